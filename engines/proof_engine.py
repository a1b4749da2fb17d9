"""What a proof needs of the engine that it proves, for each engine there is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from numpy.typing import NDArray

from ..calibrate.checkpoint import QuantizedCheckpoint
from ..calibrate.families.base import Denoiser, Family
from ..files import sha256_of_file
from .cpu_kernels.choice import choose_products
from .model_source import ModelSource
from .onnxruntime_engine import OnnxRuntimeEngine, check_available
from .parity_internals import ExposedValues, exposed_values
from .session_settings import CPU, CpuKernels, providers_of

if TYPE_CHECKING:
    from .torch_engine.engine import TorchEngine


class InferenceEngine(Protocol):
    """What parity and sampling ask of an engine (`engines/engine.py`)."""

    def infer(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]: ...

    def as_denoiser(self, family: Family, config: dict[str, Any]) -> Denoiser: ...

    def close(self) -> None: ...


class ProofEngine(Protocol):
    """An engine under proof: it can be opened, and looked into.

    `name` is one of `ENGINE_TITLES`; `what` names the artifact in errors;
    `dtype` is what it computes in; `on_gpu` says whether it makes the images on a GPU, where
    otherwise the simulation does. `exact`: it computes what the plan says, so that the simulation
    bounds its error; an engine of static scales does not.
    """

    name: str
    dtype: str
    on_gpu: bool
    exact: bool

    @property
    def what(self) -> str: ...

    def identity(self) -> dict[str, Any]:
        """What its images follow from, beside model, weights and sampling: plain JSON."""

    def exposed(self) -> ExposedValues:
        """The inner values that it can return; none where a runtime fuses them away."""

    def references(self) -> Sequence[ProofEngine]:
        """Two right ways of running the same file by another's code, to hold it against the first
        of them; none where the inner values can be looked at."""

    def open(self, extra_outputs: Sequence[str] = ()) -> InferenceEngine:
        """Load it; `infer` then returns `extra_outputs` as well."""


class OnnxRuntimeProof:
    """`model.onnx` in ONNX Runtime, on the CPU unless another provider is named.

    The weights of a large model stay packed: slower, at half the memory (docs/targets.md).
    """

    name = "onnxruntime"
    exact = True

    def __init__(
        self,
        path: Path,
        dtype: str,
        *,
        threads: int | None = None,
        fold_weights: bool = True,
        optimize: bool = True,
        provider: str | None = None,
        session_options: Mapping[str, str] | None = None,
        provider_options: Mapping[str, str] | None = None,
        kernels: CpuKernels = "auto",
    ) -> None:
        self.path = path
        self._providers = providers_of(provider)
        check_available(self._providers)  # before the simulations run, which take longest
        self._session_options = dict(session_options or {})
        self._provider_options = dict(provider_options or {})
        self.on_gpu = self._providers[0] not in (CPU, "DnnlExecutionProvider")
        self._optimize = optimize
        self.dtype = dtype
        self._threads = threads
        self._fold_weights = fold_weights
        self._kernels = kernels
        # What multiplies grouped weights and activations; refused here where it cannot be had.
        self.products = choose_products(kernels, self._providers[0], ModelSource(path))

    @property
    def what(self) -> str:
        return str(self.path)

    def identity(self) -> dict[str, Any]:
        ours = {"products": self.products.units} if self.products.is_ours else {}
        return {
            "file": sha256_of_file(self.path),
            "providers": self._providers,
            "session_options": self._session_options,
            "provider_options": self._provider_options,
            **ours,
        }

    def exposed(self) -> ExposedValues:
        return exposed_values(self.path)

    def references(self) -> Sequence[ProofEngine]:
        return ()

    def open(self, extra_outputs: Sequence[str] = ()) -> OnnxRuntimeEngine:
        return OnnxRuntimeEngine(
            self.path,
            threads=self._threads,
            extra_outputs=tuple(extra_outputs),
            fold_weights=self._fold_weights,
            optimize=self._optimize,
            providers=self._providers,
            session_options=self._session_options,
            provider_options=self._provider_options,
            kernels=self._kernels,
        )


class OnnxRuntimeTargetProof(OnnxRuntimeProof):
    """`onnxruntime/model.onnx`, or `onnxruntime-cuda/model.onnx`, in ONNX Runtime, likewise.

    The checkpoint of the proof has the plan that the file computes. What is folded at load is what
    unpacks the file's weights, so it always is. `name` says which of the two it is.
    """

    def __init__(
        self,
        path: Path,
        dtype: str,
        *,
        name: str = "onnxruntime-target",
        threads: int | None = None,
        provider: str | None = None,
        session_options: Mapping[str, str] | None = None,
        provider_options: Mapping[str, str] | None = None,
        kernels: CpuKernels = "auto",
    ) -> None:
        super().__init__(
            path,
            dtype,
            threads=threads,
            provider=provider,
            session_options=session_options,
            provider_options=provider_options,
            kernels=kernels,
        )
        self.name = name


class TorchProof:
    """A checkpoint on the CUDA kernels in PyTorch; on a CPU through their meaning in torch."""

    name = "torch"
    dtype = "float16"
    on_gpu = True
    exact = True

    def __init__(self, checkpoint: QuantizedCheckpoint, device: str) -> None:
        self._checkpoint = checkpoint
        self._device = device

    @property
    def what(self) -> str:
        return f"the torch engine of {self._checkpoint.model_name}"

    def identity(self) -> dict[str, Any]:
        return {"dtype": self.dtype}

    def exposed(self) -> ExposedValues:
        from .torch_engine.exposed import exposed_values_of

        return exposed_values_of(self._checkpoint)

    def references(self) -> Sequence[ProofEngine]:
        return ()

    def open(self, extra_outputs: Sequence[str] = ()) -> TorchEngine:
        from .torch_engine.engine import TorchEngine

        return TorchEngine(
            self._checkpoint, device=self._device, extra_outputs=tuple(extra_outputs)
        )
