"""Block by block with carried inputs, against running the whole model for every block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qdit.calibrate.blockwise import QuantizationResult, quantize_model
from qdit.calibrate.calibration_set import CalibrationSet
from qdit.calibrate.gptq import GptqSettings, gptq
from qdit.calibrate.model import DiffusionModel
from qdit.calibrate.plan import QuantizationPlan, uniform_plan
from qdit.calibrate.quantizers import (
    QuantizedWeight,
    quantize_weight_mse,
    quantize_weight_nearest,
)
from qdit.calibrate.schemes import LayerScheme
from qdit.calibrate.simulate import QuantizedInputLinear, QuantizedLinear, install_quantized_linears
from qdit.errors import InputError

MakeModel = Callable[..., DiffusionModel]
SCHEME = LayerScheme(4, 8, 32, 32)


class KilledError(Exception):
    """Stands for a kill signal."""


class KillAfter:
    """Progress that dies once `items` items are done; it keeps what was said."""

    def __init__(self, items: int = 1 << 30) -> None:
        self.items = items
        self.said: list[str] = []

    def track(self, items: Iterable, description: str, total: int | None = None) -> Iterator:
        for done, item in enumerate(items):
            if done == self.items:
                raise KilledError
            yield item

    def say(self, message: str) -> None:
        self.said.append(message)


def calibration_of(model: DiffusionModel, samples: int = 12, seed: int = 5) -> CalibrationSet:
    generator = torch.Generator().manual_seed(seed)
    return CalibrationSet(*model.family.example_inputs(model.denoiser, samples, generator))


def assert_same(one: QuantizationResult, other: QuantizationResult) -> None:
    assert list(one.weights) == list(other.weights)
    assert dict(one.errors) == dict(other.errors)
    for name, weight in one.weights.items():
        again = other.weights[name].tensors()
        assert weight.tensors().keys() == again.keys()
        for part, tensor in weight.tensors().items():
            assert torch.equal(tensor, again[part]), (name, part)


@torch.inference_mode()
def whole_model_reference(
    model: DiffusionModel,
    plan: QuantizationPlan,
    calibration: CalibrationSet,
    found: Mapping[str, QuantizedWeight],
) -> dict[str, QuantizedWeight]:
    """GPTQ as the authors run it: for every block the whole model, every linear on its own.

    Blocks already done get the weights `found`, so that each block is compared for itself.
    """
    weights = {}
    for block in range(len(model.family.blocks(model.denoiser))):
        specs = [spec for spec in model.linears if spec.block == block]
        originals = {spec.name: model.denoiser.get_submodule(spec.name) for spec in specs}
        seen: dict[str, list[Tensor]] = {spec.name: [] for spec in specs}
        for name, linear in originals.items():
            parent, _, child = name.rpartition(".")
            wrapped = QuantizedInputLinear(plan[name], linear)  # type: ignore[arg-type]
            setattr(model.denoiser.get_submodule(parent), child, wrapped)
            linear.register_forward_pre_hook(
                lambda _, arguments, rows=seen[name]: rows.append(arguments[0])
            )
        model.family.forward(model.denoiser, *calibration.tensors)
        for name, linear in originals.items():
            parent, _, child = name.rpartition(".")
            setattr(model.denoiser.get_submodule(parent), child, linear)
            linear._forward_pre_hooks.clear()
            x = torch.cat(seen[name]).reshape(-1, seen[name][0].shape[-1]).double()
            hessian = (2 / len(x) * x.T @ x).float()
            weights[name] = gptq(linear.get_parameter("weight"), hessian, plan[name])
        install_quantized_linears(model.denoiser, plan.layers, {n: found[n] for n in originals})
    return weights


def test_equals_running_the_whole_model_for_every_block(make_model: MakeModel) -> None:
    reference_model, model = make_model(), make_model()
    plan = uniform_plan("w4a8", SCHEME, model.linears)
    calibration = calibration_of(model, samples=40)
    found = quantize_model(model, plan, "gptq", calibration, batch_size=40)
    expected = whole_model_reference(reference_model, plan, calibration, found.weights)
    assert list(found.weights) == [spec.name for spec in model.linears]
    # Float32 sums in another order move a Hessian by 1e-7, so a weight at a rounding boundary may
    # take the other side and the rest of its row follows: nearly all integers are equal.
    for name, weight in expected.items():
        same = (found.weights[name].values == weight.values).double().mean().item()
        assert same > 0.99, name


def test_the_denoiser_becomes_the_simulation(make_model: MakeModel) -> None:
    model = make_model()
    plan = uniform_plan("w4a8", SCHEME, model.linears)
    calibration = calibration_of(model)
    result = quantize_model(model, plan, "gptq", calibration)
    other = make_model()
    install_quantized_linears(other.denoiser, plan.layers, result.weights)
    inputs = calibration.tensors
    with torch.inference_mode():
        assert torch.equal(
            model.family.forward(model.denoiser, *inputs),
            other.family.forward(other.denoiser, *inputs),
        )
    for spec in model.linears:
        assert isinstance(model.denoiser.get_submodule(spec.name), QuantizedLinear)
    # nothing was left behind that only lives in inference mode
    assert not any(tensor.is_inference() for tensor in model.denoiser.state_dict().values())
    model.denoiser.double().float()


def test_mixed_plans_are_honoured(make_model: MakeModel) -> None:
    # q and v are solved together, k apart; out is left alone; fc1's input stays at 16 bits
    model = make_model()
    layers = dict(uniform_plan("w4a8", SCHEME, model.linears).layers)
    block = "transformer_blocks.0."
    layers[f"{block}attn1.to_k"] = LayerScheme(8, 8, 64, 64, weight_symmetric=False)
    layers[f"{block}attn1.to_out.0"] = LayerScheme(16, 16)
    layers[f"{block}ff.net.0.proj"] = LayerScheme(3, 16, 32)
    plan = QuantizationPlan("custom", layers)
    original = model.denoiser.get_submodule(f"{block}attn1.to_out.0")
    result = quantize_model(model, plan, "gptq", calibration_of(model))
    assert f"{block}attn1.to_out.0" not in result.weights
    assert model.denoiser.get_submodule(f"{block}attn1.to_out.0") is original
    for name, weight in result.weights.items():
        assert weight.bits == plan[name].weight_bits
        assert (weight.zero_point is None) == plan[name].weight_symmetric
        assert weight.group_size == plan[name].weight_group_size(weight.values.shape[1])
    assert result.errors[f"{block}attn1.to_k"].output < result.errors[f"{block}attn1.to_q"].output


@pytest.mark.parametrize("method", ["gptq", "mse", "nearest"])
def test_output_errors_equal_direct_measurement(make_model: MakeModel, method: Any) -> None:
    model = make_model(num_layers=1)
    plan = uniform_plan("w4a8", SCHEME, model.linears)
    calibration = calibration_of(model)
    name = "transformer_blocks.0.ff.net.2"
    linear: Any = model.denoiser.get_submodule(name)
    weight = linear.weight.double()
    seen: list[Tensor] = []
    linear.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    # inside the statistics pass the linear is never multiplied, but it is given its input
    result = quantize_model(model, plan, method, calibration, batch_size=12)
    x = seen[0].double().reshape(-1, weight.shape[1])
    difference = weight - result.weights[name].dequantize(torch.float64)
    direct = ((x @ difference.T).norm() / (x @ weight.T).norm()).item()
    assert result.errors[name].output == pytest.approx(direct, rel=1e-4)
    relative = (difference.norm() / weight.norm()).item()
    assert result.errors[name].weight == pytest.approx(relative, rel=1e-5)


def test_gptq_has_the_least_output_error(make_model: MakeModel) -> None:
    errors = {}
    for method in ("gptq", "mse", "nearest"):
        model = make_model(num_layers=1)
        plan = uniform_plan("w4a8", SCHEME, model.linears)
        calibration = calibration_of(model, samples=64)
        errors[method] = quantize_model(model, plan, method, calibration).errors  # type: ignore[arg-type]
    for name in errors["gptq"]:
        assert errors["gptq"][name].output < errors["mse"][name].output
        assert errors["gptq"][name].output < errors["nearest"][name].output


@pytest.mark.parametrize(
    ("method", "quantize"),
    [("nearest", quantize_weight_nearest), ("mse", quantize_weight_mse)],
    ids=["nearest", "mse"],
)
def test_without_a_set_nothing_is_run(
    make_model: MakeModel, method: Any, quantize: Callable[..., Any]
) -> None:
    model = make_model()
    originals = {
        spec.name: model.denoiser.get_submodule(spec.name).get_parameter("weight")
        for spec in model.linears
    }

    def refuse(module: nn.Module, arguments: object) -> None:
        raise AssertionError("a forward pass was made")

    for module in model.denoiser.modules():
        module.register_forward_pre_hook(refuse)
    plan = uniform_plan("w4a8", SCHEME, model.linears)
    result = quantize_model(model, plan, method, None)
    for name, weight in result.weights.items():
        assert torch.equal(weight.values, quantize(originals[name], plan[name]).values)
        assert result.errors[name].output is None
        assert 0 < result.errors[name].weight < 0.2


def test_batch_size_hardly_matters(make_model: MakeModel) -> None:
    results = []
    for batch_size in (12, 5):
        model = make_model()
        plan = uniform_plan("w4a8", SCHEME, model.linears)
        results.append(
            quantize_model(model, plan, "gptq", calibration_of(model), batch_size=batch_size)
        )
    for name, error in results[0].errors.items():
        assert error.output == pytest.approx(results[1].errors[name].output, rel=0.03), name


@pytest.mark.parametrize("killed_after", [1, 2])
def test_killed_quantization_goes_on_to_the_bit(
    make_model: MakeModel, tmp_path: Path, killed_after: int
) -> None:
    plan = uniform_plan("w4a8", SCHEME, make_model(num_layers=3).linears)
    calibration = calibration_of(make_model())
    whole = quantize_model(make_model(num_layers=3), plan, "gptq", calibration, batch_size=6)
    with pytest.raises(KilledError):
        quantize_model(
            make_model(num_layers=3),
            plan,
            "gptq",
            calibration,
            batch_size=6,
            folder=tmp_path,
            progress=KillAfter(killed_after),
        )
    stored = sorted(tmp_path.iterdir())
    assert len(stored) == killed_after
    times = [path.stat().st_mtime_ns for path in stored]
    model, progress = make_model(num_layers=3), KillAfter()
    resumed = quantize_model(
        model, plan, "gptq", calibration, batch_size=6, folder=tmp_path, progress=progress
    )
    assert_same(resumed, whole)
    assert [path.stat().st_mtime_ns for path in stored] == times, "finished blocks are not redone"
    assert progress.said == [f"{killed_after} of 3 blocks were quantized before"]
    for spec in model.linears:
        assert isinstance(model.denoiser.get_submodule(spec.name), QuantizedLinear)


@pytest.mark.parametrize(
    "fields",
    [{"weight_symmetric": False}, {"scale_format": "integer"}],
    ids=["asymmetric", "integer scales"],
)
def test_finished_quantization_runs_nothing(
    make_model: MakeModel, tmp_path: Path, fields: dict[str, Any]
) -> None:
    model = make_model()
    plan = uniform_plan("w4a8", LayerScheme(4, 8, 32, 32, **fields), model.linears)
    calibration = calibration_of(model)
    options: dict[str, Any] = {"folder": tmp_path, "compare_scales": True}
    first = quantize_model(model, plan, "gptq", calibration, **options)
    model = make_model()

    def refuse(module: nn.Module, arguments: object) -> None:
        raise AssertionError("a forward pass was made")

    model.denoiser.get_submodule("pos_embed").register_forward_pre_hook(refuse)
    assert_same(quantize_model(model, plan, "gptq", calibration, **options), first)


CHANGES = ["plan", "scales", "method", "calibration", "model", "settings", "comparison", "damage"]


@pytest.mark.parametrize("change", CHANGES)
def test_changed_requests_start_over(make_model: MakeModel, tmp_path: Path, change: str) -> None:
    model = make_model()
    plan = uniform_plan("w4a8", SCHEME, model.linears)
    calibration = calibration_of(model)
    quantize_model(model, plan, "gptq", calibration, folder=tmp_path)
    model = make_model(seed=1) if change == "model" else make_model()
    if change == "plan":
        plan = uniform_plan("w8a8", LayerScheme(8, 8, 32, 32), model.linears)
    if change == "scales":
        scheme = LayerScheme(4, 8, 32, 32, scale_format="integer")
        plan = uniform_plan("w4a8", scheme, model.linears)
    if change == "calibration":
        calibration = calibration_of(model, seed=6)
    if change == "damage":
        path = min(tmp_path.iterdir())
        path.write_bytes(path.read_bytes()[:-5])
    settings = GptqSettings(damping=0.02) if change == "settings" else None
    progress = KillAfter()
    resumed = quantize_model(
        model,
        plan,
        "mse" if change == "method" else "gptq",
        calibration,
        folder=tmp_path,
        progress=progress,
        settings=settings,
        compare_scales=change == "comparison",
    )
    assert progress.said == []
    assert all(weight.bits == plan[name].weight_bits for name, weight in resumed.weights.items())


INTEGER = LayerScheme(4, 8, 32, "token", scale_format="integer")


@pytest.mark.parametrize(
    ("method", "calibrated"),
    [("gptq", True), ("mse", True), ("mse", False), ("nearest", True), ("nearest", False)],
    ids=["gptq", "mse with inputs", "mse", "nearest with inputs", "nearest"],
)
def test_float_scales_are_compared_with_on_the_same_inputs(
    make_model: MakeModel, method: Any, calibrated: bool
) -> None:
    # in the first block nothing before a linear is quantized but its input
    model, float_model = make_model(num_layers=1), make_model(num_layers=1)
    layers = dict(uniform_plan("w4a8", INTEGER, model.linears).layers)
    left = "transformer_blocks.0.attn1.to_k"
    layers[left] = LayerScheme(4, 8, 32, "token")
    plan = QuantizationPlan("custom", layers)
    calibration = calibration_of(model) if calibrated else None
    found = quantize_model(model, plan, method, calibration, compare_scales=True)
    floats = uniform_plan("w4a8", INTEGER.with_float_scales(), model.linears)
    expected = quantize_model(float_model, floats, method, calibration)
    for name, error in found.errors.items():
        if name == left:
            assert error == expected.errors[name]
            continue
        assert error.float_scales is not None
        assert error.float_scales == expected.errors[name], name
        assert error.weight != error.float_scales.weight
        assert (error.output is None) == (error.float_scales.output is None) == (not calibrated)


def test_float_scales_are_compared_with_only_if_asked_and_change_no_weight(
    make_model: MakeModel,
) -> None:
    results = []
    for compared in (True, False):
        model = make_model()
        plan = uniform_plan("w4a8", INTEGER, model.linears)
        results.append(
            quantize_model(model, plan, "gptq", calibration_of(model), compare_scales=compared)
        )
    with_floats, without = results
    for name, weight in with_floats.weights.items():
        for part, tensor in weight.tensors().items():
            assert torch.equal(tensor, without.weights[name].tensors()[part]), (name, part)
        error = with_floats.errors[name]
        assert error.float_scales is not None
        assert without.errors[name] == replace(error, float_scales=None)


def test_linears_that_are_solved_together_get_their_own_multipliers(make_model: MakeModel) -> None:
    model = make_model(num_layers=1)
    plan = uniform_plan("w4a8", INTEGER, model.linears)
    weights = {
        spec.name: model.denoiser.get_submodule(spec.name).get_parameter("weight").clone()
        for spec in model.linears
    }
    result = quantize_model(model, plan, "nearest", None)
    for name, weight in result.weights.items():
        alone = quantize_weight_nearest(weights[name], plan[name])
        assert weight.tensors().keys() == alone.tensors().keys() == {
            "values", "scale", "multiplier"
        }  # fmt: skip
        for part, tensor in alone.tensors().items():
            assert torch.equal(weight.tensors()[part], tensor), (name, part)
            assert weight.tensors()[part].is_contiguous()


def test_gptq_needs_a_set(make_model: MakeModel) -> None:
    model = make_model()
    with pytest.raises(InputError, match="gptq needs a calibration set, got none"):
        quantize_model(model, uniform_plan("w4a8", SCHEME, model.linears), "gptq", None)


def test_unknown_methods_are_refused(make_model: MakeModel) -> None:
    model = make_model()
    plan = uniform_plan("w4a8", SCHEME, model.linears)
    with pytest.raises(InputError, match="weights must be one of gptq, mse, nearest, got 'magic'"):
        quantize_model(model, plan, "magic", None)  # type: ignore[arg-type]


def test_plans_of_another_model_are_refused(make_model: MakeModel) -> None:
    plan = uniform_plan("w4a8", SCHEME, make_model(num_layers=3).linears)
    with pytest.raises(InputError, match="no quantizable linear of this model"):
        quantize_model(make_model(), plan, "nearest", None)
