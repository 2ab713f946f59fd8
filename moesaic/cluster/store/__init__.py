"""Where jobs are kept: the folder is the registry, one file = one store.

A store's file has ``async def open_store(address: str, limits: StoreLimits) -> Store``, whose store keeps what ``jobs.Store``
promises, and which raises:

* StoreError: jobs cannot be kept safely there, or what is there is damaged or of another version;
* Unavailable: somebody else has it, or it cannot be reached;
* NotInstalled: a package is missing.

``_operations`` and ``_queries`` have the operations, written once; a file says how its database runs them. The package
knows which addresses belong to which store.
"""

from __future__ import annotations

from typing import cast

from moesaic import registry
from moesaic.cluster.jobs import Store, StoreLimits
from moesaic.errors import InvalidParameter

FOLDER = "cluster/store"
SCHEMES = {"": "sqlite", "postgres": "postgres", "postgresql": "postgres"}
"""Which store has addresses of which scheme; those without one are paths."""


async def open_store(where: str, bounds: StoreLimits) -> Store:
    """Open the store that has an address: a path is SQLite's, ``postgresql://...`` is PostgreSQL's.

    Raises:
        InvalidParameter: an address of neither kind.
        StoreError, Unavailable, NotInstalled: see above.
    """
    scheme, mark, _ = where.partition("://")
    name = SCHEMES.get(scheme if mark else "")
    if name is None or not where:
        raise InvalidParameter("store", "is neither a path nor a postgresql:// address")
    return cast(Store, await registry.load(FOLDER, name).open_store(where, bounds))
