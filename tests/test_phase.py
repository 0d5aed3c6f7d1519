"""The grid of the bilinear model: its cells, tuning, and that committed rows are what the code makes."""

import csv
import json

import numpy as np
import pytest

from experiments.linear import phase
from experiments.linear.bilinear import estimate, scores, selected
from experiments.linear.phase import COEFFICIENTS, METHODS, MODELS, SHARES, Cell, Setting, errors, sample, tuned

SMALL = Cell(4, 0.4, 400, 200)


def test_cells_of_one_seed_share_what_they_can():
    pairs, reference = sample(SMALL, 3)
    cleaner, same = sample(SMALL._replace(eta=0.8), 3)
    np.testing.assert_array_equal(reference, same)
    assert (pairs.matched <= cleaner.matched).all() and pairs.matched.sum() < cleaner.matched.sum()
    np.testing.assert_array_equal(pairs.x, cleaner.x)
    assert not np.array_equal(pairs.x, sample(SMALL, 4)[0].x)
    assert np.linalg.matrix_rank(reference) == SMALL.signal


def test_errors_are_those_of_the_methods():
    model, (pairs, reference) = MODELS[4], sample(SMALL, 0)
    found = dict(zip(METHODS, errors(SMALL, 0, Setting(0.4, 0.5, 1.0, 1.6)), strict=True))
    twin, kept = estimate(pairs), selected(pairs, scores(pairs, reference), (0.5,))[0]
    for method, w in {
        "reference": reference,
        "twin": twin,
        "published": reference + twin,
        "steered": 0.4 * reference + twin,
        "selected": kept,
        "learnable": twin,  # all pairs are kept
        "both": 1.6 * reference + kept,
    }.items():
        assert found[method] == pytest.approx(model.error(model.truncated(w)), rel=1e-9), method


def test_tuning_takes_the_setting_of_least_error(monkeypatch):
    monkeypatch.setattr(phase, "TUNING_SEEDS", range(1_000_000, 1_000_002))
    setting = tuned(SMALL)
    assert setting.steered in COEFFICIENTS and setting.both in COEFFICIENTS
    assert setting.selected in SHARES and setting.learnable in SHARES

    def mean(own):
        return np.mean([errors(SMALL, seed, own) for seed in phase.TUNING_SEEDS], axis=0)

    best = mean(setting)
    for coefficient in COEFFICIENTS:
        assert best[METHODS.index("steered")] <= mean(setting._replace(steered=coefficient))[3] + 1e-12
    for share in SHARES:
        assert best[METHODS.index("selected")] <= mean(setting._replace(selected=share))[4] + 1e-12


def test_committed_rows_are_what_the_code_makes():
    record = json.loads(phase.RESULTS.with_suffix(".json").read_text())
    with phase.RESULTS.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 192 * 64
    for row in (rows[5], rows[7000]):
        cell = Cell(int(row["signal"]), float(row["eta"]), int(row["n"]), int(row["m"]))
        name = ", ".join(f"{key}={value:g}" for key, value in cell._asdict().items())
        found = errors(cell, int(row["seed"]), Setting(**record["settings"][name]))
        np.testing.assert_allclose(found, [float(row[method]) for method in METHODS], rtol=1e-4)


@pytest.mark.slow
def test_the_command_writes_a_row_for_each_cell_and_seed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(phase, "ETAS", (1.0,))
    monkeypatch.setattr(phase, "SIZES", (400,))
    monkeypatch.setattr(phase, "REFERENCE_SIZES", (200,))
    path = tmp_path / "new" / "phase.csv"
    phase.main(["--seeds", "2", "--processes", "1", "--output", str(path)])
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["signal"], row["seed"]) for row in rows] == [("16", "0"), ("16", "1"), ("4", "0"), ("4", "1")]
    assert set(json.loads(path.with_suffix(".json").read_text())["settings"]) == {
        "signal=16, eta=1, n=400, m=200",
        "signal=4, eta=1, n=400, m=200",
    }
    assert not list(path.parent.glob("*.partial"))
    assert "phase_diagram.py" in capsys.readouterr().out


@pytest.mark.parametrize("options", [["--seeds", "1"], ["--processes", "0"], ["--seeds", "many"]])
def test_wrong_options_are_refused_in_one_line(options, capsys):
    with pytest.raises(SystemExit) as stop:
        phase.main(options)
    assert stop.value.code == 2
    assert options[1] in capsys.readouterr().err.splitlines()[-1]
