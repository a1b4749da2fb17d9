"""Floor 4: the HTTP service. Empty until it lands; the import-order rule already covers it."""

# Fails when the folder is imported by itself (`import serve`), instead of much later (docs/adr/0001).
from .. import __version__ as __version__
