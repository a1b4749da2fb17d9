"""`load_model` on every kind of source but original state dicts (test_original_dit.py)."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel, UNet2DModel
from safetensors.torch import load_file, save_file

import qdit.demo
from qdit.calibrate.model import DiffusionModel
from qdit.calibrate.sources import load_model
from qdit.errors import InputError

WEIGHTS = "diffusion_pytorch_model.safetensors"


def make_transformer(seed: int = 0, *, equal_embedders: bool = True, **changes: Any) -> Any:
    torch.manual_seed(seed)
    config: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 3,
        "sample_size": 8,
        "num_embeds_ada_norm": 10,
    }
    denoiser = DiTTransformer2DModel(**(config | changes)).eval()
    if equal_embedders:
        embedder = denoiser.transformer_blocks[0].norm1.emb.state_dict()
        for block in denoiser.transformer_blocks:
            block.norm1.emb.load_state_dict(embedder)
    return denoiser


def make_vae() -> Any:
    return AutoencoderKL(
        block_out_channels=(8,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        latent_channels=4,
        norm_num_groups=4,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole pipeline as diffusers writes it, with the Hub's DiT models' class names."""
    scheduler = DDIMScheduler(clip_sample=False, beta_end=0.019)
    pipeline = DiTPipeline(make_transformer(), make_vae(), scheduler)
    pipeline.save_pretrained(tmp_path / "tiny-dit")
    index = tmp_path / "tiny-dit" / "model_index.json"
    labels = {"id2label": {"1": "shark", "0": "tench"}}
    index.write_text(json.dumps(json.loads(index.read_text()) | labels))
    return tmp_path / "tiny-dit"


def outputs_of(model: DiffusionModel) -> torch.Tensor:
    inputs = model.family.example_inputs(model.denoiser, 2, torch.Generator().manual_seed(0))
    return model.family.forward(model.denoiser, *inputs)


def direct_outputs(denoiser: Any, model: DiffusionModel) -> torch.Tensor:
    inputs = model.family.example_inputs(model.denoiser, 2, torch.Generator().manual_seed(0))
    with torch.no_grad():
        output: torch.Tensor = denoiser(
            inputs[0], timestep=inputs[1], class_labels=inputs[2]
        ).sample
    return output


class TestDemo:
    @pytest.mark.parametrize("source", [None, "demo"])
    def test_it_loads_whole(self, source: str | None) -> None:
        model = load_model(source)
        assert (model.name, model.source.kind) == ("demo", "demo")
        assert model.sample_shape == (3, 32, 32)
        assert len(model.linears) == 8 * 7
        assert model.class_names[0] == "airplane"
        assert len(model.class_names) == model.family.class_count(model.denoiser) == 10
        assert model.vae is None
        assert model.features is not None and model.features.is_file()
        assert model.reference is not None and model.reference.is_file()
        assert {parameter.dtype for parameter in model.denoiser.parameters()} == {torch.float32}
        assert outputs_of(model).isfinite().all()

    def test_it_is_what_diffusers_loads(self) -> None:
        model = load_model()
        transformer = Path(qdit.demo.__file__).parent / "transformer"
        denoiser = DiTTransformer2DModel.from_pretrained(transformer, torch_dtype=torch.float32)
        assert torch.equal(outputs_of(model), direct_outputs(denoiser, model))
        digest = hashlib.sha256((transformer / WEIGHTS).read_bytes()).hexdigest()
        assert model.source.sha256 == digest

    def test_its_embedder_is_tied(self) -> None:
        blocks: Any = load_model().denoiser.transformer_blocks
        assert len({id(block.norm1.emb) for block in blocks}) == 1


