import dataclasses
import json
import shutil

import numpy as np
import pytest
import tokenizers
import torch

from schemas.cluster_documents import ClusterManifest
from schemas.failures import UsageFailure
from schemas.generate_text import GenerateConfig
from schemas.tokenize_text import TokenizeManifest
from stages import generate_text
from stages.artifacts.run_models import RunModels, routing_tensors
from stages.clustering.features import normalised
from stages.clustering.routing import cluster_weights, prefix_sums
from stages.nn import choice, composed_batch, readers, sampling
from stages.nn.choice import ChosenExperts
from stages.nn.composed import ComposedModel
from stages.nn.composed_writer import ComposedWriter
from stages.nn.decoder import Decoder
from stages.nn.mixture import mean_models_run

LIMIT = 32  # tokens the tiny models were trained on at a time
MODELS = ("seed", "dense", "expert:0", "expert:2", "cbtm", "central", "central-calm", "central-control")


def config(model="seed", **changes):
    return GenerateConfig(**({"model": model, "prompt": "whisk the", "max_tokens": 12} | changes))


def text_of(run_dir, *args, **changes):
    return "".join(generate_text.stream(config(*args, **changes), run_dir))


@pytest.fixture(scope="module")
def tokenizer(full_run):
    return tokenizers.Tokenizer.from_file(str(full_run / "tokens/tokenizer.json"))


@pytest.fixture(scope="module")
def end(full_run):
    return TokenizeManifest.read(full_run).metrics.end_of_text


@pytest.fixture
def script(full_run, tokenizer, monkeypatch):
    """Makes the model say these tokens, whatever it reads; returns what it was given to read."""

    def say(ids):
        given, left = [], list(ids)

        class Scripted:
            kept = ()

            def begin(self, skipped):
                self.kept = ()

            def restart(self, kept):
                self.kept = kept

            def read(self, unread):
                given.append([*self.kept, *unread])
                self.kept = ()
                log_probs = torch.full((tokenizer.get_vocab_size(),), -50.0)
                log_probs[left.pop(0)] = 0.0
                return log_probs

        monkeypatch.setattr(generate_text, "_reader", lambda *_: Scripted())
        return given

    return say


def bytes_as_tokens(tokenizer, text):
    """One token per byte, as the byte-level alphabet writes it."""
    letters = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)[0][0]
    return [tokenizer.token_to_id(letter) for letter in letters]


@pytest.mark.parametrize("model", MODELS)
def test_every_model_writes_and_its_seed_decides_what(full_run, model):
    first = text_of(full_run, model, random_seed=1)
    assert first == text_of(full_run, model, random_seed=1)
    assert first != text_of(full_run, model, random_seed=2)


def greedy(forward, ids, count, end):
    """Continue without any cache: everything is read again for every token."""
    written = []
    for _ in range(count):
        token = int(forward(torch.tensor([ids]))[0, -1].argmax())
        if token == end:
            break
        written.append(token)
        ids = [*ids, token]
    return written


def forward_of(run_dir, name):
    models = RunModels.find(run_dir)
    if name in ("seed", "dense"):
        return Decoder.from_weights(*models.decoder(name))
    if name.startswith("expert:"):
        return Decoder.from_weights(*models.decoder(f"experts/{int(name[7:]):03d}"))
    if name != "cbtm":
        composed = ComposedModel.from_parts(**models.composition(name))
        return lambda ids: composed(ids).logits_BTV
    from safetensors.numpy import load_file

    experts = [Decoder.from_weights(*models.decoder(f"experts/{number:03d}")) for number in range(3)]
    table = load_file(run_dir / "clusters/vectorizer.safetensors")["token_vectors"]
    centroids = load_file(run_dir / "clusters/centroids.safetensors")["centroids"]

    def mixed(ids):
        vector = normalised(table[ids[0].numpy()].sum(0)[None])
        weights = torch.from_numpy(cluster_weights(vector, centroids, 0.1, 2)[0])
        assert (weights > 0).sum() == 2  # so one expert sleeps, and may wake
        log_probs = torch.stack([expert(ids)[0, -1:].log_softmax(-1) for expert in experts])
        return (weights.log()[:, None, None] + log_probs).logsumexp(0)[None]

    return mixed


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("prompt", ["whisk the", "whereas the party shall hereby", "def self ("])
def test_caches_change_nothing(full_run, tokenizer, end, model, prompt):
    given = [end, *tokenizer.encode(prompt, add_special_tokens=False).ids]
    count = LIMIT - len(given)
    assert count > 8
    expected = greedy(forward_of(full_run, model), given, count, end)
    assert text_of(full_run, model, prompt=prompt, max_tokens=count, temperature=0) == whole(tokenizer, expected)


