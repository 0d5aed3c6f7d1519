"""What the advisor is fitted to, as it is shipped; the line through scores; features of a sample of pairs."""

import math

import numpy as np
import pytest
import torch

from drrho.advice import Knowledge, log_odds, predictors
from experiments.clip.catalog.catalog import make_catalog
from experiments.clip.distributed import ONE_PROCESS
from experiments.clip.errors import UserError
from experiments.clip.reference.advice import cached_sample, menu_of, read_fitted, sample_features, scale_by
from experiments.clip.reference.cache import cache_features, open_features
from tests.clip.tars import write_tar

STRONG = Knowledge(4096, 0.93, 0.003, 0.0, 0.25)


def test_the_shipped_fit_knows_every_predictor_of_the_menu():
    fitted = read_fitted()
    assert {name for how in menu_of(STRONG) for name in predictors(how, STRONG, 0.0)} <= fitted.advisor.weights.keys()
    assert all(0 < half < 2 for half in fitted.advisor.half_widths.values())
    pairs, levels = np.array(fitted.curve).T
    assert (np.diff(pairs) > 0).all()
    assert (np.diff(levels) > 0).all()
    assert fitted.scale.share(fitted.scale.level(0.148)) == pytest.approx(0.148)


def test_the_shipped_fit_says_what_the_study_found():
    """A strong reference helps, more where captions are wrong; one that the target overtakes costs points."""
    fitted, how = read_fitted(), menu_of(STRONG)[0]  # the published coefficient

    def points(own, twin):
        return fitted.advisor.predict("", how, own, twin, fitted.scale.level(twin)).points

    weak = Knowledge(4096, 0.63, 0.004, 0.0, 0.25)
    swapped = Knowledge(4096, 0.57, 0.384, 0.0, 0.25)
    assert points(STRONG, 0.148) > 0 > points(weak, 0.148)
    assert fitted.advisor.log_odds(how, swapped, 1.0) > fitted.advisor.log_odds(how, STRONG, 1.0) + 0.2


def test_temperatures_on_the_menu_are_in_units_of_the_spread():
    narrow = STRONG._replace(spread=0.025)
    assert [10 * each.temperature for each in menu_of(narrow)] == pytest.approx(
        [each.temperature for each in menu_of(STRONG)], rel=0.1
    )
    own = [predictors(how, reference, 0.0) for reference in (narrow, STRONG) for how in menu_of(reference)[:1]]
    assert own[0] == pytest.approx(own[1], abs=0.05)


def test_the_scale_goes_through_two_scores_and_has_a_given_slope_through_one():
    two = scale_by([0.1, 0.5], [-1.0, 3.0])
    assert [two.level(0.1), two.level(0.5)] == pytest.approx([-1.0, 3.0])
    one = scale_by([0.2], [1.0], slope=0.7)
    assert (one.slope, one.level(0.2)) == pytest.approx((0.7, 1.0))
    falling = scale_by([0.1, 0.5], [3.0, -1.0], slope=0.7)  # levels that contradict the scores tell no slope
    assert falling.slope == 0.7
    assert falling.level(0.1) == pytest.approx(1.0 - 0.7 * (log_odds(0.5) - log_odds(0.1)) / 2)


def test_a_sample_has_the_features_that_a_cache_has(manifest, reference, tmp_path):
    shards = [str(manifest.folder / shard.name) for shard in manifest.splits["train"].shards]
    catalog = make_catalog(shards, tmp_path / "catalog")
    cache_features(reference, catalog, tmp_path / "features")
    cached = open_features(reference, catalog, tmp_path / "features", ONE_PROCESS)
    image, text = cached_sample(cached, 100)
    assert len(image) == len(text) == 100
    own = sample_features(reference, catalog, range(100))
    assert torch.allclose(own[0], image, atol=2e-3)
    assert torch.allclose(own[1], text, atol=2e-3)
    assert len(cached_sample(cached, 1000)[0]) == 150


def test_pairs_that_cannot_be_used_are_left_out_and_none_is_an_error(reference, tmp_path):
    path = write_tar(tmp_path / "0.tar", [("a.png", b"no picture"), ("a.txt", b"x")])
    catalog = make_catalog([str(path)], tmp_path / "catalog")
    with pytest.raises(UserError, match="none of 1 pairs"):
        sample_features(reference, catalog, [0])
    assert math.isfinite(log_odds(0.0))
