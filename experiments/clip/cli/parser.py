"""From words to options and back: the command line, and the configuration that a run keeps."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import tyro
from tyro._errors import BadValue, InstantiationFailure, InvalidChoice, MissingArgs, UnrecognizedArgs, on_parse_error

from ..errors import PROGRAM, UserError, nearest
from ..io.files import write_json
from ..ranges import annotations_of, check_options, default_of, flag, refuse_if_given
from ..training.options import SHIPPED_REFERENCE, Loss
from .options import Plan, Shards, Train
from .presets import PRESETS, STARTS, is_of_embedded_pairs

_CHECKOUT = Path(__file__).parents[3]
#: How a stored configuration names the shipped reference, from a checkout and from an installation.
_SHIPPED = "experiments/clip/glyphs/reference_model"
#: That, and where earlier versions kept what a stored configuration may name.
_MOVED = {_SHIPPED: SHIPPED_REFERENCE, "experiments/clip/reference": SHIPPED_REFERENCE}
#: Options that are called otherwise than their fields.
_OTHER_FLAGS = {"logs": "--log-to", "kind": "--data"}
# What tyro says of words that are of none of an option's types.
_NO_KIND = re.compile(r"no type matching (.*) could be instantiated from \[(.*)\]\.?")
T = TypeVar("T")


def parse_options(kind: type, arguments: Sequence[str], name: str) -> Any:
    """Turn the words after a command's name into its options, checked.

    Raises
    ------
    UserError
        One line that names what is wrong. ``--help`` prints and exits.
    """
    if kind in (Train, Plan):
        return _parsed_training(kind, list(arguments), name)
    options = _parsed(kind, arguments, name)
    check_options(options)
    return options


def _parsed_training(kind: type, arguments: list[str], name: str) -> Any:
    """Parse and check the options of `Train` or `Plan`, which start from a preset or a stored configuration."""
    preset, path = _popped(arguments, "--preset"), _popped(arguments, "--config")
    arguments = list(_with_its_value(arguments, "--compile", "reduce-overhead"))
    start = _start(preset, path, _own_data(kind, arguments))
    if kind is Plan:
        options = _parsed(Plan, arguments, name, Plan(start))
        train = options.train
        if not train.model:
            raise UserError("a plan of your own data needs --model, or a --preset that has one")
        # A plan is given the number of samples, and not where they are.
        check_options(dataclasses.replace(options, train=dataclasses.replace(train, shards=Shards())))
    else:
        options = train = _parsed(Train, arguments, name, start)
        _check_start(preset, path, start, train)
        check_options(options)
    check_method(train.loss)
    _check_optimizer(train.optimization.optimizer)
    return options


def _check_start(preset: str | None, path: str | None, start: Train, train: Train) -> None:
    """Refuse a preset or a configuration of the embedded pairs for own data, and a preset for own data without any."""
    if preset is not None:
        given, is_embedded = f"--preset {preset}", is_of_embedded_pairs(preset)
        if not is_embedded and train.source != "catalog":
            raise UserError(f"{given} is for your own data: add --catalog FOLDER, which `{PROGRAM} catalog` makes")
    else:
        given, is_embedded = f"--config {path}", path is not None and start.source != "catalog"
    if is_embedded and train.source == "catalog":
        raise UserError(f"{given} has the settings of the embedded pairs: leave it out beside --catalog")


def _parsed(kind: type, arguments: Sequence[str], name: str, default: Any = None) -> Any:
    """Parse a command's words; what the parser refuses becomes an error of one line."""

    def refuse(event: object) -> None:
        raise UserError(f"{_refusal(event, kind)}: see `{PROGRAM} {name} --help`")

    with on_parse_error(refuse):
        return tyro.cli(
            kind, args=arguments, default=default, prog=f"{PROGRAM} {name}", config=(tyro.conf.OmitArgPrefixes,)
        )


