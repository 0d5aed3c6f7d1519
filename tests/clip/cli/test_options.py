"""Options that contradict each other, or that a run would ignore."""

import pytest

from experiments.clip.errors import UserError
from experiments.clip.run import parse
from experiments.clip.training.options import CheckpointPolicy

_IN_MEMORY = ["train", "--catalog", "c", "--model", "glyph-tiny", "--in-memory", "--method", "openclip"]


@pytest.mark.parametrize(
    "words, message",
    [
        (["train", "--lock", "image", "text"], "leaves nothing to train"),
        (["train", "--unlocked-groups", "1"], "--unlocked-groups 1 has no part in this run: it is for --lock"),
        (["train", "--patch-dropout", "1"], r"--patch-dropout must be in \[0, 1\), got 1"),
        (["train", "--gamma-epochs", "-1"], "--gamma-epochs must be >= 0, got -1"),
        (["train", "--distill-own-temperature"], "--distill-own-temperature True has no part.*it is for --distill"),
        (
            ["train", "--distill", "1", "--distill-own-temperature", "--temperature-scheme", "individual"],
            "--distill-own-temperature True has no part.*one temperature for all samples",
        ),
        (["train", "--temperature-lr-schedule", "model"], "--temperature-lr-schedule model has no part"),
        (["train", "--published-temperature-gradient"], "--published-temperature-gradient True has no part"),
        (["train", "--reference-features", "f"], "--reference-features f has no part in this run: it is for --catalog"),
        (
            ["train", "--method", "openclip", "--catalog", "c", "--reference-features", "f"],
            "--reference-features f has no part in this run: it is for --method drrho",
        ),
        (["train", "--candidates", "4"], "--candidates 4 has no part in this run: it is for --select jest, jest-top-k"),
        (
            ["train", "--select", "rho-top-k", "--select-chunks", "4"],
            "--select-chunks 4 has no part.*jest or jest-top-k",
        ),
        (["train", "--select", "jest-top-k", "--select-temperature", "2"], "--select-temperature 2.0 has no part"),
        (["train", "--select", "jest", "--candidates", "1"], "--candidates must be at least 2.*got 1"),
        (["train", "--select", "jest", "--select-chunks", "0"], "--select-chunks must be between 1 and.*512, got 0"),
        (
            ["train", "--select", "jest", "--batch-size", "8"],
            "--select-chunks must be between 1 and --batch-size 8, got 16",
        ),
        (["train", "--select", "jest", "--select-temperature", "0"], "--select-temperature must be positive.*got 0"),
        (
            ["train", "--select", "jest", "--method", "fastclip", "--temperature-scheme", "individual"],
            "--select jest compares pairs at one temperature.*individual",
        ),
        (["cache-reference", "--views", "0"], "--views must be at least 1, got 0"),
        (["cache-reference", "--views", "2"], "--views 2 has no part in this run: it is for --catalog"),
        (
            ["cache-reference", "--catalog", "c", "--captions", "vague"],
            "--catalog takes the place of --data and its options",
        ),
        (
            ["train", "--normalizer", "network", "--divergence", "chi-square"],
            "--normalizer network has no part in this run: it is for --method fastclip or drrho, --divergence kl",
        ),
        (
            ["train", "--normalizer", "network", "--temperature-scheme", "global"],
            "--normalizer network has no part in this run.*--temperature-scheme constant",
        ),
        (
            ["train", "--normalizer-lr", "0.1"],
            "--normalizer-lr 0.1 has no part in this run: it is for --normalizer net",
        ),
        (
            ["train", "--normalizer", "network", "--more-references", "b", "--combine", "worst"],
            "--normalizer network predicts from features, which --combine worst is none of",
        ),
        (["train", "--combine", "mean"], "--combine mean has no part in this run: it is for --more-references"),
        (
            ["train", "--method", "openclip", "--more-references", "b"],
            "--more-references .* has no part in this run: it is for --method drrho",
        ),
        (
            ["train", "--more-references", "b", "--combine", "worst", "--method", "gist"],
            "--combine worst is of margins, which --method gist does not take",
        ),
        (
            ["train", "--more-references", "b", "--combine", "worst", "--coefficient", "adaptive"],
            "--combine worst is of margins, which --coefficient adaptive does not take",
        ),
        (
            ["train", "--more-references", "b", "--combine", "learned", "--select", "jest"],
            "--select jest compares with the mean of several references, not with --combine learned",
        ),
        (
            [*_IN_MEMORY[:-2], "--reference", "a", "--reference-features", "f", "--more-references", "b"],
            "are of all references or of none: got 1 and 0 folders for --more-references b",
        ),
        (["train", "--self-reference", "1"], r"--self-reference must be in \[0, 1\), got 1"),
        (
            ["train", "--method", "openclip", "--self-reference", "0.9"],
            "--self-reference 0.9 has no part in this run: it is for --method drrho",
        ),
        (["train", "--self-reference", "0.9"], "--temperature auto is that of another model.*give a number"),
        (
            ["train", "--method", "openclip", "--self-reference", "0.9", "--distill", "1"],
            "--distill-temperature auto is that of another model.*give a number",
        ),
        (
            ["train", "--self-reference", "0.9", "--reference", "there"],
            "--reference there has no part in this run: it is for runs without --self-reference",
        ),
        (
            [
                "train",
                "--catalog",
                "c",
                "--model",
                "glyph-tiny",
                "--self-reference",
                "0.9",
                "--reference-features",
                "f",
            ],
            "--reference-features f has no part in this run: it is for runs without --self-reference",
        ),
        (["train", "--in-memory"], "--in-memory True has no part in this run: it is for --catalog"),
        ([*_IN_MEMORY, "--workers", "2"], "--in-memory takes --workers 0, got 2: each would keep a copy"),
        ([*_IN_MEMORY, "--reading", "blocks"], "--in-memory takes --reading random, got blocks"),
        ([*_IN_MEMORY, "--caption-weights", "1::2"], "--caption-weights 1::2 has no part.*without --in-memory"),
        ([*_IN_MEMORY, "--aug-cfg", "scale=(0.4,1.0)"], "--aug-cfg .* has no part.*without --in-memory"),
        (
            [*_IN_MEMORY[:-2], "--method", "drrho", "--reference", "there"],
            "--in-memory needs --reference-features beside --reference",
        ),
    ],
)
def test_options_that_contradict_are_refused(words, message):
    with pytest.raises(UserError, match=message):
        parse(words)


