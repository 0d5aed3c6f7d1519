"""From options to models, methods and selectors."""

import json

import open_clip
import pytest
import torch

from experiments.clip.cli.building import SPREAD_SHARE, build_method, build_models, build_selector, check_ranks
from experiments.clip.distributed import ONE_PROCESS, Ranks
from experiments.clip.errors import UserError
from experiments.clip.models.config import registered_config
from experiments.clip.models.export import export_model
from experiments.clip.models.sources import register_models
from experiments.clip.run import main, parse
from experiments.clip.training.methods import METHODS, Distilled
from experiments.clip.training.options import SHIPPED_REFERENCE


class Spread:
    """A reference whose margins have a given spread."""

    def __init__(self, spread):
        self.spread = spread

    def margin_spread(self, pairs):
        return self.spread


def built(*words, spread=0.5, reference=None):
    options = parse(["train", *words])
    features = Spread(spread) if options.needs_reference else None
    return build_method(options.loss, 3, 100, reference, features, ONE_PROCESS)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_built_by_its_name(name):
    words = ["--temperature", "0.1"] if name == "fastclip" else []
    method, chosen = built("--method", name, *words)
    assert type(method) is METHODS[name]
    assert chosen["method"] == name and "reference" not in chosen


def test_an_automatic_temperature_is_a_share_of_the_spread():
    _, chosen = built(spread=0.5)
    assert chosen["temperature"] == pytest.approx(SPREAD_SHARE * 0.5)
    with pytest.raises(UserError, match=r"--temperature auto is 0\.003 here, outside --temperature-bounds 0\.01 1\.0"):
        built("--temperature-scheme", "global", spread=0.01)
    assert built("--temperature-scheme", "global", "--temperature-bounds", "0.001", "1", spread=0.01)[1][
        "temperature"
    ] == pytest.approx(0.003)


def test_distillation_wraps_any_method_at_the_references_temperature(reference):
    method, chosen = built("--method", "openclip", "--distill", "2", reference=reference)
    assert isinstance(method, Distilled)
    assert chosen["distill_temperature"] == pytest.approx(1 / reference.model.logit_scale.exp().item(), abs=1e-6)


def test_a_batch_that_cannot_be_spread_over_ranks_is_refused():
    options = parse(["train", "--batch-size", "3"])
    check_ranks(options, ONE_PROCESS)
    with pytest.raises(UserError, match="--batch-size 3 is less than the 4 ranks: every rank needs a pair"):
        check_ranks(options, Ranks(0, 4))


@pytest.mark.slow
def test_models_are_those_of_the_options(reference):
    options = parse(["train", "--model", "glyph-micro", "--method", "siglip", "--patch-dropout", "0"])
    models = build_models(options)
    assert models.reference is None and models.clip.model.logit_bias is not None
    options = parse(["train", "--model", "glyph-micro", "--seed", "3"])
    models = build_models(options)
    assert models.reference is not None and models.reference.fingerprint == reference.fingerprint
    assert torch.equal(models.clip.model.logit_scale, build_models(options).clip.model.logit_scale)
    with pytest.raises(UserError, match="--split reference has no cached reference features"):
        build_models(parse(["train", "--split", "reference"]))


def test_a_selector_is_there_only_where_pairs_are_left_out(reference):
    assert build_selector(parse(["train"]), reference, ONE_PROCESS) is None
    selector = build_selector(parse(["train", "--select", "rho-top-k", "--candidates", "4"]), reference, ONE_PROCESS)
    assert selector is not None and selector.candidates == 4


