"""What is checked of a folder's ONNX files before a runtime reads them.

The checkpoint itself is checked by `QuantizedCheckpoint.read` (docs/format.md), its bytes against
their SHA-256; an ONNX file beside it must be of that very checkpoint.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
from onnx.external_data_helper import uses_external_data

from ..calibrate.checkpoint import QuantizedCheckpoint
from ..errors import ArtifactError
from ..export.opsets import LINEARS_KEY

# standard operators, ONNX Runtime's contrib ones, and qdit's own with their fallback bodies
_DOMAINS = {"", "ai.onnx", "com.microsoft", "qdit"}


def check_onnx(path: Path, checkpoint: QuantizedCheckpoint) -> onnx.ModelProto:
    """Raise `ArtifactError` unless the file at `path` belongs to `checkpoint` and stays at home.

    Returns the model as it was parsed, its external data left where it is. What is checked:

    1. It parses, and its operators are of known domains.
    2. External data lies beside it: plain names of regular files, no paths, no links out.
    3. Its record of linears names the checkpoint's, with their shapes.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf raises its own kinds for damaged bytes
        raise ArtifactError(f"{path} is not a readable ONNX file: {error}") from error
    for entry in model.opset_import:
        if entry.domain not in _DOMAINS:
            raise ArtifactError(
                f"{path} uses operators of the domain {entry.domain!r}, known are "
                f"{', '.join(sorted(_DOMAINS - {''}))}; export the model again"
            )
    for tensor in model.graph.initializer:
        if uses_external_data(tensor):
            _check_external(path, tensor)
    _check_linears(path, model, checkpoint)
    return model


def _check_external(path: Path, tensor: onnx.TensorProto) -> None:
    location = next((e.value for e in tensor.external_data if e.key == "location"), "")
    plain = location == Path(location).name and location not in ("", ".", "..")
    data = path.parent / location
    if not plain or "\\" in location:
        raise ArtifactError(
            f"{path} keeps {tensor.name} at {location!r}; external data must lie beside the file"
        )
    if not data.is_file() or data.resolve().parent != path.parent.resolve():
        raise ArtifactError(f"{path} needs {location} beside it, as a file and not a link out")


def _check_linears(path: Path, model: onnx.ModelProto, checkpoint: QuantizedCheckpoint) -> None:
    record = next((e.value for e in model.metadata_props if e.key == LINEARS_KEY), None)
    if record is None:
        raise ArtifactError(f"{path} has no record of its linears ({LINEARS_KEY}); export it again")
    try:
        found: dict[str, Any] = json.loads(record)
        shapes = {
            name: (entry["in_features"], entry["out_features"]) for name, entry in found.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path} has a damaged {LINEARS_KEY} record: {error}") from error
    expected = {s.name: (s.in_features, s.out_features) for s in checkpoint.linears}
    if shapes != expected:
        raise ArtifactError(
            f"{path} is not of the checkpoint beside it: their linears differ; export again"
        )
