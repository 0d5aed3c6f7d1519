"""The command that breaks runs, in short: nothing is lost, and what it would report as lost is seen."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiments.benchmarks.chaos import Verdict, row, same

PROGRAM = Path(__file__).parents[2] / "experiments" / "benchmarks" / "chaos.py"


@pytest.mark.slow
def test_broken_runs_end_as_one_left_alone(tmp_path):
    command = [sys.executable, str(PROGRAM), "--kills", "3", "--faults", "1", "--seed", "5"]
    done = subprocess.run([*command, "--output", str(tmp_path / "t.md")], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in (tmp_path / "t.md").read_text().splitlines() if line.startswith("| ")][2:]
    assert len(lines) == 5
    assert all(line.count("1 of 1") == 3 for line in lines)


def test_a_difference_in_one_bit_is_seen():
    left = {"a": torch.tensor([1.0, float("nan"), -0.0]), "b": torch.tensor(3)}
    assert same(left, {key: value.clone() for key, value in left.items()})
    assert not same(left, left | {"a": torch.tensor([1.0, float("nan"), 0.0])})
    assert not same(left, {"a": left["a"]})
    assert "0 of 2" in row("x", [Verdict("killed", False, True, True)] * 2).identical_weights_and_state
