"""The parts of the demo recipe: data, extractor, DiT training, sampling and the model card."""
