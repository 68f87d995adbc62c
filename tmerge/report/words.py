"""A report in words: each sentence and each way of writing a number is here once, for terminal, page, card and app."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from tmerge.evaluation import Verdict
from tmerge.report.measured import carried_words
from tmerge.report.parts import Fusion, Measured, ReconstructionFit, SeveralSource
from tmerge.report.report import Adaptation, Alone, Kept, Report
from tmerge.report.several import join_words, listed_words
from tmerge.report.transport import Relatedness, Transport

__all__ = [
    "Tone",
    "alone_words",
    "alpha_words",
    "change_words",
    "how_words",
    "in_place_words",
    "interval_words",
    "kept_words",
    "next_words",
    "ratio_heading",
    "is_related",
    "moved_words",
    "ratio_words",
    "relatedness_numbers",
    "relatedness_words",
    "score_words",
    "solved_words",
    "summary",
    "training_summary",
    "verdict_sentence",
    "verdict_tone",
    "verdict_words",
    "written_words",
]

Tone = Literal["helps", "better", "none", "hurts"]
"""How a verdict is shown: its class in every style sheet."""

_CLEAR = 0.9
# From here on neurons correspond by their activations: more than half are found twice alike. Relatives that were
# measured lie at 0.93 and above on texts that both read, at 0.70 on others, and at 0.41 where training had spoilt the
# target; strangers at 0.14 to 0.18 on single tokens and at 0.01 on means over texts (docs/experiments.md).
_RELATED = 0.5


def is_related(measured: Relatedness) -> bool:
    """Whether a merge is worth trying: two models' neurons correspond by their activations, or clearly by weights."""
    return measured.value >= _RELATED or (measured.weights is not None and measured.weights.clear)


def relatedness_numbers(measured: Relatedness) -> str:
    """Its value with its interval, and what chance gives; and so of the weights."""
    interval = "" if measured.ci95 is None else " [{:.2f}, {:.2f}]".format(*measured.ci95)
    numbers, weights = f"{measured.value:.2f}{interval} (by chance {measured.permuted:.2f})", measured.weights
    if weights is None:
        return numbers
    return f"{numbers}, of weights {weights.paired:.2f} (by chance {weights.chance:.2f})"


def relatedness_words(measured: Relatedness) -> str:
    """Whether the two models' neurons correspond, in a sentence."""
    numbers, by_weights = f"Relatedness {relatedness_numbers(measured)}", measured.weights
    if not is_related(measured):
        return (
            f"{numbers}: two halves of the calibration set do not agree on which neuron is which, so these models "
            "share no correspondence that weights could be carried by; train or distil instead (tmerge adapt)"
        )
    if by_weights is not None and by_weights.clear:
        moved = ""
        if (count := by_weights.moved_layers) > 0:
            layers = "1 layer is" if count == 1 else f"{count} layers are"
            moved = f"; {layers} paired otherwise than by activations alone"
        carried = "" if (said := carried_words(by_weights.paired)) is None else f"; {said} (docs/experiments.md)"
        return (
            f"{numbers}: these models' weights are alike, as those of models with a common ancestor are{moved}{carried}"
        )
    sentence = f"{numbers}: these models' neurons correspond, as those of models with a common ancestor do"
    if measured.value < _CLEAR:
        sentence += (
            "; not all were found, and more will be on texts that both models read well (calibration.match_on, by "
            "default the English samples)"
        )
    return sentence


def in_place_words(share: float | None) -> str | None:
    """That nothing was to be put in another order, where that is so."""
    if share is None or share < _CLEAR:
        return None
    counted = "every neuron is" if share == 1 else f"{math.floor(1000 * share) / 10:.1f} % of the neurons are"
    carried = "the plain copy" if share == 1 else "nearly the plain copy"
    return f"{counted} matched with the source's of the same number: what is carried is {carried}"


def solved_words(solved: Transport) -> str:
    """How many problems the transport solved, and how well."""
    if solved.structure == "shared" and solved.matching == "one-to-one":
        by = "activations and weights" if solved.weights else "activations"
        return f"{solved.problems} correspondences, matched one to one by {by}: the residual stream's, each layer's own"
    steps = solved.iterations
    return (
        f"{solved.problems} feature plans, {solved.converged} converged, {steps.median} iterations in the "
        f"median, {steps.max} at most, worst marginal violation {solved.worst_marginal_violation:.1e}"
    )


def kept_words(kept: Kept) -> str:
    """What became of the target where it was to stay as it is."""
    changed = interval_words(kept.difference, signed=True)
    return (
        f"On {kept.texts} texts of {kept.dataset}, on which the target was to stay as it is: {kept.base.value:.4f} "
        f"bits per byte before, {kept.fused.value:.4f} after the merge (95 % interval of the difference {changed}; "
        "lower is better)"
    )


