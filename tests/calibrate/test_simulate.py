"""The simulation of quantized linears, and putting it into a denoiser."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qdit.calibrate.quantizers import (
    QuantizedWeight,
    fake_quantize_activation,
    quantize_weight_nearest,
)
from qdit.calibrate.schemes import LayerScheme
from qdit.calibrate.simulate import (
    QuantizedInputLinear,
    QuantizedLinear,
    install_quantized_linears,
    output_dtype,
    replace_linear,
)

SCHEMES = {
    "symmetric": LayerScheme(4, 8, 32, 64),
    "asymmetric": LayerScheme(4, 8, 32, 64, False, False),
    "weight-only": LayerScheme(4, 16, 32),
    "channel and token": LayerScheme(8, 4, "channel", "token", scale_dtype="float32"),
}


@pytest.fixture(params=SCHEMES)
def scheme(request: pytest.FixtureRequest) -> LayerScheme:
    return SCHEMES[request.param]


@pytest.fixture
def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(128, 48)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(1))


def simulation_of(
    linear: nn.Linear, scheme: LayerScheme, dtype: torch.dtype = torch.float32
) -> QuantizedLinear:
    quantized = quantize_weight_nearest(linear.weight.detach(), scheme)
    return QuantizedLinear(scheme, quantized, linear.bias, dtype)


def test_the_simulation_is_within_float32_of_its_float64_statement(
    linear: nn.Linear, scheme: LayerScheme, x: Tensor
) -> None:
    simulation = simulation_of(linear, scheme)
    # the formula y = Q_a(x) Ŵᵀ + b, its product in float64
    inputs = fake_quantize_activation(x, scheme).double()
    weight = simulation.quantized.dequantize(torch.float64)
    exact = inputs @ weight.T + linear.bias.double()
    # a float32 sum of K = 128 products: K·2^-24 of the sum of magnitudes
    bound = 130 * 2.0**-24 * (inputs.abs() @ weight.abs().T + linear.bias.double().abs())
    assert ((simulation(x).double() - exact).abs() <= bound).all()


def test_weight_only_schemes_leave_the_input_alone(linear: nn.Linear, x: Tensor) -> None:
    simulation = simulation_of(linear, SCHEMES["weight-only"])
    assert torch.equal(simulation(x), F.linear(x, simulation.weight, linear.bias))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_a_dtype_asked_for_is_the_dtype_converted_to(
    linear: nn.Linear, scheme: LayerScheme, dtype: torch.dtype
) -> None:
    made = simulation_of(linear.to(dtype), scheme, dtype)
    assert made.weight.dtype == dtype
    assert made.bias is not None
    assert made.bias.dtype == dtype
    assert torch.equal(made.weight, made.quantized.dequantize(torch.float64).to(dtype))


def test_weights_of_a_simulation_are_no_parameters(linear: nn.Linear, scheme: LayerScheme) -> None:
    simulation = simulation_of(linear, scheme)
    assert [name for name, _ in simulation.named_parameters()] == ["bias"]
    assert list(simulation.state_dict()) == ["bias"]
    assert not any(p.requires_grad for p in simulation.parameters())
    assert (simulation.in_features, simulation.out_features) == (128, 48)
    assert scheme.label in repr(simulation)


def test_a_linear_without_bias_is_simulated_without(x: Tensor, scheme: LayerScheme) -> None:
    linear = nn.Linear(128, 48, bias=False)
    simulation = simulation_of(linear, scheme)
    assert simulation.bias is None
    assert simulation(x).shape == (2, 5, 48)


def test_a_quantized_input_linear_keeps_its_weight(
    linear: nn.Linear, scheme: LayerScheme, x: Tensor
) -> None:
    simulation = QuantizedInputLinear(scheme, linear)
    assert torch.equal(simulation(x), linear(fake_quantize_activation(x, scheme)))


class OneAtATime(Mapping[str, QuantizedWeight]):
    """Weights made on access, as a checkpoint unpacks them; counts how often."""

    def __init__(self, weights: dict[str, QuantizedWeight]) -> None:
        self.weights, self.made = weights, list[str]()

    def __getitem__(self, name: str) -> QuantizedWeight:
        self.made.append(name)
        return self.weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


class Parts(nn.Module):
    """Two linears in a container, one of them without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList([nn.Linear(64, 96)])
        self.down = nn.Linear(96, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up[0](x))


