"""What a written ONNX file says of its linears."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...errors import ArtifactError
from .ledger import LINEARS_KEY


def linears_of(onnx_path: Path) -> dict[str, dict[str, Any]]:
    """The 'qdit.linears' record of a file, {} for a file made elsewhere. Raises `ArtifactError`."""
    import onnx  # building needs no onnx package where no file is looked into

    try:
        model = onnx.load(onnx_path, load_external_data=False)
        entries = {entry.key: entry.value for entry in model.metadata_props}
        found = json.loads(entries.get(LINEARS_KEY, "{}"))
        return {str(name): dict(record) for name, record in found.items()}
    except Exception as error:  # protobuf raises kinds of its own
        raise ArtifactError(f"{onnx_path} is not a readable ONNX file: {error}") from error
