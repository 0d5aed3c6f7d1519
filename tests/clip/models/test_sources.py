"""Which model and which weights a name means, with the preprocessing that the weights were published with."""

import json
import os
import subprocess
import sys
import threading
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.pretrained import _PRETRAINED
from PIL import Image

from experiments.clip.errors import UserError
from experiments.clip.models.clip import fingerprint_of, load_model, new_model
from experiments.clip.models.config import CONFIG_FILE
from experiments.clip.models.export import export_model
from experiments.clip.models.options import SHIPPED
from experiments.clip.models.published import OPENAI, preprocess_of, preprocess_of_file, tag_config
from experiments.clip.models.sources import WEIGHTS_FILE

NAME = "glyph-micro"
OTHER = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7), "interpolation": "bilinear", "resize_mode": "squash"}


def shown(clip):
    """Return the preprocessing of a model, in JSON's types."""
    config = open_clip.get_model_preprocess_cfg(clip.model)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}


def expected(**changed):
    found = {key: list(value) if isinstance(value, tuple) else value for key, value in (OPENAI | changed).items()}
    return {"size": [32, 32], "mode": "RGB", "fill_color": 0, **found}


@pytest.fixture
def tagged(monkeypatch):
    """Return a function that gives the small model tags, as published weights have."""
    return lambda **tags: monkeypatch.setitem(_PRETRAINED, NAME, tags)


@pytest.fixture
def weights(tmp_path):
    clip = new_model(NAME, 7)
    path = tmp_path / "weights.pt"
    torch.save(clip.model.state_dict(), path)
    return path


def is_seven(clip):
    return all(torch.equal(a, b) for a, b in zip(clip.model.state_dict().values(), seven().values(), strict=True))


def seven():
    return new_model(NAME, 7).model.state_dict()


def test_a_tag_brings_weights_and_their_preprocessing(tagged, weights):
    tagged(some={"file": str(weights), **OTHER}, openai={"file": str(weights), "quick_gelu": True})
    clip = load_model(NAME, "some")
    assert is_seven(clip) and shown(clip) == expected(**OTHER) and not clip.notes
    white = clip.preprocess(Image.new("RGB", (50, 40), (255, 0, 51)))
    assert white[:, 3, 3].tolist() == pytest.approx([0.9 / 0.5, -0.2 / 0.6, -0.1 / 0.7])
    clip = new_model(NAME, 0, weights="openai")
    assert is_seven(clip) and shown(clip) == expected()
    assert clip.notes == (f"QuickGELU mismatch: openai was trained with QuickGELU, {NAME} has GELU",)
    assert clip.fingerprint != load_model(NAME, "some").fingerprint


def test_a_file_that_is_called_like_a_tag_is_the_file(tagged, weights, tmp_path, monkeypatch):
    tagged(openai={"url": "https://nowhere.invalid/x/openai.pt"})
    monkeypatch.chdir(tmp_path)
    weights.rename("openai")
    assert is_seven(load_model(NAME, "openai"))
    (tmp_path / NAME).mkdir()  # a folder that holds no model leaves the name open_clip's
    assert load_model(NAME, "openai").name == NAME
    export_model(new_model("glyph-small", 3), tmp_path / "openai-folder")
    (tmp_path / "openai-folder").rename(NAME)
    assert (
        load_model(NAME).model.visual.conv1.weight.shape == new_model("glyph-small", 3).model.visual.conv1.weight.shape
    )


@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
def test_a_folder_and_its_weights_alone(name, tmp_path):
    clip = new_model(NAME, 7, image=OTHER)
    export_model(clip, tmp_path / "model")
    if name != WEIGHTS_FILE:
        for each in (WEIGHTS_FILE, "manifest.json"):
            (tmp_path / "model" / each).unlink()
        torch.save({"state_dict": clip.model.state_dict()}, tmp_path / "model" / name)
    for loaded in (load_model(tmp_path / "model"), new_model(NAME, 0, weights=tmp_path / "model")):
        assert is_seven(loaded) and shown(loaded) == expected(**OTHER)
    assert load_model(tmp_path / "model").fingerprint == fingerprint_of(tmp_path / "model")
    (tmp_path / "run").mkdir()
    (tmp_path / "model").rename(tmp_path / "run" / "model")
    with pytest.raises(UserError, match=f"has no {CONFIG_FILE}: name {tmp_path / 'run' / 'model'}"):
        load_model(tmp_path / "run")


