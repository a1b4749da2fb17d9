"""Feature networks for FID: an ONNX file, or the TorchScript Inception network that the field uses.

* `.onnx`: first input float32 [n, 3, H, W] in [-1, 1], an output named `features` [n, D];
* `.pt`: a TorchScript module called as `network(images_uint8, return_features=True)` → [n, D], with
  images 0…255. That is the calling convention of `inception-2015-12-05.pt` (D = 2048), published
  with StyleGAN3 and used by EDM; the network resizes to 299×299 by itself.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Protocol

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import ArtifactError, InputError, StepError

OUTPUT = "features"
EXTENSIONS = (".onnx", ".pt")
_BATCH = 64


class FeatureExtractor(Protocol):
    """Images [n, 3, H, W] in [-1, 1] → features float64 [n, D]; `InputError` for a wrong size."""

    path: Path

    def __call__(self, images: Tensor) -> NDArray[np.float64]: ...


def load_features(
    path: Path, *, device: torch.device | str = "cpu", threads: int | None = None
) -> FeatureExtractor:
    """Load a feature network by its extension.

    On a CUDA `device` ONNX files run there too where this ONNX Runtime has the provider; `threads`
    limits ONNX Runtime's CPU threads. Raises `InputError` for another extension
    or no such file, `ArtifactError` for a file that cannot be loaded or has another interface.
    """
    if path.suffix not in EXTENSIONS:
        raise InputError(
            f"a feature network must be one of {', '.join(EXTENSIONS)}, got {path.name!r}; "
            "give an ONNX file or the TorchScript inception-2015-12-05.pt"
        )
    if not path.is_file():
        raise InputError(f"no feature network at {path}; check --fid-features")
    if path.suffix == ".onnx":
        return OnnxFeatures(path, device=device, threads=threads)
    return TorchScriptFeatures(path, device=device)


class OnnxFeatures:
    """A feature network in ONNX Runtime. Fixed dimensions of its input are respected."""

    def __init__(
        self, path: Path, *, device: torch.device | str = "cpu", threads: int | None = None
    ) -> None:
        self.path = path
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # threads that wait for work take cores from what runs beside: torch, other workers
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), options, providers=_providers(torch.device(device))
            )
        except Exception as error:  # onnxruntime's own classes share no public base
            raise ArtifactError(f"{path} is not a loadable ONNX file: {_line(error)}") from error
        given = self._session.get_inputs()
        outputs = [output.name for output in self._session.get_outputs()]
        if OUTPUT not in outputs:
            raise ArtifactError(
                f"{path} must have an output named {OUTPUT!r}, got {', '.join(outputs)}"
            )
        shape = given[0].shape
        if len(given) != 1 or len(shape) != 4 or given[0].type != "tensor(float)":
            raise ArtifactError(
                f"{path} must take one float32 input [n, 3, H, W], got {len(given)} inputs, the "
                f"first {given[0].type} {shape}"
            )
        self._input = given[0].name
        self._fixed = tuple(size if isinstance(size, int) else None for size in shape)

    def __call__(self, images: Tensor) -> NDArray[np.float64]:
        _check_images(images)
        for size, wanted in zip(images.shape[1:], self._fixed[1:], strict=True):
            if wanted is not None and size != wanted:
                raise InputError(
                    f"{self.path.name} needs images of shape {list(self._fixed[1:])}, got "
                    f"{list(images.shape[1:])}; give --fid-features a network for that size"
                )
        batch = self._fixed[0] or _BATCH
        pixels = images.detach().cpu().float()
        return np.concatenate([self._run(part, batch) for part in pixels.split(batch)])

    def _run(self, part: Tensor, batch: int) -> NDArray[np.float64]:
        missing = batch - len(part) if self._fixed[0] is not None else 0
        if missing:  # a fixed batch is filled up with copies of the last image
            part = torch.cat([part, part[-1:].expand(missing, -1, -1, -1)])
        (features,) = self._session.run([OUTPUT], {self._input: part.numpy()})
        kept = features[: len(features) - missing]
        return _checked_output(kept, len(part) - missing, self.path)


class TorchScriptFeatures:
    """A TorchScript feature network with the calling convention of inception-2015-12-05.pt."""

    def __init__(self, path: Path, *, device: torch.device | str = "cpu") -> None:
        self.path = path
        self._device = torch.device(device)
        try:
            with warnings.catch_warnings():
                # TorchScript is deprecated in favour of torch.export, but this is the file there is
                warnings.simplefilter("ignore", DeprecationWarning)
                self._network = torch.jit.load(str(path), map_location=self._device).eval()
        except (RuntimeError, ValueError, OSError) as error:
            raise ArtifactError(
                f"{path} is not a loadable TorchScript module: {_line(error)}"
            ) from error

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> NDArray[np.float64]:
        _check_images(images)
        return np.concatenate([self._run(part) for part in images.split(_BATCH)])

    def _run(self, part: Tensor) -> NDArray[np.float64]:
        pixels = to_uint8(part.to(self._device))
        try:
            features = self._network(pixels, return_features=True)
        except RuntimeError as error:
            raise StepError(
                f"{self.path.name} failed on images of shape {list(part.shape[1:])}; it must take "
                f"uint8 images and return_features=True: {_line(error)}"
            ) from error
        return _checked_output(features.cpu().numpy(), len(part), self.path)


def _providers(device: torch.device) -> list[str | tuple[str, dict[str, int]]]:
    cuda, cpu = "CUDAExecutionProvider", "CPUExecutionProvider"
    wants_cuda = device.type == "cuda" and cuda in onnxruntime.get_available_providers()
    return [(cuda, {"device_id": device.index or 0}), cpu] if wants_cuda else [cpu]


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] → 0…255 to nearest, uint8, as ADM, EDM and DiT write their images."""
    return (images.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[0] == 0:
        raise InputError(f"images must have shape [n, 3, H, W], got {list(images.shape)}")


def _checked_output(features: NDArray[np.float64], count: int, path: Path) -> NDArray[np.float64]:
    if features.ndim != 2 or features.shape[0] != count:
        raise ArtifactError(
            f"{path} must return features of shape [{count}, D], got {list(features.shape)}"
        )
    return features.astype(np.float64)


def _line(error: Exception) -> str:
    """The last line of a library's error: the one that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
