"""Model sources: the demo, diffusers folders and Hub ids, original DiT state dicts, random weights."""
