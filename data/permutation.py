"""Permutations of which any place can be computed alone, so that shuffling 10^10 samples needs no memory.

An alternating Feistel network on Z_a x Z_b with a * b just above the length: in turn, each half is moved round by a
function of the other. Every round can be undone, so the whole is a permutation of a * b numbers; places beyond the
length are walked on from until one within is met.
"""

from __future__ import annotations

import hashlib
import math
import struct
from functools import lru_cache

import numpy as np

_WORD = (1 << 64) - 1
# Multipliers of splitmix64 (Steele, Lea and Flood 2014), whose finaliser is the mixing of the rounds.
_STEP, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MANY = 1 << 16
_ROUNDS, _ROUNDS_OF_FEW = 6, 20


class Permutation:
    """A permutation of range(length), at most 2^63, drawn by a key: any values that `str` tells apart.

    Fewer than 2^16 numbers take more rounds: what one round leaves to guess shrinks with the size of the halves, and
    six of them would favour some of the 24 orders of four numbers by a tenth.
    """

    def __init__(self, length: int, *key: object):
        if not 0 <= length <= 1 << 63:
            raise ValueError(f"length must be within 0 .. 2^63, not {length}")
        self.length = length
        self._a = math.isqrt(max(0, length - 1)) + 1
        self._b = -(-length // self._a)
        rounds = _ROUNDS if length >= _MANY else _ROUNDS_OF_FEW
        words = hashlib.shake_128(repr(tuple(map(str, key))).encode()).digest(8 * rounds)
        self._keys = struct.unpack(f"<{rounds}Q", words)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, place: int) -> int:
        """The number at a place, 0 .. length - 1."""
        if not 0 <= place < self.length:
            raise IndexError(f"place {place} of {self.length}")
        a, b = self._a, self._b
        while True:
            x, y = divmod(place, b)
            for key in self._keys:
                mixed = (y * _STEP + key) & _WORD
                mixed = (mixed ^ mixed >> 30) * _FIRST & _WORD
                mixed = (mixed ^ mixed >> 27) * _SECOND & _WORD
                # The halves change places, and so do their sizes.
                x, y, a, b = y, (x + ((mixed >> 32) * a >> 32)) % a, b, a
            place = x * b + y
            if place < self.length:
                return place

    def many(self, places: np.ndarray) -> np.ndarray:
        """The numbers at many places: int64 of any shape, to int64 of the same shape."""
        places = np.asarray(places, np.int64)
        if places.size and not (places.min() >= 0 and places.max() < self.length):
            raise IndexError(f"places outside 0 .. {self.length - 1}")
        found = self._once(places.astype(np.uint64))
        while (beyond := found >= self.length).any():
            found[beyond] = self._once(found[beyond])
        return found.astype(np.int64)

    def _once(self, places: np.ndarray) -> np.ndarray:
        a, b = np.uint64(self._a), np.uint64(self._b)
        half = np.uint64(32)
        x, y = np.divmod(places, b)
        for key in self._keys:
            mixed = y * np.uint64(_STEP) + np.uint64(key)
            mixed = (mixed ^ mixed >> np.uint64(30)) * np.uint64(_FIRST)
            mixed = (mixed ^ mixed >> np.uint64(27)) * np.uint64(_SECOND)
            x, y, a, b = y, (x + ((mixed >> half) * a >> half)) % a, b, a
        return x * b + y


@lru_cache(maxsize=256)
def permutation(length: int, seed: int, name: str, epoch: int) -> Permutation:
    """The order of a pass over `length` samples."""
    return Permutation(length, seed, name, epoch)
