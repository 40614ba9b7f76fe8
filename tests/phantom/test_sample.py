from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import pytest
import yaml
from project import ROOT

import fullscale.phantom.sample as cohort
from fullscale.phantom import scanner
from fullscale.phantom.contrast import (
    LIVER_RANGE_HU,
    SPLEEN_RANGE_HU,
    Contrast,
    draw_contrast,
)
from fullscale.phantom.organs import LIVER, SPLEEN
from fullscale.phantom.sample import (
    LIVER_ONLY,
    ORGANS,
    RESCANNED,
    SPLEEN_ONLY,
    case_at,
    save_volume,
    write_sample,
)
from fullscale.phantom.scanner import (
    ORIENTATIONS,
    Acquisition,
    Body,
    NoiseSource,
    build_body,
    draw_acquisition,
    simulate,
)
from fullscale.phantom.shapes import (
    Frame,
    Points,
    Solid,
    Structure,
    cut_smoothly,
    dome,
    ellipsoid,
    fit_volume,
    grid_over,
    join_smoothly,
    remembered,
    rotation,
    tube,
    waves,
)

NUM_PATIENTS = 5
SAMPLE_SEED, NUM_SAMPLE_CASES = 3, 4


def points(*rows: tuple[float, float, float]) -> Points:
    return Points(*np.array(rows, dtype=np.float32).T)


class Patient(NamedTuple):
    contrast: Contrast
    body: Body
    scan: Acquisition
    image: np.ndarray
    label: np.ndarray

    def volume_ml(self, organ: int) -> float:
        return float((self.label == organ).sum() * np.prod(self.scan.spacing_mm) / 1000)


@pytest.fixture(scope="module")
def patients() -> list[Patient]:
    """Five patients on a grid of twice the usual voxel size, with one plane for each slice."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scanner, "PLANE_GAP_MM", 100.0)
        for number in range(NUM_PATIENTS):
            rng = np.random.default_rng([11, number])
            contrast = draw_contrast(rng)
            body = build_body(np.random.default_rng([12, number]), contrast)
            scan = draw_acquisition(rng, body, coarsen=2.0)
            found.append(Patient(contrast, body, scan, *simulate(body, scan, rng)))
    return found


def simulate_roughly(
    seed: int, patient: int, **options: Any
) -> tuple[np.ndarray, np.ndarray, Acquisition]:
    """Return a scan of noise with two boxes as organs, in place of `simulate_patient`."""
    rng = np.random.default_rng([seed, patient, options["repeat"]])
    image = rng.normal(0, 20, (3, 8, 40)).astype(np.int16)
    label = np.zeros(image.shape, dtype=np.uint8)
    label[1, 2:6, 4:16], label[1, 2:6, 26:30] = LIVER, SPLEEN
    code = ORIENTATIONS[patient % len(ORIENTATIONS)]
    scan = Acquisition(image.shape, (5, 8, 8), (0, 0, 0), (9, 9, 9), code, 1.0, 0.0, 0.0)
    return image, label, scan


@pytest.fixture
def rough(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Replace the simulation of scans; return the list of what it was asked for."""
    asked = []

    def simulate_it(seed: int, patient: int, **options: Any) -> Any:
        asked.append({"seed": seed, "patient": patient, **options})
        return simulate_roughly(seed, patient, **options)

    monkeypatch.setattr(cohort, "simulate_patient", simulate_it)
    return asked


@pytest.fixture
def rough_sample(rough: list[dict[str, Any]], tmp_path: Path) -> Path:
    folder = tmp_path / "sample"
    assert write_sample(folder, NUM_SAMPLE_CASES, SAMPLE_SEED) == [
        "phantom_001",
        "phantom_002",
        "phantom_003",
        "phantom_004",
    ]
    return folder


def load(folder: Path, case: str) -> tuple[Any, Any]:
    return (
        nib.load(folder / "imagesTr" / f"{case}_0000.nii.gz"),
        nib.load(folder / "labelsTr" / f"{case}.nii.gz"),
    )


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "cases.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# Shapes


