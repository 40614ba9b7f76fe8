"""Score a model on an annotated cohort that it was not trained on."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from fullscale.evaluation.score_files import Summary
from fullscale.evaluation.summary import score_cases, summarise
from fullscale.formats.archives import open_source
from fullscale.ingestion.ingest import ingest
from fullscale.ingestion.names import safe_name
from fullscale.label_names import resolve_organs
from fullscale.patient_split import read_split
from fullscale.reporting.model_card import add_external, make_model_page
from fullscale.reporting.page import render
from fullscale.reporting.sections import cohort_section
from fullscale.runtime.errors import StageError
from fullscale.runtime.files import write_atomically
from fullscale.scans.cohort import Case, Cohort, is_cohort, read_cohort
from fullscale.tracking.registry import (
    add_external_scores,
    add_files,
    describe_version,
    find_numbered,
    read_external_scores,
)
from fullscale.versioning.provenance import digest_test_set

if TYPE_CHECKING:
    from fullscale.params import Params
    from fullscale.prediction.predictor import Predictor
    from fullscale.prediction.segmentation import Model
    from fullscale.tracking.store import Store
    from fullscale.workspace import Workspace

logger = logging.getLogger(__name__)

CASES, ORGANS, PAGE = "cases.csv", "organs.csv", "scores.html"


@dataclass(frozen=True)
class CohortScores:
    """The scores of a model on a cohort.

    Attributes:
        cohort: its name, safe as the name of a file.
        scores: as `score_cases` returns them.
        summary: as `summarise` returns it, and `test_set`, the digest of the cases.
        notes: for the reader: what was left out, and what is not known.
    """

    cohort: str
    scores: pd.DataFrame
    summary: Summary
    notes: tuple[str, ...]

    @property
    def num_patients(self) -> int:
        """Return the number of patients that were scored."""
        return int(self.scores["patient"].nunique())


@contextmanager
def open_cohort(source: Path) -> Iterator[Cohort]:
    """Read an ingested cohort, or check and convert other annotated scans in a temporary folder.

    Args:
        source: a cohort that `fullscale ingest` wrote, or a folder or zip that it would take.

    Raises:
        ScanError: the folder has no known layout, or is damaged.
        StageError: no case of it can be used.
    """
    with open_source(source) as folder:
        if is_cohort(folder):
            yield read_cohort(folder)
            return
        with tempfile.TemporaryDirectory(prefix="fullscale-score-") as temporary:
            converted = Path(temporary) / "data"
            report = ingest(folder, converted, num_workers=0)
            for finding in (*report.refused, *report.warnings):
                logger.warning(f"{finding.severity} {finding.case}: {finding}")
            if not report.accepted:
                raise StageError(f"no case of {source} can be used; the lines above say why")
            yield read_cohort(converted)


def leave_out_known(cohort: Cohort, workspace: Workspace) -> tuple[list[Case], list[str]]:
    """Return the cases of which data/ has neither scan nor patient, and a line for each other one.

    Args:
        cohort: the cohort to score.
        workspace: its data/ and split say what was trained on.
    """
    if not (workspace.data / "cases.csv").is_file():
        note = "There is no data/ here, so it is not known if the model was trained on these."
        return list(cohort.cases), [note]
    own = read_cohort(workspace.data).cases
    folds: dict[str, str] = {}
    if workspace.split.is_file():
        split = read_split(workspace.split)
        folds = dict(zip(split["case"], split["fold"], strict=True))
    by_voxels = {case.voxels_sha256: case for case in own if case.voxels_sha256}
    by_patient = {case.patient: case for case in own}
    kept, notes = [], []
    for case in cohort.cases:
        scan, patient = by_voxels.get(case.voxels_sha256), by_patient.get(case.patient)
        same = scan or patient
        if same is None:
            kept.append(case)
            continue
        fold = folds.get(same.name, "not split")
        what = f"its scan is case {same.name} of data/ ({fold})"
        if scan is None:
            what = (
                f"its patient {case.patient} is that of case {same.name} of data/ ({fold}); if "
                "this is another person, rename the patient in the cohort's cases.csv"
            )
        notes.append(f"{case.name} is left out: {what}.")
    return kept, notes


def find_organs(
    organs: Sequence[str], labels: Mapping[str, Sequence[int | str]], cohort: Cohort
) -> dict[str, tuple[int, ...]]:
    """Return the label ids in a cohort of those organs that it labels.

    Args:
        organs: of the network.
        labels: of each organ, as params.yaml has them; parts that the cohort lacks are left out.
        cohort: the cohort to score.

    Raises:
        StageError: it labels none of them.
    """
    found: dict[str, tuple[int, ...]] = {}
    for organ in organs:
        wanted = labels.get(organ, (organ,))
        for some in (wanted, wanted[:1]):
            try:
                found |= resolve_organs({organ: some}, cohort.labels)
                break
            except StageError:
                continue
    if not found:
        raise StageError(
            f"the model segments {', '.join(organs)}, and cohort {cohort.name} has the labels "
            f"{', '.join(cohort.labels)}; name its labels like the organs in its dataset.json"
        )
    return found


def score(
    predictor: Predictor, cohort: Cohort, params: Params, workspace: Workspace
) -> CohortScores:
    """Score a model on the cases of a cohort that are not in data/.

    Args:
        predictor: the model, with its own threshold and gate.
        cohort: the cohort.
        params: section `evaluate` and the intervals of section `register`.
        workspace: the project.

    Raises:
        StageError: no case or no organ is left to score.
    """
    cases, notes = leave_out_known(cohort, workspace)
    for note in notes:
        logger.warning(f"warning: {note}")
    if not cases:
        raise StageError(
            f"every case of cohort {cohort.name} is in data/; score a cohort of other patients"
        )
    organs = find_organs(tuple(predictor.description.organs), params.organs, cohort)
    settings = params.evaluate.model_copy(update={"ablate_slice_classifier": False})
    scores = score_cases(predictor, cases, cohort, settings, organs=organs)
    if scores.empty:
        raise StageError(
            f"no case of cohort {cohort.name} annotates {', '.join(organs)}; see the column "
            "annotated of its cases.csv"
        )
    summary = {
        "test_set": digest_test_set(cases),
        **summarise(scores, tuple(organs), params.register_),
    }
    return CohortScores(safe_name(cohort.name), scores, summary, tuple(notes))


def write_scores(found: CohortScores, model: Model, folder: Path) -> None:
    """Write the scores of each case and of each organ as CSV, and both as a page."""
    name = f"{model.name} version {model.version}" if model.version else model.name
    organs = list(found.scores["organ"].unique())
    table = pd.DataFrame(
        [
            {"organ": organ}
            | {
                key.split("/")[1]: value
                for key, value in found.summary.items()
                if key.endswith(f"/{organ}")
            }
            for organ in organs
        ]
    )
    write_atomically(folder / CASES, found.scores.to_csv(index=False, float_format="%.6f"))
    write_atomically(folder / ORGANS, table.to_csv(index=False, float_format="%.6f"))
    num_cases = found.scores["case"].nunique()
    page = render(
        [cohort_section(name, found.summary, found.scores)],
        f"{name} on {found.cohort}",
        [*found.notes, f"SHA-256 of the weights: {model.weights_sha256}."],
        "none",
        f"EXTERNAL: {num_cases} cases of {found.num_patients} patients, digest of the cases "
        f"{found.summary['test_set']}",
    )
    write_atomically(folder / PAGE, page)


def publish(found: CohortScores, model: Model, folder: Path, store: Store) -> None:
    """Write the scores onto the page of a registered version, and the files into its run.

    A page that a person wrote or changed is kept; the version's tags have the scores in any case.

    Args:
        found: the scores.
        model: a registered version.
        folder: what `write_scores` wrote.
        store: the registry.
    """
    version = find_numbered(store, model.name, str(model.version))
    if version is None:
        raise StageError(f"{store.uri} has lost version {model.version} of {model.name}")
    parts = ("test/dice/", "test/num_cases/", "test/slice_fpr/", "test/num_free_slices/")
    shown = {key: round(value, 6) for key, value in found.summary.items() if key.startswith(parts)}
    content = {"test_set": found.summary["test_set"], "num_patients": found.num_patients, **shown}
    add_external_scores(store, version, found.cohort, content)
    external = {**read_external_scores(version.tags), found.cohort: content}
    page = add_external(version.description, external)
    organs = tuple(model.trained.description.organs)
    describe_version(store, model.name, version.version, page, make_model_page(organs))
    add_files(store, version.run_id, folder, f"external/{found.cohort}")
