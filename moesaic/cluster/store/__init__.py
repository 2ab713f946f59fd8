"""Job stores: the folder is the registry, one file is one store.

A store's file has ``async def open_store(address: str, limits: StoreLimits) -> Store``. The store implements
``jobs.Store``. ``open_store`` raises:

* StoreError: the place is not safe for jobs, or the store is damaged or of another version;
* Unavailable: another process uses the store, or it is unreachable;
* NotInstalled: a package is missing.

``_operations`` and ``_queries`` contain the operations once; a store's file only runs them on its database.
"""

from __future__ import annotations

from typing import cast

from moesaic import registry
from moesaic.cluster.jobs import Store, StoreLimits
from moesaic.errors import InvalidParameter

FOLDER = "cluster/store"
SCHEMES = {"": "sqlite", "postgres": "postgres", "postgresql": "postgres"}
"""Store by URL scheme; an address without a scheme is a path."""


async def open_store(address: str, limits: StoreLimits) -> Store:
    """Open a job store. A path is an SQLite file, ``postgresql://...`` is a PostgreSQL database.

    Raises:
        InvalidParameter: the address is neither.
        StoreError: the place is not safe for jobs, or the store is damaged or of another version.
        Unavailable: another process uses the store, or it is unreachable.
        NotInstalled: a package is missing.
    """
    scheme, separator, _ = address.partition("://")
    name = SCHEMES.get(scheme if separator else "")
    if name is None or not address:
        raise InvalidParameter("store", "is neither a path nor a postgresql:// address")
    return cast(Store, await registry.load(FOLDER, name).open_store(address, limits))
