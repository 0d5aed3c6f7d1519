"""The figures about held-out icons: areas against a count of pairs, neighbors against a loop, the command on a few."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.benchmarks import icon_scores
from experiments.benchmarks.icon_scores import (
    BEGIN,
    CLDR,
    END,
    README,
    RESULTS,
    area,
    by_cldr,
    exchanged,
    main,
    measured_before,
    nearest_names,
    page,
    raw_pixels,
    rewritten,
    separation,
    top_shares,
)
from experiments.clip.glyphs.dataset import StoredPair


def test_the_area_counts_pairs_with_ties_as_half():
    rng = np.random.default_rng(0)
    scores, is_true = rng.integers(0, 9, 60).astype(float), np.arange(60) % 3 == 0
    weights = rng.integers(0, 4, 60).astype(float)
    above = (scores[is_true][:, None] > scores[~is_true]) + (scores[is_true][:, None] == scores[~is_true]) / 2
    each = weights[is_true][:, None] * weights[~is_true]
    assert area(scores, is_true, weights) == pytest.approx((above * each).sum() / each.sum())


def test_the_interval_holds_the_estimate_and_is_wider_where_icons_share_names(monkeypatch):
    monkeypatch.setattr(icon_scores, "RESAMPLES", 200)
    rng = np.random.default_rng(0)
    shift = np.repeat(rng.normal(size=40), 10)  # icons of a name are alike
    own, other = 1 + shift, rng.normal(size=400)
    together = separation(own, other, np.repeat(np.arange(40), 10).astype(str).tolist(), rng)
    apart = separation(own, other, np.arange(400).astype(str).tolist(), rng)
    assert together.value == apart.value
    assert together.low < together.value < together.high
    assert together.high - together.low > 1.5 * (apart.high - apart.low)


def test_exchanged_names_are_other_names():
    names = ["a", "b", "a", "c"] * 25
    place = exchanged(names, np.random.default_rng(0))
    assert all(names[k] != name for k, name in zip(place, names, strict=True))


def test_emoji_are_named_as_cldr_does():
    kinds = ("interface", "emoji", "emoji")
    pairs = [
        StoredPair(k, f"k{k}", Image.new("RGB", (1, 1)), name, {"kind": kind, "set": "x"})
        for k, (name, kind) in enumerate(zip(("fax machine", "faxmachine", "nothing"), kinds, strict=True))
    ]
    [renamed], places = by_cldr(pairs, {"1F4E0": "fax machine", "1F600": "grinning face"})
    assert (renamed.caption, renamed.meta, places) == ("fax machine", {"kind": CLDR, "set": "x"}, [1])


def test_neighbors_are_those_of_a_loop_among_the_names_that_are_allowed():
    rng = torch.Generator().manual_seed(0)
    items, queries = torch.rand(50, 6, generator=rng), torch.rand(7, 6, generator=rng)
    names = [f"n{k % 12}" for k in range(50)]
    allowed = frozenset(names) - {"n3"}
    ranked, distances = nearest_names(queries, items, names, allowed)
    for query, found, distance in zip(queries, ranked, distances, strict=True):
        order = sorted((k for k in range(50) if names[k] in allowed), key=lambda k: float((items[k] - query).norm()))
        assert found == list(dict.fromkeys(names[k] for k in order))[:10]
        assert distance.item() == pytest.approx((items[order[0]] - query).norm().item(), abs=1e-5)


def test_shares_and_pixels():
    ranked = [["a", "b", "c", "d", "e", "f"], ["f", "a"]]
    assert top_shares(ranked, ["f", "f"]) == {"top1": 0.5, "top5": 0.5, "top10": 1.0}
    assert raw_pixels([Image.new("RGB", (4, 4), (255, 0, 51))], 1, "RGB").tolist() == [[1.0, 0.0, pytest.approx(0.2)]]


def test_neighbors_of_the_same_icons_are_not_looked_for_again(tmp_path):
    found = {"icons": 5, "top1": 0.5, "far_icons": "a8"}
    (tmp_path / "s.json").write_text(json.dumps({"data": "a", "naming": {"neighbors": found}}))
    assert measured_before(tmp_path / "s.json", "a", 5) == found
    for path, data, asked in (
        (tmp_path / "s.json", "b", 5),
        (tmp_path / "s.json", "a", 6),
        (tmp_path / "none", "a", 5),
    ):
        assert measured_before(path, data, asked) is None
    (tmp_path / "s.json").write_text("[]")
    assert measured_before(tmp_path / "s.json", "a", 5) is None


@pytest.mark.slow
def test_the_command_measures_a_few_icons(tmp_path, capsys, monkeypatch):
    pytest.importorskip("resvg_py", reason="icons are drawn by resvg_py, of the extra icons")
    from icon_archive import icon_set, write_archive

    from experiments.clip.cli.options import Data
    from experiments.clip.icons.source import prepare

    monkeypatch.setattr(icon_scores, "RESAMPLES", 20)
    names = [f"thing-{letter}{other}" for letter in "abcdefgh" for other in "abcdefgh"]
    circle = '<circle cx="{size}" cy="9" r="3"/>'
    sets = {str(n): icon_set(names, author=str(n), body=circle.replace("9", str(5 + n))) for n in range(9)}
    prepare(Data(kind="icons", cache=tmp_path, pixels=16), write_archive(tmp_path / "icons.tgz", sets))
    words = ["--cache", str(tmp_path), "--pixels", "16", "--model", "glyphs", "--asked", "20", "--languages", "en"]
    assert main([*words, "--tasks", str(tmp_path / "tasks"), "--out", str(tmp_path / "scores.json")]) == 0
    record = json.loads((tmp_path / "scores.json").read_text())
    assert record["naming"]["asked"]["icons"] == record["naming"]["neighbors"]["icons"] == 20
    assert record["naming"]["far"]["icons"] == record["naming"]["neighbors"]["far"]["icons"] <= 10
    assert record["separation"].keys() == {"interface"}
    assert record["tasks"]["icon-names"]["acc1"] == pytest.approx(record["naming"]["all"]["top1"], abs=1e-9)
    assert "| interface |" in capsys.readouterr().out
    assert main([*words, "--pixels", "8"]) == 2
    assert "there are no icons" in capsys.readouterr().err


def test_the_readme_has_the_tables_of_the_record():
    text = README.read_text()
    assert text == rewritten(text, page(json.loads(RESULTS.read_text())))
    assert text.count(BEGIN) == text.count(END) == 1
