"""Measure the prediction of a whole scan: its speed, and the peak memory of the command.

The speed is compared with a plain loop. The loop computes every slice with every head of the plain
formulation (upsample, then convolve; one batch norm for each branch), keeps all probabilities and
restores them at once. Both have the same random weights. The slice classifier (CGM) closes half of
the slices. The masks must be equal. Run from the project's root folder:

    python -m benchmarks.prediction
    python -m benchmarks.prediction --memory --slices 600
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.machine import describe_machine
from benchmarks.network import NETWORK, Plain
from fullscale.params import SliceParams
from fullscale.prediction.network_files import NetworkDescription, Trained, save_trained
from fullscale.prediction.predictor import Predictor
from fullscale.scans.geometry import Geometry
from fullscale.scans.slicing import plan_grid, restore, slice_image
from fullscale.scans.volume import Volume, write_volume
from model.inference import adjacent_slices, prepare
from model.networks import build_network
from model.official import from_official
from model.output import probabilities
from model.preprocessing import NUM_ADJACENT_SLICES, normalise
from model.segmentation import SegmentationNetwork
from tests.shared.literal_networks import State, random_state

THRESHOLD = 0.5
NUM_OPEN = 4
"""Slices that the classifier leaves open when memory is measured: more take hours, not memory."""
FIELD_MM = 400.0
"""Sides of the slices."""
NOISE_HU = 15.0


def make_scan(num_slices: int, side: int, num_bright: int) -> Volume:
    """Make a trunk of water with 0.8 mm voxels; its top slices contain a dense disc."""
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    values_ZYX = np.full((num_slices, side, side), -1000, dtype=np.int16)
    values_ZYX[:, (x / 0.8) ** 2 + (y / 0.6) ** 2 < 1] = 40
    spine_YX = x**2 + (y - 0.4) ** 2 < 0.01
    values_ZYX[:, spine_YX] = 400
    for z in range(num_slices - num_bright, num_slices):
        values_ZYX[z, ((x + 0.4) ** 2 + y**2) < 0.1] = 200
    affine = np.diag([-0.8, -0.8, 1.5, 1.0])
    return Volume(values_ZYX, Geometry((side, side, num_slices), affine))


def make_description(size_px: int, width: int) -> NetworkDescription:
    """Return the description of a network of one organ, as stage train writes it."""
    return NetworkDescription(
        name="benchmark", architecture="unet3plus", encoder="plain", width=width,
        deep_supervision=True, cgm=True, organs={"organ": (1,)},
        slice=SliceParams(
            size_px=size_px, pixel_mm=FIELD_MM / size_px, neighbour_mm=1.5, window_hu=(-160, 240),
            body_threshold_hu=-300,
        ),
    )  # fmt: skip


def aim_classifier(
    weight: torch.Tensor,
    bias: torch.Tensor,
    network: SegmentationNetwork,
    description: NetworkDescription,
    scan: Volume,
    closed_and_open: tuple[int, int],
) -> None:
    """Change a random classifier with two outputs so that it closes one slice and opens another.

    Args:
        weight: of the classifier, changed in place.
        bias: of the classifier, changed in place.
        network: with this classifier.
        description: of the network.
        scan: with both slices.
        closed_and_open: index of the slice to close, and of the slice to open.
    """
    image_ZHW = make_slices(description, scan)
    ready = prepare(network)
    scores = []
    with torch.inference_mode():
        for z in closed_and_open:
            x_BCHW = adjacent_slices(image_ZHW, torch.tensor([z]), NUM_ADJACENT_SLICES)
            score_BK2 = ready.classify(ready.encode(x_BCHW))
            if score_BK2 is None:
                raise RuntimeError("the network has no classifier")
            scores.append(float(score_BK2[0, 0, 1] - score_BK2[0, 0, 0]))
    closed, opened = scores
    with torch.no_grad():
        if closed > opened:
            weight.copy_(weight.flip(0))
            bias.copy_(bias.flip(0))
            closed, opened = -closed, -opened
        bias[1] -= (closed + opened) / 2


def make_noisy_scan(num_slices: int, side: int) -> Volume:
    """Make a scan with noise: without, it would be read faster than a real one."""
    scan = make_scan(num_slices, side, num_slices // 2)
    rng = np.random.default_rng(0)
    for values_YX in scan.values_ZYX:
        values_YX += rng.normal(0, NOISE_HU, values_YX.shape).astype(np.int16)
    return scan


def make_half_open_network(description: NetworkDescription, scan: Volume) -> SegmentationNetwork:
    """Make a UNet 3+ with random weights whose classifier opens about half of the slices."""
    torch.manual_seed(0)
    network = build_network(
        "unet3plus", in_channels=NUM_ADJACENT_SLICES, num_organs=1, width=description.width
    ).eval()
    weight, bias = network.classifier.conv.parameters()  # type: ignore[union-attr]
    quarter = len(scan.values_ZYX) // 4
    aim_classifier(weight, bias, network, description, scan, (quarter, 3 * quarter))
    return network


def make_slices(description: NetworkDescription, scan: Volume) -> torch.Tensor:
    """Return a scan's slices as the network sees them: Z x H x W, float32 in [0, 1]."""
    settings = description.slice
    grid = plan_grid(scan, settings.size_px, settings.pixel_mm)
    image = torch.from_numpy(slice_image(scan, grid, settings.window_hu))
    return normalise(image, settings.window_hu)


