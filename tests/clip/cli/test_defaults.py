"""What stands for options that were not given: the settings of the field, by model, device and length."""

import open_clip
import pytest
from open_clip_train.params import get_default_params

from experiments.clip.cli.defaults import (
    ADAMW_OF_OTHERS,
    ADAMW_OF_TRANSFORMERS,
    adamw_of,
    out_of_proportion,
    with_defaults,
)
from experiments.clip.run import parse
from experiments.clip.training.options import Optimization

#: Transformers that open_clip_train does not take for one, because "vit" is not in their names.
UNNAMED = (
    "glyph-",
    "icon-base",
    "icon-large",
    "EVA0",
    "PE-Core-",
    "nllb-clip-",
    "MobileCLIP-B",
    "MobileCLIP2-B",
    "MobileCLIP2-L-14",
    "coca_base",
)


def test_adamw_has_the_settings_that_open_clip_gives_an_architecture():
    assert get_default_params("ViT-B-32")["lr"] == get_default_params("RN50")["lr"] == Optimization().lr
    others = set()
    for name in open_clip.list_models():
        theirs, ours = get_default_params(name), adamw_of(open_clip.get_model_config(name))
        if (theirs["beta1"], theirs["beta2"]) != ours["betas"] or theirs["eps"] != ours["adam_eps"]:
            others.add(name)
            assert ours == ADAMW_OF_TRANSFORMERS
    assert others == {name for name in open_clip.list_models() if name.startswith(UNNAMED)}
    assert adamw_of({"vision_cfg": {"layers": [3, 4, 6, 3]}}) == ADAMW_OF_OTHERS


def test_what_is_given_stays():
    words = ["train", "--catalog", "c", "--model", "m", "--method", "openclip"]
    vit = {"vision_cfg": {"layers": 12}}
    own = with_defaults(parse(words), vit, "bfloat16")
    assert (own.optimization.betas, own.optimization.adam_eps) == ((0.9, 0.98), 1e-6)
    assert own.execution.precision == "bfloat16" and own.shards.workers is None
    given = with_defaults(parse([*words, "--betas", "0.5", "0.6", "--adam-eps", "1e-3"]), vit, "float32").optimization
    assert (given.betas, given.adam_eps) == ((0.5, 0.6), 1e-3)
    lion = with_defaults(parse([*words, "--optimizer", "lion"]), vit, "float32").optimization
    assert (lion.betas, lion.adam_eps) == (None, None)


@pytest.mark.parametrize(
    ("steps", "expected"), [(10**6, 10_000), (200_000, 10_000), (199_999, 10_000), (1000, 50), (10, 1), (1, 1)]
)
def test_the_warm_up_is_that_of_the_field_or_a_share_of_a_short_run(steps, expected):
    assert Optimization().warmup_of(steps) == expected
    assert Optimization(warmup=7).warmup_of(steps) == 7


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], []),
        (["--warmup", "299"], []),
        (["--warmup", "300"], ["--warmup 300 is not over when the run is, after 300 steps: the learning rate ends at"]),
        (["--warmup", "600", "--lr", "1e-3"], ["ends at 0.0005, and --lr 0.001 is never reached"]),
        (["--batch-size", "96"], []),
        (
            ["--batch-size", "97"],
            ["--batch-size 97 is more than the 96 pairs of an epoch: every epoch is one step, on all"],
        ),
        (["--select", "rho-top-k", "--batch-size", "90"], ["--batch-size 90 times --candidates 5 is more than the 96"]),
        (["--warmup", "10000"], ["--warmup 10000 is not over"]),
    ],
)
def test_what_is_larger_than_the_run_is_said(words, said):
    lines = list(out_of_proportion(parse(["train", "--batch-size", "8", *words]), 96, 300))
    assert len(lines) == len(said) and all(part in line for part, line in zip(said, lines, strict=True))
