"""JSON as artifacts need it: no duplicate keys, no NaN, objects only, bounded in size."""

from __future__ import annotations

import json
from typing import Any

from .artifact_errors import DuplicateKeyError, InvalidJsonError


def parse_json_object(data: bytes, where: str) -> dict[str, Any]:
    """Parse UTF-8 JSON text that must be one object (RFC 8259, and RFC 7493's unique names).

    Raises `InvalidJsonError` or its `DuplicateKeyError`; `where` names the text in the message.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise DuplicateKeyError(f"{where} names the key {twice!r} twice; write it anew")
        return value

    def refuse(constant: str) -> Any:
        raise InvalidJsonError(f"{where} contains {constant}, which is not JSON; write it anew")

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        # ValueError covers JSONDecodeError and integers of thousands of digits
        raise InvalidJsonError(f"{where} is not readable JSON: {error}; write it anew") from error
    if not isinstance(value, dict):
        raise InvalidJsonError(f"{where} must be a JSON object, got {type(value).__name__}")
    return value
