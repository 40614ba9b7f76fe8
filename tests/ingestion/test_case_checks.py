from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from bodies import LABELS, lps_affine, make_body, turn
from scipy.ndimage import binary_dilation, zoom

from fullscale.ingestion.case_checks import CrossChecks, inspect_case
from fullscale.ingestion.source import SourceCase
from fullscale.runtime.errors import StageError
from fullscale.scans.checks import CHECKS, Finding, check_accepted, failure
from fullscale.scans.geometry import Geometry
from fullscale.scans.volume import Volume

IDS = {name: value for name, value in LABELS.items() if value}
SPACING_MM = (8.0, 7.0, 7.0)


def as_case(hu, labels, annotated=("liver", "spleen"), name="case", text=()):
    own, affine = turn(hu, lps_affine(hu.shape, SPACING_MM), "LPS")
    geometry = Geometry(own.shape, affine)

    def load():
        return Volume(hu, geometry, tuple(text)), Volume(labels.astype(np.uint8), geometry)

    return SourceCase(name, "p", tuple(annotated), (), load)


def codes(hu, labels, **kwargs):
    return [finding.code for finding in inspect_case(as_case(hu, labels, **kwargs), IDS).findings]


@pytest.fixture(scope="module")
def body():
    return make_body()


def test_inspect_case_finds_nothing_in_a_sound_case(body):
    seen = inspect_case(as_case(*body), IDS)
    assert seen.findings == []
    assert not seen.is_refused
    assert seen.facts.shape_ZYX == (16, 40, 48)
    assert seen.facts.orientation == "LPS"
    voxels = np.count_nonzero(body[1] == 1)
    assert seen.facts.organ_ml["liver"] == pytest.approx(voxels * 8 * 7 * 7 / 1000)


def test_inspect_case_counts_slices(body):
    hu, labels = body
    assert codes(hu[4:11], labels[4:11]) == ["few_slices"]
    assert codes(hu[4:12], labels[4:12]) == []


def _padded(hu, value):
    """The scan with a value outside a round field of view."""
    y, x = np.ogrid[-1 : 1 : hu.shape[1] * 1j, -1 : 1 : hu.shape[2] * 1j]
    return np.where(np.hypot(y, x) > 1, value, hu).astype(np.int16)


@pytest.mark.parametrize(
    "change",
    [
        lambda hu: hu.clip(-160, 240),
        lambda hu: hu + 1024,
        lambda hu: ((hu - hu.min()) / np.ptp(hu)).astype(np.float32),
        lambda hu: ((hu - hu.mean()) / hu.std()).astype(np.float32),
        lambda hu: (hu.clip(-160, 240) + 160) * 255 // 400,
        lambda hu: np.minimum(hu, 50),
        lambda hu: _padded(hu + 1024, -2000),  # the intercept is lost, padding hides it
        lambda hu: _padded(hu + 1024, -1024),
        lambda hu: _padded(hu - 1024, -3024),  # the intercept was applied twice
        lambda hu: (hu * 10).clip(-32000, 32000),
    ],
)
def test_inspect_case_refuses_what_is_not_hu(body, change):
    hu, labels = body
    assert "not_hu" in codes(change(hu), labels)


def test_inspect_case_takes_a_clipped_but_wide_range(body):
    hu, labels = body
    assert codes(hu.clip(-1000, 1000), labels) == []


@pytest.mark.parametrize("value", [-2000, -3024, -1024])
def test_inspect_case_takes_padding_outside_the_field_of_view(body, value):
    hu, labels = body
    assert codes(_padded(hu, value), labels) == []


def test_inspect_case_warns_of_a_box_without_air(body):
    hu, labels = body
    box = (slice(None), slice(6, 33), slice(22, 26))
    assert hu[box].min() > -500
    assert codes(hu[box], labels[box]) == ["no_air"]


def test_inspect_case_warns_of_slices_that_are_copies(body):
    hu, labels = (np.repeat(values, 2, axis=0) for values in body)
    assert codes(hu, labels) == ["slices_repeated"]


