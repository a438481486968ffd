"""Chunk means of the keys: partial fp64 sums and counts, published as fp32 means."""
