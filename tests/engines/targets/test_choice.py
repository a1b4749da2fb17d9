"""Which targets an export writes, by which plan, and what it refuses before any work."""

from __future__ import annotations

from typing import Any

import pytest

from qdit.calibrate.model import DiffusionModel
from qdit.calibrate.plan import QuantizationPlan, uniform_plan
from qdit.calibrate.schemes import LayerScheme
from qdit.engines.options import ExportOptions, build_options
from qdit.engines.targets.choice import choose, target_version
from qdit.engines.targets.job import check_engine
from qdit.engines.targets.options import TargetOptions
from qdit.errors import InputError

from ...export.conftest import make_small_model
from ..tensorrt.conftest import Fake

W4A8, W4A16 = LayerScheme(4, 8, 64, 64), LayerScheme(4, 16, 64)
W8A8 = LayerScheme(8, 8, "channel", "token")


@pytest.fixture(scope="module")
def model() -> DiffusionModel:
    return make_small_model(1)


def plan_of(model: DiffusionModel, scheme: LayerScheme) -> QuantizationPlan:
    return uniform_plan("custom", scheme, model.linears)


def options(**values: Any) -> TargetOptions:
    made: TargetOptions = build_options(ExportOptions, values)
    return made


class TestBest:
    """`tensorrt` is the target nearest to the plan that the version runs."""

    @pytest.mark.parametrize(
        ("scheme", "version", "best"),
        [
            (W4A8, "11", "tensorrt-plugin"),
            (W4A8, "10.9", "tensorrt-plugin"),
            (W4A16, "11", "tensorrt-int4"),
            (W4A16, "10", "tensorrt-int4"),
            (W8A8, "11", "tensorrt-plugin"),
            (W8A8, "10.8", "tensorrt-int8"),
            (W8A8, "8.6", "tensorrt-int8"),
            (W4A16, "8.6", "tensorrt-int8"),  # weight-only: float products of the very values
        ],
    )
    def test_it_is(
        self, model: DiffusionModel, scheme: LayerScheme, version: str, best: str
    ) -> None:
        wanted = options(target="tensorrt", tensorrt_version=version)
        choice = choose(wanted, plan_of(model, scheme), model.linears)
        assert choice.targets == (best,)
        assert choice.asked == {best: "tensorrt"}
        assert choice.plan == plan_of(model, scheme)
        assert any(best in note for note in choice.notes)

    def test_none_fits(self, model: DiffusionModel) -> None:
        wanted = options(target="tensorrt", tensorrt_version="8.6")
        with pytest.raises(InputError) as refused:
            choose(wanted, plan_of(model, W4A8), model.linears)
        text = str(refused.value)
        assert "no TensorRT target runs this plan" in text
        assert "needs TensorRT 10.9 or newer, got 8.6.0" in text
        assert "use --group-size channel" in text
        assert "--on-unsupported degrade" in text

    def test_degraded(self, model: DiffusionModel) -> None:
        wanted = options(target="tensorrt", tensorrt_version="8.6", on_unsupported="degrade")
        choice = choose(wanted, plan_of(model, W4A8), model.linears)
        assert choice.targets == ("tensorrt-int8",)
        assert not any(s.quantizes_activations for s in choice.plan.layers.values())
        assert any("linears w4 g64 · a8 g64 → w4 g64 · a16" in note for note in choice.notes)


def test_the_order_of_the_list_is_kept_and_the_reference_is_not_repeated(
    model: DiffusionModel,
) -> None:
    wanted = options(target="tensorrt-int8,qdq,tensorrt-plugin,tensorrt", tensorrt_version="11")
    choice = choose(wanted, plan_of(model, W8A8), model.linears)
    assert choice.targets == ("tensorrt-int8", "tensorrt-plugin")
    assert choice.needs_scales


def test_a_refusal_names_the_layer_the_reason_and_the_nearest_plan(model: DiffusionModel) -> None:
    with pytest.raises(InputError) as refused:
        choose(options(target="tensorrt-int4"), plan_of(model, W4A8), model.linears)
    text = str(refused.value)
    assert "target tensorrt-int4 cannot run transformer_blocks.0.attn1.to_q" in text
    assert "(and " in text
    assert "The nearest plan that it can run: " in text
    assert "linears w4 g64 · a8 g64 → w4 g64 · a16" in text


