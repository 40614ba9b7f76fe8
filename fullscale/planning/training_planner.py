"""Choose pixels, width, batch and length of the trainings by steps measured on this machine."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import numpy as np

from fullscale.params import Params
from fullscale.planning import rules
from fullscale.planning.draft import Draft, get_value, with_values
from fullscale.planning.fingerprint import Fingerprint
from fullscale.planning.machine import Machine
from fullscale.planning.rules import Length, Rung
from fullscale.planning.split_rules import SplitChoice
from fullscale.planning.step_time import Memory, Speed, count_memory
from fullscale.runtime.errors import StageError
from fullscale.training.epoch_order import auto_slices_per_epoch

Measure = Callable[[str, Params, int], Speed]
"""Returns the speed of a network, given its name, the parameters and the slices in a step."""
START_S = 15.0
"""Time of a training outside its steps: start, pictures, delivery to MLflow."""
MEASURED_STEP_S = 1.0
"""Steps are measured with as many slices as take about this long."""
NUM_SEEDS = 3
"""Trainings of a network from which on a verdict is on networks."""


class TrainingPlanner:
    """Chooses pixels, width, batch and length of the trainings, by measured steps."""

    def __init__(
        self,
        draft: Draft,
        split: SplitChoice,
        fingerprint: Fingerprint,
        machine: Machine,
        hours: float,
        measure: Measure | None,
    ) -> None:
        self._draft, self._measure = draft, measure
        self._by_id = draft.planned().model_copy(update={"organs": fingerprint.organs})
        self._fingerprint, self._machine, self._hours = fingerprint, machine, hours
        fold = split.table.set_index("case")["fold"]
        self._train = [case for case in fingerprint.cases if fold[case.case] == "train"]
        self._num_val_slices = sum(
            case.shape_ZYX[0] for case in fingerprint.cases if fold[case.case] == "val"
        )
        batch_size = draft.fixed("train.batch_size")
        self._batch_size = batch_size if isinstance(batch_size, int) else rules.BATCH_SIZE
        self._num_seeds = len(draft.params.seeds)
        self._speeds: dict[Rung, dict[str, Speed]] = {}
        self.length: Length | None = None
        self.rung = Rung(0, 0, 0)

    @property
    def num_seeds(self) -> int:
        """Trainings of each network."""
        return self._num_seeds

    @property
    def speeds(self) -> dict[str, Speed]:
        """Measured speed of each network at the chosen size; empty if none was measured."""
        return self._speeds.get(self.rung, {})

    @property
    def num_val_slices(self) -> int:
        """Slices of the validation cases."""
        return self._num_val_slices

    def plan(self) -> None:
        """Choose and propose."""
        cases, fixed = self._fingerprint.cases, self._draft.fixed
        side_mm = rules.slice_side_mm(cases)
        ladder = rules.make_ladder(
            rules.median_pixel_mm(cases),
            side_mm,
            pixel_mm=fixed("slice.pixel_mm"),
            size_px=fixed("slice.size_px"),
            width=fixed("train.width"),
        )
        if fixed("seeds") is None:
            self._num_seeds = 1
        self.rung, memory = self._climb(ladder)
        self._propose_sizes(ladder, side_mm, memory)
        self._propose_training(ladder)

    def _climb(self, ladder: list[Rung]) -> tuple[Rung, dict[str, Memory]]:
        """Return the dearest rung that fits time and memory, and the memory it takes."""
        while True:
            rung = (
                ladder[-1] if self._measure is None else self._fastest_enough(ladder, self._measure)
            )
            memory = {name: count_memory(name, self._sized(rung)) for name in self._by_id.networks}
            if all(each.largest_part(self._machine, 1) for each in memory.values()):
                return rung, memory
            ladder = ladder[: ladder.index(rung)]
            if not ladder:
                raise StageError(
                    "memory does not hold a training step of a single slice, even of the smallest "
                    "plan; end other programs, or take a machine with more memory"
                )

    def _fastest_enough(self, ladder: list[Rung], measure: Measure) -> Rung:
        """Return the dearest rung whose trainings fit the time, by steps measured at its size."""
        rung = ladder[0]
        while rung not in self._speeds:
            self._speeds[rung] = self._measure_rung(rung, measure)
            fitting = [each for each in ladder if self._fit(each) is not None]
            if not fitting:
                self._refuse_time(ladder[0])
            rung = fitting[-1]
        return rung

    def _measure_rung(self, rung: Rung, measure: Measure) -> dict[str, Speed]:
        params, speeds = self._sized(rung), {}
        known = self._speed_at(rung)
        for name in params.networks:
            num_slices = self._batch_size
            while (
                known and num_slices > 1 and num_slices * known[name].training_s > MEASURED_STEP_S
            ):
                num_slices //= 2
            speeds[name] = measure(name, params, num_slices)
        return speeds

    def _speed_at(self, rung: Rung) -> dict[str, Speed]:
        """Return the speeds of a rung, measured or scaled from the nearest one measured."""
        if not self._speeds or rung in self._speeds:
            return self._speeds.get(rung, {})
        nearest = min(self._speeds, key=lambda each: abs(np.log(each.operations / rung.operations)))
        factor = rung.operations / nearest.operations
        return {name: each.scaled(factor) for name, each in self._speeds[nearest].items()}

    def _fit(self, rung: Rung, num_seeds: int = 0) -> Length | None:
        budget_s, slice_s, validation_s = self._times(rung, num_seeds or self._num_seeds)
        asked = self._draft.fixed("train.num_epochs")
        num_slices = self._draft.fixed("train.slices_per_epoch")
        if asked is not None:
            num_slices = num_slices if isinstance(num_slices, int) else self._auto_slices()
            takes_s = asked * (num_slices * slice_s + validation_s)
            return Length(asked, num_slices, is_auto=True) if takes_s <= 1.1 * budget_s else None
        return rules.fit_length(
            budget_s, slice_s, validation_s, self._auto_slices(), self._batch_size
        )

    def _times(self, rung: Rung, num_seeds: int) -> tuple[float, float, float]:
        """Return the seconds for all steps, of a slice and of a validation, in all trainings."""
        speeds = self._speed_at(rung).values()
        num_trainings = num_seeds * len(speeds)
        return (
            self._hours * 3600 - num_trainings * START_S,
            num_seeds * sum(each.training_s for each in speeds),
            num_seeds * self._num_val_slices * sum(each.validation_s for each in speeds),
        )

    def _auto_slices(self) -> int:
        planned = {each.key: each.value for each in self._draft.proposals}
        neighbour_mm = planned["slice.neighbour_mm"]
        if neighbour_mm == "auto":
            neighbour_mm = float(np.median([case.spacing_mm[0] for case in self._train]))
        heights_mm = np.array([case.height_mm for case in self._train])
        return auto_slices_per_epoch(heights_mm, neighbour_mm)

    def _refuse_time(self, rung: Rung) -> None:
        _, slice_s, validation_s = self._times(rung, self._num_seeds)
        least_s = rules.shortest_s(slice_s, validation_s, self._batch_size)
        least_s += START_S * self._num_seeds * len(self._by_id.networks)
        raise StageError(
            f"--hours {self._hours:g} is too short for all trainings, even of the smallest plan; "
            f"it takes about {least_s / 3600:.2g} hours"
        )

    def _sized(self, rung: Rung) -> Params:
        return with_values(
            self._by_id,
            {
                "slice.pixel_mm": rung.pixel_mm,
                "slice.size_px": rung.size_px,
                "train.width": rung.width,
            },
        )

    def _propose_sizes(
        self, ladder: list[Rung], side_mm: float, memory: Mapping[str, Memory]
    ) -> None:
        draft, rung = self._draft, self.rung
        finest = rung.pixel_mm == min(each.pixel_mm for each in ladder)
        draft.propose(
            "slice.pixel_mm",
            rung.pixel_mm,
            "the finest that the scans hold" if finest else "the finest for which there is time",
        )
        draft.propose(
            "slice.size_px", rung.size_px, f"covers {side_mm:.0f} mm, the largest trunk and more"
        )
        limits = "time" if rung != ladder[-1] else "nothing"
        draft.propose("train.width", rung.width, f"limited by {limits}")
        part = min(each.largest_part(self._machine, self._batch_size) for each in memory.values())
        draft.propose("train.batch_size", self._batch_size, "what the learning rate is known for")
        # A number that does not divide the batch cannot be one of its parts.
        num_parts = next(
            number
            for number in itertools.count(max(1, -(-self._batch_size // part)))
            if self._batch_size % number == 0
        )
        draft.propose("train.num_accumulated", num_parts, f"{part} slices fit memory at once")

    def _propose_training(self, ladder: list[Rung]) -> None:
        draft, rung = self._draft, self.rung
        seeds = get_value(draft.params, "seeds")
        if self._measure is None:
            seeds_reason = "kept: the time of a step is not known"
            draft.propose("seeds", seeds, seeds_reason)
        else:
            is_best = rung == ladder[-1]
            if draft.fixed("seeds") is None and is_best and self._fit(rung, NUM_SEEDS):
                self._num_seeds = NUM_SEEDS
            reason = (
                "a verdict on networks, not on weights"
                if self._num_seeds >= NUM_SEEDS
                else "time goes into a larger network first"
            )
            if len(seeds) != self._num_seeds:
                seeds = list(range(self._num_seeds))
            draft.propose("seeds", seeds, reason)
            self.length = self._fit(rung)
        if self.length is not None:
            length = self.length
            draft.propose(
                "train.num_epochs", length.num_epochs, f"{self._hours:g} h for all trainings"
            )
            draft.propose(
                "train.slices_per_epoch",
                "auto" if length.is_auto else length.slices_per_epoch,
                f"{length.slices_per_epoch} slices, {length.slices_per_epoch // self._batch_size} "
                "steps",
            )
        draft.propose(
            "train.learning_rate",
            rules.choose_learning_rate(rung.width),
            f"of AdamW at width {rung.width}",
        )
        draft.propose("train.side_weights", "halving", "better in the sample's validation")
        draft.propose(
            "compute.num_loader_workers",
            rules.choose_loader_workers(self._machine.num_cores, on_gpu=bool(self._machine.gpu)),
            f"{self._machine.num_cores} cores, {self._machine.gpu or 'no GPU'}",
        )
