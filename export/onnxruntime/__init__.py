"""The targets `onnxruntime` and `onnxruntime-cuda`: linears in ONNX Runtime's own operators."""
