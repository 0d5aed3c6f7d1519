"""Cells of the study's table in which a reference steers, from rows that are known and from what is committed."""

import csv

import pytest

from experiments.clip.study.grid import REFERENCES
from experiments.clip.study.results import FIELDS
from paper_figures.phase_points import NOISE, cells, point_table, points, selection_table
from paper_figures.study_results import NotMeasured, Results, values


def row(method, seed, score, study="headline", **labels):
    own = {"captions": "clean", "fraction": "1", "model": "glyph-tiny", "reference": "", "setting": "tau=0.1"}
    own |= {"samples_trained": "118175", "study": study, "method": method, "seed": str(seed), "hash": f"{seed}"}
    return own | labels | {"test_top1": str(score)}


def test_trainings_are_grouped_by_what_they_share():
    found = cells(
        [
            row("fastclip-v1", 1, 0.1),
            row("fastclip-v1", 2, 0.2),
            row("fastclip-v1", 1, 0.9, "tuning"),
            row("drrho", 1, 0.9, "edges"),
            row("drrho", 1, 0.3, reference="weak"),
            row("drrho", 1, 0.8, reference="weak", setting="tau=0.2"),  # another setting
            row("jest", 1, 0.4, samples_trained="118400"),
            row("fastclip-v1", 1, 0.5, captions="swapped"),
        ]
    )
    clean = found["clean", "1", "glyph-tiny", "1.2e+05"]
    assert set(clean) == {("fastclip-v1", ""), ("drrho", "weak"), ("jest", "shipped")}
    assert sorted(clean["fastclip-v1", ""]) == [1, 2]
    assert clean["fastclip-v1", ""][1]["test_top1"] == "0.1"
    assert clean["drrho", "weak"][1]["test_top1"] == "0.3"
    assert set(found["swapped", "1", "glyph-tiny", "1.2e+05"]) == {("fastclip-v1", "")}


def write(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, restval="0")
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_points_need_seeds_a_known_reference_and_a_twin_that_learned(tmp_path):
    def three(method, score, **labels):
        return [row(method, seed, score + 0.001 * seed, **labels) for seed in (1, 2, 3)]

    rows = three("fastclip-v1", 0.1) + three("drrho", 0.15, reference="shipped")
    rows += three("drrho", 0.15, reference="unheard of")
    rows += three("fastclip-v1", 0.001, model="glyph-micro")  # it has learned nothing yet
    rows += three("drrho", 0.15, reference="shipped", model="glyph-micro")
    rows += three("fastclip-v1", 0.1, fraction="0.5") + three("drrho", 0.15, reference="shipped", fraction="0.5")[:2]
    rows += three("fastclip-v1", 0.1, captions="vague") + three("drrho", 0.1, reference="shipped", captions="vague")
    (point,) = points(write(tmp_path / "study.csv", rows))
    assert (point.captions, point.fraction, point.model, point.reference) == ("clean", "1", "glyph-tiny", "shipped")
    assert point.mean(point.twin) == pytest.approx(10.2)
    assert point.gain.mean == pytest.approx(5) and point.gain.low == pytest.approx(5)
    assert point.strength == pytest.approx(54.16168856 / 10.2)
    assert "| +5.0 [+5.0, +5.0] |" in point_table([point])
    assert selection_table(tmp_path / "study.csv").count("\n") == 1  # no line without all four methods


def test_nothing_measured_is_said(tmp_path):
    with pytest.raises(NotMeasured, match=r"run\.py study --only headline"):
        points(tmp_path / "none.csv")


def test_committed_points_are_the_tables_numbers():
    found, results = points(), Results()
    assert len(found) >= 20 and {point.captions for point in found} == set(NOISE)
    assert {point.reference for point in found} == {*REFERENCES, "shipped"}
    (point,) = [
        point
        for point in found
        if (point.captions, point.fraction, point.model, point.seen, point.reference)
        == ("swapped", "1", "glyph-tiny", "1.2e+05", "equal")
    ]
    assert point.mean(point.twin) == pytest.approx(values(results.method("fastclip-v1", "swapped")).mean())
    assert point.mean(point.steered) == pytest.approx(values(results.steered("equal", "swapped")).mean())
    assert "| swapped | 40 % |" in selection_table()
