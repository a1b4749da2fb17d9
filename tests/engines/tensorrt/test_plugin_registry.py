"""The plugins in TensorRT 11.4's real registry, driven through its plugin layer without a GPU."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest

from qdit.calibrate.plan import LinearSpec
from qdit.calibrate.quantizers import quantize_weight_nearest
from qdit.calibrate.schemes import LayerScheme
from qdit.engines.kernels.driver import Gpu
from qdit.engines.kernels.variants import QuantizeKind, Tile
from qdit.engines.tensorrt.plugin import register
from qdit.engines.tensorrt.plugin.numeric import numeric_launch, numeric_tactics
from qdit.engines.tensorrt.plugin.packing import Packing, kind_text
from qdit.engines.tensorrt.plugin.plugins import Plugin, plugin_of
from qdit.engines.tensorrt.plugin.ptx import capped, entry_parameters, newest_isa
from qdit.engines.tensorrt.plugin.register import plugins_digest, register_for
from qdit.engines.tensorrt.plugin.tactics import tactic_of, tile_of
from qdit.errors import InputError, StepError
from qdit.export.contents import LinearContents
from qdit.export.tensorrt.lower_plugin import LowerPluginPass
from qdit.export.tensorrt.plugin_nodes import (
    ALL_VARIANTS,
    NAMESPACE,
    RowsVariant,
)

from ...export.tensorrt.conftest import NEW, Traced, checkpoint_of
from . import shim
from .aot_driver import AotDriver, Sizes, Symbols, stood_in

H100 = Gpu(0, "NVIDIA H100", "sm_90a", 132, 227 << 10)
TOKENS, WIDTH, CHANNELS = 256, 1152, 3456
# M' is the rows of all images, rounded up
SYMBOLS: Symbols = {
    "batch": lambda batch: batch,
    "rows": lambda batch: -(-batch * TOKENS // 16) * 16,
}
SCHEMES = {
    "w4 g128": LayerScheme(4, 8, 128, 128),
    "w4 token integer": LayerScheme(4, 8, 128, "token", scale_format="integer"),
    "w8 asymmetric": LayerScheme(8, 8, 64, 128, False, False),
}


@pytest.fixture(scope="module")
def trt(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The real bindings of 11.4, with the plugins registered for an H100."""
    found = shim.parts()
    if isinstance(found, str):
        pytest.skip(found)
    with (
        pytest.MonkeyPatch.context() as patch,
        shim.installed(found, tmp_path_factory.mktemp("shim")) as bindings,
    ):
        patch.setenv("QDIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        register_for(H100, (8, 0))
        with stood_in(bindings):
            yield bindings


@dataclass(frozen=True)
class Case:
    """A plugin of one scheme with its inputs as a file has them."""

    plugin: Plugin
    kind: str
    shapes: dict[str, Sizes]

    def types(self, trt: Any) -> list[Any]:
        words = {"FP16": trt.float16, "FP32": trt.float32, "INT8": trt.int8}
        return [words[word] for word in self.plugin.types.split(",")[: len(self.shapes)]]

    def driver(self, trt: Any) -> AotDriver:
        shapes = list(self.shapes.values())
        return AotDriver(trt, self.plugin.name, self.kind, shapes, self.types(trt), SYMBOLS)

    def numbers(self, batch: int) -> dict[str, list[int]]:
        """The inputs' sizes at a batch."""
        return {
            name: [SYMBOLS[size](batch) if isinstance(size, str) else size for size in sizes]
            for name, sizes in self.shapes.items()
        }


def contents_of(scheme: LayerScheme) -> LinearContents:
    import torch

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(CHANNELS, WIDTH, generator=generator)
    spec = LinearSpec("l", "mlp_in", 0, WIDTH, CHANNELS, True, "l.input")
    quantized = quantize_weight_nearest(weight, scheme)
    return LinearContents(spec, scheme, None, lambda: quantized, lambda: weight)


def rows_case(scheme: LayerScheme) -> Case:
    kind = QuantizeKind.of(scheme, WIDTH)
    variant = RowsVariant(kind.asymmetric, kind.sum_group > 0)
    x: Sizes = ["batch", TOKENS, WIDTH]
    return Case(plugin_of(variant), kind_text(kind), {"x": x, "shift": x, "scale": x})


def product_case(scheme: LayerScheme) -> Case:
    """Shapes from the packing that files are written with; rows are those of the rows plugin."""
    operands = Packing().product(contents_of(scheme))
    layout = Packing().rows(scheme, WIDTH)
    weight, scale = list(operands.weight.shape), list(operands.scale.shape)

    def shape(operand: Any, otherwise: list[int]) -> list[int]:
        return otherwise if operand is None else list(operand.shape)

    asymmetric, sums = layout.variant.asymmetric, layout.variant.sums
    x: Sizes = ["batch", TOKENS, WIDTH]
    return Case(
        plugin_of(operands.variant),
        operands.kind,
        {
            "x": [layout.panels, "rows", 128],
            "token_scale": [layout.groups, "rows"],
            "token_sum": [layout.sums, "rows"] if sums else [1],
            "token_zero": [layout.groups, "rows"] if asymmetric else [1],
            "w": weight,
            "channel_scale": scale,
            "channel_zero": shape(operands.zero, scale),
            "channel_sum": shape(operands.total, scale),
            "multiplier": shape(operands.multiplier, weight),
            "bias": [CHANNELS],
            "residual": x,
            "gate": x,
        },
    )


def weight_only_case() -> Case:
    scheme = LayerScheme(4, 16, 64)
    operands = Packing().weight_only(contents_of(scheme))
    scale = list(operands.scale.shape)
    return Case(
        plugin_of(operands.variant),
        operands.kind,
        {
            "x": ["batch", WIDTH],
            "w": list(operands.weight.shape),
            "channel_scale": scale,
            "channel_zero": scale,
            "bias": [CHANNELS],
        },
    )


@pytest.mark.parametrize("variant", ALL_VARIANTS, ids=lambda variant: variant.name)
def test_the_registry_has_its_creator_and_its_one_field(trt: Any, variant: Any) -> None:
    creator = trt.get_plugin_registry().get_creator(variant.name, "1", NAMESPACE)
    assert creator is not None
    assert (creator.name, creator.plugin_version) == (variant.name, "1")
    assert [field.name for field in creator.field_names] == ["kind"]


def test_an_unknown_plugin_is_not_there(trt: Any) -> None:
    assert trt.get_plugin_registry().get_creator("GroupQuantNothing", "1", NAMESPACE) is None


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
class TestRows:
    def test_shapes_and_types_are_those_of_the_file(self, trt: Any, scheme: LayerScheme) -> None:
        driver = rows_case(scheme).driver(trt)
        layout = Packing().rows(scheme, WIDTH)
        assert driver.output_types == [trt.int8, trt.float32, trt.float32, trt.float32]
        for batch in (1, 3):
            rows = -(-batch * TOKENS // 16) * 16
            assert driver.outputs_at(batch) == [
                (layout.panels, rows, 128),
                (layout.groups, rows),
                (layout.groups, rows) if layout.variant.asymmetric else (1,),
                (layout.sums, rows) if layout.variant.sums else (1,),
            ]

    def test_the_launch_is_that_of_numbers(self, trt: Any, scheme: LayerScheme) -> None:
        check_launches(trt, rows_case(scheme), "qdit_quantize", batches=(1, 3, 32))


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
class TestProduct:
    def test_the_output_is_float16_with_the_bias_s_channels(
        self, trt: Any, scheme: LayerScheme
    ) -> None:
        driver = product_case(scheme).driver(trt)
        assert driver.output_types == [trt.float16]
        assert driver.outputs_at(5) == [(5, TOKENS, CHANNELS)]

    def test_the_launch_is_that_of_numbers(self, trt: Any, scheme: LayerScheme) -> None:
        check_launches(trt, product_case(scheme), "qdit_linear", batches=(1, 3, 32))

    def test_the_tactics_are_tiles_and_one_needs_no_more_than_48_kb(
        self, trt: Any, scheme: LayerScheme
    ) -> None:
        driver = product_case(scheme).driver(trt)
        assert len(driver.tactics) >= 2
        sizes = [driver.compile(tactic).shared_bytes(8) for tactic in driver.tactics]
        assert max(sizes) > 48 << 10
        assert min(sizes) <= 48 << 10


def test_a_weight_only_product(trt: Any) -> None:
    case = weight_only_case()
    driver = case.driver(trt)
    assert driver.outputs_at(3) == [(3, CHANNELS)]
    assert set(driver.tactics) == {8, 32}
    check_launches(trt, case, "qdit_weight_only", batches=(1, 3, 40))


def test_the_types_of_a_combination_are_the_file_s(trt: Any) -> None:
    """Nothing is offered but what a file has: TensorRT may not insert a conversion of packed
    weights."""
    case = product_case(SCHEMES["w4 g128"])
    driver = case.driver(trt)
    types = [desc.type for desc in driver.combinations]
    assert types == [*case.types(trt), trt.float16]
    assert {desc.format for desc in driver.combinations} == {trt.TensorFormat.LINEAR}


def check_launches(trt: Any, case: Case, entry: str, batches: tuple[int, ...]) -> None:
    """The real layer's kernel, PTX, grid, integers and order, against plain numbers."""
    driver = case.driver(trt)
    for tactic in driver.tactics:
        made = driver.compile(tactic)
        assert made.kernel == entry
        text = made.ptx.decode()
        assert re.search(r"^\.version 8\.0$", text, re.MULTILINE)
        assert re.search(r"^\.target sm_90a$", text, re.MULTILINE)
        inputs, scalars = len(case.shapes), len(made.arguments)
        found = entry_parameters(made.ptx, entry)
        assert found[:inputs] == ["u64"] * inputs
        assert {kind[1:] for kind in found[inputs : inputs + scalars]} == {"32"}
        assert found[inputs + scalars :] == ["u64"] * case.plugin.outputs
        for batch in batches:
            wanted = numeric_launch(case.plugin, case.numbers(batch), case.kind, tactic, H100)
            assert made.grid(batch) == (*wanted.grid, 1)
            assert made.threads(batch) == wanted.threads
            assert made.shared_bytes(batch) == wanted.shared_bytes
            assert made.scalars(batch) == wanted.scalars


def test_tactics_of_numbers_are_the_layer_s(trt: Any) -> None:
    case = product_case(SCHEMES["w4 g128"])
    driver = case.driver(trt)
    found = {
        tactic
        for batch in (8, 32)
        for tactic in numeric_tactics(case.plugin, case.numbers(batch), case.kind, H100)
    }
    assert set(driver.tactics) <= found


def test_every_node_of_a_file_has_a_plugin_that_takes_its_attributes(
    trt: Any, traced: Traced, tmp_path: Path
) -> None:
    """Op type, namespace, version and fields, as the parser looks them up."""
    checkpoint, contents = checkpoint_of(
        traced.model,
        LayerScheme(4, 8, 64, 64),
        attention_out=LayerScheme(8, 8, 64, 128, False, False),
    )
    path = tmp_path / "model.onnx"
    traced.write(contents, LowerPluginPass(contents, Packing(), "float16"), path, NEW, checkpoint)
    registry, seen = trt.get_plugin_registry(), set()
    for node in onnx.load(path).graph.node:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if "plugin_namespace" not in attributes:
            continue
        space, version = (
            attributes[key].decode() for key in ("plugin_namespace", "plugin_version")
        )
        creator = registry.get_creator(node.op_type, version, space)
        assert creator is not None, node.op_type
        assert {field.name for field in creator.field_names} <= set(attributes)
        assert attributes["aot"] == 1
        seen.add(node.op_type)
    assert len(seen) >= 5


class TestPtx:
    def test_a_newer_version_is_lowered_and_an_older_one_is_kept(self) -> None:
        text = b"//\n.version 9.3\n.target sm_90a\n\0"
        assert capped(text, (8, 7)) == b"//\n.version 8.7\n.target sm_90a\n"
        assert b".version 8.0\n" in capped(text, (7, 8))  # what the kernels are written in
        assert b".version 8.1\n" in capped(b".version 8.1\n", (9, 0))

    def test_what_is_no_ptx_is_refused(self) -> None:
        with pytest.raises(StepError, match=r"is no PTX"):
            capped(b"\x7fELF", (8, 0))
        with pytest.raises(StepError, match="has no entry other"):
            entry_parameters(b".visible .entry mine(.param .u64 a) {}", "other")

    def test_the_driver_s_version_says_which_ptx_it_takes(self) -> None:
        assert [newest_isa(v) for v in (12000, 12080, 13000, 13055)] == [
            (8, 0), (8, 7), (9, 0), (9, 2),
        ]  # fmt: skip
        with pytest.raises(StepError, match=r"CUDA 12\.0 or newer, got 11\.8"):
            newest_isa(11080)


def test_tactics_hold_whole_tiles() -> None:
    tiles = [Tile(256, 3, 8, 2, False), Tile(16, 1, 3), Tile(128, 2, 4, 0, True)]
    tiles.append(Tile(80, 3, 9, splits=3))
    for tile in tiles:
        assert tactic_of(tile) > 0
        assert tile_of(tactic_of(tile)) == tile
    with pytest.raises(InputError, match="tokens must be a multiple of 16"):
        tile_of(3)


def test_the_digest_follows_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    before = plugins_digest()
    assert before == plugins_digest()
    monkeypatch.setattr(register, "headers", lambda: {"ptx.cuh": "// changed"})
    assert plugins_digest() != before


def test_the_gpu_is_what_cuda_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the members of CUDA's own property structure, whatever torch was built for."""
    from cuda.bindings import runtime as real

    facts = real.cudaDeviceProp()
    facts.name, facts.major, facts.minor = b"NVIDIA H200".ljust(256, b"\0"), 9, 0
    facts.multiProcessorCount, facts.sharedMemPerBlockOptin = 132, 227 << 10
    fake = SimpleNamespace(
        cudaError_t=real.cudaError_t,
        cudaGetDevice=lambda: (real.cudaError_t.cudaSuccess, 0),
        cudaGetDeviceProperties=lambda _index: (real.cudaError_t.cudaSuccess, facts),
    )
    monkeypatch.setattr(register, "cuda_runtime", lambda: fake)
    assert register.current_gpu() == Gpu(0, "NVIDIA H200", "sm_90a", 132, 227 << 10)
    facts.major = 7
    with pytest.raises(InputError, match=r"8\.0 or newer, NVIDIA H200 has 7\.0"):
        register.current_gpu()
