import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from typer.testing import CliRunner

from fullscale.cli import app

HEAVY = ("torch", "mlflow", "prefect", "dvc", "lightning", "kornia", "pandas", "matplotlib")


def run(*arguments, code=0):
    done = subprocess.run(
        [sys.executable, "-m", "fullscale.cli", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_help_imports_nothing_heavy():
    script = (
        "import sys; from typer.testing import CliRunner; from fullscale.cli import app;"
        "r = CliRunner().invoke(app, ['--help']); assert r.exit_code == 0, r.output;"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_sample_goes_in_by_ingest(tmp_path):
    run("sample", str(tmp_path / "raw"), "--cases", "1", "--seed", "3")
    told = run("ingest", str(tmp_path / "raw"), "--data", str(tmp_path / "data"))
    assert "1 accepted, 0 already in, 0 refused" in told
    again = run("ingest", str(tmp_path / "raw"), "--data", str(tmp_path / "data"))
    assert "0 accepted, 1 already in, 0 refused" in again
    labels = json.loads((tmp_path / "data/dataset.json").read_text())["labels"]
    assert labels == {"background": 0, "liver": 1, "spleen": 2}


def test_ingest_of_nothing_is_one_line_and_an_error(tmp_path):
    told = run("ingest", str(tmp_path), "--data", str(tmp_path / "data"), code=1)
    assert told.startswith("error: ")
    assert "Traceback" not in told


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "docs/operations.md"])
def test_documents_name_only_targets_that_exist(document):
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):", makefile, flags=re.M))
    named = set(re.findall(r"`make ((?:[a-z]+ ?)+)`", (ROOT / document).read_text()))
    named |= set(re.findall(r"^    make ([a-z ]+?)(?:  .*)?$", (ROOT / document).read_text(), re.M))
    words = {word for line in named for word in line.split()}
    assert words
    assert words <= targets


def test_make_help_lists_every_target():
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    targets = re.findall(r"^([a-z]+):.*## ", (ROOT / "Makefile").read_text(), flags=re.M)
    assert re.findall(r"^make ([a-z]+)", done.stdout, flags=re.M) == targets
    assert {"setup", "repro", "test", "lint", "types", "bench", "services", "clean"} <= set(targets)


def documented_commands():
    """Every `fullscale ...` line of README and docs, as (command, options)."""
    texts = [
        path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    ]
    lines = {
        line.split("#")[0].strip()
        for text in texts
        for line in re.findall(r"^    fullscale (.*)$", text, flags=re.M)
    }
    return sorted(
        (line.split()[0], tuple(word for word in line.split() if word.startswith("--")))
        for line in lines
    )


@pytest.mark.parametrize(("command", "options"), documented_commands())
def test_documented_command_and_options_exist(command, options):
    done = CliRunner().invoke(app, [command, "--help"], terminal_width=200)
    assert done.exit_code == 0, done.output
    for option in options:
        assert option in done.output
