"""Words of an augmentation; cli/test_building.py has those that are refused."""

import pytest

from experiments.clip.errors import UserError
from experiments.clip.models.options import ModelInputs, augmentation, geometry

WORDS = ("scale=(0.4,1.0)", "color_jitter=[0.3,0.3,0.3,0.1]", "color_jitter_prob=0.8")


def test_words_are_open_clips_augmentation():
    expected = {"scale": (0.4, 1.0), "color_jitter": (0.3, 0.3, 0.3, 0.1), "color_jitter_prob": 0.8}
    assert augmentation(WORDS) == expected
    assert geometry(WORDS) == {"scale": (0.4, 1.0)}
    assert augmentation(()) == geometry(()) == {}


@pytest.mark.parametrize(
    "word", ["scale", "unheard_of=1", "scale=(1.0,0.4)", "scale=__import__('os')", "scale=" + "(" * 9999]
)
def test_what_is_no_value_is_refused_and_never_run(word):
    with pytest.raises(UserError, match="--aug-cfg"):
        ModelInputs(aug_cfg=(word,)).check_together()
