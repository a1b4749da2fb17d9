"""How a failure is answered: status, headers and OpenAI's error object."""

from __future__ import annotations

from typing import Any

from fastapi.responses import JSONResponse

from ..errors import BadRequestError, ServeError


def error_body(error: ServeError) -> dict[str, Any]:
    """OpenAI's error object."""
    param = error.param if isinstance(error, BadRequestError) else None
    return {
        "error": {"message": str(error), "type": error.kind, "param": param, "code": error.code}
    }


def error_response(error: ServeError) -> JSONResponse:
    """The answer to a request that failed."""
    headers = {}
    if error.retry_after is not None:
        headers["retry-after"] = str(error.retry_after)
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error_body(error), error.status, headers)
