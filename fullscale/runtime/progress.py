"""Display of a training: a progress bar on a terminal, one log line an epoch elsewhere."""

from __future__ import annotations

import logging
import math
import sys
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from fullscale.runtime.events import emit_event

if TYPE_CHECKING:
    from rich.progress import Progress

logger = logging.getLogger(__name__)


def training_title(network: str, seed: int) -> str:
    """Return the name of a training in messages, such as unet-0: its stage without `train@`."""
    return f"{network}-{seed}"


class TrainingDisplay:
    """Shows epoch, step, loss, Dice, slices a second and the time left.

    Args:
        name: name of the training, as `training_title` gives it.
        num_epochs, num_steps: epochs of the training, and steps of an epoch.
        done_steps: steps of the training that an earlier run did.
        is_shown: show anything; of several processes one does.
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

    def log(self, text: str) -> None:
        """Log one line, if this process shows anything."""
        # Rich redirects sys.stderr while the bar is shown, so the line appears above it.
        if self._is_shown:
            logger.info(text)

    def show_step(self, epoch: int, step: int, loss: float, slices_per_s: float) -> None:
        """Show that a step is done; epoch and step count from 1."""
        if self._bar is None:
            return
        self._fields |= {
            "epoch": epoch,
            "step": step,
            "loss": f"loss {loss:.4f}",
            "rate": f" {slices_per_s:.0f} slices/s",
        }
        self._bar.update(self._task, advance=1, **self._fields)

    def show_epoch(self, metrics: dict[str, float], *, improved: bool) -> None:
        """Show that an epoch is over, and emit the event `epoch`."""
        epoch, dice = int(metrics["epoch"]), metrics["val/dice"]
        self._fields["dice"] = f" Dice {dice:.4f}"
        if self._is_shown:
            emit_event(
                "epoch",
                training=self._name,
                epoch=epoch,
                num_epochs=self._num_epochs,
                dice=dice if math.isfinite(dice) else None,  # JSON has no NaN
            )
        self.log(
            f"{self._name} epoch {epoch}/{self._num_epochs}: loss {metrics['train/total']:.4f}, "
            f"val Dice {dice:.4f}{' (best)' if improved else ''}; "
            f"{metrics['slices/organ']:.0f} slices with organs, "
            f"{metrics['slices/organ_free']:.0f} without"
        )
