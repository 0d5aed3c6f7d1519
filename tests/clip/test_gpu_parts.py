"""The parts of the measurement on a GPU that train, run dry on the CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.benchmarks.gpu.race import PLANS, THEIRS

ROOT = Path(__file__).parents[2]
PARTS = ("train-b32", "train-drrho", "train-jpeg", "demo", "profile-towers", "profile-glyphs", "nccl")


def test_every_race_is_part_of_the_measurement_and_has_something_to_reach():
    for name, plan in PLANS.items():
        assert name.startswith("train-")
        assert plan.reach
        assert {*plan.reach, *(yardstick for yardstick, _ in plan.reach.values())} <= {*plan.racers}


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_dry_run(part, tmp_path):
    out = tmp_path / "gpu"
    command = [sys.executable, "-m", "experiments.benchmarks.gpu", "--device", "cpu", "--small", "--only", part]
    done = subprocess.run(
        [*command, "--out", str(out), "--minutes", "30"], cwd=ROOT, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    kept = json.loads((out / f"{part}.json").read_text())
    assert kept["state"] == "finished"
    assert not kept["failures"]
    assert kept["tables"]
    if part.startswith("train-"):
        rows = kept["tables"]["Races"]["rows"]
        measured = {row["racer"] for row in rows if "images per s" in row}
        left_out = {row["racer"] for row in rows if "note" in row}
        assert measured | left_out == {*PLANS[part].racers}
        assert left_out <= {THEIRS}
    if part == "nccl":
        rows = kept["tables"]["Ranks"]["rows"]
        assert {(row["ranks"], row["rank"]) for row in rows} == {(1, 0), (2, 0), (2, 1)}
