"""An archive in the layout of npm's ``@iconify/json``, with a few sets."""

import io
import json
import tarfile

SQUARE = '<path fill="currentColor" d="M2 2h{size}v{size}H2z"/>'


def icon_set(names, *, author="One", spdx="MIT", category="UI 24px", body=SQUARE, hidden=(), categories=None):
    """Return a set's entry in the list of sets, and its file; each icon is a square of another size."""
    about = {"name": author, "total": len(names), "author": {"name": author}, "category": category}
    about["license"] = {"title": spdx, "spdx": spdx, "url": "https://example.org/license"}
    icons = {name: {"body": body.format(size=1 + 0.25 * number)} for number, name in enumerate(names)}
    for name in hidden:
        icons[name]["hidden"] = True
    return about, {"icons": icons, "width": 24, "height": 24, "categories": categories or {}}


def write_archive(path, sets, version="1.2.3"):
    """Write the archive of sets by prefix, each as `icon_set` returns it."""
    files = {"package.json": {"version": version}, "collections.json": {key: about for key, (about, _) in sets.items()}}
    files |= {f"json/{prefix}.json": content for prefix, (_, content) in sets.items()}
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            data = json.dumps(content).encode()
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def small_archive(path):
    """Write one whose sets are of all splits, among them what must be left out for every reason."""
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
    return write_archive(path, sets)
