"""What the oracles share: the dense score matrix and which of its entries match, by plain PyTorch; and ids to try."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["matrix", "some_ids"]


def matrix(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float, logit_bias: Tensor | float | None,
    labels: Tensor | None, image_ids: Tensor | None, text_ids: Tensor | None, normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Of every entry `[M, N]`: its score, whether it is the labelled pair, whether it takes part, and equal ids."""
    if normalize:
        image_features, text_features = F.normalize(image_features, dim=1), F.normalize(text_features, dim=1)
    s = logit_scale * image_features @ text_features.T + (0.0 if logit_bias is None else logit_bias)
    m, n = s.shape
    y = (torch.arange(m, device=s.device) if labels is None else labels)[:, None] == torch.arange(n, device=s.device)
    row_id, col_id = (text_ids if image_ids is None else image_ids), (image_ids if text_ids is None else text_ids)
    if row_id is None or col_id is None:
        return s, y, torch.ones_like(y), torch.zeros_like(y)
    present = (row_id != -1)[:, None] & (col_id != -1)
    return s, y & present, present, row_id[:, None] == col_id


def some_ids(m: int, n: int, device: torch.device, g: torch.Generator) -> Tensor:
    """Ids `[M]` of a variant: each about twice, a tenth of them -1."""
    ids = torch.randint(0, max(m // 2, 1), (m,), generator=g)
    return ids.masked_fill(torch.rand(m, generator=g) < 0.1, -1).to(device)
