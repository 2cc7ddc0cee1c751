import json
import math
import shutil

import numpy as np
import pytest
import tokenizers
import torch

from schemas.failures import IntegrityFailure, UsageFailure
from schemas.files import digest_of
from schemas.manifest import digest_of_json
from schemas.tokenize_text import TokenizeManifest
from schemas.train_seed import SeedConfig, SeedManifest
from schemas.verify_run import VerifyConfig
from stages import train_seed, verify_run
from stages.artifacts.model_folder import read_model
from stages.data.token_store import TokenStore
from stages.nn.decoder import Decoder, NextTokenLoss


@pytest.fixture
def config(shape, training):
    return SeedConfig(model=shape, training=training)


@pytest.fixture
def no_training(monkeypatch):
    def refuse(*_):
        raise AssertionError("trains again")

    monkeypatch.setattr(train_seed, "train", refuse)


def changed(config, **training):
    return config.model_copy(update={"training": config.training.model_copy(update=training)})


def test_the_manifest_says_what_was_done(seeded_run, config):
    manifest = SeedManifest.read(seeded_run)
    tokens = TokenizeManifest.read(seeded_run)
    assert manifest.config == config
    assert manifest.inputs == (tokens.as_input(),)
    assert {ref.path for ref in manifest.outputs} == {
        f"seed/{name}" for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    }
    assert all(ref.check(seeded_run) for ref in manifest.outputs)
    assert manifest.metrics.training.tokens == 8 * 6 * 32
    left = {path.name for path in (seeded_run / "seed").iterdir()} - {ref.path[5:] for ref in manifest.outputs}
    assert left == {"manifest.json", "metrics.jsonl", "tensorboard"}


def test_the_first_loss_is_that_of_a_guess_and_the_last_is_lower(seeded_run):
    training, vocabulary = SeedManifest.read(seeded_run).metrics.training, 320
    assert TokenizeManifest.read(seeded_run).metrics.vocab_size == vocabulary
    assert training.first_loss == pytest.approx(math.log(vocabulary), rel=0.1)
    assert training.final_loss < training.first_loss - 0.3


def test_the_written_weights_are_the_trained_ones(seeded_run):
    tokens = TokenizeManifest.read(seeded_run)
    decoder = Decoder.from_weights(*read_model(seeded_run, SeedManifest.read(seeded_run)))
    store = TokenStore.open([ref.check(seeded_run) for ref in tokens.shards("train")])
    rows = np.stack([store.tokens(document)[:33] for document in range(len(store)) if store.lengths[document] > 33])
    loss = NextTokenLoss(decoder)(torch.from_numpy(rows.astype(np.int64)))["loss"].item()
    assert loss == pytest.approx(SeedManifest.read(seeded_run).metrics.training.final_loss, abs=0.4)


def test_it_trains_on_the_rows_of_all_documents_in_the_order_of_its_seed(seeded_run, copied_run, config, monkeypatch):
    run_dir, seen = copied_run(seeded_run), []

    def record(module, batch_at, training, folder, label, write):
        seen.extend(batch_at(step) for step in (0, 3))
        raise KeyboardInterrupt

    monkeypatch.setattr(train_seed, "train", record)
    with pytest.raises(KeyboardInterrupt):
        train_seed.run(changed(config, seed=4), run_dir, force=True)
    tokens = TokenizeManifest.read(run_dir)
    store = TokenStore.open([ref.check(run_dir) for ref in tokens.shards("train")])
    rows = train_seed.Rows(store, tokens.metrics.end_of_text, 32)
    assert torch.equal(torch.stack(seen), torch.stack([rows.batch(step, 6, seed=4) for step in (0, 3)]))


def test_a_second_call_is_up_to_date(seeded_run, config, no_training):
    assert train_seed.run(config, seeded_run) == SeedManifest.read(seeded_run)


def test_settings_that_change_nothing_leave_it_up_to_date(seeded_run, config, no_training):
    other = changed(config, log_every=1, checkpoint_every=2, micro_batch_size=3)
    assert train_seed.run(other, seeded_run) == SeedManifest.read(seeded_run)


