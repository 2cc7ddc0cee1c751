"""Collect a small corpus of clearly different kinds of text from the Python installation: `corpus/` of a run.

- needs no network and ships no data; the kinds are what `cpipe demo` finds again as clusters
- the files of a kind are taken in the order of a hash, each for at most a twentieth of the kind, so that none dominates
- a text that occurs twice counts once
- `group` is the file: pieces of one file stay in one split
- the same installation and seed give the same bytes; the versions of Python and of the packages are the input
"""

import json
import platform
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

from loguru import logger

from schemas.collect_text import CollectConfig, CollectManifest, CollectMetrics, KindCounts
from schemas.failures import InputFailure
from schemas.files import write_bytes
from schemas.manifest import InputRef, digest_of_json
from stages.artifacts.stage_folder import claim_folder, drop_leftovers
from stages.data.reading.installation import KINDS, LONGEST, cut, excerpts, packages, text_of

FILES_PER_KIND = 20  # at least, where there are as many
TOO_LITTLE = 1 / 8  # of the bytes asked for: such a kind is dropped
Records = list[dict[str, str]]


def run(config: CollectConfig, run_dir: Path, *, force: bool = False) -> CollectManifest:
    """Write `<kind>.jsonl` for each kind of text this installation holds enough of.

    Raises InputFailure when it holds fewer than two.
    """
    with claim_folder(run_dir, CollectManifest, config, [_installation()], force=force) as claim:
        if claim.finished:
            return claim.finished
        drop_leftovers(claim.path)
        collected = {kind: _collect(kind, config) for kind in KINDS}
        kept = {kind: records for kind, records in collected.items() if _size(records) >= _least(config)}
        if len(kept) < 2:
            raise InputFailure(f"this installation holds too little text for a demo ({len(kept)} kinds): use your own")
        outputs = [
            write_bytes(claim.path / f"{kind}.jsonl", _lines(records), run_dir).model_copy(
                update={"rows": len(records)}
            )
            for kind, records in kept.items()
        ]
        return claim.finish(outputs, _metrics(kept, tuple(sorted(collected.keys() - kept.keys()))))


def _installation() -> InputRef:
    versions = {package.name: package.version for package in packages()}
    return InputRef(name="installation", digest=digest_of_json({"python": platform.python_version(), **versions}))


def _collect(kind: str, config: CollectConfig) -> Records:
    """Records of `kind`, up to the bytes asked for."""
    records: Records = []
    size = 0
    for record in _records(kind, config):
        size += len(record["text"].encode())
        if size > config.bytes_per_kind:
            break
        records.append(record)
    logger.info("{}: {} documents, {:.0f} kB", kind, len(records), _size(records) / 1000)
    return records


def _records(kind: str, config: CollectConfig) -> Iterator[dict[str, str]]:
    """All there is of `kind`: file after file in the order of a hash, for at most its share each."""
    seen: set[bytes] = set()
    for file in sorted(excerpts(kind), key=lambda file: _hash(f"{config.sampling_seed}:{file.name}")):
        left = max(LONGEST, config.bytes_per_kind // FILES_PER_KIND)
        for number, piece in enumerate(cut(text_of(kind, file.path))):
            left -= len(piece.encode())
            if left < 0:
                break
            if _hash(piece) not in seen:
                seen.add(_hash(piece))
                yield {"id": f"{file.name}#{number}", "source": kind, "group": file.name, "text": piece}


def _hash(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=16).digest()


def _size(records: Records) -> int:
    return sum(len(record["text"].encode()) for record in records)


def _least(config: CollectConfig) -> float:
    return config.bytes_per_kind * TOO_LITTLE


def _lines(records: Records) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def _metrics(kept: dict[str, Records], dropped: tuple[str, ...]) -> CollectMetrics:
    kinds = {
        kind: KindCounts(
            files=len({record["group"] for record in records}), documents=len(records), bytes=_size(records)
        )
        for kind, records in kept.items()
    }
    return CollectMetrics(kinds=kinds, dropped=dropped)
