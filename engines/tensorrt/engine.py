"""Run a TensorRT engine: NumPy arrays through buffers of its own, torch tensors without copies."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import ArtifactError, InputError, StepError
from ..engine import Arrays, LoadedEngine, TensorSpec, check_inputs
from ..engine import as_denoiser as denoiser_by_arrays
from .cuda import DeviceBuffer, Graph, checked, cuda_runtime
from .kernels import launched_kernels
from .ledger import layers_of
from .library import tensorrt_module
from .log import ErrorLog, make_logger
from .manifest import EngineManifest, manifest_path
from .tensors import BATCH, check_tensor, numpy_dtype, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

    from ...calibrate.families.base import Denoiser, Family

_WARM_UP = 3
_MOST_BATCHES = 4  # whose contexts are kept: each holds TensorRT's scratch memory


@dataclass
class _Slot:
    """An execution context, and the graph captured from it. refused: it cannot be captured."""

    context: Any
    graph: Graph | None = None
    refused: bool = False

    def forget_graph(self) -> None:
        if self.graph is not None:
            self.graph.free()
            self.graph = None


class TensorRtEngine(LoadedEngine):
    """A serialized engine on the current GPU.

    Names, dtypes and shapes are those of the ONNX file. Where TensorRT made INT32 of an INT64 input
    (8.6), arrays are converted on the way in. `infer` keeps its buffers and, with `graphs`, replays
    one CUDA graph a batch size; `run_torch` reads and writes the tensors that it is given.

    host_code: whether the engine may bring a runtime of its own, which version-compatible ones do;
    by default what its manifest says.
    """

    def __init__(
        self, path: Path | str, *, graphs: bool = True, host_code: bool | None = None
    ) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise InputError(f"no engine at {self.path}; build it first")
        self._trt: Any = tensorrt_module()
        self._runtime = cuda_runtime()
        self._log = ErrorLog()
        logger = make_logger(self._trt, self._log)
        self._trt.init_libnvinfer_plugins(logger, "")
        self._loader: Any = self._trt.Runtime(logger)
        if _has_host_code(self.path) if host_code is None else host_code:
            self._loader.engine_host_code_allowed = True
        self._engine: Any = self._loader.deserialize_cuda_engine(self.path.read_bytes())
        if self._engine is None:
            raise ArtifactError(
                f"TensorRT {self._trt.__version__} cannot load {self.path}: {self._log.text()}; "
                "build it again on this machine"
            )
        self._stream = int(checked(self._runtime, self._runtime.cudaStreamCreate()))
        self._context: Any = self._new_context()
        self._names = [
            self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)
        ]
        mode = self._trt.TensorIOMode.INPUT
        given = [name for name in self._names if self._engine.get_tensor_mode(name) == mode]
        self._native = {name: numpy_dtype(self._trt, self._engine, name) for name in self._names}
        self._inputs = tuple(self._spec(name, is_input=True) for name in given)
        self._outputs = tuple(
            self._spec(name, is_input=False) for name in self._names if name not in given
        )
        self._buffers = {name: DeviceBuffer(self._runtime) for name in self._names}
        self._slots: dict[int, _Slot] = {}
        self._uses_graphs = graphs
        self._batch: int | None = None  # of the bound inputs
        self._made: dict[str, np.ndarray] = {}

    @property
    def batch_profile(self) -> tuple[int, int, int]:
        """The least, best and most samples of one call."""
        least, best, most = self._engine.get_tensor_profile_shape(self._inputs[0].name, 0)
        return int(least[0]), int(best[0]), int(most[0])

    def layers(self) -> list[dict[str, Any]]:
        """The engine's layers by its inspector, for the precision ledger."""
        inspector = self._open().create_engine_inspector()
        inspector.execution_context = self._context
        text = inspector.get_engine_information(self._trt.LayerInformationFormat.JSON)
        return layers_of(text)

    def kernels(self, inputs: Arrays | None = None) -> dict[str, int]:
        """Launches by kernel name of one execution (`kernels.py`).

        inputs: zeros by default, as many samples as the engine is fastest with: names and numbers
        follow from shapes alone. Raises `StepError` where the driver refuses.
        """
        self.bind(self._zeros() if inputs is None else inputs)
        context = self._slot(self._bound()).context
        self._enqueue(context, self._stream)
        self._synchronize()
        launch = partial(self._enqueue, context, self._stream)
        return launched_kernels(self._runtime, self._stream, launch)

    def infer(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """All outputs by name, on the host. Raises `InputError` for inputs that do not fit."""
        self.bind(inputs)
        self.run()
        return self.outputs()

    def bind(self, inputs: Arrays) -> None:
        """Copy the inputs of the runs to come to the GPU. Raises `InputError` as `infer` does."""
        self._open()
        check_inputs(self._inputs, inputs)
        batch = self._checked_batch(next(iter(inputs.values())).shape[0])
        arrays = {
            name: np.ascontiguousarray(array, dtype=self._native[name])
            for name, array in inputs.items()
        }
        moved = [self._buffers[name].reserve(array.nbytes) for name, array in arrays.items()]
        context = self._slot(batch).context
        for name, array in arrays.items():
            _set_shape(context, name, array.shape)
        self._made = self._output_arrays(context)
        moved += [self._buffers[name].reserve(array.nbytes) for name, array in self._made.items()]
        if any(moved):  # a graph holds addresses: where a buffer moved, every graph is void
            self._forget_graphs()
        self._batch = batch
        for name in self._names:
            context.set_tensor_address(name, self._buffers[name].pointer)
        for name, array in arrays.items():
            self._buffers[name].upload(array, self._stream)
        self._synchronize()

    def run(self) -> None:
        """One execution on the bound inputs; returns when it has finished."""
        self._launch(self._bound())
        self._synchronize()

    def outputs(self) -> dict[str, np.ndarray]:
        """What the last run made, by name, on the host."""
        self._bound()
        for name, array in self._made.items():
            self._buffers[name].download(array, self._stream)
        self._synchronize()
        return {spec.name: self._made[spec.name].astype(spec.dtype) for spec in self._outputs}

    def run_torch(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same on CUDA tensors, without copies, on torch's current stream.

        Tensors must be contiguous and have the engine's own dtypes (`native_dtypes`). Outputs are
        new tensors. Raises `InputError` for tensors that do not fit.
        """
        import torch

        self._open()
        if not self._uses_graphs:
            self._batch = None  # one context serves both: what was bound is not there any more
        for spec in self._inputs:
            check_tensor(spec, inputs, self._native[spec.name])
        self._checked_batch(next(iter(inputs.values())).shape[0])
        for name, tensor in inputs.items():
            _set_shape(self._context, name, tuple(tensor.shape))
            self._context.set_tensor_address(name, tensor.data_ptr())
        device = next(iter(inputs.values())).device
        made = {
            spec.name: torch.empty(
                tuple(self._context.get_tensor_shape(spec.name)),
                dtype=torch_dtype(self._native[spec.name]),
                device=device,
            )
            for spec in self._outputs
        }
        for name, tensor in made.items():
            self._context.set_tensor_address(name, tensor.data_ptr())
        self._enqueue(self._context, torch.cuda.current_stream(device).cuda_stream)
        return made

    def native_dtypes(self) -> dict[str, np.dtype[Any]]:
        """What the engine itself reads and writes: INT32 for INT64 in 8.6."""
        return dict(self._native)

    def as_denoiser(self, family: Family, config: dict[str, Any]) -> Denoiser:
        """This engine for the sampling loop; where torch has CUDA, tensors stay on the GPU."""
        import torch

        from ...calibrate.checkpoint_model import empty_denoiser

        if not torch.cuda.is_available():
            return denoiser_by_arrays(self, family, config)

        outline = empty_denoiser(family, config, {})
        names = [spec.name for spec in family.inputs(outline)]

        def call(x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
            given = {
                name: tensor.to("cuda", torch_dtype(self._native[name])).contiguous()
                for name, tensor in zip(names, (x, timestep, label), strict=True)
            }
            output = self.run_torch(given)[family.output_name]
            return family.noise_prediction(outline, output).to(device=x.device, dtype=x.dtype)

        return call

    def time_batches(self, inputs: Arrays, runs: int) -> list[float]:
        """Milliseconds of each of `runs` executions on the GPU, copies not counted."""
        self.bind(inputs)
        for _ in range(_WARM_UP):
            self.run()
        runtime = self._runtime
        events = [checked(runtime, runtime.cudaEventCreate()) for _ in range(2)]
        found = []
        for _ in range(runs):
            checked(runtime, runtime.cudaEventRecord(events[0], self._stream))
            self._launch(self._bound())
            checked(runtime, runtime.cudaEventRecord(events[1], self._stream))
            self._synchronize()
            found.append(float(checked(runtime, runtime.cudaEventElapsedTime(*events))))
        for event in events:
            checked(runtime, runtime.cudaEventDestroy(event))
        return found

    def close(self) -> None:
        """Free the engine, its buffers and its graphs."""
        if self._engine is None:
            return
        self._forget_graphs()
        for buffer in self._buffers.values():
            buffer.free()
        checked(self._runtime, self._runtime.cudaStreamDestroy(self._stream))
        self._slots = {}
        self._context = self._engine = self._loader = None

    def _open(self) -> Any:
        if self._engine is None:
            raise InputError(f"the engine of {self.path} is closed; open it again")
        return self._engine

    def _zeros(self) -> dict[str, np.ndarray]:
        batch = self.batch_profile[1]
        return {
            spec.name: np.zeros(
                [batch if size == BATCH else int(size) for size in spec.shape], spec.dtype
            )
            for spec in self._inputs
        }

    def _spec(self, name: str, *, is_input: bool) -> TensorSpec:
        """As the ONNX file has it: every integer input of a denoiser is INT64 there."""
        dtype = self._native[name]
        if is_input and dtype == np.int32:
            dtype = np.dtype(np.int64)
        shape = tuple(
            BATCH if size < 0 else int(size) for size in self._engine.get_tensor_shape(name)
        )
        return TensorSpec(name, dtype, shape)

    def _checked_batch(self, batch: int) -> int:
        least, _, most = self.batch_profile
        if not least <= batch <= most:
            raise InputError(
                f"the engine takes batches of {least} … {most}, got {batch}; build it with another "
                "--batch-profile"
            )
        return batch

    def _output_arrays(self, context: Any) -> dict[str, np.ndarray]:
        return {
            spec.name: np.empty(tuple(context.get_tensor_shape(spec.name)), self._native[spec.name])
            for spec in self._outputs
        }

    def _bound(self) -> int:
        """The batch that is bound. Raises `InputError` where none is, or not any more."""
        self._open()
        if self._batch is None:
            raise InputError("the engine has no inputs bound; call bind or infer first")
        return self._batch

    def _slot(self, batch: int) -> _Slot:
        """The context of a batch size. Where graphs are captured each has its own: a graph is valid
        for the shapes and the memory of the context that it was captured from."""
        if not self._uses_graphs:
            return _Slot(self._context)
        if batch not in self._slots:
            while len(self._slots) >= _MOST_BATCHES:
                self._slots.pop(next(iter(self._slots))).forget_graph()
            self._slots[batch] = _Slot(self._new_context())
        return self._slots[batch]

    def _new_context(self) -> Any:
        context = self._engine.create_execution_context()
        if context is None:
            raise StepError(f"TensorRT cannot run {self.path}: {self._log.text()}")
        # 8.6 gives the profile to the first context by itself, and the others fail as they run;
        # that they may ask for it too is settled in the build (`build.py`, preview features)
        if not context.set_optimization_profile_async(0, self._stream):
            raise StepError(f"TensorRT cannot run {self.path}: {self._log.text()}")
        self._synchronize()
        return context

    def _launch(self, batch: int) -> None:
        """Replay the graph of this batch size, capturing it where there is none yet.

        The first run of a batch size is no capture: TensorRT sets things up then that cannot be
        captured.
        """
        slot = self._slot(batch)
        if slot.graph is not None:
            slot.graph.launch(self._stream)
            return
        self._enqueue(slot.context, self._stream)
        if self._uses_graphs and not slot.refused:
            self._synchronize()
            launch = partial(self._enqueue, slot.context, self._stream)
            slot.graph = Graph.capture(self._runtime, self._stream, launch)
            slot.refused = slot.graph is None

    def _forget_graphs(self) -> None:
        for slot in self._slots.values():
            slot.forget_graph()

    def _enqueue(self, context: Any, stream: int) -> None:
        if not context.execute_async_v3(stream):
            raise StepError(f"TensorRT failed on {self.path}: {self._log.text()}")

    def _synchronize(self) -> None:
        checked(self._runtime, self._runtime.cudaStreamSynchronize(self._stream))


def _has_host_code(path: Path) -> bool:
    """Whether the manifest beside an engine says that it is version-compatible."""
    manifest = EngineManifest.read(manifest_path(path))
    return manifest is not None and bool(manifest.settings.get("version_compatible"))


def _set_shape(context: Any, name: str, shape: tuple[int, ...]) -> None:
    if not context.set_input_shape(name, shape):
        raise InputError(f"the engine does not take {name} of shape {list(shape)}")
