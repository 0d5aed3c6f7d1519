"""The index of a shard: what is written is mapped, also in many threads at once, and nothing else is taken for one."""

import ast
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from experiments.clip.catalog.index import index_bytes, map_index

ROWS = [((512, 9), [(1024, 3), (-1, -1)], b"a"), ((2048, 7), [(4096, 2), (5, 6)], b"key of more letters")]


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1], []], ids=len)
def test_what_numpy_reads_is_mapped(rows, tmp_path):
    path = tmp_path / "rows.npy"
    path.write_bytes(index_bytes(rows, 2))
    found, expected = map_index(path), np.load(path, allow_pickle=False)
    assert found.dtype == expected.dtype
    assert found.tobytes() == expected.tobytes()


def test_threads_do_not_parse_the_header_as_python(tmp_path, monkeypatch):
    """Python 3.11 ends with a ``SystemError`` where two threads parse at once."""
    path = tmp_path / "rows.npy"
    path.write_bytes(index_bytes(ROWS, 2))
    monkeypatch.setattr(ast, "literal_eval", lambda text: pytest.fail("evaluated"))
    with ThreadPoolExecutor(8) as pool:
        assert all(len(rows) == 2 for rows in pool.map(lambda _: map_index(path), range(200)))


def damaged(data, old, new):
    assert old in data
    return data.replace(old, new, 1)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: b"",
        lambda data: data[:100],
        lambda data: data[:-1],
        lambda data: damaged(data, b"NUMPY", b"NUMPI"),
        lambda data: damaged(data, b"'<i8'", b"'>i8'"),
        lambda data: damaged(data, b"'image'", b"'imago'"),
        lambda data: damaged(data, b"(2,), ", b"(9,), "),
        lambda data: damaged(data, b"False", b"True "),
    ],
    ids=["empty", "cut header", "cut rows", "magic", "order of bytes", "name", "samples", "order of rows"],
)
def test_any_other_file_is_refused(change, tmp_path):
    path = tmp_path / "rows.npy"
    path.write_bytes(change(index_bytes(ROWS, 2)))
    with pytest.raises(ValueError, match=r"header|magic|version|fields|mmap|length"):
        map_index(path)
