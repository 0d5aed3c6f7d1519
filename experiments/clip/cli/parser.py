"""Options of the commands: the command line, its checks, and how a run's options are kept."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tyro

from experiments.clip.cli.options import (
    CacheReference,
    Catalog,
    Data,
    Demo,
    Evaluate,
    GlyphTasks,
    Loss,
    Plan,
    Prepare,
    Shards,
    Train,
)
from experiments.clip.cli.presets import GLYPH, PRESETS
from experiments.clip.errors import UserError
from experiments.clip.io.files import write_json
from experiments.clip.study.options import Study
from experiments.clip.training.optimization import check_optimizer
from experiments.clip.training.selection import Selection

_CHECKOUT = Path(__file__).parents[3]

_DEFAULT_LOSS = Loss()
_WITH_REFERENCE = "--method drrho or two-level, or with --distill or --select"

COMMANDS: dict[str, type] = {
    "demo": Demo,
    "prepare": Prepare,
    "cache-reference": CacheReference,
    "train": Train,
    "evaluate": Evaluate,
    "plan": Plan,
    "catalog": Catalog,
    "glyph-tasks": GlyphTasks,
    "study": Study,
}


def parse(arguments: Sequence[str]) -> Any:
    """Turn a command line into options; without a command it is the demo's.

    Raises
    ------
    UserError
        One line that names what is wrong. ``--help`` prints and exits.
    """
    rest = list(arguments)
    if rest and rest[0] in ("-h", "--help"):
        summaries = "\n".join(f"  {name:<17}{kind.__doc__}" for name, kind in COMMANDS.items())
        print(f"usage: run.py [COMMAND] [OPTIONS]; COMMAND --help lists its options\n\n{summaries}")
        raise SystemExit(0)
    name = rest.pop(0) if rest and not rest[0].startswith("-") else "demo"
    if name not in COMMANDS:
        raise UserError(f"no command is called {name!r}: choose one of {', '.join(COMMANDS)}")
    if name not in ("train", "plan"):
        options = _parsed(name, rest, None)
        if isinstance(options, CacheReference):
            _check_cache(options)
        return options
    preset, path = _popped(rest, "--preset"), _popped(rest, "--config")
    start = _start(preset, path)
    if name == "plan":
        options = _parsed(name, rest, Plan(start))
        _check(options.train)
        if options.train.fraction != 1:
            raise UserError(f"--fraction {options.train.fraction} has no part in a plan: give --samples the pairs used")
        return options
    options = _parsed(name, rest, start)
    _check(options)
    if preset is not None and not preset.startswith(GLYPH) and options.shards.catalog is None:
        raise UserError(f"--preset {preset} is for your own data: add --catalog FOLDER, which `run.py catalog` makes")
    _check_shards(options)
    return options


def _parsed(name: str, arguments: Sequence[str], default: Any) -> Any:
    refusal = io.StringIO()
    try:
        with contextlib.redirect_stderr(refusal):
            return tyro.cli(
                COMMANDS[name],
                args=arguments,
                default=default,
                prog=f"run.py {name}",
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(f"{_first_message(refusal.getvalue())}: see `run.py {name} --help`") from None


def _check(options: Train) -> None:
    """Refuse numbers out of range, by the name of their option."""
    optimization, loss, keeping = options.optimization, options.loss, options.keeping
    tau = 1.0 if loss.temperature == "auto" else loss.temperature
    distill_tau = 1.0 if loss.distill_temperature == "auto" else loss.distill_temperature
    share = 1.0 if loss.coefficient == "adaptive" else loss.coefficient
    low, high = loss.temperature_bounds
    for flag, value, is_right, meaning in (
        ("epochs", optimization.epochs, optimization.epochs >= 1, "at least 1"),
        ("batch-size", optimization.batch_size, optimization.batch_size >= 2, "at least 2: a negative"),
        ("lr", optimization.lr, 0 < optimization.lr < math.inf, "positive"),
        ("weight-decay", optimization.weight_decay, 0 <= optimization.weight_decay < math.inf, ">= 0"),
        ("warmup", optimization.warmup, optimization.warmup >= 0, ">= 0"),
        ("temperature", loss.temperature, 0 < tau < math.inf, "positive, or auto"),
        ("final-gamma", loss.final_gamma, 0 < loss.final_gamma <= 1, "in (0, 1]"),
        ("eps", loss.eps, 0 <= loss.eps < math.inf, ">= 0"),
        ("log-every", options.log_every, options.log_every >= 1, "at least 1"),
        ("lr-min", optimization.lr_min, 0 <= optimization.lr_min <= optimization.lr, "between 0 and --lr"),
        ("betas", optimization.betas, all(0 <= beta < 1 for beta in optimization.betas), "two numbers in [0, 1)"),
        ("adam-eps", optimization.adam_eps, 0 < optimization.adam_eps < math.inf, "positive"),
        ("cooldown-steps", optimization.cooldown_steps, optimization.cooldown_steps >= 0, ">= 0"),
        ("clip-norm", optimization.clip_norm, optimization.clip_norm is None or optimization.clip_norm > 0, "positive"),
        ("ema", optimization.ema, optimization.ema is None or 0 <= optimization.ema < 1, "in [0, 1)"),
        ("exchange-minutes", options.execution.exchange_minutes, options.execution.exchange_minutes > 0, "positive"),
        ("accumulation", optimization.accumulation, 1 <= optimization.accumulation, "at least 1"),
        ("rho", loss.rho, 0 <= loss.rho < math.inf, ">= 0"),
        ("temperature-lr", loss.temperature_lr, 0 < loss.temperature_lr < math.inf, "positive"),
        ("temperature-bounds", loss.temperature_bounds, 0 < low <= high < math.inf, "two numbers, 0 < low <= high"),
        ("level", loss.level, 0 < loss.level <= 1, "in (0, 1]"),
        ("strength", loss.strength, 0 < loss.strength < math.inf, "positive"),
        ("coefficient", loss.coefficient, abs(share) < math.inf, "a finite number, or adaptive"),
        ("distill", loss.distill, 0 <= loss.distill < math.inf, ">= 0"),
        ("distill-temperature", loss.distill_temperature, 0 < distill_tau < math.inf, "positive, or auto"),
        ("checkpoint-minutes", keeping.checkpoint_minutes, keeping.checkpoint_minutes > 0, "positive"),
        ("checkpoint-steps", keeping.checkpoint_steps, (keeping.checkpoint_steps or 1) >= 1, "at least 1"),
        ("keep", keeping.keep, keeping.keep >= 1, "at least 1"),
        ("validations", options.validations, options.validations >= 1, "at least 1"),
        ("fraction", options.fraction, 0 < options.fraction <= 1, "in (0, 1]"),
        ("gamma-epochs", loss.gamma_epochs, loss.gamma_epochs is None or loss.gamma_epochs >= 0, ">= 0"),
        ("patch-dropout", options.patch_dropout, 0 <= options.patch_dropout < 1, "in [0, 1)"),
        ("unlocked-groups", options.unlocked_groups, options.unlocked_groups >= 0, ">= 0"),
        ("nonfinite-limit", options.nonfinite_limit, options.nonfinite_limit >= 0, ">= 0"),
        ("seed", options.seed, options.seed >= 0, ">= 0"),
    ):
        if not is_right:
            raise UserError(f"--{flag} must be {meaning}, got {value}")
    check_optimizer(optimization.optimizer)
    if (optimization.schedule == "cooldown") != (optimization.cooldown_steps > 0):
        raise UserError(
            f"--schedule cooldown and --cooldown-steps need each other, got {optimization.schedule} and "
            f"{optimization.cooldown_steps} steps"
        )
    if optimization.schedule == "constant" and optimization.lr_min:
        raise UserError(f"--lr-min {optimization.lr_min} has no part in this run: --schedule constant stays at --lr")
    if options.unlocked_groups and not options.lock:
        raise UserError(f"--unlocked-groups {options.unlocked_groups} has no part in this run: it is for --lock")
    if {"image", "text"} <= set(options.lock) and not options.unlocked_groups:
        raise UserError("--lock image text leaves nothing to train: lock one tower, or give --unlocked-groups")
    _check_meaning(options)
    _check_selection(options)


def _check_cache(options: CacheReference) -> None:
    """Refuse numbers out of range, and options of the features that would be ignored."""
    for flag, value, is_right, meaning in (
        ("views", options.views, options.views >= 1, "at least 1"),
        ("batch-size", options.batch_size, options.batch_size >= 1, "at least 1"),
        ("workers", options.workers, options.workers >= 0, ">= 0"),
        ("skip-limit", options.skip_limit, 0 <= options.skip_limit <= 1, "in [0, 1]"),
        ("exchange-minutes", options.exchange_minutes, options.exchange_minutes > 0, "positive"),
    ):
        if not is_right:
            raise UserError(f"--{flag} must be {meaning}, got {value}")
    if options.catalog is not None and options.data != Data():
        raise UserError("--catalog takes the place of --captions, --size and --cache: leave those out")
    if options.catalog is None:
        for name in ("out", "views", "precision", "batch_size", "workers", "skip_limit"):
            if getattr(options, name) != getattr(CacheReference(), name):
                raise UserError(f"--{name.replace('_', '-')} has no part in this run: it is for --catalog")


def _check_shards(options: Train) -> None:
    """Refuse options of the pairs that would be ignored."""
    shards = options.shards
    if shards.catalog is None:
        for name, value in vars(shards).items():
            if value != getattr(Shards(), name):
                raise UserError(f"--{name.replace('_', '-')} {value} has no part in this run: it is for --catalog")
        return
    if shards.reference_features is not None and not options.needs_reference:
        raise UserError(
            f"--reference-features {shards.reference_features} has no part in this run: it is for {_WITH_REFERENCE}"
        )
    if options.split != "train" or options.fraction != 1 or options.data != Data():
        raise UserError(
            "--catalog takes the place of --split, --fraction, --captions, --size and --cache: leave those out"
        )
    for flag, value, is_right, meaning in (
        ("workers", shards.workers, shards.workers >= 0, ">= 0"),
        ("epoch-samples", shards.epoch_samples, shards.epoch_samples is None or shards.epoch_samples >= 1, ">= 1"),
        ("block-shards", shards.block_shards, shards.block_shards >= 1, "at least 1"),
        ("skip-limit", shards.skip_limit, 0 <= shards.skip_limit <= 1, "in [0, 1]"),
    ):
        if not is_right:
            raise UserError(f"--{flag} must be {meaning}, got {value}")


def _check_selection(options: Train) -> None:
    """Refuse options of the selection that would be ignored, and numbers out of range."""
    selection, batch = options.selection, options.optimization.batch_size
    for name, takes_part, where in (
        ("candidates", selection.is_on, "--select jest, jest-top-k or rho-top-k"),
        ("select_chunks", selection.is_joint, "--select jest or jest-top-k"),
        ("select_temperature", selection.select == "jest", "--select jest"),
    ):
        value = getattr(selection, name)
        if not takes_part and value != getattr(Selection(), name):
            raise UserError(f"--{name.replace('_', '-')} {value} has no part in this run: it is for {where}")
    chunks, temperature = selection.select_chunks, selection.select_temperature
    for flag, value, is_right, meaning in (
        ("candidates", selection.candidates, selection.candidates >= 2, "at least 2: one is left out"),
        (
            "select-chunks",
            chunks,
            1 <= chunks <= batch or not selection.is_joint,
            f"between 1 and --batch-size {batch}",
        ),
        ("select-temperature", temperature, 0 < temperature <= 1e300, "positive: 0 is --select jest-top-k"),
    ):
        if not is_right:
            raise UserError(f"--{flag} must be {meaning}, got {value}")
    if selection.is_on and options.loss.learns_temperature and options.loss.temperature_scheme == "individual":
        raise UserError(
            f"--select {selection.select} compares pairs at one temperature, which --temperature-scheme individual has "
            "not: choose another"
        )


def _check_meaning(options: Train) -> None:
    """Refuse options that the chosen method would ignore: what is given must take part."""
    loss = options.loss
    contrastive = loss.method in ("fastclip", "drrho")
    learned = loss.learns_temperature
    with_radius = learned and loss.temperature_scheme != "per-temperature"
    is_kl = loss.divergence == "kl"
    for name, takes_part, where in (
        ("temperature", loss.takes_temperature, "--method fastclip, drrho or two-level"),
        ("temperature_scheme", contrastive, "--method fastclip or drrho"),
        ("rho", with_radius, "--temperature-scheme global or individual"),
        ("temperature_lr", learned, "a learned --temperature-scheme"),
        ("temperature_lr_schedule", learned, "a learned --temperature-scheme"),
        ("published_temperature_gradient", learned and is_kl, "a learned --temperature-scheme with --divergence kl"),
        ("temperature_bounds", learned, "a learned --temperature-scheme"),
        ("divergence", loss.takes_temperature, "--method fastclip, drrho or two-level"),
        ("level", loss.divergence == "cvar", "--divergence cvar"),
        ("strength", loss.method == "two-level" and loss.divergence != "cvar", "--method two-level, without cvar"),
        ("coefficient", loss.method == "drrho", "--method drrho"),
        ("final_gamma", contrastive and loss.log_step is None, "--method fastclip or drrho, without --log-step"),
        ("gamma_epochs", contrastive and loss.log_step is None, "--method fastclip or drrho, without --log-step"),
        ("log_step", contrastive and is_kl, "--method fastclip or drrho with --divergence kl"),
        ("eps", contrastive and is_kl, "--method fastclip or drrho with --divergence kl"),
        ("distill_temperature", loss.distill > 0, "--distill"),
        (
            "distill_own_temperature",
            loss.distill > 0 and not (contrastive and loss.temperature_scheme == "individual"),
            "--distill, with one temperature for all samples",
        ),
        ("reference", options.needs_reference, _WITH_REFERENCE),
        ("reference_weights", options.needs_reference, _WITH_REFERENCE),
    ):
        value = getattr(loss, name)
        if not takes_part and value != getattr(_DEFAULT_LOSS, name):
            raise UserError(f"--{name.replace('_', '-')} {value} has no part in this run: it is for {where}")
    if loss.temperature_scheme == "individual" and loss.temperature_lr_schedule == "threshold":
        raise UserError("--temperature-lr-schedule threshold is for a single tau, not --temperature-scheme individual")
    if loss.temperature_scheme == "per-temperature" and not is_kl:
        raise UserError(f"--temperature-scheme per-temperature needs --divergence kl, got {loss.divergence}")
    if contrastive and loss.temperature == "auto" and not options.needs_reference:
        raise UserError(f"--temperature auto needs a reference, which {loss.method} has not: give a number like 0.1")
    low, high = loss.temperature_bounds
    if learned and loss.temperature != "auto" and not low <= loss.temperature <= high:
        raise UserError(f"--temperature {loss.temperature} must lie within --temperature-bounds {low} {high}")


def _start(preset: str | None, path: str | None) -> Train:
    """Return where the other options start from."""
    if preset is not None and path is not None:
        raise UserError(f"--preset {preset} and --config {path} both say where to start from: give one of them")
    if preset is not None:
        if preset not in PRESETS:
            raise UserError(f"no preset is called {preset!r}: choose one of {', '.join(PRESETS)}")
        return PRESETS[preset]
    return Train() if path is None else load_config(Path(path))


def _popped(arguments: list[str], flag: str) -> str | None:
    for position, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == flag:
            value = value if equals else "".join(arguments[position + 1 : position + 2])
            del arguments[position : position + (1 if equals else 2)]
            return value
    return None


def load_config(path: Path) -> Train:
    """Return the options that `save_config` wrote, checked as a command line is."""
    try:
        stored = json.loads(path.read_bytes())
        words = list(_as_arguments(Train(), stored))
    except OSError as error:
        raise UserError(f"--config {path} cannot be read ({error.strerror}): name the config.json of a run") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"--config {path} is not the config.json of a run ({error!r}): name one") from error
    return _parsed("train", words, None)


def save_config(path: Path, options: Train) -> None:
    """Write all options, from which `load_config` repeats the run."""
    write_json(path, as_settings(options))


def as_words(options: Train) -> list[str]:
    """Return the command line of ``train`` that gives these options, of which it has those that are not defaults."""
    return list(_as_arguments(Train(), as_settings(options)))


def _as_arguments(defaults: Any, stored: dict[str, Any]) -> Iterator[str]:
    """Yield the words of the command line that gives these options."""
    fields = {each.name: getattr(defaults, each.name) for each in dataclasses.fields(defaults)}
    if strange := stored.keys() - fields.keys():
        raise UserError(f"the configuration has the unknown option {min(strange)}: it is of another version")
    for name, value in stored.items():
        flag = name.replace("_", "-")
        if value == _as_setting(fields[name]):
            continue
        if isinstance(value, str) and "/" in value and not Path(value).exists() and (_CHECKOUT / value).exists():
            value = _CHECKOUT / value  # which `as_settings` has made relative
        if dataclasses.is_dataclass(fields[name]):
            yield from _as_arguments(fields[name], value)
        elif isinstance(value, bool):
            yield f"--{flag}" if value else f"--no-{flag}"
        elif isinstance(value, list):
            yield from (f"--{flag}", *map(str, value))
        else:
            yield from (f"--{flag}", str(value))


def _first_message(framed: str) -> str:
    """Return the sentence in tyro's framed message: what stands between the title and the next rule."""
    body = [line.strip(" │╭╮╰╯") for line in framed.splitlines()[1:]]
    is_rule = [re.fullmatch("[─ -]*", line) is not None for line in body]
    first = is_rule.index(False) if False in is_rule else 0
    last = is_rule.index(True, first) if True in is_rule[first:] else len(body)
    return " ".join(" ".join(body[first:last]).split()).rstrip(".")


def as_settings(options: Any) -> dict[str, Any]:
    """Return options as JSON's types; a path within the checkout as one relative to it."""
    return {key: _as_setting(value) for key, value in vars(options).items()}


def _as_setting(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value.relative_to(_CHECKOUT) if value.is_relative_to(_CHECKOUT) else value)
    if isinstance(value, tuple):
        return [_as_setting(part) for part in value]
    return as_settings(value) if dataclasses.is_dataclass(value) else value
