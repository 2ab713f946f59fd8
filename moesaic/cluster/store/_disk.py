"""Where a file of jobs may lie: with nobody else on it, and on a disk of this machine.

Knows files, locks and mounts. Does not know what is in the file.
"""

from __future__ import annotations

import os
from pathlib import Path

from moesaic.errors import StoreError, Unavailable

NETWORK_FILE_SYSTEMS = frozenset(
    "nfs nfs4 cifs smb smb2 smb3 smbfs ncpfs 9p afs ceph lustre glusterfs fuse.glusterfs fuse.sshfs fuse.s3fs "
    "fuse.gcsfuse fuse.rclone fuse.ceph fuse.juicefs fuse.davfs davfs beegfs gpfs orangefs pvfs2 coda".split()
)
"""File systems whose locks and flushes are not to be relied upon (https://sqlite.org/howtocorrupt.html, 2.1, 3.1)."""


def file_system_type(device: int, mounts: str) -> str:
    """Return the kind of file system that a device has, or "" if it cannot be told.

    Args:
        device: as ``os.stat`` says it.
        mounts: text of /proc/self/mountinfo (proc_pid_mountinfo(5)).
    """
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in mounts.splitlines():
        fields = line.split()
        if len(fields) > 6 and fields[2] == wanted and "-" in fields[6:]:
            return fields[fields.index("-", 6) + 1]
    return ""


def refuse_network_disk(path: Path, mounts: Path = Path("/proc/self/mountinfo")) -> None:
    """Raise StoreError where ``path`` lies on a file system of the network, as far as this system tells."""
    if mounts.exists():
        found = file_system_type(path.stat().st_dev, mounts.read_text(errors="replace"))
        if found in NETWORK_FILE_SYSTEMS:
            raise StoreError(f"{path} lies on {found}, where jobs are not safe: put it on a disk of this machine")


class FileLock:
    """A lock file beside the file of jobs: its holder is the only one, and it is free once its holder is gone."""

    def __init__(self, path: Path) -> None:
        """Take it.

        Raises:
            Unavailable: somebody else has it.
        """
        import fcntl

        name = path.with_name(f"{path.name}.lock")
        self._file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._file)
            raise Unavailable(
                f"{path} is in use by another gateway: stop it, or let several share a PostgreSQL"
            ) from error

    def release(self) -> None:
        """Give it back. The file stays: were it removed, two could lock two files of this name."""
        os.close(self._file)
