"""The slices of an epoch and their order: a pure function of seed and epoch.

Loader workers, the processes of a distributed training, and a resumed training therefore agree
without communication or saved state.

S slices, C cases.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

MAX_FREE_SHARE = 0.5
"""Largest share of organ-free slices among a case's draws, unless a larger one is asked for."""


class EpochOrder:
    """The slices of each epoch of a training.

    Cases take turns: draw number d of the training goes to case d modulo C, so every case has the
    same number of draws, in each epoch to within 1. With `sampling` "slice" all slices count as
    one case.

    A case's draws are divided into organ slices and organ-free ones. Each of the two groups is
    used up in a random order before one of its slices is drawn again, in another order; an epoch
    continues where the previous one stopped.

    Of the draws of a case that has both groups, a share f is organ-free. A case without organ-free
    slices gives organ slices only, and the other way round. f makes up for these cases:
    f = (organ_free_share x C - cases without organ) / cases with both groups, but at least half of
    `organ_free_share`, and at most 0.5 or `organ_free_share`, whichever is larger.

    Args:
        case_S: whole number, the case of each slice.
        organ_free_S: boolean, True if the slice contains no organ.
        slices_per_epoch: number of draws in an epoch.
        organ_free_share: wanted share of organ-free slices, 0 to below 1.
        sampling: "case" gives each case the same weight, "slice" each slice.
        seed: of the order.

    Attributes:
        organ_free_share: the share of organ-free slices that the training will have, 0 to 1.
    """

    def __init__(
        self,
        case_S: NDArray[np.int64],
        organ_free_S: NDArray[np.bool_],
        slices_per_epoch: int,
        organ_free_share: float,
        sampling: Literal["case", "slice"],
        seed: int,
    ) -> None:
        self._num_slices, self._seed = slices_per_epoch, seed
        group_S = case_S if sampling == "case" else np.zeros_like(case_S)
        by_case = np.argsort(group_S, kind="stable")
        bounds = np.flatnonzero(np.diff(group_S[by_case])) + 1
        self._pools = [
            (slices[~organ_free_S[slices]], slices[organ_free_S[slices]])
            for slices in np.split(by_case, bounds)
        ]
        self._free_share_C = _free_shares(
            np.array([[len(pool) for pool in pools] for pools in self._pools]), organ_free_share
        )
        self.organ_free_share = float(self._free_share_C.mean())

    def __len__(self) -> int:
        """Return the number of slices in an epoch."""
        return self._num_slices

    def of_epoch(self, epoch: int) -> NDArray[np.int64]:
        """Return the indices of an epoch's slices in order of use; `epoch` counts from 0."""
        starts, ends = self._num_drawn(epoch), self._num_drawn(epoch + 1)
        chosen = [
            self._section(pool, starts[kind, case], ends[kind, case], (1, kind, case))
            for case, pools in enumerate(self._pools)
            for kind, pool in enumerate(pools)
        ]
        shuffled: NDArray[np.int64] = self._generator(0, epoch).permutation(np.concatenate(chosen))
        return shuffled

    def _num_drawn(self, epoch: int) -> NDArray[np.int64]:
        """Return how many organ and organ-free slices (2 x C) each case gave before an epoch."""
        num_cases = len(self._pools)
        case_C = np.arange(num_cases)
        total_C = (epoch * self._num_slices + num_cases - 1 - case_C) // num_cases
        # Cases round at different times, so that each epoch as a whole has its share.
        free_C = np.floor(self._free_share_C * total_C + (case_C + 0.5) / num_cases).astype(int)
        return np.stack([total_C - free_C, free_C])

    def _section(
        self, pool: NDArray[np.int64], start: int, end: int, key: tuple[int, ...]
    ) -> NDArray[np.int64]:
        """Return elements `start` to `end` of an endless sequence of permutations of `pool`."""
        if start == end:
            return pool[:0]
        rounds = range(start // len(pool), (end - 1) // len(pool) + 1)
        row = np.concatenate([self._generator(*key, number).permutation(pool) for number in rounds])
        skipped = rounds[0] * len(pool)
        return row[start - skipped : end - skipped]

    def _generator(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, *key])


def _free_shares(num_slices_C2: NDArray[np.int64], wanted: float) -> NDArray[np.float64]:
    """Return the share of organ-free slices among the draws of each case, as `EpochOrder` says."""
    has_organ_C, has_free_C = (num_slices_C2 > 0).T
    has_both_C = has_organ_C & has_free_C
    num_missing = wanted * len(num_slices_C2) - float(np.sum(~has_organ_C))
    share = num_missing / max(1.0, float(np.sum(has_both_C)))
    share = min(max(share, wanted / 2), max(wanted, MAX_FREE_SHARE))
    return np.asarray(np.where(has_both_C, share, ~has_organ_C), dtype=np.float64)


def auto_slices_per_epoch(heights_mm: NDArray[np.float64], neighbour_mm: float) -> int:
    """Return the number of slices that scans would have at a common spacing, at least 1.

    Thin slices therefore make an epoch no longer.

    Args:
        heights_mm: spacing of the slices times their number, of each scan.
        neighbour_mm: the common spacing.
    """
    return max(1, round(float(np.sum(heights_mm)) / neighbour_mm))
