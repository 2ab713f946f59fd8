"""Triton's kernels, compiled for GPUs that are not there."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from benchmarks.triton_compile import SHARED_BYTES, Row
from tests.support.require import require


def compile_kernels(tmp_path, *arguments):
    """Run the command in a process of its own: in this one, kernels may be interpreted."""
    require(importlib.util.find_spec("triton"), "Triton is not installed (pip install triton)")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.triton_compile", *arguments],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )


def test_some_kernels_stay_within_the_budget_of_a_card(tmp_path):
    out = tmp_path / "figures.json"
    found = compile_kernels(tmp_path, "--targets", "90", "--only", "bf16-int8", "--out", str(out))
    assert found.returncode == 0, found.stderr
    rows = {row["kernel"]: row for row in json.loads(out.read_text())["figures"]["rows"]}
    assert {"attention-prompt-bf16-int8", "attention-decode-bf16-int8", "attention-store-bf16-int8"} <= rows.keys()
    assert rows["attention-prompt-bf16-int8"]["instructions"]["HGMMA"] > 0
    assert all(0 < row["registers"] <= 255 and row["stack_bytes"] == 0 for row in rows.values())


@pytest.mark.slow
@pytest.mark.parametrize("target", [80, 86, 89, 90, 100])
def test_all_kernels_stay_within_the_budgets_of_a_card(tmp_path, target):
    found = compile_kernels(tmp_path, "--targets", str(target))
    assert found.returncode == 0, found.stderr


def test_a_run_without_kernels_fails(tmp_path):
    assert compile_kernels(tmp_path, "--targets", "80", "--only", "no such kernel").returncode == 1


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, None),
        ({"registers": 256}, "256 registers, more than 255"),
        ({"stack_bytes": 8}, "0 loads and stores of spilled registers, 8 bytes of stack"),
        ({"instructions": {"LDL": 2, "STL": 1, "HMMA": 1}}, "3 loads and stores of spilled registers, 0 bytes"),
        ({"shared_bytes": SHARED_BYTES[86] + 1}, "101377 bytes of shared memory, more than 101376"),
        ({"instructions": {"LDGSTS": 4}}, "no matrix instructions"),
        ({"instructions": {}, "registers": 0, "skipped": "fp8 is not supported"}, None),
    ],
)
def test_a_kernel_that_exceeds_its_budget_is_named(change, fault):
    figures = {"registers": 255, "stack_bytes": 0, "shared_bytes": SHARED_BYTES[86], "instructions": {"HMMA": 1}}
    found = Row("a-kernel", 86, **(figures | change)).faults(mma=True)
    if fault is None:
        assert found == []
    else:
        assert len(found) == 1 and found[0].startswith("a-kernel on sm_86: ") and fault in found[0]
