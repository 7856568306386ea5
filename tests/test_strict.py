"""`strict=`: a sample that no positive gives a loss is an error, in every loss that would drop it."""

import pytest
import torch
import torch.nn.functional as F

import fastvlm_loss
from fastvlm_loss import clip_loss, late_interaction_loss, triplet_loss

X, Y = (F.normalize(torch.randn(n, 8, generator=torch.Generator().manual_seed(n)), dim=1) for n in (5, 4))
LABELS, EACH = torch.tensor([0, -1, 2, -1, 2]), torch.tensor([0, 1, 2, 3, 3])
IMAGES = "strict: got 2 of 5 images without a positive, the first at index 1, wanted one for each"
TEXTS = "strict: got 2 of 4 texts without a positive, the first at index 1, wanted one for each"


def test_the_first_is_named_and_all_are_counted():
    with pytest.raises(ValueError, match=IMAGES):
        clip_loss(X, Y, 5.0, labels=LABELS, strict=True)
    with pytest.raises(ValueError, match=TEXTS):
        clip_loss(X, Y, 5.0, labels=LABELS, directions="text", strict=True)
    with pytest.raises(ValueError, match=TEXTS):
        clip_loss(X, Y, 5.0, labels=torch.tensor([0, 0, 2, 2, 2]), strict=True)
    with pytest.raises(TypeError, match="strict: got int 1, wanted True or False"):
        clip_loss(X, Y, 5.0, labels=EACH, strict=1)


def test_a_batch_without_fault_has_the_same_loss():
    for given in ({"labels": EACH}, {"labels": torch.tensor([0, 0, 2, 2, 2]), "directions": "image"}):
        assert torch.equal(clip_loss(X, Y, 5.0, **given, strict=True), clip_loss(X, Y, 5.0, **given))
    assert torch.equal(clip_loss(X[:4], Y, 5.0, strict=True), clip_loss(X[:4], Y, 5.0))


def test_an_id_of_minus_one_takes_part_in_nothing_but_its_partner_does():
    ids = torch.tensor([0, -1, 2, 3])
    assert clip_loss(X[:4], Y, 5.0, image_ids=ids, strict=True).isfinite()  # the pair is out as a whole
    with pytest.raises(ValueError, match="got 1 of 4 texts without a positive, the first at index 1"):
        clip_loss(X[:4], Y, 5.0, image_ids=ids, text_ids=torch.arange(4), strict=True)


def test_equal_ids_are_positives_where_the_loss_says_so():
    given = {"labels": LABELS, "image_ids": torch.tensor([0, 1, 2, 3, 2]), "text_ids": torch.arange(4)}
    for positives in ("out", "in"):
        assert clip_loss(X, Y, 5.0, **given, positives=positives, strict=True).isfinite()
    with pytest.raises(ValueError, match=IMAGES):
        clip_loss(X, Y, 5.0, **given, strict=True)


@pytest.mark.parametrize("name", ["relevance", "soft_target", "hard_negative", "margin", "triplet", "late_interaction"])
def test_every_loss_that_drops_samples_is_strict_if_asked(name):
    more = {
        "relevance": {"image_relevance": torch.ones(5), "text_relevance": torch.ones(4)},
        "soft_target": {"teacher_image_features": X, "teacher_text_features": Y},
        "margin": {"text_embeddings": Y},
    }.get(name, {})
    loss = getattr(fastvlm_loss, f"{name}_loss" if name in ("triplet", "late_interaction") else f"{name}_clip_loss")
    features = (X[:, None], Y[:, None]) if name == "late_interaction" else (X, Y)
    scale = () if name == "triplet" else (5.0,)
    assert loss(*features, *scale, **more, labels=LABELS).isfinite()
    assert loss(*features, *scale, **more, labels=EACH, strict=True).isfinite()
    with pytest.raises(ValueError, match=IMAGES):
        loss(*features, *scale, **more, labels=LABELS, strict=True)


def test_the_image_of_a_text_without_tokens_has_no_positive():
    mask = torch.tensor([[True], [False], [True], [True]])
    given = {"image_tokens": X[:4, None], "text_tokens": Y[:, None], "logit_scale": 5.0, "text_mask": mask}
    assert late_interaction_loss(**given).isfinite()
    with pytest.raises(ValueError, match="got 1 of 4 images without a positive, the first at index 1"):
        late_interaction_loss(**given, strict=True)


def test_an_empty_batch_has_nobody_without_a_positive():
    assert clip_loss(X[:0], Y[:0], 5.0, strict=True) == 0 and triplet_loss(X[:0], Y[:0], strict=True) == 0
