"""The key convolution: `key_conv`, its entry and checks (op.py) and its three forms."""

from .op import key_conv

__all__ = ["key_conv"]
