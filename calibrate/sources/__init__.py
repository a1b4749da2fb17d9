"""Model sources: the demo, diffusers folders and Hub ids, original DiT files, random weights."""
