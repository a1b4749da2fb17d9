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
    so its text depends on the tile (PTX ISA, 'wgmma.mma_async').
    """
    count = tokens // 2
    return "#pragma once\n" + "".join(
        _wgmma_function(name, parameters, operands, operand, count, tokens)
        for name, parameters, operands, operand in (
            ("wgmma_shared", "uint64 a", ['"l"(a)'], f"%{count}"),
            (
                "wgmma_registers",
                "const uint32 (&a)[4]",
                [f'"r"(a[{i}])' for i in range(4)],
                "{" + ", ".join(f"%{count + i}" for i in range(4)) + "}",
            ),
        )
    )


def _wgmma_function(
    name: str, parameters: str, operands: list[str], operand: str, count: int, tokens: int
) -> str:
    registers = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+r"(d[{i}])' for i in range(count))
    descriptor, keep = count + len(operands), count + len(operands) + 1
    inputs = ", ".join([*operands, '"l"(b)', '"r"(accumulate)'])
    return f"""
__device__ __forceinline__ void {name}(
    int (&d)[{count}], {parameters}, uint64 b, int accumulate) {{
    asm volatile(
        "{{\\n.reg .pred keep;\\nsetp.ne.b32 keep, %{keep}, 0;\\n"
        "wgmma.mma_async.sync.aligned.m64n{tokens}k32.s32.s8.s8 "
        "{{{registers}}}, {operand}, %{descriptor}, keep;\\n}}"
        : {outputs}
        : {inputs});
}}
"""
