"""Model families: what is quantized in each, and how its denoiser is run."""
