"""What was claimed, what is measured here, and whether it reproduces: every verdict is computed from the results.

``python paper_figures/claims.py`` rewrites the table of ``README.md`` here and the headlines of the main one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from experiments.clip.cli.options import Captions
from experiments.clip.study.grid import (
    ADDED_SEEDS,
    AT_LONGER,
    BEST,
    BUDGETS,
    CAPTIONS,
    HALF,
    LONGER,
    NEAR,
    ON_HALF,
    SCHEDULED,
    SEEDS,
    SELECTING,
    WITH_DISTILLATION,
    TunedKey,
    edges,
    tuning_of,
)
from experiments.clip.study.intervals import Interval, half_width
from experiments.clip.study.results import Row
from experiments.clip.study.settings import DIVERGENCE, TWIN
from experiments.clip.study.statistics import (
    DataSaved,
    PairedDifference,
    Rule,
    compare_exponents,
    data_saved,
    paired_difference,
    paired_ratio,
    power_law_fit,
)
from paper_figures import scheduled
from paper_figures.study_results import (
    ALL_FRACTIONS,
    COMMAND,
    FEWEST,
    NAMES,
    OURS,
    REFERENCES,
    STEERED,
    TOP1,
    UNSTEERED,
    Array,
    NotMeasured,
    Results,
    Seeds,
    headline_of,
    paired,
    published,
    values,
)

HERE = Path(__file__).parent
PAGES = (HERE / "README.md", HERE.parent / "README.md")
BEGIN, END = "<!-- claims: written by paper_figures/claims.py -->", "<!-- end of claims -->"

#: Topics whose first row is on the main page; and of each the row that asks more, by place, and what it says in short.
HEADLINES = {
    "weak to strong": (1, "the first target above its twin"),
    "above the baselines": (1, "DRRho-CLIP above JEST that trains on as many pairs"),
    "scaling law": (2, "the exponent steeper than the twin's"),
}
_INTERVAL = r"[-+.\d]+( points)? \[[^]]*\]"

TOLERANCE = -0.5  # points that half of the data may cost
TWICE, SURELY_ABOVE = 2.0, 1.5
VARIANCE_BELOW = 0.75
LEVELS_NEEDED, SPAN_NEEDED, PROBABILITY_NEEDED = 4, 30.0, 0.95
BEYOND = "beyond the paper"
_ABOVE = "above the baselines"
LEARNED = "fastclip-v3"  # the published FastCLIP, which learns its temperature
EQUAL_SAMPLES = 0.02  # by how much trainings of equal length may differ: a last batch
RULES: dict[Rule, str] = {"best-of-bins": "best of five log-spaced bins", "all": "all points"}

Verdict = Literal["yes", "no", "not measured yet"]


class Claim(NamedTuple):
    """A claim, what was published, what is measured here with intervals, whether it holds, and what measures it."""

    topic: str
    claim: str
    published: str
    ours: str
    verdict: Verdict
    command: str


class Judged(NamedTuple):
    """A measurement in words, and whether it meets the claim."""

    ours: str
    holds: bool


def claims(results: Results) -> list[Claim]:
    """Return all claims in the order of the page."""
    known = published()
    return [
        *_weak_to_strong(results, known),
        *_data_efficiency(results, known),
        *_baselines(results, known),
        *_variants(results),
        *_longer(results),
        *_poor_captions(results),
        *_variance(results, known),
        *_scaling(results, known),
        *_beyond(results),
        *_scheduled(results),
        *_past_edges(results),
    ]


def _judge(topic: str, claim: str, published: str, measure: Callable[[], Judged], studies: Iterable[str]) -> Claim:
    command = f"`{COMMAND} {' '.join(dict.fromkeys(studies))}`"
    try:
        ours, holds = measure()
    except NotMeasured:
        return Claim(topic, claim, published, "not measured yet", "not measured yet", command)
    return Claim(topic, claim, published, ours, "yes" if holds else "no", command)


def points(found: PairedDifference) -> str:
    """Return a difference in percent points with both intervals."""
    t, bootstrap = found.t, found.bootstrap
    return (
        f"{t.mean:+.2f} points [{t.low:+.2f}, {t.high:+.2f}], "
        f"bootstrap [{bootstrap.low:+.2f}, {bootstrap.high:+.2f}], {found.n} seeds"
    )


def _difference(a: Array, b: Array, above: float = 0.0, comparisons: int = 1) -> Judged:
    """Compare a difference's lower limits, of both intervals, with what they must be above.

    For one of several comparisons that answer one question, also say whether it holds when 95 % is to hold for all of
    them at once (Bonferroni).
    """
    found = paired_difference(a, b)
    holds = min(found.t.low, found.bootstrap.low) > above
    words = ""
    if holds and comparisons > 1:
        surely = "also" if found.mean - half_width(a - b, 1 - 0.05 / comparisons) > above else "not"
        words = f"; {surely} if 95 % are to hold for all {comparisons} comparisons at once"
    return Judged(points(found) + words, holds)


def _compare(
    steered: Callable[[], Seeds], other: Callable[[], Seeds], equal: str = "samples_trained", comparisons: int = 1
) -> Judged:
    """Compare two methods' trainings, seed by seed, that are equal in the field ``equal``."""
    a, b = steered(), other()
    equal_samples(a, b, equal)
    return _difference(*paired(a, b), comparisons=comparisons)


