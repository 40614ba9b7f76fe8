from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from fullscale.evaluation.metrics import score_overlap, score_physical
from fullscale.evaluation.surface import (
    SurfaceDistances,
    diagonal_mm,
    surface_distances,
    surface_points,
)
from fullscale.prediction.components import bounding_box, largest_component

ROOT = Path(__file__).parents[2]
EMPTY = np.zeros((4, 5, 6), dtype=bool)


def box(z, y, x, shape=(12, 14, 16)):
    """A mask that is True in one box, given by its first and last voxel along each axis."""
    mask = np.zeros(shape, dtype=bool)
    mask[z[0] : z[1] + 1, y[0] : y[1] + 1, x[0] : x[1] + 1] = True
    return mask


def slow_surface(mask, spacing):
    """Surface voxels in mm by looking at each voxel's six neighbours, one by one."""
    points = []
    for place in zip(*np.nonzero(mask), strict=True):
        for axis in range(3):
            for step in (-1, 1):
                other = list(place)
                other[axis] += step
                inside = all(0 <= i < num for i, num in zip(other, mask.shape, strict=True))
                if not inside or not mask[tuple(other)]:
                    points.append([i * mm for i, mm in zip(place, spacing, strict=True)])
                    break
            else:
                continue
            break
    return np.array(points)


def slow_percentile(values, share):
    """Linear interpolation between the ordered values."""
    ordered = sorted(values)
    rank = share * (len(ordered) - 1)
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (rank - low) * (ordered[high] - ordered[low])


def slow_scores(predicted, true, spacing):
    """Every score of a pair of masks by brute force, all distances between all surface voxels."""
    predicted_voxels = {tuple(place) for place in np.argwhere(predicted).tolist()}
    true_voxels = {tuple(place) for place in np.argwhere(true).tolist()}
    names = ("dice", "iou", "hd95", "mean", "near_1mm", "near_3mm", "volume")
    if not predicted_voxels and not true_voxels:
        return dict.fromkeys(names, math.nan) | {"dice": 1, "iou": 1}
    voxel_ml = spacing[0] * spacing[1] * spacing[2] / 1000
    volume = (len(predicted_voxels) - len(true_voxels)) * voxel_ml
    if not predicted_voxels or not true_voxels:
        sides = [num * mm for num, mm in zip(true.shape, spacing, strict=True)]
        far = math.sqrt(sum(side**2 for side in sides))
        return dict(zip(names, (0, 0, far, far, 0, 0, volume), strict=True))
    common = len(predicted_voxels & true_voxels)
    distances = cdist(slow_surface(predicted, spacing), slow_surface(true, spacing))
    there, back = distances.min(axis=1), distances.min(axis=0)
    both = [*there, *back]
    return {
        "dice": 2 * common / (len(predicted_voxels) + len(true_voxels)),
        "iou": common / len(predicted_voxels | true_voxels),
        "hd95": max(slow_percentile(there, 0.95), slow_percentile(back, 0.95)),
        "mean": sum(both) / len(both),
        "near_1mm": sum(each < 1.0001 for each in both) / len(both),
        "near_3mm": sum(each < 3.0001 for each in both) / len(both),
        "volume": volume,
    }


def random_pair(seed):
    """Two blobs or clouds of voxels, sometimes empty, and a spacing that is rarely the same."""
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 11, size=3))
    spacing = tuple(float(step) for step in rng.choice([0.5, 0.7, 1.0, 1.5, 3.0, 5.0], size=3))
    kinds = rng.choice(["blob", "cloud", "empty"], size=2, p=[0.6, 0.3, 0.1])
    masks = []
    for kind in kinds:
        if kind == "blob":
            centre, radius = rng.random(3) * shape, 0.5 + rng.random(3) * 5
            grid = np.stack(np.indices(shape), axis=-1)
            masks.append((((grid - centre) / radius) ** 2).sum(axis=-1) < 1)
        elif kind == "cloud":
            masks.append(rng.random(shape) < rng.choice([0.05, 0.5, 1.0]))
        else:
            masks.append(np.zeros(shape, dtype=bool))
    return *masks, spacing


