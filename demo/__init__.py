"""The embedded demo: a small class-conditional DiT, its feature extractor and FID reference."""

# A stray `import demo` from the root fails here, at once (docs/adr/0001).
from .. import __version__ as __version__
