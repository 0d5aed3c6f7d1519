"""Captions of icons: words of style are left out where a set uses them as such, and nowhere else."""

import pytest

from experiments.clip.icons.captions import Style, caption, style_of


def captions(*names):
    style = style_of(names)
    return [caption(name, style) for name in names]


def test_words_of_style_at_either_end_are_left_out():
    assert captions("home-outline", "home", "sun-outline", "sun") == ["home", "home", "sun", "sun"]
    assert captions("outline-home", "home", "outline-sun", "sun") == ["home", "home", "sun", "sun"]
    names = [f"{name}-{style}" for name in ("drop", "sun") for style in ("24-filled", "16-regular")]
    assert captions(*names) == ["drop", "drop", "sun", "sun"]
    assert captions("cube-two-tone", "cube-sharp-two-tone", "cube-sharp") == ["cube"] * 3


def test_the_same_words_are_content_where_no_partner_says_otherwise():
    assert captions("traffic-light", "chart-line", "home") == ["traffic light", "chart line", "home"]
    # One pair among hundreds is no system.
    names = [f"thing-{word}" for word in "abcdefghijklmnopqrstuvwxyz"] * 8 + ["bulb-light", "bulb"]
    assert captions(*names)[-2:] == ["bulb light", "bulb"]


def test_words_within_a_name_stay():
    assert captions("a-bold-text-bold", "a-bold-text", "cup-bold", "cup")[:2] == ["a bold text"] * 2
    assert captions("a-filled-cup", "a-cup", "b-filled-cup", "b-cup")[0] == "a filled cup"


@pytest.mark.parametrize(
    "name, expected",
    [("outline", "outline"), ("outline-outline", "outline"), ("24", ""), ("1-2", ""), ("3d-Cube_X", "3d cube x")],
)
def test_a_caption_has_a_word_with_a_letter_or_is_empty(name, expected):
    style = Style(frozenset({"outline"}), frozenset({"outline", "24"}))
    assert caption(name, style) == expected
