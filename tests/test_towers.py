"""Linear towers of unit norm: their data, their training, and what was measured with them."""

import numpy as np
import pytest
import torch

from drrho.contrastive import contrastive_risk
from experiments.linear import towers
from experiments.linear.towers import METHODS, MODEL, RESULTS, TEMPERATURE, Towers, draw, train


def test_names_repeat_and_their_pairs_share_a_signal():
    codebook = np.random.default_rng(0).standard_normal((40, MODEL.signal))
    pairs = draw(np.random.default_rng(1), 4000, 1.0, codebook)
    assert pairs.name.max() < 40
    means = [pairs.x[pairs.name == name, : MODEL.signal].mean(0).numpy() for name in (3, 5)]
    expected = np.sqrt(MODEL.correlation) * (codebook[3] - codebook[5])
    np.testing.assert_allclose(means[0] - means[1], expected, atol=0.3)
    single = draw(np.random.default_rng(1), 4000, 1.0, None)
    assert len(single.name.unique()) == 4000
    cross = (single.x.T @ single.y / 4000).numpy()
    np.testing.assert_allclose(np.diag(cross), [MODEL.correlation] * 16 + [0] * 16, atol=0.08)


def test_mismatched_pairs_share_nothing():
    pairs = draw(np.random.default_rng(0), 4000, 0.0, None)
    assert abs(np.diag((pairs.x.T @ pairs.y / 4000).numpy())).max() < 0.08


def test_training_lowers_the_risk_and_names_more():
    pairs = draw(np.random.default_rng(0), 150, 1.0, None)
    weights = torch.randn((2, 32, 16), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first, last = Towers(*weights), train(pairs)
    risks = [contrastive_risk(*own.features(pairs), TEMPERATURE).value for own in (first, last)]
    assert risks[1] < risks[0] - 0.1
    assert last.naming_error(pairs) < 0.1 < 0.9 < first.naming_error(pairs)
    for features in last.features(pairs):
        np.testing.assert_allclose(features.norm(dim=1), 1)


@pytest.mark.slow
def test_a_reference_changes_the_target_by_its_coefficient():
    pairs, reference = (draw(np.random.default_rng(seed), 80, 1.0, None) for seed in (0, 1))
    features = train(reference).features(pairs)
    twin, ignored, steered = train(pairs), train(pairs, features, 0.0), train(pairs, features, 1.0)
    torch.testing.assert_close(ignored.x, twin.x, atol=1e-6, rtol=0)
    assert abs(steered.x - twin.x).max() > 0.01


def test_chosen_pairs_keep_their_names():
    pairs = draw(np.random.default_rng(0), 10, 0.5, None)
    few = pairs.chosen(torch.tensor([3, 1]))
    assert few.name.tolist() == [3, 1] and torch.equal(few.y, pairs.y[[3, 1]])


@pytest.mark.slow
def test_a_committed_row_is_what_the_code_makes():
    lines = RESULTS.read_text().splitlines()
    assert lines[0] == ",".join(towers.FIELDS)
    found = towers.errors(0, 0.7, 1)[0]
    (row,) = [line.split(",") for line in lines if line.startswith("0,0.7,100,1,")]
    # L-BFGS stops at other points where sums round differently.
    np.testing.assert_allclose([float(found[name]) for name in METHODS], np.array(row[4:], float), atol=0.02)


@pytest.mark.parametrize("options", [["--seeds", "1"], ["--seeds", "none"], ["--names", "-1"]])
def test_wrong_options_are_refused_in_one_line(options, capsys):
    with pytest.raises(SystemExit) as stop:
        towers.main(options)
    assert stop.value.code == 2
    assert options[1] in capsys.readouterr().err.splitlines()[-1]
