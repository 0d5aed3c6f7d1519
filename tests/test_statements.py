"""Parts of bounds: printed assumptions, classes of models, confidence levels, ranges and samples."""

import math

import numpy as np
import pytest
import torch

from drrho.bounds import better_than_reference, drrho_certificate, empirical_bernstein
from drrho.efficiency import excess_over_best
from drrho.statements import ModelClass, Sample, Status, compared, guarantee, level, range_length, right_side

RNG = np.random.default_rng(0)
TARGET, REFERENCE = RNG.uniform(size=200), RNG.uniform(size=200)


def test_where_the_reference_comes_from_is_printed():
    options = {"value_range": 2, "models": 9}
    for compare in (drrho_certificate, better_than_reference):
        said = str(compare(TARGET, REFERENCE, reference_independent=True, **options))
        assert "the reference was fixed without looking at the sample" in said
        said = str(compare(TARGET, REFERENCE, reference_independent=False, **options))
        assert "may depend on the sample" in said and "N^2" in said
    assert "reference" not in str(empirical_bernstein(TARGET, value_range=1))


def test_float32_losses_on_the_edge_of_their_range_are_inside():
    losses = torch.tensor([0.1, 0.0], dtype=torch.float32, requires_grad=True)  # 0.1 is rounded up
    assert empirical_bernstein(losses, value_range=0.1).value > 0
    assert empirical_bernstein(losses, value_range=(0, 0.1)).value > 0


def test_integer_tensors_are_refused():
    with pytest.raises(TypeError, match="losses must have a floating dtype"):
        empirical_bernstein(torch.tensor([0, 1]), value_range=1)
    with pytest.raises(TypeError, match="value_range must be a number, got 'wide'"):
        empirical_bernstein([0.0, 1.0], value_range="wide")


def test_a_level_gives_the_confidence_that_rho_implies():
    at = level(math.log(2 * 7), 50, 0.05)
    assert at.log_term == pytest.approx(math.log(2 * 7 / 0.05))
    assert at.rho == pytest.approx(50 * at.log_term / 49) and at.delta == at.asked == 0.05
    assert level(math.log(2 * 7), 50, 0.05, 2 * at.rho) == at._replace(rho=2 * at.rho)
    smaller = level(math.log(2 * 7), 50, 0.05, 0.8 * at.rho)
    assert smaller.log_term == pytest.approx(0.8 * at.log_term)
    assert smaller.delta == pytest.approx(2 * 7 * math.exp(-0.8 * at.log_term)) and "implied by rho" in smaller.words
    with pytest.raises(ValueError, match="implied confidence is not positive"):
        level(math.log(2 * 7), 50, 0.05, 0.1)


def test_a_class_of_pairs_counts_twice():
    alone = ModelClass.of(9, None, 0.1)
    pairs = ModelClass.of(9, None, 0.1, reference_independent=False)
    assert (alone.log_count, alone.shift) == (math.log(9), 0.1)
    assert (pairs.log_count, pairs.shift) == (2 * math.log(9), 0.2)
    assert ModelClass.of(None, None).words == "for one model fixed in advance"
    with pytest.raises(ValueError, match="models must be >= 2"):
        ModelClass.of(1, None, reference_independent=False)


@pytest.mark.parametrize("offset", [0.0, 1e6, -1e8])
def test_a_sample_has_the_moments_of_its_row(offset):
    row = TARGET + offset
    sample = Sample.of(row)
    assert (sample.n, sample.low, sample.high, sample.ties) == (200, row.min(), row.max(), 1)
    assert sample.sd == pytest.approx(TARGET.std(), rel=1e-15 * (1 + abs(offset)) + 1e-14)
    assert sample.below + sample.above == pytest.approx(sample.high - sample.low, rel=1e-12)
    assert Sample.of(np.full(5, 0.1)).sd == 0
    assert Sample.of(row, row).high == 0


@pytest.mark.parametrize(
    ("value_range", "expected"), [(2, 2.0), ((0, 1), 1.0), ([-1.0, 1.0], 2.0), (np.float32(1.5), 1.5)]
)
def test_a_range_is_a_length_or_an_interval(value_range, expected):
    assert range_length(value_range) == range_length(value_range, Sample.of(TARGET)) == expected


def test_the_terms_of_a_statement_sum_to_its_value():
    terms = {"mean": 0.25, "B L/n": 0.5}
    assert right_side(terms) == "mean + B L/n = 0.75"
    sample, union = compared(TARGET, REFERENCE, True, 3, None, 0.0)
    bound = guarantee("R", terms, level(union.log_count, sample.n, 0.1), sample, 2.0, union, "a book")
    assert float(bound) == 0.75 and bound.status is Status.GUARANTEE and bound.confidence == 0.9
    printed = str(bound)
    assert printed.startswith("[guarantee] R <= mean + B L/n = 0.75 with probability >= 1 - 0.1")
    assert "assumes: the reference was fixed" in printed and printed.endswith("source: a book")


@pytest.mark.parametrize("given", [0, 1, "no", None, torch.tensor(False)])
def test_a_flag_on_which_a_guarantee_depends_is_true_or_false(given):
    """What is merely falsy counted as True, and made the union half as large as it had to be."""
    losses, reference = np.linspace(0, 1, 50), np.linspace(0, 0.5, 50)
    options = {"value_range": 2.0, "models": 10}
    error = ValueError if given is None else TypeError
    with pytest.raises(error, match="reference_independent must be True or False"):
        drrho_certificate(losses, reference, reference_independent=given, **options)
    values = [
        drrho_certificate(losses, reference, reference_independent=flag, **options).value
        for flag in (False, np.False_, True, np.True_)
    ]
    assert values[0] == values[1] > values[2] == values[3]
    if given is not None:
        with pytest.raises(TypeError, match="reference must be True or False"):
            excess_over_best(n=100, loss_range=1.0, standard_deviation=0.1, models=10, reference=given)
