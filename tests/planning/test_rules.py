import math

import pytest

from fullscale.planning.fingerprint import CaseFacts, OrganFacts, choose_sample
from fullscale.planning.machine import GIB, Machine, find_machine
from fullscale.planning.rules import (
    Length,
    Rung,
    choose_learning_rate,
    choose_loader_workers,
    choose_neighbour_mm,
    choose_window,
    fit_length,
    keeps_cgm,
    make_ladder,
    median_pixel_mm,
    shortest_s,
    slice_side_mm,
)
from fullscale.planning.step_time import Memory
from fullscale.runtime.errors import StageError


def case(spacing_mm=(5.0, 0.8, 0.8), trunk_mm=(250.0, 360.0)):
    return CaseFacts(
        case="a", patient="a", annotated=("liver",), shape_ZYX=(60, 512, 512),
        spacing_mm=spacing_mm, trunk_mm=trunk_mm,
    )  # fmt: skip


def organ(
    inside=(20, 60, 90, 100, 110, 140, 180), around=(-180, -110, -60, 20, 60, 180, 300), ml=1500
):
    return OrganFacts(volume_ml=ml, num_slices=20, inside_hu=inside, around_hu=around)


@pytest.mark.parametrize(
    ("scan_mm", "side_mm", "fixed", "ladder"),
    [
        # clinical scans: every rung
        (0.8, 400, {}, [(8.0, 64, 8), (6.0, 80, 8), (4.0, 112, 8), (3.0, 144, 8), (3.0, 144, 16),
                        (2.0, 208, 16), (2.0, 208, 32), (1.6, 256, 32), (1.6, 256, 64)]),
        # voxels of 3 mm: no finer pixels; and 6 mm costs no more than 8 mm, for 64 px are the least
        (3.02, 381, {}, [(6.0, 64, 8), (4.0, 96, 8), (3.0, 128, 8), (3.0, 128, 16),
                         (3.0, 128, 32), (3.0, 128, 64)]),
        # what the user fixed stays
        (0.8, 400, {"width": 24}, [(8.0, 64, 24), (6.0, 80, 24), (4.0, 112, 24), (3.0, 144, 24),
                                   (2.0, 208, 24), (1.6, 256, 24)]),
        (0.8, 400, {"pixel_mm": 2.5}, [(2.5, 160, 8), (2.5, 160, 16), (2.5, 160, 32),
                                       (2.5, 160, 64)]),
        (0.8, 400, {"size_px": 128}, [(3.2, 128, 8), (3.2, 128, 16), (3.2, 128, 32),
                                      (3.2, 128, 64)]),
    ],
)  # fmt: skip
def test_ladder_of_a_cohort(scan_mm, side_mm, fixed, ladder):
    found = [(r.pixel_mm, r.size_px, r.width) for r in make_ladder(scan_mm, side_mm, **fixed)]
    assert found == ladder
    assert min(pixel_mm * size_px for pixel_mm, size_px, _ in found) >= side_mm


def test_side_of_a_slice_has_a_larger_margin_where_not_all_scans_were_measured():
    known, unknown = case(), case(trunk_mm=None)
    assert slice_side_mm([known, known]) == pytest.approx(378)
    assert slice_side_mm([known, unknown]) == pytest.approx(396)
    assert median_pixel_mm([known, case((5.0, 0.6, 0.6)), case((5.0, 0.7, 0.7))]) == 0.7


@pytest.mark.parametrize(
    ("organs", "window"),
    [
        ([organ()], (-110, 180)),
        # bright organs of a scan in two widen it; one odd scan of eleven does not
        ([organ(inside=(20, 60, 90, 100, 110, 140, 231))], (-110, 240)),
        ([organ(), organ(inside=(20, 60, 90, 100, 110, 140, 231))], (-110, 230)),
        ([organ()] * 10 + [organ(around=(-200, -200, 0, 0, 0, 390, 400))], (-110, 180)),
        ([], None),
        ([organ(inside=(), around=(), ml=0)], None),
    ],
)
def test_window_holds_organs_and_surroundings(organs, window):
    assert choose_window(organs) == window


