"""Damaged inputs through catalog, reader and loader: a message of one line, or samples delivered or counted."""

import csv
import gzip
import io
import json
import os
import pickle
import re
import tarfile
from collections import Counter
from hashlib import sha256
from typing import NamedTuple, get_args

import corpus
import numpy as np
import pytest
import torch
from corpus import BLOCK, FORMATS, HEADERS, VICTIMS, archive, expected, image, no_hang, pax, sample, sealed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments.clip.catalog.catalog import make_catalog, open_catalog
from experiments.clip.catalog.scan import LeftOut
from experiments.clip.catalog.sources import Table
from experiments.clip.data.loader import Loader
from experiments.clip.data.reader import Reader, Reason, Skip, decode
from experiments.clip.errors import UserError
from experiments.clip.models.clip import new_model

EXAMPLES = 250
AT_LEAST = 2000
CAPTIONS = ("txt", "json:caption")
FUZZ = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


class Outcome(NamedTuple):
    """The outcome of an input.

    ``refused`` is the message, if it was refused; ``left_out`` and ``damage`` are the catalog's; ``keys`` its samples';
    ``delivered`` holds width and caption by index; ``skipped`` the reasons by index.
    """

    refused: str
    left_out: dict[str, int]
    damage: list[str]
    keys: list[str]
    delivered: dict[int, tuple[int, str]]
    skipped: dict[int, str]

    @property
    def counted(self):
        """Samples in the catalog, and what it left out."""
        return len(self.keys) + sum(count for reason, count in self.left_out.items() if reason != "damaged shard")


@pytest.fixture(scope="module")
def tried():
    """Digests of the distinct inputs."""
    return set()


@pytest.fixture(scope="module")
def clip():
    return new_model("glyph-small", 0)


@pytest.fixture
def feed(tmp_path, monkeypatch, clip, tried):
    """Gives bytes, or a source whose bytes were written, to the program, and checks what holds for every input."""
    monkeypatch.setattr("experiments.clip.io.files.os.fsync", lambda descriptor: None)
    number = 0

    def feed(data, name="x.tar", captions=CAPTIONS, source=None):
        nonlocal number
        number += 1
        tried.add(sha256(name.encode() + data).digest())
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / name).write_bytes(data)
        with no_hang():
            return consumed(source or folder / name, tmp_path / "catalogs" / str(number), captions, clip)

    return feed


def consumed(source, folder, captions, clip):
    try:
        catalog = make_catalog(source, folder, caption_key=captions)
    except UserError as error:
        assert str(error) and "\n" not in str(error)
        return Outcome(str(error), counts(str(error)) if "has no sample" in str(error) else {}, [], [], {}, {})
    assert open_catalog(folder) == catalog
    assert set(catalog.left_out) <= set(get_args(LeftOut)) and all(catalog.left_out.values())
    assert len(catalog.damaged) == catalog.left_out.get("damaged shard", 0)
    raws = list(Reader(catalog).read_many(range(len(catalog))))
    outcomes = [raw if isinstance(raw, Skip) else decode(raw) for raw in raws]
    assert [outcome.index for outcome in outcomes] == list(range(len(catalog)))
    skipped = {outcome.index: outcome.reason for outcome in outcomes if isinstance(outcome, Skip)}
    delivered = {pair.index: (pair.image.width, pair.caption) for pair in outcomes if not isinstance(pair, Skip)}
    assert set(skipped.values()) <= set(get_args(Reason))
    assert all(pair.image.mode == "RGB" for pair in outcomes if not isinstance(pair, Skip))
    assert all(caption.strip() and caption.encode() for _, caption in delivered.values())
    loader = Loader(catalog, clip.preprocess, clip.tokenize, batch_size=len(catalog), seed=0, skip_limit=1.0)
    [batch] = loader.batches(0)
    assert sorted(batch.index.tolist()) == list(delivered)
    assert batch.skipped == Counter(skipped.values()) == loader.skipped
    assert batch.image.shape == (len(delivered), 3, 32, 32) and batch.text.shape[0] == len(delivered)
    assert torch.isfinite(batch.image).all()
    keys = ["" if isinstance(raw, Skip) else raw.key for raw in raws]
    return Outcome("", catalog.left_out, catalog.damaged, keys, delivered, skipped)


def counts(message):
    """The counts by reason in a message."""
    return Counter({reason: int(count) for reason, count in re.findall(r"([a-z][a-z ]*): (\d+)", message)})