@pytest.mark.parametrize("seed", range(200))
def test_scores_equal_brute_force_on_random_pairs(seed):
    predicted, true, spacing = random_pair(seed)
    overlap = score_overlap(predicted, true, spacing, 1)
    physical = score_physical(predicted, true, spacing)
    expected = slow_scores(predicted, true, spacing)
    found = {
        "dice": overlap.dice,
        "iou": overlap.iou,
        "hd95": physical.hd95_mm,
        "mean": physical.mean_surface_distance_mm,
        "near_1mm": physical.surface_dice_1mm,
        "near_3mm": physical.surface_dice_3mm,
        "volume": physical.volume_difference_ml,
    }
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-9, nan_ok=True)


def test_random_pairs_hold_every_case():
    pairs = [random_pair(seed) for seed in range(200)]
    kinds = {(bool(predicted.any()), bool(true.any())) for predicted, true, _ in pairs}
    assert kinds == {(True, True), (True, False), (False, True), (False, False)}
    assert sum(len(set(spacing)) == 3 for *_, spacing in pairs) > 80
    assert any(1 in predicted.shape for predicted, *_ in pairs)


def test_moved_box_is_as_far_as_it_was_moved():
    true, moved = box((3, 6), (4, 8), (5, 9)), box((5, 8), (4, 8), (5, 9))
    distances = surface_distances(moved, true, (2.5, 1.0, 1.0))
    assert distances.from_predicted_P.max() == pytest.approx(5.0)
    assert distances.hd95_mm == pytest.approx(5.0)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_distance_follows_the_spacing_of_its_axis(axis):
    spacing = (3.0, 0.5, 0.8)
    true = box((5, 5), (5, 5), (5, 5))
    predicted = np.roll(true, 2, axis=axis)
    distances = surface_distances(predicted, true, spacing)
    assert distances.mean_mm == pytest.approx(2 * spacing[axis])


def test_identical_masks_are_no_distance_apart():
    mask = box((2, 9), (3, 9), (1, 14))
    distances = surface_distances(mask, mask, (1.0, 2.0, 3.0))
    assert distances.hd95_mm == distances.mean_mm == 0
    assert distances.dice_within(0) == 1


@pytest.mark.parametrize("seed", range(10))
def test_distances_do_not_depend_on_the_order_of_masks(seed):
    rng = np.random.default_rng(seed)
    one, other = rng.random((2, 6, 7, 8)) < 0.3
    spacing = (5.0, 0.7, 1.0)
    there, back = (surface_distances(*pair, spacing) for pair in ((one, other), (other, one)))
    assert there.hd95_mm == pytest.approx(back.hd95_mm)
    assert there.mean_mm == pytest.approx(back.mean_mm)
    assert there.dice_within(1) == back.dice_within(1)


def test_hd95_is_the_larger_direction_and_the_mean_holds_both():
    distances = SurfaceDistances(np.array([0.0, 0.0]), np.array([0.0, 4.0, 4.0, 4.0]))
    assert distances.hd95_mm == 4
    assert distances.mean_mm == 2
    assert distances.dice_within(3) == 0.5
    assert distances.dice_within(4) == 1


@pytest.mark.parametrize("step", [1 + 1e-6, 1 - 1e-6])
def test_rounded_spacing_does_not_decide_surface_dice(step):
    true, moved = box((3, 3), (4, 4), (5, 5)), box((4, 4), (4, 4), (5, 5))
    assert surface_distances(moved, true, (step, 1.0, 1.0)).dice_within(1) == 1


def test_surface_of_a_box_leaves_out_its_inside():
    points = surface_points(box((1, 3), (1, 3), (1, 3)), (1.0, 1.0, 1.0))
    assert len(points) == 27 - 1
    assert [2.0, 2.0, 2.0] not in points.tolist()


def test_edge_of_the_scan_is_surface():
    full = np.ones((3, 3, 3), dtype=bool)
    assert len(surface_points(full, (1.0, 1.0, 1.0))) == 26


def test_surface_lies_where_the_mask_does():
    points = surface_points(box((7, 7), (2, 2), (9, 9)), (2.0, 0.5, 3.0))
    assert points.tolist() == [[14.0, 1.0, 27.0]]