def _between(found: Interval, digits: int = 2) -> str:
    return f"{found.mean:.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]"


def _weak_to_strong(results: Results, known: dict[str, Any]) -> Iterator[Claim]:
    target, reference = known["teaser"]["target"]["imagenet_top1"], known["teaser"]["reference"]["imagenet_top1"]
    fastclip = known["table_1"]["imagenet_top1"]["fastclip"][0]

    over = f"{target - reference:+.2f} points (ImageNet, {target} over {reference})"
    over_v3 = f"{target - fastclip:+.2f} points (ImageNet, {target} over {fastclip} of {NAMES[LEARNED]})"
    words = {
        "drrho": ("the steered target", "its twin", over, over_v3),
        DIVERGENCE: (f"the target of {NAMES[DIVERGENCE]},", "the twin of DRRho-CLIP", "", ""),
    }
    for (method, longer), captions in product((("drrho", True), ("drrho", False), (DIVERGENCE, True)), NEAR):
        if longer:
            reference, studies = NEAR[captions], ("references", "weak-to-strong")
            steered, twin = (partial(results.near, name, captions) for name in (method, TWIN))
        else:
            reference, studies = "weak", ("references", "headline", "reference-quality")
            steered, twin = partial(results.steered, reference, captions), partial(results.method, TWIN, captions)

        def over_reference(reference: str = reference, steered: Callable[[], Seeds] = steered) -> Judged:
            own = 100 * float(results.reference(reference)[TOP1])
            found = steered()
            judged = _difference(values(found), np.full(len(found), own))
            return Judged(f"{judged.ours}; reference {own:.1f} %; target at {_setting(found)}", judged.holds)

        def over_twin(steered: Callable[[], Seeds] = steered, twin: Callable[[], Seeds] = twin) -> Judged:
            judged = _compare(steered, twin)
            return Judged(f"{judged.ours}; twin at {_setting(twin())}", judged.holds)

        steered_target, twin_of_it, *of_paper = words[method]
        where = f"{captions} captions" + (f", {LONGER} times as many pairs seen" if longer else "")
        rows = (
            (f"{steered_target} surpasses its reference, {REFERENCES[reference]} ({where})", over_reference),
            (f"... and {twin_of_it} without reference, {NAMES[TWIN]} ({where})", over_twin),
        )
        for (claim, measure), theirs in zip(rows, of_paper, strict=True):
            yield _judge("weak to strong", claim, theirs, measure, studies)


def _setting(trainings: Seeds) -> str:
    return next(iter(trainings.values()))["setting"]


