"""Which ONNX operators TensorRT's parser imports, by version.

Source: the table 'Supported ONNX Operators' of github onnx/onnx-tensorrt, docs/operators.md, as of
branches 8.6-EA and 10.1-GA and of TensorRT 10.15; 11 is taken to import what 10.15 does.
"""

from __future__ import annotations

from .versions import TensorRtVersion

_ALWAYS = """
    Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization
    Cast Ceil Celu Clip Concat Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum
    DepthToSpace DequantizeLinear Div Dropout Einsum Elu Equal Erf Exp Expand EyeLike Flatten
    Floor GRU Gather GatherElements GatherND Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool
    Greater GreaterOrEqual GridSample GroupNormalization HardSigmoid HardSwish Identity If
    ImageScaler InstanceNormalization IsInf IsNaN LRN LSTM LayerNormalization LeakyRelu Less
    LessOrEqual Log LogSoftmax Loop LpNormalization LpPool MatMul Max MaxPool Mean
    MeanVarianceNormalization Min Mod Mul Neg NonMaxSuppression NonZero Not OneHot Or PRelu Pad
    ParametricSoftplus Pow QuantizeLinear RNN RandomNormal RandomNormalLike RandomUniform
    RandomUniformLike Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax
    ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize
    ReverseSequence RoiAlign Round ScaledTanh Scan Scatter ScatterElements ScatterND Selu Shape
    Shrink Sigmoid Sign Sin Sinh Size Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt
    Squeeze Sub Sum Tan Tanh ThresholdedRelu Tile TopK Transpose Trilu Unsqueeze Upsample Where
    Xor
"""
_SINCE_10 = """
    CastLike DeformConv Gelu Hardmax Mish
"""
_SINCE_10_15 = """
    Attention BlackmanWindow HammingWindow HannWindow RMSNormalization RotaryEmbedding STFT
    TensorScatter
"""
_TEN, _TEN_FIFTEEN = TensorRtVersion(10), TensorRtVersion(10, 15)


def supported_operators(version: TensorRtVersion) -> frozenset[str]:
    """Names of domain 'ai.onnx' that a version imports."""
    names = _ALWAYS.split()
    if version >= _TEN:
        names += _SINCE_10.split()
    if version >= _TEN_FIFTEEN:
        names += _SINCE_10_15.split()
    return frozenset(names)
