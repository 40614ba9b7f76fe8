from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from mlflow_server import Server
from prefect import flow, task
from prefect.artifacts import Artifact
from prefect.client.orchestration import get_client
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.settings import get_current_settings
from watching import is_alive, wait_until

from flows import stages
from flows.devices import LIMIT
from flows.stages import (
    StageFailedError,
    TransientError,
    pull_data,
    push,
    restore_checkout,
    run_logged,
    run_stages,
)
from fullscale.params import load_params
from fullscale.versioning.git import run_program

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("prefect")]
ROOT = Path(__file__).parents[2]

# A flow whose stage starts a worker, as dvc starts a trainer; both write their numbers.
FLOW = """
import sys
from pathlib import Path
from prefect import flow, task
from flows.stages import run_logged
from fullscale.runtime.processes import bind_to_parent

@task
def stage(folder):
    worker = bind_to_parent(["sh", "-c", f"echo $$ > {folder}/worker; exec sleep 120"])
    code = "import os, subprocess, sys; open(sys.argv[1], 'w').write(str(os.getpid()));"
    code += "subprocess.run(sys.argv[2:])"
    run_logged([sys.executable, "-c", code, f"{folder}/stage", *worker], Path())

@flow
def killed(folder, is_submitted):
    stage.submit(folder).result() if is_submitted else stage(folder)

killed(sys.argv[1], sys.argv[2] == "submitted")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells of a parent's death")
@pytest.mark.parametrize("way", ["called", "submitted"])
def test_killed_flow_leaves_no_process(tmp_path: Path, way: str) -> None:
    files = [tmp_path / "stage", tmp_path / "worker"]
    server = get_current_settings().to_environment_variables(exclude_unset=True)
    command = [sys.executable, "-c", FLOW, str(tmp_path), way]
    with subprocess.Popen(command, cwd=ROOT, env={**os.environ, **server}) as process:
        assert wait_until(lambda: all(f.exists() and f.read_text() for f in files), 120)
        numbers = [int(file.read_text()) for file in files]
        time.sleep(1)
        assert all(is_alive(pid) for pid in numbers)
        process.kill()
    assert wait_until(lambda: not any(is_alive(pid) for pid in numbers), 10)


def test_program_outlives_other_threads_of_the_flow(tmp_path: Path) -> None:
    @task
    def stage(name: str, duration_s: str) -> None:
        run_logged(["sh", "-c", f"sleep {duration_s}; echo done > {tmp_path / name}"], ROOT)

    @flow
    def several() -> None:
        runs = [stage.submit("short", "0.1"), stage.submit("long", "4")]
        for run in runs:
            run.result()
        stage("last", "1")

    several()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last", "long", "short"]


def test_missing_program_fails_the_stage_with_its_reason() -> None:
    @flow
    def failing() -> None:
        run_logged(["no-such-program"], ROOT)

    with pytest.raises(StageFailedError, match="code 127: error: cannot run 'no-such-program'"):
        failing()


# The stages of the project as shell commands that note when they begin and end.
PIPELINE = """\
stages:
  slice: {cmd: echo slice, outs: [artifacts/slice]}
  split: {cmd: echo split >> attempts; python probe.py, deps: [probe.py]}
  train:
    matrix: {network: [unet, unet3plus], seed: [0]}
    cmd: sh train.sh ${item.network}-${item.seed}
    deps: [train.sh]
  evaluate:
    matrix: {network: [unet, unet3plus]}
    cmd: echo evaluate ${item.network} >> attempts
    deps: [train.sh]
  register: {cmd: echo register >> attempts, deps: [train.sh]}
"""
TRAINING = """\
echo begin $1 >> attempts
python epoch.py $1 1 0.1
sleep 4
python epoch.py $1 2 0.2
echo end $1 $CUDA_VISIBLE_DEVICES >> attempts
"""
EPOCH = """\
import sys
from fullscale.runtime.console import configure_logging
from fullscale.runtime.progress import TrainingDisplay

configure_logging()
_, name, epoch, dice = sys.argv
metrics = {"train/total": 1.0, "slices/organ": 2.0, "slices/organ_free": 0.0}
with TrainingDisplay(name, num_epochs=2, num_steps=1, done_steps=0) as display:
    display.show_epoch(metrics | {"epoch": int(epoch), "val/dice": float(dice)}, improved=True)
"""
# What a stage does before it begins to work.
PROBE = """\
from pathlib import Path
from fullscale.runtime.console import report_errors
from fullscale.tracking.store import connect, default_store

@report_errors
def main():
    try:
        connect(default_store(Path()))
    except Exception:
        Path("was_away").touch()
        raise

