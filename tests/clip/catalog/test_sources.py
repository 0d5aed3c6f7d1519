"""Names of data become sources, patterns become files, and tables become rows, or one line says what is wrong."""

import fsspec
import pytest

from experiments.clip.catalog.sources import (
    Synthetic,
    Table,
    TarPattern,
    expand,
    parse_sources,
    parse_weights,
    table_rows,
    with_columns,
)
from experiments.clip.errors import UserError


def test_names_become_sources(tmp_path):
    assert parse_sources("a/{0..3}.tar::b.csv::synthetic:7::synthetic:7:32") == [
        TarPattern("a/{0..3}.tar"),
        Table("b.csv"),
        Synthetic(7),
        Synthetic(7, 32),
    ]
    assert parse_sources(tmp_path / "x.TSV") == [Table(str(tmp_path / "x.TSV"))]
    assert parse_sources("pipe:cat a::b") == [TarPattern("pipe:cat a::b")]
    assert parse_sources(["zip://x.tar::s3://b/y.zip", Table("t.csv")]) == [
        TarPattern("zip://x.tar::s3://b/y.zip"),
        Table("t.csv"),
    ]
    assert parse_sources(["a.tar::b/*.tar", "simplecache::s3://b/x.tar::c.csv"]) == [
        TarPattern("a.tar"),
        TarPattern("b/*.tar"),
        TarPattern("simplecache::s3://b/x.tar"),
        Table("c.csv"),
    ]
    assert parse_sources("s3://a/1.tar::zip://*.tar::simplecache::s3://a/2.zip::http://b/3.tar") == [
        TarPattern("s3://a/1.tar"),
        TarPattern("zip://*.tar::simplecache::s3://a/2.zip"),
        TarPattern("http://b/3.tar"),
    ]
    (tmp_path / "odd::name.tar").write_bytes(b"")
    assert parse_sources(f"{tmp_path}/odd::name.tar") == [TarPattern(f"{tmp_path}/odd::name.tar")]
    with pytest.raises(UserError, match="no data is named"):
        parse_sources([])


def test_columns_are_named_for_all_tables():
    sources = parse_sources("a.tar::b.csv::c.tsv")
    assert with_columns(sources, ["path"], ["en", "de"], "tab") == [
        TarPattern("a.tar"),
        Table("b.csv", "path", ("en", "de"), "\t"),
        Table("c.tsv", "path", ("en", "de"), "\t"),
    ]
    assert with_columns(sources, (), (), "") == sources
    assert with_columns(sources, (), (), "\\t")[1] == Table("b.csv", separator="\t")


@pytest.mark.parametrize(
    ("sources", "columns", "message"),
    [
        ("a.tar", ((), (), ";"), "--separator ';' is for tables, and no source ends in .csv, .tsv, .parquet"),
        ("a.csv", ((), (), "::"), "--separator must be one character or tab, got '::'"),
        ("a.csv", ((), (), "\n"), r"--separator must be one character or tab, got '\\n'"),
        ("a.csv", (("a", "b"), (), ""), "--image-key a b: a table has its paths in one column, name that"),
    ],
)
def test_columns_that_no_table_has_are_refused(sources, columns, message):
    with pytest.raises(UserError, match=message):
        with_columns(parse_sources(sources), *columns)


def test_a_folder_is_its_shards(tmp_path):
    for name in ("1.tar", "0.tar", "._0.tar", ".hidden.tar", "0.parquet", "0_stats.json"):
        (tmp_path / name).write_bytes(b"")
    assert expand(str(tmp_path)) == expand(f"{tmp_path}/") == [f"{tmp_path}/0.tar", f"{tmp_path}/1.tar"]
    with fsspec.open("memory://folder-of-shards/1.tar", "wb") as file:
        file.write(b"")
    assert expand("memory://folder-of-shards/") == ["memory:///folder-of-shards/1.tar"]


@pytest.mark.parametrize(
    ("names", "hint"),
    [
        (["a.csv", "b.parquet", "x.jpg"], "name a table, like FOLDER/a.csv"),
        (["0.tar.gz", "1.tar.gz"], "decompress its files: samples are read by their offsets"),
        (
            ["part-0/0.tar", "part-1/0.tar"],
            r"name folders in it, like FOLDER/part-0, or all shards, like 'FOLDER/\*/\*.tar'",
        ),
        (["0.jpg", "0.txt"], "put images with their captions beside them into shards, like tar --sort=name -cf 0.tar"),
        (["README"], "shards are tar files of images and captions"),
        ([], "shards are tar files of images and captions"),
    ],
    ids=["tables", "compressed", "folders", "images", "other", "empty"],
)
def test_a_folder_without_shards_is_refused_with_a_hint(tmp_path, names, hint):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=f"has no file that ends in .tar: {hint.replace('FOLDER', str(tmp_path))}"):
        expand(str(tmp_path))


@pytest.mark.parametrize("name", ["synthetic:", "synthetic:0", "synthetic:x", "synthetic:1:2:3", "synthetic:-1"])
def test_made_up_pairs_need_a_number(name):
    with pytest.raises(UserError, match="must be synthetic:SAMPLES or synthetic:SAMPLES:PIXELS"):
        parse_sources(name)


def test_weights_are_those_of_open_clip():
    assert parse_weights("1::2.5", 2) == [1.0, 2.5]
    with pytest.raises(UserError, match="there are 1 weights, '1', for 2 sources"):
        parse_weights("1", 2)
    with pytest.raises(UserError, match="must be numbers joined by ::"):
        parse_weights("1:2", 1)


def test_paths_that_exist_are_themselves(tmp_path):
    path = tmp_path / "odd {1,2} [x] *.tar"
    path.write_bytes(b"")
    assert expand(str(path)) == [str(path)]


def test_patterns_become_files_in_their_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.tar", "a.tar", "0.tar"):
        (tmp_path / name).write_bytes(b"")
    assert expand("{b,a}.tar") == [f"{tmp_path}/b.tar", f"{tmp_path}/a.tar"]
    assert expand("[a-z].tar") == [f"{tmp_path}/a.tar", f"{tmp_path}/b.tar"]
    assert expand("pipe:cat {b,a}.tar") == ["pipe:cat b.tar", "pipe:cat a.tar"]
    with fsspec.open(f"memory://{tmp_path.name}/1.tar", "wb") as file:
        file.write(b"")
    assert expand(f"memory://{tmp_path.name}/*.tar") == [f"memory:///{tmp_path.name}/1.tar"]
    assert expand("http://localhost/{0..1}.tar") == ["http://localhost/0.tar", "http://localhost/1.tar"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("x/{0..4}.tar", r"5 of its 5 files are missing, the first is .*/x/0.tar: correct"),
        ("*.tgz", "no file matches: correct the pattern"),
        ("{0.tar", "braces of .* do not match"),
        ("", "a source has no name"),
    ],
)
def test_patterns_without_files_are_refused(tmp_path, monkeypatch, pattern, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        expand(pattern)


@pytest.mark.parametrize("separator", [",", ";", "|", "\t"])
def test_the_separator_of_a_table_is_that_of_its_header(tmp_path, separator):
    path = tmp_path / "t.csv"
    path.write_text(
        "\n".join(separator.join(row) for row in (["x", "title", "filepath"], ["1", "one", "a.png"], ["2"]))
    )
    assert list(table_rows(Table(str(path)))) == [("a.png", ["one"]), ("", [None])]
    with pytest.raises(UserError, match="must have the columns filepath, other"):
        list(table_rows(Table(str(path), captions=("other",))))