def test_a_changed_setting_is_refused_by_name(seeded_run, config, no_training):
    with pytest.raises(
        UsageFailure, match=r"training.learning_rate was 0.005 and is now 0.01: give --force"
    ) as refused:
        train_seed.run(changed(config, learning_rate=0.01), seeded_run)
    assert "\n" not in str(refused.value)


def test_force_trains_again_with_the_new_setting(seeded_run, copied_run, config):
    run_dir = copied_run(seeded_run)
    before = digest_of(run_dir / "seed" / "model.safetensors")
    manifest = train_seed.run(changed(config, learning_rate=0.01), run_dir, force=True)
    assert manifest == SeedManifest.read(run_dir)
    assert manifest.config.training.learning_rate == 0.01
    assert digest_of(run_dir / "seed" / "model.safetensors") != before


def test_a_rate_that_is_not_given_fits_the_size_of_the_training_and_is_told(seeded_run, copied_run, config):
    run_dir = copied_run(seeded_run)
    manifest = train_seed.run(changed(config, learning_rate=None, log_every=1), run_dir, force=True)
    found = manifest.metrics.training.learning_rate
    flops = 6 * manifest.metrics.parameters * manifest.metrics.training.tokens
    assert found == float(f"{0.3118 * flops ** (-1 / 8):.2g}")
    assert manifest.config.training.learning_rate is None
    lines = [json.loads(line) for line in (run_dir / "seed" / "metrics.jsonl").read_text().splitlines()]
    assert max(line["learning_rate"] for line in lines) == found
    assert SeedManifest.read(seeded_run).metrics.training.learning_rate == 0.005


def test_a_manifest_from_before_rates_were_recorded_is_as_it_was_sealed(seeded_run, copied_run, config, no_training):
    run_dir = copied_run(seeded_run)
    path = run_dir / "seed" / "manifest.json"
    content = json.loads(path.read_text())
    del content["metrics"]["training"]["learning_rate"], content["digest"]
    path.write_text(json.dumps({**content, "digest": digest_of_json(content)}))
    manifest = train_seed.run(config, run_dir)
    assert manifest.is_as_sealed()
    assert manifest.metrics.training.learning_rate is None
    assert [each for each in verify_run.stream(VerifyConfig(), run_dir) if each.problems] == []


def test_the_same_settings_give_the_same_bytes(seeded_run, copied_run, config):
    run_dir = copied_run(seeded_run)
    shutil.rmtree(run_dir / "seed")
    again = train_seed.run(config, run_dir)
    assert again.outputs == SeedManifest.read(seeded_run).outputs
    assert again.content_digest() == SeedManifest.read(seeded_run).content_digest()


@pytest.mark.parametrize("change", [{"seed": 1}, {"steps": 9}])
def test_other_settings_give_other_weights(change, seeded_run, copied_run, config):
    run_dir = copied_run(seeded_run)
    again = train_seed.run(changed(config, **change), run_dir, force=True)
    assert again.output("model.safetensors").digest != SeedManifest.read(seeded_run).output("model.safetensors").digest


def test_interrupted_it_resumes_to_the_same_bytes(seeded_run, copied_run, config, monkeypatch):
    run_dir = copied_run(seeded_run)
    shutil.rmtree(run_dir / "seed")
    rows_batch = train_seed.Rows.batch

    def batch(rows, step, size, seed):
        if step == 5:
            raise KeyboardInterrupt
        return rows_batch(rows, step, size, seed)

    monkeypatch.setattr(train_seed.Rows, "batch", batch)
    with pytest.raises(KeyboardInterrupt):
        train_seed.run(changed(config, checkpoint_every=2), run_dir)
    assert (run_dir / "seed" / "checkpoints").is_dir()
    with pytest.raises(UsageFailure, match=r"no seed in .*: run `cpipe train-seed"):
        SeedManifest.read(run_dir)
    seen = []
    monkeypatch.setattr(train_seed.Rows, "batch", lambda *given: seen.append(given[1]) or rows_batch(*given))
    again = train_seed.run(config, run_dir)
    assert seen == [4, 5, 6, 7]
    assert again.outputs == SeedManifest.read(seeded_run).outputs
    assert not (run_dir / "seed" / "checkpoints").exists()


