"""Errors a person can act on. Every message says the rule, the value got and the next action."""

from __future__ import annotations


class QditError(Exception):
    """Root of the project's own errors; the commands print it as one line."""

    exit_code = 1


class InputError(QditError):
    """The request cannot be met as it stands: a flag, a file or a plan is wrong (exit code 2)."""

    exit_code = 2


class ArtifactError(InputError):
    """A file or folder read as an artifact is malformed; subclasses name what is wrong with it."""


class StepError(QditError):
    """A step of a long job failed; carries where it stood. Raise it `from` the cause."""
