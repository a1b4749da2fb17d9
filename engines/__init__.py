"""Floor 3: run, compare, time and report on exported models."""

# A stray `import engines` from the root fails here, at once (docs/adr/0001).
from .. import __version__ as __version__
