"""The text of docs/losses.md and of the README's table, from the registry and the docstrings."""

from __future__ import annotations

import inspect
from typing import Any

from fastvlm_loss import BatchMetrics, BatchNegatives, FeatureQueue, HardNegatives, LinearHardness, filters, modules
from fastvlm_loss import hard_negatives as negatives
from fastvlm_loss.losses import LossSpec, documented

from . import docstrings, options
from .docstrings import prose

__all__ = ["HEADINGS", "losses", "specs", "table"]

SECTIONS = ("Args", "Returns", "Raises", "Source")
HEADINGS = ("Equation", "When to use it", "Arguments", "Returns", "Errors", "Paper", "Module")

INTRO = """# Losses

<!-- written by `python -m docs.make` from the registry and the docstrings: edit those -->
<!-- fmt:off -->

A score is s_ij = logit_scale · ⟨image_i, text_j⟩ + logit_bias, c_ij the product alone (a cosine, for unit features);
LSE is log Σ exp. Row i is image i, column j text j; M images, N texts, D dimensions. No loss builds anything of size
M × N.
"""

PICTURES = """## What they do to negatives

dL/ds of the negatives of one image, from easy to hard, at scale 10. Descent lowers a score whose gradient is positive.
Drawn by `python -m docs.gradients` with the losses themselves.

![Gradient of negatives, softmax losses](gradients-softmax.svg)

In `clip_loss` a negative's gradient is its probability. `hard_negative_clip_loss` moves it to the hardest and, unless
the weights are detached, attracts easy ones. A factor r of the logits is an inverse temperature: r = 4 is about the few
hardest, r = 0.25 about all. A margin is added to negatives whose captions differ (here the low-scoring ones), so the
hardest, whose captions are alike, count for less. A filter takes out what scores suspiciously well, and the others take
its share.

![Gradient of negatives, ranking losses](gradients-ranking.svg)

`triplet_loss`, margin 0.2, 12 negatives: "sum" has each one within the margin, "max" the hardest alone, "selective" the
hardest too, or the mean over all where it scores like the positive.

![Gradient of a negative, sigmoid and softmax](gradients-sigmoid.svg)

One negative among 62 others: its gradient in `clip_loss` depends on them, in `siglip_loss` (bias −5) it does not.
"""

OPTIONS = """## Which loss has which option

Options of one loss alone stand in its section. All of a loss compose freely, but for those that stand under its errors.
"""

SETUP = """The examples on this page continue from these lines.

```python
import torch
import torch.nn.functional as F
from fastvlm_loss import BatchMetrics, FeatureQueue, clip_loss, filters

image_features, text_features = (F.normalize(torch.randn(8, 16), dim=1) for _ in range(2))
guide_image, guide_text = (F.normalize(torch.randn(8, 4), dim=1) for _ in range(2))
image, text, ids, scale = image_features, text_features, torch.arange(8), 14.3
text_queue = FeatureQueue(size=32, dim=16)
text_queue.push(F.normalize(torch.randn(20, 16), dim=1))
metrics = BatchMetrics()
```
"""

METRICS = """```python
loss = clip_loss(image, text, scale, metrics=metrics)
print(metrics.image_accuracy, metrics.hardest_text)
```
"""


def specs() -> list[LossSpec]:
    """The registered losses: those on pairs of features, then those on tokens and a vocabulary."""
    return sorted(documented.values(), key=lambda s: (bool(s.names), s.name))


def table(link: str = "#") -> str:
    """One row a loss: name, one line, equation, paper."""
    rows = ["| loss | what it is | equation | paper |", "|---|---|---|---|"]
    for spec in specs():
        cells = (f"[`{spec.name}`]({link}{spec.name})", prose(spec.summary), f"`{spec.equation}`", spec.paper)
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(rows)


def losses() -> str:
    """The whole page."""
    parts = [INTRO, table(), "", PICTURES, OPTIONS, options.table(specs()), "", *(_loss(spec) for spec in specs())]
    return "\n".join([*parts, SETUP, _filters(), _queue(), _metrics(), _negatives()]).rstrip() + "\n"