@pytest.mark.parametrize("model", ["central", "central-calm"])
@pytest.mark.parametrize("prompt", ["whisk the", "whereas the party shall hereby"])
def test_few_experts_of_a_composition_write_what_they_write_without_caches(
    full_run, tokenizer, end, monkeypatch, model, prompt
):
    monkeypatch.setattr(choice, "OPENING", 2)
    monkeypatch.setattr(choice, "SEGMENT", 3)
    chosen = ChosenExperts(ComposedModel.from_parts(**RunModels.find(full_run).composition(model)), 1)
    given = [end, *tokenizer.encode(prompt, add_special_tokens=False).ids]
    count = LIMIT - len(given)
    expected = greedy(lambda ids: chosen.read(ids, chosen.new_cache()), given, count, end)
    written = text_of(full_run, model, prompt=prompt, max_tokens=count, temperature=0, active_experts=1)
    assert written == whole(tokenizer, expected)
    assert chosen.read_per_token < 2  # of three


@pytest.mark.parametrize("model", ["seed", "cbtm", "expert:0"])
def test_active_experts_of_what_is_no_composition_are_refused(full_run, model):
    with pytest.raises(UsageFailure, match=f"composed models, and {model} is none here: leave it out"):
        text_of(full_run, model, active_experts=2)


def whole(tokenizer, ids):
    """Their text up to the last whole character."""
    return tokenizer.decode(ids, skip_special_tokens=False).rstrip("\ufffd")