class TestFolder:
    def test_pipeline_folder(self, folder: Path) -> None:
        model = load_model(str(folder))
        denoiser = DiTTransformer2DModel.from_pretrained(folder / "transformer")
        assert torch.equal(outputs_of(model), direct_outputs(denoiser, model))
        assert model.name == "tiny-dit"
        assert model.source.kind == "diffusers"
        assert model.source.location == str(folder)
        assert model.class_names == ("tench", "shark")
        assert model.scheduler_config["beta_end"] == 0.019
        assert isinstance(model.vae, AutoencoderKL)
        assert not model.vae.training
        both = (folder / "transformer" / WEIGHTS, folder / "vae" / WEIGHTS)
        content = b"".join(path.read_bytes() for path in both)
        assert model.source.sha256 == hashlib.sha256(content).hexdigest()

    def test_the_transformer_folder_takes_what_lies_beside_it(self, folder: Path) -> None:
        model = load_model(str(folder / "transformer"))
        assert model.name == "tiny-dit"
        assert model.scheduler_config["beta_end"] == 0.019
        assert model.vae is not None

    def test_a_lone_transformer_folder_gets_the_published_scheduler(self, tmp_path: Path) -> None:
        make_transformer().save_pretrained(tmp_path / "mine")
        model = load_model(str(tmp_path / "mine"))
        assert model.name == "mine"
        assert model.vae is None
        assert model.scheduler_config["_class_name"] == "DDIMScheduler"
        assert model.scheduler_config["clip_sample"] is False

    def test_the_old_class_name_of_the_hub_s_dit(self, folder: Path) -> None:
        expected = outputs_of(load_model(str(folder)))
        path = folder / "transformer" / "config.json"
        config = json.loads(path.read_text())
        config |= {"_class_name": "Transformer2DModel", "num_vector_embeds": None}
        path.write_text(json.dumps(config))
        model = load_model(str(folder))
        assert torch.equal(outputs_of(model), expected)
        assert model.config["_class_name"] == "DiTTransformer2DModel"

    @pytest.mark.parametrize(
        "options",
        [
            {"max_shard_size": "30KB"},
            {"safe_serialization": False},
            {"variant": "fp16"},
            {"safe_serialization": False, "max_shard_size": "30KB"},
        ],
        ids=["shards", "pickle", "fp16 name", "pickle shards"],
    )
    def test_every_way_diffusers_stores_weights(
        self, tmp_path: Path, options: dict[str, Any]
    ) -> None:
        denoiser = make_transformer()
        denoiser.save_pretrained(tmp_path / "m", **options)
        model = load_model(str(tmp_path / "m"))
        assert torch.equal(outputs_of(model), direct_outputs(denoiser, model))
        assert len(model.source.sha256) == 64

    def test_half_precision_files_are_widened(self, tmp_path: Path) -> None:
        half = make_transformer().half()
        half.save_pretrained(tmp_path / "m")
        model = load_model(str(tmp_path / "m"))
        # a fresh module: `half`'s positional table has lost its float32 digits
        denoiser = make_transformer(seed=1)
        denoiser.load_state_dict(half.state_dict())
        assert torch.equal(outputs_of(model), direct_outputs(denoiser, model))

    def test_different_embedders_stay_apart(self, tmp_path: Path) -> None:
        denoiser = make_transformer(equal_embedders=False)
        denoiser.save_pretrained(tmp_path / "m")
        model = load_model(str(tmp_path / "m"))
        assert model.parameter_count() == sum(p.numel() for p in denoiser.parameters())
        assert torch.equal(outputs_of(model), direct_outputs(denoiser, model))

    def test_blocks_keeps_the_first(self, folder: Path) -> None:
        model = load_model(str(folder), blocks=1)
        denoiser = DiTTransformer2DModel.from_pretrained(folder / "transformer")
        denoiser.transformer_blocks = denoiser.transformer_blocks[:1]
        assert model.config["num_layers"] == 1
        assert torch.equal(outputs_of(model), direct_outputs(denoiser, model))

    def test_changing_the_model_leaves_the_file_alone(self, folder: Path) -> None:
        model = load_model(str(folder))
        before = (folder / "transformer" / WEIGHTS).read_bytes()
        for parameter in model.denoiser.parameters():
            parameter.zero_()
        assert (folder / "transformer" / WEIGHTS).read_bytes() == before


