"""search.json, and `search` in report.json: the record of one granularity search (docs/report.md).

PSNRs are in dB with peak 2 against full precision's images from the same noise: predicted from what
single linears do to images, or measured on images that the plan itself made.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, model_validator

from ...calibrate.search.costs import CostKind
from ...errors import ArtifactError
from ...files import write_json
from .entry import Entry, first_problem

SEARCH_NAME = "search.json"

Method = Literal["sensitivity", "evolutionary"]
Figure = float | None  # null where it was not measured or predicted, or is not finite


class BudgetEntry(Entry):
    """The budget: `given` as typed ('effective-bits=g128'), `value` what it came to, in `unit`."""

    kind: CostKind
    given: str
    value: float
    unit: str


class FrontEntry(Entry):
    """One optimum of the front: no plan of this cost or less has a smaller predicted error."""

    cost: float
    effective_weight_bits: float
    predicted_psnr_db: Figure


class UniformEntry(Entry):
    """The plan with `group` on both sides of every linear, for comparison."""

    group: int | Literal["channel"]
    cost: Figure
    effective_weight_bits: float
    predicted_psnr_db: Figure = None
    psnr_db: Figure = None
    fid: Figure = None


class CandidateEntry(Entry):
    """One plan that was judged by its images. `label` is what a person reads ('ranked 2nd')."""

    label: str
    cost: float
    effective_weight_bits: float
    predicted_psnr_db: Figure = None
    psnr_db: Figure = None
    fid: Figure = None
    chosen: bool = False


class HistoryEntry(Entry):
    """An evolutionary search after one generation: all that was evaluated, and the best FID.

    `seconds` is what all evaluations so far took, summed over workers and resumed runs.
    """

    generation: int = Field(ge=0)
    evaluated: int = Field(ge=0)
    seconds: float = Field(ge=0)
    best_fid: Figure


class SearchEntry(Entry):
    """A search: what it was asked, what it chose, and what it saw on the way.

    `cost` (in the budget's unit) and `effective_weight_bits` are the chosen plan's, as are
    `predicted_mse` (of image values) and `predicted_psnr_db`, null where nothing was predicted.
    `seconds` is the whole search, resumed runs added up. `images` is how many image pairs are
    behind each `psnr_db` and `fid`, 0 where none were made.

    Refused: a front whose costs fall; more than one chosen candidate; figures measured on
    images with `images` 0.
    """

    method: Method
    budget: BudgetEntry
    cost: float
    effective_weight_bits: float
    predicted_mse: Figure = None
    predicted_psnr_db: Figure = None
    seconds: float = Field(ge=0)
    front: tuple[FrontEntry, ...] = ()
    uniform: tuple[UniformEntry, ...] = ()
    candidates: tuple[CandidateEntry, ...] = ()
    history: tuple[HistoryEntry, ...] = ()
    images: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _check(self) -> SearchEntry:
        if any(after.cost < before.cost for before, after in pairwise(self.front)):
            raise ValueError("the costs of the front must not fall from point to point")
        chosen = [candidate.label for candidate in self.candidates if candidate.chosen]
        if len(chosen) > 1:
            raise ValueError(f"one candidate at most is chosen, got {', '.join(chosen)}")
        figures = [figure for plan in self.uniform for figure in (plan.psnr_db, plan.fid)]
        figures += [figure for plan in self.candidates for figure in (plan.psnr_db, plan.fid)]
        if not self.images and any(figure is not None for figure in figures):
            raise ValueError("figures measured on images need the number of images, got 0")
        return self

    @property
    def chosen(self) -> CandidateEntry | None:
        """The chosen plan's candidate; None where no candidate was judged by its images."""
        return next((candidate for candidate in self.candidates if candidate.chosen), None)

    def write(self, path: Path) -> None:
        """Write canonical JSON, atomically."""
        write_json(path, self.model_dump(mode="json"))


def read_search(path: Path) -> SearchEntry | None:
    """Read a search.json; None where there is none: not every plan was searched for.

    Raises `ArtifactError` when malformed.
    """
    try:
        return SearchEntry.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise ArtifactError(
            f"{path} is not the record of a search: {first_problem(error)}; search again"
        ) from error
