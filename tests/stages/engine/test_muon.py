import pytest
import torch
from torch import nn

from stages.engine import muon
from stages.engine.muon import Muon, nearly_orthogonal

SHAPES = [(12, 12), (12, 30), (30, 12)]


def matrices(shape, count=3):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_come_near_one_and_vectors_stay(shape, half, monkeypatch):
    monkeypatch.setattr(muon, "bf16_is_fast", lambda device: half)
    for found, given in zip(nearly_orthogonal(matrices(shape)).float(), matrices(shape), strict=True):
        left, _, right = torch.linalg.svd(given, full_matrices=False)
        inside = left.T @ found @ right.T
        assert inside.diag().min() > 0.6
        assert inside.diag().max() < 1.25
        assert (inside - inside.diag().diag()).abs().max() < (0.02 if half else 1e-5)


def test_a_matrix_of_zeros_stays_one():
    assert torch.equal(nearly_orthogonal(torch.zeros(1, 4, 6)), torch.zeros(1, 4, 6))


def steps_of(parameters, gradients, each_alone):
    of_their_own = [[p] for p in parameters] if each_alone else [parameters]
    optimizers = [Muon(few, lr=0.1, weight_decay=0.1) for few in of_their_own]
    for scale in (1.0, -0.3):
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = scale * gradient
        for optimizer in optimizers:
            optimizer.step()
    return [p.detach() for p in parameters]


@pytest.mark.parametrize("together", [2**24, 1, 400])
def test_matrices_of_a_shape_go_together_and_move_as_each_alone(together, monkeypatch):
    monkeypatch.setattr(muon, "TOGETHER", together)
    given = [matrix for shape in SHAPES for matrix in matrices(shape)]
    gradients = [matrix.roll(1, 0) for matrix in given]
    found, alone = (steps_of([nn.Parameter(m.clone()) for m in given], gradients, way) for way in (False, True))
    for one, other, before in zip(found, alone, given, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
        assert (one - before).abs().max() > 0.01


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has it from 2.9 on")
def test_a_step_is_that_of_torchs_muon_up_to_its_bf16(monkeypatch):
    monkeypatch.setattr(muon, "bf16_is_fast", lambda device: True)
    ours, theirs = (nn.Parameter(matrices((12, 30), 1)[0]) for _ in range(2))
    optimizers = [
        Muon([ours], lr=0.1, weight_decay=0.1),
        torch.optim.Muon([theirs], lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    ]
    for _ in range(3):
        ours.grad, theirs.grad = matrices((12, 30), 2)[1], matrices((12, 30), 2)[1]
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, atol=5e-3, rtol=0)


def test_what_has_no_gradient_stays():
    still = nn.Parameter(torch.ones(3, 4))
    Muon([still], lr=0.1, weight_decay=0.1).step()
    assert torch.equal(still, torch.ones(3, 4))