@pytest.mark.parametrize(
    ("at", "expected"),
    [((10, 0, 0), 0), ((13, 0, 0), 3), ((0, -12, 0), 2), ((0, 0, 5), -5), ((8, 0, 0), -2)],
)
def test_ellipsoid_distance_of_a_sphere_is_exact(
    at: tuple[float, float, float], expected: float
) -> None:
    assert ellipsoid((0, 0, 0), (10, 10, 10)).distance(points(at))[0] == pytest.approx(
        expected, abs=0.02
    )


@pytest.mark.parametrize("exponent", [2.0, 2.3, 3.0])
def test_ellipsoid_surface_meets_its_axes_at_any_exponent(exponent: float) -> None:
    solid = ellipsoid((1, 2, 3), (10, 20, 30), exponent=exponent)
    surface = solid.distance(points((11, 2, 3), (1, -18, 3), (1, 2, 33)))
    assert surface == pytest.approx(0, abs=0.05)
    assert solid.distance(points((1, 24, 3)))[0] == pytest.approx(2, rel=0.15)


def test_ellipsoid_turned_by_yaw_swaps_x_and_y() -> None:
    solid = ellipsoid((0, 0, 0), (10, 20, 30), rotation(yaw_deg=90))
    assert solid.distance(points((20, 0, 0), (0, 10, 0), (0, 0, 30))) == pytest.approx(0, abs=0.05)


def test_rotation_keeps_lengths() -> None:
    turn = rotation(12, -34, 56)
    np.testing.assert_allclose(turn @ turn.T, np.eye(3), atol=1e-6)
    assert np.linalg.det(turn) == pytest.approx(1)


@pytest.mark.parametrize(
    ("at", "expected"),
    [((5, 0, 0), -3), ((5, 7, 0), 4), ((-3, 4, 0), 2), ((14, 0, 3), 2)],
)
def test_tube_distance_is_euclidean(at: tuple[float, float, float], expected: float) -> None:
    solid = tube([(0, 0, 0), (10, 0, 0)], [3, 3])
    assert solid.distance(points(at))[0] == pytest.approx(expected, abs=1e-4)


def test_tube_tapers_between_its_knots() -> None:
    solid = tube([(0, 0, 0), (10, 0, 0)], [2, 6])
    assert solid.distance(points((5, 10, 0)))[0] == pytest.approx(6)
    assert solid.box == ((-6, -6, -6), (16, 6, 6))


def test_dome_is_a_cylinder_below_its_centre() -> None:
    field = dome((0, 0, 0), (10, 10, 20), 2.0)
    assert field(points((10, 0, -500), (10, 0, 0), (0, 0, 20))) == pytest.approx(0, abs=0.05)
    assert field(points((0, 0, 26)))[0] > 3


def test_smooth_joins_round_only_near_the_seam() -> None:
    near, far = np.array([1.0]), np.array([40.0])
    assert join_smoothly(near, far, 10)[0] == 1
    assert join_smoothly(near, near, 10)[0] == pytest.approx(1 - 10 / 4)
    assert cut_smoothly(near, near, 10)[0] == pytest.approx(1 + 10 / 4)


def test_solid_operations_shift_and_clip_distances() -> None:
    ball = ellipsoid((0, 0, 0), (10, 10, 10))
    at = points((6, 0, 0))
    assert ball.grow(2).distance(at)[0] == pytest.approx(-6, abs=0.02)
    assert ball.within(lambda p: p.x - 5).distance(at)[0] == pytest.approx(1)
    assert ball.without(lambda p: p.x - 5).distance(at)[0] == pytest.approx(-1)
    assert ball.grow(2).box == ((-12, -12, -12), (12, 12, 12))


@pytest.mark.parametrize("volume_ml", [120.0, 350.0, 900.0])
def test_fit_volume_finds_the_radius_of_a_ball(volume_ml: float) -> None:
    grid = grid_over(((-70.0, -70.0, -70.0), (70.0, 70.0, 70.0)), 4.0)
    ball = fit_volume(lambda r: ellipsoid((0, 0, 0), (r, r, r)), volume_ml, (20, 65), grid, 4.0)
    radius = (3 * volume_ml * 1000 / (4 * np.pi)) ** (1 / 3)
    assert ball.distance(points((radius, 0, 0)))[0] == pytest.approx(0, abs=0.5)


