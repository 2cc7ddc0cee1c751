"""The cluster stage on three kinds of text that no label gives away."""

import hashlib
import json
import random
import shutil
from collections import Counter

import numpy as np
import pytest
from tokenizers import Tokenizer

from schemas.cluster_documents import ClusterConfig, ClusterManifest, SweepManifest
from schemas.failures import InputFailure, IntegrityFailure, StaleFailure, UsageFailure
from schemas.tokenize_text import SPLITS, TokenizeConfig, TokenizeManifest
from stages import cluster_documents, tokenize_text
from stages.artifacts.model_folder import read_tensors
from stages.clustering.distances import means, nearest, squared_distances
from stages.clustering.features import document_vectors
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
    names = (path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in names}


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


def documents_of(run_dir):
    """Ids and sources of all documents, held-out ones last."""
    stores = [store_of(run_dir, split) for split in SPLITS]
    return [name for store in stores for name in store.ids], [name for store in stores for name in store.sources]


def own_vectors(run_dir, folder, make):
    """A file of vectors, in another order than the documents: `make(sources, generator)` are theirs."""
    ids, sources = documents_of(run_dir)
    generator = np.random.default_rng(0)
    vectors, order = make(np.array(sources), generator).astype(np.float32), generator.permutation(len(ids))
    np.save(folder / "own.npy", vectors[order])
    (folder / "own.npy.ids").write_text("".join(f"{ids[number]}\n" for number in order))
    return str(folder / "own.npy"), dict(zip(ids, vectors, strict=True))


def by_kind(sources, generator):
    """Recipes and laws together, and code in two halves: what no count of words would say."""
    places = np.where(sources == "code", 1 + generator.integers(0, 2, len(sources)), 0)
    return 5 * np.eye(3)[places] + 0.1 * generator.normal(size=(len(sources), 3))


@pytest.fixture
def with_vectors(tokens_only, tmp_path):
    path, vectors = own_vectors(tokens_only, tmp_path, by_kind)
    config = ClusterConfig(clusters=3, dimensions=8, method="unbalanced", vectors=path)
    return tokens_only, config, cluster_documents.run(config, tokens_only), vectors


def test_own_vectors_decide_the_clusters(with_vectors):
    run_dir, _, manifest, vectors = with_vectors
    found = read_tensors(run_dir / "clusters/centroids.safetensors")["given_centroids"].numpy()
    for split in SPLITS:
        table = read_table(run_dir / f"clusters/assignments-{split}.arrow")
        own = np.stack([vectors[name] for name in table["id"]])
        np.testing.assert_array_equal(table["cluster"], nearest(own, found))
        groups = {name: set() for name in ("recipe", "law", "code")}
        for name, cluster in zip(table["id"], table["cluster"].tolist(), strict=True):
            groups[name.split("-")[0]].add(cluster)
        assert groups["recipe"] == groups["law"] and len(groups["recipe"]) == 1
        assert len(groups["code"]) == 2 and not groups["code"] & groups["law"]
    assert manifest.metrics.dimensions == 3
    assert manifest.metrics.spread < 0.1


def test_texts_are_routed_by_the_mean_token_vectors_of_such_clusters(with_vectors):
    run_dir, _, manifest, _ = with_vectors
    table, centroids = tensors_of(run_dir)
    store, labels = store_of(run_dir, "train"), read_table(run_dir / "clusters/assignments-train.arrow")["cluster"]
    vectors = document_vectors((store.tokens(number) for number in range(len(store))), table)
    np.testing.assert_allclose(centroids, means(vectors, labels, 3), atol=1e-6)
    store, labels = store_of(run_dir, "valid"), read_table(run_dir / "clusters/assignments-valid.arrow")["cluster"]
    vectors = document_vectors((store.tokens(number) for number in range(len(store))), table)
    assert manifest.metrics.routed_home == pytest.approx((nearest(vectors, centroids) == labels).mean())
    assert 0.5 < manifest.metrics.routed_home < 1  # the halves of code cannot be told apart by words


def test_by_tokens_every_held_out_document_is_routed_home(clustered_run):
    assert ClusterManifest.read(clustered_run).metrics.routed_home == 1


def test_other_vectors_are_another_input_and_another_name_is_not(with_vectors, tmp_path):
    run_dir, config, manifest, _ = with_vectors
    assert [ref.name for ref in manifest.inputs] == ["tokens", "vectors", "vectors.ids"]
    for suffix in ("", ".ids"):
        (tmp_path / f"own.npy{suffix}").rename(tmp_path / f"moved.npy{suffix}")
    moved = config.model_copy(update={"vectors": str(tmp_path / "moved.npy")})
    assert cluster_documents.run(moved, run_dir) == manifest
    np.save(tmp_path / "moved.npy", np.load(tmp_path / "moved.npy") * 2)
    with pytest.raises(StaleFailure, match="its input vectors has changed: give --force"):
        cluster_documents.run(moved, run_dir)
    with pytest.raises(StaleFailure, match="its input vectors is no longer given"):
        cluster_documents.run(config.model_copy(update={"vectors": None}), run_dir)


