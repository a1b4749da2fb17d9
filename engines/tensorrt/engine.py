"""Run a TensorRT engine: NumPy arrays through buffers of its own, torch tensors without copies."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import ArtifactError, InputError, StepError
from ..engine import Arrays, TensorSpec, check_inputs
from .cuda import DeviceBuffer, Graph, checked, cuda_runtime
from .ledger import layers_of
from .library import tensorrt_module
from .log import ErrorLog, make_logger

if TYPE_CHECKING:
    from torch import Tensor

    from ...calibrate.families.base import Denoiser, Family

_MOST_GRAPHS = 8  # one a batch size: each keeps launch parameters, not tensors
_BATCH = "batch"


class TensorRtEngine:
    """A serialized engine on the current GPU.

    Names, dtypes and shapes are those of the ONNX file. Where TensorRT made INT32 of an INT64 input
    (8.6), arrays are converted on the way in. `infer` keeps its buffers and, with `graphs`, replays
    one CUDA graph a batch size; `run_torch` reads and writes the tensors that it is given.
    """

    def __init__(self, path: Path | str, *, graphs: bool = True) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise InputError(f"no engine at {self.path}; build it first")
        self._trt: Any = tensorrt_module()
        self._runtime = cuda_runtime()
        self._log = ErrorLog()
        logger = make_logger(self._trt, self._log)
        self._trt.init_libnvinfer_plugins(logger, "")
        self._loader: Any = self._trt.Runtime(logger)
        self._engine: Any = self._loader.deserialize_cuda_engine(self.path.read_bytes())
        if self._engine is None:
            raise ArtifactError(
                f"TensorRT {self._trt.__version__} cannot load {self.path}: {self._log.text()}; "
                "build it again on this machine"
            )
        self._context: Any = self._engine.create_execution_context()
        if self._context is None:
            raise StepError(f"TensorRT cannot run {self.path}: {self._log.text()}")
        self._stream = int(checked(self._runtime, self._runtime.cudaStreamCreate()))
        self._names = [
            self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)
        ]
        mode = self._trt.TensorIOMode.INPUT
        given = [name for name in self._names if self._engine.get_tensor_mode(name) == mode]
        self._native = {name: _numpy_dtype(self._trt, self._engine, name) for name in self._names}
        self._inputs = tuple(self._spec(name, is_input=True) for name in given)
        self._outputs = tuple(
            self._spec(name, is_input=False) for name in self._names if name not in given
        )
        self._buffers = {name: DeviceBuffer(self._runtime) for name in self._names}
        self._graphs: dict[tuple[int, ...], Graph | None] = {}
        self._uses_graphs = graphs

    @property
    def input_specs(self) -> tuple[TensorSpec, ...]:
        return self._inputs

    @property
    def output_specs(self) -> tuple[TensorSpec, ...]:
        return self._outputs

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

    def infer(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """All outputs by name, on the host. Raises `InputError` for inputs that do not fit."""
        self._open()
        check_inputs(self._inputs, inputs)
        batch = self._checked_batch(next(iter(inputs.values())).shape[0])
        arrays = {
            name: np.ascontiguousarray(array, dtype=self._native[name])
            for name, array in inputs.items()
        }
        for name, array in arrays.items():
            self._buffers[name].reserve(array.nbytes)
            self._set_shape(name, array.shape)
        made = self._output_arrays()
        moved = [self._buffers[name].reserve(array.nbytes) for name, array in made.items()]
        for name in self._names:
            self._context.set_tensor_address(name, self._buffers[name].pointer)
        for name, array in arrays.items():
            self._buffers[name].upload(array, self._stream)
        self._launch(batch, anew=any(moved))
        for name, array in made.items():
            self._buffers[name].download(array, self._stream)
        self._synchronize()
        return {spec.name: made[spec.name].astype(spec.dtype, copy=False) for spec in self._outputs}

    def run_torch(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same on CUDA tensors, without copies, on torch's current stream.

        Tensors must be contiguous and have the engine's own dtypes (`native_dtypes`). Outputs are
        new tensors. Raises `InputError` for tensors that do not fit.
        """
        import torch

        self._open()
        for spec in self._inputs:
            _check_tensor(spec, inputs, self._native[spec.name])
        self._checked_batch(next(iter(inputs.values())).shape[0])
        for name, tensor in inputs.items():
            self._set_shape(name, tuple(tensor.shape))
            self._context.set_tensor_address(name, tensor.data_ptr())
        device = next(iter(inputs.values())).device
        made = {
            spec.name: torch.empty(
                tuple(self._context.get_tensor_shape(spec.name)),
                dtype=_torch_dtype(self._native[spec.name]),
                device=device,
            )
            for spec in self._outputs
        }
        for name, tensor in made.items():
            self._context.set_tensor_address(name, tensor.data_ptr())
        self._enqueue(torch.cuda.current_stream(device).cuda_stream)
        return made

    def native_dtypes(self) -> dict[str, np.dtype[Any]]:
        """What the engine itself reads and writes: INT32 for INT64 in 8.6."""
        return dict(self._native)

    def as_denoiser(self, family: Family, config: dict[str, Any]) -> Denoiser:
        """This engine for the sampling loop: tensors stay on the GPU."""
        from ...calibrate.checkpoint_model import empty_denoiser

        outline = empty_denoiser(family, config, {})
        names = [spec.name for spec in family.inputs(outline)]

        def call(x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
            given = {
                name: tensor.to("cuda", _torch_dtype(self._native[name])).contiguous()
                for name, tensor in zip(names, (x, timestep, label), strict=True)
            }
            output = self.run_torch(given)[family.output_name]
            return family.noise_prediction(outline, output).to(device=x.device, dtype=x.dtype)

        return call

    def time_batches(self, inputs: Arrays, runs: int) -> list[float]:
        """Milliseconds of each of `runs` executions on the GPU, copies not counted."""
        self.infer(inputs)  # buffers, addresses and the graph are there now
        batch = self._checked_batch(next(iter(inputs.values())).shape[0])
        runtime = self._runtime
        events = [checked(runtime, runtime.cudaEventCreate()) for _ in range(2)]
        found = []
        for _ in range(runs):
            checked(runtime, runtime.cudaEventRecord(events[0], self._stream))
            self._launch(batch, anew=False)
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
        for graph in self._graphs.values():
            if graph is not None:
                graph.free()
        for buffer in self._buffers.values():
            buffer.free()
        checked(self._runtime, self._runtime.cudaStreamDestroy(self._stream))
        self._graphs = {}
        self._context = self._engine = self._loader = None

    def __enter__(self) -> TensorRtEngine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _open(self) -> Any:
        if self._engine is None:
            raise InputError(f"the engine of {self.path} is closed; open it again")
        return self._engine

    def _spec(self, name: str, *, is_input: bool) -> TensorSpec:
        """As the ONNX file has it: every integer input of a denoiser is INT64 there."""
        dtype = self._native[name]
        if is_input and dtype == np.int32:
            dtype = np.dtype(np.int64)
        shape = tuple(
            _BATCH if size < 0 else int(size) for size in self._engine.get_tensor_shape(name)
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

    def _set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        if not self._context.set_input_shape(name, shape):
            raise InputError(f"the engine does not take {name} of shape {list(shape)}")

    def _output_arrays(self) -> dict[str, np.ndarray]:
        return {
            spec.name: np.empty(
                tuple(self._context.get_tensor_shape(spec.name)), self._native[spec.name]
            )
            for spec in self._outputs
        }

    def _launch(self, batch: int, *, anew: bool) -> None:
        """Replay the graph of this batch size, capturing it where there is none yet.

        A graph holds addresses: where a buffer moved, every graph is void. The first run of a batch
        size is no capture: TensorRT sets things up then that cannot be captured.
        """
        key = (batch, *(buffer.pointer for buffer in self._buffers.values()))
        if anew:
            self._forget_graphs()
        if not self._uses_graphs:
            self._enqueue(self._stream)
        elif key not in self._graphs:
            self._enqueue(self._stream)
            self._synchronize()
            if len(self._graphs) >= _MOST_GRAPHS:
                self._forget_graphs()
            launch = lambda: self._enqueue(self._stream)  # noqa: E731 - one use, and no name for it
            self._graphs[key] = Graph.capture(self._runtime, self._stream, launch)
        else:
            graph = self._graphs[key]
            if graph is None:
                self._enqueue(self._stream)
            else:
                graph.launch(self._stream)

    def _forget_graphs(self) -> None:
        for graph in self._graphs.values():
            if graph is not None:
                graph.free()
        self._graphs = {}

    def _enqueue(self, stream: int) -> None:
        if not self._context.execute_async_v3(stream):
            raise StepError(f"TensorRT failed on {self.path}: {self._log.text()}")

    def _synchronize(self) -> None:
        checked(self._runtime, self._runtime.cudaStreamSynchronize(self._stream))


def _numpy_dtype(trt: Any, engine: Any, name: str) -> np.dtype[Any]:
    kind = engine.get_tensor_dtype(name)
    dtypes = {
        "FLOAT": np.float32,
        "HALF": np.float16,
        "INT32": np.int32,
        "INT64": np.int64,
        "INT8": np.int8,
        "BOOL": np.bool_,
        "UINT8": np.uint8,
    }
    if kind.name not in dtypes:
        raise ArtifactError(f"{name} is {kind.name}, which NumPy has no dtype for")
    return np.dtype(dtypes[kind.name])


def _torch_dtype(dtype: np.dtype[Any]) -> Any:
    import torch

    return getattr(torch, dtype.name.removesuffix("_"))


def _check_tensor(spec: TensorSpec, inputs: dict[str, Tensor], dtype: np.dtype[Any]) -> None:
    if spec.name not in inputs:
        raise InputError(f"the input {spec.name} is missing, got {', '.join(inputs)}")
    tensor = inputs[spec.name]
    if tensor.dtype != _torch_dtype(dtype) or not tensor.is_cuda or not tensor.is_contiguous():
        raise InputError(
            f"input {spec.name} must be a contiguous CUDA tensor of {dtype}, got {tensor.dtype} on "
            f"{tensor.device}"
        )
    wanted = [size for size in spec.shape if size != _BATCH]
    if tensor.dim() != len(spec.shape) or list(tensor.shape[1:]) != wanted:
        raise InputError(f"input {spec.name} must be {list(spec.shape)}, got {list(tensor.shape)}")
