"""Graph passes: one file each, with what it requires and ensures."""
