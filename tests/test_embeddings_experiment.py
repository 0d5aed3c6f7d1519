"""The embedding experiment: its pairs, its settings, its statistics, and the table from the committed results."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from drrho.integrations.candidates import Candidates
from experiments.embeddings import run
from experiments.embeddings.methods import METHODS, loss_options, settings_of
from experiments.embeddings.wordnet import SHARES, Pairs, read_pairs

README = Path(run.__file__).with_name("README.md")
LINE = "{number:08d} {kind} n {count:02x} {words} 001 @ 00001740 n 0000 | {gloss}  \n"


def wordnet(folder, synsets=400):
    """A file in WordNet's format, of synsets that have one or two words."""
    path, lines = folder / "data.noun", ["  1 This software and database is being provided to you\n"]
    for number in range(synsets):
        words = f"first_word_{number} 0" + f" second_{number} a" * (number % 2)
        gloss = f'the definition of {number}; more of it; "an example"'
        kind = "06" if number % 4 else "05"
        lines.append(LINE.format(number=number, kind=kind, count=1 + number % 2, words=words, gloss=gloss))
    path.write_text("".join(lines))
    return path


def test_pairs_are_those_of_wordnet_and_every_synset_has_one_split(tmp_path):
    splits = read_pairs(wordnet(tmp_path))
    assert list(splits) == list(SHARES)
    found = {}
    for pairs in splits.values():
        found |= dict(zip(pairs.definitions, pairs.words, strict=True))
    assert len(found) == sum(len(pairs.words) for pairs in splits.values()) == 300
    assert found["the definition of 6"] == "first word 6"
    assert found["the definition of 7"] == "first word 7, second 7"
    for name, share in SHARES.items():
        assert abs(len(splits[name].words) / 300 - share / 100) < 0.07
    assert read_pairs(wordnet(tmp_path)) == splits
    with pytest.raises(FileNotFoundError, match=r"apt-get install wordnet-base, or name its data\.noun by --wordnet"):
        read_pairs(tmp_path / "nothing")


@pytest.mark.parametrize("method", METHODS)
def test_settings_are_drawn_alike_and_make_a_loss(method):
    few, more = settings_of(method, 3), settings_of(method, 9)
    assert more[:3] == few
    assert len({json.dumps(setting) for setting in more}) == 9
    for setting in more:
        options = loss_options(method, setting)
        Candidates(**options)
        assert ("coefficient" in setting) == (method not in ("MNRL", "chi-square, no guide", "CVaR, no guide"))
        assert (options.get("coefficient") == math.inf) == (method == "GIST")


def line(stage, method, seed, mrr, setting="{}"):
    numbers = {"validation_mrr": mrr, "test_mrr": mrr, "test_recall_1": mrr, "test_recall_10": mrr}
    return {"stage": stage, "method": method, "setting": setting, "seed": str(seed)} | {
        name: f"{value:.5f}" for name, value in numbers.items()
    }


def test_the_best_setting_is_that_of_validation():
    rows = [line("tuning", "KL", 1000, mrr, setting) for mrr, setting in ((0.1, "a"), (0.3, "b"), (0.2, "c"))]
    assert run.best_settings([*rows, line("final", "KL", 0, 0.9, "d")]) == {"KL": "b"}


def test_differences_are_paired_by_seed():
    rows = [line("final", "guide", 0, 0.5)]
    for seed, base in enumerate((0.1, 0.2, 0.3)):
        rows += [
            line("final", "KL", seed, base + 0.02),
            line("final", "GIST", seed, base),
            line("final", "MNRL", seed, base),
        ]
    lines = run.table(rows[::-1]).splitlines()
    assert lines[2] == "| guide | 50.00 | 50.00 | 50.00 |  |  |"
    assert "| KL | 22.00 | 22.00 | 22.00 | +2.00 [+2.00, +2.00] | +2.00 [+2.00, +2.00] |" in lines


def test_ranks_count_what_is_more_similar():
    class Model(torch.nn.Module):
        def encode(self, texts, convert_to_tensor):
            return torch.stack([torch.tensor([float(text), 1.0]) for text in texts])

    found = run.ranking(Model(), Pairs(["0", "5", "1"], ["0", "1", "5"]))
    assert found == pytest.approx(((1 + 1 / 2 + 1 / 2) / 3, 1 / 3, 1.0))


def test_the_committed_table_is_that_of_the_results():
    rows = run.load(run.RESULTS)
    assert run.table(rows) in README.read_text()
    for method in METHODS:
        assert sum(row["stage"] == "tuning" and row["method"] == method for row in rows) == run.TRIALS
        final = [row for row in rows if row["stage"] == "final" and row["method"] == method]
        assert sorted(row["seed"] for row in final) == [str(seed) for seed in range(run.SEEDS)]
        assert {row["setting"] for row in final} == {run.best_settings(rows)[method]}


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the host warns of its own deprecations
def test_a_model_is_trained_and_the_file_goes_on_where_it_was(tmp_path, monkeypatch):
    pytest.importorskip("sentence_transformers", reason="needs the extra integrations (make test-integrations)")
    from integrations.embedders import WORDS, embedder

    generator = np.random.default_rng(0)
    texts = [[" ".join(generator.choice(WORDS, 3)) for _ in range(40)] for _ in range(2)]
    splits = {name: Pairs(*texts) for name in SHARES}
    monkeypatch.setattr(run, "BATCH", 8)
    guide = embedder(tmp_path).float()
    study = run.prepare(splits, guide, tmp_path / "cache", width=4)
    model = run.untrained(study)
    for column, tokens in zip(texts, study.tokens, strict=True):
        features = model.preprocess(column)
        found = run._features(tokens, torch.arange(40))
        assert all(torch.equal(features[name], found[name]) for name in ("input_ids", "offsets"))
    before = run.ranking(model, splits["test"])
    for method in METHODS:
        setting = {**settings_of(method, 1)[0], "learning_rate": 0.05}
        assert run.ranking(run.train(study, method, setting, 0, epochs=4), splits["test"]).mrr > before.mrr
    results = run._Results(tmp_path / "results.csv")
    results.add("final", "KL", "{}", 0, lambda: run.measured(model, study))
    again = run._Results(tmp_path / "results.csv")
    again.add("final", "KL", "{}", 0, lambda: pytest.fail("measured twice"))
    assert again.rows == results.rows == run.load(tmp_path / "results.csv")
