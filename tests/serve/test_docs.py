"""docs/serve.md against what it describes."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from qdit.cli.serve import serve
from qdit.engines.at_hand import engine_names
from qdit.serve import errors
from qdit.serve.errors import ClientGoneError, ServeError
from qdit.serve.web import app, security
from qdit.serve.web.schema import ImageRequest


@pytest.fixture(scope="module")
def text(repository: Path) -> str:
    return (repository / "docs" / "serve.md").read_text("utf-8")


def test_its_flags_exist(text: str) -> None:
    own = {"--" + name.replace("_", "-") for name in inspect.signature(serve).parameters}
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))
    assert flags
    others = {"--help", "--target", "--rm", "--model-repository"}  # of other programs
    assert flags <= own | others


def test_every_field_is_in_the_table(text: str) -> None:
    fields = set(ImageRequest.model_fields)
    assert {name for name in fields if f"`{name}`" not in text} == set()


def test_every_engine_is_in_the_table(text: str) -> None:
    assert {name for name in engine_names() if f"`{name}`" not in text} == set()


def test_every_engine_is_in_the_help() -> None:
    (option,) = (
        option for option in inspect.signature(serve).parameters.values() if option.name == "engine"
    )
    assert {name for name in engine_names() if name not in str(option.annotation)} == set()


def test_every_failure_is_in_the_table(text: str) -> None:
    kinds = [
        kind
        for module in (errors, security)
        for _, kind in inspect.getmembers(module, inspect.isclass)
        if issubclass(kind, ServeError) and kind not in (ServeError, ClientGoneError)
    ]
    kinds.remove(security.BodyError)  # its codes come by instance
    assert [kind for kind in kinds if f"`{kind.code}`" not in text] == []
    assert [kind for kind in kinds if f"| {kind.status} |" not in text] == []
    for code in ("slow_body", "body_too_large", "bad_content_type"):
        assert f"`{code}`" in text


def test_every_health_path_is_there(text: str) -> None:
    source = inspect.getsource(app)
    paths = set(re.findall(r'app\.get\("(/(?:health|metrics)[^"]*)"', source))
    assert len(paths) == 4
    assert {path for path in paths if f"`{path}`" not in text} == set()