def test_inspect_case_accepts_what_is_asked_for(body):
    hu, labels = body
    case = as_case(hu + 1024, labels)
    assert inspect_case(case, IDS).is_refused
    seen = inspect_case(case, IDS, accepted=("not_hu",), strict=True)
    assert not seen.is_refused
    assert {"not_hu": "warning"}.items() <= {f.code: f.severity for f in seen.findings}.items()


def test_accept_takes_refusals_of_judgement_only():
    with pytest.raises(StageError, match="--accept unreadable; it can be few_slices"):
        check_accepted(["not_hu", "unreadable"])


def test_inspect_case_refuses_unknown_ids(body):
    hu, labels = body
    assert codes(hu, np.where(labels == 2, 7, labels)) == ["label_unknown"]


@pytest.mark.parametrize("around", [1, 40], ids=["a rim around the organs", "nearly everything"])
def test_inspect_case_judges_the_organs_without_ignored_voxels(body, around):
    """A rim of another id would be a seam, and a labelled volume a label that is full."""
    hu, labels = body
    near = binary_dilation(labels > 0, np.ones((1, 3, 3)), around)
    case = as_case(hu, np.where(near & (labels == 0), 3, labels))
    seen = inspect_case(replace(case, ignored=3), IDS)
    assert [finding.code for finding in seen.findings] == ["label_ignored"]
    assert seen.facts.organ_ml == inspect_case(as_case(hu, labels), IDS).facts.organ_ml


def test_inspect_case_warns_of_an_empty_label(body):
    hu, labels = body
    seen = inspect_case(as_case(hu, labels * 0), IDS)
    assert [(f.code, f.severity) for f in seen.findings] == [("label_empty", "warning")]
    assert not seen.is_refused


def test_inspect_case_warns_of_labels_that_are_not_annotated(body):
    hu, labels = body
    assert codes(hu, labels, annotated=("liver",)) == ["label_not_annotated"]


@pytest.mark.parametrize("zoomed", [(1, 1.5, 1.5), (1, 2, 2), (1, 0.7, 0.7)])
def test_inspect_case_refuses_a_label_that_was_interpolated(body, zoomed):
    hu, labels = body
    spleen = np.where(labels == 2, 2.0, 0)
    blurred = np.rint(zoom(spleen, zoomed, order=1))
    image = zoom(hu.astype(np.float32), zoomed, order=1).astype(np.int16)
    assert "label_interpolated" in codes(image, blurred)
    sharp = zoom(labels, zoomed, order=0)
    assert codes(image, sharp) == []


def test_inspect_case_takes_an_organ_within_an_organ(body):
    hu, labels = body
    inner = labels.copy()
    z, y, x = np.nonzero(labels == 1)
    inner[int(z.mean()), int(y.mean()), int(x.mean())] = 2
    assert codes(hu, inner) == []


def test_inspect_case_refuses_a_label_that_covers_everything(body):
    hu, labels = body
    assert "label_full" in codes(hu, np.ones_like(labels))


@pytest.mark.parametrize(
    ("axes", "along"),
    [
        ((2,), "left to right"),
        ((1,), "front to back"),
        ((0,), "head to foot"),
        ((1, 2), "front to back and left to right"),
    ],
)
def test_inspect_case_refuses_a_label_that_fits_only_when_mirrored(axes, along):
    hu, labels = make_body()
    mask = np.zeros(labels.shape, bool)
    mask[10:15, 22:34, 8:18] = True
    hu, labels = np.where(mask, 110, hu).astype(np.int16), np.where(mask, 1, 0)
    hu[~mask & (hu > 0)] = -80
    seen = inspect_case(as_case(hu, np.flip(labels, axes)), IDS)
    (finding,) = [f for f in seen.findings if f.code == "label_mirrored"]
    assert f"mirrored from {along}" in finding.found
    assert seen.is_refused


