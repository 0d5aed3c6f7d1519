import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
from tars import image_bytes, numbered, pair, write_pairs, write_shards, write_tar
from webdataset.tariterators import group_by_keys, tar_file_expander

from experiments.clip.data import catalog as catalog_module
from experiments.clip.data import scan as scanning
from experiments.clip.data.catalog import make_catalog, open_catalog
from experiments.clip.data.reader import Reader, decode
from experiments.clip.data.sources import Synthetic, Table, expand, parse_sources, parse_weights
from experiments.clip.errors import UserError

ROOT = Path(__file__).parents[3]


def everything(catalog):
    """The numbers and captions of all samples, decoded."""
    reader = Reader(catalog)
    pairs = [decode(reader.read(index)) for index in range(len(catalog))]
    return [(numbered(sample.image), sample.caption) for sample in pairs]


def keys(catalog):
    reader = Reader(catalog)
    return [reader.read(index).key for index in range(len(catalog))]


def expected(numbers):
    return [(number, f"caption {number}") for number in numbers]


@pytest.fixture
def shards(tmp_path):
    return write_shards(tmp_path / "data", [5, 1, 8])


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_every_sample_has_its_index(shards, tmp_path, workers):
    calls = []
    catalog = make_catalog(
        str(tmp_path / "data/{00000..00002}.tar"),
        tmp_path / "catalog",
        workers=workers,
        progress=lambda *done: calls.append(done),
    )
    assert len(catalog) == 14
    assert [(shard.samples, shard.first_index) for shard in catalog.shards] == [(5, 0), (1, 5), (8, 6)]
    assert everything(catalog) == expected(range(14))
    assert catalog.left_out == {} and catalog.damaged == []
    assert calls == [(1, 3), (2, 3), (3, 3)]
    assert open_catalog(tmp_path / "catalog") == catalog


def test_nothing_in_the_folder_is_a_pickle(shards, tmp_path):
    catalog = make_catalog(str(tmp_path / "data/*.tar"), tmp_path / "catalog")
    for shard in catalog.shards:
        assert np.load(catalog.folder / shard.index, allow_pickle=False).dtype.names == ("image", "caption", "key")
    files = {path.suffix for path in catalog.folder.rglob("*") if path.is_file()}
    assert files == {".npy", ".json", ".jsonl"}


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_key_rule_is_that_of_webdataset(tmp_path, format):
    odd = ["a/b.c/0001", "plain", "./dotted", "a b/ü", "x" * 60 + "/" + "y" * 60]
    odd += ["z" * 300] if format != tarfile.USTAR_FORMAT else []
    members = [member for number, key in enumerate(odd) for member in pair(number, key)]
    members += [("__meta__.txt", b"x"), ("__a__/b.txt", b"x"), ("a.PNG", image_bytes(9)), ("a.TXT", b"caption 9")]
    members += [("b.seg.png", image_bytes(1)), ("b.png", image_bytes(10)), ("b.txt", b"caption 10")]
    path = write_tar(tmp_path / "x.tar", members, format)
    catalog = make_catalog(path, tmp_path / "catalog")
    with path.open("rb") as stream:
        reference = group_by_keys(tar_file_expander([{"url": "x.tar", "stream": stream}]))
        samples = [sample for sample in reference if "png" in sample and "txt" in sample]
    assert keys(catalog) == [sample["__key__"] for sample in samples]
    assert [caption for _, caption in everything(catalog)] == [sample["txt"].decode() for sample in samples]
    assert len(catalog) == len(odd) + 2


def test_duplicate_keys_are_different_samples(tmp_path):
    uid = "00af" * 8
    write_tar(tmp_path / "0.tar", [*pair(0, uid), *pair(1, uid), *pair(2, "other"), *pair(3, uid)])
    write_tar(tmp_path / "1.tar", pair(4, uid))
    catalog = make_catalog(str(tmp_path / "{0,1}.tar"), tmp_path / "catalog")
    assert keys(catalog) == [uid, uid, "other", uid, uid]
    assert everything(catalog) == expected(range(5))


