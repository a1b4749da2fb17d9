"""A hostile checkpoint with integer scales: their tensors, their plan, their schema version."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from qdit.calibrate import artifact_errors as errors
from qdit.calibrate.checkpoint_layout import check_values
from qdit.calibrate.plan import LinearSpec, QuantizationPlan
from qdit.calibrate.schemes import LayerScheme
from qdit.calibrate.tensor_file import TensorFile, read_entries
from qdit.errors import ArtifactError

from .conftest import Victim

Q0, OUT0, DOWN0 = (
    f"transformer_blocks.0.{path}" for path in ("attn1.to_q", "attn1.to_out.0", "ff.net.2")
)
MULTIPLIER, SCALE = f"{Q0}.weight.multiplier", f"{Q0}.weight.scale"
FLOAT32_SCALE = f"{OUT0}.weight.scale"


@pytest.fixture(scope="session")
def sound_integer(tmp_path_factory: pytest.TempPathFactory, make_quantized: Any) -> Path:
    """Integer scales everywhere but in one linear, stored as float32 in another."""
    folder = tmp_path_factory.mktemp("sound-integer")
    scheme = LayerScheme(4, 8, 32, "token", scale_format="integer")
    layers = {
        OUT0: LayerScheme(4, 8, 32, "token", scale_dtype="float32", scale_format="integer"),
        DOWN0: LayerScheme(4, 8, 32, "token"),
    }
    make_quantized(scheme, layers).checkpoint.write(folder)
    return folder


@pytest.fixture
def victim(sound_integer: Path, tmp_path: Path) -> Victim:
    return Victim(Path(shutil.copytree(sound_integer, tmp_path / "checkpoint")))


def replaced(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def apply(tensors: dict[str, Tensor]) -> None:
        tensors[name] = change(tensors[name]).contiguous()

    return apply


def filled(value: float) -> Callable[[Tensor], Tensor]:
    """The first element set to `value`."""

    def change(tensor: Tensor) -> Tensor:
        tensor.view(-1)[0] = value
        return tensor

    return change


def test_the_sound_one_reads(victim: Victim) -> None:
    weight = victim.read().weights[Q0]
    assert weight.multiplier is not None
    assert weight.multiplier.shape == weight.scale.shape == (64, 2)


class TestTensors:
    @pytest.mark.usefixtures("nothing_mapped")
    @pytest.mark.parametrize(
        ("change", "error", "match"),
        [
            (
                lambda t: t.pop(MULTIPLIER),
                errors.MissingTensorError,
                rf"lacks the tensor {MULTIPLIER}",
            ),
            (
                lambda t: t.update({f"{DOWN0}.weight.multiplier": t[MULTIPLIER].clone()}),
                errors.UnknownTensorError,
                rf"has the tensor {DOWN0}\.weight\.multiplier, which",
            ),
            (
                lambda t: t.update({f"{Q0}.weight.zero_point": t[MULTIPLIER].clone()}),
                errors.UnknownTensorError,
                rf"has the tensor {Q0}\.weight\.zero_point, which",
            ),
            # 64 channels of two groups, two multipliers a byte
            (
                replaced(MULTIPLIER, lambda t: t[:-1]),
                errors.ShapeMismatchError,
                r"must have shape \[64\] by config and plan, got \[63\]",
            ),
            (
                replaced(MULTIPLIER, lambda t: t.repeat(2)),
                errors.ShapeMismatchError,
                r"must have shape \[64\] by config and plan, got \[128\]",
            ),
            (
                replaced(MULTIPLIER, lambda t: t.view(64, 1)),
                errors.ShapeMismatchError,
                r"must have shape \[64\] by config and plan, got \[64, 1\]",
            ),
            (replaced(MULTIPLIER, Tensor.half), errors.WrongDtypeError, "must be U8, got F16"),
            # a scale a group, as float scales have it
            (
                replaced(SCALE, lambda t: t.repeat(1, 2)),
                errors.ShapeMismatchError,
                r"must have shape \[64, 1\] by config and plan, got \[64, 2\]",
            ),
            (
                replaced(f"{DOWN0}.weight.scale", lambda t: t[:, :1]),
                errors.ShapeMismatchError,
                r"must have shape \[64, 8\] by config and plan, got \[64, 1\]",
            ),
        ],
        ids=[
            "multiplier missing",
            "multiplier of float scales",
            "zero point",
            "multiplier short",
            "multiplier unpacked",
            "multiplier a matrix",
            "multiplier F16",
            "scale a group",
            "scale a channel of float scales",
        ],
    )
    def test_they_are_not_those_called_for(
        self,
        victim: Victim,
        change: Callable[[dict[str, Tensor]], object],
        error: type[ArtifactError],
        match: str,
    ) -> None:
        victim.change_tensors(change)
        victim.refuse(error, match)

    @pytest.mark.parametrize("name", [SCALE, FLOAT32_SCALE], ids=["float16", "float32"])
    @pytest.mark.parametrize(
        ("value", "error", "match"),
        [
            (float("nan"), errors.NonFiniteError, "must be finite"),
            (float("inf"), errors.NonFiniteError, "must be finite"),
            (0.0, errors.ScaleRangeError, "must be positive, got 0"),
            (-0.5, errors.ScaleRangeError, "must be positive, got -0.5"),
        ],
        ids=["nan", "inf", "zero", "negative"],
    )
    def test_a_scale_is_no_scale(
        self, victim: Victim, name: str, value: float, error: type[ArtifactError], match: str
    ) -> None:
        victim.change_tensors(replaced(name, filled(value)))
        victim.refuse(error, match)

    @pytest.mark.parametrize("value", [1 + 2.0**-20, 2.0**124], ids=["21 bits", "too large"])
    def test_float32_cannot_hold_the_multiples_of_a_scale(
        self, victim: Victim, value: float
    ) -> None:
        victim.change_tensors(replaced(FLOAT32_SCALE, filled(value)))
        victim.refuse(errors.ScaleRangeError, r"at most 20 significant bits and be finite 16 times")

    @pytest.mark.parametrize("value", [1 + 2.0**-19, 2.0**123], ids=["20 bits", "large"])
    def test_what_float32_can_hold_is_fine(self, victim: Victim, value: float) -> None:
        victim.change_tensors(replaced(FLOAT32_SCALE, filled(value)))
        weight = victim.read().weights[OUT0]
        assert weight.channel_scale[0, 0] == value
        assert weight.scale[0].isfinite().all()

    @pytest.mark.parametrize("byte", [0x00, 0xFF, 0x5A], ids=hex)
    def test_any_four_bits_are_a_multiplier(self, victim: Victim, byte: int) -> None:
        victim.change_tensors(replaced(MULTIPLIER, lambda t: torch.full_like(t, byte)))
        weight = victim.read().weights[Q0]
        assert weight.multiplier is not None
        # the first of a channel's two groups is the low half
        expected = [(byte & 15) + 1, (byte >> 4) + 1]
        assert weight.multiplier.tolist() == [expected] * 64
        assert torch.equal(weight.int8_values() * weight.channel_scale, weight.dequantize())


def test_padding_of_an_odd_number_of_multipliers_is_not_zero(tmp_path: Path) -> None:
    # no DiT has an odd number of channels; a family to come may
    spec = LinearSpec("odd", "mlp_in", 0, 32, 3, False, "odd.input")
    plan = QuantizationPlan("custom", {"odd": LayerScheme(4, 8, 32, scale_format="integer")})
    path = tmp_path / "weights.safetensors"
    for last, refused in ((0x0F, False), (0x1F, True)):
        tensors = {
            "odd.weight.packed": torch.zeros(3, 16, dtype=torch.uint8),
            "odd.weight.scale": torch.ones(3, 1, dtype=torch.float16),
            "odd.weight.multiplier": torch.tensor([0x21, last], dtype=torch.uint8),
        }
        safetensors.torch.save_file(tensors, path)
        file = TensorFile(path, read_entries(path))
        if refused:
            with pytest.raises(errors.PaddingError, match=r"bits of odd\.weight\.multiplier must"):
                check_values(file, plan, [spec], [])
        else:
            check_values(file, plan, [spec], [])


@pytest.mark.usefixtures("nothing_mapped")
class TestPlan:
    @pytest.mark.parametrize(
        ("fields", "error", "match"),
        [
            (
                {"scale_format": "float"},
                errors.ShapeMismatchError,
                rf"{SCALE} must have shape \[64, 2\]",
            ),
            (
                {"scale_format": "integers"},
                errors.InvalidPlanError,
                "scale format must be one of float, integer, got 'integers'",
            ),
            ({"scale_format": 1}, errors.InvalidPlanError, "one of float, integer, got 1"),
            ({"weight_bits": 8}, errors.InvalidPlanError, "need weights of 2, 3, 4 bits, got 8"),
            ({"weight_symmetric": False}, errors.InvalidPlanError, "need symmetric weights"),
            (
                {"weight_group": "channel"},
                errors.UnknownTensorError,
                rf"has the tensor {MULTIPLIER}, which",
            ),
            ({"scale_dtype": "float32"}, errors.WrongDtypeError, "must be F32, got F16"),
        ],
        ids=["float", "unknown", "number", "8 bits", "asymmetric", "channel", "scale dtype"],
    )
    def test_it_says_something_else(
        self, victim: Victim, fields: dict[str, Any], error: type[ArtifactError], match: str
    ) -> None:
        manifest = victim.manifest
        manifest["plan"]["layers"][Q0] |= fields
        victim.put_manifest(manifest)
        victim.refuse(error, match)

    @pytest.mark.parametrize("scale_format", ["integer", "float"])
    def test_version_1_has_no_scale_formats(self, victim: Victim, scale_format: str) -> None:
        manifest = victim.manifest
        for scheme in manifest["plan"]["layers"].values():
            scheme["scale_format"] = scale_format
        manifest["version"] = 1
        victim.put_manifest(manifest)
        victim.refuse(errors.InvalidPlanError, "scale_format needs schema version 2, got version 1")