def alone_words(alone: Mapping[str, Alone], sources: Sequence[SeveralSource]) -> str:
    """Whether all together do better than each alone, in a sentence; empty of one source.

    Args:
        alone: Of each.
        sources: Their strengths: what is at 0 is not among those that were joined.
    """
    joined = {name: alone[name] for name in (source.name for source in sources if source.strength) if name in alone}
    if len(joined) < 2:
        return f"Of the sources {next(iter(joined))} alone has a strength above 0" if joined else ""
    like = []
    for name, one in joined.items():
        change = one.fused_minus_alone
        if not change.high < 0:
            like.append(f"{name} ({change_words(change.value)}, 95 % interval {interval_words(change, signed=True)})")
    if not like:
        return "The sources joined do better on these texts than each of them alone"
    return f"These texts do not show that the sources joined do better than alone: {'; '.join(like)}"


def moved_words(
    fusion: Fusion, source_base: str | None, adapter: str | None = None, sources: Sequence[SeveralSource] = ()
) -> str:
    """What of the source, or of several, went into the target."""
    if sources:
        since = source_base or "their common base"
        return f"what {listed_words(sources)} learned since {since}, {join_words(fusion)}"
    if adapter is not None and fusion.what == "task-vector":
        return f"what the adapter {adapter} changes" + (f" of {source_base}" if source_base else "")
    if fusion.what == "task-vector":
        return (
            f"what the source learned since {source_base}" if source_base else "what the source learned since its base"
        )
    if fusion.what == "reconstruct":
        return "what the source's neurons do, fitted to what the target's own read"
    return "the source's weights"


def how_words(fusion: Fusion) -> str:
    """How it was put there: alpha, and the settings of its kind."""
    if fusion.fit is not None:
        rank = "full rank" if fusion.fit.rank is None else f"rank {fusion.fit.rank}"
        kept = (
            f", {fusion.fit.keep_texts} texts of {fusion.fit.keep} kept as they were" if fusion.fit.keep_texts else ""
        )
        held = f"{_ridge_words(fusion.fit)}, {rank}"
        final = "the last block to the source's logits, " if fusion.fit.final_goal == "logits" else ""
        return f"alpha {alpha_words(fusion)}, {held}, {final}{fusion.fit.rows:,} tokens{kept}"
    joined = "" if fusion.join is None else f"{join_words(fusion)}, "
    return f"alpha {alpha_words(fusion)}, {joined}{fusion.scale} scale, units {fusion.units}, top_k {fusion.top_k}"


def _ridge_words(fit: ReconstructionFit) -> str:
    if fit.ridge != "auto":
        return f"ridge {fit.ridge:g}"
    taken = [ridge for ridges in fit.ridges.values() for ridge in ridges]
    if not taken:
        return "ridge auto"
    among = f"{min(taken):g} to {max(taken):g}" if min(taken) < max(taken) else f"{taken[0]:g}"
    return f"ridge {among}, chosen for each fit"


def ratio_heading(fusion: Fusion) -> str:
    """What the norms of a projection's layers are of."""
    what = "change's" if fusion.fit is not None else "transported"
    return f"{what} norm over own norm"


def next_words(report: Report, folder: str = "RUN") -> str:
    """What to try next, where something is known to add to what was done; else empty.

    Args:
        report: Of a run.
        folder: Where the run is.
    """
    if report.fusion.fit is None or report.adaptation is not None or report.verdict == "hurts":
        return ""
    return f"To train a little on top of it: tmerge adapt {folder} --steps 50"


def alpha_words(fusion: Fusion) -> str:
    """A report's alpha in words: ``0.1``, or what ``auto`` chose for each projection or source."""
    if fusion.choice is None:
        return str(fusion.alpha)
    chosen = ", ".join(f"{name} {alpha:g}" for name, alpha in fusion.choice.alpha.items())
    return f"{fusion.alpha} ({chosen})"


def ratio_words(ratios: Sequence[float | None]) -> str:
    """A projection's norm ratios in words: the smallest to the largest of those that there are."""
    known = [ratio for ratio in ratios if ratio is not None]
    return f"{min(known):.2g} to {max(known):.2g}" if known else "undefined: its own are zero"


_VERDICTS: Mapping[Verdict, str] = {
    "helps": "The merge helps",
    "better, but not by the source": "The merge is better than its target, but not by the source",
    "no difference": "The merge makes no difference that these texts can show",
    "hurts": "The merge hurts",
}
_MEANS: Mapping[Verdict, str] = {"hurts": "the fused model is worse than the target it was made from"}
_TONES: Mapping[Verdict, Tone] = {
    "helps": "helps",
    "better, but not by the source": "better",
    "no difference": "none",
    "hurts": "hurts",
}


def verdict_words(verdict: Verdict) -> str:
    """A verdict on a merge in a few words."""
    return _VERDICTS[verdict]


