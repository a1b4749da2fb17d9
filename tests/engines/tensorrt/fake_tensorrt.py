"""A stand-in for `tensorrt`: no GPU, but the real bindings' members, version by version.

A member that the recorded bindings of a version lack (`api/*.json`) is missing here too, so code
that counts on it fails as it would there. `test_fake_tensorrt.py` holds every method's parameters
against the recorded ones. An 'engine' is the ONNX file itself, run by ONNX Runtime: the numbers are
those of the file.
"""

from __future__ import annotations

import enum
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import onnx
import onnxruntime

API = Path(__file__).parent / "api"
VERSIONS = ("8.6.0", "10.0.1", "10.16.1", "11.4.0")

# What 8.6's parser makes of an operator. Split is one SLICE an output there; here it has them all.
_LAYER_TYPES = {
    "QuantizeLinear": "QUANTIZE", "DequantizeLinear": "DEQUANTIZE", "MatMul": "MATRIX_MULTIPLY",
    "Gemm": "MATRIX_MULTIPLY", "Conv": "CONVOLUTION", "LayerNormalization": "NORMALIZATION",
    "Softmax": "SOFTMAX", "Split": "SLICE", "Slice": "SLICE", "Concat": "CONCATENATION",
    "Gather": "GATHER", "Cast": "CAST", "Shape": "SHAPE",
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "Pow"), "ELEMENTWISE"),
    **dict.fromkeys(("Tanh", "Sigmoid"), "ACTIVATION"),
    **dict.fromkeys(("Sin", "Cos", "Sqrt", "Exp"), "UNARY"),
    **dict.fromkeys(("Reshape", "Transpose", "Unsqueeze", "Squeeze"), "SHUFFLE"),
}  # fmt: skip

_DTYPES = {
    onnx.TensorProto.FLOAT: "FLOAT",
    onnx.TensorProto.FLOAT16: "HALF",
    onnx.TensorProto.INT64: "INT64",
    onnx.TensorProto.INT32: "INT32",
    onnx.TensorProto.INT8: "INT8",
    onnx.TensorProto.BOOL: "BOOL",
    onnx.TensorProto.INT4: "INT4",
}


