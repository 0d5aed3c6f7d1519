"""What a scan finds in tar files and tables: webdataset's samples, and what it leaves out, counted by reason."""

import csv
import dataclasses
import json
import re
import tarfile

import numpy as np
import pytest
from tars import everything, expected, image_bytes, keys, pair, write_shards, write_tar
from webdataset.tariterators import group_by_keys, tar_file_expander

from experiments.clip.catalog import scan as scan_module
from experiments.clip.catalog import sources as sources_module
from experiments.clip.catalog.catalog import make_catalog, open_catalog
from experiments.clip.catalog.scan import ScanJob, json_field, scan
from experiments.clip.catalog.sources import Table, TarPattern
from experiments.clip.catalog.subset import open_subset
from experiments.clip.data.reader import Reader, decode
from experiments.clip.errors import UserError


@pytest.fixture
def shards(tmp_path):
    return write_shards(tmp_path / "data", [5, 1, 8])


def test_a_job_is_named_by_everything_that_its_result_depends_on(tmp_path):
    job = ScanJob(TarPattern("*.tar"), "/x/0.tar", (10, 1), tmp_path, ("png",), ("txt",))
    table = ScanJob(Table("t.csv"), "/x/t.csv", (10, 1), tmp_path, ("png",), ("txt",))
    others = [
        ScanJob(TarPattern("*.tar"), "/x/1.tar", (10, 1), tmp_path, ("png",), ("txt",)),
        ScanJob(TarPattern("*.tar"), "/x/0.tar", (10, 2), tmp_path, ("png",), ("txt",)),
        ScanJob(TarPattern("*.tar"), "/x/0.tar", (10, 1), tmp_path, ("jpg",), ("txt",)),
        ScanJob(TarPattern("*.tar"), "/x/0.tar", (10, 1), tmp_path, ("png",), ("json:txt",)),
        ScanJob(Table("t.csv", image="path"), "/x/t.csv", (10, 1), tmp_path, ("png",), ("txt",)),
    ]
    assert len({each.name for each in (job, table, *others)}) == 7
    # Names of jobs are kept in journals, which later versions read.
    assert (job.name, table.name) == ("3a9b6964d864ec8d7b02349d", "383e7563b87adc6e996f7449")


def test_a_scan_writes_offsets_and_reads_no_contents(shards, tmp_path):
    size = shards[0].stat().st_size
    job = ScanJob(TarPattern("*.tar"), str(shards[0]), (size, 0), tmp_path, ("png",), ("txt",))
    [shard] = scan(job)
    assert (shard.kind, shard.path, shard.bytes, shard.samples) == ("tar", str(shards[0]), size, 5)
    assert (tmp_path / shard.index).stat().st_size == shard.index_bytes


def test_a_caption_key_names_a_member_or_a_field():
    assert (json_field("txt"), json_field("json:a.b"), json_field("json:")) == (None, "a.b", "")


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


def test_damaged_shards_keep_their_complete_samples(shards, tmp_path):
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


@pytest.mark.parametrize("method", ["gz", "bz2", "xz"])
def test_compressed_shards_are_refused(tmp_path, method):
    with tarfile.open(tmp_path / "x.tar", f"w:{method}") as tar:
        tar.addfile(tarfile.TarInfo("a.txt"))
    with pytest.raises(UserError, match=r"x.tar is compressed \("):
        make_catalog(tmp_path / "x.tar", tmp_path / "catalog")


def test_image_keys_choose_the_image(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("a.png", image_bytes(1)), ("a.txt", b"x"), ("a.thumb.png", image_bytes(2))])
    assert everything(make_catalog(path, tmp_path / "c")) == [(1, "x")]
    assert everything(make_catalog(path, tmp_path / "c", image_keys=["thumb.png", "png"])) == [(2, "x")]


@pytest.mark.parametrize(("name", "separator"), [("pairs.csv", ","), ("pairs.tsv", "\t"), ("pairs.csv", "\t")])
def test_tables(tmp_path, monkeypatch, name, separator):
    monkeypatch.setattr(scan_module, "CHUNK", 3)
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


def test_damaged_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(sources_module, "_LONGEST_FIELD", 150_000)
    (tmp_path / "t.csv").write_bytes(b"filepath,title\na.png,one\nb.png,\xff\nc.png," + b"x" * 200_000 + b"\n")
    with pytest.raises(UserError, match=r"t.csv breaks off at line \d+ \(field larger than field limit"):
        make_catalog(str(tmp_path / "t.csv"), tmp_path / "catalog")
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"reading .*t.parquet needs pyarrow|cannot read the table"):
        make_catalog(str(tmp_path / "t.parquet"), tmp_path / "catalog")


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_row_with_more_fields_than_the_header_is_refused(separator, tmp_path):
    """A caption that holds the separator without quotes: each would be cut off there."""
    (tmp_path / "a.png").write_bytes(image_bytes(1))
    table = tmp_path / "t.csv"
    lines = [["filepath", "title"], ["a.png", '"a dog"', "", ""], ["a.png", f'"a{separator} b"'], ["a.png", "a", " b"]]
    table.write_text("\n".join(separator.join(line) for line in lines[:3]) + "\n")
    assert [caption for _, caption in everything(make_catalog(table, tmp_path / "one"))] == ["a dog", f"a{separator} b"]
    table.write_text("\n".join(separator.join(line) for line in lines) + "\n")
    with pytest.raises(UserError, match=r"line 4 of the table .*t.csv has 3 fields, its header 2: put quotes around"):
        make_catalog(table, tmp_path / "two")


