"""Run git and dvc as subprocesses."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from fullscale.runtime.errors import StageError
from fullscale.runtime.processes import bind_to_parent, stage_environment

SCANS_BRANCH = "scans"
"""Branch of the data versions made from the inbox, one commit each."""
RETRAIN_PREFIX = "retrain/"
"""Beginning of the names of branches with the results of a retraining."""
CODE_VARIABLE = "FULLSCALE_CODE_BRANCH"
"""Environment variable that names the branch whose code is trained."""
_LAST_LINES = 5
# A person's own settings must not change what is committed, merged, pushed or printed.
_NEUTRAL = {
    "color.ui": "false",
    "commit.gpgSign": "false",
    "commit.template": "",
    "core.hooksPath": "/dev/null",
    "log.showSignature": "false",
    "merge.ff": "true",
    "merge.verifySignatures": "false",
    "push.followTags": "false",
    "push.gpgSign": "false",
    "user.useConfigOnly": "false",
}


def run_program(
    command: list[str], folder: Path, environment: Mapping[str, str] | None = None
) -> str:
    """Run a program without a shell; it ends when this process dies.

    Args:
        command: program and arguments. The folder of this Python interpreter is first on PATH, so
            that `dvc` is the one of this environment.
        folder: working directory.
        environment: variables to set in addition to this process's own.

    Returns:
        The standard output.

    Raises:
        StageError: the exit code is not 0; the message holds the last lines of the output.
    """
    done = subprocess.run(
        bind_to_parent(command),
        cwd=folder,
        env=stage_environment({**os.environ, **(environment or {})}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if done.returncode:
        lines = [line.strip() for line in (done.stderr or done.stdout).splitlines()]
        last_lines = [line for line in lines if line][-_LAST_LINES:]
        raise StageError(
            f"{' '.join(command)} in {folder} ended with code {done.returncode}: "
            f"{' | '.join(last_lines)}"
        )
    return done.stdout


def git(folder: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> str:
    """Run git without hooks, signatures and a person's settings; return its output, stripped.

    Args:
        folder: working directory.
        arguments: of git.
        environment: as `run_program` takes it.

    Raises:
        StageError: git failed.
    """
    given = int(os.environ.get("GIT_CONFIG_COUNT", 0))
    settings = {"GIT_CONFIG_COUNT": str(given + len(_NEUTRAL)), "GIT_TERMINAL_PROMPT": "0"}
    for place, (key, value) in enumerate(_NEUTRAL.items(), start=given):
        settings |= {f"GIT_CONFIG_KEY_{place}": key, f"GIT_CONFIG_VALUE_{place}": value}
    return run_program(["git", *arguments], folder, {**settings, **(environment or {})}).strip()


def find_commit(folder: Path, name: str) -> str | None:
    """Return the commit that a revision resolves to, or None if it does not exist."""
    try:
        return git(folder, "rev-parse", "--verify", "--end-of-options", f"{name}^{{commit}}")
    except StageError:
        return None


def find_code(root: Path, branch: str | None) -> tuple[str, str]:
    """Return the branch whose code is trained, and its newest commit.

    Args:
        root: the project.
        branch: its name; None is the branch that is checked out.

    Raises:
        StageError: there is no such branch, none is checked out, or it is that of the scans.
    """
    remedy = f"set {CODE_VARIABLE} to one that `git branch` lists"
    branch = branch or git(root, "branch", "--show-current")
    if not branch:
        raise StageError(
            f"no branch is checked out in {root}, so it is unknown which code to train: check one "
            f"out, or {remedy}"
        )
    if branch == SCANS_BRANCH:
        raise StageError(
            f"branch {SCANS_BRANCH} carries scans, and no code to train: check another one out in "
            f"{root}, or {remedy}"
        )
    commit = find_commit(root, f"refs/heads/{branch}")
    if commit is None:
        raise StageError(f"{root} has no branch {branch}, whose code is to be trained; {remedy}")
    return branch, commit


def check_branch_names(root: Path) -> None:
    """Check that no branch has a name under which git cannot make ours.

    Raises:
        StageError: a branch is called retrain, or its name begins with scans/.
    """
    taken = RETRAIN_PREFIX.rstrip("/")
    found = git(
        root, "for-each-ref", "--format=%(refname:short)",
        f"refs/heads/{taken}", f"refs/heads/{SCANS_BRANCH}/",
    ).split()  # fmt: skip
    for name in found:
        if name == taken or name.startswith(f"{SCANS_BRANCH}/"):
            raise StageError(
                f"a branch is called {name}, and beside it git cannot have {SCANS_BRANCH} and "
                f"{RETRAIN_PREFIX}DATE; rename it: git branch --move {name} OTHER"
            )


def contains(folder: Path, later: str, earlier: str) -> bool:
    """Return True if `later` is `earlier` or a descendant of it."""
    return not git(folder, "rev-list", "--max-count", "1", earlier, f"^{later}")


def commit_paths(folder: Path, paths: Sequence[str], message: str, when: str | None = None) -> str:
    """Commit files of a worktree with a detached HEAD; return the new commit. No branch moves.

    Args:
        folder: the worktree.
        paths: paths relative to it.
        message: subject and body.
        when: date of the commit, as git takes it; None is now.
    """
    git(folder, "add", "--", *paths)
    dates = {"GIT_AUTHOR_DATE": when, "GIT_COMMITTER_DATE": when} if when else {}
    commit = (*_identity(folder), "commit", "--quiet", "--message", message, "--", *paths)
    git(folder, *commit, environment=dates)
    return git(folder, "rev-parse", "HEAD")


def merge(folder: Path, commit: str, message: str) -> None:
    """Merge a commit into what is checked out in a folder without changes.

    Raises:
        StageError: there is a conflict; the folder is as it was before.
    """
    try:
        git(folder, *_identity(folder), "merge", "--quiet", "--message", message, commit)
    except StageError:
        git(folder, "reset", "--quiet", "--hard")
        raise


def move_branch(folder: Path, branch: str, commit: str) -> None:
    """Fast-forward a branch to a commit, or create the branch.

    Raises:
        StageError: the branch is checked out, or `commit` is not a descendant of it.
    """
    if place := _where_checked_out(folder, branch):
        raise StageError(
            f"branch {branch} is checked out in {place}, and moving it would disturb that "
            "folder; switch to another branch there"
        )
    before = find_commit(folder, f"refs/heads/{branch}")
    if before is not None and not contains(folder, commit, before):
        raise StageError(
            f"branch {branch} is at {before[:8]}, which {commit[:8]} does not contain: another "
            "process moved it meanwhile; run again"
        )
    # git refuses if another process moved the branch since `before` was read.
    git(folder, "update-ref", f"refs/heads/{branch}", commit, before or "0" * len(commit))


def _identity(folder: Path) -> tuple[str, ...]:
    """Return options that set a committer, if git's settings have none."""
    try:
        for key in ("user.email", "user.name"):
            git(folder, "config", "--get", key)
    except StageError:
        return ("-c", "user.name=fullscale", "-c", "user.email=fullscale@localhost")
    return ()


def _where_checked_out(folder: Path, branch: str) -> str | None:
    """Return the worktree that has a branch checked out, if any."""
    for entry in git(folder, "worktree", "list", "--porcelain").split("\n\n"):
        lines = entry.splitlines()
        if f"branch refs/heads/{branch}" in lines:
            return lines[0].removeprefix("worktree ")
    return None
