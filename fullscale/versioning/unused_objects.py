"""Objects in DVC's cache that no branch, tag or workspace of the project uses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fullscale.runtime.errors import StageError
from fullscale.runtime.files import read_json_or_empty
from fullscale.versioning.data_version import read_remote
from fullscale.versioning.git import run_program
from fullscale.versioning.retraining import PENDING_FILE

_REMOVING = "Removing "


def list_unused_objects(root: Path, checkouts: Sequence[Path]) -> list[Path]:
    """Return the files of the cache that `remove_unused_objects` would remove, sorted.

    In use is what data.dvc and dvc.lock name at the tips of all branches, in tags and experiments,
    in the project's folder and in the worktrees. Without a DVC remote outside the repository this
    cache has the only copy, and what any commit names is in use.

    Args:
        root: the project.
        checkouts: worktrees of `hold_checkouts`, which keeps them still.

    Raises:
        StageError: the cache may hold what others need, or DVC fails.
    """
    told = _collect(root, checkouts, "--dry").splitlines()
    paths = [line.removeprefix(_REMOVING) for line in told if line.startswith(_REMOVING)]
    return sorted(Path(path) for path in paths)


def remove_unused_objects(root: Path, checkouts: Sequence[Path]) -> None:
    """Remove what `list_unused_objects` returns; interrupted, the cache is whole.

    Raises:
        StageError: as `list_unused_objects` does.
    """
    _collect(root, checkouts, "--force")


def _collect(root: Path, checkouts: Sequence[Path], *options: str) -> str:
    root = root.resolve()
    cache = Path(run_program(["dvc", "cache", "dir"], root).strip())
    if not cache.is_relative_to(root):
        raise StageError(
            f"{cache} may be the cache of other projects too: run `dvc gc --projects` with all of "
            "them"
        )
    if read_json_or_empty(root / PENDING_FILE):
        raise StageError(
            "a retraining ended before its results were published, and the next one needs them: "
            "run `python -m flows.retrain` first"
        )
    remote = read_remote(root)
    is_elsewhere = bool(remote) and not Path(remote).is_relative_to(root)
    scope = ["--all-branches", "--all-tags"] if is_elsewhere else ["--all-commits"]
    command = ["dvc", "--wait-for-lock", "gc", "--workspace", *scope, "--all-experiments"]
    if checkouts:
        options = (*options, "--projects", *map(str, checkouts))
    return run_program([*command, *options], root)
