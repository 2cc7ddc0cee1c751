import json
import math
import shutil

import numpy as np
import pytest
import torch

from schemas.evaluate_models import EvaluateConfig, EvaluateManifest
from schemas.failures import StaleFailure, UsageFailure
from schemas.tokenize_text import TokenizeManifest
from schemas.train_experts import ExpertManifest, ExpertsConfig
from stages import evaluate_models, train_experts
from stages.artifacts.run_models import RunModels
from stages.data import windows
from stages.data.token_store import TokenStore, read_table
from stages.data.windows import choose_documents
from stages.nn.composed import ComposedModel
from stages.nn.decoder import Decoder
from stages.nn.memory import recall


@pytest.fixture(scope="module")
def metrics(evaluated_run):
    return EvaluateManifest.read(evaluated_run).metrics


@pytest.fixture(scope="module")
def rows(metrics):
    return {row.model: row for row in metrics.rows}


@pytest.fixture(scope="module")
def scores(evaluated_run):
    """Log-probabilities of every scored token, per model, document by document, window by window, unpadded."""
    tokens, models = TokenizeManifest.read(evaluated_run), RunModels.find(evaluated_run)
    store = TokenStore.open([evaluated_run / ref.path for ref in tokens.shards("valid")])
    documents = choose_documents(store, 1200)
    found = {}
    for folder in ("seed", "dense", "experts/000", "experts/001", "experts/002"):
        decoder, found[folder] = Decoder.from_weights(*models.decoder(folder)), []
        for document in documents:
            text = [tokens.metrics.end_of_text, *store.tokens(document).tolist()]
            for start in range(0, len(text) - 1, 32):
                window = torch.tensor(text[start : start + 33])
                logits = decoder(window[None, :-1])[0]
                found[folder].append(logits.log_softmax(-1)[torch.arange(len(window) - 1), window[1:]])
    scored = {folder: torch.cat(pieces).double() for folder, pieces in found.items()}
    scored["bytes"] = int(store.bytes[documents].sum())
    scored["lengths"] = store.lengths[documents].tolist()
    return scored


def bits(scores, log_probs):
    return -float(log_probs.sum()) / math.log(2) / scores["bytes"]


def experts_of(scores):
    return torch.stack([scores[f"experts/{number:03d}"] for number in range(3)], -1)


def test_every_model_of_the_run_has_a_row(rows):
    best = next(name for name in rows if name.startswith("best single expert"))
    gates = {
        f"gates {mode} {top}" for mode in ("independent", "joint", "contrastive") for top in ("top-1", "top-2", "all")
    }
    assert set(rows) == gates | {
        "seed", "dense", "weight average", best, "oracle expert per document", "uniform ensemble", "cBTM top-1",
        "cBTM top-2", "cBTM all", "Bayes posterior", "forgetting posterior", "central alone", "composed stitch",
        "composed calm", "composed stitch of seed copies (central-control)", "composed stitch, top-2 per text",
        "composed calm, top-2 per text",
    }  # fmt: skip
    groups = {row.group for row in rows.values()}
    assert groups == {"single", "ensemble", "gates", "central", "composed", "control"}


def test_single_models_and_the_uniform_ensemble_are_what_their_logits_say(rows, scores, metrics):
    assert metrics.tokens == len(scores["seed"]) and metrics.bytes == scores["bytes"]
    for name in ("seed", "dense"):
        assert rows[name].bits_per_byte == pytest.approx(bits(scores, scores[name]), abs=2e-5)
    experts = experts_of(scores)
    uniform = (experts.exp().sum(-1) / 3).log()
    assert rows["uniform ensemble"].bits_per_byte == pytest.approx(bits(scores, uniform), abs=2e-5)
    best = max(range(3), key=lambda number: experts[:, number].sum())
    assert rows[f"best single expert ({best:03d})"].bits_per_byte == pytest.approx(
        bits(scores, experts[:, best]), abs=2e-5
    )


def test_the_bayes_posterior_is_the_probability_of_each_whole_document(rows, scores):
    documents = experts_of(scores).split(scores["lengths"])
    whole = sum(document.sum(0).logsumexp(-1) - math.log(3) for document in documents)
    assert rows["Bayes posterior"].bits_per_byte == pytest.approx(bits(scores, whole), abs=2e-5)


