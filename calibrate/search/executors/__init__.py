"""Where candidates of a search are evaluated: in this process, on all GPUs, on a Ray cluster."""
