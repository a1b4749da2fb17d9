"""Make the probe that a file is tested with whenever it is loaded (`engines/probe_check.py`)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from ...calibrate.checkpoint import QuantizedCheckpoint
from ...calibrate.families.base import Family
from ...export.opsets import ComputeDtype, torch_dtype
from ..probe_check import Probe

_SAMPLES, _FEW_SAMPLES = 2, 1  # of a small model and of a large one
_SEED = 20

# A correct program differs from the simulation by about what a nudge of the inputs does to it: both
# make values next to a tie round the other way. Eight times that is far from what a fault does.
_FACTOR = 8.0
# Weight-only models have no ties: several hundred roundings of float32, and of faster exponentials.
_LEAST = 1e-4
# No tolerance may let through what is plainly wrong, however unstable a model is.
_MOST = 0.2
_NUDGE = 2.0**-20


@torch.inference_mode()
def make_probe(
    checkpoint: QuantizedCheckpoint, device: str, dtype: ComputeDtype = "float32"
) -> Probe:
    """Random inputs and the float32 simulation's outputs, with a tolerance measured on them.

    `checkpoint` has the plan that the file computes (`computed_plan`), `dtype` is what it computes
    in. A float16 file may be as many times as far from the float32 simulation as the float16 one
    is: another order of sums, another exponential, scales rounded once more cost no more than that.
    """
    family = checkpoint.family
    simulation = checkpoint.build_denoiser(device, torch.float32)
    count = _FEW_SAMPLES if checkpoint.is_large else _SAMPLES
    generator = torch.Generator().manual_seed(_SEED)
    inputs = family.example_inputs(simulation, count, generator)
    signs = torch.randint(0, 2, inputs[0].shape, generator=generator) * 2 - 1
    nudged = (inputs[0] * (1 + _NUDGE * signs), *inputs[1:])
    wanted = _run(family, simulation, inputs, device)
    if dtype == "float32":
        own = _run(family, simulation, nudged, device)
    else:
        half = checkpoint.build_denoiser(device, torch_dtype(dtype))
        own = _run(family, half, inputs, device)
    error = float(np.linalg.norm(own - wanted) / np.linalg.norm(wanted))
    names = [spec.name for spec in family.inputs(simulation)]
    return Probe(
        {name: value.numpy() for name, value in zip(names, inputs, strict=True)},
        {family.output_name: wanted},
        min(max(_FACTOR * error, _LEAST), _MOST),
    )


def _run(
    family: Family, simulation: nn.Module, inputs: tuple[Tensor, ...], device: str
) -> np.ndarray:
    output = family.forward(simulation, *(value.to(device) for value in inputs))
    made: np.ndarray = output.float().cpu().numpy()
    return made
