"""Run by test_distributed.py in several processes: every loss of a group against one process with the whole batch."""

from __future__ import annotations

import datetime
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F

import fastvlm_loss
from fastvlm_loss import filters

D, E = 12, 10  # of the features, of those beside them
SIZES = {"even": (5, 5, 5, 5), "uneven": (7, 2, 5, 1), "with an empty one": (6, 0, 3, 4)}


def unit(n, d, seed, dtype):
    g = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, d, generator=g, dtype=torch.float64), dim=1).to(dtype)


def vector(n, seed, dtype):
    return torch.rand(n, generator=torch.Generator().manual_seed(seed)).add(0.2).to(dtype)


def whole_batch(m, dtype):
    """Everything that the losses may want, of all processes."""
    g = torch.Generator().manual_seed(9)
    return {
        "image_features": unit(m, D, 0, dtype), "text_features": unit(m, D, 1, dtype),
        "image_ids": torch.randint(-1, max(m // 2, 1), (m,), generator=g),
        "text_ids": torch.randint(-1, max(m // 2, 1), (m,), generator=g),
        "labels": torch.randint(-1, m, (m,), generator=g),
        "image_weights": vector(m, 2, torch.float64), "text_weights": vector(m, 3, torch.float64),
        "image_relevance": vector(m, 4, torch.float64), "text_relevance": vector(m, 5, torch.float64),
        "teacher_image_features": unit(m, E, 6, dtype), "teacher_text_features": unit(m, E, 7, dtype),
        "text_embeddings": unit(m, E, 8, dtype), "caption_embeddings": unit(m * 3, E, 16, dtype).view(m, 3, E),
        "guide_image": unit(m, E, 10, dtype), "guide_text": unit(m, E, 11, dtype),
        "image_tokens": unit(m * 4, D, 12, dtype).view(m, 4, D), "text_tokens": unit(m * 3, D, 13, dtype).view(m, 3, D),
        "image_mask": torch.arange(4) < torch.randint(5, (m, 1), generator=g),
        "text_mask": torch.arange(3) < torch.randint(4, (m, 1), generator=g),
        "token_relevance": vector(m * 4, 14, torch.float64).view(m, 4),
        "relevant": torch.randint(-1, m, (m, 3), generator=g), "relevance": vector(m * 3, 15, torch.float64).view(m, 3),
    }  # fmt: skip


LEARNED = (
    "image_features", "text_features", "image_weights", "text_weights", "image_relevance", "text_relevance",
    "teacher_image_features", "teacher_text_features", "image_tokens", "text_tokens", "token_relevance",
)  # fmt: skip
# loss, what it takes of the batch, its other options
CASES = {
    "clip": ("clip_loss", (), {}),
    "clip smoothed and weighted": ("clip_loss", ("image_weights", "text_weights"), {"label_smoothing": 0.1}),
    "clip ids": ("clip_loss", ("image_ids",), {}),
    "clip two ids, out": ("clip_loss", ("image_ids", "text_ids"), {"positives": "out"}),
    "clip ids, in": ("clip_loss", ("image_ids",), {"positives": "in"}),
    "clip labels": ("clip_loss", ("labels", "image_weights"), {}),
    "clip images alone": ("clip_loss", (), {"directions": "image"}),
    "clip texts alone, summed": ("clip_loss", ("text_weights",), {"directions": "text", "reduction": "sum"}),
    "clip normalized": ("clip_loss", (), {"normalize": True}),
    "clip filtered": ("clip_loss", (), {"filters": filters.relative(0.5)}),
    "clip guided": ("clip_loss", ("image_ids", "guide_image", "guide_text"), {}),
    "siglip": ("siglip_loss", (), {}),
    "siglip ids": ("siglip_loss", ("image_ids",), {}),
    "siglip summed": ("siglip_loss", ("text_weights",), {"reduction": "sum"}),
    "siglip weighted": ("siglip_loss", ("image_weights", "text_weights", "image_ids", "text_ids"), {}),
    "relevance": ("relevance_clip_loss", ("image_relevance", "text_relevance"), {}),
    "relevance of logits": (
        "relevance_clip_loss", ("image_relevance", "text_relevance"), {"mode": "logit", "relevance_grad": True}
    ),
    "relevance of rows": ("relevance_clip_loss", ("image_relevance",), {"mode": "logit", "scope": "row"}),
    "relevance shared": ("relevance_clip_loss", ("image_relevance",), {"mode": "logit", "scope": "shared"}),
    "relevance shared, learned": (
        "relevance_clip_loss", ("image_relevance", "image_ids"),
        {"mode": "logit", "scope": "shared", "relevance_grad": True},
    ),
    "late interaction": ("late_interaction_loss", (), {}),
    "late interaction, masked": (
        "late_interaction_loss", ("image_mask", "text_mask", "token_relevance", "image_weights"),
        {"label_smoothing": 0.1, "interaction": "colbert"},
    ),
    "late interaction, ids": ("late_interaction_loss", ("image_ids", "text_ids", "text_mask"), {"positives": "out"}),
    "late interaction, texts": ("late_interaction_loss", ("labels",), {"directions": "text", "normalize": True}),
    "graded": ("graded_clip_loss", ("relevant", "relevance"), {}),
    "graded, weighted": ("graded_clip_loss", ("relevant", "relevance", "image_weights", "text_weights"), {}),
    "graded, texts": ("graded_clip_loss", ("relevant", "relevance"), {"directions": "text", "normalize": True}),
    "soft target": ("soft_target_clip_loss", ("teacher_image_features", "teacher_text_features"), {"alpha": 0.4}),
    "soft target, learned teacher": (
        "soft_target_clip_loss", ("teacher_image_features", "teacher_text_features", "image_ids"),
        {"alpha": 0.4, "teacher_grad": True, "teacher_scale": 7.0},
    ),
    "hard negative": ("hard_negative_clip_loss", (), {"beta": 0.5}),
    "hard negative, debiased": ("hard_negative_clip_loss", ("image_ids",), {"beta": 0.5, "tau_plus": 0.05}),
    "margin": ("margin_clip_loss", ("text_embeddings",), {}),
    "margin, captions": ("margin_clip_loss", ("text_embeddings", "caption_embeddings"), {}),
    "margin, labels": ("margin_clip_loss", ("text_embeddings", "labels"), {"threshold": 0.3}),
    "triplet": ("triplet_loss", (), {}),
    "triplet, hardest": ("triplet_loss", ("image_ids",), {"mining": "max"}),
    "triplet, selective": ("triplet_loss", (), {"mining": "selective"}),
}  # fmt: skip


def evaluate(case, given, group=None):
    """Loss and gradients by name."""
    name, takes, options = CASES[case]
    sides = ("image_tokens", "text_tokens") if name.startswith("late") else ("image_features", "text_features")
    tensors = {k: given[k] for k in (*sides, *takes)}
    options = dict(options)
    if "guide_image" in tensors:
        options["filters"] = filters.guide(tensors.pop("guide_image"), tensors.pop("guide_text"))
    learned = {k: v.clone().requires_grad_() for k, v in tensors.items() if k in LEARNED and not _frozen(case, k)}
    tensors |= learned
    if "token_relevance" in tensors:
        tensors["image_relevance"] = tensors.pop("token_relevance")
    dtype = torch.float64 if given["image_features"].dtype == torch.float64 else torch.float32
    if name != "triplet_loss":
        device = given["image_features"].device
        scale, bias = (torch.full((), v, dtype=dtype, device=device, requires_grad=True) for v in (9.0, -1.0))
        scores = {"logit_scale": scale} | ({} if name == "graded_clip_loss" else {"logit_bias": bias})
        tensors |= scores
        learned |= scores
    loss = getattr(fastvlm_loss, name)(**tensors, **options, group=group)
    return {
        "loss": loss.detach(),
        **dict(zip(learned, torch.autograd.grad(loss, tuple(learned.values())), strict=True)),
    }


def _frozen(case, k):
    options = CASES[case][2]
    if k in ("image_relevance", "text_relevance"):
        return not options.get("relevance_grad")
    return "teacher" in k and not options.get("teacher_grad")


def own(batch, sizes, rank):
    """The part of the batch that a process has."""
    first = sum(sizes[:rank])
    return {k: v[first : first + sizes[rank]] for k, v in batch.items()}


def compare(case, sizes, dtype, group, rank, budget, device="cpu"):
    """What differs from one process with the whole batch, after the average that DDP takes."""
    world = len(sizes)
    batch = {k: v.to(device) for k, v in whole_batch(sum(sizes), dtype).items()}
    want = evaluate(case, batch)
    got = evaluate(case, own(batch, sizes, rank), group)
    wrong = []
    for k, value in got.items():
        expected = want[k]
        if k in ("logit_scale", "logit_bias"):
            value = value.to("cpu", copy=True)
            dist.all_reduce(value, group=group)
            value, expected = value / world, expected.cpu()
        elif k != "loss":
            first = sum(sizes[:rank])
            expected, value = expected[first : first + sizes[rank]], value / world
        error = (value.double() - expected.double()).abs().max().item() if value.numel() else 0.0
        size = max(want[k].double().abs().max().item() if want[k].numel() else 0.0, 1e-3)
        if not error <= budget * size:
            wrong.append(f"{case}, {sizes}, {dtype}, rank {rank}: {k} is off by {error:.2e} of {size:.2e}")
    return wrong


def main(rank, world, port, job, results):
    """One process."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=60))
    try:
        results[rank] = job(rank, world)
    finally:
        dist.destroy_process_group()
