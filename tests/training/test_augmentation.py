import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fullscale.params import AugmentParams
from fullscale.reporting.training_pictures import draw_augmented
from fullscale.training.augmentation import NUM_NODES, Augment, draw, sampling_nodes

WINDOW_HU = (-160.0, 240.0)
STILL = dict.fromkeys(AugmentParams.model_fields, 0.0)
FULL = {
    "rotation_deg": 20,
    "scale_fraction": 0.3,
    "shift_fraction": 0.1,
    "elastic_fraction": 0.06,
    "flip_probability": 0.5,
    "noise_hu": 20,
    "blur_px": 1.5,
    "contrast_fraction": 0.3,
}
GEOMETRY = ("rotation_deg", "scale_fraction", "shift_fraction", "elastic_fraction")
MOVES = {key: FULL[key] for key in GEOMETRY}
STRENGTHS = st.fixed_dictionaries(
    {
        "rotation_deg": st.floats(0, 180),
        "scale_fraction": st.floats(0, 0.5),
        "shift_fraction": st.floats(0, 0.5),
        "elastic_fraction": st.floats(0, 0.12),
        "flip_probability": st.floats(0, 1),
        "noise_hu": st.floats(0, 100),
        "blur_px": st.floats(0, 5),
        "contrast_fraction": st.floats(0, 0.9),
    }
)


def strengths(**changes):
    return AugmentParams.model_validate(STILL | changes)


def make_augment(seed=0, **changes):
    return Augment(strengths(**changes), WINDOW_HU, seed)


def make_batch(num=8, height=33, width=35):
    rng = torch.Generator().manual_seed(1)
    image = torch.rand(num, 3, height, width, generator=rng)
    label = torch.randint(0, 3, (num, height, width), generator=rng, dtype=torch.uint8)
    return image, label, torch.arange(num)


def make_organ(num=8, side=64):
    """A bright box off the middle, in image and label alike."""
    label = torch.zeros(num, side, side, dtype=torch.uint8)
    label[:, 20:40, 14:38] = 1
    return label[:, None].float().repeat(1, 3, 1, 1), label, torch.arange(num)


def points_px(num=200, height=65, width=65, epoch=0, **changes):
    """Source points of many samples in pixels, (x, y) last: B x N x N x 2."""
    nodes = sampling_nodes(draw(0, epoch, range(num)), strengths(**changes), height, width)
    sides = np.array([width, height])
    return (nodes.permute(0, 2, 3, 1).numpy() + 1) / 2 * (sides - 1)


def still_px(side=65):
    return points_px(1, side, side)[0]


def cell_area(points_BNN2):
    """Signed area of the cells between the points; negative where mirrored or folded."""
    along_x = np.diff(points_BNN2, axis=2)[:, :-1]
    along_y = np.diff(points_BNN2, axis=1)[:, :, :-1]
    return along_x[..., 0] * along_y[..., 1] - along_x[..., 1] * along_y[..., 0]


@pytest.mark.parametrize("shape", [(33, 35), (34, 32), (96, 96)])
@pytest.mark.parametrize("size", [1, 3, 4])
def test_sample_is_changed_alike_in_any_batch(shape, size):
    image, label, position = make_batch(8, *shape)
    augment = make_augment(**FULL)
    whole = augment(image, label, 2, position)
    parts = [
        augment(
            *(each[start : start + size] for each in (image, label)), 2, position[start:][:size]
        )
        for start in range(0, 8, size)
    ]
    for together, apart in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(together, torch.cat(apart))


def test_sample_is_changed_alike_in_any_place_of_a_batch():
    image, label, position = make_batch()
    order = torch.tensor([3, 0, 7, 1, 5, 2, 6, 4])
    augment = make_augment(**FULL)
    straight = augment(image, label, 0, position)
    shuffled = augment(image[order], label[order], 0, position[order])
    assert torch.equal(shuffled[0], straight[0][order])
    assert torch.equal(shuffled[1], straight[1][order])


