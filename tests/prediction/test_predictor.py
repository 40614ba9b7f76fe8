from __future__ import annotations

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bodies import lps_affine, make_body, save_nifti, turn
from hypothesis import given, settings
from hypothesis import strategies as st
from random_network import random_trained

from fullscale.prediction.components import largest_component
from fullscale.prediction.crf import refine_slices
from fullscale.prediction.predictor import MAX_SLAB_SLICES, Predictor, pick_device, pick_precision
from fullscale.prediction.segmentation import (
    CPU_BATCH_BYTES,
    MAX_BATCH_SIZE,
    read_batch_size,
    segment_scan,
)
from fullscale.runtime.errors import StageError
from fullscale.scans.geometry import Geometry
from fullscale.scans.volume import Volume, read_image

SPACING_MM = (5.0, 7.0, 6.5)
CPU = torch.device("cpu")
CODES = [
    "".join(axes)
    for order in itertools.permutations(("LR", "AP", "SI"))
    for axes in itertools.product(*order)
]


@pytest.fixture(scope="module")
def body():
    return make_body((19, 40, 48), SPACING_MM)


def as_stored(hu, codes):
    """The scan as a file with these axes would hold it, and how the file's voxels are turned."""
    stored, affine = turn(hu, lps_affine(hu.shape, SPACING_MM), codes)
    geometry = Geometry(stored.shape, affine)
    return Volume(geometry.to_canonical(np.ascontiguousarray(stored)), geometry)


@pytest.fixture(scope="module")
def predictor(tiny_params):
    return Predictor(random_trained(tiny_params, seed=2), 0.5, 8, CPU)  # it draws both organs


def test_all_ways_to_store_a_scan_are_tried():
    assert len(set(CODES)) == 48


@pytest.mark.slow
@settings(deadline=None, max_examples=20)
@given(codes=st.sampled_from(CODES))
def test_flipped_or_permuted_scan_gives_the_flipped_or_permuted_mask(predictor, body, codes):
    usual = segment_scan(predictor, as_stored(body[0], "LPS")).label_ZYX
    assert 0.01 < (usual > 0).mean() < 0.99
    scan = as_stored(body[0], codes)
    found = scan.to_own_grid(segment_scan(predictor, scan).label_ZYX)
    expected, _ = turn(usual, lps_affine(usual.shape, SPACING_MM), codes)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("batch_size", [1, 7, MAX_SLAB_SLICES, 13, 32])
def test_slabs_are_the_prediction_bit_for_bit(tiny_params, body, batch_size):
    predictor = Predictor(random_trained(tiny_params), 0.5, batch_size, CPU)
    scan = as_stored(body[0], "LPS")
    whole = predictor.predict(predictor.slice_scan(scan))
    done = 0
    for slab in predictor.slabs(scan):
        assert slab.z.start == done
        done = slab.z.stop
        assert slab.z.stop - slab.z.start <= MAX_SLAB_SLICES
        for k, organ in enumerate(whole.organs):
            np.testing.assert_array_equal(
                slab.probability_KZYX[k], whole.restore(organ)[slab.z], strict=True
            )
            np.testing.assert_array_equal(
                slab.organ_probability_ZK[:, k], whole.organ_probability(organ)[slab.z]
            )
    assert done == len(scan.values_ZYX)


def test_network_without_a_classifier_has_no_classifier(tiny_params, body):
    predictor = Predictor(random_trained(tiny_params, "unet"), 0.5, 8, CPU)
    found = segment_scan(predictor, as_stored(body[0], "RAS"))
    assert all(each.organ_probability_Z is None for each in found.organs.values())
    assert all(each.to_json()["slice_classifier"] is None for each in found.organs.values())


