"""Targets that run in PyTorch: full precision eager and compiled, and the simulation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ....calibrate.checkpoint import QuantizedCheckpoint
from ....calibrate.families.base import Family
from ....calibrate.sources import load_model
from ....errors import InputError
from ..operator_times import OperatorTime, from_torch
from ..target import Inputs, Prepared, Runner, RunSettings

if TYPE_CHECKING:  # what only the parent needs must not count as the worker's memory
    from ...torch_engine.engine import TorchEngine
    from ..subject import Subject

Call = Callable[..., Tensor]
_PROFILED_RUNS = 3


class TorchRunner:
    """A denoiser in PyTorch. `weight_bytes` counts parameters and buffers as they are held."""

    def __init__(
        self, family: Family, denoiser: nn.Module, settings: RunSettings, *, compiled: bool = False
    ) -> None:
        torch.set_num_threads(settings.threads)
        self.device = settings.device
        self.weight_bytes: int | None = weight_bytes(denoiser)
        self._names = [spec.name for spec in family.inputs(denoiser)]
        self._compiled = compiled

        def call(*inputs: Tensor) -> Tensor:
            return family.forward(denoiser, *inputs)

        self._call: Call = compile_for(settings.device, call) if compiled else call
        self._inputs: list[Tensor] = []
        self._output = torch.empty(0)

    def bind(self, inputs: Inputs) -> None:
        self._inputs = [torch.from_numpy(inputs[name]).to(self.device) for name in self._names]
        if self._on_cuda:
            torch.cuda.reset_peak_memory_stats(self.device)

    @torch.inference_mode()
    def run(self) -> None:
        try:
            output = self._call(*self._inputs)
        except Exception as error:
            if self._compiled and (reason := missing_compiler(error)):
                raise InputError(reason) from error
            raise
        # CUDA graphs reuse their output's memory in the next run
        self._output = output.clone() if self._compiled and self._on_cuda else output
        if self._on_cuda:
            torch.cuda.synchronize(self.device)

    def profile(self) -> list[OperatorTime]:
        """Operators as torch's profiler names them; compiled ones by their kernels."""
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self._on_cuda
        with profile(activities=activities) as profiler:
            for _ in range(_PROFILED_RUNS):
                self.run()
        return from_torch(profiler.key_averages(), _PROFILED_RUNS, on_gpu=self._on_cuda)

    def output(self) -> np.ndarray:
        output: np.ndarray = self._output.float().cpu().numpy()
        return output

    def device_memory(self) -> int | None:
        return torch.cuda.max_memory_allocated(self.device) if self._on_cuda else None

    @property
    def _on_cuda(self) -> bool:
        return self.device.startswith("cuda")


class Eager:
    """Full precision, eager."""

    compiled = False

    def prepare(self, subject: Subject, folder: Path) -> Prepared:
        subject.full_precision()  # says now, and not in the worker, that it cannot be loaded
        return Prepared(subject.full_precision_arguments())

    def load(self, prepared: Prepared, settings: RunSettings) -> Runner:
        model = load_model(**prepared.settings, device=settings.device)
        denoiser = model.denoiser.to(self.dtype(settings))
        return TorchRunner(model.family, denoiser, settings, compiled=self.compiled)

    def dtype(self, settings: RunSettings) -> torch.dtype:
        """What full precision is computed in."""
        return torch.float32


class EagerBFloat16(Eager):
    """Full precision in bfloat16, eager."""

    def dtype(self, settings: RunSettings) -> torch.dtype:
        return torch.bfloat16


class Compiled(Eager):
    """Full precision under torch.compile; the warm-up compiles.

    In float32 on a CPU. On a GPU in bfloat16 and with CUDA graphs, as one deploys a model there.
    """

    compiled = True

    def dtype(self, settings: RunSettings) -> torch.dtype:
        return torch.bfloat16 if settings.device.startswith("cuda") else torch.float32


class Quantized:
    """The quantized checkpoint on the CUDA kernels: the engine `torch`."""

    def prepare(self, subject: Subject, folder: Path) -> Prepared:
        # its size is what the engine holds, as for the other targets in PyTorch
        return Prepared({"checkpoint": str(subject.quantized_folder())})

    def load(self, prepared: Prepared, settings: RunSettings) -> Runner:
        if not settings.device.startswith("cuda"):
            raise InputError(
                f"torch-quantized runs CUDA kernels, got --device {settings.device}; use a GPU, or "
                "the target torch-simulation"
            )
        from ...torch_engine.engine import TorchEngine

        engine = TorchEngine(Path(prepared.settings["checkpoint"]), device=settings.device)
        return EngineRunner(engine, settings)


class EngineRunner:
    """The torch engine as a target."""

    def __init__(self, engine: TorchEngine, settings: RunSettings) -> None:
        self.device = settings.device
        self.weight_bytes: int | None = engine.weight_bytes
        self._engine = engine
        self._inputs: list[Tensor] = []
        self._output = torch.empty(0)

    def bind(self, inputs: Inputs) -> None:
        names = [spec.name for spec in self._engine.input_specs]
        self._inputs = [torch.from_numpy(inputs[name]).to(self.device) for name in names]
        torch.cuda.reset_peak_memory_stats(self.device)

    def run(self) -> None:
        self._output = self._engine.run(*self._inputs)
        torch.cuda.synchronize(self.device)

    def output(self) -> np.ndarray:
        output: np.ndarray = self._output.float().cpu().numpy()
        return output

    def device_memory(self) -> int | None:
        return torch.cuda.max_memory_allocated(self.device)


class Simulation:
    """The quantized checkpoint as simulated in PyTorch: exact in meaning, not meant to be fast."""

    def prepare(self, subject: Subject, folder: Path) -> Prepared:
        checkpoint = subject.quantized_folder()
        return Prepared(
            {"checkpoint": str(checkpoint)}, QuantizedCheckpoint.read(checkpoint).byte_size
        )

    def load(self, prepared: Prepared, settings: RunSettings) -> Runner:
        checkpoint = QuantizedCheckpoint.read(Path(prepared.settings["checkpoint"]))
        denoiser = checkpoint.build_denoiser(device=settings.device)
        return TorchRunner(checkpoint.family, denoiser, settings)


def compile_for(device: str, call: Call) -> Call:
    """torch.compile for fixed shapes; with CUDA graphs on a GPU, where launches cost most."""
    mode = "reduce-overhead" if device.startswith("cuda") else None
    compiled: Any = torch.compile(call, dynamic=False, mode=mode)
    wrapped: Call = compiled
    return wrapped


def missing_compiler(error: BaseException | None) -> str | None:
    """What to install, where the cause of a failed torch.compile is an absent C++ compiler."""
    while error is not None:
        if type(error).__name__ == "InvalidCxxCompiler" or "C compiler" in str(error):
            return (
                "torch.compile needs a C++ compiler and found none; install g++ or clang++, "
                "or name one in CXX"
            )
        error = error.__cause__ or error.__context__ or getattr(error, "inner_exception", None)
    return None


def weight_bytes(denoiser: nn.Module) -> int:
    """Bytes of parameters and buffers, shared ones counted once."""
    tensors = {id(value): value for value in (*denoiser.parameters(), *denoiser.buffers())}
    return sum(_held_bytes(value) for value in tensors.values())


def _held_bytes(tensor: Tensor) -> int:
    """A tensor subclass (torchao's int8) holds others, and looks like a float of its shape."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(_held_bytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()
