"""Importing a module of the program changes nothing that the whole process shares."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

IMPORTS = """
import ast, contextlib, importlib, logging, os, sys, warnings
from pathlib import Path
root = Path(sys.argv[1])
files = sorted(path for path in (root / "experiments" / "clip").rglob("*.py"))
names = [".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__") for path in files]
# Other packages change some of it themselves.
for path in files:
    for node in ast.walk(ast.parse(path.read_text())):
        modules = [each.name for each in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            modules += [node.module, *(f"{node.module}.{each.name}" for each in node.names)]
        for module in modules:
            if module.split(".")[0] != "experiments":
                with contextlib.suppress(ImportError):
                    importlib.import_module(module)
import open_clip
import torch

def shared():
    umask = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Umask")]
    state = torch.random.get_rng_state().tolist()
    models = tuple(open_clip.list_models())
    return umask, logging.root.manager.disable, models, list(warnings.filters), dict(os.environ), os.getcwd(), state

# It cannot be read by Python without being changed, which other threads would notice.
os.umask = lambda mask: sys.exit("the umask is changed on import")
before = shared()
for name in names:
    importlib.import_module(name)
    changed = [(old, new) for old, new in zip(before, shared(), strict=True) if old != new]
    assert not changed, (name, changed)
print(len(names))
"""


@pytest.mark.slow
def test_imports_have_no_side_effects():
    done = subprocess.run([sys.executable, "-c", IMPORTS, str(ROOT)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 30
