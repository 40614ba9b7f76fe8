from __future__ import annotations

import numpy as np
import pytest
from bodies import lps_affine, make_body
from matplotlib.colors import to_hex

from fullscale.scans.geometry import Geometry
from fullscale.scans.volume import Volume
from fullscale.serving.preview import COLOURS, draw_preview

SPACING_MM = (8.0, 7.0, 3.5)
ORGANS = {"liver": 1, "spleen": 2}


@pytest.fixture(scope="module")
def body():
    hu, label_ZYX = make_body((16, 40, 96), SPACING_MM)
    return Volume(hu, Geometry(hu.shape[::-1], lps_affine(hu.shape, SPACING_MM))), label_ZYX


def panels(figure):
    """Axes that show something, by title."""
    return {axes.get_title(): axes for axes in figure.get_axes() if axes.get_images()}


def draw(body, label_ZYX=None):
    scan, labels = body
    labels = labels if label_ZYX is None else label_ZYX
    return draw_preview(scan, labels, ORGANS, (-160, 240), "liver 1 ml")


def outlines(axes):
    return {to_hex(each.get_edgecolor()[0]) for each in axes.collections}


def test_slices_with_organs_and_one_coronal_plane_are_drawn(body):
    shown = panels(draw(body))
    coronal = [title for title in shown if title.startswith("coronal")]
    assert len(coronal) == 1
    slices = [int(title.split()[1]) for title in shown if title.startswith("slice")]
    with_organ = np.flatnonzero(body[1].any(axis=(1, 2)))
    assert len(slices) == 6
    assert (slices[0], slices[-1]) == (with_organ[0], with_organ[-1])


def test_coronal_plane_has_the_head_on_top_and_true_proportions(body):
    scan, _ = body
    (title, axes) = next(each for each in panels(draw(body)).items() if "coronal" in each[0])
    y = int(title.split()[2])
    image = np.asarray(axes.get_images()[0].get_array())
    np.testing.assert_array_equal(image[0], scan.values_ZYX[-1, y])
    assert axes.get_aspect() == pytest.approx(8.0 / 3.5)
    axial = next(axes for title, axes in panels(draw(body)).items() if "slice" in title)
    assert axial.get_aspect() == pytest.approx(7.0 / 3.5)


def test_each_organ_has_its_colour(body):
    shown = panels(draw(body))
    coronal = next(axes for title, axes in shown.items() if "coronal" in title)
    assert outlines(coronal) == set(COLOURS[:2])
    only = np.where(body[1] == 2, body[1], 0)
    for axes in panels(draw(body, only)).values():
        assert outlines(axes) <= {COLOURS[1]}


def test_scan_in_which_nothing_was_found_is_drawn_without_outlines(body):
    shown = panels(draw(body, np.zeros_like(body[1])))
    assert len(shown) == 7
    assert all(outlines(axes) == set() for axes in shown.values())


def test_organ_in_a_single_slice_is_shown(body):
    label_ZYX = body[1].copy()
    label_ZYX[label_ZYX == 2] = 0
    label_ZYX[7, 8:16, 8:16] = 2
    shown = panels(draw(body, label_ZYX))
    assert COLOURS[1] in outlines(shown["slice 7 of 16"])
