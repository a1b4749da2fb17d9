"""One grouped linear of DiT-XL/2 on a CPU: ours, MatMulNBits and float32 MatMul, milliseconds.

    python benchmarks/cpu_products.py --rows 256,2048 --threads 1,2 --json build/cpu-products.json

Each form is a model of one linear in ONNX Runtime, from float32 rows to float32 rows:

    float32       MatMul
    nbits         what `onnxruntime/model.onnx` holds: quantization of the rows in groups as the
                  target writes it, and MatMulNBits at accuracy level 4
    ours          the same model with qdit.cpu::GroupwiseMatMul swapped in, which quantizes the rows

The forms take turns; the median of each is given, and the speed of ours against both. Random
weights and rows: no time depends on them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from rich.box import SIMPLE
from rich.table import Table

from qdit.engines.consoles import table_console
from qdit.engines.cpu_kernels.build import build_library
from qdit.engines.cpu_kernels.machine import library_units, machine_obstacle
from qdit.engines.cpu_kernels.swap import swap_products
from qdit.engines.machine import describe_machine
from qdit.export.emit import Emitter
from qdit.export.onnxruntime.rows import emit_restored_groups
from qdit.files import write_json

SHAPES = ((1152, 1152), (1152, 4608), (4608, 1152))  # K → N
_ROUNDS, _WARM_UP = 9, 2
_OPSETS = {"": 21, "com.microsoft": 1}


def float_model(k: int, n: int, random: np.random.Generator) -> onnx.ModelProto:
    """x [rows, K] → y = x W."""
    weight = random.standard_normal((k, n)).astype(np.float32)
    return _model([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": weight}, k, n)


def nbits_model(
    k: int, n: int, bits: int, group: int, random: np.random.Generator
) -> onnx.ModelProto:
    """x [rows, K] → y = Q(x) Ŵ as the target writes it: rows quantized, then MatMulNBits."""
    count = k // group
    held = {
        "w": random.integers(0, 256, (n, count, group * bits // 8), dtype=np.uint8),
        "s": np.full((n, count), 2.0**-6, np.float32),
        "z": np.full((n, -(-count * bits // 8)), 0x88 if bits == 4 else 128, np.uint8),
    }
    product = helper.make_node(
        "MatMulNBits", ["rows", *held], ["y"], domain="com.microsoft",
        K=k, N=n, bits=bits, block_size=group, accuracy_level=4,
    )  # fmt: skip
    quantized = _quantization(k, group)
    model = _model([*quantized.node, product], held, k, n)
    model.graph.initializer.extend(quantized.initializer)
    return model


def _quantization(k: int, group: int) -> onnx.GraphProto:
    """x → 'rows', by the target's own lowering."""
    x = ir.Value(name="x", shape=ir.Shape(["rows", k]), type=ir.TensorType(ir.DataType.FLOAT))
    graph = ir.Graph([x], [], nodes=[], opset_imports=_OPSETS)
    emit = Emitter(graph)
    emit.anchor = ir.node("Identity", [x])
    graph.append(emit.anchor)
    rows = emit_restored_groups(emit, x, group, "x")
    rows.name = "rows"
    graph.remove(emit.anchor, safe=True)
    graph.outputs.append(rows)
    return ir.to_proto(ir.Model(graph, ir_version=10)).graph


def _model(
    nodes: Sequence[onnx.NodeProto], held: dict[str, np.ndarray], k: int, n: int
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", n])],
        [numpy_helper.from_array(array, name) for name, array in held.items()],
    )
    opsets = [helper.make_opsetid(*entry) for entry in _OPSETS.items()]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def _session(model: onnx.ModelProto, threads: int, library: Path | None = None) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if library is not None:
        if swap_products(model) != 1:
            raise SystemExit("the model's product was not swapped: the lowering has changed")
        options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _milliseconds(sessions: dict[str, Any], x: np.ndarray) -> dict[str, float]:
    """The median of each session's runs, which take turns."""
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for round_ in range(_WARM_UP + _ROUNDS):
        for name, session in sessions.items():
            began = time.perf_counter()
            session.run(None, {"x": x})
            if round_ >= _WARM_UP:
                times[name].append(1e3 * (time.perf_counter() - began))
    return {name: statistics.median(own) for name, own in times.items()}


def measure(
    rows: Sequence[int], threads: Sequence[int], bits: int, group: int, library: Path
) -> list[dict[str, Any]]:
    """One entry for each number of threads, of rows and each shape."""
    found = []
    for count in threads:
        for k, n in SHAPES:
            random = np.random.default_rng(0)
            grouped = nbits_model(k, n, bits, group, random)
            sessions = {
                "float32": _session(float_model(k, n, random), count),
                "nbits": _session(grouped, count),
                "ours": _session(grouped, count, library),
            }
            for m in rows:
                x = random.standard_normal((m, k)).astype(np.float32)
                times = _milliseconds(sessions, x)
                found.append({"threads": count, "rows": m, "k": k, "n": n, **times})
    return found


def _table(found: Sequence[dict[str, Any]], title: str) -> Table:
    table = Table(title=title, box=SIMPLE)
    for column in ("threads", "rows", "K → N", "float32", "nbits", "ours", "× float32", "× nbits"):
        table.add_column(column, justify="right")
    for entry in found:
        times = [entry[name] for name in ("float32", "nbits", "ours")]
        table.add_row(
            str(entry["threads"]),
            str(entry["rows"]),
            f"{entry['k']} → {entry['n']}",
            *(f"{value:.2f}" for value in times),
            *(f"{value / times[2]:.2f}" for value in times[:2]),
        )
    return table


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=_numbers, default=[256, 2048])
    parser.add_argument("--threads", type=_numbers, default=[1, 2])
    parser.add_argument("--bits", type=int, choices=(4, 8), default=4)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if why := machine_obstacle():
        raise SystemExit(f"there are no products of ours here: {why}")
    library = build_library()
    found = measure(given.rows, given.threads, given.bits, given.group, library)
    title = f"w{given.bits}a8 g{given.group}, ours by {library_units(library)}, ms"
    table_console().print(_table(found, title))
    if given.json:
        machine = describe_machine()
        write_json(given.json, {"machine": machine, "units": library_units(library), "rows": found})


if __name__ == "__main__":
    main()
