"""Measured times of single linears, by target, as data that a search reads.

`engines/latency_bench.py` measures; this is the table, its file and its lookup.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ...errors import ArtifactError, InputError
from ...files import write_json
from ..plan import LinearSpec
from ..schemes import LayerScheme
from ..strict_json import parse_json_object
from .space import canonical_scheme

TABLE_VERSION = 1
_FILE_KEYS = {"version", "hardware", "environment", "entries"}
_ENTRY_KEYS = {"target", "rows", "in_features", "out_features", "scheme", "ms"}


@dataclass(frozen=True)
class LatencyKey:
    """One measured case: y [M, N] = x [M, K] Wᵀ on a target, quantized by a scheme.

    A group of all K channels is written 'channel' or 'token', so that equal cases are equal keys.
    """

    target: str
    rows: int
    in_features: int
    out_features: int
    scheme: LayerScheme

    def __post_init__(self) -> None:
        self.scheme.check_fits("a measured linear", self.in_features)
        object.__setattr__(self, "scheme", canonical_scheme(self.scheme, self.in_features))

    def to_json(self) -> dict[str, Any]:
        return {
            "target": self.target,
            "rows": self.rows,
            "in_features": self.in_features,
            "out_features": self.out_features,
            "scheme": self.scheme.to_json(),
        }


def rows_of(spec: LinearSpec, tokens: int, batch: int = 1) -> int:
    """Rows M of a linear's input [M, K]: one a token, but one an image for adaLN's embedding."""
    return batch if spec.role == "adaln" else batch * tokens


@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds by case, measured on one machine.

    `hardware` names the machine, device and threads for people; `environment` holds what else
    decides the times (library versions): a table of another environment is measured anew.
    """

    hardware: str
    environment: Mapping[str, str]
    times: Mapping[LatencyKey, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "environment", MappingProxyType(dict(self.environment)))
        object.__setattr__(self, "times", MappingProxyType(dict(self.times)))

    def __reduce__(self) -> tuple[Any, ...]:  # MappingProxyType does not pickle; workers need it
        return (LatencyTable, (self.hardware, dict(self.environment), dict(self.times)))

    def milliseconds(
        self, target: str, rows: int, in_features: int, out_features: int, scheme: LayerScheme
    ) -> float:
        """The measured time. Raises `InputError` for a case that the table lacks."""
        key = LatencyKey(target, rows, in_features, out_features, scheme)
        if key not in self.times:
            raise InputError(
                f"the latency table of {self.hardware} must hold every case that is asked for, it "
                f"has none of [{rows}, {in_features}] × [{in_features}, {out_features}] with "
                f"{scheme.label} on {target}; measure it first"
            )
        return self.times[key]

    def missing(self, keys: Iterable[LatencyKey]) -> list[LatencyKey]:
        """Those of `keys` that are not measured, each once, in order."""
        return [key for key in dict.fromkeys(keys) if key not in self.times]

    def with_times(self, times: Mapping[LatencyKey, float]) -> LatencyTable:
        """This table with further measurements; a later one replaces an earlier one."""
        return LatencyTable(self.hardware, self.environment, {**self.times, **times})

    def write(self, path: Path) -> None:
        """Write as JSON, atomically."""
        entries = [{**key.to_json(), "ms": value} for key, value in self.times.items()]
        table = {
            "version": TABLE_VERSION,
            "hardware": self.hardware,
            "environment": dict(self.environment),
            "entries": entries,
        }
        write_json(path, table)

    @classmethod
    def read(cls, path: Path) -> LatencyTable:
        """The inverse of `write`. Raises `ArtifactError` that names the file for anything else."""
        try:
            value = parse_json_object(path.read_bytes(), str(path))
            return _table(value)
        except (OSError, ValueError, InputError) as error:
            raise ArtifactError(
                f"{path} is not a readable latency table: {error}; delete it to measure again"
            ) from error


def needed_keys(
    linears: Iterable[LinearSpec],
    schemes: Mapping[str, Sequence[LayerScheme]],
    target: str,
    tokens: int,
    batch: int = 1,
) -> list[LatencyKey]:
    """The cases that a latency cost needs, each once: `schemes` by linear, `space.choices` say."""
    keys = (
        LatencyKey(target, rows_of(spec, tokens, batch), spec.in_features, spec.out_features, one)
        for spec in linears
        for one in schemes[spec.name]
    )
    return list(dict.fromkeys(keys))


def _table(value: dict[str, Any]) -> LatencyTable:
    if set(value) != _FILE_KEYS or value["version"] != TABLE_VERSION:
        raise ValueError(f"it must hold {', '.join(sorted(_FILE_KEYS))} of version {TABLE_VERSION}")
    environment, entries = value["environment"], value["entries"]
    if not isinstance(environment, dict) or not isinstance(entries, list):
        raise ValueError("environment must be an object and entries a list")
    if not all(isinstance(text, str) for text in (value["hardware"], *environment.values())):
        raise ValueError("hardware and the environment's values must be text")
    return LatencyTable(value["hardware"], environment, dict(map(_entry, entries)))


def _entry(value: object) -> tuple[LatencyKey, float]:
    if not isinstance(value, dict) or set(value) != _ENTRY_KEYS:
        raise ValueError(f"an entry must hold {', '.join(sorted(_ENTRY_KEYS))}")
    rows, k, n = sizes = [value[key] for key in ("rows", "in_features", "out_features")]
    if not all(type(size) is int and size > 0 for size in sizes):
        raise ValueError(f"an entry's sizes must be positive whole numbers, got {sizes}")
    time = value["ms"]
    if not isinstance(time, (int, float)) or not (math.isfinite(time) and time > 0):
        raise ValueError(f"an entry's ms must be a positive number, got {time!r}")
    if not isinstance(value["target"], str):
        raise ValueError("an entry's target must be text")
    scheme = LayerScheme.from_json(value["scheme"])
    return LatencyKey(value["target"], rows, k, n, scheme), float(time)
