"""Parity of denoisers: full precision, torch simulation and an exported file, on the same inputs.

They run one after another, so that few large things are alive at once: full precision (which the
caller may then put away), the float64 simulation, and the float32 one, which stays for comparing
linears beside the engine's sessions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..calibrate.checkpoint import QuantizedCheckpoint
from ..calibrate.model import DiffusionModel
from ..errors import QditError, StepError
from ..memory import release_memory
from ..progress import Progress, Silent
from .parity_inputs import Step, noise_steps, spread
from .parity_internals import (
    BlockError,
    ExposedValues,
    LinearError,
    block_errors,
    block_outputs,
    engine_blocks,
    linear_errors,
)
from .parity_measure import Comparison
from .parity_timesteps import (
    DenoiserBound,
    TimestepError,
    compare_outputs,
    denoiser_bound,
    run_steps,
    timestep_errors,
)
from .proof_engine import ProofEngine

# Steps on which the float64 (or float16) simulation runs too: it is the slowest of all.
BOUND_STEPS = 5
# The bound rests on rounding flips, about one in 10^5 quantized activations: with fewer of these
# its two distances would be those of a handful of flips. A small model gets more inputs.
_FEWEST_ACTIVATIONS = 5e6
_MOST_EXTRA_IMAGES = 2048


@dataclass(frozen=True)
class DenoiserParity:
    """Everything that was compared on the denoiser itself.

    The two overall figures are relative errors of the predicted noise over all images and steps.
    `linears` and `blocks` come from one step, the middle one. `file`: the engine against what else
    runs its file, where its inner values cannot be looked at; None elsewhere. `exact`: the engine
    computes what the plan says.
    """

    simulation: Comparison
    engine: Comparison
    bound: DenoiserBound
    linears: list[LinearError]
    blocks: list[BlockError]
    timesteps: list[TimestepError]
    images: int
    dtype: str
    file: FileParity | None = None
    exact: bool = True

    @property
    def worst_linear(self) -> LinearError | None:
        """The linear of the largest relative error; None when nothing is quantized."""
        if not self.linears:
            return None
        return max(self.linears, key=lambda linear: linear.comparison.relative_error)


@dataclass(frozen=True)
class FileParity:
    """An engine against the same file in ONNX Runtime, over up to five steps.

    `own`: how far ONNX Runtime is from itself, with its optimizations and node by node. Both are
    right; they differ by rounding, and by what it becomes where activations lie near a tie.
    """

    engine: Comparison
    own: Comparison


@dataclass(frozen=True)
class _Outputs:
    """What one torch denoiser made: the noise at every step, and the blocks at the middle one."""

    noise: list[Tensor]
    blocks: list[Tensor]


def measure_parity(
    model: DiffusionModel,
    checkpoint: QuantizedCheckpoint,
    engine: ProofEngine,
    steps: Sequence[Step],
    *,
    after_full_precision: Callable[[], None] = lambda: None,
    progress: Progress | None = None,
) -> DenoiserParity:
    """Compare the three on `steps` (from `record_trajectories`).

    Torch runs on the model's device.
    `after_full_precision` is called once `model` has run for the last time: from then on only its
    shapes are used. Raises `StepError` when the engine cannot be opened or run.
    """
    comparison = _Parity(model, checkpoint, list(steps), engine.dtype, progress or Silent())
    with plain_float32():
        full = comparison.torch_outputs(model.denoiser, "full precision", comparison.steps)
        after_full_precision()
        return _measure(comparison, full, engine)


def _measure(comparison: _Parity, full: _Outputs, engine: ProofEngine) -> DenoiserParity:
    model, checkpoint, dtype = comparison.model, comparison.checkpoint, comparison.dtype
    comparison.add_inputs(tokens=full.blocks[0].shape[1])
    other = comparison.other_simulation()
    release_memory()
    simulation = checkpoint.build_denoiser(model.device, torch.float32)
    simulated = comparison.torch_outputs(simulation, "simulation", comparison.inputs)
    values = engine.exposed()
    try:
        arrays, made = comparison.engine_outputs(engine, values)
        file = comparison.against_file(engine, made)
    except QditError:
        raise
    except Exception as error:  # whatever the runtime raises
        raise StepError(f"{engine.what} failed to run while comparing it: {error}") from error
    bounded, count = comparison.bounded, len(comparison.steps)
    on_steps = simulated.noise[:count], made[:count]
    return DenoiserParity(
        simulation=compare_outputs(on_steps[0], full.noise),
        engine=compare_outputs(on_steps[1], on_steps[0]),
        bound=denoiser_bound(
            [made[i] for i in bounded], [simulated.noise[i] for i in bounded], other, dtype
        ),
        linears=linear_errors(simulation, model.family, values, arrays, dtype),
        blocks=block_errors(
            full.blocks, simulated.blocks, engine_blocks(values, arrays) if values.blocks else None
        ),
        timesteps=timestep_errors(comparison.steps, full.noise, *on_steps),
        images=len(comparison.steps[0].labels),
        dtype=dtype,
        file=file,
        exact=engine.exact,
    )


@contextmanager
def plain_float32() -> Iterator[None]:
    """No TF32 while comparing: its 10-bit products would hide what is measured (CUDA only)."""
    switches: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = False
    try:
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value


class _Parity:
    """The runs of one comparison."""

    def __init__(
        self,
        model: DiffusionModel,
        checkpoint: QuantizedCheckpoint,
        steps: list[Step],
        dtype: str,
        progress: Progress,
    ) -> None:
        self.model = model
        self.checkpoint = checkpoint
        self.steps = steps
        self.dtype = dtype
        self.progress = progress
        self.middle = steps[len(steps) // 2]
        self.inputs = steps  # and what `add_inputs` appends
        self.bounded = spread(len(steps), BOUND_STEPS)  # positions in `inputs` for the bound

    def add_inputs(self, tokens: int) -> None:
        """Append noise images until the bound rests on enough quantized activations."""
        plan = self.checkpoint.plan
        read = {
            spec.input_name: spec.in_features
            for spec in self.checkpoint.linears
            if plan[spec.name].quantizes_activations
        }
        per_image = tokens * sum(read.values())
        if per_image == 0:
            return
        have = sum(len(self.steps[index].labels) for index in self.bounded)
        missing = math.ceil(_FEWEST_ACTIVATIONS / per_image) - have
        extra = noise_steps(
            self.model, self.steps[0].timestep, min(max(0, missing), _MOST_EXTRA_IMAGES)
        )
        self.bounded += range(len(self.steps), len(self.steps) + len(extra))
        self.inputs = [*self.steps, *extra]

    def torch_outputs(self, denoiser: nn.Module, what: str, inputs: Sequence[Step]) -> _Outputs:
        family, device = self.model.family, self.model.device
        noise = self._run(denoiser, inputs, f"parity: {what}")
        return _Outputs(noise, block_outputs(denoiser, family, self.middle, device))

    def other_simulation(self) -> list[Tensor]:
        """The simulation in float64 (float16 for float16 files) on the inputs of the bound."""
        other = torch.float64 if self.dtype == "float32" else torch.float16
        denoiser = self.checkpoint.build_denoiser(self.model.device, other)
        name = str(other).removeprefix("torch.")
        chosen = [self.inputs[index] for index in self.bounded]
        return self._run(denoiser, chosen, f"parity: simulation in {name}")

    def engine_outputs(
        self, engine: ProofEngine, values: ExposedValues
    ) -> tuple[dict[str, NDArray[Any]], list[Tensor]]:
        """The inner values at the middle step, and the noise for every input.

        The two come from two sessions: exposing inner values can change what a runtime fuses, and
        the noise must be that of the engine as it is deployed.
        """
        family, denoiser = self.model.family, self.model.denoiser
        names = tuple(spec.name for spec in family.inputs(denoiser))
        arrays: dict[str, NDArray[Any]] = {}
        if values.names:
            inner = engine.open(values.names)
            try:
                arrays = inner.infer(self.middle.arrays(names))
            finally:
                inner.close()
            release_memory()
        return arrays, self._noise(engine, self.inputs, "parity: engine")

    def against_file(self, engine: ProofEngine, made: Sequence[Tensor]) -> FileParity | None:
        """The engine beside its file's references, on the trajectories' inputs of the bound."""
        chosen = [index for index in self.bounded if index < len(self.steps)]
        steps = [self.inputs[index] for index in chosen]
        noise = [
            self._noise(reference, steps, "parity: the same file in ONNX Runtime")
            for reference in engine.references()
        ]
        if not noise:
            return None
        first, second = noise
        return FileParity(
            compare_outputs([made[index] for index in chosen], first),
            compare_outputs(second, first),
        )

    def _noise(self, engine: ProofEngine, steps: Sequence[Step], what: str) -> list[Tensor]:
        """The predicted noise of an engine as it is deployed."""
        family, denoiser = self.model.family, self.model.denoiser
        names = tuple(spec.name for spec in family.inputs(denoiser))
        noise = []
        deployed = engine.open()
        try:
            for step in self.progress.track(steps, what, total=len(steps)):
                raw = deployed.infer(step.arrays(names))[family.output_name]
                noise.append(family.noise_prediction(denoiser, torch.from_numpy(raw)))
        finally:
            deployed.close()
        return noise

    def _run(self, denoiser: nn.Module, steps: Sequence[Step], description: str) -> list[Tensor]:
        return run_steps(
            self.model.as_denoiser(denoiser),
            steps,
            description,
            device=self.model.device,
            progress=self.progress,
        )
