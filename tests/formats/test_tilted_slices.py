from __future__ import annotations

import numpy as np
import pytest

from fullscale.formats.tilted_slices import TiltedSlices

SHAPE = (20, 16, 9)
LINEAR = np.array([3.0, -2.0, 5.0])


def tilted(drift_mm):
    affine = np.diag([-1.5, -2.0, 4.0, 1.0])
    affine[:3, 3] = 10, 20, 30
    affine[:2, 2] = drift_mm
    return TiltedSlices(SHAPE, affine)


def world(shape, affine):
    voxels = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    return voxels @ affine[:3, :3].T + affine[:3, 3]


@pytest.mark.parametrize("drift_mm", [(0.0, 1.1), (0.7, -0.9), (-3.0, 0.0)])
def test_upright_grid_has_right_angles_and_the_values_of_its_places(drift_mm):
    slices = tilted(drift_mm)
    axes = slices.upright_affine[:3, :3]
    np.testing.assert_allclose(axes.T @ axes, np.diag([1.5, 2.0, 4.0]) ** 2, atol=1e-9)
    values = (world(SHAPE, slices.affine) @ LINEAR).astype(np.float32)
    upright = slices.to_upright(values, order=1, outside=np.nan)
    expected = world(slices.upright_shape, slices.upright_affine) @ LINEAR
    inside = np.isfinite(upright)
    assert inside.mean() > 0.3
    np.testing.assert_allclose(upright[inside], expected[inside], atol=0.01)


@pytest.mark.parametrize("drift_mm", [(0.0, 1.1), (0.7, -0.9), (1.5, 2.0)])
def test_labels_go_to_the_upright_grid_and_back(drift_mm):
    slices = tilted(drift_mm)
    rng = np.random.default_rng(0)
    labels = np.kron(rng.integers(0, 3, (5, 4, 9)), np.ones((4, 4, 1))).astype(np.uint8)
    there = slices.to_upright(labels, order=0, outside=0)
    np.testing.assert_array_equal(slices.to_slices(there, order=0), labels)


def test_every_slice_is_whole_on_the_upright_grid():
    slices = tilted((1.5, -4.0))  # one column and two rows a slice
    ones = slices.to_upright(np.ones(SHAPE, dtype=np.uint8), order=0, outside=0)
    assert slices.upright_shape == (20 + 8, 16 + 16, 9)
    assert ones.sum() == np.prod(SHAPE)


def test_text_names_the_tilt():
    slices = tilted((0.0, 4.0 * np.tan(np.radians(12))))
    assert str(slices) == "slices shifted by 0.85 mm each, a tilt of 12.0 degrees"
