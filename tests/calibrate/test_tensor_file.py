"""The tensor file's writer against the safetensors library's own."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qdit.calibrate.tensor_file import (
    TensorEntry,
    TensorFile,
    file_size,
    read_entries,
    stored_order,
    write_tensors,
)
from qdit.progress import Silent

DTYPES = [torch.float32, torch.float16, torch.uint8]


def written(tensors: dict[str, Tensor]) -> bytes:
    entries = {name: TensorEntry.of(value) for name, value in tensors.items()}
    handle = io.BytesIO()
    result = write_tensors(handle, entries, tensors.__getitem__)
    data = handle.getvalue()
    assert result.bytes == len(data) == file_size(entries)
    assert result.sha256 == hashlib.sha256(data).hexdigest()
    return data


@st.composite
def tensor_sets(draw: st.DrawFn) -> dict[str, Tensor]:
    # a lone surrogate is no text, and the library reserves one name
    names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
    shapes = st.lists(st.integers(0, 5), max_size=3)
    described = st.tuples(st.sampled_from(DTYPES), shapes)
    chosen = draw(
        st.dictionaries(names.filter(lambda name: name != "__metadata__"), described, max_size=6)
    )
    return {
        name: (torch.arange(5**3)[: torch.Size(shape).numel()] % 251).reshape(shape).to(dtype)
        for name, (dtype, shape) in chosen.items()
    }


@given(tensor_sets())
@settings(max_examples=150, deadline=None)
def test_the_bytes_are_those_of_the_library(tensors: dict[str, Tensor]) -> None:
    assert written(tensors) == safetensors.torch.save(tensors)


def test_entries_and_tensors_are_read_back_in_stored_order(tmp_path: Path) -> None:
    tensors = {
        "b": torch.arange(6, dtype=torch.uint8).view(2, 3),
        "a": torch.tensor([1.5, -2.0], dtype=torch.float16),
        "c": torch.tensor(3.25),
        "empty": torch.zeros(0, 4, dtype=torch.uint8),
    }
    path = tmp_path / "file.safetensors"
    path.write_bytes(written(tensors))
    entries = read_entries(path)
    assert list(entries) == stored_order(entries) == ["c", "a", "b", "empty"]
    file = TensorFile(path, entries)
    for name, value in tensors.items():
        assert entries[name] == TensorEntry.of(value)
        assert torch.equal(file.read(name), value)


def test_views_are_written_as_what_they_show() -> None:
    base = torch.arange(24, dtype=torch.uint8).view(4, 6)
    views = {"t": base.T, "s": base[::2, 1::2]}
    assert written(views) == safetensors.torch.save(
        {name: view.contiguous() for name, view in views.items()}
    )


def test_a_tensor_other_than_announced_is_an_error() -> None:
    entries = {"a": TensorEntry("F32", (2,))}
    with pytest.raises(ValueError, match=r"tensor a is .*\(3,\).*, announced .*\(2,\)"):
        write_tensors(io.BytesIO(), entries, lambda _name: torch.zeros(3))


def test_one_tensor_is_asked_for_at_a_time_and_progress_is_told() -> None:
    told: list[tuple[str, int | None]] = []

    class Teller(Silent):
        def track(
            self, items: Iterable[str], description: str, total: int | None = None
        ) -> Iterator[str]:
            told.append((description, total))
            yield from items

    asked: list[tuple[str, int]] = []
    handle = io.BytesIO()

    def tensor(name: str) -> Tensor:
        asked.append((name, handle.tell()))
        return torch.zeros(4)

    entries = {name: TensorEntry("F32", (4,)) for name in ("b", "a")}
    write_tensors(handle, entries, tensor, Teller(), "packing")  # type: ignore[arg-type]
    assert told == [("packing", 2)]
    (first, at), (second, later) = asked
    assert (first, second) == ("a", "b")
    assert later - at == 16  # the first one's bytes were out before the second was made
