"""The page of a registered version in MLflow's UI, as Markdown.

Pure functions without access to a store. MLflow's UI shows GitHub's Markdown, but ignores
attributes that set a width, keeps the line breaks of the text, and resolves the address of a
picture relative to its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlencode

from fullscale.evaluation.promotion_gate import VERDICT_WORDS
from fullscale.reporting.numbers import NOT_MEASURED, deployed_title, result_word, verdict_notes
from fullscale.runtime.markdown import escape, format_table
from fullscale.tracking.generated_text import sign, unsign
from fullscale.versioning.provenance import Provenance

MAX_CHARS = 5000
"""Longest description that MLflow's database accepts."""
MAX_SCORES_CHARS = 1200
MIN_EXTERNAL_CHARS = 500
EXTERNAL = "External: other cohorts"
PICTURE_WIDTH_PX = 1000
"""Width that fits next to the UI's menu; the UI does not scale pictures."""
PICTURES_PATH = "page"
"""Folder of the page's pictures in the run."""
PICTURES = {
    "median": "The median test case",
    "worst": "The test case with the lowest Dice",
    "best": "The test case with the highest Dice",
}
"""Pictures of stage evaluate, in the order shown."""
TIED = "\u00a0"
"""No-break space."""
GAP = "&nbsp;"
"""Space at the end of a cell, which the UI would strip otherwise."""
NO_COMMIT = "none"
"""Git commit of a verdict outside of a git repository."""


def make_version_page(
    verdict: Mapping[str, Any],
    provenance: Provenance,
    summaries: Mapping[str, Mapping[str, Any]],
    organs: Sequence[str],
    run_id: str,
    pictures: Sequence[str],
) -> str:
    """Return the description of a version that passed the promotion gate.

    It is at most MAX_CHARS - MIN_EXTERNAL_CHARS long, so `add_external` finds room.

    Args:
        verdict: the content of reports/gate.json.
        provenance: of the code that made it.
        summaries: of candidate and baseline, by network: the content of reports/NAME/summary.json.
        organs: rows of the table of scores, in this order.
        run_id: the MLflow run that holds `pictures` under PICTURES_PATH.
        pictures: the existing ones of PICTURES.
    """
    rest = [
        _scores(verdict, summaries, organs),
        _pictures(run_id, pictures),
        _promotion(),
        _provenance(verdict, provenance),
    ]
    sections = [each for each in rest if each]
    room = MAX_CHARS - MIN_EXTERNAL_CHARS - len(sign("\n\n".join(["", *sections])))
    return sign("\n\n".join([_verdict(verdict, room), *sections]))


