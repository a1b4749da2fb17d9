"""Engines are built once, again when what they follow from changed, and never by halves."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from qdit.engines.tensorrt import library, store
from qdit.engines.tensorrt.engine import TensorRtEngine
from qdit.engines.tensorrt.ledger import Ledger
from qdit.engines.tensorrt.library import GpuIdentity, why_no_engine
from qdit.engines.tensorrt.linears import linears_of
from qdit.engines.tensorrt.manifest import EngineManifest
from qdit.engines.tensorrt.settings import BatchProfile, BuildSettings
from qdit.engines.tensorrt.store import (
    checked_engine,
    layers_path,
    ledger_path,
    manifest_path,
    stored_engine,
)
from qdit.engines.tensorrt.surroundings import Told
from qdit.errors import ArtifactError, InputError, StepError
from qdit.progress import Silent

from .conftest import Fake, faked

SETTINGS = BuildSettings(BatchProfile(1, 4, 8))
QUANTIZED = "transformer_blocks.0.attn1.to_q"


class Lines(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)


def build(fake: Fake, path: Path, settings: BuildSettings = SETTINGS, **more: object) -> object:
    return stored_engine(path, settings, fake.features, Silent(), **more)  # type: ignore[arg-type]


def without(made: object, entry: str) -> object:
    """Leave an engine's manifest without an entry, as from before there was one. Returns it."""
    place = manifest_path(made.path)  # type: ignore[attr-defined]
    manifest = json.loads(place.read_text())
    taken = manifest.pop(entry)
    place.write_text(json.dumps(manifest))
    return taken


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_an_engine_its_manifest_ledger_and_timing_cache(fake: Fake, int8_file: Path) -> None:
    lines = Lines()
    made = stored_engine(int8_file, SETTINGS, fake.features, lines)
    assert files(int8_file.parent) == {
        "int8.onnx",
        "int8.engine",
        "int8.engine.json",
        "int8.ledger.json",
        "int8.layers.json",
        "timing.cache",
    }
    manifest = EngineManifest.read(manifest_path(made.path))
    assert manifest == made.manifest
    assert manifest is not None
    assert manifest.tensorrt == fake.module.__version__
    assert manifest.gpu["name"] == "NVIDIA H200"
    assert list(manifest.sources) == ["int8.onnx"]
    assert manifest.settings["batch"] == {"least": 1, "best": 4, "most": 8}
    assert manifest.engine_bytes == made.path.stat().st_size
    written = json.loads(manifest_path(made.path).read_text())
    if fake.features.strongly_typed:
        assert "told" not in written
    else:
        attention = "transformer_blocks.0.attn1"
        half = {f"{attention}/{name}": "fp16" for name in ("MatMul", "Softmax", "MatMul_2")}
        for told in (written["told"]["precisions"], written["told"]["output_types"]):
            assert half.items() <= told.items()
            assert told["transformer_blocks.0.norm1.emb.time_proj/Cos"] == "fp32"
    assert (int8_file.parent / "timing.cache").read_bytes() == b"timed+"
    assert any("1 FP16, 6 INT8; 0 of 6 quantized linears fell back" in s for s in lines.said)
    assert not made.reused


def test_the_builder_is_told_what_the_version_knows(fake: Fake, int8_file: Path) -> None:
    build(fake, int8_file, replace(SETTINGS, optimization_level=2, workspace_bytes=1 << 30))
    config = fake.faults.config
    kinds = fake.module.NetworkDefinitionCreationFlag
    name = "STRONGLY_TYPED" if fake.features.strongly_typed else "EXPLICIT_BATCH"
    assert fake.faults.network_flags == 1 << int(kinds[name])
    precision = {"FP16", "INT8", "PREFER_PRECISION_CONSTRAINTS"}
    assert config.flags_set & precision == (set() if fake.features.strongly_typed else precision)
    assert "TF32" not in config.flags_set
    assert config.pools == {"WORKSPACE": 1 << 30}
    assert config.builder_optimization_level == 2
    assert config.profiling_verbosity.name == "DETAILED"
    (profile,) = config.profiles
    assert profile.shapes["hidden_states"] == ((1, 3, 16, 16), (4, 3, 16, 16), (8, 3, 16, 16))
    assert profile.shapes["timestep"] == ((1,), (4,), (8,))
    if fake.version.startswith("11"):
        assert config.sources is None
    else:
        sources = fake.module.TacticSource
        kept = {name for name in sources.__members__ if config.sources >> int(sources[name]) & 1}
        assert kept == {"EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS"}
    assert hasattr(config, "progress_monitor") == (not fake.version.startswith("8"))
    # 10 warns where it is asked for what it does anyway, and 11 has no such feature
    assert ("PROFILE_SHARING_0806" in config.preview) == fake.version.startswith("8")


