"""The catalog: a stable index for every sample, resumed scans, and refusal of what no longer fits."""

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import fsspec
import numpy as np
import pytest
from tars import everything, expected, image_bytes, write_pairs, write_shards, write_tar

from experiments.clip.catalog import catalog as catalog_module
from experiments.clip.catalog.catalog import make_catalog, open_catalog, open_index, shard_digest
from experiments.clip.data.reader import Reader, decode
from experiments.clip.errors import UserError

ROOT = Path(__file__).parents[3]


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
    assert files == {".npy", ".json", ".jsonl", ".columns"}


def test_no_sample_at_all_is_an_error(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("a.txt", b"x")])
    with pytest.raises(UserError, match=r"no sample with image and caption \(no image: 1\): --image-key names"):
        make_catalog(path, tmp_path / "catalog")
    assert not (tmp_path / "catalog/catalog.json").exists()


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


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("data/{00000..00004}.tar", r"2 of its 5 files are missing, the first is .*/data/00003.tar: correct"),
        ("data/*.tgz", "no file matches: correct the pattern"),
        ("data/{00000.tar", r"braces of .* do not match"),
        ("data/..", r"has no file that ends in .tar: name folders in it, like data/../data, or all shards"),
        ("", "a source has no name"),
        ("data/00000.tar::data/0000*.tar", "00000.tar is listed twice: list it once and give its source a weight"),
        ("pipe:touch pwned", r"would run a shell command: allow it by --run-pipe-commands"),
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


@pytest.mark.parametrize("protocol", ["zip", "tar"])
def test_shards_within_an_archive(shards, tmp_path, protocol):
    path = tmp_path / f"all.{protocol}"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) if protocol == "zip" else tarfile.open(path, "w") as archive:
        for shard in shards:
            (archive.write if protocol == "zip" else archive.add)(shard, shard.name)
    chain = f"{protocol}://*.tar::file://{path}"
    catalog = make_catalog([chain], tmp_path / "catalog", workers=2)
    assert everything(catalog) == expected(range(14))
    assert [shard.path for shard in catalog.shards] == [chain.replace("*.tar", shard.name) for shard in shards]
    assert open_catalog(tmp_path / "catalog") == catalog


def test_a_remote_shard_is_read_once_in_one_stream(shards, tmp_path):
    pytest.importorskip("aiohttp")
    from experiments.benchmarks.remote import served

    with served(tmp_path / "data") as server:
        pattern = f"{server.url}/{{00000..00002}}.tar"
        catalog = make_catalog(pattern, tmp_path / "catalog", checksums=True)
        names = [f"/{path.name}" for path in shards]
        gets = [(path, stated) for method, path, stated in server.requests if method == "GET"]
        assert gets == [(name, "") for name in names]
        assert everything(catalog) == expected(range(14))
        for check in (None, "time", "checksum"):
            assert open_catalog(tmp_path / "catalog", check=check) == catalog
        edit(shards[2])
        open_catalog(tmp_path / "catalog")
        for check in ("time", "checksum"):
            with pytest.raises(
                UserError, match=r"no longer fits: http://.*/00002.tar has (been written since|changed)"
            ):
                open_catalog(tmp_path / "catalog", check=check)
        server.requests.clear()
        make_catalog(pattern, tmp_path / "catalog", checksums=True)
        assert [path for method, path, _ in server.requests if method == "GET"] == names[2:]
        assert open_catalog(tmp_path / "catalog", check="checksum") == open_catalog(tmp_path / "catalog", check="time")


def edit(path):
    """Change a byte of the caption of a sample in the middle, and nothing else; the clock goes on."""
    content, before = bytearray(path.read_bytes()), path.stat().st_mtime_ns
    content[content.index(b"caption 9") + 8] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before + 2 * 10**9, before + 2 * 10**9))


def test_a_shard_that_is_edited_in_place_is_noticed_by_its_time_or_its_checksum(shards, tmp_path):
    folder = tmp_path / "catalog"
    make_catalog(str(tmp_path / "data/*.tar"), folder)
    with pytest.raises(UserError, match=r"it has no checksum of .*00000.tar, which `run.py catalog --checksums` keeps"):
        open_catalog(folder, check="checksum")
    catalog = make_catalog(str(tmp_path / "data/*.tar"), folder, checksums=True)
    assert [shard.sha256 for shard in catalog.shards] == [hashlib.sha256(p.read_bytes()).hexdigest() for p in shards]
    times = shards[2].stat()
    edit(shards[2])
    assert open_catalog(folder) == catalog  # sizes and headers are the same
    with pytest.raises(UserError, match=r"00002.tar has been written since, it is of \d+, not \d+: make it again"):
        open_catalog(folder, check="time")
    os.utime(shards[2], ns=(times.st_atime_ns, times.st_mtime_ns))
    assert open_catalog(folder, check="time") == catalog
    with pytest.raises(UserError, match=r"00002.tar has changed, its checksum differs: make it again"):
        open_catalog(folder, check="checksum")


