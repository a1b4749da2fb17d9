"""Export quantized Diffusion Transformers to ONNX and TensorRT, with proof that quality holds."""

__version__ = "0.1.0"
