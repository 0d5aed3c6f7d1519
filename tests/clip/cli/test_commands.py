"""The commands ``evaluate``, ``cache-reference`` and ``catalog``, as the entry calls them."""

import pytest

from experiments.clip.cli.options import SHIPPED_REFERENCE
from experiments.clip.run import main


def test_a_catalog_says_what_it_holds(tmp_path, capsys):
    assert main(["catalog", "synthetic:20:32", "--out", str(tmp_path / "catalog"), "--workers", "0"]) == 0
    assert "20 pairs in 1 shards" in capsys.readouterr().out
    assert main(["catalog", str(tmp_path / "none.tar"), "--out", str(tmp_path / "other")]) == 2
    assert "none.tar" in capsys.readouterr().err


@pytest.mark.slow
def test_features_of_a_catalog_are_computed_once(tmp_path, capsys):
    assert main(["catalog", "synthetic:8:32", "--out", str(tmp_path / "catalog"), "--workers", "0"]) == 0
    words = ["cache-reference", "--catalog", str(tmp_path / "catalog"), "--out", str(tmp_path / "features")]
    assert main(words) == 0
    assert "computed 8 rows" in capsys.readouterr().out
    assert main(words) == 0
    assert "reusing" in capsys.readouterr().out


@pytest.mark.slow
def test_a_model_is_scored_on_held_out_glyphs(glyph_cache, capsys):
    words = ["evaluate", str(SHIPPED_REFERENCE), "--size", "small", "--cache", str(glyph_cache)]
    assert main([*words, "--split", "validation"]) == 0
    shown = capsys.readouterr().out
    assert "naming top-1" in shown and "text to image R@10" in shown


def test_the_embedded_pairs_are_cached_by_one_process(monkeypatch, capsys):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    assert main(["cache-reference"]) == 2
    assert "the embedded pairs take one process" in capsys.readouterr().err
    assert main(["prepare"]) == 2
    assert "this command takes one process, here are 2" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["evaluate", "nowhere"], ["cache-reference", "--reference", "nowhere"]])
def test_a_model_that_is_not_there_is_one_line(words, capsys):
    assert main(words) == 2
    assert "no model is called 'nowhere'" in capsys.readouterr().err
