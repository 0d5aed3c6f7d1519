"""What `import drrho` loads, and what it must leave alone, seen in a process of its own."""

import json
import subprocess
import sys

import pytest

PROBE = """
import json, logging, os, random, signal, sys, warnings
import numpy as np
import torch

def state():
    mask = os.umask(0)
    os.umask(mask)
    return {
        "umask": mask,
        "working directory": os.getcwd(),
        "environment": dict(os.environ),
        "logging": (logging.root.manager.disable, logging.root.level, list(logging.root.handlers)),
        "warnings": list(warnings.filters),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "dtype": torch.get_default_dtype(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "gradients": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul": torch.get_float32_matmul_precision(),
        "torch random": torch.get_rng_state().tolist(),
        "numpy random": repr(np.random.get_state()),
        "python random": random.getstate(),
        "numpy errors": np.geterr(),
        "print options": np.get_printoptions(),
        "path": list(sys.path),
    }

before, modules = state(), set(sys.modules)
import drrho
after = state()
print(json.dumps({
    "modules": sorted(set(sys.modules) - modules),
    "changed": [name for name in before if before[name] != after[name]],
}))
"""


@pytest.fixture(scope="module")
def seen():
    """Modules that are loaded by drrho and not by torch, and what of the process has changed."""
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(
    "package", ["cvxpy", "matplotlib", "open_clip", "pandas", "PIL", "scipy", "sklearn", "torchvision"]
)
def test_heavy_packages_are_loaded_when_they_are_used(package, seen):
    assert package not in {name.partition(".")[0] for name in seen["modules"]}


def test_only_core_modules_are_loaded(seen):
    assert "drrho.risk" in seen["modules"]
    for name in ("bounds", "conic", "contrastive", "convex", "linear", "minimize", "stochastic", "variance"):
        assert f"drrho.{name}" not in seen["modules"]


def test_import_has_no_side_effects(seen):
    assert seen["changed"] == []
