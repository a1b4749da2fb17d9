"""The search step of an export: budget, measurements, judging, and the record of it all."""
