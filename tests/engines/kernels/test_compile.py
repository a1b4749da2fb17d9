"""Every kernel compiles ahead of time, without a GPU, to the matrix instructions it is for."""

from __future__ import annotations

import builtins
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from qdit.calibrate.schemes import LayerScheme
from qdit.engines.kernels import compile as compiling
from qdit.engines.kernels.compile import compile_kernel
from qdit.engines.kernels.tuning import candidates
from qdit.engines.kernels.variants import (
    LinearKind,
    QuantizeKind,
    Tile,
    WeightOnlyKind,
    linear_defines,
    tile_problem,
)
from qdit.engines.machine import usable_cores
from qdit.errors import InputError, StepError

from .conftest import SCHEMES

WIDTH = 1152


@dataclass(frozen=True)
class Limits:
    """A GPU's, without the GPU (CUDA programming guide, 'Technical Specifications')."""

    hopper: bool
    shared_bytes: int


HOPPER = Limits(True, 227 << 10)
AMPERE = Limits(False, 163 << 10)
ADA = Limits(False, 99 << 10)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QDIT_CACHE", str(tmp_path))
    return tmp_path


def first_tile(kind: LinearKind, limits: Limits) -> Tile:
    return next(tile for tile in candidates(kind, limits) if tile.tokens == 64)


def linear_ptx(name: str, architecture: str, limits: Limits, **options: Any) -> str:
    kind = LinearKind.of(SCHEMES[name], WIDTH)
    tile = options.pop("tile", None) or first_tile(kind, limits)
    gated, bfloat16 = options.pop("gated", False), options.pop("bfloat16", False)
    defines = linear_defines(kind, tile, hopper=limits.hopper, gated=gated, bfloat16=bfloat16)
    file = "linear_sm90.cu" if limits.hopper else "linear_sm80.cu"
    return compile_kernel(file, defines, architecture, "ptx").decode()


@pytest.mark.parametrize("name", SCHEMES)
def test_hopper_s_product_is_made_of_integer_warpgroup_instructions(name: str) -> None:
    ptx = linear_ptx(name, "sm_90a", HOPPER)
    assert "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8" in ptx
    assert "cp.async.bulk.shared::cluster.global" in ptx
    assert ".target sm_90a" in ptx


@pytest.mark.parametrize(
    ("architecture", "limits"), [("sm_80", AMPERE), ("sm_89", ADA), ("sm_90", AMPERE)]
)
@pytest.mark.parametrize("name", SCHEMES)
def test_every_other_product_is_made_of_integer_warp_instructions(
    name: str, architecture: str, limits: Limits
) -> None:
    ptx = linear_ptx(name, architecture, limits)
    assert "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32" in ptx
    assert f".target {architecture}" in ptx


def test_weights_of_4_bits_are_the_register_operand() -> None:
    # the register form names four registers in braces where the other has a descriptor
    from_registers = linear_ptx("w4 g128", "sm_90a", HOPPER)
    from_shared = linear_ptx("w8 g128", "sm_90a", HOPPER)
    call = "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8"
    operands = [
        ptx.split(call)[1].split(";")[0].count("{") for ptx in (from_registers, from_shared)
    ]
    assert operands == [2, 1]


@pytest.mark.parametrize("name", ["w8 g128", "w8 g96"])
def test_sums_start_from_a_product_of_constants_where_the_tile_says_so(name: str) -> None:
    plain = first_tile(LinearKind.of(SCHEMES[name], WIDTH), HOPPER)
    starting = linear_ptx(name, "sm_90a", HOPPER, tile=replace(plain, starts=True))
    constant = "wgmma.mma_async.sync.aligned.m64n64k32.s32.u8.u8"
    assert constant in starting
    assert constant not in linear_ptx(name, "sm_90a", HOPPER, tile=plain)


@pytest.mark.parametrize(
    ("name", "tile"),
    [
        ("w4 g128", Tile(112, 3, 5, starts=True)),
        ("w8 g128", Tile(128, 2, 5, pipelined=True, starts=True)),
        ("w8 g128", Tile(80, 2, 8, splits=2)),
        ("w4 g128", Tile(80, 2, 7, splits=2, starts=True)),
        ("w4 g128 integer token", Tile(80, 3, 9, splits=3)),
        ("w8 channel token", Tile(80, 2, 8, splits=2)),
    ],
    ids=str,
)
def test_machine_code_of_tiles_that_start_or_share(name: str, tile: Tile) -> None:
    kind = LinearKind.of(SCHEMES[name], WIDTH)
    assert tile_problem(kind, tile, HOPPER) is None
    defines = linear_defines(kind, tile, hopper=True, gated=False, bfloat16=False)
    assert compile_kernel("linear_sm90.cu", defines, "sm_90a").startswith(b"\x7fELF")


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("bfloat16", [False, True], ids=["float16", "bfloat16"])
@pytest.mark.parametrize(
    ("architecture", "limits"), [("sm_90a", HOPPER), ("sm_80", AMPERE), ("sm_89", ADA)]
)
def test_machine_code_of_both_outputs(
    architecture: str, limits: Limits, bfloat16: bool, gated: bool
) -> None:
    kind = LinearKind.of(SCHEMES["w4 g128"], WIDTH)
    defines = linear_defines(
        kind, first_tile(kind, limits), hopper=limits.hopper, gated=gated, bfloat16=bfloat16
    )
    file = "linear_sm90.cu" if limits.hopper else "linear_sm80.cu"
    assert compile_kernel(file, defines, architecture).startswith(b"\x7fELF")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["w8 g128", "w4 g128", "w4 g128 integer token"])
