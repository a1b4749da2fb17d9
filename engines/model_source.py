"""An ONNX file as ONNX Runtime is given it: by its path, or as bytes of a changed model."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ArtifactError, InputError
from .onnx_peek import operators_of

if TYPE_CHECKING:
    import onnx


class ModelSource:
    """The model of a file, read once and only where something is to be changed in it.

    External data stays where it is: ONNX Runtime looks for it in the file's folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._model: onnx.ModelProto | None = None

    def load(self) -> onnx.ModelProto:
        """The model without external data. Raises `ArtifactError` for a file that is none."""
        if self._model is None:
            import onnx  # only where a file is changed: others do not pay for it

            try:
                self._model = onnx.load(self.path, load_external_data=False)
            except Exception as error:  # protobuf raises kinds of its own
                raise ArtifactError(f"{self.path} is not a readable ONNX file: {error}") from error
        return self._model

    def mentions(self, operator: str) -> bool:
        """Whether a node of the graph is such an operator, of whatever domain. True as well for a
        file that is no ONNX file: whoever loads it says so."""
        found = operators_of(self.path)
        return found is None or operator in found

    def add_outputs(self, names: Sequence[str]) -> None:
        """Inner values as further outputs. Raises `InputError` for a name that there is not."""
        import onnx

        graph = self.load().graph
        made = {name for node in graph.node for name in node.output}
        given = {value.name for value in graph.output}
        for name in names:
            if name not in made:
                close = difflib.get_close_matches(name, sorted(made), n=1)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise InputError(f"{self.path} has no value {name!r} to return{hint}")
            if name not in given:
                graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
                given.add(name)

    def take(self) -> bytes:
        """The model's bytes; it is let go of, so that there are not two while a session loads."""
        data: bytes = self.load().SerializeToString()
        self._model = None
        return data

    def drop(self) -> None:
        """Let go of the model."""
        self._model = None
