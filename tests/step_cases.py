"""A training step with each loss that the package offers. Used by several tests."""

import torch
import torch.nn.functional as F
from torch import nn

from fastvlm_loss import (
    BatchNegatives,
    MatchingHead,
    clip_loss,
    hard_negatives,
    itm_batch,
    itm_loss,
    multiscale_itm_loss,
)
from fastvlm_loss.losses import documented
from fastvlm_loss.testing import Case, inputs

PAIRS, DIM, PATCHES = 12, 8, 3


class Step(nn.Module):
    """Linear towers, what else is learned, and a loss: forward of a training step."""

    def __init__(self, loss, tensors, options, matching=False):
        super().__init__()
        torch.manual_seed(0)
        raw = {name: t.detach() for name, t in tensors.items() if t.dim() > 1}
        device = next(iter(raw.values())).device
        self.loss, self.options, self.raw = loss, options, raw
        self.towers = nn.ModuleDict({name: nn.Linear(t.shape[-1], t.shape[-1]) for name, t in raw.items()}).to(device)
        self.learned = nn.ParameterDict({name: t.detach() for name, t in tensors.items() if t.dim() < 2})
        self.head = MatchingHead(DIM) if matching else None

    def forward(self):
        features = {name: F.normalize(tower(self.raw[name]), dim=-1) for name, tower in self.towers.items()}
        head = {} if self.head is None else {"head": self.head}
        return self.loss(**features, **self.learned, **self.options, **head)


def matching(image_features, text_features, logit_scale, head):
    """ALBEF's step: the negatives are a by-product of the contrastive loss."""
    beside = BatchNegatives(seed=1, step=2)
    contrastive = clip_loss(image_features, text_features, logit_scale, negatives=beside)
    pairs = itm_batch(beside.found, seed=1, step=2)
    logits = head(image_features, text_features, pairs.image_index, pairs.text_index)
    return contrastive + itm_loss(logits, pairs.labels, pairs.weights)


def multiscale(patch_features, text_features, logit_scale):
    found = hard_negatives(patch_features[:, 0].detach(), text_features.detach(), 2, seed=1, step=2)
    return multiscale_itm_loss(patch_features, text_features, itm_batch(found, mode="weight"), logit_scale, -5.0)


LOSSES = [*documented, "itm_loss", "multiscale_itm_loss"]


def made(name, variant=0, device="cpu"):
    """A step with this loss."""
    if name in documented:
        spec = documented[name]
        case = Case(PAIRS, DIM, bias=-1.0, options=spec.variants[variant], device=device)
        return Step(spec.function, *inputs(spec, case))
    tensors, _ = inputs(documented["clip_loss"], Case(PAIRS, DIM, device=device))
    if name == "itm_loss":
        return Step(matching, tensors, {}, matching=True)
    image = tensors.pop("image_features")[:, None] + torch.linspace(-1, 1, PATCHES, device=device)[:, None]
    return Step(multiscale, {"patch_features": image, **tensors}, {})


def train(step, run):
    """One step of SGD: the loss, the gradients and what became of the parameters."""
    optimizer = torch.optim.SGD(step.parameters(), 0.1)
    loss = run()
    loss.sum().backward()
    gradients = [p.grad.clone() for p in step.parameters()]
    optimizer.step()
    return [loss.detach(), *gradients, *(p.detach() for p in step.parameters())]