def check_nothing_is_lost(outcome, data):
    """Everything that another reader finds before the damage is in the catalog or counted."""
    if "compressed" in outcome.refused:
        return
    is_damaged = "damaged shard" in outcome.left_out
    if is_damaged and not outcome.damage:  # refused: the message does not say where
        assert outcome.counted <= sum(expected(data))
        return
    end = int(re.findall(r" at byte (\d+), of ", outcome.damage[0])[0]) if is_damaged else None
    assert outcome.counted == sum(expected(data, end))


def check_pairs_are_true(outcome):
    """Images keep their own captions."""
    for width, caption in outcome.delivered.values():
        assert caption == f"caption {width - 8}"


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_cuts_everywhere(feed, format):
    data = VICTIMS[format]
    lengths = corpus.cuts(data)
    members, end = corpus.listed(data)
    for length in lengths:
        outcome = feed(data[:length])
        complete = [member for member in members if corpus.stop_of(member) <= length and not member.isdir()]
        assert outcome.counted == len({member.name.split(".")[0] for member in complete})
        assert ("damaged shard" in outcome.left_out) == (length < end + BLOCK)
        check_pairs_are_true(outcome)
    assert len(lengths) > 200


@pytest.mark.slow
@FUZZ
@given(
    st.sampled_from(list(FORMATS)), st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), min_size=1, max_size=3)
)
def test_flipped_bytes(feed, format, flips):
    data = bytearray(VICTIMS[format])
    for place, change in flips:
        data[int(place * (len(data) - 6000))] ^= change  # the rest is filling
    check_nothing_is_lost(feed(data), data)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("which", [0, 1, 7, pytest.param(14, marks=pytest.mark.slow)])
def test_false_sizes(feed, format, which):
    for value in corpus.SIZE_FIELDS:
        data = sealed(VICTIMS[format], HEADERS[format][which], 124, value)
        check_nothing_is_lost(feed(data), data)


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_garbage_in_other_fields(feed, format):
    for field, values in corpus.OTHER_FIELDS.items():
        for value in values:
            data = sealed(VICTIMS[format], HEADERS[format][3], field, value)
            check_nothing_is_lost(feed(data), data)


@pytest.mark.parametrize("value", [b"\0" * 8, b" " * 8, b"z" * 8, b"\xff" * 8, b"-000001\0", b"7777777\0", b"\x80" * 8])
def test_false_checksums(feed, value):
    data = bytearray(VICTIMS["gnu"])
    header = HEADERS["gnu"][4]
    data[header + 148 : header + 156] = value
    outcome = feed(data)
    assert outcome.left_out["damaged shard"] == 1 and f" at byte {header}, of " in outcome.damage[0]
    check_nothing_is_lost(outcome, data)


@pytest.mark.slow
def test_members_of_every_kind(feed):
    for kind in range(256):
        data = sealed(VICTIMS["gnu"], HEADERS["gnu"][3], 156, bytes([kind]))
        check_nothing_is_lost(feed(data), data)


def check_keys_are_harmless(outcome):
    for key in outcome.keys:
        assert not key.startswith("/") and ".." not in re.split(r"[/\\]", key)
        assert not re.search(r"[\x00-\x1f\x7f]", key) and len(key.encode("utf-8", "surrogateescape")) <= 4096


@pytest.mark.slow
@pytest.mark.parametrize("way", ["header", "gnu", "pax", "pax of all"])
def test_hostile_names(feed, way):
    for name in corpus.NAMES + corpus.LONG_NAMES:
        if way == "header":
            data = sealed(VICTIMS["ustar"], HEADERS["ustar"][3], 0, name[:100].ljust(100, b"\0"))
        elif way == "pax":
            record = corpus.extended(pax(b"path", name))
            data = archive(sample(0))[: 6 * BLOCK] + record + archive([*sample(1), *sample(2)])
        elif way == "gnu":
            record = corpus.extended(name + b"\0", tarfile.GNUTYPE_LONGNAME)
            data = archive(sample(0))[: 6 * BLOCK] + record + archive([*sample(1), *sample(2)])
        else:
            members = b"".join(
                corpus.extended(pax(b"path", name + suffix)) + archive([("x", content)])[: 2 * BLOCK]
                for suffix, content in [(b".png", image(1)), (b".txt", b"caption 1")]
            )
            data = archive(sample(0))[: 6 * BLOCK] + members + archive(sample(2))
        outcome = feed(data)
        check_nothing_is_lost(outcome, data)
        check_keys_are_harmless(outcome)
        assert not outcome.damage and (8, "caption 0") in outcome.delivered.values()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK])
