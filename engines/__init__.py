"""Floor 3: run, compare, time and report on exported models."""
