"""One module a runtime; `registry.py` names the targets in them."""
