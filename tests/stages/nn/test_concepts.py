import torch
import torch.nn.functional as F

from stages.nn.concepts import ConceptHeads, concept_loss, concepts_of, latent_loss


def test_the_concept_of_a_group_of_groups_is_the_normalised_sum_of_theirs():
    tokens = torch.randn(2, 26, 5)
    concepts = concepts_of(concepts_of(tokens, 4), 3)
    assert concepts.shape == (2, 2, 5)
    units = F.normalize(tokens[:, :24].unflatten(1, (2, 3, 4)).sum(3), dim=-1)
    torch.testing.assert_close(concepts, F.normalize(units.sum(2), dim=-1))


def test_both_losses_are_the_sum_of_the_two():
    made, true = torch.randn(2, 6, 3, 5), F.normalize(torch.randn(2, 6, 5), dim=-1)
    parts = concept_loss(made, true, "cosine") + concept_loss(made, true, "mse")
    torch.testing.assert_close(concept_loss(made, true, "both"), parts)


def test_the_squared_distance_of_fresh_predictions_is_of_the_size_of_the_cosines_error():
    torch.manual_seed(0)
    heads, true = ConceptHeads(256, 4, 2, 256), F.normalize(torch.randn(2, 6, 256), dim=-1)
    made = heads(F.normalize(torch.randn(2, 6, 4, 256), dim=-1) * 16)  # normed states
    assert 0.8 < concept_loss(made, true, "mse") / concept_loss(made, true, "cosine") < 2
    assert concept_loss(16 * true[:, 1:, None], true, "mse") < 1e-6  # sqrt(E) times the unit vector


def test_the_latent_loss_compares_each_expectation_with_the_group_after_it():
    latents = torch.randn(2, 5, 3, 8)
    expected = torch.randn(2, 5, 3, 8)
    expected[:, :-1] = 2 * latents[:, 1:]
    assert latent_loss(expected, latents) < 1e-6
    assert 0.5 < latent_loss(expected, latents.roll(1, 1)) < 1.5
    assert latent_loss(expected[:, :1], latents[:, :1]) == 0


def test_the_latent_loss_leaves_its_targets_alone():
    latents = torch.randn(2, 5, 3, 8, requires_grad=True)
    expected = torch.randn(2, 5, 3, 8, requires_grad=True)
    latent_loss(expected, latents).backward()
    assert latents.grad is None and expected.grad is not None
    assert (expected.grad[:, :-1] != 0).any() and (expected.grad[:, -1] == 0).all()
