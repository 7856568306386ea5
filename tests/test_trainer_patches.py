"""The objectives of a picture's patches: their heads, what their losses are, and how they are judged."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from evaluation_cases import CONFIG, SMALL, data, judged
from trainer_cases import LOCAL, config, train
from trainer_models import pictures, small, texts

from fastvlm_loss import ITMBatch, late_interaction_loss
from fastvlm_loss.trainer import patches as objectives
from fastvlm_loss.trainer.config import LocalConfig, StageConfig
from fastvlm_loss.trainer.evaluation import patches as evaluation
from fastvlm_loss.trainer.evaluation.held import encode
from fastvlm_loss.trainer.evaluation.retrieval import rank
from fastvlm_loss.trainer.model import ModelConfig, VLPretrainModel
from fastvlm_loss.trainer.plan import plan
from fastvlm_loss.trainer.report import write
from fastvlm_loss.trainer.report.curves import NAMES
from fastvlm_loss.trainer.run import Run
from fastvlm_loss.trainer.stages import stages_of
from fastvlm_loss.trainer.world import World

HERE = World(torch.device("cpu"))
LOCAL_NAMES = (*LOCAL,)
WIDE = replace(SMALL, local=LOCAL_NAMES)


@pytest.fixture(scope="module")
def model():
    return small(local=LOCAL_NAMES)


def both(model, count=3):
    tokens, mask = texts([7, 4, 6][:count])
    return model("image", pictures(count)), model("text", tokens, mask), mask


def test_heads_give_vectors_of_length_one_in_fp32(model):
    image, text, _ = both(model)
    with torch.autocast("cpu", torch.bfloat16):
        coarse = model("multiscale", image["tokens"])
        fine = model("late_interaction", image["tokens"], text["hidden"])
    assert coarse["patches"].shape == fine["patches"].shape == (3, 17, 16) and fine["words"].shape == (3, 7, 16)
    for rows in (coarse["patches"], fine["patches"], fine["words"]):
        torch.testing.assert_close(rows.norm(dim=2), torch.ones(rows.shape[:2]))
    assert coarse["scale"].tolist() == [10.0] and coarse["bias"].tolist() == [-5.0]
    assert fine["scale"].item() == pytest.approx(1 / 0.07)


def test_a_model_without_the_heads_says_so():
    with pytest.raises(ValueError, match="part: got 'multiscale', wanted a model with multiscale in local"):
        small()("multiscale", torch.zeros(2, 3, 32))
    with pytest.raises(ValueError, match="local: got 'patches', wanted one of 'multiscale', 'late_interaction'"):
        ModelConfig(local=("patches",))
    assert not [name for name, _ in small().named_parameters() if any(local in name for local in LOCAL)]


def test_an_objective_wants_its_head(tmp_path):
    with pytest.raises(ValueError, match=r"^weights.late_interaction: got .* model.local=\[\], wanted it there"):
        stages_of(config(tmp_path, model=SMALL, weights={"late_interaction": 1.0}))
    own = (StageConfig("a", 0.5, {"itc": 1.0}), StageConfig("b", 0.5, {"multiscale": 1.0}))
    with pytest.raises(ValueError, match=r"^stages\[1\].weights.multiscale: got"):
        stages_of(config(tmp_path, model=SMALL, stages=own))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (("multiscale", torch.zeros(2, 3)), r"image_tokens: got .*\[2, 3\]"),
        (("multiscale", torch.zeros(2, 3, 8)), r"image_tokens: got .*\[2, 3, 8\], wanted width 32"),
        (("late_interaction", torch.zeros(2, 3, 32), torch.zeros(2, 3, 8)), "hidden: got .*wanted width 32"),
    ],
)
def test_errors_name_what_was_given(model, call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        model(*call)


@pytest.mark.parametrize("task", LOCAL)
def test_a_run_of_it_alone_has_a_plan_and_a_report(tmp_path, task):
    made = config(tmp_path, steps=2, weights={task: 1.0})
    assert f"; {task} 1; " in plan(Run(made, HERE))
    run = train(made)
    idle = ("fusion.", "heads.match", "heads.words", "image_projection.", "temperature.")
    assert not [n for n, p in run.source.named_parameters() if p.requires_grad and n.startswith(idle)]
    assert NAMES[task] in write(run.folder, run.evaluate()).read_text()


def test_multiscale_is_cross_entropy_of_the_leaning_mean_over_patches(model):
    image, text, _ = both(model)
    pairs = ITMBatch(*map(torch.tensor, ([0, 1, 2, 0], [0, 1, 2, 2], [1, 1, 1, 0], [0.2, 0.2, 0.2, 0.4])))
    got = objectives.multiscale(model, LocalConfig(sharpness=5.0), HERE, image["tokens"], text["features"], pairs)
    patches = F.normalize(model.heads["multiscale"].patches(image["tokens"]), dim=-1)
    products = torch.einsum("npd,nd->np", patches[pairs.image_index], text["features"][pairs.text_index])
    score = ((5 * products).logsumexp(1) - math.log(17)) / 5
    want = F.binary_cross_entropy_with_logits(10 * score - 5, pairs.labels.float(), pairs.weights, reduction="sum")
    torch.testing.assert_close(got, want)


def test_late_interaction_leaves_padding_and_equal_captions_out(model):
    image, text, mask = both(model)
    ids = torch.tensor([4, 9, 4])
    got = objectives.late_interaction(model, LocalConfig(), HERE, image["tokens"], text["hidden"], mask, ids)
    x = F.normalize(model.heads["late_interaction"].patches(image["tokens"]), dim=-1)
    y = F.normalize(model.heads["late_interaction"].words(text["hidden"]), dim=-1)
    scale = torch.tensor(1 / 0.07)
    want = late_interaction_loss(x, y, scale, text_mask=mask, image_ids=ids, text_ids=ids)
    torch.testing.assert_close(got, want)
    shifted = text["hidden"].masked_fill(~mask[..., None], 7.0)
    again = objectives.late_interaction(model, LocalConfig(), HERE, image["tokens"], shifted, mask, ids)
    torch.testing.assert_close(again, got)


def test_the_temperature_is_kept_in_its_range():
    model = small(local=LOCAL_NAMES)
    head = model.heads["late_interaction"]
    for value, want in ((9.0, math.log(100)), (-1.0, 0.0)):
        torch.nn.init.constant_(head.log_scale, value)
        model.clamp_logit_scale()
        assert head.log_scale.item() == pytest.approx(want)


@pytest.fixture(scope="module")
def held():
    torch.manual_seed(0)
    model = VLPretrainModel(WIDE, data().tokenizer).eval()
    with torch.no_grad():
        return encode(model, data().tokenizer, data().collate, data().held(24), torch.device("cpu"))


@pytest.mark.parametrize("interaction", ["filip", "colbert"])
@torch.no_grad()
def test_ranks_are_those_of_every_product(held, interaction, monkeypatch):
    monkeypatch.setattr(evaluation, "_PRODUCTS", 50_000)  # a few rows at a time
    found = evaluation.late_interaction(held, LocalConfig(interaction=interaction))
    made = held.model("late_interaction", held.tokens, held.texts.hidden)
    x, y, mask = made["patches"], made["words"], held.texts.mask
    scores = {"i2t": torch.zeros(24, 24), "t2i": torch.zeros(24, 24)}
    for i in range(24):
        for j in range(24):
            products = x[i] @ y[j][mask[j]].T
            total = {"filip": torch.mean, "colbert": torch.sum}[interaction]
            scores["i2t"][i, j], scores["t2i"][j, i] = total(products.amax(1)), total(products.amax(0))
    for way, table in scores.items():
        right = held.ids[:, None] == held.ids[None]
        best = table.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        rank = ((table >= best) & ~right).sum(1)
        for k in (1, 5, 10):
            assert found[f"late_interaction/{way}_r{k}"] == pytest.approx(100 * (rank < k).float().mean().item())


@torch.no_grad()
def test_multiscale_is_judged_on_the_hardest_pairs(held):
    found = evaluation.multiscale(held, 8, LocalConfig())
    assert set(found) == {"multiscale/accuracy_hard"} and 0 <= found["multiscale/accuracy_hard"] <= 100
    model = copy.deepcopy(held.model)
    model.heads["multiscale"].bias += 50.0
    always = evaluation.multiscale(replace(held, model=model), 8, LocalConfig())
    assert always == {"multiscale/accuracy_hard": 50.0}, "it says yes to all"


def test_figures_are_those_of_the_objectives(held):
    recalls = {f"late_interaction/{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)} | {"late_interaction/r10"}
    wanted = {
        "multiscale": {"multiscale/accuracy_hard"},
        "late_interaction": recalls | {f"retrieval/chance_r{k}" for k in (1, 5, 10)},
    }
    for task, names in wanted.items():
        assert set(judged(held.model, held.samples, replace(CONFIG, model=WIDE), (task,)).figures) == names


@torch.no_grad()
def test_recalls_under_autocast_are_those_of_exact_scores(held):
    """Scores in bf16 would tie, and a tie counts as wrong."""
    exact = evaluation.late_interaction(held, LocalConfig()), rank(held, 5)
    with torch.autocast("cpu", torch.bfloat16):
        other = evaluation.late_interaction(held, LocalConfig()), rank(held, 5)
    assert other[0] == exact[0]
    for way, found in exact[1].items():
        assert torch.equal(other[1][way].ranks, found.ranks) and torch.equal(other[1][way].order, found.order)


def test_they_learn(tmp_path):
    run = train(config(tmp_path, steps=60, weights={"itc": 1.0, **LOCAL}))
    lines = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
    raw = [line["raw"] for line in lines if "raw" in line]
    for name in LOCAL:
        first, last = (sum(r[name] for r in part) / 10 for part in (raw[:10], raw[-10:]))
        assert last < 0.9 * first, f"{name}: {first:.3f} to {last:.3f}"
