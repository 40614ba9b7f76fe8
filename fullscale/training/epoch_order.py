"""Which slices an epoch uses, and in which order: a pure function of seed and epoch.

Whoever asks gets the same answer: a loader worker, another process of a distributed training, or a
run that goes on after it was killed.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class EpochOrder:
    """The slices of each epoch of a training.

    Slices that hold an organ are used once an epoch. Of the others an epoch uses a share, and
    epoch after epoch goes on where the one before stopped, so that all of them are used.

    Args:
        organ_free: for each slice, whether it holds no organ.
        organ_free_share: share of the organ-free slices in an epoch; above 1 some are used again.
        seed: of the order.
    """

    def __init__(self, organ_free: NDArray[np.bool_], organ_free_share: float, seed: int) -> None:
        self._organ = np.flatnonzero(~organ_free)
        self._free = np.flatnonzero(organ_free)
        self._seed = seed
        self.num_organ = len(self._organ)
        self.num_organ_free = round(organ_free_share * len(self._free))

    def __len__(self) -> int:
        """Slices in an epoch."""
        return self.num_organ + self.num_organ_free

    def of_epoch(self, epoch: int) -> NDArray[np.int64]:
        """Indices of an epoch's slices in the order of their use; `epoch` counts from 0."""
        chosen = np.concatenate([self._organ, self._organ_free_of(epoch)])
        shuffled: NDArray[np.int64] = self._generator(0, epoch).permutation(chosen)
        return shuffled

    def _organ_free_of(self, epoch: int) -> NDArray[np.int64]:
        """The next organ-free slices of an endless row of permutations of all of them."""
        if not self.num_organ_free:
            return self._free[:0]
        first = epoch * self.num_organ_free
        rounds = range(
            first // len(self._free), (first + self.num_organ_free - 1) // len(self._free) + 1
        )
        row = np.concatenate(
            [self._generator(1, number).permutation(self._free) for number in rounds]
        )
        start = first - rounds[0] * len(self._free)
        return row[start : start + self.num_organ_free]

    def _generator(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, *key])
