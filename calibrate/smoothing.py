"""SmoothQuant (arXiv 2211.10438), folded into adaLN: outliers move from activations into weights.

A linear's input in a DiT is x = norm(h) · (1 + scale) + shift, and scale and shift are rows of the
block's adaLN linear. Dividing x by s [K] and multiplying the columns of the weights that read it by
s changes nothing but where the large numbers are: x/s = norm(h) · (1 + scale') + shift' with
shift' = shift/s and scale' = (1 + scale)/s − 1, which are other rows of the same linear. So nothing
is left to compute at run time. It is done to the full-precision model, before its weights are
quantized.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .families.base import Family, SmoothingSite
from .input_ranges import InputRange
from .model import DiffusionModel

# s and 1/s stay within float16's comfort: adaLN's rows are stored in it.
_SMALLEST, _LARGEST = 1 / 64, 64.0


def smoothing_factors(activations: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """s_k = max|x_k|^α / max|w_k|^(1−α) (equation 4), float32 [K]; 1 where either is 0.

    `activations`: the largest magnitude of each channel [K]; `weights`: that of the columns [K].
    """
    known = (activations > 0) & (weights > 0)
    factors = activations.pow(alpha) / weights.pow(1 - alpha)
    return torch.where(known, factors, torch.ones_like(factors)).clamp(_SMALLEST, _LARGEST)


def smooth_model(
    model: DiffusionModel, ranges: Mapping[str, InputRange], alpha: float = 0.5
) -> dict[str, Tensor]:
    """Smooth every site of the model's family, in place; returns s [K] by input name.

    `ranges` are those of the full-precision model (`collect_input_ranges`). α = 0 leaves the
    activations as they are, 1 makes all their channels alike. Raises `InputError` for another α,
    a family without such sites, and inputs without ranges.
    """
    if not 0 <= alpha <= 1:
        raise InputError(f"the smoothing strength must be between 0 and 1, got {alpha}")
    sites = sites_of(model.family, model.denoiser)
    made = {}
    for site in sites:
        if site.input_name not in ranges:
            raise InputError(f"smoothing needs the range of {site.input_name}; measure it first")
        weights = [_linear(model, name).weight for name in site.consumers]
        columns = torch.stack([w.detach().abs().amax(dim=0) for w in weights]).amax(dim=0).float()
        observed = ranges[site.input_name].channels.to(columns)
        made[site.input_name] = smoothing_factors(observed, columns, alpha)
        _fold(model, site, made[site.input_name])
    return made


def sites_of(family: Family, denoiser: torch.nn.Module) -> Sequence[SmoothingSite]:
    """The family's sites. Raises `InputError` where it has none."""
    sites = family.smoothing_sites(denoiser)
    if not sites:
        raise InputError(
            f"models of family {family.name} have no adaLN to fold smoothing into; leave it out"
        )
    return sites


def _fold(model: DiffusionModel, site: SmoothingSite, factors: Tensor) -> None:
    adaln = _linear(model, site.modulation)
    with torch.no_grad():
        for rows, added in ((site.shift_rows, 0.0), (site.scale_rows, 1.0)):
            adaln.weight[rows] /= factors.to(adaln.weight)[:, None]
            adaln.bias[rows] = (adaln.bias[rows] + added) / factors.to(adaln.bias) - added
        for name in site.consumers:
            _linear(model, name).weight.mul_(factors.to(adaln.weight))


def _linear(model: DiffusionModel, name: str) -> Any:
    return model.denoiser.get_submodule(name)
