"""CUDA kernels for group-wise dynamic W8A8 and W4A8 (docs/kernels.md)."""
