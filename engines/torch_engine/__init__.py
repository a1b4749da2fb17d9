"""A quantized checkpoint in PyTorch on the CUDA kernels (docs/kernels.md)."""
