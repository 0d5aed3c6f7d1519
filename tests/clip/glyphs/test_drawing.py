"""The drawn characters, their splits, and what is done to the training captions."""

import unicodedata
from functools import cache

import numpy as np
import pytest

from experiments.clip.glyphs.drawing import (
    SPLITS,
    SWAPPED_SHARE,
    draw_glyphs,
    faces,
    glyph_splits,
    split_of,
    swapped,
    vague,
)


@cache
def drawn(chosen):
    return glyph_splits("swapped", chosen=chosen)


FEW_FACES = ("dejavusans", "dejavusans-bold")


@pytest.fixture(params=[FEW_FACES, pytest.param(None, marks=pytest.mark.slow, id="all faces")])
def splits(request):
    return drawn(request.param)


def pairs_of(splits):
    return [pair for pairs in splits.values() for pair in pairs]


@pytest.mark.slow
def test_the_data_set_has_the_expected_extent():
    pairs = pairs_of(drawn(None))
    # Later Unicode versions name a few more of the fonts' characters.
    assert len(pairs) == pytest.approx(52572, rel=0.01)
    assert len({pair.meta["name"] for pair in pairs}) == pytest.approx(7144, rel=0.01)
    assert {pair.meta["face"] for pair in pairs} == set(faces())
    assert len(faces()) == 16


@pytest.mark.slow
def test_names_are_unicode_names(splits):
    for pair in pairs_of(splits):
        assert pair.meta["name"] == unicodedata.name(chr(pair.meta["code_point"])).lower()


@pytest.mark.slow
def test_no_image_is_blank_or_cut_to_its_edge(splits):
    ink = 255 - np.stack([np.asarray(pair.image) for pair in pairs_of(splits)])
    assert ink.shape[1:] == (32, 32)
    assert ink.max(axis=(1, 2)).min() > 40
    assert not ink[:, [0, -1]].any() and not ink[:, :, [0, -1]].any()


@pytest.mark.slow
def test_a_capital_is_larger_than_its_small_letter_and_a_dot_above_is_above():
    glyphs = {
        chr(pair.meta["code_point"]): np.asarray(pair.image) < 255
        for pair in pairs_of(drawn(FEW_FACES))
        if pair.meta["face"] == "dejavusans"
    }
    height = {character: ink.any(axis=1).sum() for character, ink in glyphs.items()}
    assert height["O"] > height["o"] and height["X"] > height["x"]
    center = {character: np.nonzero(ink)[0].mean() for character, ink in glyphs.items()}
    assert center["˙"] < 16 < center["."]
    columns = [np.nonzero(ink.any(axis=0))[0] for ink in glyphs.values()]
    assert all(abs(inked[0] - (31 - inked[-1])) <= 1 for inked in columns)


def test_other_sizes_are_drawn():
    glyph = next(draw_glyphs(48))
    assert glyph.image.size == (48, 48)
    assert (glyph.face, glyph.code_point, glyph.caption) == ("dejavusans", 0x21, "exclamation mark")


@pytest.mark.slow
def test_split_shares_and_disjointness():
    splits = drawn(None)
    total = len(pairs_of(splits))
    shares = {name: len(pairs) / total for name, pairs in splits.items()}
    assert list(shares) == list(SPLITS)
    expected = {"train": 0.45, "reference": 0.45, "validation": 0.05, "test": 0.05}
    assert shares == pytest.approx(expected, abs=0.01)
    assert len({pair.key for pair in pairs_of(splits)}) == total
    assert all(
        split_of(pair.meta["face"], pair.meta["code_point"]) == name for name, pairs in splits.items() for pair in pairs
    )


@pytest.mark.parametrize(
    ("face", "code_point", "split"),
    [
        ("dejavusans", 0x41, "train"),
        ("dejavusans", 0x44, "reference"),
        ("dejavusans", 0x45, "test"),
        ("dejavusans", 0xA4, "validation"),
        ("stixgeneralbolita", 0x41, "reference"),
        ("stixgeneralbolita", 0x42, "validation"),
        ("stixgeneralbolita", 0x44, "train"),
        ("stixgeneralbolita", 0x51, "test"),
        ("dejavusansmono-bold", 0x41, "reference"),
    ],
)
def test_splits_never_change(face, code_point, split):
    assert split_of(face, code_point) == split


def test_keys_are_as_documented(splits):
    by_place = {(pair.meta["face"], pair.meta["code_point"]): pair for pair in pairs_of(splits)}
    assert by_place["dejavusans-bold", 0x41].key == "dejavusans-bold-00041"


@pytest.mark.slow
def test_only_train_is_corrupted_and_no_split_is_sorted_by_face():
    for name, pairs in drawn(None).items():
        wrong = np.mean([pair.caption != pair.meta["name"] for pair in pairs])
        assert wrong == (pytest.approx(SWAPPED_SHARE, abs=0.005) if name == "train" else 0)
        assert len({pair.meta["face"] for pair in pairs[:200]}) > 12


def test_an_unknown_corruption_is_named():
    with pytest.raises(ValueError, match="'loud': choose one of clean, vague, swapped"):
        glyph_splits("loud")


def test_vague_keeps_words_in_order_and_is_a_pure_function():
    words = [f"w{i}" for i in range(4)]
    kept = [vague(" ".join(words), 0.5, f"key{i}").split() for i in range(4000)]
    assert all(row and row == [word for word in words if word in row] for row in kept)
    # Each word survives by its own draw, or as the one rescued word: 1/2 + (1/2)^4 / 4.
    for word in words:
        assert np.mean([word in row for row in kept]) == pytest.approx(0.5 + 0.5**4 / 4, abs=0.03)
    assert kept[:50] == [vague(" ".join(words), 0.5, f"key{i}").split() for i in range(50)]


def test_vague_extremes():
    caption = "latin small letter a"
    assert vague(caption, 1.0, "k") == caption
    assert {vague(caption, 0.0, f"k{i}") for i in range(100)} == set(caption.split())
    assert vague("ampersand", 0.0, "k") == "ampersand"


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_swapped_moves_exactly_the_share(share):
    captions = [f"caption {i}" for i in range(501)]
    result = swapped(captions, share, seed=3)
    assert sorted(result) == sorted(captions)
    assert sum(a != b for a, b in zip(captions, result, strict=True)) == round(share * 501)
    assert result == swapped(captions, share, seed=3)
    assert share == 0 or result != swapped(captions, share, seed=4)
