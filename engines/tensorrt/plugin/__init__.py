"""The plugins: the kernels of `engines/kernels/`, embedded in an engine ahead of time."""
