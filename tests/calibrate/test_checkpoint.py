"""The quantized checkpoint: what goes in comes out, byte for byte the same each time."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from torch import Tensor, nn

from qdit.calibrate import checkpoint as checkpoint_module
from qdit.calibrate import checkpoint_layout
from qdit.calibrate.artifact_errors import MissingFileError
from qdit.calibrate.checkpoint import QuantizedCheckpoint
from qdit.calibrate.checkpoint_layout import expected_entries, quantized_linears
from qdit.calibrate.checkpoint_model import outline, stored_shapes
from qdit.calibrate.families import family_named
from qdit.calibrate.plan import QuantizationPlan, uniform_plan
from qdit.calibrate.quantizers import QuantizedWeight
from qdit.calibrate.schemes import LayerScheme
from qdit.calibrate.simulate import QuantizedLinear, install_quantized_linears
from qdit.calibrate.tensor_file import TensorEntry, file_size
from qdit.errors import InputError

Q0, OUT0, UP1, DOWN1, ADALN1 = (
    "transformer_blocks.0.attn1.to_q",
    "transformer_blocks.0.attn1.to_out.0",
    "transformer_blocks.1.ff.net.0.proj",
    "transformer_blocks.1.ff.net.2",
    "transformer_blocks.1.norm1.linear",
)
EMBEDDER = "norm1.emb.timestep_embedder.linear_1.weight"
# Every width, both symmetries, both scale dtypes, one linear left alone.
MIXED = {
    Q0: LayerScheme(3, 8, 32, 64, False, False),
    OUT0: LayerScheme(8, 8, "channel", "token", scale_dtype="float32"),
    UP1: LayerScheme(16, 16),
    DOWN1: LayerScheme(6, 4, 128, 32, False, True, "float32"),
    ADALN1: LayerScheme(2, 16, 32),
}
SCHEME = LayerScheme(4, 8, 32, 64)
ODD = {"attention_head_dim": 18}  # hidden size 36: rows of packed values that end inside a byte
# Every width, both scale dtypes, one linear with float scales, one left alone.
INTEGER = LayerScheme(4, 8, 32, "token", scale_format="integer")
INTEGER_LAYERS = {
    Q0: LayerScheme(3, 8, 64, "token", scale_format="integer"),
    OUT0: LayerScheme(4, 8, 32, 32, scale_dtype="float32", scale_format="integer"),
    UP1: LayerScheme(16, 16),
    DOWN1: LayerScheme(2, 8, 128, "token", scale_format="integer"),
    ADALN1: LayerScheme(4, 16, 32),
}
CASES = {
    "symmetric": (SCHEME, {}, {}),
    "asymmetric": (LayerScheme(4, 8, 32, 64, False, False), {}, {}),
    "mixed": (SCHEME, MIXED, {}),
    "integer scales": (INTEGER, INTEGER_LAYERS, {}),
    "not tied": (SCHEME, {}, {"tied": False}),
    "16/16": (LayerScheme(16, 16), {}, {}),
    "padded rows": (LayerScheme(3, 8, "channel", "token", False), {}, ODD),
}


@pytest.fixture(params=CASES)
def made(request: pytest.FixtureRequest, make_quantized: Callable[..., Any]) -> Any:
    scheme, layers, changes = CASES[request.param]
    return make_quantized(scheme, layers, **changes)


@pytest.fixture
def mixed(make_quantized: Callable[..., Any]) -> Any:
    return make_quantized(SCHEME, MIXED)


def run(model: Any, denoiser: nn.Module) -> Tensor:
    inputs = model.family.example_inputs(denoiser, 3, torch.Generator().manual_seed(0))
    with torch.inference_mode():
        output: Tensor = model.family.forward(denoiser, *inputs)
    return output


def simulation(made: Any, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The in-memory simulation that the checkpoint must equal: parameters rounded to float16."""
    denoiser: nn.Module = made.model.denoiser
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.copy_(parameter.half().float())
    install_quantized_linears(denoiser, made.plan.layers, made.weights, dtype=dtype)
    return denoiser.to(dtype)