@pytest.mark.parametrize(
    ("spacings", "neighbour_mm"),
    [((5, 5, 7.5), "auto"), ((1, 1, 5), 3.0), ((10, 10, 5), 8.0), ((3, 3, 3), "auto")],
)
def test_neighbours_lie_at_the_median_spacing_within_limits(spacings, neighbour_mm):
    assert choose_neighbour_mm([case((mm, 0.8, 0.8)) for mm in spacings]) == neighbour_mm


@pytest.mark.parametrize(
    ("width", "rate"), [(4, 0.003), (8, 0.003), (16, 0.0015), (64, 0.00038), (1024, 0.0001)]
)
def test_wider_networks_learn_more_slowly(width, rate):
    assert choose_learning_rate(width) == rate


@pytest.mark.parametrize(("num_patients", "keeps"), [(3, False), (14, False), (15, True)])
def test_few_patients_teach_no_slice_classifier(num_patients, keeps):
    assert keeps_cgm(num_patients) == keeps


@pytest.mark.parametrize(
    ("num_cores", "on_gpu", "workers"),
    [(2, False, None), (64, False, None), (1, True, 1), (4, True, 3), (16, True, None)],
)
def test_loader_workers(num_cores, on_gpu, workers):
    assert choose_loader_workers(num_cores, on_gpu=on_gpu) == workers


@pytest.mark.parametrize(
    ("budget_s", "slice_s", "validation_s", "auto", "length"),
    [
        # whole epochs, in the time to within half an epoch
        (3600, 0.1, 5, 1008, Length(34, 1008, is_auto=True)),
        # a small cohort: epochs of 32 steps
        (3600, 0.1, 5, 100, Length(64, 512, is_auto=False)),
        # a large cohort: ten shorter epochs
        (3600, 0.1, 20, 26000, Length(10, 3392, is_auto=False)),
        # too little time for 12000 slices, or for 32 steps an epoch
        (1200, 0.1, 5, 1008, None),
        (3600, 0.1, 350, 26000, None),
    ],
)
def test_length_fills_the_time(budget_s, slice_s, validation_s, auto, length):
    assert fit_length(budget_s, slice_s, validation_s, auto, 16) == length
    if length is not None:
        takes_s = length.num_epochs * (length.slices_per_epoch * slice_s + validation_s)
        assert 0.95 * budget_s <= takes_s <= 1.05 * budget_s


@pytest.mark.parametrize("auto", [100, 1008, 26000])
@pytest.mark.parametrize("validation_s", [0, 5, 100])
def test_shortest_time_has_a_length(auto, validation_s):
    least_s = shortest_s(0.1, validation_s, 16)
    assert fit_length(least_s, 0.1, validation_s, auto, 16) is not None
    assert fit_length(0.5 * least_s, 0.1, validation_s, auto, 16) is None


@pytest.mark.parametrize(
    ("gib", "part"), [(0.5, 0), (2, 1), (4, 2), (40, 16), (400, 16)]
)  # 1 GiB a slice and 0.2 of weights, in four fifths of the memory
def test_part_of_a_step_that_fits_memory(gib, part):
    memory = Memory(int(0.2 * GIB), GIB)
    assert memory.largest_part(Machine(2, int(gib * GIB)), 16) == part


def test_gpus_are_found_by_name():
    found = find_machine("H100")
    assert (found.gpu, found.memory_bytes, found.is_here) == ("h100", 80 * GIB, False)
    assert find_machine("none").gpu == ""
    with pytest.raises(StageError, match=r"--gpu 'h99' is none of auto, none, .*a100"):
        find_machine("h99")


@pytest.mark.parametrize(
    ("num_cases", "num_voxels", "count"),
    [(0, 0, 0), (2, 10**9, 2), (5, 10**6, 5), (500, 512 * 512 * 300, 19), (500, 10**5, 48)],
)
def test_sample_of_scans_whose_voxels_are_read(num_cases, num_voxels, count):
    places = choose_sample([num_voxels] * num_cases)
    assert len(places) == count
    if count > 1:
        assert (places[0], places[-1]) == (0, num_cases - 1)


def test_operations_grow_with_side_and_width():
    assert math.isclose(Rung(4, 96, 16).operations, 4 * Rung(4, 96, 8).operations)
