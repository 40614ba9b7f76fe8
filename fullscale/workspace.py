"""The pipeline that a stage runs for, and the places of its files."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fullscale.params import Params, load_params
from fullscale.runtime.errors import StageError


@dataclass(frozen=True)
class Workspace:
    """The files of one pipeline.

    Pipelines share the project's scans, code and tracked runs; each has parameters and outputs of
    its stages.

    Attributes:
        root: the project.
        params_files: parameters; sections may be spread over several files.
        artifacts: outputs of stages.
        reports: scores and pictures.
        work: what trainings keep while they run, outside DVC; a folder for each network.
        profile: as requested, such as paper/sample; empty for the main pipeline.
    """

    root: Path
    params_files: tuple[Path, ...]
    artifacts: Path
    reports: Path
    work: Path
    profile: str = ""

    @property
    def data(self) -> Path:
        """The cohort."""
        return self.root / "data"

    @property
    def lock(self) -> Path:
        """The dvc.lock of the pipeline."""
        return self.root / Path(self.profile).parent / "dvc.lock"

    @property
    def slices(self) -> Path:
        """The slice store."""
        return self.artifacts / "slices"

    @property
    def split(self) -> Path:
        """The fold of each case."""
        return self.artifacts / "split.csv"

    @property
    def verdict(self) -> Path:
        """The verdict of the promotion gate."""
        return self.reports / "gate.json"

    def trained(self, network: str) -> Path:
        """Return the folder of a trained network."""
        return self.artifacts / "train" / network

    def report(self, network: str) -> Path:
        """Return the folder of a network's scores and pictures."""
        return self.reports / network

    def scores(self, network: str) -> Path:
        """Return the file of a network's scores by case and organ."""
        return self.report(network) / "cases.csv"

    def summary(self, network: str) -> Path:
        """Return the file of a network's means, rates and intervals."""
        return self.report(network) / "summary.json"

    def calibration(self, network: str) -> Path:
        """Return the file of a network's reliability curves."""
        return self.report(network) / "calibration.csv"

    def tracking(self, network: str) -> Path:
        """Return the folder of what a network's training sends to MLflow."""
        return self.work / network / "tracking"

    def load_params(self) -> Params:
        """Read the parameters; raise as `fullscale.params.load_params` does."""
        return load_params(*self.params_files)

    def command(self, stage: str, network: str = "") -> str:
        """Return the command that runs a stage, for messages."""
        if not self.profile:
            return f"dvc repro {stage}@{network}" if network else f"dvc repro {stage}"
        pipeline, name = Path(self.profile).parent, Path(self.profile).name
        item = f"{name}-{network}" if network else name
        return f"dvc repro {pipeline}/dvc.yaml:{stage}@{item}"

    def relative(self, path: Path) -> str:
        """Return a path as seen from the project's root, for messages."""
        return path.relative_to(self.root).as_posix()


def open_workspace(root: Path, profile: str | None = None) -> Workspace:
    """Return the workspace of the main pipeline, or that of a profile of another pipeline.

    Args:
        root: the project.
        profile: PIPELINE/PROFILE: parameters are in PIPELINE/params.yaml and
            PIPELINE/PROFILE.yaml.

    Raises:
        StageError: the profile does not exist.
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
    """Return the workspace that the command line of a stage names."""
    workspace, _ = _parse(stage, arguments, takes_network=False)
    return workspace


def parse_network_command(stage: str, arguments: Sequence[str]) -> tuple[Workspace, Params, str]:
    """Return workspace, parameters and network that the command line of a stage names.

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
