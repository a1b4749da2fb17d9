"""Register the plugins with TensorRT: quickly deployable ones, ahead-of-time form.

TensorRT calls the three functions of a plugin while it builds; the engine then holds the kernels'
PTX and runs without Python (`tensorrt.plugin`, from 10.9).
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import GenericAlias
from typing import Any, Union

from ....errors import InputError, StepError
from ....export.tensorrt.plugin_nodes import KIND, NAMESPACE
from ...kernels.compile import compile_kernel
from ...kernels.driver import Gpu, make_gpu
from ...kernels.sources import headers, source
from ..cuda import checked, cuda_runtime
from ..library import tensorrt_module
from .launch import Launch
from .plugins import Plugin, all_plugins
from .ptx import Isa, capped, entry_parameters, newest_isa

_SOURCES = ("quantize.cu", "linear_sm80.cu", "linear_sm90.cu", "weight_only.cu")


@cache
def register_plugins() -> str:
    """Register every plugin for the current GPU, once a process; the digest of their code.

    Raises `InputError` for a TensorRT without ahead-of-time plugins.
    """
    register_for(current_gpu(), driver_isa())
    return plugins_digest()


def plugins_digest() -> str:
    """SHA-256 of all that an engine's kernels follow from: part of the engine's manifest."""
    digest = hashlib.sha256()
    folder = Path(__file__).parent
    texts = [source(name) for name in _SOURCES] + list(headers().values())
    texts += [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py"))]
    for text in texts:
        digest.update(text.encode())
        digest.update(b"\0")
    return digest.hexdigest()


def register_for(device: Gpu, isa: Isa) -> None:
    """Register every plugin, compiled for `device` as PTX of version `isa` at most."""
    trtp = plugin_module()
    for plugin in all_plugins():
        _Registration(plugin, device, isa, tensorrt_module(), trtp).register()


def plugin_module() -> Any:
    """The module `tensorrt.plugin`. Raises `InputError` where it knows no ahead-of-time form."""
    try:
        trtp = importlib.import_module("tensorrt.plugin")
    except ImportError as error:
        raise InputError(f"this TensorRT has no quickly deployable plugins: {error}") from error
    if not hasattr(trtp, "aot_impl"):
        version = tensorrt_module().__version__
        raise InputError(f"ahead-of-time plugins need TensorRT 10.9 or newer, got {version}")
    return trtp


def current_gpu() -> Gpu:
    """The GPU that engines are built on, by CUDA itself: torch may be one without CUDA here."""
    runtime = cuda_runtime()
    index = int(checked(runtime, runtime.cudaGetDevice()))
    facts = checked(runtime, runtime.cudaGetDeviceProperties(index))
    name = facts.name.decode().rstrip("\0") if isinstance(facts.name, bytes) else str(facts.name)
    return make_gpu(
        index,
        name,
        (int(facts.major), int(facts.minor)),
        int(facts.multiProcessorCount),
        int(facts.sharedMemPerBlockOptin),
    )


def driver_isa() -> Isa:
    """The newest PTX that this machine's driver takes. Raises `StepError` where it cannot tell."""
    from cuda.bindings import driver

    status, version = driver.cuDriverGetVersion()
    if status != driver.CUresult.CUDA_SUCCESS:
        raise StepError(f"the CUDA driver does not tell its version: {status.name}")
    return newest_isa(int(version))


