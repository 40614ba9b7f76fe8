from __future__ import annotations

import numpy as np
import pytest
from bodies import make_body
from cohorts import SPACING_MM, save_structure_set, structure_set, write_series
from matplotlib.path import Path as Polygon
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter

from fullscale.formats.rtstruct import (
    fill_contours,
    trace_contours,
)
from fullscale.ingestion.ingest import ingest
from fullscale.ingestion.layouts import read_source
from fullscale.runtime.errors import ScanError

SHAPE = (33, 27)


def random_mask(seed):
    """Return a mask (columns, rows) of several blobs, some with holes or of single pixels."""
    rng = np.random.default_rng(seed)
    return gaussian_filter(rng.normal(size=SHAPE), rng.uniform(0.4, 3)) > 0


@pytest.mark.parametrize("seed", range(8))
def test_contours_of_a_mask_give_the_mask_back(seed):
    mask = random_mask(seed)
    np.testing.assert_array_equal(fill_contours(trace_contours(mask), SHAPE), mask)


def test_contours_of_a_mask_at_the_border_of_the_picture_give_it_back():
    mask = np.ones(SHAPE, dtype=bool)
    mask[3, 4] = False
    np.testing.assert_array_equal(fill_contours(trace_contours(mask), SHAPE), mask)


def test_contour_of_a_block_has_the_size_of_its_voxels():
    mask = np.zeros(SHAPE, dtype=bool)
    mask[5:15, 8:12] = True
    (points,) = trace_contours(mask)
    assert points.min(axis=0) == pytest.approx([4.5, 7.5], abs=0.01)
    assert points.max(axis=0) == pytest.approx([14.5, 11.5], abs=0.01)
    # Rounded to whole pixels, as some programs do, it runs through the outermost ones.
    assert np.rint(points).min(axis=0).tolist() == [5, 8]
    assert np.rint(points).max(axis=0).tolist() == [14, 11]
    assert len(points) == 8  # a straight edge has no point between its ends


@pytest.mark.parametrize("seed", range(6))
def test_filled_polygon_is_that_of_matplotlib(seed):
    rng = np.random.default_rng(seed)
    points = rng.uniform(-4, 36, size=(rng.integers(3, 8), 2))
    points = points[np.argsort(np.arctan2(*(points - points.mean(axis=0)).T))]  # no crossing
    centres = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), axis=-1)
    inside = Polygon(np.vstack([points, points[:1]]), closed=True).contains_points(
        centres.reshape(-1, 2)
    )
    np.testing.assert_array_equal(fill_contours([points], SHAPE), inside.reshape(SHAPE))


def test_contour_through_the_centres_of_the_outermost_pixels_holds_them():
    corners = [(5, 8), (14, 8), (14, 11), (5, 11)]
    drawn = Image.new("1", SHAPE)
    ImageDraw.Draw(drawn).polygon(corners, fill=1)  # Pillow counts the outline as inside, too
    found = fill_contours([np.array(corners, dtype=float)], SHAPE)
    np.testing.assert_array_equal(found, np.asarray(drawn).T)
    assert np.count_nonzero(found) == 10 * 4


def test_contour_in_a_contour_is_a_hole():
    outer = np.array([(2.5, 2.5), (20.5, 2.5), (20.5, 20.5), (2.5, 20.5)])
    inner = np.array([(5.5, 5.5), (9.5, 5.5), (9.5, 9.5), (5.5, 9.5)])
    found = fill_contours([outer, inner], SHAPE)
    assert np.count_nonzero(found) == 18 * 18 - 4 * 4
    assert not found[6:10, 6:10].any()


@pytest.fixture
def made(tmp_path):
    """A CT series below subject/ct, its HU and labels (Z, Y, X)."""
    hu, labels = make_body()
    write_series(tmp_path / "subject/ct", hu)
    return tmp_path, hu, labels


def contour_data(structure_set, region=0):
    return structure_set.ROIContourSequence[region].ContourSequence


def load(folder):
    source = read_source(folder)
    assert source.refused == ()
    (case,) = source.cases
    return source, case, *case.load()


def test_structure_set_is_read_as_it_was_written(made):
    folder, hu, labels = made
    save_structure_set(folder, structure_set(folder))
    source, case, scan, found = load(folder)
    assert case.annotated == ("liver", "spleen")
    np.testing.assert_array_equal(scan.values_ZYX, hu)
    for organ, label_id in (("liver", 1), ("spleen", 2)):
        np.testing.assert_array_equal(found.values_ZYX == source.labels[organ], labels == label_id)
    report = ingest(folder, folder.parent / "data")
    assert (report.accepted, report.refused) == (["subject"], [])


