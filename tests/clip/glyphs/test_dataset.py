"""Data sets in shards: written completely or not at all, read by index, damage named."""

import io
import json
import os
import pickle
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
import webdataset
from PIL import Image

from experiments.clip.errors import UserError
from experiments.clip.glyphs import dataset
from experiments.clip.glyphs.dataset import GlyphPair, open_dataset, read_samples, verify, write_dataset

ROOT = Path(__file__).parents[3]
SETTINGS = {"size": 8, "captions": "clean", "faces": ["a", "b"]}


def make_pairs(count, prefix="k"):
    for i in range(count):
        image = Image.new("L", (8, 8), i % 256)
        yield GlyphPair(f"{prefix}-{i:05d}", image, f"the caption № {i}", {"number": i})


def make_dataset(folder, settings=None, **options):
    splits = {"train": make_pairs(23), "test": make_pairs(5, "t"), "none": []}
    return write_dataset(folder, splits, settings or SETTINGS, **{"shard_size": 7, **options})


def png_bytes(size=(8, 8)):
    stream = io.BytesIO()
    Image.new("L", size).save(stream, "PNG")
    return stream.getvalue()


def replace_shard(manifest, samples, shard=0):
    path = manifest.folder / manifest.splits["train"].shards[shard].name
    path.chmod(0o644)
    with path.open("wb") as stream, webdataset.TarWriter(stream, encoder=False) as writer:
        for sample in samples:
            writer.write(sample)


def plain_samples(count):
    return [{"__key__": f"k-{i:05d}", "png": png_bytes(), "txt": b"x", "json": b"{}"} for i in range(count)]


@pytest.fixture
def manifest(tmp_path):
    return make_dataset(tmp_path / "set")


def test_every_index_comes_back_with_its_own_sample(manifest):
    assert [shard.samples for shard in manifest.splits["train"].shards] == [7, 7, 7, 2]
    assert [shard.first_index for shard in manifest.splits["train"].shards] == [0, 7, 14, 21]
    samples = list(read_samples(manifest, "train"))
    assert [sample.index for sample in samples] == list(range(23))
    for sample, pair in zip(samples, make_pairs(23), strict=True):
        assert (sample.key, sample.caption, sample.meta) == (pair.key, pair.caption, pair.meta)
        assert sample.meta["number"] == sample.index
        assert sample.image.mode == "RGB"
        assert sample.image.tobytes() == pair.image.convert("RGB").tobytes()
    assert list(read_samples(manifest, "none")) == []


@pytest.mark.parametrize("start", [0, 1, 6, 7, 8, 14, 22, 23])
def test_reading_starts_anywhere(manifest, start):
    samples = list(read_samples(manifest, "train", start=start))
    assert [(sample.index, sample.meta["number"]) for sample in samples] == [(i, i) for i in range(start, 23)]


def test_a_start_outside_the_split_is_refused(manifest):
    with pytest.raises(ValueError, match="start is 24: choose one from 0 to 23"):
        read_samples(manifest, "train", start=24)


def test_reading_may_be_abandoned(manifest):
    samples = read_samples(manifest, "train")
    assert next(samples).index == 0
    del samples


def test_a_path_full_of_url_syntax_is_just_a_path(tmp_path):
    manifest = make_dataset(tmp_path / "odd #1 {a,b}?x=%20;:y")
    assert len(list(read_samples(manifest, "train"))) == 23


# As the format's first version wrote it, of three pairs in shards of two.
STORED = """{
 "format": 1,
 "settings": {"faces": ["a", "b"], "size": 8},
 "vocabulary": ["a", "b"],
 "splits": {
  "train": [
   {"name": "train/00000.tar", "samples": 2, "first_index": 0, "bytes": 10240,
    "sha256": "e06683f311a7db1324db06190a5053ea5e616b483dc291361e35e131d8f885c1"},
   {"name": "train/00001.tar", "samples": 1, "first_index": 2, "bytes": 10240,
    "sha256": "4035798ba37b7cff41c887ae75cdd6487251d7392f2fca44c1809c60bb607494"}
  ],
  "none": []
 },
 "fingerprint": "34b972833a72142fa593a4eab250b3915d747c8f33404ef8bde94ea82b5e8e18"
}"""


def test_a_manifest_of_an_existing_cache_opens(tmp_path):
    (tmp_path / "train").mkdir()
    for name in ("00000", "00001"):
        (tmp_path / "train" / f"{name}.tar").write_bytes(bytes(10240))
    (tmp_path / "manifest.json").write_text(STORED)
    manifest = open_dataset(tmp_path, {"size": 8, "faces": ["a", "b"]})
    assert manifest.fingerprint == json.loads(STORED)["fingerprint"]
    assert manifest.vocabulary == ("a", "b")
    assert {name: split.samples for name, split in manifest.splits.items()} == {"train": 3, "none": 0}
    assert [vars(shard) for shard in manifest.splits["train"].shards] == json.loads(STORED)["splits"]["train"]


