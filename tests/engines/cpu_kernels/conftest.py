"""Linears as the tests of the operator make them, and the sessions that run them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from qdit.calibrate.integers import MIN_SCALE
from qdit.calibrate.quantizers import quantize_activation
from qdit.calibrate.schemes import LayerScheme
from qdit.engines.cpu_kernels.build import Products, build_library
from qdit.engines.cpu_kernels.machine import library_units, machine_obstacle
from qdit.engines.cpu_kernels.swap import DOMAIN, OPERATOR

Array = NDArray[Any]


@dataclass(frozen=True)
class Linear:
    """Weights u [N, K] in groups, scales [N, K/g], zero points z [N, K/g] or None, bias [N]."""

    values: Array
    scale: Array
    zero_point: Array | None
    bias: Array | None
    group: int
    bits: int

    @property
    def sizes(self) -> dict[str, int]:
        n, k = self.values.shape
        return {"K": k, "N": n, "bits": self.bits, "block_size": self.group}

    def constants(self) -> dict[str, Array]:
        """MatMulNBits' inputs by name: two 4-bit integers a byte, the first in the low nibble."""
        n, k = self.values.shape
        groups = k // self.group
        packed = _pack(self.values, self.bits).reshape(n, groups, -1)
        found = {"B": packed, "scales": self.scale}
        if self.zero_point is not None:
            found["zero_points"] = _pack(self.zero_point, self.bits)
        if self.bias is not None:
            found["bias"] = self.bias
        return found

    def integers(self) -> Array:
        """u - z [N, K/g, g]."""
        n, k = self.values.shape
        zero = 1 << (self.bits - 1) if self.zero_point is None else self.zero_point.astype(int)
        grouped = self.values.reshape(n, k // self.group, self.group).astype(int)
        whole: Array = grouped - np.broadcast_to(zero, self.scale.shape)[..., None]
        return whole

    def weight(self) -> Array:
        """s (u - z) [N, K] in float64."""
        whole: Array = self.scale.astype(np.float64)[..., None] * self.integers()
        return whole.reshape(self.values.shape)

    def terms(self, x: Array) -> Array:
        """What is added up for each y: the groups' products, then the bias [R, N, K/g + 1].

        By the simulation's integers, whose sums are exact, and its scales, in float64.
        """
        scheme = LayerScheme(8, 8, "channel", self.group)
        q, scale, _ = quantize_activation(torch.from_numpy(x), scheme)
        sums = np.einsum("rgk,ngk->rng", q.double().numpy(), self.integers().astype(np.float64))
        scale_x = scale.double().numpy()[:, None, :, 0]
        products = sums * scale_x * self.scale.astype(np.float64)
        n = len(self.values)
        bias = np.zeros(n) if self.bias is None else self.bias.astype(np.float64)
        return np.concatenate([products, np.broadcast_to(bias[:, None], (len(x), n, 1))], axis=2)


def _pack(values: Array, bits: int) -> Array:
    if bits == 8:
        return values
    if values.shape[-1] % 2:
        values = np.pad(values, ((0, 0), (0, 1)))
    packed: Array = values[..., 0::2] | (values[..., 1::2] << 4)
    return packed


def random_linear(
    k: int, n: int, group: int, bits: int, *, zero_points: bool, bias: bool, seed: int = 0
) -> Linear:
    """Every integer may come up; scales and bias are of a trained linear's sizes."""
    rng = np.random.default_rng(seed)
    groups, top = k // group, 1 << bits
    return Linear(
        rng.integers(0, top, (n, k), dtype=np.uint8),
        rng.uniform(1e-3, 2e-2, (n, groups)).astype(np.float32),
        rng.integers(0, top, (n, groups), dtype=np.uint8) if zero_points else None,
        rng.normal(size=n).astype(np.float32) if bias else None,
        group,
        bits,
    )


def random_rows(rows: int, k: int, seed: int = 1) -> Array:
    """Rows whose sizes differ a hundredfold; one group in ten is zero."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, k)) * rng.uniform(0.1, 10, (rows, 1))
    x[:, : k // 10 // 32 * 32] = 0
    return x.astype(np.float32)


def quantized_rows(
    width: int, group: int, signs: Array | None = None
) -> tuple[list[onnx.NodeProto], dict[str, Array]]:
    """A [rows, width] → 'restored', its fake quantization, each group times one of `signs`; nodes
    and constants as the onnxruntime target writes them."""
    constants: dict[str, Array] = {
        "grouped": np.array([0, width // group, group], np.int64),
        "flat": np.array([0, width], np.int64),
        "last": np.array([-1], np.int64),
        "steps": np.float32(127.0),
        "minus_steps": np.float32(-127.0),
        "least": np.float32(MIN_SCALE),
    }
    factor = "scale"
    node = helper.make_node
    nodes = [
        node("Reshape", ["A", "grouped"], ["groups"]),
        node("ReduceMax", ["groups", "last"], ["high"], keepdims=1),
        node("Div", ["high", "steps"], ["high_steps"]),
        node("ReduceMin", ["groups", "last"], ["low"], keepdims=1),
        node("Div", ["low", "minus_steps"], ["low_steps"]),
        node("Max", ["high_steps", "low_steps", "least"], ["scale"]),
        node(
            "QuantizeLinear",
            ["groups", "scale"],
            ["integers"],
            axis=-1,
            block_size=group,
            output_dtype=TensorProto.INT8,
        ),
        node("Cast", ["integers"], ["whole"], to=TensorProto.FLOAT),
    ]
    if signs is not None:
        constants["signs"] = signs.astype(np.float32)[:, None]
        nodes.append(node("Mul", ["scale", "signs"], ["turned"]))
        factor = "turned"
    nodes.append(node("Mul", ["whole", factor], ["restored_groups"]))
    nodes.append(node("Reshape", ["restored_groups", "flat"], ["restored"]))
    return nodes, constants


def model_of(
    linear: Linear,
    operator: str = OPERATOR,
    leading: tuple[str, ...] = ("rows",),
    *,
    signs: Array | None = None,
    **changes: Any,
) -> onnx.ModelProto:
    """A [..., K] → y [..., N] by our operator, or by MatMulNBits on quantized rows, times `signs`;
    `changes` are attributes."""
    constants = linear.constants()
    nodes: list[onnx.NodeProto] = []
    rows = "A"
    places = ["B", "scales", "zero_points", "bias"]
    attributes: dict[str, Any] = dict(linear.sizes)
    domain = DOMAIN
    if operator == "MatMulNBits":
        places.insert(3, "group_indices")
        attributes["accuracy_level"] = 4
        domain = "com.microsoft"
        nodes, others = quantized_rows(linear.sizes["K"], linear.group, signs)
        constants, rows = constants | others, "restored"
    inputs = [rows, *(place if place in constants else "" for place in places)]
    nodes.append(helper.make_node(operator, inputs, ["y"], domain=domain, **attributes | changes))
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("A", TensorProto.FLOAT, [*leading, "k"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    domains = {"": 21, "com.microsoft": 1, DOMAIN: 1}
    opsets = [helper.make_opsetid(name, version) for name, version in domains.items()]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def session_of(model: onnx.ModelProto, library: Path | None, threads: int = 2) -> Any:
    """An ONNX Runtime session that knows the library's operators."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    if library is not None:
        options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def run_linear(linear: Linear, x: Array, library: Path, threads: int = 2) -> Array:
    """y of one call of our operator."""
    (y,) = session_of(model_of(linear), library, threads).run(None, {"A": x})
    made: Array = y
    return made


@pytest.fixture(scope="session")
def plain_library() -> Path:
    """The operator on portable products: on any machine with a compiler."""
    return build_library("plain")


def fast_library(products: Products = "fast") -> Path:
    """The operator on this machine's products; skips the test where it has none."""
    if why := machine_obstacle():
        pytest.skip(why)
    library = build_library(products)
    if not library_units(library):
        pytest.skip("the operating system gives no use of AVX512-VNNI")
    return library


@pytest.fixture(scope="session", params=["plain", "fast", "emulated"])
def library(request: pytest.FixtureRequest, plain_library: Path) -> Path:
    """The operator on each kind of products; 'emulated' is AMX's path without AMX."""
    return plain_library if request.param == "plain" else fast_library(request.param)