def test_an_expert_that_wakes_has_missed_nothing(full_run, changing_text):
    """The text changes its kind, so other experts are asked; token by token or in one piece is the same."""
    models, ids = RunModels.find(full_run), changing_text
    stepwise = generate_text.ClusterMixReader(config("cbtm", experts=1), full_run, models)
    asked = set()
    for place in range(len(ids)):
        log_probs = stepwise.read([ids[place]])
        asked.add(tuple(not expert.pending for expert in stepwise._experts))
    assert len({place for place in asked if sum(place) == 1}) > 1
    at_once = generate_text.ClusterMixReader(config("cbtm", experts=1), full_run, models)
    torch.testing.assert_close(at_once.read(ids), log_probs, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def changing_text(end, tokenizer):
    """Tokens of three kinds of text, one after the other."""
    texts = ["whisk the bowl of butter", " hereby pursuant clause liable notice", " def return lambda yield self"]
    return [end, *(token for text in texts for token in tokenizer.encode(text).ids)]


def mixed_by_hand(run_dir, text, context, experts, temperature=0.1):
    """Log-probabilities of the token after `text`, read anew by experts that see `context` and weighed by all of it."""
    vectors, centroids = routing_tensors(run_dir, ClusterManifest.read(run_dir))
    vector = normalised(vectors[text].sum(0)[None])
    weights = torch.from_numpy(cluster_weights(vector, centroids, temperature, experts)[0])
    decoders = [forward_of(run_dir, f"expert:{number}") for number in range(3)]
    scores = torch.stack([decoder(torch.tensor([context]))[0, -1].log_softmax(-1) for decoder in decoders])
    return (weights.log()[:, None] + scores).logsumexp(0)


def test_experts_read_no_more_than_the_evaluation_counts(full_run, changing_text):
    """Token by token: what an expert has read reaches up to the last token it was asked for."""
    vectors, centroids = routing_tensors(full_run, ClusterManifest.read(full_run))
    used = cluster_weights(normalised(prefix_sums(np.array(changing_text), vectors)[1:]), centroids, 0.1, 1) > 0
    assert used.any(0).sum() > 1
    reader = generate_text.ClusterMixReader(config("cbtm", experts=1), full_run, RunModels.find(full_run))
    for token in changing_text:
        reader.read([token])
    read = sum(expert.tokens_read for expert in reader._experts)
    assert read == round(mean_models_run(used, np.array([0])) * len(changing_text))
    assert len(changing_text) <= read < 3 * len(changing_text)
    asked = int(used.any(0).sum())
    text = f"{asked} of 3 experts read {read} tokens for {len(changing_text)} of the text"
    assert reader.cost().startswith(text)


def test_an_expert_that_is_never_chosen_is_not_loaded(full_run, end, tokenizer):
    reader = generate_text.ClusterMixReader(config("cbtm", experts=1), full_run, RunModels.find(full_run))
    reader.read([end, *tokenizer.encode("whisk the bowl of butter").ids])
    assert sum(expert._decoder is not None for expert in reader._experts) == 1


@pytest.mark.parametrize("experts", [2, 3])
def test_a_new_context_keeps_what_is_known_of_the_text(full_run, changing_text, experts):
    reader = generate_text.ClusterMixReader(config("cbtm", experts=experts), full_run, RunModels.find(full_run))
    first, rest = changing_text[:20], changing_text[20:30]
    reader.begin(first[:5])
    reader.read(first[5:])
    reader.restart(first[-6:])
    for token in rest:
        log_probs = reader.read([token])
    expected = mixed_by_hand(full_run, first + rest, first[-6:] + rest, experts)
    torch.testing.assert_close(log_probs, expected, atol=1e-4, rtol=1e-4)
    forgotten = mixed_by_hand(full_run, first[-6:] + rest, first[-6:] + rest, experts)
    assert not torch.allclose(log_probs, forgotten, atol=1e-3)


def test_a_long_prompt_is_routed_by_all_of_it(full_run, tokenizer, end, monkeypatch):
    known = []
    real = generate_text.ClusterMixReader

    class Watched(real):
        def _know(self, ids):
            known.extend(ids)
            super()._know(ids)

    monkeypatch.setattr(generate_text, "ClusterMixReader", Watched)
    prompt = "whisk the bowl until golden " * 30
    written = text_of(full_run, "cbtm", prompt=prompt, max_tokens=2 * LIMIT, temperature=0)
    ids = [end, *tokenizer.encode(prompt).ids]
    assert known[: len(ids)] == ids
    assert len(known) == len(ids) + 2 * LIMIT - 1  # each once, though contexts were read again
    assert whole(tokenizer, known[len(ids) :]) == written[: len(whole(tokenizer, known[len(ids) :]))]


@pytest.mark.parametrize("model", ["seed", "expert:0"])
def test_a_new_context_is_read_as_if_it_were_all(full_run, model, changing_text):
    models = RunModels.find(full_run)
    reader = generate_text._reader(config(model), full_run, models)
    reader.read(changing_text[:25])
    reader.restart(changing_text[15:25])
    found = reader.read(changing_text[25:27])
    fresh = generate_text._reader(config(model), full_run, models).read(changing_text[15:27])
    torch.testing.assert_close(found, fresh, atol=1e-4, rtol=1e-4)


def test_the_temperature_of_routing_can_be_given(full_run, changing_text):
    models = RunModels.find(full_run)
    for temperature in (0.01, 5.0):
        asked = config("cbtm", experts=3, routing_temperature=temperature)
        found = generate_text.ClusterMixReader(asked, full_run, models).read(changing_text[:20])
        expected = mixed_by_hand(full_run, changing_text[:20], changing_text[:20], 3, temperature)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("model", ["seed", "cbtm", "central"])
def test_a_text_longer_than_the_trained_length_goes_on(full_run, model, tokenizer):
    seed = 3
    pieces = list(generate_text.stream(config(model, max_tokens=3 * LIMIT, random_seed=seed), full_run))
    assert len(tokenizer.encode("".join(pieces)).ids) > 0
    long_prompt = "whisk the bowl until golden " * 30
    assert len(tokenizer.encode(long_prompt).ids) > 2 * LIMIT
    assert text_of(full_run, model, prompt=long_prompt, max_tokens=5)


def test_a_full_context_is_read_again_from_its_second_half(full_run, script, tokenizer, end):
    (letter,) = bytes_as_tokens(tokenizer, "x")
    given = script([letter] * 60)
    assert text_of(full_run, prompt="ab", max_tokens=60) == "x" * 60
    prompt = [end, *tokenizer.encode("ab").ids]
    assert given[0] == prompt
    context = len(prompt)
    for unread in given[1:]:
        context += 1
        if context > LIMIT:
            context = LIMIT // 2
            assert unread == [letter] * context
        else:
            assert unread == [letter]


def test_a_prompt_longer_than_the_trained_length_keeps_its_end(full_run, script, tokenizer, end):
    given = script(bytes_as_tokens(tokenizer, "x"))
    prompt = "whisk the bowl until golden " * 30
    text_of(full_run, prompt=prompt, max_tokens=1)
    assert given == [tokenizer.encode(prompt).ids[-LIMIT:]]


def test_the_end_of_text_ends_it_and_is_not_printed(full_run, script, tokenizer, end):
    script([*bytes_as_tokens(tokenizer, "so"), end, *bytes_as_tokens(tokenizer, "no")])
    assert text_of(full_run, max_tokens=50) == "so"


def test_max_tokens_is_a_limit(full_run, script, tokenizer):
    given = script(bytes_as_tokens(tokenizer, "abcdefgh"))
    assert text_of(full_run, max_tokens=5) == "abcde"
    assert len(given) == 5  # the model is not asked for more than is printed


def test_a_special_token_in_the_prompt_is_text(full_run, script, tokenizer, end):
    given = script(bytes_as_tokens(tokenizer, "x"))
    text_of(full_run, prompt="a<|endoftext|>b", max_tokens=1)
    assert given[0].count(end) == 1 and given[0][0] == end
    assert tokenizer.decode(given[0][1:], skip_special_tokens=False) == "a<|endoftext|>b"


def test_an_empty_prompt_begins_a_document(full_run, script, tokenizer, end):
    given = script(bytes_as_tokens(tokenizer, "x"))
    text_of(full_run, prompt="", max_tokens=1)
    assert given == [[end]]


def test_characters_of_several_bytes_come_whole(full_run, script, tokenizer):
    text = "aé漢😀 \u0627b"
    ids = bytes_as_tokens(tokenizer, text)
    assert len(ids) == len(text.encode())
    script(ids)
    assert list(generate_text.stream(config(max_tokens=len(ids)), full_run)) == list(text)


def test_half_a_character_at_the_end_is_not_printed(full_run, script, tokenizer):
    ids = bytes_as_tokens(tokenizer, "ab漢")
    script(ids)
    assert text_of(full_run, max_tokens=len(ids) - 1) == "ab"


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ((), "one two STOP three"),
        (("STOP",), "one two "),
        (("three", " two"), "one"),  # the first of them in the text, not in the list
        (("TOP t", "STOPS"), "one two S"),
        (("x", "threee"), "one two STOP three"),  # begun and not finished: it is text
        (("e",), "on"),
        (("one",), ""),
    ],
)
def test_a_stop_text_ends_it_and_is_not_printed(full_run, script, tokenizer, stop, expected):
    ids = bytes_as_tokens(tokenizer, "one two STOP three")  # a piece per letter: every stop is spread over pieces
    script(ids)
    assert text_of(full_run, max_tokens=len(ids), stop=stop) == expected


