"""Ranges beside the fields, and what is refused by them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest

from experiments.clip.cli.options import CacheReference, Plan, Train
from experiments.clip.errors import UserError
from experiments.clip.glyphs.options import Demo, GlyphTasks
from experiments.clip.icons.options import Prepare
from experiments.clip.ranges import AtLeast, OnlyWith, PositiveOrAuto, Range, annotations_of, check_options
from experiments.clip.study.options import Study


@dataclass(frozen=True)
class Part:
    rate: Annotated[float | Literal["auto"], PositiveOrAuto] = "auto"
    pair: Annotated[tuple[int, int], Range("ascending", lambda value: value[0] < value[1] < math.inf)] = (1, 2)


@dataclass(frozen=True)
class Options:
    part: Part = field(default_factory=Part)
    count: Annotated[int | None, AtLeast(2, "one is not enough")] = None
    is_on: bool = False
    size: Annotated[int, AtLeast(1), OnlyWith("--is-on", lambda options: options.is_on)] = 5

    def check_together(self) -> None:
        if self.count == self.size:
            raise UserError(f"--count {self.count} and --size must differ")


@pytest.mark.parametrize(
    "options",
    [Options(), Options(count=2), Options(Part(rate=0.5)), Options(is_on=True, size=7), Options(Part(pair=(3, 9)))],
)
def test_what_is_in_range_passes(options):
    check_options(options)


@pytest.mark.parametrize(
    "options, message",
    [
        (Options(count=1), "--count must be at least 2: one is not enough, got 1"),
        (Options(Part(rate=0.0)), "--rate must be positive, or auto, got 0.0"),
        (Options(Part(rate=math.nan)), "--rate must be positive, or auto, got nan"),
        (Options(Part(pair=(2, 1))), r"--pair must be ascending, got \(2, 1\)"),
        (Options(size=7), "--size 7 has no part in this run: it is for --is-on"),
        (Options(size=0), "--size must be at least 1, got 0"),
        (Options(is_on=True, count=5), "--count 5 and --size must differ"),
    ],
)
def test_what_is_wrong_is_named_with_its_value(options, message):
    with pytest.raises(UserError, match=message):
        check_options(options)


@pytest.mark.parametrize("kind", [Train, CacheReference, Plan, Demo, Prepare, GlyphTasks, Study])
def test_the_defaults_of_every_command_are_in_range(kind):
    check_options(kind())


@pytest.mark.parametrize("kind", [Train, CacheReference, Plan, Study])
def test_every_range_allows_its_own_default_and_refuses_nan_or_minus_one(kind):
    """A range that lets everything through would be no check."""

    def ranges(own):
        for name, annotation in annotations_of(own).items():
            if hasattr(annotation, "__dataclass_fields__"):
                yield from ranges(annotation)
            for note in getattr(annotation, "__metadata__", ()):
                if isinstance(note, Range):
                    yield name, note, getattr(own(), name)

    found = list(ranges(kind))
    assert found
    for name, note, default in found:
        wrong = (-1.0, -1.0) if isinstance(default, tuple) or name == "betas" else -1.0
        wrong = math.inf if name == "coefficient" else wrong  # which may be negative
        assert not note.allows(wrong), name
        assert default is None or isinstance(default, str) or note.allows(default), name
