"""docs/format.md says what the code does: its worked bytes, its keys, its errors."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from qdit.calibrate import artifact_errors, checkpoint_manifest, checkpoint_model, checkpoint_read
from qdit.calibrate.checkpoint_manifest import SCHEMA_VERSION, Manifest
from qdit.calibrate.packing import pack
from qdit.calibrate.schemes import ACTIVATION_BITS, GROUP_SIZES, WEIGHT_BITS, LayerScheme
from qdit.calibrate.tensor_file import MAX_HEADER_BYTES
from qdit.errors import ArtifactError


@pytest.fixture(scope="module")
def page(repository: Path) -> str:
    return (repository / "docs" / "format.md").read_text("utf-8")


def rows_of(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table under a heading, its first two lines left out."""
    section = page.split(heading, 1)[1]
    table = re.search(r"(?:^\|.*\n)+", section, re.MULTILINE)
    assert table is not None
    lines = table[0].strip().splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_the_worked_bytes_are_right(page: str) -> None:
    rows = rows_of(page, "### Packed integers")
    assert len(rows) == 7
    for bits, integers, stream, data in rows:
        width, kind = bits.split()
        values = [int(value.replace("−", "-")) for value in integers.split(",")]
        packed = pack(torch.tensor([values]), int(width), kind == "signed")
        assert bytes(packed.flatten().tolist()) == bytes.fromhex(data.strip("`"))
        number = int(stream.replace(" ", ""), 2)
        assert number == int.from_bytes(bytes.fromhex(data.strip("`")), "little")


def schema_keys(model: Any, prefix: str = "") -> set[str]:
    keys = set()
    for name, field in model.model_fields.items():
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        inner = [kind for kind in kinds if inspect.isclass(kind) and hasattr(kind, "model_fields")]
        dots = ".*" if field.annotation not in inner else ""
        keys |= schema_keys(inner[0], f"{prefix}{name}{dots}.") if inner else {f"{prefix}{name}"}
    return keys


def test_the_table_of_keys_is_the_schema(page: str) -> None:
    written = {cells[0].strip("`") for cells in rows_of(page, "## `qdit.json`")}
    scheme = {f"plan.layers.*.{key}" for key in LayerScheme.__dataclass_fields__}
    plan = {"plan.version", "plan.bits", "plan.layers"}
    expected = schema_keys(Manifest) - {"plan"} | plan | scheme | {"linears"}
    assert written == expected


def test_the_choices_of_a_scheme_are_the_codes(page: str) -> None:
    rows = {cells[0].strip("`"): cells[1] for cells in rows_of(page, "## `qdit.json`")}

    def text(values: tuple[int, ...]) -> str:
        return ", ".join(map(str, values))

    assert rows["plan.layers.*.weight_bits"] == text(WEIGHT_BITS)
    assert rows["plan.layers.*.activation_bits"] == text(ACTIVATION_BITS)
    assert rows["plan.layers.*.weight_group"] == f'{text(GROUP_SIZES)}, `"channel"`'


def test_every_error_has_a_rule_and_every_rule_an_error(page: str) -> None:
    validation = page.split("## Validation", 1)[1]
    named = set(re.findall(r"`(\w+Error)`", validation))
    defined = {
        name
        for name, value in vars(artifact_errors).items()
        if inspect.isclass(value) and issubclass(value, ArtifactError)
    }
    assert named - {"ArtifactError"} == defined - {"ArtifactError"}


def test_limits_are_those_of_the_code(page: str) -> None:
    assert checkpoint_read.MAX_MANIFEST_BYTES == MAX_HEADER_BYTES == 16 << 20
    assert "`qdit.json` has at most 16 MiB" in page
    assert checkpoint_model.MAX_BUFFER_BYTES == 256 << 20
    assert "fixed tables take 256 MiB at most" in page
    assert f"{checkpoint_model.MAX_LAYERS} at most" in page
    assert checkpoint_model.MAX_SCHEDULER_INTEGER == 10**6
    assert f"schema version {SCHEMA_VERSION}" in page.splitlines()[0]
    versions = {int(cells[0]) for cells in rows_of(page, "## Versions")}
    assert versions == {SCHEMA_VERSION, *checkpoint_manifest.OLDER_VERSIONS}
