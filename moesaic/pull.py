"""Download of checkpoints from the Hugging Face hub, or of a .tar archive from an http(s) URL.

Downloads are resumed, verified, and unpacked safely. This module does not depend on the contents of a checkpoint;
they are checked when the checkpoint is opened.

Resuming follows RFC 9110 (Range, If-Range). Checksums in headers follow RFC 9530 and its predecessor RFC 3230.
"""

from __future__ import annotations

import base64
import binascii
import fcntl
import glob
import hashlib
import http.client
import json
import os
import re
import secrets
import shutil
import tarfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.message import Message
from pathlib import Path, PurePosixPath
from typing import IO, Any

from moesaic.errors import DownloadError, InvalidParameter
from moesaic.hub_access import first_line, hub_errors
from moesaic.hub_files import ALWAYS, WEIGHTS, HubName, select

Progress = Callable[[int, int], None]
"""Callback with (bytes received, total bytes); the total is 0 if unknown."""

CHUNK_BYTES = 1 << 20
TIMEOUT_SECONDS = 60.0  # without receiving a byte
SHA256 = re.compile(r"[0-9a-f]{64}")
MAX_MEMBERS = 10_000


def pull(
    source: str, dest: Path | str | None = None, *, sha256: str | None = None, progress: Progress | None = None
) -> Path:
    """Download ``source`` and return the folder that contains it, or the GGUF file (of a split model, the first).

    The folder appears only when the download is complete. After an error, the received bytes are kept, and the next
    call resumes the download.

    Args:
        source: ``org/name[@revision][:choice]`` on the hub (see ``hub_files``), or the http(s) URL of a .tar, .tar.gz
            or .tgz file, optionally with ``#sha256=...``.
        dest: the folder to create; by default a folder in the cache, which is reused if it exists.
        sha256: expected SHA-256 digest of the archive, in hexadecimal.
        progress: called as bytes arrive.

    Raises:
        InvalidParameter: ``source`` is neither form or does not choose one of several GGUF models, ``dest`` is not
            empty, or ``sha256`` is not a digest.
        NotFound: the hub has no such repository or revision.
        DownloadError: the download failed, or the file is damaged.
    """
    target = None if dest is None else Path(dest)
    if source.startswith(("http://", "https://")):
        return _download_archive(source, target, sha256, progress)
    name = HubName.parse(source)
    if name is None:
        raise InvalidParameter("source", f"{source!r} is neither org/name[@revision][:choice] nor an http(s) URL")
    if sha256 is not None:
        raise InvalidParameter("sha256", "applies to archives only: the hub has its own checksums; leave it out")
    return _download_from_hub(name, target, progress)


# The hub


def _download_from_hub(name: HubName, dest: Path | None, progress: Progress | None) -> Path:
    """Download the required files of a hub repository; without a connection, use a complete copy in the cache."""
    from huggingface_hub import HfApi, errors, snapshot_download

    http_error = errors.HTTPError  # type: ignore[attr-defined]  # the class depends on the HTTP client of the version
    repository, revision = name.repository, name.revision
    with hub_errors(name):
        try:
            offered = HfApi().list_repo_files(repository, revision=revision)
        except errors.HfHubHTTPError:
            raise
        except (http_error, OSError):  # no connection
            return _cached(name, dest)
        selection = select(name, offered)
        bar = None if progress is None else _progress_bar(progress)
        patterns = [glob.escape(file) for file in selection.files]
        folder = Path(
            snapshot_download(repository, revision=revision, local_dir=dest, allow_patterns=patterns, tqdm_class=bar)
        )
        return folder / selection.opened if selection.opened else folder


def _cached(name: HubName, dest: Path | None) -> Path:
    """Return the folder or GGUF file of an earlier download that has all files of the model, or raise DownloadError."""
    from huggingface_hub import errors, snapshot_download

    # The hub's library refuses a folder that lacks files which match the patterns. No file matches the last, empty
    # ones: of several GGUF models, one may be complete.
    for patterns in (*([*ALWAYS, *weights] for weights in WEIGHTS), []):
        try:
            place = snapshot_download(
                name.repository, revision=name.revision, local_dir=dest, allow_patterns=patterns, local_files_only=True
            )
            folder = Path(place)
            selection = select(name, [file.relative_to(folder).as_posix() for file in folder.rglob("*")])
        except (errors.LocalEntryNotFoundError, DownloadError, InvalidParameter):
            continue
        if selection.opened:
            return folder / selection.opened
        if patterns:
            return folder
    raise DownloadError(f"{name.repository}: the hub cannot be reached, and the model is not in the cache")


