"""The TensorRT targets: three lowerings, and the rules that a file must keep to be parsed."""
