"""PostgreSQL for the tests: a temporary server, and databases on it."""

from __future__ import annotations

from benchmarks.postgres_server import PostgresServer, binaries
from tests.support.folders import memory_parent
from tests.support.require import require
from tests.support.stores import BaseLocation


class Server(PostgresServer):
    """A temporary PostgreSQL server; skips the test if PostgreSQL is not installed."""

    def __init__(self) -> None:
        require(binaries(), "PostgreSQL is not installed (apt-get install postgresql)")
        super().__init__(memory_parent())


class Database(BaseLocation):
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
