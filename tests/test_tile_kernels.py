"""The kernels on a single tile against torch's operations, and as compiled for a GPU."""

import json
import math
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),  # its interpreter computes with infinities by NumPy
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FIRST_ROW, FIRST_COLUMN, ANCHORS = 3, 5, 400  # of the tile among all rows and columns


def tile(height, width, include_positive):
    """Similarities in aligned rows, the rates of rows and columns, and the arguments that say where the tile lies."""
    generator = torch.Generator().manual_seed(height)
    pitch = -(-width // 16) * 16
    x = torch.randn(height, pitch, generator=generator).to(DEVICE)[:, :width]
    rates = 8 * torch.rand(2, ANCHORS, generator=generator).to(DEVICE) + 1
    geometry = (grid(height, width)[0], pitch, height, width, FIRST_ROW, FIRST_COLUMN, 17, 1, 1, int(include_positive))
    return x, rates, geometry


def grid(height, width):
    from drrho import tile_kernels

    return -(-width // tile_kernels.BLOCK_COLUMNS), -(-height // tile_kernels.BLOCK_ROWS)


def blocks():
    from drrho import tile_kernels

    return {"ROWS": tile_kernels.BLOCK_ROWS, "COLUMNS": tile_kernels.BLOCK_COLUMNS}


def own_of(x):
    """The tile's entries that are positives, 17 columns to the right of the diagonal."""
    return torch.ones_like(x, dtype=torch.bool).tril(17).triu(17)


@pytest.mark.parametrize("include_positive", [False, True])
@pytest.mark.parametrize("height, width", [(1, 130), (64, 128), (150, 70), (65, 300)])
def test_sums_of_a_tile_are_added_to_the_totals(height, width, include_positive):
    from drrho.tile_kernels import MERGED, PARTS, merge_parts, sum_tile

    x, rates, geometry = tile(height, width, include_positive)
    across, down = grid(height, width)
    parts = x.new_empty(3 * (across * height + down * width))
    positive = x.new_zeros(ANCHORS)
    sum_tile[across * down,](x, parts, positive, *rates, *geometry, **blocks())
    totals = torch.zeros(3, 2 * ANCHORS, dtype=torch.float64, device=DEVICE)
    totals[0].fill_(-torch.inf)
    programs = -(-height // MERGED) - (-width // MERGED)
    place = (FIRST_ROW, ANCHORS + FIRST_COLUMN)
    for _ in range(2):  # all sums twice, as if there were another tile like it
        merge_parts[(programs,)](
            parts, totals, height, width, across, down, *place, 2 * ANCHORS, MERGED=MERGED, PARTS=PARTS
        )
    own = own_of(x)
    here = own.any(1)
    assert torch.equal(positive[FIRST_ROW:][:height][here], x[own])
    assert torch.count_nonzero(positive) == here.sum()
    for dim, first, rate in ((1, FIRST_ROW, rates[0]), (0, FIRST_COLUMN, rates[1])):
        count = x.shape[1 - dim]
        y = x.double() * rate[first : first + count].unsqueeze(dim)
        y = y if include_positive else y.masked_fill(own, -torch.inf)
        top, total, moment = totals[:, (1 - dim) * ANCHORS + first :][:, :count]
        log_sum, e = y.logsumexp(dim), (y - y.amax(dim, keepdim=True)).exp()
        nonempty = log_sum > -torch.inf
        expected = (e * y.masked_fill(y == -torch.inf, 0)).sum(dim) / e.sum(dim)
        close = {"rtol": 2e-6, "atol": 2e-6}
        assert torch.allclose(top + torch.log(total / 2), log_sum, **close)
        assert torch.allclose((top + moment / total)[nonempty], expected[nonempty], **close)


@pytest.mark.parametrize("include_positive", [False, True])
@pytest.mark.parametrize("height, width", [(1, 130), (64, 128), (150, 70), (65, 300)])
def test_weights_of_a_tile(height, width, include_positive):
    from drrho.tile_kernels import weigh_tile

    x, rates, geometry = tile(height, width, include_positive)
    logs, by = torch.rand(2, ANCHORS).to(DEVICE) * 9, torch.rand(2, ANCHORS).to(DEVICE)
    row, column = slice(FIRST_ROW, FIRST_ROW + height), slice(FIRST_COLUMN, FIRST_COLUMN + width)
    row_rate, column_rate = rates[0, row, None].double(), rates[1, column].double()
    by_row, by_column = by[0, row, None] * row_rate, by[1, column] * column_rate
    expected = (
        by_row * (x * row_rate - logs[0, row, None]).exp() + by_column * (x * column_rate - logs[1, column]).exp()
    )
    own = own_of(x)
    kept = expected if include_positive else torch.zeros_like(expected)
    expected = torch.where(own, kept - by_row - by_column, expected)
    programs = math.prod(grid(height, width))
    split = x.new_empty(2, height, geometry[1], dtype=torch.bfloat16)
    weigh_tile[programs,](x, split, *logs, *by, *rates, *geometry, **blocks(), SPLIT=True)
    weigh_tile[programs,](x, x, *logs, *by, *rates, *geometry, **blocks(), SPLIT=False)
    assert ((x - expected).abs() <= 1e-5 * expected.abs() + 1e-5).all()
    split = split[:, :, :width].float()
    assert ((split[0] - x).abs() <= 2**-7 * x.abs()).all()  # the interpreter rounds towards zero
    assert ((split.sum(0) - x).abs() <= 2**-15 * x.abs()).all()


COMPILE = """
import json, os, re, subprocess, tempfile
import triton
import triton.backends.nvidia as nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from drrho import tile_kernels as kernels

blocks = {"ROWS": kernels.BLOCK_ROWS, "COLUMNS": kernels.BLOCK_COLUMNS}
merged = {"MERGED": kernels.MERGED}
VARIANTS = {
    "sum_tile": (blocks, kernels.WARPS, kernels.REGISTERS),
    "weigh_tile": (blocks | {"SPLIT": False}, kernels.WARPS, kernels.REGISTERS),
    "split": (blocks | {"SPLIT": True}, kernels.WARPS, kernels.REGISTERS),
    "merge_parts": (merged | {"PARTS": kernels.PARTS}, 4, None), "finish_totals": (merged, 4, None),
}
TYPES = {"totals_ptr": "*fp64", "log_negatives": "fp32"}
used = {}
for name, (constants, warps, registers) in VARIANTS.items():
    kernel = kernels.weigh_tile if name == "split" else getattr(kernels, name)
    types = {arg: TYPES.get(arg, "*fp32" if arg.endswith("_ptr") else "i32") for arg in kernel.arg_names}
    types |= dict.fromkeys(constants, "constexpr") | ({"weights_ptr": "*bf16"} if name == "split" else {})
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, arg in enumerate(kernel.arg_names)
        if arg == "pitch" or arg.endswith("_ptr") and arg not in kernels.VECTORS
    }
    options = {"num_warps": warps, "maxnreg": registers}
    source = ASTSource(kernel, types, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        dump = os.path.join(os.path.dirname(nvidia.__file__), "bin", "cuobjdump")
        text = subprocess.run([dump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    used[name] = {key: int(number) for key, number in re.findall(r"(REG|STACK|LOCAL):([0-9]+)", text)}
    used[name]["wide"] = len(re.findall(r"ld.global.*v4", compiled.asm["ptx"]))
print(json.dumps(used))
"""


@pytest.mark.slow
def test_kernels_compile_for_a_gpu_without_spills(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    used = json.loads(done.stdout)
    assert all(use["STACK"] == use["LOCAL"] == 0 for use in used.values()), used
    assert used["weigh_tile"]["wide"] == used["split"]["wide"] == 4  # loads of 16 bytes, for a thread's 16 similarities
    assert used["sum_tile"]["wide"] == 8  # the same, in two branches