def _progress_bar(progress: Progress) -> type[Any]:
    """Return a replacement for the hub's progress bar class that reports bytes to ``progress``."""
    import tqdm  # type: ignore[import-untyped]

    seen: dict[int, tuple[int, int]] = {}

    class Bar(tqdm.tqdm):  # type: ignore[misc]
        monitor_interval = 0

        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("name", None)
            super().__init__(*args, **{**options, "disable": False, "file": _NullStream()})

        def update(self, n: float | None = 1) -> bool | None:
            shown: bool | None = super().update(n)
            if self.unit == "B":  # newer versions of the hub client count received and written bytes in separate bars
                seen[id(self)] = (int(self.n), int(self.total or 0))
                progress(max(n for n, _ in seen.values()), max(total for _, total in seen.values()))
            return shown

    return Bar


class _NullStream:
    """Stream that discards the output of a progress bar."""

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        """Do nothing."""


# An archive


def _download_archive(address: str, dest: Path | None, sha256: str | None, progress: Progress | None) -> Path:
    url, expected = _split_digest(address, sha256)
    name = PurePosixPath(urllib.parse.unquote(urllib.parse.urlsplit(url).path)).name
    stem = re.sub(r"\.(tar(\.gz)?|tgz)$", "", name)
    if stem == name or not stem or stem in (".", ".."):
        raise InvalidParameter("source", f"{url} is not the URL of a .tar, .tar.gz or .tgz file")
    target = dest or cache_folder() / f"{stem}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        if dest is None:
            return target
        raise InvalidParameter("dest", f"{target} already exists and is not empty; choose a new folder")
    part = target.parent / f"{name}.part"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _open_exclusively(part) as file:
            stated = _fetch(url, part, file, progress)
            _verify(url, part, expected or stated)
            _unpack(url, part, target)
            part.unlink()
            _state_file(part).unlink(missing_ok=True)
    except (OSError, http.client.HTTPException) as error:
        hint = "; run it again to resume the download" if part.exists() else ""
        raise DownloadError(f"{url}: {first_line(error)}{hint}") from error
    return target


def _split_digest(address: str, sha256: str | None) -> tuple[str, str | None]:
    """Return the URL in ``address`` without its fragment, and the digest in the fragment or in ``sha256``, if any."""
    url, fragment = urllib.parse.urldefrag(address)
    digests = {value.lower() for value in (sha256, fragment.removeprefix("sha256=")) if value}
    if len(digests) > 1 or not all(SHA256.fullmatch(value) for value in digests):
        raise InvalidParameter(
            "sha256", f"{' and '.join(sorted(digests))}: expected one digest of 64 hexadecimal digits"
        )
    return url, next(iter(digests), None)


def cache_folder() -> Path:
    """Return Moesaic's cache folder, by the XDG base directory specification."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moesaic"


@contextmanager
def _open_exclusively(part: Path) -> Iterator[IO[bytes]]:
    """Open the partial download ``part`` for appending, and hold an exclusive lock on it."""
    with part.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DownloadError(f"{part} is being written by another process: wait until it is done") from error
        yield file


@dataclass(frozen=True)
class _ResponseInfo:
    """What the headers of a download's response say."""

    start: int
    """Offset of the first byte that the server sends."""
    total: int
    """Size of the whole file; 0 if unknown."""
    validator: str
    """ETag or date that identifies the version of the file, for If-Range; empty if there is none."""
    sha256: str | None
    """Digest of the whole file; None if unknown."""


