"""Original DiT state dicts: the converted model against the architecture as the paper states it.

`dit_forward` is written from the paper (Peebles & Xie, arXiv 2212.09748, figure 3 and section 3.2)
and the state dict's own key names, in float64 and with nothing from diffusers.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import pickle  # noqa: TID251  to make the hostile files that must be refused
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qdit.calibrate.sources import load_model
from qdit.errors import InputError

State = dict[str, Tensor]
WIDTH, HEADS, DEPTH, CLASSES = 384, 6, 2, 10


def position_table(width: int, grid: int) -> np.ndarray:
    """Half of the channels encode the column, half the row; sines before cosines in each half."""
    frequencies = 10000.0 ** (-np.arange(width // 4) / (width / 4))
    rows, columns = np.divmod(np.arange(grid * grid), grid)
    halves = []
    for positions in (columns, rows):
        phases = positions[:, None] * frequencies
        halves += [np.sin(phases), np.cos(phases)]
    return np.concatenate(halves, axis=1)


def random_state(
    *, depth: int = DEPTH, patch: int = 2, channels: int = 4, outputs: int = 8, size: int = 8
) -> State:
    """Random weights, none zero, under the original repository's names."""
    generator = torch.Generator().manual_seed(0)
    state: State = {}

    def linear(name: str, rows: int, columns: int) -> None:
        state[f"{name}.weight"] = torch.randn(rows, columns, generator=generator) / columns**0.5
        state[f"{name}.bias"] = torch.randn(rows, generator=generator) * 0.1

    linear("x_embedder.proj", WIDTH, channels * patch * patch)
    shape = (WIDTH, channels, patch, patch)
    state["x_embedder.proj.weight"] = state["x_embedder.proj.weight"].reshape(shape)
    linear("t_embedder.mlp.0", WIDTH, 256)
    linear("t_embedder.mlp.2", WIDTH, WIDTH)
    table = torch.randn(CLASSES + 1, WIDTH, generator=generator)
    state["y_embedder.embedding_table.weight"] = table
    state["pos_embed"] = torch.tensor(position_table(WIDTH, size // patch)[None]).float()
    for block in range(depth):
        linear(f"blocks.{block}.attn.qkv", 3 * WIDTH, WIDTH)
        linear(f"blocks.{block}.attn.proj", WIDTH, WIDTH)
        linear(f"blocks.{block}.mlp.fc1", 4 * WIDTH, WIDTH)
        linear(f"blocks.{block}.mlp.fc2", WIDTH, 4 * WIDTH)
        linear(f"blocks.{block}.adaLN_modulation.1", 6 * WIDTH, WIDTH)
    linear("final_layer.adaLN_modulation.1", 2 * WIDTH, WIDTH)
    linear("final_layer.linear", patch * patch * outputs, WIDTH)
    return state


def normalize(x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / ((x - mean).square().mean(-1, keepdim=True) + 1e-6).sqrt()


def dit_forward(state: State, x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
    """Raw output of a DiT with these weights, in float64. x [B, C, H, W] → [B, outC, H, W]."""
    weights = {name: value.double() for name, value in state.items()}

    def linear(name: str, value: Tensor) -> Tensor:
        return value @ weights[f"{name}.weight"].flatten(1).T + weights[f"{name}.bias"]

    batch, channels, height, _ = x.shape
    patch = state["x_embedder.proj.weight"].shape[-1]
    grid = height // patch
    tiles = x.reshape(batch, channels, grid, patch, grid, patch).permute(0, 2, 4, 1, 3, 5)
    tokens = linear("x_embedder.proj", tiles.reshape(batch, grid * grid, -1))
    tokens = tokens + weights["pos_embed"]

    # the published models computed these phases in float32
    frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
    phases = timestep[:, None].float() * frequencies
    waves = torch.cat([phases.cos(), phases.sin()], dim=1).double()
    condition = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", waves)))
    condition = condition + weights["y_embedder.embedding_table.weight"][label]

    def modulation(name: str, parts: int) -> list[Tensor]:
        values = linear(f"{name}.adaLN_modulation.1", F.silu(condition))
        return [part[:, None] for part in values.split(WIDTH, dim=1)][:parts]

    def attention(name: str, value: Tensor) -> Tensor:
        query, key, content = (
            part.reshape(batch, -1, HEADS, WIDTH // HEADS).transpose(1, 2)
            for part in linear(f"{name}.attn.qkv", value).split(WIDTH, dim=-1)
        )
        scores = query @ key.transpose(2, 3) / math.sqrt(WIDTH // HEADS)
        mixed = scores.softmax(-1) @ content
        return linear(f"{name}.attn.proj", mixed.transpose(1, 2).reshape(value.shape))

    def gelu_tanh(value: Tensor) -> Tensor:
        inner = math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)
        return 0.5 * value * (1 + inner.tanh())

    depth = sum(name.endswith("attn.qkv.bias") for name in state)
    for block in range(depth):
        name = f"blocks.{block}"
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation(name, 6)
        tokens = tokens + gate * attention(name, normalize(tokens) * (1 + scale) + shift)
        hidden = gelu_tanh(
            linear(f"{name}.mlp.fc1", normalize(tokens) * (1 + mlp_scale) + mlp_shift)
        )
        tokens = tokens + mlp_gate * linear(f"{name}.mlp.fc2", hidden)
    shift, scale = modulation("final_layer", 2)
    patches = linear("final_layer.linear", normalize(tokens) * (1 + scale) + shift)
    patches = patches.reshape(batch, grid, grid, patch, patch, -1).permute(0, 5, 1, 3, 2, 4)
    return patches.reshape(batch, -1, height, height)


def write(path: Path, value: Any) -> Path:
    torch.save(value, path)
    return path


def example(size: int = 8, channels: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, channels, size, size, generator=generator, dtype=torch.float64)
    return x, torch.tensor([0, 381, 999]), torch.tensor([0, 7, CLASSES])


class TestEquality:
    @pytest.mark.parametrize(
        "shape",
        [
            {},
            {"outputs": 4},
            {"patch": 4, "size": 16},
            {"channels": 3, "outputs": 3, "depth": 1},
        ],
        ids=["learned sigma", "fixed sigma", "patch 4", "pixels, one block"],
    )
    def test_outputs_are_those_of_the_architecture(
        self, tmp_path: Path, shape: dict[str, int]
    ) -> None:
        state = random_state(**shape)
        model = load_model(str(write(tmp_path / "dit.pt", state)))
        inputs = example(shape.get("size", 8), shape.get("channels", 4))
        expected = dit_forward(state, *inputs)
        output = model.family.forward(model.denoiser.double(), *inputs)
        assert output.shape == expected.shape
        assert expected.std() > 0.1  # every part contributes something
        torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)

    def test_every_weight_reaches_the_output(self, tmp_path: Path) -> None:
        """Two swapped keys of one shape would pass a check of names: the values must matter."""
        state = random_state(depth=1)
        inputs = example()
        expected = dit_forward(state, *inputs)
        for name in state:
            if name == "pos_embed" or name.endswith("qkv.bias"):
                continue  # a key's bias cancels out in the softmax
            changed = state | {name: state[name].flip(0)}
            assert not torch.allclose(dit_forward(changed, *inputs), expected), name


class TestInference:
    @pytest.mark.parametrize(
        ("width", "heads"), [(384, 6), (768, 12), (1024, 16), (1152, 16)], ids=["S", "B", "L", "XL"]
    )
    def test_heads_follow_the_width(
        self, width: int, heads: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from qdit.calibrate.sources.original_dit import infer_config

        monkeypatch.setitem(globals(), "WIDTH", width)
        with torch.device("cpu"):
            config = infer_config(random_state(depth=1, size=32), Path("x.pt"))
        assert config["num_attention_heads"] == heads
        assert config["num_attention_heads"] * config["attention_head_dim"] == width

    def test_config_scheduler_and_provenance(self, tmp_path: Path) -> None:
        path = write(tmp_path / "DiT-S-2.pt", random_state())
        model = load_model(str(path))
        expected = {
            "num_layers": 2,
            "in_channels": 4,
            "out_channels": 8,
            "patch_size": 2,
            "sample_size": 8,
            "num_embeds_ada_norm": CLASSES,
            "norm_eps": 1e-6,
            "timestep_downscale_freq_shift": 0,
        }
        assert {key: model.config[key] for key in expected} == expected
        assert model.name == "DiT-S-2"
        assert model.source.kind == "original-dit"
        assert model.source.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        assert model.vae is None
        scheduler = model.scheduler_config
        assert scheduler["_class_name"] == "DDIMScheduler"
        assert (scheduler["beta_start"], scheduler["beta_end"]) == (0.0001, 0.02)
        assert (scheduler["beta_schedule"], scheduler["num_train_timesteps"]) == ("linear", 1000)
        assert scheduler["prediction_type"] == "epsilon"
        assert scheduler["clip_sample"] is False

    def test_the_config_rebuilds_the_same_model(self, tmp_path: Path) -> None:
        """What a quantized checkpoint stores is config and weights: no more may be needed."""
        model = load_model(str(write(tmp_path / "dit.pt", random_state())))
        again = model.family.build(model.config)
        again.load_state_dict(model.denoiser.state_dict())
        x, timestep, label = example()
        torch.testing.assert_close(
            model.family.forward(again.double(), x, timestep, label),
            model.family.forward(model.denoiser.double(), x, timestep, label),
            rtol=0,
            atol=0,
        )

    def test_the_embedder_is_tied(self, tmp_path: Path) -> None:
        state = random_state()
        model = load_model(str(write(tmp_path / "dit.pt", state)))
        count = sum(value.numel() for name, value in state.items() if name != "pos_embed")
        assert model.parameter_count() == count

    def test_blocks_keeps_the_first(self, tmp_path: Path) -> None:
        path = write(tmp_path / "dit.pt", random_state())
        model = load_model(str(path), blocks=1)
        assert model.config["num_layers"] == 1
        state = {k: v for k, v in random_state().items() if not k.startswith("blocks.1.")}
        inputs = example()
        output = model.family.forward(model.denoiser.double(), *inputs)
        torch.testing.assert_close(output, dit_forward(state, *inputs), rtol=1e-10, atol=1e-10)


class TestWrappers:
    @pytest.mark.parametrize("wrapper", ["ema", "model"])
    def test_training_checkpoints(self, tmp_path: Path, wrapper: str) -> None:
        state = random_state()
        args = argparse.Namespace(model="DiT-S/2", image_size=256)  # as train.py saves it
        value = {wrapper: state, "opt": {"state": {}, "param_groups": [{"lr": 1e-4}]}, "args": args}
        model = load_model(str(write(tmp_path / "0050000.pt", value)))
        weight = model.denoiser.get_submodule("proj_out_2").weight
        assert torch.equal(weight, state["final_layer.linear.weight"])

    def test_the_averaged_weights_win(self, tmp_path: Path) -> None:
        state = random_state()
        raw = {name: value * (1 if name == "pos_embed" else 2) for name, value in state.items()}
        model = load_model(str(write(tmp_path / "both.pt", {"model": raw, "ema": state})))
        weight = model.denoiser.get_submodule("proj_out_2").weight
        assert torch.equal(weight, state["final_layer.linear.weight"])

    def test_half_precision_and_the_old_file_format(self, tmp_path: Path) -> None:
        state = random_state()
        half = {name: value.half() for name, value in state.items()}
        torch.save(half, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
        model = load_model(str(tmp_path / "old.pt"))
        weight = model.denoiser.get_submodule("proj_out_2").weight
        assert weight.dtype == torch.float32
        assert torch.equal(weight, half["final_layer.linear.weight"].float())


class Bomb:
    """Unpickling it would write a file: the test looks for that file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.target,))


class TestRefusals:
    def refused(self, path: Path, message: str) -> None:
        with pytest.raises(InputError, match=message) as caught:
            load_model(str(path))
        assert "\n" not in str(caught.value)

    def test_pickles_with_code(self, tmp_path: Path) -> None:
        fuse = tmp_path / "exploded"
        self.refused(
            write(tmp_path / "bomb.pt", random_state() | {"extra": Bomb(fuse)}),
            "not a state dict that is safe to read: it holds more than weights",
        )
        (tmp_path / "bare.pt").write_bytes(pickle.dumps(Bomb(fuse), protocol=2))
        self.refused(tmp_path / "bare.pt", "not a state dict that is safe to read")
        assert not fuse.exists()

    def test_files_that_are_no_state_dicts(self, tmp_path: Path) -> None:
        (tmp_path / "noise.pt").write_bytes(b"\x00not a file\xff" * 100)
        self.refused(tmp_path / "noise.pt", "not a state dict that is safe to read")
        (tmp_path / "empty.pt").write_bytes(b"")
        self.refused(tmp_path / "empty.pt", "not a state dict that is safe to read")
        whole = write(tmp_path / "whole.pt", random_state()).read_bytes()
        (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
        self.refused(tmp_path / "cut.pt", "not a state dict that is safe to read")
        self.refused(write(tmp_path / "list.pt", [1, 2]), "must hold a state dict, got list")
        self.refused(write(tmp_path / "step.pt", {"step": 3}), "step must be a tensor, got int")
        self.refused(
            write(tmp_path / "other.pt", {"conv.weight": torch.ones(1)}),
            "not a facebookresearch/DiT state dict: it lacks x_embedder.proj.weight",
        )

    @pytest.mark.parametrize(
        "name", ["blocks.1.mlp.fc2.bias", "t_embedder.mlp.2.weight", "final_layer.linear.bias"]
    )
    def test_a_missing_key(self, tmp_path: Path, name: str) -> None:
        state = random_state()
        del state[name]
        self.refused(write(tmp_path / "less.pt", state), f"lacks {name}")

    def test_a_key_too_many(self, tmp_path: Path) -> None:
        state = random_state() | {"blocks.0.attn.q_norm.weight": torch.ones(64)}
        self.refused(write(tmp_path / "more.pt", state), "holds blocks.0.attn.q_norm.weight, which")

    def test_learned_positions(self, tmp_path: Path) -> None:
        state = random_state()
        state["pos_embed"] = state["pos_embed"] + 0.01
        self.refused(write(tmp_path / "p.pt", state), "must be DiT's sin-cos table .* 0.01 in .*")
        state["pos_embed"][0, 0, 0] = float("nan")
        self.refused(write(tmp_path / "p.pt", state), "must be DiT's sin-cos table")
        state["pos_embed"] = state["pos_embed"][:, :-1]
        self.refused(write(tmp_path / "p.pt", state), "must cover a square of patches, got 15")

    def test_positions_that_drifted_in_training_pass(self, tmp_path: Path) -> None:
        state = random_state()
        state["pos_embed"] = state["pos_embed"] * (1 + 1e-5)
        load_model(str(write(tmp_path / "ema.pt", state)))

    def test_widths_without_known_heads(self, tmp_path: Path) -> None:
        state = random_state()
        state["x_embedder.proj.weight"] = torch.ones(320, 4, 2, 2)
        self.refused(
            write(tmp_path / "w.pt", state),
            "hidden size must be one of 384, 768, 1024, 1152, got 320",
        )

    def test_wrong_shapes_and_dtypes(self, tmp_path: Path) -> None:
        state = random_state()
        bad = state | {"blocks.0.mlp.fc1.weight": torch.ones(7, WIDTH)}
        self.refused(
            write(tmp_path / "a.pt", bad), r"net.0.proj.weight must have shape \[1536, 384\]"
        )
        bad = state | {"blocks.0.attn.qkv.weight": torch.ones(7, WIDTH)}
        self.refused(write(tmp_path / "b.pt", bad), "qkv.weight must stack q, k and v, got 7 rows")
        bad = state | {"blocks.0.mlp.fc1.bias": torch.ones(4 * WIDTH, dtype=torch.int32)}
        self.refused(write(tmp_path / "c.pt", bad), "proj.bias must be floating-point, got .*int32")
        bad = state | {"pos_embed": torch.ones(16, WIDTH)}
        self.refused(write(tmp_path / "d.pt", bad), "pos_embed must have 3 dimensions")