def test_waves_have_unit_variance_and_no_offset() -> None:
    grid = grid_over(((0, 0, 0), (400, 400, 400)), 8.0)
    field = waves(np.random.default_rng(0), 12, (20, 60))(grid)
    assert field.std() == pytest.approx(1, abs=0.1)
    assert field.mean() == pytest.approx(0, abs=0.05)


def test_remembered_field_answers_anew_for_other_points() -> None:
    calls = []

    def field(p: Points) -> np.ndarray:
        calls.append(p)
        return p.x * 2

    kept, first, second = remembered(field), points((1, 0, 0)), points((2, 0, 0))
    assert [float(kept(p)[0]) for p in (first, first, second, first)] == [2, 2, 4, 2]
    assert len(calls) == 3


# Contrast


@pytest.mark.parametrize("seed", range(40))
def test_contrast_stays_within_the_ranges_of_real_scans(seed: int) -> None:
    drawn = draw_contrast(np.random.default_rng(seed))
    assert LIVER_RANGE_HU[0] <= drawn.liver_hu <= LIVER_RANGE_HU[1]
    assert SPLEEN_RANGE_HU[0] <= drawn.spleen_hu <= SPLEEN_RANGE_HU[1]


def test_contrast_moves_liver_and_spleen_together() -> None:
    drawn = [draw_contrast(np.random.default_rng(seed)) for seed in range(200)]
    liver, spleen = (np.array([getattr(d, f"{o}_hu") for d in drawn]) for o in ORGANS)
    assert np.corrcoef(liver, spleen)[0, 1] > 0.5
    assert {d.phase for d in drawn} == {"native", "arterial", "portal", "delayed"}


# Anatomy


def test_organ_volumes_are_an_adult_s(patients: list[Patient]) -> None:
    livers = [p.volume_ml(LIVER) for p in patients]
    spleens = [p.volume_ml(SPLEEN) for p in patients]
    assert min(livers) > 1000
    assert max(livers) < 1900
    assert min(spleens) > 110
    assert max(spleens) < 760
    assert np.std(livers) > 80
    assert np.std(spleens) > 30


def test_organ_medians_follow_the_contrast_phase(patients: list[Patient]) -> None:
    """The HU are lower by some HU on this coarse grid: partial volume, vessels and lesions."""
    for p in patients:
        assert np.median(p.image[p.label == LIVER]) == pytest.approx(p.contrast.liver_hu, abs=10)
        assert np.median(p.image[p.label == SPLEEN]) == pytest.approx(p.contrast.spleen_hu, abs=10)


def test_slices_without_organs_lie_above_and_below(patients: list[Patient]) -> None:
    for p in patients:
        (slices,) = np.nonzero((p.label > 0).any(axis=(1, 2)))
        assert slices[0] >= 1
        assert slices[-1] <= len(p.label) - 2
        share = (p.label == LIVER).any(axis=(1, 2)).mean()
        assert 1 / 3 < share < 0.9


def test_liver_lies_right_of_the_spleen(patients: list[Patient]) -> None:
    for p in patients:
        liver, spleen = (np.argwhere(p.label == organ).mean(axis=0) for organ in (LIVER, SPLEEN))
        middle = p.scan.shape[2] / 2
        assert liver[2] < middle < spleen[2]


