"""Floor 4: the HTTP service. Empty until it lands; the import-order rule already covers it."""

# A stray `import serve` from the root fails here, at once (docs/adr/0001).
from .. import __version__ as __version__
