import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fullscale.training.dataset import BatchSharding
from fullscale.training.epoch_order import EpochOrder


def order(num_organ=6, num_free=10, share=1.0, seed=0):
    return EpochOrder(np.array([False] * num_organ + [True] * num_free), share, seed)


def test_epoch_holds_every_slice_once():
    assert sorted(order().of_epoch(3)) == list(range(16))


def test_epochs_differ_and_repeat_by_seed():
    first, second = order().of_epoch(0), order().of_epoch(1)
    assert first.tolist() != second.tolist()
    assert order().of_epoch(1).tolist() == second.tolist()
    assert order(seed=1).of_epoch(1).tolist() != second.tolist()


def test_order_does_not_depend_on_the_order_of_calls():
    one, other = order(share=0.3), order(share=0.3)
    forward = [one.of_epoch(epoch).tolist() for epoch in range(5)]
    backward = [other.of_epoch(epoch).tolist() for epoch in reversed(range(5))]
    assert forward == backward[::-1]


@given(
    num_organ=st.integers(1, 20),
    num_free=st.integers(0, 20),
    share=st.floats(0, 3),
    seed=st.integers(0, 2**31),
)
def test_organ_slices_are_used_once_and_others_by_their_share(num_organ, num_free, share, seed):
    subject = order(num_organ, num_free, share, seed)
    for epoch in range(3):
        chosen = subject.of_epoch(epoch)
        assert len(chosen) == len(subject)
        counts = np.bincount(chosen, minlength=num_organ + num_free)
        assert (counts[:num_organ] == 1).all()
        assert counts[num_organ:].sum() == round(share * num_free)
        assert np.ptp(counts[num_organ:]) <= 2 if num_free else True


def test_share_comes_round_to_every_organ_free_slice():
    subject = order(num_organ=2, num_free=10, share=0.3)
    seen = [
        index for epoch in range(10) for index in subject.of_epoch(epoch).tolist() if index >= 2
    ]
    assert sorted(seen) == sorted(list(range(2, 12)) * 3)


def test_no_share_leaves_organ_slices_only():
    assert sorted(order(share=0).of_epoch(0)) == list(range(6))


@given(
    num_processes=st.integers(1, 4),
    num_accumulated=st.integers(1, 4),
    part=st.integers(1, 5),
    step=st.integers(0, 3),
)
def test_sharding_gives_each_slice_of_a_step_to_one_part(
    num_processes, num_accumulated, part, step
):
    batch_size = num_processes * num_accumulated * part
    dealt = []
    for rank in range(num_processes):
        sharding = BatchSharding(batch_size, num_accumulated, num_processes, rank)
        assert sharding.part_size == part
        for number in range(num_accumulated):
            first = sharding.first_index(step, number)
            dealt += range(first, first + part)
    assert sorted(dealt) == list(range(step * batch_size, (step + 1) * batch_size))


@pytest.mark.parametrize("epoch", [0, 7])
def test_order_is_an_index_array(epoch):
    assert order().of_epoch(epoch).dtype.kind == "i"
