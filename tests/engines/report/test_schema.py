"""report.json: the keys that others read, and what a reader refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qdit.calibrate.checkpoint import QuantizedCheckpoint
from qdit.calibrate.model import DiffusionModel
from qdit.calibrate.sampling import SamplingSettings
from qdit.engines.gate import judge
from qdit.engines.parity_images import image_parity
from qdit.engines.parity_measure import Comparison
from qdit.engines.report.build import Proof, build_report
from qdit.engines.report.schema import Report, read_report
from qdit.errors import ArtifactError, InputError

# The keys that issue 2 promises to outside readers.
PROMISED: dict[str, type | tuple[type, ...]] = {
    "model.name": str,
    "plan.bits": str,
    "plan.effective_weight_bits": float,
    "sizes.full_precision_fp16_bytes": int,
    "sizes.quantized_bytes": int,
    "parity.passed": bool,
    "parity.simulation_vs_full_precision.relative_error": float,
    "parity.engine_vs_simulation.relative_error": float,
    "parity.images.psnr_db": float,
    "parity.fid.full_precision": float,
    "parity.fid.quantized": float,
    "parity.fid.difference": float,
    "parity.fid.difference_ci95": list,
    "parity.fid.samples": int,
    "timings_s": dict,
}


@pytest.fixture
def written(report: Report, tmp_path: Path) -> Path:
    report.write(tmp_path / "report.json")
    return tmp_path / "report.json"


@pytest.mark.parametrize("key", PROMISED)
def test_promised_keys_are_there_with_their_types(written: Path, key: str) -> None:
    value: Any = json.loads(written.read_text())
    for part in key.split("."):
        value = value[part]
    assert isinstance(value, PROMISED[key])


def test_values_are_the_figures(written: Path, checkpoint: QuantizedCheckpoint) -> None:
    value = json.loads(written.read_text())
    # w4 with one float16 scale for 32 weights: 4 + 16/32
    assert value["plan"]["effective_weight_bits"] == 4.5
    assert value["sizes"]["quantized_bytes"] == checkpoint.byte_size
    parts = value["sizes"]["parts"]
    assert sum(parts.values()) == checkpoint.byte_size
    # integers take half a byte a weight, scales two bytes for 32
    weights = value["sizes"]["full_precision_fp16_linears_bytes"] / 2
    assert parts["integers_bytes"] == weights / 2
    assert parts["scales_and_zero_points_bytes"] == weights / 16
    assert value["parity"]["fid"]["difference_ci95"] == [-0.2, 0.4]
    assert value["parity"]["fid"]["max_increase"] == 1.0
    assert value["timings_s"] == {"quantize": 61.5, "onnx": 2.25}
    assert value["versions"] == {"torch": "2.13"} and "versions" not in value["machine"]
    assert value["created"] == "2026-01-02T03:04:05+00:00"
    layer = value["plan"]["layers"][1]
    assert (layer["name"], layer["scheme"]) == (
        "transformer_blocks.0.attn1.to_q",
        "w4 g32 · a8 g32",
    )
    assert layer["bytes"] == 64 * 64 * 4.5 / 8
    assert value["sizes"]["files"] == [
        {
            "name": "model.onnx",
            "bytes": 3,
            "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
        }
    ]


def test_a_report_reads_back_equal_and_writes_equal_bytes(written: Path, report: Report) -> None:
    read = read_report(written)
    assert read == report
    before = written.read_bytes()
    read.write(written)
    assert written.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"surprise": 1}, "surprise: Extra inputs are not permitted"),
        ({"schema_version": 1}, "schema_version: Input should be 2"),
        ({"parity": {}}, "parity.passed: Field required"),
        ({"timings_s": {"onnx": "long"}}, "timings_s.onnx"),
    ],
    ids=["unknown", "version", "missing", "type"],
)
def test_malformed_reports_are_refused_by_the_first_key(
    written: Path, change: dict[str, Any], message: str
) -> None:
    written.write_text(json.dumps(json.loads(written.read_text()) | change))
    with pytest.raises(ArtifactError, match=message):
        read_report(written)


def test_other_files_and_missing_ones_are_refused(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(ArtifactError, match="not a report of schema version 2: the file"):
        read_report(tmp_path / "report.json")
    with pytest.raises(InputError, match=r"no report at .*; run qdit-export or qdit-validate"):
        read_report(tmp_path / "nowhere.json")


def rebuilt(model: DiffusionModel, checkpoint: QuantizedCheckpoint, proof: Proof) -> Report:
    return build_report(
        model,
        checkpoint,
        proof,
        SamplingSettings(4, 1.5, 7),
        command="",
        timings={},
        machine={},
        output=Path(),
    )


def test_without_fid_the_key_is_null_and_the_reason_is_there(
    model: DiffusionModel, checkpoint: QuantizedCheckpoint, proof: Proof
) -> None:
    gate = judge(proof.parity, proof.images, None, proof.limits, no_fid="no reference was given")
    made = rebuilt(model, checkpoint, replace(proof, fid=None, gate=gate))
    assert made.parity.fid is None
    assert made.parity.fid_not_run == "FID was not measured: no reference was given"
    assert made.parity.passed and not made.parity.complete


def test_figures_that_are_not_finite_become_null_and_fail(
    model: DiffusionModel, checkpoint: QuantizedCheckpoint, proof: Proof, tmp_path: Path
) -> None:
    broken = replace(proof.parity, simulation=Comparison(float("inf"), 1.0, 1, None))
    images = image_parity([float("nan"), 0.1])
    gate = judge(broken, images, proof.fid, proof.limits)
    made = rebuilt(model, checkpoint, replace(proof, parity=broken, images=images, gate=gate))
    made.write(tmp_path / "report.json")
    value = json.loads((tmp_path / "report.json").read_text())
    assert value["parity"]["simulation_vs_full_precision"]["relative_error"] is None
    assert value["parity"]["images"]["psnr_db"] is None
    assert value["parity"]["images"]["not_finite"] == 1
    assert value["parity"]["passed"] is False


def test_identical_images_are_null_with_a_flag(
    model: DiffusionModel, checkpoint: QuantizedCheckpoint, proof: Proof
) -> None:
    made = rebuilt(model, checkpoint, replace(proof, images=image_parity([0.0, 0.0])))
    assert made.parity.images is not None
    assert made.parity.images.psnr_db is None and made.parity.images.identical
