"""Splits of the icons: neither a drawing nor a name is in both pools, and each split gets its share."""

from collections import Counter

import pytest

from experiments.clip.icons.package import Icon, IconSet
from experiments.clip.icons.splits import SHARES, drawing_splits, family_of, kind_of, split_of


def a_set(prefix, icons=1, author="", category="UI 24px"):
    return IconSet(prefix, prefix, author, "MIT", "", category, (Icon("a", "", ()),) * icons)


@pytest.mark.parametrize(
    "prefix, category, kind",
    [
        ("twemoji", "Emoji", "emoji"),
        ("fluent-emoji", "", "emoji"),
        ("thesvg", "Logos", "brand"),
        ("fa-brands", "Archive / Unmaintained", "brand"),
        ("flag", "Flags / Maps", "flag"),
        ("maki", "Flags / Maps", "interface"),
        ("mdi", "Material", "interface"),
    ],
)
def test_kinds(prefix, category, kind):
    assert kind_of(a_set(prefix, category=category)) == kind


def test_sets_of_one_author_or_drawn_after_one_another_are_one_family():
    assert family_of(a_set("lucide", author="a")) == family_of(a_set("feather", author="b"))
    assert family_of(a_set("x", author="a")) == family_of(a_set("y", author="a")) == "a"
    assert family_of(a_set("z")) == "z"


def test_families_are_dealt_out_by_size_within_their_kind():
    sets = [a_set(f"set-{number}", 400 // number) for number in range(1, 40)]
    sets += [a_set("noto", 100, category="Emoji"), a_set("twemoji", 90, category="Emoji")]
    found = drawing_splits(reversed(sets))
    assert found == drawing_splits(sets)
    icons = Counter[str]()
    for each in sets[:39]:
        icons[found["interface", each.prefix]] += len(each.icons)
    total = sum(icons.values())
    assert all(icons[split] / total == pytest.approx(share, abs=0.02) for split, share in SHARES.items())
    assert {found["emoji", "noto"], found["emoji", "twemoji"]} == {"reference", "train"}


def test_a_name_is_in_one_pool_and_tests_ask_for_all():
    by_drawing = {("interface", split): split for split in SHARES}
    for name in map(str, range(200)):
        pools = [split_of("interface", pool, name, by_drawing) for pool in ("train", "reference")]
        assert pools in (["train", None], [None, "reference"])
        assert split_of("interface", "test", name, by_drawing) == "test"
        assert split_of("interface", "validation", name, by_drawing) == "validation"


@pytest.mark.parametrize("kind", ["brand", "flag"])
def test_logos_and_flags_are_split_by_name_whatever_the_set(kind):
    names = [f"name {number}" for number in range(4000)]
    found = Counter(split_of(kind, "whatever", name, {}) for name in names)
    assert all(found[split] / 4000 == pytest.approx(share, abs=0.03) for split, share in SHARES.items())
