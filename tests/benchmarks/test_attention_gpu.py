"""The GPU benchmark at toy sizes in triton's interpreter: its tables, its record, and what it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TOY = ["--toy", "--masks", "causal", "--repeats", "1"]
WITH_A_WRONG_OUTPUT = """
import sys, attention_gpu
right = attention_gpu.attention
def wrong(*args, **options):
    out, emitted = right(*args, **options)
    out[0, 0, -1, 0] += 1
    return out, emitted
attention_gpu.attention = wrong
sys.exit(attention_gpu.main(sys.argv[1:]))
"""


def run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(BENCHMARKS)} | variables
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_the_toy_run_gives_tables_and_a_record(tmp_path: Path) -> None:
    done = run(str(BENCHMARKS / "attention_gpu.py"), *TOY, "--out", str(tmp_path), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "attention_gpu.json").read_text())
    times = {line["variant"]: line["milliseconds"] for line in record["measured"]}
    assert {"statistics off", "row statistics", "+ collision, argmax", "backward", "materialised"} <= set(times)
    assert all(time is not None and time > 0 for time in times.values()), times
    assert {"date", "versions", "device", "clocks_before", "clocks_after", "goals"} <= set(record)
    page = (tmp_path / "attention_gpu.md").read_text()
    assert "| row statistics |" in page
    assert "| row statistics: at most 1.05 times off |" in page
    if not torch.cuda.is_available():
        assert "the times mean nothing" in done.stdout


def test_a_wrong_result_has_no_time_and_fails_the_run(tmp_path: Path) -> None:
    done = run("-c", WITH_A_WRONG_OUTPUT, *TOY, "--out", str(tmp_path), TRITON_INTERPRET="1")
    assert done.returncode == 1
    assert "statistics off: WRONG: out is off by" in done.stderr
    record = json.loads((tmp_path / "attention_gpu.json").read_text())
    [off] = [line for line in record["measured"] if line["variant"] == "statistics off"]
    assert off["milliseconds"] is None


def test_a_spent_budget_names_what_is_left_out(tmp_path: Path) -> None:
    done = run(
        str(BENCHMARKS / "attention_gpu.py"), *TOY, "--budget", "0", "--out", str(tmp_path), TRITON_INTERPRET="1"
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "attention_gpu.json").read_text())
    assert record["left_out"] == ["toy, causal, 40 keys"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = run(str(BENCHMARKS / "attention_gpu.py"), TRITON_INTERPRET="0")
    assert done.returncode == 2
    assert "There is no GPU here" in done.stdout
    assert not done.stderr
