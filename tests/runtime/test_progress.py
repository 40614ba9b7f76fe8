import os
import pty
import subprocess
import sys

from fullscale.runtime.progress import TrainingDisplay

SCRIPT = """
import time
from fullscale.runtime.console import configure_logging
from fullscale.runtime.progress import TrainingDisplay
configure_logging()
with TrainingDisplay("unet", 2, 3, 1) as display:
    for epoch in (1, 2):
        for step in (1, 2, 3):
            display.show_step(epoch, step, 0.5 / epoch, 123.4)
            time.sleep(0.1)
        metrics = {"epoch": epoch, "val/dice": 0.75, "train/total": 0.25, "slices/organ": 5,
                   "slices/organ_free": 7}
        display.show_epoch(metrics, improved=epoch == 2)
    time.sleep(0.2)
"""
PLAIN = (
    "unet epoch 1/2: loss 0.2500, val Dice 0.7500; 5 slices with organs, 7 without\n"
    "unet epoch 2/2: loss 0.2500, val Dice 0.7500 (best); 5 slices with organs, 7 without\n"
)


def test_one_plain_line_an_epoch_elsewhere():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True
    )
    assert done.stdout == ""
    assert done.stderr == PLAIN


def test_bar_on_a_terminal():
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env=os.environ | {"COLUMNS": "120", "TERM": "xterm-256color"},
    )
    os.close(slave)
    shown = b""
    while True:
        try:
            chunk = os.read(master, 65536)
        except OSError:  # the other side is closed
            break
        shown += chunk
    assert process.wait() == 0
    text = shown.decode()
    for part in ("unet epoch 2/2 step 3/3", "loss 0.2500", "Dice 0.7500", "123 slices/s", "left"):
        assert part in text
    for line in PLAIN.splitlines():
        assert line in text


def test_other_processes_show_nothing(capsys):
    with TrainingDisplay("unet", 1, 1, 0, is_shown=False) as display:
        display.show_step(1, 1, 0.5, 1.0)
        display.log("hello")
    assert capsys.readouterr() == ("", "")