def equal_weights(one: QuantizedWeight, other: QuantizedWeight) -> bool:
    mine, theirs = one.tensors(), other.tensors()
    return (
        one.bits == other.bits
        and mine.keys() == theirs.keys()
        and all(
            mine[name].dtype == theirs[name].dtype and torch.equal(mine[name], theirs[name])
            for name in mine
        )
    )


class TestRoundTrip:
    def test_everything_comes_back(self, made: Any, tmp_path: Path) -> None:
        made.checkpoint.write(tmp_path)
        read = QuantizedCheckpoint.read(tmp_path)
        assert read.manifest == made.checkpoint.manifest
        assert read.plan == made.plan
        assert list(read.plan.layers) == [spec.name for spec in made.model.linears]
        assert read.linears == made.model.linears
        assert read.family is made.model.family
        assert read.config == made.model.config
        assert read.scheduler_config == made.model.scheduler_config
        assert read.class_names == made.model.class_names
        assert read.source == made.model.source
        assert read.model_name == "tiny"
        assert read.metrics == {"error": 0.125}
        assert read.provenance.settings == {"method": "nearest", "seed": 0}
        assert list(read.weights) == list(made.weights)
        for name, weight in made.weights.items():
            assert equal_weights(read.weights[name], weight), name
        assert read.parameters.keys() == made.checkpoint.parameters.keys()
        for name, value in made.checkpoint.parameters.items():
            assert torch.equal(read.parameters[name], value), name

    def test_byte_size_is_that_of_the_two_files(self, made: Any, tmp_path: Path) -> None:
        before = made.checkpoint.byte_size
        made.checkpoint.write(tmp_path)
        sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
        assert sizes.keys() == {"qdit.json", "weights.safetensors"}
        assert before == sum(sizes.values()) == QuantizedCheckpoint.read(tmp_path).byte_size

    def test_a_checkpoint_read_and_written_again_has_the_same_bytes(
        self, made: Any, tmp_path: Path
    ) -> None:
        made.checkpoint.write(tmp_path / "one")
        QuantizedCheckpoint.read(tmp_path / "one").write(tmp_path / "two")
        for name in ("qdit.json", "weights.safetensors"):
            assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()

    def test_reading_unpacks_nothing_until_asked_and_then_anew(
        self, mixed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        mixed.checkpoint.write(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint_layout, "unpack", None)
            read = QuantizedCheckpoint.read(tmp_path)
            assert len(read.weights) == len(mixed.weights)
        for name in (Q0, OUT0):
            read.weights[name].values.fill_(1)
            assert equal_weights(read.weights[name], mixed.weights[name])
        name = f"{Q0}.bias"
        read.parameters[name].fill_(1)
        assert torch.equal(read.parameters[name], mixed.checkpoint.parameters[name])

    def test_unknown_names_are_key_errors(self, mixed: Any, tmp_path: Path) -> None:
        mixed.checkpoint.write(tmp_path)
        read = QuantizedCheckpoint.read(tmp_path)
        for name in (UP1, f"{UP1}.weight", f"{Q0}.weight.scale"):
            assert name not in read.weights
        assert f"{UP1}.weight" in read.parameters  # left at 16 bits
        assert f"{Q0}.weight" not in read.parameters
        assert f"{Q0}.weight.scale" not in read.parameters


class TestModules:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
    @pytest.mark.parametrize("stored", [False, True], ids=["in memory", "read"])
    def test_the_built_denoiser_is_the_simulation_to_the_bit(
        self, made: Any, stored: bool, dtype: torch.dtype, tmp_path: Path
    ) -> None:
        checkpoint = made.checkpoint
        if stored:
            checkpoint.write(tmp_path)
            checkpoint = QuantizedCheckpoint.read(tmp_path)
        denoiser = checkpoint.build_denoiser(dtype=dtype)
        assert {p.dtype for p in denoiser.parameters()} == {dtype}
        assert not any(p.is_meta for p in (*denoiser.parameters(), *denoiser.buffers()))
        assert not any(p.requires_grad for p in denoiser.parameters())
        assert not denoiser.training
        expected = run(made.model, simulation(made, dtype))
        assert torch.equal(run(made.model, denoiser), expected)
        assert float(expected.std()) > 0.01

    def test_quantized_linears_are_simulated_and_the_others_are_not(self, mixed: Any) -> None:
        denoiser = mixed.checkpoint.build_denoiser()
        for spec in mixed.model.linears:
            module = denoiser.get_submodule(spec.name)
            assert isinstance(module, nn.Linear if spec.name == UP1 else QuantizedLinear)

    def test_the_skeleton_has_all_but_the_quantized_weights(self, made: Any) -> None:
        skeleton = made.checkpoint.skeleton()
        hollow = {name for name, p in skeleton.named_parameters() if p.is_meta}
        assert hollow == {f"{name}.weight" for name in made.weights}
        assert not any(buffer.is_meta for buffer in skeleton.buffers())
        original = dict(made.model.denoiser.named_parameters())
        for name, parameter in skeleton.named_parameters():
            assert parameter.dtype == torch.float32
            assert parameter.shape == original[name].shape
            if name not in hollow:
                assert torch.equal(parameter, original[name].half().float())

    def test_shared_modules_are_stored_once_and_shared_again(
        self, make_quantized: Callable[..., Any]
    ) -> None:
        made = make_quantized(SCHEME)
        assert made.checkpoint.manifest.ties == {
            "transformer_blocks.1.norm1.emb": "transformer_blocks.0.norm1.emb"
        }
        assert f"transformer_blocks.0.{EMBEDDER}" in made.checkpoint.parameters
        assert f"transformer_blocks.1.{EMBEDDER}" not in made.checkpoint.parameters
        for module in (made.checkpoint.build_denoiser(), made.checkpoint.skeleton()):
            first, second = module.transformer_blocks
            assert first.norm1.emb is second.norm1.emb

    def test_embedders_of_their_own_are_kept_apart(
        self, make_quantized: Callable[..., Any]
    ) -> None:
        made = make_quantized(SCHEME, tied=False)
        assert made.checkpoint.manifest.ties == {}
        first, second = (
            made.checkpoint.parameters[f"transformer_blocks.{block}.{EMBEDDER}"]
            for block in range(2)
        )
        assert not torch.equal(first, second)

    def test_equal_embedders_are_tied_when_the_checkpoint_is_made(
        self, make_quantized: Callable[..., Any], make_model: Callable[..., Any]
    ) -> None:
        made = make_quantized(SCHEME)
        copied = make_model(tied=False)
        copied.denoiser.load_state_dict(made.model.denoiser.state_dict())
        again = QuantizedCheckpoint.from_result(
            copied, made.plan, made.weights, {"method": "nearest", "seed": 0}, {"error": 0.125}
        )
        assert again.manifest == made.checkpoint.manifest


class TestParameters:
    def test_they_are_float16_unless_a_value_overflows_it(
        self, make_model: Callable[..., Any]
    ) -> None:
        model = make_model()
        bias = model.denoiser.proj_out_2.bias
        with torch.no_grad():
            bias[0] = 65519.9  # the largest float32 below the tie at 65520 rounds to 65504
            model.denoiser.proj_out_1.bias[0] = 65520.0  # would round to infinity
        plan = uniform_plan("16/16", LayerScheme(16, 16), model.linears)
        checkpoint = QuantizedCheckpoint.from_result(model, plan, {}, {}, {})
        dtypes = {name: value.dtype for name, value in checkpoint.parameters.items()}
        assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == {
            "proj_out_1.bias"
        }
        assert set(dtypes.values()) == {torch.float16, torch.float32}
        built = checkpoint.build_denoiser()
        assert built.proj_out_1.bias[0] == 65520.0
        assert built.proj_out_2.bias[0] == 65504.0

    def test_full_precision_bytes_count_shared_parameters_once(self, made: Any) -> None:
        assert made.checkpoint.full_precision_fp16_bytes == 2 * made.model.parameter_count()


def digests(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
    }


class TestDeterminism:
    def test_equal_inputs_give_equal_bytes(
        self, make_quantized: Callable[..., Any], tmp_path: Path
    ) -> None:
        for number in range(2):
            made = make_quantized(SCHEME, MIXED)
            made.checkpoint.write(tmp_path / str(number))
        assert digests(tmp_path / "0") == digests(tmp_path / "1")

    def test_the_order_of_the_inputs_does_not_matter(self, mixed: Any, tmp_path: Path) -> None:
        mixed.checkpoint.write(tmp_path / "one")
        plan = QuantizationPlan(mixed.plan.bits, dict(reversed(mixed.plan.layers.items())))
        weights = dict(reversed(mixed.weights.items()))
        provenance = {"seed": 0, "method": "nearest"}
        other = QuantizedCheckpoint.from_result(
            mixed.model, plan, weights, provenance, {"error": 0.125}
        )
        other.write(tmp_path / "two")
        assert digests(tmp_path / "one") == digests(tmp_path / "two")

    def test_a_model_already_simulated_gives_the_same_checkpoint(
        self, make_quantized: Callable[..., Any]
    ) -> None:
        made = make_quantized(SCHEME)
        install_quantized_linears(made.model.denoiser, made.plan.layers, made.weights)
        again = QuantizedCheckpoint.from_result(
            made.model, made.plan, made.weights, {"method": "nearest", "seed": 0}, {"error": 0.125}
        )
        assert again.manifest == made.checkpoint.manifest

    def test_one_bit_more_or_less_is_another_checkpoint(
        self, make_quantized: Callable[..., Any]
    ) -> None:
        one, other = (make_quantized(SCHEME, seed=seed).checkpoint for seed in range(2))
        assert one.manifest.weights.sha256 != other.manifest.weights.sha256

    def test_nothing_of_time_or_place_is_written(self, mixed: Any, tmp_path: Path) -> None:
        model = mixed.model
        model.config = model.config | {"_name_or_path": "/home/someone/dit"}
        model.scheduler_config = model.scheduler_config | {"_name_or_path": "/home/someone/dit"}
        made = QuantizedCheckpoint.from_result(model, mixed.plan, mixed.weights, {}, {})
        made.write(tmp_path)
        text = (tmp_path / "qdit.json").read_text("utf-8")
        assert "someone" not in text
        assert str(tmp_path) not in text
        assert not re.search(r"20\d\d-\d\d-\d\d", text)


class TestFormat:
    """docs/format.md read by someone else: numpy, json and the safetensors library."""

    def test_the_tensor_file_is_the_librarys_own(self, made: Any, tmp_path: Path) -> None:
        made.checkpoint.write(tmp_path)
        path = tmp_path / "weights.safetensors"
        assert safetensors.torch.save(safetensors.torch.load_file(path)) == path.read_bytes()

    def test_an_independent_reader_gets_the_same_weights(self, made: Any, tmp_path: Path) -> None:
        made.checkpoint.write(tmp_path)
        manifest = json.loads((tmp_path / "qdit.json").read_text("utf-8"))
        tensors = safetensors.numpy.load_file(tmp_path / manifest["weights"]["file"])
        for linear in manifest["linears"]:
            name, scheme = linear["name"], manifest["plan"]["layers"][linear["name"]]
            if scheme["weight_bits"] == 16:
                assert f"{name}.weight" in tensors
                continue
            weight = dequantized(tensors, linear, scheme)
            assert np.array_equal(weight, made.weights[name].dequantize(torch.float64).numpy())

    @pytest.mark.parametrize("scale_dtype", ["float16", "float32"])
    def test_integer_scales_worked_out(
        self, make_quantized: Callable[..., Any], tmp_path: Path, scale_dtype: str
    ) -> None:
        """The bytes of the example in docs/format.md, in a channel's place in a file."""
        scheme = LayerScheme(4, 8, 32, "token", scale_dtype=scale_dtype, scale_format="integer")  # type: ignore[arg-type]
        made = make_quantized(scheme)
        weight = made.weights[DOWN1]
        # eight groups of the first channel; s = 0.0625 = 2^-4
        multiplier = [1, 2, 16, 8, 3, 15, 10, 9]
        weight.multiplier[0] = torch.tensor(multiplier, dtype=torch.uint8)
        weight.scale[0] = 0.0625 * torch.tensor(multiplier)
        checkpoint = QuantizedCheckpoint.from_result(made.model, made.plan, made.weights, {}, {})
        checkpoint.write(tmp_path)
        tensors = safetensors.numpy.load_file(tmp_path / "weights.safetensors")
        # less one, the earlier in the low half: 0|1 → 10, 15|7 → 7f, 2|14 → e2, 9|8 → 89
        assert tensors[f"{DOWN1}.weight.multiplier"][:4].tobytes() == b"\x10\x7f\xe2\x89"
        # 2^-4: exponent 15 − 4 = 11 → 0 01011 0000000000; 127 − 4 = 123 → 0 01111011 0…
        stored = {"float16": b"\x00\x2c", "float32": b"\x00\x00\x80\x3d"}[scale_dtype]
        assert tensors[f"{DOWN1}.weight.scale"].shape == (64, 1)
        assert tensors[f"{DOWN1}.weight.scale"][0].tobytes() == stored
        read = QuantizedCheckpoint.read(tmp_path).weights[DOWN1]
        assert read.scale[0].tolist() == [0.0625 * m for m in multiplier]
        assert read.channel_scale[0].item() == 0.0625

    @pytest.mark.parametrize(
        ("layers", "version"),
        [({}, 1), ({Q0: INTEGER}, 2), ({Q0: LayerScheme(4, 8, "channel", "token")}, 1)],
        ids=["float scales", "one linear", "channel"],
    )
    def test_the_version_is_the_lowest_that_can_say_it(
        self,
        make_quantized: Callable[..., Any],
        layers: dict[str, LayerScheme],
        version: int,
        tmp_path: Path,
    ) -> None:
        made = make_quantized(SCHEME, layers)
        made.checkpoint.write(tmp_path)
        manifest = json.loads((tmp_path / "qdit.json").read_text("utf-8"))
        assert manifest["version"] == version
        formats = {
            name: scheme["scale_format"]
            for name, scheme in manifest["plan"]["layers"].items()
            if "scale_format" in scheme
        }
        assert formats == ({Q0: "integer"} if version == 2 else {})
        assert QuantizedCheckpoint.read(tmp_path).plan == made.plan

    def test_the_manifest_says_what_the_files_are(self, mixed: Any, tmp_path: Path) -> None:
        mixed.checkpoint.write(tmp_path)
        manifest = json.loads((tmp_path / "qdit.json").read_text("utf-8"))
        data = (tmp_path / "weights.safetensors").read_bytes()
        assert (manifest["format"], manifest["version"]) == ("qdit-checkpoint", 1)
        assert manifest["weights"] == {
            "file": "weights.safetensors",
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        assert manifest["provenance"]["libraries"]["torch"] == torch.__version__
        assert [linear["name"] for linear in manifest["linears"]] == [
            spec.name for spec in mixed.model.linears
        ]


def dequantized(
    tensors: dict[str, np.ndarray], linear: dict[str, Any], scheme: dict[str, Any]
) -> np.ndarray:
    """ŵ = s·m·(q − Z) from the stored tensors, bit by bit and in float64."""
    rows, columns = linear["out_features"], linear["in_features"]
    symmetric, name = scheme["weight_symmetric"], linear["name"]

    def integers(
        packed: np.ndarray, count: int, signed: bool, bits: int = scheme["weight_bits"]
    ) -> np.ndarray:
        stream = np.unpackbits(packed.reshape(len(packed), -1), axis=1, bitorder="little")
        digits = stream[:, : count * bits].reshape(len(packed), count, bits).astype(np.int64)
        places = 1 << np.arange(bits, dtype=np.int64)
        places[-1] *= -1 if signed else 1  # two's complement: the top bit counts negative
        return digits @ places

    scale = tensors[f"{name}.weight.scale"].astype(np.float64)
    values = integers(tensors[f"{name}.weight.packed"], columns, symmetric)
    if scheme.get("scale_format", "float") == "integer":
        groups = columns // scheme["weight_group"]
        flat = tensors[f"{name}.weight.multiplier"].reshape(1, -1)
        scale = scale * (1 + integers(flat, rows * groups, False, 4).reshape(rows, groups))
    zero = np.zeros_like(scale)
    if not symmetric:
        flat = tensors[f"{name}.weight.zero_point"].reshape(1, -1)
        zero = integers(flat, scale.size, False).reshape(scale.shape)
    grouped = values.reshape(rows, scale.shape[1], -1)
    return (scale[..., None] * (grouped - zero[..., None])).reshape(rows, columns)


def sizes_of(config: dict[str, Any], scheme: LayerScheme) -> tuple[int, int, QuantizationPlan]:
    """(tensor file's bytes, packed bytes, plan) of a model nobody has to allocate."""
    family = family_named("dit")
    shape = outline(family, config, 10_000)
    family.tie_shared_modules(shape)
    linears = family.linears(shape)
    plan = uniform_plan("w4a8", scheme, linears)
    untouched = stored_shapes(shape)
    for spec in quantized_linears(plan, linears):
        del untouched[f"{spec.name}.weight"]
    entries = {
        name: TensorEntry(dtypes[0], size)
        for name, (dtypes, size) in expected_entries(plan, linears, untouched).items()
    }
    packed = sum(
        entry.byte_size
        for name, entry in entries.items()
        if name.rpartition(".")[2] in ("packed", "scale", "zero_point", "multiplier")
    )
    assert packed * 8 == pytest.approx(
        plan.effective_weight_bits(linears) * sum(spec.weight_count for spec in linears)
    )
    return file_size(entries), packed, plan


@pytest.mark.parametrize(
    "scheme",
    [
        LayerScheme(4, 8, 128, 128),
        LayerScheme(4, 8, 128, 128, weight_symmetric=False),
        LayerScheme(4, 8, 128, "token", scale_format="integer"),
    ],
    ids=["symmetric", "asymmetric", "integer scales"],
)
def test_dit_xl_in_four_bits_takes_365_mb_at_most(scheme: LayerScheme) -> None:
    config = {
        "_class_name": "DiTTransformer2DModel",
        "num_layers": 28,
        "num_attention_heads": 16,
        "attention_head_dim": 72,
        "in_channels": 4,
        "out_channels": 8,
        "num_embeds_ada_norm": 1000,
    }
    total, _packed, _plan = sizes_of(config, scheme)
    assert total <= 365e6


class TestWriting:
    def test_other_files_of_the_folder_stay(self, mixed: Any, tmp_path: Path) -> None:
        (tmp_path / "model.onnx").write_bytes(b"onnx")
        mixed.checkpoint.write(tmp_path)
        mixed.checkpoint.write(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "model.onnx",
            "qdit.json",
            "weights.safetensors",
        ]
        assert (tmp_path / "model.onnx").read_bytes() == b"onnx"

    def test_a_write_cut_short_while_packing_leaves_the_old_checkpoint(
        self,
        make_quantized: Callable[..., Any],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        old, new = (make_quantized(SCHEME, seed=seed).checkpoint for seed in range(2))
        old.write(tmp_path)
        before = digests(tmp_path)
        monkeypatch.setattr(checkpoint_layout, "pack", None)
        with pytest.raises(TypeError):
            new.write(tmp_path)
        assert digests(tmp_path) == before
        assert QuantizedCheckpoint.read(tmp_path).manifest == old.manifest

    def test_a_write_cut_short_before_the_manifest_leaves_no_checkpoint(
        self,
        make_quantized: Callable[..., Any],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        old, new = (make_quantized(SCHEME, seed=seed).checkpoint for seed in range(2))
        old.write(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint_module, "write_text", None)
            with pytest.raises(TypeError):
                new.write(tmp_path)
        with pytest.raises(MissingFileError, match=r"no qdit\.json .* run the export again"):
            QuantizedCheckpoint.read(tmp_path)
        new.write(tmp_path)
        assert QuantizedCheckpoint.read(tmp_path).manifest == new.manifest

    def test_an_open_checkpoint_survives_being_replaced(
        self, make_quantized: Callable[..., Any], tmp_path: Path
    ) -> None:
        old, new = (make_quantized(SCHEME, seed=seed) for seed in range(2))
        old.checkpoint.write(tmp_path)
        read = QuantizedCheckpoint.read(tmp_path)
        new.checkpoint.write(tmp_path)
        for name, weight in old.weights.items():
            assert equal_weights(read.weights[name], weight)

    def test_tensors_changed_since_are_noticed(self, mixed: Any, tmp_path: Path) -> None:
        mixed.weights[Q0].values[0, 0] ^= 1
        with pytest.raises(InputError, match="tensors changed after it was made"):
            mixed.checkpoint.write(tmp_path)
        assert list(tmp_path.iterdir()) == []


def changed(weight: QuantizedWeight, **fields: Any) -> QuantizedWeight:
    return replace(weight, **fields)


class TestMaking:
    """Parts that do not fit together are refused when the checkpoint is made."""

    @pytest.fixture
    def made(self, make_quantized: Callable[..., Any]) -> Any:
        return make_quantized(SCHEME, MIXED)

    def make(self, made: Any, **parts: Any) -> QuantizedCheckpoint:
        given = {
            "model": made.model,
            "plan": made.plan,
            "weights": made.weights,
            "provenance": {},
            "metrics": {},
        }
        return QuantizedCheckpoint.from_result(**(given | parts))

    def test_a_weight_is_missing(self, made: Any) -> None:
        del made.weights[Q0]
        with pytest.raises(InputError, match=rf"quantizes {Q0}, but it has no quantized weights"):
            self.make(made)

    def test_a_weight_is_left_over(self, made: Any) -> None:
        made.weights[UP1] = made.weights[Q0]
        with pytest.raises(InputError, match=rf"weights for {UP1}, which the plan leaves alone"):
            self.make(made)

    @pytest.mark.parametrize(
        "other",
        [
            LayerScheme(4, 8, 32, 64, False, False),
            LayerScheme(3, 8, 64, 64, False, False),
            LayerScheme(3, 8, 32, 64, True, False),
        ],
        ids=["bits", "group", "symmetry"],
    )
    def test_a_weight_was_quantized_by_another_plan(self, made: Any, other: LayerScheme) -> None:
        plan = QuantizationPlan("w4a8", dict(made.plan.layers) | {Q0: other})
        with pytest.raises(InputError, match=rf"the weight of {Q0} must have .* by the same plan"):
            self.make(made, plan=plan)

    def test_a_weight_has_another_shape(self, made: Any) -> None:
        weight = made.weights[Q0]
        made.weights[Q0] = changed(weight, values=weight.values[:-1])
        with pytest.raises(InputError, match=rf"the weight of {Q0} must have shapes"):
            self.make(made)

    def test_an_integer_is_out_of_range(self, made: Any) -> None:
        made.weights[Q0].values[3, 5] = 8
        with pytest.raises(InputError, match=r"asymmetric 3-bit values must lie in \[0, 7\]"):
            self.make(made)

    def test_a_zero_point_is_out_of_range(self, made: Any) -> None:
        made.weights[Q0].zero_point[3, 1] = 8
        with pytest.raises(InputError, match=r"asymmetric 3-bit values must lie in \[0, 7\]"):
            self.make(made)

    def test_a_scale_is_not_exact_in_float16(self, made: Any) -> None:
        made.weights[Q0].scale[0, 0] *= 1 + 2.0**-20
        with pytest.raises(InputError, match=rf"the scales of {Q0} must be exact in float16"):
            self.make(made)

    @pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
    @pytest.mark.parametrize("name", [Q0, OUT0], ids=["float16", "float32"])
    def test_a_scale_is_no_scale(self, made: Any, name: str, value: float) -> None:
        made.weights[name].scale[0, 0] = value
        with pytest.raises(InputError, match=rf"the scales of {name} must be"):
            self.make(made)

    @pytest.mark.parametrize(
        ("name", "scheme", "message"),
        [
            (Q0, INTEGER, "must have shapes of values, scales, zero points and multipliers"),
            (DOWN1, SCHEME, "must have shapes of values, scales, zero points and multipliers"),
        ],
        ids=["multipliers missing", "multipliers left over"],
    )
    def test_the_scale_formats_differ(
        self,
        make_quantized: Callable[..., Any],
        name: str,
        scheme: LayerScheme,
        message: str,
    ) -> None:
        made = make_quantized(SCHEME, {DOWN1: INTEGER})
        plan = QuantizationPlan("w4a8", dict(made.plan.layers) | {name: scheme})
        with pytest.raises(InputError, match=rf"the weight of {name} {message}"):
            self.make(made, plan=plan)

    @pytest.mark.parametrize(
        ("part", "value", "message"),
        [
            ("multiplier", 0, r"multipliers of .* must lie in \[1, 16\], got \[0, "),
            ("multiplier", 17, r"multipliers of .* must lie in \[1, 16\], got \[\d+, 17\]"),
            ("scale", 0.3, "must be the channel's scale times its multipliers, exactly"),
        ],
        ids=["multiplier 0", "multiplier 17", "no multiple"],
    )
    def test_multipliers_are_out_of_range_or_not_the_scales(
        self, make_quantized: Callable[..., Any], part: str, value: float, message: str
    ) -> None:
        made = make_quantized(INTEGER)
        getattr(made.weights[Q0], part)[3, 1] = value
        with pytest.raises(InputError, match=message):
            self.make(made)

    @pytest.mark.parametrize(
        ("scale_dtype", "scale", "message"),
        [
            ("float16", 1 + 2.0**-11, "must be exact in float16"),
            ("float32", 1 + 2.0**-20, "must have at most 20 significant bits"),
        ],
    )
    def test_a_channels_scale_has_too_many_bits(
        self, make_quantized: Callable[..., Any], scale_dtype: str, scale: float, message: str
    ) -> None:
        made = make_quantized(replace(INTEGER, scale_dtype=scale_dtype))  # type: ignore[arg-type]
        weight = made.weights[Q0]
        weight.multiplier[3] = 8  # a power of two: the product is exact whatever the scale
        weight.scale[3] = 8 * scale
        with pytest.raises(InputError, match=rf"the scales of {Q0} {message}"):
            self.make(made)

    @pytest.mark.parametrize("value", [float("inf"), float("nan")])
    def test_a_parameter_is_not_finite(self, made: Any, value: float) -> None:
        with torch.no_grad():
            made.model.denoiser.proj_out_1.bias[0] = value
        with pytest.raises(InputError, match=r"proj_out_1\.bias must be finite"):
            self.make(made)

    def test_the_plan_is_of_another_model(self, made: Any) -> None:
        plan = QuantizationPlan("w4a8", {Q0: SCHEME})
        with pytest.raises(InputError, match="the plan has no scheme for linear"):
            self.make(made, plan=plan)

    def test_the_config_is_of_another_model(self, made: Any) -> None:
        made.model.config = made.model.config | {"num_embeds_ada_norm": 7}
        with pytest.raises(InputError, match=r"calls for the parameter .* load the model again"):
            self.make(made)

    @pytest.mark.parametrize("what", ["provenance", "metrics"])
    @pytest.mark.parametrize("value", [float("nan"), {1, 2}, Path("x")], ids=["nan", "set", "path"])
    def test_notes_are_no_json(self, made: Any, what: str, value: object) -> None:
        with pytest.raises(InputError, match=rf"the {what} must be finite JSON data"):
            self.make(made, **{what: {"key": value}})
