"""The step-mixed loop: which samples share the next engine call, without HTTP and without clocks
of its own."""
