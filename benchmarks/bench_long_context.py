"""Long text: reading it and then writing a token, the central concept model against a plain decoder of equal size.

    python benchmarks/bench_long_context.py [--up-to 131072] [--rounds 1] [--threads 1] [--png long_context.png]

- the plain decoder is the one `cpipe generate` runs (packed, fused causal attention); its MLP is made as wide as it
  takes to have the central model's parameters
- reading: one pass over all tokens into empty caches, which gives the logits of the next token. Writing: the mean of
  32 further tokens, one at a time: in four of them the central model completes a group
- every measurement is a process of its own, and time is its CPU time: on a machine with other work only that repeats.
  Memory is the peak of the process (resident) above what it had with the weights in place, so caches and activations.
  The rows take turns; of a row's rounds the best counts
- N x N is attention of tokens over all tokens before them. Of the central model, token layers see a window; latents,
  by default, all groups before theirs (half as many states as tokens, squared), or with a window of groups C of them
- 8k at a time gives the same logits, and is how memory stays bounded whatever the length: `--million` reads 2**20
- small weights, as N x N takes minutes otherwise: in wide models both costs grow alike, but less of N x N is attention
"""

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from schemas.central import CentralConfig, CentralShape
from schemas.decoder import DecoderConfig
from stages.nn.central import CentralModel
from stages.nn.decoder import Decoder
from stages.nn.decoding import PackedDecoder

Read = Callable[[list[int]], torch.Tensor]

WIDTH, VOCABULARY, WRITTEN, MILLION = 128, 1024, 32, 2**20
SHAPE = CentralShape(encoder_layers=1, latent_layers=2, decoder_layers=1)
SEED = DecoderConfig(
    vocab_size=VOCABULARY,
    hidden_size=WIDTH,
    intermediate_size=344,
    num_attention_heads=4,
    num_key_value_heads=4,
    num_hidden_layers=4,
)
WINDOW = 256  # groups
DECODER, CENTRAL, WINDOWED, IN_PIECES = (
    "plain decoder",
    "central model",
    "central, latent window",
    "the same, 8k at a time",
)


def main() -> None:
    options = _options()
    if options.measure:
        print(json.dumps(_measure(*options.measure, options.threads)))
        return
    sizes = {name: sum(weight.numel() for weight in _model(name).parameters()) for name in (DECODER, CENTRAL)}
    print(f"torch {torch.__version__}, {options.threads} threads; width {WIDTH}, parameters: {sizes}")
    print(f"groups of {SHAPE.group_length} tokens to {SHAPE.latents_per_group} latents; C = {WINDOW} groups\n")
    lengths = [2**power for power in range(12, 21) if 2**power <= options.up_to]
    found = _all_measurements(lengths, options.rounds, options.threads)
    if options.million:
        found[IN_PIECES][MILLION] = _in_a_process(IN_PIECES, MILLION, options.threads)
    _print_tables(found, lengths)
    if options.png:
        _draw(found, options.png)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--up-to", type=int, default=131_072, help="tokens of the longest text")
    parser.add_argument("--million", action="store_true", help="let the central model read 2**20 tokens, 8k at a time")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--png", type=Path)
    parser.add_argument("--measure", nargs=2, metavar=("ROW", "TOKENS"), help="one measurement, in this process")
    return parser.parse_args()


def _model(name: str) -> Decoder | CentralModel:
    torch.manual_seed(0)
    shape = SHAPE if name == CENTRAL else SHAPE.model_copy(update={"latent_window": WINDOW})
    central = CentralModel(CentralConfig.beside(shape, SEED)).eval().requires_grad_(False)
    if name != DECODER:
        return central
    size = sum(weight.numel() for weight in central.parameters())
    rest = size - sum(weight.numel() for weight in Decoder(SEED).parameters())
    wider = round(rest / (3 * WIDTH * SEED.num_hidden_layers))  # three matrices in each MLP
    return Decoder(SEED.model_copy(update={"intermediate_size": SEED.intermediate_size + wider})).eval()


