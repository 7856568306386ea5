"""Examples as HTML: negatives, the attention of hidden words, captions, questions, each beside its picture."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ..data.samples import Sample
from ..evaluation import Evaluation
from ..evaluation.looking import Look

__all__ = ["answers", "captions", "inline", "looks", "negatives", "table"]

_SIDE, _LARGE = 64, 144  # pixels of pictures in tables, of those under a heat map


def negatives(evaluation: Evaluation) -> str:
    """Rows of pictures, columns of hardness."""
    picks = evaluation.picks
    if picks is None or not len(picks.samples):
        return ""
    head = ["picture", *("hardness " + ("∞" if math.isinf(beta) else f"{beta:g}") for beta in picks.texts)]
    rows = []
    for row, i in enumerate(picks.samples.tolist()):
        cells = [_with_caption(evaluation.samples[i])]
        for texts in picks.texts.values():
            chosen = [evaluation.samples[k].caption for k in texts[row].tolist() if k >= 0]
            cells.append("<br>".join(map(html.escape, chosen)) or "none")
        rows.append(cells)
    return table(head, rows, "small")


def looks(evaluation: Evaluation) -> str:
    """Pictures, their heat maps, and the captions with a hidden word."""
    rows = []
    for look in evaluation.looks:
        picture = evaluation.samples[look.sample].image
        assert picture is not None
        large = _resized(picture, _LARGE)
        most = f"at most {look.heat.max().item() * look.heat.numel():.1f} times the mean"
        rows.append([_image(large), _image(warmed(large, look)), html.escape(most), *_words(look)])
    head = ["picture", "where the hidden word looks", "attention", "caption", "hidden", "guessed"]
    return table(head, rows, "small") if rows else ""


def captions(evaluation: Evaluation) -> str:
    """Pictures, reference captions, and what is written."""
    rows = [
        [_thumb(sample), *map(html.escape, (sample.caption, found.greedy, found.drawn))]
        for found in evaluation.captions
        for sample in (evaluation.samples[found.sample],)
    ]
    return table(["picture", "reference", "likeliest words", "drawn by probability"], rows, "small") if rows else ""


def answers(evaluation: Evaluation) -> str:
    """Pictures, questions, reference answers and given ones; wrong ones are marked."""
    rows = []
    for found in evaluation.answers:
        mark = "right" if found.given.lower() == found.reference.lower() else "wrong"
        given = f'<span class="{mark}">{html.escape(found.given) or "nothing"}</span>'
        said = (html.escape(found.question), html.escape(found.reference), given)
        rows.append([_thumb(evaluation.samples[found.sample]), *said])
    return table(["picture", "question", "reference", "answer"], rows, "small") if rows else ""


def table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """An HTML table of cells that are HTML."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"

    return f'<table class="{kind}">' + line(head, "th") + "".join(line(row, "td") for row in rows) + "</table>"


def warmed(picture: np.ndarray, look: Look) -> np.ndarray:
    """The picture, dark where the hidden word does not look and in a warm colour where it does, uint8 as it came."""
    from matplotlib import colormaps

    heat = _smooth(look.heat, picture.shape[0], picture.shape[1])
    colours: np.ndarray = 255 * colormaps["inferno"](heat)[..., :3]
    mixed: np.ndarray = (0.45 * picture + 0.55 * colours).astype(np.uint8)
    return mixed


def inline(png: bytes) -> str:
    """A PNG as the address of an image."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _smooth(heat: Tensor, height: int, width: int) -> np.ndarray:
    """Between 0 and 1 (three times the mean, or the largest where that is more), at the size of a picture.

    So attention that is about the same everywhere looks so.
    """
    import torch.nn.functional as F

    wide = F.interpolate(heat.float()[None, None], (height, width), mode="bicubic", align_corners=False)[0, 0]
    shown: np.ndarray = (wide / max(3 * heat.mean().item(), wide.max().item(), 1e-12)).clamp(0, 1).numpy()
    return shown


def _words(look: Look) -> list[str]:
    mark = "right" if look.guess == look.word else "wrong"
    guess = f'<span class="{mark}">{html.escape(look.guess)}</span>'
    return [html.escape(look.caption), html.escape(look.word), guess]


def _with_caption(sample: Sample) -> str:
    return f"{_thumb(sample)}<br>{html.escape(sample.caption)}"


def _thumb(sample: Sample) -> str:
    assert sample.image is not None
    return _image(_resized(sample.image, _SIDE) if max(sample.image.shape) > _SIDE else sample.image)


def _image(pixels: np.ndarray) -> str:
    from PIL import Image

    with io.BytesIO() as buffer:
        Image.fromarray(pixels).save(buffer, "PNG")
        return f'<img alt="" src="{inline(buffer.getvalue())}">'


def _resized(pixels: np.ndarray, side: int) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC))