def test_a_selection_needs_a_reference_whatever_the_method():
    for method in ("openclip", "siglip", "fastclip"):
        options = parse(["train", "--method", method, "--select", "rho-top-k", "--reference", "there"])
        assert options.needs_reference and not options.loss.needs_reference
        assert options.pairs_per_step == 5 * options.optimization.batch_size
    assert not parse(["train", "--method", "openclip"]).needs_reference


def test_a_target_that_is_its_own_reference_needs_no_other():
    for words in (["--temperature", "0.1"], ["--method", "gist"], ["--method", "openclip", "--select", "jest"]):
        options = parse(["train", "--catalog", "c", "--model", "glyph-tiny", "--self-reference", "0.9", *words])
        assert not options.needs_reference and not options.loss.needs_reference


def test_a_share_of_the_pairs_is_refused_where_it_has_no_part():
    assert parse(["train", "--fraction", "0.25"]).fraction == 0.25
    for words, message in (
        (["train", "--fraction", "0"], r"--fraction must be in \(0, 1\], got 0.0"),
        (["train", "--fraction", "1.5"], r"--fraction must be in \(0, 1\], got 1.5"),
        (
            ["train", "--fraction", "0.5", "--catalog", "c"],
            "--catalog takes the place of --data and its options, --split",
        ),
        (["plan", "--fraction", "0.5"], "--fraction 0.5 has no part in a plan: give --samples"),
        (["evaluate", "there", "--fraction", "0.5"], "Unrecognized options: --fraction"),
    ):
        with pytest.raises(UserError, match=message):
            parse(words)


@pytest.mark.parametrize("millions, minutes", [(3, 1), (30, 1), (150, 5), (420, 14), (2500, 30)])
def test_checkpoints_of_large_models_are_written_seldom_unless_something_is_said(millions, minutes):
    assert CheckpointPolicy().minutes(millions * 10**6) == minutes
    assert CheckpointPolicy(checkpoint_minutes=2.5).minutes(millions * 10**6) == 2.5
    assert parse(["train", "--method", "openclip"]).keeping == CheckpointPolicy()
