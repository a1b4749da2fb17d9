"""What targets can express: the rules, the nearest plans, and the facts behind the rules."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from qdit.calibrate.plan import LinearSpec, QuantizationPlan, uniform_plan
from qdit.calibrate.quantizers import (
    QuantizedWeight,
    fake_quantize_activation,
    quantize_activation,
    quantize_weight_nearest,
)
from qdit.calibrate.schemes import GROUP_SIZES, PRESETS, LayerScheme, WeightGroup, preset_bits
from qdit.errors import InputError
from qdit.export.capabilities import (
    TARGETS,
    Refusal,
    built_targets,
    check,
    computed_plan,
    nearest_plan,
    realizations,
)
from qdit.export.onnxruntime.cuda_rules import cuda_block, realize_onnxruntime_cuda

_WIDTH = 1152


def _spec(in_features: int = _WIDTH, role: str = "mlp_in", name: str = "linear") -> LinearSpec:
    return LinearSpec(name, role, 0, in_features, 64, True, f"{name}.input")  # type: ignore[arg-type]


def _check(scheme: LayerScheme, target: str, in_features: int = _WIDTH) -> str | None:
    refusals = check(QuantizationPlan("custom", {"linear": scheme}), [_spec(in_features)], target)
    return refusals[0].reason if refusals else None


def _every_scheme() -> list[LayerScheme]:
    """All presets with all groups of K = 1152, both sides symmetric or not, both scale formats."""
    groups = [g for g in GROUP_SIZES if _WIDTH % g == 0]
    made = [
        LayerScheme(*preset_bits(preset), weight_group, activation_group, symmetric, symmetric)
        for preset, symmetric, weight_group, activation_group in itertools.product(
            PRESETS, (True, False), (*groups, "channel"), (32, 96, 128, "token")
        )
    ]
    return made + [
        replace(scheme, scale_format="integer")
        for scheme in made
        if scheme.weight_bits <= 4 and scheme.weight_symmetric and scheme.weight_group != "channel"
    ]


class TestRules:
    @pytest.mark.parametrize(
        ("target", "scheme", "reason"),
        [
            ("onnxruntime", {"activation_symmetric": False}, "symmetric activations only"),
            ("onnxruntime", {"activation_bits": 4}, "8 bits, not 4"),
            ("onnxruntime", {"activation_group": 96, "weight_group": 96}, "in groups of 32, finer"),
            ("onnxruntime", {"activation_group": "token"}, "of 128, finer than token"),
            ("onnxruntime", {"weight_group": 64}, "of 64, finer than 128"),
            ("onnxruntime", {"activation_group": 144, "weight_group": 144}, "no block of 32, 64"),
            ("onnxruntime-cuda", {}, "no product of quantized activations: they stay float16"),
            (
                "onnxruntime-cuda",
                {"weight_group": "channel", "activation_group": "token"},
                "no product of quantized activations",
            ),
            ("tensorrt-plugin", {"weight_group": 144}, "multiples of 32, got 144"),
            ("tensorrt-plugin", {"activation_group": 144}, "multiples of 32, got 144"),
            ("tensorrt-plugin", {"activation_bits": 16, "weight_group": 144}, "of 32, got 144"),
            ("tensorrt-int8", {}, "one scale a channel, got groups of 128"),
            ("tensorrt-int8", {"weight_group": "channel"}, "one scale a tensor, far coarser"),
            (
                "tensorrt-int8",
                {"weight_group": "channel", "activation_group": "token", "activation_bits": 4},
                "symmetric and have 8 bits",
            ),
            (
                "tensorrt-int8",
                {"weight_group": "channel", "weight_symmetric": False},
                "must be symmetric",
            ),
            ("tensorrt-int4", {}, "must stay at 16 bits"),
            ("tensorrt-int4", {"activation_bits": 16, "weight_bits": 8}, "4 bits at most, got 8"),
            ("tensorrt-int4", {"activation_bits": 16, "weight_group": 96}, "of 64, got 96"),
            (
                "tensorrt-int4",
                {"activation_bits": 16, "weight_symmetric": False},
                "must be symmetric",
            ),
        ],
    )
    def test_refuses_with_the_reason(
        self, target: str, scheme: dict[str, object], reason: str
    ) -> None:
        found = _check(replace(LayerScheme(), **scheme), target)  # type: ignore[arg-type]
        assert found is not None
        assert reason in found

    @pytest.mark.parametrize(
        ("target", "scheme"),
        [
            ("onnxruntime", {}),
            ("onnxruntime", {"weight_group": 384, "activation_group": 128}),
            ("onnxruntime", {"weight_group": "channel", "activation_group": "token"}),
            ("onnxruntime", {"activation_group": "token", "scale_format": "integer"}),
            ("onnxruntime", {"scale_format": "integer"}),
            ("tensorrt-plugin", {"activation_group": "token", "scale_format": "integer"}),
            ("tensorrt-int8", {"activation_bits": 16, "scale_format": "integer"}),
            ("tensorrt-int4", {"activation_bits": 16, "scale_format": "integer"}),
            ("onnxruntime", {"activation_bits": 16, "weight_group": 96}),
            ("onnxruntime-cuda", {"activation_bits": 16}),
            ("onnxruntime-cuda", {"activation_bits": 16, "weight_group": 144}),
            ("onnxruntime-cuda", {"activation_bits": 16, "scale_format": "integer"}),
            ("tensorrt-plugin", {"weight_group": 96, "activation_group": "token"}),
            ("tensorrt-plugin", {"activation_bits": 4, "activation_symmetric": False}),
            ("tensorrt-int8", {"activation_bits": 16, "weight_group": "channel"}),
            ("tensorrt-int8", {"activation_bits": 16, "weight_symmetric": False}),
            ("tensorrt-int8", {"weight_group": "channel", "activation_group": "token"}),
            ("tensorrt-int8", {"activation_group": "token", "scale_format": "integer"}),
            ("tensorrt-int4", {"activation_bits": 16, "weight_group": 192}),
            ("tensorrt-int4", {"activation_bits": 16, "weight_group": "channel"}),
        ],
    )
    def test_keeps_what_fits(self, target: str, scheme: dict[str, object]) -> None:
        assert _check(replace(LayerScheme(), **scheme), target) is None  # type: ignore[arg-type]

    def test_qdq_takes_every_scheme(self) -> None:
        assert all(_check(scheme, "qdq") is None for scheme in _every_scheme())

    def test_every_target_takes_an_unquantized_plan(self) -> None:
        scheme = LayerScheme(weight_bits=16, activation_bits=16)
        assert [_check(scheme, target) for target in TARGETS] == [None] * len(TARGETS)

    def test_refusals_name_their_layers_in_model_order(self) -> None:
        linears = [_spec(name="b"), _spec(role="adaln", name="a"), _spec(name="c")]
        plan = uniform_plan("w4a8", LayerScheme(activation_symmetric=False), linears)
        refusals = check(plan, linears, "onnxruntime")
        assert refusals == [
            Refusal("b", "its integer products take symmetric activations only"),
            Refusal("c", "its integer products take symmetric activations only"),
        ]

    def test_old_runtimes_are_refused(self) -> None:
        plan = QuantizationPlan("w4a8", {"linear": LayerScheme()})
        assert check(plan, [_spec()], "tensorrt-plugin", "10.9") == []
        (refusal,) = check(plan, [_spec()], "tensorrt-plugin", "8.6.0")
        assert refusal.reason == "tensorrt-plugin needs TensorRT 10.9 or newer, got 8.6.0"

    def test_unknown_targets_and_versions_are_refused(self) -> None:
        plan = QuantizationPlan("w4a8", {"linear": LayerScheme()})
        with pytest.raises(
            InputError, match=r"target must be one of qdq, onnxruntime, .*'openvino'"
        ):
            check(plan, [_spec()], "openvino")
        with pytest.raises(InputError, match=r"a version must look like 10\.9"):
            check(plan, [_spec()], "qdq", "new")


class TestRealizations:
    """What a target that writes every plan makes of a linear."""

    def test_the_cuda_provider_leaves_activations_unquantized(self) -> None:
        for scheme in _every_scheme():
            plan = QuantizationPlan("custom", {"linear": scheme})
            made = realizations(plan, [_spec()], "onnxruntime-cuda")["linear"]
            assert made.scheme == scheme.weight_only()
            assert bool(made.reason) == scheme.quantizes_activations
            assert made.is_native()

    @pytest.mark.parametrize(
        ("group", "block"),
        [(32, 32), (64, 64), (96, 32), (128, 128), (144, None), (192, 64), (256, 128),
         (384, 128), ("channel", 128)],
    )  # fmt: skip
    def test_its_blocks_divide_the_weight_groups(
        self, group: WeightGroup, block: int | None
    ) -> None:
        scheme = LayerScheme(weight_group=group)
        assert cuda_block(_spec(), scheme) == block
        form = realize_onnxruntime_cuda(_spec(), scheme).form
        assert form == ("dequantized" if block is None else "nbits-float16")

    @pytest.mark.parametrize("target", ["qdq", "onnxruntime"])
    def test_every_scheme_becomes_something_no_coarser(self, target: str) -> None:
        for scheme in _every_scheme():
            plan = QuantizationPlan("custom", {"linear": scheme})
            made = realizations(plan, [_spec()], target)["linear"]
            assert replace(made.scheme, activation_group=scheme.activation_group) == scheme, (
                "only activation groups may change"
            )
            assert made.scheme.activation_group_size(_WIDTH) <= (
                scheme.activation_group_size(_WIDTH)
            )
            assert bool(made.reason) == (
                not made.is_exact(scheme) or (target == "onnxruntime" and not made.is_native())
            )

    def test_the_computed_plan_is_the_plan_but_for_finer_activations(self) -> None:
        linears = [_spec(name="a"), _spec(name="b")]
        finer = replace(LayerScheme(), activation_group=96, weight_group=96)
        plan = QuantizationPlan("custom", {"a": LayerScheme(), "b": finer})
        assert computed_plan(plan, linears, "qdq") is plan
        computed = computed_plan(plan, linears, "onnxruntime")
        assert computed["a"] == LayerScheme()
        assert computed["b"] == replace(finer, activation_group=32)

    def test_targets_that_refuse_have_none(self) -> None:
        plan = QuantizationPlan("w4a8", {"linear": LayerScheme()})
        with pytest.raises(InputError, match="tensorrt-int4 does not write every plan"):
            realizations(plan, [_spec()], "tensorrt-int4")

    def test_built_targets_start_with_the_reference(self) -> None:
        assert built_targets()[:2] == ("qdq", "onnxruntime")


class TestNearestPlans:
    @pytest.mark.parametrize("target", TARGETS)
    def test_are_expressible_and_never_less_precise(self, target: str) -> None:
        for scheme in _every_scheme():
            plan = QuantizationPlan("custom", {"linear": scheme})
            made = nearest_plan(plan, [_spec()], target)["linear"]
            assert _check(made, target) is None, scheme
            assert made.weight_bits >= scheme.weight_bits
            assert made.activation_bits >= scheme.activation_bits
            if made.quantizes_weights:
                assert made.weight_group_size(_WIDTH) <= scheme.weight_group_size(_WIDTH)
            if made.quantizes_activations:
                assert made.activation_group_size(_WIDTH) <= scheme.activation_group_size(_WIDTH)

    @pytest.mark.parametrize(
        ("target", "given", "wanted"),
        [
            ("onnxruntime", {"activation_symmetric": False}, {}),
            ("onnxruntime", {"activation_group": 96, "weight_group": 96},
             {"activation_group": 32, "weight_group": 96}),
            ("onnxruntime", {"activation_bits": 4}, {}),
            ("onnxruntime-cuda", {}, {"activation_bits": 16}),
            ("onnxruntime", {"activation_group": "token"}, {}),
            ("tensorrt-plugin", {"weight_group": 144, "activation_group": "token"},
             {"weight_group": 128, "activation_group": "token"}),
            ("tensorrt-int4", {"weight_group": 96}, {"weight_group": 64, "activation_bits": 16}),
            ("tensorrt-int4", {"weight_bits": 8}, {"weight_bits": 16, "activation_bits": 16}),
            ("tensorrt-int8", {"scale_format": "integer"},
             {"scale_format": "integer", "activation_bits": 16}),
            ("tensorrt-int8", {}, {"activation_bits": 16}),
            ("tensorrt-int8", {"weight_group": "channel", "activation_group": "token",
                               "activation_bits": 4, "weight_symmetric": False},
             {"weight_group": "channel", "activation_group": "token"}),
            ("onnxruntime", {"activation_symmetric": False, "scale_format": "integer"},
             {"scale_format": "integer"}),
        ],
    )  # fmt: skip
    def test_change_as_little_as_they_can(
        self, target: str, given: dict[str, object], wanted: dict[str, object]
    ) -> None:
        plan = QuantizationPlan("w4a8", {"linear": replace(LayerScheme(), **given)})  # type: ignore[arg-type]
        made = nearest_plan(plan, [_spec()], target)
        assert made["linear"] == replace(LayerScheme(), **wanted)  # type: ignore[arg-type]
        assert made.bits == "custom"

    def test_keep_a_plan_that_fits(self) -> None:
        plan = QuantizationPlan("w4a8", {"linear": LayerScheme()})
        assert nearest_plan(plan, [_spec()], "onnxruntime") is plan

    def test_leave_other_layers_alone(self) -> None:
        linears = [_spec(name="a"), _spec(role="adaln", name="b")]
        plan = uniform_plan("w4a8", LayerScheme(activation_symmetric=False), linears)
        made = nearest_plan(plan, linears, "onnxruntime")
        assert made["b"] == plan["b"]
        assert made["a"] != plan["a"]


class TestOnnxRuntimeFacts:
    """The operators that the `onnxruntime` rules count on, against the torch simulation."""

    @pytest.mark.parametrize("block", [16, 32, 64, 128, 256])
    @pytest.mark.parametrize("bits", [4, 8])
    @pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
    def test_matmulnbits_at_level_4_is_dynamic_symmetric_groupwise(
        self, block: int, bits: int, symmetric: bool
    ) -> None:
        group = max(block, 32)  # schemes start at 32; a block of 16 repeats the scales
        scheme = LayerScheme(bits, 8, group, group, symmetric, True)
        torch.manual_seed(block)
        quantized = quantize_weight_nearest(torch.randn(96, 512), scheme)
        x = torch.randn(200, 512)
        activations = fake_quantize_activation(x, scheme)
        if block != group:
            activations = _quantized_in_blocks(x, block)
        wanted = activations @ quantized.dequantize().T
        made = _matmul_nbits(x, quantized, block, bits, level=4)
        errors = torch.linalg.norm(made - wanted, dim=1) / torch.linalg.norm(wanted, dim=1)
        # products and sums of 512 terms in another order; a row in a thousand or so differs by a
        # rounding flip (docs/targets.md)
        assert (errors > 1e-6).float().mean() <= 0.02
        assert errors.max() <= 1 / 127

    @pytest.mark.parametrize("group", [96, 192, 288])
    def test_weight_only_groups_repeat_their_scales(self, group: int) -> None:
        block = {96: 32, 192: 64, 288: 32}[group]
        scheme = LayerScheme(4, 16, group)
        quantized = quantize_weight_nearest(torch.randn(64, _WIDTH), scheme)
        x = torch.randn(5, _WIDTH)
        wanted = x @ quantized.dequantize().T
        made = _matmul_nbits(x, quantized, block, 4, level=1)
        assert torch.linalg.norm(made - wanted) <= 1e-6 * torch.linalg.norm(wanted)

    @pytest.mark.parametrize(
        "scheme",
        [
            LayerScheme(8, 8, "channel", "token"),
            LayerScheme(4, 8, 64, "token", scale_format="integer"),
            LayerScheme(3, 8, 32, "token", scale_dtype="float32", scale_format="integer"),
        ],
        ids=["channel", "integer scales", "3 bits, integer scales"],
    )
    def test_token_scales_follow_one_integer_sum(self, scheme: LayerScheme) -> None:
        quantized = quantize_weight_nearest(torch.randn(64, 256), scheme)
        weight, weight_scale = quantized.values, quantized.scale
        if scheme.has_integer_scales:
            weight, weight_scale = quantized.int8_values(), quantized.channel_scale
        x = torch.randn(9, 256)
        integers, scale, _ = quantize_activation(x, scheme)
        node = helper.make_node("MatMulInteger", ["a", "b", "za"], ["y"])
        sums = _run(
            [node],
            {
                "a": (integers[:, 0] + 128).to(torch.uint8).numpy(),
                "b": weight.T.contiguous().numpy(),
                "za": np.array(128, np.uint8),
            },
        )
        made = torch.from_numpy(sums) * scale[:, 0] * weight_scale[:, 0]
        wanted = fake_quantize_activation(x, scheme) @ quantized.dequantize().T
        assert torch.linalg.norm(made - wanted) <= 1e-6 * torch.linalg.norm(wanted)


def _quantized_in_blocks(x: torch.Tensor, block: int) -> torch.Tensor:
    groups = x.reshape(x.shape[0], -1, block)
    scale = groups.abs().amax(-1, keepdim=True) / 127
    return (torch.round(groups / scale) * scale).reshape(x.shape)


def _matmul_nbits(
    x: torch.Tensor, quantized: QuantizedWeight, block: int, bits: int, level: int
) -> torch.Tensor:
    """com.microsoft.MatMulNBits on weights whose scales are repeated down to `block`."""
    n, k = quantized.values.shape
    repeat = quantized.group_size // block
    offset = 0 if quantized.zero_point is not None else 1 << (bits - 1)
    values = (quantized.values.int() + offset).to(torch.uint8).reshape(n, k // block, block)
    tensors = {
        "a": x.numpy(),
        "b": _packed(values, bits).numpy(),
        "scales": quantized.scale.repeat_interleave(repeat, 1).flatten().numpy(),
    }
    if quantized.zero_point is not None:
        zero_points = quantized.zero_point.repeat_interleave(repeat, 1)
        tensors["zero_points"] = _packed(zero_points, bits).flatten().numpy()
    node = helper.make_node(
        "MatMulNBits", list(tensors), ["y"], domain="com.microsoft",
        K=k, N=n, bits=bits, block_size=block, accuracy_level=level,
    )  # fmt: skip
    return torch.from_numpy(_run([node], tensors))


def _packed(values: torch.Tensor, bits: int) -> torch.Tensor:
    if bits == 8:
        return values
    if values.shape[-1] % 2:
        values = torch.nn.functional.pad(values, (0, 1))
    return values[..., 0::2] | (values[..., 1::2] << 4)


def _run(nodes: list[onnx.NodeProto], tensors: dict[str, np.ndarray]) -> np.ndarray:
    first = next(iter(tensors))
    dtype = helper.np_dtype_to_tensor_dtype(tensors[first].dtype)
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(first, dtype, tensors[first].shape)],
        [helper.make_tensor_value_info(
            "y", TensorProto.INT32 if dtype == TensorProto.UINT8 else TensorProto.FLOAT, None
        )],
        [numpy_helper.from_array(a, name) for name, a in tensors.items() if name != first],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    (y,) = session.run(None, {first: tensors[first]})
    return y
