import subprocess
import sys

import numpy as np
import pytest
import torch

from fullscale.training.dataset import (
    BatchSharding,
    SliceDataset,
    TrainingSlices,
    training_batches,
    whole_batches,
)
from fullscale.training.epoch_order import EpochOrder
from model.inference import adjacent_slices
from model.preprocessing import normalise, one_mask_per_organ

WINDOW_HU = (-160.0, 240.0)
SPACING_MM = 8.0  # of the slices of the tiny cohort


def test_dataset_holds_every_slice_once(tiny_store):
    dataset = SliceDataset(tiny_store, ["case_00", "case_03"], SPACING_MM)
    sliced = [tiny_store.load(case) for case in dataset.cases]
    assert len(dataset) == sum(len(case.image) for case in sliced)
    batch = dataset.__getitems__(range(len(dataset)))
    labels = np.concatenate([case.label for case in sliced])
    assert np.array_equal(batch.label_BHW, labels)


def test_batch_stacks_neighbours_and_repeats_the_ends(tiny_store):
    dataset = SliceDataset(tiny_store, ["case_01"], SPACING_MM)
    image = tiny_store.load("case_01").image
    last = len(image) - 1
    batch = dataset.__getitems__([0, 5, last])
    assert batch.image_BCHW.dtype == torch.float32
    assert np.array_equal(batch.image_BCHW[0], image[[0, 0, 1]])
    assert np.array_equal(batch.image_BCHW[1], image[[4, 5, 6]])
    assert np.array_equal(batch.image_BCHW[2], image[[last - 1, last, last]])


def test_neighbours_at_another_distance_are_interpolated_as_in_prediction(tiny_store):
    dataset = SliceDataset(tiny_store, ["case_01"], 0.3 * SPACING_MM)
    image_ZHW = torch.from_numpy(np.array(tiny_store.load("case_01").image)).float()
    indices = torch.tensor([0, 4, 5, len(image_ZHW) - 1])
    found = dataset.__getitems__(indices.tolist()).image_BCHW
    assert torch.equal(found, adjacent_slices(image_ZHW, indices, 3, step=0.3))
    assert not torch.equal(found[1, 0], image_ZHW[3])


def test_neighbours_never_come_from_another_case(tiny_store):
    dataset = SliceDataset(tiny_store, ["case_00", "case_01"], SPACING_MM)
    first = len(tiny_store.load("case_00").image)
    image = tiny_store.load("case_01").image
    assert np.array_equal(dataset[first].image_BCHW[0], image[[0, 0, 1]])


def test_batch_knows_what_a_case_annotates(tiny_store):
    dataset = SliceDataset(tiny_store, ["case_00", "case_06", "case_07"], SPACING_MM)
    num_slices = len(tiny_store.load("case_00").image)
    batch = dataset.__getitems__([0, num_slices, 2 * num_slices])
    assert batch.annotated_BK.tolist() == [[True, True], [True, False], [False, True]]
    assert batch.case_B.tolist() == [0, 1, 2]


def test_slice_without_any_annotated_organ_is_organ_free(tiny_store):
    dataset = SliceDataset(tiny_store, ["case_00", "case_06"], SPACING_MM)
    labels = np.concatenate([tiny_store.load(case).label for case in dataset.cases])
    assert dataset.organ_free.tolist() == (labels == 0).all(axis=(1, 2)).tolist()
    assert 0 < dataset.organ_free.sum() < len(dataset)


