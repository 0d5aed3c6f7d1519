"""From options to models, methods and selectors."""

import pytest
import torch

from experiments.clip.cli.building import SPREAD_SHARE, build_method, build_models, build_selector, check_ranks
from experiments.clip.distributed import ONE_PROCESS, Ranks
from experiments.clip.errors import UserError
from experiments.clip.run import parse
from experiments.clip.training.methods import METHODS, Distilled


class Spread:
    """A reference whose margins have a given spread."""

    def __init__(self, spread):
        self.spread = spread

    def margin_spread(self, pairs):
        return self.spread


def built(*words, spread=0.5, reference=None):
    options = parse(["train", *words])
    features = Spread(spread) if options.needs_reference else None
    return build_method(options.loss, 3, 100, reference, features, ONE_PROCESS)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_built_by_its_name(name):
    words = ["--temperature", "0.1"] if name == "fastclip" else []
    method, chosen = built("--method", name, *words)
    assert type(method) is METHODS[name]
    assert chosen["method"] == name and "reference" not in chosen


def test_an_automatic_temperature_is_a_share_of_the_spread():
    _, chosen = built(spread=0.5)
    assert chosen["temperature"] == pytest.approx(SPREAD_SHARE * 0.5)
    with pytest.raises(UserError, match=r"--temperature auto is 0\.003 here, outside --temperature-bounds 0\.01 1\.0"):
        built("--temperature-scheme", "global", spread=0.01)
    assert built("--temperature-scheme", "global", "--temperature-bounds", "0.001", "1", spread=0.01)[1][
        "temperature"
    ] == pytest.approx(0.003)


def test_distillation_wraps_any_method_at_the_references_temperature(reference):
    method, chosen = built("--method", "openclip", "--distill", "2", reference=reference)
    assert isinstance(method, Distilled)
    assert chosen["distill_temperature"] == pytest.approx(1 / reference.model.logit_scale.exp().item(), abs=1e-6)


@pytest.mark.parametrize(
    "words, count, message",
    [
        (["--batch-size", "3"], 4, "--batch-size 3 is less than the 4 ranks: every rank needs a pair"),
        (["--method", "siglip"], 2, "--method siglip runs in one process"),
        (["--method", "two-level", "--select", "jest"], 2, "--method two-level with --select jest runs in one process"),
    ],
)
def test_what_cannot_be_spread_over_ranks_is_refused(words, count, message):
    options = parse(["train", *words])
    check_ranks(options, ONE_PROCESS)
    with pytest.raises(UserError, match=message):
        check_ranks(options, Ranks(0, count))


@pytest.mark.slow
def test_models_are_those_of_the_options(reference):
    options = parse(["train", "--model", "glyph-micro", "--method", "siglip", "--patch-dropout", "0"])
    models = build_models(options)
    assert models.reference is None and models.clip.model.logit_bias is not None
    options = parse(["train", "--model", "glyph-micro", "--seed", "3"])
    models = build_models(options)
    assert models.reference is not None and models.reference.fingerprint == reference.fingerprint
    assert torch.equal(models.clip.model.logit_scale, build_models(options).clip.model.logit_scale)
    with pytest.raises(UserError, match="--split reference has no cached reference features"):
        build_models(parse(["train", "--split", "reference"]))


def test_a_selector_is_there_only_where_pairs_are_left_out(reference):
    assert build_selector(parse(["train"]), reference, ONE_PROCESS) is None
    selector = build_selector(parse(["train", "--select", "rho-top-k", "--candidates", "4"]), reference, ONE_PROCESS)
    assert selector is not None and selector.candidates == 4
