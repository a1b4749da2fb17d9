"""MatMulNBits' weights for the CUDA provider: golden bytes, scales, zero points, integers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
import torch

from qdit.calibrate.plan import LinearSpec
from qdit.calibrate.quantizers import QuantizedWeight, quantize_weight_nearest
from qdit.calibrate.schemes import LayerScheme
from qdit.export.contents import LinearContents
from qdit.export.emit import Emitter
from qdit.export.onnxruntime.cuda_weight import emit_cuda_weight

SCHEME = LayerScheme(4, 16, 32)


def _emitted(
    quantized: QuantizedWeight, scheme: LayerScheme, block: int
) -> tuple[list[np.ndarray], dict[str, int]]:
    n, k = quantized.values.shape
    spec = LinearSpec("linear", "mlp_in", 0, k, n, False, "linear.input")
    contents = LinearContents(spec, scheme, None, lambda: quantized, lambda: torch.empty(0))
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 21})
    inputs, attributes = emit_cuda_weight(Emitter(graph), contents, block)
    return [value.const_value.numpy() for value in inputs], attributes  # type: ignore[union-attr]


def _integers(packed: np.ndarray, bits: int) -> np.ndarray:
    flat = packed.reshape(packed.shape[0], -1).astype(np.int32)
    if bits == 8:
        return flat
    return np.stack([flat & 15, flat >> 4], -1).reshape(packed.shape[0], -1)


def test_golden_bytes_of_four_bits() -> None:
    values = torch.zeros(1, 32, dtype=torch.int8)
    values[0, :4] = torch.tensor([-7, -1, 0, 7])
    quantized = QuantizedWeight(values, torch.tensor([[0.5]]), None, 4)
    (packed, scale), attributes = _emitted(quantized, SCHEME, 32)
    # shifted by 8: -7 → 1, -1 → 7, 0 → 8, 7 → 15; low nibbles first: 0x71, 0xf8, then zeros 0x88
    assert packed.tobytes() == b"\x71\xf8" + b"\x88" * 14
    assert packed.shape == (1, 1, 16)
    assert (scale.dtype, scale.tolist()) == (np.float16, [[0.5]])
    assert attributes == {"K": 32, "N": 1, "bits": 4, "block_size": 32}


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_hold_the_plans_weights(bits: int, symmetric: bool) -> None:
    """By the operator's own formula: (u - z) · s, z = 8 or 128 where there are no zero points."""
    torch.manual_seed(bits)
    scheme = replace(SCHEME, weight_bits=bits, weight_symmetric=symmetric, weight_group=64)
    quantized = quantize_weight_nearest(torch.randn(3, 192), scheme)
    (packed, scale, *zero_point), attributes = _emitted(quantized, scheme, 32)
    stored = attributes["bits"]
    assert stored == (4 if bits <= 4 else 8)
    assert packed.shape == (3, 6, 32 * stored // 8)
    assert scale.shape == (3, 6)
    if symmetric:
        assert zero_point == []
        zeros = np.full((3, 6), 1 << (stored - 1))
    else:
        (stored_zeros,) = zero_point
        zeros = _integers(stored_zeros, stored)[:, :6]
    blocks = _integers(packed, stored).reshape(3, 6, 32)
    made = (blocks - zeros[:, :, None]) * scale[:, :, None].astype(np.float32)
    # float16 scales of the plan are kept to the bit
    np.testing.assert_array_equal(made.reshape(3, 192), quantized.dequantize().numpy())


def test_integer_scales_are_rounded_to_float16() -> None:
    """s·m has up to 15 significant bits, float16 has 11: half a step is 2^-11 of the value."""
    torch.manual_seed(0)
    scheme = LayerScheme(4, 16, 32, scale_format="integer")
    quantized = quantize_weight_nearest(torch.randn(16, 256), scheme)
    (_, scale), _ = _emitted(quantized, scheme, 32)
    wanted = quantized.scale.numpy()
    assert not np.array_equal(scale, wanted)  # it would be exact, and this test for nothing
    assert (np.abs(scale - wanted) <= wanted * 2.0**-11).all()
