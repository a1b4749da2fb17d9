"""The `onnxruntime` target: linears in the operators that ONNX Runtime runs fastest."""
