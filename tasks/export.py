"""A trained network as one ONNX file, for programs that have neither this project nor torch.

Shapes: B batch, C adjacent slices, K organs, H W pixels of a slice.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fullscale.prediction.segmentation import Model
from fullscale.runtime.errors import StageError
from fullscale.runtime.files import write_atomically
from fullscale.serving.onnx_check import (
    LOGITS,
    ORGAN_PROBABILITY,
    PROBABILITY,
    SLICES,
    Parity,
    compare,
    make_slices,
    predict,
)
from model.inference import prepare
from model.output import organ_probability, probabilities
from model.preprocessing import NUM_ADJACENT_SLICES
from model.segmentation import SegmentationNetwork

if TYPE_CHECKING:
    import onnx_ir

OPSET = 18
"""The lowest that torch writes without converting, so that most runtimes read it."""
TOLERANCE = 1e-3
"""Measured: 1e-6 with a plain encoder. Either runtime is up to 3e-4 from the result in float64 with
an untrained ResNet-101; a wrong weight differs by 1e-2 and more."""
MAX_BYTES = 2 * 10**9
"""One file of ONNX holds less than 2 GiB."""
NEEDED = ("onnx", "onnx_ir", "onnxruntime", "onnxscript")
PREPARATION = """\
Input: a CT scan in HU with its axes turned so that slices go from the feet to the head, rows from \
front to back, columns from the patient's right to left. Of every slice the same square is \
resampled to size_px x size_px pixels; its centre is that of the body, its side the longer one of \
the body's box and body_margin_mm on either side. The body is the largest connected part above \
body_threshold_hu. HU are rounded, clipped to window_hu, and scaled so that the window is 0 to 1. \
The channels are num_adjacent_slices neighbouring slices from the feet up, the one to segment in \
the middle; beyond an end of the scan its last slice repeats.
Output: channel k of probability, and of organ_probability where there is one, is of organs[k]. A \
pixel belongs to an organ from threshold on. probability is 0 where organ_probability, which says \
whether the slice holds the organ, is 0.5 or less."""


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        num_bytes: of the file.
        opset: version of the ONNX operators in it.
        parity: how far ONNX Runtime and prediction are apart.
    """

    num_bytes: int
    opset: int
    parity: Parity


class Deployed(nn.Module):
    """A network and its gate as one function of slices.

    Args:
        network: from `model.inference.prepare`.
    """

    def __init__(self, network: SegmentationNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, ...]:
        """Adjacent slices in [0, 1] -> probabilities B x K x H x W with a hard gate.

        A network with a classifier also gives the organs' probabilities, B x K, and the logits
        before the gate, B x K x H x W.
        """
        output = self.network(x_BCHW, all_heads=False)
        gated = probabilities(output)
        if output.organ_logits is None:
            return (gated,)
        return gated, organ_probability(output.organ_logits), output.logits[0]


def export(path: Path, model: Model, *, tolerance: float = TOLERANCE) -> Exported:
    """Write a model as ONNX, after ONNX Runtime has computed the same as prediction with it.

    The logits, which show what a closed gate hides, are compared before they are taken from the
    outputs.

    Args:
        path: the file, overwritten; *.onnx.
        model: what to write.
        tolerance: largest absolute difference of probabilities.

    Raises:
        StageError: a package is missing, the name is another file's, the network is too large for
            the format or has an operation that it lacks, or the results differ.
    """
    check_request(path)
    network = prepare(model.trained.network)
    size_px = model.trained.description.slice.size_px
    written = to_onnx(network, size_px)
    describe(written, model)
    image_ZHW = make_slices(size_px)
    check = partial(compare, image_ZHW, predict(network, image_ZHW), threshold=model.threshold)
    parity = Parity(0.0, 0, 0)
    if network.classifier is not None:
        parity += check(_serialise(written), batch_size=len(image_ZHW))
        written.graph.outputs.pop()
    content = _serialise(written)
    for batch_size in (1, 2, len(image_ZHW)):
        parity += check(content, batch_size=batch_size)
    if not parity.difference <= tolerance:
        raise StageError(
            f"{path} is not written: ONNX Runtime's probabilities differ from those of prediction "
            f"by up to {parity.difference:.2g}, wanted {tolerance:g} at most, and "
            f"{parity.num_different} of {parity.num_pixels} mask pixels differ; install the "
            "versions in constraints.txt, or deploy with `mlflow models serve`"
        )
    write_atomically(path, content)
    return Exported(len(content), OPSET, parity)


