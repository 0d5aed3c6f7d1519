"""Reading and decoding samples: pairs in RGB, or skips with a reason, whatever the bytes are."""

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import corpus
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tars import image_bytes, numbered, pair, write_shards, write_tar

from experiments.clip.catalog.catalog import make_catalog
from experiments.clip.catalog.sources import Table
from experiments.clip.data import reader as reading
from experiments.clip.data.reader import RawSample, Reader, Skip, decode
from experiments.clip.errors import UserError
from experiments.clip.io import storage

ROOT = Path(__file__).parents[3]


def png_header(width, height):
    """A PNG file that is complete except for its pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/was-executed",)


def raw(image=None, *captions):
    return RawSample(0, "key", image_bytes() if image is None else image, captions or ((b"caption", None),))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1", "CMYK", "I;16", "LA"])
def test_modes_become_rgb(kind, mode):
    stream = io.BytesIO()
    try:
        Image.new(mode, (5, 3)).save(stream, kind)
    except (OSError, ValueError):
        pytest.skip("the format has no such mode")
    sample = decode(raw(stream.getvalue()))
    assert sample.image.mode == "RGB" and sample.image.size == (5, 3) and sample.caption == "caption"


@pytest.mark.parametrize("written_by_pillow", [False, True])
def test_of_16_bits_of_gray_the_upper_8_stay(written_by_pillow):
    ramp = np.linspace(0, 65535, 256 * 4).round().astype(np.uint16).reshape(4, 256)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in ramp)
    data = corpus.png(256, 4, (16, 0), zlib.compress(rows))
    if written_by_pillow:
        stream = io.BytesIO()
        Image.fromarray(ramp).save(stream, "PNG")
        data = stream.getvalue()
    pixels = np.asarray(decode(raw(data)).image)
    assert np.array_equal(pixels, np.repeat((ramp >> 8).astype(np.uint8)[..., None], 3, 2))


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (b"", "unreadable image"),
        (b"GIF89a" + bytes(100), "unreadable image"),
        (image_bytes(kind="GIF"), "unreadable image"),
        (image_bytes(kind="TIFF"), "unreadable image"),
        (image_bytes()[:-30], "unreadable image"),
        (image_bytes(kind="JPEG")[:200], "unreadable image"),
        (image_bytes(kind="WEBP")[:30], "unreadable image"),
        (pickle.dumps(Evil()), "unreadable image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "unreadable image"),
        (png_header(8192, 8193), "too many pixels"),
        (png_header(30_000, 30_000), "too many pixels"),
        (png_header(2**31 - 1, 2**31 - 1), "too many pixels"),
        (png_header(0, 5), "unreadable image"),
        (image_bytes(size=(1, 201)), "extreme aspect ratio"),
    ],
    ids=range(14),
)
def test_images_that_cannot_be_used(image, reason):
    assert decode(raw(image)) == Skip(0, reason)
    assert not os.path.exists("/tmp/was-executed")


def test_small_and_narrow_images_can_be_used():
    assert decode(raw(image_bytes(size=(1, 1)))).image.size == (1, 1)
    assert decode(raw(image_bytes(size=(1, 200)))).image.size == (1, 200)


def described(value):
    return json.dumps({"caption": value}).encode(), "caption"


@pytest.mark.parametrize(
    ("captions", "outcome"),
    [
        ([(b"a", None), (b" \n", None), ("ü".encode(), None)], ["a", "ü", "a"]),
        ([described(["a", "", "b"])], ["a", "b", "a"]),
        ([described("a"), (b"b", None)], ["a", "b", "a"]),
        ([(b"", None)], "empty caption"),
        ([(b" \n\t", None)], "empty caption"),
        ([described([])], "empty caption"),
        ([(b"\xff\xfe", None)], "invalid caption"),
        ([("latin é".encode("latin-1"), None)], "invalid caption"),
        ([described(3)], "invalid caption"),
        ([described(None)], "invalid caption"),
        ([described({"a": "b"})], "invalid caption"),
        ([(b"[1, 2]", "caption")], "invalid caption"),
        ([(b'"caption"', "caption")], "invalid caption"),
        ([(b"{}", "caption")], "invalid caption"),
        ([(b"{", "caption")], "invalid caption"),
        ([(b"[" * 10**6, "caption")], "invalid caption"),
        ([(b'{"caption": ' + b"9" * 10**5 + b"}", "caption")], "invalid caption"),
        ([(b'{"caption": "\\ud800"}', "caption")], "invalid caption"),
        ([(pickle.dumps(Evil()), None)], "invalid caption"),
        ([(b"\xef\xbb\xbfmarked", None)], ["marked"] * 3),
        ([(b'\xef\xbb\xbf{"caption": "marked"}', "caption")], ["marked"] * 3),
        ([(b"\xff", None), (b"good", None)], ["good"] * 3),
        ([(b"good", None), (b"{", "caption")], ["good"] * 3),
        ([(b"{}", "caption"), described(None), (b"good", None), described(3)], ["good"] * 3),
        ([described(["a", None, 3, "\ud800", ["c"], "b"])], ["a", "b", "a"]),
        ([described([None, 3]), (b"", None)], "invalid caption"),
    ],
    ids=range(26),
)
def test_captions(captions, outcome):
    results = [decode(raw(None, *captions), draw) for draw in range(3)]
    if isinstance(outcome, str):
        assert results == [Skip(0, outcome)] * 3
    else:
        assert [result.caption for result in results] == outcome


def test_sources_of_captions_have_their_probabilities():
    members = ((b"a", None), described(["b", "c"]), (b"\xff", None))
    weighted = RawSample(0, "key", image_bytes(), members, (1.0, 3.0, 100.0))
    draws = np.random.default_rng(0).integers(0, 2**64, 4000, dtype=np.uint64).tolist()
    shares = Counter(decode(weighted, draw).caption for draw in draws)
    assert [round(shares[each] / 4000, 1) for each in "abc"] == [0.2, 0.4, 0.4] and shares.total() == 4000
    assert {abs(shares["a"] - 1000) < 4 * 27.4, abs(shares["b"] - 1500) < 4 * 30.6} == {True}
    assert decode(weighted, 2**64 - 1).caption == "c" and decode(weighted).caption == "a"


def test_a_reader_weighs_what_a_sample_has(tmp_path):
    members = [*pair(0), ("b.png", image_bytes(1)), ("b.alt", b"alt"), ("c.png", image_bytes(2)), ("c.txt", b"txt")]
    shard = write_tar(tmp_path / "x.tar", [*members, ("c.alt", b"alt")])
    (tmp_path / "t.csv").write_text(f"filepath,title,alt\n{tmp_path}/1.png,x,\n")
    (tmp_path / "1.png").write_bytes(image_bytes())
    table = Table(str(tmp_path / "t.csv"), captions=("title", "alt"))
    catalog = make_catalog([shard, table], tmp_path / "catalog", caption_key=("txt", "alt"))
    reader = Reader(catalog, caption_weights=(1, 3))
    assert [raw.weights for raw in reader.read_many(range(4))] == [(1,), (3,), (1, 3), (1, 3)]
    assert decode(reader.read(3), 2**32 - 1).caption == "x"  # the other is empty


def test_a_large_caption_does_not_discard_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MAX_CAPTION_BYTES", 2000)
    members = [("a.png", image_bytes(1)), ("a.txt", b"x" * 3000), ("a.alt", b"good")]
    catalog = make_catalog(write_tar(tmp_path / "x.tar", members), tmp_path / "c", caption_key=("txt", "alt"))
    assert decode(Reader(catalog).read(0)).caption == "good"


def test_limits_on_bytes_hold_before_reading(tmp_path, monkeypatch):
    big = [("b.png", image_bytes(1) + bytes(5000)), ("b.txt", b"x"), ("c.png", image_bytes(2)), ("c.txt", b"x" * 3000)]
    (tmp_path / "big.png").write_bytes(image_bytes() + bytes(5000))
    (tmp_path / "t.csv").write_text("filepath,title\nbig.png,x\n")
    shard = write_tar(tmp_path / "x.tar", [*pair(0), *big])
    catalog = make_catalog([shard, tmp_path / "t.csv"], tmp_path / "catalog")
    monkeypatch.setattr(reading, "MAX_IMAGE_BYTES", 4000)
    monkeypatch.setattr(reading, "MAX_CAPTION_BYTES", 2000)
    reader = Reader(catalog)
    sizes = []
    original = storage.Ranges._read
    monkeypatch.setattr(storage.Ranges, "_read", lambda self, *range: sizes.append(range[2]) or original(self, *range))
    assert [reader.read(index) for index in (1, 2, 3)] == [Skip(index, "too many bytes") for index in (1, 2, 3)]
    assert sizes == [len("big.png" + "x")]


def test_members_far_apart_are_read_apart(tmp_path):
    members = [("a.png", image_bytes(5)), ("a.bin", bytes(10**6)), ("a.txt", b"far")]
    catalog = make_catalog(write_tar(tmp_path / "x.tar", members), tmp_path / "catalog")
    raw = Reader(catalog).read(0)
    assert raw.image == image_bytes(5) and raw.captions == ((b"far", None),)


def test_a_shard_cut_off_later_gives_skips(tmp_path):
    [shard] = write_shards(tmp_path, [4])
    catalog = make_catalog(shard, tmp_path / "catalog")
    reader = Reader(catalog)
    assert isinstance(reader.read(0), RawSample)
    os.truncate(shard, 3500)
    assert [reader.read(index) for index in (1, 3)] == [Skip(1, "cut off"), Skip(3, "cut off")]


def test_few_files_are_open_at_a_time(tmp_path):
    write_shards(tmp_path, [2] * 40)
    catalog = make_catalog(str(tmp_path / "*.tar"), tmp_path / "catalog")
    before = len(os.listdir("/proc/self/fd"))
    reader = Reader(catalog, kept=4)
    for index in [*range(80), *range(79, -1, -1)]:
        assert numbered(decode(reader.read(index)).image) == index
        # A descriptor for the tar file, one behind the map of the index.
        assert len(os.listdir("/proc/self/fd")) <= before + 8
    del reader
    assert len(os.listdir("/proc/self/fd")) == before


def read_captions(reader, indices):
    return [decode(reader.read(index)).caption for index in indices]


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_other_processes_may_read_too(tmp_path, method):
    write_shards(tmp_path, [50, 50])
    reader = Reader(make_catalog(str(tmp_path / "*.tar"), tmp_path / "catalog"))
    reader.read(0)
    with ProcessPoolExecutor(2, get_context(method)) as pool:
        parts = [pool.submit(read_captions, reader, range(start, 100, 2)) for start in (0, 1)]
        own = read_captions(reader, range(100))
        assert own[::2] == parts[0].result() and own[1::2] == parts[1].result()


def test_indices_outside_the_catalog(tmp_path):
    [shard] = write_shards(tmp_path, [4])
    reader = Reader(make_catalog(shard, tmp_path / "catalog"))
    for index in (-1, 4):
        with pytest.raises(IndexError, match=f"there is no sample {index}: the catalog has 4"):
            reader.read(index)


@pytest.fixture(scope="module")
def victims(tmp_path_factory):
    """Shards of three formats, with JSON, long names and a link."""
    folder = tmp_path_factory.mktemp("victims")
    link = tarfile.TarInfo("link.png")
    link.type, link.linkname = tarfile.SYMTYPE, "00000.png"
    members = [member for number in range(3) for member in pair(number, "k" * 120 + str(number))]
    members += [
        ("j.jpg", image_bytes(9, kind="JPEG")),
        ("j.json", b'{"caption": ["a", "b"]}'),
        link,
        ("link.txt", b"x"),
    ]
    members += [("w.webp", image_bytes(9, kind="WEBP")), ("w.txt", "ü".encode()), *pair(7)]
    formats = (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    return [write_tar(folder / f"{i}.tar", members, format).read_bytes() for i, format in enumerate(formats)]


DAMAGE = st.lists(
    st.one_of(
        st.tuples(st.just("flip"), st.integers(0, 2**20), st.integers(1, 255)),
        st.tuples(st.just("header"), st.integers(0, 40), st.tuples(st.integers(0, 511), st.integers(0, 255))),
        st.tuples(st.just("cut"), st.integers(0, 2**20), st.just(0)),
        st.tuples(st.just("drop"), st.integers(0, 2**20), st.integers(1, 2000)),
        st.tuples(st.just("zero"), st.integers(0, 2**20), st.integers(1, 1500)),
        st.tuples(st.just("repeat"), st.integers(0, 2**20), st.integers(1, 2000)),
    ),
    min_size=1,
    max_size=6,
)


def damaged(data, damage):
    data = bytearray(data)
    for kind, place, value in damage:
        if kind == "header":
            # With a valid checksum, so that the header is accepted.
            start = place * 512 % len(data)
            block = data[start : start + 512].ljust(512, b"\0")
            block[value[0]] = value[1]
            block[148:156] = b" " * 8
            block[148:155] = b"%06o\0" % sum(block)
            data[start : start + 512] = block
            continue
        place %= len(data) + 1
        if kind == "flip" and place < len(data):
            data[place] ^= value
        elif kind == "cut":
            del data[place:]
        elif kind == "drop":
            del data[place : place + value]
        elif kind == "zero":
            data[place : place + value] = bytes(len(data[place : place + value]))
        elif kind == "repeat":
            data[place:place] = data[place : place + value]
        data = data or bytearray(1)
    return bytes(data)


@pytest.mark.slow
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(which=st.integers(0, 1), damage=DAMAGE, is_late=st.booleans(), draw=st.integers(0, 2**64 - 1))
def test_damage_ends_in_user_errors_and_counted_skips(victims, tmp_path, monkeypatch, which, damage, is_late, draw):
    """Damage before the scan, or between scan and reading."""
    monkeypatch.setattr("experiments.clip.io.files.os.fsync", lambda descriptor: None)
    path = tmp_path / "x.tar"
    broken = damaged(victims[which], damage)
    path.write_bytes(victims[which] if is_late else broken)
    try:
        catalog = make_catalog(path, tmp_path / "catalog", caption_key=("txt", "json:caption"))
    except UserError as error:
        assert "\n" not in str(error)
        return
    path.write_bytes(broken)
    reader = Reader(catalog)
    outcomes = []
    for raw in reader.read_many(range(len(catalog))):
        outcomes.append(raw if isinstance(raw, Skip) else decode(raw, draw))
    assert [outcome.index for outcome in outcomes] == list(range(len(catalog)))
    # Nothing is lost silently: samples that are not among the outcomes were left out and counted.
    if len(catalog) < 6:
        assert catalog.left_out.keys() - {"link or device"}
    for outcome in outcomes:
        if not isinstance(outcome, Skip):
            assert outcome.caption.strip() and outcome.image.mode == "RGB"
            assert np.asarray(outcome.image).size <= 3 * reading.MAX_PIXELS


BOMBS = """
import sys
from pathlib import Path
from experiments.clip.catalog.catalog import make_catalog
from experiments.clip.data.reader import Reader, Skip, decode
def peak():
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) // 1024
catalog = make_catalog(sys.argv[1], sys.argv[2])
reader = Reader(catalog)
decode(reader.read(0))
before = peak()
reasons = [decode(reader.read(index)).reason for index in range(1, len(catalog))]
print(set(reasons), peak() - before)
"""


@pytest.mark.slow
def test_bombs_are_refused_before_they_are_decoded(tmp_path):
    """An image of 30,000 x 30,000 has 2,575 MiB."""
    names = ["30000x30000 header", "30000x30000", "30000x30000 jpeg", "16383x16383 webp", "8192x8193", "many scans"]
    bombs = [(f"{n}.png", corpus.IMAGES[name][0]) for n, name in enumerate(names)]
    members = [member for n, bomb in enumerate(bombs) for member in (bomb, (f"{n}.txt", b"x"))]
    (tmp_path / "x.tar").write_bytes(corpus.archive([*corpus.sample(9), *members]))
    arguments = [sys.executable, "-c", BOMBS, str(tmp_path / "x.tar"), str(tmp_path / "catalog")]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    reasons, _, growth = done.stdout.rpartition(" ")
    assert reasons == "{'too many pixels'}" and int(growth) < 64


MANY = """
import sys
from pathlib import Path
from experiments.clip.catalog.catalog import make_catalog
from experiments.clip.data.reader import Reader
def peak():
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) // 1024
reader = Reader(make_catalog(sys.argv[1], sys.argv[2]))
before = peak()
print({len(raw.image) for raw in reader.read_many(range(12))}, peak() - before)
"""


@pytest.mark.slow
def test_a_batch_of_the_largest_members_takes_the_memory_of_a_few(tmp_path):
    """Together they have 768 MiB."""
    end = 0
    with open(tmp_path / "x.tar", "wb") as file:
        for number in range(12):
            for name, size in ((f"{number}.png", reading.MAX_IMAGE_BYTES), (f"{number}.txt", 1)):
                info = tarfile.TarInfo(name)
                info.size = size
                file.seek(end)
                file.write(info.tobuf(tarfile.GNU_FORMAT))
                end += 512 + -(-size // 512) * 512
        file.truncate(end + 1024)  # contents are holes, which take no space
    arguments = [sys.executable, "-c", MANY, str(tmp_path / "x.tar"), str(tmp_path / "catalog")]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    sizes, _, growth = done.stdout.rpartition(" ")
    assert sizes == f"{{{reading.MAX_IMAGE_BYTES}}}" and int(growth) < 300
