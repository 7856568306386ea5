"""The names of the figures as a person reads them, and the table of them."""

from __future__ import annotations

from collections.abc import Mapping

from ...demo.evaluation import KS

__all__ = ["OVER_STEPS", "Line", "other_lines", "recall_lines", "table"]

Line = tuple[str, list[float]]
_RECALLS = (
    ("image to text", "retrieval/i2t_r{}"),
    ("text to image", "retrieval/t2i_r{}"),
    ("image to text, re-ranked by matching", "rerank/i2t_r{}"),
    ("text to image, re-ranked by matching", "rerank/t2i_r{}"),
    ("image to text, CSLS", "csls/i2t_r{}"),
    ("text to image, CSLS", "csls/t2i_r{}"),
    ("image to text, CSLS, re-ranked by words", "evidence/i2t_r{}"),
    ("text to image, CSLS, re-ranked by words", "evidence/t2i_r{}"),
    ("image to text, late interaction", "late_interaction/i2t_r{}"),
    ("text to image, late interaction", "late_interaction/t2i_r{}"),
    ("chance", "retrieval/chance_r{}"),
)
# the figures that a report follows over the steps
OVER_STEPS = {
    "retrieval/r10": "R@10",
    "rerank/r10": "R@10, re-ranked by matching",
    "csls/r10": "R@10, CSLS",
    "evidence/r10": "R@10, CSLS, re-ranked by words",
    "zeroshot/accuracy": "zero-shot",
    "itm/accuracy_hard": "matching, hard",
    "late_interaction/r10": "R@10, late interaction",
    "multiscale/accuracy_hard": "multi-scale matching, hard",
    "mlm/accuracy": "masked words",
    "mlm/accuracy_blind": "masked words, blind",
    "caption/token_accuracy": "caption tokens",
    "caption/exact": "captions, exact",
    "vqa/accuracy": "questions",
}
# figure, what it is, what stands beside it: a number or a figure, and what that is
_OTHERS: tuple[tuple[str, str, str | float | None, str], ...] = (
    ("zeroshot/accuracy", "zero-shot classification", "zeroshot/chance", "chance"),
    ("zeroshot/colour", "zero-shot, colour", "zeroshot/chance", "chance"),
    ("zeroshot/shape", "zero-shot, shape", "zeroshot/chance", "chance"),
    ("itm/accuracy_hard", "matching, hardest negatives", 50.0, "chance"),
    ("itm/accuracy_distractors", "matching, caption against distractor", 50.0, "chance"),
    ("multiscale/accuracy_hard", "multi-scale matching, hardest negatives", 50.0, "chance"),
    ("mlm/accuracy", "masked object words", "mlm/accuracy_blind", "without the picture"),
    ("mlm/gain", "masked object words, gain by the picture", None, ""),
    ("caption/token_accuracy", "captions, tokens", None, ""),
    ("caption/exact", "captions, word for word", None, ""),
    ("vqa/accuracy", "questions", "vqa/majority", "the usual answer"),
)


def recall_lines(figures: Mapping[str, float]) -> list[Line]:
    """Recall at each of `KS`, a line for each way of asking that there are figures of."""
    return [(title, [figures[name.format(k)] for k in KS]) for title, name in _RECALLS if name.format(1) in figures]


def other_lines(figures: Mapping[str, float]) -> list[tuple[str, float, str]]:
    """Title, value, and what stands beside it, of all other figures; unknown ones under their own names."""
    found: list[tuple[str, float, str]] = []
    known = {name.format(k) for _, name in _RECALLS for k in KS} | {
        name for name in OVER_STEPS if name.endswith("/r10")
    }
    for name, title, beside, what in _OTHERS:
        other = figures.get(beside) if isinstance(beside, str) else beside
        known |= {name, str(beside)}
        if name in figures:
            found.append((title, figures[name], "" if other is None else f"{other:.1f} {what}"))
    return found + [(name, value, "") for name, value in figures.items() if name not in known]


def table(figures: Mapping[str, float], count: int) -> str:
    """All figures as text for a terminal."""
    lines = []
    recalls = recall_lines(figures)
    if recalls:
        lines.append(f"{f'recall (%) of {count:,}':<44}" + "".join(f"{f'R@{k}':>8}" for k in KS))
        lines += [f"{title:<44}" + "".join(f"{value:8.1f}" for value in values) for title, values in recalls]
    lines += [f"{title:<44}{value:8.1f}   {beside}".rstrip() for title, value, beside in other_lines(figures)]
    return "\n".join(lines) or "nothing was held out to evaluate on"