def test_leftovers_of_other_settings_are_not_resumed(seeded_run, copied_run, config, monkeypatch):
    run_dir = copied_run(seeded_run)
    shutil.rmtree(run_dir / "seed")
    rows_batch = train_seed.Rows.batch

    def batch(rows, step, size, seed):
        if step == 5:
            raise KeyboardInterrupt
        return rows_batch(rows, step, size, seed)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(train_seed.Rows, "batch", batch)
        train_seed.run(changed(config, checkpoint_every=2, learning_rate=0.01), run_dir)
    assert train_seed.run(config, run_dir).outputs == SeedManifest.read(seeded_run).outputs


def test_without_tokens_it_says_what_to_run(tmp_path, config):
    with pytest.raises(UsageFailure, match=r"no tokens in .*: run `cpipe tokenize"):
        train_seed.run(config, tmp_path)


def test_a_changed_shard_is_refused(clustered_run, copied_run, config):
    run_dir = copied_run(clustered_run)
    path = run_dir / "tokens" / "train-00000.arrow"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityFailure, match=r"train-00000.arrow was changed"):
        train_seed.run(config, run_dir)


def test_a_new_model_that_does_not_start_near_a_guess_is_doubted(monkeypatch):
    said = []
    monkeypatch.setattr(train_seed.logger, "warning", lambda text, *values: said.append(text.format(*values)))
    train_seed._doubt(5.7, 320)
    assert not said
    train_seed._doubt(7.0, 320)
    assert said == ["the first loss was 7.00, expected about ln V = 5.77"]


def test_masked_documents_train_other_weights(seeded_run, copied_run, config):
    run_dir = copied_run(seeded_run)
    before = digest_of(run_dir / "seed" / "model.safetensors")
    train_seed.run(changed(config, mask_documents=True, steps=8), run_dir, force=True)
    assert digest_of(run_dir / "seed" / "model.safetensors") != before


@pytest.mark.parametrize("zero", [None, 1])
def test_samples_are_the_likeliest_text_of_the_weights_and_change_no_bit(zero, seeded_run, copied_run, config):
    run_dir = copied_run(seeded_run)
    engine = {"engine": "torch"} if zero is None else {"engine": "deepspeed", "zero_stage": zero}
    silent = changed(config, steps=9, **engine)
    expected = train_seed.run(silent, run_dir, force=True).output("model.safetensors").digest
    assert not (run_dir / "seed" / "samples.jsonl").exists()
    asked = changed(silent, sample_every=3, sample_prompt="the bowl")
    assert train_seed.run(asked, run_dir, force=True).output("model.safetensors").digest == expected
    lines = [json.loads(line) for line in (run_dir / "seed" / "samples.jsonl").read_text().splitlines()]
    assert [(line["step"], line["prompt"]) for line in lines] == [(step, "the bowl") for step in (3, 6, 9)]
    decoder = Decoder.from_weights(*read_model(run_dir, SeedManifest.read(run_dir)))
    tokenizer = tokenizers.Tokenizer.from_file(str(run_dir / "tokens" / "tokenizer.json"))
    ids = prompt = [0, *tokenizer.encode("the bowl").ids]
    while len(ids) < 32 and (token := int(decoder(torch.tensor([ids]))[0, -1].argmax())) != 0:
        ids = [*ids, token]
    assert lines[-1]["text"] == tokenizer.decode(ids[len(prompt) :]) != ""
    assert [each for each in verify_run.stream(VerifyConfig(), run_dir) if each.problems] == []


def test_zero_3_and_samples_exclude_each_other(seeded_run, copied_run, config):
    with pytest.raises(UsageFailure, match=r"--zero-stage 3 takes apart .* --sample-every") as refused:
        train_seed.run(changed(config, sample_every=3, zero_stage=3), copied_run(seeded_run), force=True)
    assert "\n" not in str(refused.value)
