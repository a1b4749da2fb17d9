"""A denoiser whose linears change their group sizes by a pointer: candidates at no cost."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..graphed import GraphedForward
from ..model import DiffusionModel
from ..plan import QuantizationPlan
from ..quantizers import QuantizedWeight, fake_quantize_activation
from ..schemes import LayerScheme, WeightGroup
from ..simulate import replace_linear
from .weight_cache import WeightCache


class SwitchableLinear(nn.Module):
    """A linear [..., K] → [..., N] with full-precision weights and cached quantized ones.

    Starts in full precision. `use` computes what `simulate.QuantizedLinear` computes. On CUDA the
    weight in use has one address for good, where a captured graph finds every next one.
    """

    def __init__(
        self, linear: nn.Linear, weights: Mapping[WeightGroup, QuantizedWeight], fast: bool = False
    ) -> None:
        super().__init__()
        self._linear = linear
        self._weights = weights
        own = linear.weight.detach()
        self._weight: Tensor = own.clone() if own.is_cuda else own
        self._scheme: LayerScheme | None = None
        self._quantize = fake_quantize_activation
        if fast:
            self._quantize = _compiled_quantizer()
            # the compiled denoiser breaks here: another group must not compile all of it again
            disabled = torch.compiler.disable(self.forward, recursive=False)
            self.forward = disabled  # type: ignore[method-assign]

    def take(self, weight: QuantizedWeight | None, activation: LayerScheme | None) -> None:
        """Take a weight [N, K] that is not in the cache, and quantize inputs as `use` does."""
        own = like = self._linear.weight.detach()
        if weight is not None:
            # rounded to the dtype once, as `QuantizedLinear` does
            wide = torch.float64 if like.dtype == torch.float64 else torch.float32
            own = weight.to(like.device).dequantize(wide).to(like.dtype)
        if like.is_cuda:
            self._weight.copy_(own)
        else:
            self._weight = own
        quantizes = activation is not None and activation.quantizes_activations
        self._scheme = activation if quantizes else None

    @property
    def activation(self) -> LayerScheme | None:
        """How inputs are quantized now; None leaves them as they are."""
        return self._scheme

    def use(self, weight_group: WeightGroup | None, activation: LayerScheme | None) -> None:
        """Take the cached weights of `weight_group`, and quantize inputs as `activation` says;
        None leaves that side in full precision."""
        self.take(None if weight_group is None else self._weights[weight_group], activation)

    def forward(self, x: Tensor) -> Tensor:
        if self._scheme is not None:
            x = self._quantize(x, self._scheme)
        return functional.linear(x, self._weight, self._linear.bias)


class CandidateDenoiser:
    """A copy of a model's denoiser that becomes any plan of the cache's search space.

    `fast` compiles everything around the products and runs those in float16 (CUDA): errors of
    2⁻¹¹, far below 4-bit weights', and results differ from the exact ones by rounding flips.
    On CUDA the denoiser runs as a graph, captured anew only where activations are quantized
    otherwise than before: other weights take the places of the last ones.
    The copy shares the full-precision parameters with the model.
    """

    def __init__(
        self,
        model: DiffusionModel,
        cache: WeightCache,
        *,
        device: torch.device | str = "cpu",
        fast: bool = False,
    ) -> None:
        self.model = model
        self.digest = cache.digest
        model.denoiser.to(device)
        memo: dict[int, Any] = {id(own): own for own in model.denoiser.parameters()}
        denoiser = copy.deepcopy(model.denoiser, memo)
        self.linears: dict[str, SwitchableLinear] = {}
        for name, weights in cache.weights.items():
            linear: Any = denoiser.get_submodule(name)
            on_device = {group: weight.to(device) for group, weight in weights.items()}
            self.linears[name] = SwitchableLinear(linear, on_device, fast)
            replace_linear(denoiser, name, self.linears[name])
        self.module: nn.Module = denoiser
        if fast:
            compiled = torch.compile(denoiser.forward, dynamic=False)
            denoiser.forward = torch.autocast("cuda", torch.float16)(compiled)
        if torch.device(device).type == "cuda":
            denoiser.forward = GraphedForward(denoiser.forward, self._activations)

    def _activations(self) -> tuple[LayerScheme | None, ...]:
        return tuple(linear.activation for linear in self.linears.values())

    def apply(self, plan: QuantizationPlan) -> None:
        """Become the simulation of `plan`, with the cache's weights."""
        for name, linear in self.linears.items():
            scheme = plan[name]
            linear.use(scheme.weight_group if scheme.quantizes_weights else None, scheme)

    def take(self, plan: QuantizationPlan, weights: Mapping[str, QuantizedWeight]) -> None:
        """Become the simulation of `plan` with other weights than the cache's."""
        for name, linear in self.linears.items():
            linear.take(weights.get(name), plan[name])

    def reset(self) -> None:
        """Become full precision again."""
        for linear in self.linears.values():
            linear.use(None, None)


def _compiled_quantizer() -> Any:
    """`fake_quantize_activation` as one kernel for each scheme and shape that it meets."""
    config: Any = torch._dynamo.config
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    if getattr(config, limit) < _VARIANTS:
        setattr(config, limit, _VARIANTS)
    return torch.compile(fake_quantize_activation, dynamic=False)


_VARIANTS = 256  # group sizes × input widths × batch sizes that one process may see