def _reader(name: str) -> Read:
    """Reads further tokens of a text; logits of the token after them."""
    model = _model(name)
    if isinstance(model, Decoder):
        packed = PackedDecoder(model)
        kept = packed.new_cache()
        return lambda ids: packed.read(ids, kept)
    cache, central = model.new_cache(), model
    at_once = 8192 if name == IN_PIECES else MILLION

    @torch.inference_mode()
    def read(ids: list[int]) -> torch.Tensor:
        *before, last = torch.tensor([ids]).split(at_once, 1)
        for piece in before:
            central(piece, cache, last=True)
        return central(last, cache, last=True).logits_BTV[0, -1]

    return read


def _measure(name: str, tokens: str, threads: int) -> dict[str, float]:
    torch.set_num_threads(threads)
    read, ids = _reader(name), torch.randint(VOCABULARY, (int(tokens),)).tolist()
    _reader(name)(ids[:512])  # what starts on first use
    before = _peak()
    start = time.process_time()
    read(ids)
    seconds = time.process_time() - start
    for token in range(WRITTEN):
        read([token])
    steps = time.process_time() - start - seconds
    return {"read": seconds, "write": steps / WRITTEN, "memory": (_peak() - before) / 2**20}


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _in_a_process(name: str, tokens: int, threads: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--threads", str(threads), "--measure", name, str(tokens)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout)
    print(f"{tokens:>9,} tokens, {name}: {found['read']:.2f} s, {found['memory']:.0f} MiB", file=sys.stderr, flush=True)
    return found


def _all_measurements(lengths: list[int], rounds: int, threads: int) -> dict[str, dict[int, dict[str, float]]]:
    """By row and length: the least of every quantity over the rounds."""
    found: dict[str, dict[int, dict[str, float]]] = {name: {} for name in (DECODER, CENTRAL, WINDOWED, IN_PIECES)}
    for tokens in lengths:
        for number in range(rounds):
            for name in list(found)[:: 1 if number % 2 else -1]:
                one = _in_a_process(name, tokens, threads)
                best = found[name].get(tokens, one)
                found[name][tokens] = {kind: min(value, best[kind]) for kind, value in one.items()}
    return found


def _print_tables(found: dict[str, dict[int, dict[str, float]]], lengths: list[int]) -> None:
    for kind, title, scale in (
        ("read", "reading, CPU s", 1),
        ("write", "writing a token, CPU ms", 1e3),
        ("memory", "peak memory above the weights, MiB", 1),
    ):
        shown = sorted({tokens for row in found.values() for tokens in row})
        print(f"| {title} | " + " | ".join(f"{tokens:,}" for tokens in shown) + " | slope |")
        print("|---|" + "--:|" * (len(shown) + 1))
        for name, row in found.items():
            cells = [f"{scale * row[tokens][kind]:.3g}" if tokens in row else "" for tokens in shown]
            print(f"| {name} | " + " | ".join(cells) + f" | {_slope(row, kind):.2f} |")
        for name in list(found)[1:]:
            ratios = [f"x{found[DECODER][t][kind] / found[name][t][kind]:.1f}" if t in lengths else "" for t in shown]
            print(f"| {DECODER} / {name} | " + " | ".join(ratios) + " | |")
        print()


def _slope(row: dict[int, dict[str, float]], kind: str) -> float:
    """Of log quantity over log tokens, from the second half of the lengths on: 1 is linear, 2 quadratic."""
    far = sorted(row)[-max(2, math.ceil(len(row) / 2)) :]
    if len(far) < 2:
        return math.nan
    return statistics.linear_regression([math.log(t) for t in far], [math.log(row[t][kind]) for t in far]).slope


def _draw(found: dict[str, dict[int, dict[str, float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for axis, kind, title in zip(
        axes, ("read", "memory"), ("CPU seconds to read", "MiB above the weights"), strict=True
    ):
        for name, row in found.items():
            label = f"{name} (slope {_slope(row, kind):.2f})"
            axis.plot(list(row), [row[tokens][kind] for tokens in row], marker="o", label=label)
        axis.set(xscale="log", yscale="log", xlabel="N, tokens", title=title)
        axis.legend()
    last = max(found[DECODER])
    for name, power, label in ((DECODER, 2, "N x N"), (WINDOWED, 1, "C x N")):
        reference = [found[name][last]["read"] * (tokens / last) ** power for tokens in found[DECODER]]
        axes[0].plot(list(found[DECODER]), reference, color="grey", linestyle=":")
        axes[0].annotate(label, (min(found[DECODER]), reference[0]), color="grey")
    figure.savefig(path, dpi=150, metadata={"Software": None})
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