def test_liver_tapers_to_the_left_and_below(patients: list[Patient]) -> None:
    for p in patients:
        liver = p.label == LIVER
        columns = liver.sum(axis=(0, 1))
        right, left = columns[: len(columns) // 2].sum(), columns[len(columns) // 2 :].sum()
        assert right > 2 * left
        areas = liver.sum(axis=(1, 2))
        areas = areas[areas > 0]
        assert areas[0] < areas.max() / 4


def test_lungs_lie_above_and_air_outside(patients: list[Patient]) -> None:
    for p in patients:
        top = p.image[-1]
        assert ((top > -950) & (top < -700)).mean() > 0.1
        assert np.median(p.image[:, 0]) == pytest.approx(-1000, abs=10)


def test_threshold_does_not_segment_the_liver(patients: list[Patient]) -> None:
    edges = np.arange(0, 220, 10)
    best = 0.0
    for low in edges:
        for high in edges[edges > low]:
            dices = []
            for p in patients:
                found, true = (p.image >= low) & (p.image < high), p.label == LIVER
                dices.append(2 * (found & true).sum() / (found.sum() + true.sum()))
            best = max(best, float(np.mean(dices)))
    assert 0.2 < best < 0.6


def test_neighbours_share_the_liver_s_hu(patients: list[Patient]) -> None:
    """On slices without liver, many other voxels have its HU."""
    for p in patients:
        organ_free = ~(p.label > 0).any(axis=(1, 2))
        alike = np.abs(p.image[organ_free] - p.contrast.liver_hu) < 20
        assert alike.mean() > 0.01


def test_contrast_changes_hu_and_no_shape(
    patients: list[Patient], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scanner, "PLANE_GAP_MM", 100.0)
    first = patients[0]
    contrasts = [draw_contrast(np.random.default_rng(seed)) for seed in range(20)]
    other = next(c for c in contrasts if abs(c.liver_hu - first.contrast.liver_hu) > 25)
    body = build_body(np.random.default_rng([12, 0]), other)
    image, label = simulate(body, first.scan, np.random.default_rng(0))
    np.testing.assert_array_equal(label, first.label)
    medians = [np.median(i[label == LIVER]) for i in (image, first.image)]
    assert abs(medians[0] - medians[1]) > 20


# Scanner


def scan_alone(solid: Solid, shape: tuple[int, int, int], spacing_mm: float) -> Any:
    """Scan one structure of water, id liver, in air, without noise; grid centred at the origin."""
    still = waves(np.random.default_rng(0), 1, (100, 200))
    frame = Frame((1, 1, 1), 0.0, (still, still, still), warp_mm=0.0)
    body = Body([Structure("water", solid, 0.0, LIVER)], frame, (0, 0), 50.0, None)
    spacing = (spacing_mm, 3.0, 3.0)
    z, y, x = (-(n - 1) / 2 * d for n, d in zip(shape, spacing, strict=True))
    scan = Acquisition(
        shape, spacing, (z, y, x), (0, 0, 0), "LPS", 1.0, noise_hu=0.0, streak_hu=0.0
    )
    return simulate(body, scan, np.random.default_rng(0))


@pytest.mark.parametrize("thickness_mm", [4.5, 6.0, 8.0])
def test_scan_keeps_the_volume_of_a_ball(thickness_mm: float) -> None:
    radius = 21.0
    image, label = scan_alone(
        ellipsoid((1, 2, 3), (radius, radius, radius)), (13, 33, 35), thickness_mm
    )
    volume = 4 / 3 * np.pi * radius**3 / (9 * thickness_mm)
    assert (image + 1000.0).sum() / 1000 == pytest.approx(volume, rel=0.02)
    assert (label == LIVER).sum() == pytest.approx(volume, rel=0.04)
    assert ((image > -900) & (image < -100)).sum() > 100
    assert image.min() == -1000
    assert image.max() == 0


def test_scan_averages_through_a_slice() -> None:
    below_two = Solid(lambda p: p.z - 2, ((-99, -99, -99), (99, 99, 2)))
    image, label = scan_alone(below_two, (3, 9, 9), 8.0)
    assert image[0, 4, 4] == 0
    assert image[1, 4, 4] == pytest.approx(-250, abs=40)
    assert image[2, 4, 4] == -1000
    assert label[:, 4, 4].tolist() == [LIVER, LIVER, 0]


def test_noise_is_blurred_and_reaches_its_level() -> None:
    scan = Acquisition(
        (20, 96, 96), (5, 3, 3), (0, 0, 0), (0, 0, 0), "LPS", 1.0, noise_hu=10, streak_hu=0
    )
    source = NoiseSource(np.random.default_rng(0), scan)
    water = np.zeros((96, 96), dtype=np.float32)
    noise = np.stack([source.draw(water) for _ in range(20)])[:, 20:-20, 20:-20]
    assert noise.std() == pytest.approx(11, abs=1.5)

    def alike(first: np.ndarray, second: np.ndarray) -> float:
        return float(np.corrcoef(first.ravel(), second.ravel())[0, 1])

    assert 0.15 < alike(noise[:, :, 1:], noise[:, :, :-1]) < 0.7
    assert abs(alike(noise[:, :, 6:], noise[:, :, :-6])) < 0.1
    assert 0.2 < alike(noise[1:], noise[:-1]) < 0.5


def test_acquisitions_vary_in_orientation_and_spacing(patients: list[Patient]) -> None:
    scans = [draw_acquisition(np.random.default_rng(seed), patients[0].body) for seed in range(40)]
    assert {s.orientation for s in scans} >= {"LPS", "RAS", "LAS"}
    assert len({s.orientation for s in scans}) > 4
    for s in scans:
        assert 112 <= s.shape[2] <= 144
        assert 26 <= s.shape[0] <= 50
        assert 4 <= s.spacing_mm[0] <= 8
        assert 2.4 <= s.spacing_mm[2] <= 3.6


def test_acquisition_of_full_size_has_a_clinical_grid(patients: list[Patient]) -> None:
    scan = draw_acquisition(np.random.default_rng(1), patients[0].body, full_size=True)
    assert scan.shape[1:] == (512, 512)
    assert 250 < scan.shape[0] < 360
    assert 1 <= scan.spacing_mm[0] <= 1.5
    assert 0.7 <= scan.spacing_mm[1] <= 0.9


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_save_volume_keeps_every_voxel_s_place(tmp_path: Path, orientation: str) -> None:
    volume = np.arange(2 * 3 * 5, dtype=np.int16).reshape(2, 3, 5)
    scan = Acquisition(
        (2, 3, 5), (4, 2, 3), (-10, 20, 30), (1, 2, 3), orientation, 1.0, noise_hu=0, streak_hu=0
    )
    save_volume(tmp_path / "a.nii.gz", volume, scan)
    image: Any = nib.load(tmp_path / "a.nii.gz")
    assert "".join(nib.aff2axcodes(image.affine)) == orientation
    assert image.get_data_dtype() == np.int16
    voxel = np.linalg.inv(image.affine) @ [-(30 + 3 + 4 * 3), -(20 + 2 + 1 * 2), -10 + 1 + 1 * 4, 1]
    x, y, z = np.rint(voxel[:3]).astype(int)
    assert np.asarray(image.dataobj)[x, y, z] == volume[1, 1, 4]
    np.testing.assert_allclose(image.get_qform(), image.get_sform(), atol=1e-4)


# Cohort


def test_cases_of_the_default_cohort_are_48_patients() -> None:
    cases = [case_at(index) for index in range(52)]
    assert sorted({c.patient for c in cases}) == list(range(48))
    assert len({c.name for c in cases}) == 52
    repeated = [c.name for c in cases if c.repeat]
    assert repeated == ["phantom_013", "phantom_026", "phantom_039", "phantom_052"]
    assert [c.annotated for c in cases].count(("liver",)) == 4
    assert [c.annotated for c in cases].count(("spleen",)) == 4


def test_cases_keep_their_patient_as_the_cohort_grows() -> None:
    patients = [(case_at(i).patient, case_at(i).repeat) for i in range(200)]
    assert len(set(patients)) == 200
    assert all(patients[i] == (case_at(i).patient, case_at(i).repeat) for i in range(5))


def test_options_of_a_block_show_arms_padding_a_cushion_and_thin_slices() -> None:
    options = [case_at(index).options for index in range(26)]
    assert options[:13] == options[13:]
    assert sum(1 for o in options[:13] if o) == 5
    assert [o["arms"] for o in options[:13] if "arms" in o] == ["beside", "touching", "beside"]
    assert [o["slice_mm"] for o in options[:13] if "slice_mm" in o] == [2.5]
    for name in ("padded", "cushion", "thick_table"):
        assert [o.get(name, False) for o in options[:13]].count(True) == 1
    # Patients with something missing or repeated differ in nothing else.
    assert not any(options[place] for place in (RESCANNED, LIVER_ONLY, SPLEEN_ONLY, 12))


def test_sample_has_the_nnunet_raw_layout(rough_sample: Path) -> None:
    description = json.loads((rough_sample / "dataset.json").read_text(encoding="utf-8"))
    assert description["labels"] == {"background": 0, "liver": 1, "spleen": 2}
    assert description["channel_names"] == {"0": "CT"}
    assert description["file_ending"] == ".nii.gz"
    assert description["numTraining"] == NUM_SAMPLE_CASES
    assert {"name", "description", "licence", "reference"} <= description.keys()
    rows = rows_of(rough_sample)
    assert list(rows[0]) == ["case", "patient", "annotated"]
    assert {f.name for f in (rough_sample / "imagesTr").iterdir()} == {
        f"{r['case']}_0000.nii.gz" for r in rows
    }
    assert {f.name for f in (rough_sample / "labelsTr").iterdir()} == {
        f"{r['case']}.nii.gz" for r in rows
    }
    assert {f.name for f in rough_sample.iterdir()} == {
        "dataset.json",
        "cases.csv",
        "imagesTr",
        "labelsTr",
    }


def test_sample_labels_hold_just_the_annotated_organs(rough_sample: Path) -> None:
    rows = rows_of(rough_sample)
    assert [r["annotated"] for r in rows] == ["liver;spleen"] * 3 + ["liver"]
    for row in rows:
        image, label = load(rough_sample, row["case"])
        assert image.get_data_dtype() == np.int16
        assert label.get_data_dtype() == np.uint8
        assert image.shape == label.shape
        np.testing.assert_array_equal(image.affine, label.affine)
        ids = {0} | {ORGANS[organ] for organ in row["annotated"].split(";")}
        assert set(np.unique(np.asarray(label.dataobj))) == ids


def test_sample_places_the_liver_on_the_right_in_the_world(rough_sample: Path) -> None:
    for row in rows_of(rough_sample)[:3]:
        _, label = load(rough_sample, row["case"])
        data = np.asarray(label.dataobj)
        liver, spleen = (
            nib.affines.apply_affine(label.affine, np.argwhere(data == organ).mean(axis=0))
            for organ in (LIVER, SPLEEN)
        )
        assert liver[0] > spleen[0] + 80


def test_sample_files_carry_neither_time_nor_name(rough_sample: Path) -> None:
    for file in rough_sample.rglob("*.gz"):
        header = file.read_bytes()[:10]
        assert header[3] == 0
        assert header[4:8] == bytes(4)
        with gzip.open(file) as packed:
            assert len(packed.read(352)) == 352


def test_sample_stopped_half_way_leaves_nothing_and_starts_again(
    rough_sample: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "other" / "data"
    folder.parent.mkdir()

    def stop(done: int, total: int) -> None:
        assert (done, total) == (1, 2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_sample(folder, 2, SAMPLE_SEED, progress=stop)
    assert not folder.exists()
    calls = []
    assert write_sample(
        folder, 1, SAMPLE_SEED, progress=lambda done, total: calls.append((done, total))
    ) == ["phantom_001"]
    assert calls == [(1, 1)]
    assert [p.name for p in folder.parent.iterdir()] == ["data"]
    files = sorted(f.relative_to(folder) for f in folder.rglob("*.gz"))
    assert len(files) == 2
    for file in files:
        assert (folder / file).read_bytes() == (rough_sample / file).read_bytes()


def test_sample_simulates_every_case_with_its_options(
    rough: list[dict[str, Any]], tmp_path: Path
) -> None:
    write_sample(tmp_path / "data", 26, SAMPLE_SEED)
    assert rough == [
        {
            "seed": SAMPLE_SEED,
            "patient": case.patient,
            "repeat": case.repeat,
            "full_size": False,
            **case.options,
        }
        for case in map(case_at, range(26))
    ]


def test_sample_of_full_size_shows_usual_scans_only(
    rough: list[dict[str, Any]], tmp_path: Path
) -> None:
    write_sample(tmp_path / "data", 13, SAMPLE_SEED, full_size=True)
    assert [asked["full_size"] for asked in rough] == [True] * 13
    assert all(asked.keys() == {"seed", "patient", "repeat", "full_size"} for asked in rough)


@pytest.mark.parametrize("num_cases", [0, -3])
def test_sample_without_cases_is_refused(tmp_path: Path, num_cases: int) -> None:
    with pytest.raises(ValueError, match=f"num_cases is {num_cases}, expected 1 or more"):
        write_sample(tmp_path / "data", num_cases, 0)
    assert not list(tmp_path.iterdir())


def test_sample_of_negative_seed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seed is -1, expected 0 or more"):
        write_sample(tmp_path / "data", 1, -1)


def test_sample_into_a_folder_with_content_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match=r"is not empty.*name another folder"):
        write_sample(tmp_path, 1, 0)
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_sample_into_a_file_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "data"
    target.write_text("keep")
    with pytest.raises(FileExistsError, match=r"is a file, expected a new or empty folder"):
        write_sample(target, 1, 0)
    assert target.read_text() == "keep"


def read_published() -> dict[str, bytes]:
    """Return the files of the sample scans in this repository, by their names below data/."""
    (out,) = yaml.safe_load((ROOT / "data.dvc").read_text(encoding="utf-8"))["outs"]

    def content(md5: str) -> bytes:
        return (ROOT / "sample-remote/files/md5" / md5[:2] / md5[2:]).read_bytes()

    entries = json.loads(content(out["md5"]))
    return {entry["relpath"]: content(entry["md5"]) for entry in entries}


def read_nifti(content: bytes) -> nib.Nifti1Image:
    return nib.Nifti1Image.from_bytes(gzip.decompress(content))


def test_published_sample_is_a_cohort_within_the_size_budget() -> None:
    files = read_published()
    assert 14e6 < sum(len(content) for content in files.values()) < 28e6
    rows = list(csv.DictReader(files["cases.csv"].decode().splitlines()))
    assert [(row["case"], row["patient"], row["annotated"]) for row in rows] == [
        (case.name, f"patient_{case.patient + 1:03d}", ";".join(case.annotated))
        for case in map(case_at, range(52))
    ]
    codes = set()
    for row in rows:
        image = read_nifti(files[f"imagesTr/{row['case']}_0000.nii.gz"])
        label = read_nifti(files[f"labelsTr/{row['case']}.nii.gz"])
        codes.add("".join(nib.aff2axcodes(image.affine)))
        num_voxels = np.bincount(np.asarray(label.dataobj).ravel(), minlength=3)
        for organ, (low, high) in {"liver": (1000, 1900), "spleen": (110, 760)}.items():
            volume_ml = num_voxels[ORGANS[organ]] * np.prod(image.header.get_zooms()) / 1000
            if organ in row["annotated"].split(";"):
                assert low < volume_ml < high
            else:
                assert volume_ml == 0
    assert len(codes) > 4


@pytest.mark.slow
def test_a_case_without_options_is_the_published_one(tmp_path: Path) -> None:
    """Adding options must not move one draw of the other scans."""
    files = read_published()
    write_sample(tmp_path / "data", 1, 0)
    for name in ("imagesTr/phantom_001_0000.nii.gz", "labelsTr/phantom_001.nii.gz"):
        new, old = (read_nifti(c) for c in ((tmp_path / "data" / name).read_bytes(), files[name]))
        np.testing.assert_array_equal(new.affine, old.affine)
        values = [np.asarray(image.dataobj, dtype=np.int32) for image in (new, old)]
        # Another processor may round the last digit of a few HU otherwise.
        assert np.abs(values[0] - values[1]).max() <= 1
        assert (values[0] != values[1]).mean() < 1e-3


def test_prefix_names_other_cases_and_patients(tmp_path: Path) -> None:
    cohort._write_tables(tmp_path, [case_at(0, "more")], "more")
    assert (
        (tmp_path / "cases.csv").read_text().splitlines()[1].startswith("more_001,more_patient_0")
    )
    with pytest.raises(ValueError, match=r"prefix is '\.\./more', expected letters, digits"):
        write_sample(tmp_path / "new", 1, 0, prefix="../more")
