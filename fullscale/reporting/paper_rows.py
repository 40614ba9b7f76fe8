"""Rows of the UNet 3+ paper's tables, with published and measured values."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from fullscale.evaluation.paired import Gain, holm, paired_gain
from fullscale.evaluation.score_files import read_scores, read_summary
from fullscale.evaluation.summary import make_predictor, summarise
from fullscale.params import Params
from fullscale.runtime.console import track
from fullscale.scans.volume import Volume
from fullscale.versioning.provenance import Provenance
from fullscale.workspace import Workspace

if TYPE_CHECKING:
    from fullscale.prediction.network_files import Trained
    from fullscale.prediction.predictor import Refine

PUBLISHED = Path("paper/published.csv")
NUM_TIMED = 3
CRF = "-crf"
"""Suffix of a row whose masks are those of the row without it, refined by a CRF."""
CLAIMS = (
    ("unet3plus", "unet", "UNet 3+ over UNet, plain encoder"),
    ("unet3plus", "unetplusplus", "UNet 3+ over UNet++, plain encoder"),
    ("unet3plus-resnet101", "unet-resnet101", "UNet 3+ over UNet, ResNet-101"),
    ("unet3plus", "unet3plus-no-ds", "deep supervision, plain encoder"),
    ("unet3plus-resnet101", "unet3plus-no-ds-resnet101", "deep supervision, ResNet-101"),
    ("unet3plus-hybrid", "unet3plus-resnet101", "hybrid loss over focal loss"),
    ("unet3plus-hybrid-cgm", "unet3plus-hybrid", "CGM"),
    ("unet3plus", "unet-norm", "UNet 3+ over UNet with batch norm, plain encoder"),
    ("unet3plus-hybrid-plain", "unet3plus", "hybrid loss over focal loss, plain encoder"),
    ("unet3plus-hybrid-cgm-plain", "unet3plus-hybrid-plain", "CGM, plain encoder"),
)
"""Claims of the paper: the better row, the worse row, and the difference between them."""


@dataclass(frozen=True)
class PaperRow:
    """A network of the comparison.

    Attributes:
        network: its key in params; with the suffix `CRF`, of that network after a CRF.
        title, encoder: as in the paper.
        published: organ to Dice in the paper; NaN if not published.
        summary: means over the trainings; empty if the row was not run.
        parameters, published_parameters_m: number of parameters here; in millions in the paper.
        gmac: 10^9 multiplications for a slice, at the size and width used here.
        seconds_per_scan: median over the scan that was timed.
        reason: why the row was not run; empty if it was.
    """

    network: str
    title: str
    encoder: str
    published: dict[str, float]
    summary: dict[str, Any] = field(default_factory=dict)
    parameters: int = 0
    published_parameters_m: float = math.nan
    gmac: float = math.nan
    seconds_per_scan: float = math.nan
    reason: str = ""

    def measured(self, metric: str, organ: str) -> float:
        """Return a metric of stage evaluate for an organ; NaN if not measured."""
        return float(self.summary.get(f"test/{metric}/{organ}", math.nan))


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, measured here.

    Attributes:
        title: the difference between the two rows.
        better, worse: networks, as in the paper.
        gain: paired difference in Dice, over all organs.
        p_holm: its p-value, corrected for the number of claims.
    """

    title: str
    better: str
    worse: str
    gain: Gain
    p_holm: float


@dataclass(frozen=True)
class Setting:
    """The data, parameters and code behind the values of a table.

    Attributes:
        cohort: name of the data set.
        organs: in the order of params.
        num_cases: number of test cases.
        is_lits: True if all test cases are from LiTS.
        params: of the profile.
        timed_slices: number of slices of the scan that was timed.
        provenance: versions of code and scans.
    """

    cohort: str
    organs: tuple[str, ...]
    num_cases: int
    is_lits: bool
    params: Params
    timed_slices: int
    provenance: Provenance


