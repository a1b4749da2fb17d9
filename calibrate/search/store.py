"""Evaluated candidates on disk: a killed search resumes, and a repeated one is free.

`<folder>/<key>/<plan digest>.json`, one small file a candidate, written at once and atomically:

    {"fid": 12.5, "plan": "<digest>", "psnr_db": 24.1, "seconds": 3.2, "version": 1}

1. The key is a digest of all that a fitness follows from but the plan (`EvaluatorPayload.key`), so
   that candidates of other models, settings or caches are never taken for one's own.
2. An infinite FID (images that are not finite) is "infinite", as JSON has no infinity; one that
   was not computed is null.
3. A file that cannot be read, or that does not say what its name says, counts as absent and is
   written anew. Failures are not stored: the next run tries such a candidate again.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ...errors import InputError
from ...files import write_json
from ..plan import QuantizationPlan
from ..strict_json import parse_json_object
from .fitness import Fitness

STORE_VERSION = 1
_INFINITE = "infinite"
_KEYS = {"version", "plan", "fid", "psnr_db", "seconds"}
_FOLDER_DIGITS = 32


class CandidateStore:
    """Fitnesses by plan, in a folder of their `key` (a hex digest)."""

    def __init__(self, folder: Path, key: str) -> None:
        self.folder = folder / key[:_FOLDER_DIGITS]

    def get(self, plan: QuantizationPlan) -> Fitness | None:
        """The stored fitness, or None where there is none or its file is damaged."""
        digest = plan.digest
        try:
            value = parse_json_object(self._path(digest).read_bytes(), digest)
            return _fitness(value, digest)
        except (OSError, InputError, ValueError):
            return None

    def put(self, plan: QuantizationPlan, fitness: Fitness) -> None:
        """Store one candidate's fitness, atomically."""
        digest = plan.digest
        value = {
            "version": STORE_VERSION,
            "plan": digest,
            "fid": _INFINITE if fitness.fid == math.inf else fitness.fid,
            "psnr_db": fitness.psnr_db,
            "seconds": fitness.seconds,
        }
        write_json(self._path(digest), value)

    def __len__(self) -> int:
        return sum(1 for _ in self.folder.glob("*.json")) if self.folder.is_dir() else 0

    def _path(self, digest: str) -> Path:
        return self.folder / f"{digest}.json"


def _fitness(value: dict[str, Any], digest: str) -> Fitness:
    if set(value) != _KEYS or value["version"] != STORE_VERSION or value["plan"] != digest:
        raise ValueError("not the file of this plan")
    fid = value["fid"]
    if fid is not None:
        fid = math.inf if fid == _INFINITE else _number(fid, low=0.0)
    psnr_db = None if value["psnr_db"] is None else _number(value["psnr_db"])
    return Fitness(fid, psnr_db, _number(value["seconds"], low=0.0))


def _number(value: object, low: float = -math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"not a number: {value!r}")
    if not (math.isfinite(value) and value >= low):
        raise ValueError(f"out of range: {value!r}")
    return float(value)
