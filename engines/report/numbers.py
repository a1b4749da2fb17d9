"""Figures as a person reads them: units, few digits, true minus signs, no break before a unit."""

from __future__ import annotations

import math

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_MISSING = "–"
_SPACE = "\u00a0"  # a figure and its unit stay on one line


def byte_size(count: float) -> str:
    """Decimal units, three digits: 10_712_345 → '10.7 MB'."""
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if abs(value) < 999.5:
            return f"{_digits(value) if unit != 'B' else round(value)}{_SPACE}{unit}"
        value /= 1000
    return f"{_digits(value)}{_SPACE}GB"


def error(value: float | None) -> str:
    """A relative error: percent from 0.01 % up, powers of ten below. None is 'not finite'."""
    if value is None:
        return "not finite"
    if value == 0:
        return "0"
    if value >= 1e-4:
        return f"{_digits(100 * value)}{_SPACE}%"
    return scientific(value)


def scientific(value: float) -> str:
    """2.39e-07 → '2.4 × 10⁻⁷'."""
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.replace('-', '−')}{_SPACE}×{_SPACE}10{superscript(int(exponent))}"


def superscript(exponent: int) -> str:
    """-7 → '⁻⁷'."""
    return str(exponent).translate(_SUPERSCRIPT)


def plain(value: float | None, digits: int = 3) -> str:
    """Significant digits without an exponent where that is short: 5.3049 → '5.30'."""
    if value is None:
        return _MISSING
    if value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return scientific(value)
    return _digits(value, digits).replace("-", "−")


def signed(value: float, digits: int = 3) -> str:
    """With its sign: 0.0907 → '+0.0907'."""
    return plain(value, digits) if value < 0 else "+" + plain(value, digits)


def decibel(value: float | None) -> str:
    return _MISSING if value is None else f"{value:.1f}{_SPACE}dB"


def seconds(value: float) -> str:
    """0.42 s, 12.3 s, 1 min 12 s, 2 h 5 min."""
    if value < 100:
        return f"{_digits(value, 2 if value < 1 else 3)}{_SPACE}s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes}{_SPACE}min {rest}{_SPACE}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}{_SPACE}h {minutes}{_SPACE}min"


def count(value: int) -> str:
    """Thousands separated by commas."""
    return f"{value:,}"


def millions(value: int) -> str:
    """A parameter count: '675 M', '10.3 M', '85.1 k'."""
    if value >= 1e9:
        return f"{_digits(value / 1e9)}{_SPACE}B"
    return (
        f"{_digits(value / 1e6)}{_SPACE}M" if value >= 1e6 else f"{_digits(value / 1e3)}{_SPACE}k"
    )


def _digits(value: float, digits: int = 3) -> str:
    if value == 0:
        return "0"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:.{places}f}"
    # 9.996 rounds up into one digit more: '10.00' is cut to '10.0', '100.0' to '100'
    if len(text.strip("-").replace(".", "").lstrip("0")) > digits and "." in text:
        text = text[:-1].rstrip(".")
    return text
