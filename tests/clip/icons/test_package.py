"""The archive of icons: what is read from it, and one line for everything that is not it."""

import math
import os

import pytest
from icon_archive import SQUARE, icon_set, write_archive

from experiments.clip.errors import UserError
from experiments.clip.icons.package import fetch, read_package, write_packed
from experiments.clip.icons.rendering import fault


def test_visible_icons_of_sets_with_a_usable_license(tmp_path):
    sets = {
        "one": icon_set(["b", "a", "old"], hidden=["old"], categories={"Home": ["a"], "Other": ["a", "b"]}),
        "two": icon_set(["c"], spdx="CC-BY-NC-4.0"),
        "three": icon_set(["d", "e"], spdx="GPL-3.0"),
    }
    del sets["three"][0]["license"]
    version, found, refused = read_package(write_archive(tmp_path / "icons.tgz", sets))
    assert (version, refused) == ("1.2.3", {"CC-BY-NC-4.0": 1, "none": 2})
    (one,) = found
    assert (one.prefix, one.license, one.author, one.category) == ("one", "MIT", "One", "UI 24px")
    assert [(icon.name, icon.categories) for icon in one.icons] == [("a", ("Home", "Other")), ("b", ("Other",))]
    body = SQUARE.format(size=1.25)
    assert one.icons[0].svg == f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 24 24" color="#000">{body}</svg>'


@pytest.mark.parametrize("width", [0, -1, math.nan, math.inf])
def test_an_icon_without_a_size_is_no_document(width, tmp_path):
    about, content = icon_set(["a", "b"])
    content["icons"]["a"]["width"] = width
    _, (one,), _ = read_package(write_archive(tmp_path / "icons.tgz", {"one": (about, content)}))
    assert [fault(icon.svg) for icon in one.icons] == ["without a size", ""]


@pytest.mark.parametrize("data", [b"", b"no archive", b"\x1f\x8b\x08\x00", b"\xfd7zXZ\x00\x00\x04"], ids=len)
def test_another_file_is_refused_by_name(data, tmp_path):
    (tmp_path / "icons.tgz").write_bytes(data)
    with pytest.raises(UserError, match=r"icons\.tgz is not the archive of @iconify/json"):
        read_package(tmp_path / "icons.tgz")


def test_an_archive_that_lacks_a_set_or_is_cut_short_is_refused(tmp_path):
    sets = {"one": icon_set([str(number) for number in range(999)])}
    path = write_archive(tmp_path / "icons.tgz", sets)
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(UserError, match="is not the archive"):
        read_package(path)
    about, _ = sets["one"]
    write_archive(path, {"one": (about, {"icons": {"a": {}}})})
    with pytest.raises(UserError, match="KeyError"):
        read_package(path)


def test_a_packed_archive_that_is_cut_short_or_damaged_is_refused(tmp_path):
    archive = write_archive(tmp_path / "icons.tgz", {"one": icon_set([str(number) for number in range(99)])})
    path = tmp_path / "icons.tar.xz"
    write_packed(path, archive, lambda prefix, name: prefix == "one" and name != "7")
    _, (one,), _ = read_package(path)
    assert [icon.name for icon in one.icons if "<path" not in icon.svg] == ["7"]
    assert_refused_where_damaged(path, "icons.tar.xz")


def test_a_byte_that_changed_in_the_archive_is_noticed(tmp_path):
    sets = {"one": icon_set([str(number) for number in range(99)])}
    assert_refused_where_damaged(write_archive(tmp_path / "icons.tgz", sets), "icons.tgz")


def assert_refused_where_damaged(path, name):
    whole = path.read_bytes()
    assert read_package(path)
    first = 30 if name.endswith("tgz") else 0  # the header of gzip, a time and a name, is under no checksum
    for place in range(first, len(whole), max(1, len(whole) // 60)):
        for damaged in (whole[:place], whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :]):
            path.write_bytes(damaged)
            with pytest.raises(UserError, match=f"{name} is not the archive of @iconify/json"):
                read_package(path)


def test_where_the_archive_comes_from(tmp_path, monkeypatch):
    archive = write_archive(tmp_path / "icons.tgz", {"one": icon_set(["a"])})
    assert fetch(tmp_path / "cache", archive) == archive
    with pytest.raises(UserError, match=r"--source .*nothing is not a file: give the archive"):
        fetch(tmp_path / "cache", tmp_path / "nothing")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="npm is not installed: run `npm pack @iconify/json@"):
        fetch(tmp_path / "cache")


@pytest.mark.parametrize("status", [0, 1])
def test_npm_that_fetches_nothing_is_quoted(status, tmp_path, monkeypatch):
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text(f"#!/bin/sh\necho no network >&2\nexit {status}\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{npm.parent}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(UserError, match=r"npm could not fetch the icons \(no network\): run `npm pack"):
        fetch(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_npm_fetches_once(tmp_path, monkeypatch):
    archive = write_archive(tmp_path / "icons.tgz", {"one": icon_set(["a"])})
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text(f'#!/bin/sh\ncp {archive} "$5/fetched.tgz"\n')
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{npm.parent}{os.pathsep}{os.environ['PATH']}")
    found = fetch(tmp_path / "cache")
    assert found.read_bytes() == archive.read_bytes()
    npm.unlink()
    assert fetch(tmp_path / "cache") == found
    assert list((tmp_path / "cache").iterdir()) == [found]
