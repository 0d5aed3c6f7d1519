"""Draw what the shipped model of the icons finds for a few descriptions, among icons that it was not trained on.

``python paper_figures/icon_search.py`` writes ``icon_search.png``. It takes the test split of the icons that
``run.py prepare --data icons`` drew into ``--cache``; their features are computed the first time. Without these icons
it ends with 3 and says what draws them.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from experiments.clip.cli.options import Data
from experiments.clip.errors import UserError
from experiments.clip.icons.search import Index, cell_of
from experiments.clip.icons.sheet import draw_sheet
from experiments.clip.models.clip import load_model

HERE = Path(__file__).parent
QUERIES = ("shopping cart", "padlock", "umbrella")
COUNT, COLORS = 8, 128


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the picture; return 3 where there are no icons."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path("cache"), help="folder of the prepared icons")
    parser.add_argument("--pixels", type=int, default=64, help="width of the icons' pictures")
    parser.add_argument("--model", default="icons", help="the model; by default the one that ships")
    parser.add_argument("--queries", nargs="+", default=QUERIES, help="what to look for")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the picture")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        index = Index(
            load_model(given.model), Data(kind="icons", cache=given.cache, pixels=given.pixels), splits=("test",)
        )
        rows = [(f"“{query}”", [cell_of(each) for each in index.find(query, COUNT)]) for query in given.queries]
    except UserError as error:
        print(f"icon_search: not drawn: {error}", file=sys.stderr)
        return 3
    path = given.out / "icon_search.png"
    draw_sheet(rows, COUNT).quantize(COLORS).save(path, "PNG", optimize=True)
    print(f"{path}: {path.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
