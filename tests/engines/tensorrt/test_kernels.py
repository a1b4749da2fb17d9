"""Products are told by kernel names; the names are those of engines of TensorRT 8.6 on an H200."""

from __future__ import annotations

from pathlib import Path

import pytest

from qdit.engines.tensorrt.kernels import float_products, integer_products
from qdit.engines.tensorrt.linears import least_float_products

ATTENTION = "sm80_xmma_gemm_f32f32_f32f32_f32_tn_n_tilesize256x128x8_stage3_warpsize4x2x1_ffma"
LINEAR = "sm90_xmma_gemm_i8f32_i8i32_f32_tn_n_tilesize64x128x128_cgasize1x2x1_execute_segment"
GELU = "sm80_xmma_fprop_implicit_gemm_interleaved_i8i8_i8i32_f32_nchw_vect_c_32kcrs_vect_c_32"


@pytest.mark.parametrize(
    ("name", "integer", "floats"),
    [
        (LINEAR, 1, 0),
        (GELU, 1, 0),
        (ATTENTION, 0, 1),
        ("sm80_xmma_gemm_f16f16_f16f16_f16_nn_n_tilesize64x128x32_stage5_tensor16x8x16", 0, 1),
        ("sm50_xmma_cublas_smallN_NN_f32f32_f32_f32_nn_n_thread_count256", 0, 1),
        ("mha3", 0, 2),  # q·k and the product with v
        # of a product that was split along K, the launch before counts
        ("sm80_xmma_gemm_f32f32_f32f32_f32_nn_n_tilesize32x32x8_execute_split_k_kernel_trt", 0, 0),
        # 'cuInt8' is a converter of layouts, and this one is from float to half
        ("_ZN6cuInt810nchwTonhwcIfLi32ELi4ELi2EEEvPKT_P6__halfiiiiiiii", 0, 0),
        ("__myl_bb0_10_ResResAddAddSqrDivMulMulAddResMulAddMulMinMaxRouCas_com_vec", 0, 0),
        ("generatedNativePointwise", 0, 0),
    ],
)
def test_products_by_name(name: str, integer: int, floats: int) -> None:
    assert (integer_products({name: 3}), float_products({name: 3})) == (3 * integer, 3 * floats)


def test_the_float_products_that_a_file_needs(int8_files: dict[bool, Path], tmp_path: Path) -> None:
    import onnx

    model = onnx.load(int8_files[False])
    kinds = [node.op_type for node in model.graph.node]
    # by hand: the patches' Conv, two of the timestep, adaLN's of the block and of the end (one
    # input, merged), attention's two, and the last linear; the six quantized ones are left out
    assert (kinds.count("Conv"), kinds.count("Gemm"), kinds.count("MatMul")) == (1, 3, 10)
    assert least_float_products(int8_files[False]) == 1 + 2 + 1 + 2 + 1
    model.graph.node[0].op_type = "Einsum"
    onnx.save(model, tmp_path / "other.onnx")
    assert least_float_products(tmp_path / "other.onnx") is None
