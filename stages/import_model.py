"""Import: a Hugging Face model folder in, the seed of the run out.

- to the stages after it the seed is one like any other; only what its training cost is not known
- the run's tokens must be the model's: made with the tokenizer that lies beside it, though unused tokens may have been
  renamed to concept tokens
- weights are kept in fp32, which holds bf16 and fp16 exactly
- a chat template and the tokens that end an answer are kept as text, for whoever uses an export; nothing here runs them
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from tokenizers import Tokenizer

from schemas.decoder import DecoderConfig
from schemas.failures import InputFailure, UsageFailure
from schemas.files import write_bytes
from schemas.import_model import ImportConfig, ImportManifest, ImportMetrics
from schemas.manifest import FILE_NAME, InputRef
from schemas.tokenize_text import TokenizeManifest
from stages.artifacts.huggingface_folder import PRECISIONS, HuggingFaceFolder, StoredTensor, local_folder
from stages.artifacts.model_folder import write_model
from stages.artifacts.stage_folder import claim_folder
from stages.data.token_store import TokenStore
from stages.data.tokenizer import load_tokenizer
from stages.data.tokenizer_match import difference_between
from stages.nn.decoder import Decoder

SAMPLED_DOCUMENTS = 64
SAMPLED_TOKENS = 2000  # of each


def run(config: ImportConfig, run_dir: Path, *, force: bool = False) -> ImportManifest:
    """Take the model that `config.source` names as `seed/`, for the tokens the run has."""
    folder = HuggingFaceFolder(local_folder(config.source))
    tokens = _tokens(run_dir, folder)
    shape, stored = folder.config(), folder.tensors()
    shapes = _shapes(shape, stored)
    folder.check(stored, shapes)  # before anything is hashed, which takes long
    companions = folder.companions(tokens.metrics.end_of_text, shape.vocab_size)
    inputs = [tokens.as_input(), *folder.as_inputs(), *_as_inputs(companions)]
    with claim_folder(run_dir, ImportManifest, config, inputs, force=force) as claim:
        if claim.finished:
            return claim.finished
        ids = _refuse_another_tokenizer(folder, shape, tokens, run_dir)
        weights = folder.weights(stored, shapes)
        tokenizer = tokens.output("tokenizer.json").check(run_dir).read_bytes()
        end = tokens.metrics.end_of_text
        outputs = write_model(claim.path, run_dir, shape, weights, end, tokenizer) if claim.leader else []
        if claim.leader:
            outputs += [write_bytes(claim.path / name, content, run_dir) for name, content in companions.items()]
        return claim.finish(
            outputs,
            ImportMetrics(
                parameters=sum(weight.numel() for weight in weights.values()),
                architecture=shape.model_type,
                precision=", ".join(sorted({PRECISIONS[tensor.precision] for tensor in stored.values()})),
                context=shape.max_position_embeddings,
                unnamed_ids=shape.vocab_size - ids,
            ),
        )


def _tokens(run_dir: Path, folder: HuggingFaceFolder) -> TokenizeManifest:
    if not (run_dir / TokenizeManifest.folder / FILE_NAME).is_file():
        raise UsageFailure(f"no tokens in {run_dir}: run `{_tokenize(run_dir, folder)}` first")
    return TokenizeManifest.read(run_dir)


def _as_inputs(companions: Mapping[str, bytes]) -> list[InputRef]:
    """By what is taken over: the same template may stand in one file or in another."""
    return [
        InputRef(name=name, digest=f"sha256:{hashlib.sha256(content).hexdigest()}")
        for name, content in companions.items()
    ]


def _tokenize(run_dir: Path, folder: HuggingFaceFolder, more: str = "") -> str:
    return f"cpipe tokenize {run_dir} FILES --tokenizer {folder.folder}{more}"


def _shapes(shape: DecoderConfig, stored: dict[str, StoredTensor]) -> dict[str, torch.Size]:
    """The weights such a decoder has. Raises InputFailure when it is beyond all measure: none is built then."""
    if shape.num_hidden_layers > len(stored):
        raise InputFailure(f"config.json has num_hidden_layers {shape.num_hidden_layers}, for {len(stored)} tensors")
    try:
        with torch.device("meta"):
            return {name: weight.shape for name, weight in Decoder(shape).weights().items()}
    except (RuntimeError, OverflowError, TypeError) as error:  # sizes beyond 64 bits, of one side or of a matrix
        raise InputFailure("config.json describes matrices too large for any machine") from error


def _refuse_another_tokenizer(
    folder: HuggingFaceFolder, shape: DecoderConfig, tokens: TokenizeManifest, run_dir: Path
) -> int:
    """The number of ids the tokenizer has. Raises InputFailure where the run's tokens are not what the model reads."""
    path = tokens.output("tokenizer.json").check(run_dir)
    own = load_tokenizer(path.read_bytes(), str(path))
    other = load_tokenizer(folder.tokenizer_path.read_bytes(), str(folder.tokenizer_path))
    store = TokenStore.open([ref.check(run_dir) for ref in tokens.shards("valid")])
    difference = difference_between(own, other, tokens.metrics.concept_tokens, _texts(own, store))
    if difference is not None:
        raise InputFailure(
            f"the tokens of {run_dir} are not those of {folder.tokenizer_path}: {difference}; "
            f"run `{_tokenize(run_dir, folder, ' --force')}` first, or import into another run"
        )
    ids = max(other.get_vocab().values()) + 1
    if ids > shape.vocab_size:
        raise InputFailure(
            f"{folder.tokenizer_path} has ids up to {ids - 1}, and vocab_size in config.json is {shape.vocab_size}: "
            "the model has no embedding for the last ones"
        )
    return ids


def _texts(tokenizer: Tokenizer, store: TokenStore) -> list[str]:
    """Held-out documents, or how they begin."""
    ids = (store.tokens(document)[:SAMPLED_TOKENS].tolist() for document in range(min(SAMPLED_DOCUMENTS, len(store))))
    return [tokenizer.decode(each, skip_special_tokens=False) for each in ids]
