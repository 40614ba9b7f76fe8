"""A real PostgreSQL and an S3 endpoint on this machine, for tests of a team's servers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import boto3
import psycopg2
from botocore.exceptions import EndpointConnectionError
from running_services import free_port
from watching import wait_until

PASSWORD = "a database password/%"  # noqa: S105 - with what an address has to escape
QUOTED = "a%20database%20password%2F%25"


def postgres_programs() -> Path:
    """Return the program folder of the newest PostgreSQL from Debian."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))
    assert found, "no PostgreSQL; apt-get install postgresql"
    return found[-1].parent


class Postgres:
    """A PostgreSQL cluster with a password, in a temporary folder."""

    def __init__(self) -> None:
        self.port = free_port()
        # Not below pytest's own folder, which the user postgres may not enter.
        self.folder = Path(tempfile.mkdtemp(prefix="fullscale-postgres-"))
        self._user = "postgres" if os.geteuid() == 0 else None
        if self._user:
            shutil.chown(self.folder, self._user, self._user)

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(postgres_programs() / program), *arguments]
        # The server keeps the output open, so a pipe would never end.
        with (self.folder.parent / f"{self.folder.name}.log").open("ab") as log:
            done = subprocess.run(
                command,
                cwd="/",
                user=self._user,
                group=self._user,
                extra_groups=[] if self._user else None,
                stdout=log,
                stderr=log,
                timeout=120,
                check=False,
            )
        assert done.returncode == 0, Path(log.name).read_text()

    def start(self) -> None:
        """Create and start the cluster, with two databases."""
        secret = self.folder / "password"
        secret.write_text(PASSWORD)
        if self._user:
            shutil.chown(secret, self._user)
        data = str(self.folder / "data")
        self._run(
            "initdb", "-D", data, "-U", "team", "-A", "scram-sha-256", f"--pwfile={secret}", "-N"
        )
        options = f"-p {self.port} -k {self.folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        self._run("pg_ctl", "-D", data, "-w", "-o", options, "start")
        connection = self.connect("postgres")
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute("CREATE DATABASE mlflow")
            cursor.execute("CREATE DATABASE prefect")
        connection.close()

    def connect(self, database: str):
        """Open a connection to a database."""
        return psycopg2.connect(
            host="127.0.0.1", port=self.port, user="team", password=PASSWORD, dbname=database
        )

    def count(self, database: str, table: str) -> int:
        """Return the number of rows of a table."""
        connection = self.connect(database)
        with connection.cursor() as cursor:
            cursor.execute(f"SELECT count(*) FROM {table}")  # noqa: S608 - names from tests
            (number,) = cursor.fetchone()
        connection.close()
        return number

    def url(self, database: str, driver: str = "postgresql") -> str:
        """Return the URL of a database, with user and password."""
        return f"{driver}://team:{QUOTED}@127.0.0.1:{self.port}/{database}"

    def stop(self) -> None:
        """Stop the cluster and remove its folder."""
        self._run("pg_ctl", "-D", str(self.folder / "data"), "-m", "immediate", "stop")
        shutil.rmtree(self.folder)
        self.folder.with_name(self.folder.name + ".log").unlink()


class ObjectStore:
    """An S3 endpoint with one bucket, in memory."""

    def __init__(self, bucket: str) -> None:
        port = free_port()
        self.bucket = bucket
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "team",
            "AWS_SECRET_ACCESS_KEY": "an access key",
            "AWS_DEFAULT_REGION": "eu-central-1",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.client = boto3.client(
            "s3",
            endpoint_url=self.environment["AWS_ENDPOINT_URL"],
            aws_access_key_id="team",
            aws_secret_access_key="an access key",  # noqa: S106 - known to this test alone
            region_name="eu-central-1",
        )
        assert wait_until(self._has_bucket, 60), "moto's server did not start"

    def _has_bucket(self) -> bool:
        try:
            self.client.create_bucket(
                Bucket=self.bucket,
                CreateBucketConfiguration={"LocationConstraint": "eu-central-1"},
            )
        except EndpointConnectionError:
            return False
        return True

    def keys(self, prefix: str) -> list[str]:
        """Return the names of the objects below a prefix."""
        answer = self.client.list_objects_v2(Bucket=self.bucket, Prefix=prefix)
        return [item["Key"] for item in answer.get("Contents", [])]

    def stop(self) -> None:
        """Stop the endpoint; its content is lost."""
        self.process.kill()
        self.process.wait()
