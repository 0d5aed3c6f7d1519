"""What an option's value must be, written beside the field: ``epochs: Annotated[int, AtLeast(1)] = 16``.

An options group is a frozen dataclass. `check_options` refuses, by the option's name, a value outside its range, and an
option that was given although it takes no part in the run. A group's own method ``check_together`` refuses what
involves several of its options. Nothing heavy is imported here, so that a wrong option is refused at once.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import PurePath
from typing import Any, get_type_hints

from .errors import UserError

_INTEGERS = 2**63  # from here on, torch and NumPy take none


@dataclasses.dataclass(frozen=True)
class Range:
    """The values that an option may have; None and words such as ``auto`` are the type's business.

    ``meaning`` completes "--option must be ...".
    """

    meaning: str
    allows: Callable[[Any], bool]


@dataclasses.dataclass(frozen=True)
class OnlyWith:
    """An option that takes part in a run only where ``holds`` of its group; ``where`` completes "it is for ..."."""

    where: str
    holds: Callable[[Any], bool]


def AtLeast(least: int, why: str = "") -> Range:
    """Return the range of numbers from ``least`` on; ``why`` gives a reason."""
    return Range(f"at least {least}" + (f": {why}" if why else ""), lambda value: value >= least)


NotNegative = Range(">= 0", lambda value: 0 <= value < math.inf)
Positive = Range("positive", lambda value: 0 < value < math.inf)
#: Infinity switches off what the option limits.
PositiveOrInfinite = Range("positive", lambda value: value > 0)
PositiveOrAuto = Range("positive, or auto", Positive.allows)
#: A share of something, which may be all of it but not nothing.
Share = Range("in (0, 1]", lambda value: 0 < value <= 1)
ShareOrZero = Range("in [0, 1]", lambda value: 0 <= value <= 1)
BelowOne = Range("in [0, 1)", lambda value: 0 <= value < 1)


def check_options(options: Any) -> None:
    """Check an options group and the groups in it.

    Raises
    ------
    UserError
        That names the first option that is wrong, its value and what it must be.
    """
    groups = list(_groups(options))
    for group in groups:
        for name, value, notes in _fields(group):
            _check_size(name, value)
            for note in notes:
                if isinstance(note, Range) and value is not None and not isinstance(value, str):
                    if not note.allows(value):
                        raise UserError(f"{flag(name)} must be {note.meaning}, got {value}")
    for group in groups:
        for name, _, notes in _fields(group):
            for note in notes:
                if isinstance(note, OnlyWith) and not note.holds(group):
                    refuse_if_given(group, name, note.where)
    for group in groups:
        if hasattr(group, "check_together"):
            group.check_together()


def _check_size(name: str, value: Any) -> None:
    """Refuse what no machine's number or file name can be."""
    for each in value if isinstance(value, tuple) else (value,):
        if isinstance(each, int) and abs(each) >= _INTEGERS:
            raise UserError(
                f"{flag(name)} must be below 2^63, got {str(each)[:40] if abs(each) < 10**4000 else 'more'}"
            )
        if isinstance(each, str | PurePath) and "\0" in str(each):
            raise UserError(f"{flag(name)} cannot hold a NUL character, got {str(each)[:80]!r}")


def refuse_if_given(group: Any, name: str, where: str) -> None:
    """Refuse an option that takes no part in the run, if it has another value than its default."""
    value, own = getattr(group, name), type(group).__dataclass_fields__[name]
    if value != (own.default_factory() if own.default is dataclasses.MISSING else own.default):
        raise UserError(f"{flag(name)} {value} has no part in this run: it is for {where}")


def flag(name: str) -> str:
    """Return a field's option on the command line."""
    return f"--{name.replace('_', '-')}"


@cache
def default_of(kind: type) -> Any:
    """Return a group with all defaults."""
    return kind()


@cache
def annotations_of(kind: type) -> dict[str, Any]:
    """Return the types of a group's fields, with the notes beside them."""
    # By default the module's names are the locals of what is evaluated, which functions in annotations do not see.
    return get_type_hints(kind, globalns=vars(sys.modules[kind.__module__]), include_extras=True)


def _groups(options: Any) -> Iterator[Any]:
    """Yield the groups within a group, then itself."""
    for each in dataclasses.fields(options):
        value = getattr(options, each.name)
        if dataclasses.is_dataclass(value):
            yield from _groups(value)
    yield options


def _fields(group: Any) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """Yield name, value and notes of a group's own options."""
    for name, annotation in annotations_of(type(group)).items():
        yield name, getattr(group, name), getattr(annotation, "__metadata__", ())
