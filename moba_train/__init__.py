"""MoBA pretraining on Megatron-core: staged schedules, context parallelism, needle evaluation."""

__version__ = "0.1.0"
