"""What a served model is, as far as a request may know: plain data, also between processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .errors import UnknownModelError


@dataclass(frozen=True)
class ModelCard:
    """A model that requests can name by `id`.

    `class_names` has one entry a class, or none at all; `width` and `height` are of its images in
    pixels; `tokens` is how many the transformer sees of an image.
    """

    id: str
    created: int
    precision: str
    engine: str
    class_count: int
    class_names: tuple[str, ...]
    width: int
    height: int
    tokens: int
    schedulers: tuple[str, ...]
    default_scheduler: str

    @property
    def size(self) -> str:
        """'WIDTHxHEIGHT', as the OpenAI API writes it."""
        return f"{self.width}x{self.height}"

    def class_label(self, label: int) -> str:
        """The class's name, or its number where it has none."""
        return (self.class_names[label] if self.class_names else "") or str(label)


def find_card(cards: Mapping[str, ModelCard], name: str | None) -> ModelCard:
    """The card of that id, or the first for None. Raises `UnknownModelError`."""
    if name is None:
        return next(iter(cards.values()))
    if name not in cards:
        shown = name if len(name) <= 60 else name[:59] + "…"
        raise UnknownModelError(
            f"no model {shown!r} is loaded; there are {', '.join(cards)}", "model"
        )
    return cards[name]