def test_every_tile_that_is_said_to_fit_compiles(name: str) -> None:
    kind = LinearKind.of(SCHEMES[name], WIDTH)
    tiles = list(candidates(kind, HOPPER))
    assert len(tiles) > 10

    def compile_one(tile: Tile) -> bytes:
        defines = linear_defines(kind, tile, hopper=True, gated=True, bfloat16=False)
        return compile_kernel("linear_sm90.cu", defines, "sm_90a", cache=False)

    with ThreadPoolExecutor(usable_cores()) as pool:  # NVRTC compiles on every core
        assert all(code.startswith(b"\x7fELF") for code in pool.map(compile_one, tiles))


QUANTIZERS = {
    "g32": QuantizeKind(WIDTH, 32),
    "g128": QuantizeKind(WIDTH, 128),
    "g96": QuantizeKind(WIDTH, 96),
    "g288": QuantizeKind(WIDTH, 288),
    "token": QuantizeKind(WIDTH, WIDTH),
    "token of four warps": QuantizeKind(4608, 4608),
    "asymmetric with sums": QuantizeKind(WIDTH, 64, asymmetric=True, sum_group=32),
    "normalized": QuantizeKind(WIDTH, 128, normalized=True),
    "gelu": QuantizeKind(4608, 128, gelu="tanh"),
    "exact gelu": QuantizeKind(4608, 4608, gelu="exact"),
    "not whole panels": QuantizeKind(192, 64),
}


@pytest.mark.parametrize("architecture", ["sm_80", "sm_89", "sm_90"])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_every_quantizer_compiles(name: str, architecture: str) -> None:
    for dtype in ("float16", "bfloat16", "float32"):
        if QUANTIZERS[name].normalized and dtype == "float32":
            continue
        code = compile_kernel("quantize.cu", QUANTIZERS[name].defines(dtype), architecture)
        assert code.startswith(b"\x7fELF")


@pytest.mark.parametrize("architecture", ["sm_80", "sm_89", "sm_90"])
@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (8, True), (8, False)])
def test_the_weight_only_product_uses_the_float_matrix_unit(
    bits: int, symmetric: bool, architecture: str
) -> None:
    scheme = LayerScheme(bits, 16, 128, weight_symmetric=symmetric)
    kind = WeightOnlyKind.of(scheme, WIDTH)
    for bfloat16, letters in ((False, "f16.f16"), (True, "bf16.bf16")):
        defines = kind.defines(16, bfloat16)
        ptx = compile_kernel("weight_only.cu", defines, architecture, "ptx").decode()
        assert f"mma.sync.aligned.m16n8k16.row.col.f32.{letters}.f32" in ptx


def test_compiled_code_is_kept_and_taken_from_the_cache(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    defines = QUANTIZERS["g128"].defines("float16")
    code = compile_kernel("quantize.cu", defines, "sm_90")
    (kept,) = (own_cache / "kernels").iterdir()
    assert kept.read_bytes() == code
    monkeypatch.setattr(compiling, "_compile", lambda *_: pytest.fail("compiled again"))
    assert compile_kernel("quantize.cu", defines, "sm_90") == code


def test_another_variant_and_another_source_are_other_files(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    defines = QUANTIZERS["g128"].defines("float16")
    compile_kernel("quantize.cu", defines, "sm_90")
    compile_kernel("quantize.cu", defines | {"QDIT_GROUP": 64}, "sm_90")
    text = compiling.source("quantize.cu")
    monkeypatch.setattr(compiling, "source", lambda _name: text + "\n// changed\n")
    compile_kernel("quantize.cu", defines, "sm_90")
    assert len(list((own_cache / "kernels").iterdir())) == 3


def test_a_variant_that_does_not_compile_says_what_the_compiler_said() -> None:
    defines = QUANTIZERS["g128"].defines("float16") | {"QDIT_SPAN": 2}  # 2 does not divide 9
    with pytest.raises(StepError, match=r"quantize.cu does not compile .* static assertion failed"):
        compile_kernel("quantize.cu", defines, "sm_90")


def test_a_machine_without_nvrtc_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("cuda"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"lacks cuda-bindings; install .*qdit\[gpu\]"):
        compile_kernel("quantize.cu", QUANTIZERS["g128"].defines("float16"), "sm_90")
