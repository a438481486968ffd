"""Training: the loop, its schedule, checkpoints, signals, metrics and FLOP counts."""