@pytest.mark.parametrize("seed", range(8))
def test_inspect_case_does_not_call_a_right_label_mirrored(seed):
    assert codes(*make_body(seed=seed)) == []


def test_inspect_case_warns_of_a_liver_on_the_left(body):
    hu, labels = (np.ascontiguousarray(values[:, :, ::-1]) for values in body)
    seen = inspect_case(as_case(hu, labels), IDS)
    assert [finding.code for finding in seen.findings] == ["liver_on_left"]
    assert not seen.is_refused


def test_inspect_case_warns_of_front_and_back_that_are_swapped(body):
    hu, labels = (values.copy() for values in body)
    hu[4:8, 10:13, 20:30] = -1000  # bowel gas
    assert codes(hu, labels) == []
    seen = inspect_case(as_case(hu[:, ::-1], labels[:, ::-1]), IDS)
    assert [(f.code, f.severity) for f in seen.findings] == [("axis", "warning")]
    assert "front and back look swapped" in seen.findings[0].found


def test_strict_inspection_refuses_for_what_is_a_warning_and_no_note(body):
    hu, labels = (values[:, :, ::-1] for values in body)
    case = as_case(hu, labels, text=("descrip",))
    assert not inspect_case(case, IDS).is_refused
    seen = inspect_case(case, IDS, strict=True)
    assert {f.code: f.severity for f in seen.findings} == {
        "liver_on_left": "refused",
        "private_text": "note",
    }


def test_inspect_case_notes_private_text(body):
    seen = inspect_case(as_case(*body, text=("descrip",)), IDS)
    assert [(f.code, f.severity) for f in seen.findings] == [("private_text", "note")]


@pytest.mark.parametrize("name", ["", "../x", "a/b", "a b", ".hidden", "-rf", "x" * 65, "ä", "a\n"])
def test_inspect_case_refuses_unsafe_names_before_reading(name):
    def load():
        raise AssertionError("must not be read")

    seen = inspect_case(SourceCase(name, "p", (), (), load), IDS)
    assert [finding.code for finding in seen.findings] == ["case_name"]


def test_facts_know_a_scan_again_in_any_orientation(body):
    digests = set()
    for orientation in ("LPS", "RAS", "SAL"):
        own, affine = turn(body[0], lps_affine(body[0].shape, SPACING_MM), orientation)
        geometry = Geometry(own.shape, affine)
        values = geometry.to_canonical(np.asfortranarray(own))
        labels = Volume(body[1], geometry)
        case = SourceCase(
            "c", "p", ("liver",), (), lambda v=values, g=geometry, m=labels: (Volume(v, g), m)
        )
        digests.add(inspect_case(case, IDS).facts.voxels_sha256)
    assert len(digests) == 1


def test_cross_checks_find_doubles_and_shared_patients():
    across = CrossChecks({"v0": "old"}, {"p0": ["old"]})
    assert across.check("new", "p1", "v1") == []
    assert [f.code for f in across.check("twin", "p2", "v0")] == ["content_twice"]
    (shared,) = across.check("second", "p0", "v2")
    assert (shared.code, shared.severity) == ("patient_shared", "note")
    assert "p0 with cases old, second" in shared.found
    assert across.check("second", "p0", "v2") == []


def test_every_check_says_what_is_wanted_and_how_to_cure_it():
    for code, check in CHECKS.items():
        assert code == check.code
        assert check.severity in ("refused", "warning", "note")
        assert all(len(text) > 10 for text in (check.title, check.wanted, check.cure))
        assert not any(text.endswith(".") for text in (check.title, check.wanted, check.cure))


def test_failure_reads_as_one_line():
    error = failure("not_3d", "a.nii:\n shape (8, 8)")
    assert str(error) == (
        "not_3d: found a.nii: shape (8, 8); wanted three axes, each longer than one voxel; "
        "export one three-dimensional volume per file"
    )
    assert str(Finding.from_error("a", error)) == str(error)
