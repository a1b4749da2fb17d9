"""A real exported folder: which engine, what card, and images that are the sampler's own."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qdit.calibrate.checkpoint import QuantizedCheckpoint
from qdit.calibrate.sampling import SamplingSettings, sample_images
from qdit.calibrate.sources import load_model
from qdit.engines.at_hand import engine_names, open_engine
from qdit.engines.kinds.kind import EngineSettings
from qdit.engines.onnxruntime_engine import OnnxRuntimeEngine
from qdit.errors import ArtifactError, InputError
from qdit.export.onnxruntime.files import export_onnxruntime
from qdit.serve.backend import Generation, ImageUpdate
from qdit.serve.images import encode_sample
from qdit.serve.local_backend import LocalBackend
from qdit.serve.served_model import ServedModel, load_full_precision, load_served
from qdit.serve.web.metrics import Metrics

from .conftest import settings_for

CPU = EngineSettings("cpu", 2)


@pytest.fixture(scope="module")
def served(exported: Path) -> ServedModel:
    return load_served(exported, "auto", CPU, None, lambda message: None)


def generation(label: int, steps: int, seed: int, **changes: object) -> Generation:
    values: dict[str, object] = {
        "request_id": "test", "model": "demo-w4a8", "label": label, "images": 1, "steps": steps,
        "guidance": 1.5, "seed": seed, "scheduler": None, "image_format": "png", "quality": None,
        "previews": 0, "tells_progress": False, "seconds": 60.0,
    }  # fmt: skip
    return Generation(**(values | changes))  # type: ignore[arg-type]


class TestEngines:
    def test_the_best_at_hand(self, exported: Path) -> None:
        said: list[str] = []
        opened = open_engine(exported, settings=CPU, say=said.append)
        assert opened.kind.name == "qdq"
        assert said[1].startswith("engine torch passed over: it runs on CUDA devices")
        assert said[3] == "engine onnxruntime passed over: the folder has no onnxruntime/model.onnx"

    def test_by_name(self, exported: Path) -> None:
        assert engine_names()[:5] == (
            "tensorrt-plugin", "torch", "onnxruntime-cuda", "onnxruntime", "qdq"
        )  # fmt: skip
        with pytest.raises(InputError, match=r"engine torch cannot run .*CUDA devices"):
            open_engine(exported, "torch", CPU)
        with pytest.raises(InputError, match=r"auto or one of .*qdq, .*got 'magic'"):
            open_engine(exported, "magic", CPU)

    def test_none_will_do(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"no engine .*torch: .*; onnxruntime: .*; qdq: "):
            open_engine(tmp_path, settings=CPU)

    def test_a_choice_of_cpu_kernels_is_read_or_refused(self, exported: Path) -> None:
        theirs = EngineSettings("cpu", 2, "onnxruntime")
        opened = open_engine(exported, settings=theirs)
        assert isinstance(opened.engine, OnnxRuntimeEngine)
        assert opened.engine.kernels.reason == "they were asked for"
        ours = EngineSettings("cpu", 2, "qdit")  # the reference form has none of our products
        with pytest.raises(InputError, match="qdq: qdit's own products were asked for and cannot"):
            open_engine(exported, settings=ours)
        with pytest.raises(InputError, match=r"torch cannot run .* no choice of CPU kernels, got"):
            open_engine(exported, "torch", ours)

    def test_what_multiplies_is_said(self, exported: Path) -> None:
        said: list[str] = []
        theirs = EngineSettings("cpu", 2, "onnxruntime")
        load_served(exported, "qdq", theirs, None, said.append)
        assert said == ["engine qdq: ONNX Runtime's own products: they were asked for"]

    def test_every_onnx_file_is_verified_before_one_is_opened(
        self, exported: Path, tmp_path: Path
    ) -> None:
        folder = tmp_path / "folder"
        shutil.copytree(exported, folder)
        (folder / "onnxruntime-cuda").mkdir()
        (folder / "onnxruntime-cuda" / "model.onnx").write_bytes(b"damaged")
        with pytest.raises(ArtifactError, match=r"onnxruntime-cuda/model\.onnx is not a readable"):
            load_served(folder, "qdq", CPU, None, lambda message: None)

    def test_one_that_does_not_open_is_passed_over(self, exported: Path, tmp_path: Path) -> None:
        (tmp_path / "onnxruntime").mkdir()
        (tmp_path / "onnxruntime" / "model.onnx").write_bytes(b"damaged")
        (tmp_path / "model.onnx").write_bytes((exported / "model.onnx").read_bytes())
        said: list[str] = []
        assert open_engine(tmp_path, settings=CPU, say=said.append).kind.name == "qdq"
        assert "cannot load" in said[-1]


def test_the_card(served: ServedModel) -> None:
    card = served.card
    assert (card.id, card.precision, card.engine) == ("demo-w4a8", "w4a8", "qdq")
    assert (card.size, card.tokens, card.class_count) == ("32x32", 256, 10)
    assert card.class_names[3] == "cat"
    assert card.default_scheduler == "DDIMScheduler"
    # every scheduler that the sampler can drive with this config: the step tests run the same
    assert "DPMSolverMultistepScheduler" in card.schedulers
    assert "EDMEulerScheduler" not in card.schedulers


def test_images_are_the_samplers_whatever_shares_the_batch(
    served: ServedModel, exported: Path
) -> None:
    """On ONNX Runtime's CPU provider to the bit (docs/serve.md): 12 requests of other steps,
    guidance and schedulers at once, and each again by `sample_images` alone."""
    wanted = [
        generation(
            label=i % 10,
            steps=3 + i % 5,
            seed=i,
            guidance=[1.0, 1.5, 4.0][i % 3],
            scheduler=[None, "DPMSolverMultistepScheduler", "DDPMScheduler"][i % 3],
            images=1 + i % 2,
        )
        for i in range(12)
    ]
    limits = settings_for(max_batch=8).limits
    backend = LocalBackend([served], limits, {served.card.id: Metrics().observer("m")})

    async def one(which: Generation) -> list[bytes]:
        updates = [u async for u in backend.generate(which) if isinstance(u, ImageUpdate)]
        return [u.data for u in sorted(updates, key=lambda u: u.image)]

    async def all_at_once() -> list[list[bytes]]:
        return await asyncio.gather(*(one(which) for which in wanted))

    images = asyncio.run(all_at_once())
    asyncio.run(backend.close())
    engine = open_engine(exported, settings=CPU)
    model = load_model(None, blocks=1)
    denoiser = engine.engine.as_denoiser(model.family, model.config)
    for which, files in zip(wanted, images, strict=True):
        settings = SamplingSettings(which.steps, which.guidance, which.seed, which.scheduler)
        indices = [which.label + 10 * image for image in range(which.images)]
        alone = sample_images(model, denoiser, settings, indices, batch_size=1, device="cpu")
        assert files == [encode_sample(sample, None, "png") for sample in alone]


def test_rows_do_not_depend_on_the_batch(served: ServedModel, exported: Path) -> None:
    engine = open_engine(exported, settings=CPU)
    model = load_model(None, blocks=1)
    denoise = engine.engine.as_denoiser(model.family, model.config)
    generator = torch.Generator().manual_seed(0)
    x, t, y = model.family.example_inputs(model.denoiser, 16, generator)
    whole = denoise(x, t, y)

    def rows(index: list[int]) -> Tensor:
        return denoise(x[index], t[index], y[index])

    for index in ([3], [0, 1], [15, 4, 7], list(range(15, -1, -1))):
        assert torch.equal(rows(index), whole[index])


def test_rows_of_the_onnxruntime_target_differ_by_little_in_another_batch(
    exported: Path, tmp_path: Path
) -> None:
    """Its products sum in another order for other sizes, which turns over single 8-bit roundings:
    less than a tenth of what quantization itself does to the prediction (docs/serve.md)."""
    folder = Path(shutil.copytree(exported, tmp_path / "exported"))
    (folder / "onnxruntime").mkdir()
    export_onnxruntime(QuantizedCheckpoint.read(folder), folder / "onnxruntime" / "model.onnx")
    fast = load_served(folder, "auto", CPU, None, lambda message: None)
    assert fast.card.engine == "onnxruntime"
    model = load_model(None, blocks=1)
    x, t, y = model.family.example_inputs(model.denoiser, 16, torch.Generator().manual_seed(0))
    whole = fast.engine.denoise(x, t, y)
    quantization = (whole - model.as_denoiser()(x, t, y)).square().mean().sqrt()
    for index in ([3], [0, 1], [15, 4, 7], list(range(15, -1, -1))):
        rows = fast.engine.denoise(x[index], t[index], y[index])
        assert (rows - whole[index]).square().mean().sqrt() <= 0.1 * quantization


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_rows_of_the_torch_engine_in_another_batch_differ_by_rounding_only(exported: Path) -> None:
    """No more than the engine's own float16 rounding moves them from the float32 reference."""
    model = load_model(None, blocks=1)
    fast, exact = (
        open_engine(exported, name, EngineSettings(device)).engine.as_denoiser(
            model.family, model.config
        )
        for name, device in (("torch", "cuda"), ("qdq", "cpu"))
    )
    x, t, y = model.family.example_inputs(model.denoiser, 16, torch.Generator().manual_seed(0))
    whole = fast(x, t, y)
    rounding = (whole - exact(x, t, y)).abs().max()
    assert rounding > 0
    for index in ([3, 3], [0, 1], [15, 4, 7, 8], list(range(15, -1, -1))):
        assert (fast(x[index], t[index], y[index]) - whole[index]).abs().max() <= rounding