main()
"""


@pytest.fixture(scope="module")
def empty_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DVC project without stages; for copying alone."""
    root = tmp_path_factory.mktemp("template") / "project"
    root.mkdir()
    run_program(["dvc", "init", "--quiet", "--no-scm"], root)
    return root


@pytest.fixture
def pipeline(empty_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A DVC project of small stages; whatever is transient is tried again soon."""
    root = shutil.copytree(empty_project, tmp_path / "project")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(stages, "RETRY_DELAYS_S", [5.0, 10.0, 20.0])
    (root / "dvc.yaml").write_text(PIPELINE.replace("echo slice", "mkdir -p artifacts/slice"))
    (root / "train.sh").write_text(TRAINING)
    (root / "epoch.py").write_text(EPOCH)
    (root / "probe.py").write_text("")
    return root


def attempts(root: Path) -> list[str]:
    return (root / "attempts").read_text().split("\n")[:-1]


def limit_devices(num_slots: int) -> None:
    with get_client(sync_client=True) as client:
        client.upsert_global_concurrency_limit_by_name(LIMIT, num_slots)


@pytest.fixture
def shorten(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that lets a flow run no other stages than those named, in their order."""
    return lambda *names: monkeypatch.setattr(stages, "plan", lambda params: list(names))


@flow
def all_stages(root: Path, num_devices: int = 1) -> None:
    params = load_params(ROOT / "params.yaml").model_copy(update={"seeds": (0,)})
    train = params.train.model_copy(update={"devices": num_devices, "strategy": "ddp"})
    run_stages(params.model_copy(update={"train": train}), root)


@pytest.mark.parametrize("num_slots", [1, 2])
def test_trainings_run_side_by_side_where_devices_allow(
    pipeline: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    num_slots: int,
) -> None:
    limit_devices(num_slots)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    all_stages(pipeline)
    told = attempts(pipeline)
    assert told[0] == "split"
    assert told[-3:] == ["evaluate unet", "evaluate unet3plus", "register"]
    trained = told[1:-3]
    if num_slots == 1:
        assert trained == [
            "begin unet-0", "end unet-0 GPU-a", "begin unet3plus-0", "end unet3plus-0 GPU-a",
        ]  # fmt: skip
    else:
        assert sorted(trained[:2]) == ["begin unet-0", "begin unet3plus-0"]
        assert {line.split()[-1] for line in trained[2:]} == {"GPU-a", "GPU-b"}
    for training in ("unet-0", "unet3plus-0"):
        progress = Artifact.get(f"training-{training}")
        assert progress is not None
        assert float(progress.data) == 100
        assert progress.description == f"{training}: epoch 2 of 2, validation Dice 0.2000"
    # The log of a run has a line for people where the progress has an event.
    assert "unet-0 epoch 2/2: loss 1.0000, val Dice 0.2000 (best)" in caplog.text
    assert '"event"' not in caplog.text


def test_training_on_more_devices_than_slots_gets_all(
    pipeline: Path, shorten: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten("train@unet-0")
    limit_devices(1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    all_stages(pipeline, num_devices=2)
    assert "end unet-0 0,1" in attempts(pipeline)


def test_failing_training_lets_the_other_end_and_is_not_tried_again(
    pipeline: Path, shorten: Callable[..., None]
) -> None:
    shorten("train@unet-0", "train@unet3plus-0", "register")
    limit_devices(2)
    broken = TRAINING.replace("sleep 4", "if [ $1 = unet-0 ]; then exit 3; fi; sleep 4")
    (pipeline / "train.sh").write_text(broken)
    with pytest.raises(StageFailedError, match="train@unet-0 ended with code"):
        all_stages(pipeline)
    told = attempts(pipeline)
    assert told.count("begin unet-0") == 1
    assert any(line.startswith("end unet3plus-0") for line in told)
    assert "register" not in told


def test_stage_waits_for_a_tracking_server_that_is_away(
    pipeline: Path,
    shorten: Callable[..., None],
    store_template: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    shorten("split", "register")
    (pipeline / "probe.py").write_text(PROBE)
    server = Server(shutil.copytree(store_template, tmp_path / "mlflow"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)

    def come_back() -> None:
        assert wait_until((pipeline / "was_away").exists, 60)
        server.start()

    coming = threading.Thread(target=come_back)
    coming.start()
    try:
        all_stages(pipeline)
    finally:
        coming.join()
        server.kill()
    told = attempts(pipeline)
    assert told.count("split") >= 2
    assert told[-1] == "register"
    assert f"the MLflow store {server.uri} does not answer" in caplog.text


def test_server_that_stays_away_fails_the_stage(
    pipeline: Path, shorten: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten("split", "register")
    monkeypatch.setattr(stages, "RETRY_DELAYS_S", [0.1])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    (pipeline / "probe.py").write_text(PROBE)
    with pytest.raises(TransientError, match=r"http://127.0.0.1:9 does not answer"):
        all_stages(pipeline)
    assert attempts(pipeline) == ["split", "split"]


FAILING = """\
from fullscale.runtime.console import report_errors
from fullscale.runtime.errors import StageError, TransientStageError

@report_errors
def main():
    raise ERROR

main()
"""


@pytest.mark.parametrize(
    ("error", "kind", "num_attempts"),
    [
        ("TransientStageError('come back tomorrow')", TransientError, 3),
        ("StageError('the MLflow store http://m does not answer (refused)')", StageFailedError, 1),
        ("KeyError('HTTP error code 503')", StageFailedError, 1),
    ],
)
def test_exit_code_of_a_stage_decides_whether_it_is_retried(
    pipeline: Path,
    shorten: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    error: str,
    kind: type[StageFailedError],
    num_attempts: int,
) -> None:
    """DVC ends with 255 whatever the stage's code was, so the code comes as an event."""
    shorten("split", "register")
    monkeypatch.setattr(stages, "RETRY_DELAYS_S", [0.1, 0.1])
    (pipeline / "probe.py").write_text(FAILING.replace("raise ERROR", f"raise {error}"))
    with pytest.raises(StageFailedError, match=r"dvc .* ended with code 255: ") as failed:
        all_stages(pipeline)
    assert type(failed.value) is kind
    assert attempts(pipeline) == ["split"] * num_attempts


@pytest.mark.parametrize(("code", "kind"), [(75, TransientError), (1, StageFailedError)])
def test_exit_code_of_a_program_decides_whether_it_is_transient(
    code: int, kind: type[StageFailedError]
) -> None:
    @flow
    def failing() -> None:
        run_logged(["sh", "-c", f"echo first; echo last; exit {code}"], ROOT)

    with pytest.raises(StageFailedError, match=rf"ended with code {code}: first \| last") as failed:
        failing()
    assert type(failed.value) is kind


def test_people_see_no_events(pipeline: Path) -> None:
    by_hand = run_program(["sh", "-c", "sh train.sh unet-0 2>&1"], pipeline)
    assert by_hand.splitlines() == [
        f"unet-0 epoch {epoch}/2: loss 1.0000, val Dice {dice:.4f} (best); 2 slices with organs, "
        "0 without"
        for epoch, dice in ((1, 0.1), (2, 0.2))
    ]


def test_device_that_prefect_does_not_give_is_asked_for_again(
    pipeline: Path, shorten: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when its database is locked for longer than its client asks again."""
    shorten("train@unet-0")
    limit_devices(1)
    ask, asked = stages.device_slot, []

    @contextmanager
    def ask_later(root: Path, num_devices: int) -> Iterator[dict[str, str]]:
        asked.append(root)
        if len(asked) == 1:
            raise ConcurrencySlotAcquisitionError("503 Service Unavailable")
        with ask(root, num_devices) as visible:
            yield visible

    monkeypatch.setattr(stages, "RETRY_DELAYS_S", [0.1])
    monkeypatch.setattr(stages, "device_slot", ask_later)
    all_stages(pipeline)
    assert len(asked) == 2
    assert attempts(pipeline)[-1].startswith("end unet-0")


def test_remote_that_is_away_is_asked_again(pipeline: Path, tmp_path: Path, caplog) -> None:
    mount, away = tmp_path / "mount", tmp_path / "away"
    mount.mkdir()
    (pipeline / "data").mkdir()
    (pipeline / "data/scan").write_text("1")
    run_program(["dvc", "add", "--quiet", "data"], pipeline)
    run_program(["dvc", "remote", "add", "--default", "team", str(mount / "remote")], pipeline)

    @flow
    def sending() -> None:
        push(pipeline)

    @flow
    def fetching() -> None:
        pull_data(pipeline)

    @flow
    def restoring() -> None:
        restore_checkout(pipeline)

    def while_away(work: Callable[[], None]) -> str:
        """Return the log of work whose remote comes back after the first failure."""
        caplog.clear()
        mount.rename(away)
        mount.write_text("not mounted")

        def come_back() -> None:
            assert wait_until(lambda: "Retry 1/3" in caplog.text, 60)
            mount.unlink()
            away.rename(mount)

        coming = threading.Thread(target=come_back)
        coming.start()
        work()
        coming.join()
        return str(caplog.text)

    while_away(sending)
    assert list(mount.glob("remote/files/md5/*/*.dir"))
    for work in (fetching, restoring):
        shutil.rmtree(pipeline / ".dvc/cache")
        shutil.rmtree(pipeline / "data")
        while_away(work)
        assert (pipeline / "data/scan").read_text() == "1"