def test_the_manifest_of_a_new_data_set_is_that_of_an_existing_one(tmp_path):
    splits = {"train": make_pairs(3), "none": []}
    write_dataset(tmp_path / "set", splits, {"size": 8, "faces": ["a", "b"]}, vocabulary=["a", "b"], shard_size=2)
    written, stored = json.loads((tmp_path / "set" / "manifest.json").read_bytes()), json.loads(STORED)
    for document in (written, stored):  # which depend on how Pillow compresses
        for shard in document["splits"]["train"]:
            del shard["sha256"]
        del document["fingerprint"]
    assert written == stored


def test_two_writes_give_the_same_bytes(tmp_path):
    one, two = make_dataset(tmp_path / "one"), make_dataset(tmp_path / "two")
    assert one.fingerprint == two.fingerprint
    for shard in one.splits["train"].shards:
        assert (one.folder / shard.name).read_bytes() == (two.folder / shard.name).read_bytes()
    assert make_dataset(tmp_path / "three", {"size": 9}).fingerprint != one.fingerprint


def test_opening_returns_what_was_written(manifest):
    assert open_dataset(manifest.folder, SETTINGS) == manifest
    assert open_dataset(manifest.folder) == manifest
    verify(manifest)


def test_nothing_there_is_none(tmp_path):
    assert open_dataset(tmp_path / "absent") is None
    assert open_dataset(tmp_path) is None


def test_a_complete_data_set_is_not_written_again(manifest):
    again = write_dataset(manifest.folder, {"train": make_pairs(3)}, SETTINGS)
    assert again == manifest


def test_a_folder_of_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match=r"holds other files but no manifest.json: delete .* --cache"):
        make_dataset(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_progress_counts_samples(tmp_path):
    calls = []
    write_dataset(tmp_path / "set", {"a": make_pairs(300), "b": make_pairs(300)}, {}, progress=calls.append)
    assert calls == [256, 512, 600]


@pytest.mark.parametrize("key", ["a.b", "a/b", "__a__", "", "k-00000"])
def test_keys_that_webdataset_would_misread_are_refused(tmp_path, key):
    pairs = [*make_pairs(1), GlyphPair(key, Image.new("L", (1, 1)), "", {})]
    with pytest.raises(ValueError, match="must match"):
        write_dataset(tmp_path / "set", {"train": pairs}, {})
    assert list(tmp_path.iterdir()) == []


def test_differing_settings_are_named(manifest):
    with pytest.raises(UserError) as raised:
        open_dataset(manifest.folder, {"size": 16, "captions": "clean", "faces": ("a", "b"), "new": 1})
    assert "new is None there and 1 here, size is 8 there and 16 here" in str(raised.value)
    assert "delete the folder or choose another with --cache" in str(raised.value)
    assert "captions" not in str(raised.value) and "faces" not in str(raised.value)


def test_a_missing_shard_is_named(manifest):
    (manifest.folder / "train/00002.tar").unlink()
    with pytest.raises(UserError, match=r"train/00002.tar is missing"):
        open_dataset(manifest.folder)
    with pytest.raises(UserError, match=r"train/00002.tar breaks off at sample 14 \(No such file"):
        list(read_samples(manifest, "train"))


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 2}', '{"format": 1}', "\\xff"])
def test_an_unreadable_manifest_is_named(manifest, text):
    (manifest.folder / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"cannot understand .*manifest.json.*--cache"):
        open_dataset(manifest.folder)


def test_an_edited_manifest_is_refused(manifest):
    path = manifest.folder / "manifest.json"
    document = json.loads(path.read_text())
    document["splits"]["train"][1]["first_index"] += 1
    path.write_text(json.dumps(document))
    with pytest.raises(UserError, match="fingerprint"):
        open_dataset(manifest.folder)


def test_a_truncated_shard_never_passes_for_a_complete_one(manifest):
    path = manifest.folder / manifest.splits["train"].shards[1].name
    whole = path.read_bytes()
    path.chmod(0o644)
    # Seven samples of three members of 1,024 bytes each, then padding.
    for length in (0, 300, 512, 1024, 3072, 5000, 5120, 6144, 6 * 3072 + 1024, 7 * 3072 - 512):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"00001.tar has \d+ bytes, not"):
            open_dataset(manifest.folder)
        kept = []
        with pytest.raises(UserError, match=r"00001.tar (ends before|breaks off at) sample \d+.*--cache|lacks"):
            for sample in read_samples(manifest, "train"):
                kept.append(sample.index)
        assert kept == list(range(len(kept))) and 7 <= len(kept) < 14


def test_verify_finds_a_changed_byte(manifest):
    path = manifest.folder / "test/00000.tar"
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    assert open_dataset(manifest.folder) == manifest
    with pytest.raises(UserError, match=r"test/00000.tar has the SHA-256"):
        verify(manifest)


def test_too_many_and_too_few_samples_are_named(manifest):
    replace_shard(manifest, plain_samples(8))
    with pytest.raises(UserError, match=r"00000.tar holds more than 7 samples"):
        list(read_samples(manifest, "train"))
    replace_shard(manifest, plain_samples(6))
    with pytest.raises(UserError, match=r"00000.tar ends before sample 6 of 7"):
        list(read_samples(manifest, "train"))