def test_what_is_left_out_is_counted(tmp_path):
    link = tarfile.TarInfo("linked.txt")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    folder = tarfile.TarInfo("some.folder")
    folder.type = tarfile.DIRTYPE
    members = [
        folder,
        *pair(0),
        ("only.txt", b"x"),
        ("alone.png", image_bytes()),
        ("film.mp4", b"x"),
        ("film.txt", b"x"),
        ("linked.png", image_bytes()),
        link,
        *pair(0, "../../etc/passwd"),
        *pair(0, "/absolute"),
        *pair(0, "line\nfeed"),
        *pair(0, "n" * 5000),
        ("README", b"x"),
        ("evil.pickle", b"cos\nsystem\n(S'touch /tmp/pwned'\ntR."),
        ("evil.png", image_bytes()),
        ("evil.pyd", b"x"),
        *pair(1),
    ]
    catalog = make_catalog(write_tar(tmp_path / "x.tar", members), tmp_path / "catalog")
    assert everything(catalog) == expected([0, 1])
    assert catalog.left_out == {
        "no image": 2,
        "no caption": 2,
        "link or device": 1,
        "hostile name": 4,
        "name without a type": 1,
    }
    assert json.loads((tmp_path / "catalog/catalog.json").read_text())["left_out"] == catalog.left_out


def test_damaged_shards_keep_what_is_whole(shards, tmp_path):
    truncated = shards[0].read_bytes()
    shards[0].write_bytes(truncated[: len(truncated) // 2])
    flipped = bytearray(shards[2].read_bytes())
    flipped[12 * 512] ^= 1  # the second sample's first header
    shards[2].write_bytes(flipped)
    (tmp_path / "data/00003.tar").write_bytes(b"")
    (tmp_path / "data/00004.tar").write_bytes(b"<html>404</html>" * 1000)
    (tmp_path / "data/00005.tar").write_bytes(bytes(10240))
    catalog = make_catalog(str(tmp_path / "data/*.tar"), tmp_path / "catalog")
    kept = catalog.shards[0].samples
    assert 0 < kept < 5
    assert [shard.samples for shard in catalog.shards[1:]] == [1, 1, 0, 0, 0]
    assert everything(catalog) == expected([*range(kept), 5, 6])
    assert catalog.left_out["damaged shard"] == 4
    assert re.search(r"00002.tar: bad checksum at byte 6144, of 51200", "\n".join(catalog.damaged))
    assert re.search(r"00003.tar: no end mark at byte 0, of 0", "\n".join(catalog.damaged))


def test_no_sample_at_all_is_an_error(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("a.txt", b"x")])
    with pytest.raises(UserError, match=r"no sample with image and caption \(no image: 1\): check --caption-key"):
        make_catalog(path, tmp_path / "catalog")
    assert not (tmp_path / "catalog/catalog.json").exists()


@pytest.mark.parametrize("method", ["gz", "bz2", "xz"])
def test_compressed_shards_are_refused(tmp_path, method):
    with tarfile.open(tmp_path / "x.tar", f"w:{method}") as tar:
        tar.addfile(tarfile.TarInfo("a.txt"))
    with pytest.raises(UserError, match=r"x.tar is compressed \("):
        make_catalog(tmp_path / "x.tar", tmp_path / "catalog")


def test_captions_of_several_kinds(tmp_path):
    described = json.dumps({"caption": "from json", "list": ["one", "two"]}).encode()
    members = [("a.jpg", image_bytes(kind="JPEG")), ("a.txt", b"plain"), ("a.json", described)]
    members += [("b.webp", image_bytes(kind="WEBP")), ("b.syn.txt", b"synthetic")]
    path = write_tar(tmp_path / "x.tar", members)
    for name, wanted, samples in [
        ("txt", ["plain"], 1),
        ("json:caption", ["from json"], 1),
        ("json:list", ["one", "two"], 1),
        (("txt", "json:list", "syn.txt"), ["plain", "one", "two"], 2),
    ]:
        catalog = make_catalog(path, tmp_path / "catalog", caption_key=name)
        raw = Reader(catalog).read(0)
        assert len(catalog) == samples
        assert [decode(raw, draw).caption for draw in range(len(wanted))] == wanted
    assert decode(Reader(catalog).read(1), 7).caption == "synthetic"


def test_image_keys_choose_the_image(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("a.png", image_bytes(1)), ("a.txt", b"x"), ("a.thumb.png", image_bytes(2))])
    assert everything(make_catalog(path, tmp_path / "c")) == [(1, "x")]
    assert everything(make_catalog(path, tmp_path / "c", image_keys=["thumb.png", "png"])) == [(2, "x")]


