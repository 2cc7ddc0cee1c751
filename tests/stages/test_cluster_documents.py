"""The cluster stage on three kinds of text that no label gives away."""

import hashlib
import json
import random
import shutil
from collections import Counter

import numpy as np
import pytest
from tokenizers import Tokenizer

from schemas.cluster_documents import ClusterConfig, ClusterManifest
from schemas.failures import InputFailure, IntegrityFailure, UsageFailure
from schemas.tokenize_text import SPLITS, TokenizeConfig, TokenizeManifest
from stages import cluster_documents, tokenize_text
from stages.artifacts.model_folder import read_tensors
from stages.clustering.features import document_vectors
from stages.clustering.kmeans import nearest
from stages.data.token_store import TokenStore, read_table


@pytest.fixture
def tokens_only(clustered_run, copied_run):
    """A run of this test's own with `tokens/` alone."""
    run_dir = copied_run(clustered_run)
    shutil.rmtree(run_dir / "clusters")
    return run_dir


def run_on(texts, tmp_path, config, **tokenize):
    """Tokenize and cluster a few texts."""
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"id": f"d{n}", "text": text}) + "\n" for n, text in enumerate(texts)))
    tokenize_text.run(TokenizeConfig(inputs=(str(path),), vocab_size=300, **tokenize), tmp_path / "run")
    return cluster_documents.run(config, tmp_path / "run")


def store_of(run_dir, split):
    return TokenStore.open([run_dir / ref.path for ref in TokenizeManifest.read(run_dir).shards(split)])


def tensors_of(run_dir):
    vectors = read_tensors(run_dir / "clusters/vectorizer.safetensors")["token_vectors"].numpy()
    return vectors, read_tensors(run_dir / "clusters/centroids.safetensors")["centroids"].numpy()


def digests(run_dir):
    folder = run_dir / "clusters"
    names = (path for path in folder.iterdir() if path.name != "manifest.json")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in names}


def test_kinds_of_text_are_told_apart_without_their_labels(clustered_run):
    metrics = ClusterManifest.read(clustered_run).metrics
    assert metrics.purity > 0.95
    assert metrics.token_purity > 0.95
    assert metrics.nmi > 0.9
    assert metrics.fit_balance < 1.05
    assert {max(cluster.sources, key=cluster.sources.get) for cluster in metrics.clusters} == {"recipe", "code", "law"}
    assert metrics.largest_weight > 0.9
    assert 1 <= metrics.effective_clusters < 1.5


def test_assignments_are_the_nearest_centroids_in_the_order_of_the_store(clustered_run):
    token_vectors, centroids = tensors_of(clustered_run)
    assert token_vectors.shape == (TokenizeManifest.read(clustered_run).metrics.vocab_size, 8)
    assert centroids.shape == (3, 8)
    for split in SPLITS:
        store = store_of(clustered_run, split)
        table = read_table(clustered_run / f"clusters/assignments-{split}.arrow")
        assert table["id"] == store.ids
        assert table["cluster"].dtype == np.int32
        vectors = document_vectors((store.tokens(n) for n in range(len(store))), token_vectors)
        np.testing.assert_array_equal(table["cluster"], nearest(vectors, centroids))


def test_summaries_count_documents_tokens_and_sources(clustered_run):
    metrics = ClusterManifest.read(clustered_run).metrics
    train, valid = (store_of(clustered_run, split) for split in SPLITS)
    labels = read_table(clustered_run / "clusters/assignments-train.arrow")["cluster"]
    for number, cluster in enumerate(metrics.clusters):
        members = np.flatnonzero(labels == number)
        assert cluster.documents == len(members)
        assert cluster.tokens == train.lengths[members].sum()
        assert sum(cluster.sources.values()) == len(members)
    assert sum(cluster.valid_documents for cluster in metrics.clusters) == len(valid)


def test_top_terms_are_pieces_of_words_more_frequent_in_the_cluster(clustered_run):
    tokenizer = Tokenizer.from_file(str(clustered_run / "tokens/tokenizer.json"))
    store = store_of(clustered_run, "train")
    labels = read_table(clustered_run / "clusters/assignments-train.arrow")["cluster"]
    words = [tokenizer.decode([token]).strip().casefold() for token in range(tokenizer.get_vocab_size())]
    rates = [Counter(words[token] for token in store.tokens(number)) for number in range(len(store))]
    for label, cluster in enumerate(ClusterManifest.read(clustered_run).metrics.clusters):
        terms = [term.casefold() for term in cluster.top_terms]
        assert 3 <= len(terms) <= 10
        assert len(set(terms)) == len(terms)
        assert all(any(map(str.isalpha, term)) for term in terms)
        for term in terms:
            inside = np.mean([rate[term] for rate, of in zip(rates, labels, strict=True) if of == label])
            assert inside > np.mean([rate[term] for rate in rates])


