"""The advisor's table: which trainings are compared, choices and regrets, the committed files."""

import json

import numpy as np
import pytest

from drrho.advice import Advisor, Finished, Intervention, Knowledge, Prediction
from experiments.benchmarks import advice
from experiments.benchmarks.advice import (
    FOLDER,
    ICONS,
    REFERENCES,
    STUDY,
    Cell,
    Situation,
    cells_of,
    intervention_of,
    is_twin,
    judged,
    main,
    options_of,
    page,
    read_rows,
)
from experiments.clip.reference.advice import FITTED

KNOWN = Knowledge(4096, 0.9, 0.1, 0.0, 0.25)


@pytest.fixture(scope="module")
def cells():
    references = json.loads(REFERENCES.read_text())
    return [each for path in (STUDY, ICONS) for each in cells_of(read_rows(path), references)]


def cell(gain, reference="a", error=0.001):
    how = Intervention(1.0, 0.125, "kl")
    finished = Finished(reference, how, KNOWN, 0.0, 0.2, 0.2 + gain / 100, error)
    return Cell(Situation("clean", "1", "m", 10, reference), finished, 0.2, 1.0, 0.0)


def said(*points):
    return [Prediction("a", Intervention(1.0, 0.125, "kl"), x, x - 1, x + 1) for x in points]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--model m --temperature 0.2 --lr 1", Intervention(1.0, 0.2, "kl")),
        ("--temperature 0.15 --coefficient 0.5", Intervention(0.5, 0.15, "kl")),
        ("--temperature 0.05 --divergence chi-square", Intervention(1.0, 0.05, "chi-square")),
        ("--method openclip --select jest --candidates 2", Intervention(select="jest", candidates=2)),
        ("--temperature 0.15 --select jest", Intervention(1.0, 0.15, "kl", "jest", 5)),
        ("--method openclip", None),
        ("--temperature 0.1 --coefficient adaptive", None),
        ("--temperature 0.15 --distill 0.2", None),
        ("--divergence cvar --level 0.1", None),
        ("--method fastclip --temperature 0.1", None),
    ],
)
def test_what_a_training_used_its_reference_for(words, expected):
    assert intervention_of(options_of({"options": words})) == expected


def test_the_twin_is_the_steered_objective_without_a_reference():
    assert is_twin({"method": "fastclip", "temperature": "0.1"})
    assert not is_twin({"method": "fastclip", "divergence": "chi-square"})
    assert not is_twin({"method": "drrho"})
    assert not is_twin({"method": "fastclip", "normalizer": "network"})


def test_gains_are_those_of_the_rows(cells):
    """DRRho-CLIP on clean captions under the shipped reference, against a sum over the file."""
    [own] = [
        each
        for each in cells
        if each.situation == Situation("clean", "1", "glyph-tiny", 120, "shipped")
        and each.finished.how == Intervention(1.0, 0.125, "kl")
    ]
    rows = [row for row in read_rows(STUDY) if row["captions"] == "clean" and row["samples_trained"] == "118175"]

    def mean(method, rate, tau):
        found = [
            float(row["test_top1"])
            for row in rows
            if (row["model"], row["fraction"], row["learning_rate"], row["method"]) == ("glyph-tiny", "1", rate, method)
            and options_of(row).get("temperature") == tau
            and row["reference"] in ("", "shipped")
        ]
        return np.mean(found)

    expected = 100 * (mean("drrho", "0.002", "0.125") - mean("fastclip-v1", "0.001", "0.1"))
    assert own.finished.gain == pytest.approx(expected)
    assert len({each.finished.group for each in cells}) == 11


def test_a_verdict_counts_regret_signs_and_losses(monkeypatch):
    monkeypatch.setattr(advice, "RESAMPLES", 10)
    cells = [cell(3.0), cell(1.0), cell(-2.0), *(cell(gain, "b") for gain in (-1.0, -3.0, 0.1))]
    verdict = judged(cells, said(1.0, 2.0, -1.0, -0.5, -2.0, 0.5))
    assert verdict.regret == pytest.approx((2.0 + 0.0) / 2)  # 1 chosen of 3, and what was best of the other
    assert (verdict.sign, verdict.worse) == ((5, 5), (3, 3))
    assert judged(cells, said(3, 1, -2, -1, -3, 0.1)).rank[0] == pytest.approx(1.0)
    none = judged(cells[:3], said(-1.0, -2.0, -3.0))
    assert none.regret == pytest.approx(3.0)


def test_the_committed_files_belong_together(cells):
    record = json.loads((FOLDER / "advice.json").read_text())
    assert (FOLDER / "advice.md").read_text() == page(record) + "\n"
    fitted = json.loads(FITTED.read_text())
    assert fitted["weights"] == record["weights"]
    again = Advisor.fitted([each.finished for each in cells])
    assert again.weights == pytest.approx(fitted["weights"], abs=1e-9)
    assert again.half_widths == pytest.approx(fitted["half_widths"], abs=1e-9)


def test_a_measurement_names_what_it_lacks(capsys):
    with pytest.raises(SystemExit):
        main(["--measure", "weak=x"])
    assert "--score" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_writes_its_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(advice, "RESAMPLES", 10)
    before = FITTED.read_text()
    assert main(["--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"advice.json", "advice.md"}
    assert FITTED.read_text() == before
