"""What a run writes down of its numbers."""

import json
import re
import sys
import textwrap
import types

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_runs import contrastive, run

from experiments.clip.errors import UserError
from experiments.clip.training.logs import LateNumbers, Logs, filled_in, on_device, packed, parts_of_ranks
from experiments.clip.training.methods import RankSum
from tests.clip.launched import Launched


@pytest.mark.slow
def test_the_log_says_what_steering_rests_on(pairs, features, tmp_path):
    run(pairs, contrastive(len(pairs)), tmp_path / "c", features, validate=lambda: {"accuracy": 0.5})
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "lr" in line]
    assert [line["step"] for line in steps] == [3, 6, 9, 10]
    for line in steps:
        for name in ("variance_of_losses", "variance_of_excess"):
            assert 0 < line[f"{name}/image"] and 0 < line[f"{name}/text"]
            assert line[name] == pytest.approx((line[f"{name}/image"] + line[f"{name}/text"]) / 2)
        assert -1 <= line["correlation_with_reference"] <= 1
        assert 1 <= line["effective_negatives"] <= 29
        assert line["pairs_per_second_per_rank"] > 0
        assert 0 <= line["share_of_time_waiting_for_data"] <= 1
        assert line["gradient_norm"] > 0
    assert [line["samples_trained"] for line in steps] == [90, 180, 270, 300]
    assert [line for line in lines if "lr" not in line] == [
        {"step": step, "validation/accuracy": 0.5} for step in (5, 10)
    ]


def scalars(folder):
    """All numbers of TensorBoard's events, by tag, as TensorBoard reads them."""
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.slow
def test_tensorboard_has_the_scores_of_a_validation_once(pairs, features, tmp_path):
    """Tags of a validation are its scores: what training measures has its own, once."""
    scores = {"task/acc1": 0.25, "held_out/loss": 2.0}
    run(pairs, contrastive(len(pairs)), tmp_path / "c", features, validate=lambda: scores, logs=("tensorboard",))
    found = scalars(tmp_path)
    assert {tag: points for tag, points in found.items() if tag.startswith("validation/")} == {
        f"validation/{name}": [(5, value), (10, value)] for name, value in scores.items()
    }
    assert [step for step, _ in found["loss"]] == [3, 6, 9, 10]


def test_names_are_fit_for_every_log(tmp_path):
    logs = Logs(tmp_path, ("text", "jsonl", "tensorboard"), {})
    logs.write(7, {"validation/\x1b[31m<b>task/acc1": 0.5, "loss": 1234.5678})
    logs.close()
    (line,) = (tmp_path / "log.txt").read_text().splitlines()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  step 7  (.*)", line)[1] == (
        r"validation/\x1b[31m<b>task/acc1 0.5  loss 1234.57"
    )
    tags = scalars(tmp_path)
    assert tags.keys() == {"validation/__31m_b_task/acc1", "loss"}
    assert (tmp_path / "log.jsonl").read_text().isascii() and "\x1b" not in (tmp_path / "log.jsonl").read_text()


def test_the_text_of_a_resumed_run_goes_on(tmp_path):
    for step in (1, 2):
        logs = Logs(tmp_path, ("text",), {})
        logs.write(step, {"loss": 0.5})
        logs.close()
    assert [line.split("  ")[1:] for line in (tmp_path / "log.txt").read_text().splitlines()] == [
        ["step 1", "loss 0.5"],
        ["step 2", "loss 0.5"],
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.txt"]


def test_tensorboard_and_unknown_writers(pairs, tmp_path):
    logs = Logs(tmp_path, ("tensorboard",), {})
    logs.write(3, {"loss": 0.5})
    logs.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"loss" in events.read_bytes()
    assert not (tmp_path / "log.jsonl").exists()
    with pytest.raises(UserError, match="--log-to wandb needs the package wandb"):
        Logs(tmp_path, ("wandb",), {})


@pytest.mark.slow
@pytest.mark.parametrize("project", [None, "mine"])
def test_wandb_has_the_project_of_its_own_variable(project, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    if project is not None:
        monkeypatch.setenv("WANDB_PROJECT", project)
    logs = Logs(tmp_path, ("wandb",), {})
    assert logs._wandb.project == (project or "drrho")
    logs.close()


def test_numbers_of_several_types_are_packed_in_their_order():
    numbers = [torch.tensor(0.1), torch.tensor(True), torch.tensor(3), torch.tensor([0.2]), torch.tensor(0.1).double()]
    assert packed(numbers).tolist() == [number.item() for number in numbers]
    assert packed(numbers[:1]).dtype == torch.float64


def test_a_log_is_filled_in_with_what_the_device_computed():
    log = {"a": torch.tensor(0.5), "rate": 0.1, "share": RankSum(torch.tensor(2.0), lambda total: total / 4)}
    log["bounded"] = torch.tensor(7)
    sums, values = packed(parts_of_ranks(log)).tolist(), packed(on_device(log)).tolist()
    found = filled_in(log, sums, values)
    assert found == {"a": 0.5, "rate": 0.1, "share": 0.5, "bounded": 7} and list(found) == list(log)
    assert isinstance(found["bounded"], int)


def test_late_numbers_come_in_order_and_all_of_them_when_asked():
    late, received = LateNumbers(torch.device("cpu"), 2), []
    for k in range(4):
        late.put(torch.tensor([float(k)]) if k else None, received.append)
        late.read()
        assert len(received) == max(0, k - 1)
    late.read(all_of_them=True)
    assert received == [[], [1.0], [2.0], [3.0]]


FULL = """
    import resource, sys
    from pathlib import Path
    from experiments.clip.errors import UserError
    from experiments.clip.training.logs import Logs

    logs = Logs(Path(sys.argv[1]), ("tensorboard",), {})
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    try:
        for step in range(1000):
            logs.write(step, {"loss": 0.5})
        logs.close()
    except UserError as error:
        print(error)
"""


def test_a_full_disk_is_one_line_of_tensorboard_s_writer(tmp_path):
    """A write past the file-size limit of a real process fails as on a full disk."""
    (tmp_path / "full.py").write_text(textwrap.dedent(FULL))
    output, errors = Launched(tmp_path, program=tmp_path / "full.py").communicate(timeout=60)
    assert errors == ""
    assert output.startswith(f"cannot write {tmp_path / 'tensorboard'} (File too large)") and output.count("\n") == 1


def test_a_run_has_a_name_of_its_own_in_wandb(tmp_path, monkeypatch):
    """Kept when it is resumed, whatever its folder is called; wandb itself is not among what the tests need."""
    given = []
    wandb = types.SimpleNamespace(init=lambda **options: given.append(options))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    folders = [tmp_path / name / "train [1]" for name in ("a", "b", "a")]
    for folder in folders:
        Logs(folder, ("wandb",), {"lr": 0.1}, "steering", "mine" if folder == folders[1] else None)
    assert [options["name"] for options in given] == ["train [1]", "mine", "train [1]"]
    first, second, again = (options["id"] for options in given)
    assert first == again != second and re.fullmatch("[0-9a-f]{16}", first)
    assert {options["project"] for options in given} == {"steering"}
