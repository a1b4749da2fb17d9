"""The kernels' CUDA C++ sources, and the one header that is made by rule."""

from __future__ import annotations

from functools import cache
from pathlib import Path

_FOLDER = Path(__file__).parent / "cuda"


@cache
def source(name: str) -> str:
    """The text of a kernel, 'linear_sm90.cu'."""
    return (_FOLDER / name).read_text(encoding="utf-8")


@cache
def headers() -> dict[str, str]:
    """Every header by the name that the kernels include it by."""
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(_FOLDER.glob("*.cuh"))}


@cache
def wgmma_header(tokens: int) -> str:
    """`wgmma.cuh` for tiles of so many tokens, a multiple of 8 up to 256.

    Hopper's matrix instruction names each accumulator register of a thread, `tokens` / 2 of them,
    so its text depends on the tile (PTX ISA, 'wgmma.mma_async'). Descriptors are given by their
    lower word; the upper one is always `kDescriptorHigh` (`ptx.cuh`).
    """
    count = tokens // 2
    shared = _wgmma_function("wgmma_shared", "uint32 a", ['"r"(a)'], tokens, shared=True)
    operands = [f'"r"(a[{i}])' for i in range(4)]
    registers = _wgmma_function(
        "wgmma_registers", "const uint32 (&a)[4]", operands, tokens, shared=False
    )
    start = _wgmma_function(
        "wgmma_start", "uint32 a", ['"r"(a)'], tokens, shared=True, types="u8.u8", high="kStartHigh"
    )
    return f"#pragma once\n// {count} accumulators a thread\n{shared}{registers}{start}"


def _wgmma_function(
    name: str,
    parameter: str,
    operands: list[str],
    tokens: int,
    *,
    shared: bool,
    types: str = "s8.s8",
    high: str = "kDescriptorHigh",
) -> str:
    count = tokens // 2
    registers = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+r"(d[{i}])' for i in range(count))
    input_word, upper, keep = (count + len(operands) + i for i in range(3))
    first = "first" if shared else "{" + ", ".join(f"%{count + i}" for i in range(4)) + "}"
    made = f"mov.b64 first, {{%{count}, %{upper}}};\\n" if shared else ""
    inputs = ", ".join([*operands, '"r"(b)', f'"n"({high})', '"r"(accumulate)'])
    return f"""
__device__ __forceinline__ void {name}(
    int (&d)[{count}], {parameter}, uint32 b, int accumulate) {{
    asm volatile(
        "{{\\n.reg .pred keep;\\n.reg .b64 first, second;\\n"
        "setp.ne.b32 keep, %{keep}, 0;\\n{made}mov.b64 second, {{%{input_word}, %{upper}}};\\n"
        "wgmma.mma_async.sync.aligned.m64n{tokens}k32.s32.{types} "
        "{{{registers}}}, {first}, second, keep;\\n}}"
        : {outputs}
        : {inputs});
}}
"""
