"""`cpipe route`: a text with every token in the colour of the expert that is asked most for it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from schemas.route_text import RouteConfig, RoutedToken

COLORS = ("red", "green", "yellow", "blue", "magenta", "cyan", "bright_red", "bright_green", "bright_yellow",
          "bright_blue", "bright_magenta", "bright_cyan")  # fmt: skip
Why = Annotated[bool, typer.Option("--why", help="A line per token with weights and scores.")]


def route_command(run_argument: Any, as_json: Any) -> Any:
    """The command, with a flag for every setting."""
    from cpipe.options import flags_of

    def act(run: Path, flags: dict[str, Any], why: bool, as_json: bool) -> None:
        from cpipe.console import session
        from cpipe.settings import resolve
        from stages.route_text import stream

        with session(run, "route", log=False):
            config = resolve(RouteConfig, {}, flags, "cpipe route")
            tokens = list(stream(config, run))
            names = _names(run)
        if as_json:
            print(json.dumps([token.model_dump() for token in tokens], ensure_ascii=False))
        else:
            _show(tokens, names, why)

    return flags_of(RouteConfig, act, {"why": Why, "as_json": as_json}, run_argument)


def _names(run: Path) -> list[str]:
    """A few terms of each expert's cluster, or the name of the domain it was added for."""
    from schemas.cluster_documents import ClusterManifest
    from schemas.train_experts import ExpertManifest, ExpertsManifest

    terms = [", ".join(cluster.top_terms[:4]) for cluster in ClusterManifest.read(run).metrics.clusters]
    added = range(len(terms), ExpertsManifest.read(run).metrics.experts)
    return [*terms, *(ExpertManifest.read(run, f"experts/{number:03d}").config.added or "" for number in added)]


def _show(tokens: Sequence[RoutedToken], names: Sequence[str], why: bool) -> None:
    from cpipe.show import OUT

    text, asked = Text(), [0] * (len(names) + 1)
    for token in tokens:
        best = _most(token)
        asked[best] += 1
        text.append(token.text, "" if not best else f"reverse {COLORS[(best - 1) % len(COLORS)]}")
    OUT.print(text, soft_wrap=True)
    for slot, count in enumerate(asked):
        if count:
            color = "" if not slot else f"reverse {COLORS[(slot - 1) % len(COLORS)]}"
            label = "the seed" if not slot else f"expert {slot - 1:03d}"
            words = "" if not slot else names[slot - 1]
            OUT.print(Text.assemble((label, color), f"  {100 * count / max(1, len(tokens)):.0f} % of tokens  {words}"))
    if why:
        _explain(tokens)


def _most(token: RoutedToken) -> int:
    """The slot of largest weight; 0 is the seed."""
    slots = (token.seed, *token.weights)
    return slots.index(max(slots))


def _explain(tokens: Sequence[RoutedToken]) -> None:
    from rich.table import Table

    from cpipe.show import OUT

    table = Table()
    for name in ("token", "seed", "experts by weight", "scores of all experts"):
        table.add_column(name)
    for token in tokens:
        order = sorted(range(len(token.weights)), key=lambda expert: -token.weights[expert])
        asked = "  ".join(f"{expert:03d} {token.weights[expert]:.2f}" for expert in order if token.weights[expert])
        scores = " ".join(f"{score:.2f}" for score in token.scores)
        table.add_row(repr(token.text)[1:-1], f"{token.seed:.2f}", asked, scores)
    OUT.print(table)
