"""UNet 3+ as it runs here against its plain formulation, in one process, taking turns.

The plain formulation upsamples, then convolves, has a batch norm for each branch, computes every
head in eval mode and decodes every slice. Both have the same weights. Run from the project's root:

    python -m benchmarks.network --json build/network.json
    python -m benchmarks.network --device cuda --batch 16
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.machine import describe_machine, measure_peak_tflops
from fullscale.runtime.startup import keep_freed_memory
from model.inference import InferenceSettings, adjacent_slices, predict_slices, prepare
from model.losses import total_loss
from model.networks import count_flop
from model.official import from_official
from model.output import Output, organ_present, probabilities
from model.segmentation import SegmentationNetwork
from tests.shared.literal_networks import State, random_state, unet3plus

NETWORK = "unet3plus_ds_cgm"
NUM_STEPS = 12
LEARNING_RATE = 0.01
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Plain:
    """The literal formulation, with the interface that the measurements need."""

    def __init__(self, state: State, device: torch.device) -> None:
        self.state = {key: value.clone().to(device) for key, value in state.items()}
        self.parameters = {
            key: value.requires_grad_()
            for key, value in self.state.items()
            if key.endswith(("weight", "bias"))
        }

    def __call__(self, x_BCHW: Tensor, *, training: bool) -> Output:
        """Every head, in both modes."""
        logits, scores = unet3plus(self.state, x_BCHW, training)
        return Output(logits, None if scores is None else scores[:, None])


class Bench:
    """The two forms, their input, and how to measure them."""

    def __init__(self, args: argparse.Namespace, precision: str) -> None:
        self.device = torch.device(args.device)
        self.rounds = args.rounds
        self.batch = args.batch
        self.clock = time.process_time if args.clock == "cpu" else time.perf_counter
        self.precision = PRECISIONS[precision]
        rng = torch.Generator().manual_seed(0)
        self.x = torch.rand(args.batch, 3, args.side, args.side, generator=rng).to(self.device)
        shape = (args.batch, 1, args.side, args.side)
        self.target = (torch.rand(shape, generator=rng) > 0.5).to(self.device)
        state = random_state(NETWORK, width=args.width)
        self.volume = torch.rand(args.slices, args.side, args.side, generator=rng)
        self.volume *= torch.linspace(0.3, 1, args.slices)[:, None, None]
        self._open_half(state)
        self.plain = Plain(state, self.device)
        self.ours = from_official(NETWORK, state).to(self.device)
        if self.ours.classifier is None:
            raise RuntimeError(f"{NETWORK} has lost its classifier")
        self.ours.classifier.dropout.eval()
        self.ready = prepare(self.ours)

    def _open_half(self, state: State) -> None:
        """Move the classifier's bias so that it finds an organ in half of the slices."""
        net = prepare(from_official(NETWORK, state)).to(self.device)
        with torch.inference_mode():
            scores = [net.classify(net.encode(self._stack(z))) for z in range(len(self.volume))]
        difference = torch.cat([each[:, 0, 1] - each[:, 0, 0] for each in scores]).sort().values
        middle = len(difference) // 2
        state["cls.1.bias"][1] -= difference[middle - 1 : middle + 1].mean().cpu()

    def _stack(self, z: int) -> Tensor:
        return adjacent_slices(self.volume, torch.tensor([z]), 3).to(self.device)

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of forward passes; in float32 it does nothing."""
        if self.precision == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.precision)

    def seconds(self, *forms: Callable[[], Any]) -> list[float]:
        """Median seconds of each, taking turns, after one round of warming up."""
        taken: list[list[float]] = [[] for _ in forms]
        for turn in range(self.rounds + 1):
            for form, times in zip(forms, taken, strict=True):
                self.wait()
                start = self.clock()
                form()
                self.wait()
                if turn:
                    times.append(self.clock() - start)
        return [statistics.median(times) for times in taken]

    def wait(self) -> None:
        """Wait until the accelerator has finished."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def forward_plain(self) -> Output:
        """Inference on a batch."""
        with torch.inference_mode(), self.autocast():
            return self.plain(self.x, training=False)

    def forward_ours(self) -> Output:
        """Inference on a batch: folded, finest head only."""
        with torch.inference_mode(), self.autocast():
            return self.ready(self.x)

    def volume_plain(self) -> Tensor:
        """Return the volume's probabilities, decoding every slice."""
        slices = torch.arange(len(self.volume))
        found = []
        with torch.inference_mode(), self.autocast():
            for some in torch.split(slices, self.batch):
                x = adjacent_slices(self.volume, some, 3).to(self.device)
                found.append(probabilities(self.plain(x, training=False)).cpu())
        return torch.cat(found).transpose(0, 1)

    def volume_ours(self) -> Tensor:
        """Return the volume's probabilities, decoding only slices with an organ."""
        with self.autocast():
            return predict_slices(
                self.ready,
                self.volume,
                InferenceSettings(batch_size=self.batch, device=self.device),
            ).probabilities

    def train_plain(self) -> Output:
        """Forward pass of a training step."""
        with self.autocast():
            return self.plain(self.x, training=True)

    def train_ours(self) -> Output:
        """Forward pass of a training step."""
        with self.autocast():
            return self.ours(self.x)

    def step(self, forward: Callable[[], Output], parameters: list[Tensor]) -> Callable[[], None]:
        """A whole training step: forward pass, hybrid loss, backward pass, update."""
        optimizer = torch.optim.SGD(parameters, lr=1e-6)

        def run() -> None:
            optimizer.zero_grad()
            total_loss(forward(), self.target).total.backward()
            optimizer.step()

        return run

    def kept_mib(self, forward: Callable[[], Output]) -> float:
        """Return the memory that is still allocated after a forward pass, its output included."""
        if self.device.type == "cuda":
            before = torch.cuda.memory_allocated()
            output = forward()
            kept = torch.cuda.memory_allocated() - before
        else:
            with torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
            ) as profile:
                output = forward()
            kept = sum(event.self_cpu_memory_usage for event in profile.key_averages())
        del output
        return kept / 2**20

    def peak_mib(self, step: Callable[[], None]) -> float | None:
        """Return the peak memory of a step above that in use before; None if unknown."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step()
            return (torch.cuda.max_memory_allocated() - before) / 2**20
        reset = Path("/proc/self/clear_refs")
        if not reset.exists():
            return None
        _give_freed_memory_back()
        reset.write_text("5")
        before_kib = _status_kib("VmRSS")
        step()
        return (_status_kib("VmHWM") - before_kib) / 2**10

    def errors(self) -> dict[str, float]:
        """Largest deviation from the plain form, relative to its largest value."""
        plain, ours = self.forward_plain(), self.forward_ours()
        found = {"output": relative_error(ours.logits[0], plain.logits[0])}
        closed = int((~organ_present(self._volume_scores())).sum())
        found["closed_slices"] = closed
        found["volume"] = relative_error(self.volume_ours(), self.volume_plain())
        plain_gradient, our_gradient = self.gradients(self.plain, self.ours, self.x, self.target)
        found["gradient"] = relative_distance(our_gradient, plain_gradient)
        found |= self.exact_errors()
        return found

    def exact_errors(self) -> dict[str, float]:
        """Gradients in float64, where rounding is out of the way, and how far the precision is off.

        A gradient through so many batch norms, maxima and ReLUs is sensitive to rounding: how far
        the plain form is from its own float64 result says how much the other deviation means.
        Then the largest difference of a weight after steps of both forms, in both precisions. On
        half the side, and on the CPU, since it is slow.
        """
        side = self.x.shape[-1] // 2
        x, target = self.x[:1, :, :side, :side].cpu(), self.target[:1, :, :side, :side].cpu()
        state = {key: value.detach().cpu() for key, value in self.plain.state.items()}
        gradients, weights = {}, {}
        for dtype in (torch.float32, torch.float64):
            converted = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
            ours = from_official(NETWORK, state).to(dtype)
            ours.classifier.dropout.eval()  # type: ignore[union-attr]
            plain = Plain(converted, torch.device("cpu"))
            gradients[dtype] = self.gradients(plain, ours, x.to(dtype), target)
            weights[dtype] = self.weights_after_steps(plain, ours, x.to(dtype), target)
        (plain_32, ours_32), (plain_64, ours_64) = gradients.values()
        (plain_weights_32, our_weights_32), (plain_weights_64, our_weights_64) = weights.values()
        moved = f"weight_after_{NUM_STEPS}_steps"
        return {
            "gradient_in_float64": relative_distance(ours_64, plain_64),
            "plain_gradient_from_float64": relative_distance(plain_32, plain_64),
            "our_gradient_from_float64": relative_distance(ours_32, plain_64),
            f"{moved}_in_float64": largest_difference(our_weights_64, plain_weights_64),
            f"plain_{moved}_from_float64": largest_difference(plain_weights_32, plain_weights_64),
            f"our_{moved}_from_float64": largest_difference(our_weights_32, plain_weights_64),
        }

    def gradients(
        self, plain: Plain, ours: SegmentationNetwork, x: Tensor, target: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Of the hybrid loss, in the order of our parameters: the plain form's, and ours."""
        with self.autocast() if x.dtype == torch.float32 else nullcontext():
            outputs = plain(x, training=True), ours(x)
        for output in outputs:
            total_loss(output, target).total.backward()
        theirs = {
            key: value.grad if key in plain.parameters else value
            for key, value in plain.state.items()
        }
        parameters = list(ours.parameters())
        found = [each.grad.cpu() for each in parameters if each.grad is not None]
        for parameter in [*parameters, *plain.parameters.values()]:
            parameter.grad = None
        return self._in_our_order(theirs, ours), found

    def weights_after_steps(
        self, plain: Plain, ours: SegmentationNetwork, x: Tensor, target: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Train both forms on one batch; their weights, in the order of our parameters."""
        parameters = [*plain.parameters.values(), *ours.parameters()]
        optimizer = torch.optim.SGD(parameters, lr=LEARNING_RATE)
        for _ in range(NUM_STEPS):
            optimizer.zero_grad()
            for output in (plain(x, training=True), ours(x)):
                total_loss(output, target).total.backward()
            optimizer.step()
        return self._in_our_order(plain.state, ours), [each.detach() for each in ours.parameters()]

    def _in_our_order(self, state: State, ours: SegmentationNetwork) -> list[Tensor]:
        named = dict(from_official(NETWORK, state).named_parameters())
        return [named[key].detach().cpu() for key, _ in ours.named_parameters()]

    def _volume_scores(self) -> Tensor:
        with torch.inference_mode():
            scores = [
                self.ready.classify(self.ready.encode(self._stack(z)))
                for z in range(len(self.volume))
            ]
        return torch.cat(scores)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Return the largest difference by the largest wanted value."""
    return float((found.float() - wanted.float()).abs().max() / wanted.float().abs().max())


def largest_difference(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Return the largest absolute difference of two values."""
    pairs = zip(found, wanted, strict=True)
    return max(float((a.double() - b.double()).abs().max()) for a, b in pairs)


def relative_distance(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Length of the difference, relative to that of `wanted`."""
    squares = [
        ((a.double() - b.double()).square().sum(), b.double().square().sum())
        for a, b in zip(found, wanted, strict=True)
    ]
    difference, whole = (sum(each, torch.zeros(())) for each in zip(*squares, strict=True))
    return float((difference / whole).sqrt())


def _give_freed_memory_back() -> None:
    """So that what an earlier form freed does not hide what the next one takes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status_kib(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {key}")


def count_tflop(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """10^12 operations for one image, of inference and of a training step, without computing.

    A step is counted as three forward passes with every head; the loss is left out.
    """
    state = {
        key: value.to("meta") for key, value in random_state(NETWORK, width=args.width).items()
    }
    with torch.device("meta"):
        x = torch.empty(1, 3, args.side, args.side)
        net: SegmentationNetwork = from_official(NETWORK, state).eval()
    forms: dict[str, Callable[[bool], Output]] = {
        "plain": lambda every_head: unet3plus(state, x, False),
        "ours": lambda every_head: net(x, all_heads=every_head),
    }
    with torch.no_grad():
        return {
            name: {
                "inference": count_flop(lambda form=form: form(False)) / 1e12,
                "step": 3 * count_flop(lambda form=form: form(True)) / 1e12,
            }
            for name, form in forms.items()
        }


def run_precision(args: argparse.Namespace, precision: str) -> dict[str, Any]:
    """Every measurement in one precision."""
    bench = Bench(args, precision)
    tflop = count_tflop(args)
    result: dict[str, Any] = {"errors": bench.errors(), "tflop_per_image": tflop}
    pairs: dict[str, list[float]] = {
        "forward_s": bench.seconds(bench.forward_plain, bench.forward_ours),
        "half_free_volume_s": bench.seconds(bench.volume_plain, bench.volume_ours),
    }
    steps = [
        bench.step(bench.train_plain, list(bench.plain.parameters.values())),
        bench.step(bench.train_ours, list(bench.ours.parameters())),
    ]

    def step_keeping_all() -> None:
        bench.ours.recompute_maps(None)
        steps[1]()
        bench.ours.recompute_maps(args.recompute_from_bytes)

    plain_s, ours_s, keeping_s = bench.seconds(*steps, step_keeping_all)
    pairs["training_step_s"] = [plain_s, ours_s]
    pairs["training_step_keeping_all_s"] = [plain_s, keeping_s]
    plain_mib, ours_mib = (bench.kept_mib(each) for each in (bench.train_plain, bench.train_ours))
    bench.ours.recompute_maps(None)
    pairs["kept_for_backward_mib"] = [plain_mib, ours_mib]
    pairs["kept_for_backward_keeping_all_mib"] = [plain_mib, bench.kept_mib(bench.train_ours)]
    bench.ours.recompute_maps(args.recompute_from_bytes)
    peaks = [bench.peak_mib(each) for each in steps]
    if None not in peaks:
        pairs["peak_of_training_step_mib"] = [each for each in peaks if each is not None]
    result["measures"] = {
        name: {"plain": plain, "ours": ours, "ratio": plain / ours if ours else None}
        for name, (plain, ours) in pairs.items()
    }
    peak = measure_peak_tflops(bench.device, bench.precision, bench.clock)
    result["matrix_product_tflops"] = peak
    for form in ("plain", "ours"):
        rate, step_rate = (
            args.batch / result["measures"][name][form] for name in ("forward_s", "training_step_s")
        )
        result[f"forward_{form}"] = {
            "images_per_s": rate,
            "tflops": rate * tflop[form]["inference"],
            "share_of_matrix_product": rate * tflop[form]["inference"] / peak,
            "training_images_per_s": step_rate,
            "training_share_of_matrix_product": step_rate * tflop[form]["step"] / peak,
        }
    return result


def show(precision: str, result: dict[str, Any], console: Console) -> None:
    """Print the table of one precision."""
    table = Table(title=f"{precision}: plain formulation against ours")
    for column in ("measure", "plain", "ours", "plain / ours"):
        table.add_column(column, justify="left" if column == "measure" else "right")
    for name, row in result["measures"].items():
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        table.add_row(name, f"{row['plain']:.3f}", f"{row['ours']:.3f}", ratio)
    for name in result["forward_ours"]:
        plain, ours = (result[f"forward_{form}"][name] for form in ("plain", "ours"))
        table.add_row(name, f"{plain:.3f}", f"{ours:.3f}", "")
    for name, value in result["errors"].items():
        table.add_row(
            f"deviation: {name}" if name != "closed_slices" else name, "", f"{value:.2g}", ""
        )
    console.print(table)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: processor time, for a machine that does other work too; use --threads 1",
    )
    parser.add_argument("--width", type=int, default=64, help="channels of the first level")
    parser.add_argument("--side", type=int, default=320, help="of a slice, in pixels")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--slices", type=int, default=4, help="of the volume, half of them empty")
    parser.add_argument("--rounds", type=int, default=5, help="that the medians are over")
    parser.add_argument("--precision", choices=PRECISIONS, action="append")
    parser.add_argument("--recompute-from-bytes", type=int, default=16 * 2**20)
    parser.add_argument("--json", type=Path, help="where to write the result")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    device = torch.device(args.device)
    console = Console(width=110)
    settings = {key: value for key, value in vars(args).items() if key != "json"}
    report: dict[str, Any] = {"machine": describe_machine(device), "settings": settings}
    console.print(report["machine"])
    for precision in args.precision or list(PRECISIONS):
        report[precision] = run_precision(args, precision)
        show(precision, report[precision], console)
    report["machine"]["load_average_1min_after"] = describe_machine(device)["load_average_1min"]
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