def test_text_is_held_back_no_longer_than_a_stop_may_take(full_run, script, tokenizer):
    ids = bytes_as_tokens(tokenizer, "abcdefghij")
    given = script(ids)
    seen = []
    for piece in generate_text.stream(config(max_tokens=10, stop=("xyz",)), full_run):
        seen.append((piece, len(given)))
    assert seen[0] == ("a", 3)
    assert "".join(piece for piece, _ in seen) == "abcdefghij"


def test_the_model_stops_being_asked_at_a_stop(full_run, script, tokenizer):
    given = script(bytes_as_tokens(tokenizer, "abcdefghij"))
    assert text_of(full_run, max_tokens=10, stop=("cd",)) == "ab"
    assert len(given) == 4


def test_an_empty_stop_text_is_refused():
    with pytest.raises(ValueError, match="end everything at once"):
        config(stop=("a", ""))


@pytest.mark.parametrize("model", ["cbtm", "layer-joint"])
def test_more_experts_than_there_are_cannot_be_asked(layer_gated_run, model):
    assert text_of(layer_gated_run, model, experts=3)
    with pytest.raises(UsageFailure, match=r"^--experts 4 is more than the run's 3 experts: give 3 or fewer$"):
        text_of(layer_gated_run, model, experts=4)


@pytest.mark.parametrize("model", ["cbtm", "layer-joint"])
def test_two_experts_are_asked_unless_it_is_said_or_there_is_one(layer_gated_run, model, monkeypatch):
    def first(log_probs, *given):
        found.append(log_probs)
        return sampling.draw(log_probs, *given)

    found: list[torch.Tensor] = []
    monkeypatch.setattr(generate_text, "draw", first)
    for count in (None, 2, 1):
        text_of(layer_gated_run, model, experts=count, max_tokens=1)
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2], atol=1e-4)
    models = RunModels.find(layer_gated_run)
    alone = dataclasses.replace(models, experts=models.experts[:1])
    assert [generate_text._experts_per_token(config(model), each) for each in (models, alone)] == [2, 1]


