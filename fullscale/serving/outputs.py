"""Write the output files of a segmented scan.

Only the geometry of a DICOM header is copied into them, because headers identify the patient. The
exceptions are DICOM segmentation and structure set, which belong to their series.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from fullscale.prediction.segmentation import Model, Segmented
from fullscale.runtime.files import write_atomically
from fullscale.scans.dicom_seg_writer import Maker, write_segmentation, write_structure_set
from fullscale.scans.nifti_writer import write_on_grid
from fullscale.serving.input_checks import InputWarning
from fullscale.serving.prediction_jobs import PredictionJob
from fullscale.serving.result_json import result_to_json
from fullscale.serving.scan_files import NIFTI_SUFFIXES, LoadedScan


def write_outputs(
    job: PredictionJob,
    scan: LoadedScan,
    found: Segmented,
    input_warnings: Sequence[InputWarning],
    model: Model,
) -> None:
    """Write the files that a job names.

    The label map is written last: if it exists, all outputs exist.

    Raises:
        OSError: a file cannot be written.
        ScanError: the scan's file has changed, or a DICOM output cannot refer to its series.
    """
    source, paths = job.source, job.paths
    geometry, label_ZYX = scan.own_geometry, scan.to_own_slices(found.label_ZYX)
    is_nifti = source.files[0].name.lower().endswith(NIFTI_SUFFIXES)
    like = source.files[0] if is_nifti else None
    organs = {organ: each.label_id for organ, each in found.organs.items()}
    for organ, probability_ZYX in (found.probabilities or {}).items():
        probability_ZYX = scan.to_own_slices(probability_ZYX)
        write_on_grid(paths.probability(organ), probability_ZYX, geometry, like)
    if paths.statistics is not None:
        content = result_to_json(source.name, scan.volume, found, input_warnings, model)
        write_atomically(paths.statistics, json.dumps(content, indent=2) + "\n")
    if paths.preview is not None:
        _write_preview(paths.preview, scan, found, organs, model)
    if paths.dicom_seg is not None and scan.order is not None:
        write_segmentation(paths.dicom_seg, label_ZYX, scan.order, organs, _maker(model))
    if paths.rtstruct is not None and scan.order is not None:
        write_structure_set(paths.rtstruct, label_ZYX, scan.order, organs, _maker(model))
    write_on_grid(paths.label_map, label_ZYX, geometry, like)


def _write_preview(
    path: Path, scan: LoadedScan, found: Segmented, organs: dict[str, int], model: Model
) -> None:
    # Imported here: matplotlib is slow to import, and most runs draw nothing.
    from fullscale.runtime.files import save_picture
    from fullscale.serving.preview import draw_preview

    heading = ", ".join(f"{organ} {each.volume_ml:.0f} ml" for organ, each in found.organs.items())
    window_hu = model.trained.description.slice.window_hu
    save_picture(draw_preview(scan.volume, found.label_ZYX, organs, window_hu, heading), path)


def _maker(model: Model) -> Maker:
    return Maker(
        model.name, model.version or "unregistered", model.weights_sha256,
        metadata.version("fullscale"),
    )  # fmt: skip