def _refusal(event: object, kind: type) -> str:
    """Return what the parser found wrong."""
    match event:
        case UnrecognizedArgs():
            word = event.tokens[0].partition("=")[0]
            return f"Unrecognized options: {', '.join(event.tokens)}{nearest(word, sorted(_flags(kind)), 1)}"
        case InvalidChoice():
            choices = [choice for choice in event.choices if choice != "None"]  # which is to leave the option out
            name, hint = event.argument.display_name(), nearest(str(event.value), choices, 1)
            return f"{name} must be one of {', '.join(choices)}, got {event.value!r}{hint}"
        case InstantiationFailure() if event.argument is not None:
            message = event.message.splitlines()[0]
            if found := _NO_KIND.fullmatch(message):
                kinds = [kind.strip("{}") for kind in found[1].split("|") if kind != "{None}"]
                return f"{event.argument.display_name()} needs {' or '.join(kinds)}, got {found[2]}"
            return f"{event.argument.display_name()}: {message}"
        case MissingArgs():
            return f"Missing: {', '.join(each.arg.display_name() for each in event.missing_arguments)}"
        case BadValue():
            count = event.argument.lowered.nargs
            return f"{event.argument.display_name()} needs {'a value' if count == 1 else f'{count} values'}"
    return f"the options cannot be understood ({type(event).__name__})"


def _flags(kind: type) -> Iterator[str]:
    """Yield the options of a group and of the groups in it."""
    for name, annotation in annotations_of(kind).items():
        if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
            yield from _flags(annotation)
        else:
            yield _flag(name)


def _flag(name: str) -> str:
    """Return an option by the name of its field."""
    return _OTHER_FLAGS.get(name, flag(name))


def check_method(loss: Loss) -> None:
    """Refuse options that the method does not take, by what the methods' classes say."""
    from ..training.methods import METHODS  # loads torch

    for option in sorted(set().union(*(method.takes for method in METHODS.values()))):
        takers = [name for name, method in METHODS.items() if option in method.takes]
        if loss.method not in takers:
            *others, last = takers
            where = f"{', '.join(others)} or {last}" if others else last
            refuse_if_given(loss, option, f"--method {where}")


def _check_optimizer(name: str) -> None:
    """Refuse an optimizer that does not exist."""
    from ..training.optimization import check_optimizer  # loads torch

    check_optimizer(name)


def _own_data(kind: type, words: Sequence[str]) -> str:
    """Return the source of the pairs, as the words that are not parsed yet say."""
    own = ("--catalog", "--samples") if kind is Plan else ("--catalog",)
    if any(word.partition("=")[0] in own for word in words):
        return "catalog"
    return _popped(list(words), "--data") or "glyphs"


def _start(preset: str | None, path: str | None, source: str) -> Train:
    """Return where the other options start from; without a name, the settings of the source of the pairs."""
    if preset is not None and path is not None:
        raise UserError(f"--preset {preset} and --config {path} both say where to start from: give one of them")
    if preset is not None:
        if preset not in PRESETS:
            raise UserError(
                f"no preset is called {preset[:80]!r}{nearest(preset, PRESETS)}: choose one of {', '.join(PRESETS)}"
            )
        return PRESETS[preset]
    return STARTS.get(source, STARTS["glyphs"]) if path is None else load_config(Path(path))


def _popped(arguments: list[str], name: str) -> str | None:
    """Remove an option with its value from the words, and return the value."""
    for position, argument in enumerate(arguments):
        own, equals, value = argument.partition("=")
        if own == name:
            value = value if equals else "".join(arguments[position + 1 : position + 2])
            del arguments[position : position + (1 if equals else 2)]
            return value
    return None


def _with_its_value(arguments: Sequence[str], name: str, *values: str) -> Iterator[str]:
    """Yield the words, where an option that takes a value or stands alone as a flag is given the flag's value."""
    for word, following in itertools.pairwise([*arguments, ""]):
        if word == f"--no-{name.removeprefix('--')}":
            yield from (name, "False")
        elif word == name and following not in (*values, "True", "False"):
            yield from (name, "True")
        else:
            yield word


def save_config(path: Path, options: Train) -> None:
    """Write all options, from which `load_config` repeats the run."""
    write_json(path, as_settings(options))


def load_config(path: Path) -> Train:
    """Return the options that `save_config` wrote."""
    try:
        return _with_shipped_reference(from_dict(Train, json.loads(path.read_bytes())))
    except OSError as error:
        raise UserError(f"--config {path} cannot be read ({error.strerror}): name the config.json of a run") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"--config {path} is not the config.json of a run ({str(error)[:200]!r}): name one") from error