def test_cbtm_weighs_experts_by_the_text_before(evaluated_run, rows, scores):
    from safetensors.numpy import load_file

    table = load_file(evaluated_run / "clusters/vectorizer.safetensors")["token_vectors"]
    centroids = load_file(evaluated_run / "clusters/centroids.safetensors")["centroids"]
    tokens = TokenizeManifest.read(evaluated_run)
    store = TokenStore.open([evaluated_run / ref.path for ref in tokens.shards("valid")])
    weights = []
    for document in choose_documents(store, 1200):
        for position in range(int(store.lengths[document])):
            vector = table[store.tokens(document)[:position]].sum(0)
            vector = vector / max(float(np.linalg.norm(vector)), 1e-30)
            weights.append(-((vector - centroids) ** 2).sum(-1) / 0.1 if vector.any() else np.zeros(3))
    log_weights = torch.from_numpy(np.stack(weights)).log_softmax(-1)
    expected = (log_weights + experts_of(scores)).logsumexp(-1)
    assert rows["cBTM all"].bits_per_byte == pytest.approx(bits(scores, expected), abs=5e-5)


def test_gates_weigh_experts_by_the_document_so_far_over_windows(evaluated_run, rows, scores):
    tokens, models = TokenizeManifest.read(evaluated_run), RunModels.find(evaluated_run)
    store = TokenStore.open([evaluated_run / ref.path for ref in tokens.shards("valid")])
    seed, gates = Decoder.from_weights(*models.decoder("seed")), models.gate_tensors()
    weights = []
    for document in choose_documents(store, 1200):
        text = torch.tensor([tokens.metrics.end_of_text, *store.tokens(document).tolist()])
        total = torch.zeros(32)
        for start in range(0, len(text) - 1, 32):
            for u in seed.hidden_states(text[None, start : min(start + 32, len(text) - 1)], depth=1)[-1][0]:
                total = 0.99 * total + (u - u.mean()) / u.std(correction=0)
                read = (total - total.mean()) / total.std(correction=0)
                score = gates["joint.vectors"] @ read + gates["joint.bias"]
                weights.append(torch.cat([torch.zeros(1), score]).softmax(0))
    both = torch.cat([scores["seed"][:, None], experts_of(scores)], -1)
    mixed = (torch.stack(weights).log() + both).logsumexp(-1)
    assert rows["gates joint all"].bits_per_byte == pytest.approx(bits(scores, mixed), abs=1e-5)


def test_the_oracle_is_a_bound_for_every_choice_of_one_expert(rows):
    oracle = rows["oracle expert per document"]
    best = next(row for name, row in rows.items() if name.startswith("best single expert"))
    assert oracle.bits_per_byte <= best.bits_per_byte
    assert oracle.bits_per_byte <= rows["Bayes posterior"].bits_per_byte
    for cluster, value in oracle.clusters.items():
        assert value <= best.clusters[cluster] + 1e-6


def test_rows_are_best_first_and_compared_with_dense(metrics, rows):
    values = [row.bits_per_byte for row in metrics.rows]
    assert values == sorted(values)
    for row in metrics.rows:
        assert row.against_dense == pytest.approx(100 * (row.bits_per_byte / rows["dense"].bits_per_byte - 1), abs=1e-2)


def test_every_row_says_what_it_costs(rows):
    decoder = rows["seed"]
    assert decoder.parameters == decoder.active_parameters == rows["dense"].parameters
    assert rows["uniform ensemble"].parameters == 3 * decoder.parameters
    assert rows["uniform ensemble"].active_parameters == 3 * decoder.parameters
    assert rows["uniform ensemble"].inference_flops == pytest.approx(3 * decoder.inference_flops)
    assert rows["oracle expert per document"].active_parameters == decoder.parameters
    assert rows["oracle expert per document"].inference_flops == pytest.approx(decoder.inference_flops)
    top = [rows[f"cBTM {top}"] for top in ("top-1", "top-2", "all")]
    assert decoder.parameters <= top[0].active_parameters < top[1].active_parameters < top[2].active_parameters
    assert top[0].inference_flops <= top[1].inference_flops <= top[2].inference_flops
    assert rows["gates joint all"].parameters == 4 * decoder.parameters
    assert rows["seed"].training_flops < rows["dense"].training_flops < rows["gates joint all"].training_flops
    # experts and dense saw as many tokens, so training them cost the same
    assert rows["weight average"].training_flops == rows["dense"].training_flops


