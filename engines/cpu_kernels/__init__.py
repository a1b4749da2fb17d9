"""Our own integer products on a CPU: C kernels that ONNX Runtime loads as a custom operator.

The file on disk stays standard: the engine swaps nodes as it loads one (docs/onnxruntime.md).
"""
