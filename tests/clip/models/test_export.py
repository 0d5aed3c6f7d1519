"""Exported weights load in open_clip: checkpoints, bundles and averages of any wrapper of the model."""

import copy
import json

import open_clip
import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from experiments.clip.errors import UserError
from experiments.clip.models.clip import load_model, new_model
from experiments.clip.models.config import CONFIG_FILE
from experiments.clip.models.export import export_bundle, export_checkpoint, export_model, plain_state
from experiments.clip.models.sources import WEIGHTS_FILE


@pytest.fixture(scope="module")
def clip():
    made = new_model("glyph-small", 3)
    made.model.eval()
    return made


def preprocess_of(clip):
    return open_clip.get_model_preprocess_cfg(clip.model)


def features(model):
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    text = open_clip.get_tokenizer("glyph-small")(["comma", "digit two"])
    with torch.no_grad():
        return torch.cat([model.eval().encode_image(image), model.encode_text(text)])


@pytest.mark.slow
def test_checkpoint_loads_in_open_clip_and_gives_the_same_features(clip, tmp_path):
    path = tmp_path / "epoch_7.pt"
    export_checkpoint(clip.name, clip.model.state_dict(), preprocess_of(clip), path, epoch=7)
    model, _, preprocess = open_clip.create_model_and_transforms(clip.name, pretrained=str(path))
    assert torch.equal(features(model), features(clip.model))
    assert str(preprocess) == str(clip.preprocess)
    assert [file.name for file in tmp_path.iterdir()] == ["epoch_7.pt"]


def test_checkpoint_is_of_tensors_and_plain_types(clip, tmp_path):
    path = tmp_path / "epoch_2.pt"
    export_checkpoint(clip.name, clip.model.state_dict(), preprocess_of(clip), path, epoch=2, dtype=torch.float16)
    stored = torch.load(path, weights_only=True)
    assert (stored["epoch"], stored["name"]) == (2, "glyph-small")
    assert stored["preprocess_cfg"] == preprocess_of(clip)
    assert stored["state_dict"].keys() == clip.model.state_dict().keys()
    assert {value.dtype for value in stored["state_dict"].values()} == {torch.float16}
    # Only the part of a larger storage that a tensor views is written.
    storage = torch.zeros(10**6)
    export_checkpoint(clip.name, {"a": storage[:10]}, {}, tmp_path / "part.pt", epoch=0)
    assert (tmp_path / "part.pt").stat().st_size < 10_000


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViT-S-32-alt", "RN50"])
def test_checkpoint_of_open_clips_own_models(name, tmp_path):
    model = open_clip.create_model(name, force_image_size=None)
    export_checkpoint(name, model.state_dict(), {}, tmp_path / "epoch_1.pt", epoch=1)
    again, _, _ = open_clip.create_model_and_transforms(name, pretrained=str(tmp_path / "epoch_1.pt"))
    for (key, old), new in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert old.dtype == new.dtype and torch.equal(old, new), key


def compiled(model):
    model = copy.deepcopy(model)
    model.visual = torch.compile(model.visual)
    return torch.compile(model)


def averaged(model):
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))


def checkpointed(model):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = copy.deepcopy(model)
    model.transformer.resblocks[0] = checkpoint_wrapper(model.transformer.resblocks[0])
    return model


def in_parallel(model):
    return DistributedDataParallel(compiled(model))


@pytest.fixture
def one_rank(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "wrap",
    [averaged, *(pytest.param(wrap, marks=pytest.mark.slow) for wrap in (compiled, checkpointed, in_parallel))],
)
def test_wrappers_leave_no_trace(wrap, clip, one_rank, tmp_path):
    state = wrap(clip.model).state_dict()
    export_checkpoint(clip.name, state, preprocess_of(clip), tmp_path / "epoch_1.pt", epoch=1)
    export_bundle(clip.name, state, preprocess_of(clip), tmp_path / "bundle")
    for model, _, _ in (
        open_clip.create_model_and_transforms(clip.name, pretrained=str(tmp_path / "epoch_1.pt")),
        open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'bundle'}"),
    ):
        assert torch.equal(features(model), features(clip.model))


@pytest.mark.slow
def test_average_is_exported_like_any_state(clip, tmp_path):
    average = averaged(clip.model)
    moved = new_model("glyph-small", 4)
    average.update_parameters(clip.model)
    average.update_parameters(moved.model)
    export_model(clip, tmp_path / "ema", weights=average.state_dict())
    loaded = load_model(tmp_path / "ema").model.state_dict()
    mean = {key: (value + moved.model.state_dict()[key]) / 2 for key, value in clip.model.state_dict().items()}
    for key, value in mean.items():
        torch.testing.assert_close(loaded[key], value)