def test_change_is_the_same_after_a_restart():
    batch = make_batch()
    interrupted = make_augment(seed=3, **FULL)
    for epoch in range(2):
        interrupted(*batch[:2], epoch, batch[2])
    resumed = make_augment(seed=3, **FULL)
    for before, after in zip(
        interrupted(*batch[:2], 2, batch[2]), resumed(*batch[:2], 2, batch[2]), strict=True
    ):
        assert torch.equal(before, after)


@pytest.mark.parametrize("key", [key for key in FULL if key != "flip_probability"])
@pytest.mark.parametrize(("seed", "epoch", "start"), [(1, 0, 0), (0, 1, 0), (0, 0, 8)])
def test_other_seed_epoch_or_position_changes_otherwise(key, seed, epoch, start):
    image, label, position = make_batch()
    first = make_augment(**{key: FULL[key]})(image, label, 0, position)[0]
    other = make_augment(seed, **{key: FULL[key]})(image, label, epoch, position + start)[0]
    differs_B = (first != other).flatten(1).any(dim=1)
    assert differs_B.sum() >= 7  # two blurs can both be too weak to show


@given(
    st.integers(0, 2**128 - 1),
    st.lists(
        st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**63 - 1)), min_size=2, max_size=4
    ),
)
@settings(max_examples=50, deadline=None)
def test_no_two_places_share_numbers(seed, places):
    drawn = [draw(seed, epoch, [position]).noise_seed_B[0] for epoch, position in places]
    assert len(set(drawn)) == len(set(places))


def test_draws_are_pinned():
    """A change here changes every training that was ever begun."""
    draws = draw(seed=7, epoch=2, positions=[5])
    expected = np.random.Generator(np.random.Philox(key=7, counter=[0, 0, 5, 2]))
    assert draws.noise_seed_B == [int(expected.integers(2**63))]
    assert draws.rotation_B[0] == 2 * expected.random() - 1


def test_switching_a_change_on_leaves_the_others():
    image, label, position = make_batch()
    alone = make_augment(rotation_deg=20)(image, label, 0, position)[1]
    together = make_augment(rotation_deg=20, noise_hu=9, blur_px=1)(image, label, 0, position)[1]
    assert torch.equal(alone, together)


def test_global_random_state_is_neither_read_nor_moved():
    batch = make_batch()
    augment = make_augment(**FULL)
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - the global state is what is looked at
        random.seed(seed)
        before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
        results.append(augment(*batch[:2], 0, batch[2])[0])
        assert torch.equal(torch.get_rng_state(), before[0])
        assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
        assert random.getstate() == before[2]
    assert torch.equal(*results)


def test_no_strength_does_no_work():
    image, label, position = make_batch()
    changed, label_after = make_augment()(image, label, 0, position)
    assert changed is image
    assert label_after is label


@pytest.mark.parametrize("key", list(FULL))
def test_input_is_not_overwritten(key):
    image, label, position = make_batch()
    copies = image.clone(), label.clone()
    changed, _ = make_augment(**{key: FULL[key]})(image, label, 0, position)
    assert not torch.equal(changed, image)
    assert torch.equal(image, copies[0])
    assert torch.equal(label, copies[1])


@pytest.mark.parametrize("key", ["noise_hu", "blur_px", "contrast_fraction"])
def test_change_of_values_leaves_label(key):
    image, label, position = make_batch()
    assert make_augment(**{key: FULL[key]})(image, label, 0, position)[1] is label


@given(
    STRENGTHS, st.integers(0, 2**32), st.integers(1, 3), st.integers(32, 40), st.integers(32, 40)
)
@settings(max_examples=40, deadline=None)
def test_any_strengths_keep_shape_type_range_and_label_ids(chosen, seed, num, height, width):
    image, label, position = make_batch(num, height, width)
    label[label == 1] = 255
    changed, label_after = make_augment(seed, **chosen)(image, label, 0, position)
    assert (changed.shape, changed.dtype) == (image.shape, torch.float32)
    assert (label_after.shape, label_after.dtype) == (label.shape, torch.uint8)
    assert torch.isfinite(changed).all()
    assert changed.min() >= 0
    assert changed.max() <= 1
    assert set(label_after.unique().tolist()) <= {0, 2, 255}


