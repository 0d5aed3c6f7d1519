"""Members of tar files, against those that tarfile finds, and damage that is reported with its offset."""

import io
import tarfile

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tars import pair, write_tar

from experiments.clip.io.tar import Damaged, tar_members

NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=300)
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def archive(members, format=tarfile.GNU_FORMAT):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def walked(data):
    """The members, and the message if the end is not reached."""
    members = []
    try:
        for member in tar_members(io.BytesIO(data), len(data)):
            members.append(member)
    except Damaged as damage:
        return members, str(damage)
    return members, ""


@pytest.mark.slow
@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@settings(max_examples=60, deadline=None)
@given(members=st.lists(st.tuples(NAMES, st.binary(max_size=1500)), max_size=5))
@example([("\x80/", b"")])  # a name in an extended header that ends with a slash
def test_members_are_those_of_tarfile(format, members):
    data = archive(members, format)
    found, damage = walked(data)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        expected = [(member.name, member.offset_data, member.size) for member in tar]
    assert [(member.name, member.offset, member.size) for member in found] == expected
    assert [data[member.offset :][: member.size] for member in found] == [content for _, content in members]
    assert not damage


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_kinds_of_members(format, tmp_path):
    special = []
    for name, kind in [
        ("folder", tarfile.DIRTYPE),
        ("symbolic.txt", tarfile.SYMTYPE),
        ("hard.txt", tarfile.LNKTYPE),
        ("pipe.txt", tarfile.FIFOTYPE),
        ("device.txt", tarfile.CHRTYPE),
    ]:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, "00000.txt"
        special.append(info)
    path = write_tar(tmp_path / "x.tar", [*pair(0), *special, *pair(1)], format)
    members, damage = walked(path.read_bytes())
    assert [member.kind for member in members] == ["file"] * 2 + ["folder"] + ["other"] * 4 + ["file"] * 2
    assert not damage


def test_every_truncation_is_reported(tmp_path):
    data = write_tar(tmp_path / "x.tar", [*pair(0), *pair(1)]).read_bytes()
    intact, _ = walked(data)
    end = intact[-1].offset + 512
    for length in [*range(0, end, 37), *range(0, end + 1, 512), *range(511, end, 512), end - 1]:
        members, damage = walked(data[:length])
        # A member counts if its content is complete, whatever became of the padding.
        assert members == [member for member in intact if member.offset + member.size <= length]
        assert damage
    assert walked(data[: end + 512]) == (intact, "")


def test_a_damaged_header_is_not_an_end(tmp_path):
    data = bytearray(write_tar(tmp_path / "x.tar", [*pair(0), *pair(1)]).read_bytes())
    intact, _ = walked(data)
    data[intact[1].offset - 512] ^= 1
    members, damage = walked(data)
    assert members == intact[:1]
    assert damage == f"bad checksum at byte {intact[1].offset - 512}"


def test_data_after_the_end_mark_is_reported():
    data = archive([("a.txt", b"1")])
    assert walked(data + data)[1] == "data after the end mark at byte 1024"
    assert walked(data + bytes(10_000))[1] == ""


def with_size(field):
    """A header whose size field is this, with a valid checksum."""
    header = bytearray(tarfile.TarInfo("a.txt").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = field
    header[148:156] = b" " * 8
    header[148:155] = b"%06o\0" % sum(header)
    return bytes(header)


@pytest.mark.parametrize(
    ("field", "problem"),
    [
        (b"\xff" * 11 + b"\x00", "a size of -256"),  # some versions of tarfile loop for ever
        (b"\x80" + b"\x7f" * 11, "that is cut off"),
        (b"77777777777\0", "a member of 8589934591 bytes that is cut off"),
        (b"notoctal\0\0\0\0", "invalid header"),
    ],
)
def test_impossible_sizes(field, problem):
    data = with_size(field) + bytes(2048)
    members, damage = walked(data)
    assert members == []
    assert problem in damage


@pytest.mark.parametrize(
    "record",
    [b"", b"5 path=a\n", b"99999 path=a\n", b"path=a\n", b"0 a=b\n", b"1" * 4000, b"12 size=-100\n", b"12 size=abc9\n"],
)
def test_damaged_extended_headers(record):
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, len(record)
    data = info.tobuf(tarfile.USTAR_FORMAT) + record.ljust(-(-len(record) // 512) * 512, b"\0")
    data += archive([("a.txt", b"content")])
    members, damage = walked(data)
    assert bool(damage) == (record != b"")
    assert len(members) == (record == b"")


def test_huge_extended_headers_are_not_read():
    for kind in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XGLTYPE):
        info = tarfile.TarInfo("x")
        info.type, info.size = kind, 2**33
        assert "an extended header of 8589934592 bytes" in walked(info.tobuf(tarfile.GNU_FORMAT) + bytes(4096))[1]


def test_sparse_members_are_no_files():
    info = tarfile.TarInfo("a.txt")
    info.type = tarfile.GNUTYPE_SPARSE
    members, damage = walked(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    assert [member.kind for member in members] == ["other"] and not damage
    info = tarfile.TarInfo("a.txt")
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
    members, damage = walked(info.tobuf(tarfile.PAX_FORMAT) + bytes(1024))
    assert [member.kind for member in members] == ["other"] and not damage


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=3000))
def test_any_bytes_end(data):
    walked(data)
