import socket
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from fullscale.runtime.errors import EX_TEMPFAIL
from fullscale.tracking.errors import UnreachableError
from fullscale.tracking.outages import translate_outages

RUN_ID = "a" * 32


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")


@contextmanager
def answering(status, body=b"{}"):
    """A server that gives the same answer to every request; None closes the connection."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if status is None:
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_PUT = do_POST = do_GET

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


def get_run(uri):
    MlflowClient(uri).get_run(RUN_ID)


def upload(uri):
    from mlflow.store.artifact.http_artifact_repo import HttpArtifactRepository

    address = f"{uri}/api/2.0/mlflow-artifacts/artifacts/x"
    HttpArtifactRepository(address, tracking_uri=uri).log_artifact(__file__)


@pytest.mark.parametrize("work", [get_run, upload])
@pytest.mark.parametrize("status", [500, 502, 503, None])
def test_server_that_fails_in_the_middle_is_unreachable(work, status):
    with answering(status) as uri:
        with (
            pytest.raises(
                UnreachableError, match=rf"{uri} does not answer \(.*\); start"
            ) as failed,
            translate_outages(uri),
        ):
            work(uri)
        assert failed.value.exit_code == EX_TEMPFAIL


@pytest.mark.parametrize("work", [get_run, upload])
def test_server_that_hangs_or_is_gone_is_unreachable(work):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(UnreachableError), translate_outages(uri):
            work(uri)
    with pytest.raises(UnreachableError), translate_outages(uri):
        work(uri)


@pytest.mark.parametrize("work", [get_run, upload])
@pytest.mark.parametrize("status", [400, 403, 404])
def test_refusal_is_passed_on(work, status):
    body = b'{"error_code": "INTERNAL_ERROR", "message": "does not answer, error code 503"}'
    with (
        answering(status, body) as uri,
        pytest.raises(Exception, match=r"503|Client Error") as failed,
        translate_outages(uri),
    ):
        work(uri)
    assert not isinstance(failed.value, UnreachableError)


@pytest.mark.parametrize("error", [MlflowException("a mistake of the client"), KeyError("x")])
def test_mistake_is_passed_on(error):
    with pytest.raises(type(error)) as failed, translate_outages("http://m"):
        raise error
    assert failed.value is error