def test_a_digest_of_a_shard_does_not_depend_on_the_others(shards, tmp_path):
    digests = []
    for pattern in ("00000", "{00000..00002}", "{00001..00002}"):
        catalog = make_catalog(str(tmp_path / f"data/{pattern}.tar"), tmp_path / "catalog")
        digests.append({Path(shard.path).name: shard_digest(catalog, shard) for shard in catalog.shards})
    assert digests[1] == {**digests[0], **digests[2]} and len(set(digests[1].values())) == 3


def test_captions_of_tables_belong_to_the_fingerprint(tmp_path):
    prints = []
    for caption in ("one", "two", "one"):
        (tmp_path / "t.csv").write_text(f"filepath,title\na.png,{caption}\n")
        prints.append(make_catalog(str(tmp_path / "t.csv"), tmp_path / "catalog").fingerprint)
    assert prints[0] == prints[2] != prints[1]


def test_made_up_pairs(tmp_path):
    catalog = make_catalog("synthetic:25000:16", tmp_path / "catalog")
    assert [shard.samples for shard in catalog.shards] == [10000, 10000, 5000]
    sample = decode(Reader(catalog).read(24_999))
    assert sample.image.size == (16, 16) and sample.caption == "made-up pair number 24999"
    assert open_catalog(tmp_path / "catalog") == catalog


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
    intact = shards[2].read_bytes()
    shards[2].write_bytes(intact[:-512])
    with pytest.raises(UserError, match=r"no longer fits: .*00002.tar has \d+ bytes, not \d+: make it again"):
        open_catalog(tmp_path / "catalog")
    write_pairs(shards[2], range(100, 108))
    assert shards[2].stat().st_size == len(intact)
    with pytest.raises(UserError, match=r"00002.tar holds other samples: make it again"):
        open_catalog(tmp_path / "catalog")
    assert open_catalog(tmp_path / "catalog", verify=False)
    again = make_catalog(str(tmp_path / "data/*.tar"), tmp_path / "catalog")
    assert everything(again) == expected([*range(6), *range(100, 108)])
    assert open_catalog(tmp_path / "catalog") == again


def test_lost_or_foreign_index_files(shards, tmp_path):
    catalog = make_catalog(str(tmp_path / "data/*.tar"), tmp_path / "catalog")
    index = catalog.folder / catalog.shards[1].index
    intact = index.read_bytes()
    index.write_bytes(intact[:50])
    with pytest.raises(UserError, match=r"npy has 50 bytes, not"):
        open_catalog(tmp_path / "catalog")
    with pytest.raises(UserError, match=r"cannot read .*npy"):
        Reader(catalog).read(5)
    index.write_bytes((catalog.folder / catalog.shards[0].index).read_bytes())
    with pytest.raises(UserError, match=r"cannot read .*npy .*its checksum differs"):
        Reader(catalog).read(5)
    with pytest.raises(UserError, match=r"is not the index of"):
        open_index(catalog, catalog.shards[1], verify=False)
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
    path.write_text(path.read_text().replace('"samples": 14', '"samples": 15'))
    with pytest.raises(UserError, match="its checksum differs"):
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
from experiments.clip.catalog import catalog
scan = catalog.scan
def slow(job):
    time.sleep(0.1)
    print(job.path, flush=True)
    return scan(job)
