"""The quantized checkpoint: a folder of `qdit.json` and `weights.safetensors` (docs/format.md).

Everything after calibration starts from it; nothing re-quantizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from ..files import atomic_path, write_text
from ..progress import Progress, Silent
from .checkpoint_layout import quantized_linears
from .checkpoint_make import CheckpointParts, make_parts, write_contents
from .checkpoint_manifest import MANIFEST_NAME, Provenance
from .checkpoint_model import empty_denoiser, load_parameters
from .checkpoint_read import read_parts
from .model import DiffusionModel, ModelSource
from .plan import QuantizationPlan
from .quantizers import QuantizedWeight
from .simulate import install_quantized_linears


class QuantizedCheckpoint(CheckpointParts):
    """A quantized model as data.

    * `plan`, `linears`: the schemes and every quantizable linear, in model order;
    * `weights`: the integers and scales of each linear that the plan quantizes, by linear name;
      unpacked anew on each access when the checkpoint was read from a folder;
    * `parameters`: all other parameters by name (biases of quantized linears among them), each
      in float16, or in float32 where a value would overflow float16.
    """

    @classmethod
    def from_result(
        cls,
        model: DiffusionModel,
        plan: QuantizationPlan,
        weights: Mapping[str, QuantizedWeight],
        provenance: Mapping[str, Any],
        metrics: Mapping[str, Any],
        *,
        progress: Progress | None = None,
    ) -> QuantizedCheckpoint:
        """The checkpoint of `model` whose linears became `weights` by `plan`.

        `provenance` (method, calibration settings, seeds) and `metrics` are JSON data; what varies
        between equal runs (times, temporary paths) does not belong there. Shared modules of
        `model.denoiser` are tied. Raises `InputError` if the parts do not fit together.
        """
        return cls(
            **vars(make_parts(model, plan, weights, provenance, metrics, progress or Silent()))
        )

    @classmethod
    def read(cls, folder: Path | str) -> QuantizedCheckpoint:
        """Open a checkpoint folder. Raises the `ArtifactError` that names what is wrong with it."""
        return cls(**vars(read_parts(Path(folder))))

    def write(self, folder: Path | str, *, progress: Progress | None = None) -> None:
        """Write the two files into `folder`, beside whatever else lies there.

        The manifest goes last and an old one goes before its tensors are replaced, so a write cut
        short at any point leaves the old checkpoint or none. Equal checkpoints give equal bytes.
        """
        manifest_path = Path(folder) / MANIFEST_NAME
        with atomic_path(Path(folder) / self.manifest.weights.file) as temporary:
            with temporary.open("wb") as handle:
                written = write_contents(
                    handle,
                    self.plan,
                    self.linears,
                    self.weights,
                    self.parameters,
                    progress or Silent(),
                    "writing weights",
                )
            if written.sha256 != self.manifest.weights.sha256:
                raise InputError(
                    "the checkpoint's tensors changed after it was made; make it again"
                )
            manifest_path.unlink(missing_ok=True)
        write_text(manifest_path, self.manifest.to_text())

    @property
    def config(self) -> dict[str, Any]:
        """The denoiser's config."""
        return dict(self.manifest.model.config)

    @property
    def scheduler_config(self) -> dict[str, Any]:
        return dict(self.manifest.model.scheduler_config)

    @property
    def model_name(self) -> str:
        return self.manifest.model.name

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.manifest.model.class_names

    @property
    def source(self) -> ModelSource:
        """Where the full-precision model came from."""
        entry = self.manifest.model.source
        return ModelSource(entry.kind, entry.location, entry.sha256, entry.seed)

    @property
    def provenance(self) -> Provenance:
        return self.manifest.provenance

    @property
    def metrics(self) -> dict[str, Any]:
        return dict(self.manifest.metrics)

    @property
    def byte_size(self) -> int:
        """Bytes of the two files, written or not."""
        return self.manifest.weights.bytes + len(self.manifest.to_text().encode())

    @property
    def full_precision_fp16_bytes(self) -> int:
        """Bytes of the full-precision parameters in float16, shared ones counted once."""
        quantized = sum(spec.weight_count for spec in quantized_linears(self.plan, self.linears))
        untouched = sum(value.numel() for value in self.parameters.values())
        return 2 * (quantized + untouched)

    def skeleton(self) -> nn.Module:
        """The denoiser in float32 with every quantized weight on the meta device.

        All other parameters hold their values, biases of quantized linears included.
        """
        denoiser = empty_denoiser(self.family, self.config, self.manifest.ties)
        load_parameters(denoiser, self.parameters, "cpu", torch.float32)
        return denoiser

    def build_denoiser(
        self,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        keep_weights: bool | None = None,
    ) -> nn.Module:
        """The simulation: quantized linears dequantize to `dtype`, everything else is cast to it.

        One weight at a time is unpacked and dequantized. `keep_weights` keeps the dequantized
        weights instead of making them anew in every call; by default a large model on a CPU
        (`is_large`) does not, since its weights would fill the memory once for each copy.
        """
        if keep_weights is None:
            keep_weights = torch.device(device).type != "cpu" or not self.is_large
        denoiser = empty_denoiser(self.family, self.config, self.manifest.ties)
        load_parameters(denoiser, self.parameters, device, dtype)
        install_quantized_linears(
            denoiser,
            self.plan.layers,
            self.weights,
            device=device,
            dtype=dtype,
            keep_weights=keep_weights,
        )
        return denoiser.to(device=device, dtype=dtype)

    @property
    def is_large(self) -> bool:
        """Whether the full-precision parameters take more than 1 GiB in float32."""
        return 2 * self.full_precision_fp16_bytes > 1 << 30