def recorded(version: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((API / f"{version}.json").read_text())
    return found


class Device:
    """The GPU's memory: arrays by address, and what was asked of the runtime."""

    def __init__(self) -> None:
        self.memory: dict[int, np.ndarray] = {}
        self.next = 0x1000
        self.launches = 0
        self.graphs = 0
        self.replays = 0
        self.capturing: list[Callable[[], None]] | None = None
        self.captured: dict[int, list[Callable[[], None]]] = {}

    def malloc(self, size: int) -> int:
        address, self.next = self.next, self.next + (size + 255) // 256 * 256
        self.memory[address] = np.zeros(size, np.uint8)
        return address


def fake_runtime(device: Device) -> Any:
    """`cuda.bindings.runtime` over `Device`."""
    status = enum.Enum("cudaError_t", ["cudaSuccess", "cudaErrorMemoryAllocation"])
    ok = status.cudaSuccess
    kinds = enum.Enum("cudaMemcpyKind", ["cudaMemcpyHostToDevice", "cudaMemcpyDeviceToHost"])

    def memcpy(to: int, source: int, size: int, kind: Any, _stream: int) -> tuple[Any]:
        import ctypes

        if kind == kinds.cudaMemcpyHostToDevice:
            device.memory[to][:size] = np.frombuffer(ctypes.string_at(source, size), np.uint8)
        else:
            ctypes.memmove(to, device.memory[source].ctypes.data, size)
        return (ok,)

    def begin(_stream: int, _mode: Any) -> tuple[Any]:
        device.capturing = []
        return (ok,)

    def end(_stream: int) -> tuple[Any, int]:
        device.graphs += 1
        device.captured[device.graphs] = device.capturing or []
        device.capturing = None
        return ok, device.graphs

    def replay(graph: int, _stream: int) -> tuple[Any]:
        device.replays += 1
        for work in device.captured[graph]:
            work()
        return (ok,)

    def free(address: int) -> tuple[Any]:
        del device.memory[address]
        return (ok,)

    return SimpleNamespace(
        cudaError_t=status,
        cudaMemcpyKind=kinds,
        cudaStreamCaptureMode=SimpleNamespace(cudaStreamCaptureModeThreadLocal=1),
        cudaMalloc=lambda size: (ok, device.malloc(size)),
        cudaFree=free,
        cudaMemcpyAsync=memcpy,
        cudaStreamCreate=lambda: (ok, 7),
        cudaStreamDestroy=lambda _s: (ok,),
        cudaStreamSynchronize=lambda _s: (ok,),
        cudaStreamBeginCapture=begin,
        cudaStreamEndCapture=end,
        cudaGraphInstantiate=lambda graph, _flags: (ok, graph),
        cudaGraphDestroy=lambda _graph: (ok,),
        cudaGraphLaunch=replay,
        cudaGraphExecDestroy=lambda _graph: (ok,),
        cudaEventCreate=lambda: (ok, object()),
        cudaEventDestroy=lambda _event: (ok,),
        cudaEventRecord=lambda _event, _stream: (ok,),
        cudaEventElapsedTime=lambda _one, _other: (ok, 1.5),
    )


class Faults:
    """What a test wants to go wrong, and what a build was told."""

    parse_error: str = ""
    build_error: str = ""
    killed_while_building = False
    precisions: ClassVar[dict[str, str]] = {}  # linear → the format that its layer reads
    hidden: ClassVar[set[str]] = set()  # linears that no layer names
    regions: ClassVar[list[str]] = []  # fused layers that show nothing of what is in them
    config: Any = None
    network_flags = 0
    network: Any = None
    started_from = b""  # the timing cache that a build was given
    kernels: ClassVar[dict[str, int]] = {}  # launches by name, as the driver tells them
    driver_error = False


def make_fake(version: str, device: Device, faults: type[Faults]) -> ModuleType:
    """The module `tensorrt` of a recorded version."""
    api = recorded(version)
    module = ModuleType("tensorrt")
    module.__spec__ = ModuleSpec("tensorrt", None)  # torch asks whether TensorRT is there
    module.__version__ = api["version"]  # type: ignore[attr-defined]
    enums = {
        name: enum.IntEnum(name, members, start=0)  # type: ignore[misc]
        for name, members in api["enums"].items()
    }
    if "LayerType" not in enums:  # recorded of 8.6 alone
        kinds = recorded(VERSIONS[0])["enums"]["LayerType"]
        enums["LayerType"] = enum.IntEnum("LayerType", kinds, start=0)  # type: ignore[misc]
    enums["DeviceType"] = enum.IntEnum("DeviceType", ["GPU", "DLA"])
    for name, kind in enums.items():
        setattr(module, name, kind)
    old = version.startswith("8.")
    dtypes = enums["DataType"]
    severity = enum.IntEnum(
        "Severity", ["INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"], start=0
    )

    class ILogger:
        Severity = severity

        def __init__(self) -> None: ...

        def log(self, severity: Any, msg: str) -> None: ...

    class ITensor:
        def __init__(self, value: onnx.ValueInfoProto, *, is_output: bool = False) -> None:
            self.name = value.name
            self.is_network_output = is_output
            dims = value.type.tensor_type.shape.dim
            self.shape = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in dims)
            kind = _DTYPES[value.type.tensor_type.elem_type]
            self.dtype = dtypes["INT32" if old and kind == "INT64" else kind]
            self.is_shape_tensor = False

    class ILayer:
        """What it was told is kept; a build fails for what 8.6 refuses (`_refusal`)."""

        def __init__(self, name: str, kind: str, inputs: list[Any], outputs: list[Any]) -> None:
            self.name, self.type = name, enums["LayerType"][kind]
            self.inputs, self.outputs = inputs, outputs
            self.told: Any = None
            self.output_types: dict[int, Any] = {}

        @property
        def precision(self) -> Any:
            return self.told or dtypes["FLOAT"]

        @precision.setter
        def precision(self, value: Any) -> None:
            self.told = value

        @property
        def precision_is_set(self) -> bool:
            return self.told is not None

        @property
        def num_inputs(self) -> int:
            return len(self.inputs)

        @property
        def num_outputs(self) -> int:
            return len(self.outputs)

        def get_input(self, index: int) -> Any:
            return self.inputs[index]

        def get_output(self, index: int) -> Any:
            return self.outputs[index]

        def set_output_type(self, index: int, dtype: Any) -> None:
            self.output_types[index] = dtype

    class INetworkDefinition:
        def __init__(self) -> None:
            self.model: onnx.ModelProto | None = None
            self.layers: list[Any] = []

        @property
        def _graph(self) -> Any:
            assert self.model is not None
            return self.model.graph

        @property
        def num_inputs(self) -> int:
            return len(self._graph.input)

        @property
        def num_layers(self) -> int:
            return len(self._made_layers())

        def get_input(self, index: int) -> Any:
            return ITensor(self._graph.input[index])

        def get_layer(self, index: int) -> Any:
            return self._made_layers()[index]

        def _made_layers(self) -> list[Any]:
            """One a constant, then one a node."""
            if not self.layers:
                values = _values(self.model)
                ends = {value.name for value in self._graph.output}
                tensors = {
                    name: ITensor(value, is_output=name in ends) for name, value in values.items()
                }
                for tensor in self._graph.initializer:
                    made = [tensors[tensor.name]]
                    self.layers.append(ILayer(tensor.name, "CONSTANT", [], made))
                for node in self._graph.node:
                    given = [tensors.get(name) for name in node.input]
                    made = [tensors[name] for name in node.output if name]
                    kind = _LAYER_TYPES.get(node.op_type, "PLUGIN_V2")
                    self.layers.append(ILayer(node.name, kind, given, made))
            return self.layers

        def __iter__(self) -> Iterator[Any]:
            return (self.get_layer(index) for index in range(self.num_layers))

    class ITimingCache:
        def __init__(self, data: bytes = b"") -> None:
            self.data = data

        def serialize(self) -> bytes:
            return self.data + b"+"

    class IBuilderConfig:
        def __init__(self) -> None:
            self.flags_set: set[str] = set()
            self.pools: dict[str, int] = {}
            self.profiles: list[Any] = []
            self.sources: int | None = None
            self.cache: Any = None
            self.profiling_verbosity: Any = None
            self.builder_optimization_level: int | None = None
            self.hardware_compatibility_level: Any = None
            # 8.6 has two of its three on by itself
            self.preview = {n for n in enums["PreviewFeature"].__members__ if n.endswith("_0805")}

        def set_preview_feature(self, feature: Any, enable: bool) -> None:
            (self.preview.add if enable else self.preview.discard)(feature.name)

        def set_flag(self, flag: Any) -> None:
            self.flags_set.add(flag.name)

        def clear_flag(self, flag: Any) -> None:
            self.flags_set.discard(flag.name)

        def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
            self.pools[pool.name] = pool_size

        def set_tactic_sources(self, tactic_sources: int) -> bool:
            self.sources = tactic_sources
            return True

        def add_optimization_profile(self, profile: Any) -> int:
            self.profiles.append(profile)
            return len(self.profiles) - 1

        def create_timing_cache(self, serialized_timing_cache: bytes) -> Any:
            return ITimingCache(serialized_timing_cache)

        def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
            self.cache = cache
            return True

        def get_timing_cache(self) -> Any:
            return self.cache

    class IOptimizationProfile:
        def __init__(self) -> None:
            self.shapes: dict[str, tuple[Any, Any, Any]] = {}

        def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
            self.shapes[input] = (tuple(min), tuple(opt), tuple(max))

        def __bool__(self) -> bool:
            return True

    class Builder:
        def __init__(self, logger: Any) -> None:
            self.logger = logger

        def create_network(self, flags: int) -> Any:
            faults.network_flags = flags
            faults.network = INetworkDefinition()
            return faults.network

        def create_builder_config(self) -> Any:
            faults.config = IBuilderConfig()
            return faults.config

        def create_optimization_profile(self) -> Any:
            return IOptimizationProfile()

        def build_serialized_network(self, network: Any, config: Any) -> bytes | None:
            if faults.killed_while_building:
                raise KeyboardInterrupt
            if faults.build_error:
                self.logger.log(severity.ERROR, faults.build_error)
                return None
            if old and (refused := _refusal(network, config)):
                self.logger.log(severity.ERROR, refused)
                return None
            monitor = getattr(config, "progress_monitor", None)
            if monitor is not None:
                monitor.phase_start("Building Engine", None, 2)
                for step in range(2):
                    monitor.phase_start("Tactics", "Building Engine", 1)
                    assert monitor.step_complete("Tactics", 0)
                    monitor.phase_finish("Tactics")
                    assert monitor.step_complete("Building Engine", step)
                monitor.phase_finish("Building Engine")
            faults.started_from = config.cache.data
            config.cache = ITimingCache(b"timed")
            shapes = {name: list(map(list, s)) for name, s in config.profiles[0].shapes.items()}
            host_code = "VERSION_COMPATIBLE" in config.flags_set
            shared = not old or "PROFILE_SHARING_0806" in config.preview
            head = json.dumps({"shapes": shapes, "host_code": host_code, "shared": shared}).encode()
            body: bytes = network.model.SerializeToString()
            return len(head).to_bytes(4, "little") + head + body

    class OnnxParser:
        def __init__(self, network: Any, logger: Any) -> None:
            self.network, self.logger = network, logger

        def parse_from_file(self, model: str) -> bool:
            self.network.model = onnx.load(model)
            return not faults.parse_error

        @property
        def num_errors(self) -> int:
            return 1 if faults.parse_error else 0

        def get_error(self, index: int) -> Any:
            return SimpleNamespace(node=lambda: 12, desc=lambda: faults.parse_error)

    class EngineInspector:
        def __init__(self, model: onnx.ModelProto) -> None:
            self.model = model
            self.execution_context: Any = None

        def get_engine_information(self, format: Any) -> str:
            assert format.name == "JSON"
            assert self.execution_context is not None
            return json.dumps({"Layers": list(_layers(self.model, faults))})

    class IExecutionContext:
        def __init__(self, engine: Any) -> None:
            self.engine = engine
            self.shapes: dict[str, tuple[int, ...]] = {}
            self.addresses: dict[str, int] = {}
            # seen on an H200: 8.6 gives the one profile to an engine's first context alone
            self.has_profile = not old or not engine.contexts
            engine.contexts.append(self)

        def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
            others = (context for context in self.engine.contexts if context is not self)
            if not self.engine.shares_profiles and any(other.has_profile for other in others):
                # seen on an H100 with 8.6, and then the process ended by a segmentation fault
                taken = f"Profile {profile_index} has been chosen by another IExecutionContext"
                self.engine.logger.log(severity.ERROR, taken)
                return False
            self.has_profile = profile_index == 0
            self.shapes.clear()
            return self.has_profile

        def set_input_shape(self, name: str, shape: Any) -> bool:
            least, _, most = self.engine.profile[name]
            self.shapes[name] = tuple(shape)
            return all(a <= s <= b for a, s, b in zip(least, shape, most, strict=True))

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            if name in self.shapes:
                return self.shapes[name]
            batch = next(iter(self.shapes.values()))[0]
            tensor = self.engine.tensors[name]
            return tuple(batch if size < 0 else size for size in tensor.shape)

        def set_tensor_address(self, name: str, memory: int) -> bool:
            self.addresses[name] = memory
            return True

        def execute_async_v3(self, stream_handle: int) -> bool:
            if not self.has_profile:
                return False  # 'Assertion mOptimizationProfile >= 0 failed'
            shapes, addresses = dict(self.shapes), dict(self.addresses)
            work = lambda: self.engine.run(shapes, addresses)  # noqa: E731
            device.launches += 1
            if device.capturing is not None:
                device.capturing.append(work)
            else:
                work()
            return True

    class ICudaEngine:
        def __init__(self, data: bytes, logger: Any) -> None:
            size = int.from_bytes(data[:4], "little")
            self.logger = logger
            self.contexts: list[Any] = []
            head = json.loads(data[4 : 4 + size])
            self.profile, self.shares_profiles = head["shapes"], head["shared"]
            self.model = onnx.load_from_string(data[4 + size :])
            values = (*self.model.graph.input, *self.model.graph.output)
            self.tensors = {value.name: ITensor(value) for value in values}
            self._inputs = [value.name for value in self.model.graph.input]
            self._session = onnxruntime.InferenceSession(data[4 + size :])

        @property
        def num_io_tensors(self) -> int:
            return len(self.tensors)

        def get_tensor_name(self, index: int) -> str:
            return list(self.tensors)[index]

        def get_tensor_mode(self, name: str) -> Any:
            return enums["TensorIOMode"]["INPUT" if name in self._inputs else "OUTPUT"]

        def get_tensor_dtype(self, name: str) -> Any:
            return self.tensors[name].dtype

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            shape: tuple[int, ...] = self.tensors[name].shape
            return shape

        def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Any]:
            return list(self.profile[name])

        def create_engine_inspector(self) -> Any:
            return EngineInspector(self.model)

        def create_execution_context(self) -> Any:
            return IExecutionContext(self)

        def run(self, shapes: dict[str, Any], addresses: dict[str, int]) -> None:
            """The file's own numbers, between the addresses."""
            feeds = {}
            for name in self._inputs:
                dtype = np.dtype(
                    {"FLOAT": "f4", "HALF": "f2", "INT32": "i4", "INT64": "i8"}[
                        self.tensors[name].dtype.name
                    ]
                )
                count = int(np.prod(shapes[name])) * dtype.itemsize
                given = device.memory[addresses[name]][:count].view(dtype).reshape(shapes[name])
                feeds[name] = given.astype(np.int64) if dtype == np.int32 else given.copy()
            for value, made in zip(
                self._session.get_outputs(), self._session.run(None, feeds), strict=True
            ):
                raw = np.ascontiguousarray(made).view(np.uint8).ravel()
                device.memory[addresses[value.name]][: raw.size] = raw

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self.logger = logger
            self.engine_host_code_allowed = False

        def deserialize_cuda_engine(self, serialized_engine: bytes) -> Any:
            if b'"host_code": true' in serialized_engine and not self.engine_host_code_allowed:
                self.logger.log(severity.ERROR, "host code is not allowed")
                return None
            try:
                return ICudaEngine(serialized_engine, self.logger)
            except Exception as error:  # a damaged plan: TensorRT logs, and returns nothing
                self.logger.log(severity.ERROR, f"plan is damaged: {type(error).__name__}")
                return None

    class IProgressMonitor:
        def __init__(self) -> None: ...

        def phase_start(self, phase_name: str, parent_phase: Any, num_steps: int) -> None: ...

        def step_complete(self, phase_name: str, step: int) -> bool:
            return True

        def phase_finish(self, phase_name: str) -> None: ...

    for cls in (
        ILogger, ITensor, ILayer, INetworkDefinition, ITimingCache, IBuilderConfig,
        IOptimizationProfile, Builder, OnnxParser, EngineInspector, IExecutionContext, ICudaEngine,
        Runtime, IProgressMonitor,
    ):  # fmt: skip
        if cls.__name__ in api["classes"]:
            setattr(module, cls.__name__, cls)
    module.Logger = type("Logger", (ILogger,), dict(severity.__members__))  # type: ignore[attr-defined]
    if not version.startswith("11"):  # Polygraphy's tool makes a calibrator wherever it says INT8
        calibrator = type("IInt8Calibrator", (), {})
        module.IInt8Calibrator = calibrator  # type: ignore[attr-defined]
        for kind in (
            "EntropyCalibrator",
            "EntropyCalibrator2",
            "LegacyCalibrator",
            "MinMaxCalibrator",
        ):
            setattr(module, f"IInt8{kind}", type(kind, (calibrator,), {}))
    aliases = {"float32": "FLOAT", "float16": "HALF"}  # the bindings' own names of types
    for alias, name in aliases.items():
        setattr(module, alias, dtypes[name])
    module.init_libnvinfer_plugins = lambda logger, namespace: True  # type: ignore[attr-defined]
    return module