def test_targets_that_no_one_plan_fits_are_refused(model: DiffusionModel) -> None:
    """INT4 makes the layers weight-only of 4 bits; an 8-bit one would stay unquantized."""
    wanted = options(target="tensorrt-int8,tensorrt-int4", on_unsupported="degrade")
    choice = choose(wanted, plan_of(model, W8A8), model.linears)
    assert not any(s.quantizes_activations for s in choice.plan.layers.values())
    assert any("tensorrt-int4 cannot run the plan as given" in note for note in choice.notes)


def test_a_version_that_a_target_needs_is_no_matter_of_the_plan(model: DiffusionModel) -> None:
    wanted = options(target="tensorrt-plugin", tensorrt_version="10.8", on_unsupported="degrade")
    with pytest.raises(InputError, match=r"tensorrt-plugin needs TensorRT 10\.9 or newer"):
        choose(wanted, plan_of(model, W8A8), model.linears)


def test_the_version_is_the_installed_one(fake: Fake) -> None:
    assert target_version(options(target="tensorrt")) == fake.features.version
    asked = options(target="tensorrt", tensorrt_version="10.9")
    assert str(target_version(asked)) == "10.9.0"


def test_without_tensorrt_it_is_the_newest() -> None:
    assert target_version(options(target="tensorrt")).major == 11


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"target": "tensorrt-int9"},
            r"must be one of qdq, .*tensorrt, got 'tensorrt-int9'",
        ),
        ({"target": "tensorrt,tensorrt"}, "tensorrt is named twice"),
        ({"tensorrt_version": "7"}, r"TensorRT must be 8\.6\.0 or newer, got 7\.0\.0"),
        ({"tensorrt_version": "new"}, "must look like 8.6, 10.9 or 11, got 'new'"),
        ({"batch_profile": "4/2/1"}, "1 ≤ least ≤ best ≤ most, got 4/2/1"),
        ({"on_unsupported": "ignore"}, "on-unsupported"),
        ({"smooth": 1.5}, "smooth"),
        ({"optimization_level": 6}, "optimization-level"),
    ],
)
def test_bad_values_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_options(ExportOptions, values)


def test_numbers_of_a_config_file_are_versions() -> None:
    assert options(tensorrt_version=10).tensorrt_version == "10"
    assert options(tensorrt_version=8.6).tensorrt_version == "8.6"
    assert options(batch_profile=8).build_settings().batch.most == 8


@pytest.mark.parametrize(
    "flag", ["require_engine", "refit", "smooth", "tensorrt_version", "optimization_level"]
)
def test_a_flag_that_no_target_reads_is_refused(model: DiffusionModel, flag: str) -> None:
    value: Any = {"smooth": 0.5, "tensorrt_version": "10", "optimization_level": 3}.get(flag, True)
    with pytest.raises(InputError, match=f"--{flag.replace('_', '-')} is read by TensorRT targets"):
        choose(options(**{flag: value}), plan_of(model, W8A8), model.linears)


class TestRequireEngine:
    def test_without_tensorrt(self, model: DiffusionModel) -> None:
        wanted = options(target="tensorrt-int8", require_engine=True)
        choice = choose(wanted, plan_of(model, W8A8), model.linears)
        with pytest.raises(InputError, match=r"--require-engine: .*TensorRT is not installed"):
            check_engine(wanted, choice)

    def test_with_another_version(self, newest: Fake, model: DiffusionModel) -> None:
        wanted = options(target="tensorrt-int8", tensorrt_version="10", require_engine=True)
        choice = choose(wanted, plan_of(model, W8A8), model.linears)
        with pytest.raises(InputError, match=r"files are for TensorRT 10\.0\.0, and 11\.4\.0 is"):
            check_engine(wanted, choice)

    def test_with_tensorrt_and_a_gpu(self, newest: Fake, model: DiffusionModel) -> None:
        wanted = options(target="tensorrt-int8", require_engine=True)
        check_engine(wanted, choose(wanted, plan_of(model, W8A8), model.linears))


def test_weight_streaming_is_refused_before_any_work(model: DiffusionModel) -> None:
    wanted = options(target="tensorrt-int8", tensorrt_version="8.6", weight_streaming=True)
    choice = choose(wanted, plan_of(model, W8A8), model.linears)
    with pytest.raises(InputError, match="weight streaming needs TensorRT 10"):
        check_engine(wanted, choice)


def test_plugins_for_every_gpu_are_refused(model: DiffusionModel) -> None:
    wanted = options(target="tensorrt-plugin", tensorrt_version="11", hardware_compatible=True)
    choice = choose(wanted, plan_of(model, W4A8), model.linears)
    with pytest.raises(InputError, match="kernels of one GPU architecture"):
        check_engine(wanted, choice)
