"""ALBEF's training step, small: two towers, a contrastive loss, hard negatives, a fusion encoder that tells matches.

    python examples/albef_step.py                     # both variants, from the same weights and on the same pairs
    python examples/albef_step.py --variant ours      # or "usual": the loop of ALBEF, BLIP and LAVIS

The variants differ in two lines of `ours`, marked below. Of ALBEF (Li et al. 2021, section 3) the momentum towers and
masked language modelling are left out. The pairs are made up: a picture shows three of 32 things, its caption names
them.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvlm_loss import BatchNegatives, clip_loss, itm_batch, itm_loss

THINGS, SHOWN, PATCH = 32, 3, 16  # kinds of things, of them in a picture, numbers in a patch
WIDTH, DIM = 32, 32  # of the encoders, of the features
SEED = 0

Pairs = tuple[Tensor, Tensor, Tensor, Tensor | None]  # index of each image and text `[n]`, labels, weights
Step = Callable[[Tensor, Tensor, Tensor, Tensor, int], tuple[Tensor, Pairs]]


def usual(image: Tensor, text: Tensor, scale: Tensor, ids: Tensor, step: int) -> tuple[Tensor, Pairs]:
    """The contrastive loss and the pairs to match as they are usually made: B x B scores, a draw and a wait per row."""
    scores = scale * image @ text.T
    every = torch.arange(len(scores))
    contrastive = (F.cross_entropy(scores, every) + F.cross_entropy(scores.T, every)) / 2
    with torch.no_grad():
        to_text, to_image = scores.softmax(1), scores.T.softmax(1)
        to_text.fill_diagonal_(0)
        to_image.fill_diagonal_(0)
    wrong_image = torch.tensor([torch.multinomial(weights, 1).item() for weights in to_image])
    wrong_text = torch.tensor([torch.multinomial(weights, 1).item() for weights in to_text])
    labels = torch.cat([torch.ones_like(every), torch.zeros_like(every), torch.zeros_like(every)])
    return contrastive, (torch.cat([every, wrong_image, every]), torch.cat([every, every, wrong_text]), labels, None)


def ours(image: Tensor, text: Tensor, scale: Tensor, ids: Tensor, step: int) -> tuple[Tensor, Pairs]:
    """The same without the matrix and without waiting; equal captions are no negatives."""
    negatives = BatchNegatives(seed=SEED, step=step)  # <- the first line: the loss's own pass picks the negatives
    contrastive = clip_loss(image, text, scale, image_ids=ids, negatives=negatives)
    return contrastive, itm_batch(negatives.found, mode="albef")  # <- the second: matches, wrong images, wrong texts


VARIANTS: dict[str, Step] = {"usual": usual, "ours": ours}


class Tower(nn.Module):
    """Tokens of one modality in context, and one feature of unit length."""

    def __init__(self, embed: nn.Module) -> None:
        super().__init__()
        self.embed = embed
        self.first = nn.Parameter(0.02 * torch.randn(1, 1, WIDTH))
        self.layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)
        self.project = nn.Linear(WIDTH, DIM)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, T, ...]` to tokens `[B, 1 + T, WIDTH]` and features `[B, DIM]`."""
        x = self.embed(inputs)
        x = self.layer(torch.cat([self.first.expand(len(x), -1, -1), x], 1))
        return x, F.normalize(self.project(x[:, 0]), dim=1)


class Model(nn.Module):
    """Two towers, and a fusion encoder in which a text looks at an image."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = Tower(nn.Linear(PATCH, WIDTH)), Tower(nn.Embedding(THINGS, WIDTH))
        self.fusion = nn.TransformerDecoderLayer(WIDTH, 4, 2 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)
        self.head = nn.Linear(WIDTH, 2)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def losses(self, patches: Tensor, words: Tensor, ids: Tensor, step: int, variant: Step) -> tuple[Tensor, Tensor]:
        """The contrastive and the matching loss of one batch."""
        image_tokens, image = self.image(patches)
        text_tokens, text = self.text(words)
        contrastive, (image_index, text_index, labels, weights) = variant(image, text, self.log_scale.exp(), ids, step)
        fused = self.fusion(text_tokens[text_index], image_tokens[image_index])
        return contrastive, itm_loss(self.head(fused[:, 0]), labels, weights)


def pairs(count: int, kinds: Tensor, dice: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Patches `[count, SHOWN, PATCH]`, words `[count, SHOWN]` in another order, ids `[count]` of the contents."""
    shown = torch.rand(count, THINGS, generator=dice).argsort(1)[:, :SHOWN]
    patches = kinds[shown] + 0.3 * torch.randn(count, SHOWN, PATCH, generator=dice)
    words = shown.gather(1, torch.rand(count, SHOWN, generator=dice).argsort(1))
    return patches, words, (shown.sort(1).values * THINGS ** torch.arange(SHOWN)).sum(1)


def train(variant: Step, steps: int, batch: int) -> list[tuple[float, float]]:
    """Contrastive and matching loss of every step."""
    torch.manual_seed(SEED)
    dice = torch.Generator().manual_seed(SEED)
    kinds, model = torch.randn(THINGS, PATCH, generator=dice), Model()
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3, betas=(0.9, 0.98))
    history = []
    for step in range(steps):
        contrastive, matching = model.losses(*pairs(batch, kinds, dice), step, variant)
        optimizer.zero_grad()
        (contrastive + matching).backward()
        optimizer.step()
        with torch.no_grad():
            model.log_scale.clamp_(0, math.log(100))
        history.append((contrastive.item(), matching.item()))
    return history


def main() -> None:
    """Train and print the mean losses of every ten steps."""
    parser = argparse.ArgumentParser(description="ALBEF's training step, small")
    parser.add_argument("--variant", choices=[*VARIANTS, "both"], default="both")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch", type=int, default=48)
    options = parser.parse_args()
    chosen = [options.variant] if options.variant != "both" else list(VARIANTS)
    runs = [torch.tensor(train(VARIANTS[name], options.steps, options.batch)) for name in chosen]
    print("step", *(f"{name + ' contrastive':>18} {'matching':>8}" for name in chosen))
    for first in range(0, options.steps, 10):
        means = [run[first : first + 10].mean(0).tolist() for run in runs]
        print(f"{first:4d}", *(f"{contrastive:18.3f} {matching:8.3f}" for contrastive, matching in means))


if __name__ == "__main__":
    main()
