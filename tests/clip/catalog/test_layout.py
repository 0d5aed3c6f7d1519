"""Hints at shards that are not webdataset's: each kind of layout is recognized, and the remedy it names works."""

import json

import pytest
from tars import everything, image_bytes, pair, write_tar

from experiments.clip.catalog.catalog import IMAGE_KEYS, make_catalog
from experiments.clip.catalog.layout import layout_hint
from experiments.clip.errors import UserError

IMAGE = image_bytes(1)
JSON = json.dumps({"url": "x", "width": 3, "caption_en": "c"}).encode()


@pytest.mark.parametrize(
    ("members", "hint"),
    [
        ([("a.png", IMAGE), ("a.caption", b"c")], r"may be --caption-key caption \(its first members: .png 1, .captio"),
        (
            [("a.png", IMAGE), ("a.json", JSON)],
            r"may be --caption-key json:caption_en \(of the fields caption_en, url\)",
        ),
        ([("a.png", IMAGE), ("a.json", b"{")], r"--caption-key names the members that are captions \(its first memb"),
        ([("a.png", IMAGE), ("a.cls", b"1")], r"--caption-key names the members that are captions .*\.png 1, \.cls 1"),
        ([("a.left.png", IMAGE), ("a.txt", b"c")], r"its images may be --image-key left.png \(its first members"),
        (
            [(f"a.{number}.{kind}", IMAGE) for number in range(3) for kind in ("png", "txt")],
            r"the name of a sample ends at the first dot.* here 0.png and 1.png: name the members so",
        ),
        ([("a.gif", b"x"), ("a.txt", b"c")], r"images are JPEG, PNG or WebP, not gif"),
        ([("a.bin", b"x"), ("a.txt", b"c")], r"--image-key names the members that are images"),
        ([("a.png", IMAGE), ("b.png", IMAGE), ("a.txt", b"c"), ("b.txt", b"c")], "must follow each other, as tar --so"),
        (
            [("i/a.png", IMAGE), ("t/a.txt", b"c")],
            "i/a and t/a are two samples: image and caption must be in one folder",
        ),
        ([("a_1.png", IMAGE), ("a_2.txt", b"c")], "a_1 and a_2 are two samples: image and caption must have one name"),
        ([("plain", IMAGE)], "check --image-key, --caption-key and files"),
    ],
    ids=range(12),
)
def test_a_layout_that_gives_no_sample_is_refused_with_a_hint(tmp_path, members, hint):
    path = write_tar(tmp_path / "x.tar", members)
    with pytest.raises(UserError, match=f"no sample with image and caption .*{hint}"):
        make_catalog(path, tmp_path / "catalog")


@pytest.mark.parametrize(
    ("members", "keys"),
    [
        ([("a.png", IMAGE), ("a.caption", b"c")], {"caption_key": "caption"}),
        ([("a.png", IMAGE), ("a.json", JSON)], {"caption_key": "json:caption_en"}),
        ([("a.left.png", IMAGE), ("a.txt", b"c")], {"image_keys": ("left.png",)}),
    ],
)
def test_what_the_hint_says_helps(tmp_path, members, keys):
    assert everything(make_catalog(write_tar(tmp_path / "x.tar", members), tmp_path / "catalog", **keys)) == [(1, "c")]


def test_names_in_hints_cannot_steer_a_terminal(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("a.\x1b[2J.png", IMAGE), ("a.txt", b"c")])
    hint = layout_hint(str(path), path.stat().st_size, IMAGE_KEYS, ["txt"])
    assert hint.isprintable() and r"\x1b[2j.png" in hint


def test_a_damaged_shard_has_a_hint_from_its_intact_part(tmp_path):
    path = write_tar(tmp_path / "x.tar", [*pair(0)[:1], ("00000.caption", b"c"), *pair(1)])
    path.write_bytes(path.read_bytes()[:2200])
    assert "--caption-key caption" in layout_hint(str(path), 2200, IMAGE_KEYS, ["txt"])