def test_a_document_is_no_caption(shards, tmp_path):
    with pytest.raises(UserError, match=r"--caption-key json would take whole documents.* json:caption"):
        make_catalog([str(path) for path in shards], tmp_path / "catalog", caption_key=("txt", "json"))
    (tmp_path / "a.png").write_bytes(image_bytes(1))
    (tmp_path / "t.csv").write_text("path,json\na.png,words\n")
    catalog = make_catalog(Table(str(tmp_path / "t.csv"), "path", ("json",)), tmp_path / "catalog", caption_key="json")
    assert [caption for _, caption in everything(catalog)] == ["words"]  # a column may be called so


def test_a_field_of_a_table_may_be_long(tmp_path):
    (tmp_path / "a.png").write_bytes(image_bytes(1))
    (tmp_path / "t.csv").write_text(f"filepath,html,title\na.png,{'x' * 500_000},one\na.png,x,{'y' * 200_000}\n")
    assert [caption[:3] for _, caption in everything(make_catalog(tmp_path / "t.csv", tmp_path / "catalog"))] == [
        "one",
        "yyy",
    ]


@pytest.fixture
def parquet(tmp_path):
    """Return what writes a parquet file of columns, and image files 1.png to 4.png beside it."""
    pyarrow, writer = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for number in range(1, 5):
        (tmp_path / f"{number}.png").write_bytes(image_bytes(number))

    def write(**columns):
        writer.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
        return tmp_path / "t.parquet"

    return write


def test_columns_of_lists_bytes_and_nulls(parquet, tmp_path):
    import pyarrow as pa

    path = parquet(
        filepath=pa.array([f"{number}.png".encode() for number in range(1, 5)], pa.binary()),
        title=pa.array([["one", None, "eins"], [], None, ["four"]], pa.list_(pa.string())),
        alt=pa.array([b"1", None, b"\xff", "ü".encode()], pa.binary()),
        kind=pa.array(["a", "b", "a", None]).dictionary_encode(),
        nothing=pa.nulls(4),
    )
    catalog = make_catalog(Table(str(path), captions=("title", "alt", "kind", "nothing")), tmp_path / "catalog")
    reader = Reader(catalog)
    captions = [{decode(raw, draw).caption for draw in range(12)} for raw in reader.read_many(range(4))]
    assert captions == [{"one", "eins", "1", "a"}, {"b"}, {"a"}, {"four", "ü"}]
    catalog = make_catalog(Table(str(path)), tmp_path / "catalog")
    assert everything(catalog) == [(1, "one"), (4, "four")] and catalog.left_out == {"no caption": 2}


@pytest.mark.parametrize("caption", ["\x1eplain", "[1]", '{"captions": ["x"]}'])
def test_a_caption_that_looks_like_a_stored_list_is_itself(tmp_path, caption):
    (tmp_path / "1.png").write_bytes(image_bytes(1))
    with (tmp_path / "t.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([["filepath", "title"], ["1.png", caption]])
    assert everything(make_catalog(tmp_path / "t.tsv", tmp_path / "catalog")) == [(1, caption)]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"title": [1, 2]}, "the column title of .*t.parquet holds int64, and not captions: text, or lists of text"),
        ({"title": [[["a"]], None]}, r"holds list<.*list<.*>, and not captions"),
        ({"title": [{"a": "b"}, None]}, r"holds struct<a: string>, and not captions"),
        ({"filepath": [["a.png"], None]}, r"column filepath .* holds list<.*>, and not paths of images: name another"),
        ({"filepath": [{"bytes": b"x", "path": "x"}] * 2}, r"holds struct<.*>, and not paths of images: name another"),
        ({"filepath": [image_bytes(1), None]}, "holds images, and not their paths: write images and captions to webd"),
    ],
    ids=["numbers", "lists of lists", "structs", "lists of paths", "structs of images", "images"],
)
def test_columns_that_hold_something_else_are_refused(parquet, tmp_path, column, message):
    path = parquet(**{"filepath": ["1.png", "2.png"], "title": ["a", "b"]} | column)
    with pytest.raises(UserError, match=message):
        make_catalog(path, tmp_path / "catalog")