def test_a_composition_costs_more_than_the_central_model_alone(rows):
    alone, decoder = rows["central alone"], rows["seed"]
    for name in ("composed stitch", "composed calm", "composed stitch of seed copies (central-control)"):
        assert rows[name].inference_flops > alone.inference_flops + 3 * decoder.inference_flops
        assert rows[name].parameters > alone.parameters + 3 * decoder.parameters
        assert rows[name].training_flops > alone.training_flops
    assert rows["composed stitch"].training_flops > rows["dense"].training_flops + alone.training_flops * 0.9
    # It reads the joint gates, so what they took to train is a part of what it took.
    assert rows["composed stitch"].training_flops > rows["gates joint all"].training_flops + alone.training_flops * 0.4


def test_a_composition_knows_of_a_document_what_the_windows_before_told(evaluated_run, rows):
    tokens, models = TokenizeManifest.read(evaluated_run), RunModels.find(evaluated_run)
    store = TokenStore.open([evaluated_run / ref.path for ref in tokens.shards("valid")])
    composed = ComposedModel.from_parts(**models.composition("central"))
    found, alone, size = 0.0, 0.0, 0
    for document in choose_documents(store, 1200):
        text = [tokens.metrics.end_of_text, *store.tokens(document).tolist()]
        size, before = size + int(store.bytes[document]), None
        for start in range(0, len(text) - 1, 32):
            window, cache = torch.tensor([text[start : start + 33]]), composed.new_cache()
            alone += float(composed.log_probs(window[:, :-1], window[:, 1:])[0].sum())
            if before:
                recall(cache, before, 1)
            logits = composed(window[:, :-1], cache).logits_BTV
            found += float(logits.log_softmax(-1).gather(-1, window[:, 1:, None]).sum())
            before = cache
    assert rows["composed stitch"].bits_per_byte == pytest.approx(-found / math.log(2) / size, rel=1e-5)
    assert rows["composed stitch"].bits_per_byte != pytest.approx(-alone / math.log(2) / size, rel=1e-5)


def test_few_experts_cost_what_they_read(evaluated_run, evaluation, rows, monkeypatch, tmp_path):
    from stages.nn import choice

    monkeypatch.setattr(choice, "OPENING", 5)
    monkeypatch.setattr(choice, "SEGMENT", 8)
    run_dir = shutil.copytree(evaluated_run, tmp_path / "run")
    for name in ("central-calm", "central-control"):
        shutil.rmtree(run_dir / name)
    asked = evaluation.model_copy(update={"active_experts": (1, 2, 5)})
    found = {row.model: row for row in evaluate_models.run(asked, run_dir, force=True).metrics.rows}
    assert "composed stitch, top-5 per text" not in found  # of three experts
    every, two, one = (found[f"composed stitch{few}"] for few in ("", ", top-2 per text", ", top-1 per text"))
    assert every == rows["composed stitch"]
    assert rows["central alone"].inference_flops < one.inference_flops < two.inference_flops < every.inference_flops
    assert every.parameters == one.parameters > every.active_parameters - one.active_parameters > 0
    assert one.active_parameters < two.active_parameters < every.active_parameters
    assert len({one.bits_per_byte, two.bits_per_byte, every.bits_per_byte}) == 3


def test_no_composition_asks_nobody():
    with pytest.raises(ValueError, match="at least one expert, not 0"):
        EvaluateConfig(active_experts=(2, 0))


