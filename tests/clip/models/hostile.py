"""Loads model folders and reports what Python was asked to do: files opened, hosts reached, programs run, input read.

``python hostile.py FOLDER...`` prints a line of JSON for each. The audit hook sees the calls of all libraries in this
process. Temporary files count as opened by whoever names them, except within the loader's own temporary folders.
"""

import json
import os
import sys
import tempfile

libraries = tuple({os.path.realpath(path) for path in (*sys.path, sys.prefix, sys.base_prefix) if path})
system = ("/proc", "/sys", "/dev", "/etc/ld", "/usr", "/lib", "/etc/mime")
temporary = os.path.realpath(tempfile.gettempdir())
seen: dict = {}
folder = ""


def hook(event, arguments):
    if not folder:
        return
    if event == "open" and isinstance(arguments[0], str | bytes):
        path = os.path.realpath(os.fsdecode(arguments[0]))
        if not path.startswith((folder, temporary, *libraries, *system)):
            seen["opened"].append(path)
        elif os.path.basename(path).startswith("outside"):
            seen["opened"].append(path)
    elif event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        seen["reached"].append(str(arguments[0] if event != "socket.connect" else arguments[1]))
    elif event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"):
        seen["ran"].append(str(arguments[0]))
    elif event == "builtins.input":
        seen["asked"].append(True)


def load(path):
    """Return what loading a folder says, and what it did beside reading the folder."""
    global folder
    from experiments.clip.errors import UserError
    from experiments.clip.models.clip import load_model

    seen.update(opened=[], reached=[], ran=[], asked=[])
    folder = os.path.realpath(path)
    try:
        said = f"loaded {load_model(path).encode_text(['comma']).shape[1]}"
    except UserError as error:
        said = str(error)
    folder = ""
    return {"said": said, **{key: found for key, found in seen.items() if found}}


if __name__ == "__main__":
    try:
        import transformers  # noqa: F401
    except ImportError:
        pass
    sys.addaudithook(hook)
    for path in sys.argv[1:]:
        print(json.dumps(load(path)))
