import subprocess

import pytest
from project import ROOT

from fullscale.evaluation.score_files import read_summary, read_verdict
from fullscale.params import load_params
from fullscale.prediction.network_files import WEIGHTS_NAME, digest_weights
from fullscale.reporting.model_card import (
    MAX_CHARS,
    MIN_EXTERNAL_CHARS,
    PICTURES,
    add_external,
    make_model_page,
    make_version_page,
)
from fullscale.runtime.markdown import escape
from fullscale.tracking.generated_text import is_ours
from fullscale.versioning.provenance import Provenance
from fullscale.workspace import open_workspace

COMMIT, DATA = "c" * 40, "d" * 32 + ".dir"
CODE = Provenance(COMMIT, DATA)
RUN_ID = "f" * 32
ORGANS = ("liver", "spleen")
CHAMPION = {
    "version": "3",
    "scores": {
        "test/num_cases/liver": 7,
        "test/dice/liver": 0.90125,
        "test/num_free_slices/liver": 110,
        "test/slice_fpr/liver": 0.02,
        "test/num_cases/spleen": 0,
    },
}


@pytest.fixture
def verdict(published):
    """The published verdict, of one training."""
    found = read_verdict(open_workspace(published))
    return {**found, "champion": None, "seeds": [0], "members": [0]}


@pytest.fixture(scope="module")
def summaries(published):
    return {name: read_summary(open_workspace(published), name) for name in ("unet3plus", "unet")}


