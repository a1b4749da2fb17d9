"""The scheduler of DiT models that come without one."""

from __future__ import annotations

from typing import Any


def default_scheduler_config() -> dict[str, Any]:
    """DDIM as facebook/DiT-XL-2-256 ships it.

    1000 steps of linear betas 1e-4 … 0.02 predicting epsilon (Peebles & Xie, section 4), samples
    not clipped: they are latents.
    """
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": 1000,
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "clip_sample": False,
        "prediction_type": "epsilon",
        "set_alpha_to_one": True,
        "steps_offset": 0,
        "timestep_spacing": "leading",
    }