def test_usage_says_what_every_part_is_worth(metrics, rows):
    parts = {}
    for row in metrics.usage:
        parts.setdefault(row.model, set()).add(row.part)
        exchanged_for_equals = "seed copies" in row.model and row.part == "experts"
        assert len(row.places) == 4
        if " " not in row.part:
            assert (row.difference == 0) == exchanged_for_equals
    composed = {name for name in rows if name.startswith("composed") and not name.endswith("per text")}
    assert set(parts) == {"central alone", *composed}
    central = {"latents", "latents exchanged", "latents static", "plan", "plan exchanged", "plan static"}
    assert parts.pop("central alone") == central
    bridges = {"experts", "bridges", "bridges exchanged", "bridges static"}
    assert all(found == central | bridges for found in parts.values())


def test_predictions_do_not_depend_on_text_not_yet_given(metrics):
    assert 0 < metrics.prefix_gap < 1e-4


def test_a_model_that_looks_ahead_is_found(full_run, copied_run, evaluation, monkeypatch):
    from stages.nn.central import CentralModel

    forward = CentralModel.forward

    def peeks(self, ids_BT, *rest, **named):
        out = forward(self, ids_BT, *rest, **named)
        out.logits_BTV[:, :-1].scatter_add_(-1, ids_BT[:, 1:, None], torch.ones(*ids_BT[:, 1:].shape, 1))
        return out

    monkeypatch.setattr(CentralModel, "forward", peeks)
    run_dir = copied_run(full_run)
    shutil.rmtree(run_dir / "central-calm")
    shutil.rmtree(run_dir / "central-control")
    assert evaluate_models.run(evaluation, run_dir).metrics.prefix_gap > 0.1


def test_the_files_hold_the_table(evaluated_run, metrics):
    content = json.loads((evaluated_run / "reports/table.json").read_text())
    assert [row["model"] for row in content["rows"]] == [row.model for row in metrics.rows]
    assert len(content["usage"]) == len(metrics.usage)
    text = (evaluated_run / "reports/table.md").read_text()
    assert all(f"| {row.model} | {row.bits_per_byte:.4f} |" in text for row in metrics.rows)
    assert (evaluated_run / "reports/bits_per_byte.png").read_bytes().startswith(b"\x89PNG")


def test_clusters_and_sources_are_those_of_the_documents(evaluated_run, rows):
    assert set(rows["seed"].sources) == {"recipe", "code", "law"}
    assigned = set(read_table(evaluated_run / "clusters/assignments-valid.arrow")["cluster"].tolist())
    assert set(rows["seed"].clusters) <= {f"cluster {number:03d}" for number in assigned}


def test_a_second_call_scores_nothing(evaluated_run, evaluation, monkeypatch):
    monkeypatch.setattr(evaluate_models, "Evaluation", None)
    assert evaluate_models.run(evaluation, evaluated_run) == EvaluateManifest.read(evaluated_run)
    quick = evaluation.model_copy(update={"score_batch_size": 3})  # cannot change the result
    assert evaluate_models.run(quick, evaluated_run) == EvaluateManifest.read(evaluated_run)


def test_the_size_of_the_batches_does_not_change_the_table(evaluated_run, copied_run, evaluation, rows):
    config = evaluation.model_copy(update={"score_batch_size": 5})
    again = evaluate_models.run(config, copied_run(evaluated_run), force=True)
    for row in again.metrics.rows:
        assert row.bits_per_byte == pytest.approx(rows[row.model].bits_per_byte, abs=1e-5)


def test_a_run_without_gates_compositions_and_dense_has_fewer_rows(expert_run, copied_run, evaluation):
    run_dir = copied_run(expert_run)
    shutil.rmtree(run_dir / "dense")
    metrics = evaluate_models.run(evaluation, run_dir).metrics
    assert {row.group for row in metrics.rows} == {"single", "ensemble"}
    assert "dense" not in {row.model for row in metrics.rows}
    assert {row.against_dense for row in metrics.rows} == {None}
    assert metrics.usage == () and metrics.prefix_gap == 0


