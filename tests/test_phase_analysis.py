"""Exponents, gains and tables of the bilinear model, from errors that are known."""

from itertools import product

import numpy as np
import pytest

from experiments.clip.study.intervals import Interval
from experiments.linear import phase_analysis
from experiments.linear.bilinear import pays_from, predicted
from experiments.linear.phase import ETAS, METHODS, MODELS, REFERENCE_SIZES, RESULTS, SIZES, Cell
from experiments.linear.phase_analysis import (
    agreement_table,
    early,
    exponent_table,
    exponents,
    gain,
    load,
    load_towers,
    noisy,
    signs,
    strength,
    tower_table,
    verdict,
    winners,
)
from experiments.linear.towers import RESULTS as TOWERS


@pytest.fixture(scope="module")
def exact():
    """The predicted errors themselves, with a little noise that seeds share; what is not predicted is the twin's."""
    measured = {}
    rng = np.random.default_rng(0)
    for cell in (Cell(*each) for each in product(MODELS, ETAS, SIZES, REFERENCE_SIZES)):
        lines = predicted(MODELS[cell.signal], *cell[1:])._asdict()
        common = 1 + 0.01 * rng.standard_normal(20)
        measured[cell] = {method: float(lines.get(method, lines["twin"])) * common for method in METHODS}
    return measured


def test_exponents_are_those_that_were_built_in(exact):
    powers = {
        cell: {"twin": 3 * cell.n**-0.4 * cell.eta**-0.9 * errors["twin"] / errors["twin"].mean()}
        for cell, errors in exact.items()
    }
    found = exponents(powers, "twin", 16, 600)
    assert found.n.mean == pytest.approx(-0.4) and found.eta.mean == pytest.approx(-0.9)
    assert found.n.low < -0.4 < found.n.high and found.n.high - found.n.low < 0.02
    theory = exponents(exact, "steered", 16, 600)
    assert theory.n.mean == pytest.approx(theory.predicted[0], abs=0.01)
    assert theory.eta.mean == pytest.approx(theory.predicted[1], abs=0.01)
    assert exponents(exact, "learnable", 16, 600).predicted is None


def test_exponents_of_theory_are_the_published_ones_where_the_error_is_small(exact):
    found = exponents(exact, "twin", 4, 600)
    assert found.predicted[0] == pytest.approx(-0.5, abs=0.04)
    assert -1.4 < found.predicted[1] < -1  # the variance of what turns the signal falls too, with 1 - (eta theta)^2
    assert found.cells == sum(early(MODELS[4], cell) for cell in exact if cell.signal == 4 and cell.m == 600)
    other = exponents(exact, "steered", 4, 5400, noisy)  # the reference is all there is
    assert max(np.abs(other.predicted)) < 0.1
    with pytest.raises(ValueError, match="leaves 0 cells of m=7"):
        exponents(exact, "twin", 4, 7)


def test_signs_strengths_and_gains(exact):
    for cell, errors in exact.items():
        model = MODELS[cell.signal]
        ratio = cell.m * model.information(1) / (cell.n * model.information(cell.eta))
        assert strength(errors) == pytest.approx(ratio, rel=0.15)
        if abs(np.log(ratio / pays_from(cell.eta))) > 0.2:
            assert verdict(gain(errors)) == (1 if ratio > pays_from(cell.eta) else -1)
    right, sure = signs(exact)
    assert right >= sure - 2 and sure > 180
    assert verdict(Interval(0.1, -0.1, 0.3)) == 0
    halved = {"twin": np.full(5, 0.4), "published": np.full(5, 0.2) * np.linspace(0.9, 1.1, 5)}
    assert gain(halved).mean == pytest.approx(1, abs=0.02)


def test_tables_have_a_line_for_all_there_is(exact):
    assert agreement_table(exact).count("1.00 (") == 2 * 4
    table = exponent_table(exact, 16, (200, 5400)).splitlines()
    assert len(table) == 2 + 2 * (1 + 2 * 5)
    assert "<= -0.5" in "".join(table)
    best = winners(exact).splitlines()
    assert best[0].startswith("| least mean error | noise 0 % | noise 20 % |")
    assert best[-1].startswith("| both | ") and "0 of 32" in best[2]
    cell = {method: np.array([0.2, 0.3, 0.4]) for method in ("reference", "twin", "half", "selected", "both")}
    cell["published"] = cell["twin"] - np.array([0.1, 0.11, 0.09])
    (line,) = tower_table({(40, 0.7, 200): cell}).splitlines()[2:]
    assert line.startswith("| 40 | 30 % | 200 | 30.0 | 30.0 |") and line.endswith("| -10.0 [-12.5, -7.5] |")


def test_committed_results_are_whole():
    measured = load(RESULTS)
    assert set(measured) == {Cell(*each) for each in product(MODELS, ETAS, SIZES, REFERENCE_SIZES)}
    assert {len(errors[method]) for errors in measured.values() for method in METHODS} == {64}
    assert all(len(errors["twin"]) == 3 for errors in load_towers(TOWERS).values())
    assert phase_analysis.NAMES.keys() == set(METHODS)
