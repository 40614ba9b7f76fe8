"""Load of the machine during a training: processor, memory, disk, network, graphics cards."""

from __future__ import annotations

import logging
import threading
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor

PREFIX = "system/"  # what MLflow's UI shows under "System metrics"
INTERVAL_S = 5.0


class SystemMetrics:
    """Sample MLflow's monitors in a thread, from `with` to its end."""

    def __init__(self) -> None:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
        from mlflow.system_metrics.metrics.rocm_monitor import ROCMMonitor

        # A card that does not measure its power is reported at every sample.
        logging.getLogger("mlflow.system_metrics").setLevel(logging.ERROR)
        self._monitors: list[BaseMetricsMonitor] = []
        for monitor in (CPUMonitor, DiskMonitor, NetworkMonitor, GPUMonitor, ROCMMonitor):
            try:
                self._monitors.append(monitor())
            except (ImportError, RuntimeError, OSError, AttributeError):
                continue  # no such part in this machine, or its library is missing
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="system-metrics", daemon=True)

    def __enter__(self) -> SystemMetrics:
        self.averages()  # processor load is measured from one call to the next
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end.set()

    def averages(self) -> dict[str, float]:
        """Return means since the last call, by MLflow's names after `PREFIX`.

        Percentages, megabytes and watts, as the names say; network traffic since the start.
        """
        with self._lock:
            self._collect()
            means = {
                PREFIX + name: float(value)
                for monitor in self._monitors
                for name, value in monitor.aggregate_metrics().items()
            }
            for monitor in self._monitors:
                monitor.clear_metrics()
        return means

    def _collect(self) -> None:
        for monitor in self._monitors:
            monitor.collect_metrics()

    def _sample(self) -> None:
        import psutil

        psutil.cpu_percent()  # the first call in a thread measures nothing
        while not self._end.wait(INTERVAL_S):
            with self._lock:
                self._collect()
