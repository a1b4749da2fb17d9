"""Tiny CPU runs of the demo recipe: what it writes, resuming after a kill, and bad input."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

RECIPES = Path(__file__).parents[2] / "recipes"
TINY = ["--batch-size", "4", "--extractor-epochs", "1", "--device", "cpu"]


def train(images: Path, output: Path, *options: str) -> Result:
    import train_demo

    arguments = ["--images", str(images), "--output", str(output), *TINY, *options]
    return CliRunner().invoke(train_demo.app, arguments)


@pytest.fixture(scope="module")
def finished(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run of two steps with the real model."""
    output = tmp_path_factory.mktemp("finished") / "demo"
    result = train(images, output, "--steps", "2")
    assert result.exit_code == 0, result.output
    return output


@pytest.fixture
def small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let runs train a DiT of two narrow blocks."""
    from demo_recipe import dit, run

    config = {**dit.CONFIG, "num_layers": 2, "num_attention_heads": 1, "patch_size": 8}
    monkeypatch.setattr(run, "build_model", lambda seed: dit.build_model(seed, config))


def test_writes_every_file_and_no_temporary_one(finished: Path) -> None:
    files = {str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file()}
    assert files == {
        ".training/extractor.json",
        ".training/run.json",
        "README.md",
        "features.onnx",
        "reference.npz",
        "scheduler/scheduler_config.json",
        "training.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
    }


def test_model_loads_in_diffusers_with_the_embedder_in_every_block(finished: Path) -> None:
    from demo_recipe.dit import CONFIG
    from diffusers import DDIMScheduler, DiTTransformer2DModel

    model = DiTTransformer2DModel.from_pretrained(finished / "transformer")
    assert {key: model.config[key] for key in CONFIG} == CONFIG
    saved = load_file(finished / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.float16}
    assert saved.keys() == model.state_dict().keys()
    tables = [key for key in saved if key.endswith("embedding_table.weight")]
    assert len(tables) == 8
    assert all(torch.equal(saved[key], saved[tables[0]]) for key in tables)
    scheduler = DDIMScheduler.from_pretrained(finished / "scheduler")
    assert scheduler.config.prediction_type == "epsilon"


def test_onnx_features_equal_the_torch_features() -> None:
    from demo_recipe.extractor import Extractor, extract
    from demo_recipe.extractor_onnx import OPSET, build_model

    torch.manual_seed(0)
    network = Extractor()
    for module in network.modules():  # statistics that folding has to get right
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
            module.weight.data.uniform_(0.5, 2.0)
            module.bias.data.normal_()
    network.eval()
    pixels = torch.randint(0, 256, (7, 3, 32, 32), dtype=torch.uint8)
    model = build_model(network)
    assert model.opset_import[0].version == OPSET
    session = onnxruntime.InferenceSession(model.SerializeToString())
    found = session.run(["features", "logits"], {"images": pixels.float().numpy() / 127.5 - 1})
    # both sum in float32 in another order, over 8 layers: a few hundred roundings of 6e-8
    for actual, expected in zip(found, extract(network, pixels), strict=True):
        np.testing.assert_allclose(actual, expected, atol=2e-5 * np.abs(expected).max())


def test_onnx_model_has_the_promised_interface(finished: Path) -> None:
    graph = onnx.load(finished / "features.onnx").graph
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in [*graph.input, *graph.output]
    }
    assert shapes == {"images": ["N", 3, 32, 32], "features": ["N", 256], "logits": ["N", 10]}


def test_reference_is_the_float64_mean_and_covariance_of_the_features(
    finished: Path, images: Path
) -> None:
    from demo_recipe.features import FeatureModel
    from demo_recipe.images import load_folder

    features = FeatureModel(finished / "features.onnx")(load_folder(images / "train").images)
    wide = features.astype(np.float64)
    reference = np.load(finished / "reference.npz")
    assert reference["mu"].dtype == reference["sigma"].dtype == np.float64
    # the features behind it are torch's, which differ from onnxruntime's by float32 rounding
    scale = np.abs(wide).max()
    np.testing.assert_allclose(reference["mu"], wide.mean(axis=0), atol=2e-5 * scale)
    covariance = np.cov(wide, rowvar=False)
    np.testing.assert_allclose(reference["sigma"], covariance, atol=2e-5 * scale**2)


def test_statistics_are_numpys_exactly() -> None:
    from demo_recipe.fid import statistics_of

    features = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)
    found = statistics_of(features)
    np.testing.assert_array_equal(found.mu, features.astype(np.float64).mean(axis=0))
    np.testing.assert_array_equal(found.sigma, np.cov(features.astype(np.float64), rowvar=False))


def test_frechet_distance_of_known_gaussians() -> None:
    from demo_recipe.fid import Statistics, frechet_distance

    first = Statistics(np.zeros(3), np.diag([1.0, 4.0, 9.0]))
    second = Statistics(np.array([1.0, 2.0, 2.0]), np.diag([4.0, 4.0, 1.0]))
    # |mu|² = 9; for diagonals the rest is the squared difference of deviations: 1 + 0 + 4
    assert frechet_distance(first, second) == pytest.approx(14.0, abs=1e-12)
    assert frechet_distance(first, first) == pytest.approx(0.0, abs=1e-12)


class KilledError(BaseException):
    """Ends a run where a kill would."""


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_killed_run_resumes_to_the_same_weights(
    images: Path,
    tmp_path: Path,
    small_model: None,
    monkeypatch: pytest.MonkeyPatch,
    optimizer: str,
) -> None:
    from demo_recipe.trainer import Trainer

    # 13 steps of batch 20 cross epochs (5 steps each); a log row falls to the last step only
    options = ["--steps", "13", "--batch-size", "20", "--optimizer", optimizer]
    whole = train(images, tmp_path / "whole", *options, "--checkpoint-minutes", "9")
    assert whole.exit_code == 0, whole.output

    save = Trainer.save

    def save_then_die(trainer: Any) -> None:
        save(trainer)
        if trainer.counters.step == 7:
            raise KilledError

    often = [*options, "--checkpoint-minutes", "0"]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save", save_then_die)
        with pytest.raises(KilledError):
            train(images, tmp_path / "killed", *often)
    assert not (tmp_path / "killed" / "transformer").exists()
    resumed = train(images, tmp_path / "killed", *often)
    assert resumed.exit_code == 0, resumed.output

    weights = Path("transformer", "diffusion_pytorch_model.safetensors")
    expected, found = (load_file(tmp_path / name / weights) for name in ("whole", "killed"))
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    first, second = (
        json.loads((tmp_path / name / "training.json").read_text()) for name in ("whole", "killed")
    )
    assert second["steps"] == 13
    assert [row[:2] for row in second["history"]] == [row[:2] for row in first["history"]]


def test_the_loss_falls(images: Path, tmp_path: Path) -> None:
    from demo_recipe.dit import CONFIG, build_model
    from demo_recipe.images import load_folder
    from demo_recipe.trainer import Trainer, TrainSettings

    config = {**CONFIG, "num_layers": 1, "num_attention_heads": 1, "patch_size": 4}
    settings = TrainSettings(steps=60, minutes=None, batch_size=50, learning_rate=2e-3)
    data = load_folder(images / "train")
    trainer = Trainer(build_model(0, config), data, settings, tmp_path / "checkpoint.safetensors")
    losses = [row[1] for row in trainer.run(log_every=20).history]
    assert losses[0] > losses[1] > losses[2]


def test_time_ends_a_run_with_a_learning_rate_of_zero() -> None:
    from demo_recipe.checkpoint import Counters
    from demo_recipe.trainer import TrainSettings

    settings = TrainSettings(minutes=2.0, warmup=0.1)
    assert settings.rate(settings.progress(5, 6.0)) == pytest.approx(settings.learning_rate / 2)
    assert settings.rate(settings.progress(5, 12.0)) == pytest.approx(settings.learning_rate)
    assert settings.rate(settings.progress(5, 120.0)) == pytest.approx(0.0, abs=1e-15)
    assert not settings.ended(Counters(step=10**6, seconds=119.9))
    assert settings.ended(Counters(step=1, seconds=120.0))


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    from demo_recipe.optimizers import orthogonalise

    matrices = torch.randn(3, 16, 64, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrices))
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_timesteps_are_stratified() -> None:
    from demo_recipe.diffusion import stratified_timesteps

    timesteps = stratified_timesteps(500, torch.Generator().manual_seed(0))
    assert torch.equal(timesteps // 2, torch.arange(500))


def test_a_finished_run_is_left_alone(finished: Path, images: Path) -> None:
    before = (finished / "training.json").stat().st_mtime_ns
    result = train(images, finished, "--steps", "2")
    assert result.exit_code == 0
    assert "is complete; pass --no-resume to train again" in result.output
    assert (finished / "training.json").stat().st_mtime_ns == before


def test_evaluation_reports_and_updates_the_card(
    finished: Path, images: Path, tmp_path: Path
) -> None:
    import evaluate_demo

    model = tmp_path / "model"
    shutil.copytree(finished, model)
    arguments = ["--model", str(model), "--features", str(model / "features.onnx")]
    arguments += ["--reference", str(model / "reference.npz"), "--real", str(images / "test")]
    arguments += ["--images", "4", "--steps", "1,2", "--guidance", "1.0,1.5", "--device", "cpu"]
    arguments += ["--batch-size", "3", "--json", str(tmp_path / "fid.json"), "--update-card"]
    result = CliRunner().invoke(evaluate_demo.app, arguments)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "fid.json").read_text())
    settings = [(row["steps"], row["guidance"]) for row in report["rows"]]
    assert settings == [(1, 1.0), (1, 1.5), (2, 1.0), (2, 1.5)]
    assert all(np.isfinite(row["fid"]) for row in report["rows"])
    assert report["real"]["images"] == 20
    card = (model / "README.md").read_text()
    assert f"| 2 steps, guidance 1.5 | {report['rows'][3]['fid']:.3f} |" in card
    assert "not measured yet" not in card
    assert "Mean training loss" in card


def one_line_error(result: Result) -> str:
    """The message of a run that must have failed with exit code 2 and nothing but that line."""
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


def test_refuses_a_missing_folder_from_the_shell(tmp_path: Path) -> None:
    command = [sys.executable, str(RECIPES / "train_demo.py"), "--images", str(tmp_path / "none")]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "out")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: the image folder must hold train/ and test/, got ")


def test_refuses_classes_that_differ(own_images: Path, tmp_path: Path) -> None:
    (own_images / "test" / "class9").rename(own_images / "test" / "other")
    message = one_line_error(train(own_images, tmp_path / "out", "--steps", "1"))
    assert "same class folders, got class9, other in one of them only" in message


def test_refuses_another_number_of_classes(own_images: Path, tmp_path: Path) -> None:
    for split in ("train", "test"):
        shutil.rmtree(own_images / split / "class9")
    message = one_line_error(train(own_images, tmp_path / "out", "--steps", "1"))
    assert "must hold 10 class folders, got 9" in message


def test_refuses_an_image_of_a_wrong_size(own_images: Path, tmp_path: Path) -> None:
    Image.new("RGB", (48, 32)).save(own_images / "train" / "class3" / "0004.png")
    message = one_line_error(train(own_images, tmp_path / "out", "--steps", "1"))
    assert "must be 32x32 pixels, got 48x32 in " in message
    assert "class3/0004.png" in message


def test_refuses_a_file_that_is_no_image(own_images: Path, tmp_path: Path) -> None:
    (own_images / "test" / "class0" / "0000.png").write_text("text")
    message = one_line_error(train(own_images, tmp_path / "out", "--steps", "1"))
    assert "as an image; replace or delete it" in message


def test_refuses_an_empty_class(own_images: Path, tmp_path: Path) -> None:
    shutil.rmtree(own_images / "train" / "class5")
    (own_images / "train" / "class5").mkdir()
    message = one_line_error(train(own_images, tmp_path / "out", "--steps", "1"))
    assert "must hold .jpg or .png images, got none" in message


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--batch-size", "101"], "batch size must lie between 1 and the 100 training images"),
        (["--optimizer", "sgd"], "--optimizer must be one of adamw, muon, got 'sgd'"),
        (["--steps", "0"], "--steps must be above 0, got 0"),
        (["--minutes", "-1"], "--minutes must be above 0, got -1.0"),
        (["--seed", "-1"], "--seed must lie between 0 and 2**40, got -1"),
        (["--device", "tpu"], "--device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        (["--device", "cuda:64"], "--device cuda:64 is not there"),
    ],
    ids=["batch-size", "optimizer", "steps", "minutes", "seed", "device", "gpu"],
)
def test_refuses_bad_options(
    images: Path, tmp_path: Path, options: list[str], expected: str
) -> None:
    assert expected in one_line_error(train(images, tmp_path / "out", *options))


def test_refuses_to_resume_with_other_settings(finished: Path, images: Path) -> None:
    message = one_line_error(train(images, finished, "--steps", "3"))
    assert "holds a run with other settings (dit.steps 2 -> 3); pass --no-resume" in message


def test_refuses_a_damaged_checkpoint(tmp_path: Path) -> None:
    from demo_recipe.checkpoint import load_checkpoint
    from demo_recipe.errors import RecipeError

    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(b"\x08\x00")
    with pytest.raises(RecipeError, match=r"cannot read the checkpoint .* pass --no-resume"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--steps", "20,x"], "--steps must be numbers between commas, got '20,x'"),
        (["--steps", "0"], "--steps must lie between 1 and 1000, got 0"),
        (["--images", "1"], "--images must be at least 2 for a covariance, got 1"),
        (["--model", "nowhere"], "the model folder must hold transformer/config.json"),
        (["--features", "nowhere"], "the feature extractor must exist, got 'nowhere'"),
        (["--reference", "nowhere"], "the reference must be an .npz file with mu and sigma"),
    ],
    ids=["text", "steps", "images", "model", "features", "reference"],
)
def test_evaluation_refuses_bad_options(finished: Path, options: list[str], expected: str) -> None:
    import evaluate_demo

    arguments = ["--model", str(finished), "--features", str(finished / "features.onnx")]
    arguments += ["--reference", str(finished / "reference.npz"), "--device", "cpu", *options]
    assert expected in one_line_error(CliRunner().invoke(evaluate_demo.app, arguments))
