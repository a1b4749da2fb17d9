"""What 'qdit.linears' says of a linear beside its place and scheme."""

from __future__ import annotations

from typing import Any

from ...calibrate.schemes import LayerScheme
from ..realization import Realization

FORM, COMPUTES, REASON = "form", "computes", "reason"


def realization_facts(made: Realization, planned: LayerScheme) -> dict[str, Any]:
    """The form, the scheme that it computes where that is not the plan's, and the reason."""
    facts: dict[str, Any] = {FORM: made.form}
    if not made.is_exact(planned):
        facts[COMPUTES] = made.scheme.to_json()
    return facts | ({REASON: made.reason} if made.reason else {})
