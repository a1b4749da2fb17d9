"""How much a search does by default, by kind of device."""

from __future__ import annotations

# Measuring one linear: images of its trajectory, and the sampler's steps (quality ranks alike at
# more). Four images lose 0.06 of 0.65 dB against 64 (docs/adr/0006).
LEVEL_IMAGES = {"cpu": 4, "cuda": 32}
LEVEL_STEPS = 10
# Plans that are quantized for real and judged by images; 1 is the first, unjudged.
REFINE = {
    "none": {"cpu": 1, "cuda": 1},
    "sensitivity": {"cpu": 3, "cuda": 8},
    "evolutionary": {"cpu": 1, "cuda": 1},
}
JUDGED_IMAGES = {"cpu": 16, "cuda": 256}
UNIFORM_GROUPS = (32, 64, 128)  # what a search is compared with