def test_a_checkpoint_states_its_own_preprocessing(tagged, weights):
    tagged(some=OTHER)
    torch.save({"state_dict": seven(), "preprocess_cfg": {"mean": (0.25, 0.5, 0.75), "size": 32}}, weights)
    assert shown(load_model(NAME, weights)) == expected(mean=(0.25, 0.5, 0.75))
    torch.save({"state_dict": seven(), "preprocess_cfg": {"mean": "/outside"}}, weights)
    with pytest.raises(UserError, match=r"mean must be three numbers, got /outside"):
        load_model(NAME, weights)


def test_a_file_has_the_preprocessing_that_all_weights_of_its_model_share(tagged, weights):
    tagged(one=OTHER, two=OTHER | {"url": "https://nowhere.invalid/x/two.pt"})
    assert shown(load_model(NAME, weights)) == expected(**OTHER)
    tagged(one={}, two=OTHER | {"url": "https://nowhere.invalid/x/two.pt"})
    clip = load_model(NAME, weights)
    assert shown(clip) == expected()
    [note] = clip.notes
    assert "weights.pt gets OpenAI's; name a tag (one, two), or give --image-mean and --image-std" in note
    two = weights.rename(weights.with_name("two.pt"))
    assert shown(load_model(NAME, two)) == expected(**OTHER)
    # A model that is trained from the start has OpenAI's, as open_clip's own program gives it.
    assert shown(new_model(NAME, 0)) == expected()


def test_every_registered_model_has_what_its_weights_were_published_with():
    """Against open_clip's own table: 54 of its models differ from OpenAI's, 3 of them in some of their weights."""
    differ, ambiguous = set(), set()
    for name in open_clip.list_models():
        for tag in open_clip.list_pretrained_tags_by_model(name):
            entry = tag_config(name, tag)
            given = {key: entry[key] or OPENAI[key] for key in OPENAI}
            assert preprocess_of(entry) == given, (name, tag)
            found, note = preprocess_of_file(name, Path("weights.pt"))
            if note:
                ambiguous.add(name)
            else:
                assert found == given
            if given != OPENAI:
                differ.add(name)
    assert ambiguous == {"ViT-L-14", "ViT-H-14", "ViT-H-14-quickgelu"} and len(differ) >= 45


def test_what_a_user_states_goes_before_what_was_published(tagged, weights):
    tagged(some={"file": str(weights), **OTHER})
    clip = load_model(NAME, "some", {"mean": (0.5, 0.5, 0.5), "std": None})
    assert shown(clip) == expected(**OTHER | {"mean": (0.5, 0.5, 0.5)})
    with pytest.raises(UserError, match="std must be positive"):
        load_model(NAME, "some", {"std": (0.0, 0.5, 0.5)})


@pytest.mark.parametrize("name", SHIPPED)
def test_the_models_that_ship_go_by_short_names_and_a_folder_of_that_name_before_them(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()  # other things
    shipped = load_model(name)
    assert shipped.fingerprint == load_model(SHIPPED[name]).fingerprint
    export_model(new_model("glyph-micro", 0), tmp_path / name)
    assert load_model(name).fingerprint not in (shipped.fingerprint, "")


def test_an_architecture_of_ones_own(tmp_path):
    config = open_clip.get_model_config("glyph-small")
    config["text_cfg"]["layers"] = 1
    (tmp_path / "own.json").write_text(json.dumps(config))
    clip = new_model(str(tmp_path / "own.json"), 0)
    assert len(clip.model.transformer.resblocks) == 1
    export_model(clip, tmp_path / "model")
    again = load_model(tmp_path / "model").model.state_dict()
    assert all(torch.equal(again[key], value) for key, value in clip.model.state_dict().items())
    loaded, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'model'}")
    assert torch.equal(loaded.logit_scale, clip.model.logit_scale)
    assert clip.fingerprint and clip.fingerprint != new_model("glyph-small", 0).fingerprint == ""


