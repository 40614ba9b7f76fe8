"""Measure the networks: forward pass, training step with the whole loss, and a volume."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.agreement import NETWORKS
from benchmarks.gpu.settings import Report, Settings
from benchmarks.machine import describe_machine, measure_peak_tflops
from benchmarks.network import PRECISIONS
from fullscale.params import load_params
from fullscale.training.batch_size import largest_part
from fullscale.training.step import make_optimizer
from model.inference import InferenceSettings, predict_slices, prepare
from model.losses import total_loss
from model.networks import build_network, count_flop
from model.output import Gating
from model.preprocessing import NUM_ADJACENT_SLICES
from model.segmentation import SegmentationNetwork

NUM_ORGANS = 1
GIB = 2**30


class Speed:
    """Measures one network in one precision.

    Args:
        name: key of `model.networks.NETWORKS`.
        precision: key of `PRECISIONS`.
        settings: sizes.
        peak_tflops: rate of a large matrix product in this precision.
    """

    def __init__(self, name: str, precision: str, settings: Settings, peak_tflops: float) -> None:
        self._settings, self._peak_tflops = settings, peak_tflops
        self._device, self._dtype = torch.device(settings.device), PRECISIONS[precision]
        self._train = load_params(Path("params.yaml")).train
        torch.manual_seed(0)
        self._network = self._build(name).to(self._device, memory_format=torch.channels_last)
        with torch.device("meta"), torch.no_grad():
            meta, x_BCHW = self._build(name).eval(), self._image(1, torch.device("meta"))
            forward = count_flop(lambda: meta(x_BCHW, all_heads=False))
            self._forward_tflop = forward / 1e12
            self._step_tflop = 3 * count_flop(lambda: meta(x_BCHW, all_heads=True)) / 1e12

    def _build(self, name: str) -> SegmentationNetwork:
        return build_network(
            name,
            in_channels=NUM_ADJACENT_SLICES,
            num_organs=NUM_ORGANS,
            width=self._settings.width,
        )

    def _image(self, batch_size: int, device: torch.device) -> Tensor:
        side_px = self._settings.side_px
        return torch.rand(batch_size, NUM_ADJACENT_SLICES, side_px, side_px, device=device)

    def autocast(self) -> torch.autocast:
        """Return the context of a forward pass."""
        return torch.autocast(
            self._device.type, torch.bfloat16, enabled=self._dtype == torch.bfloat16
        )

    def forward(self, batch_size: int, mode: str | None) -> dict[str, float]:
        """Return the rate of inference on a batch: batch norms folded, finest head."""
        network = _compiled(prepare(self._network), mode)
        x_BCHW = self._image(batch_size, self._device).contiguous(memory_format=torch.channels_last)

        def call() -> None:
            with torch.inference_mode(), self.autocast():
                network(x_BCHW)

        return self._rates(call, batch_size, self._forward_tflop)

    def training_step(self, batch_size: int, mode: str | None) -> dict[str, float]:
        """Return the rate of training steps: forward pass, loss, backward pass, AdamW."""
        return self._rates(self._step(batch_size, mode), batch_size, self._step_tflop)

    def _step(self, batch_size: int, mode: str | None) -> Callable[[], None]:
        network = self._network.train()
        called, optimizer = _compiled(network, mode), make_optimizer(network, self._train)
        x_BCHW = self._image(batch_size, self._device).contiguous(memory_format=torch.channels_last)
        mask_BKHW = self._image(batch_size, self._device)[:, :NUM_ORGANS] > 0.5

        def call() -> None:
            with self.autocast():
                output = called(x_BCHW)
            total_loss(output, mask_BKHW).total.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return call

    def largest_batch(self) -> int:
        """Return the largest power of two of slices whose training step fits."""
        on_gpu, usable_bytes = self._device.type == "cuda", 1
        if on_gpu:
            torch.cuda.empty_cache()
            usable_bytes = torch.cuda.mem_get_info()[0]

        def try_part(size: int) -> int:
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            self._step(size, None)()
            return torch.cuda.max_memory_allocated() if on_gpu else 0

        return largest_part(try_part, usable_bytes, self._settings.largest_batch)

    def volume(self, gating: Gating) -> dict[str, float]:
        """Return the rate of a volume in whose lower half the slice classifier finds no organ."""
        settings, network = self._settings, prepare(self._network.eval())
        image_ZHW = torch.rand(settings.num_slices, settings.side_px, settings.side_px)
        image_ZHW *= torch.linspace(0.3, 1, settings.num_slices)[:, None, None]
        inference = InferenceSettings(
            batch_size=settings.batch_size,
            device=self._device,
            gating=gating,
            precision=self._dtype,
        )
        if network.classifier is not None:  # type: ignore[union-attr]
            found = predict_slices(network, image_ZHW, inference).organ_probability
            assert found is not None
            bias = network.classifier.conv.bias  # type: ignore[union-attr]
            bias[1] -= torch.logit(found).median().to(bias)
        return self._rates(
            lambda: predict_slices(network, image_ZHW, inference), settings.num_slices, None
        )

    def _rates(
        self, call: Callable[[], object], num_images: int, tflop: float | None
    ) -> dict[str, float]:
        """Return images a second, and what they take."""
        settings, on_gpu = self._settings, self._device.type == "cuda"
        started = settings.clock()
        call()
        first_s = settings.clock() - started
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        taken = []
        for _ in range(settings.rounds):
            started = settings.clock()
            call()
            taken.append(settings.clock() - started)
        rate = num_images / statistics.median(taken)
        found = {"images_per_s": rate, "first_call_s": first_s}
        if tflop is not None:
            found["tflops"] = rate * tflop
            found["share_of_matrix_product"] = rate * tflop / self._peak_tflops
        if on_gpu:
            found["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
        return found


def _compiled(network: Any, mode: str | None) -> Any:
    """Return a network, compiled unless the mode is None; "reduce-overhead" uses CUDA graphs."""
    return network if mode is None else torch.compile(network, mode=mode)


def run(settings: Settings, report: Report) -> None:
    """Measure, the most important first: a time limit may end it."""
    device = torch.device(settings.device)
    report.add("machine", describe_machine(device))
    peaks = {}
    for precision in settings.precisions:
        peaks[precision] = report.measure(
            f"matrix product, {precision}, TFLOP/s",
            lambda precision=precision: measure_peak_tflops(
                device, PRECISIONS[precision], side=settings.matrix_side
            ),
        )
    for precision in settings.precisions:
        for name in reversed(NETWORKS):
            _run_network(name, precision, settings, report, peaks[precision])
    for mode in settings.compile_modes[1:]:
        for name in reversed(NETWORKS):
            speed = Speed(name, settings.precisions[0], settings, peaks[settings.precisions[0]])
            _run_mode(f"{name}, {settings.precisions[0]}", mode, speed, settings, report)
            torch.compiler.reset()


def _run_network(
    name: str, precision: str, settings: Settings, report: Report, peak_tflops: float
) -> None:
    title, speed = f"{name}, {precision}", Speed(name, precision, settings, peak_tflops)
    _run_mode(title, None, speed, settings, report)
    for gating in ("none", "hard") if name == "unet3plus" else ("none",):
        words = {"none": "every slice decoded", "hard": "with the slice classifier"}[gating]
        report.measure(f"{title}: volume, {words}", lambda gating=gating: speed.volume(gating))
    if precision == settings.precisions[0]:
        size = report.measure(f"{title}: largest batch", speed.largest_batch)
        if size is not None and size > settings.batch_size:
            report.measure(f"{title}: forward, {size}", lambda: speed.forward(size, None))
            report.measure(
                f"{title}: training step, {size}", lambda: speed.training_step(size, None)
            )


def _run_mode(
    title: str, mode: str | None, speed: Speed, settings: Settings, report: Report
) -> None:
    words = "eager" if mode is None else f"torch.compile {mode}"
    size = settings.batch_size
    report.measure(f"{title}: forward, {size}, {words}", lambda: speed.forward(size, mode))
    report.measure(
        f"{title}: training step, {size}, {words}", lambda: speed.training_step(size, mode)
    )
