"""Convert a trained network to an ONNX graph.

Shapes: B batch, C adjacent slices, K organs, H W pixels of a slice.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fullscale.prediction.segmentation import Model
from fullscale.runtime.errors import StageError, shorten
from fullscale.serving.onnx_check import LOGITS, ORGAN_PROBABILITY, PROBABILITY, SLICES
from model.ensemble import (
    AnyNetwork,
    join_organ_probabilities,
    join_probabilities,
    list_members,
)
from model.output import Gating, organ_probability, probabilities
from model.preprocessing import NUM_ADJACENT_SLICES

if TYPE_CHECKING:
    import onnx_ir

OPSET = 18
"""The lowest version that torch writes without conversion; most runtimes read it."""
MAX_BYTES = 2 * 10**9
"""An ONNX file must be smaller than 2 GiB."""
PREPARATION = """\
Input: a CT scan in HU with its axes turned so that slices go from the feet to the head, rows from \
front to back, columns from the patient's right to left. Of every slice the same square of \
size_px x size_px pixels is resampled, pixel_mm apart, with its centre at that of the trunk: in \
each slice the largest part that is left of the voxels above body_threshold_hu once arms and table \
are cut away. Outside the scan is air. HU are rounded, clipped to window_hu, and scaled so that \
the window is 0 to 1. The num_adjacent_slices channels are the image at distances of neighbour_mm \
from the feet up, the slice to segment in the middle, interpolated linearly between the scan's \
slices; beyond an end of the scan its last slice repeats.
Output: channel k of probability, and of organ_probability where there is one, is of organs[k]. A \
pixel belongs to an organ from threshold on, to the most probable one of several. \
organ_probability says whether the slice holds the organ. With gate hard, probability is 0 where \
organ_probability is 0.5 or less; with soft it is multiplied by organ_probability already. With \
slab it is not changed yet: set it to 0 in a slice where organ_probability is 0.5 or less in the \
slice itself, in the next one on each side, and in all others at most neighbour_mm away. With none \
it stays as it is. With refine largest_component, at last only the largest connected part of each \
organ in the scan's label map is kept, corners of voxels touching; with none the map stays."""


class DeployedNetwork(nn.Module):
    """A network, or an ensemble, and its slice classifiers (CGM) as one function of slices.

    Args:
        network: from `model.inference.prepare`.
        gating: see `graph_gating`.
    """

    def __init__(self, network: AnyNetwork, gating: Gating) -> None:
        super().__init__()
        self.members = nn.ModuleList(list_members(network))
        self.gating: Gating = gating

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, ...]:
        """Compute organ probabilities of slices.

        Args:
            x_BCHW: adjacent slices, float32 in [0, 1].

        Returns:
            Probabilities B x K x H x W, after the slice classifier. A network
            with a classifier also gives the organs' probabilities, B x K, and the logits, which the
            classifier does not change, B x K x H x W; those of an ensemble's members follow each
            other along K.
        """
        outputs = [member(x_BCHW, all_heads=False) for member in self.members]
        classified = join_probabilities([probabilities(output, self.gating) for output in outputs])
        organs = [
            organ_probability(output.organ_logits)
            for output in outputs
            if output.organ_logits is not None
        ]
        if not organs:
            return (classified,)
        logits = [output.logits[0] for output in outputs]
        return (
            classified,
            join_organ_probabilities(organs),
            logits[0] if len(logits) == 1 else torch.cat(logits, dim=1),
        )


def to_onnx(network: AnyNetwork, size_px: int, gating: Gating = "hard") -> onnx_ir.Model:
    """Convert a network with its slice classifier (CGM); the graph takes any number of slices.

    Args:
        network: from `model.inference.prepare`.
        size_px: H and W, which are fixed.
        gating: see `graph_gating`.

    Raises:
        StageError: the network is too large, or has an operation that ONNX lacks.
    """
    num_bytes = sum(each.nbytes for each in network.state_dict().values())
    if num_bytes > MAX_BYTES:
        raise StageError(
            f"found a network of {num_bytes / 1e9:.1f} GB; one file of ONNX holds "
            f"{MAX_BYTES / 1e9:g} GB, so train a narrower one"
        )
    has_classifier = network.classifier is not None
    example = torch.zeros(2, NUM_ADJACENT_SLICES, size_px, size_px)
    with _silence_exporter():
        program = torch.export.export(
            DeployedNetwork(network, gating).eval(),
            (example,),
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
        try:
            converted = torch.onnx.export(
                program,
                dynamo=True,
                dynamic_shapes=({0: "batch"},),
                input_names=[SLICES],
                output_names=[
                    PROBABILITY,
                    *([ORGAN_PROBABILITY, LOGITS] if has_classifier else []),
                ],
                opset_version=OPSET,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            reason = shorten(error.__cause__ or error, 300)
            raise StageError(
                f"{type(network).__name__} cannot be written as ONNX {OPSET}: {reason}; deploy it "
                "with `mlflow models serve`"
            ) from None
    model: onnx_ir.Model = converted.model  # type: ignore[union-attr]
    return model


def add_metadata(written: onnx_ir.Model, model: Model) -> None:
    """Replace torch's metadata, which name paths of this machine, by those that a user needs.

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
        "gate": model.gate,
        "refine": model.refine,
        "trained_on": description.trained_on and description.trained_on.model_dump(),
    }
    written.metadata_props.clear()
    written.metadata_props.update({key: json.dumps(value) for key, value in facts.items()})
    written.doc_string = PREPARATION


def serialise(graph: onnx_ir.Model) -> bytes:
    """Return the bytes of an ONNX file; the same graph gives the same bytes."""
    import onnx_ir

    content: bytes = onnx_ir.to_proto(graph).SerializeToString(deterministic=True)
    return content


@contextmanager
def _silence_exporter() -> Iterator[None]:
    """Hide log lines and warnings of torch's exporter: a user cannot act on them."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
