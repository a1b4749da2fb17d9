"""The fake against the members that were recorded from the real bindings."""

from __future__ import annotations

import inspect

import pytest

from .fake_tensorrt import VERSIONS, Device, Faults, make_fake, recorded

# What fakes need beyond TensorRT's own members; the code under test uses none of it.
OWN = {
    "IBuilderConfig": {"flags_set", "pools", "profiles", "sources", "cache", "preview"},
    "IExecutionContext": {"shapes", "addresses"},
    "ICudaEngine": {"profile", "model", "tensors", "run"},
    "INetworkDefinition": {"model", "layers"},
    "ILayer": {"told", "inputs", "outputs", "output_types"},
    "IOptimizationProfile": {"shapes"},
    "ITimingCache": {"data"},
    "EngineInspector": {"model"},
    "OnnxParser": {"network"},
    "Runtime": set(),
    "Builder": set(),
    "ILogger": {"Severity"},
    "ITensor": set(),
    "IProgressMonitor": set(),
}


@pytest.mark.parametrize("version", VERSIONS)
def test_it_has_only_members_that_the_version_has(version: str) -> None:
    module, api = make_fake(version, Device(), Faults), recorded(version)
    for name, own in OWN.items():
        if not hasattr(module, name):
            assert name not in api["classes"]
            continue
        members = {
            member
            for member, value in vars(getattr(module, name)).items()
            if not member.startswith("_") and not inspect.isclass(value)
        }
        extra = members - own - set(api["classes"][name])
        # 10.0 brought the monitor: a class that is not there cannot be subclassed
        assert not extra, f"{name}: {extra}"


@pytest.mark.parametrize("version", VERSIONS)
def test_parameters_are_called_as_the_real_ones(version: str) -> None:
    module, api = make_fake(version, Device(), Faults), recorded(version)
    checked = 0
    for name in OWN:
        if not hasattr(module, name):
            continue
        for member, value in vars(getattr(module, name)).items():
            overloads = api["classes"][name].get(member)
            if member.startswith("_") or not inspect.isfunction(value) or not overloads:
                continue
            if overloads == "property":
                pytest.fail(f"{name}.{member} is a property in {version}")
            given = list(inspect.signature(value).parameters)
            assert any(fits(given, real) for real in overloads), (
                f"{name}.{member}: {given} is none of {overloads}"
            )
            checked += 1
    assert checked >= 20


def fits(given: list[str], real: list[str]) -> bool:
    """Whether `real` may be called with `given`: 'name=' there marks what has a default."""
    names = [parameter.rstrip("=") for parameter in real]
    rest = real[len(given) :]
    return names[: len(given)] == given and all(parameter.endswith("=") for parameter in rest)


@pytest.mark.parametrize("version", VERSIONS)
def test_properties_are_properties(version: str) -> None:
    module, api = make_fake(version, Device(), Faults), recorded(version)
    for name in OWN:
        for member, value in vars(getattr(module, name, object)).items():
            if isinstance(value, property) and not member.startswith("_"):
                assert api["classes"][name][member] == "property", f"{name}.{member}"


def test_what_came_and_went_between_the_versions() -> None:
    """The differences that `build.py` and `versions.py` count on."""
    old, ten, new = (recorded(v) for v in ("8.6.0", "10.0.1", "11.4.0"))
    assert "IProgressMonitor" not in old["classes"]
    assert "IProgressMonitor" in ten["classes"]
    assert "INT8" in ten["enums"]["BuilderFlag"]
    assert "INT8" not in new["enums"]["BuilderFlag"]
    assert "EXPLICIT_BATCH" not in new["enums"]["NetworkDefinitionCreationFlag"]
    assert "STRONGLY_TYPED" not in old["enums"]["NetworkDefinitionCreationFlag"]
    assert "WEIGHT_STREAMING" not in old["enums"]["BuilderFlag"]
    assert "PROFILE_SHARING_0806" in old["enums"]["PreviewFeature"]
    assert "PROFILE_SHARING_0806" not in new["enums"]["PreviewFeature"]
    assert "CUBLAS" not in new["enums"]["TacticSource"]
    assert "INT4" not in old["enums"]["DataType"]
