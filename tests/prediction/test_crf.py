import math
from dataclasses import replace

import pytest
import torch

from fullscale.prediction.crf import CrfSettings, refine_box, refine_slices

SETTINGS = CrfSettings(
    appearance_weight=1.5,
    appearance_mm=7.0,
    appearance_hu=25.0,
    smoothness_weight=0.75,
    smoothness_mm=3.0,
    num_iterations=3,
)
PIXEL_MM = 2.5


def make_box(height=6, width=5):
    random = torch.Generator().manual_seed(3)
    probability_HW = torch.rand(height, width, generator=random)
    probability_HW[0, 0], probability_HW[1, 1] = 0.0, 1.0
    return probability_HW, torch.rand(height, width, generator=random) * 200


def literal_mean_field(probability, image_hu, pixel_mm, settings):
    """Algorithm 1 of Kraehenbuehl and Koltun with loops over pixels and two labels."""
    height, width = len(probability), len(probability[0])
    pixels = [(y, x) for y in range(height) for x in range(width)]

    def kernels(one, two):
        mm2 = pixel_mm**2 * ((one[0] - two[0]) ** 2 + (one[1] - two[1]) ** 2)
        hu2 = (image_hu[one[0]][one[1]] - image_hu[two[0]][two[1]]) ** 2
        appearance = mm2 / (2 * settings.appearance_mm**2) + hu2 / (2 * settings.appearance_hu**2)
        return math.exp(-appearance), math.exp(-mm2 / (2 * settings.smoothness_mm**2))

    others = {one: [two for two in pixels if two != one] for one in pixels}
    total = [
        {one: sum(kernels(one, two)[m] for two in others[one]) for one in pixels} for m in (0, 1)
    ]
    weights = (settings.appearance_weight, settings.smoothness_weight)
    sure = {p: min(max(probability[p[0]][p[1]], 1e-6), 1 - 1e-6) for p in pixels}
    unary = {p: (-math.log(1 - sure[p]), -math.log(sure[p])) for p in pixels}  # rest, organ
    found = {p: (1 - sure[p], sure[p]) for p in pixels}
    for _ in range(settings.num_iterations):
        updated = {}
        for one in pixels:
            energy = list(unary[one])
            for m, weight in enumerate(weights):
                for two in others[one]:
                    root = math.sqrt(total[m][one] * total[m][two])
                    pull = weight * kernels(one, two)[m] / root
                    for label in (0, 1):  # Potts: the other label of the other pixel costs
                        energy[label] += pull * found[two][1 - label]
            parts = [math.exp(-value) for value in energy]
            updated[one] = (parts[0] / sum(parts), parts[1] / sum(parts))
        found = updated
    return torch.tensor([[found[y, x][1] for x in range(width)] for y in range(height)])


@pytest.mark.parametrize("range_hu", [0, 1, 200, 400])
def test_mean_field_is_that_of_loops_over_pixels(range_hu):
    probability_HW, image_hu_HW = make_box()
    image_hu_HW *= range_hu / 200
    wanted_HW = literal_mean_field(
        probability_HW.tolist(), image_hu_HW.tolist(), PIXEL_MM, SETTINGS
    )
    found_HW = refine_box(probability_HW, image_hu_HW, PIXEL_MM, SETTINGS)
    assert torch.allclose(found_HW, wanted_HW, atol=1e-5)


def test_mean_field_of_a_large_box_is_that_of_all_pairs_of_pixels():
    probability_HW, image_hu_HW = make_box(40, 50)
    hu_N = image_hu_HW.double().reshape(-1)
    rows, columns = torch.meshgrid(torch.arange(40), torch.arange(50), indexing="ij")
    place_N2 = PIXEL_MM * torch.stack([rows, columns], dim=-1).double().reshape(-1, 2)
    mm2_NN = (place_N2[:, None] - place_N2).square().sum(dim=-1)
    hu2_NN = (hu_N[:, None] - hu_N).square()
    near_NN = torch.exp(-mm2_NN / (2 * SETTINGS.smoothness_mm**2))
    alike_NN = torch.exp(
        -mm2_NN / (2 * SETTINGS.appearance_mm**2) - hu2_NN / (2 * SETTINGS.appearance_hu**2)
    )
    pull_NN = torch.zeros_like(near_NN)
    for weight, kernel_NN in (
        (SETTINGS.appearance_weight, alike_NN),
        (SETTINGS.smoothness_weight, near_NN),
    ):
        kernel_NN.fill_diagonal_(0)
        root_N = kernel_NN.sum(dim=1).rsqrt()
        pull_NN += weight * root_N[:, None] * kernel_NN * root_N
    logit_N = torch.logit(probability_HW.double().reshape(-1), 1e-6)
    wanted_N = torch.sigmoid(logit_N)
    for _ in range(SETTINGS.num_iterations):
        wanted_N = torch.sigmoid(logit_N + pull_NN @ (2 * wanted_N - 1))
    found_HW = refine_box(probability_HW, image_hu_HW, PIXEL_MM, SETTINGS)
    assert torch.allclose(found_HW.double().reshape(-1), wanted_N, atol=1e-5)


def test_field_without_weights_changes_nothing():
    probability_HW, image_hu_HW = make_box()
    off = replace(SETTINGS, appearance_weight=0.0, smoothness_weight=0.0)
    found_HW = refine_box(probability_HW, image_hu_HW, PIXEL_MM, off)
    assert torch.allclose(found_HW, probability_HW.clamp(1e-6, 1 - 1e-6), atol=1e-6)


def make_organ():
    """An organ of 160 HU more than the rest, drawn two columns too small, and noise beside it."""
    image_HW = torch.zeros(24, 24)
    image_HW[6:18, 6:18] = 0.4
    probability_HW = torch.full((24, 24), 0.2)
    probability_HW[6:18, 6:18] = 0.8
    probability_HW[6:18, 16:18] = 0.45
    probability_HW[2, 20] = 0.6
    return probability_HW, image_HW


def test_edge_follows_the_image_and_noise_disappears():
    probability_HW, image_HW = make_organ()
    found = refine_slices(probability_HW[None, None], image_HW[None], 3.0, (-160, 240))
    mask_HW = found[0, 0] >= 0.5
    assert torch.equal(mask_HW, image_HW > 0)


def test_slice_without_the_organ_and_pixels_outside_the_box_stay_as_they_are():
    probability_HW, image_HW = make_organ()
    probability_HW[probability_HW < 0.4] = 0.001
    probability_HW[2, 20] = 0.001
    probabilities = torch.stack([torch.full((24, 24), 0.009), probability_HW])[None]
    found = refine_slices(probabilities, image_HW.expand(2, 24, 24), 3.0, (-160, 240))
    assert torch.equal(found[0, 0], probabilities[0, 0])
    assert torch.equal(found[0, 1, :2], probability_HW[:2])  # box and margin begin at row 2
    assert not torch.equal(found[0, 1, 2:], probability_HW[2:])