def _with_shipped_reference(options: Train) -> Train:
    """Return the options of a run; with the embedded pairs, the reference that ships with them need not be named."""
    reference = options.loss.reference
    if options.source != "glyphs" or reference is None or reference.absolute() != SHIPPED_REFERENCE:
        return options
    return dataclasses.replace(options, loss=dataclasses.replace(options.loss, reference=None))


def as_settings(options: Any) -> dict[str, Any]:
    """Return options as JSON's types; a path within the checkout as one relative to it."""
    return {key: _as_setting(value) for key, value in vars(options).items()}


def _as_setting(value: Any) -> Any:
    if isinstance(value, Path):
        if value == SHIPPED_REFERENCE:
            return _SHIPPED
        return str(value.relative_to(_CHECKOUT) if value.is_relative_to(_CHECKOUT) else value)
    if isinstance(value, tuple):
        return [_as_setting(part) for part in value]
    return as_settings(value) if dataclasses.is_dataclass(value) else value


def from_dict(kind: type[T], stored: Mapping[str, Any]) -> T:
    """Return the options group that `as_settings` turned into JSON's types.

    Options that are not stored have their defaults.

    Raises
    ------
    UserError
        For an option that the group does not have, or a value of another type.
    """
    types_of = annotations_of(kind)
    if unknown := stored.keys() - types_of.keys():
        raise UserError(f"the configuration has the unknown option {min(unknown)}: it is of another version")
    defaults = default_of(kind)
    # A path that is a default is one in this checkout, whatever the folder that the program is started from.
    given = {name: value for name, value in stored.items() if value != _as_setting(getattr(defaults, name))}
    return dataclasses.replace(
        defaults, **{name: _from_setting(types_of[name], value, name) for name, value in given.items()}
    )


def _from_setting(annotation: Any, value: Any, name: str) -> Any:
    """Return a stored value as one of the field's type."""
    if dataclasses.is_dataclass(annotation):
        if not isinstance(value, Mapping):
            raise TypeError(f"{name} holds {value!r}, not options")
        return from_dict(annotation, value)  # pyright: ignore[reportArgumentType]
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _from_setting(parts[0], value, name)
    if origin in (Union, types.UnionType):
        for part in parts:
            if _is_of(part, value):
                return _from_setting(part, value, name)
    elif origin is tuple and isinstance(value, list):
        each = parts[:1] * len(value) if parts[-1] is Ellipsis else parts
        return tuple(_from_setting(part, item, name) for part, item in zip(each, value, strict=True))
    elif _is_of(annotation, value):
        if annotation is Path:
            return _path(value)
        return annotation(value) if annotation in (int, float) else value
    raise UserError(f"the configuration's {name} cannot be {value!r}")


def _is_of(annotation: Any, value: Any) -> bool:
    """Whether a value of JSON's types can stand for one of a type that is not composed."""
    if get_origin(annotation) is Literal:
        return value in get_args(annotation)
    if get_origin(annotation) is tuple:
        return isinstance(value, list)
    if annotation in (int, float) and isinstance(value, bool):
        return False
    accepted: dict[Any, Any] = {Path: str, float: (int, float), types.NoneType: types.NoneType}
    return isinstance(value, accepted.get(annotation, annotation))


def _path(text: str) -> Path:
    """Return a stored path; one that `as_settings` has made relative to the checkout is found from anywhere."""
    if text in _MOVED:
        return _MOVED[text]
    is_elsewhere = not Path(text).exists() and (_CHECKOUT / text).exists()
    return _CHECKOUT / text if "/" in text and is_elsewhere else Path(text)


def as_words(options: Train) -> list[str]:
    """Return the command line of ``train`` that gives these options, naming those that do not start so."""
    return list(_words(as_settings(STARTS[options.source]), as_settings(options)))


def _words(defaults: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterator[str]:
    for name, value in settings.items():
        if value == defaults[name]:
            continue
        if isinstance(value, dict):
            yield from _words(defaults[name], value)
        elif isinstance(value, bool):
            yield _flag(name) if value else f"--no-{name.replace('_', '-')}"
        elif isinstance(value, list):
            yield from (_flag(name), *map(str, value))
        else:
            yield from (_flag(name), str(value))
