from __future__ import annotations

import copy
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.multiprocessing import spawn
from torch.nn.parallel import DistributedDataParallel

from model.batchnorm import norm_relu
from model.blocks import norm_relu_then
from model.inference import prepare
from model.networks import NETWORKS, build_network
from model.output import Output
from model.segmentation import SegmentationNetwork
from model.synchronised import SynchronisedNorm, num_processes, synchronise_norms

# Samples of each process.
SPLITS = {2: (3, 1), 3: (1, 2, 1)}
CASES = [*((name, "plain") for name in NETWORKS), ("unet3plus", "resnet101")]
# Three processes take as long again: what differs among them is the ways, not the networks.
PARTED = [*((2, *case) for case in CASES), (3, "unet3plus", "plain"), (3, "unet", "plain")]
MAPS = {
    "ordinary": ((5, 3, 4, 6), (2, 3)),
    "one_value_each": ((3, 2, 1, 1), (1, 1, 1)),
    "empty_process": ((3, 4, 5, 2), (0, 3)),
    "one_channel": ((4, 1, 7, 3), (1, 2, 1)),
}

TIMEOUT = timedelta(seconds=120)  # that a deadlock fails


@contextmanager
def group(rank: int, world_size: int, folder: Path):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=world_size,
        timeout=TIMEOUT,
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def network(name: str, encoder: str) -> SegmentationNetwork:
    torch.manual_seed(0)
    net = build_network(name, in_channels=3, num_organs=2, width=4, encoder=encoder).double()
    for module in net.modules():
        if isinstance(module, nn.Dropout | nn.Dropout2d):
            module.p = 0
    return net


def images() -> Tensor:
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double()


def cost(output: Output, samples: slice) -> Tensor:
    """A different linear function of every sample's outputs."""
    outputs = [*output.logits, *([] if output.organ_logits is None else [output.organ_logits])]
    rng = torch.Generator().manual_seed(2)
    return sum(
        (each * torch.randn(4, *each.shape[1:], generator=rng)[samples]).sum() for each in outputs
    )


def portion(rank: int, split: tuple[int, ...]) -> slice:
    return slice(sum(split[:rank]), sum(split[: rank + 1]))