def test_another_image_size_and_context_length_are_exported_with_the_model(weights, tmp_path):
    clip = new_model(NAME, 0, weights=weights, force_image_size=64, force_context_length=9)
    assert clip.preprocess(Image.new("RGB", (9, 9))).shape == (3, 64, 64) and clip.tokenize(["a"]).shape == (1, 9)
    assert torch.equal(clip.model.token_embedding.weight, seven()["token_embedding.weight"])
    export_model(clip, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    assert loaded.preprocess(Image.new("RGB", (9, 9))).shape == (3, 64, 64) and loaded.tokenize(["a"]).shape == (1, 9)
    clip.model.eval()
    image = torch.randn(2, 3, 64, 64)
    assert torch.equal(loaded.encode_image(image), clip.encode_image(image))
    assert clip.fingerprint != new_model(NAME, 0, weights=weights).fingerprint


@pytest.mark.parametrize(
    "name, weights, message",
    [
        ("VIT-B32", None, r"no model is called 'VIT-B32' \(nearest: ViT-B-32, "),
        ("glyph-smal", None, r"\(nearest: glyph-small"),
        (NAME, None, "names no weights"),
        (NAME, "opnai", r"no tag \(nearest: openai\) of glyph-micro \(tags are openai\)"),
        (NAME, "nothing/like/it", "there is no file of weights 'nothing/like/it'"),
        ("glyph-small", "openai", r"of glyph-small \(it has no tags\)"),
        ("a\0b", None, "cannot be the name of a model"),
        (NAME, "a\0b", "there is no file of weights"),
        ("x" * 5000, None, "no model is called"),
        (NAME, "x" * 5000, "there is no file of weights"),
    ],
    ids=["case", "typing", "alone", "tag", "path", "no tags", "NUL", "NUL in weights", "long", "long weights"],
)
def test_what_does_not_exist_is_one_line_with_what_does(name, weights, message, tagged):
    tagged(openai={})
    with pytest.raises(UserError, match=message) as caught:
        load_model(name, weights)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


class Hub(BaseHTTPRequestHandler):
    """Serves the files of one repository as the Hugging Face hub does."""

    folder: Path
    commit = "0123456789abcdef0123456789abcdef01234567"

    def do_GET(self):
        self.answer(True)

    def do_HEAD(self):
        self.answer(False)

    def answer(self, with_content):
        path = self.path.partition("?")[0]
        names = sorted(each.name for each in self.folder.iterdir())
        if path.startswith("/api/models/owner/name"):
            siblings = [{"rfilename": name} for name in names]
            document = {"id": "owner/name", "modelId": "owner/name", "sha": self.commit, "siblings": siblings}
            if "/tree/" in path:
                document = [
                    {"type": "file", "path": n, "size": (self.folder / n).stat().st_size, "oid": "0" * 40}
                    for n in names
                ]
            return self.send(json.dumps(document).encode(), with_content, "application/json")
        name = path.rpartition("/")[2]
        if path.startswith("/owner/name/resolve/") and name in names:
            return self.send((self.folder / name).read_bytes(), with_content, "application/octet-stream")
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send(self, content, with_content, kind):
        self.send_response(200)
        for key, value in {
            "Content-Type": kind,
            "Content-Length": len(content),
            "ETag": f'"{sha256(content).hexdigest()}"',
            "X-Repo-Commit": self.commit,
        }.items():
            self.send_header(key, str(value))
        self.end_headers()
        if with_content:
            self.wfile.write(content)

    def log_message(self, *arguments):
        pass


FROM_HUB = """
import sys
from open_clip.pretrained import _PRETRAINED
from experiments.clip.errors import UserError
from experiments.clip.models.clip import load_model, new_model
_PRETRAINED["glyph-micro"] = {"openai": {"hf_hub": "owner/name/", "mean": (0.1, 0.2, 0.3)}}
for load in (
    lambda: load_model("hf-hub:owner/name"),
    lambda: new_model("glyph-micro", 0, weights="hf-hub:owner/name"),
    lambda: load_model("glyph-micro", "openai"),
    lambda: load_model("hf-hub:owner/none"),
):
    try:
        clip = load()
        scale = float(clip.model.visual.conv1.weight.detach().sum())
        print(f"{scale:.6f}", clip.model.visual.preprocess_cfg["mean"][0])
    except UserError as error:
        print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_models_and_tags_come_from_the_hub(kind, tmp_path):
    clip = new_model(NAME, 7, image=OTHER)
    export_model(clip, tmp_path / "model")
    if kind == "bin":
        for each in (WEIGHTS_FILE, "manifest.json"):
            (tmp_path / "model" / each).unlink()
        torch.save(clip.model.state_dict(), tmp_path / "model" / "open_clip_pytorch_model.bin")
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Served", (Hub,), {"folder": tmp_path / "model"}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {key: value for key, value in os.environ.items() if "proxy" not in key.lower()}
    environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "hub")}
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, sys.path)), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-W", "ignore", "-c", FROM_HUB]
    options = {"env": environment, "capture_output": True, "text": True, "timeout": 200}
    process = subprocess.run(command, **options)
    server.shutdown()
    said = process.stdout.splitlines()
    total = f"{float(clip.model.visual.conv1.weight.detach().sum()):.6f}"
    assert said[:3] == [f"{total} 0.1"] * 3, (process.stdout, process.stderr)
    assert said[3].startswith("cannot fetch hf-hub:owner/none from the Hugging Face hub (")
    # What was fetched is there when the hub is not.
    server.server_close()
    assert subprocess.run(command, **options).stdout.splitlines()[:3] == said[:3]
