"""Pictures of icons: on white, equal each time, drawn once, and nothing is read or run that a document names."""

import io

import numpy as np
import pytest
from PIL import Image

from experiments.clip.icons import rendering
from experiments.clip.icons.rendering import Renders, fault, render

pytest.importorskip("resvg_py", reason="icons are drawn by resvg_py, of the extra icons")

HEAD = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 24 24" color="#000">'
HALF = HEAD + '<path fill="currentColor" d="M0 0h12v24H0z"/></svg>'


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)))


def test_black_on_white_in_the_size_that_is_asked_for():
    picture = pixels(render(HALF, 16))
    assert picture.shape == (16, 16, 3)
    assert (picture[:, :8] == 0).all()
    assert (picture[:, 8:] == 255).all()


def test_colors_stay_and_a_long_drawing_is_centered():
    wide = HEAD.replace("0 0 24 24", "0 0 24 12") + '<path fill="#f00" d="M0 0h24v12H0z"/></svg>'
    picture = pixels(render(wide, 16))
    assert picture[8, 8].tolist() == [255, 0, 0]
    assert (picture[[0, 1, 14, 15]] == 255).all()


@pytest.mark.parametrize(
    "body", ["", '<path fill="#fff" d="M0 0h24v24H0z"/>', '<path fill="none" d="M0 0h9v9z"/>', "<path"], ids=range(4)
)
def test_what_shows_nothing_or_cannot_be_drawn_is_no_picture(body):
    assert render(HEAD + body + "</svg>", 16) is None


@pytest.mark.parametrize(
    "body",
    [
        '<image href="file:///etc/passwd"/>',
        '<use xlink:href="other.svg#a"/>',
        "<use href='http://example.org/a'/>",
        '<path fill="url(http://example.org/#a)"/>',
        "<style>@import 'a'</style>",
        "<text>a</text>",
        "<script/>",
        "< script/>",
        "<foreignObject/>",
        "<!DOCTYPE a>",
    ],
    ids=range(10),
)
def test_what_reads_or_runs_something_is_left_out(body):
    assert fault(HEAD + body + "</svg>") == "unsafe"


def test_references_within_the_document_are_allowed_and_long_ones_are_not():
    assert fault(HEAD + '<use href="#a"/><path fill="url(#b)" mask="url( \'#c\')"/></svg>') == ""
    assert fault(HEAD + "M1 1" * 30_000) == "too long"


def test_pictures_are_kept_and_a_damaged_file_is_drawn_again(tmp_path, monkeypatch):
    documents = [HALF, HEAD + "</svg>", HALF.replace("h12", "h6")]
    monkeypatch.setattr(rendering, "_CHUNK", 2)
    renders, done = Renders(tmp_path / "pictures", 16), []
    drawn = renders.draw(documents, lambda count, total: done.append((count, total)))
    assert drawn == [render(document, 16) for document in documents]
    assert drawn[1] is None
    assert done == [(2, 3), (3, 3)]

    files = sorted((tmp_path / "pictures").iterdir())
    assert len(files) == 2
    monkeypatch.setattr(rendering, "render", lambda *_: pytest.fail("drawn again"))
    monkeypatch.setattr(rendering, "spread", map)
    assert renders.draw(documents, lambda *_: None) == drawn
    monkeypatch.undo()
    damaged = bytearray(files[0].read_bytes())
    damaged[-1] ^= 1
    files[0].write_bytes(damaged)
    monkeypatch.setattr(rendering, "_CHUNK", 2)
    assert renders.draw(documents, lambda *_: None) == drawn
    renders.remove()
    assert not (tmp_path / "pictures").exists()