def segment_plainly(
    plain: Plain,
    description: NetworkDescription,
    scan: Volume,
    batch_size: int,
    device: torch.device,
) -> NDArray[np.uint8]:
    """Segment with the plain loop: every slice, every head, all probabilities kept."""
    grid = plan_grid(scan, description.slice.size_px, description.slice.pixel_mm)
    image_ZHW = make_slices(description, scan)
    found = []
    with torch.inference_mode():
        for some in torch.split(torch.arange(len(image_ZHW)), batch_size):
            x_BCHW = adjacent_slices(image_ZHW, some, NUM_ADJACENT_SLICES).to(device)
            found.append(probabilities(plain(x_BCHW, training=False)).cpu())
    probability_KZYX = restore(torch.cat(found).transpose(0, 1).numpy(), grid)
    return (probability_KZYX[0] >= THRESHOLD).astype(np.uint8)


def seconds(clock: Callable[[], float], rounds: int, *forms: Callable[[], object]) -> list[float]:
    """Return the median seconds of each function; they run in turn, after one warm-up round."""
    taken: list[list[float]] = [[] for _ in forms]
    for turn in range(rounds + 1):
        for form, times in zip(forms, taken, strict=True):
            start = clock()
            form()
            if turn:
                times.append(clock() - start)
    return [statistics.median(times) for times in taken]


def measure_speed(args: argparse.Namespace) -> dict[str, float]:
    """Return the seconds of a scan, and the number of voxels in which the masks differ."""
    device = torch.device(args.device)
    description = make_description(args.side, args.width)
    scan = make_scan(args.slices, args.voxels, args.slices // 2)
    state: State = random_state(NETWORK, width=args.width, seed=args.seed)
    # A slice at the border sees its neighbour in the other half, so take the middle of each half.
    quarter = args.slices // 4
    aim_classifier(
        state["cls.1.weight"], state["cls.1.bias"], from_official(NETWORK, state).eval(),
        description, scan, (quarter, 3 * quarter),
    )  # fmt: skip
    plain = Plain(state, device)
    trained = Trained(from_official(NETWORK, state).eval(), description)
    predictor = Predictor(trained, THRESHOLD, args.batch, device)
    ours = predictor.segment(scan).label_map
    wanted = segment_plainly(plain, description, scan, args.batch, device)
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    plain_s, ours_s = seconds(
        clock,
        args.rounds,
        lambda: segment_plainly(plain, description, scan, args.batch, device),
        lambda: predictor.segment(scan),
    )
    return {
        "plain_s": plain_s,
        "ours_s": ours_s,
        "ratio": plain_s / ours_s,
        "slices_with_organ": int(ours.any(axis=(1, 2)).sum()),
        "organ_voxels": int(ours.sum()),
        "different_voxels": int((ours != wanted).sum()),
    }


def measure_memory(args: argparse.Namespace) -> dict[str, float]:
    """Return the command's peak memory, in MB, and that of a process that only imports torch."""
    description = make_description(args.side, args.width)
    torch.manual_seed(args.seed)
    network = build_network(
        "unet3plus", in_channels=NUM_ADJACENT_SLICES, num_organs=1, width=args.width,
        deep_supervision=True, cgm=True,
    ).eval()  # fmt: skip
    small = make_scan(3 * NUM_OPEN, args.voxels, NUM_OPEN)
    weight, bias = network.classifier.conv.parameters()  # type: ignore[union-attr]
    aim_classifier(weight, bias, network, description, small, (NUM_OPEN, 5 * NUM_OPEN // 2))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_trained(folder / "network", network, description)
        scan = make_scan(args.slices, args.voxels, NUM_OPEN)
        own = scan.to_own_grid(scan.values_ZYX)
        write_volume(folder / "scan.nii.gz", own, scan.geometry.own_affine)
        framework_mb = _peak_mb("import torch")
        arguments = [
            "predict", folder / "scan.nii.gz", folder / "out.nii.gz",
            "--model", folder / "network",
            "--statistics", folder / "out.json", "--preview", folder / "out.png",
        ]  # fmt: skip
        start = time.perf_counter()
        command_mb = _peak_mb(
            "import sys; from tasks.cli import app; app(sys.argv[1:], standalone_mode=False)",
            *map(str, arguments),
        )
        taken_s = time.perf_counter() - start
        organs = json.loads((folder / "out.json").read_text())["organs"]
    return {
        "framework_mb": framework_mb,
        "command_mb": command_mb,
        "over_framework_mb": command_mb - framework_mb,
        "open_slices": organs["organ"]["slice_classifier"]["num_present_slices"],
        "seconds": taken_s,
    }


def _peak_mb(program: str, *arguments: str) -> float:
    """Return the peak memory of a new process that runs a program, in MB.

    Read from the kernel as VmHWM, because ru_maxrss also counts the parent process.
    """
    report = "\nprint(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    done = subprocess.run(
        [sys.executable, "-c", program + report, *arguments],
        check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    return int(done.stdout.split()[-1]) * 1024 / 1e6


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memory", action="store_true", help="measure memory instead of seconds")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--width", type=int, default=64, help="channels of the first level")
    parser.add_argument("--side", type=int, default=320, help="side of a slice, in pixels")
    parser.add_argument("--voxels", type=int, default=512, help="voxels of the scan along Y and X")
    parser.add_argument("--slices", type=int, default=8, help="slices of the scan")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3, help="rounds of which the median is taken")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(describe_machine(torch.device(args.device)))
    print(f"scan {args.voxels} x {args.voxels} x {args.slices}, slices {args.side} px, "
          f"width {args.width}")  # fmt: skip
    found = measure_memory(args) if args.memory else measure_speed(args)
    print("| measure | value |\n|---|---|")
    for name, value in found.items():
        print(f"| {name} | {value:.4g} |" if value < 1e4 else f"| {name} | {value:.0f} |")


if __name__ == "__main__":
    main()
