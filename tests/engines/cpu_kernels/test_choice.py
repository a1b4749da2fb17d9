"""Whose products a session takes, and why: case by case, on stand-ins for machine and compiler."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import onnx
import pytest

from qdit.engines.cpu_kernels import choice, machine
from qdit.engines.cpu_kernels.build import build_library
from qdit.engines.cpu_kernels.choice import NOTHING_TO_TAKE, choose_products
from qdit.engines.cpu_kernels.machine import library_units, machine_obstacle
from qdit.engines.model_source import ModelSource
from qdit.engines.session_settings import CPU, CUDA
from qdit.errors import InputError, StepError

from .conftest import model_of, random_linear


@pytest.fixture
def source(tmp_path: Path) -> ModelSource:
    """A file with one product that could be ours."""
    linear = random_linear(64, 4, 32, 4, zero_points=True, bias=True)
    path = tmp_path / "model.onnx"
    onnx.save(model_of(linear, "MatMulNBits"), path)
    return ModelSource(path)


@pytest.fixture
def able(monkeypatch: pytest.MonkeyPatch, plain_library: Path) -> Path:
    """A machine that has everything; its products are the portable ones."""
    monkeypatch.setattr(choice, "machine_obstacle", lambda: "")
    monkeypatch.setattr(choice, "build_library", partial(build_library, "plain"))
    monkeypatch.setattr(choice, "library_units", lambda library: "AMX")
    return plain_library


@pytest.mark.parametrize("wanted", ["auto", "qdit"])
def test_ours_where_they_can_be_had(
    wanted: choice.CpuKernels, source: ModelSource, able: Path
) -> None:
    found = choose_products(wanted, CPU, source)
    assert found.is_ours
    assert found.is_notable
    assert (found.library, found.nodes, found.units) == (able, 1, "AMX")
    assert str(found) == "qdit's own products by AMX (1 node)"


def _other_level(source: ModelSource, patch: pytest.MonkeyPatch) -> None:
    model = source.load()
    for entry in model.graph.node[-1].attribute:
        if entry.name == "accuracy_level":
            entry.i = 1
    onnx.save(model, source.path)
    source.drop()


def _no_such_operator(source: ModelSource, patch: pytest.MonkeyPatch) -> None:
    source.load().graph.node[-1].op_type = "MatMulMBits"
    onnx.save(source.load(), source.path)
    patch.setattr(ModelSource, "load", lambda self: pytest.fail("the file was read"))


def _no_unit(source: ModelSource, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(choice, "machine_obstacle", lambda: "this processor has no AVX512-VNNI")


def _no_use(source: ModelSource, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(choice, "library_units", lambda library: "")


def _raise(error: Exception) -> None:
    raise error


def _no_compiler(source: ModelSource, patch: pytest.MonkeyPatch) -> None:
    error = InputError("no C compiler; install one, or qdit[cpu], which brings one")
    patch.setattr(choice, "build_library", lambda: _raise(error))


def _broken_compiler(source: ModelSource, patch: pytest.MonkeyPatch) -> None:
    error = StepError("the C compiler cc failed with status 1:\nerror 29")
    patch.setattr(choice, "build_library", lambda: _raise(error))


def _damaged(source: ModelSource, patch: pytest.MonkeyPatch) -> None:
    source.path.write_bytes(source.path.read_bytes()[:50])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param(_other_level, NOTHING_TO_TAKE, id="no such node"),
        pytest.param(_no_such_operator, NOTHING_TO_TAKE, id="no such operator: file not read"),
        pytest.param(_no_unit, "this processor has no AVX512-VNNI", id="another processor"),
        pytest.param(_no_use, "the operating system gives no use of AVX512", id="no permission"),
        pytest.param(_no_compiler, r"no C compiler; install one, or qdit\[cpu\]", id="no compiler"),
        pytest.param(_broken_compiler, "failed with status 1:\nerror 29", id="compiler fails"),
        pytest.param(_damaged, r"model\.onnx is not a readable ONNX file", id="damaged file"),
    ],
)
@pytest.mark.usefixtures("able")
def test_onnx_runtimes_with_the_reason_where_not(
    change: object, reason: str, source: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(source, monkeypatch)  # type: ignore[operator]
    found = choose_products("auto", CPU, source)
    assert not found.is_ours
    assert found.is_notable == (reason is not NOTHING_TO_TAKE)
    with pytest.raises(InputError, match=f"were asked for and cannot be used: .*{reason}.*; leave"):
        choose_products("qdit", CPU, source)
    assert str(found).startswith("ONNX Runtime's own products: ")
    assert "\n" not in str(found)


@pytest.mark.usefixtures("able")
def test_a_gpus_provider_has_none(source: ModelSource) -> None:
    found = choose_products("auto", CUDA, source)
    assert CUDA in found.reason
    assert not found.is_notable
    with pytest.raises(InputError, match=f"the file runs by {CUDA}, and ours are a CPU's"):
        choose_products("qdit", CUDA, source)


@pytest.mark.usefixtures("able")
def test_onnx_runtimes_where_they_are_asked_for(source: ModelSource) -> None:
    found = choose_products("onnxruntime", CPU, source)
    assert not found.is_ours
    assert found.reason == "they were asked for"


def test_another_word_is_refused(source: ModelSource) -> None:
    with pytest.raises(InputError, match="CPU kernels are one of auto, qdit, onnxruntime, got 'q"):
        choose_products("quick", CPU, source)  # type: ignore[arg-type]


class TestMachine:
    @pytest.mark.parametrize(
        ("system", "processor", "reason"),
        [
            ("darwin", "arm64", "they are written for x86-64 Linux, this is arm64"),
            ("win32", "AMD64", "they are written for x86-64 Linux, this is AMD64"),
            ("linux", "aarch64", "they are written for x86-64 Linux, this is aarch64"),
        ],
    )
    def test_other_systems(
        self, system: str, processor: str, reason: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(machine.sys, "platform", system)
        monkeypatch.setattr(machine.platform, "machine", lambda: processor)
        assert machine_obstacle().startswith(reason)

    @pytest.mark.parametrize(
        ("flags", "reason"),
        [({"avx2", "avx512f"}, "this processor has no AVX512-VNNI"), ({"avx512_vnni"}, "")],
        ids=["without", "with"],
    )
    def test_processors(
        self, flags: set[str], reason: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(machine.sys, "platform", "linux")
        monkeypatch.setattr(machine.platform, "machine", lambda: "x86_64")
        monkeypatch.setattr(machine, "processor_flags", lambda: frozenset(flags))
        assert machine_obstacle() == reason

    def test_portable_products_are_nothing_to_swap_for(self, plain_library: Path) -> None:
        assert library_units(plain_library) == ""

    def test_a_damaged_library(self, tmp_path: Path) -> None:
        damaged = tmp_path / "damaged.so"
        damaged.write_bytes(b"no library")
        with pytest.raises(StepError, match=r"damaged\.so is no library of products: .*; delete"):
            library_units(damaged)
