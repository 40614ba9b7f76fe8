from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import scipy.ndimage as ndi

from fullscale.phantom import scanner
from fullscale.phantom.arms import build_arms
from fullscale.phantom.contrast import draw_contrast
from fullscale.phantom.organs import LIVER, SPLEEN
from fullscale.phantom.patient import simulate_patient
from fullscale.phantom.scanner import (
    LARGE_FIELD_MM,
    PADDING_HU,
    THICK_TABLE,
    Acquisition,
    build_body,
)
from fullscale.phantom.trunk import build_trunk

SEED, PATIENT, COARSEN, SLICE_MM = 5, 2, 1.5, 16.0
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "beside": {"arms": "beside"},
    "touching": {"arms": "touching", "cushion": True},
    "padded": {"arms": "beside", "padded": True, "thick_table": True},
}


class Scan(NamedTuple):
    image: np.ndarray
    label: np.ndarray
    grid: Acquisition


def scan_quickly(monkeypatch: pytest.MonkeyPatch, **options: Any) -> Scan:
    """Simulate the patient with one plane for each slice."""
    monkeypatch.setattr(scanner, "PLANE_GAP_MM", 100.0)
    options = {"coarsen": COARSEN, "slice_mm": SLICE_MM} | options
    return Scan(*simulate_patient(SEED, PATIENT, **options))


@pytest.fixture(scope="module")
def patients() -> dict[str, Scan]:
    """One patient with other arms, tables and fields."""
    with pytest.MonkeyPatch.context() as patch:
        return {name: scan_quickly(patch, **options) for name, options in OPTIONS.items()}


def place_of(inner: Scan, outer: Scan) -> tuple[slice, slice, slice]:
    """Return where the grid of `inner` lies in that of `outer`."""
    shift = np.subtract(inner.grid.origin_mm, outer.grid.origin_mm) / outer.grid.spacing_mm
    np.testing.assert_allclose(shift, np.rint(shift), atol=1e-6)
    first = np.rint(shift).astype(int)
    assert (first >= 0).all()
    z, y, x = (slice(int(a), int(a) + n) for a, n in zip(first, inner.label.shape, strict=True))
    return z, y, x