def test_sources_are_numbered_in_order(tmp_path):
    write_pairs(tmp_path / "a/0.tar", range(3))
    write_pairs(tmp_path / "b/[x]{1}.tar", range(3, 5))
    write_pairs(tmp_path / "b/y.tar", range(5, 7))
    catalog = make_catalog(f"{tmp_path}/a/*.tar::{tmp_path}/b/[x]{{1}}.tar::{tmp_path}/b/?.tar", tmp_path / "catalog")
    assert everything(catalog) == expected(range(7))
    assert [shard.source for shard in catalog.shards] == [0, 1, 2]
    assert catalog.shard_weights([1, 2, 3]) == [1, 2, 3]
    with pytest.raises(UserError, match="there are 2 weights for 3 sources"):
        catalog.shard_weights([1, 2])


def test_weights_are_those_of_open_clip():
    assert parse_weights("1::2.5", 2) == [1.0, 2.5]
    with pytest.raises(UserError, match="there are 1 weights, '1', for 2 sources"):
        parse_weights("1", 2)
    with pytest.raises(UserError, match="must be numbers joined by ::"):
        parse_weights("1:2", 1)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("data/{00000..00004}.tar", r"2 of its 5 files are missing, the first is .*/data/00003.tar: correct"),
        ("data/*.tgz", "no file matches: correct the pattern"),
        ("data/{00000.tar", r"braces of .* do not match"),
        ("data", r"is a folder: name its tar files"),
        ("", "a source has no name"),
        ("data/00000.tar::data/0000*.tar", "00000.tar is listed twice: list it once and give its source a weight"),
        ("pipe:touch pwned", r"would run a shell command: allow it with run_pipe_commands"),
        ("nosuchprotocol://x.tar", "install the package that reads it"),
        ("synthetic:many", "must be synthetic:SAMPLES"),
        ("absent.csv", r"cannot read .*absent.csv \(No such file"),
    ],
)
def test_wrong_sources(shards, tmp_path, monkeypatch, pattern, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        make_catalog(pattern, tmp_path / "catalog")
    assert not (tmp_path / "pwned").exists()


def test_pipes_run_once_where_allowed(shards, tmp_path):
    source = f"pipe:cat {tmp_path}/data/{{00000,00001}}.tar && echo x >> {tmp_path}/runs"
    for _ in range(2):
        catalog = make_catalog(source, tmp_path / "catalog", run_pipe_commands=True)
    assert everything(catalog) == expected(range(6))
    assert (tmp_path / "runs").read_text() == "x\nx\n"
    with pytest.raises(UserError, match=r"the command 'echo no >&2; false' ended with 1 \(no\)"):
        make_catalog("pipe:echo no >&2; false", tmp_path / "other", run_pipe_commands=True)
    assert not list((tmp_path / "other/pipes").iterdir())


@pytest.mark.parametrize("protocol", ["memory", "file"])
def test_remote_shards(shards, tmp_path, protocol):
    base = f"memory://{tmp_path.name}" if protocol == "memory" else f"file://{tmp_path}/data"
    if protocol == "memory":
        for path in shards:
            with fsspec.open(f"{base}/{path.name}", "wb") as file:
                file.write(path.read_bytes())
    catalog = make_catalog(f"{base}/{{00000,00001}}.tar::{base}/*2.tar", tmp_path / "catalog")
    assert everything(catalog) == expected(range(14))
    assert open_catalog(tmp_path / "catalog") == catalog
    assert [decode(raw).caption for raw in Reader(catalog).read_many([13, 0, 5])] == [
        "caption 13",
        "caption 0",
        "caption 5",
    ]
    local = make_catalog(str(tmp_path / "data/*.tar"), tmp_path / "local")
    assert local.fingerprint == catalog.fingerprint
    fsspec.filesystem(protocol).rm(f"{base}/00001.tar")
    with pytest.raises(UserError, match=r"cannot read .*00001.tar"):
        open_catalog(tmp_path / "catalog")


@pytest.mark.parametrize(("name", "separator"), [("pairs.csv", ","), ("pairs.tsv", "\t"), ("pairs.csv", "\t")])
def test_tables(tmp_path, monkeypatch, name, separator):
    monkeypatch.setattr(scanning, "CHUNK", 3)
    (tmp_path / "images").mkdir()
    lines = [separator.join(["title", "filepath", "other"])]
    for number in range(7):
        (tmp_path / f"images/{number}.png").write_bytes(image_bytes(number))
        lines.append(separator.join([f'"caption {number}"', f"images/{number}.png", "x"]))
    lines += ["", separator.join(["no image", "", ""]), "short"]
    (tmp_path / name).write_text("\n".join(lines))
    catalog = make_catalog(str(tmp_path / name), tmp_path / "catalog")
    assert [shard.samples for shard in catalog.shards] == [3, 3, 1]
    assert everything(catalog) == expected(range(7))
    assert catalog.left_out == {"no image": 2}
    assert open_catalog(tmp_path / "catalog") == catalog


def test_tables_with_columns_of_other_names(tmp_path):
    (tmp_path / "1.png").write_bytes(image_bytes(1))
    (tmp_path / "t.csv").write_text(f'path;en;de\n{tmp_path}/1.png;"an; image";Bild\n{tmp_path}/1.png\nabsent;x;y\n')
    catalog = make_catalog(Table(str(tmp_path / "t.csv"), "path", ("en", "de")), tmp_path / "catalog")
    reader = Reader(catalog)
    assert [decode(reader.read(0), draw).caption for draw in (0, 1)] == ["an; image", "Bild"]
    assert reader.read(1).reason == "no image file"
    assert catalog.left_out == {"no caption": 1}
    with pytest.raises(UserError, match="must have the columns filepath, title, its header is 'path;en;de'"):
        make_catalog(str(tmp_path / "t.csv"), tmp_path / "catalog")


def test_captions_of_tables_belong_to_the_fingerprint(tmp_path):
    prints = []
    for caption in ("one", "two", "one"):
        (tmp_path / "t.csv").write_text(f"filepath,title\na.png,{caption}\n")
        prints.append(make_catalog(str(tmp_path / "t.csv"), tmp_path / "catalog").fingerprint)
    assert prints[0] == prints[2] != prints[1]


def test_damaged_tables(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"filepath,title\na.png,one\nb.png,\xff\nc.png," + b"x" * 200_000 + b"\n")
    with pytest.raises(UserError, match=r"t.csv breaks off at line \d+ \(field larger than field limit"):
        make_catalog(str(tmp_path / "t.csv"), tmp_path / "catalog")
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"reading .*t.parquet needs pyarrow|cannot read the table"):
        make_catalog(str(tmp_path / "t.parquet"), tmp_path / "catalog")