def _data_efficiency(results: Results, known: dict[str, Any]) -> Iterator[Claim]:
    on_half = [(method, captions) for captions, methods in ON_HALF.items() for method in methods]
    for method, captions in (*product(("drrho", WITH_DISTILLATION), ("clean", "swapped")), *on_half):

        def half(baseline: str, method: str = method, captions: str = captions) -> Judged:
            share, full = results.share(method, captions, HALF), results.method(baseline, captions)
            equal_samples(share, full)
            judged = _difference(*paired(share, full), TOLERANCE)
            return Judged(judged.ours + _chosen_from(share), judged.holds)

        def saved(method: str = method, captions: str = captions) -> Judged:
            found, own = (data_saved(*shares(results, who, captions)) for who in (method, TWIN))
            more = f"; not met in {100 * found.more_than_all:.0f} % of the draws" if found.more_than_all else ""
            words = f"{_fraction(found)} of the data{more}; {NAMES[TWIN]} itself meets it with {_fraction(own)}"
            return Judged(words, found.fraction.high <= HALF)

        name = f"{NAMES[method]} ({captions} captions)"
        for baseline in (LEARNED, TWIN):  # the published one first: the main page shows it
            yield _judge(
                "data efficiency",
                f"{name} on 50 % of the data is at least as good as {NAMES[baseline]} on 100 %, "
                f"to within {-TOLERANCE:g} points",
                "comparable (figure 3, no numbers)" if (method, baseline) == ("drrho", LEARNED) else "",
                partial(half, baseline),
                ("headline", headline_of(baseline), "fractions"),
            )
        if (method, captions) in on_half:  # no smaller share is measured
            continue
        yield _judge(
            "data efficiency",
            f"{name} meets {NAMES[TWIN]}'s 100 % with half of the data or less",
            "",
            saved,
            ("headline", "fractions"),
        )


def _fraction(found: DataSaved) -> str:
    fraction, note = found.fraction, found.note
    words = f"{note} {fraction.mean:.3g}" if note == "at most" else note or f"{fraction.mean:.3f}"
    ends = (f"{end:.3f}" if np.isfinite(end) else "more than 1" for end in fraction[1:])
    return f"{words} [{', '.join(ends)}]"


def shares(results: Results, method: str, captions: str) -> tuple[Array, Array, Array]:
    """Return shares [k] of the pairs, a method's scores [k, seeds] on them, the twin's [seeds] on all."""
    cells = [results.share(method, captions, fraction) for fraction in ALL_FRACTIONS]
    twin = results.method(TWIN, captions)
    common = set.intersection(*(set(cell) for cell in (*cells, twin)))
    steered = np.stack([values({seed: cell[seed] for seed in common}) for cell in cells])
    return np.array(ALL_FRACTIONS), steered, values({seed: twin[seed] for seed in common})


def _baselines(results: Results, known: dict[str, Any]) -> Iterator[Claim]:
    table = known["table_1"]["imagenet_top1"]
    own = {
        "jest": "jest",
        "jest-top-k": "jest_topk",
        LEARNED: "fastclip",
        TWIN: "",
        "openclip": "openclip",
        "siglip": "",
        "distillation": "mobileclip_distillation",
    }
    for method, column in own.items():
        steered = "drrho-distillation" if method == "distillation" else "drrho"
        theirs = table["drrho_clip_distillation" if method == "distillation" else "drrho_clip"]
        differences = [a - b for a, b in zip(theirs, table[column], strict=True)] if column else []
        for captions in CAPTIONS:
            ours, trained = (partial(results.method, each, captions) for each in (steered, method))
            name = f"{NAMES[steered]} above {NAMES[method]}"
            of_paper = ""
            if differences and captions == "clean":
                of_paper = f"{min(differences):+.2f} to {max(differences):+.2f} points (ImageNet, three references)"
            if method in SELECTING:  # published by pairs scored
                equally = f"{name} that scores as many pairs ({captions} captions)"
                measure = partial(_compare, ours, partial(results.scored, method, captions), "samples_scored")
                yield _judge(_ABOVE, equally, of_paper, measure, ("headline", "tuning-scored", "scored"))
                name, of_paper = f"{name} that trains on as many pairs", ""
            measure = partial(_compare, ours, trained)
            yield _judge(_ABOVE, f"{name} ({captions} captions)", of_paper, measure, ("headline", headline_of(method)))
    for method in (TWIN, "openclip"):
        for seeds, which in (
            (SEEDS, "only the seeds that were fixed before"),
            (ADDED_SEEDS, "only the seeds that were added when the first were seen"),
        ):
            pair = (partial(_of_seeds, results, each, seeds) for each in ("drrho", method))
            words = f"DRRho-CLIP above {NAMES[method]} (clean captions), {which}"
            yield _judge(_ABOVE, words, "", partial(_compare, *pair), ("headline",))


