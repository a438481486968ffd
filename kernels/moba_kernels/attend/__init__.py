"""Attention over the keys at hand: forward and backward, Full or MoBA."""
