"""The command that breaks runs, in short: nothing is lost, and what it would report as lost is seen."""

import json
import random
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from experiments.benchmarks.chaos.__main__ import Journal, wanted
from experiments.benchmarks.chaos.damage import DAMAGES, PART, STEPS_DAMAGED
from experiments.benchmarks.chaos.ends import End, Verdict, close, is_lost, row, same, same_samples
from experiments.benchmarks.chaos.faults import FAULTS
from experiments.benchmarks.chaos.kills import KILLS
from experiments.benchmarks.chaos.runs import STEPS
from experiments.benchmarks.measure import ROOT
from experiments.clip.distributed import Ranks
from experiments.clip.errors import UserError
from experiments.clip.training.checkpoint import check_sound, set_aside_damaged, step_folder
from experiments.clip.training.checkpoint_writer import CheckpointWriter


@pytest.mark.slow
def test_broken_runs_end_as_one_left_alone(tmp_path):
    """What is in the journal already is not done again."""
    journal = tmp_path / "journal.jsonl"
    Journal(journal, 5).add("the same seed again, unbroken", 0, Verdict("from the journal", True, True, True))
    command = [sys.executable, "-m", "experiments.benchmarks.chaos", "--kills", "1", "--faults", "2", "--seed", "5"]
    command += ["--only", "checkpoint", "--output", str(tmp_path / "t.md"), "--journal", str(journal)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in (tmp_path / "t.md").read_text().splitlines() if line.startswith("| ")][2:]
    assert len(lines) == 4 and not journal.exists()
    assert all(line.count("1 of 1") == 3 for line in lines) and "from the journal (1)" in lines[0]


def test_a_full_run_has_sixty_kills_and_forty_faults_of_every_kind():
    todo = list(wanted(60, 40, ""))
    names = [name for name, _, _ in todo]
    assert len(names) == 101 and len({(name, number) for name, number, _ in todo}) == 101
    assert set(names[1:61]) == set(KILLS) and set(names[61:]) == set(FAULTS) | set(DAMAGES)
    assert len(FAULTS | DAMAGES) <= 40


def test_the_journal_has_the_trials_of_its_seed(tmp_path):
    verdict = Verdict("killed", True, True, False)
    Journal(tmp_path / "new" / "j.jsonl", 1).add("kind", 2, verdict)
    with (tmp_path / "new" / "j.jsonl").open("a") as file:
        file.write('{"seed": 1, "kind"')  # the process was killed
    assert Journal(tmp_path / "new" / "j.jsonl", 1).found == {("kind", 2): verdict}
    assert Journal(tmp_path / "new" / "j.jsonl", 0).found == {}


@pytest.mark.parametrize("name", STEPS_DAMAGED)
def test_damage_to_a_checkpoint_is_damage_that_is_found(name, tmp_path):
    """The mixtures are such as a reader without checksums takes for a checkpoint."""
    writer = CheckpointWriter(tmp_path, {}, Ranks(), keep=2)
    for step in (1, 2):
        tensors = {f"weight{k}": torch.full((2000,), float(10 * step + k)) for k in range(6)}
        writer.start(tensors, {}, {}, {"step": step})
        writer.commit()
    before, last = (step_folder(tmp_path, step) for step in (1, 2))
    content = (last / PART).read_bytes(), (last / "manifest.json").read_bytes()
    STEPS_DAMAGED[name](SimpleNamespace(random=random.Random(3)), before, last)
    assert ((last / PART).read_bytes(), (last / "manifest.json").read_bytes()) != content
    check_sound(before)
    with pytest.raises(UserError, match="is damaged"):
        check_sound(last)
    assert [found.path for found in set_aside_damaged(tmp_path, Ranks())] == [last]


def test_a_difference_in_one_bit_is_seen():
    left = {"a": torch.tensor([1.0, float("nan"), -0.0]), "b": torch.tensor(3)}
    assert same(left, {key: value.clone() for key, value in left.items()})
    assert not same(left, left | {"a": torch.tensor([1.0, float("nan"), 0.0])})
    assert not same(left, {"a": left["a"]})
    lost = Verdict("killed", False, True, True)
    assert "0 of 2" in row("x", [lost] * 2).identical_weights_and_state
    assert is_lost(lost) and is_lost(Verdict("NOT CLEAR", True, True, True))
    assert not is_lost(Verdict("killed", True, True, True))


def test_ends_on_other_ranks_are_close_or_not():
    end = End({}, {"w": torch.ones(4)}, {1: 0.5, 2: 0.25})
    assert close(End({}, {"w": torch.full((4,), 1.01)}, {1: 0.50005, 2: 0.25}), end)
    assert not close(End({}, {"w": torch.full((4,), 1.05)}, end.losses), end)
    assert not close(End({}, end.exported, {1: 0.501, 2: 0.25}), end)
    assert not close(End({}, end.exported, {1: 0.5}), end)


def write_samples(folder, rank, ranks, steps, samples):
    lines = "".join(f"{step} {json.dumps(samples(step))}\n" for step in steps)
    (folder / f"samples-{rank}-of-{ranks}").write_text(lines)


def test_samples_of_ranks_are_those_of_one(tmp_path):
    alone = {step: {(10 * step, 10 * step + 1)} for step in range(STEPS)}
    write_samples(tmp_path, 0, 1, range(10), lambda step: [10 * step, 10 * step + 1])
    for rank in (0, 1):
        write_samples(tmp_path, rank, 2, range(8 + rank, STEPS), lambda step, rank=rank: [10 * step + rank])
    assert same_samples(tmp_path, alone, [1, 2])
    assert not same_samples(tmp_path, alone, [2])  # the first steps are in nobody's
    assert not same_samples(tmp_path, alone | {20: {(0, 1)}}, [1, 2])
    write_samples(tmp_path, 1, 2, range(8, STEPS), lambda step: [7])
    assert not same_samples(tmp_path, alone, [1, 2])
