"""The extractor as an ONNX model, written node by node with the batch norms folded in."""

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from demo_recipe.extractor import FEATURE_COUNT, Extractor, Residual
from demo_recipe.files import write_atomically
from demo_recipe.images import CLASS_COUNT, IMAGE_SIZE

OPSET = 17
IR_VERSION = 8


class GraphWriter:
    """Collects nodes and initializers; each method returns the name of the value it adds."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def constant(self, name: str, value: np.ndarray) -> str:
        """Add ``value`` as an initializer."""
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def node(self, kind: str, inputs: list[str], output: str, **attributes: object) -> str:
        """Add one node of type ``kind`` with one output."""
        self.nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    def conv_block(self, block: nn.Sequential, x: str, name: str) -> str:
        """Convolution with the folded batch norm, then ReLU."""
        weight, bias = fold_batch_norm(block[0], block[1])
        inputs = [x, self.constant(f"{name}.weight", weight), self.constant(f"{name}.bias", bias)]
        y = self.node("Conv", inputs, f"{name}.conv", kernel_shape=[3, 3], pads=[1, 1, 1, 1])
        return self.node("Relu", [y], f"{name}.relu")

    def module(self, module: nn.Module, x: str, name: str) -> str:
        """One entry of ``Extractor.body``."""
        if isinstance(module, nn.MaxPool2d):
            return self.node("MaxPool", [x], name, kernel_shape=[2, 2], strides=[2, 2])
        if isinstance(module, Residual):
            y = self.conv_block(module.first, x, f"{name}.first")
            return self.node("Add", [x, self.conv_block(module.second, y, f"{name}.second")], name)
        return self.conv_block(module, x, name)


def fold_batch_norm(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[np.ndarray, np.ndarray]:
    """Weight [O, I, 3, 3] and bias [O] (float32, folded in float64) of ``norm(conv(x))``."""
    scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    weight = conv.weight.double() * scale[:, None, None, None]
    bias = norm.bias.double() - norm.running_mean.double() * scale
    return weight.detach().float().cpu().numpy(), bias.detach().float().cpu().numpy()


def build_model(network: Extractor) -> onnx.ModelProto:
    """``images`` float32 [N, 3, 32, 32] to ``features`` [N, 256] and ``logits`` [N, 10]."""
    writer = GraphWriter()
    x = "images"
    for index, module in enumerate(network.body):
        x = writer.module(module, x, f"body.{index}")
    x = writer.node("GlobalAveragePool", [x], "pool")
    writer.node("Flatten", [x], "features", axis=1)
    head = [
        writer.constant("head.weight", network.head.weight.detach().float().cpu().numpy()),
        writer.constant("head.bias", network.head.bias.detach().float().cpu().numpy()),
    ]
    writer.node("Gemm", ["features", *head], "logits", transB=1)
    graph = helper.make_graph(
        writer.nodes,
        "features",
        [_value("images", ["N", 3, IMAGE_SIZE, IMAGE_SIZE])],
        [_value("features", ["N", FEATURE_COUNT]), _value("logits", ["N", CLASS_COUNT])],
        writer.initializers,
    )
    opsets = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(
        graph, producer_name="qdit-recipes", opset_imports=opsets, ir_version=IR_VERSION
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def export_extractor(network: Extractor, path: Path) -> None:
    """Write the extractor to ``path``, atomically."""
    model = build_model(network)
    write_atomically(path, lambda temporary: onnx.save(model, temporary))


def _value(name: str, shape: list[int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
