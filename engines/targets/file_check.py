"""How far a target's file is from the simulation: measured in ONNX Runtime, before any engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...calibrate.calibration_set import CalibrationSet
from ...calibrate.checkpoint import QuantizedCheckpoint
from ..onnxruntime_engine import OnnxRuntimeEngine
from ..parity_inputs import spread
from ..parity_measure import Comparer
from ..session_settings import CPU

_SAMPLES, _FEW_SAMPLES = 4, 1  # of a small model and of a large one
_SEED = 0


@torch.inference_mode()
def file_numbers(
    path: Path,
    checkpoint: QuantizedCheckpoint,
    samples: CalibrationSet | None,
    *,
    device: str,
    threads: int | None,
    providers: Sequence[str] = (CPU,),
) -> dict[str, Any]:
    """{'file_vs_simulation': relative error of the predicted noise, 'compared_inputs': how many,
    'compared_by': what multiplied grouped weights and activations, '' where nothing does}.

    Inputs are spread over the calibration set, so over the timesteps; without one they are noise.
    A target that changes the plan's meaning (`Target.changes`) is as far away as that change.
    """
    inputs = _inputs(checkpoint, samples)
    family = checkpoint.family
    simulation = checkpoint.build_denoiser(device, torch.float32)
    names = [spec.name for spec in family.inputs(simulation)]
    engine = OnnxRuntimeEngine(path, threads=threads, providers=providers)
    comparer = Comparer()
    try:
        for row in zip(*(tensor.split(1) for tensor in inputs), strict=True):
            arrays = {name: value.numpy() for name, value in zip(names, row, strict=True)}
            made = torch.from_numpy(engine.infer(arrays)[family.output_name]).float()
            expected = family.forward(simulation, *(value.to(device) for value in row)).cpu()
            comparer.add(
                family.noise_prediction(simulation, made),
                family.noise_prediction(simulation, expected),
            )
    finally:
        engine.close()
    error = comparer.result().relative_error
    return {
        "file_vs_simulation": error,
        "compared_inputs": len(inputs[0]),
        "compared_by": engine.kernels.note,
    }


def _inputs(checkpoint: QuantizedCheckpoint, samples: CalibrationSet | None) -> tuple[Tensor, ...]:
    count = _FEW_SAMPLES if checkpoint.is_large else _SAMPLES
    if samples is None:
        generator = torch.Generator().manual_seed(_SEED)
        outline = checkpoint.skeleton()
        return tuple(checkpoint.family.example_inputs(outline, count, generator))
    chosen = torch.tensor(spread(len(samples), min(count, len(samples))))
    return tuple(tensor[chosen] for tensor in samples.tensors)
