import numpy as np
import pytest
import torch

from stages.nn.mixture import mixed_log_probs, posterior_log_weights
from stages.nn.mixture_fit import fit_routing

GENERATOR = torch.Generator().manual_seed(0)


def made(temperature, tokens=4000, experts=4):
    """Tokens that are written by the expert that cBTM at this temperature picks: no other temperature fits better."""
    distances = 2 * torch.rand(tokens, experts, generator=GENERATOR)
    author = torch.multinomial((-distances / temperature).softmax(-1), 1, generator=GENERATOR)
    scores = torch.full((tokens, experts), -5.0).scatter(1, author, -0.1)
    return distances, list(scores.split(400))


@pytest.mark.parametrize("temperature", [0.02, 0.3, 2.0])
def test_the_temperature_a_text_is_made_with_is_found(temperature):
    distances, documents = made(temperature)
    fitted = fit_routing(distances, documents, 0.1, 0.9)
    assert fitted.temperature == pytest.approx(temperature, rel=0.15)
    assert (fitted.documents, fitted.tokens) == (10, 4000)


def loss(distances, documents, temperature):
    return -float(mixed_log_probs((-distances / temperature).log_softmax(-1), torch.cat(documents)).mean())


def test_no_temperature_nearby_is_better_and_the_gain_is_over_the_given_one():
    distances, documents = made(0.2)
    fitted = fit_routing(distances, documents, 1.5, 0.9)
    for factor in (0.5, 0.9, 0.97, 1.03, 1.1, 2.0):
        assert loss(distances, documents, factor * fitted.temperature) >= loss(distances, documents, fitted.temperature)
    expected = loss(distances, documents, 1.5) - loss(distances, documents, fitted.temperature)
    assert fitted.gain == pytest.approx(expected, abs=1e-5)


def changing(every, documents=6, tokens=240):
    """Documents in which another of two experts is right after so many tokens."""
    for _ in range(documents):
        right = (torch.arange(tokens) // every) % 2
        noise = 0.3 * torch.rand(tokens, 2, generator=GENERATOR)
        yield torch.full((tokens, 2), -3.0).scatter(1, right[:, None], -1.0) + noise


def test_evidence_that_stays_right_is_not_forgotten():
    documents = list(changing(every=10_000))
    assert fit_routing(torch.zeros(6 * 240, 2), documents, 0.1, 0.9).forgetting > 0.99


def test_the_faster_texts_change_the_faster_evidence_is_forgotten():
    factors = [fit_routing(torch.zeros(6 * 240, 2), list(changing(every)), 0.1, 0.9).forgetting for every in (5, 40)]
    assert factors[0] < factors[1] < 0.999


def test_the_factor_found_is_the_best_on_a_fine_grid():
    documents = list(changing(every=12))

    def mean_loss(factor):
        mixed = [mixed_log_probs(posterior_log_weights(each, factor), each) for each in documents]
        return -float(torch.cat(mixed).double().mean())

    fitted = fit_routing(torch.zeros(6 * 240, 2), documents, 0.1, 0.5)
    best = min(mean_loss(factor) for factor in np.linspace(0.02, 1, 99))
    assert mean_loss(fitted.forgetting) <= best + 1e-4
    assert fitted.forgetting_gain == pytest.approx(mean_loss(0.5) - mean_loss(fitted.forgetting), abs=1e-5)


def test_a_single_expert_fits_as_well_with_any():
    fitted = fit_routing(torch.zeros(10, 1), [torch.full((10, 1), -1.0)], 0.1, 0.9)
    assert fitted.gain == fitted.forgetting_gain == 0
