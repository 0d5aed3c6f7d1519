"""Kernels of rows are compiled for a GPU, whether or not there is one: the interpreter allows more."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

KERNELS = (0, 1, 2, 3, 5, 6, 7, 8, 9, 10)
#: Prints what went wrong with each kernel that does not compile.
COMPILE = """
import json
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from drrho.solvers.device import rows

function = rows._solve_rows


def compiled(kernel, losses, based, form):
    answer = "*fp64" if losses == "fp64" else "*fp32"
    types = {"z": "*" + losses, "weights": answer, "fields": answer, "failed": "*i32", "count": "i32", "n": "i32"}
    types |= {"base_stride": "i32", "order": "fp64"}
    types |= {"base": "*fp64"} if based else {}
    types |= {"radius": "*fp64"} if form != "penalty" and kernel != 2 else {}
    types |= {"strength": "*fp64"} if form != "ball" else {}
    aligned = {(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in types if types[name][0] == "*"}
    together, tile, warps = rows._shape(4096, 1000)
    constants = {"KIND": kernel, "ROWS": together, "TILE": tile}
    signature = {name: types.get(name, "constexpr") for name in function.arg_names}
    constants = {name: constants.get(name) for name, kind in signature.items() if kind == "constexpr"}
    source = ASTSource(function, signature, constants, aligned)
    options = {"num_warps": warps} | ({"maxnreg": rows._REGISTERS} if losses != "fp64" and kernel < 9 else {})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["cubin"]


failures = {}
for kernel in map(int, sys.argv[1:]):
    for given in ("fp32", False, "ball"), ("fp64", True, "hybrid"), ("bf16", False, "penalty"):
        try:
            assert compiled(kernel, *given)
        except Exception as error:
            failures[kernel] = f"{given}: {error!r}"
print(json.dumps(failures))
"""


@pytest.fixture(scope="module")
def failures():
    """In a process of its own, which does not interpret; one for all kernels, because its imports take seconds."""
    command, environment = [sys.executable, "-c", COMPILE, *map(str, KERNELS)], os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_compile_for_a_gpu(kernel, failures):
    assert failures.get(str(kernel)) is None
