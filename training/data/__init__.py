"""From files to batches: sources, decoding, the cache, the held-out split, batches."""
