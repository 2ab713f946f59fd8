"""A temporary PostgreSQL server. Its data and its Unix socket are in a temporary folder."""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

import asyncpg

ROOT = os.geteuid() == 0


def binaries() -> Path | None:
    """Return the folder with the programs of the newest PostgreSQL on this machine; None if none is installed."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    return programs[-1].parent if programs else None


class PostgresServer:
    """A running PostgreSQL server. If this process is root, the server runs as the user ``postgres``."""

    def __init__(self, parent: Path | None = None) -> None:
        """Create a database cluster and start the server.

        Args:
            parent: folder in which the server's folder is created; None means the usual temporary folder.

        Raises:
            FileNotFoundError: PostgreSQL is not installed.
        """
        folder = binaries()
        if folder is None:
            raise FileNotFoundError("PostgreSQL is not installed: apt-get install postgresql")
        self._programs = folder
        self.folder = Path(tempfile.mkdtemp(prefix="jobs-postgres-", dir=parent))
        self._data = self.folder / "data"
        if ROOT:
            user = pwd.getpwnam("postgres")
            os.chown(self.folder, user.pw_uid, user.pw_gid)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._run("initdb", "-D", str(self._data), "-U", "tests", "-A", "trust", "-E", "UTF8", "--locale=C")
        with (self._data / "postgresql.conf").open("a") as settings:
            settings.write(f"listen_addresses = ''\nunix_socket_directories = '{self.folder}'\nport = {self.port}\n")
            settings.write("recovery_init_sync_method = syncfs\n")  # the default reads the whole folder at a restart
        self.start()

    def _run(self, program: str, *arguments: str) -> None:
        become = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if ROOT else []
        command = [*become, str(self._programs / program), *arguments]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr

    def start(self) -> None:
        """Start the server and wait until it accepts connections."""
        self._run("pg_ctl", "start", "-w", "-D", str(self._data), "-l", str(self.folder / "log"))

    def stop(self, mode: str = "immediate") -> None:
        """Stop the server. ``mode`` is the shutdown mode of ``pg_ctl``; "immediate" has the effect of a kill."""
        self._run("pg_ctl", "stop", "-w", "-D", str(self._data), "-m", mode)

    def remove(self) -> None:
        """Stop the server and delete its folder."""
        self.stop()
        shutil.rmtree(self.folder)

    def address(self, database: str) -> str:
        """Return the connection URL of a database."""
        return f"postgresql://tests@/{database}?host={self.folder}&port={self.port}"

    def sql(self, statement: str, database: str = "postgres") -> list[asyncpg.Record]:
        """Run an SQL statement over a new connection; return its rows."""

        async def run() -> list[asyncpg.Record]:
            connection = await asyncpg.connect(self.address(database))
            try:
                rows: list[asyncpg.Record] = await connection.fetch(statement)
                return rows
            finally:
                await connection.close()

        return asyncio.run(run())