def _loss(spec: LossSpec) -> str:
    doc, module = docstrings.of(spec.function), docstrings.of(inspect.getmodule(spec.function))
    missing = [name for name in SECTIONS if name not in doc.sections] + ([] if doc.when else [docstrings.FIRST])
    if missing:
        raise ValueError(f"{spec.name}: got a docstring without {', '.join(missing)}, wanted all of the kind")
    refused = options.refusals(spec)
    errors = [prose(doc.sections["Raises"])]
    if refused:
        errors += ["", "Options that do not go together:", "", *(f"- {prose(error)}" for error in refused)]
    bodies = {
        "Equation": [f"`{spec.equation}`", "", "```", *("\n\n".join(module.notes).splitlines()), "```"],
        "When to use it": [prose(doc.when), *(line for note in doc.notes for line in ("", prose(note)))],
        "Arguments": docstrings.arguments(doc.sections["Args"], spec.function),
        "Returns": [prose(doc.sections["Returns"])],
        "Errors": errors,
        "Paper": [prose(doc.sections["Source"])],
        "Module": [prose(_module(spec))],
    }
    assert tuple(bodies) == HEADINGS
    head = [f"## {spec.name}", "", prose(doc.summary), "", "```", docstrings.signature(spec.function), "```", ""]
    return "\n".join([*head, *(line for name in HEADINGS for line in (f"### {name}", "", *bodies[name], ""))])


def _module(spec: LossSpec) -> str:
    for cls in vars(modules).values():
        if inspect.isclass(cls) and vars(cls).get("function") and cls.function is spec.function:
            return f"`fastvlm_loss.{cls.__name__}`: {inspect.getdoc(cls)}"
    return "None; one is derived by `class Name(LossModule): function = staticmethod(the_function)`."


def _filters() -> str:
    doc, rules = docstrings.of(filters), docstrings.of(inspect.getmodule(filters.Filter))
    code = "\n".join(doc.notes)
    lines = [
        "## Filters",
        "",
        prose(doc.summary),
        "",
        *(prose(note) for note in rules.notes),
        "",
        "```python",
        code,
        "```",
        "",
    ]
    for name in filters.__all__:
        if not inspect.isclass(rule := getattr(filters, name)):
            found = docstrings.of(rule)
            lines.append(f"- `{docstrings.signature(rule)}`: {prose(found.summary)}")
            lines += [
                f"    {line}" for line in docstrings.arguments(found.sections.get("Args", ""), rule) if found.sections
            ]
    raised = docstrings.of(inspect.getmodule(filters.Filter).filtered).sections["Raises"]  # type: ignore[union-attr]
    return "\n".join([*lines, "", "### Filters: errors", "", *docstrings.arguments(raised), ""])


def _queue() -> str:
    doc = docstrings.of(FeatureQueue)
    lines = ["## FeatureQueue", "", prose(doc.summary), ""]
    lines += [line for note in doc.notes for line in (prose(note), "")]
    lines += ["### FeatureQueue: arguments", "", *docstrings.arguments(doc.sections["Args"], FeatureQueue), ""]
    lines += ["### FeatureQueue: methods", ""]
    for name, method in vars(FeatureQueue).items():
        if inspect.isfunction(method) and not name.startswith("_") and name not in ("extra_repr", "forward"):
            found = docstrings.of(method)
            lines.append(f"- `{docstrings.signature(method)}`: {prose(found.summary)}")
            lines += [f"    {line}" for line in _given(found, method)]
    return "\n".join([*lines, "", f"Paper: {prose(doc.sections['Source'])}", ""])


def _metrics() -> str:
    doc = docstrings.of(BatchMetrics)
    notes = [line for note in (doc.summary, *doc.notes) for line in (prose(note), "")]
    return "\n".join(["## BatchMetrics", "", *notes, METRICS, *docstrings.arguments(doc.sections["Attributes"]), ""])


def _negatives() -> str:
    doc = docstrings.of(negatives)
    lines = ["## Hard negatives", "", "[negatives.md](negatives.md) is their page.", ""]
    lines += ["```", docstrings.signature(negatives), "```", ""]
    lines += [line for note in (doc.summary, *doc.notes) for line in (prose(note), "")]
    lines += [*docstrings.arguments(doc.sections["Args"], negatives), "", f"Paper: {prose(doc.sections['Source'])}", ""]
    for kind, section in ((HardNegatives, "Attributes"), (BatchNegatives, "Args"), (LinearHardness, "Args")):
        doc = docstrings.of(kind)
        notes = [line for note in (doc.summary, *doc.notes) for line in (prose(note), "")]
        given = docstrings.arguments(doc.sections[section], None if section == "Attributes" else kind)
        lines += [f"### {kind.__name__}", "", *notes, *given, ""]
    return "\n".join(lines)


def _given(doc: Any, function: Any) -> list[str]:
    return docstrings.arguments(doc.sections["Args"], function) if "Args" in doc.sections else []
