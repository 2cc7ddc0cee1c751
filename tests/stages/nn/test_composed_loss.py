import pytest
import torch
from toy_composed import OTHER, SEED, VOCAB, composed

from stages.nn.composed_loss import ComposedLoss, name_of

BRIDGES = pytest.mark.parametrize("bridge", ["stitch", "calm", "stitch of states", "calm of states"])


class Kept(dict):
    """Features in memory."""

    read = dict.get
    keep = dict.__setitem__


def rows(seed=0):
    return torch.randint(VOCAB, (3, 25), generator=torch.Generator().manual_seed(seed))


def gradients(loss, row):
    loss.zero_grad()
    parts = loss(row)
    parts["loss"].backward()
    return parts["loss"].detach(), {n: p.grad for n, p in loss.named_parameters() if p.grad is not None}


@BRIDGES
@pytest.mark.parametrize("gate", [True, False])
def test_kept_features_change_no_bit_and_spare_the_experts(bridge, gate, monkeypatch):
    model, kept = composed(bridge, experts=(SEED, OTHER), gate=gate).train(), Kept()
    expected = gradients(ComposedLoss(model), rows())
    loss = ComposedLoss(model, kept)
    cold = gradients(loss, rows())
    monkeypatch.setattr(model, "consult", None)
    warm = gradients(loss, rows())
    assert len(kept) == 1 and expected[1]
    for found in (cold, warm):
        assert torch.equal(found[0], expected[0])
        assert found[1].keys() == expected[1].keys()
        assert all(torch.equal(found[1][name], expected[1][name]) for name in expected[1])


def test_of_other_rows_the_experts_are_asked():
    model, kept = composed().train(), Kept()
    loss = ComposedLoss(model, kept)
    for seed in range(3):
        found = loss(rows(seed))["loss"]
        assert torch.equal(found, ComposedLoss(model)(rows(seed))["loss"])
    assert len(kept) == 3


def test_only_states_that_are_read_are_kept():
    model, kept = composed("stitch", experts=(SEED, OTHER)).train(), Kept()
    ComposedLoss(model, kept)(rows())
    (tensors,) = kept.values()
    depths = model.bridges.depths_read()
    assert depths == {model.bridges.depths[site] for site in ("latent_1", "latent_2", "token_1")}
    expected = {f"state.{x}.{round(depth * layers)}" for x, layers in ((0, 4), (1, 3)) for depth in depths}
    assert set(tensors) == {"prior", "target"} | expected


def test_the_name_says_rows_shape_and_precision():
    row = rows()
    whole = name_of(row, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        half = name_of(row, torch.float32)
    others = [name_of(other, torch.float32) for other in (row.flip(0), row[:2], row.view(5, 15))]
    assert len({whole, half, name_of(row, torch.bfloat16), *others}) == 6
    assert name_of(row.clone(), torch.float32) == whole
