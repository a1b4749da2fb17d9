"""What the versions read."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from qdit.errors import InputError, StepError
from qdit.export.tensorrt.older_opset import OlderOpsetPass
from qdit.export.tensorrt.versions import TensorRtVersion, features


@pytest.mark.parametrize(
    ("text", "version"),
    [("8.6", (8, 6, 0)), ("10", (10, 0, 0)), ("10.16.1.11", (10, 16, 1)), ("11.4.0+a", (11, 4, 0))],
)
def test_versions_are_parsed(text: str, version: tuple[int, int, int]) -> None:
    assert TensorRtVersion.parse(text) == version


@pytest.mark.parametrize("text", ["", "ten", "8.x"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"must look like 8\.6, 10\.9 or 11, got"):
        TensorRtVersion.parse(text)


def test_older_versions_are_refused() -> None:
    with pytest.raises(InputError, match=r"8.6.0 or newer, got 8.5.3"):
        features(TensorRtVersion(8, 5, 3))


@pytest.mark.parametrize(
    ("version", "opset", "plugins"),
    [
        ("8.6", 17, False),
        ("10.0.1", 21, False),
        ("10.9", 21, True),
        ("10.15", 24, True),
        ("11", 24, True),
    ],
)
def test_what_grows_with_versions(version: str, opset: int, plugins: bool) -> None:
    found = features(TensorRtVersion.parse(version))
    assert (found.newest_opset, found.plugins) == (opset, plugins)


HEAD = '<ir_version: 8, opset_import: ["" : 18]>'


def older(text: str) -> ir.Model:
    model = ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(HEAD + text)))
    OlderOpsetPass()(model)
    return model


class TestOlderOpset:
    def test_split_names_its_sizes(self) -> None:
        model = older(
            "g (float[2, 7] x) => (float[2, 4] a, float[2, 3] b) "
            "{ a, b = Split<axis = 1, num_outputs = 2>(x) }"
        )
        proto = ir.to_proto(model)
        onnx.checker.check_model(proto, full_check=True)
        assert proto.opset_import[0].version == 17
        x = np.arange(14, dtype=np.float32).reshape(2, 7)
        session = onnxruntime.InferenceSession(proto.SerializeToString())
        left, right = session.run(None, {"x": x})
        np.testing.assert_array_equal(np.concatenate([left, right], axis=1), x)
        assert left.shape == (2, 4)

    def test_equal_splits_share_their_sizes(self) -> None:
        model = older(
            "g (float[2, 4] x) => (float[2, 2] a, float[2, 2] b, float[2, 2] c, float[2, 2] d) "
            "{ a, b = Split<axis = 1, num_outputs = 2>(x) "
            "c, d = Split<axis = 1, num_outputs = 2>(x) }"
        )
        assert list(model.graph.initializers) == ["split/2x2"]

    @pytest.mark.parametrize(("sizes", "kept"), [("{6, -1}", False), ("{0, 12}", True)])
    def test_allowzero_goes_where_it_means_nothing(self, sizes: str, kept: bool) -> None:
        model = older(
            f"g (float[2, 6] x) => (y) <int64[2] s = {sizes}> "
            "{ y = Reshape<allowzero = 1>(x, s) }"
        )
        assert ("allowzero" in model.graph[0].attributes) == kept

    @pytest.mark.parametrize(
        "node", ["ReduceMax(x)", "Pad(x, p, v)", "Mish(x)"], ids=["changed", "changed too", "new"]
    )
    def test_what_opset_18_changed_is_refused(self, node: str) -> None:
        with pytest.raises(StepError, match=r"opset 1[78]"):
            older(
                "g (float[2, 6] x) => (y) <int64[4] p = {0, 0, 0, 0}, float v = {0}> "
                f"{{ y = {node} }}"
            )

    def test_other_opsets_are_refused(self) -> None:
        model = ir.from_proto(
            onnx.parser.parse_model(
                '<ir_version: 8, opset_import: ["" : 21]> '
                "g (float[2] x) => (float[2] y) { y = Relu(x) }"
            )
        )
        with pytest.raises(Exception, match="expected opset 18, got 21"):
            OlderOpsetPass()(model)
