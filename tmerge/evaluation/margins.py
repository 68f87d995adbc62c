"""How far ahead the right answer of a multiple-choice question is: what an accuracy of the same questions hides.

    margin = max over right answers of b(answer) - max over wrong ones,   b(a) = log2 p(a | question) / bytes of a

in bits per byte of an answer, as texts are scored. An accuracy moves only where an answer crosses zero; the margins
of all questions move whenever a model does (paired by question: `task_difference`). By the byte, since sentences of
different length differ in likelihood by dozens of bits in a model that cannot read them, whichever is right; for
answers of one length, such as letters, it is the difference of likelihoods that accuracy asks the sign of.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

__all__ = ["question_margins"]


def question_margins(samples: Sequence[Mapping[str, Any]]) -> list[float] | None:
    """Each question's margin, in bits per byte.

    Args:
        samples: Of one task, as lm-evaluation-harness logs them: ``target`` (the right answer's place or its words, or
            a list of places), ``arguments`` ((context, answer) a choice), ``filtered_resps`` ((log-likelihood, greedy)
            a choice) and ``acc``.

    Returns:
        A margin a question; None where the task is not one of several answers judged by their likelihoods, or is judged
        otherwise than by the likeliest answer (the harness's own ``acc`` says so).
    """
    margins = []
    for sample in samples:
        answers = [str(arguments[1]).strip() for arguments in sample.get("arguments", ()) if len(arguments) > 1]
        choices = sample.get("filtered_resps", ())
        right = _right_places(sample.get("target"), answers)
        if right is None or "acc" not in sample or len(answers) != len(choices) or "" in answers:
            return None
        if not all(_is_likelihood(choice) for choice in choices):
            return None
        bits = [float(choice[0]) / math.log(2) for choice in choices]
        ahead = _ahead(bits, right)
        # Of two answers that are equally likely, the harness takes the first.
        if ahead is None or (ahead != 0 and (ahead > 0) != (float(sample["acc"]) == 1)):
            return None
        margin = _ahead([bit / len(answer.encode()) for bit, answer in zip(bits, answers, strict=True)], right)
        if margin is None:
            return None
        margins.append(margin)
    return margins


def _ahead(scores: Sequence[float], right: Collection[int]) -> float | None:
    """The best right answer's score less the best wrong one's; None where there is no such thing."""
    of_right = [score for place, score in enumerate(scores) if place in right]
    of_wrong = [score for place, score in enumerate(scores) if place not in right]
    if not of_right or not of_wrong:
        return None
    ahead = max(of_right) - max(of_wrong)
    return ahead if math.isfinite(ahead) else None


def _right_places(target: Any, answers: Sequence[str]) -> set[int] | None:
    if isinstance(target, str):
        target = answers.index(target.strip()) if target.strip() in answers else None
    if isinstance(target, int):
        return {target}
    return set(target) if isinstance(target, list) and all(isinstance(place, int) for place in target) else None


def _is_likelihood(choice: Any) -> bool:
    return isinstance(choice, (tuple, list)) and len(choice) == 2 and isinstance(choice[0], (int, float))
