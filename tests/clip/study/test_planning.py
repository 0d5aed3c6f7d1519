"""What identifies a training, and how long it is expected to take."""

import dataclasses
import shlex
from pathlib import Path

from experiments.clip.cli.options import Train
from experiments.clip.cli.presets import STARTS
from experiments.clip.run import parse
from experiments.clip.study import planning
from experiments.clip.study.grid import REFERENCES, STUDIES, Cell
from experiments.clip.study.planning import (
    cell_hash,
    differ_in_seed_alone,
    expected_seconds,
    planned_trainings,
    reference_label,
)
from experiments.clip.study.results import read_rows
from experiments.clip.training.options import Loss

GLYPHS = STARTS["glyphs"]
RESULTS = Path(planning.__file__).parent / "results" / "study.csv"


def test_a_hash_is_that_of_all_that_the_result_depends_on():
    cell = next(iter(STUDIES["tuning"]({})))
    train = cell.train
    own = cell_hash(cell)
    for same in (
        dataclasses.replace(train, out=Path("elsewhere"), logs=()),
        dataclasses.replace(train, data=dataclasses.replace(train.data, cache=Path("elsewhere"))),
    ):
        assert cell_hash(Cell("another label", same, "setting")) == own
    steered = dataclasses.replace(train, loss=Loss())
    others = [
        *(dataclasses.replace(train, **{name: value}) for name, value in (("seed", 9), ("fraction", 0.5))),
        dataclasses.replace(train, data=dataclasses.replace(train.data, captions="clean")),
        dataclasses.replace(train, optimization=dataclasses.replace(train.optimization, lr=3e-4)),
        steered,
    ]
    hashes = {cell_hash(Cell("", other)) for other in others}
    hashes |= {cell_hash(Cell("", steered, reference=name)) for name in REFERENCES}
    assert len({own, *hashes}) == 1 + len(others) + len(REFERENCES)


def test_trainings_that_differ_in_their_seed_alone():
    cell = Cell("drrho", GLYPHS)
    assert differ_in_seed_alone(cell, Cell("label", dataclasses.replace(GLYPHS, seed=3)))
    assert not differ_in_seed_alone(cell, Cell("drrho", dataclasses.replace(GLYPHS, seed=3, fraction=0.5)))


def test_a_training_of_two_studies_is_planned_once(monkeypatch):
    cells = [Cell("drrho", dataclasses.replace(GLYPHS, seed=seed)) for seed in range(3)]
    monkeypatch.setitem(STUDIES, "first", lambda _: cells[:2])
    monkeypatch.setitem(STUDIES, "second", lambda _: cells)
    planned = planned_trainings(["first", "second"], {})
    assert [(each.study, each.cell.train.seed) for each in planned] == [("first", 0), ("first", 1), ("second", 2)]
    assert str(planned[2]).endswith("(second, swapped, glyph-small, drrho, seed 2)")


def test_a_label_of_the_reference():
    assert reference_label(Cell("drrho", Train(), reference="weak")) == "weak"
    assert reference_label(Cell("drrho", Train())) == "shipped"
    assert reference_label(Cell("drrho", Train(loss=Loss(reference=Path("models/other"))))) == "other"
    assert reference_label(Cell("openclip", Train(loss=Loss(method="openclip")))) == ""


def test_time_is_expected_of_alike_trainings_first():
    def row(model, samples, seconds):
        return {"model": model, "samples_trained": str(samples), "seconds": seconds}

    train = Train(model="glyph-tiny")
    rows = [row("glyph-tiny", 100, "10"), row("glyph-tiny", 100, "30"), row("glyph-tiny", 200, "60")]
    rows += [row("glyph-tiny", 100, ""), row("glyph-small", 100, "999")]
    assert expected_seconds(train, 100, rows) == 20  # the median
    assert expected_seconds(train, 300, rows) == 90  # 0.3 seconds a pair: the median of 0.1, 0.3 and 0.3
    alone = expected_seconds(train, 100, rows[-1:])
    assert 0 < alone and expected_seconds(train, 200, rows[-1:]) == 2 * alone


def test_the_words_of_a_committed_row_are_the_training_of_its_hash():
    """Whatever the defaults of other runs become."""
    rows = read_rows(RESULTS)
    steered_by_others = {row["hash"] for row in rows.values() if row["reference"] not in ("", "shipped")}
    own = [row for key, row in rows.items() if key not in steered_by_others]
    assert len(own) > 1000
    for row in own[::100]:
        options = parse(["train", *shlex.split(row["options"])])
        assert cell_hash(Cell(row["method"], options)) == row["hash"]
