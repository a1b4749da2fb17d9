"""The printed command lines: Polygraphy's own parser makes of its line what the builder is told.

`trtexec`'s lists of layers are read as its source of 8.6 does: entries end at commas, names at the
last colon.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qdit.engines.tensorrt.build import build_engine
from qdit.engines.tensorrt.commands import Command, polygraphy_command, trtexec_command
from qdit.engines.tensorrt.settings import BatchProfile, BuildSettings
from qdit.engines.tensorrt.store import engine_path
from qdit.engines.tensorrt.surroundings import Told
from qdit.engines.tensorrt.target import input_shapes
from qdit.progress import Silent

from .conftest import Fake, faked

PLAIN = BuildSettings(BatchProfile(1, 4, 8))
EVERYTHING = BuildSettings(
    BatchProfile(2, 3, 5),
    optimization_level=2,
    workspace_bytes=1 << 30,
    hardware_compatible=True,
    version_compatible=True,
    refit=True,
)

# Polygraphy sets a parser flag with these that 8.6.0 does not have yet
COMPATIBLE = ("hardware_compatible", "version_compatible")


def settings_of(fake: Fake, everything: bool) -> BuildSettings:
    if not everything:
        return PLAIN
    modern = fake.features.strongly_typed
    return replace(EVERYTHING, weight_streaming=modern, **dict.fromkeys(COMPATIBLE, modern))


def what_matters(config: Any) -> dict[str, Any]:
    return {
        "flags": config.flags_set,
        "pools": config.pools,
        "profiles": [profile.shapes for profile in config.profiles],
        "sources": config.sources,
        "level": config.builder_optimization_level,
        "compatible": config.hardware_compatibility_level,
        "verbosity": config.profiling_verbosity,
        "preview": config.preview,
    }


NAMES = {"fp16": "HALF", "fp32": "FLOAT"}


def told_precisions(network: Any) -> dict[str, str]:
    return {layer.name: layer.told.name for layer in network if layer.precision_is_set}


def told_output_types(network: Any) -> dict[str, str]:
    return {
        layer.name: kind.name
        for layer in network
        for kind in layer.output_types.values()  # each of these layers has one output
    }


def listed(flag: str) -> dict[str, str]:
    """What `trtexec` makes of a list of layers."""
    entries = [entry.rpartition(":") for entry in flag.split(",") if entry]
    return {name: NAMES[kind] for name, _, kind in entries}


def convert_tool() -> Any:
    from polygraphy.tools.registry import TOOL_REGISTRY

    (tool,) = [tool for tool in TOOL_REGISTRY if type(tool).__name__ == "Convert"]
    return tool


@pytest.mark.parametrize("everything", [False, True], ids=["plain", "everything"])
def test_polygraphy_makes_the_builder_s_configuration(
    fake: Fake, int8_file: Path, everything: bool
) -> None:
    settings = settings_of(fake, everything)
    told = build_engine(int8_file, settings, fake.features, Silent()).told
    wanted, network_flags = what_matters(fake.faults.config), fake.faults.network_flags
    precisions = told_precisions(fake.faults.network)
    assert bool(precisions) != fake.features.strongly_typed

    line = polygraphy_command(
        int8_file,
        engine_path(int8_file),
        input_shapes(int8_file),
        settings,
        fake.features,
        quantized=True,
        told=told,
    ).line
    tool, parser = convert_tool(), argparse.ArgumentParser()
    tool.setup_parser(parser.add_subparsers())
    program, *arguments = shlex.split(line)
    assert program == "polygraphy"
    tool.parse(parser.parse_args(arguments))
    from polygraphy.tools.args import TrtConfigArgs, TrtLoadNetworkArgs

    loader = tool.arg_groups[TrtLoadNetworkArgs]
    builder, network, *_ = loader.load_network()
    config = tool.arg_groups[TrtConfigArgs].create_config(builder, network=network)
    assert what_matters(config) == wanted
    assert fake.faults.network_flags == network_flags
    assert told_precisions(network) == precisions
    assert not told_output_types(network)  # it has no flag for them


@pytest.mark.parametrize("everything", [False, True], ids=["plain", "everything"])
def test_trtexec_is_told_the_same(fake: Fake, int8_file: Path, everything: bool) -> None:
    """Against the flags that `trtexec --help` of each version lists: no program to ask here."""
    settings = settings_of(fake, everything)
    told = build_engine(int8_file, settings, fake.features, Silent()).told
    made = trtexec_command(
        int8_file,
        engine_path(int8_file),
        input_shapes(int8_file),
        settings,
        fake.features,
        quantized=True,
        told=told,
    )
    line = made.line
    assert made.note == ""
    program, *arguments = shlex.split(line)
    assert program == "trtexec"
    given = dict(argument.partition("=")[::2] for argument in arguments)
    batch = settings.batch
    for key, count in (("min", batch.least), ("opt", batch.best), ("max", batch.most)):
        shapes = f"hidden_states:{count}x3x16x16,timestep:{count},class_labels:{count}"
        assert given[f"--{key}Shapes"] == shapes
    assert given["--onnx"] == str(int8_file)
    assert given["--profilingVerbosity"] == "detailed"
    old = not fake.features.strongly_typed
    assert ("--fp16" in given, "--int8" in given) == (old, old)
    assert given.get("--preview") == ("+profileSharing0806" if old else None)
    network = fake.faults.network
    assert listed(given.get("--layerPrecisions", "")) == told_precisions(network)
    assert listed(given.get("--layerOutputTypes", "")) == told_output_types(network)
    for flag in ("--layerPrecisions", "--layerOutputTypes"):
        assert (flag in given) == old
    assert ("--stronglyTyped" in given) == fake.version.startswith("10")
    assert ("--tacticSources" in given) == (not fake.version.startswith("11"))
    if everything:
        assert given["--memPoolSize"] == "workspace:1024"
        assert given["--builderOptimizationLevel"] == "2"
        assert "--refit" in given
        for flag in ("--allowWeightStreaming", "--versionCompatible"):
            assert (flag in given) == (not old)


class TestNotes:
    """On 8.6, where a line's engine may be another than qdit's."""

    SETTINGS = BuildSettings(BatchProfile(1, 4, 8))
    UNKNOWN = "on TensorRT 8.6 attention and the timestep stay TensorRT's own choice in this line"
    LEFT_OUT = "1 layers stay TensorRT's own choice in this line, which cannot hold their names"
    TOLD = Told({"b": "fp16", "a/c:d": "fp32", "e": "fp16"}, {"b": "fp16", "a/c:d": "fp32"})

    @pytest.fixture
    def old(self) -> Iterator[Fake]:
        with faked("8.6.0") as made:
            yield made

    def commands(
        self,
        fake: Fake,
        told: Told,
        settings: BuildSettings = SETTINGS,
        *,
        quantized: bool = True,
    ) -> dict[str, Command]:
        given = (Path("a.onnx"), Path("a.engine"), (), settings, fake.features)
        more = {"quantized": quantized, "told": told}
        return {
            "trtexec": trtexec_command(*given, **more),  # type: ignore[arg-type]
            "polygraphy": polygraphy_command(*given, **more),  # type: ignore[arg-type]
        }

    def test_an_engine_that_was_built_has_its_names_in_both_lines(self, old: Fake) -> None:
        made = self.commands(old, self.TOLD)
        assert " --layerPrecisions=a/c:d:fp32,b:fp16,e:fp16 " in made["trtexec"].line
        assert " --layerOutputTypes=a/c:d:fp32,b:fp16 " in made["trtexec"].line
        names = "a/c:d:float32 b:float16 e:float16"
        assert f" --layer-precisions {names} --preview" in made["polygraphy"].line
        assert made["trtexec"].note == ""
        assert made["polygraphy"].note.startswith("the output types of 2 layers")

    def test_without_an_engine_the_note_says_what_is_missing(self, old: Fake) -> None:
        for command in self.commands(old, Told()).values():
            assert command.note.startswith(self.UNKNOWN)
            assert "ayer" not in command.line
        for command in self.commands(old, Told(), quantized=False).values():
            assert "the timestep stays TensorRT's own choice" in command.note
            assert "attention" not in command.note

    def test_left_free_nothing_is_missing(self, old: Fake) -> None:
        free = replace(self.SETTINGS, surroundings="free")
        assert {command.note for command in self.commands(old, Told(), free).values()} == {""}
        plain = self.commands(old, Told(), free, quantized=False)  # told its timestep even so
        assert all("the timestep stays" in command.note for command in plain.values())

    def test_strongly_typed_networks_need_no_note(self, newest: Fake) -> None:
        for command in self.commands(newest, Told()).values():
            assert command.note == ""
            assert "ayer" not in command.line

    @pytest.mark.parametrize("name", ["a,b", "it's", "*"])
    def test_names_that_trtexec_cannot_read_are_left_out(self, old: Fake, name: str) -> None:
        made = self.commands(old, Told({name: "fp16", "z": "fp16"}, {name: "fp16"}))
        words = shlex.split(made["trtexec"].line)
        assert "--layerPrecisions=z:fp16" in words
        assert "--layerOutputTypes" not in made["trtexec"].line
        assert made["trtexec"].note == f"{self.LEFT_OUT}: {name!r}"
        assert f"{name}:float16" in shlex.split(made["polygraphy"].line)

    @pytest.mark.parametrize("name", ["-a", ""])
    def test_names_that_polygraphy_cannot_read_are_left_out(self, old: Fake, name: str) -> None:
        made = self.commands(old, Told({name: "fp16", "z": "fp16"}))
        words = shlex.split(made["polygraphy"].line)
        place = words.index("--layer-precisions")
        assert words[place + 1 : place + 3] == ["z:float16", "--preview-features"]
        assert made["polygraphy"].note == f"{self.LEFT_OUT}: {name!r}"
        assert f"--layerPrecisions={name}:fp16,z:fp16" in shlex.split(made["trtexec"].line)

    def test_many_names_left_out_are_counted(self, old: Fake) -> None:
        note = self.commands(old, Told({f"{i},": "fp16" for i in range(5)}))["trtexec"].note
        assert note.startswith("5 layers stay")
        assert note.endswith("'0,', '1,', '2,', …")

    def test_names_with_spaces_and_brackets_are_quoted(self, old: Fake) -> None:
        name = "(Unnamed Layer* 7) [Softmax]"
        made = self.commands(old, Told({name: "fp16"}))
        assert f"--layerPrecisions={name}:fp16" in shlex.split(made["trtexec"].line)
        assert f"{name}:float16" in shlex.split(made["polygraphy"].line)
