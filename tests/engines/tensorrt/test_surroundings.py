"""What the layers of a weakly typed network are told, on the file that 8.6 gets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qdit.engines.tensorrt.build import build_engine
from qdit.engines.tensorrt.settings import DEFAULT_SURROUNDINGS, BatchProfile, BuildSettings
from qdit.errors import InputError, StepError
from qdit.progress import Silent

from .conftest import Fake, faked

BLOCK = "transformer_blocks.0"


@pytest.fixture
def old() -> Iterator[Fake]:
    with faked("8.6.0") as made:
        yield made


def layers(fake: Fake, path: Path, surroundings: str = "fp16") -> dict[str, Any]:
    """By name, after a build that TensorRT took."""
    settings = BuildSettings(BatchProfile(1, 2, 4), surroundings=surroundings)
    build_engine(path, settings, fake.features, Silent())
    return {layer.name: layer for layer in fake.faults.network.layers}


def precision(layer: Any) -> str:
    return layer.told.name if layer.precision_is_set else ""


def output(layer: Any) -> str:
    return "/".join(kind.name for kind in layer.output_types.values())


@pytest.mark.parametrize(
    ("name", "told", "made"),
    [
        # attention: all of it, or it is not one kernel
        ("attn1/Reshape", "HALF", "HALF"),
        ("attn1/MatMul", "HALF", "HALF"),
        ("attn1/Softmax", "HALF", "HALF"),
        ("attn1/MatMul_2", "HALF", "HALF"),
        ("attn1.to_q.output", "HALF", "HALF"),  # its bias
        ("norm1.norm/LayerNormalization", "HALF", "HALF"),
        ("norm1.linear/product", "HALF", "HALF"),  # not quantized in this plan
        # what a QuantizeLayer reads keeps its type
        ("norm1/Add_2", "HALF", ""),
        ("attn1/Reshape_4", "HALF", ""),
        # integer products, and all that is quantized
        ("attn1.to_q/product", "", ""),
        ("ff.net.2/product", "", ""),
        ("attn1.input/int8/quantized", "", ""),
        ("attn1.input/int8/dequantized", "", ""),
        ("attn1.to_q.weight/dequantized", "", ""),
        ("attn1.to_q.weight/matrix", "", ""),
        ("attn1.to_q.weight", "", ""),
        # bias and GELU of a product whose result is quantized again
        ("ff.net.0.proj.output", "", ""),
        ("ff.net.0/Pow", "", ""),
        ("ff.net.0/Tanh", "", ""),
        ("ff.net.0/Mul_4", "", ""),
        # a timestep, and what is made of it before the first product
        ("norm1.emb.time_proj/Cast", "", ""),
        ("norm1.emb.time_proj/Mul", "FLOAT", "FLOAT"),
        ("norm1.emb.time_proj/Cos", "FLOAT", "FLOAT"),
        ("norm1.emb.time_proj/Concat", "FLOAT", "FLOAT"),
        ("norm1.emb.timestep_embedder.linear_1/Gemm", "HALF", "HALF"),
    ],
)
def test_what_a_layer_is_told(
    old: Fake, int8_files: dict[bool, Path], name: str, told: str, made: str
) -> None:
    layer = layers(old, int8_files[False])[f"{BLOCK}.{name}"]
    assert (precision(layer), output(layer)) == (told, made)


def test_the_network_s_output_keeps_its_type(old: Fake, int8_files: dict[bool, Path]) -> None:
    found = [
        layer
        for layer in layers(old, int8_files[False]).values()
        if any(tensor.is_network_output for tensor in layer.outputs)
    ]
    assert [(precision(layer), output(layer)) for layer in found] == [("HALF", "")]


def test_constants_and_integers_are_told_nothing(old: Fake, int8_files: dict[bool, Path]) -> None:
    for layer in layers(old, int8_files[False]).values():
        if layer.type.name in ("CONSTANT", "SHAPE", "CAST", "QUANTIZE", "DEQUANTIZE"):
            assert not layer.precision_is_set and not layer.output_types, layer.name


def test_left_free_nothing_is_told(old: Fake, int8_files: dict[bool, Path]) -> None:
    found = layers(old, int8_files[False], DEFAULT_SURROUNDINGS)
    assert not any(layer.precision_is_set or layer.output_types for layer in found.values())


def test_a_network_without_quantized_layers_is_told_the_timestep_alone(
    old: Fake, int8_files: dict[bool, Path], tmp_path: Path
) -> None:
    import onnx

    model = onnx.load(int8_files[False])
    kept, names = [], {}
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = names.get(name, name)
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            names[node.output[0]] = node.input[0]
        else:
            kept.append(node)
    del model.graph.node[:]
    model.graph.node.extend(kept)
    onnx.save(model, tmp_path / "plain.onnx")
    found = layers(old, tmp_path / "plain.onnx")
    assert {precision(layer) for layer in found.values()} == {"", "FLOAT"}


def test_strongly_typed_networks_are_told_nothing(
    newest: Fake, int8_files: dict[bool, Path]
) -> None:
    found = layers(newest, int8_files[True])
    assert not any(layer.precision_is_set for layer in found.values())


@pytest.mark.parametrize(
    ("kind", "words"), [("QUANTIZE", "can only output"), ("CAST", "params.toType")]
)
def test_the_fake_refuses_what_8_6_refused(
    old: Fake, int8_files: dict[bool, Path], kind: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qdit.engines.tensorrt import build

    def tell(trt: Any, network: Any, _surroundings: str) -> Any:
        (layer, *_) = [one for one in network if one.type.name == kind]
        layer.set_output_type(0, trt.DataType.HALF)
        return type("Told", (), {"half": 0})

    monkeypatch.setattr(build, "tell_precisions", tell)
    with pytest.raises(StepError, match=words):
        layers(old, int8_files[False])


def test_what_is_no_surroundings() -> None:
    with pytest.raises(InputError, match="must be one of fp16, free, got 'int8'"):
        BuildSettings(surroundings="int8")