def test_a_second_start_does_nothing_and_a_forced_one_gives_the_same_bytes(clustered_run, copied_run):
    run_dir, config = copied_run(clustered_run), ClusterConfig(clusters=3, dimensions=8)
    before, stamp = digests(run_dir), (run_dir / "clusters/manifest.json").stat().st_mtime_ns
    first = cluster_documents.run(config, run_dir)
    assert (run_dir / "clusters/manifest.json").stat().st_mtime_ns == stamp
    forced = cluster_documents.run(config, run_dir, force=True)
    assert digests(run_dir) == before
    assert forced.content_digest() == first.content_digest()


def test_random_partition_is_a_hash_of_the_id_and_tells_nothing(tokens_only):
    manifest = cluster_documents.run(ClusterConfig(clusters=3, dimensions=8, method="random"), tokens_only)
    assert manifest.metrics.nmi < 0.1
    for split in SPLITS:
        table = read_table(tokens_only / f"clusters/assignments-{split}.arrow")
        hashes = [int(hashlib.sha256(f"0:{name}".encode()).hexdigest()[:16], 16) % 3 for name in table["id"]]
        assert table["cluster"].tolist() == hashes


def test_equal_tokens_where_lengths_differ_by_kind(tmp_path):
    draw = random.Random(0)
    kinds = [(4, "butter flour sugar"), (4, "court tenant clause"), (80, "return yield lambda")]
    texts = [
        " ".join(draw.choices(words.split(), k=length)) + f" {number}"
        for length, words in kinds
        for number in range(50 if length < 80 else 20)
    ]
    by_documents = run_on(texts, tmp_path, ClusterConfig(clusters=3, equal="documents"), valid_fraction=0.1)
    by_tokens = cluster_documents.run(ClusterConfig(clusters=3), tmp_path / "run", force=True)
    assert by_tokens.metrics.train_token_balance < by_documents.metrics.train_token_balance
    assert by_tokens.metrics.fit_balance < 1.01
    assert by_documents.metrics.fit_balance < 1.05


def test_fit_uses_no_more_documents_than_the_sample(tokens_only):
    config = ClusterConfig(clusters=3, dimensions=8, sample_documents=30)
    manifest = cluster_documents.run(config, tokens_only)
    assert manifest.metrics.sampled_documents == 30
    assert sum(cluster.documents for cluster in manifest.metrics.clusters) == len(store_of(tokens_only, "train"))


def test_unbalanced_and_single_cluster(tokens_only):
    free = cluster_documents.run(ClusterConfig(clusters=4, dimensions=8, method="unbalanced"), tokens_only)
    assert free.metrics.train_balance == pytest.approx(free.metrics.fit_balance)
    whole = cluster_documents.run(ClusterConfig(clusters=1, dimensions=8), tokens_only, force=True)
    assert whole.metrics.train_balance == 1
    assert whole.metrics.effective_clusters == pytest.approx(1)


def test_one_source_has_no_purity(tmp_path):
    texts = [f"{'butter flour' if n % 2 else 'court tenant'} {n}" for n in range(30)]
    metrics = run_on(texts, tmp_path, ClusterConfig(clusters=2), valid_fraction=0.2).metrics
    assert metrics.purity is None
    assert metrics.token_purity is None
    assert metrics.nmi is None


def test_more_clusters_than_documents_are_refused(tokens_only):
    with pytest.raises(InputFailure, match=r"training documents cannot make 500 clusters: give --clusters at most"):
        cluster_documents.run(ClusterConfig(clusters=500), tokens_only)


def test_identical_documents_are_refused_but_make_one_cluster(tmp_path):
    with pytest.raises(InputFailure, match="too much alike") as refusal:
        run_on(["the same words"] * 40, tmp_path, ClusterConfig(clusters=2), valid_fraction=0.2)
    assert "\n" not in str(refusal.value)
    whole = cluster_documents.run(ClusterConfig(clusters=1), tmp_path / "run")
    assert whole.metrics.train_balance == 1


def test_a_changed_shard_is_noticed(tokens_only):
    shard = tokens_only / "tokens/train-00000.arrow"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(IntegrityFailure, match="changed after it was written"):
        cluster_documents.run(ClusterConfig(clusters=3), tokens_only)


def test_tokens_of_another_vocabulary_are_refused(tokens_only):
    path = tokens_only / "tokens/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["metrics"]["vocab_size"] = 100
    path.write_text(json.dumps(manifest))
    with pytest.raises(IntegrityFailure, match=r"holds token \d+, the tokenizer has only 100"):
        cluster_documents.run(ClusterConfig(clusters=3), tokens_only)


def test_missing_tokens_name_the_command(tmp_path):
    with pytest.raises(UsageFailure, match="cpipe tokenize"):
        cluster_documents.run(ClusterConfig(), tmp_path)
