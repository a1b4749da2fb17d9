"""The kernels on a GPU, against their meaning in torch and against float64.

Outputs are poisoned: torch fills what it allocates with NaN and the largest integers, so that a
value that no kernel wrote, or one of a padding row that leaks, shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from qdit.calibrate.quantizers import quantize_weight_nearest
from qdit.calibrate.schemes import LayerScheme
from qdit.engines.kernels import product
from qdit.engines.kernels.driver import Gpu, gpu
from qdit.engines.kernels.layouts import from_panels, scale_order
from qdit.engines.kernels.measure import Product, random_operands
from qdit.engines.kernels.operands import Gate, Modulation, QuantizedRows
from qdit.engines.kernels.product import linear
from qdit.engines.kernels.reference import dequantized_rows
from qdit.engines.kernels.rows import quantize_rows
from qdit.engines.kernels.tuning import candidates
from qdit.engines.kernels.variants import Gelu, QuantizeKind, Tile, WeightOnlyKind, tile_problem
from qdit.engines.kernels.weight_only import weight_only_linear
from qdit.engines.kernels.weights import pack_weight

from .conftest import SCHEMES, Problem, make_problem, output_bound

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

HALF = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
by_name = pytest.mark.parametrize("name", SCHEMES)
by_dtype = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
# hidden widths of DiT-S, B, L and XL, and the MLPs' of S and XL
WIDTHS = (384, 768, 1024, 1152, 1536, 4608)


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh tensors hold NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def rows_of(x: Tensor, kind: QuantizeKind, modulation: Modulation | None = None) -> QuantizedRows:
    with poisoned():
        return quantize_rows(x.cuda(), kind, modulation)


def assert_same_rows(made: QuantizedRows, expected: QuantizedRows) -> None:
    """Integers, scales, zero points and sums of the rows that there are, to the bit."""
    count, width = expected.count, expected.kind.width
    order = scale_order(expected.rows)[:count]
    assert torch.equal(
        from_panels(made.values.cpu(), count, width), from_panels(expected.values, count, width)
    )
    groups = width // expected.kind.group
    assert torch.equal(made.scale.cpu()[:groups, order], expected.scale[:groups, order])
    for own, other in ((made.zero, expected.zero), (made.total, expected.total)):
        assert (own is None) == (other is None)
        if own is not None and other is not None:
            assert torch.equal(own.cpu()[:groups, order], other[:groups, order])


@by_name
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rows_are_the_simulation_s_to_the_bit(name: str, dtype: torch.dtype) -> None:
    problem = make_problem(SCHEMES[name], 301, 1152, 64, dtype=dtype)
    expected = quantize_rows(problem.x, problem.rows_kind)
    assert_same_rows(rows_of(problem.x, problem.rows_kind), expected)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("group", [32, 64, 96, 128, 192, "token"])
@pytest.mark.parametrize("count", [1, 17, 300])
def test_rows_of_every_width(width: int, group: int | str, count: int) -> None:
    size = width if group == "token" else int(group)
    if width % size:
        pytest.skip(f"{size} does not divide {width}")
    x = torch.randn(count, width, generator=torch.Generator().manual_seed(width + count)).half()
    kind = QuantizeKind(width, size)
    assert_same_rows(rows_of(x, kind), quantize_rows(x, kind))


@pytest.mark.parametrize("group", [32, 96, 128, 1152])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_extreme_rows(group: int, asymmetric: bool) -> None:
    x = torch.zeros(48, 1152).half()
    x[1, 700] = 1  # one outlier
    x[2] = 65504
    x[3] = -65504
    x[4, ::2] = 65504
    x[4, 1::2] = -65504
    x[5] = 2.0**-24  # float16's least
    x[6, 5] = -65504
    x[7] = torch.linspace(-65504, 65504, 1152)
    x[8] = torch.randn(1152, generator=torch.Generator().manual_seed(0)) * 1e-6
    kind = QuantizeKind(1152, group, asymmetric=asymmetric)
    assert_same_rows(rows_of(x, kind), quantize_rows(x, kind))


def test_every_scale_is_the_quotient_that_a_division_rounds_to() -> None:
    """The kernel divides by 127 in three multiply-adds: for every significand that float32 has."""
    bits = torch.arange(1 << 23, dtype=torch.int32, device="cuda") | 127 << 23
    largest = functional.pad(bits.view(torch.float32), (0, -(1 << 23) % 36), value=1.0)
    x = torch.zeros(largest.numel() // 36, 36, 32, device="cuda")
    x[:, :, 5] = largest.view(-1, 36)
    rows = quantize_rows(x.flatten(1), QuantizeKind(1152, 32))
    made = rows.scale[:, scale_order(rows.rows)[: rows.count].cuda()].t()
    # a tensor: a number would be divided by as a product with its rounded reciprocal
    steps = torch.full((), 127.0, device="cuda")
    assert torch.equal(made, largest.view(-1, 36) / steps)


def test_millions_of_values_round_as_their_quotients_do() -> None:
    random = torch.Generator(device="cuda").manual_seed(0)
    x = torch.randn(50_000, 1152, generator=random, device="cuda")
    rows = quantize_rows(x, QuantizeKind(1152, 128))
    groups = x.unflatten(1, (9, 128))
    scale = groups.abs().amax(2, keepdim=True) / torch.full((), 127.0, device="cuda")
    expected = (groups / scale).round().flatten(1).to(torch.int8)
    assert torch.equal(from_panels(rows.values, rows.count, 1152), expected)


def test_rows_that_lie_apart() -> None:
    wide = torch.randn(60, 3 * 1152, generator=torch.Generator().manual_seed(0)).half()
    kind = QuantizeKind(1152, 128)
    strided = wide.cuda()[:, 1152:2304]
    assert not strided.is_contiguous()
    assert_same_rows(rows_of(strided, kind), quantize_rows(wide[:, 1152:2304], kind))


def assert_within_half_a_step(rows: QuantizedRows, expected: Tensor) -> None:
    """A producer in float32 may move a value across a rounding boundary, by next to nothing."""
    group = rows.kind.group
    step = expected.unflatten(1, (-1, group)).abs().amax(2, keepdim=True) / 127
    error = (dequantized_rows(rows).cpu() - expected).unflatten(1, (-1, group)).abs()
    assert (error <= 0.5002 * step + 1e-30).all()


@by_dtype
@pytest.mark.parametrize(("width", "group"), [(384, 64), (768, 128), (1024, 1024), (1152, 128)])
def test_normalized_and_modulated_rows(width: int, group: int, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(width)
    x = (torch.randn(520, width, generator=random) * 2 + 1).to(dtype)
    both = (torch.randn(3, 6 * width, generator=random) * 0.3).to(dtype)
    shift, scale = both[:, 3 * width : 4 * width], both[:, 4 * width : 5 * width]
    on_gpu = both.cuda()
    modulation = Modulation(
        on_gpu[:, 3 * width : 4 * width], on_gpu[:, 4 * width : 5 * width], 256, 1e-6
    )
    rows = rows_of(x, QuantizeKind(width, group, normalized=True), modulation)
    wide = x.double()
    variance = wide.var(1, unbiased=False, keepdim=True)
    normal = (wide - wide.mean(1, keepdim=True)) / (variance + 1e-6).sqrt()
    by_row = [value.double().repeat_interleave(256, 0)[:520] for value in (scale, shift)]
    assert_within_half_a_step(rows, normal * (1 + by_row[0]) + by_row[1])


@by_dtype
@pytest.mark.parametrize("form", ["tanh", "exact"])
@pytest.mark.parametrize("group", [64, 128, 4608])
def test_rows_through_gelu(form: Gelu, group: int, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(3)
    x = (torch.randn(300, 4608, generator=random) * 2).to(dtype)
    rows = rows_of(x, QuantizeKind(4608, group, gelu=form))
    approximate = "tanh" if form == "tanh" else "none"
    expected = functional.gelu(x.double(), approximate=approximate)
    assert_within_half_a_step(rows, expected)


def run(problem: Problem, tile: Tile | None = None, gate: Gate | None = None) -> Tensor:
    """The product on the GPU, every buffer poisoned."""
    packed = problem.packed.to("cuda")
    rows = rows_of(problem.x, problem.rows_kind)
    bias = problem.bias.cuda()
    with poisoned():
        y = linear(rows, packed, problem.kind, bias=bias, dtype=bias.dtype, gate=gate, tile=tile)
    return y.cpu()


def assert_right(problem: Problem, y: Tensor) -> None:
    expected, magnitude = problem.expected()
    bound = output_bound(expected, magnitude, y.dtype, problem.x.shape[1])
    assert ((y.double() - expected).abs() <= bound).all()


@pytest.fixture(params=["own", "before Hopper"])
def either_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """This GPU with its own kernel, and with the one of older GPUs."""
    here = gpu(0)
    if request.param == "before Hopper":
        here = replace(here, architecture=here.architecture.rstrip("a"))
        monkeypatch.setattr(product, "gpu_of", lambda _tensor: here)
    elif not here.hopper:
        pytest.skip("there is only one kernel for this GPU")
    return here


@by_name
def test_products_of_every_scheme(name: str, either_kernel: Gpu) -> None:
    problem = make_problem(SCHEMES[name], 301, 1152, 392)
    assert_right(problem, run(problem))


@by_dtype
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("count", "channels"), [(1, 1152), (37, 72), (513, 1536)])
def test_products_of_every_width(
    width: int, bits: int, count: int, channels: int, dtype: torch.dtype, either_kernel: Gpu
) -> None:
    problem = make_problem(LayerScheme(bits, 8, 128, 128), count, width, channels, dtype=dtype)
    assert_right(problem, run(problem))


@pytest.mark.parametrize("name", ["w4 g128", "w8 g32", "w4 g128 integer token"])
def test_every_tile_gives_one_result(name: str) -> None:
    """A choice of a dozen tiles of each kind, as each is compiled for this."""
    problem = make_problem(SCHEMES[name], 517, 1152, 456)
    first = run(problem)
    assert_right(problem, first)
    tiles = list(candidates(problem.kind, gpu(0)))
    chosen = tiles[:: max(1, len(tiles) // 12)]
    chosen.append(Tile(96, 2, 4, pipelined=True))
    chosen += [replace(tile, starts=True) for tile in chosen]
    fitting = [tile for tile in chosen if tile_problem(problem.kind, tile, gpu(0)) is None]
    assert len(fitting) >= 12
    for tile in fitting:
        assert torch.equal(run(problem, tile), first), tile


@pytest.mark.parametrize(
    "name", ["w4 g128", "w8 g128", "w8 channel token", "w4 g128 integer token"]
)
@pytest.mark.parametrize("width", [128, 256, 1152, 4608])
@pytest.mark.parametrize("splits", [2, 3])
def test_warpgroups_that_share_panels(name: str, width: int, splits: int) -> None:
    """Fewer panels than parts, as many, and a number that the parts do not divide."""
    problem = make_problem(SCHEMES[name], 1037, width, 456)
    whole = run(problem, Tile(64, 1, 6))
    plain = Tile(64, splits, 6, splits=splits)
    for tile in (plain, replace(plain, tokens=32, stages=7, starts=True)):
        refused = tile_problem(problem.kind, tile, gpu(0))
        if refused is not None:
            assert splits * 128 > width or (tile.starts and not name.endswith("g128")), refused
            continue
        y = run(problem, tile)
        assert_right(problem, y)
        if problem.kind.activation_group is None:
            assert torch.equal(y, whole)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize("starts", [False, True])
def test_sums_as_large_as_they_can_be(bits: int, heavy: bool, starts: bool) -> None:
    """All weights of a group one integer: the most negative, the one above, the most positive."""
    scheme = LayerScheme(bits, 8, 128, 128)
    problem = make_problem(scheme, 32, 384, 128)
    problem.x[:16] = 1.0
    problem.x[16:] = -1.0
    problem.weight.values[:64] = -(1 << (bits - 1)) + (not heavy)
    problem.weight.values[64:] = (1 << (bits - 1)) - 1
    packed = pack_weight([problem.weight], scheme, problem.kind)
    assert packed.heavy == heavy
    assert_right(problem, run(problem, Tile(64, 2, 4, starts=starts)))


@pytest.mark.parametrize("tile", [Tile(112, 3, 3), Tile(112, 2, 6, pipelined=True)])
def test_no_panel_takes_the_scales_of_the_one_that_is_copied_over_it(tile: Tile) -> None:
    """A stage that is released while loads from it are on their way: one launch in twenty showed
    it, in a few values of some ten millions."""
    scheme = LayerScheme(8, 8, 128, 128)
    wanted = Product(scheme, 1152, 4608, 16384)
    rows, weight = random_operands(wanted, torch.device("cuda"))
    expected = linear(rows[0], weight, wanted.kind, tile=Tile(64, 2, 4))
    for _ in range(15):
        made = [linear(rows[0], weight, wanted.kind, tile=tile) for _ in range(10)]
        assert all(torch.equal(y, expected) for y in made)


def test_exact_where_float32_is() -> None:
    """Integers in, scales of powers of two: the product has no rounding to hide behind."""
    random = torch.Generator().manual_seed(0)
    x = torch.randint(-127, 128, (257, 1152), generator=random).half()
    x[:, ::64] = 127  # so that every group's scale is 1
    integers = torch.randint(-1, 2, (384, 1152), generator=random).float()
    integers[:, ::64] = 7
    scheme = LayerScheme(4, 8, 64, 64)
    weight = quantize_weight_nearest(integers * 2.0**-8, scheme)
    problem = Problem(scheme, x, weight, torch.zeros(384).half())
    expected, _ = problem.expected()
    assert torch.equal(expected, x.double() @ integers.double().t() * 2.0**-8)
    assert torch.equal(run(problem), expected.half())


def test_rows_of_extremes_go_through_the_product() -> None:
    problem = make_problem(SCHEMES["w4 g128"], 40, 1152, 128)
    problem.x[0] = 0
    problem.x[1] = 0
    problem.x[1, 300] = 60000
    problem.x[2] = 65504
    y = run(problem)
    expected, magnitude = problem.expected()
    fits = expected.abs() < 65000
    assert torch.equal(y[0], problem.bias)
    bound = output_bound(expected, magnitude, y.dtype, 1152)
    assert ((y.double() - expected).abs() <= bound)[fits].all()
    assert y.isinf()[expected.abs() > 65600].all()


@by_dtype
@pytest.mark.parametrize("name", ["w8 g128", "w4 g64", "w4 g128 integer token"])
def test_a_gated_product(name: str, dtype: torch.dtype, either_kernel: Gpu) -> None:
    problem = make_problem(SCHEMES[name], 300, 1152, 384, dtype=dtype)
    random = torch.Generator().manual_seed(5)
    residual = torch.randn(300, 384, generator=random).to(dtype)
    factors = torch.randn(3, 3 * 384, generator=random).to(dtype)
    gate = Gate(residual.cuda(), factors.cuda()[:, 384:768], 128)
    y = run(problem, gate=gate)
    plain = run(problem).double()
    by_row = factors[:, 384:768].double().repeat_interleave(128, 0)[:300]
    expected = residual.double() + by_row * plain
    magnitude = residual.double().abs() + (by_row * plain).abs()
    assert ((y.double() - expected).abs() <= 1.01 * HALF[dtype] * magnitude + 1e-7).all()


@by_dtype
@pytest.mark.parametrize("bits", [3, 4, 6, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("count", [1, 5, 16, 70])
def test_a_weight_only_product(bits: int, symmetric: bool, count: int, dtype: torch.dtype) -> None:
    scheme = LayerScheme(bits, 16, 128, weight_symmetric=symmetric)
    random = torch.Generator().manual_seed(count)
    x = torch.randn(count, 1152, generator=random).to(dtype)
    weight = quantize_weight_nearest(torch.randn(6912, 1152, generator=random) * 0.05, scheme)
    bias = torch.randn(6912, generator=random).to(dtype)
    packed = pack_weight([weight], scheme).to("cuda")
    with poisoned():
        y = weight_only_linear(x.cuda(), packed, WeightOnlyKind.of(scheme, 1152), bias.cuda())
    dequantized = weight.dequantize(torch.float64)
    expected = x.double() @ dequantized.t() + bias.double()
    magnitude = x.double().abs() @ dequantized.abs().t() + bias.double().abs()
    bound = 1.01 * HALF[dtype] * expected.abs() + magnitude * 2.0**-24 * 40 + 1e-7
    assert ((y.cpu().double() - expected).abs() <= bound).all()


def test_products_under_a_graph_and_on_a_side_stream() -> None:
    problem = make_problem(SCHEMES["w4 g128"], 300, 1152, 384)
    packed, x, bias = problem.packed.to("cuda"), problem.x.cuda(), problem.bias.cuda()
    eager = run(problem)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        aside = linear(quantize_rows(x, problem.rows_kind), packed, problem.kind)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows = quantize_rows(x, problem.rows_kind)
        captured = linear(rows, packed, problem.kind, bias=bias)
    x.zero_()
    x.copy_(problem.x)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured.cpu(), eager)
    without = linear(rows_of(problem.x, problem.rows_kind), packed, problem.kind)
    assert torch.equal(aside, without)
