import pytest
import torch
from loud_decoder import loud, shape
from torch import nn

from schemas.decoder import DecoderConfig
from stages.nn.attention import RMSNorm
from stages.nn.packing import packable


def test_a_decoder_with_a_part_it_does_not_know_is_not_packed():
    plain, normed, biased = loud(shape()), loud(shape()), loud(shape())
    normed.model.layers[1].self_attn.q_norm = RMSNorm(8, 1e-5)
    biased.model.layers[0].self_attn.o_proj.bias = nn.Parameter(torch.zeros(32))
    assert packable(plain) and not packable(normed) and not packable(biased)


def test_a_decoder_with_a_setting_it_does_not_know_is_not_packed():
    class Further(DecoderConfig):
        invented: int | None = None

    decoder = loud(shape())
    known = decoder.config.model_dump()
    for value, expected in ((None, True), (8, False)):
        decoder.config = Further(**known, invented=value)
        assert packable(decoder) is expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_decoder_of_another_type_than_fp32_is_not_packed(dtype):
    assert not packable(loud(shape()).to(dtype))