def test_vectors_of_other_documents_leave_the_run_as_it_was(tokens_only, tmp_path):
    path, _ = own_vectors(tokens_only, tmp_path, by_kind)
    names = (tmp_path / "own.npy.ids").read_text().splitlines()
    (tmp_path / "own.npy.ids").write_text("\n".join(["x1", "x2", *names[2:]]))
    with pytest.raises(InputFailure, match="has no vector for 2 of 120 documents of the run: ") as refused:
        cluster_documents.run(ClusterConfig(clusters=3, vectors=path), tokens_only)
    assert all(name in str(refused.value) for name in names[:2]) and "\n" not in str(refused.value)
    assert not (tokens_only / "clusters/manifest.json").exists()


def test_overlap_gives_the_documents_nearest_to_a_border_to_two(tokens_only):
    manifest = cluster_documents.run(ClusterConfig(clusters=3, dimensions=8, overlap=0.25), tokens_only)
    table = read_table(tokens_only / "clusters/assignments-train.arrow")
    token_vectors, centroids = tensors_of(tokens_only)
    store = store_of(tokens_only, "train")
    vectors = document_vectors((store.tokens(number) for number in range(len(store))), token_vectors)
    ranked = squared_distances(vectors, centroids).argsort(1)
    margins = np.diff(np.sort(squared_distances(vectors, centroids), 1)[:, :2], axis=1)[:, 0]
    shared = table["second"] >= 0
    assert table["second"].dtype == np.int32
    assert shared.sum() == round(0.25 * len(store)) == manifest.metrics.shared_documents
    np.testing.assert_array_equal(table["second"][shared], ranked[shared, 1])
    assert margins[shared].max() <= margins[~shared].min()
    assert manifest.metrics.shared_tokens == store.lengths[shared].sum()
    counts = np.bincount(table["second"][shared], minlength=3)
    assert [cluster.shared_documents for cluster in manifest.metrics.clusters] == counts.tolist()
    assert "second" not in read_table(tokens_only / "clusters/assignments-valid.arrow")


@pytest.mark.parametrize("changed", [{}, {"tree": "3x1"}], ids=["flat", "tree"])
def test_potentials_are_stored_and_decide_where_documents_go(tokens_only, changed):
    config = ClusterConfig.from_mapping({"clusters": 3, "dimensions": 8, "potentials": True, **changed})
    manifest = cluster_documents.run(config, tokens_only)
    table, centroids = tensors_of(tokens_only)
    potentials = read_tensors(tokens_only / "clusters/centroids.safetensors")["potentials"].numpy()
    assert potentials.shape == (3,)
    for split in SPLITS:
        store = store_of(tokens_only, split)
        vectors = document_vectors((store.tokens(number) for number in range(len(store))), table)
        found = read_table(tokens_only / f"clusters/assignments-{split}.arrow")["cluster"]
        np.testing.assert_array_equal(found, (squared_distances(vectors, centroids) - potentials).argmin(1))
        tokens = np.bincount(found, store.lengths, 3)
        told = {"train": manifest.metrics.train_token_balance, "valid": manifest.metrics.valid_token_balance}[split]
        assert told == pytest.approx(tokens.max() / tokens.mean())
    assert manifest.metrics.train_token_balance < 1.1


def test_without_potentials_none_are_stored(clustered_run):
    assert set(read_tensors(clustered_run / "clusters/centroids.safetensors")) == {"centroids"}


def test_without_overlap_no_document_has_a_second_cluster(clustered_run):
    assert set(read_table(clustered_run / "clusters/assignments-train.arrow")["second"].tolist()) == {-1}
    assert ClusterManifest.read(clustered_run).metrics.shared_documents == 0


def test_materialised_clusters_hold_their_documents(tokens_only):
    config = ClusterConfig(clusters=3, dimensions=8, overlap=0.1, materialise=True)
    manifest = cluster_documents.run(config, tokens_only)
    for split in SPLITS:
        whole = store_of(tokens_only, split)
        table = read_table(tokens_only / f"clusters/assignments-{split}.arrow")
        second = table.get("second", np.full(len(whole), -1))
        for cluster in range(3):
            refs = manifest.shards(cluster, split)
            assert [ref.path for ref in refs] == [f"clusters/{cluster:03d}/{split}-00000.arrow"]
            part = TokenStore.open([ref.check(tokens_only) for ref in refs])
            numbers = np.flatnonzero((table["cluster"] == cluster) | (second == cluster))
            assert part.ids == [whole.ids[number] for number in numbers]
            for place, number in enumerate(numbers.tolist()):
                np.testing.assert_array_equal(part.tokens(place), whole.tokens(number))
    before = digests(tokens_only)
    cluster_documents.run(config, tokens_only, force=True)
    assert digests(tokens_only) == before


