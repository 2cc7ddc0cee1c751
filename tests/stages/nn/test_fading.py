import pytest
import torch

from stages.nn import fading
from stages.nn.fading import fading_sums

FADINGS = pytest.mark.parametrize("factor", [0.0, 0.5, 0.99, 1.0])


def some(tokens=40):
    draw = torch.Generator().manual_seed(3)
    return torch.randn(2, tokens, 5, generator=draw), torch.rand(2, tokens, generator=draw) < 0.15


def step_by_step(x, factor, begins, before=None):
    state = torch.zeros_like(x[:, 0]) if before is None else before
    out = []
    for token in range(x.shape[1]):
        state = x[:, token] + factor * state * ~begins[:, token, None]
        out.append(state)
    return torch.stack(out, 1)


@FADINGS
@pytest.mark.parametrize("chunk", [1, 7, 40, 512])
def test_chunks_equal_the_recurrence(factor, chunk, monkeypatch):
    monkeypatch.setattr(fading, "CHUNK", chunk)
    x, begins = some()
    torch.testing.assert_close(fading_sums(x, factor, begins), step_by_step(x, factor, begins))


@FADINGS
@pytest.mark.parametrize("cut", [1, 13, 39])
def test_a_text_read_in_two_parts_has_the_same_sums(factor, cut):
    x, begins = some()
    whole = fading_sums(x, factor, begins)
    first = fading_sums(x[:, :cut], factor, begins[:, :cut])
    second = fading_sums(x[:, cut:], factor, begins[:, cut:], first[:, -1])
    torch.testing.assert_close(torch.cat([first, second], 1), whole)


def test_without_fading_away_it_is_the_plain_sum_and_with_nothing_kept_the_input():
    x, _ = some()
    torch.testing.assert_close(fading_sums(x, 1.0), x.cumsum(1))
    assert torch.equal(fading_sums(x, 0.0), x)


def test_a_document_does_not_see_the_one_before_it_nor_any_what_comes_after():
    x, begins = some()
    begins[:] = False
    begins[:, 20] = True
    other = x.clone()
    other[:, 10] += 1
    moved = (fading_sums(other, 0.9, begins) != fading_sums(x, 0.9, begins)).any(-1).any(0)
    assert moved.nonzero().flatten().tolist() == list(range(10, 20))
