"""One linear of DiT-XL/2 in ONNX Runtime's CUDA provider, in every form that it has: microseconds.

    python benchmarks/onnxruntime_cuda.py --rows 2,16,512,4096 --json build/ort-products.json

A model of `COPIES` independent products is timed and divided by their number, so that what a call
costs the host is spread; inputs and outputs stay on the device. The forms:

    float16          MatMul of float16: what the weights would be unquantized
    nbits4, nbits8   MatMulNBits of 4 and 8 bits, blocks of 128: what `onnxruntime-cuda` writes
    nbits4/32        the same in blocks of 32, which the kernel behind fpA_intB takes
    nbits4+zeros     with zero points: asymmetric weights
    …, fpA_intB      the same with the session option ep.cuda.fpa_intb_gemm=1
    fake+float16     8-bit activations in groups of 128, quantized and restored, then float16
    int8 token       8-bit activations with a scale a token, MatMulInteger, scaled afterwards
    blocked          QuantizeLinear in blocks of 128, as `model.onnx` and `onnxruntime` have it

The last three are the plan's own activations. A form that the provider cannot run has its error in
place of a time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from rich.box import SIMPLE
from rich.table import Table

from qdit.engines.consoles import table_console
from qdit.engines.cuda_session import load_cuda_libraries
from qdit.engines.machine import describe_machine
from qdit.engines.session_settings import CUDA, providers_of
from qdit.files import write_json
from qdit.progress import Terminal

SHAPES = ((1152, 6912), (1152, 1152), (1152, 4608), (4608, 1152))  # K → N; adaLN's first
COPIES = 8
_WARM_UP, _RUNS = 3, 15
_GROUP = 128
_HALF, _FLOAT = TensorProto.FLOAT16, TensorProto.FLOAT
_FPA = {"ep.cuda.fpa_intb_gemm": "1"}

# Nodes that make 'y<i>' of 'x<i>', and their initializers.
Part = tuple[list[onnx.NodeProto], dict[str, np.ndarray]]
Make = Callable[[int, int, int, np.random.Generator], Part]


def _float16(i: int, k: int, n: int, random: np.random.Generator) -> Part:
    weight = random.standard_normal((k, n)).astype(np.float16)
    return [helper.make_node("MatMul", [f"x{i}", f"w{i}"], [f"y{i}"])], {f"w{i}": weight}


def _nbits(bits: int, block: int, *, zeros: bool = False) -> Make:
    def make(i: int, k: int, n: int, random: np.random.Generator) -> Part:
        count = k // block
        held = {
            f"w{i}": random.integers(0, 256, (n, count, block * bits // 8), dtype=np.uint8),
            f"s{i}": np.full((n, count), 2.0**-6, np.float16),
        }
        if zeros:
            held[f"z{i}"] = np.full((n, -(-count * bits // 8)), 0x77, np.uint8)
        node = helper.make_node(
            "MatMulNBits", [f"x{i}", *held], [f"y{i}"], domain="com.microsoft",
            K=k, N=n, bits=bits, block_size=block,
        )  # fmt: skip
        return [node], held

    return make


def _scale(i: int, x: str, steps: float = 127.0) -> list[onnx.NodeProto]:
    """'s<i>': the largest magnitude over the last dimension of x, over `steps`."""
    node = helper.make_node
    return [
        node("Abs", [x], [f"abs{i}"]),
        node("ReduceMax", [f"abs{i}", "last"], [f"max{i}"], keepdims=1),
        node("Div", [f"max{i}", "steps"], [f"s{i}"]),
    ]


def _fake(i: int, k: int, n: int, random: np.random.Generator) -> Part:
    node = helper.make_node
    product, held = _float16(i, k, n, random)
    product[0].input[0] = f"restored{i}"
    held |= {"grouped": np.array([0, k // _GROUP, _GROUP]), "flat": np.array([0, k])}
    held |= {"last": np.array([-1]), "steps": np.array(127, np.float16)}
    return [
        node("Reshape", [f"x{i}", "grouped"], [f"g{i}"]),
        *_scale(i, f"g{i}"),
        node("Div", [f"g{i}", f"s{i}"], [f"div{i}"]),
        node("Round", [f"div{i}"], [f"q{i}"]),
        node("Mul", [f"q{i}", f"s{i}"], [f"r{i}"]),
        node("Reshape", [f"r{i}", "flat"], [f"restored{i}"]),
        *product,
    ], held


def _int8(i: int, k: int, n: int, random: np.random.Generator) -> Part:
    node = helper.make_node
    held = {
        f"w{i}": random.integers(-127, 128, (k, n), dtype=np.int8),
        f"c{i}": np.full(n, 2.0**-6, np.float32),
        "last": np.array([-1]),
        "steps": np.array(127, np.float16),
    }
    return [
        *_scale(i, f"x{i}"),
        node("Div", [f"x{i}", f"s{i}"], [f"div{i}"]),
        node("Round", [f"div{i}"], [f"q{i}"]),
        node("Cast", [f"q{i}"], [f"i{i}"], to=TensorProto.INT8),
        node("MatMulInteger", [f"i{i}", f"w{i}"], [f"sum{i}"]),
        node("Cast", [f"sum{i}"], [f"float{i}"], to=_FLOAT),  # sums exceed what float16 holds
        node("Mul", [f"float{i}", f"c{i}"], [f"scaled{i}"]),
        node("Cast", [f"scaled{i}"], [f"half{i}"], to=_HALF),
        node("Mul", [f"half{i}", f"s{i}"], [f"y{i}"]),
    ], held


def _blocked(i: int, k: int, n: int, random: np.random.Generator) -> Part:
    node = helper.make_node
    product, held = _float16(i, k, n, random)
    product[0].input[0] = f"restored{i}"
    held |= {"grouped": np.array([0, k // _GROUP, _GROUP]), "scales": np.array([0, k // _GROUP])}
    held |= {"last": np.array([-1]), "steps": np.array(127, np.float16)}
    blocks: dict[str, Any] = {"axis": -1, "block_size": _GROUP}
    return [
        node("Reshape", [f"x{i}", "grouped"], [f"g{i}"]),
        *_scale(i, f"g{i}"),
        node("Reshape", [f"s{i}", "scales"], [f"f{i}"]),
        node(
            "QuantizeLinear", [f"x{i}", f"f{i}"], [f"q{i}"], output_dtype=TensorProto.INT8, **blocks
        ),
        node("DequantizeLinear", [f"q{i}", f"f{i}"], [f"restored{i}"], **blocks),
        *product,
    ], held


FORMS: dict[str, tuple[Make, dict[str, str]]] = {
    "float16": (_float16, {}),
    "nbits4": (_nbits(4, 128), {}),
    "nbits4/32": (_nbits(4, 32), {}),
    "nbits4/32, fpA_intB": (_nbits(4, 32), _FPA),
    "nbits4+zeros": (_nbits(4, 128, zeros=True), {}),
    "nbits8": (_nbits(8, 128), {}),
    "nbits8/32, fpA_intB": (_nbits(8, 32), _FPA),
    "fake+float16": (_fake, {}),
    "int8 token": (_int8, {}),
    "blocked": (_blocked, {}),
}


def model_of(make: Make, rows: int, k: int, n: int, copies: int = COPIES) -> bytes:
    """`copies` independent products of rows x<i> [rows, K], each with weights of its own."""
    random = np.random.default_rng(0)
    nodes: list[onnx.NodeProto] = []
    held: dict[str, np.ndarray] = {}
    for i in range(copies):
        part, initializers = make(i, k, n, random)
        nodes += part
        held |= initializers
    graph = helper.make_graph(
        nodes,
        "products",
        [helper.make_tensor_value_info(f"x{i}", _HALF, [rows, k]) for i in range(copies)],
        [helper.make_tensor_value_info(f"y{i}", _HALF, [rows, n]) for i in range(copies)],
        [numpy_helper.from_array(array, name) for name, array in held.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    made: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return made


def microseconds(
    make: Make, session_options: dict[str, str], rows: int, k: int, n: int, provider: str
) -> float:
    """Of one product, the median of several runs."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    for key, value in session_options.items():
        options.add_session_config_entry(key, value)
    session = onnxruntime.InferenceSession(
        model_of(make, rows, k, n), options, providers=providers_of(provider)
    )
    device = "cuda" if session.get_providers()[0] == CUDA else "cpu"
    x = np.random.default_rng(1).standard_normal((rows, k)).astype(np.float16)
    binding = session.io_binding()
    given = [onnxruntime.OrtValue.ortvalue_from_numpy(x, device, 0) for _ in range(COPIES)]
    for i, value in enumerate(given):
        binding.bind_ortvalue_input(f"x{i}", value)
        binding.bind_output(f"y{i}", device)
    seconds = []
    for run in range(_WARM_UP + _RUNS):
        started = time.perf_counter()
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        if run >= _WARM_UP:
            seconds.append(time.perf_counter() - started)
    return 1e6 * statistics.median(seconds) / COPIES


