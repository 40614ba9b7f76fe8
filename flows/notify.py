"""Messages to people through a Prefect notification block; off by default."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Mapping

from prefect import get_run_logger
from prefect.blocks import notifications as _known_kinds  # noqa: F401 - loading a block needs them
from prefect.blocks.abstract import NotificationBlock
from prefect.blocks.core import Block
from prefect.variables import Variable

RunLogger = logging.Logger | logging.LoggerAdapter[logging.Logger]
ENVIRONMENT = "FULLSCALE_NOTIFY"
VARIABLE = "fullscale_notify"


def chosen_block(environment: Mapping[str, str]) -> str | None:
    """Return the notification block to use, as TYPE/NAME such as slack-webhook/team.

    FULLSCALE_NOTIFY names it, else the Prefect variable `fullscale_notify`; None: send nothing.
    """
    if ENVIRONMENT in environment:
        return environment[ENVIRONMENT] or None
    found = Variable.get(VARIABLE)
    return str(found) if found else None


def notify(
    block_name: str | None, subject: str, body: str, logger: RunLogger | None = None
) -> bool:
    """Send a message; a failure is logged and does not fail the run.

    Args:
        block_name: as `chosen_block` returns it.
        subject: one line.
        body: the event, and where to find its results.
        logger: for failures; None is the log of the run.

    Returns:
        Whether it was sent.
    """
    if block_name is None:
        return False
    logger = logger or get_run_logger()
    try:
        block = Block.load(block_name)
        if not isinstance(block, NotificationBlock):
            logger.warning(
                "%s cannot notify: a %s is no notification block; create one in the Prefect UI "
                "and name it in %s",
                *(block_name, type(block).__name__, ENVIRONMENT),
            )
            return False
        with block.raise_on_failure():
            sent = block.notify(body, subject)
            if inspect.iscoroutine(sent):
                asyncio.run(sent)
    except Exception as error:  # blocks come from many packages and raise errors of any kind
        logger.warning("no message was sent through %s: %s", block_name, error)
        return False
    return True
