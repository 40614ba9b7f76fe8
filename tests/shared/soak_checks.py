"""What must hold when a soak has come to rest: no scan lost, nothing half, all versions remade."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import mlflow
import psutil
from deliveries import ACCEPTED, QUARANTINED, WAITING, Sent
from project import Project
from quick_project import REMOTE

from fullscale.ingestion.names import safe_name
from fullscale.params import load_params
from fullscale.patient_split import is_test_patient
from fullscale.runtime.files import file_sha256
from fullscale.scans.cohort import Case, read_cohort
from fullscale.tracking.registry import CHALLENGER, CHAMPION
from fullscale.tracking.store import Store, use_tracking_uri
from fullscale.versioning.data_version import committed_data_version
from fullscale.versioning.git import SCANS_BRANCH, git
from fullscale.versioning.provenance import digest_test_set

if TYPE_CHECKING:
    from soak import Soak

MODEL = "fullscale-organs"
CANDIDATE = "unet3plus"
MIB = 2**20
MAX_MIB = {".prefect/prefect.db": 40, "mlruns/mlflow.db": 20}
"""Sizes that the databases must not reach."""
MAIN = "main"
PLACES = {"accepted": ACCEPTED, "quarantine": QUARANTINED}


def branch_versions(root: Path) -> dict[str, str]:
    """The data version of each branch `retrain/*`."""
    names = git(root, "for-each-ref", "--format=%(refname:short)", "refs/heads/retrain").split()
    return {name: committed_data_version(root, name) for name in names}


def processes_in(root: Path) -> dict[int, str]:
    """Command lines of processes that work in a folder or below it, by number."""
    found = {}
    for process in psutil.process_iter():
        try:
            is_zombie = process.status() == psutil.STATUS_ZOMBIE
            if not is_zombie and Path(process.cwd()).is_relative_to(root):
                found[process.pid] = " ".join(process.cmdline())
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def verify(soak: Soak, received: list[dict]) -> dict[str, object]:
    """Assert everything; returns what there is to tell."""
    elsewhere = Project(soak.root.parent / "elsewhere")
    git(soak.root, "clone", "--quiet", str(soak.root), str(elsewhere.root))
    remote = str(soak.root.parent / REMOTE)
    elsewhere.run("dvc", "remote", "add", "--local", "--default", "team", remote)
    fates = verify_files(soak.root / "inbox", soak.sender.sent)
    names = verify_data(elsewhere, soak.sender.sent)
    made = branch_versions(soak.root) | {MAIN: committed_data_version(soak.root, MAIN)}
    weights, test_sets, statuses = verify_branches(elsewhere, made)
    split = load_params(soak.root / "params.yaml").split
    first = read_cohort(soak.root / "data").cases  # its checkout is as it was in the beginning
    frozen = digest_test_set(each for each in first if is_test_patient(each.patient, split))
    assert test_sets == {frozen}, f"test sets {test_sets}, wanted {frozen}"
    versions = verify_registry(soak.services.mlflow_url, weights, made, frozen)
    client = mlflow.MlflowClient(soak.services.mlflow_url)
    champion = client.get_model_version_by_alias(MODEL, CHAMPION).version
    assert str(champion) == soak.chosen, "the champion is the one that a person chose last"
    sizes = {name: round((soak.root / name).stat().st_size / MIB, 1) for name in MAX_MIB}
    assert all(sizes[name] < limit for name, limit in MAX_MIB.items()), sizes
    soak.say("verified", f"{len(weights)} branches, {versions} versions, {names} cases landed")
    texts = [message["text"].partition("\n")[0] for message in received]
    return {
        **{f"files {fate}": number for fate, number in fates.items()},
        "cases landed": names,
        "data versions": int(git(soak.root, "rev-list", "--count", f"HEAD..{SCANS_BRANCH}")),
        "retrainings published": dict(statuses),
        "versions registered": versions,
        "messages": dict(Counter(texts)),
        "MiB": sizes,
    }


def verify_files(inbox: Path, sent: list[Sent]) -> dict[str, int]:
    """Every file that was sent lies where it has to, whole, and in no other place."""
    found: dict[tuple[str, str], set[str]] = {}
    for path in inbox.rglob("*"):
        if not path.is_file() or path.name == "reason.txt":
            continue
        top = path.relative_to(inbox).parts[0]
        place = PLACES.get(top, WAITING)
        if place == QUARANTINED:
            assert (path.parent / "reason.txt").read_text().strip(), path
        case = path.name.removesuffix(".nii.gz").removesuffix("_0000")
        found.setdefault((case, file_sha256(path)), set()).add(place)
    fates = Counter(each.expected for each in sent)
    wanted: dict[tuple[str, str], set[str]] = {}
    for each in sent:  # one content may come twice, as when only the image beside it is another
        case = safe_name(each.case) if each.expected == QUARANTINED else each.case
        wanted.setdefault((case, each.sha256), set()).add(each.expected)
    for key, fate in wanted.items():
        places = found.get(key, set())
        assert places == fate, f"{key}: found in {sorted(places) or 'no place'}, not {sorted(fate)}"
    known = {(safe_name(each.case), each.sha256) for each in sent}
    strange = [key for key in found if (safe_name(key[0]), key[1]) not in known]
    assert not strange, f"half or strange files: {strange}"
    return dict(fates)


def verify_data(elsewhere: Project, sent: list[Sent]) -> int:
    """The newest data version has exactly the cases that were accepted; returns how many."""
    elsewhere.run("git", "checkout", "--quiet", f"origin/{SCANS_BRANCH}")
    elsewhere.run("dvc", "pull", "--quiet", "data.dvc")
    cohort = read_cohort(elsewhere.root / "data")
    landed = {case.name for case in cohort.cases if case.training_only}
    assert landed == {each.case for each in sent if each.expected == ACCEPTED}
    for case in cohort.cases:
        assert file_sha256(case.image) == case.image_sha256, case.name
        assert file_sha256(case.label) == case.label_sha256, case.name
    return len(landed)


def tested_cases(elsewhere: Project) -> list[Case]:
    """The test cases of the split that is checked out."""
    table = (elsewhere.root / "artifacts/split.csv").read_text().split()
    names = {line.split(",")[0] for line in table[1:] if line.endswith(",test")}
    return [case for case in read_cohort(elsewhere.root / "data").cases if case.name in names]


def verify_branches(
    elsewhere: Project, versions: dict[str, str]
) -> tuple[dict[str, list[tuple[str, str]]], set[str], Counter[str]]:
    """Each branch's results come from the remote, and there is nothing left to compute.

    Returns:
        Branch, and the commit it was made on, by the weights' SHA-256; the test sets; how often
        each verdict was given to a retraining.
    """
    weights: dict[str, list[tuple[str, str]]] = {}
    test_sets, statuses = set(), Counter[str]()
    for branch, data_version in versions.items():
        assert branch == MAIN or data_version[:8] in branch, (branch, data_version)
        elsewhere.run("git", "checkout", "--quiet", f"origin/{branch}")
        elsewhere.run("dvc", "pull", "--quiet", "--force", "data.dvc", "dvc.yaml")
        told = elsewhere.run("dvc", "repro")
        assert "Running stage" not in told, f"{branch}: {told}"
        assert "up to date" in elsewhere.run("dvc", "status", "data.dvc", "dvc.yaml"), branch
        assert git(elsewhere.root, "status", "--porcelain") == "", branch
        gate = json.loads((elsewhere.root / "reports/gate.json").read_text())
        file = elsewhere.root / "artifacts/train" / CANDIDATE / "0/weights.safetensors"
        assert file_sha256(file) == gate["weights_sha256"], branch
        assert gate["data_version"] == data_version, branch
        test_sets |= {gate["test_set"], digest_test_set(tested_cases(elsewhere))}
        statuses[gate["status"]] += branch != MAIN
        parent = git(elsewhere.root, "rev-parse", "HEAD^")
        weights.setdefault(gate["weights_sha256"], []).append((branch, parent))
    return weights, test_sets, statuses


def verify_registry(
    mlflow_url: str,
    weights: dict[str, list[tuple[str, str]]],
    data_versions: dict[str, str],
    test_set: str,
) -> int:
    """Every version's weights are those of a branch made on its commit, and one is the challenger.

    Returns:
        How many versions there are.
    """
    client = mlflow.MlflowClient(mlflow_url)
    versions = client.search_model_versions(f"name = '{MODEL}'")
    for version in versions:
        name = f"version {version.version} with {version.tags}"
        tags = {key.removeprefix("fullscale."): value for key, value in version.tags.items()}
        assert {"weights_sha256", "git_commit", "test_set", "data_version"} <= set(tags), name
        made = weights.get(tags["weights_sha256"], [])
        assert tags["git_commit"] in {commit for _, commit in made}, name
        assert tags["data_version"] in {data_versions[branch] for branch, _ in made}, name
        assert tags["test_set"] == test_set, name
        with use_tracking_uri(Store(mlflow_url)):
            fetched = mlflow.artifacts.download_artifacts(f"models:/{MODEL}/{version.version}")
        file = Path(fetched) / "artifacts/weights.safetensors"
        assert file_sha256(file) == tags["weights_sha256"], name
    challenger = client.get_model_version_by_alias(MODEL, CHALLENGER)
    assert challenger.version in {version.version for version in versions}
    return len(versions)
