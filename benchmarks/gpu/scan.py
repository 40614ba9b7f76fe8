"""Measure a scan from file to file, and its parts: read, resample, network, back, write."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.settings import Report, Settings
from benchmarks.prediction import make_description, make_half_open_network, make_noisy_scan
from fullscale.prediction.network_files import Trained
from fullscale.prediction.predictor import Predictor
from fullscale.prediction.segmentation import read_batch_size, segment_scan
from fullscale.scans.nifti_writer import write_on_grid
from fullscale.scans.volume import read_image, write_volume
from model.output import Gating


def run(settings: Settings, report: Report) -> None:
    """Measure."""
    num_slices, side, _ = settings.scan_shape
    scan = make_noisy_scan(num_slices, side)
    description = make_description(settings.side_px, settings.width)
    network = make_half_open_network(description, scan)
    device = torch.device(settings.device)
    batch_size = read_batch_size("auto", description, device)
    report.add("batch size of --batch-size auto", batch_size)

    def predictor(gate: Gating) -> Predictor:
        return Predictor(Trained(network, description), 0.5, batch_size, device, "auto", gate)

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        own = scan.to_own_grid(scan.values_ZYX)
        write_volume(folder / "scan.nii.gz", own, scan.geometry.own_affine)
        predictor("hard").segment(scan)  # prepares kernels
        for gate in ("hard", "none"):
            report.measure(
                f"parts, gate {gate}",
                lambda gate=gate: measure_parts(folder, predictor(gate), settings),
            )
        report.measure(
            "file to file, s", lambda: measure_whole(folder, predictor("hard"), settings)
        )


def measure_parts(folder: Path, predictor: Predictor, settings: Settings) -> dict[str, float]:
    """Return the seconds of each part, one after the other, the whole prediction in memory."""
    seconds: dict[str, float] = {}

    def timed(name: str, function: Callable[[], Any]) -> Any:
        started = settings.clock()
        value = function()
        seconds[name] = settings.clock() - started
        return value

    path = folder / "scan.nii.gz"
    scan = timed("read_s", lambda: read_image(path))
    slices = timed("resample_s", lambda: predictor.slice_scan(scan))
    found = timed("network_s", lambda: predictor.predict(slices))
    label_map = timed("back_s", lambda: predictor.label_map(found))
    timed("write_s", lambda: write_on_grid(folder / "a.nii.gz", label_map, scan.geometry, path))
    seen_ZK = found.prediction.organ_probability
    assert seen_ZK is not None
    return {"open_slices": int((seen_ZK > 0.5).sum()), **seconds}


def measure_whole(folder: Path, predictor: Predictor, settings: Settings) -> float:
    """Return the seconds from file to file, as `fullscale predict` works, slab by slab."""
    started = settings.clock()
    path = folder / "scan.nii.gz"
    scan = read_image(path)
    found = segment_scan(predictor, scan)
    write_on_grid(folder / "b.nii.gz", found.label_ZYX, scan.geometry, path)
    return settings.clock() - started
