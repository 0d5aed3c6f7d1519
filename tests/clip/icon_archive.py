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