def _variants(results: Results) -> Iterator[Claim]:
    """Compare variants of DRRho-CLIP with their twins, and with what is published."""
    ahead = (
        ("drrho-learned", LEARNED),
        *((DIVERGENCE, other) for other in ("fastclip-chi-square", LEARNED, "openclip")),
        *((BEST, other) for other in ("jest", "jest-top-k", LEARNED, "openclip")),
    )
    for (method, other), captions in product(ahead, CAPTIONS):
        pair = (partial(results.method, each, captions) for each in (method, other))
        words = f"{NAMES[method]}, above {NAMES[other]} that trains on as many pairs ({captions} captions)"
        measure = partial(_compare, *pair, comparisons=len(ahead) * len(CAPTIONS))
        yield _judge(_ABOVE, words, "", measure, ("headline", headline_of(method)))
    for captions in CAPTIONS:
        pair = partial(results.scored, BEST, captions), partial(results.method, "drrho", captions)
        name = f"{NAMES[BEST]} that scores as many pairs as DRRho-CLIP"
        words = f"{name}, and trains on fewer, above it ({captions} captions)"
        measure = partial(_compare, *pair, "samples_scored")
        yield _judge(_ABOVE, words, "", measure, ("headline", "tuning-scored", "scored"))


def _longer(results: Results) -> Iterator[Claim]:
    """Compare methods at `LONGER` times the budget, and with those the best at the usual one, at as many operations."""
    for captions, methods in AT_LONGER.items():
        longer = {each: partial(results.need, "longer", method=each, captions=captions) for each in methods}
        for method, other in product(("drrho", DIVERGENCE), (LEARNED, TWIN)):
            words = f"{NAMES[method]} above {NAMES[other]}, {LONGER} times as many pairs seen ({captions} captions)"
            yield _judge(_ABOVE, words, "", partial(_compare, longer[method], longer[other]), ("longer",))
        for method in methods:
            name = f"{NAMES[BEST]} above {NAMES[method]} that takes as many operations"
            words = f"{name}, training on {LONGER} times as many pairs ({captions} captions)"
            measure = partial(_compare_of_operations, partial(results.method, BEST, captions), longer[method])
            yield _judge(_ABOVE, words, "", measure, ("longer", headline_of(BEST)))


def _compare_of_operations(steered: Callable[[], Seeds], other: Callable[[], Seeds]) -> Judged:
    """Compare a method with one that must not take fewer operations, and say how many more it takes."""
    a, b = steered(), other()
    first, second = (float(next(iter(side.values()))["gflops"]) for side in (a, b))
    if second < first:
        raise ValueError(f"{second:g} GFLOP of a baseline are fewer than the {first:g} that it is compared with")
    judged = _difference(*paired(a, b))
    return Judged(f"{judged.ours}; the baseline takes {second / first:.2f} times the operations", judged.holds)


def _of_seeds(results: Results, method: str, seeds: Iterable[int]) -> Seeds:
    """Return a method's trainings on clean captions of these seeds."""
    found = {seed: row for seed, row in results.method(method, "clean").items() if seed in seeds}
    if len(found) < FEWEST:
        raise NotMeasured("headline", f"{method} of other seeds")
    return found


def equal_samples(a: Seeds, b: Seeds, field: str = "samples_trained") -> None:
    """Refuse to compare trainings that did not train on equally many pairs, or did not score as many."""
    first, second = (float(next(iter(side.values()))[field]) for side in (a, b))
    if abs(first - second) > EQUAL_SAMPLES * max(first, second):
        raise ValueError(f"trainings whose {field} are {first:g} and {second:g} are compared as if they were equal")