def _state_file(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _fetch(url: str, part: Path, file: IO[bytes], progress: Progress | None) -> str | None:
    """Append the missing bytes of ``url`` to the partial download ``part``; return the server's digest, if any."""
    size = file.seek(0, os.SEEK_END)
    validator = _validator(url, part) if size else ""
    headers = {"Accept-Encoding": "identity", "User-Agent": "moesaic"}
    if validator:
        headers |= {"Range": f"bytes={size}-", "If-Range": validator}
    request = urllib.request.Request(url, headers=headers)
    try:
        response = _opener().open(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and validator:  # the part is complete, or it belongs to another file
            if error.headers.get("Content-Range") == f"bytes */{size}":
                return _digest(error.headers)
            file.truncate(0)
            return _fetch(url, part, file, progress)
        raise DownloadError(f"{url}: the server responded {error.code} {error.reason}") from error
    with response:
        info = _response_info(url, response, size)
        file.truncate(info.start)
        _state_file(part).write_text(json.dumps({"url": url, "validator": info.validator}))
        free = shutil.disk_usage(part.parent).free
        if info.total - info.start > free:
            raise DownloadError(f"{url}: requires {info.total - info.start} bytes, but the disk has {free} free")
        _receive(response, file, info, progress)
    size = file.tell()
    if info.total and size != info.total:
        raise DownloadError(f"{url}: ended after {size} of {info.total} bytes; run it again to resume the download")
    return info.sha256


def _validator(url: str, part: Path) -> str:
    """Return the ETag or date of the file version that ``part`` is the beginning of; empty if it is unknown."""
    try:
        state = json.loads(_state_file(part).read_text())
        return str(state["validator"]) if state["url"] == url else ""
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _response_info(url: str, response: http.client.HTTPResponse, size: int) -> _ResponseInfo:
    """Return what the headers say; raise DownloadError if they contradict a request for the bytes from ``size`` on."""
    headers = response.headers
    etag = headers.get("ETag", "")
    validator = headers.get("Last-Modified", "") if not etag or etag.startswith("W/") else etag
    if response.status == 206:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", ""))
        if not match or int(match[1]) != size:
            raise DownloadError(f"{url}: the server sent other bytes of the file than requested: use another URL")
        return _ResponseInfo(size, int(match[2]) if match[2] != "*" else 0, validator, _digest(headers))
    length = headers.get("Content-Length", "")
    return _ResponseInfo(0, int(length) if length.isdecimal() else 0, validator, _digest(headers))


def _digest(headers: Message) -> str | None:
    """Return the SHA-256 digest of the whole file from the headers, in hexadecimal."""
    plain = headers.get("X-Checksum-Sha256", "").lower()
    if SHA256.fullmatch(plain):
        return plain
    for name in ("Repr-Digest", "Digest"):
        if match := re.search(r"sha-256=:?([A-Za-z0-9+/=]{44})", headers.get(name, ""), re.IGNORECASE):
            try:
                return base64.b64decode(match[1], validate=True).hex()
            except binascii.Error:
                return None
    return None


def _receive(
    response: http.client.HTTPResponse, file: IO[bytes], info: _ResponseInfo, progress: Progress | None
) -> None:
    """Append the body of ``response`` to ``file``; received bytes are written even if the connection breaks."""
    done = info.start
    try:
        while data := response.read1(CHUNK_BYTES):
            file.write(data)
            done += len(data)
            if progress is not None:
                progress(done, info.total)
    finally:
        file.flush()


class _Redirect(urllib.request.HTTPRedirectHandler):
    """Redirect handler that refuses redirects from https to http, because http is not protected."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> Any:
        if not newurl.startswith(("http://", "https://") if req.type == "http" else "https://"):
            raise DownloadError(f"{req.full_url}: redirects to {newurl}, which is not safe: use another URL")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> urllib.request.OpenerDirector:
    """Return an opener that supports only http and https."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
        _Redirect,
    ):
        opener.add_handler(handler())
    return opener


def _verify(url: str, part: Path, digest: str | None) -> None:
    """Raise DownloadError if ``part`` has another SHA-256 digest; delete it then: resuming would not repair it."""
    if digest is None:
        return
    with part.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != digest:
        part.unlink()
        raise DownloadError(f"{url}: arrived damaged: expected sha256 {digest}, got {actual}; run it again")


def _unpack(url: str, part: Path, target: Path) -> None:
    """Unpack the archive ``part`` beside ``target``, then rename the result to ``target``.

    If the archive has a single top folder, that folder becomes ``target``.
    """
    staging = target.parent / f".{target.name}.{secrets.token_hex(4)}.part"
    try:
        staging.mkdir()
        with tarfile.open(part, "r:*") as archive:
            for count, member in enumerate(archive):
                if count >= MAX_MEMBERS:
                    raise DownloadError(f"{url}: contains more than {MAX_MEMBERS} files: it is not a checkpoint")
                _extract(url, archive, member, staging)
        entries = list(staging.iterdir())
        if not entries:
            raise DownloadError(f"{url}: the archive is empty")
        (entries[0] if len(entries) == 1 and entries[0].is_dir() else staging).rename(target)
    except (tarfile.TarError, EOFError) as error:
        raise DownloadError(f"{url}: not a tar archive, or the archive is damaged") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _extract(url: str, archive: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    """Write one member of the archive below ``folder``, without its mode, owner and time."""
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts or "\\" in member.name or "\0" in member.name:
        raise DownloadError(f"{url}: refused: the archive would write {member.name!r}, which is outside of the folder")
    if member.isdir():
        (folder / path).mkdir(parents=True, exist_ok=True)
        return
    if not member.isreg():
        raise DownloadError(f"{url}: refused: {member.name!r} in the archive is a link or a device, not a file")
    if member.size > shutil.disk_usage(folder).free:
        raise DownloadError(f"{url}: {member.name} requires {member.size} bytes, more than the free disk space")
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    data = archive.extractfile(member)
    assert data is not None
    with data, (folder / path).open("xb") as file:
        shutil.copyfileobj(data, file, CHUNK_BYTES)