def read_rows(workspace: Workspace, params: Params, scan: Volume) -> list[PaperRow]:
    """Return the rows of the paper's tables whose network a profile has, with its values.

    Args:
        workspace: of the profile.
        params: its parameters.
        scan: every network is timed on this scan.
    """
    published = pd.read_csv(workspace.root / PUBLISHED, index_col="network")
    facts = [
        (str(name), facts)
        for name, facts in published.iterrows()
        if str(name).removesuffix(CRF) in params.networks
    ]
    return [
        _read_row(name, fact, workspace, params, scan)
        for name, fact in track(facts, "table", len(facts))
    ]


def _read_row(
    name: str, facts: pd.Series[Any], workspace: Workspace, params: Params, scan: Volume
) -> PaperRow:
    from fullscale.prediction.network_files import build, load_trained
    from model.networks import NETWORKS, compute_cost
    from model.preprocessing import NUM_ADJACENT_SLICES

    row = PaperRow(
        network=name,
        title=str(facts["title"]),
        encoder=str(facts["encoder"]),
        published={organ: float(facts.get(organ, math.nan)) for organ in params.organs},
    )
    if not workspace.summary(name).is_file():
        return replace(row, reason=f"{workspace.summary(name)} is missing")
    network = name.removesuffix(CRF)
    refine: Refine = params.evaluate.refine if network == name else "crf"
    trained = load_trained(workspace.trained(network, min(params.seeds)))
    description = trained.description
    cost = compute_cost(lambda: build(description), NUM_ADJACENT_SLICES, params.slice.size_px)
    published_m = NETWORKS[description.architecture].published_parameters_m
    return replace(
        row,
        summary=_mean_of_trainings(workspace, name, params),
        parameters=cost.parameters,
        published_parameters_m=published_m.get(description.encoder, math.nan),
        gmac=cost.gmac,
        seconds_per_scan=time_scan(trained, params, scan, refine),
    )


def _mean_of_trainings(workspace: Workspace, name: str, params: Params) -> dict[str, Any]:
    """Return a network's scores, of several trainings their mean, not those of the ensemble.

    The paper's figures are of single networks. An interval is over patients, each with all their
    scores.
    """
    summary = read_summary(workspace, name)
    metrics = summarise(read_scores(workspace, name), tuple(params.organs), params.register_)
    counts = {key: value for key, value in summary.items() if key.startswith("test/num_")}
    return {**metrics, **counts}  # a case is one, however often the network was trained


def time_scan(trained: Trained, params: Params, scan: Volume, refine: Refine) -> float:
    """Return seconds to segment a scan without reading it: the median of `NUM_TIMED` after a first.

    Args:
        trained: the network.
        params: section evaluate.
        scan: HU in canonical orientation.
        refine: how masks are refined.
    """
    predictor = make_predictor(trained, params.evaluate.model_copy(update={"refine": refine}))
    took_s = []
    for _ in range(1 + NUM_TIMED):
        start = time.perf_counter()
        predictor.segment(scan)
        took_s.append(time.perf_counter() - start)
    return statistics.median(took_s[1:])


def measure_claims(workspace: Workspace, params: Params, rows: Sequence[PaperRow]) -> list[Claim]:
    """Return the paper's claims as paired differences in Dice, with p-values corrected by Holm."""
    titles = {row.network: f"{row.title} ({row.encoder})" for row in rows if not row.reason}
    scores = {network: read_scores(workspace, network) for network in titles}
    claims = [claim for claim in CLAIMS if claim[0] in titles and claim[1] in titles]
    gains = [paired_gain(scores[one], scores[two], params.register_) for one, two, _ in claims]
    corrected = holm([gain.p_value for gain in gains])
    return [
        Claim(title, titles[one], titles[two], gain, p)
        for (one, two, title), gain, p in zip(claims, gains, corrected, strict=True)
    ]