def test_measures_are_those_of_the_label_map(predictor, body):
    scan = as_stored(body[0], "LPS")
    found = segment_scan(predictor, scan)
    np.testing.assert_array_equal(found.label_ZYX, predictor.segment(scan).label_map)
    for organ, each in found.organs.items():
        mask = found.label_ZYX == predictor.description.organs[organ][0]
        assert each.label_id == predictor.description.organs[organ][0]
        assert each.volume_ml == pytest.approx(mask.sum() * 5 * 7 * 6.5 / 1000)
        assert each.mean_hu == pytest.approx(scan.values_ZYX[mask].mean(dtype=np.float64))
        np.testing.assert_array_equal(each.voxels_Z, mask.sum(axis=(1, 2)))
        content = each.to_json()
        drawn = np.flatnonzero(mask.any(axis=(1, 2)))
        assert (content["first_slice"], content["last_slice"]) == (drawn[0], drawn[-1])
        assert content["num_slices"] == len(drawn)
        assert content["slice_classifier"]["num_present_slices"] == 19
        assert len(content["slice_classifier"]["by_slice"]) == 19


def test_closed_gate_leaves_nothing_to_measure(tiny_params, body):
    trained = random_trained(tiny_params)
    trained.network.classifier.conv.bias.data.unflatten(0, (-1, 2))[:, 1] -= 1000
    found = segment_scan(Predictor(trained, 0.5, 8, CPU), as_stored(body[0], "LPS"))
    assert not found.label_ZYX.any()
    content = found.organs["liver"].to_json()
    assert (
        content["volume_ml"]
        == content["num_slices"]
        == content["slice_classifier"]["num_present_slices"]
        == 0
    )
    assert content["mean_hu"] is content["first_slice"] is content["last_slice"] is None


def test_probabilities_are_kept_in_half_precision_on_request(predictor, body):
    scan = as_stored(body[0], "LPS")
    assert segment_scan(predictor, scan).probabilities is None
    kept = segment_scan(predictor, scan, keep_probabilities=True).probabilities
    whole = predictor.predict(predictor.slice_scan(scan))
    for organ, found_ZYX in kept.items():
        assert found_ZYX.dtype == np.float16
        np.testing.assert_allclose(found_ZYX, whole.restore(organ), atol=3e-4)


def test_progress_is_shown_in_batches(predictor, body):
    told = []

    def progress(batches, description, total):
        told.append((description, total, len(list(batches))))
        return []

    segment_scan(predictor, as_stored(body[0], "LPS"), progress=progress)
    assert told == [("slices", 3, 3)]


def test_memory_that_runs_out_is_explained(predictor, body):
    def progress(batches, description, total):
        raise torch.OutOfMemoryError("2 GiB")

    with pytest.raises(StageError, match="memory ran out; try a smaller --batch-size"):
        segment_scan(predictor, as_stored(body[0], "LPS"), progress=progress)


@pytest.mark.parametrize("name", ["gpu", "cuda:7", ""])
def test_unknown_device_is_refused(name):
    with pytest.raises(StageError, match=f"found device '{name}'; wanted one of auto, cpu"):
        pick_device(name)


def test_device_that_is_not_here_is_refused():
    missing = [
        name
        for name, backend in (("cuda", torch.cuda), ("mps", torch.backends.mps))
        if not backend.is_available()
    ]
    assert missing, "a machine with both has another way to fail"
    for name in missing:
        with pytest.raises(StageError, match=f"torch finds no device {name} here; use one of"):
            pick_device(name)
    assert pick_device("cpu") == CPU


@pytest.mark.parametrize("asked", ["0", "-1", "1.5", "many", ""])
def test_batch_size_that_is_none_is_refused(tiny_params, asked):
    description = random_trained(tiny_params).description
    with pytest.raises(StageError, match=f"found --batch-size {asked}; wanted a whole number"):
        read_batch_size(asked, description, CPU)


def test_batch_size_follows_the_memory_a_slice_needs(tiny_params):
    description = random_trained(tiny_params).description
    assert read_batch_size("12", description, CPU) == 12
    assert read_batch_size("auto", description, CPU) == MAX_BATCH_SIZE
    sizes = []
    for width in (8, 16, 64):
        large = description.model_copy(
            update={
                "width": width,
                "slice": description.slice.model_copy(update={"size_px": 320}),
            }
        )
        sizes.append(read_batch_size("auto", large, CPU))
        assert sizes[-1] == 1 or sizes[-1] * width * 4 * 320**2 < CPU_BATCH_BYTES
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == 1


