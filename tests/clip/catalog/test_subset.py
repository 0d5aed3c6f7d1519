"""Files of uids: DataComp's format, mapped and searched."""

import numpy as np
import pytest

from experiments.clip.catalog.subset import UID, is_uid, map_uids, open_subset, times_in, uid_in
from experiments.clip.errors import UserError


def uids(*numbers):
    return np.array([divmod(number, 2**64) for number in numbers], UID)


BIG = 2**127 + 2**64 + 5


def test_a_uid_is_found_as_often_as_it_is_there(tmp_path):
    np.save(tmp_path / "uids.npy", uids(0, 7, 7, 2**64, 2**64 + 1, BIG))
    subset = open_subset(tmp_path / "uids.npy", "uid")
    assert (subset.uids, subset.key, len(subset.checksum)) == (6, "uid", 32)
    found = map_uids(tmp_path / "uids.npy")
    wanted = ["0", "7", "07", f"{2**64:032x}", f"{2**64 + 1:X}", f"{BIG:032x}", "6", f"{BIG + 1:x}", "f" * 32]
    assert [times_in(found, uid) for uid in wanted] == [1, 2, 2, 1, 1, 1, 0, 0, 0]


def test_numbers_without_a_header_are_uids_too(tmp_path):
    (tmp_path / "uids").write_bytes(uids(1, BIG).tobytes())
    assert times_in(map_uids(tmp_path / "uids"), f"{BIG:x}") == 1
    assert open_subset(tmp_path / "uids", "uid").uids == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (uids(7, 5), r"are not sorted: sort them by numpy.save\(PATH, numpy.sort"),
        (uids(2**64, 5), "are not sorted"),
        (np.arange(4), r"holds int64 \[4\], not DataComp's uids"),
        (uids(1, 2, 3, 4).reshape(2, 2), r"\[2, 2\], not DataComp's uids"),
        (b"seventeen bytes..", "cannot read the uids"),
        (b"", "cannot read the uids"),
        (b"\x93NUMPY", "cannot read the uids"),
        (None, "cannot read the uids"),
    ],
    ids=["unsorted", "unsorted upper", "numbers", "rows", "text", "empty", "cut off", "absent"],
)
def test_other_files_are_refused(tmp_path, content, message):
    path = tmp_path / "uids.npy"
    if isinstance(content, np.ndarray):
        np.save(path, content)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_subset(path, "uid")


def test_objects_are_not_unpickled(tmp_path):
    np.save(tmp_path / "uids.npy", np.array([object()]), allow_pickle=True)
    with pytest.raises(UserError, match="cannot read the uids"):
        map_uids(tmp_path / "uids.npy")


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b'{"uid": "0aF"}', "0aF"),
        (b'\xef\xbb\xbf{"uid": "1"}', "1"),
        (b'{"uid": 7}', None),
        (b'{"uid": ""}', None),
        (b'{"uid": "0x7"}', None),
        (b'{"uid": "' + b"1" * 33 + b'"}', None),
        ('{"uid": "٣"}'.encode(), None),
        (b'{"key": "7"}', None),
        (b'["uid"]', None),
        (b"\xff", None),
        (b"[" * 10**5, None),
    ],
    ids=range(11),
)
def test_the_uid_of_a_document(data, found):
    assert uid_in(data, "uid") == found and is_uid(found) == (found is not None)