def test_a_further_dense_baseline_has_a_row_and_makes_the_table_stale(evaluated_run, copied_run, evaluation, rows):
    run_dir = copied_run(evaluated_run)
    shutil.copytree(run_dir / "dense", run_dir / "dense-8")
    with pytest.raises(StaleFailure, match="dense-8 is new"):
        evaluate_models.run(evaluation, run_dir)
    again = {row.model: row for row in evaluate_models.run(evaluation, run_dir, force=True).metrics.rows}
    assert again.pop("dense, 8 steps") == again["dense"].model_copy(update={"model": "dense, 8 steps"})
    assert again == rows


def test_a_composition_is_told_the_steps_of_a_dense_baseline_that_costs_as_much(evaluated_run, metrics, rows):
    dense = ExpertManifest.read(evaluated_run, "dense").metrics.training
    step = (rows["dense"].training_flops - rows["seed"].training_flops) / dense.steps
    composed = {row.model for row in metrics.rows if row.group in ("composed", "control")}
    assert set(metrics.dense_steps) == {model for model in composed if "per text" not in model}
    for model, steps in metrics.dense_steps.items():
        spent = rows[model].training_flops
        assert abs(rows["seed"].training_flops + steps * step - spent) <= 0.5 * step


def test_with_gates_inside_the_model_alone_none_at_the_experts_have_a_row(layer_gated_run, copied_run, evaluation):
    def never(*_):
        raise AssertionError("nothing reads the seed's states")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(evaluate_models.Evaluation, "_states_of_seed", never)
        run_dir = copied_run(layer_gated_run)
        rows = evaluate_models.run(evaluation.model_copy(update={"top_k": (1,)}), run_dir).metrics.rows
    gates = {row.model for row in rows if row.group == "gates"}
    assert gates == {f"gates layer-joint {top}" for top in ("top-1", "all")}
    routing = json.loads((run_dir / "reports/routing.json").read_text())
    assert {row["model"] for row in routing} == {"gates layer-joint top-1"}  # the nearest to two of three


@pytest.mark.parametrize(
    ("top_k", "asked", "experts", "looked_inside"),
    [
        ((1, 2, 4), 2, 8, 2),
        ((1, 2, 4), 2, 2, None),  # where two are all
        ((1, 2, 4), 2, 1, None),
        ((1, 4), 3, 8, 4),
        ((1,), 7, 8, None),
        ((), 2, 8, None),
    ],
)
def test_the_report_looks_inside_the_selection_nearest_to_what_was_asked_for(top_k, asked, experts, looked_inside):
    config = EvaluateConfig(top_k=top_k, inspected_top_k=asked)
    assert config.inspected(experts).top_k == looked_inside
    assert config.inspected(experts) in [*config.selections(experts)]


def test_a_new_composition_makes_the_table_stale_and_says_so(evaluated_run, copied_run, evaluation):
    run_dir = copied_run(evaluated_run)
    shutil.rmtree(run_dir / "central-calm")
    with pytest.raises(UsageFailure, match="its input central-calm is no longer given: give --force"):
        evaluate_models.run(evaluation, run_dir)


def test_a_changed_expert_makes_the_table_stale_and_says_so(expert_run, copied_run, evaluation, training):
    run_dir = copied_run(expert_run)
    evaluate_models.run(evaluation, run_dir)
    longer = ExpertsConfig(training=training.model_copy(update={"steps": 2}))
    train_experts.run(longer.model_copy(update={"expert": "0"}), run_dir, force=True)
    with pytest.raises(UsageFailure, match=r"no experts in .*: run `cpipe train-experts"):  # two old ones, one new
        evaluate_models.run(evaluation, run_dir)
    train_experts.run(longer, run_dir, force=True)
    with pytest.raises(UsageFailure, match="its input experts/000 has changed") as refused:
        evaluate_models.run(evaluation, run_dir)
    assert "\n" not in str(refused.value)
    before = ExpertManifest.read(expert_run, "experts/000")
    assert before.content_digest() != ExpertManifest.read(run_dir, "experts/000").content_digest()


def test_gates_and_compositions_of_experts_that_were_replaced_are_refused(full_run, copied_run, evaluation, training):
    run_dir = copied_run(full_run)
    shutil.rmtree(run_dir / "gates")
    longer = ExpertsConfig(training=training.model_copy(update={"steps": 2}))
    train_experts.run(longer, run_dir, force=True)
    with pytest.raises(UsageFailure, match="central was made from another experts than is there now: run `cpipe comp"):
        evaluate_models.run(evaluation, run_dir)
    for folder in run_dir.glob("central*"):
        shutil.rmtree(folder)
    assert evaluate_models.run(evaluation, run_dir).metrics.rows