def _values(model: onnx.ModelProto | None) -> dict[str, onnx.ValueInfoProto]:
    """All of a file's values, with types where ONNX infers them; FLOAT in functions' outputs."""
    assert model is not None
    graph = onnx.shape_inference.infer_shapes(model).graph
    found = {
        name: onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        for node in graph.node
        for name in node.output
        if name
    }
    found |= {
        tensor.name: onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        for tensor in graph.initializer
    }
    return found | {v.name: v for v in (*graph.input, *graph.value_info, *graph.output)}


def _refusal(network: Any, config: Any) -> str:
    """Why 8.6 does not take what the layers were told; '' where it does.

    The first two in the words that it had on an H200; the third by its bindings' docstrings.
    """
    readers: dict[str, list[Any]] = {}
    for layer in network.layers:
        for tensor in layer.inputs:
            if tensor is not None:
                readers.setdefault(tensor.name, []).append(layer)
    for layer in network.layers:
        kind = layer.type.name
        types = {kind.name for kind in (*layer.output_types.values(), layer.told) if kind}
        if kind == "QUANTIZE" and types - {"INT8"}:
            return "A QuantizeLayer can only output DataType::kINT8 or DataType::kFP8"
        if kind == "CAST" and any(
            t != layer.outputs[i].dtype for i, t in layer.output_types.items()
        ):
            return "mOutputTypes.at(0).value() == params.toType failed."
        quantized = any(
            reader.type.name == "QUANTIZE"
            for index in layer.output_types
            for reader in readers.get(layer.outputs[index].name, [])
        )
        if "HALF" in types and (kind == "DEQUANTIZE" or quantized):
            return "FP16 input is not supported"
        if "HALF" in types and "FP16" not in config.flags_set:
            return f"{layer.name}: FP16 is not enabled"
        if any(layer.outputs[i].dtype.name not in ("FLOAT", "HALF") for i in layer.output_types):
            return f"{layer.name}: integers are no floats"
    return ""


