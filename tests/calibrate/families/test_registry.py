"""The family registry: what is found, what is refused, and how a family joins."""

from __future__ import annotations

from pathlib import Path

import pytest

from qdit.calibrate import families
from qdit.calibrate.families import FAMILIES, family_named, family_of
from qdit.errors import InputError

NEW_FAMILY = """
class Toy:
    name = "toy"
    output_name = "sample"
    class_names = ("ToyTransformer",)

FAMILY = Toy()
"""


def test_dit_is_found_by_class_name() -> None:
    assert family_of({"_class_name": "DiTTransformer2DModel"}) is FAMILIES["dit"]


def test_dit_is_found_by_its_old_class_name() -> None:
    # as facebook/DiT-XL-2-256's transformer/config.json says
    config = {"_class_name": "Transformer2DModel", "norm_type": "ada_norm_zero"}
    assert family_of(config) is FAMILIES["dit"]


@pytest.mark.parametrize(
    "config",
    [
        {"_class_name": "UNet2DConditionModel"},
        {"_class_name": "Transformer2DModel", "norm_type": "ada_norm_single"},
        {},
    ],
    ids=["unet", "old PixArt", "no class"],
)
def test_other_classes_are_refused_with_what_is_supported(config: dict[str, str]) -> None:
    with pytest.raises(InputError, match=r"no model family .* classes are DiTTransformer2DModel"):
        family_of(config)


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match="no model family 'flux'; the families are dit"):
        family_named("flux")


def test_a_family_joins_by_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "toy.py").write_text(NEW_FAMILY)
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path)])
    assert sorted(families._discover()) == ["dit", "toy"]
