import threading

import pytest
from watching import wait_until

from fullscale.runtime.locks import LockedError, acquire_lock


def test_lock_that_is_held_is_refused_if_not_waited_for(tmp_path):
    path = tmp_path / "below/lock"
    with (
        acquire_lock(path),
        pytest.raises(LockedError, match=rf"another process holds {path}; wait"),
        acquire_lock(path, wait=False),
    ):
        pass
    with acquire_lock(path, wait=False):
        pass


def test_waiting_ends_when_the_lock_is_released(tmp_path, capfd):
    path = tmp_path / "lock"
    order = []

    def second():
        with acquire_lock(path):
            order.append("second")

    with acquire_lock(path):
        thread = threading.Thread(target=second)
        thread.start()
        assert wait_until(lambda: "waiting until it ends" in capfd.readouterr().err, 20)
        order.append("first")
    thread.join(20)
    assert order == ["first", "second"]


def test_waiting_can_be_given_up(tmp_path):
    def give_up():
        raise KeyboardInterrupt

    path = tmp_path / "lock"
    with acquire_lock(path), pytest.raises(KeyboardInterrupt), acquire_lock(path, on_wait=give_up):
        pass
