from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import yaml
from cohorts import write_nnunet
from repository import make_repository

from scans.cohort import read_cohort
from scans.ingest import ingest
from scans.store import SliceStore
from tasks.params import Params
from tasks.slice import slice_cohort
from tasks.tracking import Store

ROOT = Path(__file__).parents[2]
TINY = {
    "slice": {"size_px": 32},
    "train": {"width": 4, "num_epochs": 2, "batch_size": 8, "num_picture_slices": 2},
    "register": {"num_bootstrap": 200, "min_cases": 2},
}
ANNOTATED = ["liver;spleen"] * 6 + ["liver", "spleen"]
CASES = "".join(f"case_{i:02d},patient_{i:02d},{names}\n" for i, names in enumerate(ANNOTATED))


def published() -> dict:
    """The content of the project's own params.yaml, as a fresh copy."""
    return yaml.safe_load((ROOT / "params.yaml").read_text())


def changed(changes: dict, base: dict | None = None) -> dict:
    """params.yaml with some keys changed, section by section."""
    content = published() if base is None else copy.deepcopy(base)
    for section, values in changes.items():
        if isinstance(values, dict) and isinstance(content.get(section), dict):
            content[section] = {**content[section], **values}
        else:
            content[section] = values
    return content


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


def make_store(folder: Path) -> Store:
    folder.mkdir()
    return Store(f"sqlite:///{folder / 'mlflow.db'}", (folder / "artifacts").as_uri())


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
