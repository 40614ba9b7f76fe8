"""Days of work in minutes: scans land, processes are killed, a person promotes, moves and copies.

In the end all is in its place. Everything runs behind a proxy that does not answer.

    make soak MINUTES=30

Real servers, a worker and all deployments run on a clone of the project with few and small scans.
What is random follows from the seed; when a process is there to be killed, the machine decides.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import psutil
from deliveries import WAITING, Sender
from mlflow.exceptions import MlflowException
from project import Project
from quick_project import make_quick_project
from running_services import RunningServices, free_port
from soak_checks import MODEL, branch_versions, processes_in, verify
from watching import wait_until
from webhook import open_receiver

from fullscale.runtime.processes import stage_environment
from fullscale.tracking.errors import UnreachableError
from fullscale.tracking.registry import CHAMPION
from fullscale.tracking.store import Store, connect
from fullscale.versioning.data_version import committed_data_version, find_unannounced
from fullscale.versioning.git import SCANS_BRANCH, find_commit, git
from fullscale.versioning.retraining import list_pending, newest_branch

ARRIVAL_S = (10.0, 50.0)
KILL_EVERY_S = 120.0
PERSON_EVERY_S = 90.0
ACTIONS = {"promote": 4, "move": 1, "copy": 1}
"""What a person does meanwhile, and how often: each is done once at least in a long soak."""
PERSONS_CRON = "*/3 * * * *"
LONGEST_REST_S = 2400.0
TARGETS = {
    "worker": (("prefect worker start",), 2),
    "flow run": (("prefect.engine",), 4),
    "trainer": (("-m tasks.train ",), 4),
    "another stage": (tuple(f"-m tasks.{name}" for name in ("slice", "evaluate", "register")), 3),
    "dvc": (("/dvc ",), 3),
    "Prefect's server": (("flows.servers.prefect_server",), 1),
    "MLflow's server": (("mlflow server",), 1),
    "all services": ((), 1),
}
"""What is killed: words of its command line, and how often. Without words, what keeps all."""
NOTIFY = "import sys; from webhook import save_webhook; save_webhook(sys.argv[1])"


class Soak:
    """One soak of a project.

    Args:
        folder: everything is made below it.
        seed: of all that is random.
        log: where each event is written, with the seconds since the beginning.
        project: a quick project in `folder` that nothing was run in; None makes it.
    """

    def __init__(self, folder: Path, seed: int, log: Path, project: Project | None = None) -> None:
        self.chance = random.Random(seed)
        self.log_path = log
        self.counts: Counter[str] = Counter()
        self.project = project or make_quick_project(folder)
        (self.root / "inbox").mkdir()
        self.sender = Sender(folder / "made", self.root / "inbox", self.chance)
        self.promoted: str | None = None
        proxy = f"http://127.0.0.1:{free_port()}"  # nobody is there
        self.project.environment |= {
            **dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), proxy),
            "FULLSCALE_MLFLOW_PORT": str(free_port()),
            "FULLSCALE_PREFECT_PORT": str(free_port()),
            "FULLSCALE_WATCH_INTERVAL_S": "30",
            "FULLSCALE_RETRAIN_CRON": "*/10 * * * *",
            "FULLSCALE_NOTIFY": "custom-webhook/team",
            "PYTHONPATH": str(self.root),
        }
        self.head = self._own_checkout()
        self.services = RunningServices(self.project)
        self.services.log_path = folder / "services.log"
        self.started_s = time.monotonic()

    @property
    def root(self) -> Path:
        """The project, where it is now."""
        return self.project.root

    def say(self, kind: str, what: str) -> None:
        """Write down an event."""
        line = f"{time.monotonic() - self.started_s:7.1f} {kind}: {what}"
        print(line, flush=True)
        with self.log_path.open("a") as log:
            log.write(line + "\n")

    def run(
        self, duration_s: float, kill_every_s: float = KILL_EVERY_S, kinds: Sequence[str] = ()
    ) -> dict[str, object]:
        """Let scans land and processes die for some time, wait for rest, and verify.

        Args:
            duration_s: how long scans land.
            kill_every_s: how long a process lives on average until the next one is killed; where
                a machine needs longer than that for a flow, nothing gets done.
            kinds: of deliveries, which come at once; none lets chance decide on kinds and times.
        """
        with open_receiver() as receiver, self._services(receiver.url):
            settings = self._change_settings()
            for kind in kinds:
                self._send(kind)
            self._disturb(duration_s, kill_every_s, is_more_sent=not kinds)
            self.say("rest", "no more scans, no more kills")
            self.sender.wait()
            sent = [asdict(each) for each in self.sender.sent]
            (self.root.parent / "sent.json").write_text(json.dumps(sent, indent=1))
            why = self._await_rest(receiver.received)
            self.say("rest", why or "everything has come to its end")
            assert not why, why
            assert wait_until(lambda: not self._orphans(), 10, pause_s=1), self._orphans()
            summary = verify(self, receiver.received)
            assert self._read_settings() == settings, "no setting of a person was changed"
        left = processes_in(self.root)
        assert not left, f"left after the services ended: {left}"
        assert self._own_checkout() == self.head
        summary = {"disturbed for s": round(duration_s), **self.counts, **summary}
        self.say("summary", json.dumps(summary))
        return summary

    @contextmanager
    def _services(self, webhook: str) -> Iterator[None]:
        self.services.start()
        self.started_s = time.monotonic()
        try:
            here = {
                "PYTHONPATH": str(Path(__file__).parent),
                "PREFECT_API_URL": f"{self.services.prefect_url}/api",
            }
            subprocess.run(
                [sys.executable, "-c", NOTIFY, webhook],
                cwd=self.root,
                env=stage_environment(self.project.environment | here),
                check=True,
            )
            yield
            self.services.stop()
        finally:
            self.services.kill_left()

    def _send(self, kind: str | None = None) -> None:
        what = self.sender.send(kind)
        self.counts["pairs sent"] += 1
        self.say("sent", what)

    def _disturb(self, duration_s: float, kill_every_s: float, *, is_more_sent: bool) -> None:
        end_s = time.monotonic() + duration_s
        next_arrival_s, next_kill_s = time.monotonic(), time.monotonic() + kill_every_s
        next_action_s = time.monotonic() + PERSON_EVERY_S
        while time.monotonic() < end_s:
            if is_more_sent and time.monotonic() >= next_arrival_s:
                self._send()
                next_arrival_s = time.monotonic() + self.chance.uniform(*ARRIVAL_S)
            if time.monotonic() >= next_kill_s:
                self._kill()
                next_kill_s = time.monotonic() + kill_every_s * self.chance.uniform(0.5, 1.5)
            if time.monotonic() >= next_action_s:
                self._act()
                next_action_s = time.monotonic() + PERSON_EVERY_S * self.chance.uniform(0.5, 1.5)
            time.sleep(0.5)

    def _kill(self) -> None:
        """SIGKILL to one of the processes that are there."""
        found = {
            kind: [process for words in all_words for process in self.services.find(words)]
            for kind, (all_words, _) in TARGETS.items()
        }
        found["all services"] = [psutil.Process(self.services.process.pid)]
        present = [kind for kind, processes in found.items() if processes]
        kind = self.chance.choices(present, [TARGETS[kind][1] for kind in present])[0]
        victim = self.chance.choice(sorted(found[kind], key=lambda process: process.pid))
        with suppress(psutil.NoSuchProcess):
            command = " ".join(victim.cmdline()[-4:])
            victim.kill()
            self.counts[f"killed: {kind}"] += 1
            self.say("killed", f"{kind} ({command})")
        if kind == "all services":
            self.services.process.wait()
            assert wait_until(lambda: not self.services.has_ports(), 120)
            self._start_again("after a kill")

    def _change_settings(self) -> object:
        """Pause a deployment and change a schedule, as a person does in Prefect's pages."""
        self.services.pause("reproduce")
        check = self.services.deployment("promote-check")
        path = f"deployments/{check['id']}/schedules/{check['schedules'][0]['id']}"
        self.services.patch(path, {"schedule": {"cron": PERSONS_CRON, "timezone": "UTC"}})
        return self._read_settings()

    def _read_settings(self) -> object:
        (schedule,) = self.services.deployment("promote-check")["schedules"]
        return self.services.deployment("reproduce")["paused"], schedule["schedule"]["cron"]

    def _act(self) -> None:
        """Do what a person does now and then."""
        action = self.chance.choices(list(ACTIONS), list(ACTIONS.values()))[0]
        {"promote": self._promote, "move": self._move, "copy": self._copy}[action]()

    def _promote(self) -> None:
        """Make any version champion, an earlier one too."""
        try:
            client, _ = connect(Store(self.services.mlflow_url))
            versions = [each.version for each in client.search_model_versions(f"name = '{MODEL}'")]
            if not versions:
                return
            chosen = str(self.chance.choice(sorted(versions)))
            client.set_registered_model_alias(MODEL, CHAMPION, chosen)
        except (MlflowException, UnreachableError) as error:  # its server is killed now and then
            self.say("not promoted", str(error)[:80])
            self.promoted = None
            return
        self.promoted = chosen
        self.counts["promoted"] += 1
        self.say("promoted", f"version {chosen}")

    def _move(self) -> None:
        """Stop, move the project, and go on in the new folder."""
        self._stop_for_a_person()
        self.counts["moved"] += 1
        folder = self.root.with_name(f"project-{self.counts['moved']}")
        self.project.root = self.root.rename(folder)
        self.project.environment["PYTHONPATH"] = str(self.root)
        self.sender.inbox = self.root / "inbox"
        self._start_again(f"in {folder.name}")

    def _copy(self) -> None:
        """Stop, copy the project, go on, and make room in the copy: the original stays whole."""
        self._stop_for_a_person()
        self.counts["copied"] += 1
        copy = self.root.with_name(f"copy-{self.counts['copied']}")
        shutil.copytree(self.root, copy, symlinks=True)
        self._start_again(f"beside {copy.name}")
        command = ["fullscale", "gc", "--yes", "--keep-versions", "1"]
        here = self.project.environment | {"PYTHONPATH": str(copy)}
        done = subprocess.run(
            command, cwd=copy, env=here, capture_output=True, text=True, check=True
        )
        self.say("made room", done.stdout.splitlines()[-1])

    def _stop_for_a_person(self) -> None:
        self.sender.wait()
        assert self.services.stop(timeout_s=120) == []

    def _start_again(self, where: str) -> None:
        """Start the services, and keep what they printed before."""
        kept = self.services.log()
        self.services.start()
        self.say("started", f"all services {where}")
        with self.services.log_path.with_name("services-before.log").open("a") as log:
            log.write(kept)

    def _await_rest(self, received: list[dict]) -> str:
        """Wait until there is nothing left to do; says what is, if that takes too long."""
        wait_until(lambda: self._unrest(received) == "", LONGEST_REST_S, pause_s=3)
        return self._unrest(received)

    def _unrest(self, received: list[dict]) -> str:
        """Return what is still to be done; empty at rest."""
        waiting = {sent.path for sent in self.sender.sent if sent.expected == WAITING}
        inbox = self.root / "inbox"
        lying = {str(path.relative_to(inbox)) for path in inbox.glob("*sTr/*")}
        if lying != waiting:
            return f"not sorted: {sorted(lying ^ waiting)}"
        if find_unannounced(self.root) or list_pending(self.root):
            return "a data version or a retraining was not told of"
        branch = newest_branch(self.root)
        tip = find_commit(self.root, f"refs/heads/{SCANS_BRANCH}")
        newest = tip and committed_data_version(self.root, tip)
        if branch is None or branch_versions(self.root)[branch] != newest:
            return f"data version {newest} is not trained on"
        texts = "\n".join(message["text"] for message in received)
        if untold := [b for b in branch_versions(self.root) if f"Branch: {b}\n" not in texts]:
            return f"no message of {untold}"
        return ""

    def _orphans(self) -> dict[int, str]:
        """Processes that work in the project, and that the services do not know."""
        inside = processes_in(self.root)
        known = {process.pid for process in self.services.processes()}
        strange = set(inside) - known - {self.services.process.pid}
        return {pid: inside[pid] for pid in strange}

    def _own_checkout(self) -> tuple[str, str]:
        """Return what a person sees of the project's own checkout."""
        return git(self.root, "rev-parse", "HEAD"), git(self.root, "status", "--porcelain")


def main() -> None:
    """Run a soak, and print its summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--kill-every-s", type=float, default=KILL_EVERY_S)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--log", type=Path, default=Path(tempfile.gettempdir()) / "soak.log")
    parser.add_argument("--folder", type=Path, help="keep everything there")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    args.log.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        Soak(folder.resolve(), args.seed, args.log.resolve()).run(
            60 * args.minutes, args.kill_every_s
        )


if __name__ == "__main__":
    main()
