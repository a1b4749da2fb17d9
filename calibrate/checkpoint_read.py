"""Read a checkpoint folder from anyone: everything is checked before anything is allocated."""

from __future__ import annotations

import re
import stat
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import ArtifactError, InputError
from ..files import sha256_of_file
from .artifact_errors import (
    FileTooLargeError,
    HashMismatchError,
    InvalidPlanError,
    MissingFileError,
    ShapeMismatchError,
    SizeMismatchError,
    TruncatedFileError,
    UnknownFamilyError,
    UnsafePathError,
)
from .checkpoint_layout import (
    StoredParameters,
    StoredWeights,
    check_entries,
    check_values,
    expected_entries,
    quantized_linears,
)
from .checkpoint_make import CheckpointParts, linear_entries, plan_in_order
from .checkpoint_manifest import (
    INTEGER_SCALES_VERSION,
    MANIFEST_NAME,
    Manifest,
    WeightsEntry,
    parse_manifest,
)
from .checkpoint_model import apply_ties, check_scheduler_config, outline, stored_shapes
from .families import family_named
from .families.base import Family
from .plan import LinearSpec, QuantizationPlan
from .tensor_file import TensorFile, read_entries

# DiT-XL/2's manifest has 0.1 MB.
MAX_MANIFEST_BYTES = 16 << 20
_MESSAGE_LENGTH = 600
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def read_parts(folder: Path) -> CheckpointParts:
    """Check a checkpoint folder by the rules of `docs/format.md`, in their order, and open it.

    Raises the `ArtifactError` that names the first broken rule.
    """
    try:
        return _read(folder)
    except ArtifactError as error:
        raise type(error)(_printable(str(error))) from error
    except OSError as error:
        raise MissingFileError(f"{folder} cannot be read: {error}") from error


def _printable(message: str) -> str:
    """One line of bounded length: names and values out of a hostile file end up in messages."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message[: 2 * _MESSAGE_LENGTH])
    return line if len(line) <= _MESSAGE_LENGTH else line[: _MESSAGE_LENGTH - 1] + "…"


def _read(folder: Path) -> CheckpointParts:
    manifest_path = _file_in(folder, MANIFEST_NAME)
    size = manifest_path.stat().st_size
    if size > MAX_MANIFEST_BYTES:
        raise FileTooLargeError(
            f"{manifest_path} may have {MAX_MANIFEST_BYTES} bytes, it has {size}"
        )
    manifest = parse_manifest(manifest_path.read_bytes(), str(manifest_path))
    path = _file_in(folder, manifest.weights.file)
    _check_size(path, manifest.weights)
    entries = read_entries(path)
    family = _family(manifest, manifest_path)
    check_scheduler_config(manifest.model.scheduler_config)
    denoiser = outline(family, manifest.model.config, len(entries))
    linears = family.linears(denoiser)
    _check_linears(manifest, linears, manifest_path)
    plan = _plan(manifest, linears, manifest_path)
    apply_ties(denoiser, manifest.ties, {spec.name: None for spec in linears})
    untouched = _untouched(denoiser, plan, linears)
    check_entries(entries, expected_entries(plan, linears, untouched), path)
    if sha256_of_file(path) != manifest.weights.sha256:
        raise HashMismatchError(
            f"{path} is not the file that {manifest_path} was written for (SHA-256 differs); "
            "a write was cut short or a file was replaced: export the model again"
        )
    file = TensorFile(path, entries)
    check_values(file, plan, linears, untouched)
    return CheckpointParts(
        manifest=manifest,
        family=family,
        plan=plan,
        linears=linears,
        weights=StoredWeights(file, plan, linears),
        parameters=StoredParameters(file, untouched),
    )


def _file_in(folder: Path, name: str) -> Path:
    """The regular file `name` directly in `folder`, never a path out of it."""
    if not _PLAIN_NAME.fullmatch(name):
        raise UnsafePathError(
            f"a checkpoint's file must have a plain name of letters, digits, '.', '_' and '-' "
            f"without a path, got {name[:80]!r}; it lies beside {MANIFEST_NAME}"
        )
    path = folder / name
    if path.is_symlink() and not _stays_in(path, folder):
        raise UnsafePathError(f"{path} is a link out of its folder; copy the file instead")
    if not path.exists():
        raise MissingFileError(
            f"there is no {name} in {folder}; name the folder of a finished export, "
            "or run the export again"
        )
    if not stat.S_ISREG(path.stat().st_mode):
        raise MissingFileError(f"{path} must be a regular file")
    return path


def _stays_in(path: Path, folder: Path) -> bool:
    try:
        return path.resolve().parent == folder.resolve()
    except RuntimeError:  # how pathlib reports a loop of links before Python 3.13
        return False


def _check_size(path: Path, entry: WeightsEntry) -> None:
    size = path.stat().st_size
    message = f"{path} must have {entry.bytes} bytes by {MANIFEST_NAME}, got {size}; export again"
    if size < entry.bytes:
        raise TruncatedFileError(message)
    if size > entry.bytes:
        raise SizeMismatchError(message)


def _family(manifest: Manifest, where: Path) -> Family:
    try:
        return family_named(manifest.model.family)
    except InputError as error:
        raise UnknownFamilyError(f"{where}: {error}") from error


def _check_linears(manifest: Manifest, linears: list[LinearSpec], where: Path) -> None:
    expected = linear_entries(linears)
    if len(manifest.linears) != len(expected):
        raise ShapeMismatchError(
            f"{where} lists {len(manifest.linears)} linears, the config gives {len(expected)}"
        )
    for found, wanted in zip(manifest.linears, expected, strict=True):
        if found != wanted:
            raise ShapeMismatchError(
                f"{where} lists the linear {found!r}, the config gives {wanted!r}"
            )


def _plan(manifest: Manifest, linears: list[LinearSpec], where: Path) -> QuantizationPlan:
    try:
        plan = QuantizationPlan.from_json(manifest.plan)
        _check_says(manifest)
        plan.check(linears)
    except InputError as error:
        raise InvalidPlanError(f"{where}: {error}") from error
    return plan_in_order(plan, linears)


def _check_says(manifest: Manifest) -> None:
    """Raise `InputError` for a key that the manifest's version does not have yet."""
    layers: Any = manifest.plan["layers"]
    for name, scheme in layers.items():
        if manifest.version < INTEGER_SCALES_VERSION and "scale_format" in scheme:
            raise InputError(
                f"the plan's layer {name}: scale_format needs schema version "
                f"{INTEGER_SCALES_VERSION}, got version {manifest.version}"
            )


def _untouched(
    denoiser: nn.Module, plan: QuantizationPlan, linears: list[LinearSpec]
) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that stay as they are."""
    shapes = stored_shapes(denoiser)
    for spec in quantized_linears(plan, linears):
        shapes.pop(f"{spec.name}.weight", None)
    return shapes