def test_empty_mask_has_no_surface_and_no_distance():
    assert surface_points(EMPTY, (1.0, 1.0, 1.0)).shape == (0, 3)
    full = ~EMPTY
    with pytest.raises(ValueError, match=r"surfaces of 0 and 96 voxels: an empty mask"):
        surface_distances(EMPTY, full, (1.0, 1.0, 1.0))


def test_distances_refuse_shapes_that_differ():
    with pytest.raises(ValueError, match=r"prediction \(4, 5, 6\) and truth \(3, 5, 6\)"):
        surface_distances(EMPTY, EMPTY[:3], (1.0, 1.0, 1.0))


def test_bounding_box_holds_the_mask_and_no_more():
    assert bounding_box(box((2, 5), (0, 3), (7, 7))) == (slice(2, 6), slice(0, 4), slice(7, 8))
    assert bounding_box(EMPTY) is None


def test_diagonal_is_that_of_the_scan():
    assert diagonal_mm((3, 4, 12), (1.0, 1.0, 1.0)) == pytest.approx(13)
    assert diagonal_mm((1, 2, 6), (3.0, 2.0, 2.0)) == pytest.approx(13)


def test_largest_component_drops_the_smaller_part():
    large, small = box((2, 5), (2, 5), (2, 5)), box((8, 9), (8, 9), (8, 9))
    assert np.array_equal(largest_component(large | small), large)


@pytest.mark.parametrize("corner", [(6, 6, 6), (6, 5, 5), (5, 6, 6)])
def test_parts_that_touch_are_one(corner):
    touching = box((2, 5), (2, 5), (2, 5))
    touching[corner] = True
    assert np.array_equal(largest_component(touching), touching)


def test_largest_component_of_one_part_or_none_changes_nothing():
    one = box((0, 11), (0, 13), (0, 15))
    assert np.array_equal(largest_component(one), one)
    assert not largest_component(EMPTY).any()


def test_of_equal_parts_the_first_is_kept():
    first, second = box((1, 2), (1, 2), (1, 2)), box((8, 9), (8, 9), (8, 9))
    assert np.array_equal(largest_component(first | second), first)


LARGE = """
import json, time
from pathlib import Path
import numpy as np
from fullscale.evaluation.metrics import score_classifier, score_overlap, score_physical
from fullscale.prediction.components import largest_component

def organ(centre, radius):
    mask = np.zeros((200, 512, 512), dtype=bool)
    _, y, x = np.ogrid[:1, :512, :512]
    for z in range(200):
        mask[z] = (
            ((z - centre[0]) / radius[0]) ** 2
            + ((y[0] - centre[1]) / radius[1]) ** 2
            + ((x[0] - centre[2]) / radius[2]) ** 2
        ) < 1
    return mask

true = organ((100, 250, 200), (80, 120, 140))
predicted = organ((104, 255, 204), (82, 118, 140))
predicted[1, 2, 2] = predicted[198, 500, 508] = True  # the box is as large as the scan
start = time.monotonic()
overlap = score_overlap(predicted, true, (1.0, 0.78, 0.78), 10)
physical = score_physical(predicted, true, (1.0, 0.78, 0.78))
score_classifier(true.any(axis=(1, 2)), true)
cleaned = score_physical(largest_component(predicted), true, (1.0, 0.78, 0.78))
# Of this program alone: the kernel's ru_maxrss begins with the size of the one that started it.
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(json.dumps({
    "peak_mb": int(status["VmHWM"].split()[0]) / 1024,
    "wall_s": time.monotonic() - start,
    "dice": overlap.dice,
    "hd95": [physical.hd95_mm, cleaned.hd95_mm],
}))
"""


@pytest.mark.slow
def test_scan_of_200_large_slices_is_scored_within_800_megabytes():
    done = subprocess.run(
        [sys.executable, "-c", LARGE], cwd=ROOT, capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    print(found)
    assert found["peak_mb"] < 800  # 600 slices take 1400, of which 200 are libraries
    assert 0.9 < found["dice"] < 1
    assert found["hd95"] == pytest.approx([6.39, 6.39], abs=0.05)
