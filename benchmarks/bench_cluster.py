"""`cpipe cluster` beside its peers: k-means by cost, tightness and balance; text to vectors by documents a second.

    pip install faiss-cpu k-means-constrained    # what is missing is named and left out
    OMP_NUM_THREADS=1 python benchmarks/bench_cluster.py ['corpus/*.jsonl.zst'] [--rounds 3] [--sizes 100000x16]

- every row is a process of its own; rows take turns, in the opposite order every other round; medians of the rounds.
  CPU seconds are those of the fit (or of the pass over the text), memory is the peak above what was there before it
- synthetic vectors: 300 topics on the sphere, as frequent as Zipf has it, each as wide as it happens, with heavy tails
- k-means on fewer than 16,384 vectors is slower than its peers: all starts run on all of them, for the tightest result
- inertia is over that of scikit-learn's KMeans with as many starts. The exact assignment of k-means-constrained is the
  oracle: what it costs to be even there is what the data costs
- text: one file is one domain. Text to unit vectors is timed from texts in memory, each way with its own tokenization,
  fitted before on the same documents
- purity and mutual information are those of all documents at their nearest centroid, documents counting alike
"""

import argparse
import glob
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

STARTS = 3
DIMENSIONS = 100
EXACT = (2000, 8)
BYTES_PER_DOMAIN = 5_000_000
VOCABULARY = 4096


def ours(x: np.ndarray, k: int, balanced: bool) -> np.ndarray:
    from stages.clustering.kmeans import fit_kmeans

    return fit_kmeans(x, k, balanced=balanced, restarts=STARTS, iterations=50, seed=0).labels


def kmeans(x: np.ndarray, k: int) -> np.ndarray:
    from sklearn.cluster import KMeans

    return KMeans(k, n_init=STARTS, random_state=0).fit(x).labels_


def minibatch(x: np.ndarray, k: int) -> np.ndarray:
    from sklearn.cluster import MiniBatchKMeans

    return MiniBatchKMeans(k, n_init=STARTS, random_state=0).fit(x).labels_


def faiss_kmeans(x: np.ndarray, k: int) -> np.ndarray:
    import faiss

    fit = faiss.Kmeans(x.shape[1], k, niter=20, nredo=STARTS, seed=0)  # on 256 vectors a cluster, as is its default
    fit.train(x)
    return fit.index.search(x, 1)[1][:, 0]


