"""Job stores. Each file in this folder without a leading ``_`` is one kind of store.

Such a file defines ``async def open_store(address: str, limits: StoreLimits) -> Store``; it returns a ``jobs.Store``.
It raises:

* StoreError: the location could lose jobs, or the store is damaged or has another schema version;
* Unavailable: another process uses the store, or it is unreachable;
* NotInstalled: a package is missing.

``_operations`` and ``_queries`` contain the operations of all stores; a store's file only runs them on its database.
"""

from __future__ import annotations

from typing import cast

from moesaic import registry
from moesaic.cluster.jobs import Store, StoreLimits
from moesaic.errors import InvalidParameter

FOLDER = "cluster/store"
SCHEMES = {"": "sqlite", "postgres": "postgres", "postgresql": "postgres"}
"""The name of the store's file by URL scheme. An address without a scheme is the path of an SQLite file."""


async def open_store(address: str, limits: StoreLimits) -> Store:
    """Open a job store. A path is an SQLite file, ``postgresql://...`` is a PostgreSQL database.

    Raises:
        InvalidParameter: the address is neither.
        StoreError: the location could lose jobs, or the store is damaged or has another schema version.
        Unavailable: another process uses the store, or it is unreachable.
        NotInstalled: a package is missing.
    """
    scheme, separator, _ = address.partition("://")
    name = SCHEMES.get(scheme if separator else "")
    if name is None or not address:
        raise InvalidParameter("store", "the address is neither a path nor a postgresql:// URL")
    return cast(Store, await registry.load(FOLDER, name).open_store(address, limits))
