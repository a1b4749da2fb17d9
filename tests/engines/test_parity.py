"""Parity measured on a small random DiT, with an engine whose errors are known."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from qdit.calibrate.checkpoint import QuantizedCheckpoint
from qdit.calibrate.families.dit import FAMILY
from qdit.calibrate.model import DiffusionModel, ModelSource
from qdit.calibrate.plan import uniform_plan
from qdit.calibrate.quantizers import quantize_weight_nearest
from qdit.calibrate.sampling import SamplingSettings
from qdit.calibrate.schemes import LayerScheme
from qdit.engines.parity import DenoiserParity, measure_parity, plain_float32
from qdit.engines.parity_inputs import Step, record_trajectories
from qdit.engines.parity_internals import exposed_values
from qdit.engines.proof_engine import OnnxRuntimeProof
from qdit.errors import ArtifactError, StepError

CONFIG = {
    "_class_name": "DiTTransformer2DModel",
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "in_channels": 3,
    "out_channels": 6,
    "num_layers": 3,
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": 4,
    "norm_num_groups": 32,
}
SCHEDULER = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000}


@pytest.fixture(scope="module")
def model() -> DiffusionModel:
    torch.manual_seed(0)
    denoiser = FAMILY.build(CONFIG)
    for parameter in denoiser.parameters():  # adaLN-zero would switch every block off
        parameter.copy_(torch.randn_like(parameter) * 0.2)
    FAMILY.tie_shared_modules(denoiser)
    source = ModelSource("random", "random:tiny", "")
    return DiffusionModel("tiny", source, FAMILY, denoiser, CONFIG, SCHEDULER)


@pytest.fixture(scope="module")
def checkpoint(model: DiffusionModel) -> QuantizedCheckpoint:
    scheme = LayerScheme(4, 8, 32, 32)
    plan = uniform_plan("w4a8", scheme, model.linears)
    weights = {
        spec.name: quantize_weight_nearest(
            model.denoiser.get_submodule(spec.name).weight, plan[spec.name]
        )
        for spec in model.linears
    }
    return QuantizedCheckpoint.from_result(model, plan, weights, {}, {})


@pytest.fixture(scope="module")
def steps(model: DiffusionModel) -> list[Step]:
    return record_trajectories(model, SamplingSettings(4, 1.5, 0), 2)


@pytest.fixture
def exported(tmp_path: Path, model: DiffusionModel) -> Path:
    """A file with the metadata of an export (the graph is never run)."""
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "g",
        [value],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
    )
    made = helper.make_model(graph)
    linears = {
        spec.name: {"input": spec.input_name, "output": f"{spec.name}.output"}
        for spec in model.linears
    }
    blocks = [f"transformer_blocks.{i}.output" for i in range(3)]
    helper.set_model_props(
        made, {"qdit.linears": json.dumps(linears), "qdit.blocks": json.dumps(blocks)}
    )
    onnx.save(made, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


@dataclass
class TorchEngine:
    """The simulation behind the engine's interface, with errors put in where a test wants them."""

    model: DiffusionModel
    denoiser: nn.Module
    extra: Sequence[str]
    noise_error: float = 0.0
    linear_error: dict[str, float] = field(default_factory=dict)
    closed: bool = False

    def infer(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        assert list(inputs) == ["hidden_states", "timestep", "class_labels"]
        assert inputs["hidden_states"].dtype == np.float32
        assert inputs["timestep"].dtype == inputs["class_labels"].dtype == np.int64
        found: dict[str, np.ndarray] = {}
        hooks = [hook for spec in self.model.linears for hook in [self._watch(spec, found)]]
        for index, block in enumerate(FAMILY.blocks(self.denoiser)):
            hooks.append(block.register_forward_hook(_keeping(found, index)))
        tensors = [torch.from_numpy(value) for value in inputs.values()]
        with torch.inference_mode():
            raw = FAMILY.forward(self.denoiser, *tensors)
        for hook in hooks:
            hook.remove()
        found["sample"] = (raw * (1 + self.noise_error)).numpy()
        return {name: found[name] for name in (*self.extra, "sample")}

    def _watch(self, spec: Any, found: dict[str, np.ndarray]) -> Any:
        factor = 1 + self.linear_error.get(spec.name, 0.0)

        def keep(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            found[spec.input_name] = inputs[0].numpy()
            found[f"{spec.name}.output"] = (output.double() * factor).float().numpy()

        return self.denoiser.get_submodule(spec.name).register_forward_hook(keep)

    def close(self) -> None:
        self.closed = True


def _keeping(found: dict[str, np.ndarray], index: int) -> Callable[..., None]:
    def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        found[f"transformer_blocks.{index}.output"] = output.numpy()

    return keep


class Stand(OnnxRuntimeProof):
    """A file that opens as a stand-in."""

    def __init__(
        self, path: Path, make: Callable[[Sequence[str]], TorchEngine], dtype: str = "float32"
    ) -> None:
        super().__init__(path, dtype)
        self._make = make

    def open(self, extra_outputs: Sequence[str] = ()) -> Any:
        return self._make(extra_outputs)


def measured(
    model: DiffusionModel,
    checkpoint: QuantizedCheckpoint,
    exported: Path,
    steps: list[Step],
    **errors: Any,
) -> tuple[DenoiserParity, list[TorchEngine]]:
    engines: list[TorchEngine] = []

    def open_engine(extra: Sequence[str]) -> TorchEngine:
        engines.append(TorchEngine(model, checkpoint.build_denoiser(), extra, **errors))
        return engines[-1]

    return measure_parity(model, checkpoint, Stand(exported, open_engine), steps), engines


@pytest.fixture(autouse=True)
def few_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recorded steps alone: what a small model gets beside them has its own test."""
    monkeypatch.setattr("qdit.engines.parity._FEWEST_ACTIVATIONS", 0)


def test_trajectories_hold_every_step_of_the_first_images(
    model: DiffusionModel, steps: list[Step]
) -> None:
    assert [step.timestep for step in steps] == [750, 500, 250, 0]
    assert [step.position for step in steps] == [0, 1, 2, 3]
    assert steps[0].x.shape == (2, 3, 8, 8)
    assert steps[0].labels.tolist() == [0, 1]
    # recording changes nothing: the same first step comes from the noise alone
    again = record_trajectories(model, SamplingSettings(4, 1.0, 0), 2)
    assert torch.equal(again[0].x, steps[0].x)


def test_an_engine_that_is_the_simulation_is_no_distance_away(
    model: DiffusionModel, checkpoint: QuantizedCheckpoint, exported: Path, steps: list[Step]
) -> None:
    parity, engines = measured(model, checkpoint, exported, steps)
    assert parity.engine.distance == 0 and parity.bound.ratio == 0
    assert all(linear.comparison.distance == 0 for linear in parity.linears)
    assert [linear.name for linear in parity.linears] == [spec.name for spec in model.linears]
    assert all(block.engine is not None and block.engine.distance == 0 for block in parity.blocks)
    assert [engine.closed for engine in engines] == [True, True]
    assert engines[1].extra == ()  # the outputs come from the file as it is deployed


def test_simulation_against_full_precision_is_the_plain_difference_of_outputs(
    model: DiffusionModel, checkpoint: QuantizedCheckpoint, exported: Path, steps: list[Step]
) -> None:
    parity, _ = measured(model, checkpoint, exported, steps)
    full, simulated = model.as_denoiser(), model.as_denoiser(checkpoint.build_denoiser())
    pairs = [
        [denoise(step.x, step.timesteps, step.labels).double() for denoise in (full, simulated)]
        for step in steps
    ]
    stacked = [torch.stack(side) for side in zip(*pairs, strict=True)]
    expected = (stacked[1] - stacked[0]).norm() / stacked[0].norm()
    assert parity.simulation.relative_error == pytest.approx(float(expected), rel=1e-6)
    assert 0.01 < parity.simulation.relative_error < 0.5
    for index, error in enumerate(parity.timesteps):
        own = (stacked[1][index] - stacked[0][index]).norm() / stacked[0][index].norm()
        assert error.simulation.relative_error == pytest.approx(float(own), rel=1e-6)
    assert [error.timestep for error in parity.timesteps] == [750, 500, 250, 0]


def test_blocks_grow_away_from_full_precision_on_the_same_model_input(
    model: DiffusionModel, checkpoint: QuantizedCheckpoint, exported: Path, steps: list[Step]
) -> None:
    parity, _ = measured(model, checkpoint, exported, steps)
    assert [block.block for block in parity.blocks] == [0, 1, 2]
    assert all(0 < block.simulation.relative_error < 1 for block in parity.blocks)
    assert parity.blocks[0].simulation.elements == 2 * 16 * 64  # images × tokens × width


def test_the_bounds_own_distance_is_that_to_float64(
    model: DiffusionModel, checkpoint: QuantizedCheckpoint, exported: Path, steps: list[Step]
) -> None:
    parity, _ = measured(model, checkpoint, exported, steps)
    assert parity.bound.own_dtypes == ("float32", "float64")
    assert parity.bound.inputs == len(steps) * 2
    assert 1e-9 < parity.bound.own.relative_error < 1e-2


def test_a_small_model_gets_more_inputs_for_the_bound_and_for_nothing_else(
    model: DiffusionModel,
    checkpoint: QuantizedCheckpoint,
    exported: Path,
    steps: list[Step],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain, _ = measured(model, checkpoint, exported, steps)
    monkeypatch.setattr("qdit.engines.parity._FEWEST_ACTIVATIONS", 430_000)
    parity, _ = measured(model, checkpoint, exported, steps)
    # 16 tokens × (64 qkv + 64 out + 64 mlp in + 256 mlp out) × 3 blocks = 21,504 activations an
    # image: 20 images make 430,000
    assert parity.bound.inputs == 20
    assert parity.simulation == plain.simulation
    assert [step.simulation for step in parity.timesteps] == [
        step.simulation for step in plain.timesteps
    ]


def test_errors_put_into_the_engine_are_found_at_their_size_and_place(
    model: DiffusionModel, checkpoint: QuantizedCheckpoint, exported: Path, steps: list[Step]
) -> None:
    name = "transformer_blocks.1.ff.net.2"
    parity, _ = measured(
        model, checkpoint, exported, steps, noise_error=1e-3, linear_error={name: 1e-4}
    )
    assert parity.engine.relative_error == pytest.approx(1e-3, rel=1e-2)
    assert all(
        step.engine is not None and step.engine.relative_error == pytest.approx(1e-3, rel=1e-2)
        for step in parity.timesteps
    )
    worst = parity.worst_linear
    assert worst is not None
    assert (worst.name, worst.role, worst.block) == (name, "mlp_out", 1)
    assert worst.comparison.relative_error == pytest.approx(1e-4, rel=1e-2)


def test_full_precision_runs_no_more_once_the_caller_was_told(
    model: DiffusionModel, checkpoint: QuantizedCheckpoint, exported: Path, steps: list[Step]
) -> None:
    calls: list[str] = []
    hook = model.denoiser.register_forward_pre_hook(lambda *_: calls.append("run"))

    def open_engine(extra: Sequence[str]) -> TorchEngine:
        return TorchEngine(model, checkpoint.build_denoiser(), extra)

    measure_parity(
        model,
        checkpoint,
        Stand(exported, open_engine),
        steps,
        after_full_precision=lambda: calls.append("told"),
    )
    hook.remove()
    # every step, and the middle one again for the blocks
    assert calls == ["run"] * (len(steps) + 1) + ["told"]


def test_a_float16_file_is_bound_by_the_float16_simulation(
    model: DiffusionModel, checkpoint: QuantizedCheckpoint, exported: Path, steps: list[Step]
) -> None:
    def open_engine(extra: Sequence[str]) -> TorchEngine:
        return TorchEngine(model, checkpoint.build_denoiser(), extra)

    engine = Stand(exported, open_engine, "float16")
    parity = measure_parity(model, checkpoint, engine, steps[:2])
    assert parity.bound.own_dtypes == ("float16", "float32")
    # one float16 rounding is 2^-11 of a value; a whole denoiser is a few of them
    assert 2**-12 < parity.bound.own.relative_error < 0.1
    for linear in parity.linears:
        assert linear.own_error is not None
        assert 2**-13 < linear.own_error < 2e-2
        # the stand-in engine computes in float32 and so is exactly the simulation
        assert linear.comparison.distance == 0


def test_an_engine_that_fails_is_named_and_closed(
    model: DiffusionModel, checkpoint: QuantizedCheckpoint, exported: Path, steps: list[Step]
) -> None:
    class Broken(TorchEngine):
        def infer(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            raise RuntimeError("no kernel")

    engine = Broken(model, model.denoiser, ())
    with pytest.raises(StepError, match=r"model\.onnx failed to run while comparing it: no kernel"):
        measure_parity(model, checkpoint, Stand(exported, lambda _extra: engine), steps)
    assert engine.closed


@pytest.mark.parametrize("content", ["other", "nothing"])
def test_files_without_the_metadata_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "model.onnx"
    if content == "other":
        onnx.save(helper.make_model(helper.make_graph([], "g", [], [])), path)
    with pytest.raises(ArtifactError, match=r"does not say which values .* export it with qdit"):
        exposed_values(path)


@pytest.fixture
def tf32() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.mark.usefixtures("tf32")
def test_tf32_is_off_only_while_comparing() -> None:
    with plain_float32():
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.allow_tf32
