"""Everything that a worker needs to judge candidates, as plain picklable data.

Workers may run on other hosts, so nothing here is a path of the driver's. Arrays are NumPy's: Ray
keeps those once a host and maps them into every worker there, where torch tensors would be copied.
"""

from __future__ import annotations

import hashlib
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...errors import InputError
from ...files import sha256_of_json
from ..families import family_named
from ..features import load_features
from ..frechet import Statistics
from ..model import DiffusionModel, ModelSource
from ..quantizers import QuantizedWeight
from ..schemes import WeightGroup
from ..sources.assemble import assemble
from .fitness import Evaluator, FitnessSettings
from .switchable import CandidateDenoiser
from .weight_cache import WeightCache

# Raise it when the same inputs give another fitness than before: stored candidates are then void.
FITNESS_VERSION = 2
# torch allocates so, and kernels may sum in another order where data lies otherwise
_ALIGNMENT = 64
# One number for every host, so that all of them add up alike; several workers share a host's cores.
_THREADS_BESIDE_A_GPU = 8

AnyArray = NDArray[Any]


@dataclass(frozen=True)
class ModelArrays:
    """A model without its files: parameters by all their names (tied ones are one array)."""

    name: str
    family: str
    config: Mapping[str, Any]
    scheduler_config: Mapping[str, Any]
    parameters: Mapping[str, AnyArray]
    vae_config: Mapping[str, Any] | None
    vae_state: Mapping[str, AnyArray]


@dataclass(frozen=True)
class WeightArrays:
    """A `QuantizedWeight` in NumPy: its tensors by field (`QuantizedWeight.tensors`)."""

    tensors: Mapping[str, AnyArray]
    bits: int


@dataclass(frozen=True)
class EvaluatorPayload:
    """Builds equal evaluators anywhere. `threads` is what every worker on a CPU runs torch with."""

    model: ModelArrays
    weights: Mapping[str, Mapping[WeightGroup, WeightArrays]]
    cache_digest: str
    features_name: str
    features_file: bytes
    mu: NDArray[np.float64]
    sigma: NDArray[np.float64]
    settings: FitnessSettings
    threads: int

    def build(self, device: torch.device | str) -> Evaluator:
        """An evaluator on `device`. It samples the full-precision images, if they are asked for."""
        model = _build_model(self.model, device)
        cache = WeightCache(
            {
                name: {group: _quantized_weight(arrays) for group, arrays in groups.items()}
                for name, groups in self.weights.items()
            },
            self.cache_digest,
        )
        with tempfile.TemporaryDirectory(prefix="qdit-features-") as folder:
            path = Path(folder) / self.features_name
            path.write_bytes(self.features_file)
            on_cpu = torch.device(device).type == "cpu"
            threads = self.threads if on_cpu else _THREADS_BESIDE_A_GPU
            extractor = load_features(path, device=device, threads=threads)
        candidate = CandidateDenoiser(model, cache, device=device, fast=self.settings.fast)
        reference = Statistics(self.mu, self.sigma)
        return Evaluator(model, candidate, extractor, reference, self.settings, device=device)

    @cached_property
    def key(self) -> str:
        """SHA-256 over all that a fitness follows from, apart from the plan and the device."""
        model = self.model
        return sha256_of_json(
            {
                "version": FITNESS_VERSION,
                "family": model.family,
                "config": dict(model.config),
                "scheduler": dict(model.scheduler_config),
                "parameters": _sha256_of_arrays(model.parameters),
                "vae": [dict(model.vae_config or {}), _sha256_of_arrays(model.vae_state)],
                "cache": self.cache_digest,
                "features": hashlib.sha256(self.features_file).hexdigest(),
                "reference": _sha256_of_arrays({"mu": self.mu, "sigma": self.sigma}),
                "settings": self.settings.to_json(),
            }
        )

    @cached_property
    def byte_size(self) -> int:
        """Bytes of all arrays, shared ones once, and of the feature network."""
        arrays = [*self.model.parameters.values(), *self.model.vae_state.values()]
        for groups in self.weights.values():
            for weight in groups.values():
                arrays += weight.tensors.values()
        distinct = {id(array): array.nbytes for array in [*arrays, self.mu, self.sigma]}
        return sum(distinct.values()) + len(self.features_file)