def to_onnx(network: SegmentationNetwork, size_px: int) -> onnx_ir.Model:
    """A network and its gate as an ONNX graph of any number of slices of one size.

    Args:
        network: from `model.inference.prepare`.
        size_px: H and W.

    Raises:
        StageError: the network is too large, or has an operation that ONNX lacks.
    """
    num_bytes = sum(each.nbytes for each in network.state_dict().values())
    if num_bytes > MAX_BYTES:
        raise StageError(
            f"found a network of {num_bytes / 1e9:.1f} GB; one file of ONNX holds "
            f"{MAX_BYTES / 1e9:g} GB, so train a narrower one"
        )
    gated = network.classifier is not None
    example = torch.zeros(2, NUM_ADJACENT_SLICES, size_px, size_px)
    with _quiet():
        # Not strict, the tracer takes len(x) for a constant and so fixes the batch.
        program = torch.export.export(
            Deployed(network).eval(),
            (example,),
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            strict=True,
        )
        try:
            converted = torch.onnx.export(
                program,
                dynamo=True,
                dynamic_shapes=({0: "batch"},),
                input_names=[SLICES],
                output_names=[PROBABILITY, *([ORGAN_PROBABILITY, LOGITS] if gated else [])],
                opset_version=OPSET,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            reason = " ".join(str(error.__cause__ or error).split())[:300]
            raise StageError(
                f"{type(network).__name__} cannot be written as ONNX {OPSET}: {reason}; deploy it "
                "with `mlflow models serve`"
            ) from None
    model: onnx_ir.Model = converted.model  # type: ignore[union-attr]
    return model


def describe(written: onnx_ir.Model, model: Model) -> None:
    """Put into a file what it needs to be used, and take out what torch says of this machine.

    Each value is JSON.
    """
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    ClearMetadataAndDocStringPass()(written)
    graph = written.graph
    values = (*graph.inputs, *graph.initializers.values(), *(x for n in graph for x in n.outputs))
    for value in values:
        value.metadata_props.clear()
    description = model.trained.description
    facts: dict[str, Any] = {
        "model_name": model.name,
        "model_version": model.version,
        "weights_sha256": model.weights_sha256,
        "organs": [
            {"name": name, "label_ids": label_ids} for name, label_ids in description.organs.items()
        ],
        **description.slice.model_dump(),
        "num_adjacent_slices": NUM_ADJACENT_SLICES,
        "threshold": model.threshold,
        "trained_on": description.trained_on and description.trained_on.model_dump(),
    }
    written.metadata_props.clear()
    written.metadata_props.update({key: json.dumps(value) for key, value in facts.items()})
    written.doc_string = PREPARATION


def _serialise(model: onnx_ir.Model) -> bytes:
    import onnx_ir

    content: bytes = onnx_ir.to_proto(model).SerializeToString(deterministic=True)
    return content


def check_request(path: Path) -> None:
    """Refuse a file name that is not ONNX's, and an environment without the extra `onnx`.

    Raises:
        StageError: with what to do.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise StageError(
            f"this environment lacks {', '.join(missing)}; install the extra with "
            "`pip install --constraint constraints.txt --editable '.[onnx]'`"
        )
    if path.suffix != ".onnx" or path.is_dir():
        raise StageError(f"found --onnx {path}; wanted the name of a file, *.onnx")


@contextmanager
def _quiet() -> Iterator[None]:
    """Within, the exporter keeps to itself what only its own authors can change."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
