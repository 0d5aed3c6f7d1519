"""A model's configuration in a file: what it may hold, and that it comes back as it was written."""

import json

import pytest

from experiments.clip.errors import UserError
from experiments.clip.models.config import (
    CONFIG_FILE,
    Config,
    checked_preprocess,
    read_config,
    read_json,
    registered_config,
    write_config,
)


def test_a_configuration_comes_back_as_it_was_written(tmp_path):
    config = Config(registered_config("ViT-B-32").model, {"mean": [0.5, 0.5, 0.5], "interpolation": "bilinear"})
    write_config(tmp_path, config)
    assert read_config(tmp_path / CONFIG_FILE) == config


def test_an_architecture_alone_is_a_configuration_too(tmp_path):
    model = registered_config("RN50").model
    (tmp_path / "rn50.json").write_text(json.dumps(model))
    assert read_config(tmp_path / "rn50.json") == Config(model, {})


@pytest.mark.parametrize(
    "content, message",
    [
        ("[]", "it holds no options"),
        ("{", "is no JSON"),
        ('{"embed_dim": 8, "unheard_of": 1}', "is no configuration of a model"),
        (" " * 2**23, "is no JSON"),
    ],
    ids=["a list", "cut", "an unknown key", "blanks"],
)
def test_what_is_no_configuration_is_refused_by_name(content, message, tmp_path):
    path = tmp_path / "model.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as error:
        read_config(path)
    assert str(path) in str(error.value)


def test_a_file_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*No such file"):
        read_json(tmp_path / "none.json")


def test_a_preprocessing_is_checked():
    assert checked_preprocess({"mean": (0.1, 0.2, 0.3), "std": None}) == {"mean": (0.1, 0.2, 0.3)}
    with pytest.raises(UserError, match="the preprocessing of images is not possible"):
        checked_preprocess({"mean": (0.1, float("nan"), 0.3)})
