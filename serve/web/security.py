"""API keys, bounded bodies and the headers of every answer."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import InputError
from ..errors import ServeError
from ..settings import RequestLimits

if TYPE_CHECKING:
    from starlette.requests import Request

KEYS_VARIABLE = "QDIT_API_KEYS"
_SHORTEST_KEY = 16
# Nothing from elsewhere, nothing inline: what a class name or a message holds can never run.
SECURITY_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


class AuthenticationError(ServeError):
    """No key, or not one of ours."""

    status = 401
    kind = "authentication_error"
    code = "invalid_api_key"


class BodyError(ServeError):
    """The body is too large, too slow, or not JSON by its content type."""

    kind = "invalid_request_error"

    def __init__(self, message: str, status: int, code: str) -> None:
        super().__init__(message, status, code)
        self.status = status
        self.code = code

    def __str__(self) -> str:
        return str(self.args[0])


class ApiKeys:
    """The keys that may use the API; an empty set lets everyone in.

    Only digests are kept, and a key is compared with all of them in constant time: neither which
    key matched nor how much of it shows in the time that the answer takes.
    """

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._digests = [_digest(key) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def check(self, authorization: str | None) -> None:
        """Raise `AuthenticationError` unless the header carries one of the keys."""
        if not self._digests:
            return
        scheme, _, given = (authorization or "").partition(" ")
        digest = _digest(given.strip())
        matches = 0
        for own in self._digests:
            matches |= hmac.compare_digest(own, digest)
        if scheme.lower() != "bearer" or not matches:
            raise AuthenticationError("give an API key: 'Authorization: Bearer …'")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def read_keys(file: Path | None, variable: str | None) -> ApiKeys:
    """Keys from a file (one a line, '#' starts a comment) and from an environment variable's value.

    Raises `InputError` for a file without keys, or with one that is too short to be safe.
    """
    lines = (variable or "").replace(",", "\n").splitlines()
    if file is not None:
        try:
            lines += file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the API keys in {file}: {error}") from error
    keys = [line.partition("#")[0].strip() for line in lines]
    keys = [key for key in keys if key]
    if file is not None and not keys:
        raise InputError(f"{file} holds no API key; write one a line")
    if any(len(key) < _SHORTEST_KEY for key in keys):
        raise InputError(
            f"an API key must have at least {_SHORTEST_KEY} characters; make one with "
            "`python -c 'import secrets; print(secrets.token_urlsafe(32))'`"
        )
    return ApiKeys(keys)


async def read_json_body(request: Request, limits: RequestLimits) -> bytes:
    """The body, bounded in bytes and time. Raises `BodyError`.

    The content type must be JSON: a page of another site can send other types to a server on this
    machine without asking the browser first.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise BodyError(
            f"the content type must be application/json, got {kind[:100]!r}",
            415,
            "bad_content_type",
        )
    most = limits.max_body_bytes
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared[:20]) > most:
        raise _too_large(most)
    try:
        return await asyncio.wait_for(_read(request, most), limits.body_seconds)
    except asyncio.TimeoutError as error:
        message = f"the body must arrive within {limits.body_seconds:g} s"
        raise BodyError(message, 408, "slow_body") from error


async def _read(request: Request, most: int) -> bytes:
    parts, size = [], 0
    async for part in request.stream():
        parts.append(part)
        size += len(part)
        if size > most:
            raise _too_large(most)
    return b"".join(parts)


def _too_large(most: int) -> BodyError:
    return BodyError(f"the body may have {most} bytes", 413, "body_too_large")
