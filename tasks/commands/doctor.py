"""Check that a project can work here: environment, disk, GPU, git, DVC, servers."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException
from importlib import metadata
from pathlib import Path

import typer

from fullscale.runtime.console import report_errors
from fullscale.runtime.files import folder_bytes
from fullscale.runtime.processes import MLFLOW_PORT, PREFECT_PORT

GIB = 2**30
MIN_PYTHON = (3, 11)
FREE_GIB = 5
FREE_FACTOR = 3
"""Free space wanted, by the size of data/: slices, cache and artefacts."""
MEMORY_GIB = 4
TIMEOUT_S = 2.0


@dataclass(frozen=True)
class Server:
    """A server as `make services` starts it, or as it is used elsewhere.

    Attributes:
        port_variable: environment variable of its port here.
        port: the default.
        url_variable: environment variable of its address, if it runs elsewhere.
        path: of the address here that the variable would hold.
    """

    port_variable: str
    port: int
    url_variable: str
    path: str = ""


SERVERS = {
    "MLflow": Server("FULLSCALE_MLFLOW_PORT", MLFLOW_PORT, "MLFLOW_TRACKING_URI"),
    "Prefect": Server("FULLSCALE_PREFECT_PORT", PREFECT_PORT, "PREFECT_API_URL", "/api"),
}


@dataclass(frozen=True)
class Line:
    """The result of one check.

    Attributes:
        name: of the subject.
        found: what there is.
        cure: what to do; empty if all is well.
    """

    name: str
    found: str
    cure: str = ""

    def __str__(self) -> str:
        return f"{'do' if self.cure else 'ok':3} {self.name}: {self.found}" + (
            f"; {self.cure}" if self.cure else ""
        )


@report_errors
def command() -> None:
    """Check environment, disk, GPU, git, DVC and servers. Exit code 1 if one is not ok."""
    lines = []
    for line in examine(Path()):
        typer.echo(str(line))
        lines.append(line)
    num_open = sum(bool(line.cure) for line in lines)
    typer.echo(f"doctor: {len(lines) - num_open} ok, {num_open} to do")
    if num_open:
        raise typer.Exit(1)


def examine(root: Path) -> Iterator[Line]:
    """Yield one line for each check of the project at `root`; nothing is changed."""
    yield check_python(sys.version_info[:2])
    yield check_packages(root / "constraints.txt")
    yield check_params(root)
    yield check_disk(shutil.disk_usage(root).free, folder_bytes(root / "data"))
    yield check_memory()
    yield check_device()
    yield check_git(root)
    yield check_scans(root)
    yield check_remote(root)
    for name in SERVERS:
        yield check_server(name)


def check_python(found: tuple[int, ...]) -> Line:
    """Check the version of Python."""
    wanted = ".".join(map(str, MIN_PYTHON))
    cure = "" if found >= MIN_PYTHON else f"wanted {wanted} or newer: install it, then `make setup`"
    return Line("Python", ".".join(map(str, found)), cure)


def check_packages(constraints: Path) -> Line:
    """Compare the installed packages with the versions that were tested together."""
    if not constraints.is_file():
        return Line("packages", f"no {constraints.name}", "run in the project's folder")
    different = []
    for row in constraints.read_text(encoding="utf-8").splitlines():
        name, _, wanted = row.partition("#")[0].strip().partition("==")
        if not wanted:
            continue
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # of an extra that is not installed
        if found.partition("+")[0] != wanted.partition("+")[0]:
            different.append(f"{name} {found}, tested {wanted}")
    if different:
        return Line("packages", "; ".join(different[:3]), "run `make setup`")
    return Line("packages", f"the versions of {constraints.name}")


def check_params(root: Path) -> Line:
    """Check that params.yaml can be read."""
    from fullscale.runtime.errors import StageError
    from fullscale.workspace import open_workspace

    try:
        params = open_workspace(root).load_params()
    except StageError as error:
        return Line("params.yaml", str(error), "correct it; docs/reference.md describes each key")
    return Line("params.yaml", f"networks {', '.join(params.networks)}")


def check_disk(free_bytes: int, data_bytes: int) -> Line:
    """Check the free space by the size of the scans."""
    wanted = max(FREE_GIB * GIB, FREE_FACTOR * data_bytes)
    found = f"{free_bytes / GIB:.0f} GiB free, scans have {data_bytes / GIB:.1f} GiB"
    cure = f"wanted {wanted / GIB:.0f} GiB: make room, for example with `fullscale gc`"
    return Line("disk", found, "" if free_bytes >= wanted else cure)


def check_memory() -> Line:
    """Check the memory that is available."""
    import psutil

    free = psutil.virtual_memory().available
    cure = f"wanted {MEMORY_GIB} GiB: end other programs"
    return Line(
        "memory", f"{free / GIB:.0f} GiB available", "" if free >= MEMORY_GIB * GIB else cure
    )


def check_device() -> Line:
    """Check that torch can use a GPU that the machine has."""
    import torch

    if torch.cuda.is_available():
        return Line("device", f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}")
    cores = f"{len(os.sched_getaffinity(0))} cores, no GPU, torch {torch.__version__}"
    if shutil.which("nvidia-smi"):
        return Line(
            "device",
            f"{cores}, though nvidia-smi is installed",
            "torch does not see the GPU: install a CUDA build of torch that fits the driver, and "
            "look at CUDA_VISIBLE_DEVICES",
        )
    return Line("device", cores)


def check_git(root: Path) -> Line:
    """Check that the project is a git repository with a name for commits."""
    from fullscale.runtime.errors import StageError
    from fullscale.versioning.git import git

    try:
        commit = git(root, "rev-parse", "--short", "HEAD")
    except StageError as error:
        cure = "clone the project, or commit to it; a message of git may name another remedy"
        return Line("git", str(error), cure)
    changed = len(git(root, "status", "--porcelain", "--untracked-files=no").splitlines())
    found = f"commit {commit}, {changed} changed files"
    for key in ("user.name", "user.email"):
        try:
            git(root, "config", "--get", key)
        except StageError:
            return Line("git", f"{found}, no {key}", f"`git config {key} ...` for your commits")
    return Line("git", found)


def check_scans(root: Path) -> Line:
    """Check that there are scans, and that DVC has this version of them."""
    from fullscale.runtime.errors import ScanError, StageError
    from fullscale.scans.cohort import read_cohort
    from fullscale.versioning.git import run_program

    try:
        num_cases = len(read_cohort(root / "data").cases)
    except ScanError as error:
        return Line("scans", error.found, error.cure)
    if not (root / "data.dvc").is_file():
        return Line("scans", f"{num_cases} cases, no data.dvc", "version them with `dvc add data`")
    try:
        changed = "changed" in run_program(["dvc", "status", "data.dvc"], root)
    except StageError as error:
        return Line("scans", str(error), "correct that, then `dvc status data.dvc`")
    if changed:
        cure = "keep them with `dvc add data`, or undo that with `dvc checkout data.dvc`"
        return Line("scans", f"{num_cases} cases, others than those of data.dvc", cure)
    return Line("scans", f"{num_cases} cases, as data.dvc says")


def check_remote(root: Path) -> Line:
    """Check that DVC has a default remote, and that a folder that it names exists."""
    from fullscale.runtime.errors import StageError
    from fullscale.versioning.git import run_program

    try:
        rows = run_program(["dvc", "config", "--list"], root).splitlines()
    except StageError as error:
        return Line("DVC", str(error), "run in the project's folder, after `make setup`")
    # Settings of this clone come last, and count more than those of the project.
    settings = {key: value for key, _, value in (row.partition("=") for row in rows)}
    name = settings.get("core.remote", "")
    url = settings.get(f"remote.{name}.url", "")
    if not url:
        cure = "name one: docs/operations.md, Keep the scans in a remote"
        return Line("DVC remote", "none is the default, so scans are on this machine only", cure)
    if "://" not in url and not Path(url).is_dir():
        return Line("DVC remote", f"{name}, {url}, which is no folder", "mount or make it")
    return Line("DVC remote", f"{name}, {url}")


def check_server(name: str) -> Line:
    """Check that a server runs where the environment says, or that its port here is free."""
    server = SERVERS[name]
    elsewhere = os.environ.get(server.url_variable, "")
    if elsewhere.startswith("http"):
        if _is_healthy(elsewhere.rstrip("/")):
            return Line(name, f"runs at {elsewhere}")
        cure = f"start it, or correct {server.url_variable}"
        return Line(name, f"{elsewhere} does not answer", cure)
    text = os.environ.get(server.port_variable) or str(server.port)
    if not text.isdecimal() or not 0 < int(text) < 2**16:
        return Line(name, f"{server.port_variable} is {text!r}", "wanted a port from 1 to 65535")
    try:
        socket.create_connection(("127.0.0.1", int(text)), TIMEOUT_S).close()
    except OSError:
        return Line(name, f"port {text} is free; `make services` starts the server")
    if _is_healthy(f"http://127.0.0.1:{text}{server.path}"):
        return Line(name, f"runs at port {text}")
    cure = f"another program has the port: end it, or set {server.port_variable} to another one"
    return Line(name, f"port {text} answers, but not as {name} does", cure)


def _is_healthy(url: str) -> bool:
    """Return True if the health check of a server at an address succeeds."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=TIMEOUT_S) as answer:  # noqa: S310
            return bool(answer.status == 200)
    except (OSError, ValueError, HTTPException):
        return False