def work(rank: int, world_size: int, folder: Path) -> None:
    with group(rank, world_size, folder):
        train_part(rank, world_size, folder)
        norm_parts(rank, world_size, folder)
        if world_size == 3:
            check_other_ways(rank)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Return the folder of results of each number of processes."""
    folders = {size: tmp_path_factory.mktemp(f"processes{size}") for size in SPLITS}
    for size, folder in folders.items():
        spawn(work, (size, folder), nprocs=size)
    return folders


def train_part(rank: int, world_size: int, folder: Path) -> None:
    samples = portion(rank, SPLITS[world_size])
    for name, encoder in [case for size, *case in PARTED if size == world_size]:
        net = network(name, encoder)
        synchronise_norms(net)
        synchronise_norms(net)
        # Among three processes, only the first computes its maps again.
        net.recompute_maps(0 if world_size == 2 or rank == 0 else None)
        x = images()[samples].requires_grad_()
        # Two processes leave averaging to torch, three do it by hand.
        parallel = DistributedDataParallel(net) if world_size == 2 else net
        output = parallel(x)
        (world_size * cost(output, samples)).backward()
        if parallel is net:
            for parameter in net.parameters():
                dist.all_reduce(parameter.grad)
                parameter.grad /= world_size
        results = {f"grad/{key}": value.grad for key, value in net.named_parameters()}
        results |= {f"state/{key}": value for key, value in net.state_dict().items()}
        results |= {f"logits/{i}": each.detach() for i, each in enumerate(output.logits)}
        results["x"] = x.grad / world_size
        with torch.no_grad():
            results["prepared"] = prepare(net)(images()[samples]).logits[0]
        results = {key: value.contiguous() for key, value in results.items()}
        save_file(results, folder / f"{name}-{encoder}-{rank}.safetensors")


def equal(found: Tensor, wanted: Tensor) -> None:
    size = wanted.double().abs().max().item()
    # Rounding of float64, through a hundred layers.
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9 * max(size, 1))


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "name", "encoder"), PARTED)
def test_network_on_several_processes_equals_one(
    results: dict[int, Path], world_size: int, name: str, encoder: str
) -> None:
    net, x = network(name, encoder), images().requires_grad_()
    output = net(x)
    cost(output, slice(None)).backward()
    with torch.no_grad():
        prepared = prepare(net)(images()).logits[0]
    for rank in range(world_size):
        samples = portion(rank, SPLITS[world_size])
        found = load_file(results[world_size] / f"{name}-{encoder}-{rank}.safetensors")
        for i, logits in enumerate(output.logits):
            equal(found[f"logits/{i}"], logits[samples].detach())
        equal(found["x"], x.grad[samples])
        equal(found["prepared"], prepared[samples])
        for key, parameter in net.named_parameters():
            equal(found[f"grad/{key}"], parameter.grad)
        state = {key[6:]: value for key, value in found.items() if key.startswith("state/")}
        assert state.keys() == net.state_dict().keys()
        for key, value in net.state_dict().items():
            equal(state[key], value)


def norm_parts(rank: int, world_size: int, folder: Path) -> None:
    for name, (shape, split) in MAPS.items():
        if len(split) == world_size:
            x, seed, norm = norm_case(shape, portion(rank, split))
            synchronise_norms(norm)
            F.relu(norm(x)).mul(seed).sum().backward()
            results = {"x": x.grad, "weight": norm.weight.grad, "bias": norm.bias.grad}
            save_file(results | dict(norm.named_buffers()), folder / f"{name}-{rank}.safetensors")


def norm_case(shape: tuple[int, ...], samples: slice) -> tuple[Tensor, Tensor, nn.BatchNorm2d]:
    torch.manual_seed(3)
    norm = nn.BatchNorm2d(shape[1]).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = (2 * torch.randn(shape, dtype=torch.float64) + 1)[samples].clone().requires_grad_()
    return x, torch.randn(shape, dtype=torch.float64)[samples], norm


def check_other_ways(rank: int) -> None:
    """In a group: the ways in which a network uses a norm agree; what is not synchronised."""
    x, _, norm = norm_case((4, 3, 5, 5), portion(rank, (1, 1, 2)))
    synchronise_norms(norm)
    expected = F.relu(norm(x))
    assert torch.equal(norm_relu(norm, x), expected)
    before = {key: value.clone() for key, value in norm.named_buffers()}
    y = norm_relu_then(norm, nn.Identity(), x, 0)
    after = {key: value.clone() for key, value in norm.named_buffers()}
    y.sum().backward()
    assert torch.equal(y, expected)
    assert after["num_batches_tracked"] == before["num_batches_tracked"] + 1
    assert all(torch.equal(value, after[key]) for key, value in norm.named_buffers())

    # Only one process evaluates: an exchange would wait for the others.
    if rank == 0:
        plain = nn.BatchNorm2d(3).double()
        plain.load_state_dict(norm.state_dict())
        assert torch.equal(norm.eval()(x), plain.eval()(x))
        assert type(copy.deepcopy(norm)) is SynchronisedNorm

    bare = nn.Sequential(nn.BatchNorm2d(3, affine=False))
    with pytest.raises(ValueError, match="batch norm '0' cannot be synchronised: it needs weights"):
        synchronise_norms(bare)


@pytest.mark.slow
@pytest.mark.parametrize("name", MAPS)
def test_norm_over_parts_equals_the_norm_over_the_whole(
    results: dict[int, Path], name: str
) -> None:
    shape, split = MAPS[name]
    x, seed, norm = norm_case(shape, slice(None))
    F.relu(norm(x)).mul(seed).sum().backward()
    found = [
        load_file(results[len(split)] / f"{name}-{rank}.safetensors") for rank in range(len(split))
    ]
    equal(torch.cat([each["x"] for each in found]), x.grad)
    equal(sum(each["weight"] for each in found), norm.weight.grad)
    equal(sum(each["bias"] for each in found), norm.bias.grad)
    for key, value in norm.named_buffers():
        for each in found:
            equal(each[key], value)


def norm_types(net: nn.Module) -> set[type]:
    return {type(each) for each in net.modules() if isinstance(each, nn.BatchNorm2d)}


def test_without_a_group_nothing_changes() -> None:
    net = build_network("unet3plus", in_channels=3, num_organs=1, width=4)
    synchronise_norms(net)
    assert num_processes() == 1
    assert norm_types(net) == {nn.BatchNorm2d}


def test_group_of_one_process_changes_nothing(tmp_path: Path) -> None:
    net = build_network("unet3plus", in_channels=3, num_organs=1, width=4)
    with group(0, 1, tmp_path):
        synchronise_norms(net)
    assert norm_types(net) == {nn.BatchNorm2d}


def test_synchronised_norm_outlives_its_group() -> None:
    x, _, norm = norm_case((4, 3, 5, 5), slice(None))
    orphan = copy.deepcopy(norm)
    orphan.__class__ = SynchronisedNorm
    torch.testing.assert_close(norm_relu(orphan, x), F.relu(norm(x)))
    for one, other in zip(orphan.buffers(), norm.buffers(), strict=True):
        assert torch.equal(one, other)
