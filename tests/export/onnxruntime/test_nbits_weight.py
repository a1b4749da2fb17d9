"""MatMulNBits' weights: golden bytes, and blocks that are turned around."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch

from qdit.calibrate.plan import LinearSpec
from qdit.calibrate.quantizers import QuantizedWeight, quantize_weight_nearest
from qdit.calibrate.schemes import LayerScheme
from qdit.export.contents import LinearContents
from qdit.export.emit import Emitter
from qdit.export.onnxruntime.nbits_weight import emit_nbits_weight, pack
from qdit.export.onnxruntime.rows import block_signs

SCHEME = LayerScheme(4, 8, 32, 32)


def _arrays(quantized: QuantizedWeight, scheme: LayerScheme, turned: bool) -> list[np.ndarray]:
    n, k = quantized.values.shape
    spec = LinearSpec("linear", "mlp_in", 0, k, n, False, "linear.input")
    contents = LinearContents(spec, scheme, None, lambda: quantized, lambda: torch.empty(0))
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 21})
    inputs, attributes = emit_nbits_weight(Emitter(graph), contents, 32, turned=turned)
    assert attributes["block_size"] == 32
    return [value.const_value.numpy() for value in inputs]  # type: ignore[union-attr]


def test_the_first_integer_is_in_the_low_nibble() -> None:
    # 1, 2 → 0x21; 15 and the padding 0 → 0x0F
    packed = pack(torch.tensor([1, 2, 15], dtype=torch.uint8), 4)
    assert packed.numpy().tobytes() == b"\x21\x0f"


def test_signs_are_the_thue_morse_sequence() -> None:
    assert block_signs(8).tolist() == [1, -1, -1, 1, -1, 1, 1, -1]


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_turned_blocks_are_the_negated_weight(bits: int, symmetric: bool) -> None:
    torch.manual_seed(bits)
    scheme = LayerScheme(bits, 8, 32, 32, symmetric, True)
    quantized = quantize_weight_nearest(torch.randn(3, 128), scheme)
    stored = 4 if bits <= 4 else 8
    values, scale, zero_point = _arrays(quantized, scheme, turned=True)
    integers, zeros = (_unpacked(array, stored) for array in (values, zero_point))
    made = (integers.reshape(3, 4, 32) - zeros[:, :4, None]) * scale[:, :, None]
    wanted = quantized.dequantize().numpy().reshape(3, 4, 32) * block_signs(4)[:, None]
    np.testing.assert_array_equal(made.astype(np.float32), wanted)


def _unpacked(array: np.ndarray, bits: int) -> np.ndarray:
    flat = array.reshape(array.shape[0], -1).astype(np.float32)
    if bits == 8:
        return flat
    high = np.floor(flat / 16)
    return np.stack([flat - 16 * high, high], -1).reshape(array.shape[0], -1)