def test_hostile_records(feed, kind):
    for record in corpus.RECORDS:
        data = archive(sample(0))[: 6 * BLOCK] + corpus.extended(record, kind) + archive([*sample(1), *sample(2)])
        outcome = feed(data)
        if kind != tarfile.XGLTYPE:  # passed over, unlike by tarfile
            check_nothing_is_lost(outcome, data)
        check_keys_are_harmless(outcome)
        assert (8, "caption 0") in outcome.delivered.values()
        assert outcome.damage or outcome.counted == 3 or kind in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME)


def test_names_that_nearly_agree(feed):
    """Keys that repeat, or differ in case only, are other samples, in whatever order."""
    for keys in [("a", "a"), ("a", "A"), ("a", "a", "a"), ("é", "e\u0301"), ("x/a", "y/a"), ("a", "b", "a")]:
        outcome = feed(archive([member for number, key in enumerate(keys) for member in sample(number, key)]))
        assert outcome.delivered == {n: (8 + n, f"caption {n}") for n in range(len(keys))} and not outcome.left_out
        mixed = [
            member
            for members in zip(*(sample(n, key) for n, key in enumerate(keys)), strict=True)
            for member in members
        ]
        data = archive(mixed)
        check_nothing_is_lost(feed(data), data)


@pytest.mark.slow
def test_other_members(feed):
    """Links, devices, folders and pickles in the place of images and captions."""
    kinds = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE]
    for kind in [*kinds, tarfile.GNUTYPE_SPARSE, tarfile.CONTTYPE]:
        for suffix in ("png", "txt", "json", "pkl"):
            for target in ("/etc/passwd", "0000.png", "../x"):
                others = [member for member in sample(1) if not member[0].endswith(suffix)]
                data = archive([*sample(0), corpus.special(f"0001.{suffix}", kind, target), *others, *sample(2)])
                outcome = feed(data)
                check_nothing_is_lost(outcome, data)
                assert {(8, "caption 0"), (10, "caption 2")} <= set(outcome.delivered.values())


def judged(outcome, wanted):
    """Check three samples, the middle one of which must have the outcome ``wanted``."""
    assert not outcome.left_out and {0, 2} <= set(outcome.delivered) and outcome.counted == 3
    if wanted is not None:
        assert outcome.skipped.get(1, "") == wanted


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("name", corpus.IMAGES)
def test_images(feed, name, suffix):
    data, wanted = corpus.IMAGES[name]
    judged(feed(archive([*sample(0), (f"1.{suffix}", data), ("1.txt", b"x"), *sample(2)])), wanted)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name == "1 MiB of letters" else []) for name in corpus.TEXTS],
)
def test_texts(feed, name):
    data, wanted = corpus.TEXTS[name]
    judged(feed(archive([*sample(0), ("1.png", image()), ("1.txt", data), *sample(2)])), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", corpus.JSONS)
def test_jsons(feed, name):
    data, wanted = corpus.JSONS[name]
    judged(feed(archive([*sample(0), ("1.png", image()), ("1.json", data), *sample(2)])), wanted)


EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "drop", "repeat", "zero", "insert"]),
        st.floats(0, 1),
        st.one_of(st.integers(1, 30), st.integers(1, 3000)),
    ),
    min_size=1,
    max_size=3,
)


def edited(data, edits, step=1):
    """Bytes with these changes, at multiples of ``step``."""
    data = bytearray(data)
    for kind, share, count in edits:
        place = int(share * len(data)) // step * step
        part = data[place : place + count * step]
        if kind == "flip" and part:
            data[place] ^= count % 255 + 1
        elif kind == "cut":
            del data[place:]
        elif kind == "drop":
            del data[place : place + count * step]
        elif kind == "repeat":
            data[place:place] = part
        elif kind == "zero":
            data[place : place + len(part)] = bytes(len(part))
        elif kind == "insert":
            data[place:place] = (b"\xff\xda\0\x08" * count)[: count * step]
    return bytes(data)


