"""Held-out samples, and a model that knows them by heart, so that every figure of an evaluation is known beforehand."""

from functools import cache

import torch
from torch import nn

from fastvlm_loss.trainer.config import Config, EvaluationConfig
from fastvlm_loss.trainer.data import Data, DataConfig, SourceConfig
from fastvlm_loss.trainer.evaluation import evaluate
from fastvlm_loss.trainer.model import FusionConfig, ImageConfig, ModelConfig, TextConfig, VLPretrainModel

TASKS = ("itc", "itm", "mlm", "caption", "vqa")
CPU = torch.device("cpu")
DATA = DataConfig(sources=(SourceConfig(samples=300),), size=32, questions=True)
SMALL = ModelConfig(
    image=ImageConfig(size=32, widths=(8, 8, 16, 16)),
    text=TextConfig(width=32, layers=1, heads=2, inner=64, positions=32, init_range=0.05),
    fusion=FusionConfig(layers=2),
    embed_dim=16,
)
CONFIG = Config(batch_size=8, data=DATA, model=SMALL, evaluation=EvaluationConfig(rerank=4))


@cache
def data():
    return Data.open(DATA)


@cache
def real():
    """A new model of the trainer's."""
    torch.manual_seed(0)
    return VLPretrainModel(SMALL, data().tokenizer)


def judged(model, samples, config=CONFIG, tasks=TASKS):
    return evaluate(model, data().tokenizer, samples, config, CPU, "fp32", tasks)


class Oracle(nn.Module):
    """Answers from memory; of the `forgotten` samples it knows only what is a text of another one.

    A picture's tokens hold its number, a text's states its tokens; fused states hold scores of the next (or hidden)
    token, and, behind those of the vocabulary, the match logits.
    """

    def __init__(self, samples, forgotten=(), blind_guess=None):
        super().__init__()
        self.part, self.log_scale = nn.Dropout(0.5), nn.Parameter(torch.zeros(()))
        self.tokenizer, self.blind_guess = data().tokenizer, blind_guess
        self.vocabulary_size = len(self.tokenizer)
        self.samples, self.pictures = samples, [torch.from_numpy(s.image.copy()) for s in samples]
        self.forgotten, self.calls = set(forgotten), []
        collate = data().collate
        self.captions = [self._tokens(collate.text([s.caption], [s])) for s in samples]
        self.questions = [[self._tokens(collate.question([q])) for q in s.questions] for s in samples]
        self.numbers = {caption: k for k, caption in enumerate(dict.fromkeys(map(tuple, self.captions)))}

    def _tokens(self, batch):
        return batch["tokens"][0][batch["mask"][0]].tolist()

    def forward(self, part, *given):
        self.calls.append(part)
        return getattr(self, f"_{part}")(*given)

    def _features(self, numbers):
        wide = len(self.samples) + 1
        return torch.eye(wide)[[wide - 1 if k is None else k for k in numbers]]

    def _image(self, images):
        rows = [next(i for i, p in enumerate(self.pictures) if torch.equal(p, image)) for image in images]
        known = [None if i in self.forgotten else self.numbers[tuple(self.captions[i])] for i in rows]
        tokens = torch.tensor(rows).float()[:, None, None].expand(-1, 4, 3)
        return {"features": self._features(known), "tokens": tokens}

    def _text(self, tokens, mask, prefix=None):
        known = [self.numbers.get(tuple(row[m].tolist())) for row, m in zip(tokens, mask, strict=True)]
        return {"features": self._features(known), "hidden": tokens.float()[:, :, None].expand(-1, -1, 3)}

    def _fuse(self, hidden, mask, image_tokens, prefix=None):
        fused = torch.zeros(*hidden.shape[:2], self.vocabulary_size + 2)
        for n in range(len(hidden)):
            tokens = hidden[n, :, 0].long()[mask[n]].tolist()
            image = None if image_tokens is None else int(image_tokens[n, 0, 0])
            if prefix is None:
                self._hidden_or_match(fused[n], tokens, image)
            else:
                self._next(fused[n], tokens, int(prefix[n]), image)
        return fused

    def _hidden_or_match(self, fused, tokens, image):
        if image is not None:
            match = tokens == self.captions[image] and image not in self.forgotten
            fused[0, self.vocabulary_size + int(match)] = 1
        for t, token in enumerate(tokens):
            if token == self.tokenizer.mask_id and image is not None and image not in self.forgotten:
                if t < len(self.captions[image]):
                    fused[t, self.captions[image][t]] = 1
            elif token == self.tokenizer.mask_id and image is None and self.blind_guess is not None:
                fused[t, self.blind_guess] = 1

    def _next(self, fused, tokens, prefix, image):
        texts = [self.captions[image]] if prefix == 1 else self.questions[image]
        for t in range(prefix - 1, len(tokens)):
            follows = [text[t + 1] for text in texts if text[: t + 1] == tokens[: t + 1] and len(text) > t + 1]
            if follows and image not in self.forgotten:
                fused[t, follows[0]] = 1

    def _match(self, fused, image_features, text_features):
        return fused[:, 0, self.vocabulary_size :]

    def _words(self, rows):
        return rows

    def _vocabulary(self):
        return torch.eye(self.vocabulary_size, self.vocabulary_size + 2), torch.zeros(self.vocabulary_size)
