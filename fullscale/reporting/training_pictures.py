"""Pictures of one training: learning curves, augmented slices, predictions of an epoch."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from fullscale.evaluation.slice_pictures import draw_slices
from fullscale.params import Params
from fullscale.reporting.style import Curve, draw_curve, find_curve
from fullscale.tracking.run_record import RunRecord
from fullscale.training.augmentation import Augment
from fullscale.training.dataset import Batch, SliceDataset
from model.output import probabilities
from model.preprocessing import IGNORED_LABEL, normalise, one_mask_per_organ
from model.segmentation import SegmentationNetwork

MAX_COLUMNS = 3
PANEL_IN = (4.4, 2.9)
WHOLE = ("total", "mean")  # curves that summarise the others
WHOLE_COLOUR = "#1f2937"
COLOURS = (
    "#2563eb", "#e8590c", "#0f9d76", "#9333ea", "#d6336c", "#a16207", "#0891b2", "#64748b",
)  # fmt: skip
SIDE = re.compile(r"train/(side\d+)/(.+)")

Curves = dict[str, Curve]


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        title: with the unit.
        keys: metric key of each curve, by the curve's name.
        is_fraction: True if values lie between 0 and 1.
    """

    title: str
    keys: dict[str, str]
    is_fraction: bool = False