class TestHub:
    """The Hub cannot be reached here; its local cache can be laid out as it would lie."""

    @pytest.fixture
    def cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        return tmp_path / "hub"

    @pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pickle"])
    def test_a_cached_model(self, cache: Path, folder: Path, safe: bool) -> None:
        commit = "0" * 40
        repository = cache / "models--acme--tiny-dit"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(commit)
        shutil.copytree(folder, repository / "snapshots" / commit)
        if not safe:
            transformer = repository / "snapshots" / commit / "transformer"
            (transformer / WEIGHTS).unlink()
            make_transformer().save_pretrained(transformer, safe_serialization=False)
        model = load_model("acme/tiny-dit")
        assert (model.name, model.source.location) == ("acme/tiny-dit", "acme/tiny-dit")
        assert model.source.kind == "diffusers"
        assert torch.equal(outputs_of(model), outputs_of(load_model(str(folder))))

    def test_a_model_that_cannot_be_fetched(self, cache: Path) -> None:
        with pytest.raises(InputError, match="cannot fetch acme/absent from the Hub: ") as caught:
            load_model("acme/absent")
        assert "\n" not in str(caught.value)
        assert caught.value.__cause__ is not None


class TestRandom:
    def test_the_seed_decides(self) -> None:
        first, again, other = (
            load_model("random:DiT-S/4", seed=seed, blocks=1) for seed in (0, 0, 1)
        )
        assert torch.equal(outputs_of(first), outputs_of(again))
        assert not torch.equal(outputs_of(first), outputs_of(other))
        assert (first.source.seed, other.source.seed) == (0, 1)

    def test_fewer_blocks_are_the_first_ones(self) -> None:
        two, one = (load_model("random:DiT-S/8", blocks=blocks) for blocks in (2, 1))
        whole = dict(two.denoiser.named_parameters())
        for name, parameter in one.denoiser.named_parameters():
            assert torch.equal(parameter, whole[name]), name

    def test_shape_is_the_published_one(self) -> None:
        model = load_model("random:DiT-S/2")
        assert model.sample_shape == (4, 32, 32)
        assert model.family.class_count(model.denoiser) == 1000
        assert 32.5e6 < model.parameter_count() < 33.5e6
        assert outputs_of(model).shape == (2, 8, 32, 32)

    def test_activations_are_alive(self) -> None:
        """Every block changes its input, none takes over, and timestep and label both tell."""
        model = load_model("random:DiT-S/4")
        family, denoiser = model.family, model.denoiser
        x, timestep, label = family.example_inputs(denoiser, 2, torch.Generator().manual_seed(0))
        state = family.before_blocks(denoiser, x, timestep, label)
        hidden = state.hidden_states
        for block in family.blocks(denoiser):
            after = family.run_block(block, type(state)(hidden, state.shared))
            change = (after - hidden).std() / hidden.std()
            assert 0.01 < change < 1
            hidden = after
        output = family.forward(denoiser, x, timestep, label)
        assert 0.1 < output.std() < 10
        for other in ((x, timestep + 100, label), (x, timestep, label - 1)):
            assert (family.forward(denoiser, *other) - output).std() > 0.01 * output.std()

    @pytest.mark.parametrize("name", ["DiT-XXL/2", "DiT-XL", "dit-xl/2", "DiT-S/3", ""])
    def test_other_names_are_refused(self, name: str) -> None:
        with pytest.raises(InputError, match=r"random models are DiT-XL/2, .*DiT-S/8; got "):
            load_model(f"random:{name}")

    def test_too_many_blocks(self) -> None:
        with pytest.raises(InputError, match="blocks must be between 1 and the model's 12, got 13"):
            load_model("random:DiT-S/2", blocks=13)