@dataclass(frozen=True)
class _Registration:
    """One plugin with what its functions need beside their arguments."""

    plugin: Plugin
    device: Gpu
    isa: Isa
    trt: Any
    trtp: Any

    def register(self) -> None:
        trtp, plugin = self.trtp, self.plugin
        name = f"{NAMESPACE}::{plugin.name}"
        outputs = GenericAlias(tuple, (trtp.TensorDesc,) * plugin.outputs)
        text = Union[str, bytes]  # noqa: UP007 - TensorRT reads the annotation by its origin
        parts = (text, text, trtp.KernelLaunchParams, trtp.SymExprs)
        trtp.register(name)(self._signed(self.describe, (), outputs))
        combinations = GenericAlias(list, (trtp.AutoTuneCombination,))
        trtp.autotune(name)(self._signed(self.autotune, (("outputs", outputs),), combinations))
        last = (("outputs", outputs), ("tactic", int))
        trtp.aot_impl(name)(self._signed(self.compile, last, GenericAlias(tuple, parts)))

    def describe(self, *given: Any, **attributes: str) -> tuple[Any, ...]:
        """Called with descriptors and the attributes by name."""
        return self.plugin.describe(
            self.trt, self.trtp, self._named(given), _text(attributes[KIND])
        )

    def autotune(self, *given: Any) -> list[Any]:
        """Called with descriptors, the attributes, and the outputs' descriptors."""
        *tensors, kind, _outputs = given
        tactics = self.plugin.tactics(self._named(tensors), _text(kind), self.device)
        return [self.trtp.AutoTuneCombination(self.plugin.types, "LINEAR", tactics)]

    def compile(self, *given: Any) -> tuple[str, bytes, Any, Any]:
        """Called like `autotune`, and with a tactic: name, PTX, launch and integers."""
        *tensors, kind, outputs, tactic = given
        launch = self.plugin.launch(
            self.trtp, self._named(tensors), _text(kind), tactic, self.device
        )
        code = compile_kernel(launch.file, launch.defines, self.device.architecture, "ptx")
        ptx = capped(code, self.isa)
        _check_parameters(ptx, launch, len(tensors), len(outputs))
        return launch.entry, ptx, self._launch_params(launch), self._scalars(launch)

    def _launch_params(self, launch: Launch) -> Any:
        made = self.trtp.KernelLaunchParams()
        made.grid_x, made.grid_y = launch.grid
        made.block_x = launch.threads
        made.shared_mem = launch.shared_bytes
        return made

    def _scalars(self, launch: Launch) -> Any:
        made = self.trtp.SymIntExprs(len(launch.scalars))
        for index, value in enumerate(launch.scalars):
            made[index] = self.trtp.SymInt32(value)
        return made

    def _named(self, tensors: Sequence[Any]) -> dict[str, Any]:
        return dict(zip(self.plugin.inputs, tensors, strict=True))

    def _signed(
        self, function: Callable[..., Any], last: Sequence[tuple[str, Any]], returns: Any
    ) -> Callable[..., Any]:
        """`function` with the signature that TensorRT checks: tensors, the attribute, and more.

        Plugins differ in their tensors' names and numbers, which a written-out function would have
        to repeat.
        """

        def called(*given: Any, **attributes: Any) -> Any:
            return function(*given, **attributes)

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        tensors = [(name, self.trtp.TensorDesc) for name in self.plugin.inputs]
        parameters = [
            inspect.Parameter(name, kind, annotation=annotation)
            for name, annotation in (*tensors, (KIND, str), *last)
        ]
        signature = inspect.Signature(parameters, return_annotation=returns)
        called.__signature__ = signature  # type: ignore[attr-defined]
        return called


def _check_parameters(ptx: bytes, launch: Launch, inputs: int, outputs: int) -> None:
    """TensorRT passes inputs, integers and outputs, and checks nothing: a mismatch would crash."""
    found = entry_parameters(ptx, launch.entry)
    wanted = ["u64"] * inputs + ["32"] * len(launch.scalars) + ["u64"] * outputs
    fits = len(found) == len(wanted) and all(
        kind == want if want == "u64" else kind.endswith(want)
        for kind, want in zip(found, wanted, strict=True)
    )
    if not fits:
        raise StepError(
            f"{launch.entry} of {launch.file} has the parameters {', '.join(found)}, and TensorRT "
            f"would pass {', '.join(wanted)}; plugin and kernel do not belong together"
        )


def _text(value: Any) -> str:
    """An attribute from a field of characters, which may end with NUL."""
    return str(value).rstrip("\0")
