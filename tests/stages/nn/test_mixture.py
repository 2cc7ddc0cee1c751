import numpy as np
import pytest
import torch

from stages.nn.mixture import mean_models_run, mixed_log_probs, oracle_log_weights, posterior_log_weights


def some_scores(tokens=9, models=3, seed=0):
    return torch.rand(tokens, models, generator=torch.Generator().manual_seed(seed)).clamp_min(1e-3).log()


def test_the_mixture_is_the_sum_of_weighted_probabilities():
    scores = some_scores()
    weights = some_scores(seed=1).exp()
    weights /= weights.sum(-1, keepdim=True)
    expected = (weights * scores.exp()).sum(-1).log()
    torch.testing.assert_close(mixed_log_probs(weights.log(), scores), expected)


def test_a_weight_of_zero_leaves_a_model_out_and_far_tails_do_not_vanish():
    weights = torch.tensor([[1.0, 0.0], [0.5, 0.5]]).log()
    scores = torch.tensor([[-2.0, -0.1], [-800.0, -801.0]])  # exp(-800) is 0 in fp32
    mixed = mixed_log_probs(weights, scores)
    assert mixed[0] == -2.0
    assert mixed[1].item() == pytest.approx(-800 + np.log((1 + np.exp(-1)) / 2), abs=1e-3)


def test_the_posterior_of_two_models_is_bayes_rule_by_hand():
    # Model 0 gives each token 1/2, model 1 gives 1/4, 1/4, 1: prior 1/2; then 2/3, 4/5, 2/3.
    scores = torch.tensor([[1 / 2, 1 / 4], [1 / 2, 1 / 4], [1 / 2, 1.0], [1 / 2, 1.0]]).log()
    weights = posterior_log_weights(scores).exp()
    torch.testing.assert_close(weights[:, 0], torch.tensor([1 / 2, 2 / 3, 4 / 5, 2 / 3]))
    torch.testing.assert_close(weights.sum(-1), torch.ones(4))


@pytest.mark.parametrize("forgetting", [1.0, 0.9, 0.3])
@pytest.mark.parametrize("position", range(9))
def test_a_posterior_knows_nothing_of_its_token_and_those_after(forgetting, position):
    scores = some_scores()
    before = posterior_log_weights(scores, forgetting)
    changed = scores.clone()
    changed[position:] = some_scores(seed=7)[position:]
    after = posterior_log_weights(changed, forgetting)
    assert torch.equal(before[: position + 1], after[: position + 1])
    if position < 8:
        assert not torch.equal(before[position + 1], after[position + 1])


def test_the_posterior_of_scores_made_of_it_is_the_probability_of_the_whole_text():
    scores = some_scores()
    mixed = mixed_log_probs(posterior_log_weights(scores), scores)
    expected = scores.sum(0).logsumexp(0) - np.log(3)  # mean over models of p(text)
    assert mixed.sum().item() == pytest.approx(expected.item(), rel=1e-5)


def test_without_loss_of_memory_forgetting_is_bayes():
    scores = some_scores()
    torch.testing.assert_close(posterior_log_weights(scores, 1 - 1e-9), posterior_log_weights(scores, 1.0))


def test_what_forgets_at_once_stays_near_uniform():
    weights = posterior_log_weights(some_scores(), 1e-4).exp()
    torch.testing.assert_close(weights, torch.full((9, 3), 1 / 3), atol=1e-3, rtol=0)


def test_evidence_fades_by_the_factor_per_token():
    scores, factor = some_scores(), 0.7
    evidence = torch.stack([sum(factor ** (t - s) * scores[s] for s in range(t)) for t in range(1, 9)])
    torch.testing.assert_close(posterior_log_weights(scores, factor)[1:], evidence.log_softmax(-1))


def test_a_forgetting_posterior_follows_a_text_that_changes():
    scores = torch.tensor([[-1.0, -3.0]] * 50 + [[-3.0, -1.0]] * 10)
    assert posterior_log_weights(scores, 1.0)[-1].argmax() == 0
    assert posterior_log_weights(scores, 0.8)[-1].argmax() == 1


def test_the_oracle_takes_the_model_best_over_all_and_no_mixture_beats_it_in_a_document():
    scores = some_scores()
    weights = oracle_log_weights(scores)
    best = scores.sum(0).max()
    assert mixed_log_probs(weights, scores).sum() == best
    assert (weights.exp().sum(0) == 9).sum() == 1
    assert mixed_log_probs(posterior_log_weights(scores), scores).sum() < best


def steps_taken(used, starts):
    """Models with caches: whoever is asked at a token reads everything of the segment that it has not read yet."""
    reads, unread = 0, []
    for token, row in enumerate(used):
        if token in starts:
            unread = [0] * used.shape[1]
        for model, asked in enumerate(row):
            unread[model] += 1
            if asked:
                reads += unread[model]
                unread[model] = 0
    return reads / len(used)


@pytest.mark.parametrize("seed", range(20))
def test_models_run_equals_a_simulation_of_catching_up(seed):
    draw = np.random.default_rng(seed)
    tokens = int(draw.integers(1, 40))
    used = draw.random((tokens, 4)) < draw.random()
    starts = np.unique([0, *draw.integers(0, tokens, 4)])
    assert mean_models_run(used, starts) == pytest.approx(steps_taken(used, set(starts.tolist())))


def test_models_run_of_plain_cases():
    assert mean_models_run(np.ones((6, 3), bool), np.array([0, 4])) == 3
    assert mean_models_run(np.zeros((6, 3), bool), np.array([0])) == 0
    late = np.zeros((6, 2), bool)
    late[:, 0] = True
    late[5, 1] = True  # joins at the last token and reads all six
    assert mean_models_run(late, np.array([0])) == 2
    assert mean_models_run(late, np.array([0, 5])) == pytest.approx(7 / 6)