@pytest.mark.parametrize("model", ["sed", "central-none", "expert:3", "expert:", "expert:x", "gates", "central-alone"])
def test_an_unknown_model_is_one_line_with_those_there_are(full_run, model):
    with pytest.raises(UsageFailure) as refused:
        text_of(full_run, model)
    message = str(refused.value)
    assert "\n" not in message and model in message
    for known in ("seed", "dense", "expert:0 to expert:2", "cbtm", "central", "central-calm", "central-control"):
        assert known in message
    assert "joint" not in message  # there are gates at the experts' inputs alone


def test_gates_inside_are_among_the_models_there_are(layer_gated_run):
    with pytest.raises(UsageFailure, match="there are seed, dense, expert:0 to expert:2, cbtm, layer-joint; `cpipe co"):
        text_of(layer_gated_run, "sed")


def test_a_run_without_dense_and_compositions_says_so(expert_run, copied_run):
    run_dir = copied_run(expert_run)
    shutil.rmtree(run_dir / "dense")
    for model in ("dense", "central"):
        with pytest.raises(UsageFailure, match="seed, expert:0 to expert:2, cbtm"):
            text_of(run_dir, model)
    assert text_of(run_dir, "cbtm")


def test_a_run_without_experts_says_what_to_run(seeded_run):
    with pytest.raises(UsageFailure, match=r"no experts in .*: run `cpipe train-experts .*` first"):
        text_of(seeded_run, "cbtm")


PROMPTS = ("whisk the", "whereas the party shall hereby " * 12, "def self (", "", "def")  # one is longer than LIMIT


