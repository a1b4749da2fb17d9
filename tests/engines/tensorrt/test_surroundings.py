"""What the layers of a weakly typed network are told, on the file that 8.6 gets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx.parser
import pytest

from qdit.engines.tensorrt.build import build_engine
from qdit.engines.tensorrt.settings import SURROUNDINGS, BatchProfile, BuildSettings
from qdit.engines.tensorrt.surroundings import HALF, SINGLE, Told, tell_precisions
from qdit.errors import InputError, StepError
from qdit.progress import Silent

from .conftest import Fake, faked

BLOCK = "transformer_blocks.0"
TIME = f"{BLOCK}.norm1.emb.time_proj/"

# Every case that the small model's file lacks. Layers are called by what they make.
CASES = """
<ir_version: 8, opset_import: ["": 17]>
cases (float[N, 4, 4] x, int64[N, 4] timestep)
    => (float[N, 4, 4] y, float[N, 4, 4] z, float[N, 4] t)
<float s = {0.1}, int8 o = {0}, float[4, 4] w = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1}>
{
    a = Tanh(x)
    a_turned = Transpose<perm = [0, 2, 1]>(a)
    w_turned = Transpose<perm = [1, 0]>(w)
    q = QuantizeLinear(a, s, o)
    d = DequantizeLinear(q, s, o)
    d_turned = Transpose<perm = [0, 2, 1]>(d)
    x_turned = Transpose<perm = [0, 2, 1]>(x)

    a_a = MatMul(a, a_turned)
    a_w = MatMul(a, w)
    w_a = MatMul(w, a)
    a_ww = MatMul(a, w_turned)
    a_d = MatMul(a, d)
    d_a = MatMul(d, a)
    a_dd = MatMul(a, d_turned)
    dd_a = MatMul(d_turned, a)
    d_d = MatMul(d, d_turned)
    x_a = MatMul(x, a)
    a_xx = MatMul(a, x_turned)

    quantized_product = MatMul(a, a)
    product_q = QuantizeLinear(quantized_product, s, o)
    quantized_softmax = Softmax(a_a)
    softmax_q = QuantizeLinear(quantized_softmax, s, o)
    softmax_d = DequantizeLinear(softmax_q, s, o)
    softmax = Softmax(softmax_d)
    y = MatMul(softmax, a)
    z = Softmax(y)

    f = Cast<to = 1>(timestep)
    sines = Sin(f)
    quantized_sines = Cos(f)
    sines_q = QuantizeLinear(quantized_sines, s, o)
    t = Exp(sines)
    softmax_f = Softmax(sines)
    a_f = MatMul(a, sines)
    after = Tanh(a_f)
}
"""


@pytest.fixture
def old() -> Iterator[Fake]:
    with faked("8.6.0") as made:
        yield made


@pytest.fixture
def cases(tmp_path: Path) -> Path:
    model = onnx.parser.parse_model(CASES)
    for node in model.graph.node:
        node.name = node.output[0]
    onnx.save(model, tmp_path / "cases.onnx")
    return tmp_path / "cases.onnx"


def layers(fake: Fake, path: Path, surroundings: str = "attention") -> dict[str, Any]:
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
        # 1: attention
        ("attn1/MatMul", "HALF", "HALF"),
        ("attn1/Softmax", "HALF", "HALF"),
        ("attn1/MatMul_2", "HALF", "HALF"),
        # 2: a timestep, and what is made of it before the first product
        ("norm1.emb.time_proj/Cast", "", ""),
        ("norm1.emb.time_proj/Mul", "FLOAT", "FLOAT"),
        ("norm1.emb.time_proj/Cos", "FLOAT", "FLOAT"),
        ("norm1.emb.time_proj/Concat", "FLOAT", "FLOAT"),
        ("norm1.emb.timestep_embedder.linear_1/Gemm", "", ""),
        # 4: linears' products, quantized and not
        ("attn1.to_q/product", "", ""),
        ("ff.net.2/product", "", ""),
        ("norm1.linear/product", "", ""),
        # 4: all that is quantized
        ("attn1.input/int8/quantized", "", ""),
        ("attn1.input/int8/dequantized", "", ""),
        ("attn1.to_q.weight/dequantized", "", ""),
        ("attn1.to_q.weight/matrix", "", ""),
        ("attn1.to_q.weight", "", ""),
        # 4: what stands around
        ("attn1/Reshape", "", ""),
        ("attn1.to_q.output", "", ""),
        ("norm1.norm/LayerNormalization", "", ""),
        ("norm1/Add_2", "", ""),
        ("ff.net.0/Tanh", "", ""),
    ],
)
def test_what_a_layer_is_told(
    old: Fake, int8_files: dict[bool, Path], name: str, told: str, made: str
) -> None:
    layer = layers(old, int8_files[False])[f"{BLOCK}.{name}"]
    assert (precision(layer), output(layer)) == (told, made)


def test_of_each_block_three_layers_are_half(old: Fake, int8_files: dict[bool, Path]) -> None:
    found = layers(old, int8_files[False])
    half = {name for name, layer in found.items() if precision(layer) == "HALF"}
    assert half == {f"{BLOCK}.attn1/{name}" for name in ("MatMul", "Softmax", "MatMul_2")}
    single = {name for name, layer in found.items() if precision(layer) == "FLOAT"}
    assert single
    assert all(name.startswith(TIME) for name in single)


@pytest.mark.parametrize(
    ("name", "told", "made"),
    [
        ("a_a", "HALF", "HALF"),
        ("softmax", "HALF", "HALF"),
        ("a_f", "HALF", "HALF"),
        ("softmax_f", "HALF", "HALF"),  # 1 goes before 2
        # 1: not both are computed, whatever turned them
        *((name, "", "") for name in ("a_w", "w_a", "a_ww", "x_a", "a_xx")),
        *((name, "", "") for name in ("a_d", "d_a", "a_dd", "dd_a", "d_d")),
        # 2: up to the first product
        ("f", "", ""),
        ("sines", "FLOAT", "FLOAT"),
        ("after", "", ""),
        # 3: what a QuantizeLayer reads, and the network's outputs
        ("quantized_product", "HALF", ""),
        ("quantized_softmax", "HALF", ""),
        ("quantized_sines", "FLOAT", ""),
        ("y", "HALF", ""),
        ("z", "HALF", ""),
        ("t", "FLOAT", ""),
    ],
)
def test_each_case(old: Fake, cases: Path, name: str, told: str, made: str) -> None:
    layer = layers(old, cases)[name]
    assert (precision(layer), output(layer)) == (told, made)


@pytest.mark.parametrize(("surroundings", "half", "single"), [("attention", 8, 3), ("free", 0, 0)])
def test_what_was_told_is_handed_back_by_name(
    old: Fake, cases: Path, surroundings: str, half: int, single: int
) -> None:
    layers(old, cases, "free")
    network = old.faults.network
    told = tell_precisions(old.module, network, surroundings)
    assert (told.count(HALF), told.count(SINGLE)) == (half, single)
    assert told == told_by_the_layers(network)


def told_by_the_layers(network: Any) -> Told:
    """What the layers themselves remember."""
    names = {"HALF": "fp16", "FLOAT": "fp32"}
    return Told(
        {layer.name: names[precision(layer)] for layer in network if layer.precision_is_set},
        {layer.name: names[output(layer)] for layer in network if layer.output_types},
    )


def test_cases_differ_in_what_outputs_are_told(old: Fake, cases: Path) -> None:
    layers(old, cases, "free")
    told = tell_precisions(old.module, old.faults.network, "attention")
    untold = {"quantized_product", "quantized_softmax", "quantized_sines", "y", "z", "t"}
    assert told.precisions.keys() - told.output_types.keys() == untold


@pytest.mark.parametrize("given", [{"a": "int8"}, {"a": ["fp16"]}, ["a"]])
def test_what_no_layer_is_told(given: Any) -> None:
    with pytest.raises(InputError, match=r"told fp16 or fp32 by name, got .*build it again"):
        Told(given)
    with pytest.raises(InputError, match="told fp16 or fp32"):
        Told({}, given)


def test_constants_and_integers_are_told_nothing(old: Fake, int8_files: dict[bool, Path]) -> None:
    for layer in layers(old, int8_files[False]).values():
        if layer.type.name in ("CONSTANT", "SHAPE", "CAST", "QUANTIZE", "DEQUANTIZE"):
            assert not layer.precision_is_set and not layer.output_types, layer.name


def test_left_free_nothing_is_told(old: Fake, int8_files: dict[bool, Path]) -> None:
    found = layers(old, int8_files[False], "free")
    assert not any(layer.precision_is_set or layer.output_types for layer in found.values())


@pytest.mark.parametrize("surroundings", SURROUNDINGS)
def test_a_network_without_quantized_layers_is_told_the_timestep_alone(
    old: Fake, int8_files: dict[bool, Path], tmp_path: Path, surroundings: str
) -> None:
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
    found = layers(old, tmp_path / "plain.onnx", surroundings)
    told = {name: precision(layer) for name, layer in found.items() if layer.precision_is_set}
    assert set(told.values()) == {"FLOAT"}
    assert all(name.startswith(TIME) for name in told)
    assert output(found[f"{TIME}Cos"]) == "FLOAT"


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
        return Told()

    monkeypatch.setattr(build, "tell_precisions", tell)
    with pytest.raises(StepError, match=words):
        layers(old, int8_files[False])


def test_what_is_no_surroundings() -> None:
    with pytest.raises(InputError, match="must be one of attention, free, got 'int8'"):
        BuildSettings(surroundings="int8")