def test_a_start_that_was_killed_leaves_nothing_behind(tokens_only, tmp_path, monkeypatch):
    config = ClusterConfig(clusters=3, dimensions=8, materialise=True)
    whole = shutil.copytree(tokens_only, tmp_path / "whole")
    cluster_documents.run(config, whole)
    real = cluster_documents.write_cluster

    def killed(store, documents, folder, *rest):
        real(store, documents, folder, *rest)
        (folder / ".train-00000.arrow.17.tmp").write_bytes(b"half")
        (folder.parent / ".centroids.safetensors.17.tmp").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(cluster_documents, "write_cluster", killed)
    with pytest.raises(KeyboardInterrupt):
        cluster_documents.run(config, tokens_only)
    monkeypatch.setattr(cluster_documents, "write_cluster", real)
    cluster_documents.run(config, tokens_only)
    assert digests(tokens_only) == digests(whole)


def test_clusters_are_not_materialised_unasked(clustered_run):
    manifest = ClusterManifest.read(clustered_run)
    assert manifest.shards(0, "train") == []
    assert {path.name for path in (clustered_run / "clusters").iterdir()} == {
        "manifest.json", "vectorizer.safetensors", "centroids.safetensors", "assignments-train.arrow",
        "assignments-valid.arrow", "clusters.md", "map.png",
    }  # fmt: skip


def test_reports_name_the_clusters_and_their_central_documents(clustered_run):
    metrics = ClusterManifest.read(clustered_run).metrics
    text = (clustered_run / "clusters/clusters.md").read_text()
    store, labels = store_of(clustered_run, "train"), read_table(clustered_run / "clusters/assignments-train.arrow")
    cluster_of = dict(zip(labels["id"], labels["cluster"].tolist(), strict=True))
    table, centroids = tensors_of(clustered_run)
    vectors = document_vectors((store.tokens(number) for number in range(len(store))), table)
    for number, cluster in enumerate(metrics.clusters):
        assert cluster.cluster == number
        assert f"| {number:03d} | {cluster.documents} | {cluster.tokens:,} |" in text
        assert all(cluster_of[name] == number for name in cluster.central_documents)
        own = np.flatnonzero(labels["cluster"] == number)
        nearest_first = own[((vectors[own] - centroids[number]) ** 2).sum(1).argsort(kind="stable")]
        assert [store.ids[place] for place in nearest_first[:3]] == list(cluster.central_documents)
    assert (clustered_run / "clusters/map.png").read_bytes().startswith(b"\x89PNG")


def test_a_tree_has_a_cluster_for_every_leaf(tokens_only):
    manifest = cluster_documents.run(ClusterConfig(tree="3x2", dimensions=8, equal="documents"), tokens_only)
    assert len(manifest.metrics.clusters) == manifest.config.clusters == 6
    assert manifest.metrics.fit_balance < 1.05
    assert manifest.metrics.purity > 0.95
    pairs = [manifest.metrics.clusters[first : first + 2] for first in (0, 2, 4)]
    mains = [{max(leaf.sources, key=leaf.sources.get) for leaf in pair} for pair in pairs]
    assert sorted(map(sorted, mains)) == [["code"], ["law"], ["recipe"]]


def test_the_number_of_threads_changes_neither_bytes_nor_key(clustered_run, copied_run, monkeypatch):
    from stages.clustering import assignment

    run_dir = copied_run(clustered_run)
    before, first = digests(run_dir), ClusterManifest.read(run_dir)
    monkeypatch.setattr(assignment, "CHUNK_DOCUMENTS", 7)
    for workers in (1, 3):
        config = ClusterConfig(clusters=3, dimensions=8, workers=workers)
        assert cluster_documents.run(config, run_dir).key == first.key
        again = cluster_documents.run(config, run_dir, force=True)
        assert digests(run_dir) == before
        assert again.content_digest() == first.content_digest()


SWEEP = ClusterConfig(sweep="2,3,6", dimensions=8)


