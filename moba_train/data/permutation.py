"""A pseudo-random order of n documents as a pure function: no array of n, any position in constant time.

`position -> document` is a keyed bijection of b-bit integers (2^b >= n, less than 2n) made of steps that each can be
undone: multiply by an odd number, add, xor with the own upper bits. Positions that land at n or above are sent through
again until they land below (cycle walking, Black & Rogaway, CT-RSA 2002), so that it is a permutation of 0..n-1.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

ROUNDS = 6
"""Enough that neighbours of small n (the hard case: few bits to mix) are spread evenly; see the test."""


def permute(positions: NDArray[np.int64], *, n: int, key: str) -> NDArray[np.int64]:
    """Documents at `positions` of the order named by `key`.

    Args:
        positions: int64, any shape, values in 0..n-1.
        n: number of documents.
        key: names the order; another key gives another order.

    Returns:
        int64 of the same shape, values in 0..n-1; a permutation of 0..n-1 when all positions are given.
    """
    bits = max(2, (n - 1).bit_length())
    mask = np.uint64((1 << bits) - 1)
    shift = np.uint64((bits + 1) // 2)
    constants = np.frombuffer(
        hashlib.sha512(key.encode()).digest() + hashlib.sha512(f"+{key}".encode()).digest(), "<u8"
    )
    flat = positions.reshape(-1).astype(np.uint64)
    pending = np.arange(flat.size)
    while pending.size:
        x = flat[pending]
        for i in range(ROUNDS):
            x = (x * (constants[2 * i] | np.uint64(1)) + constants[2 * i + 1]) & mask
            x ^= x >> shift
        flat[pending] = x
        pending = pending[x >= np.uint64(n)]
    return flat.astype(np.int64).reshape(positions.shape)
