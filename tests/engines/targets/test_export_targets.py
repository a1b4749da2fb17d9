"""`qdit-export --target`, end to end: files, engines, the record and the report."""

from __future__ import annotations

import html
import io
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from qdit.calibrate.checkpoint import QuantizedCheckpoint
from qdit.calibrate.sources import load_model
from qdit.engines.export_job import prepare, quantize_and_export, run_export
from qdit.engines.inspection import as_json, inspect_artifact, print_tables
from qdit.engines.options import ExportOptions, ValidateOptions, build_options
from qdit.engines.report.schema import Report, read_report
from qdit.engines.report.targets_schema import TARGETS_NAME, TargetEntry, read_targets
from qdit.engines.tensorrt.manifest import EngineManifest
from qdit.engines.validate_job import run_validate
from qdit.errors import ArtifactError, InputError, StepError
from qdit.export.tensorrt.rules import check_file
from qdit.progress import Silent

from ..tensorrt.conftest import Fake, faked

INT8: dict[str, Any] = {"bits": "w8a8", "group_size": "channel", "target": "tensorrt-int8"}


def options_of(model: Path, output: Path, **flags: Any) -> ExportOptions:
    values = {
        "model": str(model),
        "output": output,
        "weights": "nearest",
        "calib_samples": 8,
        "num_inference_steps": 2,
        "fid_samples": 0,
        "device": "cpu",
        **flags,
    }
    made: ExportOptions = build_options(ExportOptions, values)
    return made


def export(model: Path, output: Path, **flags: Any) -> Report:
    """A whole export, its proof included."""
    run_export(options_of(model, output, **flags), "qdit-export", Silent())
    return read_report(output / "report.json")


def targets(model: Path, output: Path, **flags: Any) -> tuple[TargetEntry, ...]:
    """An export up to its proof."""
    return quantize_and_export(options_of(model, output, **flags), Silent()).targets