def trunk_and_arms(scan: Scan, index: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return the trunk and all larger parts beside it on a slice, (Y, X) masks, body filled."""
    solid = ndi.binary_fill_holes(scan.image[index] > -400)
    solid = ndi.binary_opening(solid)  # drops the table's sheets
    parts, num = ndi.label(solid)
    masks = sorted((parts == part for part in range(1, num + 1)), key=lambda m: int(m.sum()))
    pixel_cm2 = scan.grid.spacing_mm[1] ** 2 / 100
    return masks[-1], [m for m in masks[:-1] if m.sum() * pixel_cm2 > 12]


# Options


@pytest.mark.parametrize("name", ["beside", "touching", "padded"])
def test_options_leave_every_organ_voxel_in_its_place(patients: dict[str, Scan], name: str) -> None:
    plain, other = patients["plain"], patients[name]
    assert other.grid.spacing_mm == plain.grid.spacing_mm
    at = place_of(plain, other)
    np.testing.assert_array_equal(other.label[at], plain.label)
    assert (other.label > 0).sum() == (plain.label > 0).sum()
    liver = plain.label == LIVER
    assert np.median(other.image[at][liver]) == pytest.approx(np.median(plain.image[liver]), abs=2)


def test_arms_are_missing_unless_asked_for(patients: dict[str, Scan]) -> None:
    scan = patients["plain"]
    for index in range(len(scan.image)):
        assert not trunk_and_arms(scan, index)[1]


def test_arms_beside_lie_in_air_on_either_side(patients: dict[str, Scan]) -> None:
    scan = patients["beside"]
    pixel = scan.grid.spacing_mm[1]
    for index in range(len(scan.image)):
        trunk, arms = trunk_and_arms(scan, index)
        assert len(arms) == 2
        away = ndi.distance_transform_edt(~trunk) * pixel
        middles = []
        for arm in arms:
            assert 10 - pixel <= away[arm].min() <= 40 + pixel
            assert 50 < 2 * np.sqrt(arm.sum() / np.pi) * pixel < 112
            assert (scan.image[index][arm] > 200).sum() * pixel**2 > 100  # bones
            middles.append(ndi.center_of_mass(arm)[1])
            assert np.nonzero(arm)[1].min() > 0
            assert np.nonzero(arm)[1].max() < arm.shape[1] - 1
        x = ndi.center_of_mass(trunk)[1]
        assert min(middles) < x < max(middles)


def test_arms_that_touch_leave_no_air_over_a_part_of_their_length(
    patients: dict[str, Scan],
) -> None:
    scan = patients["touching"]
    # An arm that touches is one part with the trunk.
    counts = [len(trunk_and_arms(scan, index)[1]) for index in range(len(scan.image))]
    assert counts.count(0) >= 2
    assert len(set(counts)) > 1
    assert scan.grid.shape[2] < patients["beside"].grid.shape[2]


def test_padded_field_is_a_square_around_a_scan_circle(patients: dict[str, Scan]) -> None:
    scan = patients["padded"]
    _, rows, columns = scan.grid.shape
    pixel = scan.grid.spacing_mm[1]
    assert rows == columns == pytest.approx(LARGE_FIELD_MM / pixel, abs=0.5)
    y, x = np.indices((rows, columns)) - (rows - 1) / 2
    is_outside = np.hypot(y, x) * pixel > LARGE_FIELD_MM / 2
    assert 0.15 < is_outside.mean() < 0.25
    assert (scan.image[:, is_outside] == PADDING_HU).all()
    assert scan.image[:, ~is_outside].min() > PADDING_HU
    assert (scan.image[:, rows // 4 : -rows // 4, :4] > -200).any()  # an arm is cut


def test_cushion_touches_the_back_and_a_thick_table_is_dense(patients: dict[str, Scan]) -> None:
    scan, plain = patients["touching"], patients["plain"]
    assert scan.grid.cushion is not None
    assert 10 <= scan.grid.cushion.thickness_mm <= 25
    assert -80 <= scan.grid.cushion.hu <= -50
    middle = len(scan.image) // 2
    under = plain.image[middle] < -900
    foam = np.abs(scan.image[middle][place_of(plain, scan)[1:]] - scan.grid.cushion.hu) < 30
    rows = np.nonzero((under & foam).sum(axis=1) > 10)[0]
    assert len(rows) * scan.grid.spacing_mm[1] > 8
    assert not trunk_and_arms(plain, middle)[0][rows[-1]].any()
    assert patients["padded"].grid.sheets == THICK_TABLE


@pytest.mark.parametrize("slice_mm", [0.88, 1.75, 7.0])
def test_reslice_keeps_the_range_and_makes_thin_slices_noisier(
    patients: dict[str, Scan], slice_mm: float
) -> None:
    old = patients["plain"].grid
    new = old.reslice(slice_mm)
    assert new.spacing_mm == (slice_mm, *old.spacing_mm[1:])
    assert new.shape[0] * slice_mm == pytest.approx(old.shape[0] * SLICE_MM, abs=slice_mm / 2)
    middles = [g.origin_mm[0] + (g.shape[0] - 1) / 2 * g.spacing_mm[0] for g in (old, new)]
    assert middles[0] == pytest.approx(middles[1])
    assert new.noise_hu / old.noise_hu == pytest.approx(np.sqrt(SLICE_MM / slice_mm))


def test_slices_of_another_thickness_show_the_same_organs(
    patients: dict[str, Scan], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for scan in (patients["plain"], scan_quickly(monkeypatch, slice_mm=SLICE_MM / 2)):
        liver = np.argwhere(scan.label == LIVER) * scan.grid.spacing_mm + scan.grid.origin_mm
        voxel_ml = np.prod(scan.grid.spacing_mm) / 1000
        found.append((len(liver) * voxel_ml, *liver.mean(axis=0)))
        assert (scan.label == SPLEEN).any()
    assert found[0][0] == pytest.approx(found[1][0], rel=0.03)
    np.testing.assert_allclose(found[0][1:], found[1][1:], atol=2.5)


def test_equal_arguments_give_equal_scans(
    patients: dict[str, Scan], monkeypatch: pytest.MonkeyPatch
) -> None:
    again = scan_quickly(monkeypatch, **OPTIONS["touching"])
    np.testing.assert_array_equal(again.image, patients["touching"].image)
    np.testing.assert_array_equal(again.label, patients["touching"].label)
    assert again.grid == patients["touching"].grid


@pytest.mark.parametrize("slice_mm", [0.0, -1.0, float("nan")])
def test_slices_without_thickness_are_refused(patients: dict[str, Scan], slice_mm: float) -> None:
    with pytest.raises(ValueError, match=r"slice_mm is .*, expected more than 0"):
        patients["plain"].grid.reslice(slice_mm)


def test_unknown_arms_and_arms_without_a_generator_are_refused() -> None:
    rng = np.random.default_rng(0)
    contrast = draw_contrast(rng)
    with pytest.raises(ValueError, match="'up', expected one of none, beside, touching"):
        build_body(rng, contrast, arms="up")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="arms_rng is None: pass a generator"):
        build_body(rng, contrast, arms="beside")


@pytest.mark.parametrize("seed", range(8))
def test_arms_have_the_size_and_the_bones_of_an_adult_s(seed: int) -> None:
    rng = np.random.default_rng(seed)
    contrast = draw_contrast(rng)
    trunk = build_trunk(rng, contrast.muscle_hu)
    scale = (1.08, 0.93, 1.0)
    arms = build_arms(rng, "beside", trunk.skin, contrast, trunk.fat_mm, scale)
    assert [s.name for s in arms.structures].count("humerus") == 4  # two shafts, two ends
    assert {"ulna", "radius"} <= {s.name for s in arms.structures}
    assert 220 < arms.reach_mm < 340
    for skin in (s for s in arms.structures if s.name == "skin of the arm"):
        low, high = skin.solid.box
        middle = (low[2] + 270 + 110, low[2] + 270 - 55)  # of upper arm; below the elbow
        for z, (least, most) in zip(middle, ((80, 110), (60, 85)), strict=True):
            axes = [np.arange(a, b, 1.0, dtype=np.float32) for a, b in zip(low, high, strict=True)]
            x, y = np.meshgrid(axes[0], axes[1], indexing="ij")
            at = scanner.Points(x, y, np.full_like(x, z))
            area = (skin.solid.distance(at) < 0).sum() * scale[0] * scale[1]
            assert least < 2 * np.sqrt(area / np.pi) < most
