"""The project's one benchmark tool: targets side by side in one run (`qdit-bench`).

A target is one way of running the denoiser. Each lives in a process of its own; the parent lets
them run in turns, one at a time, so that drift of the machine hits all alike. A new target is one
module under `targets/` and one line in `registry.py`.
"""