class TestWithoutTensorRt:
    @pytest.fixture(scope="class")
    def exported(self, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        output = tmp_path_factory.mktemp("without")
        export(model_folder, output, **INT8, tensorrt_version="8.6", batch_profile="1/4/8")
        return output

    def test_the_lowered_file_is_written_and_checked(self, exported: Path) -> None:
        path = exported / "tensorrt" / "tensorrt-int8.onnx"
        assert check_file(path, "8.6") == []
        (entry,) = read_report(exported / "report.json").targets
        assert read_targets(exported / TARGETS_NAME) == (entry,)
        assert entry.file == "tensorrt/tensorrt-int8.onnx"
        assert entry.bytes == path.stat().st_size
        assert entry.checked_for == "TensorRT 8.6.0"
        assert entry.requested == {"INT8": 6, "FP16": 1}
        assert "one calibrated activation scale" in entry.changes
        assert entry.file_vs_simulation is not None
        assert 0 < entry.file_vs_simulation < 0.2
        assert entry.compared_inputs == 4

    def test_the_report_says_that_there_is_no_engine_and_why(self, exported: Path) -> None:
        (entry,) = read_report(exported / "report.json").targets
        assert entry.engine is None
        assert entry.no_engine is not None
        assert entry.no_engine.startswith("TensorRT is not installed here")
        page = (exported / "report.html").read_text()
        assert "none: TensorRT is not installed here" in page
        assert "trtexec --onnx=" in page

    def test_the_file_is_among_those_hashed(self, exported: Path) -> None:
        report = read_report(exported / "report.json")
        assert "tensorrt/tensorrt-int8.onnx" in {file.name for file in report.sizes.files}

    def test_the_command_lines_have_the_profile_and_the_flags(self, exported: Path) -> None:
        (entry,) = read_report(exported / "report.json").targets
        lines = {command.tool: shlex.split(command.line) for command in entry.commands}
        path = exported / "tensorrt" / "tensorrt-int8.onnx"
        trtexec = lines["trtexec"]
        assert f"--onnx={path}" in trtexec
        assert {"--fp16", "--int8", "--noTF32"} <= set(trtexec)
        wanted = "hidden_states:4x3x16x16,timestep:4,class_labels:4"
        assert f"--optShapes={wanted}" in trtexec
        assert not any("layer" in word.lower() for word in trtexec)
        polygraphy = lines["polygraphy"]
        assert polygraphy[:3] == ["polygraphy", "convert", str(path)]
        assert "hidden_states:[8,3,16,16]" in polygraphy

    def test_beside_the_lines_stands_what_they_cannot_know(self, exported: Path) -> None:
        (entry,) = read_report(exported / "report.json").targets
        said = "on TensorRT 8.6 attention and the timestep stay TensorRT's own choice in this line"
        assert [command.note.startswith(said) for command in entry.commands] == [True, True]
        page = html.unescape((exported / "report.html").read_text())
        assert f"trtexec: {said}" in page
        assert f"polygraphy: {said}" in page

    def test_records_of_before_have_no_notes(self, exported: Path, tmp_path: Path) -> None:
        record = json.loads((exported / TARGETS_NAME).read_text())
        for command in record[0]["commands"]:
            del command["note"]
        (tmp_path / TARGETS_NAME).write_text(json.dumps(record))
        (entry,) = read_targets(tmp_path / TARGETS_NAME)
        assert [command.note for command in entry.commands] == ["", ""]

    def test_a_second_run_writes_nothing_anew(self, model_folder: Path, exported: Path) -> None:
        path = exported / "tensorrt" / "tensorrt-int8.onnx"
        before = path.stat().st_mtime_ns
        flags = INT8 | {"tensorrt_version": "8.6", "batch_profile": "1/4/8"}
        targets(model_folder, exported, **flags)
        assert path.stat().st_mtime_ns == before
        path.write_bytes(path.read_bytes()[:-1])
        targets(model_folder, exported, **flags)
        assert check_file(path, "8.6") == []

    def test_a_validation_keeps_the_record(self, exported: Path) -> None:
        before = read_report(exported / "report.json").targets
        options = build_options(
            ValidateOptions, {"fid_samples": 0, "num_inference_steps": 2, "device": "cpu"}
        )
        run_validate(exported, options, None, "qdit-validate", Silent())
        assert read_report(exported / "report.json").targets == before


def test_every_target_of_a_list_is_written(model_folder: Path, tmp_path: Path) -> None:
    flags = {"bits": "w4a16", "group_size": 64}
    made = targets(model_folder, tmp_path, **flags, target="tensorrt-int4,tensorrt-plugin")
    assert [entry.name for entry in made] == ["tensorrt-int4", "tensorrt-plugin"]
    int4, plugin = made
    assert int4.requested == {"INT4": 7}
    assert plugin.requested == {"PLUGIN": 7}
    assert plugin.commands == ()  # other tools know no plugins of qdit
    for entry in made:
        assert entry.file_vs_simulation is not None
        assert entry.file_vs_simulation < 5e-3  # exact in meaning: float16's rounding alone
    assert targets(model_folder, tmp_path, **flags) == ()
    assert not (tmp_path / TARGETS_NAME).exists()


def test_degrading_is_said_in_the_report(model_folder: Path, tmp_path: Path) -> None:
    report = export(
        model_folder,
        tmp_path,
        bits="w4a8",
        group_size=64,
        target="tensorrt-int4",
        on_unsupported="degrade",
    )
    assert report.plan.bits == "custom"
    assert {layer.activation_bits for layer in report.plan.layers} == {16}
    assert any("degraded" in warning for warning in report.warnings)
    assert QuantizedCheckpoint.read(tmp_path).plan.bits == "custom"


def test_smoothing_changes_the_weights_and_not_the_model(
    model_folder: Path, tmp_path: Path
) -> None:
    """Its function stays full precision's to within what 8 bits cost."""
    full = load_model(str(model_folder))
    generator = torch.Generator().manual_seed(0)
    inputs = full.family.example_inputs(full.denoiser, 2, generator)
    digests = []
    with torch.inference_mode():
        expected = full.family.forward(full.denoiser, *inputs)
        for smooth in (None, 0.5):
            folder = tmp_path / str(smooth)
            targets(model_folder, folder, **INT8, smooth=smooth)
            checkpoint = QuantizedCheckpoint.read(folder)
            assert checkpoint.provenance.settings.get("smooth") == smooth
            made = full.family.forward(checkpoint.build_denoiser(), *inputs)
            assert float((made - expected).norm() / expected.norm()) < 0.05
            digests.append(checkpoint.manifest.weights.sha256)
    assert digests[0] != digests[1]


class TestRefusals:
    def test_nothing_is_written_where_an_engine_is_required(
        self, model_folder: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(InputError, match="--require-engine") as refused:
            targets(model_folder, tmp_path / "new", **INT8, require_engine=True)
        assert refused.value.exit_code == 2
        assert not (tmp_path / "new").exists()

    def test_nothing_is_written_for_a_plan_that_a_target_cannot_run(
        self, model_folder: Path, tmp_path: Path
    ) -> None:
        flags = INT8 | {"group_size": 64}
        with pytest.raises(InputError, match="target tensorrt-int8 cannot run"):
            targets(model_folder, tmp_path / "new", **flags)
        assert not (tmp_path / "new").exists()

    def test_smoothing_and_a_search(self, model_folder: Path, tmp_path: Path) -> None:
        values = {"model": str(model_folder), "smooth": 0.5, "target": "tensorrt"}
        options = build_options(ExportOptions, values | {"search": "sensitivity"})
        with pytest.raises(InputError, match=r"--smooth 0\.5 and --search sensitivity"):
            prepare(options, Silent())

    def test_an_engine_without_a_manifest_is_not_inspected(self, tmp_path: Path) -> None:
        (tmp_path / "x.engine").write_bytes(b"half of one")
        with pytest.raises(ArtifactError, match="is no finished engine"):
            inspect_artifact(tmp_path / "x.engine")

    def test_a_damaged_record(self, tmp_path: Path) -> None:
        (tmp_path / TARGETS_NAME).write_text('[{"name": 1}]')
        with pytest.raises(ArtifactError, match="is not the record of an export's targets"):
            read_targets(tmp_path / TARGETS_NAME)


class TestWithTensorRt:
    """On the stand-in that has the real bindings' members."""

    def test_an_engine_is_built_recorded_and_reused(
        self, newest: Fake, model_folder: Path, tmp_path: Path
    ) -> None:
        report = export(model_folder, tmp_path, **INT8, require_engine=True)
        (entry,) = report.targets
        assert entry.no_engine is None
        engine = entry.engine
        assert engine is not None
        assert engine.file == "tensorrt/tensorrt-int8.engine"
        assert engine.gpu == "NVIDIA H200"
        assert engine.batch == (1, 8, 32)
        assert (engine.fallbacks, engine.reused) == (0, False)
        assert sum(row.executed == "INT8" for row in engine.ledger) == 6
        assert engine.file in {file.name for file in report.sizes.files}
        manifest = EngineManifest.read(tmp_path / f"{engine.file}.json")
        assert manifest is not None
        assert manifest.tensorrt == engine.tensorrt == newest.module.__version__
        page = (tmp_path / "report.html").read_text()
        assert "precision of every linear (1 FP16, 6 INT8; 0 of 6" in page
        for artifact in (tmp_path, tmp_path / engine.file):
            inspected = inspect_artifact(artifact)
            (row,) = inspected.engines
            assert row.engine == "tensorrt-int8.engine"
            assert sum(entry.executed == "INT8" for entry in row.ledger.rows) == 6
            found = json.loads(as_json(inspected))["engines"][0]["ledger"]
            assert found == [entry.model_dump() for entry in engine.ledger]
            console = Console(record=True, width=160, file=io.StringIO())
            print_tables(inspected, console)
            assert "0 of 6 quantized linears fell back" in console.export_text()
        again = targets(model_folder, tmp_path, **INT8)[0].engine
        assert again is not None
        assert again.reused
        flags = {"engine": "tensorrt", "num_inference_steps": 2, "fid_samples": 2, "device": "cpu"}
        options = build_options(ValidateOptions, flags)
        assert run_validate(tmp_path, options, None, "qdit-validate", Silent())
        parity = read_report(tmp_path / "report.json").parity
        assert parity.engine == "tensorrt"
        assert parity.engine_vs_file is not None
        assert parity.engine_vs_file.relative_error == 0.0  # the stand-in runs the file itself
        assert parity.images is not None
        assert parity.images.engine == "tensorrt"
        assert "TensorRT vs its file" in (tmp_path / "report.html").read_text()

    def test_on_8_6_the_lines_name_the_layers_that_were_told(
        self, model_folder: Path, tmp_path: Path
    ) -> None:
        with faked("8.6.0"):
            first, again = (targets(model_folder, tmp_path, **INT8)[0] for _ in range(2))
        assert first.engine is not None and again.engine is not None
        assert (first.engine.reused, again.engine.reused) == (False, True)
        assert again.commands == first.commands
        trtexec, polygraphy = first.commands
        softmax = "transformer_blocks.0.attn1/Softmax"
        cos = "transformer_blocks.0.norm1.emb.time_proj/Cos"
        flags = dict(word.partition("=")[::2] for word in shlex.split(trtexec.line))
        for flag in ("--layerPrecisions", "--layerOutputTypes"):
            assert {f"{softmax}:fp16", f"{cos}:fp32"} <= set(flags[flag].split(","))
        assert trtexec.note == ""
        words = shlex.split(polygraphy.line)
        assert {f"{softmax}:float16", f"{cos}:float32"} <= set(words)
        assert "Polygraphy has no flag" in polygraphy.note

    def test_a_fallback_ends_the_export_and_leaves_no_engine(
        self, newest: Fake, model_folder: Path, tmp_path: Path
    ) -> None:
        newest.faults.precisions["transformer_blocks.0.ff.net.2"] = "FP16"
        with pytest.raises(StepError, match=r"ff\.net\.2: INT8 was asked for, FP16 runs"):
            targets(model_folder, tmp_path, **INT8)
        assert not list((tmp_path / "tensorrt").glob("*.engine*"))
        report = export(model_folder, tmp_path, **INT8, allow_fallback=True)
        engine = report.targets[0].engine
        assert engine is not None
        assert engine.fallbacks == 1
        page = (tmp_path / "report.html").read_text()
        assert "1 quantized linears run in floating point (--allow-fallback)" in page

    def test_what_nothing_proves_is_said_in_report_and_inspection(
        self, newest: Fake, model_folder: Path, tmp_path: Path
    ) -> None:
        newest.faults.hidden.update(f"transformer_blocks.0.ff.net.{n}" for n in ("0.proj", "2"))
        newest.faults.regions.append("{ForeignNode[a...z]}")
        engine = export(model_folder, tmp_path, **INT8).targets[0].engine
        assert engine is not None
        assert (engine.fallbacks, engine.unproved) == (0, 2)
        page = (tmp_path / "report.html").read_text()
        assert "what 2 quantized linears run in is not proved" in page
        console = Console(record=True, width=160, file=io.StringIO())
        print_tables(inspect_artifact(tmp_path / engine.file), console)
        text = console.export_text()
        assert "2 of 6 quantized linears unproved, 0 of the other 4 fell back" in text
        assert "{ForeignNode[a...z]}" in text

    def test_a_file_for_another_version_gets_no_engine(
        self, model_folder: Path, tmp_path: Path
    ) -> None:
        with faked("11.4.0"):
            (entry,) = targets(model_folder, tmp_path, **INT8, tensorrt_version="8.6")
        assert entry.engine is None
        assert "files are for TensorRT 8.6.0, and 11.4.0 is installed" in str(entry.no_engine)
