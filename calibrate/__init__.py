"""Floor 1: models, sampling, quantizers, GPTQ, FID and the quantized checkpoint."""

# A stray `import calibrate` from the root fails here, at once (docs/adr/0001).
from .. import __version__ as __version__
