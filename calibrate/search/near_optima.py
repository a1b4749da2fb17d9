"""Plans near the optimum: what the solver would choose if the errors were a little different.

Measured errors are those of one rounding of the weights; quantizing again under another plan rounds
otherwise. On the demo a layer's error varies by a factor of about e^0.3 between roundings, and
paired PSNR by 0.5 dB between plans of equal predicted error: judging a few of them by their images
and keeping the best gains that.
"""

from __future__ import annotations

import numpy as np

from .solver import Table, solve

SPREAD = 0.1  # standard deviation of the errors' logarithms
_TRIES = 20  # draws for one more distinct plan


def near_optima(
    errors: Table,
    costs: Table,
    budget: float,
    count: int,
    *,
    seed: int = 0,
    tie_break: Table | None = None,
) -> list[dict[str, int]]:
    """`count` distinct plans within `budget` at most, as choices by layer; the optimum first.

    The others are the exact optima for errors multiplied by log-normal factors of `SPREAD`, one a
    choice. Fewer come back where draws keep giving the same plans. Raises what `solve` raises.
    """
    found = [solve(errors, costs, budget, tie_break=tie_break)]
    random = np.random.default_rng(seed)
    for _ in range(_TRIES * count):
        if len(found) >= count:
            break
        drawn = {
            name: tuple(np.asarray(row) * np.exp(SPREAD * random.standard_normal(len(row))))
            for name, row in errors.items()
        }
        plan = solve(drawn, costs, budget)
        if plan not in found:
            found.append(plan)
    return found[:count]
