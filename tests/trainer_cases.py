"""A run of the trainer so small that a test may do it several times."""

from dataclasses import replace

import torch

from fastvlm_loss.trainer.config import (
    CheckpointConfig,
    Config,
    EvaluationConfig,
    OptimizerConfig,
)
from fastvlm_loss.trainer.data import DataConfig, SourceConfig
from fastvlm_loss.trainer.model import FusionConfig, ImageConfig, ModelConfig, TextConfig
from fastvlm_loss.trainer.run import Run
from fastvlm_loss.trainer.world import World

LOCAL = {"multiscale": 0.5, "late_interaction": 0.5}
ALL = {"itc": 1.0, "itm": 1.0, "mlm": 1.0, "caption": 0.5, "vqa": 0.5, **LOCAL}


def config(output, **changes):
    small = Config(
        output=str(output),
        steps=6,
        batch_size=16,
        weights=ALL,
        precision="fp32",
        tensorboard=False,
        data=DataConfig(sources=(SourceConfig(samples=200),), size=32, questions=True, augment=False),
        model=ModelConfig(
            image=ImageConfig(size=32, widths=(8, 8, 16, 16)),
            text=TextConfig(width=32, layers=1, heads=2, inner=64, positions=32),
            fusion=FusionConfig(layers=1),
            embed_dim=16,
            local=(*LOCAL,),
        ),
        optimizer=OptimizerConfig(lr=3e-3),
        checkpoint=CheckpointConfig(every=0),
        evaluation=EvaluationConfig(limit=12, rerank=4),
    )
    return replace(small, **changes)


def train(made, world=None):
    run = Run(made, world or World(torch.device("cpu")))
    run.train()
    return run


def weights(run):
    return {name: value.clone() for name, value in run.source.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