def make_payload(
    model: DiffusionModel,
    cache: WeightCache,
    settings: FitnessSettings,
    *,
    features: Path,
    reference: Statistics,
    threads: int | None = None,
) -> EvaluatorPayload:
    """Take the model, the cache and the FID files apart into arrays.

    `threads` defaults to torch's own setting here, so that a serial evaluation and workers agree.
    A feature network must be one file: ONNX with external data does not travel.
    """
    if not features.is_file():
        raise InputError(f"no feature network at {features}; check --fid-features")
    return EvaluatorPayload(
        model=_model_arrays(model),
        weights={
            name: {group: _weight_arrays(weight) for group, weight in groups.items()}
            for name, groups in cache.weights.items()
        },
        cache_digest=cache.digest,
        features_name=features.name,
        features_file=features.read_bytes(),
        mu=reference.mu,
        sigma=reference.sigma,
        settings=settings,
        threads=threads or torch.get_num_threads(),
    )


def _model_arrays(model: DiffusionModel) -> ModelArrays:
    vae: Any = model.vae
    return ModelArrays(
        model.name,
        model.family.name,
        dict(model.config),
        dict(model.scheduler_config),
        _arrays(dict(model.denoiser.named_parameters(remove_duplicate=False))),
        None if vae is None else _plain(vae.config),
        {} if vae is None else _arrays(vae.state_dict()),
    )


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A diffusers config as plain data, without its private notes."""
    return {key: value for key, value in config.items() if not key.startswith("_")}


def _arrays(tensors: Mapping[str, Tensor]) -> dict[str, AnyArray]:
    """Tensors as arrays; one tensor under several names becomes one array, pickled once."""
    made: dict[int, AnyArray] = {}
    return {
        name: made.setdefault(id(tensor), tensor.detach().cpu().numpy())
        for name, tensor in tensors.items()
    }


def _weight_arrays(weight: QuantizedWeight) -> WeightArrays:
    arrays = {name: tensor.cpu().numpy() for name, tensor in weight.tensors().items()}
    return WeightArrays(arrays, weight.bits)


def _quantized_weight(arrays: WeightArrays) -> QuantizedWeight:
    tensors = {name: _tensor(array) for name, array in arrays.tensors.items()}
    return QuantizedWeight.of(tensors, arrays.bits)


def _tensor(array: AnyArray) -> Tensor:
    """The array as a tensor: its own memory where that is aligned as torch's is, else a copy."""
    if array.ctypes.data % _ALIGNMENT or not array.flags.c_contiguous:
        return torch.tensor(array)
    with warnings.catch_warnings():
        # Ray's arrays are read-only; nothing writes to a weight
        warnings.filterwarnings("ignore", message=".*not writable", category=UserWarning)
        return torch.from_numpy(array)


def _build_model(parts: ModelArrays, device: torch.device | str) -> DiffusionModel:
    family = family_named(parts.family)
    config = dict(parts.config)
    tensors = {name: _tensor(array) for name, array in parts.parameters.items()}
    denoiser = assemble(
        family, config, tensors, where=f"the model {parts.name}", device=device, blocks=None
    )
    source = ModelSource("payload", parts.name, "")
    vae = _build_vae(parts, device)
    scheduler_config = dict(parts.scheduler_config)
    return DiffusionModel(parts.name, source, family, denoiser, config, scheduler_config, vae)


def _build_vae(parts: ModelArrays, device: torch.device | str) -> nn.Module | None:
    if parts.vae_config is None:
        return None
    from diffusers import AutoencoderKL

    vae: nn.Module = AutoencoderKL.from_config(dict(parts.vae_config))
    vae.load_state_dict({name: _tensor(array) for name, array in parts.vae_state.items()})
    return vae.eval().requires_grad_(False).to(device)


def _sha256_of_arrays(arrays: Mapping[str, AnyArray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.data)
    return digest.hexdigest()
