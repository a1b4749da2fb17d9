"""Floor 1: models, sampling, quantizers, GPTQ, FID and the quantized checkpoint."""

# Fails when the folder is imported by itself (`import calibrate`), instead of much later (docs/adr/0001).
from .. import __version__ as __version__
