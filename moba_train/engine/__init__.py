"""Engines: who owns the model shards, the optimizer and the step."""
