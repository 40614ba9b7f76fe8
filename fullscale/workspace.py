"""The pipeline that a stage runs for, and the places of its files."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
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
        work: what trainings keep while they run, outside DVC; a folder for each of them.
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

    def trained(self, network: str, seed: int) -> Path:
        """Return the folder of a network as trained with a seed."""
        return self.artifacts / "train" / network / str(seed)

    def trainings(self, network: str, seeds: Iterable[int]) -> list[Path]:
        """Return the folders of all trainings of a network, in the order of their seeds."""
        return [self.trained(network, seed) for seed in sorted(seeds)]

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

    def training_work(self, network: str, seed: int) -> Path:
        """Return the folder of what a training keeps while it runs."""
        return self.work / network / str(seed)

    def tracking(self, network: str, seed: int) -> Path:
        """Return the folder of what a training sends to MLflow."""
        return self.training_work(network, seed) / "tracking"

    def load_params(self) -> Params:
        """Read the parameters; raise as `fullscale.params.load_params` does."""
        return load_params(*self.params_files)

    def command(self, stage: str, *item: str | int) -> str:
        """Return the command that runs a stage, for messages.

        Args:
            stage: the stage.
            item: the network, and for stage train the seed; nothing for a stage that runs once.
        """
        pipeline, profile = Path(self.profile).parent, Path(self.profile).name
        name = "-".join(str(part) for part in (profile, *item) if part != "")
        target = f"{stage}@{name}" if name else stage
        return f"dvc repro {pipeline}/dvc.yaml:{target}" if profile else f"dvc repro {target}"

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
    return open_workspace(Path(), _parser(stage).parse_args(arguments).profile)


def parse_evaluate_command(arguments: Sequence[str]) -> tuple[Workspace, Params, str, str]:
    """Return what the command line of stage evaluate names.

    Returns:
        Workspace, parameters, network, and the name of its reports: the network's, or with
        `--refine` both, such as unet-crf; then the parameters have that `evaluate.refine`.

    Raises:
        StageError: the network is not one of the workspace's.
    """
    parser = _parser("evaluate")
    parser.add_argument("network", nargs="?", default="", help="one of networks in params.yaml")
    parser.add_argument(
        "--refine", choices=("crf", "largest_component"), help="in place of evaluate.refine"
    )
    found = parser.parse_args(arguments)
    workspace = open_workspace(Path(), found.profile)
    params = workspace.load_params()
    if found.network not in params.networks:
        raise StageError(
            f"usage: python -m tasks.evaluate NETWORK, one of {', '.join(params.networks)}"
        )
    if found.refine is None:
        return workspace, params, found.network, found.network
    refined = params.evaluate.model_copy(update={"refine": found.refine})
    params = params.model_copy(update={"evaluate": refined})
    return workspace, params, found.network, f"{found.network}-{found.refine}"


def parse_training_command(arguments: Sequence[str]) -> tuple[Workspace, Params, str, int]:
    """Return workspace, parameters, network and seed that the command line of stage train names.

    Raises:
        StageError: network or seed is not one of the workspace's.
    """
    parser = _parser("train")
    parser.add_argument("network", nargs="?", default="", help="one of networks in params.yaml")
    parser.add_argument("seed", nargs="?", default="", help="one of seeds in params.yaml")
    found = parser.parse_args(arguments)
    workspace = open_workspace(Path(), found.profile)
    params = workspace.load_params()
    seeds = {str(seed): seed for seed in params.seeds}
    if found.network not in params.networks or found.seed not in seeds:
        raise StageError(
            f"usage: python -m tasks.train NETWORK SEED, one of {', '.join(params.networks)}, and "
            f"one of {', '.join(seeds)}"
        )
    return workspace, params, found.network, seeds[found.seed]


def _parser(stage: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m tasks.{stage}")
    parser.add_argument("--profile", help="of another pipeline, such as paper/sample")
    return parser
