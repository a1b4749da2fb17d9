"""docs/format.md says what the code does: its worked bytes, its keys, its errors."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from qdit.calibrate import artifact_errors, checkpoint_manifest, checkpoint_model, checkpoint_read
from qdit.calibrate.checkpoint_manifest import READ_VERSIONS, SCHEMA_VERSION, Manifest
from qdit.calibrate.integer_scales import CHANNEL_SCALE_BITS
from qdit.calibrate.packing import pack
from qdit.calibrate.schemes import (
    ACTIVATION_BITS,
    GROUP_SIZES,
    INTEGER_SCALE_BITS,
    LARGEST_MULTIPLIER,
    MULTIPLIER_BITS,
    WEIGHT_BITS,
    LayerScheme,
    ScaleFormat,
)
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


def test_the_worked_multipliers_are_right(page: str) -> None:
    section = page.split("Multipliers are 4-bit plain integers", 1)[1]
    (row,) = rows_of("#" + section, "#")
    given, less, data, stored, scales = row
    multipliers = [int(value) for value in given.split(",")]
    assert [int(value) for value in less.split(",")] == [m - 1 for m in multipliers]
    packed = pack(torch.tensor([multipliers]) - 1, MULTIPLIER_BITS, symmetric=False)
    assert bytes(packed.flatten().tolist()) == bytes.fromhex(data.strip("`"))
    scale = np.frombuffer(bytes.fromhex(stored.strip("`")), "<f2")[0]
    assert [float(value) for value in scales.split(",")] == [float(scale) * m for m in multipliers]


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
    formats = ", ".join(f'`"{value}"`' for value in get_args(ScaleFormat))
    assert rows["plan.layers.*.scale_format"] == formats


def test_the_limits_of_integer_scales_are_the_codes(page: str) -> None:
    assert f"an integer multiplier m [N, G] of 1 … {LARGEST_MULTIPLIER} times" in page
    assert INTEGER_SCALE_BITS == (2, 3, 4)
    assert "symmetric and have 2, 3 or 4 bits" in page
    assert f"c has at\nmost {CHANNEL_SCALE_BITS} significant bits" in page
    bits = LayerScheme(4, 8, 128, scale_format="integer").effective_weight_bits(1152)
    assert f"4 + 4/128 + 16/1152 = {bits:.4f}" in page


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
    assert page.splitlines()[0].endswith("schema versions " + " and ".join(map(str, READ_VERSIONS)))
    versions = {int(cells[0]) for cells in rows_of(page, "## Versions")}
    assert versions == {*READ_VERSIONS, *checkpoint_manifest.OLDER_VERSIONS}
    assert max(READ_VERSIONS) == SCHEMA_VERSION
    assert get_args(Manifest.model_fields["version"].annotation) == READ_VERSIONS
