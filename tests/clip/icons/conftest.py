"""A tiny package of icons, prepared once for all tests of the room."""

import pytest
from icon_archive import SQUARE, icon_set, write_archive

from experiments.clip.cli.options import Data


@pytest.fixture(scope="package")
def archive(tmp_path_factory):
    names = [f"thing-{letter}{other}" for letter in "abcdefgh" for other in "abcdefgh"]
    circle = '<circle cx="9" cy="9" r="{size}"/>'
    sets = {
        "one": icon_set([*names, *(f"{name}-filled" for name in names)]),
        "two": icon_set([*names, "7"], author="Two", body=circle),
        "three": icon_set(names[:40], author="Three", body=circle.replace("9", "12"), spdx="CC-BY-4.0"),
        "four": icon_set(names[:30], author="Four", body=SQUARE.replace("M2", "M9"), categories={"Letters": names[:3]}),
        "same": icon_set(names[30:42], author="Five", body=circle),
        "five": icon_set(names[:8], author="Nine", body=circle.replace("9", "15")),
        "none": icon_set(names[:5], author="Six", body='<path fill="#fff" d="M0 0h9v9z"/>'),
        "hostile": icon_set(names[:3], author="Seven", body='<image href="/etc/passwd"/>'),
        "closed": icon_set(names[:5], author="Eight", spdx="CC-BY-NC-4.0"),
    }
    return write_archive(tmp_path_factory.mktemp("icons") / "icons.tgz", sets)


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