def test_contour_in_millimetres_holds_the_voxels_whose_centres_lie_in_it(made):
    folder, _, labels = made
    whole = structure_set(folder)
    # Slice 5 of the series; its first voxel has its centre at -100, -80, 30 mm (LPS).
    z = 30 + 5 * SPACING_MM[0]
    left, top = -100 + 7 * 10 - 3.0, -80 + 7 * 8 - 3.0  # 3 of 3.5 mm before a centre
    corners = [(left, top), (left + 7 * 6, top), (left + 7 * 6, top + 7 * 4), (left, top + 7 * 4)]
    (*_, last) = contour_data(whole)
    last.ContourData = [f"{v:.2f}" for x, y in corners for v in (x, y, z)]
    whole.ROIContourSequence[0].ContourSequence = [last]
    save_structure_set(folder, whole)
    source, _, _, found = load(folder)
    expected = np.zeros_like(labels, dtype=bool)
    expected[5, 8:12, 10:16] = True
    kept = expected & (labels != 2)  # where both are drawn, the smaller has the voxels
    np.testing.assert_array_equal(found.values_ZYX == source.labels["liver"], kept)


def test_region_without_contour_is_not_annotated_and_told_of(made):
    folder, _, _ = made
    save_structure_set(folder, structure_set(folder, ("liver", "spleen", "heart")))
    _, case, _, _ = load(folder)
    assert case.annotated == ("liver", "spleen")
    assert ("region_empty", "heart of plan.dcm") in case.doubts


def test_structure_set_without_contours_is_left_out_and_named(made):
    folder, _, labels = made
    save_structure_set(folder, structure_set(folder, labels=np.zeros_like(labels)))
    source = read_source(folder)
    assert source.cases == ()
    told = [
        finding.found for finding in source.findings if "structure set without" in finding.found
    ]
    assert told
    assert "plan.dcm" in told[0]


@pytest.mark.filterwarnings("ignore:Invalid value for VR DS")
@pytest.mark.parametrize(
    ("data", "found"),
    [
        (["1"] * 8, "of 8 numbers"),
        (["nan"] * 9, "of 9 numbers"),
        (None, "with 0 points"),
        ("1", "1 n"),
    ],
)
def test_contour_of_what_is_no_points_is_refused(made, data, found):
    folder, _, _ = made
    whole = structure_set(folder)
    contour_data(whole)[0].ContourData = data
    save_structure_set(folder, whole)
    with pytest.raises(ScanError, match=f"^contour: .*{found}"):
        read_source(folder).cases[0].load()


def test_region_with_the_name_of_a_number_is_refused(made):
    folder, _, _ = made
    save_structure_set(folder, structure_set(folder, ("ROI_1", "spleen")))
    ((_, error),) = read_source(folder).refused
    assert error.code == "segment_unnamed"


def test_structure_set_without_a_series_finds_it_by_the_frame_of_reference(made):
    folder, _, labels = made
    whole = structure_set(folder)
    del whole.ReferencedFrameOfReferenceSequence[0].RTReferencedStudySequence
    save_structure_set(folder, whole)
    _, _, _, found = load(folder)
    np.testing.assert_array_equal(found.values_ZYX > 0, labels > 0)


def between_slices(whole):
    for contour in contour_data(whole):
        mm = np.array(contour.ContourData, dtype=float).reshape(-1, 3)
        mm[:, 2] += SPACING_MM[0] / 2
        contour.ContourData = [f"{v:.2f}" for v in mm.ravel()]


def outside(whole):
    mm = np.array(contour_data(whole)[0].ContourData, dtype=float).reshape(-1, 3)
    mm[:, 2] -= 1000
    contour_data(whole)[0].ContourData = [f"{v:.2f}" for v in mm.ravel()]


def every_other(whole):
    heights = sorted({float(each.ContourData[2]) for each in contour_data(whole)})
    whole.ROIContourSequence[0].ContourSequence = [
        each for each in contour_data(whole) if float(each.ContourData[2]) in heights[::2]
    ]


def opened(whole):
    contour_data(whole)[0].ContourGeometricType = "OPEN_PLANAR"


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (between_slices, "in the plane of no slice"),
        (outside, "outside the slices"),
        (every_other, r"on every 2\. slice only"),
        (opened, "type OPEN_PLANAR"),
    ],
)
def test_contours_that_give_no_voxels_refuse_the_case(made, spoil, found):
    folder, _, _ = made
    whole = structure_set(folder)
    spoil(whole)
    save_structure_set(folder, whole)
    with pytest.raises(ScanError, match=f"^contour: found .*{found}"):
        read_source(folder).cases[0].load()
