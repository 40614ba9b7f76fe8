"""What a person sees of a training: a bar on a terminal, one line an epoch elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from rich.progress import Progress


class TrainingDisplay:
    """Shows epoch, step, loss, Dice, slices a second and the time left.

    Args:
        name: the network's.
        num_epochs, num_steps: of the training, and of an epoch.
        done_steps: steps that were done before, in an earlier run.
        is_shown: whether to say anything; one process of several does.
    """

    def __init__(
        self, name: str, num_epochs: int, num_steps: int, done_steps: int, *, is_shown: bool = True
    ) -> None:
        self._name = name
        self._num_epochs = num_epochs
        self._num_steps = num_steps
        self._done_steps = done_steps
        self._is_shown = is_shown
        self._bar: Progress | None = None
        self._fields: dict[str, Any] = {"epoch": 1, "step": 0, "loss": "", "dice": "", "rate": ""}

    def __enter__(self) -> Self:
        if self._is_shown and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn(
                    f"{self._name} epoch {{task.fields[epoch]}}/{self._num_epochs} "
                    f"step {{task.fields[step]}}/{self._num_steps}"
                ),
                BarColumn(),
                TextColumn("{task.fields[loss]}{task.fields[dice]}{task.fields[rate]}"),
                TimeRemainingColumn(elapsed_when_finished=True),
                TextColumn("left"),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(
                self._name,
                total=self._num_epochs * self._num_steps,
                completed=self._done_steps,
                **self._fields,
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """One line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        elif self._is_shown:
            print(text, flush=True)

    def step(self, epoch: int, step: int, loss: float, slices_per_s: float) -> None:
        """A step is done; epoch and step count from 1."""
        if self._bar is None:
            return
        self._fields |= {
            "epoch": epoch,
            "step": step,
            "loss": f"loss {loss:.4f}",
            "rate": f" {slices_per_s:.0f} slices/s",
        }
        self._bar.update(self._task, advance=1, **self._fields)

    def epoch(self, metrics: dict[str, float], *, improved: bool) -> None:
        """An epoch is over."""
        epoch, dice = int(metrics["epoch"]), metrics["val/dice"]
        self._fields["dice"] = f" Dice {dice:.4f}"
        self.say(
            f"{self._name} epoch {epoch}/{self._num_epochs}: loss {metrics['train/total']:.4f}, "
            f"val Dice {dice:.4f}{' (best)' if improved else ''}; "
            f"{metrics['slices/organ']:.0f} slices with organs, "
            f"{metrics['slices/organ_free']:.0f} without"
        )
