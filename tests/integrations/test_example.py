"""The example of a steered Trainer: its data, and that every way trains."""

import pytest

pytest.importorskip("transformers", reason="needs the extra integrations (make test-integrations)")
pytestmark = pytest.mark.filterwarnings("default")  # hosts warn of their own deprecations

from transformers import Trainer  # noqa: E402

from drrho.integrations.trainer import steered  # noqa: E402
from examples.steer_your_trainer import (  # noqa: E402
    LENGTH,
    WAYS,
    documentation,
    encoded,
    held_out_loss,
    split,
    trainer_of,
    with_noise,
)


@pytest.fixture(scope="module")
def lines():
    return documentation()


def test_parts_have_no_line_in_common(lines):
    parts = split(lines)
    assert len(lines) > 5000 and max(map(len, lines)) < LENGTH
    assert sum(map(len, parts)) == len(set().union(*parts)) == len(lines)
    assert len(parts[0]) > 2 * len(parts[2]) and abs(len(parts[0]) - len(parts[1])) < 100


def test_a_third_of_the_lines_has_its_letters_shuffled(lines):
    found, wrong = with_noise(lines[:3000])
    assert sum(wrong) == pytest.approx(1000, abs=100)
    for line, noisy, is_wrong in zip(lines, found, wrong, strict=False):
        assert sorted(line) == sorted(noisy) and (is_wrong or line == noisy)


def test_letters_are_tokens(lines):
    (row,) = encoded(["Return é."])
    assert row["input_ids"] == [1, *(byte + 3 for byte in b"Return \xe9."), 2] == row["labels"]
    assert all(max(sample["input_ids"]) < 256 for sample in encoded(lines[:200]))


@pytest.mark.parametrize("name", WAYS)
def test_every_way_trains(lines, tmp_path, name):
    reference = trainer_of(Trainer, lines[:32], 1, 1, str(tmp_path)).model
    kind = Trainer
    if WAYS[name] is not None:
        divergence, how = WAYS[name]
        kind = steered(Trainer, divergence, reference=reference, cache=tmp_path / "cache", **how)
    trainer = trainer_of(kind, lines[:32], 0, 2, str(tmp_path))
    before = held_out_loss(trainer, lines[40:50])
    trainer.train()
    assert held_out_loss(trainer, lines[40:50]) < before