class TestRefusals:
    def refused(self, source: Path | str, message: str) -> None:
        with pytest.raises(InputError, match=message) as caught:
            load_model(str(source))
        assert "\n" not in str(caught.value)

    def change(self, folder: Path, **tensors: torch.Tensor | None) -> None:
        path = folder / "transformer" / WEIGHTS
        state = load_file(path) | tensors
        save_file({name: value for name, value in state.items() if value is not None}, path)

    @pytest.mark.parametrize("source", ["nowhere", "/no/such/folder", "a/b/c", "", "model.onnx"])
    def test_nothing_there(self, source: str, tmp_path: Path, monkeypatch: Any) -> None:
        monkeypatch.chdir(tmp_path)
        if source:
            self.refused(source, "no model at .*: give 'demo', a diffusers folder")
        else:  # an empty path is the current folder
            self.refused(source, "neither transformer/ nor config.json")

    def test_files_of_another_kind(self, tmp_path: Path) -> None:
        (tmp_path / "model.onnx").write_bytes(b"")
        self.refused(tmp_path / "model.onnx", "no model at .*model.onnx")

    def test_a_folder_of_something_else(self, tmp_path: Path) -> None:
        self.refused(tmp_path, "holds neither transformer/ nor config.json")

    def test_another_architecture(self, tmp_path: Path) -> None:
        unet = UNet2DModel(
            block_out_channels=(4,),
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            norm_num_groups=2,
            add_attention=False,
        )
        unet.save_pretrained(tmp_path / "unet")
        self.refused(tmp_path / "unet", "class 'UNet2DModel'; .* DiTTransformer2DModel")

    @pytest.mark.parametrize(
        ("text", "message"),
        [("{", "is not readable JSON"), ("[1]", "must hold a JSON object, got list")],
    )
    def test_broken_configs(self, folder: Path, text: str, message: str) -> None:
        (folder / "transformer" / "config.json").write_text(text)
        self.refused(folder, f"config.json {message}")

    def test_no_config(self, folder: Path) -> None:
        (folder / "transformer" / "config.json").unlink()
        self.refused(folder, "no config.json in .*transformer; is it a diffusers folder")

    def test_no_weights(self, folder: Path) -> None:
        (folder / "transformer" / WEIGHTS).unlink()
        self.refused(folder, "no weights in .*; expected one of diffusion_pytorch_model")

    def test_truncated_weights(self, folder: Path) -> None:
        path = folder / "transformer" / WEIGHTS
        path.write_bytes(path.read_bytes()[:-100])
        self.refused(folder, "is not a readable safetensors file")

    def test_a_missing_tensor(self, folder: Path) -> None:
        self.change(folder, **{"proj_out_2.bias": None})
        self.refused(folder, "lacks proj_out_2.bias; is the file complete")

    def test_a_tensor_too_many(self, folder: Path) -> None:
        self.change(folder, **{"transformer_blocks.0.attn2.to_q.weight": torch.ones(2)})
        self.refused(folder, "holds transformer_blocks.0.attn2.to_q.weight, which")

    def test_a_wrong_shape(self, folder: Path) -> None:
        self.change(folder, **{"proj_out_2.bias": torch.ones(3)})
        self.refused(folder, r"proj_out_2.bias must have shape \[32\] by the config, got \[3\]")

    def test_a_wrong_dtype(self, folder: Path) -> None:
        self.change(folder, **{"proj_out_2.bias": torch.ones(32, dtype=torch.int64)})
        self.refused(folder, r"proj_out_2.bias must be floating-point, got torch.int64")

    @pytest.mark.parametrize(
        ("index", "message"),
        [
            ({"weight_map": {"a": "../elsewhere.safetensors"}}, "shards must lie beside the index"),
            ({"weight_map": {"a": "/etc/passwd"}}, "shards must lie beside the index"),
            ({"weight_map": {"a": "absent.safetensors"}}, "absent.safetensors, which is missing"),
            ({"weight_map": {}}, "must have a 'weight_map'"),
            ({}, "must have a 'weight_map'"),
        ],
        ids=["parent", "absolute", "absent", "empty", "none"],
    )
    def test_shard_indexes(self, folder: Path, index: dict[str, Any], message: str) -> None:
        (folder / "transformer" / WEIGHTS).unlink()
        (folder / "transformer" / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
        self.refused(folder, message)

    def test_another_kind_of_vae(self, folder: Path) -> None:
        (folder / "vae" / "config.json").write_text('{"_class_name": "VQModel"}')
        self.refused(folder, "must be an AutoencoderKL, got 'VQModel'")

    def test_a_vae_without_weights(self, folder: Path) -> None:
        (folder / "vae" / WEIGHTS).unlink()
        self.refused(folder, "cannot load the VAE in .*vae: ")
