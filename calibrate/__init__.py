"""Floor 1: models, sampling, quantizers, GPTQ, FID and the quantized checkpoint."""
