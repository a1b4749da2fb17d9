"""The files and engines that `--target` asks for, beside the reference `model.onnx`."""
