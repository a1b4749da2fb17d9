"""TensorRT's log: what goes wrong is kept for the error message, the rest is passed on quietly."""

from __future__ import annotations

import logging
from typing import Any

_LOG = logging.getLogger("qdit.tensorrt")
_KEPT = 4  # the last messages say what failed; earlier ones how it came to that


class ErrorLog:
    """The last error messages of a build."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def add(self, message: str) -> None:
        self.messages = [*self.messages, " ".join(message.split())][-_KEPT:]

    def text(self) -> str:
        """The messages in one line."""
        return "; ".join(self.messages) or "it gave no reason"


def make_logger(trt: Any, errors: ErrorLog) -> Any:
    """A `tensorrt.ILogger`; its class can only be made where TensorRT is installed."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            """Called from TensorRT's own threads; an exception here would end the process."""
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                errors.add(message)
                _LOG.error("%s", message)
            elif severity == trt.ILogger.Severity.WARNING:
                _LOG.info("%s", message)
            else:
                _LOG.debug("%s", message)

    return Logger()
