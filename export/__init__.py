"""Floor 2: a quantized checkpoint becomes an abstract ONNX graph, then one file per target."""
