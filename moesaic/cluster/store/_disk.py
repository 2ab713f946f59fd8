"""Checks of an SQLite file's location: only one process uses the file, and it is on a local disk.

This module does not depend on the content of the file.
"""

from __future__ import annotations

import os
from pathlib import Path

from moesaic.errors import StoreError, Unavailable

NETWORK_FILE_SYSTEMS = frozenset(
    "nfs nfs4 cifs smb smb2 smb3 smbfs ncpfs 9p afs ceph lustre glusterfs fuse.glusterfs fuse.sshfs fuse.s3fs "
    "fuse.gcsfuse fuse.rclone fuse.ceph fuse.juicefs fuse.davfs davfs beegfs gpfs orangefs pvfs2 coda".split()
)
"""File systems whose locks and flushes are unreliable (https://sqlite.org/howtocorrupt.html, 2.1, 3.1)."""


def file_system_type(device: int, mounts: str) -> str:
    """Return the type of the file system on a device, such as "ext4"; "" if it is unknown.

    Args:
        device: the device number from ``os.stat``.
        mounts: text of /proc/self/mountinfo (proc_pid_mountinfo(5)).
    """
    device_number = f"{os.major(device)}:{os.minor(device)}"
    for line in mounts.splitlines():
        fields = line.split()
        if len(fields) > 6 and fields[2] == device_number and "-" in fields[6:]:
            return fields[fields.index("-", 6) + 1]
    return ""


def refuse_network_disk(path: Path, mounts: Path = Path("/proc/self/mountinfo")) -> None:
    """Raise StoreError if ``path`` is on a network file system. If the file ``mounts`` is missing, check nothing."""
    if mounts.exists():
        kind = file_system_type(path.stat().st_dev, mounts.read_text(errors="replace"))
        if kind in NETWORK_FILE_SYSTEMS:
            raise StoreError(f"{path} is on the network file system {kind}, which can lose jobs: use a local disk")


class FileLock:
    """Exclusive lock on a file next to the store's file. The operating system releases it when the process exits."""

    def __init__(self, path: Path) -> None:
        """Acquire the lock of the store's file ``path``.

        Raises:
            Unavailable: another process holds the lock.
        """
        import fcntl

        name = path.with_name(f"{path.name}.lock")
        self._file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._file)
            raise Unavailable(
                f"{path} is in use by another gateway: stop it, or use PostgreSQL for several gateways"
            ) from error

    def release(self) -> None:
        """Release the lock. The lock file stays; otherwise two processes could lock two files of this name."""
        os.close(self._file)
