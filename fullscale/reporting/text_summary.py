"""The results as text for a terminal: scores, slice classifiers, verdict, registered model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fullscale.evaluation.promotion_gate import VERDICT_WORDS
from fullscale.reporting.numbers import NOT_MEASURED, result_word, verdict_notes

if TYPE_CHECKING:
    from rich.table import Table

    from fullscale.evaluation.score_files import Summary, VerdictContent
    from fullscale.params import Params
    from fullscale.reporting.results import Results
    from fullscale.tracking.store import Store


def score_rows(results: Results) -> list[tuple[str, str, str, str, str]]:
    """Return organ, network, Dice, slice FPR and number of cases as text, for every network."""
    return [
        (
            organ,
            network,
            _format(summary, "dice", organ),
            _format(summary, "slice_fpr", organ),
            str(summary[f"test/num_cases/{organ}"]),
        )
        for organ in results.organs
        for network, summary in results.summaries.items()
    ]


def make_table(results: Results) -> Table:
    """Return the scores as a table for the terminal, with Dice's interval and HD95."""
    from rich.table import Table

    table = Table(title="Test set, scored in 3D on each scan's own grid")
    for heading in ("organ", "network"):
        table.add_column(heading)
    for heading in ("Dice", "slice FPR", "cases", "Dice interval", "HD95 mm"):
        table.add_column(heading, justify="right")
    for row in score_rows(results):
        organ, network, *_ = row
        summary = results.summaries[network]
        low, high = (_format(summary, f"dice_{end}", organ, 3) for end in ("low", "high"))
        interval = low if low == NOT_MEASURED else f"{low} - {high}"
        table.add_row(*row, interval, _format(summary, "hd95_mm", organ, 1))
    return table


def _format(summary: Summary, metric: str, organ: str, digits: int = 4) -> str:
    value = summary.get(f"test/{metric}/{organ}")
    return NOT_MEASURED if value is None else f"{value:.{digits}f}"


def classifier_lines(results: Results) -> list[str]:
    """Return what the slice classifiers (CGM) did on the test set, a line for organ and network.

    Networks without one are left out.
    """
    return [
        f"Slice classifier (CGM) of {network}, {organ}: sensitivity "
        f"{_format(summary, 'classifier_sensitivity', organ)} "
        f"({summary[f'test/num_organ_slices/{organ}']} organ slices), specificity "
        f"{_format(summary, 'classifier_specificity', organ)} "
        f"({summary[f'test/num_free_slices/{organ}']} organ-free slices)"
        for organ in results.organs
        for network, summary in results.summaries.items()
        if any(
            f"test/classifier_{rate}/{organ}" in summary for rate in ("sensitivity", "specificity")
        )
    ]


def out_of_fold_lines(results: Results) -> list[str]:
    """Return the cross-validation's Dice, a line for each network that has one."""
    return [
        f"Out of fold, {network}: "
        + ", ".join(
            f"{organ} {summary[key]:.4f}"
            for organ in results.organs
            if (key := f"out_of_fold/dice/{organ}") in summary
        )
        + f" ({summary['out_of_fold/num_patients']} patients who are not tested, each segmented by "
        "the training that validated on them)"
        for network, summary in results.summaries.items()
        if "out_of_fold/num_patients" in summary
    ]


def verdict_lines(verdict: VerdictContent) -> list[str]:
    """Return the verdict, its criteria and its notes, a line each."""
    return [
        f"Verdict: {VERDICT_WORDS[verdict['status']]}",
        *(
            f"  {result_word(criterion)}  {criterion['found']} (wanted: {criterion['wanted']})"
            for criterion in verdict["criteria"]
        ),
        *(f"  {note}" for note in verdict_notes(verdict)),
    ]


def registry_line(params: Params, verdict: VerdictContent, store: Store) -> str:
    """Return the registered version of the candidate, or the reason why it has none."""
    from fullscale.tracking.pages import version_url
    from fullscale.tracking.registry import find_version, list_aliases

    name = params.register_.model_name
    if verdict["status"] != "pass":
        return "Registered: nothing, because the promotion gate did not pass"
    version = find_version(store, name, verdict["weights_sha256"])
    if version is None:
        return (
            "Registered: not in this tracking store; register it there with "
            "`dvc repro --force --single-item register`"
        )
    aliases = ", ".join(list_aliases(store, name, version)) or "none"
    url = version_url(store, name, version)
    place = "" if url is None else f", {url}"
    return f"Registered: {name} version {version} (aliases: {aliases}){place}"
