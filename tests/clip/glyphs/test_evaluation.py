"""The classes that glyph names give, and the three evaluations of a model on held-out pairs."""

import json
import unicodedata

import pytest
import torch
from random_tensors import features

from experiments.clip.evaluation.encoding import zero_shot_classifier
from experiments.clip.evaluation.metrics import Naming, zero_shot
from experiments.clip.glyphs.evaluation import BASE_LETTERS, evaluate, glyph_attributes


def classes_by_caption(captions, task_name, minimum=1):
    tasks = {task.name: task for task in glyph_attributes(captions, minimum)}
    task = tasks[task_name]
    return {captions[i]: task.classes[c] for i, c in zip(task.members, task.labels, strict=True)}


def test_scripts_of_literal_captions():
    expected = {
        "latin small letter e with acute": "latin",
        "latin small letter dotless i": "latin",
        "latin letter small capital g": "latin",
        "latin subscript small letter a": "latin",
        "greek small letter alpha with tonos": "greek",
        "greek capital letter omega": "greek",
        "cyrillic small letter zhe": "cyrillic",
        "georgian mtavruli capital letter an": "georgian",
        "armenian modifier letter left half ring": "armenian",
        "arabic letter beh": "arabic",
        "old italic letter a": "old italic",
        "new tai lue letter high qa": "new tai lue",
    }
    others = [
        "modifier letter small h",
        "fullwidth latin small letter a",
        "combining latin small letter a",
        "negative circled latin capital letter a",
        "love letter",
        "box drawings light horizontal",
        "latin small ligature ff",
        "greek lunate epsilon symbol",
        "numeric letters",
    ]
    assert classes_by_caption([*others, *expected], "script") == expected


def test_every_unicode_script_starts_its_captions():
    names = [unicodedata.name(chr(code), "").lower() for code in range(0x20000)]
    scripts = classes_by_caption([name for name in names if name], "script", minimum=20)
    assert all(caption.startswith(script + " ") for caption, script in scripts.items())
    assert {"latin", "greek", "cyrillic", "arabic", "hebrew", "armenian", "georgian", "coptic"} <= set(scripts.values())
    assert not {word for script in scripts.values() for word in script.split()} & {
        "small",
        "capital",
        "modifier",
    }


def test_rare_scripts_are_no_class():
    captions = ["greek small letter alpha"] * 3 + ["latin small letter b"] * 3 + ["coptic small letter hori"] * 2
    (task,) = glyph_attributes(captions, minimum=3)
    assert task.classes == ("greek", "latin")
    assert task.members == (0, 1, 2, 3, 4, 5)
    assert task.labels == (0, 0, 0, 1, 1, 1)


def test_base_letters_of_literal_captions():
    expected = {
        "latin small letter e with acute": "e",
        "latin capital letter o with diaeresis and macron": "o",
        "latin small letter z with swash tail": "z",
    }
    others = [
        "latin small letter a",
        "latin small letter ae with acute",
        "latin small letter dotless i",
        "latin small letter dotless j with stroke",
        "latin small letter open e with retroflex hook",
        "latin letter small capital g",
        "latin letter small capital i with stroke",
        "greek small letter alpha with tonos",
        "modifier letter small h with hook",
        "modifier letter small h",
        "fullwidth latin small letter a with acute",
    ]
    captions = [*others, *expected]
    assert classes_by_caption(captions, "base letter") == expected
    task = glyph_attributes(captions)[-1]
    assert task.classes == BASE_LETTERS and len(BASE_LETTERS) == 26


def test_a_task_without_two_classes_is_left_out():
    assert glyph_attributes(["latin small letter e with acute", "box drawings light horizontal"]) == []


# --- the evaluations ----------------------------------------------------------------------------------------

VOCABULARY = [
    f"latin {case} letter {letter} with {mark}"
    for case in ("small", "capital")
    for letter in "aeiou"
    for mark in ("acute", "grave", "ogonek")
] + [f"greek small letter {name}" for name in ("alpha", "beta", "gamma")]


def encode_names(texts):
    """Give each name its own direction, so that an image of a name can be told apart from all others."""
    return torch.cat([features(1, sum(ord(c) * 31**i for i, c in enumerate(t)) % 2**31, 64) for t in texts])


def encode_image(batch):  # [b, 3, h, w] -> [b, d]
    return batch[:, 0, 0]


def images_of(captions):
    return encode_names(captions)[:, None, None, :].expand(-1, 3, 1, -1)


def test_evaluate_collects_the_three_evaluations():
    captions = VOCABULARY[3:20] + VOCABULARY[4:9] + VOCABULARY[-3:]  # 25 samples of 20 names
    batches = images_of(captions).split(4)
    result = evaluate(encode_image, encode_names, batches, captions, VOCABULARY, batch_size=7)
    assert result.naming == Naming(1, 1, 1 / 33, 25, 33)
    assert result.retrieval == ({1: 1, 5: 1, 10: 1}, {1: 1, 5: 1, 10: 1})
    assert set(result.attributes) == {"base letter"}  # three Greek letters are too few for a class

    (task,) = glyph_attributes(captions)
    classifier = zero_shot_classifier(encode_names, task.classes, task.templates)
    images = encode_names([captions[i] for i in task.members])
    assert result.attributes["base letter"] == zero_shot(images, classifier, torch.tensor(task.labels))
    assert result.attributes["base letter"].samples == 22

    assert json.loads(json.dumps(result.as_dict())) == result.as_dict()
    assert result.as_dict()["retrieval"]["text_to_image"]["5"] == 1
    assert result.as_dict()["attributes"]["base letter"]["classes"] == 26


def test_evaluate_takes_no_gradient():
    weight = torch.nn.Parameter(torch.eye(64))
    tracked = []

    def encode(batch):
        output = encode_image(batch) @ weight
        tracked.append(output.requires_grad)
        return output

    evaluate(encode, encode_names, [images_of(VOCABULARY)], VOCABULARY, VOCABULARY)
    assert tracked == [False]


@pytest.mark.parametrize(
    "captions, vocabulary, message",
    [
        (VOCABULARY[:3], VOCABULARY, "image_batches has 2 images for 3 captions"),
        (["snowman", "comet"], VOCABULARY, "captions has 'snowman'"),
        (VOCABULARY[:2], [*VOCABULARY, VOCABULARY[5]], "more than once"),
    ],
)
def test_evaluate_refuses_mismatched_input(captions, vocabulary, message):
    with pytest.raises(ValueError, match=message):
        evaluate(encode_image, encode_names, [images_of(VOCABULARY[:2])], captions, vocabulary)


def test_no_images_are_refused():
    with pytest.raises(ValueError, match="image_batches is empty"):
        evaluate(encode_image, encode_names, [], [], VOCABULARY)
