"""What a run writes down of its numbers."""

import json

import pytest
from training_runs import contrastive, run

from experiments.clip.errors import UserError
from experiments.clip.training.logs import Logs


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


def test_tensorboard_and_unknown_writers(pairs, tmp_path):
    logs = Logs(tmp_path, ("tensorboard",), {})
    logs.write(3, {"loss": 0.5})
    logs.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"loss" in events.read_bytes()
    assert not (tmp_path / "log.jsonl").exists()
    with pytest.raises(UserError, match="--logs wandb needs the package wandb"):
        Logs(tmp_path, ("wandb",), {})