def test_a_sweep_compares_and_leaves_the_clusters_alone(clustered_run, copied_run):
    run_dir = copied_run(clustered_run)
    before = digests(run_dir)
    manifest = cluster_documents.run(SWEEP, run_dir)
    assert isinstance(manifest, SweepManifest)
    rows = {row.clusters: row for row in manifest.metrics.rows}
    assert list(rows) == [2, 3, 6]
    assert rows[3].purity > 0.95 and rows[3].stability > 0.95 > rows[6].stability
    assert rows[2].spread > rows[3].spread > rows[6].spread
    assert digests(run_dir) == before
    assert SweepManifest.read(run_dir) == manifest
    assert rows[3].inertia == pytest.approx(ClusterManifest.read(run_dir).metrics.inertia, rel=1e-3)


def test_a_finished_sweep_measures_nothing_and_another_one_is_refused(tokens_only, monkeypatch):
    first = cluster_documents.run(SWEEP, tokens_only)
    monkeypatch.setattr(cluster_documents, "try_clusters", None)
    assert cluster_documents.run(SWEEP.model_copy(update={"clusters": 4, "overlap": 0.5}), tokens_only) == first
    with pytest.raises(StaleFailure, match='sweep was "2,3,6" and is now "2,3": give --force'):
        cluster_documents.run(SWEEP.model_copy(update={"sweep": "2,3"}), tokens_only)
    assert not (tokens_only / "clusters").exists()


def test_a_sweep_that_was_stopped_goes_on_after_the_last_number(tokens_only, monkeypatch):
    real, tried = cluster_documents.try_clusters, []

    def stops(config, count, *rest):
        if count == 6 and len(tried) == 2:
            raise KeyboardInterrupt
        tried.append(count)
        return real(config, count, *rest)

    monkeypatch.setattr(cluster_documents, "try_clusters", stops)
    with pytest.raises(KeyboardInterrupt):
        cluster_documents.run(SWEEP, tokens_only)
    assert not (tokens_only / "clusters-sweep/manifest.json").exists()
    monkeypatch.setattr(cluster_documents, "try_clusters", lambda *given: tried.append(given[1]) or real(*given))
    manifest = cluster_documents.run(SWEEP, tokens_only)
    assert tried == [2, 3, 6]
    assert [ref.path for ref in manifest.outputs] == [f"clusters-sweep/00{count}.json" for count in (2, 3, 6)]


def test_a_sweep_over_own_vectors_needs_no_token_vectors(tokens_only, tmp_path, monkeypatch):
    path, _ = own_vectors(tokens_only, tmp_path, by_kind)
    monkeypatch.setattr(cluster_documents, "fit_vectorizer", None)
    config = ClusterConfig(sweep="2,3", vectors=path, method="unbalanced")
    metrics = cluster_documents.run(config, tokens_only).metrics
    assert metrics.dimensions == 3
    assert metrics.rows[1].spread < 0.1 < metrics.rows[0].spread


def test_a_sweep_beyond_the_documents_is_refused(tokens_only):
    with pytest.raises(InputFailure, match="cannot make 500 clusters: give --sweep at most"):
        cluster_documents.run(ClusterConfig(sweep="2,500"), tokens_only)


def test_one_giant_document_among_small_ones(tmp_path):
    texts = ["whisk the flour " * 60_000, *(f"court tenant clause {number}" for number in range(30))]
    with pytest.raises(InputFailure, match=r"a few hold nearly all tokens; .* --equal documents") as refused:
        run_on(texts, tmp_path, ClusterConfig(clusters=20), valid_fraction=0.2)
    assert "\n" not in str(refused.value)
    metrics = cluster_documents.run(ClusterConfig(clusters=2, equal="documents"), tmp_path / "run").metrics
    assert len(metrics.clusters) == 2


def test_documents_without_a_token_have_a_cluster_and_are_not_central(tokens_only, monkeypatch):
    class Emptied(TokenStore):
        """As if the tokenizer had dropped every third document's text."""

        def __init__(self, batches):
            super().__init__(batches)
            self.lengths[::3] = 0

        def tokens(self, document):
            return super().tokens(document)[: 0 if document % 3 == 0 else None]

    monkeypatch.setattr(cluster_documents, "TokenStore", Emptied)
    manifest = cluster_documents.run(ClusterConfig(clusters=3, dimensions=8, overlap=1), tokens_only)
    names = store_of(tokens_only, "train").ids
    assert sum(cluster.documents for cluster in manifest.metrics.clusters) == len(names)
    assert not set(names[::3]) & {name for cluster in manifest.metrics.clusters for name in cluster.central_documents}
    assert manifest.metrics.shared_documents == len(names) - len(names[::3])


def test_only_documents_without_tokens_are_refused(tokens_only, monkeypatch):
    monkeypatch.setattr(TokenStore, "tokens", lambda store, document: np.zeros(0, np.uint16))
    with pytest.raises(InputFailure, match="0 different document vectors cannot make 3 clusters"):
        cluster_documents.run(ClusterConfig(clusters=3), tokens_only)
