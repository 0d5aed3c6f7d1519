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
    with pytest.raises(UserError, match="no data is named"):
        parse_sources([])


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
