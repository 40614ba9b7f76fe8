from __future__ import annotations

import os
import shutil
import signal

import pytest
from cohorts import write_nnunet
from project import clone_project
from repository import make_repository
from tiny import CASES, TINY, changed, make_store

from fullscale.ingestion.ingest import ingest
from fullscale.params import Params
from fullscale.scans.cohort import read_cohort
from fullscale.scans.slice_store import SliceStore
from tasks.slice import slice_cohort

# Tests run side by side, one to a core: more threads each would be in one another's way, and cost
# two fifths more processor time in all.
os.environ.setdefault("OMP_NUM_THREADS", "1")
SMALL = {
    "slice": {"size_px": 32},
    "train": {"width": 4, "num_epochs": 1, "num_picture_slices": 0},
    "register": {"num_bootstrap": 200},
}


@pytest.fixture(scope="session", autouse=True)
def heard_signals():
    """Programs that tests start hear signals, also where this one was told to ignore them.

    That is so behind nohup and in the background of a shell without job control.
    """
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, None)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, usual or signal.SIG_DFL)


@pytest.fixture(scope="session")
def small_project(tmp_path_factory):
    """A clone with the sample scans, narrow networks and one epoch, reproduced once."""
    project = clone_project(tmp_path_factory.mktemp("small") / "project")
    project.run("dvc", "pull", "--quiet", "data.dvc")
    for section, values in SMALL.items():
        project.change_params(section, **values)
    project.first_output = project.run("dvc", "repro")
    return project


@pytest.fixture(scope="session")
def tiny_params() -> Params:
    return Params.model_validate(changed(TINY))


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """data/ with eight small scans, two of them annotated for one organ only."""
    root = tmp_path_factory.mktemp("cohort")
    ingest(write_nnunet(root / "source", 8, cases_csv=CASES), root / "data")
    return root / "data"


@pytest.fixture(scope="session")
def tiny_cohort(tiny_data):
    return read_cohort(tiny_data)


@pytest.fixture(scope="session")
def tiny_store(tiny_data, tiny_params, tmp_path_factory):
    folder = tmp_path_factory.mktemp("slices")
    slice_cohort(tiny_data, folder, tiny_params)
    return SliceStore(folder)


@pytest.fixture(scope="session")
def mlflow_store(tmp_path_factory):
    """A real tracking store, made once because a new database takes seconds."""
    return make_store(tmp_path_factory.mktemp("tracking") / "mlruns")


@pytest.fixture
def empty_store(tmp_path):
    """A real tracking store that no one has used."""
    return make_store(tmp_path / "mlruns")


@pytest.fixture(scope="session")
def scans_template(tmp_path_factory):
    """A small repository of git and DVC whose data/ holds three scans."""
    return make_repository(tmp_path_factory.mktemp("template") / "project")


@pytest.fixture
def scans_repo(scans_template, tmp_path):
    """A copy of that repository for one test."""
    return shutil.copytree(scans_template, tmp_path / "project", symlinks=True)
