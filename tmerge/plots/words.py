"""A report in words and table rows: what the page says besides its pictures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tmerge.quantities import count_words
from tmerge.report import (
    Evaluation,
    Report,
    Transport,
    alpha_words,
    how_words,
    interval_words,
    moved_words,
    next_words,
    ratio_words,
    relatedness_numbers,
    score_rows,
    strength_words,
    verdict_sentence,
)

__all__ = ["CAPTIONS", "facts", "findings", "model_rows", "ratio_rows", "score_cells"]

# Below this, more than nine tenths of what fusing does to a neuron is to make it smaller.
_MOSTLY_SHRINKING = 0.1
_NOTHING = 1e-6

CAPTIONS = {
    "loss": "How to read it: the objective's own value at each step, over the texts of that step.",
    "scores": "How to read it: bits per byte is what a model needs, on average, for each byte of text it has not seen. "
    "The upper intervals are wide because texts differ in difficulty; the lower panel compares text by text. A "
    "difference whose interval leaves out zero is one that these texts show.",
    "fit": "How to read it: each projection was changed so that it gives, from what it reads, what its counterparts "
    "give in the source; 1 is as far off as giving nothing. Where a solid line lies far below its dotted one, the "
    "target could take it over; where they meet, what the projection reads does not tell what it should give.",
    "norms": "How to read it: the norm of what was carried over from the source, divided by the norm of the neurons it "
    "is mixed into. Fusing weights with strength alpha takes alpha of the target's own away and gives alpha of the "
    "transported back: far below 1 the neurons mostly become smaller, and 1e-9 means nothing but shrinking. A task "
    "vector is added, and takes nothing away.",
    "coupling": "The paper's Figure 7. How to read it: a row is a target layer; colours say how much more or less than "
    "an even share it takes from each source layer. A bright diagonal means that layers at like depth match; an "
    "even row, that all source layers fit it equally well. Dots mark the source layers that were fused.",
    "flow": "How to read it: every target layer, right, takes one full width. A source layer that is tall, left, feeds "
    "many of them. Only the kept layers are drawn.",
    "plan": "The paper's Figure 8. How to read it: rows are neurons of the target and columns neurons of the source, "
    "summed into blocks; a colour says how many times the mass of an even plan a block holds. The grouped order is "
    "found from this very plan, so some diagonal shows even between unrelated features. What counts is how bright it "
    "is, and what the models' own order shows, in which attention heads lie together. Drawn is each target layer's "
    "strongest source layer.",
    "mass": "The paper's Figure 3. How to read it: the further a line lies above the dotted one that ends with it, the "
    "fewer source neurons each target neuron is an average of. Dashed lines are inputs, solid ones outputs.",
    "timing": "How to read it: forward passes are the models reading texts, which any method must do that looks at "
    "activations.",
    "neurons": "How to read it: a row is a target layer; only the neurons that are coloured were changed by the merge, "
    "all others are the target's own. Stripes down the picture are neurons, or attention heads, that are active in "
    "many layers.",
    "descent": "How to read it: above zero, a small step of the merge lowers the loss on these calibration texts, "
    "below zero it raises it. A bar that is no longer than its random neighbour says that the merge knows nothing of "
    "where the loss falls.",
}
"""How to read each picture."""


def findings(report: Report) -> list[str]:
    """The verdict and what it rests on, a sentence each: verdict, numbers, controls, how much arrived."""
    evaluation = report.evaluation
    change = evaluation.difference
    notes = [
        f"{verdict_sentence(report.verdict)}.",
        f"On {evaluation.texts} held-out texts it needs {evaluation.fused.value:.4f} bits per byte, where the "
        f"unchanged target needs {evaluation.base.value:.4f}: a difference of {change.value:+.4f} "
        f"(95 % interval {interval_words(change, signed=True)}; lower is better). "
        f"The source alone needs {evaluation.source.value:.4f}.",
    ]
    if evaluation.controls:
        notes.append(_controls(evaluation))
    notes.append(_arrived(report))
    if following := next_words(report):
        notes.append(f"{following}.")
    if report.same_model:
        notes.append("Target and source are the same model: this is a check of the road, not a merge.")
    return notes


def score_cells(report: Report) -> Iterable[Sequence[str]]:
    """Model, score and difference to the target; a second line in a cell holds its explanation or interval."""
    for row in score_rows(report):
        change = f"{row.change_words}\n{row.change_interval_words}" if row.difference is not None else ""
        yield f"{row.name}\n{row.explained}", f"{row.value_words}\n{row.interval_words}", change


def model_rows(report: Report) -> Iterable[Sequence[str]]:
    """What is known of the two models."""
    target, source = report.target, report.source
    yield "model", target.name, source.name
    yield "commit", target.commit, source.commit
    yield "architecture", target.architecture, source.architecture
    yield "parameters", f"{target.parameters:,}", f"{source.parameters:,}"
    yield "layers", f"{target.layers:,}", f"{source.layers:,}"
    yield "width", f"{target.hidden_size:,}", f"{source.hidden_size:,}"
    yield "licence", target.licence or "not stated", source.licence or "not stated"


def ratio_rows(report: Report) -> Iterable[Sequence[str]]:
    """Projection, neurons, smallest and largest norm ratio, what became of the bias."""
    for name, item in report.fusion.projections.items():
        yield name, f"{item.neurons:,} of {item.of:,}", ratio_words(item.norm_ratio), item.bias


def facts(report: Report) -> Iterable[Sequence[str]]:
    """What was read, how it was solved, how it was fused, and where."""
    read, solved, fusion = report.calibration, report.transport, report.fusion
    yield "calibration", f"{read.texts:,} texts of {read.dataset}"
    if read.other:
        yield "neurons matched on", f"{read.other:,} texts of {read.other_dataset}"
    yield "tokens", f"{read.tokens.target:,} (target), {read.tokens.source:,} (source)"
    cut = read.truncated
    if cut.target or cut.source:
        yield "cut short", f"{count_words(cut.target, 'text')} (target), {count_words(cut.source, 'text')} (source)"
    held_out = report.evaluation
    yield "held out", f"{held_out.texts:,} other texts, {held_out.bytes:,} bytes"
    yield from _solved(solved)
    yield "what was moved", moved_words(fusion, report.source_base, report.adapter, report.sources)
    for each in report.sources:
        licence = (each.model.licence if each.model.adapter is None else each.model.adapter.licence) or "not stated"
        yield each.name, f"{each.reference}, {strength_words(each)}; licence {licence}"
    yield "fusion", how_words(fusion)
    if fusion.stream:
        yield "beside the projections", ", ".join(fusion.stream)
    yield "run on", f"{report.device}, {report.dtype}, seed {report.seed}"


def _controls(evaluation: Evaluation) -> str:
    """How the merge compares with changes of the same neurons that know nothing of the correspondence."""
    low, high = evaluation.difference.ci95
    controls = evaluation.controls
    listed = ", ".join(f"{name} {item.difference.value:+.4f}" for name, item in controls.items())
    groups: dict[str, list[str]] = {"better": [], "worse": [], "like": []}
    for name, item in controls.items():
        other_low, other_high = item.difference.ci95
        groups["better" if high < other_low else "worse" if low > other_high else "like"].append(name)
    said = [f"the merge is {word} than {_and(groups[word])}" for word in ("better", "worse") if groups[word]]
    if groups["like"]:
        who = "it" if said else "the merge"
        said.append(f"{who} cannot be told from {_and(groups['like'])} by these intervals")
    return (
        "The controls change the same neurons without the right correspondence, and made these differences: "
        f"{listed}. {', and '.join(said).capitalize()}."
    )


def _arrived(report: Report) -> str:
    """What the norm ratios say about the fusion."""
    fusion = report.fusion
    ratios = [ratio for item in fusion.projections.values() for ratio in item.norm_ratio if ratio is not None]
    if not ratios:
        return "The target's own neurons are all zero, so there is no norm to hold what was transported against."
    low, high = min(ratios), max(ratios)
    if fusion.what == "reconstruct":
        return f"What was fitted changes the weights by {low:.2g} to {high:.2g} times their own norm."
    sentence = f"What was transported has {low:.2g} to {high:.2g} times the norm of the neurons it is mixed into"
    if fusion.what == "task-vector":
        return f"{sentence}; it is added to them, and nothing is taken away."
    if high < _NOTHING:
        alpha = alpha_words(fusion)
        return f"{sentence}: nothing arrives, and all that fusing with alpha {alpha} does is to shrink them."
    if high < _MOSTLY_SHRINKING:
        return f"{sentence}: most of what fusing with alpha {alpha_words(fusion)} does is to shrink them."
    return f"{sentence}."


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _solved(solved: Transport) -> Iterable[Sequence[str]]:
    """How the transport was solved."""
    steps = solved.iterations
    shared = solved.structure == "shared"
    if shared:
        kind = "one to one" if solved.matching == "one-to-one" else f"entropic, epsilon {solved.epsilon}"
        kind += ", by activations and weights" if solved.weights else ", by activations"
        yield "structure", f"one residual stream, whole heads, MLP neurons as units, layers in order; {kind}"
    if not shared or solved.matching == "entropic":
        yield (
            "feature plans",
            f"{solved.converged:,} of {solved.problems:,} converged, {steps.median:g} iterations in the "
            f"median, {steps.max} at most, marginals within {solved.worst_marginal_violation:.1e}",
        )
    if not shared:
        yield "regularisation", f"epsilon {solved.epsilon}, eta {solved.eta}"
        yield "layer plan", f"{solved.layer_cost} cost, {solved.layer_marginals} marginals"
    if solved.map != "plan":
        yield "map", f"{solved.map}, fitted to the features"
    if solved.relatedness:
        yield "relatedness", relatedness_numbers(solved.relatedness)
