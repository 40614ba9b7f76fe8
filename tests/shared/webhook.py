"""A web server that messages are sent to, and the block that sends them."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

from prefect.blocks.notifications import CustomWebhookNotificationBlock


class Receiver:
    """A web server that keeps what is posted to it."""

    def __init__(self) -> None:
        self.received: list[dict[str, Any]] = []
        self.code = 200
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"])
                receiver.received.append(json.loads(self.rfile.read(length)))
                self.send_response(receiver.code)
                self.end_headers()

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@contextmanager
def open_receiver() -> Iterator[Receiver]:
    """A receiver that is closed in the end."""
    receiver = Receiver()
    try:
        yield receiver
    finally:
        receiver.server.shutdown()
        receiver.server.server_close()


def save_webhook(url: str) -> str:
    """Save a notification block that posts to an address; returns its TYPE/NAME."""
    block = CustomWebhookNotificationBlock(
        name="team", url=url, json_data={"text": "{{subject}}\n{{body}}"}
    )
    block.save("team", overwrite=True)
    return "custom-webhook/team"