@pytest.fixture
def prompts_file(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return str(path)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_prompts_side_by_side_get_what_each_alone_gets(full_run, prompts_file, batch_size, temperature):
    """Longer than a context, so that texts begin anew at different times, and end at different times."""
    settings = {"max_tokens": 2 * LIMIT, "temperature": temperature, "stop": ("ll",)}
    together = config("expert:1", prompt="", prompts=prompts_file, batch_size=batch_size, **settings)
    expected = [(prompt, text_of(full_run, "expert:1", prompt=prompt, **settings)) for prompt in PROMPTS]
    assert list(generate_text.continuations(together, full_run)) == expected
    assert len({text for _, text in expected}) > 2


def test_a_composed_model_writes_side_by_side_what_it_writes_alone(full_run, prompts_file):
    settings = {"max_tokens": LIMIT, "temperature": 1.0, "stop": ("ll",)}
    together = config("central", prompt="", prompts=prompts_file, batch_size=3, **settings)
    expected = [(prompt, text_of(full_run, "central", prompt=prompt, **settings)) for prompt in PROMPTS]
    assert list(generate_text.continuations(together, full_run)) == expected
    assert len({text for _, text in expected}) > 2


def test_texts_side_by_side_end_at_a_stop_in_the_same_place(full_run, prompts_file):
    settings = {"max_tokens": 40, "temperature": 1.0}
    whole_texts = [text_of(full_run, prompt=prompt, **settings) for prompt in PROMPTS]
    stop = (whole_texts[0][9:12], whole_texts[2][14:16])
    together = config(prompt="", prompts=prompts_file, stop=stop, **settings)
    expected = [min((text.split(each)[0] for each in stop), key=len) for text in whole_texts]
    assert expected != whole_texts
    assert [text for _, text in generate_text.continuations(together, full_run)] == expected


@pytest.mark.parametrize(("model", "settings"), [("cbtm", {}), ("central", {"active_experts": 1})])
def test_models_that_cannot_go_side_by_side_go_one_after_the_other(
    full_run, prompts_file, model, settings, monkeypatch
):
    expected = [(prompt, text_of(full_run, model, prompt=prompt, **settings)) for prompt in PROMPTS]
    monkeypatch.setattr(generate_text, "_write_side_by_side", None)
    together = config(model, prompt="", prompts=prompts_file, **settings)
    assert list(generate_text.continuations(together, full_run)) == expected


@pytest.mark.parametrize(
    ("model", "settings"), [("central", {}), ("central-calm", {}), ("central", {"active_experts": 1})]
)
def test_a_composed_model_writes_packed_what_it_writes_as_it_is(full_run, model, settings, monkeypatch):
    settings = {"temperature": 0, "max_tokens": 2 * LIMIT, **settings}
    expected = text_of(full_run, model, prompt=PROMPTS[0], **settings)
    step, packed = ComposedWriter.step, []
    monkeypatch.setattr(ComposedWriter, "step", lambda *args: packed.append(args) or step(*args))
    assert text_of(full_run, model, prompt=PROMPTS[0], **settings) == expected
    assert packed
    monkeypatch.setattr(composed_batch, "writable", lambda _: False)
    del packed[:]
    assert text_of(full_run, model, prompt=PROMPTS[0], **settings) == expected
    assert not packed


def test_a_decoder_that_cannot_be_packed_writes_the_same(full_run, prompts_file, monkeypatch):
    expected = [text_of(full_run, prompt=prompt, temperature=0, max_tokens=40) for prompt in PROMPTS]
    monkeypatch.setattr(readers, "packable", lambda _: False)
    assert text_of(full_run, prompt=PROMPTS[0], temperature=0, max_tokens=40) == expected[0]
    together = config(prompt="", prompts=prompts_file, temperature=0, max_tokens=40)
    assert [text for _, text in generate_text.continuations(together, full_run)] == expected


def test_a_prompt_and_a_file_of_prompts_exclude_each_other():
    with pytest.raises(ValueError, match="leave one of them"):
        config(prompt="a", prompts="b.txt")
