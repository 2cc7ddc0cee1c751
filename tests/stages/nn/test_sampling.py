import pytest
import torch

from schemas.decoder import DecoderConfig
from stages.nn.decoder import Decoder
from stages.nn.sampling import SAMPLE_TOKENS, draw, likeliest

PROBABILITIES = torch.tensor([0.02, 0.4, 0.08, 0.25, 0.05, 0.2])


def drawn(count=4000, temperature=1.0, top_k=None, top_p=1.0, seed=0, probabilities=PROBABILITIES):
    generator = torch.Generator().manual_seed(seed)
    log_probs = probabilities.log()
    return [draw(log_probs, temperature, top_k, top_p, generator) for _ in range(count)]


def cut(probabilities, top_k, top_p):
    """The likeliest tokens: k at most, and no more than are needed for the mass p. Renormalised."""
    kept, mass = {}, 0.0
    for token in sorted(range(len(probabilities)), key=lambda token: -probabilities[token]):
        if mass >= top_p - 1e-9 or (top_k is not None and len(kept) == top_k):
            break
        kept[token] = float(probabilities[token])
        mass += kept[token]
    return {token: probability / sum(kept.values()) for token, probability in kept.items()}


def chi_square(tokens, expected):
    assert set(tokens) <= set(expected)
    return sum((tokens.count(token) - len(tokens) * p) ** 2 / (len(tokens) * p) for token, p in expected.items())


def test_temperature_zero_is_the_likeliest_whatever_the_seed():
    assert {draw(PROBABILITIES.log(), 0, None, 0.5, torch.Generator().manual_seed(seed)) for seed in range(20)} == {1}


def test_a_low_temperature_comes_to_the_likeliest():
    assert set(drawn(200, temperature=0.01)) == {1}


@pytest.mark.parametrize(
    ("top_k", "top_p"),
    [(None, 1.0), (1, 1.0), (3, 1.0), (99, 1.0), (None, 0.01), (None, 0.5), (None, 0.7), (None, 0.9), (2, 0.9)],
)
def test_top_k_and_top_p_draw_from_what_they_say(top_k, top_p):
    expected = cut(PROBABILITIES, top_k, top_p)
    tokens = drawn(top_k=top_k, top_p=top_p)
    assert set(tokens) == set(expected)
    # 20.5: the 99.9 % quantile of chi-square with 5 degrees of freedom, the most there are here
    assert chi_square(tokens, expected) < 20.5


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_softmax_at_the_temperature(temperature):
    powers = PROBABILITIES ** (1 / temperature)
    expected = dict(enumerate((powers / powers.sum()).tolist()))
    assert chi_square(drawn(temperature=temperature), expected) < 20.5
    other = dict(enumerate(PROBABILITIES.tolist()))
    if temperature != 1.0:
        assert chi_square(drawn(temperature=temperature), other) > 100  # so the test can tell


def test_the_cut_comes_after_the_temperature():
    # flattened, the first token holds less than half, so a second one is let in
    assert set(drawn(500, top_p=0.39)) == {1}
    assert set(drawn(500, top_p=0.39, temperature=3.0)) == {1, 3}


def test_a_token_of_probability_zero_is_never_drawn():
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.5])
    assert set(drawn(300, probabilities=probabilities)) == {1, 3}


def test_same_seed_same_tokens():
    assert drawn(100, seed=3) == drawn(100, seed=3) != drawn(100, seed=4)


def new_decoder(positions):
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"num_key_value_heads": 1, "vocab_size": 50, "max_position_embeddings": positions}
    return Decoder(DecoderConfig(**shape))


def by_hand(decoder, ids, count):
    for _ in range(count):
        ids = [*ids, int(decoder(torch.tensor([ids]))[0, -1].argmax())]
    return ids[len(ids) - count :]


@pytest.mark.parametrize(
    ("positions", "prompt", "read", "count"),
    [(200, 5, 5, SAMPLE_TOKENS), (20, 5, 5, 15), (20, 30, 10, 10), (200, 190, 160, 40)],
)
def test_the_likeliest_tokens_are_those_of_whole_passes_as_far_as_positions_reach(positions, prompt, read, count):
    decoder = new_decoder(positions)
    ids = [(7 * number) % 50 for number in range(prompt)]
    assert likeliest(decoder, -1, ids) == by_hand(decoder, ids[-read:], count)


def test_the_likeliest_end_with_the_text():
    decoder = new_decoder(200)
    whole = likeliest(decoder, -1, [3, 4])
    assert likeliest(decoder, whole[3], [3, 4]) == whole[: whole.index(whole[3])]


def test_a_decoder_in_training_is_left_as_it_is():
    decoder, ids = new_decoder(200), torch.arange(20)[None]
    decoder(ids).sum().backward()
    before, random_state = [p.grad.clone() for p in decoder.parameters()], torch.get_rng_state()
    likeliest(decoder, -1, [3, 4])
    assert decoder.training and torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(p.grad, grad) for p, grad in zip(decoder.parameters(), before, strict=True))
    decoder(ids).sum().backward()  # nothing of inference mode is left in it
