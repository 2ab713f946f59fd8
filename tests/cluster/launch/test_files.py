"""Files for systemd and SLURM: they equal the examples in deploy/, and systemd and bash accept them."""

from __future__ import annotations

import importlib.util
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moesaic import cli
from moesaic.cluster import launch
from moesaic.cluster.launch import Plan, systemd
from moesaic.errors import InvalidRequest, NotInstalled
from tests.support.require import require_program

DEPLOY = Path(__file__).parents[3] / "deploy"
SHOWN = ("--gpus", "1", "--replicas", "4", "--program", "/opt/moesaic/.venv/bin/moesaic")
WORKER = ("/srv/models/mixtral-q4", "--gateway", "https://chat.example.org", "--device", "cuda")
KEY = ("--key-file", "/etc/moesaic/worker.key")


@pytest.mark.parametrize(("name", "more"), [("systemd", ()), ("slurm", ("--cpus", "16"))])
def test_deploy_examples_are_current(name, more, tmp_path, capsys):
    line = ["launch", name, *SHOWN, *more, "--to", str(tmp_path), "--worker", *WORKER, *KEY]
    assert cli.main(line) == 0
    written = Path(capsys.readouterr().out.strip())
    assert written.read_text() == (DEPLOY / name / written.name).read_text()


def test_launchers_have_the_required_functions():
    plan = Plan(WORKER, program="/bin/true")
    assert set(launch.names()) == {"ray", "slurm", "systemd"}
    for name in launch.names():
        launcher = launch.load(name)
        assert launcher.files(plan) or callable(launcher.run)


@pytest.mark.parametrize(
    ("worker", "why"),
    [
        (("x",), "--gateway is missing"),
        ((*WORKER, "--key", "secret"), "publicly readable"),
        ((*WORKER, "--key=secret"), "publicly readable"),
        ((*WORKER, "--name", "x"), "leave out --name"),
        ((*WORKER, "a\nb"), "line breaks"),
    ],
)
def test_invalid_plan_is_refused(worker, why):
    with pytest.raises(InvalidRequest, match=why):
        Plan(worker)


def test_wrong_worker_flags_are_refused(capsys):
    with pytest.raises(SystemExit):
        cli.main(["launch", "slurm", "--worker", "--gateway", "http://127.0.0.1:1", "--gatway", "x"])
    assert "--gatway" in capsys.readouterr().err


def test_systemd_refuses_several_gpus_and_relative_paths():
    with pytest.raises(InvalidRequest, match="--gpus"):
        systemd.files(Plan(WORKER, gpus=2, program="/bin/true"))
    with pytest.raises(InvalidRequest, match="absolute"):
        systemd.files(Plan(WORKER, program="moesaic"))


NASTY = ("/srv/a b", "--chat-format", 'x"y$HOME%n\\', "--gateway=https://h", "--system;rm")


@pytest.fixture
def analyze():
    return require_program("systemd-analyze")


@pytest.mark.parametrize("worker", [(*WORKER, *KEY), NASTY, ("/home/me/model", "--gateway=https://h")])
@pytest.mark.parametrize("gpus", [0, 1])
def test_systemd_verifies_the_worker_unit(analyze, tmp_path, worker, gpus):
    plan = Plan(worker, gpus=gpus, cpus=2.5, program="/bin/true")
    unit = tmp_path / systemd.NAME.replace("@", "@1")
    unit.write_text(systemd.files(plan)[systemd.NAME])
    verify(analyze, unit)
    assert "--key " not in unit.read_text()


def test_systemd_verifies_the_gateway_unit(analyze, tmp_path):
    shown = DEPLOY / "systemd/moesaic-gateway.service"
    command = next(line for line in shown.read_text().splitlines() if line.startswith("ExecStart="))
    cli._parser().parse_args(shlex.split(command.partition(" ")[2]))
    unit = tmp_path / shown.name
    unit.write_text(shown.read_text().replace("/opt/moesaic/.venv/bin/moesaic", "/bin/true"))
    verify(analyze, unit)


def verify(analyze: str, unit: Path) -> None:
    done = subprocess.run([analyze, "verify", str(unit)], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr == "", done.stderr


def words(quoted: str) -> list[str]:
    """Split a command as systemd does; shlex handles the same quotes and backslashes."""
    return [word.replace("$$", "$").replace("%%", "%") for word in shlex.split(quoted)]


def test_systemd_quoting_preserves_words():
    unit = systemd.files(Plan(NASTY, program="/bin/true"))[systemd.NAME]
    command = next(line for line in unit.splitlines() if line.startswith("ExecStart="))
    assert words(command.removeprefix("ExecStart=")) == ["/bin/true", "worker", *NASTY, "--name", "%H-%i"]


FAKE = """
import pathlib, signal, sys, time
log = pathlib.Path(sys.argv[0]).with_name("log")
runs = len(log.read_text().splitlines()) if log.exists() else 0
with log.open("a") as out:
    print(*sys.argv[1:], file=out)
code = pathlib.Path(sys.argv[0]).with_name("codes").read_text().split()[runs]
if code == "drain":
    def end(*_):
        time.sleep(0.3)
        with log.open("a") as out:
            print("drained", file=out)
        sys.exit(0)
    signal.signal(signal.SIGTERM, end)
    print("up", flush=True)
    time.sleep(60)
sys.exit(int(code))
"""


@pytest.fixture
def script(tmp_path):
    """Run SLURM's script with a fake worker that exits with the given codes in turn."""
    started: list[subprocess.Popen[str]] = []

    def start(codes: str) -> subprocess.Popen[str]:
        program = tmp_path / "a worker"
        program.write_text(f"#!{sys.executable}\n{FAKE}")
        program.chmod(0o700)
        (tmp_path / "codes").write_text(codes)
        [content] = launch.load("slurm").files(Plan(WORKER, program=str(program))).values()
        content = content.replace("sleep 5", "sleep 0.05")
        environment = {
            "SLURM_JOB_NAME": "w",
            "SLURM_ARRAY_JOB_ID": "7",
            "SLURM_ARRAY_TASK_ID": "1",
            "PATH": "/usr/bin:/bin",
        }
        process = subprocess.Popen(["bash", "-c", content], env=environment, stdout=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def log(tmp_path: Path) -> list[str]:
    return (tmp_path / "log").read_text().splitlines()


def test_slurm_script_restarts_a_failed_worker(script, tmp_path):
    assert script("70 1 0").wait(30) == 0
    assert log(tmp_path) == [shlex.join(["worker", *WORKER, "--name", "w-7-1"])] * 3


def test_slurm_script_exits_when_the_worker_is_refused(script, tmp_path):
    assert script("2 0").wait(30) == 2
    assert len(log(tmp_path)) == 1


def test_slurm_script_drains_the_worker_before_the_time_limit(script, tmp_path):
    process = script("drain 0")
    assert process.stdout and process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGUSR1)
    assert process.wait(30) == 0
    assert log(tmp_path)[1:] == ["drained"]


def test_slurm_script_waits_for_a_terminated_worker(script, tmp_path):
    process = script("drain 0")
    assert process.stdout and process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    assert process.poll() is None
    [worker] = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(worker), signal.SIGTERM)
    assert process.wait(30) == 0
    assert log(tmp_path)[1:] == ["drained"]


def test_missing_ray_names_the_extra():
    if importlib.util.find_spec("ray"):
        pytest.skip("Ray is installed here")
    with pytest.raises(NotInstalled, match=r"moesaic\[ray\]"):
        launch.load("ray").run(Plan(WORKER))
