"""Reproduce the published result: every stage of dvc.yaml, each as its own Prefect task.

`python -m flows.reproduce` needs no server: Prefect starts a temporary one.
"""

from __future__ import annotations

from pathlib import Path

from prefect import flow

from flows.artifacts import show_results, show_status
from flows.run_log import add_library_lines
from flows.stages import pull_data, run_stages
from fullscale.params import load_params
from fullscale.tracking.store import default_store


@flow(name="reproduce", flow_run_name="reproduce by hand", log_prints=True)
def reproduce(root: Path | None = None) -> str:
    """Run all stages and show their results.

    Args:
        root: the project; None is the working directory.

    Returns:
        The promotion gate's status: pass, fail or undecided.
    """
    add_library_lines()
    root = (root or Path()).resolve()
    params = load_params(root / "params.yaml")
    pull_data(root)
    run_stages(params, root)
    verdict = show_results(params, root, default_store(root))
    show_status(verdict["status"])
    return str(verdict["status"])


def main() -> None:
    """Run the flow on the working directory, with Prefect's state kept inside the project."""
    reproduce(Path())


if __name__ == "__main__":
    main()
