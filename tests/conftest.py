from __future__ import annotations

import gc
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from cohorts import write_nnunet
from filelock import FileLock
from project import ROOT, Project, copy_project, write_published
from quick_project import make_quick_project
from repository import make_repository
from tiny import CASES, TINY, changed

from fullscale.ingestion.ingest import ingest
from fullscale.params import Params
from fullscale.runtime.console import NEW_OBJECTS, configure_logging
from fullscale.scans.cohort import read_cohort
from fullscale.scans.slice_store import SliceStore
from fullscale.tracking.store import Store, connect, sqlite_store
from tasks.slice import slice_cohort

# Tests run side by side, one to a core: more threads each would be in one another's way, and cost
# two fifths more processor time in all.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Else `dvc init` starts a second program, before a repository's settings forbid it.
os.environ.setdefault("DVC_NO_ANALYTICS", "1")
# These take long to make, so a test that uses one is slow.
SLOW_FIXTURES = {
    "empty_databases",
    "fuzzed",
    "prefect",
    "quick_template",
    "reproduced_template",
    "patients",
}
# Started first, the longest before the others: at the end no process is left alone with one.
LONG_FILES = (
    "system/test_services.py",
    "system/test_restarts.py",
    "flows/test_retrain.py",
    "flows/test_chain_faults.py",
    "system/test_soak.py",
    "versioning/test_data_version.py",
    "system/test_several_seeds.py",
    "flows/test_stages.py",
    "system/test_survival.py",
    "system/test_team_servers.py",
    "system/test_distributed.py",
    "tasks/test_receive.py",
    "system/test_pipeline.py",
    "tasks/test_export.py",
    "tasks/test_train.py",
    "versioning/test_retraining.py",
    "system/test_paper.py",
    "system/test_serving.py",
    "system/test_promotion.py",
    "model/test_networks.py",
    "model/test_synchronised.py",
    "tasks/test_gc.py",
)
# What programs keep for their next run, wherever they are started.
CACHES = {".hypothesis", ".import_linter_cache", ".mypy_cache", ".pytest_cache", ".ruff_cache"}
# Where the pipeline and the services of the project itself write, perhaps during the tests.
OWN_FOLDERS = (".cache", ".prefect", "artifacts", "data", "inbox", "mlruns", "reports")
LOOSE_FILES = pytest.StashKey[set[str]]()
LEFT_FILES = pytest.StashKey[list[str]]()
# Databases that wait for a disk take half the time of what uses them. Killed programs lose nothing
# that they wrote, wherever that is.
MEMORY_DISK = Path("/dev/shm")  # noqa: S108 - pytest makes a private folder in it
MEMORY_DISK_BYTES = 6 * 2**30
FAST = "not slow"
STORE_DATABASE = "mlflow.db"
SLOW_FILE = re.compile(r"^pytestmark = \[?pytest\.mark\.slow", re.M)
FIRST_OUTPUT = "first_output.txt"
"""What `dvc repro` printed when the reproduced project was made, next to the project."""


def pytest_configure(config: pytest.Config) -> None:
    """Keep files of tests in memory where there is room for them.

    What killed programs leave among the temporary files is in one folder, which goes at the end.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    has_room = MEMORY_DISK.is_dir() and shutil.disk_usage(MEMORY_DISK).free >= MEMORY_DISK_BYTES
    of_tests = str(MEMORY_DISK) if has_room else tempfile.gettempdir()
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", of_tests)
    folder = tempfile.mkdtemp(prefix="fullscale-tests-")
    Path(folder).chmod(0o711)  # PostgreSQL has a user of its own
    os.environ |= {"TMPDIR": folder, "JOBLIB_TEMP_FOLDER": folder}
    tempfile.tempdir = folder
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


@pytest.hookimpl(tryfirst=True)  # before slow tests are left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the longest files, and mark what uses a slow fixture."""
    order = {f"tests/{name}": place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: order.get(item.nodeid.partition("::")[0], len(order)))
    for item in items:
        if SLOW_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Look for no garbage while tests are imported, never in what was imported, and seldom."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(NEW_OBJECTS)
        gc.enable()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Do not import files of slow tests where only fast ones are wanted: that takes seconds."""
    if config.option.markexpr != FAST or collection_path.suffix != ".py":
        return None
    return True if SLOW_FILE.search(collection_path.read_text()) else None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return two processes more than cores: many slow tests mostly wait for other programs."""
    return len(os.sched_getaffinity(0)) + (0 if config.option.markexpr == FAST else 2)


