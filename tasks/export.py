"""Export a trained network as one ONNX file, which needs neither this project nor torch."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fullscale.prediction.segmentation import Model
from fullscale.runtime.errors import StageError
from fullscale.runtime.files import write_atomically
from fullscale.serving.onnx_check import (
    Parity,
    compare_outputs,
    compute_reference,
    graph_gating,
    make_slices,
)
from fullscale.serving.onnx_graph import OPSET, add_metadata, serialise, to_onnx
from model.ensemble import list_members
from model.inference import prepare

TOLERANCE = 1e-3
"""Measured: 1e-6 with a plain encoder. With an untrained ResNet-101 both runtimes are up to 3e-4
from the result in float64. A wrong weight differs by 1e-2 and more."""
NEEDED = ("onnx", "onnx_ir", "onnxruntime", "onnxscript")


@dataclass(frozen=True)
class ExportResult:
    """Properties of the file.

    Attributes:
        num_bytes: size of the file.
        opset: version of its ONNX operators.
        parity: differences between ONNX Runtime and prediction.
    """

    num_bytes: int
    opset: int
    parity: Parity


def export(path: Path, model: Model, *, tolerance: float = TOLERANCE) -> ExportResult:
    """Write a model as ONNX if ONNX Runtime computes the same with it as prediction.

    Args:
        path: the file, *.onnx; an existing one is overwritten.
        model: the model to write.
        tolerance: largest allowed absolute difference of probabilities.

    Raises:
        StageError: a package is missing, the file's name is unsuitable, the network is too large
            for ONNX or has an operation that ONNX lacks, it is an ensemble with gate slab, it has
            refine crf, or the results differ.
    """
    check_request(path)
    network = prepare(model.trained.network)
    if model.gate == "slab" and network.classifier is not None and len(list_members(network)) > 1:
        raise StageError(
            "an ensemble with gate slab cannot be one ONNX file: each member opens and closes "
            "slices of its own, and a graph does not know its slab; set another evaluate.gate, or "
            "export its members one by one"
        )
    if model.refine == "crf":
        raise StageError(
            "a model with refine crf cannot be one ONNX file: the field is computed by code of "
            "this project; set another evaluate.refine, or deploy it with `mlflow models serve`"
        )
    size_px = model.trained.description.slice.size_px
    gating = graph_gating(model.gate)
    graph = to_onnx(network, size_px, gating)
    add_metadata(graph, model)
    image_ZHW = make_slices(size_px)
    reference = compute_reference(network, image_ZHW, gating)
    check = partial(compare_outputs, image_ZHW, reference, threshold=model.threshold)
    parity = Parity(0.0, 0, 0)
    if network.classifier is not None:
        # The probabilities of a slice that the classifier closes are 0 whatever the decoder
        # computes. So compare its logits too, and remove them from the file afterwards.
        parity += check(serialise(graph), batch_size=len(image_ZHW))
        graph.graph.outputs.pop()
    content = serialise(graph)
    for batch_size in (1, 2, len(image_ZHW)):
        parity += check(content, batch_size=batch_size)
    if not parity.difference <= tolerance:  # also true of NaN
        raise StageError(
            f"{path} is not written: ONNX Runtime's probabilities differ from those of prediction "
            f"by up to {parity.difference:.2g}, wanted {tolerance:g} at most, and "
            f"{parity.num_different} of {parity.num_pixels} mask pixels differ; install the "
            "versions in constraints.txt, or deploy with `mlflow models serve`"
        )
    write_atomically(path, content)
    return ExportResult(len(content), OPSET, parity)


def check_request(path: Path) -> None:
    """Check the file's name, and that the packages of the extra `onnx` are installed.

    Raises:
        StageError: the name is not *.onnx, or a package is missing.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise StageError(
            f"this environment lacks {', '.join(missing)}; install the extra with "
            "`pip install --constraint constraints.txt --editable '.[onnx]'`"
        )
    if path.suffix != ".onnx" or path.is_dir():
        raise StageError(f"found --onnx {path}; wanted the name of a file, *.onnx")
