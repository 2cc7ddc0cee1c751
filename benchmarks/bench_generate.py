"""Writing text: cpipe's packed decoder beside `transformers.generate`, the same weights, greedy, identical tokens.

    python benchmarks/bench_generate.py [--rounds 5] [--tokens 128] [--threads 1] [--device cpu]

- one folder of random weights (8.9 M parameters, 6 layers of width 256, 8,192 tokens) is read by both; that both write
  the same tokens is checked before anything is timed, for one prompt and for prompts of unequal lengths side by side
- transformers pads unequal prompts on the left; cpipe reads each alone and takes their steps together
- the rows take turns; a ratio is the median over the rounds of (row / transformers in the same round). Wall time and
  CPU time of the process are both shown: on a machine with other work only the second repeats
- the last tables are what mixing experts and the composed model cost beside one expert, for one prompt and side by
  side. That the composed model writes packed, alone and side by side, what it writes as trained is checked too
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from schemas.central import CentralConfig
from schemas.compose_model import BridgeConfig
from schemas.decoder import DecoderConfig
from stages.nn.central import CentralModel
from stages.nn.choice import ChosenExperts
from stages.nn.composed import ComposedModel
from stages.nn.composed_batch import ComposedBatch, composed_reader
from stages.nn.decoder import Decoder
from stages.nn.decoding import PackedDecoder
from stages.nn.memory import ComposedReader
from stages.nn.text_batches import TextBatch

Write = Callable[[], list[list[int]]]

SHAPE = DecoderConfig(vocab_size=8192, max_position_embeddings=512, tie_word_embeddings=False)
PROMPTS = (16, 16, 31, 5, 48, 12, 23, 9)  # lengths; the first is the one written alone


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(prefix="bench-generate-") as folder:
        _save(Path(folder))
        reference = LlamaForCausalLM.from_pretrained(folder).to(options.device).eval()
        decoder = Decoder.from_weights(SHAPE, load_file(Path(folder) / "model.safetensors")).to(options.device)
    prompts = [torch.randint(SHAPE.vocab_size, (length,)).tolist() for length in PROMPTS]
    count = options.tokens
    packed = PackedDecoder(decoder)
    print(f"torch {torch.__version__}, {options.threads} threads, {options.device}; {count} tokens after the prompt\n")
    one: dict[str, Write] = {
        "transformers generate": lambda: _transformers(reference, prompts[:1], count),
        "cpipe, the decoder as trained, cached": lambda: [_general(decoder, prompts[0], count)],
        "cpipe, packed (what `cpipe generate` runs)": lambda: [_mixed([packed], prompts[0], count)],
    }
    many: dict[str, Write] = {
        f"transformers generate, {len(prompts)} prompts": lambda: _transformers(reference, prompts, count),
        f"cpipe --prompts, {len(prompts)} prompts": lambda: _side_by_side(
            [TextBatch(packed, len(prompts))], prompts, count
        ),
    }
    experts = [packed, *(PackedDecoder(_other(seed).to(options.device)) for seed in range(1, 4))]
    composed = ChosenExperts(_composed([_other(seed) for seed in range(4)]).to(options.device), len(experts))
    reader = composed_reader(composed)
    costs: dict[str, Write] = {
        "one expert": one["cpipe, packed (what `cpipe generate` runs)"],
        "2 experts mixed": lambda: [_mixed(experts[:2], prompts[0], count)],
        "4 experts mixed": lambda: [_mixed(experts, prompts[0], count)],
        "central model with 4 experts": lambda: [_central(reader, prompts[0], count)],
        "central model with 4 experts, as trained": lambda: [_central(ComposedReader(composed), prompts[0], count)],
    }
    batches, composed_batch = [TextBatch(expert, len(prompts)) for expert in experts], reader.batch(len(prompts))
    costs_of_many: dict[str, Write] = {
        "one expert": lambda: _side_by_side(batches[:1], prompts, count),
        "4 experts mixed": lambda: _side_by_side(batches, prompts, count),
        "central model with 4 experts": lambda: _side_by_side([composed_batch], prompts, count),
    }
    alone = [_central(ComposedReader(composed), prompt, count) for prompt in prompts]
    assert alone == costs_of_many["central model with 4 experts"](), "side by side other tokens are written"
    assert alone[:1] == costs["central model with 4 experts"](), "packed, other tokens are written"
    for title, rows, same in (
        ("batch 1", one, True),
        ("batch of unequal lengths", many, True),
        ("costs, one prompt", costs, False),
        (f"costs, {len(prompts)} prompts", costs_of_many, False),
    ):
        _compare(title, rows, options.rounds, check=same)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def _save(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(SHAPE.to_huggingface(0)))
    save_file(_other(0).weights(), folder / "model.safetensors", metadata={"format": "pt"})


def _other(seed: int) -> Decoder:
    """Weights large enough that the likeliest token is no near tie."""
    torch.manual_seed(seed)
    decoder = Decoder(SHAPE).eval().requires_grad_(False)
    for parameter in decoder.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.08)
    return decoder


def _composed(experts: list[Decoder]) -> ComposedModel:
    shape = SHAPE.model_dump(include={"hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"})
    central = CentralConfig(vocab_size=SHAPE.vocab_size, **shape)
    return ComposedModel(CentralModel(central), experts, BridgeConfig()).eval().requires_grad_(False)


def _transformers(model: LlamaForCausalLM, prompts: list[list[int]], count: int) -> list[list[int]]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    asked = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.inference_mode():
        return model.generate(ids, attention_mask=mask, **asked)[:, longest:].tolist()


@torch.inference_mode()
def _general(decoder: Decoder, prompt: list[int], count: int) -> list[int]:
    cache, unread, written = decoder.new_cache(), prompt, []
    for _ in range(count):
        states = decoder.hidden_states(torch.tensor([unread], device=decoder.lm_head.weight.device), cache)
        unread = [int(decoder.lm_head(states[-1][0, -1]).argmax())]
        written += unread
    return written


def _mixed(experts: list[PackedDecoder], prompt: list[int], count: int) -> list[int]:
    caches, unread, written = [expert.new_cache() for expert in experts], prompt, []
    for _ in range(count):
        read = [expert.read(unread, cache) for expert, cache in zip(experts, caches, strict=True)]
        scores = read[0] if len(read) == 1 else torch.stack([each.log_softmax(-1) for each in read]).logsumexp(0)
        unread = [int(scores.argmax())]
        written += unread
    return written


def _central(reader: ComposedReader, prompt: list[int], count: int) -> list[int]:
    unread, written = prompt, []
    reader.begin([])
    for _ in range(count):
        unread = [int(reader.read(unread).argmax())]
        written += unread
    return written


def _side_by_side(batches: list[TextBatch | ComposedBatch], prompts: list[list[int]], count: int) -> list[list[int]]:
    """By one model, or by several mixed."""
    for batch in batches:
        for number in range(len(prompts)):
            batch.add(number)
    unread, written = dict(enumerate(prompts)), [[] for _ in prompts]
    for _ in range(count):
        read = [batch.read(unread) for batch in batches]
        for number in unread:
            scores = read[0][number]
            if len(read) > 1:
                scores = torch.stack([each[number].log_softmax(-1) for each in read]).logsumexp(0)
            unread[number] = [int(scores.argmax())]
            written[number] += unread[number]
    for batch in batches:
        for number in range(len(prompts)):
            batch.remove(number)
    return written


def _compare(title: str, rows: dict[str, Write], rounds: int, *, check: bool) -> None:
    texts = {name: write() for name, write in rows.items()}  # also what warms them up
    first = next(iter(rows))
    assert not check or all(text == texts[first] for text in texts.values()), "the rows do not write the same tokens"
    tokens = sum(map(len, texts[first]))
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in rows}
    for number in range(rounds):
        for name in list(rows)[:: 1 if number % 2 else -1]:
            wall, cpu = time.perf_counter(), time.process_time()
            rows[name]()
            spent[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    print(f"| {title} | tokens/s, best | CPU ms/token, best | x first row, wall | by CPU |\n|---|--:|--:|--:|--:|")
    for name, measured in spent.items():
        pairs = list(zip(spent[first], measured, strict=True))
        wall, cpu = (statistics.median(base[kind] / own[kind] for base, own in pairs) for kind in (0, 1))
        best, least = (min(own[kind] for own in measured) for kind in (0, 1))
        print(f"| {name} | {tokens / best:.0f} | {least / tokens * 1e3:.2f} | {wall:.2f} | {cpu:.2f} |")
    print(f"\nidentical tokens: {'yes' if check else 'not compared'}\n", flush=True)


if __name__ == "__main__":
    main()
