"""Texts that the model writes: in one pass whether it would write the reference, and token by token what it writes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .held import ROWS, Held, logits, top

__all__ = ["agreement", "written"]


def agreement(held: Held, tokens: Tensor, mask: Tensor, prompts: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
    """Where the likeliest next token is the reference's, given the reference so far.

    A greedy text equals its reference if and only if all tokens agree, because it has written the reference so far.

    Args:
        tokens, mask: `[n, T]`, prompts with their references behind, on the CPU.
        prompts: int64 `[n]`, tokens of each prompt.
        image: int64 `[n]`, the pictures.

    Returns:
        bool `[n, T - 1]` twice: which positions agree, and which have a reference at all. Unknown words never agree.
    """
    targets, special = tokens[:, 1:], held.tokenizer
    known = (targets != special.unk_id) | (targets == special.sep_id)  # CLIP has one token for both
    counts = mask[:, 1:] & (torch.arange(1, tokens.shape[1]) >= prompts[:, None])
    agrees = torch.zeros_like(counts)
    for part in torch.arange(len(tokens)).split(ROWS) if len(tokens) else ():
        place = counts[part]
        fused = held.fuse(tokens[part], mask[part], prompts[part], image[part])
        found = top(held, fused[:, :-1][place.to(fused.device)]) == targets[part][place]
        agrees[part] = agrees[part].masked_scatter(place, found)
    return agrees & known, counts


def written(
    held: Held, tokens: Tensor, prompts: Tensor, image: Tensor, most: int, noise: torch.Generator | None = None
) -> list[str]:
    """What is written behind a few prompts, up to the first [SEP] or `most` tokens.

    Args:
        tokens: int64 `[n, T]`, whose first `prompts` `[n]` are prompt.
        image: int64 `[n]`, the pictures.
        noise: a CPU generator, to draw each token with its probability; None for the likeliest one.
    """
    ends, rows = prompts.clone(), torch.arange(len(tokens))
    done = torch.zeros(len(tokens), dtype=torch.bool)
    tokens = F.pad(tokens[:, : int(prompts.max())], (0, most), value=held.tokenizer.pad_id)
    for _ in range(most):
        width = int(ends.max())
        mask = torch.arange(width) < ends[:, None]
        fused = held.fuse(tokens[:, :width], mask, prompts, image)
        scores = logits(held, fused[rows, ends - 1]).cpu()
        if noise is not None:
            scores = scores - torch.empty_like(scores).exponential_(generator=noise).log()  # Gumbel: a draw
        tokens[rows, ends] = scores.argmax(1)
        ends += 1
        done |= tokens[rows, ends - 1] == held.tokenizer.sep_id
        if bool(done.all()):
            break
    made = [row[start:end].tolist() for row, start, end in zip(tokens, prompts, ends, strict=True)]
    sep = held.tokenizer.sep_id
    return [held.tokenizer.decode(row[: row.index(sep)] if sep in row else row) for row in made]
