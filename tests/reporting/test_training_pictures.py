import math

import pytest
import torch

from fullscale.reporting.training_pictures import draw_augmented, draw_curves
from fullscale.runtime.files import save_picture
from model.preprocessing import IGNORED_LABEL

ORGANS = ("liver", "spleen")


def row(epoch):
    """Every key a training of UNet 3+ on two organs may report."""
    values = {"epoch": epoch, "learning_rate": 0.003 / epoch, "val/dice": 1 - 0.5 / epoch}
    for term in ("focal", "iou", "total"):
        values[f"train/{term}"] = 0.5 / epoch
        values |= {f"train/side{side}/{term}": side / epoch for side in range(1, 6)}
    for organ in ORGANS:
        values[f"val/dice/{organ}"] = 1 - 0.4 / epoch
        values[f"val/slice_fpr/{organ}"] = 0.3 / epoch
        for rate in ("accuracy", "sensitivity", "specificity"):
            values[f"val/classifier_{rate}/{organ}"] = 1 - 0.2 / epoch
    return values


def drawn(figure):
    """Curves of each panel: {title: {name: [(epoch, value), ...]}}."""
    return {
        axis.get_title(loc="left"): {
            line.get_label(): list(zip(line.get_xdata(), line.get_ydata(), strict=True))
            for line in axis.get_lines()
        }
        for axis in figure.axes
        if axis.get_lines()
    }


def test_every_kind_of_metric_has_a_panel():
    panels = drawn(draw_curves([row(1), row(2)], "unet3plus"))
    sides = {f"side{side}" for side in range(1, 6)}
    assert {title: set(curves) for title, curves in panels.items() if title != "Learning rate"} == {
        "Training loss": {"focal", "iou", "total"},
        "Validation Dice": {"liver", "spleen", "mean"},
        "Validation slice false-positive rate": {"liver", "spleen"},
        "Validation accuracy of the slice classifier": {"liver", "spleen"},
        "Validation sensitivity of the slice classifier": {"liver", "spleen"},
        "Validation specificity of the slice classifier": {"liver", "spleen"},
        "Training loss focal, by side output": sides,
        "Training loss iou, by side output": sides,
        "Training loss total, by side output": sides,
    }
    assert len(panels["Learning rate"]) == 1


def test_curve_goes_through_its_values_in_the_order_of_epochs():
    panels = drawn(draw_curves([row(4), row(1), row(2)], ""))
    assert panels["Validation Dice"]["mean"] == [(1, 0.5), (2, 0.75), (4, 0.875)]
    assert panels["Training loss focal, by side output"]["side3"] == [(1, 3), (2, 1.5), (4, 0.75)]


@pytest.mark.parametrize(
    ("prefix", "panel"),
    [
        ("train/side", "by side output"),
        ("val/classifier_", "classifier"),
        ("val/slice_fpr/", "false-positive"),
        ("val/dice", "Dice"),
        ("learning_rate", "Learning rate"),
    ],
)
def test_missing_keys_are_not_drawn(prefix, panel):
    rows = [{key: value for key, value in row(1).items() if not key.startswith(prefix)}]
    assert not [title for title in drawn(draw_curves(rows, "")) if panel in title]


def test_mean_dice_alone_is_drawn():
    panels = drawn(draw_curves([{"epoch": 1, "val/dice": 0.5}], ""))
    assert panels == {"Validation Dice": {"mean": [(1, 0.5)]}}


@pytest.mark.parametrize("gap", [math.nan, math.inf])
def test_values_that_are_not_finite_are_left_out(gap):
    rows = [{"epoch": 1, "train/iou": 1.0}, {"epoch": 2, "train/iou": gap}, {"epoch": 3}]
    assert drawn(draw_curves(rows, "")) == {"Training loss": {"iou": [(1, 1.0)]}}


@pytest.mark.parametrize(("num_epochs", "is_marked"), [(1, True), (30, True), (300, False)])
def test_few_epochs_are_marked_and_many_are_a_line(num_epochs, is_marked):
    figure = draw_curves([row(epoch) for epoch in range(1, num_epochs + 1)], "")
    lines = [line for axis in figure.axes for line in axis.get_lines()]
    assert {line.get_marker() == "o" for line in lines} == {is_marked}


def test_one_epoch_leaves_ink_in_the_picture(tmp_path):
    save_picture(draw_curves([row(1)], "unet3plus"), tmp_path / "one.png")
    save_picture(draw_curves([{"epoch": 1}], "unet3plus"), tmp_path / "none.png")
    assert (tmp_path / "one.png").stat().st_size > 2 * (tmp_path / "none.png").stat().st_size


def test_heading_stands_over_the_picture():
    assert draw_curves([row(1)], "unet, epoch 1").get_suptitle() == "unet, epoch 1"


def test_picture_of_augmented_slices_leaves_out_what_nobody_judged(tmp_path):
    image_BCHW = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    label_BHW = torch.zeros(1, 32, 32, dtype=torch.uint8)
    label_BHW[0, 8:16, 8:16] = 1
    partly_BHW = label_BHW.clone()
    partly_BHW[0, 20:28] = IGNORED_LABEL
    pictures = []
    for number, each in enumerate((label_BHW, partly_BHW)):
        figure = draw_augmented(
            image_BCHW, each, lambda image, label, *_: (image, label), (-160, 240)
        )
        save_picture(figure, tmp_path / f"{number}.png")
        pictures.append((tmp_path / f"{number}.png").read_bytes())
    assert pictures[0] == pictures[1]


def test_more_organs_than_colours_are_drawn():
    rows = [{"epoch": 1, **{f"val/dice/organ{number}": 0.5 for number in range(20)}}]
    assert len(drawn(draw_curves(rows, ""))["Validation Dice"]) == 20