def test_what_the_model_takes_follows_the_options(tmp_path, capsys):
    own = build_models(parse(["train", "--method", "openclip", "--model", "glyph-micro"])).clip
    export_model(own, tmp_path / "model")
    words = ["--method", "openclip", "--model", "glyph-micro", "--pretrained", str(tmp_path / "model")]
    words += ["--force-image-size", "64", "--force-context-length", "9", "--image-mean", "0.5", "0.5", "0.5"]
    clip = build_models(parse(["train", *words, "--seed", "7"])).clip
    assert clip.model.visual.image_size == (64, 64) and clip.tokenize(["a"]).shape == (1, 9)
    assert open_clip.get_model_preprocess_cfg(clip.model)["mean"] == (0.5, 0.5, 0.5)
    assert torch.equal(clip.model.token_embedding.weight, own.model.token_embedding.weight)


def test_each_tower_is_locked_but_for_its_own_number_of_groups():
    words = ["train", "--method", "openclip", "--model", "glyph-micro", "--lock", "image", "text"]
    words += ["--unlocked-groups", "1", "--unlocked-text-groups"]

    def learning(groups):
        model = build_models(parse([*words, str(groups)])).clip.model
        return {name for name, each in model.named_parameters() if each.requires_grad}

    assert {"visual.proj"} == {name for name in learning(0) if name.startswith("visual.")}
    text = [len([name for name in learning(groups) if not name.startswith("visual.")]) for groups in range(3)]
    assert text == sorted(set(text))
    with pytest.raises(UserError, match="--unlocked-text-groups 1 has no part in this run: it is for --lock text"):
        parse(["train", "--lock", "image", "--unlocked-text-groups", "1"])


def test_patches_that_an_architecture_drops_may_be_kept(tmp_path):
    register_models()
    config = registered_config("glyph-micro").model
    config["vision_cfg"]["patch_dropout"] = 0.5
    (tmp_path / "own.json").write_text(json.dumps(config))
    words = ["train", "--method", "openclip", "--model", str(tmp_path / "own.json")]
    for more, share in (([], 0.5), (["--patch-dropout", "0"], 0.0), (["--patch-dropout", "0.25"], 0.25)):
        dropout = build_models(parse([*words, *more])).clip.model.visual.patch_dropout
        assert getattr(dropout, "prob", 0.0) == share


def test_a_reference_beside_the_target_sees_its_crops():
    words = ["--catalog", "none", "--model", "glyph-micro", "--reference", str(SHIPPED_REFERENCE)]
    words += ["--aug-cfg", "scale=(0.3,0.4)"]
    words += ["color_jitter=(0.1,0.1,0.1,0.1)", "color_jitter_prob=0.5"]
    clip, reference = build_models(parse(["train", *words]))
    crops = [next(step for step in each.augment.transforms if hasattr(step, "scale")) for each in (clip, reference)]
    assert [crop.scale for crop in crops] == [(0.3, 0.4)] * 2
    assert len(clip.augment.transforms) == len(reference.augment.transforms) + 1


@pytest.mark.parametrize(
    "words, message",
    [
        (["scale=0.4"], "--aug-cfg scale must be an interval"),
        (["sclae=(0.4,1)"], "--aug-cfg takes KEY=VALUE of scale, ratio"),
        (["ratio=(0.7,1.3)"], "--aug-cfg ratio is for timm's augmentation"),
        (["use_timm=True", "gray_scale_prob=0.1"], "leave out use_timm=True"),
        (["color_jitter=0.4", "color_jitter_prob=0.1"], "color_jitter must be four numbers"),
        (["scale=__import__('os')"], "--aug-cfg scale must be an interval"),
        (["scale=" + "(" * 10_000], "--aug-cfg scale must be an interval"),
    ],
)
def test_an_augmentation_that_open_clip_would_not_use_is_refused(words, message):
    with pytest.raises(UserError, match=message):
        parse(["train", "--catalog", "none", "--aug-cfg", *words])


def test_a_model_that_writes_captions_is_no_target(capsys):
    for command in (["train"], ["plan"]):
        assert main([*command, "--method", "openclip", "--model", "coca_ViT-B-32"]) == 2
        assert "coca_ViT-B-32 writes captions (CoCa), which is not trained here" in capsys.readouterr().err