def test_files_of_macos_split_no_sample(tmp_path):
    members = [
        member
        for number in range(3)
        for name, data in pair(number, f"folder/{number}")
        for member in ((f"folder/._{name.rpartition('/')[2]}", b"\0\5\x16\7"), (name, data))
    ]
    catalog = make_catalog(write_tar(tmp_path / "x.tar", [("._x", b""), *members]), tmp_path / "catalog")
    assert everything(catalog) == expected(range(3))
    assert catalog.left_out == {"macOS metadata": 7}


def test_a_caption_that_is_a_link_does_not_discard_the_others(tmp_path):
    link = tarfile.TarInfo("a.txt")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    members = [("a.png", image_bytes(1)), link, ("a.alt", b"good"), ("b.png", image_bytes(2)), ("b.txt", b"b")]
    path = write_tar(tmp_path / "x.tar", members)
    assert everything(make_catalog(path, tmp_path / "c", caption_key=("txt", "alt"))) == [(1, "good"), (2, "b")]
    catalog = make_catalog(path, tmp_path / "c")
    assert everything(catalog) == [(2, "b")] and catalog.left_out == {"link or device": 1}


UIDS = ["f" * 32, "0" * 31 + "1", "8000000000000000" * 2, "abc", "7"]


def described(number):
    return [*pair(number), (f"{number:05d}.json", json.dumps({"uid": UIDS[number]}).encode())]


@pytest.fixture
def subset(tmp_path):
    """Return the subset of samples 0, 2 and twice 1, as DataComp writes it."""
    rows = np.array([divmod(int(UIDS[number], 16), 2**64) for number in (0, 1, 1, 2)] + [(5, 5)], np.dtype("u8,u8"))
    np.save(tmp_path / "uids.npy", np.sort(rows))
    return open_subset(tmp_path / "uids.npy", "uid")


def test_a_subset_of_shards(subset, tmp_path):
    broken = [*pair(0, "broken"), ("broken.json", b'{"uid": "zz"}'), *pair(0, "without")]
    path = write_tar(tmp_path / "x.tar", [*(m for number in range(5) for m in described(number)), *broken])
    everything_first = make_catalog(path, tmp_path / "catalog")
    catalog = make_catalog(path, tmp_path / "catalog", subset=subset)
    assert len(everything_first) == 7 and everything(catalog) == expected([0, 1, 1, 2])
    assert catalog.left_out == {"not in the subset": 2, "no uid": 2}
    assert open_catalog(tmp_path / "catalog") == catalog and catalog.subset.uids == 5


def test_a_subset_of_a_table(subset, tmp_path):
    for number in range(5):
        (tmp_path / f"{number}.png").write_bytes(image_bytes(number))
    rows = [f"{number}.png,caption {number},{UIDS[number]}" for number in range(5)] + ["0.png,x,none", "0.png,y"]
    (tmp_path / "t.csv").write_text("\n".join(["filepath,title,uid", *rows]))
    catalog = make_catalog(tmp_path / "t.csv", tmp_path / "catalog", subset=subset)
    assert everything(catalog) == expected([0, 1, 1, 2])
    assert catalog.left_out == {"not in the subset": 2, "no uid": 2}
    with pytest.raises(UserError, match=r"must have the columns filepath, title, other"):
        make_catalog(tmp_path / "t.csv", tmp_path / "catalog", subset=dataclasses.replace(subset, key="other"))
    with pytest.raises(UserError, match=r"synthetic:5 has no uids of a subset"):
        make_catalog("synthetic:5", tmp_path / "catalog", subset=subset)


def test_a_pattern_may_name_several_tables(tmp_path):
    for part in range(3):
        (tmp_path / f"{part}.png").write_bytes(image_bytes(part))
        (tmp_path / f"part-{part}.csv").write_text(f"filepath,title\n{part}.png,caption {part}\n")
    for pattern in ("part-*.csv", "part-{0..2}.csv"):
        catalog = make_catalog(str(tmp_path / pattern), tmp_path / "catalog")
        assert everything(catalog) == expected(range(3)) and len(catalog.sources) == 1
    with pytest.raises(UserError, match=r"part-3.csv"):
        make_catalog(str(tmp_path / "part-{0..3}.csv"), tmp_path / "catalog")
    (tmp_path / "odd{1}.csv").write_text("filepath,title\n1.png,caption 1\n")
    assert everything(make_catalog(str(tmp_path / "odd{1}.csv"), tmp_path / "catalog")) == expected([1])
    with pytest.raises(UserError, match=r"the table s3://bucket/t.csv is remote: copy it to this machine"):
        make_catalog("s3://bucket/t.csv", tmp_path / "catalog")


def test_urls_in_the_place_of_paths_are_refused_with_a_hint(tmp_path):
    (tmp_path / "t.csv").write_text("url,text\nhttp://host/1.jpg,one\nhttps://host/2.jpg,two\n")
    with pytest.raises(UserError, match=r"no sample .* \(URL: 2\): download its images, into shards by img2dataset"):
        make_catalog(Table(str(tmp_path / "t.csv"), "url", ("text",)), tmp_path / "catalog")
