import torch
from toy_routed import routed, rows

from schemas.train_gates import Selection
from stages.nn.watching import Watched


def test_it_counts_who_was_asked_and_gives_the_mean_weights_of_each_layer() -> None:
    decoder = routed(selection=Selection(top_k=1))
    watched, ids = Watched(decoder), rows()
    logits, weights = watched(ids)
    assert torch.equal(logits, decoder(ids))
    told = decoder.gates.told
    first = torch.stack([told[name].exp() for name in told if name.startswith("model.layers.1.")]).mean(0)
    assert weights.shape == (3, 11, 3, 4)
    torch.testing.assert_close(weights[:, :, 1], first)
    watched(ids)
    for name, asked in watched.asked().items():
        torch.testing.assert_close(asked, (told[name] > -torch.inf).float().mean((0, 1)))


def test_scores_are_log_probabilities_with_the_weights_beside_them() -> None:
    decoder, ids = routed(place="layer"), rows()
    found = Watched(decoder).scores_and_weights(ids[:, :-1], ids[:, 1:])
    expected = decoder(ids[:, :-1]).log_softmax(-1).gather(-1, ids[:, 1:, None])
    torch.testing.assert_close(found[..., :1], expected)
    torch.testing.assert_close(found[..., 1:].unflatten(-1, (3, 4)).sum(-1), torch.ones(3, 10, 3))