def _poor_captions(results: Results) -> Iterator[Claim]:
    for captions in ("vague", "swapped"):

        def over_best(steered: str, captions: str = captions) -> Judged:
            others = {name: results.method(name, captions) for name in UNSTEERED}
            return _ratio(results.method(steered, captions), others, NAMES[steered])

        def best_over_best(over_best: Callable[[str], Judged] = over_best, captions: str = captions) -> Judged:
            # Chosen on another split than the one that the ratio is of.
            validation = {name: values(results.method(name, captions), "validation_top1").mean() for name in STEERED}
            return over_best(max(validation, key=lambda name: validation[name]))

        for who, measure in (
            *((NAMES[method], partial(over_best, method)) for method in ("drrho", WITH_DISTILLATION)),
            ("the method with a reference that is best on the validation split", best_over_best),
        ):
            yield _judge(
                "poor captions",
                f"{captions} captions: {who} has at least twice the naming accuracy of the best method without "
                f"reference, the ratio's lower limit above {SURELY_ABOVE}",
                "",
                measure,
                ("headline", "headline-more"),
            )

        for method in ("drrho", WITH_DISTILLATION, DIVERGENCE) if captions in AT_LONGER else ():
            others = [name for name in AT_LONGER[captions] if name in UNSTEERED]

            def longer(method: str = method, captions: str = captions, others: Sequence[str] = others) -> Judged:
                own = {n: results.need("longer", method=n, captions=captions) for n in (method, *others)}
                return _ratio(own.pop(method), own, NAMES[method])

            yield _judge(
                "poor captions",
                f"{captions} captions, {LONGER} times as many pairs seen: {NAMES[method]} has at least twice the "
                f"naming accuracy of the best of {', '.join(NAMES[name] for name in others)}",
                "",
                longer,
                ("longer",),
            )


def _ratio(steered: Seeds, others: dict[str, Seeds], name: str) -> Judged:
    """Compare a method's score with the best of others'."""
    best = max(others, key=lambda other: values(others[other]).mean())
    a, b = paired(steered, others[best])
    found = paired_ratio(a, b)
    words = f"{name}: {_between(found)} times {NAMES[best]}'s {b.mean():.1f} %, {len(b)} seeds{_chosen_from(steered)}"
    return Judged(words, found.mean >= TWICE and found.low > SURELY_ABOVE)


def _chosen_from(trainings: Seeds) -> str:
    """Say of a selection how many pairs its own are chosen from; of other methods, nothing."""
    chosen, given = (float(next(iter(trainings.values()))[f"samples_{what}"]) for what in ("trained", "scored"))
    times = round(given / chosen)
    return f"; trained on as many pairs, chosen from {times} times as many" if times > 1 else ""


def variance_ratio(trainings: Seeds, side: str) -> Interval:
    """Return Var(l - l_ref) / Var(l) over the negatives at the end of training, with Fieller's interval over seeds."""
    excess, losses = (values(trainings, f"variance_of_{name}/{side}", percent=False) for name in ("excess", "losses"))
    return paired_ratio(excess, losses)


def _variance(results: Results, known: dict[str, Any]) -> Iterator[Claim]:
    theirs = known["variance"]
    ratio = theirs["rho_loss"] / theirs["loss"]
    for reference in ("shipped", "equal", "weak"):
        for captions in CAPTIONS if reference == "shipped" else ("clean", "swapped"):

            def below(reference: str = reference, captions: str = captions) -> Judged:
                trainings = results.steered(reference, captions)
                found = {side: variance_ratio(trainings, side) for side in ("image", "text")}
                words = ", ".join(f"{side} {_between(ratio)}" for side, ratio in found.items())
                return Judged(f"{words}, {len(trainings)} seeds", max(r.high for r in found.values()) < VARIANCE_BELOW)

            yield _judge(
                "less variance",
                f"Var(l - l_ref) / Var(l) below {VARIANCE_BELOW} on both sides, {REFERENCES[reference]} reference "
                f"({captions} captions)",
                f"{ratio:.2f} (image side, {theirs['reference']})" if captions == "clean" else "",
                below,
                ("headline",) if reference == "shipped" else ("reference-quality",),
            )