def draw_curves(rows: list[dict[str, float]], heading: str) -> Figure:
    """Draw losses, validation scores and learning rate over the epochs of one training.

    Metrics without a finite number are left out.

    Args:
        rows: one per epoch, with keys epoch, train/TERM, train/sideN/TERM, val/dice,
            val/dice/ORGAN, val/slice_fpr/ORGAN, val/classifier_RATE/ORGAN, learning_rate.
        heading: title of the whole picture.
    """
    rows = sorted(rows, key=lambda row: row["epoch"])
    drawn = []
    for panel in _panels(list(dict.fromkeys(key for row in rows for key in row))):
        curves = _curves(rows, panel)
        if curves:
            drawn.append((panel, curves))
    num_columns = 2 if len(drawn) == 4 else max(1, min(MAX_COLUMNS, len(drawn)))
    num_rows = max(1, -(-len(drawn) // num_columns))
    width_in, height_in = PANEL_IN
    figure = Figure(
        figsize=(width_in * num_columns, height_in * num_rows + 0.4), layout="constrained"
    )
    figure.suptitle(heading, fontsize=12)
    axes = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
    for axis in axes[len(drawn) :]:
        axis.set_axis_off()
    for axis, (panel, curves) in zip(axes, drawn, strict=False):
        _draw_panel(axis, panel, curves)
    return figure


def _panels(keys: list[str]) -> list[Panel]:
    def below(prefix: str) -> dict[str, str]:
        found = {key.removeprefix(prefix): key for key in keys if key.startswith(prefix)}
        return {name: key for name, key in found.items() if "/" not in name}

    sides: dict[str, dict[str, str]] = {}
    for key in keys:
        if match := SIDE.fullmatch(key):
            sides.setdefault(match[2], {})[match[1]] = key
    mean = {"mean": "val/dice"} if "val/dice" in keys else {}
    return [
        Panel("Training loss", below("train/")),
        Panel("Validation Dice", below("val/dice/") | mean, is_fraction=True),
        Panel("Validation slice false-positive rate", below("val/slice_fpr/"), is_fraction=True),
        *(
            Panel(
                f"Validation {rate} of the slice classifier",
                below(f"val/classifier_{rate}/"),
                is_fraction=True,
            )
            for rate in ("accuracy", "sensitivity", "specificity")
        ),
        *(Panel(f"Training loss {term}, by side output", sides[term]) for term in sides),
        Panel("Learning rate", {"": "learning_rate"}),
    ]


def _curves(rows: list[dict[str, float]], panel: Panel) -> Curves:
    """Return the curves of a panel that have values."""
    curves = {name: find_curve(rows, key) for name, key in panel.keys.items()}
    return {name: curve for name, curve in curves.items() if curve[0]}


def _draw_panel(axis: Axes, panel: Panel, curves: Curves) -> None:
    colours = iter(COLOURS * (1 + len(curves) // len(COLOURS)))
    for name, curve in curves.items():
        is_whole = name in WHOLE
        draw_curve(
            axis, curve, name, color=WHOLE_COLOUR if is_whole else next(colours),
            linewidth=2.0 if is_whole else 1.3, marker="o",
            markersize=5 if len(curve[0]) == 1 else 3, zorder=3 if is_whole else 2,
        )  # fmt: skip
    axis.set_title(panel.title, fontsize=10, loc="left")
    axis.xaxis.label.set_fontsize(8)
    axis.tick_params(labelsize=8, which="both")
    axis.grid(color="#e5e7eb", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    if panel.is_fraction:
        axis.set_ylim(-0.03, 1.03)
    if list(curves) != [""]:
        axis.legend(fontsize=7, frameon=False, ncols=1 + (len(curves) > 4))


def draw_augmented(
    image_BCHW: Tensor,
    label_BHW: Tensor,
    augment: Callable[[Tensor, Tensor, int, Tensor], tuple[Tensor, Tensor]],
    window_hu: tuple[float, float],
    num_epochs: int = 3,
) -> Figure:
    """Draw slices, and below them their augmented versions of the first epochs.

    Args:
        image_BCHW: float32 in 0..1 (window units); the middle channel is drawn.
        label_BHW: uint8 label map, outlined.
        augment: an `Augment`; the slices have positions 0, 1, ... in each epoch.
        window_hu: HU of image values 0 and 1.
        num_epochs: augmented versions below each slice.
    """
    position_B = torch.arange(len(image_BCHW))
    versions = [(image_BCHW, label_BHW)]
    versions += [augment(image_BCHW, label_BHW, epoch, position_B) for epoch in range(num_epochs)]
    images, labels = (torch.cat(each, dim=-2).cpu() for each in zip(*versions, strict=True))
    low_hu, high_hu = window_hu
    judged = labels.where(labels != IGNORED_LABEL, 0)
    masks = one_mask_per_organ(judged, int(judged.max())).numpy()
    figure = draw_slices(
        (low_hu + images[:, images.shape[1] // 2] * (high_hu - low_hu)).numpy(),
        masks,
        np.zeros_like(masks),
        window_hu,
        titles=[f"position {position}" for position in position_B.tolist()],
    )
    figure.suptitle("original; below, as augmented in successive epochs (green: truth)", fontsize=9)
    return figure


class Reporter:
    """Track a training: metrics of each epoch, pictures after the first, second, fourth, ..."""

    def __init__(
        self, title: str, seed: int, params: Params, validation: SliceDataset, run: RunRecord
    ) -> None:
        self._title, self._seed, self._params, self._run = title, seed, params, run
        self._slices = _picture_slices(validation, params.train.num_picture_slices)

    def log_augmented(self, slices: SliceDataset) -> None:
        """Track a picture of some training slices and their augmented versions."""
        train, window_hu = self._params.train, self._params.slice.window_hu
        batch = _picture_slices(slices, train.num_picture_slices)
        if batch is not None:
            augment = Augment(train.augment, window_hu, self._seed)
            image_BCHW = normalise(batch.image_BCHW, window_hu)
            figure = draw_augmented(image_BCHW, batch.label_BHW, augment, window_hu)
            self._run.log_picture(figure, "augmented.png")

    def log_epoch(self, metrics: Mapping[str, float], measured: Mapping[str, float]) -> None:
        """Track the metrics of an epoch, and further measurements such as times."""
        values = {key: value for key, value in metrics.items() if key != "epoch"}
        self._run.log_metrics({**values, **measured}, step=int(metrics["epoch"]))

    def log_prediction(self, epoch: int, network: SegmentationNetwork) -> None:
        """Track a picture of some validation slices with truth and prediction."""
        if (batch := self._slices) is None:
            return
        network.eval()
        device = next(network.parameters()).device
        with torch.inference_mode():
            image = normalise(batch.image_BCHW, self._params.slice.window_hu).to(device)
            predicted = probabilities(network(image)) >= self._params.evaluate.threshold
        masks = one_mask_per_organ(batch.label_BHW, len(self._params.organs))
        predicted = predicted.cpu() & (batch.label_BHW != IGNORED_LABEL)[:, None]
        figure = draw_slices(
            batch.image_BCHW[:, 1].numpy(),
            masks.numpy(),
            predicted.numpy(),
            self._params.slice.window_hu,
            titles=[""] * len(masks),
            heading=f"{self._title}, epoch {epoch}, validation slices",
        )
        self._run.log_picture(figure, f"validation/epoch-{epoch:04d}.png")

    def log_curves(self, rows: list[dict[str, float]]) -> None:
        """Track the learning curves as a picture."""
        self._run.log_picture(draw_curves(rows, self._title), "curves.png")


def _picture_slices(dataset: SliceDataset, count: int) -> Batch | None:
    if count == 0:
        return None
    return dataset.__getitems__(
        np.linspace(0, len(dataset) - 1, count + 2).astype(int)[1:-1].tolist()
    )
