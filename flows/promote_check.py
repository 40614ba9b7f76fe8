"""Show which registered version is the champion, and notify people when that changes."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, cast

from prefect import flow, get_run_logger, task
from prefect.artifacts import Artifact, create_markdown_artifact
from prefect.variables import Variable

from flows.notify import chosen_block, notify
from flows.run_log import add_library_lines
from flows.stages import RETRY_DELAYS_S, RETRY_JITTER
from fullscale.params import load_params
from fullscale.tracking.pages import version_url
from fullscale.tracking.registry import CHAMPION, Registered, find_alias, mark_champion
from fullscale.tracking.store import Store, default_store

if TYPE_CHECKING:
    from prefect.client.schemas.objects import Artifact as StoredArtifact

NOBODY = "none"
ARTIFACT_KEY = "champion"
VARIABLE = "fullscale_champion"


@dataclass(frozen=True)
class ChampionObservation:
    """The champion at the time of a check.

    Attributes:
        model_name: the registered model.
        version: the champion's number, or "none".
        since: time of the first check that found this version, ISO 8601 in UTC.
    """

    model_name: str
    version: str
    since: str


@task(task_run_name="champion", retry_jitter_factor=RETRY_JITTER)
def find_champion(store: Store, model_name: str) -> Registered | None:
    """Return the champion, and note that it is; retried if the registry does not answer."""
    found = find_alias(store, model_name, CHAMPION)
    if found is not None:
        mark_champion(store, model_name, found.version)
    return found


@flow(name="promote-check", log_prints=True)
def promote_check(root: Path | None = None) -> str:
    """Compare the champion with the one of the last check; notify people if it changed.

    The first check notifies nobody. The observation is kept in a Prefect variable.

    Args:
        root: the project; None is the working directory.

    Returns:
        The champion's version, or "none".

    Raises:
        StageError: the model registry does not answer.
    """
    add_library_lines()
    root = (root or Path()).resolve()
    model_name = load_params(root / "params.yaml").register_.model_name
    find = find_champion.with_options(
        retries=len(RETRY_DELAYS_S), retry_delay_seconds=RETRY_DELAYS_S
    )
    store = default_store(root)
    found = find(store, model_name)
    version = NOBODY if found is None else found.version
    before = read_last_observation(model_name)
    if before is not None and before.version == version:
        show_champion(describe_champion(before, found, store))
        return version
    now = ChampionObservation(model_name, version, datetime.now(UTC).isoformat(timespec="seconds"))
    text = describe_champion(now, found, store)
    show_champion(text)
    if before is None:
        get_run_logger().info("%s: champion is %s", model_name, version)
    else:
        moved = f"{model_name}: champion moved from version {before.version} to {version}"
        get_run_logger().info(moved)
        notify(chosen_block(os.environ), moved, text)
    Variable.set(VARIABLE, asdict(now), overwrite=True)
    return version


def read_last_observation(model_name: str) -> ChampionObservation | None:
    """Return the observation of the last check, if it was of this model."""
    stored = Variable.get(VARIABLE)
    if not isinstance(stored, dict) or stored.get("model_name") != model_name:
        return None
    return ChampionObservation(model_name, str(stored["version"]), str(stored["since"]))


def describe_champion(
    observation: ChampionObservation, found: Registered | None, store: Store
) -> str:
    """Return the champion, the address of its page and the tags of its version as markdown."""
    if found is None:
        return f"No version of {observation.model_name} is champion (since {observation.since})."
    name = f"{observation.model_name} version {observation.version}"
    lines = [f"{name} is champion, seen since {observation.since}.", ""]
    if url := version_url(store, observation.model_name, observation.version):
        lines += [url, ""]
    return "\n".join(lines + [f"- {key}: {found.tags[key]}" for key in sorted(found.tags)])


def show_champion(markdown: str) -> None:
    """Create an artifact, unless the newest one has the same text."""
    newest = cast("StoredArtifact | None", Artifact.get(ARTIFACT_KEY))
    if newest is None or newest.data != markdown:
        create_markdown_artifact(key=ARTIFACT_KEY, markdown=markdown)


def main() -> None:
    """Run the flow on the working directory."""
    promote_check(Path())


if __name__ == "__main__":
    main()
