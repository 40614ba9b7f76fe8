import numpy as np
import pytest
import torch

from tasks.dataset import SliceDataset, load_batches, normalise, one_mask_per_organ

WINDOW_HU = (-160.0, 240.0)


def test_dataset_holds_every_slice_once(tiny_store):
    dataset = SliceDataset(tiny_store, ["case_00", "case_03"])
    sliced = [tiny_store.load(case) for case in dataset.cases]
    assert len(dataset) == sum(len(case.image) for case in sliced)
    batch = dataset.__getitems__(range(len(dataset)))
    labels = np.concatenate([case.label for case in sliced])
    assert np.array_equal(batch.label_BHW, labels)


def test_batch_stacks_neighbours_and_repeats_the_ends(tiny_store):
    dataset = SliceDataset(tiny_store, ["case_01"])
    image = tiny_store.load("case_01").image
    last = len(image) - 1
    batch = dataset.__getitems__([0, 5, last])
    assert batch.image_BCHW.dtype == torch.int16
    assert np.array_equal(batch.image_BCHW[0], image[[0, 0, 1]])
    assert np.array_equal(batch.image_BCHW[1], image[[4, 5, 6]])
    assert np.array_equal(batch.image_BCHW[2], image[[last - 1, last, last]])


def test_neighbours_never_come_from_another_case(tiny_store):
    dataset = SliceDataset(tiny_store, ["case_00", "case_01"])
    first = len(tiny_store.load("case_00").image)
    image = tiny_store.load("case_01").image
    assert np.array_equal(dataset[first].image_BCHW[0], image[[0, 0, 1]])


def test_batch_knows_what_a_case_annotates(tiny_store):
    dataset = SliceDataset(tiny_store, ["case_00", "case_06", "case_07"])
    num_slices = len(tiny_store.load("case_00").image)
    batch = dataset.__getitems__([0, num_slices, 2 * num_slices])
    assert batch.annotated_BK.tolist() == [[True, True], [True, False], [False, True]]
    assert batch.case_B.tolist() == [0, 1, 2]


@pytest.mark.parametrize(("shuffle", "num_batches"), [(True, 4), (False, 5)])
def test_loader_leaves_out_incomplete_batch_only_when_shuffled(tiny_store, shuffle, num_batches):
    dataset = SliceDataset(tiny_store, ["case_00", "case_01"])
    size = len(dataset) // 4 - 1
    sizes = [len(batch.case_B) for batch in load_batches(dataset, size, shuffle=shuffle)]
    assert len(sizes) == num_batches
    assert sizes[:4] == [size] * 4


def test_normalise_maps_window_to_unit_range():
    image = torch.tensor([-160, 40, 240], dtype=torch.int16)
    assert normalise(image, WINDOW_HU).tolist() == [0.0, 0.5, 1.0]


def test_masks_match_label_map():
    label = torch.tensor([[[0, 1], [2, 1]]], dtype=torch.uint8)
    masks = one_mask_per_organ(label, 3)
    assert masks.shape == (1, 3, 2, 2)
    assert masks[0].tolist() == [
        [[False, True], [False, True]],
        [[False, False], [True, False]],
        [[False, False], [False, False]],
    ]
