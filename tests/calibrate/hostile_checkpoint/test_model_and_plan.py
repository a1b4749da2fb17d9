"""A hostile description of the model: family, config, linears, plan, ties."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from qdit.calibrate import artifact_errors as errors
from qdit.errors import ArtifactError

Json = dict[str, Any]
Q0 = "transformer_blocks.0.attn1.to_q"
EMB0, EMB1 = (f"transformer_blocks.{block}.norm1.emb" for block in range(2))


@pytest.mark.usefixtures("nothing_mapped")
class TestModel:
    def test_an_unknown_family(self, victim: Any) -> None:
        manifest = victim.manifest
        manifest["model"]["family"] = "flux"
        victim.put_manifest(manifest)
        victim.refuse(errors.UnknownFamilyError, r"no model family 'flux'; the families are dit")

    def test_a_config_of_another_family(self, victim: Any) -> None:
        victim.change_config({"_class_name": "FluxTransformer2DModel"})
        victim.refuse(errors.InvalidConfigError, "is not one of family dit: _class_name is 'Flux")

    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            (
                {"num_layers": 10**9},
                r"num_layers must be at most \d+, for \d+ stored .* 1000000000",
            ),
            ({"num_layers": 513}, r"num_layers must be at most \d+"),
            ({"num_layers": 0}, "num_layers must be a positive integer, got 0"),
            ({"num_layers": -1}, "num_layers must be a positive integer, got -1"),
            ({"num_layers": "2"}, "num_layers must be a positive integer, got '2'"),
            ({"attention_head_dim": 2**40}, "cannot be built"),
            ({"num_attention_heads": 2**62}, "cannot be built"),
            ({"sample_size": 2**24}, "fixed tables may take 268435456 bytes, they take"),
            ({"sample_size": 2**62}, "cannot be built|fixed tables may take"),
            ({"patch_size": 3}, "patch_size must divide sample_size"),
            ({"norm_type": "layer_norm"}, "norm_type must be ada_norm_zero"),
        ],
        ids=lambda value: str(value) if isinstance(value, dict) else "",
    )
    def test_a_config_that_cannot_be_built(self, victim: Any, changes: Json, match: str) -> None:
        victim.change_config(changes)
        victim.refuse(errors.InvalidConfigError, match)

    @pytest.mark.parametrize(
        "changes",
        [
            {"num_layers": 1},
            {"num_layers": 3},
            {"attention_head_dim": 16},
            {"attention_head_dim": 2**20},
            {"attention_bias": False},
        ],
        ids=str,
    )
    def test_a_config_with_other_linears(self, victim: Any, changes: Json) -> None:
        victim.change_config(changes)
        victim.refuse(errors.ShapeMismatchError, r"lists .*, the config gives")

    @pytest.mark.parametrize(
        ("changes", "tensor"),
        [
            ({"num_embeds_ada_norm": 10**9}, r"embedding_table\.weight"),
            ({"num_embeds_ada_norm": 6}, r"embedding_table\.weight"),
            ({"patch_size": 4}, r"proj_out_2\.weight|pos_embed\.proj\.weight|proj_out_2\.bias"),
            ({"in_channels": 6}, r"pos_embed\.proj\.weight"),
            ({"out_channels": 3}, r"proj_out_2\.\w+"),
        ],
        ids=lambda value: str(value) if isinstance(value, dict) else "",
    )
    def test_a_config_with_other_parameters(self, victim: Any, changes: Json, tensor: str) -> None:
        victim.change_config(changes)
        victim.refuse(errors.ShapeMismatchError, rf"tensor .*({tensor}) must have shape .*config")

    @pytest.mark.parametrize("value", [10**12, -(10**12)])
    def test_a_scheduler_with_huge_tables(self, victim: Any, value: int) -> None:
        victim.change_config({"num_train_timesteps": value}, "scheduler_config")
        victim.refuse(errors.InvalidConfigError, "num_train_timesteps must be at most 1000000")

    @pytest.mark.parametrize(
        ("key", "value"), [("in_features", 999), ("out_features", 999), ("name", "x")]
    )
    def test_a_table_of_linears_that_lies(self, victim: Any, key: str, value: object) -> None:
        manifest = victim.manifest
        manifest["linears"][2][key] = value
        victim.put_manifest(manifest)
        victim.refuse(errors.ShapeMismatchError, r"lists the linear .*, the config gives")

    def test_a_table_of_linears_in_another_order(self, victim: Any) -> None:
        manifest = victim.manifest
        manifest["linears"].reverse()
        victim.put_manifest(manifest)
        victim.refuse(errors.ShapeMismatchError, r"lists the linear")


@pytest.mark.usefixtures("nothing_mapped")
class TestPlan:
    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (lambda plan: plan.update(version=2), "plan version must be 1, got 2"),
            (lambda plan: plan.update(extra=1), "a full plan must be a JSON object of version"),
            (lambda plan: plan.pop("bits"), "a full plan must be a JSON object of version"),
            (lambda plan: plan["layers"].pop(Q0), f"no scheme for linear {Q0}"),
            (lambda plan: plan["layers"].update(x={}), "names 'x', which is no quantizable"),
            (lambda plan: plan["layers"][Q0].update(weight_bits=5), "weight bits must be one of"),
            (lambda plan: plan["layers"][Q0].update(weight_bits=4.0), "weight bits must be one"),
            (lambda plan: plan["layers"][Q0].update(weight_group=64), "must divide the 36 input"),
            (lambda plan: plan["layers"][Q0].update(surprise=1), "unknown scheme key 'surprise'"),
            (
                lambda plan: plan["layers"]["transformer_blocks.0.norm1.linear"].update(
                    activation_bits=8
                ),
                "adaLN linears are quantized weight-only",
            ),
        ],
        ids=[
            "version",
            "extra key",
            "no bits",
            "missing layer",
            "unknown layer",
            "bits",
            "float bits",
            "group",
            "scheme key",
            "adaln",
        ],
    )
    def test_a_plan_that_does_not_fit(
        self, victim: Any, change: Callable[[Json], object], match: str
    ) -> None:
        manifest = victim.manifest
        change(manifest["plan"])
        victim.put_manifest(manifest)
        victim.refuse(errors.InvalidPlanError, match)

    @pytest.mark.parametrize(
        ("field", "value", "error", "match"),
        [
            ("weight_bits", 4, errors.ShapeMismatchError, rf"{Q0}\.weight\.packed must have shape"),
            ("weight_bits", 16, errors.MissingTensorError, rf"lacks the tensor {Q0}\.weight;"),
            ("weight_symmetric", True, errors.UnknownTensorError, rf"{Q0}\.weight\.zero_point"),
            ("scale_dtype", "float32", errors.WrongDtypeError, r"must be F32, got F16"),
        ],
        ids=["bits", "16 bits", "symmetry", "scale dtype"],
    )
    def test_a_plan_for_other_tensors(
        self,
        victim: Any,
        field: str,
        value: object,
        error: type[ArtifactError],
        match: str,
    ) -> None:
        manifest = victim.manifest
        scheme = manifest["plan"]["layers"][Q0] | {field: value}
        if scheme["weight_bits"] == 16:
            scheme["activation_bits"] = 16
        manifest["plan"]["layers"][Q0] = scheme
        victim.put_manifest(manifest)
        victim.refuse(error, match)


@pytest.mark.usefixtures("nothing_mapped")
class TestTies:
    @pytest.mark.parametrize(
        ("ties", "match"),
        [
            ({"nowhere": EMB0}, "the model has no such module"),
            ({EMB1: "nowhere"}, "the model has no such module"),
            ({EMB1: f"{EMB0}.__class__"}, "the model has no such module"),
            ({EMB1: "forward"}, "the model has no such module"),
            ({EMB1: f"{EMB0}.class_embedder.embedding_table.weight"}, "no such module"),
            ({"": EMB0}, "a path is empty"),
            ({EMB1: ""}, "a path is empty"),
            ({EMB0: EMB0}, "is tied itself"),
            ({EMB0: EMB1, EMB1: EMB0}, "is tied itself"),
            ({EMB1: f"{EMB1}.timestep_embedder"}, "overlaps a tied module"),
            ({f"{EMB1}.timestep_embedder": EMB1}, "overlaps a tied module"),
            ({EMB1: EMB0, f"{EMB1}.timestep_embedder": f"{EMB0}.timestep_embedder"}, "overlaps"),
            ({EMB1: "proj_out_1"}, "the modules differ"),
            ({"proj_out_1": "proj_out_2"}, "the modules differ"),
            (
                {"transformer_blocks.1": "transformer_blocks.0"},
                "a quantizable linear lies inside",
            ),
            (
                {"transformer_blocks.1.attn1.to_k": "transformer_blocks.0.attn1.to_k"},
                "a quantizable linear lies inside",
            ),
        ],
    )
    def test_an_impossible_tie(self, victim: Any, ties: dict[str, str], match: str) -> None:
        manifest = victim.manifest
        manifest["ties"] = ties
        victim.put_manifest(manifest)
        victim.refuse(errors.InvalidTieError, match)

    def test_a_tie_that_was_not_there_when_the_tensors_were_written(self, victim: Any) -> None:
        manifest = victim.manifest
        manifest["ties"] = {}
        victim.put_manifest(manifest)
        victim.refuse(errors.MissingTensorError, r"lacks the tensor transformer_blocks\.1\.norm1")
