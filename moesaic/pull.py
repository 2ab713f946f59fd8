"""Fetches a checkpoint: from the model hub, or from a plain http(s) address of a .tar.

Knows how to resume, to check what arrived, and to unpack it without trusting it. Does not know what a
checkpoint is: whoever opens the folder finds out.

Resuming follows RFC 9110 (Range, If-Range), checksums in headers RFC 9530 and its forerunner RFC 3230.
"""

from __future__ import annotations

import base64
import binascii
import fcntl
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from email.message import Message
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import IO, Any

from moesaic.errors import DownloadError, InvalidParameter, NotFound

Progress = Callable[[int, int], None]
"""Called with the bytes there are so far, and the bytes there will be (0 where nobody says)."""

CHUNK = 1 << 20
TIMEOUT = 60.0  # seconds without a byte
HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", re.ASCII)
SHA256 = re.compile(r"[0-9a-f]{64}")
MEMBERS = 10_000

# What a hub repository is asked for besides weights, and its weights in the order of preference.
ALWAYS = (
    *("config.json", "generation_config.json", "params.json", "tokenizer.json", "tokenizer.model*", "tekken.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("LICENSE*", "README.md"),
)
WEIGHTS = (
    ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
    ("consolidated.safetensors", "consolidated[.-]*.safetensors", "consolidated.safetensors.index.json"),
    ("consolidated.[0-9][0-9].pt", "consolidated.[0-9][0-9].pth"),
    ("pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json"),
)


def pull(
    source: str, dest: Path | str | None = None, *, sha256: str | None = None, progress: Progress | None = None
) -> Path:
    """Fetch ``source`` and return the folder that holds it.

    Args:
        source: ``org/name`` or ``org/name@revision`` on the hub, or the http(s) address of a .tar (.tar.gz too),
            to which ``#sha256=...`` may be added.
        dest: the folder to make; by default a place in the cache, where what is there already is not fetched again.
        sha256: what the archive's digest must be, in hexadecimal.
        progress: called as bytes arrive.

    Raises:
        InvalidParameter: ``source`` is neither, ``dest`` holds something, or ``sha256`` is no digest.
        NotFound: the hub has no such repository or revision.
        DownloadError: it could not be fetched, or arrived damaged. What came so far is kept, and the next
            call goes on from there; a folder is there whole or not at all.
    """
    target = None if dest is None else Path(dest)
    if source.startswith(("http://", "https://")):
        return _archive(source, target, sha256, progress)
    found = HUB_ID.fullmatch(source)
    if not found:
        raise InvalidParameter("source", f"{source!r} is neither org/name[@revision] nor an http(s) address")
    if sha256 is not None:
        raise InvalidParameter("sha256", "is for archives; the hub's own checksums are used for hub files")
    return _hub(found[1], found[2], target, progress)


# The hub


def _hub(name: str, revision: str | None, dest: Path | None, progress: Progress | None) -> Path:
    """Fetch the useful files of a hub repository; what is in the cache and complete is taken when offline."""
    from huggingface_hub import HfApi, errors, snapshot_download

    broken = errors.HTTPError  # type: ignore[attr-defined]  # of whichever client the installed version uses
    try:
        try:
            offered = HfApi().list_repo_files(name, revision=revision)
        except errors.HfHubHTTPError:
            raise
        except (broken, OSError):  # no connection
            return _cached(name, revision, dest)
        wanted = choose(offered)
        if not wanted:
            raise DownloadError(f"{name}: holds no weights in a format that is read here")
        bar = None if progress is None else _bar(progress)
        return Path(snapshot_download(name, revision=revision, local_dir=dest, allow_patterns=wanted, tqdm_class=bar))
    except errors.GatedRepoError as error:
        raise DownloadError(f"{name}: its owner asks you to agree to terms and log in first (hf auth login)") from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise NotFound(f"the hub has no {name}{f'@{revision}' if revision else ''} that you may see") from error
    except (broken, OSError, ValueError, RuntimeError) as error:
        raise DownloadError(f"{name}: {_line(error)}") from error


def _cached(name: str, revision: str | None, dest: Path | None) -> Path:
    """Return the folder of an earlier fetch, if it is complete for one kind of weights."""
    from huggingface_hub import errors, snapshot_download

    for weights in WEIGHTS:
        wanted = [*ALWAYS, *weights]
        try:
            found = snapshot_download(
                name, revision=revision, local_dir=dest, allow_patterns=wanted, local_files_only=True
            )
        except errors.LocalEntryNotFoundError:
            continue
        if choose([file.name for file in Path(found).iterdir()]):
            return Path(found)
    raise DownloadError(f"{name}: the hub cannot be reached, and it is not in the cache")


def choose(offered: Sequence[str]) -> list[str]:
    """Return the files of a repository to fetch: configuration, tokenizer, and the safest kind of weights."""
    top = [file for file in offered if "/" not in file]
    for weights in WEIGHTS:
        if any(fnmatchcase(file, pattern) for file in top for pattern in weights):
            return [file for file in top if any(fnmatchcase(file, pattern) for pattern in (*weights, *ALWAYS))]
    return []


def _bar(progress: Progress) -> type[Any]:
    """Return a class that stands in for the hub's progress bars and hands their bytes on."""
    import tqdm  # type: ignore[import-untyped]

    seen: dict[int, tuple[int, int]] = {}

    class Bar(tqdm.tqdm):  # type: ignore[misc]
        monitor_interval = 0

        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("name", None)
            super().__init__(*args, **{**options, "disable": False, "file": _Nowhere()})

        def update(self, n: float | None = 1) -> bool | None:
            shown: bool | None = super().update(n)
            if self.unit == "B":  # newer hubs count bytes received and bytes on disk apart
                seen[id(self)] = (int(self.n), int(self.total or 0))
                progress(max(n for n, _ in seen.values()), max(total for _, total in seen.values()))
            return shown

    return Bar


class _Nowhere:
    """A stream that swallows what a progress bar draws."""

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        """Nothing to do."""


# An archive


def _archive(address: str, dest: Path | None, sha256: str | None, progress: Progress | None) -> Path:
    url, digest = _split(address, sha256)
    name = PurePosixPath(urllib.parse.unquote(urllib.parse.urlsplit(url).path)).name
    stem = re.sub(r"\.(tar(\.gz)?|tgz)$", "", name)
    if stem == name or not stem or stem in (".", ".."):
        raise InvalidParameter("source", f"{url} does not name a .tar, .tar.gz or .tgz")
    target = dest or cache() / f"{stem}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        if dest is None:
            return target
        raise InvalidParameter("dest", f"{target} exists already; name a new folder")
    part = target.parent / f"{name}.part"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _alone(part) as file:
            said = _fetch(url, part, file, progress)
            _check(url, part, digest or said)
            _unpack(url, part, target)
            part.unlink()
            _note(part).unlink(missing_ok=True)
    except (OSError, http.client.HTTPException) as error:
        kept = "; run it again to go on from where it stopped" if part.exists() else ""
        raise DownloadError(f"{url}: {_line(error)}{kept}") from error
    return target


def _split(address: str, sha256: str | None) -> tuple[str, str | None]:
    """Return the address without its fragment, and the digest that either names."""
    url, fragment = urllib.parse.urldefrag(address)
    given = {value.lower() for value in (sha256, fragment.removeprefix("sha256=")) if value}
    if len(given) > 1 or not all(SHA256.fullmatch(value) for value in given):
        raise InvalidParameter("sha256", f"{' and '.join(sorted(given))}: expected one digest of 64 hexadecimal digits")
    return url, next(iter(given), None)


def cache() -> Path:
    """Return the folder for what can be had again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moesaic"


@contextmanager
def _alone(part: Path) -> Iterator[IO[bytes]]:
    """Open ``part`` for appending, as the only process that does."""
    with part.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DownloadError(f"{part} is being written by another process") from error
        yield file


@dataclass(frozen=True)
class _Answer:
    """What a server said: from which byte on it sends, how many there are in all, and the digest of all."""

    start: int
    total: int  # 0: not said
    mark: str  # what tells this version from the next, for If-Range
    sha256: str | None


def _note(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _fetch(url: str, part: Path, file: IO[bytes], progress: Progress | None) -> str | None:
    """Bring ``part`` to its full length, and return the digest that the server gave."""
    have = file.seek(0, os.SEEK_END)
    mark = _mark(url, part) if have else ""
    headers = {"Accept-Encoding": "identity", "User-Agent": "moesaic"}
    if mark:
        headers |= {"Range": f"bytes={have}-", "If-Range": mark}
    request = urllib.request.Request(url, headers=headers)
    try:
        response = _opener().open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and mark:  # nothing is left to send: all is there, or it is another file
            if error.headers.get("Content-Range") == f"bytes */{have}":
                return _digest(error.headers)
            file.truncate(0)
            return _fetch(url, part, file, progress)
        raise DownloadError(f"{url}: the server answers {error.code} {error.reason}") from error
    with response:
        answer = _answer(url, response, have)
        file.truncate(answer.start)
        _note(part).write_text(json.dumps({"url": url, "mark": answer.mark}))
        free = shutil.disk_usage(part.parent).free
        if answer.total - answer.start > free:
            raise DownloadError(f"{url}: needs {answer.total - answer.start} bytes, but the disk has {free} free")
        _receive(response, file, answer, progress)
    have = file.tell()
    if answer.total and have != answer.total:
        raise DownloadError(f"{url}: ended after {have} of {answer.total} bytes; run it again to go on from there")
    return answer.sha256


def _mark(url: str, part: Path) -> str:
    """Return the validator of the bytes in ``part``; empty where they are of no known version."""
    try:
        note = json.loads(_note(part).read_text())
        return str(note["mark"]) if note["url"] == url else ""
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _answer(url: str, response: http.client.HTTPResponse, have: int) -> _Answer:
    """Return what the headers say, or raise DownloadError if they contradict the request."""
    headers = response.headers
    etag = headers.get("ETag", "")
    mark = headers.get("Last-Modified", "") if not etag or etag.startswith("W/") else etag
    if response.status == 206:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", ""))
        if not found or int(found[1]) != have:
            raise DownloadError(f"{url}: the server sends another part than it was asked for")
        return _Answer(have, int(found[2]) if found[2] != "*" else 0, mark, _digest(headers))
    length = headers.get("Content-Length", "")
    return _Answer(0, int(length) if length.isdecimal() else 0, mark, _digest(headers))


def _digest(headers: Message) -> str | None:
    """Return the SHA-256 of the whole file that the headers give, in hexadecimal."""
    plain = headers.get("X-Checksum-Sha256", "").lower()
    if SHA256.fullmatch(plain):
        return plain
    for name in ("Repr-Digest", "Digest"):
        if found := re.search(r"sha-256=:?([A-Za-z0-9+/=]{44})", headers.get(name, ""), re.IGNORECASE):
            try:
                return base64.b64decode(found[1], validate=True).hex()
            except binascii.Error:
                return None
    return None


def _receive(response: http.client.HTTPResponse, file: IO[bytes], answer: _Answer, progress: Progress | None) -> None:
    """Append the body to ``file``; everything that arrived is there also when the connection breaks."""
    done = answer.start
    try:
        while data := response.read1(CHUNK):
            file.write(data)
            done += len(data)
            if progress is not None:
                progress(done, answer.total)
    finally:
        file.flush()


class _Redirect(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but not from https to http, where anybody could change the bytes."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> Any:
        if not newurl.startswith(("http://", "https://") if req.type == "http" else "https://"):
            raise DownloadError(f"{req.full_url}: redirects to {newurl}, which is not safe to follow")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> urllib.request.OpenerDirector:
    """Return an opener for http and https alone."""
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


def _check(url: str, part: Path, digest: str | None) -> None:
    """Raise DownloadError unless ``part`` has the digest; a damaged one is removed, as going on would not mend it."""
    if digest is None:
        return
    with part.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != digest:
        part.unlink()
        raise DownloadError(f"{url}: arrived damaged: expected sha256 {digest}, found {found}; run it again")


def _unpack(url: str, part: Path, target: Path) -> None:
    """Unpack beside ``target``, then rename; a single folder in the archive becomes ``target`` itself."""
    made = target.parent / f".{target.name}.{secrets.token_hex(4)}.part"
    try:
        made.mkdir()
        with tarfile.open(part, "r:*") as archive:
            for count, member in enumerate(archive):
                if count >= MEMBERS:
                    raise DownloadError(f"{url}: holds more than {MEMBERS} files, which no checkpoint does")
                _place(url, archive, member, made)
        inside = list(made.iterdir())
        if not inside:
            raise DownloadError(f"{url}: is an empty archive")
        (inside[0] if len(inside) == 1 and inside[0].is_dir() else made).rename(target)
    except (tarfile.TarError, EOFError) as error:
        raise DownloadError(f"{url}: is not a tar archive, or a damaged one") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _place(url: str, archive: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    """Write one member under ``folder``. Nothing of it but name and bytes is used: no mode, owner or time."""
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts or "\\" in member.name or "\0" in member.name:
        raise DownloadError(f"{url}: refused, {member.name!r} would lie outside the folder")
    if member.isdir():
        (folder / path).mkdir(parents=True, exist_ok=True)
        return
    if not member.isreg():
        raise DownloadError(f"{url}: refused, {member.name!r} is a link or a device, not a file")
    if member.size > shutil.disk_usage(folder).free:
        raise DownloadError(f"{url}: {member.name} needs {member.size} bytes, more than the disk has free")
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    data = archive.extractfile(member)
    assert data is not None
    with data, (folder / path).open("xb") as file:
        shutil.copyfileobj(data, file, CHUNK)


def _line(error: BaseException) -> str:
    """Return the first line of an error's text, or its kind."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (text.strip().splitlines() or [type(error).__name__])[0]