@pytest.fixture
def parts() -> Parts:
    torch.manual_seed(0)
    return Parts()


LAYERS = {"up.0": LayerScheme(4, 8, 32, 64), "down": LayerScheme(8, 16, 96)}


def weights_of(parts: Parts) -> dict[str, QuantizedWeight]:
    return {
        name: quantize_weight_nearest(parts.get_submodule(name).weight.detach(), scheme)
        for name, scheme in LAYERS.items()
    }


def test_installing_replaces_the_named_linears_and_asks_once_for_each_weight(parts: Parts) -> None:
    weights = OneAtATime(weights_of(parts))
    bias = parts.up[0].bias.detach().clone()
    install_quantized_linears(parts, LAYERS, weights)
    assert weights.made == ["up.0", "down"]
    up, down = parts.up[0], parts.down
    assert isinstance(up, QuantizedLinear)
    assert isinstance(down, QuantizedLinear)
    assert (up.scheme, down.scheme) == tuple(LAYERS.values())
    assert torch.equal(up.bias, bias)
    assert down.bias is None
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(2))
    expected = F.linear(fake_quantize_activation(x, up.scheme), up.weight, bias) @ down.weight.T
    assert torch.equal(parts(x), expected)


def test_installing_again_replaces_simulations_and_half_quantized_linears(parts: Parts) -> None:
    weights = weights_of(parts)
    bias = parts.up[0].bias.detach().clone()
    replace_linear(parts, "up.0", QuantizedInputLinear(LAYERS["up.0"], parts.up[0]))
    for _ in range(2):  # the second time over simulations, one without any parameter
        install_quantized_linears(parts, LAYERS, weights)
        assert isinstance(parts.up[0], QuantizedLinear)
        assert torch.equal(parts.up[0].bias, bias)
        assert parts.down.bias is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_a_simulation_takes_the_replaced_linears_dtype(parts: Parts, dtype: torch.dtype) -> None:
    weights = weights_of(parts)
    install_quantized_linears(parts.to(dtype), LAYERS, weights)
    assert output_dtype(parts) == dtype
    assert {parts.up[0].weight.dtype, parts.down.weight.dtype} == {dtype}
    assert parts(torch.ones(1, 64, dtype=dtype)).dtype == dtype


def test_a_linear_on_the_meta_device_becomes_real(parts: Parts) -> None:
    weights = weights_of(parts)
    bias = parts.up[0].bias
    hollow = Parts().to("meta")
    hollow.up[0].bias = bias
    install_quantized_linears(hollow, LAYERS, weights)
    assert hollow.up[0].weight.device.type == "cpu"
    install_quantized_linears(parts, LAYERS, weights)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(2))
    assert torch.equal(hollow(x), parts(x))


def test_device_and_dtype_can_be_given(parts: Parts) -> None:
    weights = weights_of(parts)
    install_quantized_linears(parts, LAYERS, weights, device="meta", dtype=torch.float16)
    assert parts.down.weight.is_meta
    assert parts.down.weight.dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_a_weight_made_anew_equals_the_kept_one(dtype: torch.dtype) -> None:
    scheme = LayerScheme(weight_group=32, activation_group=32)
    quantized = quantize_weight_nearest(torch.randn(16, 64), scheme)
    kept = QuantizedLinear(scheme, quantized, None, dtype)
    anew = QuantizedLinear(scheme, quantized, None, keep_weight=False).to(dtype)
    x = torch.randn(5, 64).to(dtype)
    assert torch.equal(kept(x), anew(x))
    assert sum(b.numel() for b in anew.buffers()) == 0
    assert (anew.in_features, anew.out_features) == (64, 16)
