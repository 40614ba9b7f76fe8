"""What is written for a segmented scan.

Nothing of a DICOM header goes along but the geometry, except into the DICOM segmentation, which
belongs to its series.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from fullscale.prediction.segmentation import Model, Segmented
from fullscale.runtime.files import write_atomically
from fullscale.scans.dicom_seg_writer import Maker, write_segmentation
from fullscale.scans.nifti_writer import write_on_grid
from fullscale.serving.input_checks import Doubt
from fullscale.serving.result_json import describe_result
from fullscale.serving.scan_files import Scan, ScanInput, strip_suffix


@dataclass(frozen=True)
class Targets:
    """Where the outputs of one scan go; None where one is not wanted.

    Attributes:
        label_map: .nii or .nii.gz; probabilities lie beside it.
        probabilities: whether they are wanted.
        preview: .png.
        statistics: .json.
        dicom_seg: .dcm.
    """

    label_map: Path
    probabilities: bool = False
    preview: Path | None = None
    statistics: Path | None = None
    dicom_seg: Path | None = None

    def probability(self, organ: str) -> Path:
        """The file of one organ's probabilities."""
        stem = strip_suffix(self.label_map.name)
        suffix = self.label_map.name[len(stem) :]
        return self.label_map.with_name(f"{stem}_{organ}_probability{suffix}")


def write_outputs(
    source: ScanInput,
    scan: Scan,
    found: Segmented,
    doubts: Sequence[Doubt],
    model: Model,
    targets: Targets,
) -> None:
    """Write what is wanted; the label map comes last, so that where it is, all is.

    Raises:
        OSError: a file cannot be written.
        ScanError: the scan has changed, or its series cannot be referred to.
    """
    geometry = scan.volume.geometry
    like = None if source.is_dicom else source.files[0]
    organs = {organ: each.label_id for organ, each in found.organs.items()}
    for organ, probability_ZYX in (found.probabilities or {}).items():
        write_on_grid(targets.probability(organ), probability_ZYX, geometry, like)
    if targets.statistics is not None:
        content = describe_result(source.name, scan.volume, found, doubts, model)
        write_atomically(targets.statistics, json.dumps(content, indent=2) + "\n")
    if targets.preview is not None:
        _write_preview(scan, found, organs, model, targets.preview)
    if targets.dicom_seg is not None and scan.order is not None:
        write_segmentation(targets.dicom_seg, found.label_ZYX, scan.order, organs, _maker(model))
    write_on_grid(targets.label_map, found.label_ZYX, geometry, like)


def _write_preview(
    scan: Scan, found: Segmented, organs: dict[str, int], model: Model, path: Path
) -> None:
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
