import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fullscale.training.dataset import BatchSharding
from fullscale.training.epoch_order import EpochOrder, auto_slices_per_epoch


def make_slices(cases):
    """Case and organ_free of each slice; `cases` holds (organ slices, organ-free slices)."""
    case = np.repeat(np.arange(len(cases)), [sum(numbers) for numbers in cases])
    organ_free = np.concatenate(
        [np.repeat([False, True], numbers) for numbers in cases] or [np.empty(0, bool)]
    )
    return case, organ_free


def make_order(cases=((6, 10), (20, 5)), num=16, share=0.25, sampling="case", seed=0):
    return EpochOrder(*make_slices(cases), num, share, sampling, seed)


def count(order, num_epochs, num_slices):
    """Return the number of uses of each slice in some epochs."""
    return sum(np.bincount(order.of_epoch(e), minlength=num_slices) for e in range(num_epochs))


CASES = st.lists(
    st.tuples(st.integers(0, 12), st.integers(0, 12)).filter(any), min_size=1, max_size=6
)
BOTH = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=6)
NUMS = st.integers(1, 40)
SHARES = st.floats(0, 0.95)
SAMPLINGS = st.sampled_from(["case", "slice"])
SEEDS = st.integers(0, 2**31)
few = settings(max_examples=60, deadline=None)


def test_epochs_differ_and_repeat_by_seed():
    first, second = make_order().of_epoch(0), make_order().of_epoch(1)
    assert first.tolist() != second.tolist()
    assert make_order().of_epoch(1).tolist() == second.tolist()
    assert make_order(seed=1).of_epoch(1).tolist() != second.tolist()


@few
@given(CASES, NUMS, SHARES, SAMPLINGS, SEEDS)
def test_order_does_not_depend_on_the_order_of_calls(cases, num, share, sampling, seed):
    one, other = (make_order(cases, num, share, sampling, seed) for _ in range(2))
    forward = [one.of_epoch(epoch).tolist() for epoch in range(4)]
    backward = [other.of_epoch(epoch).tolist() for epoch in reversed(range(4))]
    assert forward == backward[::-1]


@few
@given(CASES, NUMS, SHARES, SAMPLINGS, SEEDS)
def test_every_epoch_has_the_same_length(cases, num, share, sampling, seed):
    order = make_order(cases, num, share, sampling, seed)
    assert {len(order.of_epoch(epoch)) for epoch in range(5)} == {len(order)} == {num}


@few
@given(CASES, NUMS, SHARES, SEEDS)
def test_every_case_has_the_same_number_of_draws(cases, num, share, seed):
    order, (case, _) = make_order(cases, num, share, seed=seed), make_slices(cases)
    total = np.zeros(len(cases), int)
    for epoch in range(len(cases)):
        drawn = np.bincount(case[order.of_epoch(epoch)], minlength=len(cases))
        assert np.ptp(drawn) <= 1
        total += drawn
    assert set(total) == {num}  # in as many epochs as cases, the remainder came round to all


@few
@given(BOTH, st.integers(20, 60), SHARES, SAMPLINGS)
def test_organ_free_slices_have_their_share_in_every_epoch(cases, num, share, sampling):
    order, (_, organ_free) = make_order(cases, num, share, sampling), make_slices(cases)
    assert order.organ_free_share == pytest.approx(share)
    drawn = [organ_free[order.of_epoch(epoch)].sum() for epoch in range(40)]
    # The draws of each case are whole numbers, so each may miss its share by less than one.
    assert np.allclose(drawn, share * num, atol=max(3, len(cases)))
    assert sum(drawn) == pytest.approx(40 * share * num, abs=len(cases))


