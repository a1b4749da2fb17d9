"""Random damage: whatever breaks, it breaks by name."""

from __future__ import annotations

import random
from typing import Any

import pytest


@pytest.mark.parametrize("seed", range(60))
def test_random_damage_to_the_manifest_never_escapes_by_another_name(
    victim: Any, seed: int
) -> None:
    chance = random.Random(seed)
    data = bytearray(victim.manifest_path.read_bytes())
    for _ in range(chance.choice([1, 1, 2, 5])):
        place = chance.randrange(len(data))
        action = chance.choice(["flip", "cut", "copy"])
        if action == "flip":
            data[place] = chance.choice(b'0123456789-.eE"{}[]:, \n\\ax\xff\x00')
        elif action == "cut":
            del data[place : place + chance.randrange(1, 40)]
        else:
            data[place:place] = data[chance.randrange(len(data)) :][: chance.randrange(1, 40)]
    victim.manifest_path.write_bytes(data)
    victim.survive()


@pytest.mark.parametrize("seed", range(60))
def test_random_damage_to_the_header_never_escapes_by_another_name(victim: Any, seed: int) -> None:
    chance = random.Random(seed)
    data = bytearray(victim.weights_path.read_bytes())
    end = 8 + int.from_bytes(data[:8], "little")
    for _ in range(chance.choice([1, 1, 2, 5])):
        data[chance.randrange(end)] = chance.choice(b'0123456789-.eE"{}[]:, U8F16\\\xff\x00')
    victim.put_data(bytes(data))
    victim.survive()
