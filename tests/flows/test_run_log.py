from __future__ import annotations

import asyncio
import logging

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId
from prefect.runtime import flow_run

from flows.run_log import add_library_lines

pytestmark = pytest.mark.slow


def test_library_lines_are_in_the_log_of_the_run(prefect: None) -> None:
    """Prefect's API has them, where the UI shows them."""
    run_ids = []

    @flow
    def logging_flow() -> None:
        for _ in range(2):
            add_library_lines()
        run_ids.append(flow_run.get_id())
        logging.getLogger("fullscale.scans.slicing").info("a line of the library")
        logging.getLogger("another.library").info("a line of another library")

    logging.getLogger("fullscale").info("before the run")
    logging_flow()
    logging.getLogger("fullscale").info("after the run")

    async def read_logs() -> list[str]:
        async with get_client() as client:
            wanted = LogFilter(flow_run_id=LogFilterFlowRunId(any_=run_ids))
            for _ in range(100):  # they are sent in the background
                logs = await client.read_logs(wanted)
                if any("Finished" in log.message for log in logs):
                    break
                await asyncio.sleep(0.2)
            return [log.message for log in logs]

    messages = asyncio.run(read_logs())
    assert messages.count("a line of the library") == 1
    assert not [text for text in messages if "another" in text or "the run" in text]
