"""The commands, end to end, on a small trained-looking model made on the spot."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from qdit import cli
from qdit.calibrate.sources import load_model
from qdit.cli.entry import GATE_FAILED

FAST = ["--calib-samples", "12", "--num-inference-steps", "3", "--fid-samples", "6", "-q"]
SMALL = ["--group-size", "32", *FAST]


@pytest.fixture(scope="session")
def small_model(save_dit: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder: 2 blocks, hidden 64, 32×32×3 pixels, adaLN away from zero."""
    return save_dit(tmp_path_factory.mktemp("small-model"))


@pytest.fixture(scope="session")
def fid_flags() -> list[str]:
    """The demo's feature network and statistics: they fit every 32×32 model."""
    demo = load_model(None)
    return ["--fid-features", str(demo.features), "--reference", str(demo.reference)]


@pytest.fixture(scope="session")
def exported(
    small_model: Path, fid_flags: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """One finished export that several tests look at (none may change it)."""
    output = tmp_path_factory.mktemp("exported")
    assert run("export", str(small_model), *SMALL, *fid_flags, "--output", str(output)) == 0
    return output


def run(command: str, *arguments: str, monkey: pytest.MonkeyPatch | None = None) -> int:
    """Run a command in this process; its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"qdit-{command}", *arguments])
        with pytest.raises(SystemExit) as stopped:
            getattr(cli, f"{command}_command")()
    return int(stopped.value.code or 0)


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


def test_an_export_writes_what_the_readme_says(exported: Path) -> None:
    names = {path.name for path in exported.iterdir() if not path.name.startswith(".")}
    assert names == {
        "qdit.json",
        "weights.safetensors",
        "model.onnx",
        "report.json",
        "report.html",
        "samples.png",
    }


def test_the_report_has_the_keys_that_outside_checks_read(exported: Path) -> None:
    report = report_of(exported)
    parity = report["parity"]
    assert report["plan"]["bits"] == "w4a8"
    assert report["plan"]["effective_weight_bits"] == pytest.approx(4.5)
    assert report["sizes"]["quantized_bytes"] == sum(
        (exported / name).stat().st_size for name in ("qdit.json", "weights.safetensors")
    )
    assert report["sizes"]["full_precision_fp16_bytes"] > report["sizes"]["quantized_bytes"] / 2
    assert parity["passed"] is True
    assert 0 < parity["simulation_vs_full_precision"]["relative_error"] < 1
    assert 0 <= parity["engine_vs_simulation"]["relative_error"] < 0.05
    assert parity["images"]["psnr_db"] > 0
    fid = parity["fid"]
    assert fid["samples"] == 6
    assert fid["difference"] == pytest.approx(fid["quantized"] - fid["full_precision"])
    low, high = fid["difference_ci95"]
    assert low <= high
    assert {"calibration", "quantize", "onnx", "parity", "images"} <= set(report["timings_s"])
    assert report["model"]["name"]


def test_a_second_run_reuses_every_long_step(
    small_model: Path, fid_flags: list[str], exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (exported / "weights.safetensors").stat().st_mtime_ns
    loud = [flag for flag in SMALL if flag != "-q"]
    assert run("export", str(small_model), *loud, *fid_flags, "--output", str(exported)) == 0
    assert "reused finished steps: calibration, quantize, onnx" in capsys.readouterr().err
    assert (exported / "weights.safetensors").stat().st_mtime_ns == before


def test_a_killed_export_goes_on_and_ends_with_the_same_bytes(
    small_model: Path, exported: Path, fid_flags: list[str], tmp_path: Path
) -> None:
    arguments = [str(small_model), *SMALL, *fid_flags, "--output", str(tmp_path)]
    script = (
        "import os, sys\n"
        "from qdit import cli\n"
        "from qdit.calibrate.block_store import BlockStore\n"
        "write = BlockStore.write\n"
        "def die(self, block, result):\n"
        "    write(self, block, result)\n"
        "    os._exit(9)\n"
        "BlockStore.write = die\n"
        "sys.argv[0] = 'qdit-export'\n"
        "cli.export_command()\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, *arguments], check=False)
    assert killed.returncode == 9
    assert not (tmp_path / "qdit.json").exists()
    assert run("export", *arguments) == 0
    for name in ("qdit.json", "weights.safetensors", "model.onnx"):
        assert (tmp_path / name).read_bytes() == (exported / name).read_bytes(), name


def test_dry_run_writes_nothing(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    arguments = [str(small_model), "--group-size", "32", "--dry-run", "--output", str(output)]
    assert run("export", *arguments, "-q") == 0
    text = capsys.readouterr().out
    assert "w4 g32 · a8 g32" in text
    assert "effective weight bits" in text
    assert not output.exists()


def test_dry_run_says_what_would_be_searched(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    arguments = [str(small_model), "--group-size", "32", "--dry-run", "--output", str(output)]
    assert run("export", *arguments, "--budget", "effective-bits=g32") == 0
    printed = " ".join(capsys.readouterr().out.split())
    # 14 linears, all activations at once, and full precision
    assert "search: sensitivity, at most 4.5 bits per weight; 16 measured trajectories" in printed
    assert run("export", *arguments, "--budget", "effective-bits=3") == 2
    assert "at least the cheapest plan's" in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bits", "w5a8"], r"bits must be one of w8a8"),
        (["--group-size", "48"], r"weight group must be one of 32"),
        (
            ["--bits", "w8a8", "--scale-format", "integer"],
            r"integer scales need weights of 2, 3, 4",
        ),
        (["--group-size", "128"], r"must divide the 64 input channels .* got 128; use one of 32"),
        (["--opset", "20"], r"opset"),
        (["--device", "cuda:99"], r"device 'cuda:99' is not there"),
        (["--device", "tpu"], r"device must be auto, cpu, cuda"),
        (["--group-size", "32", "--plan", "/nowhere.json"], r"no plan file at /nowhere.json"),
        (["--config", "/nowhere.toml"], r"cannot read the config file"),
        (["--no-such-flag"], r"No such option: --no-such-flag"),
        (["--fid-features", "/nowhere.onnx"], r"no such file: /nowhere.onnx"),
        (
            ["--group-size", "32", "--require-engine", "--target", "tensorrt"],
            r"--require-engine: no TensorRT engine can be built",
        ),
        (
            ["--group-size", "32", "--target", "tensorrt-int8", "--tensorrt-version", "10"],
            r"tensorrt-int8 cannot run .*use --group-size channel.*--on-unsupported degrade",
        ),
    ],
    ids=lambda value: value[-2] if isinstance(value, list) and len(value) > 1 else "",
)
def test_bad_input_is_one_line_with_exit_code_2_and_nothing_written(
    small_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    output = tmp_path / "out"
    assert run("export", str(small_model), *arguments, "--output", str(output)) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert re.search(message, errors[-1]), errors
    assert errors[-1].startswith("error: ")
    assert not output.exists()


def test_an_unknown_model_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("export", str(tmp_path / "nowhere"), "--output", str(tmp_path / "out")) == 2
    assert "nowhere" in capsys.readouterr().err


def test_the_config_file_is_overridden_by_flags(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "qdit.toml"
    config.write_text('bits = "w8a8"\ngroup-size = 32\n')
    base = [str(small_model), "--config", str(config), "--dry-run", "-q"]
    assert run("export", *base) == 0
    assert "w8 g32 · a8 g32" in capsys.readouterr().out
    assert run("export", *base, "--bits", "w4a8") == 0
    assert "w4 g32 · a8 g32" in capsys.readouterr().out


def test_a_plan_file_changes_single_layers(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "plan.json"
    layer = "transformer_blocks.0.attn1.to_q"
    plan.write_text(json.dumps({"version": 1, "layers": {layer: {"weight_bits": 8}}}))
    arguments = [str(small_model), "--group-size", "32", "--plan", str(plan), "--dry-run", "-q"]
    assert run("export", *arguments) == 0
    assert "w8 g32 · a8 g32" in capsys.readouterr().out


def test_validate_proves_again_from_other_noise(exported: Path, fid_flags: list[str]) -> None:
    first = report_of(exported)["parity"]["images"]["psnr_db"]
    flags = ["--num-inference-steps", "3", "--fid-samples", "6", "--seed", "5", "-q"]
    assert run("validate", str(exported), *flags, *fid_flags) == 0
    again = report_of(exported)
    assert again["parity"]["images"]["psnr_db"] != first
    assert again["sampling"]["seed"] == 5


def test_the_gate_catches_a_tampered_file(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("qdit.json", "weights.safetensors"):
        (tmp_path / name).write_bytes((exported / name).read_bytes())
    model = onnx.load(exported / "model.onnx")
    scale = next(
        tensor
        for tensor in model.graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT
        and len(tensor.dims) == 2
        and "scale" in tensor.name
    )
    values = onnx.numpy_helper.to_array(scale) * np.float32(1.01)
    scale.CopyFrom(onnx.numpy_helper.from_array(values, scale.name))
    onnx.save(model, tmp_path / "model.onnx")
    flags = ["--num-inference-steps", "3", "--fid-samples", "0", "-q"]
    assert run("validate", str(tmp_path), *flags) == GATE_FAILED
    report = report_of(tmp_path)
    assert report["parity"]["passed"] is False
    failed = [c["name"] for c in report["parity"]["checks"] if c["outcome"] == "failed"]
    assert "linears_same_input" in failed


def test_validate_refuses_another_model(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("validate", str(exported), "--model", "demo", "-q") == 2
    assert "is not the model" in capsys.readouterr().err


@pytest.mark.parametrize("artifact", [".", "model.onnx"], ids=["folder", "onnx"])
def test_inspect_lists_every_linear(
    exported: Path, capsys: pytest.CaptureFixture[str], artifact: str
) -> None:
    assert run("inspect", str(exported / artifact), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["linears"]) == 2 * 7
    assert found["effective_weight_bits"] == pytest.approx(4.5)
    assert {row["weight_group"] for row in found["linears"]} == {32}
    assert {row["scale_format"] for row in found["linears"]} == {"float"}
    assert run("inspect", str(exported / artifact)) == 0
    assert "transformer_blocks.1.ff.net.2" in capsys.readouterr().out


def test_inspect_says_what_each_target_can_run(
    exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("inspect", str(exported), "--json") == 0
    targets = {row["target"]: row for row in json.loads(capsys.readouterr().out)["targets"]}
    assert targets["qdq"]["runs"]
    assert not targets["tensorrt-int8"]["runs"]
    assert targets["tensorrt-int8"]["reason"]


def test_integer_scales_from_calibration_to_the_report(
    small_model: Path,
    fid_flags: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # tables of a wide terminal
    flags = ["--scale-format", "integer", "--activation-group-size", "token"]
    output = tmp_path / "out"
    assert run("export", str(small_model), *SMALL, *flags, *fid_flags, "--output", str(output)) == 0
    report = report_of(output)
    assert report["parity"]["passed"] is True
    # 4 + 4/32 + 16/K: K is 64 for six linears of each block and 256 for the seventh
    sizes = [layer["in_features"] * layer["out_features"] for layer in report["plan"]["layers"]]
    bits = [4.125 + 16 / layer["in_features"] for layer in report["plan"]["layers"]]
    expected = sum(n * b for n, b in zip(sizes, bits, strict=True)) / sum(sizes)
    assert report["plan"]["effective_weight_bits"] == pytest.approx(expected)
    summary = report["integer_scales"]
    assert summary["linears"] == 2 * 7
    assert summary["effective_weight_bits"] == pytest.approx(expected)
    assert summary["float_scales_effective_weight_bits"] == pytest.approx(4.5)
    # choosing among the integers near a scale gains what rounding it to them costs
    assert 0 < summary["output_error"] < 1.05 * summary["float_scales_output_error"]
    assert "Integer scales" in (output / "report.html").read_text("utf-8")
    for artifact in (".", "model.onnx"):
        assert run("inspect", str(output / artifact), "--json") == 0
        found = json.loads(capsys.readouterr().out)
        assert {row["scale_format"] for row in found["linears"]} == {"integer"}
        assert found["effective_weight_bits"] == pytest.approx(expected, rel=1e-3)
    assert run("inspect", str(output)) == 0
    assert "w4 g32 int" in capsys.readouterr().out
    assert run("validate", str(output), "--fid-samples", "0", "-q") == 0
    assert report_of(output)["integer_scales"] == summary


@pytest.mark.parametrize("name", ["none", "broken.onnx"], ids=["missing", "damaged"])
def test_inspect_refuses_what_it_cannot_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"\x00\xff not onnx")
    assert run("inspect", str(tmp_path / name)) == 2
    assert name in capsys.readouterr().err


@pytest.mark.parametrize("command", ["bench", "export", "inspect", "serve", "tune", "validate"])
def test_help_shows_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, "--help") == 0
    assert f"qdit-{command} " in capsys.readouterr().out


def test_sixteen_bits_equal_full_precision(small_model: Path, tmp_path: Path) -> None:
    flags = ["--bits", "16/16", "--num-inference-steps", "3", "--fid-samples", "2", "-q"]
    assert run("export", str(small_model), *flags, "--output", str(tmp_path)) == 0
    parity = report_of(tmp_path)["parity"]
    # only the float16 rounding of stored parameters is left
    assert parity["simulation_vs_full_precision"]["relative_error"] < 2e-3
    assert parity["images"]["psnr_db"] > 50
