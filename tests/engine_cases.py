"""Everything that can be asked of the engine, on any backend and in any dtype. Used by several tests."""

from dataclasses import replace

import torch

import fastvlm_loss
from fastvlm_loss.engine import tile
from fastvlm_loss.scores import filters
from fastvlm_loss.scores.problem import Problem

FEATURES = ("x", "y", "scale", "bias")
TEACHER = ("tx", "ty", "ts")
FACTORS = ("row", "col")


def tensors(m, n, d=24, e=16, seed=0):
    """Differentiable fp64 leaves: features, teacher's features, factors, scales and biases."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    made = {
        "x": normal(m, d), "y": normal(n, d), "scale": torch.tensor(0.9), "bias": torch.tensor(-0.4),
        "tx": normal(m, e), "ty": normal(n, e), "ts": torch.tensor(0.7), "row": 0.5 + normal(m).abs(),
        "col": 0.5 + normal(n).abs(), "col_bias": normal(n),
    }  # fmt: skip
    return made


def _hardness(beta):
    return lambda p, t: replace(p, numbers=p.scale.detach().new_tensor([beta, 0.0]))


def _margin(p, t):
    names = "text_relevance_x", "text_relevance_y", "slope"
    beside = p.beside("margin", names, t["tx"].detach(), t["ty"].detach(), 0.7, len(t["tx"]))
    return replace(beside, numbers=p.scale.detach().new_tensor([0.3, 0.5]))


def _taught(p, t):
    return p.taught(t["tx"], t["ty"], t["ts"])


def _filtered(*rules):
    return lambda p, t: filters.filtered(p, list(rules))


def _guided(p, t):
    return filters.filtered(p, [filters.guide(t["tx"], t["ty"], 0.1), filters.absolute(0.3)])


# name: (problem from the plain one, options of the verb, what else has a gradient)
CASES = {
    "plain": (None, {}, ()),
    "smoothed": (None, {"gap": True}, ()),
    "out": (None, {"positives": "out"}, ()),
    "out, smoothed": (None, {"positives": "out", "gap": True}, ()),
    "in": (None, {"positives": "in"}, ()),
    "hard, beta 0": (_hardness(0.0), {"hard": True}, ()),
    "hard": (_hardness(0.5), {"hard": True}, ()),
    "hard, detached": (_hardness(2.0), {"hard": True, "detached": True}, ()),
    "hinge": (lambda p, t: p.weighted(t["row"], t["col"]), {}, FACTORS),
    "tempered": (lambda p, t: p.weighted(t["row"], t["col"]), {}, FACTORS),
    "tempered, smoothed": (lambda p, t: p.weighted(t["row"], t["col"]), {"gap": True}, FACTORS),
    "taught": (_taught, {}, TEACHER),
    "taught, tempered": (lambda p, t: _taught(p, t).weighted(t["row"], t["col"]), {}, (*TEACHER, *FACTORS)),
    "margin": (_margin, {}, ()),
    "biased columns": (lambda p, t: replace(p, col_bias=t["col_bias"]), {}, ("col_bias",)),
    "absolute filter": (_filtered(filters.absolute(0.2)), {}, ()),
    "relative filter": (_filtered(filters.relative(0.5)), {}, ()),
    "two filters, taught": (
        lambda p, t: _taught(_filtered(filters.absolute(0.1), filters.above_margin(0.4))(p, t), t), {}, TEACHER,
    ),
    "guide": (_guided, {}, ()),
    "guide, smoothed": (_guided, {"gap": True}, ()),
    "filtered hard": (lambda p, t: _filtered(filters.absolute(0.2))(_hardness(0.5)(p, t), t), {"hard": True}, ()),
    "filtered hinge": (
        lambda p, t: _filtered(filters.absolute(0.2))(p.weighted(t["row"], t["col"]), t), {}, FACTORS,
    ),
}  # fmt: skip


def targets(kind, m, n, seed=0):
    """Options of `Problem.of`: "paired" (M = N), "ids", "labels", or "labels and ids"; some are nobody's."""
    g = torch.Generator().manual_seed(seed)
    ids = {"image_ids": torch.randint(-1, m // 2 + 1, (m,), generator=g)}
    labels = {"labels": torch.randint(-1, n, (m,), generator=g)}
    both = {**labels, **ids, "text_ids": torch.randint(-1, m // 2 + 1, (n,), generator=g)}
    return {"paired": {}, "ids": ids, "labels": labels, "labels and ids": both}[kind]


def answer(backend, made, case, given, dtype=torch.float64, directions=(True, True), hardest=False, selection=None):
    """Value of a weighted sum of the vectors, every gradient, the by-products and what is selected, as one dict."""
    build, options, more = CASES[case]
    small = torch.float64 if dtype == torch.float64 else torch.float32
    own = {k: v.detach().to(dtype if k in ("x", "y", "tx", "ty") else small).requires_grad_() for k, v in made.items()}
    with fastvlm_loss.backend(backend):
        p = Problem.of(own["x"], own["y"], own["scale"], own["bias"], **given)
        p = p if build is None else build(p, own)
        verb = tile.hinge if "hinge" in case else tile.softmax
        t = verb(p, rows=directions[0], cols=directions[1], hardest=hardest, selection=selection, **options)
        weight = torch.linspace(0.2, 1.0, len(t.nll), dtype=t.nll.dtype)
        value = (t.nll * weight).sum() + (0.0 if t.gap is None else (t.gap * weight.flip(0)).sum())
        wanted = [*FEATURES, *more]
        found = torch.autograd.grad(value, [own[k] for k in wanted], allow_unused=True)
        by = {k: v if t.targets is None else torch.where(t.targets > 0, v, 0) for k, v in t.summary.items()}
    gradients = {k: own[k].detach() * 0 if g is None else g for k, g in zip(wanted, found, strict=True)}
    picked = dict(zip(("order", "product"), t.selected or (), strict=False))
    return {"value": value.detach(), **gradients, **{f"summary {k}": v for k, v in by.items()}, **picked}
