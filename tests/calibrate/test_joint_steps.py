"""Trajectories stepped together against the same ones stepped alone: equal to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qdit.calibrate.joint_steps import JointStep, steps_jointly
from qdit.calibrate.sampling import SampledModel, SamplingSettings, Trajectory
from qdit.calibrate.schedulers import make_scheduler, prepare_scheduler

SHAPE = (3, 4, 4)
DDIM: dict[str, Any] = {"_class_name": "DDIMScheduler", "beta_schedule": "linear"}
CONFIGS = {
    "clipped": DDIM | {"clip_sample": True, "clip_sample_range": 0.7},
    "unclipped": DDIM | {"clip_sample": False},
    "last alpha from the table": DDIM | {"clip_sample": False, "set_alpha_to_one": False},
    "trailing": DDIM | {"timestep_spacing": "trailing"},
    "thresholded": DDIM | {"thresholding": True},
    "v prediction": DDIM | {"prediction_type": "v_prediction"},
    "multistep": {"_class_name": "DPMSolverMultistepScheduler"},
    "scaled input": {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"},
    "noise in its steps": {"_class_name": "EulerAncestralDiscreteScheduler"}
    | {"timestep_spacing": "leading"},
}
JOINT = ("clipped", "unclipped", "last alpha from the table", "trailing")


def predicted(x: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
    """A denoiser without a batch's rounding: every row by itself."""
    return torch.sin(3 * x + labels.view(-1, 1, 1, 1)) * (1 + timesteps.view(-1, 1, 1, 1) / 999)


def trajectories(*names: str) -> list[Trajectory]:
    """Different step counts, guidance scales and numbers of samples."""
    made = []
    for place, name in enumerate(names):
        model = SampledModel(SHAPE, 10, 10, CONFIGS[name])
        settings = SamplingSettings(3 + 2 * place, (1.0, 1.5, 4.0)[place % 3], seed=place)
        made.append(Trajectory(model, settings, range(place, place + 1 + place % 2)))
    return made


def run_together(own: list[Trajectory]) -> None:
    while left := [trajectory for trajectory in own if trajectory.steps_left]:
        step = JointStep(left)
        assert step.advance(predicted(*step.rows())) == {}


@pytest.mark.parametrize(
    "names",
    [*((name,) * 4 for name in CONFIGS), JOINT, tuple(CONFIGS)],
    ids=[*CONFIGS, "all that step jointly", "all"],
)
def test_the_bits_of_each_alone(names: tuple[str, ...]) -> None:
    together, alone = trajectories(*names), trajectories(*names)
    run_together(together)
    for one, other in zip(together, alone, strict=True):
        while other.steps_left:
            other.advance(predicted(*other.rows()))
        assert torch.equal(one.x, other.x)
        assert torch.equal(one.foreseen(), other.foreseen())


def test_rows_are_those_of_each() -> None:
    """With labels, guided ones first; then the guided ones' without."""
    plain, guided, strong, other = own = trajectories(*JOINT)
    assert [trajectory.guidance for trajectory in own] == [1.0, 1.5, 4.0, 1.0]
    of = {t: [rows.chunk(t.halves) for rows in t.rows()] for t in own}
    order = [(guided, 0), (strong, 0), (plain, 0), (other, 0), (guided, 1), (strong, 1)]
    for part, made in enumerate(JointStep(own).rows()):
        expected = torch.cat([of[t][part][half] for t, half in order])
        assert torch.equal(made, expected)
        assert made.dtype == expected.dtype


@pytest.mark.parametrize("name", CONFIGS)
def test_one_trajectory_has_its_own_rows(name: str) -> None:
    for own in trajectories(name, name):
        for made, expected in zip(JointStep([own]).rows(), own.rows(), strict=True):
            assert torch.equal(made, expected)


def test_padding_repeats_the_first_row_and_moves_nothing() -> None:
    padded, plain = trajectories(*JOINT), trajectories(*JOINT)
    step = JointStep(padded)
    rows = step.rows(padded_to=16)
    bare = JointStep(plain)
    for made, expected in zip(rows, bare.rows(), strict=True):
        count = len(expected)
        assert len(made) == 16
        assert torch.equal(made[:count], expected)
        assert torch.equal(made[count:], made[:1].expand(16 - count, *made.shape[1:]))
    step.advance(predicted(*rows))
    bare.advance(predicted(*bare.rows()))
    for one, other in zip(padded, plain, strict=True):
        assert torch.equal(one.x, other.x)


def test_a_prediction_stays_as_the_engine_gave_it() -> None:
    step = JointStep(trajectories(*JOINT))
    prediction = predicted(*step.rows())
    before = prediction.clone()
    step.advance(prediction)
    assert torch.equal(prediction, before)


def test_a_step_needs_its_rows_first() -> None:
    with pytest.raises(RuntimeError, match="tell its rows before it advances"):
        JointStep(trajectories("clipped")).advance(torch.zeros(1, *SHAPE))


@pytest.mark.parametrize("name", CONFIGS)
def test_only_ddim_on_predicted_noise_steps_jointly(name: str) -> None:
    assert steps_jointly(make_scheduler(CONFIGS[name])) == (name in JOINT)


def test_a_failing_scheduler_stops_its_own_trajectory_only() -> None:
    own = trajectories("clipped", "multistep", "clipped")

    def fail(*_args: Any, **_options: Any) -> Any:
        raise RuntimeError("out of order")

    own[1].scheduler.step = fail
    step = JointStep(own)
    errors = step.advance(predicted(*step.rows()))
    assert {own.index(failed): str(error) for failed, error in errors.items()} == {
        1: "out of order"
    }
    assert [trajectory.position for trajectory in own] == [1, 0, 1]


def test_schedulers_of_one_config_share_no_state() -> None:
    first, second = (make_scheduler(CONFIGS["multistep"]) for _ in range(2))
    first.set_timesteps(5)
    first.step(torch.ones(1, *SHAPE), first.timesteps[0], torch.ones(1, *SHAPE))
    assert second.model_outputs == [None, None]
    assert second.num_inference_steps is None
    assert len(second.timesteps) == 1000


def test_prepared_schedulers_are_shared_where_steps_leave_no_state() -> None:
    ddim, other = (prepare_scheduler(DDIM, None, 5) for _ in range(2))
    assert ddim.scheduler is other.scheduler
    assert ddim.timesteps != prepare_scheduler(DDIM, None, 6).timesteps
    config = CONFIGS["multistep"]
    first, second = (prepare_scheduler(config, None, 5) for _ in range(2))
    first.scheduler.step(torch.ones(1, *SHAPE), first.scheduler.timesteps[0], torch.ones(1, *SHAPE))
    assert first.timesteps == second.timesteps
    assert second.scheduler.model_outputs == [None, None]
    assert prepare_scheduler(config, None, 5).scheduler.model_outputs == [None, None]
