from __future__ import annotations

import os
import time

import pytest

from fullscale.runtime.errors import ScanError
from fullscale.scans.parallel import Compute, map_cases


def double(number):
    return 2 * number


def slow_first(number):
    time.sleep(0.2 if number == 0 else 0)
    return number, os.getpid()


@pytest.mark.parametrize("num_workers", [1, 2, 0])
def test_map_cases_keeps_the_order(num_workers):
    results = map_cases(double, list(range(7)), Compute(num_workers=num_workers))
    assert list(results) == [0, 2, 4, 6, 8, 10, 12]


def test_map_cases_with_one_worker_stays_in_this_process():
    results = list(map_cases(slow_first, [0, 1], Compute(num_workers=1)))
    assert {pid for _, pid in results} == {os.getpid()}


def test_map_cases_with_two_workers_uses_others():
    results = list(map_cases(slow_first, [0, 1, 2, 3], Compute(num_workers=2)))
    assert [number for number, _ in results] == [0, 1, 2, 3]
    assert os.getpid() not in {pid for _, pid in results}


def test_map_cases_of_nothing_is_nothing():
    assert list(map_cases(double, [], Compute())) == []


def test_map_cases_yields_as_work_is_done():
    results = map_cases(double, [1, 2, 3], Compute(num_workers=1))
    assert next(results) == 2


def test_map_cases_without_a_scheduler_says_so(monkeypatch):
    pytest.importorskip("distributed", reason="the extra dask is not installed")
    monkeypatch.setattr("fullscale.scans.parallel.CONNECT_TIMEOUT_S", 1)
    compute = Compute("dask", "tcp://127.0.0.1:9")
    with pytest.raises(ScanError, match=r"cluster: found no answer .*127\.0\.0\.1:9.*start"):
        list(map_cases(double, [1, 2], compute))


def test_scan_errors_survive_the_way_between_processes():
    error = ScanError("code", "found", "wanted", "cure")
    results = list(map_cases(make_error, [0, 1], Compute(num_workers=2)))
    assert [str(result) for result in results] == [str(error)] * 2
    assert results[0].cure == "cure"


def make_error(_):
    return ScanError("code", "found", "wanted", "cure")
