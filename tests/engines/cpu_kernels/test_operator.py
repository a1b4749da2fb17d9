"""qdit.cpu::GroupwiseMatMul against float64, the simulation and MatMulNBits."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import helper

from qdit.calibrate.quantizers import fake_quantize_activation
from qdit.calibrate.schemes import LayerScheme

from .conftest import (
    Array,
    Linear,
    model_of,
    random_linear,
    random_rows,
    run_linear,
    session_of,
)

# Half of float32's step at 1: what one rounding changes at most, relatively.
_ROUNDING = 2.0**-24
# (K, N, group, bits, zero points, bias): every group with both widths; N that no tile divides, odd
# numbers of groups, whose last zero point has half a byte to itself.
CASES = [
    (32, 1, 32, 4, False, False),
    (96, 17, 32, 4, True, True),
    (192, 64, 64, 4, False, True),
    (320, 33, 64, 8, True, False),
    (384, 100, 128, 4, True, True),
    (1152, 72, 128, 8, False, True),
    (256, 31, 256, 4, True, False),
    (768, 129, 256, 8, True, True),
    (480, 48, 96, 4, True, True),  # a multiple of 32 that is no power of two
]
ROWS = [1, 2, 17, 256]


def _id(case: tuple[int, int, int, int, bool, bool]) -> str:
    k, n, group, bits, zero_points, bias = case
    return f"{k}x{n} g{group} w{bits}{' z' if zero_points else ''}{' bias' if bias else ''}"


@pytest.fixture(scope="module", params=CASES, ids=_id)
def linear(request: pytest.FixtureRequest) -> Linear:
    k, n, group, bits, zero_points, bias = request.param
    return random_linear(k, n, group, bits, zero_points=zero_points, bias=bias)


class TestNumbers:
    @pytest.mark.parametrize("rows", ROWS)
    def test_equal_float64_but_for_the_roundings_of_the_sum(
        self, rows: int, linear: Linear, library: Path
    ) -> None:
        """Integer sums are exact. Each group's product has two roundings (s_x s_w, times the sum)
        and is added once, the bias too: so many relative roundings of what is added up."""
        x = random_rows(rows, linear.sizes["K"])
        terms = linear.terms(x)
        made = run_linear(linear, x, library)
        bound = (terms.shape[2] + 2) * _ROUNDING * np.abs(terms).sum(axis=2)
        np.testing.assert_array_less(np.abs(made - terms.sum(axis=2)), bound + 1e-30)

    def test_equal_the_simulation(self, linear: Linear, library: Path) -> None:
        x = random_rows(64, linear.sizes["K"])
        scheme = LayerScheme(8, 8, "channel", linear.group)
        given = fake_quantize_activation(torch.from_numpy(x), scheme)
        bias = None if linear.bias is None else torch.from_numpy(linear.bias)
        weight = torch.from_numpy(linear.weight()).float()
        wanted = torch.nn.functional.linear(given, weight, bias).numpy()
        assert _relative(run_linear(linear, x, library), wanted) <= 1e-6

    def test_equal_matmulnbits(self, linear: Linear, library: Path) -> None:
        if linear.group == 96:
            pytest.skip("MatMulNBits has blocks that are powers of two")
        x = random_rows(64, linear.sizes["K"])
        (wanted,) = session_of(model_of(linear, "MatMulNBits"), None).run(None, {"A": x})
        assert _relative(run_linear(linear, x, library), wanted) <= 1e-6

    def test_integers_round_to_the_even_neighbour(self, library: Path) -> None:
        """127 in each group makes its scale 1, and powers of two keep every sum exact:
        0.5, 1.5, 2.5, -0.5, -1.5, -2.5 → 0, 2, 2, -0, -2, -2."""
        linear = replace(
            random_linear(64, 19, 32, 4, zero_points=True, bias=False),
            scale=np.full((19, 2), 0.25, np.float32),
        )
        x = np.zeros((1, 64), np.float32)
        x[0, [0, 63]] = 127, -127
        x[0, 1:7] = 0.5, 1.5, 2.5, -0.5, -1.5, -2.5
        q = np.zeros(64)
        q[[0, 63]] = 127, -127
        q[1:7] = 0, 2, 2, 0, -2, -2
        np.testing.assert_array_equal(run_linear(linear, x, library)[0], linear.weight() @ q)

    def test_a_case_worked_out_by_hand(self, library: Path) -> None:
        """K = 32, 4 bits: u = 9, 1, 8, 8, … and z = 8 → 1, -7, 0, …, the bytes 0x19, 0x88, …;
        x = 254, 2, 0, … → s_x = 2, q = 127, 1, 0, …; (127 - 7) · 2 · 0.5 + 3 = 123."""
        values = np.full((1, 32), 8, np.uint8)
        values[0, :2] = 9, 1
        linear = Linear(
            values, np.array([[0.5]], np.float32), None, np.array([3], np.float32), 32, 4
        )
        assert linear.constants()["B"].tobytes() == b"\x19" + b"\x88" * 15
        x = np.zeros((1, 32), np.float32)
        x[0, :2] = 254, 2
        assert run_linear(linear, x, library).tolist() == [[123]]

    @pytest.mark.parametrize("outputs", [4000, 4001])  # rows that begin with a line, and not
    def test_more_outputs_than_caches_hold_and_more_rows_than_a_job(
        self, outputs: int, library: Path
    ) -> None:
        linear = random_linear(32, outputs, 32, 8, zero_points=True, bias=True)
        x = random_rows(1100, 32)
        made = run_linear(linear, x, library)
        for rows in (slice(0, 5), slice(760, 780), slice(1090, 1100)):
            wanted = linear.terms(x[rows]).sum(axis=2)
            assert _relative(made[rows], wanted) <= 1e-6
        assert np.isfinite(made).all()

    def test_what_is_no_number_shows_in_its_row_alone(self, library: Path) -> None:
        """Zeros around it too: a largest magnitude that forgets it would hide it."""
        linear = random_linear(128, 70, 32, 4, zero_points=True, bias=True)
        x = random_rows(20, 128)
        wanted = run_linear(linear, x, library)
        for row, value in ((3, np.nan), (17, np.inf), (18, -np.inf)):
            x[row, 40] = value
        made = run_linear(linear, x, library)
        finite = np.isfinite(made)
        assert not finite[[3, 17, 18]].any()
        others = [row for row in range(20) if row not in (3, 17, 18)]
        np.testing.assert_array_equal(made[others], wanted[others])

    def test_zeros_and_what_is_below_the_least_scale(self, library: Path) -> None:
        """s_x is 2^-24 at least: 2^-25 is half of it and rounds to 0, 2^-23 is 2."""
        linear = random_linear(64, 5, 32, 8, zero_points=True, bias=True)
        x = np.zeros((3, 64), np.float32)
        x[1, 0], x[2, 0] = 2.0**-25, 2.0**-23
        made = run_linear(linear, x, library)
        np.testing.assert_array_equal(made[:2], np.stack([linear.bias] * 2))
        wanted = linear.terms(x)[2].sum(axis=1)
        np.testing.assert_allclose(made[2], wanted, rtol=4 * _ROUNDING)

    def test_the_extremes_of_every_integer(self, library: Path) -> None:
        """±127 against 0 … 255 with zero points 0 and 255: the largest sums there are."""
        for bits, zero in [(4, 0), (4, 15), (8, 0), (8, 255)]:
            top = (1 << bits) - 1
            values = np.full((3, 512), top - zero, np.uint8)
            linear = Linear(
                values,
                np.ones((3, 2), np.float32),
                np.full((3, 2), zero, np.uint8),
                None,
                256,
                bits,
            )
            x = np.full((2, 512), 127, np.float32)
            x[1] = -127
            expected = 512 * 127 * (top - 2 * zero)
            assert run_linear(linear, x, library).tolist() == [[expected] * 3, [-expected] * 3]


class TestCalls:
    @pytest.mark.parametrize(
        "leading", [(), (1,), (0,), (3, 0), (2, 3), (2, 1, 3)], ids=lambda shape: str(list(shape))
    )
    def test_leading_dimensions_stay(self, leading: tuple[int, ...], library: Path) -> None:
        linear = random_linear(64, 9, 32, 4, zero_points=True, bias=True)
        flat = random_rows(int(np.prod(leading)), 64)
        names = tuple(f"d{i}" for i in range(len(leading)))
        session = session_of(model_of(linear, leading=names), library)
        (made,) = session.run(None, {"A": flat.reshape(*leading, 64)})
        assert made.shape == (*leading, 9)
        np.testing.assert_array_equal(made.reshape(-1, 9), run_linear(linear, flat, library))

    def test_threads_change_no_bit(self, linear: Linear, library: Path) -> None:
        x = random_rows(37, linear.sizes["K"])
        np.testing.assert_array_equal(
            run_linear(linear, x, library, threads=1), run_linear(linear, x, library, threads=2)
        )

    def test_rows_do_not_depend_on_one_another(self, linear: Linear, library: Path) -> None:
        x = random_rows(23, linear.sizes["K"])
        whole = run_linear(linear, x, library)
        session = session_of(model_of(linear), library)
        alone = np.concatenate([session.run(None, {"A": x[i : i + 1]})[0] for i in range(23)])
        np.testing.assert_array_equal(whole, alone)

    def test_calls_of_one_session_may_overlap(self, library: Path) -> None:
        linear = random_linear(256, 65, 64, 4, zero_points=True, bias=True)
        session = session_of(model_of(linear), library)
        inputs = [random_rows(rows, 256, seed=rows) for rows in (1, 7, 40, 90)] * 4
        wanted = [run_linear(linear, x, library, threads=1) for x in inputs]

        def run(x: Array) -> Array:
            (made,) = session.run(None, {"A": x})
            return np.array(made)

        with ThreadPoolExecutor(4) as pool:
            for made, expected in zip(pool.map(run, inputs), wanted, strict=True):
                np.testing.assert_array_equal(made, expected)

    def test_sessions_come_and_go(self, library: Path) -> None:
        """The operator's domain outlives each of them."""
        linear = random_linear(32, 3, 32, 4, zero_points=False, bias=False)
        x = random_rows(2, 32)
        wanted = run_linear(linear, x, library)
        for _ in range(5):
            np.testing.assert_array_equal(run_linear(linear, x, library), wanted)


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"block_size": 48}, "block_size must be a multiple of 32 that divides K = 96, got 48"),
            ({"block_size": 64}, "block_size must be a multiple of 32 that divides K = 96, got 64"),
            ({"block_size": 0}, "block_size must be a multiple of 32 that divides K = 96, got 0"),
            ({"bits": 2}, "bits must be 4 or 8, got 2"),
            ({"N": 0}, "K and N must lie between 1 and 2.28, got 96 and 0"),
            ({"K": -32}, "K and N must lie between 1 and 2.28, got -32 and 5"),
            ({"N": 6}, "B must have 288 values, got 240"),
            ({"bits": 8}, "B must have 480 values, got 240"),
        ],
    )
    def test_attributes(self, changes: dict[str, int], message: str, plain_library: Path) -> None:
        linear = random_linear(96, 5, 32, 4, zero_points=False, bias=False)
        with pytest.raises(Exception, match=message):
            session_of(model_of(linear, **changes), plain_library)

    @pytest.mark.parametrize(("name", "wanted"), [("scale", 15), ("zero_point", 10), ("bias", 5)])
    def test_sizes_of_constants(self, name: str, wanted: int, plain_library: Path) -> None:
        """K = 96 in groups of 32, N = 5: 15 scales, 5 · 2 bytes of zero points, 5 biases."""
        linear = random_linear(96, 5, 32, 4, zero_points=True, bias=True)
        array = getattr(linear, name)
        longer = np.concatenate([array, array[:1]])
        found = 18 if name == "scale" else 12 if name == "zero_point" else 6
        with pytest.raises(Exception, match=rf"{name}s? must have {wanted} values, got {found}"):
            session_of(model_of(replace(linear, **{name: longer})), plain_library)

    @pytest.mark.parametrize("name", ["B", "scales", "zero_points", "bias"])
    def test_what_the_graph_computes(self, name: str, plain_library: Path) -> None:
        linear = random_linear(64, 4, 32, 8, zero_points=True, bias=True)
        model = model_of(linear)
        (constant,) = (one for one in model.graph.initializer if one.name == name)
        shape = list(constant.dims)
        model.graph.input.append(helper.make_tensor_value_info(name, constant.data_type, shape))
        model.graph.initializer.remove(constant)
        with pytest.raises(Exception, match=f"{name} must be an initializer, got a value that"):
            session_of(model, plain_library)

    def test_a_missing_attribute(self, plain_library: Path) -> None:
        model = model_of(random_linear(64, 4, 32, 8, zero_points=False, bias=False))
        node = model.graph.node[0]
        node.attribute.remove(next(entry for entry in node.attribute if entry.name == "bits"))
        with pytest.raises(Exception, match="bits"):
            session_of(model, plain_library)

    @pytest.mark.parametrize(
        ("shape", "message"),
        [
            ((3, 65), "the last dimension of A must be 64, got 65"),
            ((1,) * 16 + (64,), "A must have 1 to 16 dimensions, got 17"),
        ],
    )
    def test_shapes_of_rows(
        self, shape: tuple[int, ...], message: str, plain_library: Path
    ) -> None:
        linear = random_linear(64, 4, 32, 4, zero_points=False, bias=False)
        names = tuple(f"d{i}" for i in range(len(shape) - 1))
        session = session_of(model_of(linear, leading=names), plain_library)
        with pytest.raises(Exception, match=message):
            session.run(None, {"A": np.ones(shape, np.float32)})


def _relative(made: Array, wanted: Array) -> float:
    wide = wanted.astype(np.float64)
    return float(np.linalg.norm(made - wide) / np.linalg.norm(wide))
