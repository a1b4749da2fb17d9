"""`tensorrt-int4` files in ONNX Runtime against float64; blocks, repeated scales and nibbles."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from qdit.calibrate.schemes import LayerScheme
from qdit.engines.onnxruntime_engine import OnnxRuntimeEngine
from qdit.export.tensorrt.lower_int4 import LowerInt4Pass, block_size
from qdit.export.tensorrt.versions import TensorRtVersion, features

from ..conftest import example_arrays, relative_error
from .conftest import NEW, Traced, checkpoint_of

W4A16 = LayerScheme(4, 16, 64)
SCHEMES = {
    "g64": W4A16,
    "g128": replace(W4A16, weight_group=128),
    "g256": replace(W4A16, weight_group=256),
    "channel": replace(W4A16, weight_group="channel"),
    "w3 g64": replace(W4A16, weight_bits=3),
    "w2 g128": replace(W4A16, weight_bits=2, weight_group=128),
    "integer g64": replace(W4A16, scale_format="integer"),
    "float32 scales": replace(W4A16, scale_dtype="float32"),
}
# float16 weights, inputs and outputs: each rounds by 2^-11 at most, K = 256 and 1024 of them add up
# at random, and ONNX Runtime sums in float32. Measured at 3e-4.
HALF_BOUND = 2.0**-10


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
def test_every_linear_is_its_float64_meaning(
    traced: Traced, scheme: LayerScheme, tmp_path: Path
) -> None:
    checkpoint, contents = checkpoint_of(traced.model, scheme)
    lowering = LowerInt4Pass(contents, "float16")
    path = traced.write(contents, lowering, tmp_path / "model.onnx", NEW, checkpoint).path
    (entry,) = (e.value for e in onnx.load(path).metadata_props if e.key == "qdit.linears")
    records = json.loads(entry)
    names = sorted({str(e[key]) for e in records.values() for key in ("input", "output")})
    values = OnnxRuntimeEngine(path, extra_outputs=names).infer(example_arrays(traced.model, 2))
    reference = checkpoint.build_denoiser(dtype=torch.float64)
    for name, record in records.items():
        given = torch.from_numpy(values[record["input"]]).double()
        with torch.inference_mode():
            wanted = reference.get_submodule(name)(given).numpy()
        assert relative_error(values[record["output"]], wanted) <= HALF_BOUND, name
        assert record["precision"] == "INT4"


def test_the_weights_are_the_checkpoint_s_to_the_bit(traced: Traced, tmp_path: Path) -> None:
    """ONNX Runtime's own DequantizeLinear on the file's tensors, in float32 of float16 scales."""
    scheme = replace(W4A16, weight_group=256)  # two blocks of 128 a group
    checkpoint, contents = checkpoint_of(traced.model, scheme)
    lowering = LowerInt4Pass(contents, "float16")
    path = traced.write(contents, lowering, tmp_path / "model.onnx", NEW, checkpoint).path
    model = onnx.load(path)
    node = next(n for n in model.graph.node if n.name.endswith("ff.net.2.weight/dequantized"))
    assert {a.name: a.i for a in node.attribute} == {"axis": 0, "block_size": 128}
    kept = [value for value in model.graph.initializer if value.name in node.input]
    output = onnx.helper.make_tensor_value_info(
        node.output[0], onnx.TensorProto.FLOAT16, [1024, 256]
    )
    alone = onnx.helper.make_model(
        onnx.helper.make_graph([node], "weight", [], [output], kept),
        opset_imports=[onnx.helper.make_opsetid("", 21)],
        ir_version=10,
    )
    session = onnxruntime.InferenceSession(alone.SerializeToString())
    (made,) = session.run(None, {})
    wanted = checkpoint.weights["transformer_blocks.0.ff.net.2"].dequantize(torch.float32)
    np.testing.assert_array_equal(made, wanted.half().numpy().T)


def test_nothing_stands_between_the_weight_and_its_product(traced: Traced, tmp_path: Path) -> None:
    checkpoint, contents = checkpoint_of(traced.model, W4A16)
    path = traced.write(
        contents, LowerInt4Pass(contents, "float16"), tmp_path / "m.onnx", NEW, checkpoint
    ).path
    model = onnx.load(path)
    made = {output: node for node in model.graph.node for output in node.output}
    products = [n for n in model.graph.node if n.name.endswith("/product")]
    assert len(products) == 7
    assert {made[n.input[1]].op_type for n in products} == {"DequantizeLinear"}


@pytest.mark.parametrize(
    ("group", "block"), [(64, 64), (128, 128), (192, 64), (256, 128), (576, 64), (1152, 128)]
)
def test_the_coarsest_block_that_divides_a_group(group: int, block: int) -> None:
    assert block_size(group) == block


def test_int4_needs_version_10() -> None:
    assert not features(TensorRtVersion(8, 6)).blocks
    assert features(TensorRtVersion(10)).blocks
