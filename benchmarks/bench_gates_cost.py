"""What a token costs behind gates inside a decoder, for more and more experts at the same number asked.

    python benchmarks/bench_gates_cost.py

LoRA experts of rank 16 with random weights, independent gates at every linear layer or at every layer, top-2.
Operations and CPU time per token are told against the plain decoder, whose passes alternate with the others in one run:
of a text of 512 tokens, and of one token after it.
"""

import time
from functools import partial

import torch
from torch.utils.flop_counter import FlopCounterMode

from schemas.decoder import DecoderConfig
from schemas.train_experts import LoraConfig
from schemas.train_gates import Place, Selection
from stages.nn.decoder import Decoder
from stages.nn.gates import Gates
from stages.nn.lora import adapters, add_adapters
from stages.nn.routed import RoutedDecoder

SHAPE = DecoderConfig(vocab_size=4096, hidden_size=256, intermediate_size=688, num_hidden_layers=4,
                      num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=1024)  # fmt: skip
TOKENS, ROUNDS = 512, 7


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    plain = Decoder(SHAPE).eval().requires_grad_(False)
    print("| gates | experts | FLOPs/token | time of 512 tokens | time of one token |\n|---|--:|--:|--:|--:|")
    for place in ("layer", "module"):
        for count in (2, 8, 64):
            decoder = routed(plain, count, place)
            flops = operations(decoder) / operations(plain)
            times = [(seconds(decoder), seconds(plain)) for _ in range(ROUNDS)]
            ratios = [min(own[part] for own, _ in times) / min(base[part] for _, base in times) for part in (0, 1)]
            print(f"| at each {place} | {count} | {flops:.2f} | {ratios[0]:.2f} | {ratios[1]:.2f} |", flush=True)


def routed(plain: Decoder, count: int, place: Place) -> RoutedDecoder:
    found = [adapters(add_adapters(Decoder(SHAPE), LoraConfig(rank=16), seed=number)) for number in range(count)]
    loud = [{name: (a, torch.randn_like(b) * 0.02) for name, (a, b) in each.items()} for each in found]
    parts = {"shared": (SHAPE, plain.weights()), "seed": plain.weights(), "adapters": loud, "experts": []}
    build = partial(RoutedDecoder.from_parts, **parts, place=place, mode="independent", memory=0.99, end_of_text=0)
    closed = build().gate_tensors()
    drawn = {name: torch.randn_like(vectors) for name, vectors in closed.items()}
    return build(tensors=drawn, weigh=partial(Gates.log_weights, selection=Selection(top_k=2)))


def operations(decoder: Decoder) -> float:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        decoder(torch.arange(1, TOKENS + 1)[None])
    return float(counter.get_total_flops())


@torch.no_grad()
def seconds(decoder: Decoder) -> tuple[float, float]:
    """CPU time of a text, and of one token after it."""
    cache = decoder.new_cache()
    start = time.process_time()
    decoder(torch.arange(1, TOKENS + 1)[None], cache)
    middle = time.process_time()
    decoder(torch.tensor([[1]]), cache)
    return middle - start, time.process_time() - middle


if __name__ == "__main__":
    main()
