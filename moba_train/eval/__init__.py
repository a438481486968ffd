"""Evaluations: loss by position, needle in a haystack, and their pictures. No torch before an engine is called."""
