"""A model small enough to train in milliseconds, with the batches and settings of its training."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from schemas.training import TrainingConfig

VOCAB = 17
BAD = VOCAB  # a token with which the loss is infinite, though its gradient is not


class Toy(nn.Module):
    """Next-token loss of an embedding, a hidden layer and a norm: matrices, vectors and something frozen."""

    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(VOCAB, 8)
        self.hidden = nn.Linear(8, 12)
        self.norm = nn.LayerNorm(12)
        self.out = nn.Linear(12, VOCAB, bias=False)
        self.frozen = nn.Linear(12, 12).requires_grad_(False)
        self.dropout = dropout

    def forward(self, rows):
        bad, rows = (rows == BAD).any(), rows.clamp(max=VOCAB - 1)
        x = F.gelu(self.hidden(F.dropout(self.embed(rows[:, :-1]), self.dropout)))
        x = self.norm(x + self.frozen(x))
        loss = F.cross_entropy(self.out(x).flatten(0, 1), rows[:, 1:].flatten())
        loss = loss + torch.where(bad, math.inf, 0.0)
        return {"loss": loss, "size": x.detach().square().mean()}


def config(**changes):
    settings = {
        "steps": 8, "batch_size": 4, "sequence_length": 6, "learning_rate": 1e-2, "warmup": 0.25, "log_every": 1,
        "checkpoint_every": 3, "engine": "torch", "optimizer": "adamw", "precision": "fp32",
        "gradient_clipping": 0.85,  # of some steps
    }  # fmt: skip
    return TrainingConfig(**{**settings, **changes})


def batch_at(step):
    return torch.randint(VOCAB, (4, 7), generator=torch.Generator().manual_seed(100 + step))


def batch_with(*bad):
    """`batch_at`, with a bad token in the second row of the steps `bad`; with two processes, the second gets it."""

    def batches(step):
        rows = batch_at(step)
        if step in bad:
            rows[1, 2] = BAD
        return rows

    return batches


def weights(module):
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
