"""Scores of a model on held-out glyphs: naming, two zero-shot tasks on attributes, retrieval."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..distributed import ONE_PROCESS, Ranks
from ..evaluation.encoding import encode_images, encode_texts, zero_shot_classifier
from ..evaluation.metrics import Naming, Retrieval, ZeroShot, naming, retrieval, zero_shot
from ..models.clip import Clip
from .dataset import Manifest
from .stream import PreparedPairs

SCRIPT_TEMPLATES = ("{} small letter", "{} capital letter", "{} letter")
BASE_LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")
BASE_LETTER_TEMPLATES = tuple(
    f"latin {case} letter {{}}{mark}"
    for case in ("small", "capital")
    for mark in (
        "",
        " with acute",
        " with grave",
        " with circumflex",
        " with diaeresis",
        " with caron",
        " with macron",
        " with dot below",
    )
)

# The script is what stands before "letter" up to the first of these words: "georgian mtavruli capital
# letter an" is Georgian. A name that begins with one ("modifier letter small h", "fullwidth latin small
# letter a") has no script, because its picture is a styled copy of a letter and its caption does not start
# with the class name.
_NOT_SCRIPT = frozenset(
    "capital circled cluster-final cluster-initial combining crossed epigraphic final fullwidth "
    "halfwidth love modifier mtavruli negative parenthesized regional shorthand small squared subjoined "
    "subscript superfixed superscript tag thick tortoise turned vowel-carrier".split()
)
_ACCENTED_LATIN = re.compile(r"latin (?:small|capital) letter ([a-z]) with .+")


class AttributeTask(NamedTuple):
    """A zero-shot task: ``members`` are positions among the samples, ``labels`` index ``classes``."""

    name: str
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    members: tuple[int, ...]
    labels: tuple[int, ...]


class Evaluation(NamedTuple):
    """All three evaluations of one model."""

    naming: Naming
    attributes: dict[str, ZeroShot]
    retrieval: Retrieval

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers as nested dictionaries that survive a round trip through JSON."""
        return {
            "naming": self.naming._asdict(),
            "attributes": {name: scores._asdict() for name, scores in self.attributes.items()},
            "retrieval": {
                direction: {str(k): recall for k, recall in recalls.items()}
                for direction, recalls in self.retrieval._asdict().items()
            },
        }


def evaluate_model(clip: Clip, pairs: PreparedPairs, manifest: Manifest, ranks: Ranks = ONE_PROCESS) -> Evaluation:
    """Score a model on held-out pairs by naming over all names, attributes and retrieval; ranks share the encoding."""
    encode_image, encode_text = encoders_of(clip, ranks)
    return evaluate(encode_image, encode_text, pairs.image_batches(), pairs.captions, manifest.vocabulary)


def encoders_of(
    clip: Clip, ranks: Ranks = ONE_PROCESS
) -> tuple[Callable[[Tensor], Tensor], Callable[[Sequence[str]], Tensor]]:
    """Return a model's two encoders, in evaluation mode, whose work ranks share."""
    clip.model.eval()

    def encode(captions: Sequence[str]) -> Tensor:
        return clip.encode_tokens(_tokens(clip.tokenize, tuple(captions)))

    return ranks.split_over_ranks(clip.encode_image), ranks.split_over_ranks(encode)


@lru_cache(maxsize=64)
def _tokens(tokenize: Callable[[Sequence[str]], Tensor], captions: tuple[str, ...]) -> Tensor:
    """Return the captions' tokens, kept because every validation encodes the same names."""
    return tokenize(captions)


def glyph_attributes(captions: Sequence[str], minimum: int = 20) -> list[AttributeTask]:
    """Read the zero-shot tasks off the captions; a task with samples of fewer than two classes is left out.

    Parameters
    ----------
    captions
        The held-out captions, one per sample.
    minimum
        Number of samples that a script needs to be a class.

    Returns
    -------
    list of AttributeTask
        ``script``: the script of a letter, by the words that its name starts with. ``base letter``: the
        letter under the accent of a Latin letter, among all 26.
    """
    scripts = [_script(caption) for caption in captions]
    counts = Counter(script for script in scripts if script)
    letters = [match[1] if match else "" for match in map(_ACCENTED_LATIN.fullmatch, captions)]
    common = tuple(sorted(script for script, count in counts.items() if count >= minimum))
    tasks = (
        _attribute_task("script", common, SCRIPT_TEMPLATES, scripts),
        _attribute_task("base letter", BASE_LETTERS, BASE_LETTER_TEMPLATES, letters),
    )
    return [task for task in tasks if len(set(task.labels)) > 1]


def evaluate(
    encode_image: Callable[[Tensor], Tensor],  # [b, 3, h, w] -> [b, d]
    encode_text: Callable[[list[str]], Tensor],  # b texts -> [b, d]
    image_batches: Iterable[Tensor],  # each [b, 3, h, w]
    captions: Sequence[str],
    vocabulary: Sequence[str],
    batch_size: int = 512,
    attributes_of: Callable[[Sequence[str]], Sequence[AttributeTask]] = glyph_attributes,
) -> Evaluation:
    """Run the three evaluations on held-out pairs.

    Parameters
    ----------
    encode_image, encode_text
        The two encoders; their features need not be normalized.
    image_batches
        The held-out images in the order of ``captions``.
    captions
        The held-out captions, one per image.
    vocabulary
        The distinct captions of the whole data set.
    batch_size
        Number of texts per call of ``encode_text``.
    attributes_of
        Returns the zero-shot tasks on attributes that captions have.
    """
    positions = {caption: position for position, caption in enumerate(vocabulary)}
    if len(positions) < len(vocabulary):
        repeated, _ = Counter(vocabulary).most_common(1)[0]
        raise ValueError(f"vocabulary has {repeated!r} more than once; pass distinct captions")
    unknown = [caption for caption in captions if caption not in positions]
    if unknown:
        raise ValueError(f"captions has {unknown[0]!r}, which vocabulary lacks; add it to vocabulary")
    images = encode_images(encode_image, image_batches)
    if len(images) != len(captions):
        raise ValueError(f"image_batches has {len(images)} images for {len(captions)} captions; pair them up")
    texts = encode_texts(encode_text, vocabulary, batch_size)
    labels = torch.tensor([positions[caption] for caption in captions])
    distinct = labels.unique()
    attributes = {}
    for task in attributes_of(captions):
        classifier = zero_shot_classifier(encode_text, task.classes, task.templates, batch_size)
        attributes[task.name] = zero_shot(images[list(task.members)], classifier, torch.tensor(task.labels))
    return Evaluation(
        naming(images, texts, labels),
        attributes,
        retrieval(images, texts[distinct.to(texts.device)], labels, distinct),
    )


def _script(caption: str) -> str:
    words = caption.split()
    if "letter" not in words:
        return ""
    before = words[: words.index("letter")]
    end = next((i for i, word in enumerate(before) if word in _NOT_SCRIPT), len(before))
    return " ".join(before[:end])


def _attribute_task(
    name: str, classes: tuple[str, ...], templates: tuple[str, ...], values: Sequence[str]
) -> AttributeTask:
    index = {value: position for position, value in enumerate(classes)}
    members = tuple(i for i, value in enumerate(values) if value in index)
    return AttributeTask(name, classes, templates, members, tuple(index[values[i]] for i in members))