@few
@given(CASES, NUMS, SHARES, SAMPLINGS, SEEDS)
def test_a_group_of_slices_is_used_up_before_one_comes_again(cases, num, share, sampling, seed):
    order, (case, organ_free) = make_order(cases, num, share, sampling, seed), make_slices(cases)
    case = case if sampling == "case" else np.zeros_like(case)
    for num_epochs in (1, 2, 9):
        counts = count(order, num_epochs, len(case))
        for number in set(case):
            for kind in (False, True):
                group = counts[(case == number) & (organ_free == kind)]
                assert not len(group) or np.ptp(group) <= 1


@settings(max_examples=20, deadline=None)
@given(CASES, st.integers(50, 90), st.floats(0.2, 0.9), SAMPLINGS)
def test_all_slices_are_used(cases, num, share, sampling):
    order, (case, _) = make_order(cases, num, share, sampling), make_slices(cases)
    # A case's rarer group has at least 0.1 of its draws, and at most 12 slices.
    num_epochs = 2 + 10 * 13 * len(cases) // num
    assert count(order, num_epochs, len(case)).min() > 0


@pytest.mark.parametrize(
    ("cases", "share", "expected"),
    [
        ([(9, 1), (9, 1)], 0.25, [0.25, 0.25]),
        ([(9, 0), (9, 1)], 0.25, [0, 0.5]),
        ([(9, 0), (9, 0), (9, 1)], 0.25, [0, 0, 0.5]),  # at most half of a case's draws
        ([(9, 0), (9, 1)], 0.75, [0, 0.75]),  # unless more is asked for
        ([(0, 9), (9, 1), (9, 1), (9, 1), (9, 1)], 0.4, [1, 0.25, 0.25, 0.25, 0.25]),
        ([(0, 9), (9, 1)], 0.4, [1, 0.2]),  # at least half of what is asked for
        ([(0, 9), (9, 1)], 0, [1, 0]),
        ([(9, 0), (8, 0)], 0.25, [0, 0]),
        ([(0, 9), (0, 8)], 0.25, [1, 1]),
    ],
)
def test_cases_make_up_for_those_without_organ_free_slices(cases, share, expected):
    num = 20 * len(cases)
    order, (case, organ_free) = make_order(cases, num, share), make_slices(cases)
    drawn = sum(
        np.bincount(case[chosen], weights=organ_free[chosen], minlength=len(cases))
        for chosen in map(order.of_epoch, range(50))
    )
    assert drawn / (50 * 20) == pytest.approx(expected, abs=0.002)
    assert order.organ_free_share == pytest.approx(np.mean(expected))


def test_rare_organ_free_slices_are_repeated_within_an_epoch():
    counts = count(make_order([(30, 2)], 40), 1, 32)
    assert counts[30:].tolist() == [5, 5]
    assert counts[:30].sum() == 30


def test_a_case_shorter_than_its_part_of_an_epoch_repeats():
    cases = [(3, 1), (300, 100)]
    counts = count(make_order(cases, 80), 1, 404)
    assert counts[:4].tolist() == [10, 10, 10, 10]
    assert counts[4:].sum() == 40
    assert counts[4:].max() == 1


def test_sampling_slice_gives_every_slice_the_same_weight():
    cases = [(3, 1), (300, 100)]
    assert count(make_order(cases, 404, sampling="slice"), 1, 404).tolist() == [1] * 404


def test_cases_need_not_be_in_order():
    case, organ_free = np.array([7, 2, 7, 2, 7, 7]), np.array([False] * 4 + [True] * 2)
    counts = count(EpochOrder(case, organ_free, 8, 0.5, "case", 0), 1, 6)
    assert counts.tolist() == [1, 2, 1, 2, 1, 1]


def test_epoch_is_as_long_as_slices_at_the_common_spacing():
    heights_mm = np.array([1000 * 0.5, 50 * 5.0])
    assert auto_slices_per_epoch(heights_mm, 5.0) == 100 + 50
    assert auto_slices_per_epoch(5.0 * np.array([40, 60]), 5.0) == 100
    assert auto_slices_per_epoch(np.array([1.0]), 5.0) == 1


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
    assert make_order().of_epoch(epoch).dtype.kind == "i"
