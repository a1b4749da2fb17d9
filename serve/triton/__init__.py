"""Triton Inference Server: model repositories of exported folders, and an engine on a server."""