@pytest.mark.slow
@FUZZ
@given(st.integers(0, len(corpus.BASES) - 1), EDITS)
def test_images_damaged_at_random(feed, base, edits):
    data = edited(corpus.BASES[base], edits)
    judged(feed(archive([*sample(0), ("1.jpg", data), ("1.txt", b"x"), *sample(2)])), None)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.just("caption") | st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


@pytest.mark.slow
@FUZZ
@given(
    st.binary(max_size=300) | st.text(max_size=300).map(str.encode),
    st.binary(max_size=100) | VALUES.map(lambda value: json.dumps({"caption": value}).encode()),
    EDITS | st.just([]),
)
def test_captions_at_random(feed, text, described, edits):
    both = [("1.png", image()), ("1.txt", text), ("3.png", image()), ("3.json", edited(described, edits))]
    outcome = feed(archive([*sample(0), *both, *sample(2)]))
    assert not outcome.left_out and {0, 3} <= set(outcome.delivered) and outcome.counted == 4


@pytest.mark.slow
@FUZZ
@given(st.sampled_from(list(FORMATS)), EDITS, st.sampled_from([1, BLOCK]))
def test_shards_damaged_twice(feed, format, edits, step):
    data = edited(VICTIMS[format][: HEADERS[format][-1] + 4 * BLOCK], edits, step)
    check_nothing_is_lost(feed(data), data)


HEADER_EDITS = st.lists(
    st.tuples(
        st.integers(0, 14),
        st.one_of(
            st.tuples(st.just(124), st.sampled_from(corpus.SIZE_FIELDS)),
            st.tuples(st.just(156), st.binary(min_size=1, max_size=1)),
            st.tuples(st.just(0), st.sampled_from(corpus.NAMES).map(lambda name: name.ljust(100, b"\0"))),
            st.tuples(st.integers(0, 511), st.binary(min_size=1, max_size=12)),
        ),
    ),
    min_size=2,
    max_size=2,
)


@pytest.mark.slow
@FUZZ
@given(st.sampled_from(list(FORMATS)), HEADER_EDITS, EDITS | st.just([]))
def test_false_headers_that_are_sealed(feed, format, headers, edits):
    data = VICTIMS[format]
    for which, (field, value) in headers:
        data = sealed(data, HEADERS[format][which], field, value)
    data = edited(data, edits[:1], BLOCK)
    outcome = feed(data)
    check_nothing_is_lost(outcome, data)
    check_keys_are_harmless(outcome)


def test_no_tar_files(feed):
    """Files of other kinds, and empty ones."""
    for data in [
        b"",
        b"\0",
        bytes(2**21),
        b"\xff" * 10_240,
        b"<html>404</html>" * 1000,
        b"PK\x03\x04" + bytes(5000),
        b"7z\xbc\xaf\x27\x1c" + bytes(5000),
        b"\x1f\x9d" + bytes(5000),
        b"\x04\x22\x4d\x18" + bytes(5000),
        gzip.compress(VICTIMS["gnu"])[1:],
        image(),
        pickle.dumps({"0.png": image()}),
        json.dumps({"0.txt": "x"}).encode(),
        np.random.default_rng(0).bytes(10_240),
        archive([("README", b"x")]),
        archive([("0.txt", b"x")]),
        archive([("__meta__/0.png", image()), ("__meta__/0.txt", b"x")]),
    ]:
        outcome = feed(data)
        assert "has no sample with image and caption" in outcome.refused
        check_nothing_is_lost(outcome, data)
        assert outcome.left_out
    folder = corpus.special("folder", tarfile.DIRTYPE)
    for data in [bytes(BLOCK), bytes(2 * BLOCK), bytes(10_240), archive([]), archive([folder])]:
        assert "(no members)" in feed(data).refused


