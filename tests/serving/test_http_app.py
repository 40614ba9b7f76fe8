from __future__ import annotations

import concurrent.futures
import itertools
import json
import threading
from functools import cache

import pandas as pd
import pytest
from fastapi.testclient import TestClient
from payloads import base64_of, malformed, nifti, request
from random_network import random_trained, save_random
from watching import wait_until

from fullscale.prediction.segmentation import Model
from fullscale.serving.alias_follower import AliasFollower
from fullscale.serving.http_app import RequestLimits, make_app
from fullscale.serving.row_segmenter import RowSegmenter
from fullscale.serving.upload import ScanLimits
from tasks.serve import LOOPBACK_HOSTS

JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def folder(tiny_params, tmp_path_factory):
    return save_random(tmp_path_factory.mktemp("trained"), tiny_params)


@pytest.fixture(scope="module")
def follower(folder):
    return AliasFollower(str(folder), folder, ScanLimits(folder, 1 << 20), "cpu")


@pytest.fixture(scope="module")
def client(follower):
    with TestClient(make_app(follower, RequestLimits(4 << 20, 2))) as client:
        yield client


def ask(client, body, **headers):
    return client.post("/invocations", content=body, headers={**JSON, **headers})


def test_other_host_is_refused_where_hosts_are_named(follower):
    app = make_app(follower, RequestLimits(4 << 20, 2), LOOPBACK_HOSTS)
    with TestClient(app) as client:
        codes = {
            host: client.get("/model", headers={"Host": host}).status_code
            for host in ("127.0.0.1:8000", "localhost", "[::1]:8000", "rebound.example.org:8000")
        }
    assert list(codes.values()) == [200, 200, 200, 400]


def test_scan_is_answered(client, follower):
    answer = ask(client, request(scan=base64_of(nifti())))
    assert answer.status_code == 200
    (prediction,) = answer.json()["predictions"]
    expected = follower.current.segment(pd.DataFrame({"scan": [base64_of(nifti())]}))
    assert prediction == {name: expected[name][0] for name in ("mask", "statistics")}


@pytest.mark.parametrize(
    "content",
    [
        {"dataframe_split": {"columns": ["scan"], "data": [["{scan}"]]}},
        {"inputs": {"scan": ["{scan}"]}},
        {"instances": [{"scan": "{scan}"}]},
        {"dataframe_records": [{"scan": "{scan}"}], "params": {"unused": 1}},
    ],
)
def test_every_form_of_the_protocol_is_read(client, content):
    body = json.dumps(content).replace("{scan}", base64_of(nifti()))
    assert len(ask(client, body).json()["predictions"]) == 1


def test_model_and_health_are_reported(client, follower):
    assert client.get("/health").status_code == client.get("/ping").status_code == 200
    shown = client.get("/model").json()
    assert shown["name"] == "unet3plus"
    assert shown["version"] is None
    assert shown["weights_sha256"] == follower.current.model.weights_sha256
    assert shown["organs"] == ["liver", "spleen"]


@cache
def malformed_bodies(seed):
    return list(malformed(seed, num=30))


@pytest.mark.parametrize(("seed", "number"), list(itertools.product(range(3), range(30))))
def test_malformed_request_is_refused_clearly(client, seed, number):
    answer = ask(client, malformed_bodies(seed)[number])
    assert 400 <= answer.status_code < 500, answer.text
    content = answer.json()
    assert content["error_code"] == answer.status_code
    assert 10 < len(content["message"]) <= 600
    assert "Traceback" not in content["message"]
    assert "scan.nii" not in content["message"]


@pytest.mark.parametrize("kind", ["text/csv", "application/x-parquet", "", "multipart/form-data"])
def test_other_content_is_not_read(client, kind):
    answer = ask(client, b"scan\nQQ==\n", **{"Content-Type": kind})
    assert answer.status_code == 415
    assert "wanted application/json" in answer.json()["message"]


def test_body_that_is_too_large_is_refused_with_and_without_its_length(client):
    body = request(scan="A" * (4 << 20))
    assert ask(client, body).status_code == 413
    chunks = (body[start : start + 65536] for start in range(0, len(body), 65536))
    answer = ask(client, chunks)
    assert answer.status_code == 413
    assert answer.json()["message"] == "a body of more than 4,194,304 bytes"


class Slow(RowSegmenter):
    """A segmenter that waits for an event."""

    def __init__(self, model, go_on):
        super().__init__(model, ScanLimits(), "cpu")
        self.began, self._go_on = threading.Semaphore(0), go_on

    def segment(self, rows):
        self.began.release()
        self._go_on.wait(30)
        return super().segment(rows)


def test_requests_beyond_the_limit_are_refused_and_accepted_later(follower, tiny_params):
    go_on = threading.Event()
    slow = Slow(Model("organs", "1", "ab" * 32, 0.5, random_trained(tiny_params)), go_on)
    another = AliasFollower(follower.model_name, follower._root, ScanLimits(), "cpu")
    another.current = slow
    body = request(scan=base64_of(nifti()))
    with (
        TestClient(make_app(another, RequestLimits(max_concurrent=2))) as client,
        concurrent.futures.ThreadPoolExecutor(2) as threads,
    ):
        try:
            first = threads.submit(ask, client, body)
            assert slow.began.acquire(timeout=30)
            second = threads.submit(ask, client, body)
            # Free slots are checked before the body is read.
            assert wait_until(
                lambda: ask(client, b"", **{"Content-Type": "none"}).status_code == 503, 30
            )
            assert ask(client, body).headers["Retry-After"] == "30"
            assert client.get("/health").status_code == 200
        finally:
            go_on.set()
        assert first.result(30).status_code == second.result(30).status_code == 200
        assert ask(client, body).status_code == 200


def test_defect_is_status_500_and_the_next_request_is_answered(
    follower, folder, capsys, tiny_params
):
    another = AliasFollower(follower.model_name, folder, ScanLimits(), "cpu")
    good = another.current
    another.current = None
    with TestClient(make_app(another, RequestLimits())) as client:
        answer = ask(client, request(scan=base64_of(nifti())))
        assert answer.status_code == 500
        assert answer.json()["message"] == "this failed; the server's log says why"
        assert "AttributeError" in capsys.readouterr().err
        another.current = good
        assert ask(client, request(scan=base64_of(nifti()))).status_code == 200
