"""Why a request gets no images, as the HTTP layer tells it: status, OpenAI's type and code."""

from __future__ import annotations

from ..errors import QditError


class ServeError(QditError):
    """Root of what a request can fail with. Picklable: it travels between Ray's processes."""

    status = 500
    kind = "server_error"
    code = "internal_error"
    retry_after: int | None = None  # seconds


class BadRequestError(ServeError):
    """The request cannot be met as it stands; `param` is the field at fault."""

    status = 400
    kind = "invalid_request_error"
    code = "invalid_value"

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, param, code)
        self.param = param
        self.code = code or type(self).code

    def __str__(self) -> str:
        return str(self.args[0])


class UnknownModelError(BadRequestError):
    """No such model is loaded."""

    status = 404
    code = "model_not_found"


class QueueFullError(ServeError):
    """The bounded queue has no room; trying again after `retry_after` seconds may find some."""

    status = 429
    kind = "rate_limit_error"
    code = "queue_full"

    def __init__(self, message: str, retry_after: int = 1) -> None:
        super().__init__(message, retry_after)
        self.retry_after = retry_after

    def __str__(self) -> str:
        return str(self.args[0])


class RequestTimeoutError(ServeError):
    """The request's time was over before its images were done."""

    status = 504
    kind = "timeout_error"
    code = "request_timeout"


class EngineFailedError(ServeError):
    """The engine failed in a call that served this request."""

    status = 500
    code = "engine_failed"


class UnavailableError(ServeError):
    """The server does not take requests now: it drains, or its engine is not usable."""

    status = 503
    kind = "unavailable_error"
    code = "unavailable"

    def __init__(self, message: str, retry_after: int = 5) -> None:
        super().__init__(message, retry_after)
        self.retry_after = retry_after

    def __str__(self) -> str:
        return str(self.args[0])


class ClientGoneError(ServeError):
    """The client went away. Nobody is there to read it; it is counted."""

    status = 499
    kind = "cancelled"
    code = "client_closed_request"