@pytest.mark.slow
def test_sigmoid_head_stays_in_the_bundle_and_leaves_the_checkpoint(tmp_path):
    clip = new_model("glyph-small", 0, sigmoid=True)
    clip.model.eval()
    export_model(clip, tmp_path / "bundle")
    export_checkpoint(clip.name, clip.model.state_dict(), preprocess_of(clip), tmp_path / "epoch_1.pt", epoch=1)
    bundle, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'bundle'}")
    plain, _, _ = open_clip.create_model_and_transforms(clip.name, pretrained=str(tmp_path / "epoch_1.pt"))
    assert torch.equal(bundle.logit_bias, clip.model.logit_bias) and plain.logit_bias is None
    assert torch.equal(features(bundle), features(clip.model)) and torch.equal(features(plain), features(clip.model))


def test_bundle_keeps_a_preprocessing_of_its_own(clip, tmp_path):
    own = preprocess_of(clip) | {"mean": (0.5, 0.5, 0.5), "interpolation": "bilinear", "resize_mode": "squash"}
    export_bundle(clip.name, clip.model.state_dict(), own, tmp_path, torch.float16)
    again = preprocess_of(load_model(tmp_path))
    assert {key: tuple(value) if isinstance(value, list) else value for key, value in again.items()} == own
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["model_cfg"] == open_clip.get_model_config(clip.name)
    assert (tmp_path / WEIGHTS_FILE).stat().st_size < 0.6 * sum(4 * p.numel() for p in clip.model.parameters())


def test_a_scale_of_sharded_parameters_becomes_a_number_again(clip):
    state = clip.model.state_dict() | {"logit_scale": torch.tensor([2.5])}
    assert plain_state(state)["logit_scale"].shape == ()


def test_integers_keep_their_type():
    assert plain_state({"count": torch.tensor(3)}, torch.float16)["count"].dtype == torch.int64


def test_two_models_in_one_state_are_refused():
    with pytest.raises(ValueError, match="weights of one model"):
        plain_state({"a": torch.zeros(1), "module.a": torch.zeros(1)})


def test_weights_that_are_not_finite_are_refused(clip, tmp_path):
    state = clip.model.state_dict() | {"logit_scale": torch.tensor(torch.nan)}
    with pytest.raises(UserError, match="logit_scale are not finite"):
        export_bundle(clip.name, state, preprocess_of(clip), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_unknown_model_is_refused(clip, tmp_path):
    with pytest.raises(UserError, match="glyph-huge"):
        export_checkpoint("glyph-huge", clip.model.state_dict(), {}, tmp_path / "epoch_1.pt", epoch=1)
    with pytest.raises(UserError, match="glyph-huge"):
        export_bundle("glyph-huge", clip.model.state_dict(), {}, tmp_path / "bundle")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_export_loads_in_open_clip_and_gives_the_same_features(tmp_path):
    clip = new_model("glyph-small", 3)
    export_model(clip, tmp_path)
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    again, _, _ = open_clip.create_model_and_transforms("glyph-small", pretrained=str(tmp_path / WEIGHTS_FILE))
    image = torch.randn(2, 3, 32, 32)
    expected = clip.model.encode_image(image)
    assert torch.equal(model.encode_image(image), expected)
    assert torch.equal(again.encode_image(image), expected)


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE, "epoch_1.pt"])
def test_a_flipped_bit_in_an_export_is_refused_by_name(name, clip, tmp_path):
    export_model(clip, tmp_path / "model")
    export_checkpoint(clip.name, clip.model.state_dict(), {}, tmp_path / "epoch_1.pt", epoch=1)
    path = tmp_path / name if name.endswith(".pt") else tmp_path / "model" / name
    content = bytearray(path.read_bytes())
    position = content.index(b"0.48") + 3 if name == CONFIG_FILE else len(content) // 2  # a digit, or a weight
    content[position] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"checksum.* differs"):
        load_model("glyph-small", path) if name.endswith(".pt") else load_model(tmp_path / "model")


def test_a_file_that_an_export_lost_or_got_is_named(clip, tmp_path):
    export_model(clip, tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"manifest.json is of .*, the folder has .*tokenizer.json"):
        load_model(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    load_model(tmp_path)
    (tmp_path / "manifest.json").unlink()  # as in a folder from elsewhere
    load_model(tmp_path)
