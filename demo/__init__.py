"""The embedded demo: a small class-conditional DiT, its feature extractor and FID reference."""
