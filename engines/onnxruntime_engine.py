"""Run an exported ONNX file in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime

from ..errors import ArtifactError, InputError, StepError
from ..memory import release_memory
from .cpu_kernels.choice import Products, choose_products
from .cpu_kernels.swap import swap_products
from .cuda_session import GRAPH_OPTION, GraphRunner, load_cuda_libraries, wants_graphs
from .engine import Arrays, LoadedEngine, TensorSpec, as_denoiser, check_inputs
from .model_source import ModelSource
from .probe_check import SelfTestError, read_probe
from .session_settings import CPU, CUDA, CpuKernels

if TYPE_CHECKING:
    from ..calibrate.families.base import Denoiser, Family

_NUMPY_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}
_ERRORS_ONLY = 3
_DATA_FOLDER = "session.model_external_initializers_file_folder_path"


class OnnxRuntimeEngine(LoadedEngine):
    """An ONNX file in an ONNX Runtime session.

    * `providers`: execution providers in order of preference, the CPU's by default. One that this
      ONNX Runtime lacks, or cannot start, is an `InputError`: never a silent run on the CPU.
    * `threads`: threads within one operator; by default one a physical core.
    * `extra_outputs`: names of inner values (metadata 'qdit.linears' and 'qdit.blocks' list them)
      that `infer` returns as well.
    * `fold_weights`: dequantize the weights once, at load. Needs memory for float weights and
      makes each run faster; without it they stay packed and every run dequantizes them.
    * `self_test`: run the probe beside the file, where there is one (`probe_check.py`), and raise
      `SelfTestError` where the session's numbers are off. Not with `extra_outputs`, which are
      there to be looked at.
    * `session_options`: further entries of ONNX Runtime's session configuration, over our own.
    * `provider_options`: options of the first provider. 'enable_cuda_graph' = 1 of the CUDA
      provider captures a CUDA graph for each shape of the inputs; not with `extra_outputs`.
    * `profile_folder`: write a profile there, which `end_profiling` names. It slows runs down.
    * `optimize`: let ONNX Runtime fuse and fold; False runs the file's own nodes one by one.
    * `kernels`: what multiplies grouped weights and activations on a CPU. 'auto': our own products
      where the machine has them, else ONNX Runtime's; 'qdit': ours, or an `InputError` that says
      why not; 'onnxruntime': its own. The file on disk is the same (docs/onnxruntime.md). What was
      taken, and why, is the attribute of that name.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        providers: Sequence[str] | None = None,
        threads: int | None = None,
        extra_outputs: Sequence[str] = (),
        fold_weights: bool = True,
        optimize: bool = True,
        kernels: CpuKernels = "auto",
        self_test: bool = True,
        session_options: Mapping[str, str] | None = None,
        provider_options: Mapping[str, str] | None = None,
        profile_folder: Path | None = None,
    ) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise InputError(f"no ONNX file at {self.path}; export the model first")
        wanted = list(providers or [CPU])
        check_available(wanted)
        options = _session_options(threads, fold_weights, optimize)
        for key, value in (session_options or {}).items():
            _add_entry(options, key, value)
        if profile_folder is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile_folder / "profile")
        given = dict(provider_options or {})
        if extra_outputs:
            given.pop(GRAPH_OPTION, None)  # they are there to be looked at once
        if wanted[0] == CUDA:
            load_cuda_libraries()
        source = ModelSource(self.path)
        self.kernels = choose_products(kernels, wanted[0], source)
        model = _model_of(source, options, self.kernels, extra_outputs)
        self._session: Any = _open(self.path, model, options, wanted, given)
        del model
        # Folding and packing weights leaves more freed memory behind than the model needs: 508 MB
        # became 220 MB for a w4a8 file of 4 DiT-XL/2 blocks.
        release_memory()
        started = self._session.get_providers()
        if wanted[0] not in started:
            raise InputError(
                f"ONNX Runtime could not start {wanted[0]} and would run on {started[0]}; "
                "check the driver and the installed libraries"
            )
        _check_provider_options(self._session.get_provider_options(), wanted[0], given)
        self._inputs = tuple(_spec(value) for value in self._session.get_inputs())
        self._outputs = tuple(_spec(value) for value in self._session.get_outputs())
        self._names = [spec.name for spec in self._outputs]
        self._looks_inside = bool(extra_outputs)
        self._graphs = (
            GraphRunner(self._session, self._inputs, self._outputs) if wants_graphs(given) else None
        )
        if self_test and not extra_outputs:
            self._test()

    @property
    def metadata(self) -> dict[str, str]:
        """The file's metadata, 'qdit.linears' and 'qdit.blocks' among them."""
        return dict(self._open_session().get_modelmeta().custom_metadata_map)

    def infer(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """All outputs by name. Raises `InputError` for inputs of a wrong name, dtype or shape."""
        session = self._open_session()
        check_inputs(self._inputs, inputs)
        run = _run_in_turn if self._looks_inside else _run
        try:
            if self._graphs is not None:
                return self._graphs.run(self._names, inputs)
            return run(session, self._names, inputs)
        except Exception as error:  # ONNX Runtime raises kinds of its own
            raise StepError(f"ONNX Runtime failed on {self.path}: {error}") from error

    def as_denoiser(self, family: Family, config: dict[str, Any]) -> Denoiser:
        """This engine for the sampling loop; `config` is the denoiser's."""
        return as_denoiser(self, family, config)

    def end_profiling(self) -> Path:
        """The profile of all runs so far, ONNX Runtime's own JSON; `profile_folder` asked for it.

        There is none before and none after. Raises `InputError` where it was not asked for.
        """
        written = self._open_session().end_profiling()
        if not written:
            raise InputError("the engine writes no profile; open it with profile_folder")
        return Path(written)

    def _test(self) -> None:
        """Hold the session against the stored probe. Raises `SelfTestError` where it is off."""
        probe = read_probe(self.path)
        if probe is None:
            return
        provider = self._open_session().get_providers()[0]
        runtime, otherwise = f"ONNX Runtime {onnxruntime.__version__}", ""
        if self.kernels.is_ours:
            runtime, otherwise = f"{runtime} with {self.kernels}", "--cpu-kernels onnxruntime, "
        try:
            error = probe.error_of(self.infer(probe.inputs))
        except StepError as failure:  # another engine or provider may run it
            self.close()
            raise SelfTestError(
                f"{runtime} cannot run {self.path} by {provider}: {failure}; use {otherwise}"
                "another version or provider, or model.onnx"
            ) from failure
        if error > probe.tolerance:
            self.close()
            raise SelfTestError(
                f"{runtime} computes {self.path} wrong with {provider}: {error:.3g} from the "
                f"stored output of the reference, at most {probe.tolerance:.3g} is rounding; use "
                f"{otherwise}another version or provider, or model.onnx, or export again where the "
                "file was changed"
            )

    def close(self) -> None:
        """Free the session."""
        self._session = self._graphs = None

    def _open_session(self) -> Any:
        if self._session is None:
            raise InputError(f"the engine of {self.path} is closed; open it again")
        return self._session


def _run(session: Any, names: Sequence[str], inputs: Arrays) -> dict[str, np.ndarray]:
    return dict(zip(names, session.run(None, dict(inputs)), strict=True))


def _run_in_turn(session: Any, names: Sequence[str], inputs: Arrays) -> dict[str, np.ndarray]:
    """As `_run`, with outputs copied out of ONNX Runtime one by one and freed there.

    `session.run` keeps its own outputs until all are copied: every inner value of a large model
    twice.
    """
    given = {
        name: onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
        for name, array in inputs.items()
    }
    made = list(session.run_with_ort_values(None, given))
    made.reverse()
    return {name: made.pop().numpy() for name in names}


def check_available(providers: Sequence[str]) -> None:
    """Raise `InputError` for a provider that this ONNX Runtime was built without."""
    available = onnxruntime.get_available_providers()
    for name in providers:
        if name not in available:
            raise InputError(
                f"this ONNX Runtime has no provider {name}, it has {', '.join(available)}; "
                "install qdit[gpu] for CUDAExecutionProvider"
            )


def _check_provider_options(
    known: Mapping[str, Mapping[str, str]], provider: str, given: Mapping[str, str]
) -> None:
    """Raise `InputError` for options that the provider, once started, does not know."""
    names = known.get(provider, {})
    unknown = sorted(set(given) - set(names))
    if unknown:
        raise InputError(
            f"the provider options of {provider} are {', '.join(sorted(names)) or 'none'}, got "
            f"{', '.join(unknown)}; leave it out or choose another provider"
        )


def _session_options(threads: int | None, fold_weights: bool, optimize: bool) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    if threads is not None:
        if threads < 1:
            raise InputError(f"threads must be at least 1, got {threads}")
        options.intra_op_num_threads = threads
    # Threads that spin on after a run take the cores from whatever runs next (torch, in a proof;
    # another target, in a benchmark). Within a run they still spin.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    # The exported pattern is not one that ONNX Runtime fuses (docs/adr/0003). Should a newer one
    # learn to: level 1 computes MatMulNBits in float32; the default, 4, would quantize the
    # activations of weight-only layers to 8 bits.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if fold_weights:
        # Leaves DequantizeLinear of constants to constant folding, and fuses no Q/DQ at all.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    else:
        # The arena and the memory plan would keep room for every layer's dequantized weight at
        # once, which is what leaving them packed is meant to save.
        options.enable_cpu_mem_arena = False
        options.enable_mem_pattern = False
    return options


def _add_entry(options: Any, key: str, value: str) -> None:
    if "." not in key:
        raise InputError(
            f"a session option is called like session.use_env_allocators, got {key!r}; ONNX "
            "Runtime's onnxruntime_session_options_config_keys.h lists them"
        )
    try:
        options.add_session_config_entry(key, value)
    except Exception as error:  # ONNX Runtime raises kinds of its own
        raise InputError(f"ONNX Runtime refuses the session option {key}={value}") from error


def _model_of(
    source: ModelSource, options: Any, products: Products, extra_outputs: Sequence[str]
) -> str | bytes:
    """The file's path, or the bytes of what is made of it; `options` then say where data lies."""
    if not extra_outputs and not products.is_ours:
        source.drop()
        return str(source.path)
    source.add_outputs(extra_outputs)
    if products.is_ours:
        swap_products(source.load())
        _register(products, options)
    folder = str(source.path.parent.absolute())
    options.add_session_config_entry(_DATA_FOLDER, folder)
    return source.take()


def _register(products: Products, options: Any) -> None:
    try:
        options.register_custom_ops_library(str(products.library))
    except Exception as error:  # ONNX Runtime raises kinds of its own
        raise StepError(
            f"ONNX Runtime {onnxruntime.__version__} does not take the operators of "
            f"{products.library}: {error}; use --cpu-kernels onnxruntime"
        ) from error


def _open(
    path: Path,
    model: str | bytes,
    options: Any,
    providers: Sequence[str],
    provider_options: Mapping[str, str],
) -> Any:
    try:
        return onnxruntime.InferenceSession(
            model,
            options,
            providers=list(providers),
            provider_options=[dict(provider_options), *({} for _ in providers[1:])],
        )
    except Exception as error:  # ONNX Runtime raises kinds of its own
        raise ArtifactError(f"ONNX Runtime cannot load {path}: {error}") from error


def _spec(value: Any) -> TensorSpec:
    dtype = _NUMPY_DTYPES.get(value.type)
    if dtype is None:
        raise ArtifactError(f"{value.name} has type {value.type}, which no qdit model has")
    dims = tuple(dim if isinstance(dim, int) else str(dim) for dim in value.shape)
    return TensorSpec(value.name, np.dtype(dtype), dims)
