import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fullscale.runtime.prefetch import prefetch


@given(items=st.lists(st.one_of(st.none(), st.integers())), depth=st.integers(1, 3))
def test_items_come_in_their_order(items, depth):
    assert list(prefetch(iter(items), depth)) == items


def test_next_item_is_made_while_the_last_is_used():
    made = []

    def make():
        for number in range(3):
            made.append(number)
            yield number

    items = prefetch(make())
    assert next(items) == 0
    end = time.monotonic() + 5
    while len(made) < 2:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert list(items) == [1, 2]


def test_error_comes_after_the_items_before_it():
    def make():
        yield 1
        raise ValueError("no more scans")

    items = prefetch(make())
    assert next(items) == 1
    with pytest.raises(ValueError, match="no more scans"):
        next(items)


def test_thread_ends_with_who_takes_the_items():
    def endless():
        while True:
            yield 0

    before = threading.active_count()
    items = prefetch(endless())
    assert next(items) == 0
    assert threading.active_count() == before + 1
    items.close()
    assert threading.active_count() == before
