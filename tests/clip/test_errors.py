"""Text that comes from elsewhere, fit for a terminal."""

import pytest

from experiments.clip.errors import printable


@pytest.mark.parametrize(
    "text, shown",
    [
        ("wds/imagenet1k", "wds/imagenet1k"),
        ("größe [red] ✓", "größe [red] ✓"),
        ("a\x1b[31mb", r"a\x1b[31mb"),
        ("a\r\nb\tc\x07", r"a\r\nb\tc\x07"),
        ("\x9b2J\u202egpj", r"\x9b2J\u202egpj"),
        ("\udcff", r"\udcff"),
    ],
)
def test_what_does_not_print_is_escaped(text, shown):
    assert printable(text) == shown
    assert shown.isprintable()
