"""Each way from JSON lines to token ids on disk that `bench_tokenize.py` sets beside cpipe, as a program of its own.

    python benchmarks/bench_tokenize_peers.py PIPELINE OUT TOKENIZER CORES FILE…

- the encoders alone hold all texts in memory first; they time only the encoding, and say so in `OUT/timing.json`
- the others are the tools' usual ways, as their documentation shows them, with one process per core; in those a
  library's own threads would only get into each other's way, so they get one
- nothing is imported before it is needed: starting up is part of what is measured
"""

import io
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Job(NamedTuple):
    out: Path
    tokenizer: str
    cores: int
    files: list[str]


def fastokens_alone(job: Job) -> None:
    from bench_tokenize_ids import load_fastokens

    _encoder_alone(job, load_fastokens)


def tokenizers_alone(job: Job) -> None:
    from bench_tokenize_ids import load_tokenizers

    _encoder_alone(job, load_tokenizers)


def _encoder_alone(job: Job, load: Any) -> None:
    from bench_tokenize_ids import Ids, in_batches, write_binary

    os.environ["RAYON_NUM_THREADS"] = str(job.cores)
    batches = list(in_batches(json.loads(line)["text"] for line in _lines(job.files)))
    encode = load(job.tokenizer)
    started, started_cpu = time.perf_counter(), time.process_time()
    parts = [encode(batch) for batch in batches]
    timing = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - started_cpu}
    (job.out / "timing.json").write_text(json.dumps(timing))
    write_binary(job.out, Ids.join(parts))


def datasets_map(job: Job) -> None:
    """Hugging Face datasets. `input_ids` is the name for which it keeps int32 where others would become int64."""
    os.environ["RAYON_NUM_THREADS"] = "1"
    import datasets
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(job.tokenizer)
    tokenizer.encode_special_tokens = True

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        encodings = tokenizer.encode_batch_fast(batch["text"], add_special_tokens=False)
        return {"input_ids": [encoding.ids for encoding in encodings]}

    cores = job.cores if job.cores > 1 else None  # None: no pool
    reading = min(job.cores, len(job.files)) if len(job.files) > 1 else None
    cache = str(job.out / "cache")
    data = datasets.load_dataset("json", data_files=job.files, split="train", num_proc=reading, cache_dir=cache)
    data = data.map(encode, batched=True, num_proc=cores, remove_columns=data.column_names)
    data.save_to_disk(str(job.out / "dataset"), num_proc=cores)


def datatrove_tokenizer(job: Job) -> None:
    """Hugging Face datatrove; a task takes whole files, so one file keeps one core busy."""
    os.environ["RAYON_NUM_THREADS"] = "1"
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    folder = Path(job.files[0]).parent
    pipeline = [
        JsonlReader(str(folder), glob_pattern=f"*{''.join(Path(job.files[0]).suffixes)}"),
        DocumentTokenizer(str(job.out / "tokens"), tokenizer_name_or_path=job.tokenizer, shuffle_documents=False),
    ]
    logs = str(job.out / "logs")
    LocalPipelineExecutor(pipeline=pipeline, tasks=job.cores, workers=job.cores, logging_dir=logs).run()


def megatron_loop(job: Job) -> None:
    """As Megatron-LM's tools/preprocess_data.py: a pool encodes line by line, the parent writes .bin and .idx."""
    os.environ["RAYON_NUM_THREADS"] = "1"
    from tokenizers import Tokenizer

    dtype = np.uint16 if Tokenizer.from_file(job.tokenizer).get_vocab_size() <= 1 << 16 else np.int32
    lengths = []
    pool = multiprocessing.Pool(job.cores, _load_worker, (job.tokenizer,))
    with pool, (job.out / "tokens.bin").open("wb") as tokens:
        for ids in pool.imap(_encode_line, _lines(job.files), chunksize=32):
            tokens.write(np.array(ids, dtype=dtype).tobytes())
            lengths.append(len(ids))
    np.array(lengths, dtype=np.int64).tofile(job.out / "tokens.idx")


def _load_worker(tokenizer: str) -> None:
    global _tokenizer
    from tokenizers import Tokenizer

    _tokenizer = Tokenizer.from_file(tokenizer)
    _tokenizer.encode_special_tokens = True


def _encode_line(line: bytes) -> list[int]:
    return _tokenizer.encode(json.loads(line)["text"], add_special_tokens=False).ids


def _lines(files: list[str]) -> Iterator[bytes]:
    for file in files:
        with _opened(file) as stream:
            yield from stream


def _opened(file: str) -> io.BufferedReader:
    if not file.endswith(".zst"):
        return open(file, "rb")
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(file, compression="zstd"), 1 << 20)


PIPELINES = {
    function.__name__: function
    for function in (fastokens_alone, tokenizers_alone, datasets_map, datatrove_tokenizer, megatron_loop)
}


def main() -> None:
    name, out, tokenizer, cores, *files = sys.argv[1:]
    PIPELINES[name](Job(Path(out), tokenizer, int(cores), files))


if __name__ == "__main__":
    main()