def measure(
    rows: Sequence[int], shapes: Sequence[tuple[int, int]], provider: str, forms: Sequence[str]
) -> list[dict[str, Any]]:
    """A record a form, shape and number of rows: 'microseconds', or 'error'."""
    found = []
    for k, n in shapes:
        for count in rows:
            for form in forms:
                record: dict[str, Any] = {"form": form, "rows": count, "k": k, "n": n}
                try:
                    record["microseconds"] = microseconds(*FORMS[form], count, k, n, provider)
                except Exception as error:  # ONNX Runtime raises kinds of its own
                    record["error"] = str(error).splitlines()[0][:300]
                found.append(record)
    return found


def _print(records: Sequence[dict[str, Any]], forms: Sequence[str]) -> None:
    table = Table("K → N", "rows", *forms, box=SIMPLE)
    cells: dict[tuple[int, int, int], dict[str, str]] = {}
    for record in records:
        key = (record["k"], record["n"], record["rows"])
        time_or_not = record.get("microseconds")
        text = "–" if time_or_not is None else f"{time_or_not:.1f}"
        cells.setdefault(key, {})[record["form"]] = text
    for (k, n, rows), row in cells.items():
        table.add_row(f"{k} → {n}", str(rows), *(row[form] for form in forms))
    table_console().print(table)
    for error in sorted({f"{r['form']}: {r['error']}" for r in records if "error" in r}):
        print(error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="2,16,512,4096")
    parser.add_argument("--shapes", default=",".join(f"{k}x{n}" for k, n in SHAPES))
    parser.add_argument("--forms", default=";".join(FORMS), help="separated by semicolons")
    parser.add_argument("--provider", default="cuda")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    forms = [form.strip() for form in asked.forms.split(";")]
    if unknown := sorted(set(forms) - set(FORMS)):
        parser.error(f"--forms must be of {'; '.join(FORMS)}, got {'; '.join(unknown)}")
    if providers_of(asked.provider)[0] == CUDA:
        load_cuda_libraries()
    rows = [int(count) for count in asked.rows.split(",")]
    shapes = [(int(k), int(n)) for k, n in (text.split("x") for text in asked.shapes.split(","))]
    records = measure(rows, shapes, asked.provider, forms)
    _print(records, forms)
    if asked.json is not None:
        write_json(asked.json, {"machine": describe_machine(), "results": records})
        with Terminal() as terminal:
            terminal.say(f"wrote {asked.json}")


if __name__ == "__main__":
    main()