catalog.scan = slow
catalog.make_catalog(sys.argv[1], sys.argv[2], workers=int(sys.argv[3]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_scan_resumes_after_kill_9(tmp_path, workers):
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


def test_a_file_that_fails_while_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.clip.io.files.WAITS", (0.0,))
    with pytest.raises(UserError, match=r"cannot read /proc/self/mem after 2 attempts \(Input/output error\): check"):
        make_catalog("/proc/self/mem", tmp_path / "catalog")


@pytest.mark.parametrize("name", ["x.tar", "x.csv", "x.parquet"])
def test_pipes_and_folders_in_the_place_of_files(tmp_path, name):
    for make in (os.mkfifo, os.mkdir):
        path = tmp_path / make.__name__ / name
        path.parent.mkdir()
        make(path)
        with pytest.raises(UserError, match=r"is no regular file: name one|the folder .* has no file that ends"):
            make_catalog(path, tmp_path / "catalog")


# As an earlier version wrote it, apart from DATA.
WRITTEN = """{"format": 1, "fingerprint": "57a66e41a04e95bea385024367aff740ffa9d8b75e4b61a529a1f39474538535",
"samples": 9, "left_out": {"no image": 1},
"sources": [{"kind": "shards", "pattern": "DATA/*.tar"}, {"captions": ["title"],
"image": "filepath", "kind": "table", "path": "DATA/t.csv", "root": "", "separator": ""},
{"kind": "synthetic", "pixels": 8, "samples": 5}],
"image_keys": ["jpg", "jpeg", "png", "webp"], "caption_keys": ["txt"],
"shards": [{"kind": "tar", "path": "DATA/0.tar", "bytes": 10240, "samples": 2,
"index": "index/9a964e4dcae0dc806bd035d6.npy", "index_bytes": 258,
"index_sha256": "82cc36da6229bfc1f9354d5ad08e24e4d88cb115ba46d402e653dd646b35c295",
"heads": "4cb091c2efe28fdb3cb6f06e96f5a66204b789ecb0085290b1dad163205aa7bd", "left_out": {"no image": 1}, "damage": "",
"root": "", "pixels": 0, "source": 0, "first_index": 0},
{"kind": "table", "path": "index/2ba00ad413d236ee38a88467-000000.rows", "bytes": 16, "samples": 2,
"index": "index/2ba00ad413d236ee38a88467-000000.npy", "index_bytes": 258,
"index_sha256": "e29e06c184f5b7406b3284206e1e802e6633e84ede0583179681711f8f8d70da",
"heads": "b3ff5c185c99636ea8c54abb5f4b0b5febbbcd0627d9bc8fbdfca99b8f8c2494", "left_out": {}, "damage": "",
"root": "DATA", "pixels": 0, "source": 1, "first_index": 2},
{"kind": "synthetic", "path": "synthetic:5:8", "bytes": 0, "samples": 5, "index": "", "index_bytes": 0,
"index_sha256": "", "heads": "", "left_out": {}, "damage": "", "root": "", "pixels": 8,
"source": 2, "first_index": 4}]}"""


def test_fingerprints_of_earlier_versions_stay_as_they_are(tmp_path):
    """The same data have the fingerprint that they had, which checkpoints and reference features hold."""
    members = [("a.png", b"1" * 700), ("a.txt", b"one"), ("b.png", b"2"), ("b.txt", b"two"), ("c.txt", b"x")]
    write_tar(tmp_path / "0.tar", members)
    (tmp_path / "t.csv").write_text("filepath,title\na.png,one\nb.png,two\n")
    sources = f"{tmp_path}/*.tar::{tmp_path}/t.csv::synthetic:5:8"
    catalog = make_catalog(sources, tmp_path / "catalog")
    written = json.loads(WRITTEN.replace("DATA", str(tmp_path)))
    for shard, old in zip(map(dataclasses.asdict, catalog.shards), written["shards"], strict=True):
        # Index files are named after the paths and times of what was scanned.
        different = {"tar": ("index",), "table": ("index", "path")}.get(old["kind"], ())
        version, checksum = shard.pop("version"), shard.pop("sha256")  # which they did not have
        assert checksum == "" and version == (
            str((tmp_path / "0.tar").stat().st_mtime_ns) if shard["kind"] == "tar" else ""
        )
        assert shard == old | {name: shard[name] for name in different}
    assert catalog.fingerprint == written["fingerprint"]
    (tmp_path / "catalog/catalog.json").write_text(json.dumps(written))
    with pytest.raises(UserError, match=r"its format is 1, this program reads 2.*: make the catalog again"):
        open_catalog(tmp_path / "catalog")
    assert make_catalog(sources, tmp_path / "catalog") == catalog == open_catalog(tmp_path / "catalog")


def test_a_flipped_bit_in_an_index_or_a_catalog_is_refused_by_name(tmp_path):
    write_tar(tmp_path / "a.tar", [("0.jpg", b"x"), ("0.txt", b"one"), ("1.jpg", b"y"), ("1.txt", b"two")])
    catalog = make_catalog(str(tmp_path / "a.tar"), tmp_path / "catalog")
    [shard] = catalog.shards
    index, content = catalog.folder / shard.index, (catalog.folder / shard.index).read_bytes()
    index.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=rf"cannot read {index} .*checksum differs"):
        open_index(open_catalog(tmp_path / "catalog"), shard)
    index.write_bytes(content)
    assert len(open_index(catalog, shard)) == 2
    for pattern in ("catalog.json", "shards-*.jsonl", "shards-*.columns"):
        [path] = (tmp_path / "catalog").glob(pattern)
        content = path.read_bytes()
        path.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
        with pytest.raises(UserError, match=r"catalog\.json .*checksum differs"):
            open_catalog(tmp_path / "catalog")
        path.write_bytes(content)
    assert open_catalog(tmp_path / "catalog") == catalog