def test_epoch_is_as_long_as_asked_for(tiny_store, tiny_params):
    dataset = SliceDataset(tiny_store, ["case_00", "case_06"], 2 * SPACING_MM)
    for sampling, asked, expected in [
        ("case", "auto", len(dataset) // 2),
        ("slice", "auto", len(dataset)),
        ("case", 7, 7),
        ("slice", 7, 7),
    ]:
        values = {"sampling": sampling, "slices_per_epoch": asked}
        train = tiny_params.train.model_copy(update=values)
        assert len(dataset.make_order(train, 0)) == expected


def test_order_gives_each_case_its_draws(tiny_store, tiny_params):
    dataset = SliceDataset(tiny_store, ["case_00", "case_06"], SPACING_MM)
    chosen = dataset.make_order(tiny_params.train, 0).of_epoch(0)
    batch = dataset.__getitems__(chosen.tolist())
    assert abs(int((batch.case_B == 0).sum()) - len(chosen) / 2) <= 1
    assert batch.label_BHW.flatten(1).any(dim=1).float().mean() == pytest.approx(0.75, abs=0.05)


def test_whole_batches_hold_every_slice_once_for_any_number_of_processes(tiny_store):
    dataset = SliceDataset(tiny_store, ["case_00", "case_01"], SPACING_MM)
    for num_processes in (1, 3):
        sizes = []
        for rank in range(num_processes):
            batches = whole_batches(dataset, 7, rank=rank, num_processes=num_processes)
            sizes += [len(batch.case_B) for batch in batches]
        assert sum(sizes) == len(dataset)
        assert max(sizes) == 7


def collect(store, sharding, start=(0, 0)):
    dataset = SliceDataset(store, ["case_00", "case_06"], SPACING_MM)
    case = np.zeros(len(dataset), int)
    order = EpochOrder(case, dataset.organ_free, len(dataset), 0.25, "case", 0)
    return list(training_batches(TrainingSlices(dataset, order, sharding), 2, start))


def test_training_goes_on_at_any_step(tiny_store):
    whole = collect(tiny_store, BatchSharding(4))
    num_steps = len(whole) // 2
    for start in ((0, 2), (1, 0), (1, num_steps - 1), (0, num_steps)):
        rest = collect(tiny_store, BatchSharding(4), start)
        expected = whole[start[0] * num_steps + start[1] :]
        assert len(rest) == len(expected)
        for one, other in zip(rest, expected, strict=True):
            assert torch.equal(one.image_BCHW, other.image_BCHW)
            assert torch.equal(one.position_B, other.position_B)
            assert one.epoch == other.epoch


def test_processes_and_parts_share_each_step(tiny_store):
    whole = collect(tiny_store, BatchSharding(8))
    dealt = [collect(tiny_store, BatchSharding(8, 2, 2, rank)) for rank in range(2)]
    for step, batch in enumerate(whole):
        parts = [dealt[rank][2 * step + part] for part in range(2) for rank in range(2)]
        assert torch.equal(torch.cat([part.label_BHW for part in parts]), batch.label_BHW)
        assert torch.equal(torch.cat([part.position_B for part in parts]), batch.position_B)
        assert sum(part.share for part in parts) == pytest.approx(1)
        for part in parts:
            pairs = part.annotated_BK.sum() / batch.annotated_BK.sum()
            assert part.share == pytest.approx(float(pairs))


WORKERS = """
import sys
from pathlib import Path
import numpy as np
import torch
from fullscale.scans.slice_store import SliceStore
from fullscale.training.dataset import (
    BatchSharding, SliceDataset, TrainingSlices, training_batches
)
from fullscale.training.epoch_order import EpochOrder

slices = SliceDataset(SliceStore(Path(sys.argv[1])), ["case_00", "case_06"], 8.0)
case = np.zeros(len(slices), int)
order = EpochOrder(case, slices.organ_free, len(slices), 0.25, "case", 0)
alone, helped = (
    list(training_batches(TrainingSlices(slices, order, BatchSharding(4)), 2, num_workers=count))
    for count in (0, 3)
)
assert len(alone) == len(helped) > 4
for one, other in zip(alone, helped, strict=True):
    assert torch.equal(one.image_BCHW, other.image_BCHW)
    assert torch.equal(one.label_BHW, other.label_BHW)
    assert (one.share, one.epoch) == (other.share, other.epoch)
print(len(helped))
"""


@pytest.mark.slow  # another program loads torch
def test_workers_give_the_same_batches(tiny_store):
    """In a separate program: readers are forks, and Prefect leaves a process unfit to fork."""
    done = subprocess.run(
        [sys.executable, "-c", WORKERS, str(tiny_store.root)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 4


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
