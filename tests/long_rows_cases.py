"""Long rows to solve by the device's kernels, how their answers are compared, and how the kernels are compiled."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from interpreted import DEVICE

from drrho.solvers.algorithms import algorithm_of
from drrho.solvers.problem import Solution

N = 40_000


def losses_like(name, n=N):
    rng = np.random.default_rng(5)
    normal = rng.normal(size=n)
    return {
        "normal": normal,
        "shifted by 1e6": 1e6 + 1e-2 * normal,
        "tiny": 1e-8 * normal,
        "log-normal": np.exp(2 * normal),
        "Cauchy": np.tan(np.pi * (rng.random(n) - 0.5)),
        "tied": np.minimum(np.round(2 * normal), 2.0),
        "two values": (normal > 2).astype(float),
        "sorted": np.sort(normal),
        "outlier first": np.concatenate([[1e4], normal[1:]]),
    }[name]


def solved(z, divergence, radius=None, strength=None):
    """Return the solution of rows ``[rows, n]``, and whether one was refused or declined."""
    z = torch.as_tensor(z, device=DEVICE)
    failed = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    radius, strength = (
        None if number is None else torch.full(z.shape[:-1], number, dtype=torch.float64, device=DEVICE)
        for number in (radius, strength)
    )
    from drrho.solvers.device.long import solve_long_rows

    kernel, fraction = algorithm_of(divergence).kernel, divergence.tail_fraction or 0.0
    assert kernel is not None
    with np.errstate(all="ignore"):  # the interpreter warns of what a GPU does not
        weights, fields = solve_long_rows(z, radius, strength, None, None, failed, kernel, fraction)
    value, *others = fields.cpu().unbind()
    return Solution(value, weights.cpu(), *others), bool(failed.item())


def agree(found, expected, dtype):
    """Compare with a risk in float64 of the same, perhaps narrower, losses."""
    close = 1e-10 if dtype == torch.float64 else 3e-7
    spread = (expected.weights.max() * expected.weights.numel()).item()
    value = expected.value.item()
    torch.testing.assert_close(found.premium.double(), expected.premium, rtol=close, atol=0)
    torch.testing.assert_close(found.value.double(), expected.value, rtol=0, atol=close * abs(value) + close * spread)
    torch.testing.assert_close(found.strength.double(), expected.strength, rtol=close, atol=0)
    torch.testing.assert_close(
        found.weights.double(), expected.weights, rtol=0, atol=close * expected.weights.max().item()
    )
    assert abs(found.gap.item()) <= 1e-7 * expected.premium.item()
    assert found.weights.double().sum().item() == pytest.approx(1, abs=0.1 * close + 4e-8 * (dtype == torch.float32))


HARD = ["tied", "shifted by 1e6", "log-normal", "tiny", "Cauchy", "two values", "sorted", "outlier first"]
of_any_shape = pytest.mark.parametrize(
    "name", ["normal", *(pytest.param(name, marks=pytest.mark.slow) for name in HARD)]
)


# The kernels as a GPU's compiler sees them, which allows less than the interpreter.
COMPILE = """
import os, re, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from drrho.solvers.device import long_passes, long_rows, long_tail

PTXAS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "ptxas")
TYPES = dict.fromkeys(("n", "parts", "turn", "passes"), "i32") | {"work": "*fp64", "order": "fp64", "alpha": "*fp64"}
TYPES |= dict.fromkeys(("counts", "failed"), "*i32")
FORMS = {"ball": ["radius_at"], "penalty": ["strength_at"], "hybrid": ["radius_at", "strength_at"]}


def check(function, held, given=(), **constants):
    for losses in ("*fp32", "*fp64"):
        single, width = losses == "*fp32", 1024 if losses == "*fp32" else 512
        types = TYPES | dict.fromkeys(("z", "weights", "fields"), losses) | dict.fromkeys(given, "*fp64")
        known = {"ROWS": held * 256 // width, "LANES": width, "ALIGNED": True, "PARTS": 256, "SAMPLE": 4096}
        known |= {"SINGLE": single, "BITS": 32 if single else 64} | constants
        names = function.arg_names
        signature = {name: types.get(name, "constexpr") for name in names}
        fixed = {name: known.get(name) for name, kind in signature.items() if kind == "constexpr"}
        aligned = {(j,): [["tt.divisibility", 16]] for j, name in enumerate(names) if signature[name][0] == "*"}
        options = {"num_warps": 8, "maxnreg": 128 if held else None}
        source = ASTSource(function, signature, fixed, aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "kernel.ptx")
            with open(path, "w") as file:
                file.write(compiled.asm["ptx"])
            command = [PTXAS, "-v", "-arch=sm_90a", path, "-o", path + ".cubin"]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        spilled = re.findall(r"(\\d+) bytes spill stores", said)
        assert spilled == ["0"], (function, losses, constants, said)


family = int(sys.argv[1])
if family == 2:
    check(long_rows.look, 8)
    check(long_tail.start_tail, 0)
    check(long_tail.tally, 8)
    check(long_tail.weigh_tail, 8)
    check(long_tail.finish_tail, 8)
else:
    for given in FORMS.values():
        check(long_passes.start, 0, given, FAMILY=family)
        check(long_passes.finish, 8, given, FAMILY=family)
    check(long_passes.step, 8, FAMILY=family)
    check(long_passes.weigh, 4 if family else 8, FAMILY=family)
"""


def compile_family(family):
    """Compile the kernels of chi-square (0), of KL (1), or of tails (2) for a GPU; none may spill registers."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    subprocess.run([sys.executable, "-c", COMPILE, str(family)], check=True, env=environment)
