import hashlib
import math
import resource
import signal

import pytest
import torch

from fullscale.runtime.checkpoints import Checkpoints
from fullscale.runtime.errors import StageError

IDENTITY = {"train.learning_rate": "0.003", "slices of train case a": "abc", "code model/a.py": "1"}


def make_state(number):
    return {
        "network": {"weight": torch.full((3, 4), float(number))},
        "position": {"epoch": number, "rows": [{"val/dice": math.nan}], "sums": {"total": 0.5}},
        "average": None,
    }


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path, IDENTITY)


def test_state_comes_back(checkpoints):
    checkpoints.save(make_state(7))
    back = checkpoints.load()
    assert torch.equal(back["network"]["weight"], torch.full((3, 4), 7.0))
    assert back["position"]["epoch"] == 7
    assert math.isnan(back["position"]["rows"][0]["val/dice"])


def test_memory_layout_comes_back(checkpoints):
    weight = torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last)
    checkpoints.save({"weight": weight})
    assert checkpoints.load()["weight"].stride() == weight.stride()


def test_nothing_kept_means_a_new_start(checkpoints, capsys):
    assert checkpoints.load() is None
    assert capsys.readouterr().err == ""


def test_newest_of_two_is_used_and_older_ones_go(checkpoints, tmp_path):
    for number in range(5):
        checkpoints.save(make_state(number))
    assert checkpoints.load()["position"]["epoch"] == 4
    assert sorted(path.name[:6] for path in tmp_path.iterdir()) == ["000004", "000005"]


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.99])
def test_truncated_checkpoint_gives_way_to_the_one_before(checkpoints, capsys, keep):
    checkpoints.save(make_state(1))
    path = checkpoints.save(make_state(2))
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    assert checkpoints.load()["position"]["epoch"] == 1
    assert f"{path} is damaged" in capsys.readouterr().err


def test_flipped_bit_is_noticed(checkpoints):
    path = checkpoints.save(make_state(2))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    assert checkpoints.load() is None


def test_half_written_file_is_ignored(checkpoints, tmp_path):
    checkpoints.save(make_state(1))
    (tmp_path / f"000002-{'0' * 32}.ckpt.part").write_bytes(b"half")
    assert checkpoints.load()["position"]["epoch"] == 1


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"train.learning_rate": "0.1"}, "train.learning_rate was 0.003, is 0.1"),
        ({"slices of train case a": "def"}, "slices of train case a was abc, is def"),
        ({"slices of train case b": "1"}, "slices of train case b was not there, is 1"),
        ({"code model/a.py": "2"}, "code model/a.py was 1, is 2"),
    ],
)
def test_checkpoint_of_another_training_is_refused_by_name(tmp_path, capsys, change, named):
    Checkpoints(tmp_path, IDENTITY).save(make_state(1))
    assert Checkpoints(tmp_path, IDENTITY | change).load() is None
    told = capsys.readouterr().err
    assert "not continued, training starts anew" in told
    assert named in told
    assert told.count(" was ") == 1


def test_checkpoint_of_other_code_names_the_first_differences_and_counts_the_rest(tmp_path, capsys):
    Checkpoints(tmp_path, IDENTITY).save(make_state(1))
    changed = IDENTITY | {f"code fullscale/{number}.py": "1" for number in range(20)}
    assert Checkpoints(tmp_path, changed).load() is None
    told = capsys.readouterr().err
    assert told.count(" was not there, ") == 4
    assert told.endswith("; and 16 more\n")


def test_clear_removes_checkpoints_only(checkpoints, tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    checkpoints.save(make_state(1))
    checkpoints.clear()
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


def test_no_code_runs_from_a_checkpoint(checkpoints, tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("run",))

    torch.save({"identity": IDENTITY, "state": Evil()}, tmp_path / "evil")
    path = checkpoints.save(make_state(1))
    content = (tmp_path / "evil").read_bytes()
    evil = tmp_path / f"000009-{hashlib.sha256(content).hexdigest()[:32]}.ckpt"
    evil.write_bytes(content)
    assert checkpoints.load()["position"]["epoch"] == 1
    assert path.exists()


@pytest.fixture
def small_files():
    """No file may grow beyond 4 KiB: the system refuses as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, before)


def test_disk_that_takes_no_more_keeps_the_last_checkpoint(checkpoints, tmp_path, small_files):
    first = checkpoints.save({"position": {"epoch": 1}})
    with pytest.raises(StageError, match=r"no checkpoint could be written .*make room and run"):
        checkpoints.save({"weight": torch.zeros(10_000)})
    assert checkpoints.load() == {"position": {"epoch": 1}}
    assert list(tmp_path.iterdir()) == [first]
