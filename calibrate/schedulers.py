"""diffusers schedulers by config and class name, checked for what sampling here can honour."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from ..errors import InputError

DEFAULT_SCHEDULER = "DDIMScheduler"
# Their steps change nothing in them (sampling never sets DDIM's eta), so that trajectories may
# share one, and their denoisers see samples as they are.
_PLAIN = ("DDIMScheduler",)


def make_scheduler(scheduler_config: dict[str, Any], name: str | None = None) -> Any:
    """A fresh diffusers scheduler of class `name`, else of the config's own class, else DDIM.

    Any of diffusers' interchangeable (Karras) schedulers will do; one class reads another's config.
    Raises `InputError` for an unknown class, and for a learned variance: sampling here drops the
    learned sigma (as DDIM and the ODE solvers do), so such a step could not be taken.
    """
    from diffusers.schedulers import KarrasDiffusionSchedulers

    class_name = name or scheduler_config.get("_class_name") or DEFAULT_SCHEDULER
    known = sorted(member.name for member in KarrasDiffusionSchedulers)
    if class_name not in known:
        raise InputError(f"the scheduler must be one of {', '.join(known)}, got {class_name!r}")
    variance = scheduler_config.get("variance_type")
    if variance in ("learned", "learned_range"):
        raise InputError(
            f"the scheduler's variance_type must not be learned, got {variance!r}; "
            f"use 'fixed_small' or {DEFAULT_SCHEDULER}"
        )
    try:
        # a copy takes a tenth of the time that reading a config does
        return copy.deepcopy(_prototype(class_name, json.dumps(scheduler_config, default=str)))
    except (TypeError, ValueError, NotImplementedError, ImportError) as error:
        raise InputError(f"cannot make a {class_name} of this config: {error}") from error


@dataclass(frozen=True, eq=False)
class PreparedScheduler:
    """A scheduler that was told its number of steps, and the `timesteps` that it visits.

    `is_plain`: its steps leave no state behind, and it does not scale the denoiser's input.
    """

    scheduler: Any
    timesteps: tuple[int, ...]
    is_plain: bool
    _derived: dict[Callable[[Any], Any], Any] = field(default_factory=dict, init=False)

    def derived(self, of: Callable[[Any], Any]) -> Any:
        """What `of` makes of the scheduler, made once."""
        if of not in self._derived:
            self._derived[of] = of(self.scheduler)
        return self._derived[of]


def prepare_scheduler(
    scheduler_config: dict[str, Any], name: str | None, num_inference_steps: int
) -> PreparedScheduler:
    """`make_scheduler` and `set_steps` for one trajectory. Raises what they raise.

    A server makes one for every image: what was prepared before is shared where steps leave no
    state behind, and copied otherwise.
    """
    prepared = _prepared(json.dumps(scheduler_config, default=str), name, num_inference_steps)
    if prepared.is_plain:
        return prepared
    return replace(prepared, scheduler=copy.deepcopy(prepared.scheduler))


@lru_cache(maxsize=256)
def _prepared(config: str, name: str | None, num_inference_steps: int) -> PreparedScheduler:
    scheduler = make_scheduler(json.loads(config), name)
    timesteps = tuple(set_steps(scheduler, num_inference_steps))
    return PreparedScheduler(scheduler, timesteps, type(scheduler).__name__ in _PLAIN)


@lru_cache(maxsize=32)
def _prototype(class_name: str, config: str) -> Any:
    import diffusers

    return getattr(diffusers, class_name).from_config(json.loads(config))


def set_steps(scheduler: Any, num_inference_steps: int) -> list[int]:
    """Prepare `scheduler` for so many steps; the original timesteps (0 … 999) it will visit.

    Some schedulers visit more timesteps than steps asked for (Heun). Raises `InputError` where a
    timestep is not whole (the denoisers take integers), and for a number of steps that the
    scheduler cannot take (PNDM below 4, DPM-Solver++ from 1000 on).
    """
    try:
        scheduler.set_timesteps(num_inference_steps)
    except (ValueError, IndexError, AssertionError, RuntimeError) as error:
        raise _cannot_take(scheduler, num_inference_steps, str(error)) from error
    values = [float(value) for value in scheduler.timesteps]
    for value in values:
        if not value.is_integer():
            raise InputError(
                f"timesteps must be whole numbers, got {value:.3f} from "
                f"{type(scheduler).__name__} with {num_inference_steps} steps; "
                f"use timestep_spacing 'leading' or {DEFAULT_SCHEDULER}"
            )
    if num_inference_steps > 1 and len(set(values)) == 1:
        # the spacing was rounded to 0: diffusers' multistep solvers at as many steps as in training
        raise _cannot_take(scheduler, num_inference_steps, "it would visit one timestep only")
    return [int(value) for value in values]


def _cannot_take(scheduler: Any, steps: int, reason: str) -> InputError:
    reason = f": {reason}" if reason else ""
    return InputError(
        f"{type(scheduler).__name__} cannot take {steps} steps{reason}; "
        f"use another number or {DEFAULT_SCHEDULER}"
    )
