"""Files of numbers: what is read is compared with its checksums, and nothing else is touched."""

import os

import numpy as np
import pytest

from drrho.integrations.pages import PAGE, Pages, checksums_of, write_file

COUNT = 3 * PAGE // 4 + 5


@pytest.fixture
def path(tmp_path):
    write_file(tmp_path / "numbers", np.arange(COUNT, dtype="<f4"))
    return tmp_path / "numbers"


def damage(path, place):
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)
        file.seek(place)
        file.write(bytes([byte[0] ^ 1]))


def test_values_are_those_that_were_written(path):
    index = np.array([0, COUNT - 1, 1024, 7])
    assert Pages(path, "<f4", COUNT).take(index).tolist() == index.tolist()
    write_file(path.with_name("empty"), np.empty(0, "<f4"))
    assert Pages(path.with_name("empty"), "<f4", 0).values.tolist() == []


@pytest.mark.parametrize("place", [0, PAGE, 2 * PAGE + 3, 4 * COUNT - 1])
def test_a_page_is_compared_when_it_is_read_and_not_before(path, place):
    damage(path, place)
    pages, page = Pages(path, "<f4", COUNT), place // PAGE
    others = np.array([k for k in (0, 1024, 2048, 3072) if k // 1024 != page])
    assert pages.take(others).tolist() == others.tolist()
    with pytest.raises(ValueError, match=f"numbers is damaged between bytes {page * PAGE} and {(page + 1) * PAGE}"):
        pages.take(np.array([place // 4]))


def test_a_long_range_is_compared_in_all_its_pages(path):
    damage(path, PAGE + 1)
    with pytest.raises(ValueError, match=f"damaged between bytes {PAGE}"):
        Pages(path, "<f4", COUNT).compare(np.array([0]), np.array([3000]))


def test_a_file_of_another_size_is_refused_by_name(path):
    os.truncate(path, 4 * COUNT - 4)
    with pytest.raises(ValueError, match=f"numbers must have {4 * COUNT} bytes, got {4 * COUNT - 4}"):
        Pages(path, "<f4", COUNT)
    checksums_of(path).unlink()
    with pytest.raises(ValueError, match=r"numbers\.crc must have \d+ bytes, got no file"):
        Pages(path, "<f4", COUNT - 1)