@pytest.mark.parametrize("member", ["png", "txt"])
def test_a_missing_member_is_named(manifest, member):
    samples = plain_samples(7)
    del samples[3][member]
    replace_shard(manifest, samples)
    with pytest.raises(UserError, match=rf"sample 3 \(k-00003\) of .*00000.tar lacks its member .{member}"):
        list(read_samples(manifest, "train"))


@pytest.mark.parametrize(
    ("member", "data"),
    [
        ("png", b"GIF89a"),
        ("png", png_bytes((64, 64))[:-40]),
        ("txt", b"\xff"),
        ("json", b"{"),
        ("json", b"1"),
    ],
)
def test_an_undecodable_member_is_named(manifest, member, data):
    samples = plain_samples(7)
    samples[5][member] = data
    replace_shard(manifest, samples)
    with pytest.raises(UserError, match=r"sample 5 \(k-00005\) of .* cannot be decoded"):
        list(read_samples(manifest, "train"))


@pytest.mark.parametrize("size", [(8200, 8200), (10000, 10000), (20000, 20000)])
def test_a_decompression_bomb_is_refused_undecoded(manifest, size):
    header = bytearray(png_bytes()[8:33])
    header[8:16] = size[0].to_bytes(4, "big") + size[1].to_bytes(4, "big")
    crc = zlib.crc32(header[4:21]).to_bytes(4, "big")
    bomb = png_bytes()[:8] + bytes(header[:21]) + crc + png_bytes()[33:]
    samples = plain_samples(7)
    samples[2]["png"] = bomb
    replace_shard(manifest, samples)
    with pytest.raises(UserError, match=r"sample 2 \(k-00002\) of .* cannot be decoded \(.*pixels"):
        list(read_samples(manifest, "train"))


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_pickle_is_never_executed(manifest, tmp_path):
    trace = tmp_path / "executed"
    payload = pickle.dumps(Payload(trace))
    pickle.loads(payload)
    assert trace.exists()
    trace.unlink()
    evil = {name: payload for name in ("pyd", "pickle", "pkl", "pth", "x.pyd", "npy")}
    replace_shard(manifest, [sample | evil for sample in plain_samples(7)])
    assert len(list(read_samples(manifest, "train"))) == 23
    replace_shard(manifest, [sample | {"json": payload} for sample in plain_samples(7)])
    with pytest.raises(UserError, match="cannot be decoded"):
        list(read_samples(manifest, "train"))
    assert not trace.exists()


def test_an_unknown_split_lists_the_splits(manifest):
    with pytest.raises(UserError, match="no split 'training': choose one of train, test, none"):
        read_samples(manifest, "training")


def test_an_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "set", tmp_path / "file" / "deeper" / "set"):
        with pytest.raises(UserError) as raised:
            make_dataset(folder)
        assert str(folder) in str(raised.value) and "Not a directory" in str(raised.value)
        assert "choose another with --cache" in str(raised.value) and "\n" not in str(raised.value)


def run_writer(folder, before=""):
    code = f"""
import sys, time
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from PIL import Image
from experiments.clip.errors import UserError
from experiments.clip.glyphs.dataset import GlyphPair, write_dataset
{before}
image = Image.new("L", (8, 8))
pairs = (GlyphPair(f"k-{{i:07d}}", image, "x", {{}}) for i in range(10**6))
try:
    write_dataset(Path({str(folder)!r}), {{"train": pairs}}, {SETTINGS!r}, shard_size=20)
except UserError as error:
    sys.exit(f"USER ERROR {{error}}")
"""
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)


def wait_for(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_a_killed_write_leaves_nothing_and_the_next_one_works(tmp_path):
    folder = tmp_path / "set"
    with run_writer(folder) as process:
        partial = tmp_path / f".set.partial-{process.pid}"
        wait_for(lambda: (partial / "train" / "00002.tar").exists())
        # What a living process is writing is not taken for abandoned.
        dataset._remove_abandoned(folder)
        assert partial.exists()
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert partial.exists()
    assert open_dataset(folder) is None
    assert open_dataset(partial) is None
    manifest = make_dataset(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    assert len(list(read_samples(manifest, "train"))) == 23


@pytest.mark.slow
def test_a_full_disk_is_named_and_cleaned_up(tmp_path):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (30000, 30000))"
    with run_writer(tmp_path / "set", limit) as process:
        _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert error.startswith(f"USER ERROR cannot write the data set {tmp_path / 'set'} (")
    assert "File too large" in error and "choose another with --cache" in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("settings", [SETTINGS, {"size": 9}])
def test_the_first_of_two_writers_wins(tmp_path, settings):
    folder = tmp_path / "set"
    first = make_dataset(tmp_path / "first")

    def overtaken():
        yield from make_pairs(10)
        first.folder.rename(folder)
        yield from make_pairs(10, "late")

    if settings == SETTINGS:
        manifest = write_dataset(folder, {"train": overtaken()}, settings)
        assert manifest.fingerprint == first.fingerprint
    else:
        with pytest.raises(UserError, match="size is 8 there and 9 here"):
            write_dataset(folder, {"train": overtaken()}, settings)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
