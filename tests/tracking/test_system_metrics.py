import time

from fullscale.tracking.system_metrics import SystemMetrics


def test_processor_load_is_measured_between_two_calls():
    with SystemMetrics() as system:
        end = time.process_time() + 0.3
        while time.process_time() < end:
            pass
        found = system.averages()
    assert 0 < found["system/cpu_utilization_percentage"] <= 100
    assert 0 < found["system/system_memory_usage_percentage"] < 100