def fake_driver(device: Device, faults: type[Faults]) -> Any:
    """`cuda.bindings.driver` over a captured execution, which launches `faults.kernels`."""
    status = enum.Enum("CUresult", ["CUDA_SUCCESS", "CUDA_ERROR_NOT_SUPPORTED"])
    kinds = enum.Enum("CUgraphNodeType", ["CU_GRAPH_NODE_TYPE_GRAPH", "CU_GRAPH_NODE_TYPE_KERNEL"])
    ok = status.CUDA_SUCCESS

    def nodes(graph: int, count: int = 0) -> tuple[Any, ...]:
        if faults.driver_error:
            return status.CUDA_ERROR_NOT_SUPPORTED, None, 0
        assert len(device.captured[graph]) == 1, "one execution is captured"
        found = [name for name, launches in faults.kernels.items() for _ in range(launches)]
        return ok, found[:count], len(found)

    return SimpleNamespace(
        CUresult=status,
        CUgraphNodeType=kinds,
        cuGraphGetNodes=nodes,
        cuGraphNodeGetType=lambda _node: (ok, kinds.CU_GRAPH_NODE_TYPE_KERNEL),
        cuGraphKernelNodeGetParams=lambda node: (ok, SimpleNamespace(func=0, kern=node)),
        cuKernelGetName=lambda kern: (ok, kern.encode()),
    )


