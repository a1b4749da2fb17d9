"""Keep diffusers from warning about nothing."""

from __future__ import annotations

import logging


class _EmptyList(logging.Filter):
    """Drops 'modules … should be kept in float32: []', logged at every `.to(dtype)` of a model.

    diffusers 0.42 tests `fp32_modules is not None` where it means 'not empty'; with a name in the
    list the warning passes.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        return "should be kept in float32: []" not in record.getMessage()


_FILTER = _EmptyList()


def silence_needless_warnings() -> None:
    """Install the filter; calling it again changes nothing."""
    logging.getLogger("diffusers.models.modeling_utils").addFilter(_FILTER)


def silence_schedulers() -> None:
    """Keep schedulers from noting what they change in a config, once for every trajectory."""
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.set_verbosity_error()
