import json
import subprocess
import sys

import pytest

from fullscale.runtime.console import report_errors
from fullscale.runtime.errors import ScanError, StageError, TransientStageError, shorten
from fullscale.runtime.events import EVENTS_VARIABLE, EventReader, emit_event
from fullscale.runtime.progress import TrainingDisplay

METRICS = {"train/total": 1.0, "slices/organ": 9.0, "slices/organ_free": 3.0}


@pytest.fixture
def events(tmp_path, monkeypatch):
    path = tmp_path / "events.jsonl"
    monkeypatch.setenv(EVENTS_VARIABLE, str(path))
    return EventReader(path)


@pytest.mark.parametrize(("dice", "expected"), [(0.5, 0.5), (float("nan"), None)])
def test_each_epoch_is_an_event(events, dice, expected):
    with TrainingDisplay("unet3plus-0", num_epochs=12, num_steps=5, done_steps=0) as display:
        display.show_epoch(METRICS | {"epoch": 3.0, "val/dice": dice}, improved=True)
    assert events.read_new() == [
        {
            "event": "epoch",
            "training": "unet3plus-0",
            "epoch": 3,
            "num_epochs": 12,
            "dice": expected,
        }
    ]


def test_processes_that_show_nothing_emit_nothing(events):
    with TrainingDisplay("unet", 1, 1, 0, is_shown=False) as display:
        display.show_epoch(METRICS | {"epoch": 1.0, "val/dice": 0.5}, improved=True)
    assert events.read_new() == []


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (TransientStageError("the store is away"), 75),
        (StageError("the store is away"), 1),
        (ScanError("spacing", "0 mm", "0.2 to 10 mm", "mend it"), 1),
        (OSError("disk"), 1),
    ],
)
def test_failure_is_an_event_with_the_exit_code(events, error, code):
    @report_errors
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == code
    assert events.read_new() == [{"event": "failed", "exit_code": code, "message": str(error)}]


def test_defect_is_no_event(events):
    @report_errors
    def main():
        raise KeyError("x")

    with pytest.raises(KeyError):
        main()
    assert events.read_new() == []


def test_nothing_is_written_where_nobody_listens(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(EVENTS_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    emit_event("epoch", epoch=1)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_file_that_cannot_be_written_stops_no_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(EVENTS_VARIABLE, str(tmp_path / "gone/events"))
    emit_event("epoch", epoch=1)
    assert "event epoch is not written" in capsys.readouterr().err


def test_reader_takes_whole_lines_once(tmp_path):
    path = tmp_path / "events"
    reader = EventReader(path)
    assert reader.read_new() == []
    path.write_text('{"event": "a"}\n{"eve')
    assert reader.read_new() == [{"event": "a"}]
    assert reader.read_new() == []
    path.write_text(path.read_text() + 'nt": "b"}\n')
    assert reader.read_new() == [{"event": "b"}]


def test_events_of_several_processes_do_not_mix(events, tmp_path):
    code = "from fullscale.runtime.events import emit_event\n"
    code += "for n in range(200): emit_event('n', n=n, text='x' * 2000)"
    writers = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    found = events.read_new()
    assert sorted(event["n"] for event in found) == sorted(list(range(200)) * 3)
    assert json.dumps(found[0]).startswith('{"event": "n"')


@pytest.mark.parametrize(
    ("text", "max_chars", "expected"),
    [
        ("  two\n lines ", 200, "two lines"),
        ("a" * 200, 200, "a" * 200),
        ("a" * 150 + "b" * 150, 200, "a" * 80 + " ... " + "b" * 115),
        ("abcdefghijklmnopqrstuvwxyz", 20, "abcdefgh ... tuvwxyz"),
    ],
)
def test_long_text_keeps_its_beginning_and_its_end(text, max_chars, expected):
    found = shorten(ValueError(text), max_chars)
    assert found == expected
    assert len(found) <= max_chars