def _layers(model: onnx.ModelProto, faults: type[Faults]) -> Iterator[dict[str, Any]]:
    """One layer a product, as the inspector writes them, and a reformat before each."""
    formats = {
        "INT8": "Row major Int8 format",
        "INT4": "Row major linear Int4 format",
        "FP16": "Row major linear FP16 format",
        "FP32": "Row major linear FP32",
    }
    for region in faults.regions:
        inputs = [{"Name": "x", "Format/Datatype": formats["FP32"]}]
        yield {"Name": region, "LayerType": "Myelin", "Inputs": inputs}
    (entry,) = [e.value for e in model.metadata_props if e.key == "qdit.linears"] or ["{}"]
    for name, record in json.loads(entry).items():
        if name in faults.hidden:
            continue
        executed = faults.precisions.get(name, record.get("precision", "FP16"))
        kind = "PluginV3" if executed == "PLUGIN" else "CaskGemmConvolution"
        yield {
            "Name": f"Reformatting CopyNode for Input Tensor 0 to {name}/product",
            "LayerType": "Reformat",
            "Inputs": [{"Format/Datatype": formats["FP32"]}],
        }
        yield {
            "Name": f"{name}.weight + {name}/product + {name}.output",
            "LayerType": kind,
            "Inputs": [{"Name": record["input"], "Format/Datatype": formats.get(executed, "")}],
            "Weights": {"Type": "Int4" if executed == "INT4" else "Half"},
        }


@contextmanager
def installed(module: ModuleType) -> Iterator[ModuleType]:
    """Let `import tensorrt` find the fake, and Polygraphy look at it anew."""
    kept = {
        name: found
        for name, found in sys.modules.items()
        if name == "tensorrt" or name.startswith(("tensorrt.", "polygraphy"))
    }
    for name in kept:
        del sys.modules[name]
    sys.modules["tensorrt"] = module
    try:
        yield module
    finally:
        for name in [n for n in sys.modules if n == "tensorrt" or n.startswith("polygraphy")]:
            del sys.modules[name]
        sys.modules.update(kept)
