"""Search: the best pictures of an exact product, a sheet with names, and questions that cannot be answered."""

import pytest
import torch
from PIL import Image

from experiments.clip.catalog.catalog import make_catalog
from experiments.clip.cli.options import Data
from experiments.clip.errors import UserError
from experiments.clip.glyphs.dataset import read_samples
from experiments.clip.icons.search import Index
from experiments.clip.run import main
from experiments.clip.training.options import SHIPPED_REFERENCE

pytest.importorskip("resvg_py", reason="icons are drawn by resvg_py, of the extra icons")


@pytest.fixture(scope="module")
def index(icon_data, reference):
    return Index(reference, icon_data)


@torch.no_grad()
def test_the_best_are_those_of_the_whole_product(index, manifest, reference):
    pairs = [pair for split in manifest.splits for pair in read_samples(manifest, split)]
    assert len(index) == len(pairs)
    images = torch.cat([reference.encode_image(reference.preprocess(pair.image)[None]) for pair in pairs])
    scores = images @ reference.encode_text(["a circle"])[0]
    found = index.find("a circle", 5)
    assert [each.score for each in found] == pytest.approx(scores.topk(5).values.tolist(), abs=2e-3)
    assert all(scores[each.sample].item() == pytest.approx(each.score, abs=2e-3) for each in found)
    for each in found:
        pair = pairs[each.sample]
        assert each.shown.image.tobytes() == pair.image.tobytes()
        assert (each.shown.caption, each.shown.details) == (pair.caption, pair.meta)


def test_a_picture_finds_itself(index, manifest):
    pair = next(read_samples(manifest, "test"))
    best = index.find(pair.image, 1)[0]
    assert best.score == pytest.approx(1, abs=2e-3)


def test_more_than_there_are_is_refused(index):
    with pytest.raises(UserError, match=f"--top {len(index) + 1} is more than the {len(index)} pictures"):
        index.find("a circle", len(index) + 1)


def test_the_command_writes_a_sheet_and_computes_features_once(icon_data, tmp_path, capsys):
    words = ["search", "thing ab", "--data", "icons", "--pixels", "16", "--cache", str(icon_data.cache)]
    words += ["--model", str(SHIPPED_REFERENCE), "--top", "9", "--out", str(tmp_path / "a" / "sheet.png")]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "the 9 best are in" in printed
    assert "MIT" in printed or "CC-BY-4.0" in printed
    with Image.open(tmp_path / "a" / "sheet.png") as sheet:
        assert sheet.size[0] > 8 * 96
    files = {path: path.stat().st_mtime_ns for path in icon_data.cache.glob("features-*/*")}
    assert main(words) == 0
    assert files == {path: path.stat().st_mtime_ns for path in icon_data.cache.glob("features-*/*")}
    assert "reusing" in capsys.readouterr().out


def test_a_picture_is_a_question_and_a_catalog_a_place(manifest, tmp_path, capsys):
    catalog = tmp_path / "catalog"
    made = make_catalog([str(manifest.folder / shard.name) for shard in manifest.splits["test"].shards], catalog)
    Image.new("RGB", (30, 30)).save(tmp_path / "black.png")
    words = [
        "search",
        "--catalog",
        str(catalog),
        "--cache",
        str(tmp_path),
        "--model",
        "glyphs",
        "--top",
        str(len(made)),
    ]
    assert main([*words, "--image", str(tmp_path / "black.png"), "--out", str(tmp_path / "sheet.png")]) == 0
    assert f"over {len(made)} pictures" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "the query is empty: say what to look for"),
        (["  "], "the query is empty: say what to look for"),
        (["cat", "--image", "a.png"], "--image takes the place of the query"),
        (["cat", "--top", "0"], "--top must be at least 1, got 0"),
        (["cat", "--catalog", "c", "--pixels", "32"], "--pixels 32 has no part in this run"),
        (["cat", "--data", "glyphs"], "--data must be icons, got glyphs"),
        (["--image", "nothing.png"], "nothing.png cannot be read (No such file or directory)"),
        (["--image", "text.png"], "text.png is no picture in JPEG, PNG or WebP"),
        (
            ["cat", "--model", "glyphs", "--size", "small"],
            "there are no icons in cache/icons-64-small: run `python experiments/clip/run.py prepare --data icons "
            "--size small`",
        ),
    ],
    ids=["empty", "blank", "both", "none", "pixels", "glyphs", "missing", "text", "unprepared"],
)
def test_a_question_that_cannot_be_answered_is_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.png").write_text("no picture")
    assert main(["search", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_sheet_that_cannot_be_written_is_one_line(icon_data, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    words = ["search", "cat", "--pixels", "16", "--cache", str(icon_data.cache), "--model", "glyphs"]
    assert main([*words, "--top", "2", "--out", str(tmp_path / "file" / "sheet.png")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_icons_of_another_size_are_not_there(icon_data, reference):
    with pytest.raises(UserError, match="there are no icons in"):
        Index(reference, Data(kind="icons", cache=icon_data.cache, pixels=8))