def test_file_of_another_orientation_is_segmented_alike(tmp_path, predictor, body):
    masks = []
    for codes in ("LPS", "AIR"):
        scan = read_image(save_nifti(tmp_path / f"{codes}.nii.gz", body[0], SPACING_MM, codes))
        masks.append(segment_scan(predictor, scan).label_ZYX)
    np.testing.assert_array_equal(*masks)


def test_unknown_precision_is_refused():
    with pytest.raises(StageError, match="found precision 'half'; wanted one of auto, fp32, bf16"):
        pick_precision("half", CPU)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has /proc/cpuinfo")
def test_auto_precision_is_bf16_on_a_processor_that_has_it():
    flags = Path("/proc/cpuinfo").read_text().split()
    has_bf16 = "avx512_bf16" in flags or "amx_bf16" in flags
    assert pick_precision("auto", CPU) == (torch.bfloat16 if has_bf16 else torch.float32)


@pytest.mark.slow  # another program loads torch
def test_auto_precision_is_float32_with_kernels_that_every_processor_has():
    program = (
        "import torch; from fullscale.prediction.predictor import pick_precision; "
        "from fullscale.runtime.cpu_kernels import fix_cpu_kernels; fix_cpu_kernels('avx2', 1); "
        "print(pick_precision('auto', torch.device('cpu')))"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], env=os.environ, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "torch.float32"


def test_bf16_draws_the_same_organs_but_for_their_edges(tiny_params, body, predictor):
    half = Predictor(random_trained(tiny_params, seed=2), 0.5, 8, CPU, "bf16")
    scan = as_stored(body[0], "LPS")
    found, exact = segment_scan(half, scan), segment_scan(predictor, scan)
    assert (found.precision, exact.precision) == ("bf16", "fp32")
    assert 0 < (found.label_ZYX != exact.label_ZYX).mean() < 0.03


def refined(tiny_params, refine):
    """A predictor of the same network, with another way to refine."""
    return Predictor(random_trained(tiny_params, seed=2), 0.5, 8, CPU, refine=refine)


def test_largest_component_is_kept_of_each_organ_in_every_way_to_segment(tiny_params, body):
    scan = as_stored(body[0], "LPS")
    plain, clean = (refined(tiny_params, each) for each in ("none", "largest_component"))
    found = segment_scan(clean, scan)
    num_lost = 0
    wanted_ZYX = np.zeros_like(found.label_ZYX)
    for organ, mask_ZYX in plain.segment(scan).masks.items():
        largest_ZYX = largest_component(mask_ZYX)
        num_lost += int(mask_ZYX.sum() - largest_ZYX.sum())
        wanted_ZYX[largest_ZYX] = clean.description.organs[organ][0]
        assert found.organs[organ].voxels_Z.sum() == largest_ZYX.sum()
        hu = scan.values_ZYX[largest_ZYX].mean(dtype=np.float64)
        assert found.organs[organ].mean_hu == pytest.approx(hu)
    assert num_lost > 0
    predicted = clean.predict(clean.slice_scan(scan))
    for label_ZYX in (
        found.label_ZYX, clean.segment(scan).label_map, clean.label_map(predicted),
    ):  # fmt: skip
        np.testing.assert_array_equal(label_ZYX, wanted_ZYX)


def test_crf_sees_the_slices_and_gives_one_map_in_every_way_to_segment(tiny_params):
    scan = as_stored(make_body((5, 40, 48), SPACING_MM)[0], "LPS")
    crf = refined(tiny_params, "crf")
    predicted = crf.predict(crf.slice_scan(scan))
    settings = crf.description.slice
    refined_KZHW = refine_slices(
        predicted.prediction.probabilities,
        predicted.slices.image_ZHW,
        settings.pixel_mm,
        settings.window_hu,
    )
    assert (refined_KZHW - predicted.prediction.probabilities).abs().max() > 0.1
    prediction = predicted.prediction._replace(probabilities=refined_KZHW)
    slabs = replace(predicted, prediction=prediction).slabs()
    wanted_ZYX = np.concatenate([crf.to_labels(slab) for slab in slabs])
    for label_ZYX in (
        segment_scan(crf, scan).label_ZYX, crf.segment(scan).label_map, crf.label_map(predicted),
    ):  # fmt: skip
        np.testing.assert_array_equal(label_ZYX, wanted_ZYX)
