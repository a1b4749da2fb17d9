"""The DiT family against diffusers' own module, which it describes and takes apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from qdit.calibrate.families import family_named
from qdit.calibrate.families.base import BlockInputs
from qdit.calibrate.quantizers import quantize_weight_nearest
from qdit.calibrate.schemes import LayerScheme
from qdit.calibrate.simulate import QuantizedInputLinear, install_quantized_linears, replace_linear
from qdit.errors import InputError

CONFIG: dict[str, Any] = {
    "_class_name": "DiTTransformer2DModel",
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 3,
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": 10,
}
FAMILY = family_named("dit")
BLOCK_LINEARS = [
    "norm1.linear",
    "attn1.to_q",
    "attn1.to_k",
    "attn1.to_v",
    "attn1.to_out.0",
    "ff.net.0.proj",
    "ff.net.2",
]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def make(**changes: Any) -> Any:
    torch.manual_seed(0)
    return FAMILY.build(CONFIG | changes)


def example(denoiser: nn.Module, batch: int = 3) -> tuple[torch.Tensor, ...]:
    return FAMILY.example_inputs(denoiser, batch, torch.Generator().manual_seed(1))


class TestForward:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_forward_and_blocks_are_diffusers_to_the_bit(self, dtype: torch.dtype) -> None:
        denoiser = make().to(dtype)
        x, timestep, label = example(denoiser)
        seen: list[torch.Tensor] = []
        for block in denoiser.transformer_blocks:
            block.register_forward_hook(lambda _module, _args, output: seen.append(output))
        denoiser.transformer_blocks[0].register_forward_pre_hook(
            lambda _module, args: seen.append(args[0])
        )
        expected = denoiser(x.to(dtype), timestep=timestep, class_labels=label).sample

        assert torch.equal(FAMILY.forward(denoiser, x, timestep, label), expected)
        assert expected.dtype == dtype
        state = FAMILY.before_blocks(denoiser, x, timestep, label)
        walked = [state.hidden_states]
        for block in FAMILY.blocks(denoiser):
            state = BlockInputs(FAMILY.run_block(block, state), state.shared)
            walked.append(state.hidden_states)
        assert len(walked) == 1 + CONFIG["num_layers"]
        for ours, theirs in zip(walked, seen[: len(walked)], strict=True):
            assert torch.equal(ours, theirs)

    def test_labels_are_never_dropped(self) -> None:
        denoiser = make()
        assert not any(module.training for module in denoiser.modules())
        x, timestep, _ = example(denoiser, batch=64)
        x, timestep = x[:1].expand_as(x), timestep[:1].expand_as(timestep)
        label = torch.full((64,), 3)
        rows = FAMILY.forward(denoiser, x, timestep, label)
        torch.testing.assert_close(rows, rows[:1].expand_as(rows))

    def test_noise_prediction_drops_a_learned_sigma(self) -> None:
        learned, plain = make(), make(out_channels=4)
        for denoiser in (learned, plain):
            output = FAMILY.forward(denoiser, *example(denoiser))
            assert torch.equal(FAMILY.noise_prediction(denoiser, output), output[:, :4])
            assert FAMILY.noise_prediction(denoiser, output).shape == (3, 4, 8, 8)

    def test_no_parameter_needs_a_gradient(self) -> None:
        assert not any(parameter.requires_grad for parameter in make().parameters())

    def test_inputs_name_and_shape_the_exported_inputs(self) -> None:
        denoiser = make()
        specs = FAMILY.inputs(denoiser)
        assert [spec.name for spec in specs] == ["hidden_states", "timestep", "class_labels"]
        for spec, tensor in zip(specs, example(denoiser), strict=True):
            assert tensor.dtype == spec.dtype
            assert tensor.shape == (3, *spec.shape)

    def test_null_label_is_the_row_after_the_classes(self) -> None:
        denoiser = make()
        assert (FAMILY.class_count(denoiser), FAMILY.null_label(denoiser)) == (10, 10)
        table = denoiser.transformer_blocks[0].norm1.emb.class_embedder.embedding_table
        assert table.num_embeddings == 11


class TestFrequencyShift:
    """Timestep frequencies: diffusers' (i/127) by default, the original DiT's (i/128) by config."""

    @pytest.mark.parametrize("shift", [0, 1])
    def test_the_config_decides_and_remembers(self, shift: int) -> None:
        denoiser = make(timestep_downscale_freq_shift=shift)
        assert denoiser.config["timestep_downscale_freq_shift"] == shift
        embedding = denoiser.transformer_blocks[-1].norm1.emb.time_proj(torch.tensor([7]))
        frequencies = 1e4 ** (-torch.arange(128, dtype=torch.float64) / (128 - shift))
        expected = torch.cat([(7 * frequencies).cos(), (7 * frequencies).sin()])
        # float32 phases up to 7: half an ulp of 7 is 2.4e-7
        torch.testing.assert_close(embedding[0].double(), expected, rtol=0, atol=2e-6)


class TestLinears:
    def test_order_inputs_and_sizes_are_those_of_a_real_run(self) -> None:
        denoiser = make()
        specs = FAMILY.linears(denoiser)
        ran: list[str] = []
        sources: dict[str, int] = {}
        kept: list[torch.Tensor] = []  # alive, so that no two inputs share an address

        def note(name: str) -> Any:
            def hook(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
                ran.append(name)
                sources[name] = args[0].data_ptr()
                kept.append(args[0])

            return hook

        for name, module in denoiser.named_modules():
            if isinstance(module, nn.Linear) and ".emb." not in name and "blocks" in name:
                module.register_forward_pre_hook(note(name))
        FAMILY.forward(denoiser, *example(denoiser))
        assert [spec.name for spec in specs] == ran
        for spec in specs:
            module = denoiser.get_submodule(spec.name)
            assert module.weight.shape == (spec.out_features, spec.in_features)
            assert (module.bias is not None) == spec.has_bias
            same = {other.name for other in specs if other.input_name == spec.input_name}
            assert same == {name for name in ran if sources[name] == sources[spec.name]}

    def test_roles_and_blocks(self) -> None:
        specs = FAMILY.linears(make())
        roles = ["adaln", *["attention_qkv"] * 3, "attention_out", "mlp_in", "mlp_out"]
        assert [spec.role for spec in specs] == roles * 3
        assert [spec.block for spec in specs] == [block for block in range(3) for _ in range(7)]
        names = [f"transformer_blocks.{block}.{n}" for block in range(3) for n in BLOCK_LINEARS]
        assert [spec.name for spec in specs] == names

    def test_attention_without_bias(self) -> None:
        denoiser = make(attention_bias=False)
        for spec in FAMILY.linears(denoiser):
            assert spec.has_bias == (denoiser.get_submodule(spec.name).bias is not None)

    def test_replaced_linears_and_the_meta_device_change_nothing(self) -> None:
        denoiser = make()
        specs = FAMILY.linears(denoiser)
        with torch.device("meta"):
            assert FAMILY.linears(FAMILY.build(CONFIG)) == specs
        scheme = LayerScheme(weight_group=32, activation_group=32)
        weights, schemes = {}, {}
        for spec in specs:
            linear = denoiser.get_submodule(spec.name)
            weights[spec.name] = quantize_weight_nearest(linear.weight, scheme)
            schemes[spec.name] = scheme.weight_only() if spec.role == "adaln" else scheme
        half = dict(list(weights.items())[:10])
        install_quantized_linears(denoiser, schemes, half)
        for spec in specs[10:]:
            linear = denoiser.get_submodule(spec.name)
            replace_linear(denoiser, spec.name, QuantizedInputLinear(schemes[spec.name], linear))
        assert FAMILY.linears(denoiser) == specs
        assert FAMILY.inputs(denoiser) == FAMILY.inputs(make())
        output = FAMILY.forward(denoiser, *example(denoiser))
        assert output.shape == (3, 8, 8, 8)
        assert output.isfinite().all()


class TestTying:
    def copy_embedder(self, denoiser: Any) -> None:
        first = denoiser.transformer_blocks[0].norm1.emb.state_dict()
        for block in denoiser.transformer_blocks:
            block.norm1.emb.load_state_dict(first)

    def test_equal_embedders_become_one_and_the_output_stays(self) -> None:
        denoiser = make()
        self.copy_embedder(denoiser)
        before = FAMILY.forward(denoiser, *example(denoiser))
        count = sum(p.numel() for p in denoiser.parameters())
        embedder = sum(p.numel() for p in denoiser.transformer_blocks[0].norm1.emb.parameters())
        FAMILY.tie_shared_modules(denoiser)
        assert len({id(block.norm1.emb) for block in denoiser.transformer_blocks}) == 1
        assert sum(p.numel() for p in denoiser.parameters()) == count - 2 * embedder
        assert torch.equal(FAMILY.forward(denoiser, *example(denoiser)), before)

    def test_one_different_value_keeps_them_apart(self) -> None:
        denoiser = make()
        self.copy_embedder(denoiser)
        denoiser.transformer_blocks[2].norm1.emb.class_embedder.embedding_table.weight[4, 0] += 1
        FAMILY.tie_shared_modules(denoiser)
        assert len({id(block.norm1.emb) for block in denoiser.transformer_blocks}) == 3

    def test_meta_embedders_are_tied(self) -> None:
        with torch.device("meta"):
            denoiser: Any = FAMILY.build(CONFIG)
        FAMILY.tie_shared_modules(denoiser)
        assert len({id(block.norm1.emb) for block in denoiser.transformer_blocks}) == 1


class TestBuild:
    def test_on_meta_only_the_parameters_are_meta(self) -> None:
        real = make()
        with torch.device("meta"):
            denoiser = FAMILY.build(CONFIG)
        assert all(parameter.is_meta for parameter in denoiser.parameters())
        buffers = dict(denoiser.named_buffers())
        assert buffers.keys() == dict(real.named_buffers()).keys()
        for name, buffer in real.named_buffers():
            assert torch.equal(buffers[name], buffer), name
        # so assigning the parameters completes it
        denoiser.load_state_dict(real.state_dict(), assign=True)
        inputs = example(real)
        assert torch.equal(FAMILY.forward(denoiser, *inputs), FAMILY.forward(real, *inputs))

    # Table 1 and section 4 of the paper: 33, 130, 458 and 675 million parameters
    @pytest.mark.parametrize(
        ("depth", "heads", "head_dim", "millions"),
        [(12, 6, 64, 33), (12, 12, 64, 130), (24, 16, 64, 458), (28, 16, 72, 675)],
        ids=["S/2", "B/2", "L/2", "XL/2"],
    )
    def test_published_parameter_counts(
        self, depth: int, heads: int, head_dim: int, millions: int
    ) -> None:
        shape = {
            "num_layers": depth,
            "num_attention_heads": heads,
            "attention_head_dim": head_dim,
            "sample_size": 32,
            "num_embeds_ada_norm": 1000,
        }
        with torch.device("meta"):
            denoiser = FAMILY.build(CONFIG | shape)
        FAMILY.tie_shared_modules(denoiser)
        count = sum(parameter.numel() for parameter in denoiser.parameters())
        assert round(count / 1e6) == millions

    def test_keep_blocks_keeps_the_first(self) -> None:
        denoiser = make()
        kept = list(denoiser.transformer_blocks[:2])
        FAMILY.keep_blocks(denoiser, 2)
        assert list(FAMILY.blocks(denoiser)) == kept
        assert denoiser.config["num_layers"] == 2
        assert len(FAMILY.linears(denoiser)) == 14

    @pytest.mark.parametrize("count", [0, 4, -1])
    def test_keep_blocks_refuses_other_counts(self, count: int) -> None:
        with pytest.raises(InputError, match=f"blocks must be between 1 and .* 3, got {count}"):
            FAMILY.keep_blocks(make(), count)

    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("num_layers", 0, "num_layers must be a positive integer, got 0"),
            ("patch_size", "2", "patch_size must be a positive integer, got '2'"),
            ("in_channels", True, "in_channels must be a positive integer, got True"),
            ("patch_size", 3, "patch_size must divide sample_size 8, got 3"),
            ("norm_type", "ada_norm_single", "norm_type must be ada_norm_zero"),
            ("activation_fn", "geglu", "activation_fn must be gelu-approximate or gelu"),
            ("out_channels", 5, "out_channels must be 4 or 8, got 5"),
            ("timestep_downscale_freq_shift", 2, "freq_shift must be 0 or 1, got 2"),
        ],
        ids=lambda value: str(value)[:24],
    )
    def test_configs_that_no_dit_has_are_refused(self, key: str, value: Any, message: str) -> None:
        with pytest.raises(InputError, match=message):
            FAMILY.build(CONFIG | {key: value})

    def test_keys_of_old_configs_are_left_out(self) -> None:
        old = {"_class_name": "Transformer2DModel", "num_vector_embeds": None, "dropout": 0.0}
        denoiser = FAMILY.build(CONFIG | old | {"norm_type": "ada_norm_zero"})
        assert "num_vector_embeds" not in denoiser.config

    def test_casting_logs_nothing(self, caplog: pytest.LogCaptureFixture) -> None:
        import logging

        logging.getLogger("diffusers").addHandler(caplog.handler)
        make().to(torch.float16)
        assert not caplog.records


@pytest.mark.parametrize("patch_size", [2, 4])
@pytest.mark.parametrize("out_channels", [4, 8], ids=["noise only", "learned sigma"])
def test_the_blocks_and_what_is_around_them_are_the_whole_model(
    patch_size: int, out_channels: int
) -> None:
    torch.manual_seed(0)
    denoiser = FAMILY.build(CONFIG | {"patch_size": patch_size, "out_channels": out_channels})
    for parameter in denoiser.parameters():
        parameter.data.normal_(std=0.1)
    FAMILY.tie_shared_modules(denoiser)
    inputs = FAMILY.example_inputs(denoiser, 3, torch.Generator().manual_seed(1))
    with torch.no_grad():
        state = FAMILY.before_blocks(denoiser, *inputs)
        for block in FAMILY.blocks(denoiser):
            state = BlockInputs(FAMILY.run_block(block, state), state.shared)
        assert torch.equal(FAMILY.after_blocks(denoiser, state), FAMILY.forward(denoiser, *inputs))