def list_loose_files() -> set[str]:
    """Names of all files in the working tree that git has not, without caches."""
    listed = subprocess.run(
        [
            *("git", "-C", str(ROOT), "--no-optional-locks", "status", "--porcelain", "-z"),
            *("--ignored", "--untracked-files=all", "--", ".", ":!.venv", ":!*.egg-info"),
            *(f":!{folder}" for folder in OWN_FOLDERS),
        ],
        capture_output=True,
        check=True,
    )
    entries = listed.stdout.decode().split("\0")
    names = {entry[3:] for entry in entries if entry.startswith(("?? ", "!! "))}
    return {name for name in names if not (CACHES | {"__pycache__"}) & set(Path(name).parts)}


def pytest_sessionstart(session: pytest.Session) -> None:
    """Remember which files there are before the first test."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        session.config.stash[LOOSE_FILES] = list_loose_files()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a run that leaves a file in the working tree or a child process behind."""
    if LOOSE_FILES in session.config.stash:
        left_files = sorted(list_loose_files() - session.config.stash[LOOSE_FILES])
        if left_files:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
            session.config.stash[LEFT_FILES] = left_files
    if session.config.getoption("numprocesses", None):
        return  # its children are the processes that run tests, and each of them checks itself
    children = [child for child in psutil.Process().children() if child.status() != "zombie"]
    left = [" ".join(child.cmdline()) for child in children]
    # Python and joblib keep these for processes to come; they end with this one.
    left = [line for line in left if "multiprocessing" not in line and "loky" not in line]
    if left:
        raise RuntimeError(f"the tests left processes behind: {left}")


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Name the files that the tests left behind."""
    for name in config.stash.get(LEFT_FILES, []):
        terminalreporter.write_line(f"ERROR: the tests left {name} in the working tree", red=True)


@pytest.fixture(scope="session", autouse=True)
def heard_signals():
    """Programs that tests start hear signals, also where this one was told to ignore them.

    That is so behind nohup and in the background of a shell without job control.
    """
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, None)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, usual or signal.SIG_DFL)


@pytest.fixture(scope="session", autouse=True)
def log_on_stderr():
    """Log lines are on stderr, as where a command line has configured logging."""
    configure_logging()


@pytest.fixture(scope="session")
def build_once(tmp_path_factory) -> Callable[[str, Callable[[Path], object]], Path]:
    """Return a function that lets one of the processes of this run of pytest fill a folder.

    The others wait for it. The folder is shared: tests copy from it and write nothing into it.
    """
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent

    def build(name: str, fill: Callable[[Path], object]) -> Path:
        folder, finished = shared / name, shared / f"{name}.finished"
        with FileLock(shared / f"{name}.lock"):
            if not finished.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                fill(folder)
                finished.touch()
        return folder

    return build


@pytest.fixture(scope="session")
def empty_databases(build_once, store_template) -> Path:
    """The folders mlruns and .prefect of a project; for copying alone.

    Their databases have the newest tables and no content. Those of Prefect take 5 s to make.
    """

    def make(folder: Path) -> None:
        copy_store(store_template, folder / "mlruns")
        subprocess.run(
            ["prefect", "server", "database", "upgrade", "-y"],
            env=Project(folder).environment | {"PREFECT_HOME": str(folder / ".prefect")},
            capture_output=True,
            check=True,
        )

    return build_once("databases", make)


@pytest.fixture(scope="session")
def quick_template(build_once, empty_databases) -> Project:
    """A small project that nothing was run in; for copying alone."""

    def make(folder: Path) -> None:
        project = make_quick_project(folder)
        shutil.copytree(empty_databases, project.root, dirs_exist_ok=True)

    return Project(build_once("quick", make) / "project")


@pytest.fixture
def quick_project(quick_template, tmp_path) -> Project:
    """A small project for one test, in which nothing was run."""
    return copy_project(quick_template, tmp_path / "quick")


@pytest.fixture(scope="session")
def reproduced_template(build_once, quick_template) -> Project:
    """A small project whose pipeline was run once; for copying alone."""

    def reproduce(folder: Path) -> None:
        project = copy_project(quick_template, folder)
        (folder / FIRST_OUTPUT).write_text(project.run("dvc", "repro"))

    return Project(build_once("reproduced", reproduce) / "project")


@pytest.fixture
def reproduced_project(reproduced_template, tmp_path) -> Project:
    """A small project for one test, after a run of its pipeline: slices, networks, registry."""
    return copy_project(reproduced_template, tmp_path / "reproduced")


@pytest.fixture(scope="session")
def forget_runs(store_template) -> Callable[[Project], None]:
    """Return a function that gives a project a tracking store in which nothing is."""

    def forget(project: Project) -> None:
        shutil.rmtree(project.root / "mlruns")
        copy_store(store_template, project.root / "mlruns")

    return forget


@pytest.fixture(scope="session")
def prefect(empty_databases, tmp_path_factory) -> Iterator[None]:
    """A Prefect server for all tests of this process that need one; settings lead to it."""
    from prefect.settings import PREFECT_HOME, PREFECT_LOCAL_STORAGE_PATH, temporary_settings
    from prefect.testing.utilities import prefect_test_harness

    home = tmp_path_factory.mktemp("prefect")  # the working tree's would get results of tests
    folders = {PREFECT_HOME: home, PREFECT_LOCAL_STORAGE_PATH: home / "storage"}

    def make_database_folder() -> str:
        folder = tempfile.mkdtemp(dir=home)
        shutil.copy(empty_databases / ".prefect/prefect.db", f"{folder}/prefect-test.db")
        return folder

    with pytest.MonkeyPatch.context() as patch, temporary_settings(folders):
        patch.setattr("prefect.testing.utilities.mkdtemp", make_database_folder)
        with prefect_test_harness(server_startup_timeout=180):
            yield


@pytest.fixture(scope="session")
def published(tmp_path_factory) -> Path:
    """A folder with README, parameters and reports as they are published."""
    folder = tmp_path_factory.mktemp("published")
    write_published(folder)
    return folder


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
def store_template(build_once):
    """The folder of a real tracking store without runs: a new database takes most of a second."""
    return build_once("store", lambda folder: connect(sqlite_store(folder / STORE_DATABASE)))


@pytest.fixture(scope="session")
def mlflow_store(store_template, tmp_path_factory):
    """A real tracking store that the tests of a process share."""
    return copy_store(store_template, tmp_path_factory.mktemp("tracking") / "mlruns")


@pytest.fixture
def empty_store(store_template, tmp_path):
    """A real tracking store that no one has used."""
    return copy_store(store_template, tmp_path / "mlruns")


def copy_store(template: Path, folder: Path) -> Store:
    """Copy a tracking store: its database holds no path of its own."""
    return sqlite_store(shutil.copytree(template, folder) / STORE_DATABASE)


@pytest.fixture(scope="session")
def scans_template(build_once):
    """A small repository of git and DVC whose data/ holds three scans; for copying alone."""
    folder = build_once("scans", lambda folder: make_repository(folder / "project"))
    return folder / "project"


@pytest.fixture
def scans_repo(scans_template, tmp_path):
    """A copy of that repository for one test."""
    return shutil.copytree(scans_template, tmp_path / "project", symlinks=True)