def test_progress_is_said_where_there_is_a_monitor(fake: Fake, int8_file: Path) -> None:
    lines = Lines()
    stored_engine(int8_file, SETTINGS, fake.features, lines)
    said = any("TensorRT: Building Engine, 2 steps" in line for line in lines.said)
    assert said == hasattr(fake.module, "IProgressMonitor")


class TestReuse:
    def test_the_same_is_not_built_twice(
        self, newest: Fake, int8_files: dict[bool, Path], tmp_path: Path
    ) -> None:
        path = copied(int8_files, tmp_path)
        first, second = build(newest, path), build(newest, path)
        assert not first.reused and second.reused  # type: ignore[attr-defined]
        assert second.ledger == first.ledger  # type: ignore[attr-defined]

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ("file", "sources"),
            ("settings", "settings"),
            ("gpu", "gpu"),
            ("tensorrt", "tensorrt 11.4.0.106 → 11.5.0"),
            ("plugins", "plugins a → b"),
            ("cut", "cut short"),
            ("flipped", "not the one that was built"),
            ("manifest", "there is none yet"),
            ("ledger", "ledger is missing"),
        ],
    )
    def test_a_change_builds_it_again(
        self,
        change: str,
        said: str,
        newest: Fake,
        int8_files: dict[bool, Path],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        path = copied(int8_files, tmp_path)
        first = stored_engine(path, SETTINGS, newest.features, Silent(), plugins=lambda: "a")
        settings, plugins = SETTINGS, "a"
        if change == "file":
            path.write_bytes(path.read_bytes() + b"\x72\x00")  # an empty doc_string more
        elif change == "settings":
            settings = replace(SETTINGS, optimization_level=3)
        elif change == "gpu":
            other = GpuIdentity("NVIDIA H100", "9.0", "580.1")
            monkeypatch.setattr(store, "gpu_identity", lambda index=0: other)
        elif change == "tensorrt":
            newest.module.__version__ = "11.5.0"
        elif change == "plugins":
            plugins = "b"
        elif change == "cut":
            first.path.write_bytes(first.path.read_bytes()[:-1])
        elif change == "flipped":
            data = bytearray(first.path.read_bytes())
            data[-1] ^= 1
            first.path.write_bytes(data)
        elif change == "manifest":
            manifest_path(first.path).write_text("{}")
        else:
            ledger_path(first.path).unlink()
        lines = Lines()
        second = stored_engine(path, settings, newest.features, lines, plugins=lambda: plugins)
        assert not second.reused
        assert said in second.why
        assert any(said in line for line in lines.said)

    def test_an_8_6_engine_from_before_profiles_were_shared_is_built_again(
        self, int8_files: dict[bool, Path], tmp_path: Path
    ) -> None:
        path = Path(shutil.copy(int8_files[False], tmp_path / "int8.onnx"))
        with faked("8.6.0") as old:
            made = build(old, path)
            assert without(made, "preview_features") == ["PROFILE_SHARING_0806"]
            again = build(old, path)
            assert "preview_features [] → ['PROFILE_SHARING_0806']" in again.why  # type: ignore[attr-defined]
            assert build(old, path).reused  # type: ignore[attr-defined]

    def test_engines_of_later_versions_from_before_are_kept(
        self, newest: Fake, int8_files: dict[bool, Path], tmp_path: Path
    ) -> None:
        path = copied(int8_files, tmp_path)
        made = build(newest, path)
        assert without(made, "preview_features") == []
        assert build(newest, path).reused  # type: ignore[attr-defined]

    def test_an_8_6_engine_from_before_names_were_kept_is_reused(
        self, int8_files: dict[bool, Path], tmp_path: Path
    ) -> None:
        path = Path(shutil.copy(int8_files[False], tmp_path / "int8.onnx"))
        with faked("8.6.0") as old:
            made = build(old, path)
            assert without(made, "told")
            again = build(old, path)
            assert again.reused  # type: ignore[attr-defined]
            assert again.manifest.told == Told()  # type: ignore[attr-defined]

    @pytest.mark.parametrize(
        "told", [[], 5, "told", {"precisions": ["a"]}, {"precisions": {"a": "int8"}}, {"other": {}}]
    )
    def test_a_manifest_that_tells_something_else_is_none(
        self, told: object, int8_files: dict[bool, Path], tmp_path: Path
    ) -> None:
        path = Path(shutil.copy(int8_files[False], tmp_path / "int8.onnx"))
        with faked("8.6.0") as old:
            place = manifest_path(build(old, path).path)  # type: ignore[attr-defined]
            manifest = json.loads(place.read_text())
            place.write_text(json.dumps(manifest | {"told": told}))
            assert EngineManifest.read(place) is None

    def test_the_timing_cache_is_kept_over_builds(
        self, newest: Fake, int8_files: dict[bool, Path], tmp_path: Path
    ) -> None:
        path = copied(int8_files, tmp_path)
        build(newest, path)
        build(newest, path, replace(SETTINGS, optimization_level=1))
        assert newest.faults.started_from == b"timed+"
        assert (path.parent / "timing.cache").read_bytes() == b"timed+"

    def test_compatible_engines_run_elsewhere(
        self,
        newest: Fake,
        int8_files: dict[bool, Path],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        path = copied(int8_files, tmp_path)
        both = replace(SETTINGS, hardware_compatible=True, version_compatible=True)
        build(newest, path, both)
        assert newest.faults.config.hardware_compatibility_level.name == "AMPERE_PLUS"
        assert "VERSION_COMPATIBLE" in newest.faults.config.flags_set
        TensorRtEngine(path.with_suffix(".engine")).close()  # its own runtime is allowed
        newest.module.__version__ = "11.9.0"
        other = GpuIdentity("NVIDIA A100", "8.0", "550.1")
        monkeypatch.setattr(store, "gpu_identity", lambda index=0: other)
        assert build(newest, path, both).reused  # type: ignore[attr-defined]
        newest.module.__version__ = "12.0.0"
        assert not build(newest, path, both).reused  # type: ignore[attr-defined]


class TestFailures:
    def test_a_killed_build_leaves_nothing_that_looks_like_an_engine(
        self, newest: Fake, int8_files: dict[bool, Path], tmp_path: Path
    ) -> None:
        path = copied(int8_files, tmp_path)
        build(newest, path)
        newest.faults.killed_while_building = True
        with pytest.raises(KeyboardInterrupt):
            build(newest, path, replace(SETTINGS, optimization_level=1))
        assert files(path.parent) == {"int8.onnx", "timing.cache"}

    def test_what_the_parser_says_is_in_the_error(
        self, newest: Fake, int8_files: dict[bool, Path], tmp_path: Path
    ) -> None:
        newest.faults.parse_error = "no importer for Det"
        with pytest.raises(StepError, match=r"node 12: no importer for Det.*--tensorrt 11\.4\.0"):
            build(newest, copied(int8_files, tmp_path))

    def test_what_the_builder_says_is_in_the_error(
        self, newest: Fake, int8_files: dict[bool, Path], tmp_path: Path
    ) -> None:
        newest.faults.build_error = "could not find any\n  implementation for node x"
        path = copied(int8_files, tmp_path)
        with pytest.raises(StepError, match="could not find any implementation for node x"):
            build(newest, path)
        assert files(path.parent) == {"int8.onnx"}

    def test_a_linear_that_fell_back_is_no_engine(self, fake: Fake, int8_file: Path) -> None:
        fake.faults.precisions[QUANTIZED] = "FP16"
        with pytest.raises(StepError, match=rf"1 quantized linears .* {QUANTIZED}: INT8 was asked"):
            build(fake, int8_file)
        assert "int8.engine" not in files(int8_file.parent)
        made = build(fake, int8_file, replace(SETTINGS, allow_fallback=True))
        assert [row.linear for row in made.ledger.fallbacks] == [QUANTIZED]  # type: ignore[attr-defined]

    def test_a_linear_that_no_layer_names_is_said(
        self, newest: Fake, int8_files: dict[bool, Path], tmp_path: Path
    ) -> None:
        newest.faults.hidden.add(QUANTIZED)
        made = build(newest, copied(int8_files, tmp_path))
        assert "1 of 6 quantized linears unproved" in made.ledger.summary  # type: ignore[attr-defined]

    def test_what_a_region_hides_is_neither_int8_nor_a_fallback(
        self, fake: Fake, int8_file: Path, int8_files: dict[bool, Path]
    ) -> None:
        region = f"{{ForeignNode[{QUANTIZED}/product...proj_out]}}"
        fake.faults.hidden.update(linears_of(int8_file))
        fake.faults.regions.append(region)
        made = build(fake, int8_file)  # without allow_fallback
        rows = made.ledger.rows  # type: ignore[attr-defined]
        assert {(row.executed, row.layer) for row in rows} == {("hidden", region)}
        said = "7 hidden; 6 of 6 quantized linears unproved, 0 of the other 0 fell back"
        assert made.ledger.summary == said  # type: ignore[attr-defined]
        layers = json.loads(layers_path(made.path).read_text())["Layers"]  # type: ignore[attr-defined]
        assert [layer["Name"] for layer in layers] == [region]

    @pytest.mark.parametrize(("floats", "unproved"), [(7, 0), (8, 6)])
    def test_the_launched_kernels_prove_what_a_region_hides(
        self, fake: Fake, int8_file: Path, floats: int, unproved: int
    ) -> None:
        fake.faults.hidden.update(linears_of(int8_file))
        fake.faults.regions.append("{ForeignNode[a...z]}")
        fake.faults.kernels.update({
            "sm90_xmma_gemm_i8f32_i8i32_f32_tn_n_tilesize64x128x128": 4,  # q, k and v are one
            "sm80_xmma_gemm_f16f16_f16f16_f16_tn_n": floats - 2,
            "mha0": 1,
            "__myl_bb0_1_Cas_com": 9,
        })  # fmt: skip
        made = build(fake, int8_file)
        assert len(made.ledger.unproved) == unproved  # type: ignore[attr-defined]
        (row,) = [r for r in made.ledger.rows if r.linear == QUANTIZED]  # type: ignore[attr-defined]
        assert row.executed == ("hidden" if unproved else "INT8 by kernels")
        assert Ledger.read(ledger_path(made.path)) == made.ledger  # type: ignore[attr-defined]

    def test_a_driver_that_names_no_kernels_costs_no_engine(
        self, fake: Fake, int8_file: Path
    ) -> None:
        fake.faults.hidden.update(linears_of(int8_file))
        fake.faults.regions.append("{ForeignNode[a...z]}")
        fake.faults.driver_error = True
        lines = Lines()
        made = stored_engine(int8_file, SETTINGS, fake.features, lines)
        assert len(made.ledger.unproved) == 6
        assert any("cannot be named: the CUDA driver failed" in line for line in lines.said)

    def test_other_surroundings_are_another_engine(
        self, int8_files: dict[bool, Path], tmp_path: Path
    ) -> None:
        with faked("8.6.0") as old:
            path = tmp_path / "int8.onnx"
            path.write_bytes(int8_files[False].read_bytes())
            build(old, path, replace(SETTINGS, surroundings="free"))
            made = build(old, path, replace(SETTINGS, surroundings="attention"))
            assert "surroundings free" in made.why  # type: ignore[attr-defined]
            assert build(old, path, replace(SETTINGS, surroundings="attention")).reused  # type: ignore[attr-defined]

    def test_the_inspector_s_answer_goes_with_its_engine(
        self, newest: Fake, int8_files: dict[bool, Path], tmp_path: Path
    ) -> None:
        path = copied(int8_files, tmp_path)
        made = build(newest, path)
        assert layers_path(made.path).is_file()  # type: ignore[attr-defined]
        store.forget_engine(made.path)  # type: ignore[attr-defined]
        assert files(tmp_path) == {"int8.onnx", "timing.cache"}

    def test_weight_streaming_is_refused_before_any_work(self, fake: Fake, int8_file: Path) -> None:
        settings = replace(SETTINGS, weight_streaming=True)
        if fake.features.strongly_typed:
            build(fake, int8_file, settings)
            assert "WEIGHT_STREAMING" in fake.faults.config.flags_set
        else:
            with pytest.raises(InputError, match="weight streaming needs TensorRT 10"):
                build(fake, int8_file, settings)
            assert files(int8_file.parent) == {"int8.onnx"}

    def test_an_unfinished_engine_is_not_loaded(
        self, newest: Fake, int8_files: dict[bool, Path], tmp_path: Path
    ) -> None:
        path = copied(int8_files, tmp_path)
        made = build(newest, path)
        assert checked_engine(made.path) == made.manifest  # type: ignore[attr-defined]
        manifest_path(made.path).unlink()  # type: ignore[attr-defined]
        with pytest.raises(ArtifactError, match="is no finished engine"):
            checked_engine(made.path)  # type: ignore[attr-defined]


class TestWithout:
    def test_tensorrt(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(library.importlib.sys.modules, "tensorrt", None)  # type: ignore[attr-defined]
        assert why_no_engine().startswith("TensorRT is not installed here")

    def test_a_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with faked("11.4.0"):
            assert why_no_engine() == ""
            monkeypatch.setattr(library, "_QUERY", ("no-such-tool",))
        with faked("11.4.0"):
            monkeypatch.setattr(library, "gpu_identity", GPU_IDENTITY)
            assert "no NVIDIA GPU answers here" in why_no_engine()


GPU_IDENTITY = library.gpu_identity


def copied(int8_files: dict[bool, Path], folder: Path) -> Path:
    return Path(shutil.copy(int8_files[True], folder / "int8.onnx"))


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(InputError, match=r"0 … 5, got 6"):
        BuildSettings(optimization_level=6)
    with pytest.raises(InputError, match="at least 1 MiB"):
        BuildSettings(workspace_bytes=5)
    with pytest.raises(InputError, match=r"1 ≤ least ≤ best ≤ most, got 4/2/8"):
        BatchProfile(4, 2, 8)


@pytest.mark.parametrize(("text", "numbers"), [("1/8/32", (1, 8, 32)), ("16", (16, 16, 16))])
def test_batch_profiles_are_parsed(text: str, numbers: tuple[int, int, int]) -> None:
    found = BatchProfile.parse(text)
    assert (found.least, found.best, found.most) == numbers


@pytest.mark.parametrize("text", ["", "1/2", "a/b/c", "1/2/3/4"])
def test_other_batch_profiles_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="must look like 1/8/32"):
        BatchProfile.parse(text)


def test_a_ledger_is_read_back(tmp_path: Path, newest: Fake, int8_files: dict[bool, Path]) -> None:
    made = build(newest, copied(int8_files, tmp_path))
    assert Ledger.read(ledger_path(made.path)) == made.ledger  # type: ignore[attr-defined]
    rows = json.loads(ledger_path(made.path).read_text())  # type: ignore[attr-defined]
    assert {row["requested"] for row in rows} == {"INT8", "FP16"}
