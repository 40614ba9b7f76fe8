"""Plans by measurements of cohorts and known speeds; the rules have their own tests."""

import pytest

from docs import make_plans
from fullscale.planning.fingerprint import NAME, read_fingerprint
from fullscale.versioning.provenance import read_data_version


@pytest.mark.slow
def test_plans_of_the_page_are_those_that_the_command_makes():
    text = make_plans.TARGET.read_text()
    assert text == make_plans.fill(text), "run: python -m docs.make_plans"
    sample = read_fingerprint(make_plans.COHORTS / "sample" / NAME)
    assert sample.data_version == read_data_version(make_plans.ROOT), (
        "run: python -m docs.make_plans --measure data sample"
    )


def test_plan_of_two_scans_says_what_is_impossible_and_goes_on(monkeypatch):
    monkeypatch.setattr(make_plans, "HOURS", 0.5)
    plan = make_plans.plan_of("real")
    values = {each.key: each.value for each in plan.proposals}
    assert values["slice.neighbour_mm"] == 3
    assert values["train.num_epochs"] >= 10
    assert {key for key in plan.changes if key.startswith("split.")} == set()
    assert plan.stages == {}
    assert [text.partition(":")[0] for text in plan.impossible] == ["a training", "a verdict"]
    assert "Add scans" in plan.impossible[0]


def test_plan_of_five_scans_has_a_split_and_no_verdict(monkeypatch):
    monkeypatch.setattr(make_plans, "HOURS", 0.5)
    plan = make_plans.plan_of("five")
    assert [text.partition(":")[0] for text in plan.impossible] == ["a verdict"]
    assert "6 test patients of every organ" in plan.impossible[0]
    trainings = [plan.stages[f"train@{name}-0"] for name in ("unet", "unet3plus")]
    assert sum(trainings) == pytest.approx(1800, rel=0.1)


@pytest.mark.parametrize(("cohort", "keeps"), [("five", False), ("mixed", True)])
def test_few_patients_are_planned_and_measured_without_slice_classifier(monkeypatch, cohort, keeps):
    monkeypatch.setattr(make_plans, "HOURS", 0.5)
    speed_of, measured = make_plans.speed_of, set()

    def measure(name, params, num_slices):
        measured.add((name, bool(params.recipes[name].cgm)))
        return speed_of(name, params, num_slices)

    monkeypatch.setattr(make_plans, "speed_of", measure)
    plan = make_plans.plan_of(cohort)
    proposal = next(each for each in plan.proposals if each.key == "recipes.unet3plus.cgm")
    assert proposal.value is keeps
    assert measured == {("unet", False), ("unet3plus", keeps)}
