"""Build, inspect and run TensorRT engines; every module imports without TensorRT."""
