"""The picture of what the shipped model of the icons finds: drawn again from a few icons, and the committed one."""

import pytest
from icon_archive import icon_set, write_archive
from PIL import Image

from experiments.clip.cli.options import Data
from paper_figures.icon_search import COUNT, HERE, main


def test_it_is_drawn_from_prepared_icons(tmp_path, capsys):
    pytest.importorskip("resvg_py", reason="icons are drawn by resvg_py, of the extra icons")
    from experiments.clip.icons.source import prepare

    names = [f"thing-{letter}{other}" for letter in "abcdefgh" for other in "abcdefgh"]
    body = '<circle cx="{size}" cy="9" r="3"/>'
    sets = {str(n): icon_set(names, author=str(n), body=body.replace("9", str(5 + n))) for n in range(9)}
    prepare(Data(kind="icons", cache=tmp_path, pixels=16), write_archive(tmp_path / "icons.tgz", sets))
    words = ["--cache", str(tmp_path), "--pixels", "16", "--model", "glyphs", "--out", str(tmp_path)]
    assert main([*words, "--queries", "a circle", "a thing"]) == 0
    with Image.open(tmp_path / "icon_search.png") as picture:
        assert picture.width > COUNT * 96
    capsys.readouterr()
    assert main([*words, "--cache", str(tmp_path / "nothing")]) == 3
    assert "run `python experiments/clip/run.py prepare --data icons --pixels 16" in capsys.readouterr().err


def test_the_committed_picture_is_small():
    path = HERE / "icon_search.png"
    assert path.stat().st_size < 200_000
    with Image.open(path) as picture:
        assert picture.width > COUNT * 96
