import json
import re
import shutil
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
from cohorts import write_nnunet
from project import ROOT
from typer.testing import CliRunner

from tasks.cli import app

pytestmark = pytest.mark.slow

HEAVY = (
    "torch", "mlflow", "prefect", "dvc", "lightning_fabric", "kornia", "pandas", "matplotlib",
    "numpy", "scipy",
)  # fmt: skip


def run(*arguments, code=0):
    """What a command prints, in this process: its imports would take a second each time."""
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == code, done.output
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.output


def test_help_imports_nothing_heavy():
    script = (
        "import sys; from typer.testing import CliRunner; from tasks.cli import app;"
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
    command = [sys.executable, "-m", "tasks.cli", "ingest", str(tmp_path)]
    done = subprocess.run(
        [*command, "--data", str(tmp_path / "data")], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


@pytest.fixture
def mixed_source(tmp_path):
    """Two good scans and one whose label is cut short."""
    source = write_nnunet(tmp_path / "source", 3)
    label = source / "labelsTr/case_01.nii.gz"
    label.write_bytes(label.read_bytes()[:200])
    return source


def test_ingest_takes_the_good_and_explains_the_bad(mixed_source, tmp_path):
    told = run("ingest", str(mixed_source), "--data", str(tmp_path / "data"))
    assert "refused case_01: unreadable: found " in told
    assert "2 accepted, 0 already in, 1 refused" in told
    quarantine = json.loads((tmp_path / "quarantine.json").read_text())
    assert [finding["case"] for finding in quarantine["refused"]] == ["case_01"]


def test_strict_ingest_fails_on_one_refusal_and_keeps_the_good(mixed_source, tmp_path):
    told = run("ingest", str(mixed_source), "--data", str(tmp_path / "data"), "--strict", code=1)
    assert "2 accepted" in told
    assert (tmp_path / "data/labelsTr/case_00.nii.gz").is_file()


@pytest.fixture
def swapped_source(tmp_path):
    """A good scan, and one whose header swaps left and right."""
    source = write_nnunet(tmp_path / "source", 2)
    for path in (source / "imagesTr/case_01_0000.nii.gz", source / "labelsTr/case_01.nii.gz"):
        file = nib.load(path)
        affine = np.diag([-1.0, 1.0, 1.0, 1.0]) @ file.affine
        nib.save(nib.Nifti1Image(np.asanyarray(file.dataobj), affine), path)
    return source


def test_swapped_axis_is_a_warning_and_a_refusal_if_strict(swapped_source, tmp_path):
    told = run("validate", str(swapped_source))
    assert "warning case_01: liver_on_left: found left and right look swapped" in told
    told = run("validate", str(swapped_source), "--strict", code=1)
    assert "refused case_01: liver_on_left" in told
    told = run("ingest", str(swapped_source), "--data", str(tmp_path / "data"), "--strict", code=1)
    assert "1 accepted, 0 already in, 1 refused" in told
    told = run("ingest", str(swapped_source), "--data", str(tmp_path / "data"))
    assert "warning case_01: liver_on_left" in told
    assert "1 accepted, 1 already in, 0 refused" in told


def test_dry_run_writes_nothing(mixed_source, tmp_path):
    told = run("ingest", str(mixed_source), "--data", str(tmp_path / "data"), "--dry-run")
    assert "(dry run): 2 accepted" in told
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_ingest_that_accepts_nothing_fails(mixed_source, tmp_path):
    for path in (mixed_source / "labelsTr").iterdir():
        path.write_bytes(b"")
    told = run("ingest", str(mixed_source), "--data", str(tmp_path / "data"), code=1)
    assert "0 accepted, 0 already in, 3 refused" in told


def test_validate_shows_a_table_a_page_and_fails(mixed_source, tmp_path):
    page = tmp_path / "report.html"
    for folder, end in (("imagesTr", "_0000.nii.gz"), ("labelsTr", ".nii.gz")):
        path = mixed_source / folder / f"case_02{end}"
        path.rename(path.with_name(f"case_02_of_a_study_with_a_long_name{end}"))
    told = run("validate", str(mixed_source), "--report", str(page), code=1)
    assert "case_00" in told
    assert "…" not in told  # at 80 columns
    assert "refused case_01: unreadable" in told
    html = page.read_text()
    assert html.count("data:image/png;base64,") == 2
    assert "http" not in html


def test_validate_prints_json_alone(mixed_source):
    done = subprocess.run(
        [sys.executable, "-m", "tasks.cli", "validate", str(mixed_source), "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    cases = json.loads(done.stdout)["cases"]
    assert {case["case"]: case["verdict"] for case in cases} == {
        "case_00": "good",
        "case_01": "refused",
        "case_02": "good",
    }


def test_networks_are_listed_with_exact_counts():
    told = run("networks")
    for count in ("39,396,033", "47,176,132", "26,989,637"):
        assert count in told
    assert "deeplabv3plus" in told


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "docs/operations.md"])
def test_documents_name_only_targets_that_exist(document):
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.M))
    named = set(re.findall(r"`make ((?:[a-z-]+ ?)+)`", (ROOT / document).read_text()))
    named |= set(
        re.findall(r"^    make ([a-z -]+?)(?:  .*)?$", (ROOT / document).read_text(), re.M)
    )
    words = {word for line in named for word in line.split()}
    assert words
    assert words <= targets


def test_make_sets_a_moved_project_up_again(tmp_path):
    def steps(folder):
        command = ["make", "--no-print-directory", "--dry-run", "setup"]
        return subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=True
        ).stdout

    before = tmp_path / "a folder"
    before.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy2(ROOT / name, before)
    mark = before / steps(before).split("touch ")[1].strip()
    mark.parent.mkdir()
    mark.touch()
    assert "venv" not in steps(before)
    assert "-m venv --clear .venv" in steps(before.rename(tmp_path / "another"))


def test_make_help_lists_every_target():
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    targets = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), flags=re.M)
    assert re.findall(r"^make ([a-z-]+)", done.stdout, flags=re.M) == targets
    assert {
        "setup",
        "repro",
        "test",
        "test-fast",
        "soak",
        "lint",
        "types",
        "services",
        "clean",
    } <= set(targets)


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
