"""The HTTP layer: OpenAI-compatible API, page, health and metrics.

The one package that imports FastAPI and prometheus-client as it is imported: others import it in
functions only.
"""
