"""Other ways to build a file for TensorRT 8.6.

Options of `tensorrt_engines.py`, for finding out: the product has `surroundings` alone. Each
changes what the product's own builder configuration says, or the file, in one place.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdit.engines.tensorrt.settings import DEFAULT_SURROUNDINGS, FREE_SURROUNDINGS
from qdit.errors import InputError

CONSTRAINTS = ("prefer", "obey", "none")


@dataclass(frozen=True)
class Variant:
    """What is otherwise than in the product.

    * `level`: `builder_optimization_level`, None leaves TensorRT's own (3);
    * `fp16`: whether floats may run in half precision;
    * `constraints`: 'obey' asks for INT8 in every quantized product, and the build fails where
      TensorRT has no such kernel; 'prefer' is the product's, and names no layer; 'none' no flag;
    * `dynamic_shapes`: FASTER_DYNAMIC_SHAPES_0805, which lets Myelin take layers of dynamic shape;
    * `convolutions`: quantized linears as 1×1 convolutions, which have INT8 kernels of their own;
    * `surroundings`: `BuildSettings.surroundings`; None is the product's, and 'free' without FP16.
    """

    level: int | None = None
    fp16: bool = True
    constraints: str = "prefer"
    dynamic_shapes: bool = True
    convolutions: bool = False
    surroundings: str | None = None

    @property
    def around(self) -> str:
        """What the build settings are told."""
        return self.surroundings or (DEFAULT_SURROUNDINGS if self.fp16 else FREE_SURROUNDINGS)

    @property
    def label(self) -> str:
        """Its name as a folder: 'plain', or what differs, as in 'level5-conv'."""
        parts = [
            f"level{self.level}" * (self.level is not None),
            "no-fp16" * (not self.fp16),
            self.constraints * (self.constraints != "prefer"),
            "no-dynamic-shapes" * (not self.dynamic_shapes),
            "conv" * self.convolutions,
            f"around-{self.surroundings}" * (self.surroundings is not None),
        ]
        return "-".join(part for part in parts if part) or "plain"

    def check(self, strongly_typed: bool) -> None:
        """Raise `InputError` for what a strongly typed network (TensorRT 10 on) has no flag for."""
        if strongly_typed and self != Variant(self.level):
            raise InputError(
                f"the variant {self.label} is for TensorRT 8.6, whose networks are weakly typed; "
                "leave all but --level out"
            )
        if not self.fp16 and self.around != FREE_SURROUNDINGS:
            raise InputError(
                f"--no-fp16 forbids what --surroundings {self.around} asks for; take one of them"
            )


@contextmanager
def altered(variant: Variant, quantized: Set[str]) -> Iterator[None]:
    """Let the product's builder configure a build, and then change what `variant` says.

    quantized: the names of the INT8 linears.
    """
    from qdit.engines.tensorrt import build

    original = build._configure

    def configure(trt: Any, builder: Any, network: Any, *rest: Any) -> Any:
        config = original(trt, builder, network, *rest)
        _alter(trt, network, config, variant, quantized)
        return config

    build._configure = configure
    try:
        yield
    finally:
        build._configure = original


def _alter(trt: Any, network: Any, config: Any, variant: Variant, quantized: Set[str]) -> None:
    if not variant.fp16:
        config.clear_flag(trt.BuilderFlag.FP16)
    if variant.constraints != "prefer":
        config.clear_flag(trt.BuilderFlag.PREFER_PRECISION_CONSTRAINTS)
    if variant.constraints == "obey":
        config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
        products = {f"{name}/product" for name in quantized}
        for index in range(network.num_layers):
            layer = network.get_layer(index)
            if layer.name in products:
                products.discard(layer.name)
                layer.precision = trt.int8
        if products:  # or the engine would be said to obey what it was never told
            raise InputError(f"the parsed network has no layer {min(products)}; do without 'obey'")
    if not variant.dynamic_shapes:
        config.set_preview_feature(trt.PreviewFeature.FASTER_DYNAMIC_SHAPES_0805, False)


def write_convolutions(source: Path, target: Path, quantized: Set[str]) -> None:
    """The file with quantized MatMuls [B, T, K] × [K, N] as Convs [B, K, T, 1] → [B, N, T, 1].

    The input is turned before it is quantized, so that nothing lies between its DequantizeLinear
    and the Conv, and the weight [N, K, 1, 1] needs no Transpose any more; names stay. For files of
    TensorRT 8.6, whose weights are floats that are quantized in the file. Raises `InputError` for
    others.
    """
    import onnx
    from onnx import helper

    model = onnx.load(source)
    graph = model.graph
    makers = {output: node for node in graph.node for output in node.output}
    readers: dict[str, list[Any]] = defaultdict(list)
    for node in graph.node:
        for value in node.input:
            readers[value].append(node)
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    axes = "convolutions/axes"
    graph.initializer.append(helper.make_tensor(axes, onnx.TensorProto.INT64, [1], [3]))
    before: dict[str, list[Any]] = {}  # new nodes by the name of the one that they stand before
    instead: dict[str, list[Any]] = {}  # … and by that of the one which they replace
    for name in quantized:
        (product,) = [node for node in graph.node if node.name == f"{name}/product"]
        dequantized, turned = makers[product.input[0]], makers[product.input[1]]
        chain = [turned, makers[turned.input[0]], makers[dequantized.input[0]]]
        kinds = [node.op_type for node in chain]
        if kinds != ["Transpose", "DequantizeLinear", "QuantizeLinear"]:
            raise InputError(f"{name} in {source} is {kinds}; export the file for TensorRT 8.6")
        quantize, weight = chain[2], makers[chain[1].input[0]]
        if weight.op_type != "QuantizeLinear" or weight.input[0] not in tensors:
            raise InputError(f"{name} in {source} has no float weight; export it for TensorRT 8.6")
        if any(f"{other.name}".removesuffix("/product") not in quantized
               for other in readers[dequantized.output[0]]):  # fmt: skip
            raise InputError(f"the quantized input of {name} is read by others; leave --conv out")
        tensors[weight.input[0]].dims.extend([1, 1])
        if quantize.name not in before:
            x = quantize.input[0]
            rows, image = f"{quantize.name}/rows", f"{quantize.name}/image"
            before[quantize.name] = [
                helper.make_node("Transpose", [x], [rows], rows, perm=[0, 2, 1]),
                helper.make_node("Unsqueeze", [rows, axes], [image], image),
            ]
            quantize.input[0] = image
        image, rows = f"{name}/image", f"{name}/rows"
        inputs = [dequantized.output[0], chain[1].output[0]]
        instead[turned.name] = []
        instead[product.name] = [
            helper.make_node("Conv", inputs, [image], product.name, kernel_shape=[1, 1]),
            helper.make_node("Squeeze", [image, axes], [rows], rows),
            helper.make_node(
                "Transpose", [rows], list(product.output), f"{rows}/t", perm=[0, 2, 1]
            ),
        ]
    nodes = [
        new
        for node in graph.node
        for new in [*before.get(node.name, []), *instead.get(node.name, [node])]
    ]
    del graph.node[:], graph.value_info[:]  # shapes of before; parsers infer them
    graph.node.extend(nodes)
    onnx.checker.check_model(model)
    onnx.save(model, target)
