"""A small DiT for the TensorRT lowerings, traced once an opset and dtype."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

from qdit.calibrate.checkpoint import QuantizedCheckpoint
from qdit.calibrate.model import DiffusionModel
from qdit.calibrate.plan import QuantizationPlan, uniform_plan
from qdit.calibrate.schemes import LayerScheme
from qdit.export.contents import LinearContents, checkpoint_contents
from qdit.export.tensorrt.files import compute_dtype, opset_for, write_traced
from qdit.export.tensorrt.versions import Features, TensorRtVersion, features
from qdit.export.trace import trace
from qdit.export.write import ExportedModel
from qdit.progress import Silent

from ..conftest import make_small_model, quantize_nearest

OLD = features(TensorRtVersion(8, 6))
NEW = features(TensorRtVersion(11, 4))


class Traced:
    """Abstract models of one small model, each traced once: that takes longest."""

    def __init__(self, model: DiffusionModel) -> None:
        self.model = model
        self._protos: dict[int, onnx.ModelProto] = {}

    def write(
        self,
        contents: dict[str, LinearContents],
        lowering: ir.passes.InPlacePass,
        path: Path,
        wanted: Features,
        skeleton: QuantizedCheckpoint,
        target: str = "tensorrt",
    ) -> ExportedModel:
        opset = opset_for(wanted)
        if opset not in self._protos:
            made = trace(
                skeleton.skeleton(),
                self.model.family,
                self.model.linears,
                dtype=compute_dtype(wanted),
                opset=opset,
            )
            self._protos[opset] = ir.to_proto(made)
        return write_traced(
            ir.from_proto(self._protos[opset]),
            self.model.family,
            "small",
            contents,
            path,
            target,
            lowering,
            wanted,
            Silent(),
        )


@pytest.fixture(scope="session")
def traced() -> Traced:
    return Traced(make_small_model(1))


def checkpoint_of(
    model: DiffusionModel, scheme: LayerScheme, **changes: LayerScheme
) -> tuple[QuantizedCheckpoint, dict[str, LinearContents]]:
    """A checkpoint of one scheme (adaLN weight-only), single layers changed by their role."""
    plan = uniform_plan("custom", scheme, model.linears)
    layers = dict(plan.layers)
    for spec in model.linears:
        if spec.role in changes:
            layers[spec.name] = changes[spec.role]
    checkpoint = quantize_nearest(model, QuantizationPlan("custom", layers))
    return checkpoint, checkpoint_contents(checkpoint)
