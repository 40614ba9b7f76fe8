"""Which pipeline a stage runs for, and where that one's files are."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fullscale.params import Params, load_params
from fullscale.runtime.errors import StageError


@dataclass(frozen=True)
class Workspace:
    """Where one pipeline reads and writes.

    Scans, code and tracked runs are the project's; parameters and what stages make are its own.

    Attributes:
        root: the project.
        params_files: parameters; sections may be spread over several files.
        artifacts: outputs of stages.
        reports: scores and pictures.
        work: what trainings keep while they go on, outside DVC; a folder for each network.
        profile: as it was asked for; empty for the main pipeline.
    """

    root: Path
    params_files: tuple[Path, ...]
    artifacts: Path
    reports: Path
    work: Path
    profile: str = ""

    @property
    def slices(self) -> Path:
        """The slice store."""
        return self.artifacts / "slices"

    @property
    def split(self) -> Path:
        """The fold of each case."""
        return self.artifacts / "split.csv"

    def trained(self, network: str) -> Path:
        """A trained network."""
        return self.artifacts / "train" / network

    def tracking(self, network: str) -> Path:
        """Where a network's training keeps what MLflow has to be told."""
        return self.work / network / "tracking"

    def load_params(self) -> Params:
        """Its parameters; errors as `fullscale.params.load_params`."""
        return load_params(*self.params_files)


def open_workspace(root: Path, profile: str | None = None) -> Workspace:
    """The main pipeline's workspace, or that of a profile of another.

    Args:
        root: the project.
        profile: as PIPELINE/PROFILE: parameters are in PIPELINE/params.yaml and
            PIPELINE/PROFILE.yaml.

    Raises:
        StageError: there is no such profile.
    """
    if profile is None:
        return Workspace(
            root,
            (root / "params.yaml",),
            root / "artifacts",
            root / "reports",
            root / ".cache/train",
        )
    pipeline = Path(profile).parent
    files = (root / pipeline / "params.yaml", root / f"{profile}.yaml")
    if pipeline.parts[:1] in ((), ("..",), ("/",)) or not files[1].is_file():
        raise StageError(
            f"no profile {profile!r}: wanted PIPELINE/PROFILE such as paper/sample, with "
            f"parameters in PIPELINE/params.yaml and PIPELINE/PROFILE.yaml"
        )
    artifacts = root / "artifacts" / profile
    return Workspace(
        root,
        files,
        artifacts,
        artifacts / "reports",
        root / ".cache" / profile / "train",
        profile,
    )


def parse_command(stage: str, arguments: Sequence[str]) -> Workspace:
    """The workspace that the command line of a stage asks for."""
    workspace, _ = _parse(stage, arguments, takes_network=False)
    return workspace


def parse_network_command(stage: str, arguments: Sequence[str]) -> tuple[Workspace, Params, str]:
    """Workspace, parameters and network that the command line of a stage asks for.

    Raises:
        StageError: the network is not one of the workspace's.
    """
    workspace, network = _parse(stage, arguments, takes_network=True)
    params = workspace.load_params()
    if network not in params.networks:
        raise StageError(
            f"usage: python -m tasks.{stage} NETWORK, one of {', '.join(params.networks)}"
        )
    return workspace, params, network


def _parse(stage: str, arguments: Sequence[str], *, takes_network: bool) -> tuple[Workspace, str]:
    parser = argparse.ArgumentParser(prog=f"python -m tasks.{stage}")
    if takes_network:
        parser.add_argument("network", nargs="?", default="", help="one of networks in params.yaml")
    parser.add_argument("--profile", help="of another pipeline, such as paper/sample")
    found = parser.parse_args(arguments)
    return open_workspace(Path(), found.profile), getattr(found, "network", "")
