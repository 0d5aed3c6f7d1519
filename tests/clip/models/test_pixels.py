"""Images in bytes, normalized where the model is: the bits of the model's own preprocessing."""

import pickle
import random

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torchvision import transforms

from experiments.clip.models.clip import new_model
from experiments.clip.models.pixels import Normalization, cut

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
OPENAI = Normalization(*(tuple(torch.tensor(part).tolist()) for part in (MEAN, STD)))  # in float32


def image(width=50, height=40, mode="RGB"):
    values = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def seeded(transform, *arguments):
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002 (timm draws from the global generator)
    return transform(*arguments)


TRANSFORMS = {
    "shortest": {"is_train": False},
    "longest": {"is_train": False, "resize_mode": "longest"},
    "squash": {"is_train": False, "resize_mode": "squash", "interpolation": "bilinear"},
    "not square": {"image_size": (24, 32), "is_train": False},
    "crops": {"is_train": True},
    "colors": {
        "is_train": True,
        "aug_cfg": {"color_jitter": (0.4, 0.4, 0.4, 0.1), "color_jitter_prob": 0.9, "gray_scale_prob": 0.5},
    },
    "timm": {"is_train": True, "aug_cfg": {"use_timm": True, "scale": (0.5, 1.0), "color_jitter": 0.4}},
}


@pytest.mark.filterwarnings("ignore:Unused augmentation cfg items")  # open_clip's, of items that it has used
@pytest.mark.parametrize("name", TRANSFORMS)
def test_bytes_normalized_later_have_the_bits_of_the_whole_transform(name):
    whole = open_clip.image_transform(**{"image_size": 32, "mean": MEAN, "std": STD, **TRANSFORMS[name]})
    shorter, normalization = cut(whole)
    assert normalization == OPENAI
    for given in (image(), image(37, 61), image(32, 32)):
        pixels = seeded(shorter, given)
        assert pixels.dtype == torch.uint8 and pixels.is_contiguous()
        assert torch.equal(normalization(pixels[None])[0], seeded(whole, given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_byte_in_every_channel(dtype):
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    expected = transforms.Normalize(MEAN, STD)(every.float() / 255).to(dtype)
    assert torch.equal(OPENAI(every, dtype), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_byte_has_the_same_bits_on_a_gpu(dtype):
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    assert torch.equal(OPENAI(every.cuda(), dtype).cpu(), OPENAI(every, dtype))


def test_a_transform_that_cannot_be_cut_stays_as_it_is():
    erasing = {"use_timm": True, "scale": (0.5, 1.0), "re_prob": 1.0}
    whole = [
        open_clip.image_transform(32, is_train=True, aug_cfg=erasing),
        transforms.Compose([transforms.ToTensor()]),
        transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD), transforms.RandomErasing()]),
        transforms.ToTensor(),
        lambda image: torch.zeros(3, 2, 2),
    ]
    for transform in whole:
        assert cut(transform) == (transform, None)


@pytest.mark.parametrize("mode", ["L", "CMYK", "F"])
def test_an_image_that_is_not_rgb_after_the_first_steps_is_normalized_there(mode):
    mean, std = (0.5,) * len(Image.new(mode, (1, 1)).getbands()), (0.2,) * len(Image.new(mode, (1, 1)).getbands())
    steps = [transforms.Grayscale() if mode == "L" else lambda image: image.convert(mode), transforms.ToTensor()]
    whole = transforms.Compose([*steps, transforms.Normalize(mean, std)])
    assert torch.equal(cut(whole)[0](image()), whole(image())) and whole(image()).dtype == torch.float32


def test_a_shorter_transform_can_be_sent_to_a_worker():
    shorter, _ = cut(new_model("glyph-micro", 0).augment)
    assert torch.equal(seeded(pickle.loads(pickle.dumps(shorter)), image()), seeded(shorter, image()))


def test_a_model_has_the_same_features_of_bytes_as_of_floats():
    clip = new_model("glyph-micro", 0)
    images = [image(), image(37, 61), image(32, 32, "L")]
    floats = torch.stack([clip.preprocess(each) for each in images])
    pixels = torch.stack([clip.in_bytes(clip.preprocess)(each) for each in images])
    assert pixels.dtype == torch.uint8 and torch.equal(clip.prepared(pixels), floats)
    assert torch.equal(clip.prepared(floats), floats)
    assert torch.equal(clip.encode_image(pixels), clip.encode_image(floats))
    with torch.autocast("cpu", torch.bfloat16):
        assert clip.prepared(pixels).dtype == torch.bfloat16
        assert torch.equal(clip.encode_image(pixels), clip.encode_image(floats))


def test_a_transform_of_another_normalization_is_not_cut():
    clip = new_model("glyph-micro", 0)
    other = open_clip.image_transform(32, is_train=True, mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 1.0))
    assert clip.in_bytes(other) is other
    assert clip.in_bytes(clip.augment) is not clip.augment