def _scaling(results: Results, known: dict[str, Any]) -> Iterator[Claim]:
    law = known["scaling_law"]
    theirs = f"{law['drrho_clip']['exponent']} against {law['openclip']['exponent']} (best of bins)"
    # The published baseline, then what tells the reference's part from the loss's: the twin.
    for method, baseline in (
        ("drrho", "openclip"),
        ("drrho", TWIN),
        (WITH_DISTILLATION, "openclip"),
        (WITH_DISTILLATION, TWIN),
    ):
        for rule, rule_name in RULES.items():
            steeper = f"{NAMES[method]}'s exponent of error against compute is steeper than {NAMES[baseline]}'s"
            of_paper = theirs if (method, baseline, rule) == ("drrho", "openclip", "best-of-bins") else ""

            def exponent(method: str = method, baseline: str = baseline, rule: Rule = rule) -> Judged:
                both = method, baseline
                compute, errors, _ = results.scaling(both)
                fits = [results.power_law(compute[name], errors[name], rule) for name in both]
                probability = compare_exponents(*fits).probability_less
                by_seed = paired_difference(*(seed_exponents(compute[n], errors[n], rule) for n in both))
                levels = len(np.unique(compute[method].round(3)))
                span = compute[method].max() / compute[method].min()
                own, other = (_between(fit.exponent, 3) for fit in fits)
                words = (
                    f"{own} against {other}, steeper in {100 * probability:.1f} % of the draws; difference by seed "
                    f"{_between(by_seed.t, 3)}; {levels} levels over {span:.0f}x, {by_seed.n} seeds"
                )
                enough = levels >= LEVELS_NEEDED and span >= SPAN_NEEDED
                return Judged(words, enough and probability >= PROBABILITY_NEEDED and by_seed.t.high < 0)

            yield _judge("scaling law", f"{steeper} ({rule_name})", of_paper, exponent, ("scaling",))


def seed_exponents(compute: Array, errors: Array, rule: Rule) -> Array:
    """Return the exponent that each seed's errors give alone."""
    return np.array([power_law_fit(compute, own[:, None], rule, replicates=1).exponent.mean for own in errors.T])


def _beyond(results: Results) -> Iterator[Claim]:
    for method in OURS:
        for captions in CAPTIONS:
            pair = (partial(results.method, name, captions) for name in (method, "drrho"))
            also = ", which is in the paper too" if method == "drrho-distillation" else ""
            yield _judge(
                BEYOND,
                f"{NAMES[method]}{also}, above DRRho-CLIP as published ({captions} captions)",
                "",
                partial(_compare, *pair, comparisons=len(OURS) * len(CAPTIONS)),
                ("headline", headline_of(method)),
            )


def _scheduled(results: Results) -> Iterator[Claim]:
    """Judge the scheduled coefficient: it must not cost points, and help where a constant one surely does."""
    topic, studies = "steering that does not hurt", (scheduled.STUDY,)
    for reference, epochs in product(REFERENCES, BUDGETS):
        where = f"reference {REFERENCES[reference]}, {epochs} passes"

        def within(reference: str = reference, epochs: int = epochs) -> Judged:
            found = scheduled.gain(results, SCHEDULED, reference, epochs)
            return Judged(_gain_in_words(found), found.gain.mean >= scheduled.TOLERANCE)

        def helps(reference: str = reference, epochs: int = epochs) -> Judged:
            ours, constant = (scheduled.gain(results, each, reference, epochs) for each in (SCHEDULED, "drrho"))
            return Judged(f"constant {_gain_in_words(constant)}; scheduled {_gain_in_words(ours)}", ours.gain.low > 0)

        words = (
            f"the mean of the scheduled coefficient is at most {-scheduled.TOLERANCE} points below the twin's ({where})"
        )
        yield _judge(topic, words, "", within, studies)
        if _constant_helps(results, reference, epochs):
            words = f"... and above it, lower limit above 0, as the tuned constant one is ({where})"
            yield _judge(topic, words, "", helps, studies)


def _constant_helps(results: Results, reference: str, epochs: int) -> bool:
    """Return whether the constant coefficient is surely above the twin, or not measured yet."""
    try:
        return scheduled.gain(results, "drrho", reference, epochs).gain.low > 0
    except NotMeasured:
        return True


def _gain_in_words(found: scheduled.Gain) -> str:
    mean, low, high = found.gain
    return f"{mean:+.2f} points [{low:+.2f}, {high:+.2f}], {found.seeds} seeds, twin {found.twin:.1f} %"