def add_external(page: str, external: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a version's page with its scores on other cohorts, in place of those it showed.

    Args:
        page: description of the version; "" if it has none.
        external: by cohort: Dice, slice FPR and counts under the keys of reports/NAME/summary.json.
    """
    head, *sections = unsign(page).split("\n\n### ")
    sections = [each for each in sections if not each.startswith(EXTERNAL)]
    if external:
        room = MAX_CHARS - len(sign("\n\n### ".join([head, *sections])))
        sections.insert(1, _external(external, room))  # below the internal scores
    return sign("\n\n### ".join([head, *sections]))


def _external(external: Mapping[str, Mapping[str, Any]], room: int) -> str:
    heading, rule, *rows = format_table(
        ("cohort", "organ", "Dice", "slice FPR"),
        [
            (escape(cohort) + GAP, escape(organ) + GAP, *_cells([scores], organ))
            for cohort, scores in external.items()
            for organ in _scored_organs(scores)
        ],
    )
    note = (
        "None of these patients was in data/ when the cohort was scored. Tables: under `external/` "
        "in the artifacts of the source run."
    )
    room -= len("\n".join(["\n\n### ", EXTERNAL, heading, rule, "", note]))
    return "\n".join([EXTERNAL, heading, rule, *_cut(rows, room, "the version's tags"), "", note])


def _scored_organs(scores: Mapping[str, Any]) -> list[str]:
    prefix = "test/dice/"
    return [key.removeprefix(prefix) for key in scores if key.startswith(prefix)]


def make_model_page(organs: Sequence[str]) -> str:
    """Return the description of the registered model, its aliases, and how to promote a version.

    Args:
        organs: the organs that it segments.
    """
    return "\n".join(
        (
            f"Segmentation of {_enumerate(organs)} in CT. Stage `register` adds a version when a "
            "candidate passes the promotion gate; the page of the version gives the reasons.",
            "",
            "- `champion`: the version in use. `fullscale predict` and `fullscale serve` take it.",
            "- `challenger`: the newest version that passed.",
            "",
            "To promote a version, open it and add `champion` to its aliases; it leaves the "
            "version that had it. To roll back, do the same on the earlier version.",
        )
    )


def _verdict(verdict: Mapping[str, Any], max_chars: int) -> str:
    heading, rule, *rows = format_table(
        ("result", "found", "wanted"),
        [
            (
                result_word(criterion),
                escape(criterion["found"]) + GAP,
                escape(criterion["wanted"]),
            )
            for criterion in verdict["criteria"]
        ],
    )
    notes = [escape(note) for note in verdict_notes(verdict)]
    title = "\n".join([VERDICT_WORDS[verdict["status"]], "---", heading, rule])
    note = "\n" + " ".join(["A candidate passes if it meets all of these.", *notes])
    return "\n".join([title, *_cut(rows, max_chars - len(title) - len(note) - 1), note])


def _scores(
    verdict: Mapping[str, Any],
    summaries: Mapping[str, Mapping[str, Any]],
    organs: Sequence[str],
) -> str:
    candidate, baseline, champion = (verdict[key] for key in ("candidate", "baseline", "champion"))
    columns = {
        f"{candidate} (this)": summaries[candidate],
        f"{baseline} (baseline)": summaries[baseline],
    }
    note = "No other version was champion then, so there is none to compare with."
    if champion is not None:
        columns["champion then"] = champion["scores"]
        note = f"Champion then: version {champion['version']}, scored again on the same test set."
    headings = [
        escape(f"{metric}, {name}") + GAP for metric in ("Dice", "slice FPR") for name in columns
    ]
    heading, rule, *rows = format_table(
        ("organ", *headings),
        [(escape(organ) + GAP, *_cells(list(columns.values()), organ)) for organ in organs],
    )
    return "\n".join(
        [
            "### Internal: the project's test set, scored in 3D on each scan's own grid",
            heading,
            rule,
            *_cut(rows, MAX_SCORES_CHARS),
            "",
            "Dice: mean over n cases. Slice FPR: share of n organ-free slices in which the organ "
            f"was seen. {note}",
        ]
    )


def _cells(summaries: Sequence[Mapping[str, Any]], organ: str) -> list[str]:
    """Return Dice of each network, then slice FPR of each, with the numbers of cases and slices."""
    cells = []
    for metric, count in (("dice", "num_cases"), ("slice_fpr", "num_free_slices")):
        for summary in summaries:
            value = summary.get(f"test/{metric}/{organ}")
            number = summary.get(f"test/{count}/{organ}", 0)
            shown = NOT_MEASURED if value is None else f"{value:.4f}"
            cells.append(f"{shown} (n = {number})".replace(" ", TIED))
    return cells


def _pictures(run_id: str, names: Sequence[str]) -> str:
    shown = [
        f"{title}: truth in green, prediction in red\n\n![{title}]({_address(run_id, name)})"
        for name, title in PICTURES.items()
        if name in names
    ]
    note = "Larger ones: under `test/` in the artifacts of the source run, linked above."
    return "\n\n".join(["### Pictures", *shown, note]) if shown else ""


def _address(run_id: str, name: str) -> str:
    """Return the address of a picture on MLflow's server, in the form that its UI uses."""
    query = urlencode({"path": f"{PICTURES_PATH}/{name}.png", "run_uuid": run_id})
    return f"get-artifact?{query}"


def _promotion() -> str:
    return "\n".join(
        (
            "### Promote, roll back",
            "- Promote: add `champion` to this version's aliases (the pencil, or Add, next to "
            "Aliases above). It leaves the version that had it. The button Promote model does "
            "something else: it copies the version into another registered model.",
            "- Roll back: do the same on the page of the earlier version.",
            "- What follows: the next `fullscale predict` and, within seconds, `fullscale serve` "
            "segment with it, the promotion gate compares with it, and `promote-check` reports the "
            "change.",
        )
    )


def _provenance(verdict: Mapping[str, Any], provenance: Provenance) -> str:
    """Return the versions of code and data, and the commands that reproduce the weights.

    data.dvc is taken from the commit that added the data version, which may be a later one.
    """
    data, commit = verdict["data_version"], provenance.git_commit.removesuffix("-dirty")
    checkouts = [
        f"git checkout {commit}",
        f"git checkout $(git log --all --format=%h -S {data[:8]} -- data.dvc | tail -1) data.dvc",
    ]
    return "\n".join(
        [
            "### Reproduce",
            f"- data version: `{data}`",
            f"- git commit: `{commit}`"
            + (f", code of branch `{provenance.branch}`" if provenance.branch else "")
            + (", with changes that were not committed" if provenance.git_commit != commit else ""),
            f"- test set: `{verdict['test_set']}`",
            f"- what segments: {deployed_title(verdict)}",
            f"- SHA-256 of the weights: `{verdict['weights_sha256']}`",
            "",
            "In a clone of the project; the last line prints that SHA-256 on a processor that "
            "rounds alike:",
            "```",
            *(checkouts if commit != NO_COMMIT else ()),
            "make setup && source .venv/bin/activate",
            "dvc pull data.dvc",
            "dvc repro",
            _digest_command(verdict),
            "```",
        ]
    )


def _digest_command(verdict: Mapping[str, Any]) -> str:
    """Return the command that prints the SHA-256 of the weights, as `digest_weights` defines it."""
    folder, members = f"artifacts/train/{verdict['candidate']}", verdict["members"]
    if len(members) == 1:
        return f"sha256sum {folder}/{members[0]}/weights.safetensors"
    listed = " ".join(f"{seed}/weights.safetensors" for seed in members)
    return f"(cd {folder} && sha256sum {listed}) | cut -c -64 | sha256sum"


def _cut(rows: Sequence[str], max_chars: int, place_of_all: str = "reports/gate.json") -> list[str]:
    """Return the rows that fit, and a row with the number of the others and where all are."""
    kept: list[str] = []
    room = max_chars - len(f"\n| and 9999 more: {place_of_all} |")
    for place, row in enumerate(rows):
        room -= len(row) + 1
        if room < 0:
            return [*kept, f"| and {len(rows) - place} more: {place_of_all} |"]
        kept.append(row)
    return kept


def _enumerate(words: Sequence[str]) -> str:
    *others, last = words
    return f"{', '.join(others)} and {last}" if others else last
