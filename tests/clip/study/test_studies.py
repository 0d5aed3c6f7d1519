"""Both data sets' studies have names of their own, and what a tuning tries is found by its key."""

import pytest

from experiments.clip.cli.options import Data
from experiments.clip.icons.pairs import dataset_settings
from experiments.clip.run import main
from experiments.clip.study import grid, icon_grid
from experiments.clip.study.cells import TunedKey
from experiments.clip.study.settings import SETTINGS
from experiments.clip.study.studies import (
    REFERENCE_STUDY_OF,
    REFERENCES,
    STUDIES,
    STUDIES_OF,
    TUNING_STUDIES_OF,
    tried_settings,
)


def test_no_name_is_that_of_two_studies_or_references():
    assert len(STUDIES) == len(grid.STUDIES) + len(icon_grid.STUDIES) + len(icon_grid.GPU_STUDIES)
    references = grid.REFERENCES, icon_grid.REFERENCES, icon_grid.GPU_REFERENCES
    assert len(REFERENCES) == sum(map(len, references))
    for kind, studies in STUDIES_OF.items():
        assert set(TUNING_STUDIES_OF[kind]) <= set(studies)
        assert REFERENCE_STUDY_OF[kind] in studies


def test_settings_are_those_of_the_tuning_study():
    assert tried_settings(TunedKey("tuning", "clean", "drrho")) == SETTINGS["drrho"]
    assert tried_settings(TunedKey("icon-tuning", "natural", "drrho", "icons-strong")) == icon_grid.SETTINGS["drrho"]
    assert tried_settings(TunedKey("gpu-icon-tuning", "natural", "drrho", "gpu-strong")) == icon_grid.SETTINGS["drrho"]
    assert tried_settings(TunedKey("icon-tuning", "natural", "no method")) == ()


def test_pairs_of_icons_are_known_by_what_they_are_made_of():
    one, other = (dataset_settings(Data(kind="icons", pixels=32, swapped=share)) for share in (0.0, 0.2))
    assert one != other and one | {"swapped": 0.2} == other


@pytest.mark.parametrize("kind, name", [("icons", "headline"), ("glyphs", "icon-headline")])
def test_a_study_of_the_other_pairs_is_refused(kind, name, tmp_path, capsys):
    words = ["study", "--data", kind, "--only", name, "--out", str(tmp_path), "--results", str(tmp_path / "s.csv")]
    assert main(words) == 2
    assert f"--only {name} is no study of --data {kind}" in capsys.readouterr().err
