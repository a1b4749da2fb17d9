"""The abstract trace: what it holds and what it leaves out."""

from __future__ import annotations

import json

import onnx_ir as ir
import pytest
import torch
from diffusers.models.embeddings import Timesteps
from torch import nn

from qdit.calibrate.checkpoint_model import empty_denoiser
from qdit.calibrate.model import DiffusionModel
from qdit.errors import StepError
from qdit.export.abstract import TabulatedTimesteps, tabulate_timesteps
from qdit.export.full_precision import skeleton_of
from qdit.export.trace import trace

from .conftest import Tracer


@pytest.fixture(scope="module")
def traced(small_model: DiffusionModel, tracer: Tracer) -> ir.Model:
    return tracer.abstract(skeleton_of(small_model), small_model)


def _nodes(model: ir.Model, op_type: str) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == op_type]


class TestTrace:
    def test_holds_one_abstract_node_a_linear_in_model_order(
        self, traced: ir.Model, small_model: DiffusionModel
    ) -> None:
        nodes = _nodes(traced, "GroupQuantLinear")
        names = [node.attributes["layer"].as_string() for node in nodes]
        assert names == [spec.name for spec in small_model.linears]
        assert {node.domain for node in nodes} == {"qdit"}
        for node, spec in zip(nodes, small_model.linears, strict=True):
            assert node.inputs[0].shape[-1] == spec.in_features
            assert node.outputs[0].shape[-1] == spec.out_features

    def test_linears_share_an_input_where_their_specs_say_so(
        self, traced: ir.Model, small_model: DiffusionModel
    ) -> None:
        inputs = {
            node.attributes["layer"].as_string(): node.inputs[0]
            for node in _nodes(traced, "GroupQuantLinear")
        }
        by_name: dict[str, set[int]] = {}
        for spec in small_model.linears:
            by_name.setdefault(spec.input_name, set()).add(id(inputs[spec.name]))
        assert all(len(values) == 1 for values in by_name.values())
        # the SiLU before adaLN is one value for all blocks
        assert len({id(v) for name, v in inputs.items() if name.endswith("norm1.linear")}) == 1

    def test_marks_every_block(self, traced: ir.Model) -> None:
        paths = [node.attributes["block"].as_string() for node in _nodes(traced, "BlockOutput")]
        assert paths == ["transformer_blocks.0", "transformer_blocks.1"]

    def test_computes_shared_modules_once(self, traced: ir.Model) -> None:
        counts = {op: len(_nodes(traced, op)) for op in ("Sin", "Cos", "Gather", "Gemm", "Sigmoid")}
        assert counts == {"Sin": 1, "Cos": 1, "Gather": 1, "Gemm": 3, "Sigmoid": 2}

    def test_holds_no_linears_weight(self, traced: ir.Model, small_model: DiffusionModel) -> None:
        names = set(traced.graph.initializers)
        for spec in small_model.linears:
            assert not {f"{spec.name}.weight", f"{spec.name}.bias"} & names
        largest = max(value.const_value.nbytes for value in traced.graph.initializers.values())
        assert largest <= 4 * 512 * 256  # proj_out_1

    def test_keeps_no_shape_computations_or_sequences(self, traced: ir.Model) -> None:
        kinds = {node.op_type for node in traced.graph}
        assert not kinds & {
            "Shape", "SequenceAt", "SplitToSequence", "Identity", "Constant", "Slice", "Einsum"
        }  # fmt: skip

    def test_names_are_unique_and_follow_the_modules(self, traced: ir.Model) -> None:
        nodes = [node.name for node in traced.graph]
        values = [value.name for node in traced.graph for value in node.outputs]
        assert len(set(nodes)) == len(nodes)
        assert len(set(values) | set(traced.graph.initializers)) == len(values) + len(
            traced.graph.initializers
        )
        assert "transformer_blocks.1.attn1/Softmax" in nodes
        assert "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1.weight" in (
            traced.graph.initializers
        )

    def test_carries_no_paths_of_this_machine(self, traced: ir.Model) -> None:
        text = json.dumps([dict(node.metadata_props) for node in traced.graph])
        assert set(text) <= set("[{}, ]")

    def test_needs_every_linear(self, small_model: DiffusionModel) -> None:
        class Unused(type(small_model.family)):  # type: ignore[misc]
            def forward(self, denoiser: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
                return (
                    inputs[0]
                    + denoiser.transformer_blocks[0]
                    .norm1.emb(inputs[1], inputs[2], hidden_dtype=torch.float32)
                    .mean()
                )

        skeleton = skeleton_of(small_model)
        with pytest.raises(StepError, match="must hold each of 14 linears once, got 0; missing"):
            trace(skeleton, Unused(), small_model.linears, dtype="float32", opset=21)

    def test_wraps_what_the_exporter_raises(self, small_model: DiffusionModel) -> None:
        class Broken(type(small_model.family)):  # type: ignore[misc]
            def forward(self, denoiser: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
                raise RuntimeError("no such layer")

        with pytest.raises(StepError, match="cannot trace this dit model for opset 21") as caught:
            trace(
                skeleton_of(small_model), Broken(), small_model.linears, dtype="float32", opset=21
            )
        assert caught.value.__cause__ is not None


class TestTabulatedTimesteps:
    @pytest.mark.parametrize("shift", [0, 1])
    @pytest.mark.parametrize("flip", [True, False])
    def test_equal_diffusers_to_the_bit(self, shift: int, flip: bool) -> None:
        original = Timesteps(256, flip_sin_to_cos=flip, downscale_freq_shift=shift)
        steps = torch.arange(1000)
        assert torch.equal(TabulatedTimesteps(original)(steps), original(steps))

    def test_scale(self) -> None:
        original = Timesteps(64, flip_sin_to_cos=True, downscale_freq_shift=0, scale=1000)
        steps = torch.arange(50)
        assert torch.equal(TabulatedTimesteps(original)(steps), original(steps))

    def test_stays_in_float32(self) -> None:
        module = TabulatedTimesteps(Timesteps(64, True, 1)).to(torch.float16)
        assert module(torch.arange(3)).dtype == torch.float32

    def test_replaces_a_shared_module_by_a_shared_one(self, small_model: DiffusionModel) -> None:
        ties = {"transformer_blocks.1.norm1.emb": "transformer_blocks.0.norm1.emb"}
        denoiser = empty_denoiser(small_model.family, small_model.config, ties)
        tabulate_timesteps(denoiser)
        blocks = small_model.family.blocks(denoiser)
        first, second = (block.norm1.emb.time_proj for block in blocks)
        assert first is second
        assert isinstance(first, TabulatedTimesteps)