def _past_edges(results: Results) -> Iterator[Claim]:
    """Compare tuned settings at an edge of what was tried with those one step past it, one training each."""
    past: dict[tuple[str, Captions], list[str]] = {}
    for cell in edges(results.tuned):
        past.setdefault((cell.method, cell.train.data.captions), []).append(cell.setting)
    for (method, captions), settings in past.items():
        labels = {"method": method, "captions": captions}
        own = results.tuned[TunedKey(tuning_of(method), captions, method)]
        tuned = partial(results.one, tuning_of(method), **labels, setting=own.name)
        others = [partial(results.one, "edges", **labels, setting=setting) for setting in settings]
        yield _judge(
            "tuning",
            f"{NAMES[method]} ({captions} captions) is not better one step past the edge of what tuning tried",
            "",
            partial(_not_better, tuned, others),
            (tuning_of(method), "edges"),
        )


def _not_better(tuned: Callable[[], Row], others: Iterable[Callable[[], Row]]) -> Judged:
    rows = [tuned(), *(other() for other in others)]
    scores = [100 * float(row["validation_top1"]) for row in rows]
    words = [f"{score:.1f} % at {row['setting']}" for score, row in zip(scores, rows, strict=True)]
    own = f"{words[0]}; past the edge {', '.join(words[1:])} (validation pairs, 1 seed)"
    return Judged(own, scores[0] >= max(scores))


def table(rows: Iterable[Claim]) -> str:
    """Return the table of the figures' page: all rows, and of each topic how many of them hold."""
    lines = ["| claim | published | ours, with 95 % intervals | reproduced | command |", "|---|---|---|---|---|"]
    for topic, own in by_topic(rows).items():
        lines.append(f"| **{topic}** | | | {how_many_hold(own)} | |")
        for row in own:
            lines.append(f"| {' | '.join((row.claim, row.published or '-', row.ours, row.verdict, row.command))} |")
    return "\n".join(lines)


def by_topic(rows: Iterable[Claim]) -> dict[str, list[Claim]]:
    """Return the rows of each topic, in the order in which topics come first."""
    topics: dict[str, list[Claim]] = {}
    for row in rows:
        topics.setdefault(row.topic, []).append(row)
    return topics


def how_many_hold(rows: Sequence[Claim]) -> str:
    """Say how many rows hold, of those that are measured."""
    measured = [row for row in rows if row.verdict != "not measured yet"]
    held = f"{sum(row.verdict == 'yes' for row in measured)} of {len(measured)}" if measured else "none measured"
    left = len(rows) - len(measured)
    return f"{held}, {left} not measured yet" if measured and left else held


def headlines(rows: Sequence[Claim]) -> str:
    """Return the table of the main page, what asks more than its rows, and how many of all rows hold."""
    topics = by_topic(rows)
    lines = ["| claim | published | ours, with 95 % intervals | reproduced |", "|---|---|---|---|"]
    asking_more = []
    for topic, (place, words) in HEADLINES.items():
        first, more = topics[topic][0], topics[topic][place]
        lines.append(f"| {first.claim} | {first.published or '-'} | {briefly(first.ours)} | {first.verdict} |")
        asking_more.append(f"{words}, {_difference_of(more.ours)}: {more.verdict}")
    of_paper = how_many_hold([row for row in rows if row.published])
    lines += ["", f"What asks more: {'; '.join(asking_more)}."]
    return "\n".join([*lines, f"Rows that hold: {of_paper} of those published, {how_many_hold(rows)} of all."])


def briefly(ours: str) -> str:
    """Return a measurement without its second interval and settings."""
    ours = re.sub(r", bootstrap \[[^]]*\]|, steeper in [.\d]+ % of the draws", "", ours)
    return "; ".join(part for part in ours.split("; ") if " at " not in part)


def _difference_of(ours: str) -> str:
    """Return the difference that a measurement speaks of first: by seed, where it compares two fits."""
    found = re.search(rf"(?<=difference by seed ){_INTERVAL}", ours) or re.match(_INTERVAL, ours)
    return found[0] if found else ours


def with_table(page: str, text: str) -> str:
    """Return a page with what stands between its marks replaced."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the page has no {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def pages(results: Results) -> dict[Path, str]:
    """Return both pages with tables of these results."""
    rows = claims(results)
    texts = (table(rows), headlines(rows))
    return {path: with_table(path.read_text(), text) for path, text in zip(PAGES, texts, strict=True)}


if __name__ == "__main__":
    for path, text in pages(Results()).items():
        path.write_text(text)
        print(path)
