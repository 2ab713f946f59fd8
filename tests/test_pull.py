"""Downloads over real connections from a local server, which counts the bytes and can misbehave."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import resource
import signal
import tarfile
from pathlib import Path

import pytest

from moesaic.errors import DownloadError, InvalidParameter, NotFound
from moesaic.hub_files import choose_files
from moesaic.pull import pull
from tests.support.downloads import downloads, use_as_hub

WEIGHTS = bytes(range(256)) * 2000


def tar(files=None, *, prefix="mistral-7B/", extra=()):
    """Return an archive of some files and extra members."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in (files or {"params.json": b"{}", "consolidated.00.pth": WEIGHTS}).items():
            member = tarfile.TarInfo(prefix + name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        for member in extra:
            archive.addfile(member)
    return out.getvalue()


@pytest.fixture
def server():
    with downloads(tar()) as server:
        yield server


def names(path):
    """Return the names of all files in a folder, including hidden ones."""
    return sorted(file.name for file in path.iterdir())


def test_an_archive_becomes_a_folder(server, tmp_path):
    seen = []
    folder = pull(server.url, tmp_path / "model", progress=lambda done, total: seen.append((done, total)))
    assert folder == tmp_path / "model"
    assert (folder / "consolidated.00.pth").read_bytes() == WEIGHTS
    assert names(tmp_path) == ["model"] and names(folder) == ["consolidated.00.pth", "params.json"]
    assert seen[-1] == (len(server.body), len(server.body)) and seen == sorted(seen)


def test_a_compressed_archive_without_a_top_folder(server, tmp_path):
    server.routes["/x.tar.gz"] = (200, {}, gzip.compress(tar(prefix="./")))
    folder = pull(server.url.replace("m.tar", "x.tar.gz"), tmp_path / "model")
    assert names(folder) == ["consolidated.00.pth", "params.json"]


def test_a_cached_archive_is_not_downloaded_again(server, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = pull(server.url)
    assert folder.parent == tmp_path / "moesaic"
    assert pull(server.url) == folder and len(server.requests) == 1


def test_a_broken_download_is_resumed(server, tmp_path):
    server.cut = 100_000
    with pytest.raises(DownloadError, match=r"ended after 100000 of \d+ bytes; run it again"):
        pull(server.url, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    assert (tmp_path / "m.tar.part").read_bytes() == server.body[:100_000]
    server.cut = None
    pull(server.url, tmp_path / "model")
    assert server.requests[-1][1]["Range"] == "bytes=100000-"
    assert server.requests[-1][1]["If-Range"] == '"one"'
    assert server.sent == len(server.body)
    assert names(tmp_path) == ["model"]


def test_without_range_support_the_download_restarts(server, tmp_path):
    server.cut, server.ranges = 100_000, False
    with pytest.raises(DownloadError):
        pull(server.url, tmp_path / "model")
    server.cut = None
    folder = pull(server.url, tmp_path / "model")
    assert server.sent == 100_000 + len(server.body)
    assert (folder / "consolidated.00.pth").read_bytes() == WEIGHTS


@pytest.mark.parametrize("etag", ['"two"', 'W/"two"', None])
def test_another_version_is_not_appended(server, tmp_path, etag):
    server.cut = 100_000
    with pytest.raises(DownloadError):
        pull(server.url, tmp_path / "model")
    server.cut, server.etag = None, etag
    server.body = tar({"params.json": b"{}", "consolidated.00.pth": WEIGHTS[::-1]})
    folder = pull(server.url, tmp_path / "model")
    assert (folder / "consolidated.00.pth").read_bytes() == WEIGHTS[::-1]


def test_without_a_validator_the_download_restarts(server, tmp_path):
    server.cut, server.etag = 100_000, None
    with pytest.raises(DownloadError):
        pull(server.url, tmp_path / "model")
    server.cut = None
    pull(server.url, tmp_path / "model")
    assert "Range" not in server.requests[-1][1]


def test_a_complete_part_is_unpacked_without_download(server, tmp_path):
    """This is the state after a crash between download and unpacking."""
    (tmp_path / "m.tar.part").write_bytes(server.body)
    (tmp_path / "m.tar.part.json").write_text(json.dumps({"url": server.url, "validator": '"one"'}))
    pull(server.url, tmp_path / "model")
    assert server.sent == 0 and names(tmp_path) == ["model"]


def test_a_part_longer_than_the_file_is_downloaded_again(server, tmp_path):
    (tmp_path / "m.tar.part").write_bytes(server.body + b"x")
    (tmp_path / "m.tar.part.json").write_text(json.dumps({"url": server.url, "validator": '"one"'}))
    pull(server.url, tmp_path / "model")
    assert server.sent == len(server.body)


def test_the_digest_can_be_stated_in_three_ways(server, tmp_path):
    digest = hashlib.sha256(server.body)
    pull(server.url, tmp_path / "a", sha256=digest.hexdigest())
    pull(f"{server.url}#sha256={digest.hexdigest()}", tmp_path / "b")
    server.headers = {"Repr-Digest": f"sha-256=:{base64.b64encode(digest.digest()).decode()}:"}
    pull(server.url, tmp_path / "c")
    assert names(tmp_path) == ["a", "b", "c"]


@pytest.mark.parametrize("way", ["argument", "fragment", "Repr-Digest", "Digest", "X-Checksum-Sha256"])
def test_a_damaged_download_is_rejected_and_deleted(server, tmp_path, way):
    digest = hashlib.sha256(server.body)
    encoded = base64.b64encode(digest.digest()).decode()
    server.body = server.body[:-2000] + bytes(2000 - 1) + b"!"
    server.headers = {
        "Repr-Digest": {"Repr-Digest": f"sha-256=:{encoded}:"},
        "Digest": {"Digest": f"SHA-256={encoded}"},
        "X-Checksum-Sha256": {"X-Checksum-Sha256": digest.hexdigest()},
    }.get(way, {})
    url = f"{server.url}#sha256={digest.hexdigest()}" if way == "fragment" else server.url
    with pytest.raises(DownloadError, match=f"arrived damaged: expected sha256 {digest.hexdigest()}"):
        pull(url, tmp_path / "model", sha256=digest.hexdigest() if way == "argument" else None)
    assert not (tmp_path / "model").exists()
    assert not (tmp_path / "m.tar.part").exists()  # resuming would not repair it


def test_a_redirect_is_followed_and_keeps_the_range(server, tmp_path):
    server.routes["/old.tar"] = (302, {"Location": "/m.tar"}, b"")
    url = server.url.replace("m.tar", "old.tar")
    server.cut = 100_000
    with pytest.raises(DownloadError):
        pull(url, tmp_path / "model")
    server.cut = None
    pull(url, tmp_path / "model")
    assert server.sent == len(server.body)


@pytest.mark.parametrize("to", ["ftp://127.0.0.1/m.tar", "file:///etc/passwd"])
def test_a_redirect_to_another_scheme_is_rejected(server, tmp_path, to):
    server.routes["/m.tar"] = (302, {"Location": to}, b"")
    with pytest.raises(DownloadError, match=r"redirects to|responded 302"):
        pull(server.url, tmp_path / "model")


def test_server_errors_have_one_line(server, tmp_path):
    with pytest.raises(DownloadError, match=r"gone\.tar: the server responded 404") as caught:
        pull(server.url.replace("m.tar", "gone.tar"), tmp_path / "model")
    assert "\n" not in str(caught.value)
    with pytest.raises(DownloadError, match="refused"):
        pull("http://127.0.0.1:9/m.tar", tmp_path / "model")


def test_a_full_disk_keeps_the_received_bytes(server, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(DownloadError, match=r"File too large; run it again"):
            pull(server.url, tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert (tmp_path / "m.tar.part").stat().st_size == 200_000
    pull(server.url, tmp_path / "model")
    assert server.requests[-1][1]["Range"] == "bytes=200000-"


def test_a_file_larger_than_the_disk_is_rejected_at_once(server, tmp_path):
    server.headers = {"Content-Length": str(1 << 60)}
    server.body = b""
    with pytest.raises(DownloadError, match="but the disk has"):
        pull(server.url, tmp_path / "model")


def unusual(name, kind=tarfile.REGTYPE, link=""):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    return member


@pytest.mark.parametrize(
    "member",
    [
        unusual("/etc/evil"),
        unusual("../evil"),
        unusual("a/../../evil"),
        unusual("a\\evil"),
        unusual("m/link", tarfile.SYMTYPE, "/etc/passwd"),
        unusual("m/link", tarfile.LNKTYPE, "m/params.json"),
        unusual("m/device", tarfile.CHRTYPE),
        unusual("m/pipe", tarfile.FIFOTYPE),
    ],
    ids=lambda member: member.name,
)
def test_hostile_archive_members_are_rejected_by_name(server, tmp_path, member):
    server.body = tar(extra=[member])
    with pytest.raises(DownloadError, match="refused") as caught:
        pull(server.url, tmp_path / "inner" / "model")
    assert repr(member.name) in str(caught.value)
    assert names(tmp_path) == ["inner"]
    assert names(tmp_path / "inner") == ["m.tar.part", "m.tar.part.json"]


@pytest.mark.parametrize("body", [b"no archive at all" * 100, tar()[:1000], gzip.compress(tar())[:300], b"x"])
def test_a_file_that_is_not_an_archive_is_rejected(server, tmp_path, body):
    server.body = body
    with pytest.raises(DownloadError, match="archive"):
        pull(server.url, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_concurrent_download_of_the_same_file_fails(server, tmp_path):
    import fcntl

    with (tmp_path / "m.tar.part").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(DownloadError, match="being written by another process"):
            pull(server.url, tmp_path / "model")


@pytest.mark.parametrize(
    ("source", "options"),
    [
        ("just-a-name", {}),
        ("a/b/c", {}),
        ("org/../name", {}),
        ("ftp://host/m.tar", {}),
        ("http://127.0.0.1:9/m.zip", {}),
        ("http://127.0.0.1:9/m.tar#sha256=abc", {}),
        ("http://127.0.0.1:9/m.tar#sha256=" + "a" * 64, {"sha256": "b" * 64}),
        ("org/name", {"sha256": "b" * 64}),
    ],
)
def test_invalid_sources_are_rejected(tmp_path, source, options):
    with pytest.raises(InvalidParameter):
        pull(source, tmp_path / "model", **options)
    assert names(tmp_path) == []


def test_a_folder_that_is_not_empty_is_left_unchanged(server, tmp_path):
    (tmp_path / "letter").write_text("dear")
    with pytest.raises(InvalidParameter, match="already exists"):
        pull(server.url, tmp_path)
    assert names(tmp_path) == ["letter"] and not server.requests


# The hub


def test_the_safest_kind_of_weights_is_chosen():
    always = ["config.json", "tokenizer.json"]
    offered = {
        "code": ["modeling.py", "tokenizer.py", "tokenizer/evil.json", "original/consolidated.00.pth"],
        "bin": ["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"],
        "torch": ["consolidated.00.pt", "consolidated.01.pt"],
        "mistral": ["consolidated.safetensors"],
        "hf": ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"],
    }
    assert choose_files([*always, *offered["code"]]) == []
    so_far = list(offered["code"])
    for kind in ("bin", "torch", "mistral", "hf"):
        so_far += offered[kind]
        assert choose_files([*always, *so_far]) == [*always, *offered[kind]]


@pytest.fixture
def hub(server, tmp_path, monkeypatch):
    """Return a server with the routes of a hub that has one repository."""
    files = {"config.json": b"{}", "model.safetensors": WEIGHTS, "run.py": b"evil", "x.bin": b"evil"}
    server.add_repository("org/name", files)
    server.routes["/api/models/org/none/tree/main"] = (404, {"X-Error-Code": "RepoNotFound"}, b"")
    server.routes["/api/models/org/gated/tree/main"] = (403, {"X-Error-Code": "GatedRepo"}, b"")
    use_as_hub(server, tmp_path / "cache", monkeypatch)
    return server


def test_a_hub_repository_is_downloaded_without_its_code(hub, tmp_path):
    seen = []
    folder = pull("org/name", tmp_path / "model", progress=lambda done, total: seen.append((done, total)))
    assert folder == tmp_path / "model"
    assert {"config.json", "model.safetensors"} <= set(names(folder)) <= {"config.json", "model.safetensors", ".cache"}
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert seen[-1][0] == len(WEIGHTS) + 2
    assert not [path for path, _ in hub.requests if path.endswith(("run.py", "x.bin"))]


def test_the_hub_cache_is_used_offline(hub, tmp_path, monkeypatch):
    from huggingface_hub import constants

    folder = pull("org/name")
    assert Path(folder).is_relative_to(tmp_path / "cache") and (folder / "config.json").read_bytes() == b"{}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert pull("org/name") == folder
    with pytest.raises(DownloadError, match="cannot be reached, and the model is not in the cache"):
        pull("org/other")


def test_hub_errors_have_one_line(hub):
    with pytest.raises(NotFound, match="the hub has no org/none"):
        pull("org/none")
    with pytest.raises(DownloadError, match="log in"):
        pull("org/gated")
