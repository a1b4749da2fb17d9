"""From a prompt to a class label: the models here know classes, not language."""

from __future__ import annotations

import difflib
import re

from .cards import ModelCard
from .errors import BadRequestError

_SHOWN = 5


def label_of(prompt: str, card: ModelCard) -> int:
    """The class that `prompt` names.

    1. A whole number is a class id, 0 … class_count-1.
    2. A class's name, whatever its case; '_', '-' and spaces are alike.
    3. One of the comma-separated synonyms in a name ('tench, Tinca tinca').
    4. A name of several classes (ImageNet has two cranes) is refused with their ids.

    Raises `BadRequestError` with near names for anything else.
    """
    text = prompt.strip()
    if re.fullmatch(r"[0-9]{1,9}", text):
        return _checked_id(int(text), card)
    names = _labels_by_name(card)
    found = names.get(_plain(text), [])
    if len(found) == 1:
        return found[0]
    if found:
        ids = " or ".join(f"{label} ({card.class_label(label)})" for label in found[:_SHOWN])
        raise BadRequestError(f"{_shown(text)} names several classes; give an id: {ids}", "prompt")
    raise BadRequestError(_unknown(text, names, card), "prompt", "unknown_class")


def _checked_id(label: int, card: ModelCard) -> int:
    if label >= card.class_count:
        raise BadRequestError(
            f"class ids are 0 … {card.class_count - 1}, got {label}", "prompt", "unknown_class"
        )
    return label


def _labels_by_name(card: ModelCard) -> dict[str, list[int]]:
    whole: dict[str, list[int]] = {}
    parts: dict[str, list[int]] = {}
    for label, name in enumerate(card.class_names):
        whole.setdefault(_plain(name), []).append(label)
        for synonym in {_plain(part) for part in name.split(",")} - {_plain(name)}:
            parts.setdefault(synonym, []).append(label)
    names = parts | whole  # a whole name wins over another class's synonym
    names.pop("", None)
    return names


def _plain(text: str) -> str:
    return " ".join(re.split(r"[\s_-]+", text.casefold())).strip()


def _shown(text: str) -> str:
    short = text if len(text) <= 60 else text[:59] + "…"
    return repr(short)


def _unknown(text: str, names: dict[str, list[int]], card: ModelCard) -> str:
    if not names:
        return (
            f"the prompt must be a class id 0 … {card.class_count - 1} (this model's classes have "
            f"no names), got {_shown(text)}"
        )
    close = difflib.get_close_matches(_plain(text), names, n=3) or list(names)[:_SHOWN]
    near = ", ".join(close)
    return (
        f"the prompt must be a class's name or id 0 … {card.class_count - 1}, got {_shown(text)}; "
        f"try {near} (GET /v1/models lists all)"
    )
