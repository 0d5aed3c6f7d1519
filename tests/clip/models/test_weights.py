"""Weights in every format that models are published in, and files that are no weights."""

import os
import pickle
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from experiments.clip.errors import UserError
from experiments.clip.models.clip import load_model, new_model
from experiments.clip.models.weights import plain_name, read_weights
from tests.clip.models.archives import write_archive

NAME = "glyph-micro"


@pytest.fixture(scope="module")
def state():
    return new_model(NAME, 7).model.state_dict()


def stored(state, path):
    torch.save(state, path)


def training_checkpoint(state, path):
    torch.save({"epoch": 3, "name": NAME, "state_dict": {f"module.{k}": v for k, v in state.items()}}, path)


def compiled(state, path):
    torch.save({f"_orig_mod.{key}": value for key, value in state.items()}, path)


def compiled_in_parallel(state, path):
    torch.save({f"module._orig_mod.{key}": value for key, value in state.items()}, path)


def compiled_towers(state, path):
    torch.save({key.replace("visual.", "visual._orig_mod."): value for key, value in state.items()}, path)


def averaged(state, path):
    torch.save({"n_averaged": torch.tensor(3)} | {f"module.module.{k}": v for k, v in state.items()}, path)


def sharded_scale(state, path):
    torch.save(state | {"logit_scale": state["logit_scale"].reshape(1)}, path)


def older_format(state, path):
    torch.save(state, path, _use_new_zipfile_serialization=False)


FORMATS = [stored, training_checkpoint, compiled, compiled_in_parallel, compiled_towers, averaged, sharded_scale]
FORMATS += [older_format, save_file]


@pytest.mark.parametrize("write", FORMATS, ids=lambda write: write.__name__)
@pytest.mark.parametrize("called", ["weights.pt", "openai"])
def test_weights_are_read_by_what_the_file_holds(write, called, state, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(dict(state), called)
    loaded = load_model(NAME, called).model.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())


@pytest.mark.parametrize("called", ["ViT-B-32.pt", "openai"])
def test_an_archive_of_openai_is_read_without_its_program(called, tmp_path, monkeypatch):
    model = new_model(NAME, 7).model
    write_archive(model, tmp_path / called)
    monkeypatch.setattr(torch.jit, "load", None)
    clip = load_model(NAME, tmp_path / called)
    for key, value in model.state_dict().items():
        assert torch.equal(clip.model.state_dict()[key], value.float()), key
    [note] = clip.notes
    assert note == f"QuickGELU mismatch: {tmp_path / called} was trained with QuickGELU, {NAME} has GELU"


def rewritten(path, change):
    """Write an archive anew with some members changed."""
    with zipfile.ZipFile(path) as archive:
        members = {each.filename: archive.read(each) for each in archive.infolist()}
    change(members)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


class Evil:
    def __reduce__(self):
        return os.system, ("touch ran",)


def program(members):
    members[next(name for name in members if name.endswith("/data.pkl"))] = pickle.dumps(Evil())


def global_name(members):
    members[next(name for name in members if name.endswith("/data.pkl"))] = b"\x80\x02cos\nsystem\n."


def endless(members):
    """An object that is its own attribute, by the pickle's memory."""
    members[next(name for name in members if name.endswith("/data.pkl"))] = (
        b"\x80\x02c__torch__\nM\nq\x00)\x81q\x01}q\x02X\x01\x00\x00\x00aq\x03h\x01sb."
    )


def short(members):
    for name in members:
        if "/data/" in name:
            members[name] = members[name][:-2]


def missing(members):
    del members[next(name for name in members if "/data/" in name)]


@pytest.mark.parametrize(
    "change, message",
    [
        (program, "it names posix.system, which no model has"),
        (global_name, "it names os.system, which no model has"),
        (endless, "its modules have no end"),
        (short, "does not load as weights of"),
        (missing, "There is no item named"),
    ],
    ids=["program", "name", "endless", "short", "missing"],
)
def test_an_archive_that_is_none_is_refused(change, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_archive(new_model(NAME, 7).model, "archive.pt")
    rewritten("archive.pt", change)
    with pytest.raises(UserError, match=message):
        load_model(NAME, "archive.pt")
    assert not (tmp_path / "ran").exists()


def bomb(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
        archive.writestr("archive/data/0", bytes(10**8))


def numbers(path):
    torch.save([1, 2], path)


def nothing(path):
    torch.save({}, path)


def nested(path):
    torch.save({"state_dict": {"a": {"b": torch.zeros(1)}}}, path)


def two_models(path):
    torch.save({"a": torch.zeros(1), "module.a": torch.zeros(1)}, path)


def other_model(path):
    torch.save({"a": torch.zeros(1)}, path)


def pickled(path):
    path.write_bytes(pickle.dumps(Evil()))


def text(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\n")


def empty(path):
    path.write_bytes(b"")


def header(path):
    content = b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4]}}'
    path.write_bytes(len(content).to_bytes(8, "little") + content + bytes(4))


def vast(path):
    torch.save({"a": torch.zeros(1).expand(10**6, 10**6)}, path)


@pytest.mark.parametrize(
    "write, message",
    [
        (bomb, "is compressed"),
        (numbers, "it holds list, not weights by name"),
        (nothing, "it holds no weights by name"),
        (nested, "it holds dict as 'a', not weights by name"),
        (two_models, "the weights of two models"),
        (other_model, "does not load as weights of glyph-micro"),
        (pickled, "does not load as weights of glyph-micro"),
        (text, "does not load as weights of glyph-micro"),
        (empty, "does not load as weights of glyph-micro"),
        (header, "does not load as weights of glyph-micro"),
        (vast, "does not load as weights of glyph-micro"),
    ],
    ids=lambda value: getattr(value, "__name__", "says"),
)
def test_a_file_that_holds_no_weights_is_one_line(write, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "file")
    with pytest.raises(UserError, match=message) as caught:
        load_model(NAME, tmp_path / "file")
    assert "\n" not in str(caught.value) and not (tmp_path / "ran").exists()


def test_names_that_wrappers_lengthen_are_the_models_own():
    assert plain_name("module.module._orig_mod.visual._fsdp_wrapped_module.proj") == "visual.proj"
    assert plain_name("module") == "module"


def test_only_the_state_of_a_checkpoint_is_weights(state, tmp_path):
    stored = {"state_dict": state, "preprocess_cfg": {"mean": (0.5, 0.5, 0.5)}, "optimizer": {"a": torch.zeros(9)}}
    torch.save(stored, tmp_path / "epoch_1.pt")
    weights = read_weights(tmp_path / "epoch_1.pt")
    assert weights.state.keys() == state.keys() and weights.preprocess == {"mean": (0.5, 0.5, 0.5)}
