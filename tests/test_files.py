"""Atomic writes: what a failure at any moment leaves behind. Canonical JSON and hashes."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qdit.files import (
    atomic_path,
    canonical_json,
    sha256_of_file,
    sha256_of_json,
    write_json,
    write_text,
)


def test_the_target_appears_only_when_the_block_has_succeeded(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "file.bin"
    with atomic_path(target) as temporary:
        temporary.write_bytes(b"new")
        assert not target.exists()
        assert temporary.parent == target.parent  # a rename is atomic within one folder only
    assert target.read_bytes() == b"new"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failure_keeps_the_old_file_and_leaves_nothing_else(
    tmp_path: Path, error: type[BaseException]
) -> None:
    target = tmp_path / "file.bin"
    target.write_bytes(b"old")
    with pytest.raises(error), atomic_path(target) as temporary:
        temporary.write_bytes(b"half")
        raise error
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_block_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    target = tmp_path / "file.bin"
    target.write_bytes(b"old")
    with pytest.raises(FileNotFoundError), atomic_path(target):
        pass
    assert target.read_bytes() == b"old"


def test_a_target_that_cannot_be_replaced_leaves_nothing_behind(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    (target / "inside").mkdir(parents=True)
    with pytest.raises(OSError), atomic_path(target) as temporary:
        temporary.write_bytes(b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_threads_may_write_one_file_at_once(tmp_path: Path) -> None:
    target, together = tmp_path / "file.bin", threading.Barrier(8)

    def write(_number: int) -> None:
        with atomic_path(target) as temporary:
            together.wait(10)
            temporary.write_bytes(b"the same")
            together.wait(10)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    assert target.read_bytes() == b"the same"
    assert list(tmp_path.iterdir()) == [target]


def test_a_killed_process_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "file.bin"
    target.write_bytes(b"old")
    script = f"""
        import os, signal, pathlib
        from qdit.files import atomic_path
        with atomic_path(pathlib.Path({str(target)!r})) as temporary:
            temporary.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert target.read_bytes() == b"old"
    write_text(target, "new")
    assert target.read_text() == "new"


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("untouched")
    target = tmp_path / "link"
    target.symlink_to(other)
    write_text(target, "new")
    assert other.read_text() == "untouched"
    assert not target.is_symlink()
    assert target.read_text() == "new"


def test_files_get_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    write_text(tmp_path / "atomic", "")
    modes = {(tmp_path / name).stat().st_mode for name in ("plain", "atomic")}
    assert len(modes) == 1


def test_text_is_written_as_utf8(tmp_path: Path) -> None:
    write_text(tmp_path / "file.txt", "σ → µ\n")
    assert (tmp_path / "file.txt").read_bytes() == b"\xcf\x83 \xe2\x86\x92 \xc2\xb5\n"


def test_canonical_json_is_one_text_for_equal_values(tmp_path: Path) -> None:
    one, other = {"b": [1, 2.5], "a": {"y": None, "x": "σ"}}, {"a": {"x": "σ", "y": None}}
    other["b"] = [1, 2.5]
    expected = """\
        {
          "a": {
            "x": "σ",
            "y": null
          },
          "b": [
            1,
            2.5
          ]
        }
        """
    assert canonical_json(one) == canonical_json(other) == textwrap.dedent(expected)
    write_json(tmp_path / "file.json", one)
    assert json.loads((tmp_path / "file.json").read_text("utf-8")) == one


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_numbers_that_json_lacks_are_refused_and_nothing_is_written(
    tmp_path: Path, value: float
) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "file.json", {"value": value})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("data", "digest"),
    [
        # FIPS 180-4 / NIST examples
        (b"", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
        (b"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
        (b"a" * 10**6, "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"),
    ],
    ids=["empty", "abc", "a million a"],
)
def test_file_hashes_are_sha256(tmp_path: Path, data: bytes, digest: str) -> None:
    (tmp_path / "file").write_bytes(data)
    assert sha256_of_file(tmp_path / "file") == digest


def test_a_file_longer_than_one_chunk_is_hashed_whole(tmp_path: Path) -> None:
    data = os.urandom((1 << 20) + 17)
    (tmp_path / "file").write_bytes(data)
    assert sha256_of_file(tmp_path / "file") == hashlib.sha256(data).hexdigest()


def test_json_hashes_tell_values_apart_and_orders_not() -> None:
    assert sha256_of_json({"a": 1, "b": 2}) == sha256_of_json({"b": 2, "a": 1})
    assert sha256_of_json({"a": 1}) != sha256_of_json({"a": 1.5})
    assert sha256_of_json([1, 2]) != sha256_of_json([2, 1])
