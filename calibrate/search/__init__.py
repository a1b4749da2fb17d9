"""Granularity search: one weight group and one activation group for each linear, under a budget."""