@pytest.mark.parametrize("magic", [b"\x1f\x8b\x08", b"BZh9", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"])
def test_compressed_files_are_named(feed, magic):
    for rest in (b"", bytes(5000), VICTIMS["gnu"]):
        assert "is compressed (" in feed(magic + rest).refused


def test_a_hole_that_looks_like_an_end_is_reported(feed):
    """Zeros over several members, as after a crash, in the place of an end mark."""
    members, _ = corpus.listed(VICTIMS["gnu"])
    start = members[7].offset
    for length, rest in [(BLOCK, VICTIMS["gnu"][start:]), (2**21, b""), (2**21, VICTIMS["gnu"][start:])]:
        data = VICTIMS["gnu"][:start] + bytes(length) + rest
        outcome = feed(data)
        assert outcome.left_out["damaged shard"] == 1 and len(outcome.delivered) == 2
        assert f"data after the end mark at byte {start}, of " in outcome.damage[0]


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_an_end_after_half_a_member_is_reported(feed, kind):
    data = archive(sample(0))[: 6 * BLOCK] + corpus.extended(pax(b"path", b"1.png"), kind) + bytes(2 * BLOCK)
    outcome = feed(data)
    assert outcome.delivered == {0: (8, "caption 0")}
    assert "no member after its extended header at byte" in outcome.damage[0]


PATHS = [
    "0.png",
    "./0.png",
    "x/../0.png",
    "absent.png",
    "folder",
    "folder/",
    ".",
    "..",
    "/",
    "",
    " ",
    "0.png ",
    "nul\0.png",
    "line\nfeed.png",
    "~/0.png",
    "$HOME/0.png",
    "%00",
    "n" * 300,
    "d/" * 3000 + "0.png",
    "/etc/passwd",
    "/dev/zero",
    "/dev/stdin",
    "/proc/self/mem",
    "/proc/self/environ",
    "pipe",
    "loop",
    "dangling",
    "empty.png",
    "table.csv",
    "pipe:touch executed",
    "http://localhost/0.png",
    "file:///etc/passwd",
    "odd:/0.png",
    "odd://0.png",
    "\udcff\udcfe.png",
    "a\u0301\u202e.png",
    'quo"te.png',
    "com,ma.png",
    "evil.pkl",
]
TITLES = {
    "x": "",
    "ü": "",
    "": "empty caption",
    " ": "empty caption",
    "\u3000": "empty caption",
    "\udcff": "invalid caption",
    "a\nb\r\nc": "",
    'a "b" c': "",
    "a,b;c\td|e": "",
    "\x1c": "empty caption",
    "x" * 100_000: "",
}


class Evil:
    """What would leave a file if it were read as a pickle."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def images(tmp_path):
    """A folder of images and traps, for tables."""
    folder = tmp_path / "images"
    for name in ("", "folder", "x", "odd:"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name in ("0.png", "odd:/0.png"):
        (folder / name).write_bytes(image())
    (folder / "empty.png").write_bytes(b"")
    (folder / "evil.pkl").write_bytes(pickle.dumps(Evil(tmp_path / "executed")))
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nowhere")
    return folder


def text_table(rows, separator):
    stream = io.StringIO(newline="")
    csv.writer(stream, delimiter=separator).writerows([["filepath", "title"], *rows])
    return stream.getvalue().encode("utf-8", "surrogateescape")


@pytest.fixture
def feed_table(feed, images, tmp_path):
    number = 0

    def feed_table(data, suffix="csv"):
        nonlocal number
        number += 1
        # Where `feed` will write it.
        path = tmp_path / str(number) / f"table.{suffix}"
        return feed(data, path.name, "txt", Table(str(path), root=str(images)))

    return feed_table


@pytest.mark.slow
@pytest.mark.parametrize("separator", [",", "\t"])
def test_tables_of_hostile_paths(feed_table, tmp_path, separator):
    usable = {"0.png", "./0.png", "x/../0.png", "odd:/0.png", "odd://0.png"}
    for path in PATHS:
        outcome = feed_table(text_table([["0.png", "before"], [path, "x"], ["0.png", "after"]], separator))
        reason = "URL" if path.startswith("http://") else "" if path else "no image"
        assert outcome.left_out == ({reason: 1} if reason else {})
        assert {(8, "before"), (8, "after")} <= set(outcome.delivered.values()) and outcome.counted == 3
        assert ((8, "x") in outcome.delivered.values()) == (path in usable)
    assert not (tmp_path / "executed").exists()


def test_tables_of_hostile_captions(feed_table):
    for title, wanted in TITLES.items():
        outcome = feed_table(text_table([["0.png", title], ["0.png", "after"]], ","))
        assert outcome.skipped.get(0, "") == wanted and outcome.delivered[1] == (8, "after")


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r", ""])
def test_a_quote_that_is_not_closed_swallows_nothing(feed_table, ending):
    rows = ["filepath,title", "0.png,one", '0.png,"two', "0.png,three" + ending]
    outcome = feed_table("\n".join(rows).encode())
    assert re.search(r"table.csv breaks off at line 3 \(a quote is not closed\): correct it$", outcome.refused)
    rows = ["filepath,title", "0.png,one", "\x1c", '0.png,"two', '0.png,three"' + ending]
    outcome = feed_table("\n".join(rows).encode())
    assert [caption for _, caption in outcome.delivered.values()] == ["one", "two\n0.png,three"]
    assert outcome.left_out == {"no caption": 1}


def test_tables_that_are_none(feed_table):
    for data in [
        b"",
        b"\xef\xbb\xbf",
        b"\0" * 1000,
        b"\xff" * 1000,
        b"filepath\n0.png\n",
        b"title\n0.png\n",
        b"filepath title\n0.png x\n",
        b'"filepath,title\n0.png,x\n',
        "filepath,title\n0.png,x\n".encode("utf-16"),
        b"filepath,title\n",
        b"filepath,title\n\n\n",
        b"filepath,title\n,x\n",
        b"filepath,title\n0.png\n",
        b"filepath,title" * 20_000,
        VICTIMS["gnu"],
    ]:
        assert feed_table(data).refused


@pytest.mark.slow
@FUZZ
@given(
    st.lists(st.tuples(st.sampled_from(PATHS), st.sampled_from(list(TITLES)) | st.text(max_size=20)), max_size=4),
    st.sampled_from(",\t;|"),
    EDITS | st.just([]),
)
def test_tables_damaged_at_random(feed_table, rows, separator, edits):
    rows = [["0.png", "first"], *rows]
    table = text_table(rows, separator)
    outcome = feed_table(edited(table, edits))
    if not edits and not outcome.refused:
        assert outcome.counted == len(rows)
    assert not outcome.refused or edits or re.search(r"breaks off at line \d+ \(line contains NUL\)", outcome.refused)


@pytest.fixture(scope="module")
def parquet():
    pyarrow = pytest.importorskip("pyarrow")
    stream = io.BytesIO()
    table = pyarrow.table({"filepath": ["0.png"] * 40, "title": ["x"] * 39 + [None]})
    pytest.importorskip("pyarrow.parquet").write_table(table, stream)
    return stream.getvalue()


@pytest.mark.slow
@settings(FUZZ, max_examples=60)
@given(edits=EDITS)
def test_parquet_damaged_at_random(feed_table, parquet, edits):
    assert feed_table(parquet, "parquet").left_out == {"no caption": 1}
    feed_table(edited(parquet, edits), "parquet")


@pytest.mark.slow
def test_nothing_is_executed(feed, tmp_path):
    """Pickles under the names of every kind of member, and commands in the place of data."""
    mark = tmp_path / "executed"
    evil = pickle.dumps(Evil(mark))
    arrays = io.BytesIO()
    np.save(arrays, np.array([Evil(mark)], dtype=object), allow_pickle=True)
    saved = io.BytesIO()
    torch.save(Evil(mark), saved)
    kinds = ["pkl", "pickle", "pyd", "pth", "pt", "npy", "npz", "ten", "cls", "png", "txt", "json", "mp4", "dill", "py"]
    for content in (evil, arrays.getvalue(), saved.getvalue(), b"import os; os.mkdir(%r)" % str(mark)):
        for kind in kinds:
            others = [member for member in sample(1) if not member[0].endswith(kind)]
            outcome = feed(
                archive([*sample(0), (f"0001.{kind}", content), *others]), captions=(*CAPTIONS, "pyd", "pkl")
            )
            assert outcome.counted == 2 and outcome.delivered[0] == (8, "caption 0")
    with pytest.raises(UserError, match="would run a shell command"):
        make_catalog(f"pipe:mkdir {mark}", tmp_path / "catalog")
    (tmp_path / "x.tar").write_bytes(VICTIMS["gnu"])
    catalog = make_catalog(tmp_path / "x.tar", tmp_path / "catalog")
    (catalog.folder / catalog.shards[0].index).write_bytes(arrays.getvalue())
    with pytest.raises(UserError, match="make the catalog again"):
        Reader(catalog).read(0)
    assert not mark.exists()
    with pytest.raises(FileExistsError):  # the payload is no dud
        pickle.loads(evil)
        pickle.loads(evil)


def test_so_many_inputs_were_tried(request, tried):
    defined = {name for name in globals() if name.startswith("test_")}
    if defined - {item.originalname for item in request.session.items if item.module is request.module}:
        pytest.skip("only a part of the tests was run")
    assert len(tried) >= AT_LEAST
