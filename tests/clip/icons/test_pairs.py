"""Icons are trained on as glyphs are: in memory, named over the names that are held out, under a named reference."""

import pytest

from experiments.clip.cli.options import Train
from experiments.clip.cli.parser import as_words, parse_options
from experiments.clip.cli.train import run_training
from experiments.clip.glyphs.source import load_pairs
from experiments.clip.icons.pairs import evaluate_model
from experiments.clip.models.clip import load_model
from experiments.clip.run import main


@pytest.fixture(scope="module")
def reference(icon_data, manifest, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "reference"
    words = ["train", "--data", "icons", "--pixels", "16", "--cache", str(icon_data.cache), "--split", "reference"]
    words += ["--model", "glyph-micro", "--method", "openclip", "--epochs", "2", "--batch-size", "16", "--warmup", "2"]
    assert main([*words, "--validations", "1", "--out", str(out)]) == 0
    return out / "model"


def options_of(icon_data, out, **more):
    words = ["--data", "icons", "--pixels", "16", "--cache", str(icon_data.cache), "--model", "glyph-micro"]
    words += ["--epochs", "2", "--batch-size", "16", "--warmup", "2", "--validations", "1", "--out", str(out)]
    return parse_options(
        Train, [*words, *(word for pair in more.items() for word in (f"--{pair[0]}", str(pair[1])))], "train"
    )


def test_a_steered_run_is_validated_by_naming_over_the_held_out_names(icon_data, manifest, reference, tmp_path):
    options = options_of(icon_data, tmp_path / "run", reference=reference, coefficient="scheduled", temperature=0.1)
    trained = run_training(options)
    last = trained.history[-1]
    held_out = load_pairs(manifest, "validation", trained.clip)
    found = evaluate_model(trained.clip, held_out, manifest)
    assert found.naming.classes == len(set(held_out.captions))
    assert last["naming_top1"] == pytest.approx(found.naming.top1)
    assert found.attributes == {}
    assert trained.identity["data"] == manifest.fingerprint
    assert parse_options(Train, as_words(options), "train") == options


def test_the_target_and_its_reference_see_other_icons(icon_data, manifest, reference):
    clip = load_model(reference)
    names = {split: set(load_pairs(manifest, split, clip).captions) for split in ("train", "reference")}
    assert not names["train"] & names["reference"]


def test_scores_of_held_out_icons_are_printed(icon_data, manifest, reference, capsys):
    words = ["evaluate", str(reference), "--data", "icons", "--pixels", "16", "--cache", str(icon_data.cache)]
    assert main(words) == 0
    assert "top-1" in capsys.readouterr().out


def test_icons_have_no_reference_of_their_own(capsys):
    for words in (["train", "--data", "icons"], ["cache-reference", "--data", "icons"]):
        assert main(words) == 2
        assert "--data icons needs --reference" in capsys.readouterr().err
    assert main(["train", "--data", "icons", "--method", "openclip", "--captions", "clean"]) == 2
    assert "--captions clean has no part in this run: it is for --data glyphs" in capsys.readouterr().err
    assert main(["train", "--swapped", "0.2"]) == 2
    assert "it is for --data icons" in capsys.readouterr().err
