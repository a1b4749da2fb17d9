"""Floor 4: the HTTP service and its step-mixed batching."""

# A stray `import serve` from the root fails here, at once (docs/adr/0001).
from .. import __version__ as __version__