@given(st.integers(0, 2**32), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_label_follows_image(seed, epoch):
    image, label, position = make_organ()
    moved, label_after = make_augment(seed, **MOVES)(image, label, epoch, position)
    assert not torch.equal(label_after, label)
    for channel in range(3):
        bright = moved[:, channel] > 0.5
        overlap = (bright & (label_after == 1)).sum(dim=(1, 2))
        union = (bright | (label_after == 1)).sum(dim=(1, 2))
        assert (overlap / union).min() > 0.97


def test_rotation_spreads_over_its_range():
    still, turned = still_px() - 32, points_px(1000, rotation_deg=12) - 32
    angles = np.arctan2(turned[:, 0, 0, 1], turned[:, 0, 0, 0]) - np.arctan2(*still[0, 0][::-1])
    angles = np.rad2deg((angles + np.pi) % (2 * np.pi) - np.pi)
    assert np.abs(angles).max() <= 12.001
    assert angles.std() == pytest.approx(12 / np.sqrt(3), rel=0.05)
    assert abs(angles.mean()) < 0.7
    assert np.allclose(np.linalg.norm(turned, axis=-1), np.linalg.norm(still, axis=-1), atol=1e-3)


def test_rotation_keeps_angles_in_an_oblong_picture():
    turned = points_px(20, height=33, width=97, rotation_deg=45) - [48, 16]
    assert np.linalg.norm(turned[:, 0, 0], axis=-1) == pytest.approx(np.hypot(48, 16), rel=1e-4)


def test_scale_spreads_over_its_range():
    scale = 1 / ((points_px(1000, scale_fraction=0.3) - 32)[:, 0, 0] / -32)
    assert np.allclose(scale[:, 0], scale[:, 1], atol=1e-4)
    assert scale.min() >= 0.7 - 1e-4
    assert scale.max() <= 1.3 + 1e-4
    assert scale.std() == pytest.approx(0.3 / np.sqrt(3), rel=0.05)


def test_shift_is_a_fraction_of_each_side():
    shift = points_px(1000, height=51, width=101, shift_fraction=0.1)[:, 0, 0]
    assert np.abs(shift).max(axis=0) == pytest.approx([10.1, 5.1], rel=0.02)
    assert shift.std(axis=0) == pytest.approx(np.array([10.1, 5.1]) / np.sqrt(3), rel=0.05)
    assert abs(np.corrcoef(shift.T)[0, 1]) < 0.1


@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.12])
def test_bend_is_bounded_and_not_far_below(fraction):
    length = np.linalg.norm(points_px(elastic_fraction=fraction) - still_px(), axis=-1)
    assert length.max() <= fraction * 65 + 1e-3
    assert length.max() > 0.5 * fraction * 65
    assert length.mean() > 0.15 * fraction * 65


def test_bend_of_equal_control_points_is_a_shift():
    draws = draw(0, 0, [0])
    draws.bend_BKK2[:] = [0.5, -1]
    nodes = sampling_nodes(draws, strengths(elastic_fraction=0.1), 65, 65)
    moved = (nodes.permute(0, 2, 3, 1).numpy()[0] + 1) * 32 - still_px()
    assert moved == pytest.approx(np.broadcast_to([3.25, -6.5], moved.shape), abs=1e-4)


@given(st.integers(0, 2**20))
@settings(max_examples=30, deadline=None)
def test_strongest_bend_never_folds(epoch):
    assert cell_area(points_px(8, epoch=epoch, elastic_fraction=0.12)).min() > 0


def test_still_map_is_the_identity():
    assert still_px(NUM_NODES)[3, 5] == pytest.approx([5, 3], abs=1e-5)