@pytest.mark.parametrize("setting", ["tokens", "usage_tokens"])
def test_fewer_tokens_than_any_document_are_refused(expert_run, copied_run, evaluation, setting):
    with pytest.raises(UsageFailure, match="3 tokens hold no whole held-out document") as refused:
        evaluate_models.run(evaluation.model_copy(update={setting: 3}), copied_run(expert_run))
    assert "\n" not in str(refused.value)


@pytest.fixture(scope="module")
def fitted_run(expert_run, tmp_path_factory, evaluation):
    """An evaluation that fits the routing, of a run with nothing but experts, and the documents it fitted on."""
    run_dir = shutil.copytree(expert_run, tmp_path_factory.mktemp("runs") / "fitted")
    config = evaluation.model_copy(update={"tokens": 600, "fit_temperature": True, "fit_tokens": 500})
    given, real = {}, windows.Windows

    class Recorded(real):
        def __init__(self, store, documents, *rest, **more):
            super().__init__(store, documents, *rest, **more)
            given[len(given)] = sorted(documents)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "Windows", Recorded)
        metrics = evaluate_models.run(config, run_dir).metrics
    return run_dir, config, metrics, given[0], given[2]


def test_routing_is_fitted_on_held_out_documents_that_are_not_scored(fitted_run):
    _, _, metrics, scored, fitted_on = fitted_run
    assert scored and fitted_on
    assert not set(scored) & set(fitted_on)
    assert (len(scored), len(fitted_on)) == (metrics.documents, metrics.fitted.documents)
    assert metrics.fitted.tokens <= 500


def test_the_text_that_is_scored_does_not_change_what_is_fitted(fitted_run, tmp_path, monkeypatch):
    run_dir, config, metrics, scored, _ = fitted_run
    real = TokenStore.tokens

    def other_text(store, document):
        tokens = real(store, document)
        return tokens[::-1] if document in scored else tokens

    monkeypatch.setattr(TokenStore, "tokens", other_text)
    again = evaluate_models.run(config, shutil.copytree(run_dir, tmp_path / "run"), force=True).metrics
    assert again.fitted == metrics.fitted
    assert {row.model: row.bits_per_byte for row in again.rows} != {
        row.model: row.bits_per_byte for row in metrics.rows
    }


def test_fitted_rows_stand_beside_those_with_what_was_given(fitted_run, expert_run, copied_run):
    run_dir, config, metrics, _, _ = fitted_run
    fixed = evaluate_models.run(config.model_copy(update={"fit_temperature": False}), copied_run(expert_run)).metrics
    before = {row.model: row for row in fixed.rows}
    rows = {row.model: row for row in metrics.rows}
    names = {"cBTM top-1", "cBTM top-2", "cBTM all", "forgetting posterior"}
    assert set(rows) - set(before) == {f"{name} fitted" for name in names}
    assert all(rows[name] == row for name, row in before.items())
    assert fixed.fitted is None
    # whichever expert is nearest is so at any temperature
    assert rows["cBTM top-1 fitted"].bits_per_byte == rows["cBTM top-1"].bits_per_byte
    assert metrics.fitted.gain >= 0 and metrics.fitted.forgetting_gain >= 0
    assert rows["cBTM all fitted"].bits_per_byte != rows["cBTM all"].bits_per_byte
    text = (run_dir / "reports/table.md").read_text()
    assert f"temperature {metrics.fitted.temperature:.4g}, forgetting {metrics.fitted.forgetting:.4g}" in text


def test_no_text_left_to_fit_on_is_one_line(expert_run, copied_run, evaluation):
    everything = evaluation.model_copy(update={"tokens": 10**6, "fit_temperature": True})
    with pytest.raises(UsageFailure, match=r"all \d+ held-out documents are taken already: give fewer with --tokens"):
        evaluate_models.run(everything, copied_run(expert_run))