def test_made_up_pairs(tmp_path):
    catalog = make_catalog("synthetic:25000:16", tmp_path / "catalog")
    assert [shard.samples for shard in catalog.shards] == [10000, 10000, 5000]
    sample = decode(Reader(catalog).read(24_999))
    assert sample.image.size == (16, 16) and sample.caption == "made-up pair number 24999"
    assert open_catalog(tmp_path / "catalog") == catalog
    assert parse_sources("synthetic:7") == [Synthetic(7)]


def test_the_fingerprint_is_that_of_the_data_not_of_its_place(shards, tmp_path):
    one = make_catalog(str(tmp_path / "data/*.tar"), tmp_path / "one")
    (tmp_path / "data").rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"no longer fits: .*data/00000.tar is missing: make it again"):
        open_catalog(tmp_path / "one")
    two = make_catalog(str(tmp_path / "moved/*.tar"), tmp_path / "one")
    assert two.fingerprint == one.fingerprint
    three = make_catalog(str(tmp_path / "moved/0000[01].tar"), tmp_path / "one")
    assert three.fingerprint != one.fingerprint


def test_a_catalog_that_no_longer_fits_is_refused(shards, tmp_path):
    make_catalog(str(tmp_path / "data/*.tar"), tmp_path / "catalog")
    whole = shards[2].read_bytes()
    shards[2].write_bytes(whole[:-512])
    with pytest.raises(UserError, match=r"no longer fits: .*00002.tar has \d+ bytes, not \d+: make it again"):
        open_catalog(tmp_path / "catalog")
    write_pairs(shards[2], range(100, 108))
    assert shards[2].stat().st_size == len(whole)
    with pytest.raises(UserError, match=r"00002.tar holds other samples: make it again"):
        open_catalog(tmp_path / "catalog")
    assert open_catalog(tmp_path / "catalog", verify=False)
    again = make_catalog(str(tmp_path / "data/*.tar"), tmp_path / "catalog")
    assert everything(again) == expected([*range(6), *range(100, 108)])
    assert open_catalog(tmp_path / "catalog") == again