def test_outside_is_air_and_background():
    image = torch.ones(16, 3, 33, 33)
    label = torch.ones(16, 33, 33, dtype=torch.uint8)
    moved, label_after = make_augment(shift_fraction=0.4)(image, label, 0, torch.arange(16))
    outside = label_after == 0
    assert outside.float().mean() > 0.1
    assert moved.permute(1, 0, 2, 3)[:, outside].max() <= 0.5
    assert (moved == 0).float().mean() > 0.1


def test_flip_swaps_left_and_right_of_image_and_label():
    image, label, position = make_batch()
    flipped, label_after = make_augment(flip_probability=1)(image, label, 0, position)
    assert torch.allclose(flipped, image.flip(-1), atol=1e-5)
    assert torch.equal(label_after, label.flip(-1))


def test_flip_has_the_set_probability():
    num = 400
    image = torch.zeros(num, 1, 8, 8)
    image[..., :4] = 1
    label = torch.zeros(num, 8, 8, dtype=torch.uint8)
    flipped, _ = make_augment(flip_probability=0.25)(image, label, 0, torch.arange(num))
    assert float((flipped[:, 0, 0, 0] < 0.5).float().mean()) == pytest.approx(0.25, abs=0.06)


@pytest.mark.parametrize(("flip_probability", "sign"), [(0, 1), (1, -1)])
def test_picture_is_mirrored_by_flip_alone(flip_probability, sign):
    area = cell_area(points_px(**MOVES, flip_probability=flip_probability))
    assert (sign * area).min() > 0


@pytest.mark.parametrize("noise_hu", [5, 20])
def test_noise_has_the_set_strength(noise_hu):
    image = torch.full((8, 3, 64, 64), 0.5)
    label = torch.zeros(8, 64, 64, dtype=torch.uint8)
    changed, _ = make_augment(noise_hu=noise_hu)(image, label, 0, torch.arange(8))
    noise_hu_BCHW = (changed - image) * (WINDOW_HU[1] - WINDOW_HU[0])
    assert float(noise_hu_BCHW.std()) == pytest.approx(noise_hu, rel=0.02)
    assert abs(float(noise_hu_BCHW.mean())) < 0.02 * noise_hu
    assert torch.corrcoef(noise_hu_BCHW.flatten(1)).fill_diagonal_(0).abs().max() < 0.04
    channels = noise_hu_BCHW.transpose(0, 1).flatten(1)
    assert torch.corrcoef(channels).fill_diagonal_(0).abs().max() < 0.03


def test_contrast_turns_about_the_middle_of_the_window():
    image = torch.tensor([0.3, 0.5, 0.7]).repeat(500, 1, 32, 1)
    label = torch.zeros(500, 32, 3, dtype=torch.uint8)
    changed, _ = make_augment(contrast_fraction=0.4)(image, label, 0, torch.arange(500))
    low, middle, high = changed[:, 0, 0].T
    assert torch.all(middle == 0.5)
    gain = (high - 0.5) / 0.2
    assert torch.allclose(low, 1 - high, atol=1e-6)
    assert gain.min() >= 0.6 - 1e-5
    assert gain.max() <= 1.4 + 1e-5
    assert float(gain.std()) == pytest.approx(0.4 / 3**0.5, rel=0.05)


def test_blur_is_a_gaussian_of_the_drawn_width():
    image = torch.zeros(4, 3, 41, 43)
    image[:, :, 20, 21] = 1
    label = torch.zeros(4, 41, 43, dtype=torch.uint8)
    changed, _ = make_augment(blur_px=3)(image, label, 5, torch.arange(4))
    for picture, sigma_px in zip(changed[:, 1], 3 * draw(0, 5, range(4)).blur_B, strict=True):
        at = torch.arange(-9, 10, dtype=torch.float64)
        kernel = torch.exp(-(at**2) / (2 * sigma_px**2))
        kernel /= kernel.sum()
        assert torch.allclose(picture[11:30, 12:31], (kernel[:, None] * kernel).float(), atol=1e-6)
        assert float(picture.sum()) == pytest.approx(1, abs=1e-5)


