"""Say which model is in use, and when a person has made another one champion."""

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
from flows.stages import RETRY_DELAYS_S, RETRY_JITTER
from fullscale.params import load_params
from fullscale.tracking.registry import CHAMPION, Registered, find_alias
from fullscale.tracking.store import Store, default_store

if TYPE_CHECKING:
    from prefect.client.schemas.objects import Artifact as Kept

NOBODY = "none"
ARTIFACT_KEY = "champion"
VARIABLE = "fullscale_champion"


@dataclass(frozen=True)
class Look:
    """The champion as a look found it.

    Attributes:
        model_name: the registered model.
        version: the champion's number, or "none".
        since: when this version was first seen as the champion, ISO 8601 in UTC.
    """

    model_name: str
    version: str
    since: str


@task(task_run_name="champion", retry_jitter_factor=RETRY_JITTER)
def ask_registry(store: Store, model_name: str) -> Registered | None:
    """The version in use; a registry that does not answer is asked again."""
    return find_alias(store, model_name, CHAMPION)


@flow(name="promote-check", log_prints=True)
def promote_check(root: Path | None = None) -> str:
    """Compare the champion with the one seen last; tell of a move, and show who is in use.

    The first look only takes note. What was seen is kept in a Prefect variable.

    Args:
        root: the project; None is the working directory.

    Returns:
        The version in use, or "none".

    Raises:
        StageError: the model registry does not answer.
    """
    root = (root or Path()).resolve()
    model_name = load_params(root / "params.yaml").register_.model_name
    ask = ask_registry.with_options(retries=len(RETRY_DELAYS_S), retry_delay_seconds=RETRY_DELAYS_S)
    found = ask(default_store(root), model_name)
    version = NOBODY if found is None else found.version
    before = read_last_look(model_name)
    if before is not None and before.version == version:
        show_champion(describe(before, found))
        return version
    now = Look(model_name, version, datetime.now(UTC).isoformat(timespec="seconds"))
    show_champion(describe(now, found))
    if before is None:
        get_run_logger().info("%s: champion is %s", model_name, version)
    else:
        moved = f"{model_name}: champion moved from version {before.version} to {version}"
        get_run_logger().info(moved)
        notify(chosen_block(os.environ), moved, describe(now, found))
    Variable.set(VARIABLE, asdict(now), overwrite=True)
    return version


def read_last_look(model_name: str) -> Look | None:
    """What the last look found, if it was for this model."""
    kept = Variable.get(VARIABLE)
    if not isinstance(kept, dict) or kept.get("model_name") != model_name:
        return None
    return Look(model_name, str(kept["version"]), str(kept["since"]))


def describe(look: Look, found: Registered | None) -> str:
    """Who is in use, and what the verdict said of it, as markdown."""
    if found is None:
        return f"No version of {look.model_name} is champion (since {look.since})."
    lines = [f"{look.model_name} version {look.version} is champion, seen since {look.since}.", ""]
    return "\n".join(lines + [f"- {key}: {found.tags[key]}" for key in sorted(found.tags)])


def show_champion(markdown: str) -> None:
    """Leave an artifact, unless the newest one says the same."""
    newest = cast("Kept | None", Artifact.get(ARTIFACT_KEY))
    if newest is None or newest.data != markdown:
        create_markdown_artifact(key=ARTIFACT_KEY, markdown=markdown)


def main() -> None:
    """Run the flow on the working directory."""
    promote_check(Path())


if __name__ == "__main__":
    main()
