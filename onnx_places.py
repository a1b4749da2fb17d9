"""Where an exported folder holds its ONNX files, for all that write, read or serve them.

Relative to the folder, with '/' on every system. Without any import: the server reads it too.
"""

from __future__ import annotations

QDQ_FILE = "model.onnx"  # the reference form
ONNXRUNTIME_FILE = "onnxruntime/model.onnx"
ONNXRUNTIME_CUDA_FILE = "onnxruntime-cuda/model.onnx"
