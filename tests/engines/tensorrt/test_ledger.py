"""Linears are found among an engine's layers, in the words that TensorRT's inspector uses."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from qdit.engines.tensorrt.ledger import (
    BY_KERNELS,
    HIDDEN,
    NOT_FOUND,
    Ledger,
    layers_of,
    make_ledger,
    with_kernels,
)
from qdit.engines.tensorrt.monitor import BuildPhases, heartbeat
from qdit.errors import ArtifactError
from qdit.progress import Silent

INT8 = {"block.q": {"precision": "INT8"}}


def layer(
    name: str, text: str = "", kind: str = "CaskGemmConvolution", **more: Any
) -> dict[str, Any]:
    inputs = [{"Name": "x", "Format/Datatype": text}] if text else []
    return {"Name": name, "LayerType": kind, "Inputs": inputs, **more}


@pytest.mark.parametrize(
    ("layers", "executed"),
    [
        ([layer("block.q/product", "Row major Int8 format")], "INT8"),
        ([layer("block.q/product", "Row major linear FP16 format")], "FP16"),
        ([layer("block.q/product", "Row major linear FP32")], "FP32"),
        ([layer("block.q.weight + block.q/product + gelu", "Channel major INT8 format")], "INT8"),
        # the tactic names the matrix unit even where the input is converted inside the kernel
        (
            [layer("block.q/product", "Row major linear FP16 format",
                   TacticName="sm80_xmma_gemm_i8i8_i8i32_f32_tn_n_tilesize128x128x64_stage3")],
            "INT8",
        ),
        # a reformat that names the product is not the product
        (
            [layer("Reformatting for block.q/product", "Row major linear FP32", "Reformat"),
             layer("block.q/product", "Row major Int8 format")],
            "INT8",
        ),
        # fused by Myelin: the ONNX nodes are in the metadata
        (
            [layer("__myl_FcAdd_0xabc", "Row major Int8 format", "gemm",
                   Metadata="[ONNX Layer: block.q/product]\x1e[ONNX Layer: block.q.output]")],
            "INT8",
        ),
        ([layer("block.q.output", "Row major Int8 format")], "INT8"),
        ([layer("block.q", kind="PluginV3")], "PLUGIN"),
        # other linears whose names start or end alike
        ([layer("block.q_norm/product", "Row major Int8 format"),
          layer("other.block.q/product", "Row major Int8 format")], NOT_FOUND),
        ([layer("{ForeignNode[block.a...block.z]}", kind="Myelin")], HIDDEN),
        # a region's formats are those of its ends, also where it starts or ends with the linear
        ([layer("{ForeignNode[block.q/product...z]}", "Row major linear FP32", "Myelin")], HIDDEN),
        ([layer("{ForeignNode[a...block.q/product]}", "Row major Int8 format", "Myelin",
                Metadata="[ONNX Layer: block.q/product]")], HIDDEN),
        ([layer("{ForeignNode[a...z]}", "Row major Int8 format", "ForeignNode")], HIDDEN),
        # a reformat into a region is no proof of a fallback
        ([layer("Reformatting CopyNode for Input Tensor 0 to {ForeignNode[block.q/product...z]}",
                "Row major linear FP32", "Reformat"),
          layer("{ForeignNode[block.q/product...z]}", "Row major linear FP32", "Myelin")], HIDDEN),
        ([layer("Reformatting for block.q/product", "FP32", "Reformat")], NOT_FOUND),
        # a layer that shows the linear proves it, whatever is hidden beside it
        ([layer("{ForeignNode[a...z]}", kind="Myelin"),
          layer("block.q/product", "Row major Int8 format")], "INT8"),
        ([], NOT_FOUND),
    ],
)  # fmt: skip
def test_a_linear_s_layer(layers: list[dict[str, Any]], executed: str) -> None:
    (row,) = make_ledger(INT8, layers).rows
    assert row.executed == executed
    assert row.fell_back == (executed in ("FP16", "FP32"))
    assert row.is_open == (executed in (HIDDEN, NOT_FOUND))


@pytest.mark.parametrize(
    ("regions", "place"),
    [
        (["{ForeignNode[a...z]}"], "{ForeignNode[a...z]}"),
        (["{ForeignNode[a...b]}", "{ForeignNode[c...block.q/product]}"],
         "{ForeignNode[c...block.q/product]}"),
        (["{ForeignNode[a...b]}", "{ForeignNode[block.q.output...z]}"],
         "{ForeignNode[block.q.output...z]}"),
        (["{ForeignNode[a...b]}", "{ForeignNode[c...z]}"], ""),  # in either
        # starts at the weight of it, or names another linear that starts alike
        (["{ForeignNode[block.q.weight...b]}", "{ForeignNode[c...z]}"], ""),
        (["{ForeignNode[block.q.0/product...b]}", "{ForeignNode[c...z]}"], ""),
        ([], ""),
    ],
)  # fmt: skip
def test_the_region_that_must_hold_a_hidden_linear(regions: list[str], place: str) -> None:
    (row,) = make_ledger(INT8, [layer(name, kind="Myelin") for name in regions]).rows
    assert (row.executed, row.layer) == (HIDDEN if regions else NOT_FOUND, place)


def test_int4_is_that_of_the_weights() -> None:
    linears = {"l": {"precision": "INT4"}}
    weights = {"Type": "Int4", "Count": 64}
    layers = [layer("l/product", "Row major linear FP16 format", Weights=weights)]
    (row,) = make_ledger(linears, layers).rows
    assert row.executed == "INT4"
    (other,) = make_ledger(linears, [layer("l/product", "FP16", Weights={"Type": "Half"})]).rows
    assert other.fell_back


def test_unquantized_linears_cannot_fall_back() -> None:
    (row,) = make_ledger({"l": {"precision": "FP16"}}, [layer("l/product", "FP32")]).rows
    assert not row.fell_back


def test_the_inspector_s_answer() -> None:
    layers = [layer("a", "FP16")]
    assert layers_of(json.dumps({"Layers": layers, "Bindings": []})) == layers
    with pytest.raises(ArtifactError, match="without detailed profiling verbosity"):
        layers_of(json.dumps({"Layers": ["a", "b"]}))
    with pytest.raises(ArtifactError, match="not readable"):
        layers_of("nothing")


def test_the_summary_counts() -> None:
    linears = {f"l{i}": {"precision": "INT8"} for i in range(3)}
    layers = [layer("l0/product", "Int8"), layer("l1/product", "FP16")]
    ledger: Ledger = make_ledger(linears, layers)
    assert ledger.summary == (
        "1 FP16, 1 INT8, 1 not found; 1 of 3 quantized linears unproved, 1 of the other 2 fell back"
    )
    proved = make_ledger({"l0": {"precision": "INT8"}}, layers)
    assert proved.summary == "1 INT8; 0 of 1 quantized linears fell back"


# q, k and v of one input, fc1 and fc2: four or three to five products
BLOCK = {
    name: {"precision": "INT8", "input": source}
    for name, source in (("q", "x"), ("k", "x"), ("v", "x"), ("fc1", "y"), ("fc2", "z"))
} | {"adaln": {"precision": "FP16", "input": "c"}}
REGION = "{ForeignNode[a...z]}"


@pytest.mark.parametrize(
    ("integer", "floats", "proved"),
    [
        (3, 4, True),  # q, k and v merged
        (4, 4, True),
        (5, 4, True),
        (5, 9, True),  # one each, whatever else there is
        (3, 5, False),  # one of q, k and v, and the other two in FP16
        (4, 5, False),
        (3, 3, False),  # fewer than the network needs: names that are not understood
        (2, 4, False),
        (6, 4, False),
        (0, 4, False),
    ],
)
def test_kernels_prove_what_leaves_no_other_choice(integer: int, floats: int, proved: bool) -> None:
    hidden = make_ledger(BLOCK, [layer(REGION, kind="Myelin")])
    found = with_kernels(hidden, BLOCK, integer=integer, floats=floats, least_floats=4)
    if not proved:
        assert found == hidden
        return
    *quantized, adaln = found.rows
    words = f"{integer} integer kernels launched for 5 linears, in {REGION}"
    assert {(row.executed, row.layer) for row in quantized} == {(BY_KERNELS, words)}
    assert adaln == hidden.rows[-1]
    assert not found.unproved and not found.fallbacks
    assert found.summary == "5 INT8 by kernels, 1 hidden; 0 of 5 quantized linears fell back"


def test_kernels_prove_nothing_where_the_file_or_a_layer_is_not_like_that() -> None:
    hidden = make_ledger(BLOCK, [layer(REGION, kind="Myelin")])
    assert with_kernels(hidden, BLOCK, integer=3, floats=4, least_floats=None) == hidden
    some = make_ledger(BLOCK, [layer(REGION, kind="Myelin"), layer("q/product", "FP16")])
    assert with_kernels(some, BLOCK, integer=4, floats=4, least_floats=4) == some
    shown = make_ledger(BLOCK, [layer(f"{name}/product", "Int8") for name in BLOCK])
    assert with_kernels(shown, BLOCK, integer=5, floats=4, least_floats=4) == shown


class Lines(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)


def test_the_time_left_is_that_of_the_outermost_phase() -> None:
    lines, now = Lines(), [0.0]
    phases = BuildPhases(lines, lambda: now[0])
    phases.start("Building", None, 10)
    phases.start("Tactics", "Building", 100)
    for step in range(3):
        now[0] += 20.0
        assert phases.step("Tactics", step)
        assert phases.step("Building", step)
    assert lines.said == [
        "TensorRT: Building, 10 steps",
        "TensorRT: Building 1/10, about 180 s left",
        "TensorRT: Building 2/10, about 160 s left",
        "TensorRT: Building 3/10, about 140 s left",
    ]
    phases.cancelled = True
    assert not phases.step("Building", 3)
    phases.finish("Tactics")
    phases.finish("Building")
    assert phases.phases == {}


def test_a_silent_build_is_said_to_go_on() -> None:
    lines = Lines()
    with heartbeat(lines, "tensorrt-int8", seconds=0.01):
        while len(lines.said) < 2:
            time.sleep(0.005)
    count = len(lines.said)
    assert lines.said[0] == "TensorRT: still building tensorrt-int8, 0 s so far"
    time.sleep(0.05)
    assert len(lines.said) == count  # it ends with the build
