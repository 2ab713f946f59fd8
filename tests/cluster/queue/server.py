"""PostgreSQL for the tests: a temporary server, installed from Debian's packages if need be, and databases on it."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from benchmarks.postgres_server import ROOT, PostgresServer, binaries
from tests.cluster.queue.places import Places


def install() -> None:
    """Install PostgreSQL if it is missing; skip the test if that is not possible."""
    if binaries() is None and ROOT and shutil.which("apt-get"):
        for command in (["update"], ["install", "-y", "--no-install-recommends", "postgresql"]):
            environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
            subprocess.run(["apt-get", *command], env=environment, capture_output=True, check=False)
    if binaries() is None:
        pytest.skip("PostgreSQL is not installed, and cannot be installed from here: apt-get install postgresql")


class Server(PostgresServer):
    """A temporary PostgreSQL server; constructing one skips the test if PostgreSQL is not available."""

    def __init__(self) -> None:
        install()
        super().__init__()


class Database(Places):
    """A new, empty database of a server."""

    name = "postgres"
    _count = 0

    def __init__(self, server: Server) -> None:
        Database._count += 1
        self.database = f"jobs{Database._count}"
        self.server = server
        server.sql(f"CREATE DATABASE {self.database}")
        super().__init__(server.address(self.database))

    def close(self) -> None:
        super().close()
        self.server.sql(f"DROP DATABASE {self.database} WITH (FORCE)")
