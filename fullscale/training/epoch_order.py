"""The slices of an epoch and their order: a pure function of seed and epoch.

Loader workers, the processes of a distributed training, and a resumed training therefore agree
without communication or saved state.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class EpochOrder:
    """The slices of each epoch of a training.

    Slices with an organ are used once per epoch. Of the organ-free slices an epoch uses a share;
    each epoch continues where the previous one stopped, so that all of them are used.

    Args:
        organ_free: boolean, one per slice: True if the slice contains no organ.
        organ_free_share: share of the organ-free slices per epoch; above 1 some are used again.
        seed: of the order.
    """

    def __init__(self, organ_free: NDArray[np.bool_], organ_free_share: float, seed: int) -> None:
        self._organ = np.flatnonzero(~organ_free)
        self._free = np.flatnonzero(organ_free)
        self._seed = seed
        self.num_organ = len(self._organ)
        self.num_organ_free = round(organ_free_share * len(self._free))

    def __len__(self) -> int:
        """Return the number of slices in an epoch."""
        return self.num_organ + self.num_organ_free

    def of_epoch(self, epoch: int) -> NDArray[np.int64]:
        """Return the indices of an epoch's slices in order of use; `epoch` counts from 0."""
        chosen = np.concatenate([self._organ, self._organ_free_of(epoch)])
        shuffled: NDArray[np.int64] = self._generator(0, epoch).permutation(chosen)
        return shuffled

    def _organ_free_of(self, epoch: int) -> NDArray[np.int64]:
        """Return an epoch's section of an endless sequence of permutations of them."""
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
