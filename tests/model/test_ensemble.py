from __future__ import annotations

import pytest
import torch

from model.ensemble import Ensemble, list_members
from model.inference import InferenceSettings, predict_slices, prepare
from model.networks import build_network
from model.segmentation import SegmentationNetwork

IMAGE = torch.rand(6, 32, 40, generator=torch.Generator().manual_seed(3))


def build(seed: int, *, cgm: bool, num_organs: int = 2) -> SegmentationNetwork:
    """A network whose slice classifier, if any, opens about half of the slices of `IMAGE`."""
    torch.manual_seed(seed)
    net = build_network("unet3plus", in_channels=3, num_organs=num_organs, width=4, cgm=cgm)
    for _ in range(3):
        net(torch.rand(4, 3, 32, 32))
    if net.classifier is not None:
        scores = net.eval()(IMAGE.unsqueeze(1).expand(-1, 3, -1, -1)).organ_logits
        difference = scores[..., 1] - scores[..., 0]
        net.classifier.conv.bias.data.unflatten(0, (-1, 2))[:, 1] -= difference.median(dim=0).values
    return net.eval()


@pytest.mark.parametrize("gating", ["hard", "soft", "none"])
@pytest.mark.parametrize("cgm", [True, False])
def test_ensemble_is_the_mean_of_its_members_after_each_ones_decision(cgm, gating):
    members = [build(seed, cgm=cgm) for seed in range(3)]
    settings = InferenceSettings(gating=gating, batch_size=4)
    alone = [predict_slices(member, IMAGE, settings) for member in members]
    together = predict_slices(prepare(Ensemble(members)), IMAGE, settings)
    mean_KZHW = torch.stack([each.probabilities for each in alone]).mean(dim=0)
    assert torch.allclose(together.probabilities, mean_KZHW, atol=1e-6)
    if not cgm:
        assert together.organ_probability is None
        return
    highest_ZK = torch.stack([each.organ_probability for each in alone]).amax(dim=0)
    assert torch.allclose(together.organ_probability, highest_ZK, atol=1e-6)


def test_slice_that_every_member_closes_is_exactly_empty_and_no_other():
    members = [build(seed, cgm=True) for seed in range(2)]
    for member, closed in zip(members, (0, 1), strict=True):
        # The first member never sees the first organ, the second never the second.
        member.classifier.conv.bias.data.unflatten(0, (-1, 2))[closed, 1] = -100.0
    open_ZK = [predict_slices(member, IMAGE).organ_probability > 0.5 for member in members]
    any_open_ZK = open_ZK[0] | open_ZK[1]
    assert any_open_ZK.any()
    assert not any_open_ZK.all()
    found = predict_slices(Ensemble(members), IMAGE)
    is_empty_KZ = (found.probabilities == 0).all(dim=(2, 3))
    assert torch.equal(is_empty_KZ.T, found.organ_probability <= 0.5)
    assert torch.equal(is_empty_KZ.T, ~any_open_ZK)


def test_ensemble_of_one_is_that_network_bit_for_bit():
    member = build(0, cgm=True)
    alone, together = (predict_slices(net, IMAGE) for net in (member, Ensemble([member])))
    assert torch.equal(alone.probabilities, together.probabilities)
    assert torch.equal(alone.organ_probability, together.organ_probability)
    assert list_members(member) == [member]


def test_members_that_do_not_fit_are_refused():
    for members in (
        [],
        [build(0, cgm=True), build(1, cgm=False)],
        [build(0, cgm=True), build(1, cgm=True, num_organs=3)],
    ):
        with pytest.raises(ValueError, match=rf"found {len(members)} members"):
            Ensemble(members)
