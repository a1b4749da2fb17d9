"""What the report's JSON files share: strict, frozen entries, and how a bad key is named."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, ValidationError


class Entry(BaseModel):
    """Refuses unknown keys, NaN and infinity; cannot be changed once made."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def first_problem(error: ValidationError) -> str:
    """The first bad key and what is wrong with it: 'parity.passed: Field required'."""
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"]) or "the file"
    return f"{key}: {first['msg']}"
