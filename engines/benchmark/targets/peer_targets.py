"""What a user would take instead: other libraries' 8-bit models, made of the same full precision.

Each as its documentation shows it, with the settings that it names for speed. `pip install
qdit[peers]` brings them; a target whose library is absent says so in its row.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ....errors import InputError
from ..target import Inputs, Prepared, Runner, RunSettings
from .onnxruntime_targets import OnnxRuntimeRunner, onnx_bytes

if TYPE_CHECKING:  # what only the parent needs must not count as the worker's memory
    from ..subject import Subject

_CALIBRATION_INPUTS = 8
# Above this, quantize_dynamic must write its weights beside the file.
_INLINE_BYTES = 1 << 30


class OnnxRuntimeDynamic:
    """`onnxruntime.quantization.quantize_dynamic` on the fp32 graph: one uint8 scale a tensor,
    taken as it runs, and int8 weights with one scale a channel."""

    def prepare(self, subject: Subject, folder: Path) -> Prepared:
        from onnxruntime.quantization import QuantType, quantize_dynamic
        from onnxruntime.quantization.shape_inference import quant_pre_process

        from ....export.full_precision import export_full_precision

        full, prepared, path = (folder / f"{name}.onnx" for name in ("full", "prepared", "model"))
        export_full_precision(subject.full_precision(), full)
        large = onnx_bytes(full) > _INLINE_BYTES
        quant_pre_process(
            str(full), str(prepared), skip_symbolic_shape=True, save_as_external_data=large
        )
        quantize_dynamic(
            str(prepared),
            str(path),
            weight_type=QuantType.QInt8,
            per_channel=True,
            use_external_data_format=large,
        )
        return Prepared({"path": str(path)}, onnx_bytes(path))

    def load(self, prepared: Prepared, settings: RunSettings) -> Runner:
        return OnnxRuntimeRunner(Path(prepared.settings["path"]), settings)


class TorchAoInt8:
    """torchao's int8 dynamic quantization, one scale a token and a channel, under torch.compile.

    On a CPU in float32 with Inductor's constant freezing, which its int8 products need; on a GPU in
    bfloat16 with CUDA graphs, as `torch-compile` runs there. Its int8 products there need more than
    16 rows, which an image's conditioning does not have: only the linears of tokens are quantized.
    """

    def prepare(self, subject: Subject, folder: Path) -> Prepared:
        subject.full_precision()  # says now, and not in the worker, that it cannot be loaded
        return Prepared(subject.full_precision_arguments())

    def load(self, prepared: Prepared, settings: RunSettings) -> Runner:
        import torch

        from ....calibrate.sources import load_model
        from .torch_targets import TorchRunner

        with _wanted("torchao"):
            from torchao.quantization import (
                Int8DynamicActivationInt8WeightConfig,
                quantize_,
            )
        on_gpu = settings.device.startswith("cuda")
        model = load_model(**prepared.settings, device=settings.device)
        denoiser = model.denoiser.to(torch.bfloat16 if on_gpu else torch.float32).eval()
        seen: set[int] = set()
        of_tokens = {spec.name for spec in model.family.linears(denoiser) if spec.role != "adaln"}

        def is_wanted(module: torch.nn.Module, name: str) -> bool:
            # all blocks share one embedder, which torchao would quantize once a block
            if not isinstance(module, torch.nn.Linear) or id(module) in seen:
                return False
            seen.add(id(module))
            return name in of_tokens if on_gpu else True

        quantize_(denoiser, Int8DynamicActivationInt8WeightConfig(), is_wanted)
        if not on_gpu:
            import torch._inductor.config as inductor

            inductor.freezing = True
        return TorchRunner(model.family, denoiser, settings, compiled=True)


class OpenVino:
    """The full-precision ONNX file in OpenVINO, at its default precision.

    That is bfloat16 where the CPU computes it natively; `relative_difference_to_first` shows it.
    """

    def prepare(self, subject: Subject, folder: Path) -> Prepared:
        from ....export.full_precision import export_full_precision

        path = folder / "model.onnx"
        export_full_precision(subject.full_precision(), path)
        return Prepared({"path": str(path)}, onnx_bytes(path))

    def load(self, prepared: Prepared, settings: RunSettings) -> Runner:
        return OpenVinoRunner(Path(prepared.settings["path"]), settings)


class OpenVinoInt8(OpenVino):
    """NNCF's 8-bit post-training quantization of it: static activations, transformer preset."""

    def prepare(self, subject: Subject, folder: Path) -> Prepared:
        full = Path(super().prepare(subject, folder).settings["path"])
        with _wanted("nncf"), _wanted("openvino"):
            import nncf
            import openvino
        samples = [_sample(subject, index) for index in range(_CALIBRATION_INPUTS)]
        quantized = nncf.quantize(
            openvino.Core().read_model(full),
            nncf.Dataset(samples),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(samples),
        )
        path = folder / "int8.xml"
        openvino.save_model(quantized, path, compress_to_fp16=False)
        size = sum(path.with_suffix(suffix).stat().st_size for suffix in (".xml", ".bin"))
        return Prepared({"path": str(path)}, size)


class OpenVinoRunner:
    """A compiled OpenVINO model on the CPU."""

    weight_bytes: int | None = None

    def __init__(self, path: Path, settings: RunSettings) -> None:
        if settings.device != "cpu":
            raise InputError(
                f"the OpenVINO targets run on the CPU, got --device {settings.device}; use "
                "--device cpu"
            )
        with _wanted("openvino"):
            import openvino
        self.device = settings.device
        options = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": settings.threads,
        }
        compiled = openvino.Core().compile_model(path, "CPU", options)
        self._request: Any = compiled.create_infer_request()
        self._inputs: dict[str, np.ndarray] = {}
        self._output = np.empty(0, np.float32)

    def bind(self, inputs: Inputs) -> None:
        self._inputs = dict(inputs)

    def run(self) -> None:
        (self._output,) = self._request.infer(self._inputs).values()

    def output(self) -> np.ndarray:
        return self._output.astype(np.float32)

    def device_memory(self) -> int | None:
        return None


def _sample(subject: Subject, index: int) -> dict[str, np.ndarray]:
    """One sample of a batch of random inputs; the batch is the same in every call."""
    return {
        name: array[index : index + 1]
        for name, array in subject.inputs(_CALIBRATION_INPUTS).items()
    }


@contextmanager
def _wanted(library: str) -> Iterator[None]:
    """Turn the absence of a peer's library into a line that says how to get it."""
    try:
        yield
    except ImportError as error:
        raise InputError(f"{library} is not installed: pip install qdit[peers]") from error
