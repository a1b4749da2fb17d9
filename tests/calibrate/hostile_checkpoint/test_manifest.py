"""A hostile qdit.json: text, version, keys and values."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qdit.calibrate import artifact_errors as errors
from qdit.errors import ArtifactError

Json = dict[str, Any]


@pytest.mark.usefixtures("nothing_mapped")
class TestManifestText:
    @pytest.mark.parametrize(
        ("text", "match"),
        [
            (b"", "is not readable JSON"),
            (b"{", "is not readable JSON"),
            (b'{"version": 1} trailing', "is not readable JSON"),
            (b"\xff\xfe{}", "is not readable JSON"),
            (b'{"version": NaN}', "contains NaN, which is not JSON"),
            (b'{"version": -Infinity}', "contains -Infinity, which is not JSON"),
            (b'{"version": ' + b"9" * 5000 + b"}", "is not readable JSON"),
            (b"[" * 100_000, "is not readable JSON"),
            (b'{"a":' * 5000 + b"1" + b"}" * 5000, "is not readable JSON"),
            (b"[]", "must be a JSON object, got list"),
            (b"null", "must be a JSON object, got NoneType"),
            (b'"version"', "must be a JSON object, got str"),
        ],
        ids=[
            "empty",
            "syntax",
            "trailing",
            "not UTF-8",
            "NaN",
            "Infinity",
            "endless number",
            "deep list",
            "deep object",
            "list",
            "null",
            "string",
        ],
    )
    def test_it_is_no_json_object(self, victim: Any, text: bytes, match: str) -> None:
        victim.manifest_path.write_bytes(text)
        victim.refuse(errors.InvalidJsonError, match)

    def test_it_is_deeper_than_the_second_parser_goes(self, victim: Any) -> None:
        manifest = victim.manifest
        manifest["metrics"] = {"deep": "HERE"}
        text = json.dumps(manifest).replace('"HERE"', "[" * 400 + "]" * 400)
        victim.manifest_path.write_text(text, "utf-8")
        victim.refuse(errors.InvalidJsonError, "is not readable JSON")

    def test_a_key_stands_twice(self, victim: Any) -> None:
        text = victim.manifest_path.read_text("utf-8")
        victim.manifest_path.write_text('{"version": 1,' + text.lstrip()[1:], "utf-8")
        victim.refuse(errors.DuplicateKeyError, "names the key 'version' twice")

    def test_a_nested_key_stands_twice(self, victim: Any) -> None:
        text = victim.manifest_path.read_text("utf-8")
        text = text.replace('"patch_size": 2', '"patch_size": 2, "patch_size": 2')
        victim.manifest_path.write_text(text, "utf-8")
        victim.refuse(errors.DuplicateKeyError, "names the key 'patch_size' twice")

    def test_it_is_enormous(self, victim: Any) -> None:
        with victim.manifest_path.open("ab") as handle:
            handle.truncate(1 << 40)  # a sparse file: reading it would be the end
        victim.refuse(errors.FileTooLargeError, "may have 16777216 bytes, it has 1099511627776")

    @pytest.mark.parametrize(
        ("version", "error", "match"),
        [
            (0, errors.UnsupportedVersionError, r"version 0, written by .*export the model again"),
            (3, errors.UnsupportedVersionError, r"version 3, .* versions 1 and 2; upgrade qdit"),
            (10**30, errors.UnsupportedVersionError, "upgrade qdit"),
            (-1, errors.InvalidValueError, "version must be a whole number, got -1"),
            ("1", errors.InvalidValueError, "version must be a whole number, got '1'"),
            (1.0, errors.InvalidValueError, r"version must be a whole number, got 1\.0"),
            (True, errors.InvalidValueError, "version must be a whole number, got True"),
            (None, errors.InvalidValueError, "version must be a whole number, got None"),
        ],
        ids=lambda value: repr(value) if not isinstance(value, type) else "",
    )
    def test_it_has_another_version(
        self, victim: Any, version: object, error: type[ArtifactError], match: str
    ) -> None:
        # the version is judged before anything else: another version may have other keys
        victim.put_manifest({"version": version, "something": "else"})
        victim.refuse(error, match)

    def test_it_has_no_version(self, victim: Any) -> None:
        victim.put_manifest({})
        victim.refuse(errors.MissingKeyError, "lacks the key 'version'; is it a qdit checkpoint")


def parent_of(manifest: Json, path: str) -> tuple[Any, str]:
    *parents, last = path.split(".")
    value: Any = manifest
    for part in parents:
        value = value[int(part)] if isinstance(value, list) else value[part]
    return value, last


KEYS = [
    "format",
    "model",
    "plan",
    "linears",
    "ties",
    "weights",
    "provenance",
    "metrics",
    "model.name",
    "model.family",
    "model.config",
    "model.scheduler_config",
    "model.class_names",
    "model.source",
    "model.source.kind",
    "model.source.location",
    "model.source.sha256",
    "model.source.seed",
    "weights.file",
    "weights.bytes",
    "weights.sha256",
    "linears.0.name",
    "linears.0.in_features",
    "linears.0.out_features",
    "linears.0.has_bias",
    "provenance.qdit",
    "provenance.libraries",
    "provenance.settings",
]
STRICT_OBJECTS = ["", "model.", "model.source.", "weights.", "linears.3.", "provenance."]
BAD_VALUES = [
    ("format", "onnx"),
    ("model", []),
    ("model.name", 5),
    ("model.name", None),
    ("model.config", "x"),
    ("model.class_names", "cat"),
    ("model.class_names", [1]),
    ("model.source.seed", 1.5),
    ("model.source.seed", "0"),
    ("model.source.sha256", "abc"),
    ("plan", []),
    ("linears", {}),
    ("linears.0", None),
    ("linears.0.in_features", 0),
    ("linears.0.in_features", "64"),
    ("linears.0.in_features", 64.0),
    ("linears.0.out_features", -1),
    ("linears.0.has_bias", 1),
    ("ties", [["a", "b"]]),
    ("ties", {"a": 1}),
    ("weights.file", 1),
    ("weights.bytes", 7),
    ("weights.bytes", "8"),
    ("weights.bytes", True),
    ("weights.sha256", "A" * 64),
    ("weights.sha256", "0" * 63),
    ("provenance.libraries", {"torch": 2}),
    ("metrics", 0.5),
]


@pytest.mark.usefixtures("nothing_mapped")
class TestManifestKeys:
    @pytest.mark.parametrize("path", KEYS)
    def test_a_key_is_missing(self, victim: Any, path: str) -> None:
        manifest = victim.manifest
        parent, last = parent_of(manifest, path)
        del parent[last]
        victim.put_manifest(manifest)
        victim.refuse(errors.MissingKeyError, rf"lacks the key '{path}'")

    @pytest.mark.parametrize("prefix", STRICT_OBJECTS)
    def test_a_key_is_unknown(self, victim: Any, prefix: str) -> None:
        manifest = victim.manifest
        parent, last = parent_of(manifest, f"{prefix}surprise")
        parent[last] = 1
        victim.put_manifest(manifest)
        victim.refuse(errors.UnknownKeyError, rf"unknown key '{prefix}surprise'")

    @pytest.mark.parametrize(
        ("path", "value"), BAD_VALUES, ids=[f"{path}={value!r:.10}" for path, value in BAD_VALUES]
    )
    def test_a_value_is_of_another_kind(self, victim: Any, path: str, value: object) -> None:
        manifest = victim.manifest
        parent, last = parent_of(manifest, path)
        parent[int(last) if isinstance(parent, list) else last] = value
        victim.put_manifest(manifest)
        victim.refuse(errors.InvalidValueError, rf"qdit\.json: {path}.*, got ")

    @pytest.mark.parametrize("key", ["format", "version"])
    def test_a_long_value_is_shown_short(self, victim: Any, key: str) -> None:
        victim.put_manifest(victim.manifest | {key: "x" * 100_000})
        with pytest.raises(errors.InvalidValueError, match="xxx") as caught:
            victim.read()
        assert len(str(caught.value)) <= 600

    def test_control_characters_do_not_reach_the_terminal(self, victim: Any) -> None:
        victim.put_manifest(victim.manifest | {"a\n\x1b[2Jb": 1})
        victim.refuse(errors.UnknownKeyError, r"unknown key 'a\\+n\\+x1b\[2Jb'")
