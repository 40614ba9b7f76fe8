from __future__ import annotations

from collections.abc import Iterator

import pytest
from prefect import flow
from prefect.blocks.system import Secret
from prefect.variables import Variable
from webhook import Receiver, open_receiver, save_webhook

from flows.notify import ENVIRONMENT, VARIABLE, chosen_block, notify

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("prefect")]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with open_receiver() as receiver:
        yield receiver


@flow
def telling(block: str | None, subject: str, body: str) -> bool:
    return notify(block, subject, body)


def test_message_reaches_a_real_web_server(receiver: Receiver) -> None:
    block = save_webhook(receiver.url)
    assert telling(block, "Retraining: pass", "gain 0.0123\nbranch retrain/x") is True
    assert receiver.received == [{"text": "Retraining: pass\ngain 0.0123\nbranch retrain/x"}]


def test_no_block_sends_nothing(receiver: Receiver) -> None:
    save_webhook(receiver.url)
    assert telling(None, "Retraining: pass", "") is False
    assert receiver.received == []


def test_refusing_receiver_harms_nothing(receiver: Receiver, caplog) -> None:
    receiver.code = 500
    assert telling(save_webhook(receiver.url), "Retraining: pass", "") is False
    assert len(receiver.received) == 1
    assert "no message was sent through custom-webhook/team: Server error '500" in caplog.text


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ("custom-webhook/nobody", "no message was sent through custom-webhook/nobody"),
        ("nothing", "no message was sent through nothing"),
        ("secret/password", "secret/password cannot notify: a Secret is no notification block"),
    ],
)
def test_block_that_cannot_notify_is_named(block: str, words: str, caplog) -> None:
    Secret(value="hidden").save("password", overwrite=True)
    assert telling(block, "subject", "body") is False
    assert words in caplog.text
    assert "hidden" not in caplog.text


def test_unreachable_receiver_harms_nothing(receiver: Receiver, caplog) -> None:
    block = save_webhook("http://127.0.0.1:9/hook")
    assert telling(block, "subject", "body") is False
    assert "no message was sent" in caplog.text


def test_environment_names_the_block_before_the_variable() -> None:
    assert chosen_block({}) is None
    Variable.set(VARIABLE, "custom-webhook/team", overwrite=True)
    assert chosen_block({}) == "custom-webhook/team"
    assert chosen_block({ENVIRONMENT: "slack-webhook/lab"}) == "slack-webhook/lab"
    assert chosen_block({ENVIRONMENT: ""}) is None
    Variable.unset(VARIABLE)