def verdict_sentence(verdict: Verdict) -> str:
    """A verdict on a merge with what it means, without a full stop."""
    return f"{_VERDICTS[verdict]}: {_MEANS[verdict]}" if verdict in _MEANS else _VERDICTS[verdict]


def verdict_tone(verdict: Verdict) -> Tone:
    """Which of four colours and signs a verdict is shown in."""
    return _TONES[verdict]


def summary(report: Report) -> str:
    """The verdict as a sentence with its number and interval, and what else does as well."""
    change = report.evaluation.difference
    numbers = f"{change_words(change.value)} bits per byte on {report.evaluation.texts} held-out texts"
    interval = f"95 % interval {interval_words(change, signed=True)}"
    return f"{verdict_sentence(report.verdict)}: {numbers} ({interval}; lower is better).{_caution(report)}"


def _caution(report: Report) -> str:
    """Which controls the merge is not clearly better than, where it is better than the target.

    A report from before there was a verdict of this kind says that it helps; the controls are told of there too.
    """
    if report.verdict not in ("helps", "better, but not by the source"):
        return ""
    gains: list[str] = []
    like: list[str] = []
    for name, control in report.evaluation.controls.items():
        if not control.fused_minus_control.high < 0:
            group = gains if control.difference.high < 0 else like
            group.append(f"{name} ({change_words(control.difference.value)})")
    if not gains and not like:
        return ""
    told = f"the merge cannot be told from {', '.join(like)}"
    if not gains:
        return f" But these texts do not show that it is the source's knowledge that helps: {told}."
    more = f", and {told}" if like else ""
    listed = ", ".join(gains)
    return f" But as far as these texts show, it is not the source's knowledge that helps: {listed} gain as much{more}."


def training_summary(report: Report) -> str:
    """What training on top of the merge did; empty where there was none."""
    adaptation, adapted = report.adaptation, report.evaluation.adapted
    if adaptation is None or adapted is None:
        return ""
    data = adaptation.data
    among = f" (those of {data.kept} texts of {data.kept_dataset} among them)" if data.kept else ""
    return (
        f"{len(adaptation.loss_curve)} steps of {adaptation.objective} over {adaptation.tokens:,} tokens{among}, "
        f"{_transported_words(report, adaptation)}. Against the target: {adapted.difference.value:+.4f} bits per byte "
        f"(95 % interval {interval_words(adapted.difference, signed=True)}); against the merge before training: "
        f"{adapted.difference_to_fused.value:+.4f} ({interval_words(adapted.difference_to_fused, signed=True)})."
    )


def _transported_words(report: Report, adaptation: Adaptation) -> str:
    """What a training did with what was transported, and at which strength, where that is not the merge's."""
    strengths, sources = adaptation.alpha, report.sources
    each_at = strengths if isinstance(strengths, Mapping) else {"": strengths}
    if not any(each_at.values()):
        return "with nothing of what was transported (strength 0)"
    merged = {each.name: each.strength for each in sources} if sources else report.fusion.alpha_used
    at = ""
    if strengths != merged:
        at = f" (at strength {', '.join(f'{name} {value:g}'.strip() for name, value in each_at.items())})"
    if adaptation.residual != "frozen" and not adaptation.lora_rank:
        return f"what was transported{at} trained as well"
    # Beside a low rank all of the model stands still; else a residual is held beside projections alone.
    but = ", but for embeddings and norms" if report.fusion.stream and not adaptation.lora_rank else ""
    return f"what was transported{at} held fixed{but}"


def written_words(release: str | None, licence_files: Sequence[str], source_licence_files: Sequence[str]) -> list[str]:
    """What a reader of a run's folder has to know of the checkpoint or adapter in it, a line each.

    Args:
        release: The first ``transformers`` that reads it; None where it need not be said.
        licence_files: Of the target, beside the weights.
        source_licence_files: Of what was merged into it.
    """
    words = []
    if release is not None:
        words.append(
            f"reads with transformers {release} or later: earlier releases do not know this architecture, or read a "
            "config that today's wrote in another way"
        )
    if licence_files:
        words.append(f"the target's licence files lie beside the weights: {', '.join(licence_files)}")
    if source_licence_files:
        words.append(f"the licence files of what was merged into it go with it: {', '.join(source_licence_files)}")
    return words


def score_words(value: float) -> str:
    """A score to four digits: ``2.9512``."""
    return f"{value:.4f}"


def change_words(value: float) -> str:
    """A difference of scores to four digits, with its sign: ``-0.0123``."""
    return f"{value:+.4f}"


def interval_words(measured: Measured, *, signed: bool = False) -> str:
    """A 95 % interval: ``2.9412 to 2.9620``; of a difference with signs."""
    words = change_words if signed else score_words
    return f"{words(measured.low)} to {words(measured.high)}"
