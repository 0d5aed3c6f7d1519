"""The command that measures what checksums cost, in short."""

import re

from experiments.benchmarks.checksums import main, rounds_of, rows, state_of, without_checksums
from experiments.clip.training import checkpoint_writer
from experiments.clip.training.checkpoint import Checkpoint


def test_it_times_both_and_leaves_the_checksums_on(tmp_path):
    found = rounds_of(tmp_path, state_of(400_000), 2)
    assert {len(values) for values in found.values()} == {2} and min(map(min, found.values())) >= 0
    with without_checksums():
        assert checkpoint_writer.checksum(tmp_path) == "0" * 64
    [last] = tmp_path.glob("step-*")
    assert len(Checkpoint(last).full_tensors("")) == 64
    assert re.search(r"[1-9a-f]", (last / "manifest.json").read_text().partition(":")[2])


def test_figures_are_of_medians_and_of_the_quickest():
    found = {name: [1.0, 9.0, 2.0] for name in ("without", "alone", "processor", "loaded")}
    found |= {"with": [1.02, 9.0, 2.02], "verified": [0.4, 0.4, 3.0]}
    by_name = {row.measured: row for row in rows(found, 1.0)}
    added = by_name["what checksums add to the quickest"]
    assert (round(added.median, 6), added.met) == (2.0, "yes")
    assert (by_name["1 GB verified before it is read"].median, by_name["1 GB verified before it is read"].met) == (
        0.4,
        "yes",
    )


def test_the_command_writes_a_table(tmp_path, capsys):
    main(["--rounds", "2", "--gigabytes", "0.0005", "--folder", str(tmp_path), "--output", str(tmp_path / "t.md")])
    assert (tmp_path / "t.md").read_text().strip() == capsys.readouterr().out.strip()
    assert list(tmp_path.iterdir()) == [tmp_path / "t.md"]
