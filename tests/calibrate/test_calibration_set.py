"""The calibration set as a file: round trip, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from qdit.calibrate.calibration_set import CalibrationSet, metadata_of
from qdit.errors import ArtifactError, InputError


def make(samples: int = 5, seed: int = 0) -> CalibrationSet:
    generator = torch.Generator().manual_seed(seed)
    return CalibrationSet(
        torch.randn(samples, 3, 4, 4, generator=generator),
        torch.randint(1000, (samples,), generator=generator),
        torch.randint(10, (samples,), generator=generator),
    )


def same(one: CalibrationSet, other: CalibrationSet) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.tensors, other.tensors, strict=True))


def test_round_trip_keeps_values_metadata_and_digest(tmp_path: Path) -> None:
    original = make()
    original.write(tmp_path / "set.safetensors", {"seed": "7"})
    restored = CalibrationSet.read(tmp_path / "set.safetensors")
    assert same(original, restored)
    assert restored.digest == original.digest
    assert metadata_of(tmp_path / "set.safetensors") == {"seed": "7"}
    assert [path.name for path in tmp_path.iterdir()] == ["set.safetensors"]


def test_batches_are_the_set_in_order() -> None:
    original = make(5)
    parts = list(original.batches(2))
    assert [len(part) for part in parts] == [2, 2, 1]
    assert same(CalibrationSet.concatenate(parts), original)


@pytest.mark.parametrize("changed", [0, 1, 2], ids=["hidden_states", "timestep", "class_labels"])
def test_digest_tells_every_tensor_apart(changed: int) -> None:
    original = make()
    tensors = [tensor.clone() for tensor in original.tensors]
    tensors[changed].view(-1)[0] += 1
    assert CalibrationSet(*tensors).digest != original.digest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda x, t, y: (x.half(), t, y),
            "hidden_states must be torch.float32, got torch.float16",
        ),
        (lambda x, t, y: (x, t.float(), y), "timestep must be torch.int64, got torch.float32"),
        (lambda x, t, y: (x, t, y[1:]), r"class_labels must have 1 dimensions and 5 samples"),
        (lambda x, t, y: (x[0], t, y), r"hidden_states must have 4 dimensions"),
        (lambda x, t, y: (x[:0], t[:0], y[:0]), "at least one sample, got 0"),
    ],
    ids=["half precision", "float timestep", "lengths differ", "no batch", "empty"],
)
def test_malformed_sets_cannot_be_built(
    change: Callable[..., tuple[Tensor, ...]], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        CalibrationSet(*change(*make().tensors))


def test_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "set.safetensors"
    make().write(path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ArtifactError, match="no readable calibration set"):
        CalibrationSet.read(path)
    assert metadata_of(path) == {}


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no readable calibration set"):
        CalibrationSet.read(tmp_path / "none.safetensors")


def test_other_tensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "set.safetensors"
    save_file({"x": torch.zeros(3)}, path)
    with pytest.raises(ArtifactError, match="holds hidden_states, timestep, class_labels, got x"):
        CalibrationSet.read(path)


def test_wrong_dtype_in_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "set.safetensors"
    names = ("hidden_states", "timestep", "class_labels")
    save_file(dict(zip(names, (t.double() for t in make().tensors), strict=True)), path)
    with pytest.raises(ArtifactError, match=r"must be torch.float32, got torch.float64; collect"):
        CalibrationSet.read(path)


def test_batch_size_must_be_positive() -> None:
    with pytest.raises(InputError, match="batch size must be at least 1, got 0"):
        list(make().batches(0))
