"""What each loss does to easy and hard negatives: dL/ds of every negative against its score, as small SVGs.

One image, its text, and some negatives whose cosines are chosen. The losses are this library's, and so are the
gradients: with one image x of unit length dL/dy_j = scale * (dL/ds_j) * x, so that dL/ds_j = <dL/dy_j, x> / scale.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastvlm_loss
from fastvlm_loss import filters

__all__ = ["PICTURES", "batch", "draw", "pull", "style"]

HERE = Path(__file__).parent
SCALE, POSITIVE = 10.0, 0.4
GREY, BLUE, RED, GREEN, GOLD = "#7d8590", "#2f81f7", "#e5534b", "#3fb950", "#d29922"  # on white and on near-black

Loss = Callable[..., Tensor]
Curve = tuple[str, Tensor, Tensor, dict[str, Any]]  # label, cosines, gradients, style


def batch(cosines: Tensor, positive: float = POSITIVE) -> tuple[Tensor, Tensor]:
    """One image `[1, N + 2]` and `[N + 1, N + 2]` texts at these cosines from it, the positive first; fp64."""
    c = torch.cat([torch.tensor([positive]), cosines]).double()
    image = torch.nn.functional.one_hot(torch.tensor([0]), len(c) + 1).double()
    texts = torch.cat([c[:, None], torch.diag((1 - c.square()).sqrt())], 1)
    return image, texts


def pull(
    loss: Loss, cosines: Tensor, positive: float = POSITIVE, scale: float | None = SCALE, **options: Any
) -> Tensor:
    """dL/ds `[N]` of each negative; a loss without a scale has `scale` None."""
    image, texts = batch(cosines, positive)
    texts.requires_grad_()
    scalars = [] if scale is None else [scale]
    value = loss(image, texts, *scalars, labels=torch.tensor([0]), **options)
    (gradient,) = torch.autograd.grad(value, texts)
    return (gradient @ image[0])[1:] / (scale or 1.0)


def softmax() -> list[tuple[str, list[Curve]]]:
    """The softmax family: hard negatives, relevance as a factor of the logits, margin and filter."""
    c = torch.linspace(-0.4, 0.7, 40).double()
    image = {"directions": "image"}
    plain = pull(fastvlm_loss.clip_loss, c, **image)
    hard = [("β = 0.25", 0.25, False, GREEN), ("β = 1", 1.0, False, GOLD), ("β = 1, detached", 1.0, True, RED)]
    hard_curves: list[Curve] = []
    for name, beta, detached, color in hard:
        options = {"beta": beta, "detach_weights": detached, **image}
        hard_curves.append((name, c, pull(fastvlm_loss.hard_negative_clip_loss, c, **options), {"color": color}))
    relevance = [
        (f"r = {r:g}", c, pull(fastvlm_loss.relevance_clip_loss, c, image_relevance=torch.tensor([r]).double(),
                               mode="logit", scope="row", raw=True), {"color": k})
        for r, k in ((0.25, GREEN), (1.0, BLUE), (4.0, RED))
    ]  # fmt: skip
    # captions more alike the better they score: R from 0 at the easiest to 1 at the hardest
    alike = torch.cat([torch.ones(1).double(), torch.linspace(0, 1, len(c)).double()])
    captions = torch.stack([alike, (1 - alike.square()).sqrt()], 1)
    margin = pull(fastvlm_loss.margin_clip_loss, c, text_embeddings=captions, threshold=0.5, **image)
    kept = pull(fastvlm_loss.clip_loss, c, filters=filters.absolute(0.1), **image)
    clip: Curve = ("clip_loss", c, plain, {"color": BLUE})
    return [
        ("hard_negative_clip_loss", [clip, *hard_curves]),
        ('relevance_clip_loss, mode="logit"', relevance),
        ("margin_clip_loss, filters", [clip, ("margin 0.2", c, margin, {"color": GREEN}),
                                       ("absolute(0.1)", c, kept, {"color": RED, "linestyle": "--"})]),
    ]  # fmt: skip


def ranking() -> list[tuple[str, list[Curve]]]:
    """The ranking losses, in a batch whose hardest negative is far from the positive, and in one where it is near."""
    found = []
    for title, hardest in (
        ("hardest 0.1 below the positive", 0.3),
        ("hardest within ε of the positive", POSITIVE - 0.005),
    ):
        c = torch.cat([torch.linspace(-0.2, hardest - 0.05, 11), torch.tensor([hardest])]).double()
        styles = {"sum": (BLUE, "o"), "max": (RED, "s"), "selective": (GREEN, "x")}
        curves = [
            (f'"{mining}"', c, pull(fastvlm_loss.triplet_loss, c, scale=None, mining=mining, directions="image"),
             {"color": k, "marker": marker, "linestyle": "", "markersize": 4})
            for mining, (k, marker) in styles.items()
        ]  # fmt: skip
        found.append((title, curves))
    return found


def sigmoid() -> list[tuple[str, list[Curve]]]:
    """One negative of changing score, in a batch whose other 62 are easy, and in one where they are hard."""
    swept = torch.linspace(-0.4, 0.9, 40).double()
    settings: list[tuple[str, Loss, dict[str, Any], str]] = [
        ("clip_loss", fastvlm_loss.clip_loss, {"directions": "image"}, BLUE),
        ("siglip_loss", fastvlm_loss.siglip_loss, {"logit_bias": -5.0}, RED),
    ]
    curves: list[Curve] = []
    for name, loss, options, color in settings:
        for others, low, style, width in (("easy", -0.2, "-", 3.0), ("hard", 0.3, "--", 1.6)):
            rest = torch.linspace(low, low + 0.2, 62).double()
            g = torch.stack([pull(loss, torch.cat([one[None], rest]), **options)[0] for one in swept])
            look = {"color": color, "linestyle": style, "linewidth": width, "alpha": 0.5 if width > 2 else 1.0}
            curves.append((f"{name}, others {others}", swept, g, look))
    return [("", curves)]


PICTURES = {"softmax": (softmax, "symlog"), "ranking": (ranking, "linear"), "sigmoid": (sigmoid, "log")}


def style() -> AbstractContextManager[None]:
    """How matplotlib draws the documentation's pictures: the same bytes for the same numbers, grey on nothing."""
    import matplotlib

    matplotlib.use("svg")
    settings: dict[str, Any] = {"svg.hashsalt": "fastvlm_loss", "svg.fonttype": "none", "font.family": "sans-serif"}
    for part in ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"):
        settings[part] = GREY
    return matplotlib.rc_context(settings)


def draw(folder: Path = HERE) -> list[Path]:
    """All pictures into `folder`, the same bytes for the same numbers."""
    made = []
    with style():
        for name, (panels, scale) in PICTURES.items():
            path = folder / f"gradients-{name}.svg"
            _figure(panels(), scale).savefig(path, transparent=True, metadata={"Date": None})
            made.append(path)
    return made


def _figure(panels: list[tuple[str, list[Curve]]], scale: str) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.4 + 3.0 * len(panels), 3.0), layout="constrained")
    for k, (title, curves) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), k + 1, xlabel="cosine of the negative")
        axes.set_yscale(scale, **({"linthresh": 1e-3} if scale == "symlog" else {}))
        axes.set_title(title, fontsize=9)
        for label, x, y, style in curves:
            axes.plot(x.tolist(), y.tolist(), label=label, **{"linewidth": 1.6, **style})
        if len(panels) > 1:
            axes.axvline(POSITIVE, color=GREY, linewidth=1, linestyle=":", label="positive")
        axes.grid(color=GREY, alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.axes[0].set_ylabel("dL/ds")
    return figure


if __name__ == "__main__":
    for made in draw():
        print(made.relative_to(HERE.parent))