def test_page_of_an_ensemble_names_its_members_and_the_digest_over_theirs(
    verdict, summaries, tmp_path
):
    verdict |= {"seeds": [0, 2, 10], "members": [0, 2, 10]}
    page = make_version_page(verdict, CODE, summaries, ORGANS, RUN_ID, [])
    assert "- what segments: the ensemble of 3 trainings, seeds 0, 2, 10\n" in page
    command = page.split("\n```\n")[1].splitlines()[-1]
    folders = [tmp_path / "artifacts/train/unet3plus" / str(seed) for seed in verdict["members"]]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / WEIGHTS_NAME).write_text(folder.name)
    told = subprocess.run(
        ["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert told.stdout.split()[0] == digest_weights(folders)


def test_page_of_the_best_training_says_so(verdict, summaries):
    verdict |= {"seeds": [0, 2], "members": [2]}
    page = make_version_page(verdict, CODE, summaries, ORGANS, RUN_ID, [])
    assert "- what segments: the training with seed 2, of 2 the best in validation\n" in page
    assert "sha256sum artifacts/train/unet3plus/2/weights.safetensors\n" in page


def cells(page, start):
    """The cells of the only line that starts so."""
    (line,) = (line for line in page.splitlines() if line.startswith(start))
    text = line.replace("&nbsp;", " ").replace("\u00a0", " ")
    return [cell.strip() for cell in text.strip("|").split("|")]


def test_page_begins_with_the_verdict_and_every_reason(verdict, summaries):
    page = make_version_page(verdict, CODE, summaries, ORGANS, RUN_ID, list(PICTURES))
    assert page.startswith("PASS: the candidate may be promoted\n---\n")
    for criterion in verdict["criteria"]:
        assert f"| PASS | {escape(criterion['found'])}&nbsp; | {criterion['wanted']} |" in page


def test_page_has_the_notes_of_the_verdict(verdict, summaries):
    verdict["notes"] = ["First candidate judged on test set 1234."]
    page = make_version_page(verdict, CODE, summaries, ORGANS, RUN_ID, list(PICTURES))
    wanted = "A candidate passes if it meets all of these. First candidate judged on test set 1234."
    assert wanted in page


def test_page_of_an_older_verdict_has_no_notes(verdict, summaries):
    verdict.pop("notes", None)
    page = make_version_page(verdict, CODE, summaries, ORGANS, RUN_ID, list(PICTURES))
    assert "\nA candidate passes if it meets all of these.\n" in page


def test_page_compares_candidate_baseline_and_champion(verdict, summaries):
    page = make_version_page({**verdict, "champion": CHAMPION}, CODE, summaries, ORGANS, RUN_ID, [])
    assert cells(page, "| organ |") == [
        *("organ", "Dice, unet3plus (this)", "Dice, unet (baseline)", "Dice, champion then"),
        *("slice FPR, unet3plus (this)", "slice FPR, unet (baseline)"),
        "slice FPR, champion then",
    ]
    scores = []
    for metric, count in (("dice", "num_cases"), ("slice_fpr", "num_free_slices")):
        for summary in (summaries["unet3plus"], summaries["unet"], CHAMPION["scores"]):
            value, number = (summary[f"test/{key}/liver"] for key in (metric, count))
            scores.append(f"{value:.4f} (n = {number})")
    assert cells(page, "| liver&nbsp; |") == ["liver", *scores]
    assert scores[2] == "0.9012 (n = 7)"
    assert cells(page, "| spleen&nbsp; |")[3] == "not measured (n = 0)"
    assert "Champion then: version 3, scored again on the same test set." in page


def test_page_says_that_there_was_no_champion(verdict, summaries):
    page = make_version_page(verdict, CODE, summaries, ORGANS, RUN_ID, [])
    assert "No other version was champion then, so there is none to compare with." in page
    assert len(cells(page, "| liver&nbsp; |")) == 5


def test_page_shows_the_pictures_that_there_are(verdict, summaries):
    page = make_version_page(verdict, CODE, summaries, ORGANS, RUN_ID, ["best", "median"])
    shown = [line for line in page.splitlines() if line.startswith("![")]
    address = "get-artifact?path=page%2F{}.png&run_uuid=" + RUN_ID
    assert shown == [
        f"![The median test case]({address.format('median')})",
        f"![The test case with the highest Dice]({address.format('best')})",
    ]
    assert "### Pictures" not in make_version_page(verdict, CODE, summaries, ORGANS, RUN_ID, [])


def test_page_says_what_it_was_made_from_and_how_to_make_it_again(verdict, summaries):
    page = make_version_page(verdict, CODE, summaries, ORGANS, RUN_ID, [])
    for value in (
        COMMIT,
        *(verdict[key] for key in ("data_version", "test_set", "weights_sha256")),
    ):
        assert f": `{value}`\n" in page
    assert page.count("\n```\n") == 2
    commands = page.split("\n```\n")[1].splitlines()
    assert commands == [
        f"git checkout {COMMIT}",
        f"git checkout $(git log --all --format=%h -S {verdict['data_version'][:8]} -- data.dvc "
        "| tail -1) data.dvc",
        "make setup && source .venv/bin/activate",
        "dvc pull data.dvc",
        "dvc repro",
        "sha256sum artifacts/train/unet3plus/0/weights.safetensors",
    ]


def test_page_names_the_branch_and_says_that_the_code_was_not_committed(verdict, summaries):
    dirty = make_version_page(
        verdict, Provenance(f"{COMMIT}-dirty", DATA), summaries, ORGANS, RUN_ID, []
    )
    assert f"- git commit: `{COMMIT}`, with changes that were not committed\n" in dirty
    assert f"\ngit checkout {COMMIT}\n" in dirty
    branch = make_version_page(
        verdict, Provenance(COMMIT, DATA, "main"), summaries, ORGANS, RUN_ID, []
    )
    assert f"- git commit: `{COMMIT}`, code of branch `main`\n" in branch
    nowhere = make_version_page(verdict, Provenance("none", DATA), summaries, ORGANS, RUN_ID, [])
    assert "- git commit: `none`\n" in nowhere
    assert "git checkout" not in nowhere


@pytest.mark.parametrize("num_organs", [13, 104])
def test_page_of_many_organs_fits_and_counts_what_it_leaves_out(verdict, summaries, num_organs):
    organs = [f"a_rather_long_name_of_organ_number_{place:03d}" for place in range(num_organs)]
    criterion = {"passed": True, "wanted": "at most 0.01 below unet"}
    verdict["criteria"] += [
        {**criterion, "found": f"{organ}: mean Dice 0.9308, unet 0.9106 (8 cases)"}
        for organ in organs
    ]
    verdict["notes"] = ["Judged: these weights against those weights."] * 5
    verdict["champion"] = CHAMPION
    page = make_version_page(verdict, CODE, summaries, organs, RUN_ID, list(PICTURES))
    room = MAX_CHARS - MIN_EXTERNAL_CHARS
    assert room - 200 < len(page) <= room
    assert is_ours(page)
    lines = page.splitlines()
    notes = [
        place for place, line in enumerate(lines) if line.endswith("more: reports/gate.json |")
    ]
    assert len(notes) == 2
    for place, total in zip(notes, (len(verdict["criteria"]), num_organs), strict=True):
        top = max(row for row in range(place) if lines[row].startswith("|---"))
        num_left_out = int(lines[place].removeprefix("| and ").split()[0])
        assert (place - top - 1) + num_left_out == total
    assert "number\\_000" in page
    assert page.count("```") == 2


def external(*organs):
    scores = {"dice": 0.91234, "num_cases": 20, "slice_fpr": 0.0125, "num_free_slices": 800}
    return {f"test/{metric}/{organ}": value for organ in organs for metric, value in scores.items()}


def test_page_tells_external_scores_from_internal_ones(verdict, summaries):
    page = make_version_page(verdict, CODE, summaries, ORGANS, RUN_ID, list(PICTURES))
    shown = add_external(page, {"Chaos": external("liver"), "Ircad_b": external(*ORGANS)})
    assert is_ours(shown)
    titles = [line for line in shown.splitlines() if line.startswith("### ")]
    assert titles[0].startswith("### Internal: the project's test set")
    assert titles[1] == "### External: other cohorts"
    assert cells(shown, "| Chaos&nbsp; |") == [
        *("Chaos", "liver", "0.9123 (n = 20)", "0.0125 (n = 800)")
    ]
    assert shown.count("| Ircad\\_b&nbsp; |") == 2
    again = add_external(shown, {"Chaos": external("liver")})
    assert again.count("### External") == 1
    assert "Ircad" not in again
    assert add_external(again, {}) == page


def test_page_of_many_cohorts_fits(verdict, summaries):
    organs = [f"a_rather_long_name_of_organ_number_{place:03d}" for place in range(104)]
    page = make_version_page(verdict, CODE, summaries, organs, RUN_ID, list(PICTURES))
    shown = add_external(page, {"first": external(*organs), "second": external(*organs)})
    assert len(shown) <= MAX_CHARS
    assert "more: the version's tags |" in shown


CHANGES = (
    lambda page: f"{page} ",
    lambda page: f"Mine. {page}",
    lambda page: page.replace("| PASS |", "| FAIL |"),
    lambda page: "Mine.",
)


@pytest.mark.parametrize("change", CHANGES)
def test_page_that_a_person_changed_is_theirs(verdict, summaries, change):
    page = make_version_page(verdict, CODE, summaries, ORGANS, RUN_ID, [])
    assert is_ours(page)
    assert not is_ours(change(page))


@pytest.mark.parametrize("nothing", [None, ""])
def test_description_that_no_one_wrote_may_be_written(nothing):
    assert is_ours(nothing)


def test_model_says_what_it_segments_and_what_its_aliases_mean():
    text = make_model_page(tuple(load_params(ROOT / "params.yaml").organs))
    assert text.startswith("Segmentation of liver and spleen in CT.")
    assert "`champion`: the version in use" in text
    assert "`challenger`: the newest version that passed" in text
    assert make_model_page(("liver",)).startswith("Segmentation of liver in CT.")
    assert make_model_page(("a", "b", "c")).startswith("Segmentation of a, b and c in CT.")
