"""The printed command lines: Polygraphy's own parser makes of its line what the builder is told."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qdit.engines.tensorrt.build import build_engine
from qdit.engines.tensorrt.commands import polygraphy_command, trtexec_command
from qdit.engines.tensorrt.settings import BatchProfile, BuildSettings
from qdit.engines.tensorrt.store import engine_path
from qdit.engines.tensorrt.target import input_shapes
from qdit.progress import Silent

from .conftest import Fake

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


def convert_tool() -> Any:
    from polygraphy.tools.registry import TOOL_REGISTRY

    (tool,) = [tool for tool in TOOL_REGISTRY if type(tool).__name__ == "Convert"]
    return tool


@pytest.mark.parametrize("everything", [False, True], ids=["plain", "everything"])
def test_polygraphy_makes_the_builder_s_configuration(
    fake: Fake, int8_file: Path, everything: bool
) -> None:
    settings = settings_of(fake, everything)
    build_engine(int8_file, settings, fake.features, Silent())
    wanted, network_flags = what_matters(fake.faults.config), fake.faults.network_flags

    line = polygraphy_command(
        int8_file,
        engine_path(int8_file),
        input_shapes(int8_file),
        settings,
        fake.features,
        quantized=True,
    )
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


@pytest.mark.parametrize("everything", [False, True], ids=["plain", "everything"])
def test_trtexec_is_told_the_same(fake: Fake, int8_file: Path, everything: bool) -> None:
    """Against the flags that `trtexec --help` of each version lists: no program to ask here."""
    settings = settings_of(fake, everything)
    line = trtexec_command(
        int8_file,
        engine_path(int8_file),
        input_shapes(int8_file),
        settings,
        fake.features,
        quantized=True,
    )
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
    assert ("--stronglyTyped" in given) == fake.version.startswith("10")
    assert ("--tacticSources" in given) == (not fake.version.startswith("11"))
    if everything:
        assert given["--memPoolSize"] == "workspace:1024"
        assert given["--builderOptimizationLevel"] == "2"
        assert "--refit" in given
        for flag in ("--allowWeightStreaming", "--versionCompatible"):
            assert (flag in given) == (not old)
