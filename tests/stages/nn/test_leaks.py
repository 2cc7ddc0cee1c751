"""The alarm rings for a model that looks ahead, and only for one."""

import torch

from stages.nn.leaks import gap_to_prefix

VOCABULARY = 7


def logits_of(states_BT):
    return states_BT[..., None] * torch.arange(VOCABULARY)


def test_a_model_that_sees_only_the_past_has_no_gap():
    ids = torch.randint(VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(0))
    assert gap_to_prefix(lambda x: logits_of(x.double().cumsum(1) / 10), ids) < 1e-6


def test_a_model_that_sees_the_next_token_has_a_gap():
    ids = torch.randint(VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(0))
    assert gap_to_prefix(lambda x: logits_of(x.double().roll(-1, 1) / 10), ids) > 0.1


def test_a_model_that_sees_the_length_of_the_text_has_a_gap():
    ids = torch.zeros(1, 20, dtype=torch.long)
    assert gap_to_prefix(lambda x: logits_of(torch.full(x.shape, float(x.shape[1]) / 20)), ids) > 0.1