def constrained(x: np.ndarray, k: int) -> np.ndarray:
    from k_means_constrained import KMeansConstrained

    sizes = {"size_min": len(x) // k, "size_max": -(-len(x) // k)}
    return KMeansConstrained(k, **sizes, n_init=STARTS, random_state=0, n_jobs=1).fit(x).labels_


FITS: dict[str, tuple[str | None, str, Callable[[np.ndarray, int], np.ndarray]]] = {
    "kmeans": (None, "scikit-learn KMeans", kmeans),
    "minibatch": (None, "scikit-learn MiniBatchKMeans", minibatch),
    "faiss": ("faiss", "faiss Kmeans", faiss_kmeans),
    "constrained": ("k_means_constrained", "k-means-constrained (exact)", constrained),
    "unbalanced": (None, "cpipe, unbalanced", lambda x, k: ours(x, k, False)),
    "balanced": (None, "cpipe, balanced", lambda x, k: ours(x, k, True)),
}


def fit(name: str, path: str, clusters: str) -> dict[str, float]:
    """One row, in its own process: warm up what is imported, then fit."""
    x, k, method = np.load(path), int(clusters), FITS[name][2]
    method(x[:500].copy(), 2)
    used, memory = measured(lambda: method(x, k), keep := [])
    labels = keep[0]
    sizes = np.bincount(labels, minlength=k)
    means = np.stack([x[labels == cluster].mean(0, dtype=np.float64) for cluster in range(k)])
    inertia = sum(((x[labels == cluster] - means[cluster]) ** 2).sum() for cluster in range(k))
    balance = {"largest": sizes.max() / sizes.mean(), "smallest": sizes.min() / sizes.mean()}
    return {"cpu": used, "memory": memory, "inertia": float(inertia)} | {key: float(v) for key, v in balance.items()}


def measured(act: Callable[[], Any], keep: list[Any]) -> tuple[float, float]:
    """CPU seconds, and MB by which the peak of memory rose."""
    before, started = _resident(), time.process_time()
    keep.append(act())
    used = time.process_time() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return used, max(0.0, peak - before)


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def apply(name: str, path: str, tokenizer: str) -> dict[str, float]:
    """Text to unit vectors, in its own process: fitted first, then timed on the same texts."""
    texts = json.loads(Path(path).read_text())["texts"]
    act = _cpipe_vectors(texts, tokenizer) if name == "cpipe" else _sklearn_vectors(texts, name)
    used, memory = measured(act, keep := [])
    return {"cpu": used, "memory": memory, "documents": len(keep[0])}


def _cpipe_vectors(texts: Sequence[str], tokenizer: str) -> Callable[[], np.ndarray]:
    from stages.clustering.features import document_vectors

    encode = encoder(tokenizer)
    table = token_table(list(encode(texts)))
    return lambda: document_vectors(encode(texts), table)


def _sklearn_vectors(texts: Sequence[str], name: str) -> Callable[[], np.ndarray]:
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import Normalizer

    limit = {"max_features": 100_000} if name == "capped" else {}
    svd = TruncatedSVD(DIMENSIONS, random_state=0)
    steps = make_pipeline(TfidfVectorizer(stop_words="english", dtype=np.float32, **limit), svd, Normalizer())
    steps.fit(texts)
    return lambda: steps.transform(texts)


def encoder(tokenizer: str) -> Callable[[Sequence[str]], Any]:
    """The encoder of `cpipe tokenize`: texts to arrays of ids."""
    from stages.data.encoder import Encoder
    from stages.data.reading.readers import Document

    found = Encoder(Path(tokenizer).read_bytes(), None, "auto")

    def encode(texts: Sequence[str]) -> Any:
        documents = (Document("", "", "", text, len(text.encode()), 0) for text in texts)
        return (encoded.tokens for encoded in found.encode(documents))

    return encode


def token_table(documents: Sequence[np.ndarray]) -> np.ndarray:
    from stages.clustering.features import count_tokens, fit_token_vectors, inverse_document_frequency, weighted_rows

    counts = count_tokens(documents, VOCABULARY)
    idf = inverse_document_frequency(counts)
    return fit_token_vectors(weighted_rows(counts, idf), idf, DIMENSIONS, 0)


def vectors_of(path: str, tokenizer: str, out: str) -> dict[str, float]:
    """Both kinds of vectors of the corpus, for the other rows to read."""
    texts = json.loads(Path(path).read_text())["texts"]
    np.save(f"{out}/ids.npy", _cpipe_vectors(texts, tokenizer)())
    np.save(f"{out}/words.npy", np.asarray(_sklearn_vectors(texts, "words")(), np.float32))
    return {"documents": len(texts)}


def agreement(path: str, clusters: str, kind: str, corpus: str) -> dict[str, float]:
    """Purity and mutual information with the domains, each document at its nearest centroid."""
    from stages.clustering.distances import means, nearest
    from stages.clustering.quality import mutual_information, purity

    x, k, sources = np.load(path), int(clusters), json.loads(Path(corpus).read_text())["sources"]
    labels = nearest(x, means(x, ours(x, k, kind == "balanced"), k))
    return {"purity": purity(labels, sources), "nmi": mutual_information(labels, sources)}


CHILDREN: dict[str, Callable[..., dict[str, float]]] = {
    child.__name__: child for child in (fit, apply, vectors_of, agreement)
}


def child(*arguments: str) -> dict[str, float]:
    """What a process of its own says of one row; ends this script when it fails."""
    done = subprocess.run([sys.executable, __file__, "--row", *arguments], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(arguments)} ended with {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def alternated(rows: Sequence[tuple[str, ...]], rounds: int) -> list[dict[str, float]]:
    """Medians of what the rows say, which take turns."""
    found: dict[tuple[str, ...], list[dict[str, float]]] = {row: [] for row in rows}
    for number in range(rounds):
        for row in rows[:: -1 if number % 2 else 1]:
            found[row].append(child(*row))
    return [{key: float(np.median([each[key] for each in found[row]])) for key in found[row][0]} for row in rows]


def print_fits(title: str, path: str, clusters: int, rounds: int, exact: bool) -> None:
    names = [name for name in FITS if exact or name != "constrained"]
    missing = [FITS[name][0] for name in names if FITS[name][0] and not find_spec(str(FITS[name][0]))]
    names = [name for name in names if FITS[name][0] not in missing]
    rows = alternated([("fit", name, path, str(clusters)) for name in names], rounds)
    print(f"\n{title}, {clusters} clusters, {STARTS} starts{f'; not installed: {missing}' if missing else ''}\n")
    print("| method | CPU s | of KMeans | memory, MB | inertia of KMeans | largest / mean | smallest / mean |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for name, row in zip(names, rows, strict=True):
        print(
            f"| {FITS[name][1]} | {row['cpu']:.2f} | {row['cpu'] / rows[0]['cpu']:.2f} | {row['memory']:.0f} "
            f"| {row['inertia'] / rows[0]['inertia']:.3f} | {row['largest']:.3f} | {row['smallest']:.3f} |",
            flush=True,
        )


def print_text(corpus: str, tokenizer: str, rounds: int) -> None:
    names = {"words": "scikit-learn, defaults", "capped": "scikit-learn, 100,000 words", "cpipe": "cpipe, token ids"}
    rows = alternated([("apply", name, corpus, tokenizer) for name in names], rounds)
    rates = [row["documents"] / row["cpu"] for row in rows]
    print(f"\nText to unit vectors of {DIMENSIONS} dimensions, {rows[0]['documents']:.0f} documents\n")
    print("| way | documents per CPU s | of scikit-learn | memory, MB |\n|---|--:|--:|--:|")
    for name, row, rate in zip(names.values(), rows, rates, strict=True):
        print(f"| {name} | {rate:,.0f} | {rate / rates[0]:.1f} | {row['memory']:.0f} |", flush=True)


def print_agreement(work: Path, corpus: str) -> None:
    print("\nAgreement of the clusters with the domains\n\n| vectors | k-means | clusters | purity | NMI |")
    print("|---|---|--:|--:|--:|")
    for kind in ("ids", "words"):
        for method in ("unbalanced", "balanced"):
            for clusters in (9, 16):
                row = child("agreement", f"{work}/{kind}.npy", str(clusters), method, corpus)
                print(f"| {kind} | {method} | {clusters} | {row['purity']:.3f} | {row['nmi']:.3f} |", flush=True)


def synthetic(documents: int, topics: int = 300) -> np.ndarray:
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(topics, DIMENSIONS))
    centers /= np.linalg.norm(centers, axis=1, keepdims=True)
    widths = rng.lognormal(0, 0.4, topics) / np.sqrt(DIMENSIONS)
    frequency = 1 / np.arange(1, topics + 1)
    x = np.empty((documents, DIMENSIONS), np.float32)
    for rows in np.array_split(np.arange(documents), documents // 50_000 + 1):
        truth = rng.choice(topics, len(rows), p=frequency / frequency.sum())
        tails = np.sqrt(4 / rng.chisquare(4, len(rows)))  # Student's t with 4 degrees of freedom
        noise = rng.standard_normal((len(rows), DIMENSIONS)) * (widths[truth] * tails)[:, None]
        x[rows] = centers[truth] + noise
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def read_corpus(pattern: str) -> dict[str, list[str]]:
    import pyarrow as pa

    corpus: dict[str, list[str]] = {"texts": [], "sources": []}
    for path in sorted(glob.glob(pattern)) or sys.exit(f"no such file: {pattern}"):
        left = BYTES_PER_DOMAIN
        with io.BufferedReader(pa.input_stream(path, compression="detect"), 1 << 20) as stream:
            for line in stream:
                text = json.loads(line)["text"]
                left -= len(text.encode())
                if left < 0:
                    break
                if text.strip():
                    corpus["texts"].append(text)
                    corpus["sources"].append(Path(path).name.partition(".")[0])
    return corpus


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", nargs="?", help="JSON lines with a key `text`, a file per domain: a glob")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", default="100000x16,500000x64", help="documents x clusters")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-cluster-") as folder:
        for documents, clusters in [EXACT, *(map(int, size.split("x")) for size in options.sizes.split(",") if size)]:
            np.save(f"{folder}/x.npy", synthetic(documents))
            exact = (documents, clusters) == EXACT
            print_fits(f"{documents:,} synthetic vectors", f"{folder}/x.npy", clusters, options.rounds, exact)
        if options.corpus:
            from stages.data.tokenizer import train_tokenizer

            corpus, tokenizer = f"{folder}/corpus.json", f"{folder}/tokenizer.json"
            read = read_corpus(options.corpus)
            Path(corpus).write_text(json.dumps(read))
            train_tokenizer(read["texts"][:: max(1, len(read["texts"]) // 5000)], VOCABULARY).save(tokenizer)
            print_text(corpus, tokenizer, options.rounds)
            child("vectors_of", corpus, tokenizer, folder)
            for clusters in (9, 16):
                print_fits("Text as token ids", f"{folder}/ids.npy", clusters, options.rounds, True)
            print_agreement(Path(folder), corpus)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    if sys.argv[1:2] == ["--row"]:
        print(json.dumps(CHILDREN[sys.argv[2]](*sys.argv[3:])))
    else:
        main()
