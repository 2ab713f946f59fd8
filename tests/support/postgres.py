"""PostgreSQL server for tests: Debian's binaries, with a data folder and a socket of its own."""

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

from tests.support.require import require
from tests.support.stores import Places

ROOT = os.geteuid() == 0


def binaries() -> Path | None:
    """Return the folder of the newest installed server's binaries."""
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    return installed[-1].parent if installed else None


class Server:
    """Running server. Root starts it as the user ``postgres``, because PostgreSQL refuses to run as root."""

    def __init__(self) -> None:
        require(folder := binaries(), "PostgreSQL is not installed (apt-get install postgresql)")
        assert folder
        self._bin = folder
        self.folder = Path(tempfile.mkdtemp(prefix="jobs-postgres-"))
        self._data = self.folder / "data"
        if ROOT:
            user = pwd.getpwnam("postgres")
            os.chown(self.folder, user.pw_uid, user.pw_gid)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._do("initdb", "-D", str(self._data), "-U", "tests", "-A", "trust", "-E", "UTF8", "--locale=C")
        with (self._data / "postgresql.conf").open("a") as settings:
            settings.write(f"listen_addresses = ''\nunix_socket_directories = '{self.folder}'\nport = {self.port}\n")
            settings.write("recovery_init_sync_method = syncfs\n")  # otherwise every restart reads the whole folder
        self.start()

    def _do(self, program: str, *arguments: str) -> None:
        become = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if ROOT else []
        command = [*become, str(self._bin / program), *arguments]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr

    def start(self) -> None:
        self._do("pg_ctl", "start", "-w", "-D", str(self._data), "-l", str(self.folder / "log"))

    def stop(self, mode: str = "immediate") -> None:
        """Stop the server; the mode "immediate" is like a kill."""
        self._do("pg_ctl", "stop", "-w", "-D", str(self._data), "-m", mode)

    def remove(self) -> None:
        self.stop()
        shutil.rmtree(self.folder)

    def address(self, database: str) -> str:
        return f"postgresql://tests@/{database}?host={self.folder}&port={self.port}"

    def sql(self, statement: str, database: str = "postgres") -> list[asyncpg.Record]:
        """Run a statement on a connection of its own and return the rows."""

        async def run() -> list[asyncpg.Record]:
            connection = await asyncpg.connect(self.address(database))
            try:
                rows: list[asyncpg.Record] = await connection.fetch(statement)
                return rows
            finally:
                await connection.close()

        return asyncio.run(run())


class Database(Places):
    """Database on a test server."""

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
