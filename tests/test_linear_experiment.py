"""The linear experiment: splits, methods, statistics, and figures from the committed results."""

import csv
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from experiments.linear import run
from experiments.linear.analysis import interval, load, match_table, risk_table, samples_to_match, variance_ratio
from experiments.linear.methods import METHODS, errors_of, fit_reference, losses_of, scores_of
from experiments.linear.tables import TABLES, split
from paper_figures import linear_models

ROOT = Path(__file__).parents[1]
every_table = pytest.mark.parametrize("name", TABLES)


@every_table
def test_splits_are_disjoint_nested_and_seeded(name):
    table = TABLES[name]
    small, large = (split(name, 3, n) for n in (table.sizes[0], table.sizes[-1]))
    assert np.array_equal(small.target[0], large.target[0][: table.sizes[0]])
    assert np.array_equal(small.test[0], large.test[0])
    assert [len(part[1]) for part in (large.reference, large.target)] == [table.reference_samples, table.sizes[-1]]
    everything = np.concatenate([part[0] for part in (large.reference, large.target, large.test)])
    whole = table.load()[0]
    assert everything.shape == whole.shape
    assert len(np.unique(everything, axis=0)) == len(np.unique(whole, axis=0))  # every sample once
    assert np.array_equal(split(name, 3, table.sizes[0]).target[0], small.target[0])
    assert not np.array_equal(split(name, 4, table.sizes[0]).target[0], small.target[0])


def test_every_method_has_the_same_tuning_budget():
    assert {len(method.grid) for method in METHODS.values()} == {12}


@pytest.mark.parametrize("name", ["diabetes", "wine"])
def test_a_repetition_measures_every_method(name):
    n = TABLES[name].sizes[1]
    settings = {method.name: method.grid[5] for method in METHODS.values()}
    rows = run.repetition((name, n, 0, 0.1, settings))
    assert [row["method"] for row in rows] == ["reference", *METHODS]
    reference = rows[0]
    assert float(reference["excess_variance"]) == 0.0
    parts, classes = split(name, 0, n), run.classes_of(name)
    scores = scores_of(fit_reference(*parts.reference, classes, 0.1), classes)(parts.test[0])
    assert float(reference["risk"]) == pytest.approx(losses_of(scores, parts.test[1], classes).mean(), rel=1e-5)
    assert float(reference["error"]) == pytest.approx(errors_of(scores, parts.test[1], classes).mean(), rel=1e-5)
    assert all(float(row["bound"]) > float(row["error"]) - float(reference["error"]) for row in rows)
    assert len({row["risk"] for row in rows}) >= 6  # robust ones may return the reference, or agree


def test_fine_tuning_lies_between_the_reference_and_the_sample():
    parts = split("diabetes", 0, 40)
    reference = fit_reference(*parts.reference, 0, 0.1)
    tuned = [METHODS["fine-tuning"].fit({"price": price}, *parts.target, 0, reference) for price in (1e5, 1e-5)]
    own = METHODS["ERM"].fit({"l2": 1e-7}, *parts.target, 0, None)
    x = parts.test[0]
    np.testing.assert_allclose(tuned[0](x), scores_of(reference, 0)(x), atol=1e-3)
    np.testing.assert_allclose(tuned[1](x), own(x), atol=2e-2)


def test_statistics():
    values = np.random.default_rng(0).normal(size=50)
    low, high = stats.t.interval(0.95, 49, values.mean(), stats.sem(values))
    assert interval(values) == pytest.approx((values.mean(), low, high))
    noise = 1e-3 * np.random.default_rng(1).normal(size=20)
    sizes = {
        n: {"reference": {"risk": np.zeros(20)}, "m": {"risk": level + noise}, "never": {"risk": 1 + noise}}
        for n, level in ((10, 1.0), (100, -1.0))
    }
    found = samples_to_match(sizes, "m")
    assert found.mean == pytest.approx(np.sqrt(1000), rel=1e-2)
    assert found.low <= found.mean <= found.high
    assert samples_to_match(sizes, "never") is None
    ratio = variance_ratio({"variance": np.array([1.0, 4.0]), "excess_variance": np.array([0.5, 8.0])})
    assert ratio.mean == pytest.approx(1.0)


@pytest.mark.slow
def test_committed_results_figures_and_page():
    measured = load(run.RESULTS)
    assert list(measured) == list(TABLES)
    with run.RESULTS.open() as file:
        rows = [row for row in csv.DictReader(file) if (row["table"], row["n"], row["method"]) == ("wine", "30", "ERM")]
    assert len(rows) >= 200
    mean = np.mean([float(row["risk"]) for row in rows])
    assert measured["wine"][30]["ERM"]["risk"].mean() == pytest.approx(mean, rel=1e-12)
    figure = linear_models.draw_risks(measured)
    (line,) = [line for line in figure.axes[2].lines if line.get_label() == "ERM"]
    assert line.get_ydata()[1] == pytest.approx(mean, rel=1e-12)
    assert len(linear_models.draw_variance(measured).axes) == 2
    page = (ROOT / "experiments" / "linear" / "README.md").read_text()
    assert risk_table(measured) in page  # the numbers on the page are those of the file
    assert match_table(measured) in page


@pytest.mark.parametrize("options", [["--repetitions", "0"], ["--processes", "-1"], ["--tables", "iris"]])
def test_wrong_options_are_refused_in_one_line(options, capsys):
    with pytest.raises(SystemExit) as stop:
        run.main(options)
    assert stop.value.code == 2
    assert options[1] in capsys.readouterr().err.splitlines()[-1]
