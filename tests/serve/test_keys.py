"""Tests of API keys: storage, authentication and limits."""

from __future__ import annotations

import json
import stat

import pytest

from moesaic import cli
from moesaic.errors import InvalidRequest, KeyExhausted, Unauthorized
from moesaic.serve import keys
from moesaic.serve.keys import Key, Keys


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_only_the_digest_of_a_random_key_is_stored(tmp_path, capsys):
    file = tmp_path / "keys.json"
    for name in ("anna", "ben"):
        assert cli.main(["keys", "add", name, "--file", str(file), "--concurrent", "2"]) == 0
    secrets = capsys.readouterr().out.split()
    assert len(set(secrets)) == 2 and all(len(secret) >= 43 for secret in secrets)
    assert not any(secret in file.read_text() for secret in secrets)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    registry = Keys(keys.read(file))
    assert registry.owner(secrets[0].encode()) == Key("anna", keys.digest(secrets[0]), concurrent=2)
    assert cli.main(["keys", "revoke", "anna", "--file", str(file)]) == 0
    registry.replace(keys.read(file))
    with pytest.raises(Unauthorized):
        registry.owner(secrets[0].encode())
    assert registry.owner(secrets[1].encode()).name == "ben"


def test_revoking_the_last_key_locks_the_server(tmp_path):
    secret, anna = keys.new("anna")
    registry = Keys((anna,))
    registry.replace(())
    for candidate in (None, b"", secret.encode()):
        with pytest.raises(Unauthorized):
            registry.owner(candidate)
    with pytest.raises(Unauthorized):
        Keys((), wanted=True).owner(None)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[]",
        b"\xff",
        b'{"keys": {}',
        b'{"keys": [1]}',
        b'{"keys": [{"name": "a"}]}',
        b'{"keys": [{"name": "a", "sha256": "zz"}]}',
        b'{"keys": [{"name": "", "sha256": "%b"}]}' % (b"0" * 64),
        b'{"keys": [{"name": "a\\nb", "sha256": "%b"}]}' % (b"0" * 64),
        b'{"keys": [{"name": "environment-1", "sha256": "%b"}]}' % (b"0" * 64),
        b'{"keys": [{"name": "a", "sha256": "%b", "concurrent": 0}]}' % (b"0" * 64),
        b'{"keys": [{"name": "a", "sha256": "%b", "admin": "yes"}]}' % (b"0" * 64),
        b'{"keys": [{"name": "a", "sha256": "%b", "priority": "high"}]}' % (b"0" * 64),
        b'{"keys": [{"name": "a", "sha256": "%b", "rpm": 3}]}' % (b"0" * 64),
        b'{"keys": [{"name": "a", "sha256": "%b"}, {"name": "a", "sha256": "%b"}]}' % (b"0" * 64, b"1" * 64),
    ],
)
def test_a_damaged_file_is_refused_without_quoting_it(tmp_path, content):
    (tmp_path / "keys.json").write_bytes(content)
    with pytest.raises(InvalidRequest) as caught:
        keys.read(tmp_path / "keys.json")
    assert "0000" not in str(caught.value) and "sha256" not in str(caught.value)


def test_a_missing_file_is_a_usage_error(tmp_path, capsys):
    assert cli.main(["serve", "--keys", str(tmp_path / "none.json"), "--port", "0"]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_keys_from_the_environment():
    registry = Keys(keys.from_environment("one, two,,"))
    assert registry.owner(b"two").name == "environment-2"
    with pytest.raises(Unauthorized):
        registry.owner(b"")


def exhausted(registry: Keys, key: Key) -> float:
    with pytest.raises(KeyExhausted) as caught:
        registry.begin(key)
    return caught.value.retry_after


def test_requests_per_minute():
    clock, key = Clock(), Key("a", "0" * 64, requests_per_minute=6)
    registry = Keys((key,), clock)
    for _ in range(6):
        registry.begin(key)
    assert exhausted(registry, key) == pytest.approx(10)
    clock.now += 10
    registry.begin(key)
    assert exhausted(registry, key) == pytest.approx(10)
    other = Key("b", "1" * 64, requests_per_minute=6)
    registry.replace((key, other))
    registry.begin(other)
    assert exhausted(registry, key) == pytest.approx(10), "a reload of the keys must not reset the limits"


def test_tokens_per_minute_are_charged_at_the_end():
    clock, key = Clock(), Key("a", "0" * 64, tokens_per_minute=600)
    registry = Keys((key,), clock)
    registry.begin(key)
    registry.end(key, 1200)
    assert exhausted(registry, key) == pytest.approx(60.1)
    clock.now += 61
    registry.begin(key)


def test_concurrent_requests():
    key = Key("a", "0" * 64, concurrent=2)
    registry = Keys((key,))
    registry.begin(key)
    registry.begin(key)
    assert exhausted(registry, key) > 0
    registry.end(key, 0)
    registry.begin(key)
    for _ in range(2):
        registry.end(key, 0)
    assert not registry._running, "keys without requests must be forgotten"


def test_a_refused_request_is_not_charged():
    clock, key = Clock(), Key("a", "0" * 64, requests_per_minute=2, concurrent=1)
    registry = Keys((key,), clock)
    registry.begin(key)
    for _ in range(5):
        exhausted(registry, key)
    registry.end(key, 0)
    registry.begin(key)


def test_the_file_is_written_atomically(tmp_path, monkeypatch):
    file = tmp_path / "keys.json"
    keys.write(file, (Key("a", "0" * 64),))
    before = file.read_bytes()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "no space")))
    with pytest.raises(OSError):
        keys.write(file, ())
    assert list(tmp_path.iterdir()) == [file]
    assert file.read_bytes() == before and json.loads(before)["keys"][0]["name"] == "a"
