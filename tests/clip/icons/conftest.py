"""A tiny package of icons, prepared once for all tests of the room."""

import pytest
from icon_archive import small_archive

from experiments.clip.cli.options import Data


@pytest.fixture(scope="package")
def archive(tmp_path_factory):
    return small_archive(tmp_path_factory.mktemp("icons") / "icons.tgz")


@pytest.fixture(scope="package")
def icon_data(archive, tmp_path_factory):
    """Return the options by which the icons are found that were prepared at 16 pixels."""
    pytest.importorskip("resvg_py", reason="icons are drawn by resvg_py, of the extra icons")
    from experiments.clip.icons.source import prepare

    data = Data(kind="icons", cache=tmp_path_factory.mktemp("cache"), pixels=16)
    prepare(data, archive)
    return data


@pytest.fixture(scope="package")
def manifest(icon_data):
    from experiments.clip.icons.source import prepare

    return prepare(icon_data)
