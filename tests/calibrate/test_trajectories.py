"""Collecting the calibration set, against a plain sampling loop with diffusers' scheduler."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler

from qdit.calibrate.model import DiffusionModel
from qdit.calibrate.sampling import SamplingSettings, initial_noise
from qdit.calibrate.trajectories import (
    FILE_NAME,
    FIRST_TRAJECTORY,
    CalibrationSet,
    collect_calibration_set,
    spread_steps,
)
from qdit.errors import InputError

SETTINGS = SamplingSettings(num_inference_steps=6, guidance_scale=1.5, seed=3)


class KilledError(Exception):
    """Stands for a kill signal."""


class KillAfter:
    """Progress that dies after `items` items of the outermost bar."""

    def __init__(self, items: int) -> None:
        self.items = items

    def track(self, items: Iterable, description: str, total: int | None = None) -> Iterator:
        for done, item in enumerate(items):
            if done == self.items:
                raise KilledError
            yield item

    def say(self, message: str) -> None:
        return None


def same(one: CalibrationSet, other: CalibrationSet) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.tensors, other.tensors, strict=True))


def count_calls(model: DiffusionModel) -> Counter[str]:
    calls: Counter[str] = Counter()
    model.denoiser.register_forward_pre_hook(lambda *_: calls.update(["denoiser"]))
    return calls


@pytest.mark.parametrize(
    ("samples", "per_trajectory", "steps"),
    [(256, 8, 50), (256, 1, 50), (60, 4, 20), (7, 3, 10), (10, 10, 10), (5, 2, 50)],
    ids=str,
)
def test_steps_are_spread_evenly(samples: int, per_trajectory: int, steps: int) -> None:
    chosen = spread_steps(samples, per_trajectory, steps)
    counts = Counter(step for trajectory in chosen for step in trajectory)
    assert sum(counts.values()) == samples
    assert set(counts) <= set(range(steps))
    if samples >= steps:
        assert set(counts) == set(range(steps)), "every step is covered"
        assert max(counts.values()) - min(counts.values()) <= 1
    assert max(len(trajectory) for trajectory in chosen) == per_trajectory
    for trajectory in chosen:
        gaps = [late - early for early, late in pairwise(trajectory)]
        assert all(gap >= steps // per_trajectory for gap in gaps)


def test_equals_a_plain_guided_sampling_loop(make_model: Callable[..., DiffusionModel]) -> None:
    model = make_model()
    found = collect_calibration_set(model, SETTINGS, 3, per_trajectory=3, batch_size=1)
    label = int(found.class_labels[0])
    index = FIRST_TRAJECTORY * 5 + label
    scheduler = DDIMScheduler(num_train_timesteps=1000)
    scheduler.set_timesteps(6)
    x = initial_noise([index], (3, 8, 8), SETTINGS.seed)
    expected = {}
    with torch.inference_mode():
        for timestep in scheduler.timesteps:
            expected[int(timestep)] = x
            both = model.denoiser(
                torch.cat([x, x]),
                timestep=timestep.expand(2),
                class_labels=torch.tensor([label, 5]),
                return_dict=False,
            )[0][:, :3]
            noise = both[1:] + 1.5 * (both[:1] - both[1:])
            x = scheduler.step(noise, timestep, x).prev_sample
    # 3 samples over 6 steps: steps 0, 2 and 4
    assert found.timestep.tolist() == [int(scheduler.timesteps[i]) for i in (0, 2, 4)]
    assert found.class_labels.tolist() == [label] * 3
    for x, timestep in zip(found.hidden_states, found.timestep, strict=True):
        torch.testing.assert_close(x, expected[int(timestep)][0], rtol=1e-5, atol=1e-5)


def test_batches_do_not_matter(make_model: Callable[..., DiffusionModel]) -> None:
    model = make_model()
    together = collect_calibration_set(model, SETTINGS, 12, per_trajectory=3, batch_size=4)
    apart = collect_calibration_set(model, SETTINGS, 12, per_trajectory=3, batch_size=1)
    keys = [
        sorted(zip(part.timestep.tolist(), part.class_labels.tolist(), strict=True))
        for part in (together, apart)
    ]
    assert keys[0] == keys[1]
    assert len(set(together.class_labels.tolist())) > 1, "labels are random"
    sums = [part.hidden_states.abs().sum().item() for part in (together, apart)]
    assert sums[0] == pytest.approx(sums[1], rel=1e-5)


def test_seed_decides(make_model: Callable[..., DiffusionModel]) -> None:
    model = make_model()
    first = collect_calibration_set(model, SETTINGS, 4, per_trajectory=2)
    again = collect_calibration_set(model, SETTINGS, 4, per_trajectory=2)
    other = collect_calibration_set(model, SamplingSettings(6, 1.5, 4), 4, per_trajectory=2)
    assert same(first, again)
    assert first.digest != other.digest


def test_saved_set_is_reused(make_model: Callable[..., DiffusionModel], tmp_path: Path) -> None:
    model = make_model()
    first = collect_calibration_set(model, SETTINGS, 4, per_trajectory=2, folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
    calls = count_calls(model)
    again = collect_calibration_set(model, SETTINGS, 4, per_trajectory=2, folder=tmp_path)
    assert same(first, again)
    assert not calls


@pytest.mark.parametrize("change", ["samples", "seed", "model", "damage"])
def test_another_request_collects_anew(
    make_model: Callable[..., DiffusionModel], tmp_path: Path, change: str
) -> None:
    collect_calibration_set(make_model(), SETTINGS, 4, per_trajectory=2, folder=tmp_path)
    model = make_model(seed=1) if change == "model" else make_model()
    settings = SamplingSettings(6, 1.5, 9) if change == "seed" else SETTINGS
    samples = 6 if change == "samples" else 4
    if change == "damage":
        path = tmp_path / FILE_NAME
        path.write_bytes(path.read_bytes()[:-1])
    calls = count_calls(model)
    collected = collect_calibration_set(model, settings, samples, per_trajectory=2, folder=tmp_path)
    assert calls["denoiser"] == 6
    assert same(collected, CalibrationSet.read(tmp_path / FILE_NAME))


def test_killed_collection_goes_on(
    make_model: Callable[..., DiffusionModel], tmp_path: Path
) -> None:
    model = make_model()
    whole = collect_calibration_set(model, SETTINGS, 9, per_trajectory=3, batch_size=1)
    with pytest.raises(KilledError):
        collect_calibration_set(
            model,
            SETTINGS,
            9,
            per_trajectory=3,
            batch_size=1,
            folder=tmp_path,
            progress=KillAfter(2),
        )
    assert len(list(tmp_path.glob("*.part.safetensors"))) == 2
    calls = count_calls(model)
    resumed = collect_calibration_set(
        model, SETTINGS, 9, per_trajectory=3, batch_size=1, folder=tmp_path
    )
    assert calls["denoiser"] == 6, "only the third trajectory is run"
    assert same(resumed, whole)
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


@pytest.mark.parametrize(
    ("samples", "per_trajectory", "message"),
    [
        (0, 1, "calibration samples must be at least 1, got 0"),
        (4, 0, "between 1 and its 6 steps, got 0"),
        (4, 7, "between 1 and its 6 steps, got 7"),
    ],
    ids=["no samples", "none a trajectory", "more than steps"],
)
def test_impossible_counts_are_refused(
    make_model: Callable[..., DiffusionModel], samples: int, per_trajectory: int, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        collect_calibration_set(make_model(), SETTINGS, samples, per_trajectory=per_trajectory)
