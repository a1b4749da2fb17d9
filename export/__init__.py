"""Floor 2: a quantized checkpoint becomes an abstract ONNX graph, then one file per target."""

# A stray `import export` from the root fails here, at once (docs/adr/0001).
from .. import __version__ as __version__