class TestFullPrecision:
    def test_beside_the_quantized_model(self, served: ServedModel, exported: Path) -> None:
        full = load_full_precision(served, exported, "cpu")
        assert (full.card.id, full.card.precision) == ("demo", "full-precision")
        full.engine.probe()

    def test_a_source_that_is_gone(
        self, served: ServedModel, exported: Path, tmp_path: Path
    ) -> None:
        for name in ("weights.safetensors", "model.onnx"):
            (tmp_path / name).write_bytes((exported / name).read_bytes())
        manifest = (exported / "qdit.json").read_text("utf-8")
        sha256 = load_model(None).source.sha256
        (tmp_path / "qdit.json").write_text(manifest.replace(sha256, "0" * 64), "utf-8")
        with pytest.raises(InputError, match=r"is not the model that .* serve without --full"):
            load_full_precision(served, tmp_path, "cpu")


def test_latents_need_a_vae(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs a VAE to make images; name its folder with --vae"):
        load_served(_latent_export(tmp_path), "auto", CPU, None, lambda message: None)


def _latent_export(folder: Path) -> Path:
    from qdit.calibrate.checkpoint import QuantizedCheckpoint
    from qdit.calibrate.plan import uniform_plan
    from qdit.calibrate.quantizers import quantize_weight_nearest
    from qdit.calibrate.schemes import LayerScheme

    model = load_model("random:DiT-S/2", blocks=1)
    scheme = LayerScheme(weight_group=64, activation_group=64)
    plan = uniform_plan("w4a8", scheme, model.linears)
    weights = {
        spec.name: quantize_weight_nearest(
            model.denoiser.get_submodule(spec.name).weight, plan[spec.name]
        )
        for spec in model.linears
    }
    QuantizedCheckpoint.from_result(model, plan, weights, {}, {}).write(folder)
    return folder
