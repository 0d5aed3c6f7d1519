"""The demo: the options of its two trainings, and all of it on a few glyphs."""

import dataclasses
import json
import re

import pytest
from PIL import Image

from experiments.clip.cli.options import Data
from experiments.clip.cli.presets import PRESETS
from experiments.clip.glyphs import demo
from experiments.clip.glyphs.options import Demo


def test_both_trainings_are_their_presets_with_the_demos_data_and_seed(tmp_path):
    data = Data("vague", "full", tmp_path)
    options = Demo(captions="vague", cache=tmp_path, out=tmp_path / "out", reference=tmp_path / "other", seed=7)
    steered, unsteered = (demo.training_options(options, data, name) for name in ("steered", "unsteered"))
    assert (steered.data, steered.seed, steered.out) == (data, 7, tmp_path / "out" / "steered")
    assert steered.loss.reference == tmp_path / "other"
    assert steered.optimization == PRESETS["glyph-steered"].optimization
    assert unsteered.loss == PRESETS["glyph-unsteered"].loss  # which has no reference
    assert (unsteered.data, unsteered.seed, unsteered.out) == (data, 7, tmp_path / "out" / "unsteered")


def test_the_quick_demo_trains_a_smaller_model_for_fewer_epochs_and_is_else_the_demo(tmp_path):
    quick, whole = (demo.training_options(Demo(each, out=tmp_path), Data(), "steered") for each in (True, False))
    assert (quick.model, quick.optimization.epochs, quick.validations) == (demo.QUICK_MODEL, demo.QUICK_EPOCHS, 2)
    assert quick.optimization.batch_size == demo.QUICK_BATCH
    longer = dataclasses.replace(quick.optimization, epochs=whole.optimization.epochs, batch_size=512)
    assert dataclasses.replace(quick, model=whole.model, optimization=longer, validations=whole.validations) == whole


@pytest.mark.slow
def test_the_demo_trains_scores_and_reports(glyph_cache, tmp_path, capsys):
    demo.run(Demo(quick=True, cache=glyph_cache, out=tmp_path))
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["options"]["captions"] == "swapped" and results["pairs"] == 150
    assert list(results["scores"]) == ["reference", "unsteered", "steered"]
    assert set(results["runs"]) == {"unsteered", "steered"}
    shown = capsys.readouterr().out
    assert "Trained on swapped captions, a small run: 150 pairs, 2 epochs" in shown and "naming top-1" in shown
    assert re.search(r"method\W+fastclip\W+drrho", shown) and re.search(r"reference\W+none\W+yes", shown)
    for name in ("curves.png", "predictions.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 400
    assert "| naming top-1 |" in (tmp_path / "report.md").read_text()