def test_lost_or_foreign_index_files(shards, tmp_path):
    catalog = make_catalog(str(tmp_path / "data/*.tar"), tmp_path / "catalog")
    index = catalog.folder / catalog.shards[1].index
    whole = index.read_bytes()
    index.write_bytes(whole[:50])
    with pytest.raises(UserError, match=r"npy has 50 bytes, not"):
        open_catalog(tmp_path / "catalog")
    with pytest.raises(UserError, match=r"cannot read .*npy"):
        Reader(catalog).read(5)
    index.write_bytes((catalog.folder / catalog.shards[0].index).read_bytes())
    with pytest.raises(UserError, match=r"is not the index of"):
        Reader(catalog).read(5)
    index.unlink()
    with pytest.raises(UserError, match=r"is missing: make it again"):
        open_catalog(tmp_path / "catalog")
    assert everything(make_catalog(str(tmp_path / "data/*.tar"), tmp_path / "catalog")) == expected(range(14))


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 9}', '{"format": 1, "shards": [{"x": 1}]}', "\\xff"])
def test_a_damaged_catalog_file(tmp_path, text):
    (tmp_path / "catalog.json").write_text(text)
    with pytest.raises(UserError, match=r"cannot understand .*catalog.json .*: make the catalog again"):
        open_catalog(tmp_path)


def test_an_edited_catalog_file(shards, tmp_path):
    make_catalog(str(tmp_path / "data/*.tar"), tmp_path / "catalog")
    path = tmp_path / "catalog/catalog.json"
    path.write_text(path.read_text().replace('"first_index": 5', '"first_index": 4'))
    with pytest.raises(UserError, match="its fingerprint does not match"):
        open_catalog(tmp_path / "catalog")
    with pytest.raises(UserError, match="there is no catalog in"):
        open_catalog(tmp_path / "absent")


def test_unchanged_shards_are_not_scanned_again(shards, tmp_path, monkeypatch):
    scanned = []
    scan = catalog_module.scan
    monkeypatch.setattr(catalog_module, "scan", lambda job: scanned.append(Path(job.path).name) or scan(job))
    make_catalog(str(tmp_path / "data/0000[01].tar"), tmp_path / "catalog")
    make_catalog(str(tmp_path / "data/*.tar"), tmp_path / "catalog")
    write_pairs(shards[1], [99])
    os.utime(shards[1], ns=(1, 1))
    catalog = make_catalog(str(tmp_path / "data/*.tar"), tmp_path / "catalog")
    assert scanned == ["00000.tar", "00001.tar", "00002.tar", "00001.tar"]
    assert everything(catalog) == expected([*range(5), 99, *range(6, 14)])


SCAN = """
import sys, time
from experiments.clip.data import catalog
scan = catalog.scan
def slow(job):
    time.sleep(0.1)
    print(job.path, flush=True)
    return scan(job)
catalog.scan = slow
catalog.make_catalog(sys.argv[1], sys.argv[2], workers=int(sys.argv[3]))
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_a_scan_goes_on_after_kill_9(tmp_path, workers):
    write_shards(tmp_path / "data", [3] * 12)
    arguments = [sys.executable, "-c", SCAN, str(tmp_path / "data/*.tar"), str(tmp_path / "catalog"), str(workers)]
    journal = tmp_path / "catalog/journal.jsonl"
    with subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        while not journal.exists() or journal.read_bytes().count(b'"tar"') < 4:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
    assert not (tmp_path / "catalog/catalog.json").exists()
    with journal.open("ab") as file:
        file.write(b'["half a li')
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert 1 <= len(done.stdout.splitlines()) <= 8
    resumed = open_catalog(tmp_path / "catalog")
    fresh = make_catalog(str(tmp_path / "data/*.tar"), tmp_path / "fresh")
    assert dataclasses.replace(resumed, folder=fresh.folder) == fresh
    assert everything(resumed) == expected(range(36))


def test_an_unwritable_folder(shards, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        make_catalog(str(tmp_path / "data/*.tar"), tmp_path / "file")


def test_paths_that_exist_are_themselves(tmp_path):
    path = tmp_path / "odd {1,2} [x] *.tar"
    path.write_bytes(b"")
    assert expand(str(path)) == [str(path)]
