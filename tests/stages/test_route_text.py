import pytest
import torch

from schemas.failures import UsageFailure
from schemas.route_text import RouteConfig
from schemas.tokenize_text import TokenizeManifest
from schemas.train_gates import GatesManifest, Selection
from stages import route_text
from stages.artifacts.run_models import RunModels
from stages.nn.decoder import Decoder
from stages.nn.gates import ExpertGates

TEXT = "the cat, naïve 東京"


@pytest.fixture(scope="module")
def gates(full_run):
    return ExpertGates.from_tensors(
        RunModels.find(full_run).gate_tensors(), *GatesManifest.read(full_run).reads("joint")
    )


def ids_of(full_run, text):
    import tokenizers

    tokens = TokenizeManifest.read(full_run)
    tokenizer = tokenizers.Tokenizer.from_file(str(full_run / "tokens/tokenizer.json"))
    return [tokens.metrics.end_of_text, *tokenizer.encode(text, add_special_tokens=False).ids]


def test_each_token_is_routed_by_the_text_before_it(full_run, gates):
    ids = torch.tensor([ids_of(full_run, TEXT)])
    seed = Decoder.from_weights(*RunModels.find(full_run).decoder("seed"))
    assert ids.shape[1] < seed.config.max_position_embeddings
    read = gates.remembered(seed.hidden_states(ids, depth=gates.layer)[-1], ids)
    expected = gates.log_weights(read, Selection(top_k=1))[0, :-1].exp()
    found = list(route_text.stream(RouteConfig(text=TEXT, selection=Selection(top_k=1)), full_run))
    assert "".join(token.text for token in found) == TEXT
    torch.testing.assert_close(torch.tensor([[token.seed, *token.weights] for token in found]), expected)
    scores = torch.tensor([token.scores for token in found])
    torch.testing.assert_close(scores, gates.scores(read)[0, :-1])


def test_a_text_longer_than_the_context_is_remembered_over_windows(full_run, gates):
    text = TEXT * 12
    ids = ids_of(full_run, text)
    seed = Decoder.from_weights(*RunModels.find(full_run).decoder("seed"))
    width = seed.config.max_position_embeddings
    assert len(ids) > 2 * width
    total = torch.zeros(seed.config.hidden_size)
    for start in range(0, len(ids) - 1, width):
        for u in seed.hidden_states(torch.tensor([ids[start : min(start + width, len(ids) - 1)]]), depth=1)[-1][0]:
            total = gates.memory * total + (u - u.mean()) / u.std(correction=0)
    last = list(route_text.stream(RouteConfig(text=text, selection=Selection()), full_run))[-1]
    torch.testing.assert_close(
        torch.tensor([last.seed, *last.weights]), gates.log_weights(total[None, None])[0, 0].exp(), atol=1e-4, rtol=1e-3
    )


def test_the_name_of_a_special_token_and_no_text_are_text(full_run):
    name = "<|endoftext|> said"
    assert "".join(token.text for token in route_text.stream(RouteConfig(text=name), full_run)) == name
    assert list(route_text.stream(RouteConfig(), full_run)) == []


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"selection": Selection(top_k=9)}, "--top-k 9 is more than the run's 3 experts"),
        ({"mode": "mean-activation"}, "learnt as independent, joint, contrastive, not mean-activation"),
    ],
)
def test_what_cannot_be_is_one_line(full_run, settings, told):
    with pytest.raises(UsageFailure, match=told):
        list(route_text.stream(RouteConfig(text="a", **settings), full_run))


def test_a_run_without_gates_says_what_to_run(expert_run):
    with pytest.raises(UsageFailure, match="run `cpipe train-gates"):
        list(route_text.stream(RouteConfig(text="a"), expert_run))


@pytest.mark.parametrize("mode", [None, "joint"])
def test_a_run_with_gates_inside_the_model_alone_says_what_to_run(layer_gated_run, mode):
    told = r"holds no gates at the inputs of experts \(there: layer-joint\): run `cpipe train-gates .* --force` with"
    with pytest.raises(UsageFailure, match=told) as refused:
        list(route_text.stream(RouteConfig(text="a", mode=mode), layer_gated_run))
    assert "\n" not in str(refused.value)