def test_blur_of_small_picture_and_wide_kernel():
    image = torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(0))
    label = torch.zeros(2, 5, 7, dtype=torch.uint8)
    changed, _ = make_augment(blur_px=5)(image, label, 0, torch.arange(2))
    assert float(changed.std()) < float(image.std())


@pytest.mark.parametrize("context", ["deterministic", "autocast", "channels_last", "grad"])
def test_result_is_the_same_where_training_runs_it(context):
    image, label, position = make_batch()
    augment = make_augment(**FULL)
    plain, plain_label = augment(image, label, 0, position)
    if context == "deterministic":
        torch.use_deterministic_algorithms(True)
        try:
            found, found_label = augment(image, label, 0, position)
        finally:
            torch.use_deterministic_algorithms(False)
    elif context == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            found, found_label = augment(image, label, 0, position)
    elif context == "channels_last":
        laid_out = image.to(memory_format=torch.channels_last)
        found, found_label = augment(laid_out, label, 0, position)
    else:
        with torch.enable_grad():
            found, found_label = augment(image.clone().requires_grad_(), label, 0, position)
        assert not found.requires_grad
    assert found.dtype == torch.float32
    assert torch.equal(found, plain)
    assert torch.equal(found_label, plain_label)


@pytest.mark.parametrize("key", list(FULL))
def test_single_change_does_not_depend_on_memory_format(key):
    image, label, position = make_batch()
    augment = make_augment(**{key: FULL[key]})
    laid_out = image.to(memory_format=torch.channels_last)
    found, _ = augment(laid_out, label, 0, position)
    assert torch.equal(found, augment(image, label, 0, position)[0])


@pytest.mark.parametrize("threads", [1, 2])
def test_result_does_not_depend_on_threads(threads):
    image, label, position = make_batch(4, 97, 101)
    before = torch.get_num_threads()
    results = []
    try:
        for num in (threads, 3):
            torch.set_num_threads(num)
            results.append(make_augment(**FULL)(image, label, 0, position)[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


def test_seed_below_zero_is_refused():
    with pytest.raises(
        ValueError, match=r"seed is -1, expected 0 or more: choose another of seeds"
    ):
        make_augment(seed=-1)


def test_image_that_is_not_float32_is_refused():
    image, label, position = make_batch()
    with pytest.raises(ValueError, match=r"image is torch\.int16, expected torch\.float32"):
        make_augment(noise_hu=1)(image.to(torch.int16), label, 0, position)


@pytest.mark.parametrize(
    ("num_labels", "height", "num_positions"), [(7, 33, 8), (8, 32, 8), (8, 33, 9)]
)
def test_batch_that_does_not_belong_together_is_refused(num_labels, height, num_positions):
    image, label, _ = make_batch()
    with pytest.raises(ValueError, match=r"image \(8, 3, 33, 35\) came with label .* expected"):
        make_augment(noise_hu=1)(image, label[:num_labels, :height], 0, torch.arange(num_positions))


def test_picture_shows_slices_and_what_becomes_of_them():
    image, label, position = make_organ(4, 48)
    augment = make_augment(rotation_deg=20, shift_fraction=0.1)
    axes = draw_augmented(image, label, augment, WINDOW_HU, num_epochs=2).axes
    assert [axis.get_title() for axis in axes] == [f"position {place}" for place in range(4)]
    for place, axis in enumerate(axes):
        shown_hu = axis.images[0].get_array()
        assert shown_hu.shape == (3 * 48, 48)
        assert np.unique(shown_hu[:48]).tolist() == list(WINDOW_HU)
        second = augment(image, label, 1, position)[0][place, 1].numpy()
        assert np.allclose(shown_hu[96:], second * 400 - 160, atol=1e-3)
        assert len(axis.collections[0].get_paths()[0].to_polygons()) == 3


def test_picture_of_slices_without_organ_has_no_outline():
    image, label, _ = make_batch(2)
    axes = draw_augmented(image, torch.zeros_like(label), make_augment(), WINDOW_HU).axes
    assert [len(axis.collections) for axis in axes] == [0, 0]
