"""One service as its keeper sees it."""

from __future__ import annotations

import os

import pytest
from running_services import free_port

from flows.servers.service_settings import Service
from flows.services import RunningService, ServiceError, wait_until_ready


def test_server_that_does_not_answer_is_told_with_its_last_lines() -> None:
    command = ("sh", "-c", "echo waiting for the database; exec sleep 60")
    url = f"http://127.0.0.1:{free_port()}/health"
    running = RunningService(Service("mlflow", command, os.environ, health_url=url))
    try:
        with pytest.raises(ServiceError, match=r"did not answer.*last lines:\nwaiting for"):
            wait_until_ready(running, timeout_s=0.6)
    finally:
        running.stop(0)
