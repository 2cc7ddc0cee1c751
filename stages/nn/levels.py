"""A level of the central model: what lies below it in groups, reduced to latents that see their past and plan ahead.

Tokens lie below the first level, latents of level l below level l + 1; both are called units here.

Shape letters: B batch, N units, U units per group, M groups, K latents per group, C unit width, D latent width,
E concept width, H horizon.

    units ─ groups ─ reducer ─ local and global layers ─┬───────────────── skip ────────────────┬─ latent layers ─┐
                                                        └─ (the level above: the same once more)┴                 │
    units + latents of the group before + plan of the group before ◀──────────────────────────────────────────────┘

- a unit of group c receives from group c - 1, the last one complete before its own. So it is at every level: whatever
  comes down to a unit was made of units before its own group, and of nothing else. By induction: the latents of group
  c of level l end with the group's last unit; what they receive from level l + 1 ends before their group there does
- latents and plan of the first level are all a token ever gets; those above reach it through these
- one code path: the whole sequence is a chunk after nothing. The cache holds what is left over between chunks
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from schemas.central import CentralConfig
from stages.nn.attention import RMSNorm, StackCache
from stages.nn.concepts import ConceptHeads, PlanReader
from stages.nn.latent_stack import LatentStack, Visit, arranged
from stages.nn.latents import Reducer, Upsampler

# (site, states [B, N, D], index [N] of the last token each has seen) -> states [B, N, D]
Read = Callable[[str, Tensor, Tensor], Tensor]

LATENT_SITES = "latent_"
EXCHANGED, STATIC = " exchanged", " static"  # behind the name of a part: what stands in its place
NOTHING: frozenset[str] = frozenset()


def latent_site(layer: int) -> str:
    """Name of the place after a latent layer, not counting local ones, of the first level."""
    return f"{LATENT_SITES}{layer}"


@dataclass
class LevelOutput:
    """What a level made of the groups that became complete in one pass."""

    prediction_BMHE: Tensor  # concepts ahead
    latent_BMKD: Tensor | None  # as reduced; None where no group became complete
    expected_BMKD: Tensor | None  # of the next group's, where the latent loss is on


class LevelCache:
    """What a level, with those above it, has to keep between chunks of one batch of sequences."""

    def __init__(self, config: CentralConfig, number: int) -> None:
        shape = config.all_levels[number - 1]
        self.seen = 0  # units
        self.first = StackCache(shape.global_layers)
        self.latents = StackCache(shape.latent_layers)
        self.open_BNC: Tensor | None = None  # units of the group that is not complete
        self.latent_BMKD: Tensor | None = None  # of the last complete group
        self.plan_BMHE: Tensor | None = None
        self.above = LevelCache(config, number + 1) if number < len(config.all_levels) else None


class Level(nn.Module):
    """Groups of units, their latents and plans, and what units get of them."""

    def __init__(self, config: CentralConfig, number: int) -> None:
        """`number`: from 1 on."""
        super().__init__()
        self.add_level(config, number)

    def add_level(self, config: CentralConfig, number: int) -> None:
        """Make the level's parts. The central model is its own first level, whose parts come amid the token layers."""
        shape, below, own = config.all_levels[number - 1], config.widths(number - 1), config.widths(number)
        latents, units, horizon = shape.latents_per_group, config.units(number), shape.plan_horizon
        concept, eps = config.hidden_size, config.rms_norm_eps
        self.config, self.number, self.units = config, number, units
        self.shares_positions = shape.shared_positions
        self.reducer = Reducer(own.width, own.heads, latents, shape.reducer, eps, below.width)
        first = arranged(shape.local_layers, shape.global_layers, shape.arrangement)
        self.first_layers = LatentStack(config, own, first, shape.latent_window)
        order = arranged(shape.latent_local_layers, shape.latent_layers, shape.arrangement)
        self.latent_layers = LatentStack(config, own, order, shape.latent_window, latent_stack=True)
        self.latent_norm = RMSNorm(own.width, eps)
        self.heads = ConceptHeads(own.width, latents, horizon, concept)
        self.start_KD = nn.Parameter(torch.zeros(latents, own.width))  # what group 0 finds in place of one before it
        self.start_HD = nn.Parameter(torch.zeros(horizon, concept))
        self.upsampler = Upsampler(below.width, below.heads, latents, units, shape.upsampling, eps, own.width)
        self.plan_reader = PlanReader(below.width, below.heads, horizon, units, eps, concept)
        self.expect = nn.Linear(own.width, own.width, bias=False) if config.latent_weight else None
        self.above = Level(config, number + 1) if number < len(config.all_levels) else None

    def think(
        self, x_BNC: Tensor, cache: LevelCache, read: Read | None = None, ablate: frozenset[str] = NOTHING
    ) -> tuple[Tensor, list[LevelOutput]]:
        """Units, after those the cache has seen, with what groups before theirs give them.

        Also what this level and those above made, as far up as groups became complete. `read` is for the states of
        this level's sites. `ablate`: "latents" or "plan" leaves out what these give, "latents exchanged" gives each row
        those of another row, "latents static" all rows and groups the same, their mean; likewise of the plan, and of
        a level above the first, "latents_2" and so on.
        """
        start = cache.seen
        memory_BMKD, plan_BMHE, reduced_BMKD, above = self.groups(x_BNC, cache, read, ablate)
        cache.seen += x_BNC.shape[1]
        mark = "" if self.number == 1 else f"_{self.number}"
        if f"latents{mark}" not in ablate:
            x_BNC = x_BNC + self.upsampler(x_BNC, start, ablated(memory_BMKD, f"latents{mark}", ablate))
        if f"plan{mark}" not in ablate:
            x_BNC = x_BNC + self.plan_reader(x_BNC, start, ablated(plan_BMHE, f"plan{mark}", ablate))
        expected_BMKD = None if self.expect is None else self.expect(memory_BMKD[:, 1:])
        return x_BNC, [LevelOutput(plan_BMHE[:, 1:], reduced_BMKD, expected_BMKD), *above]

    def groups(
        self, x_BNC: Tensor, cache: LevelCache, read: Read | None = None, ablate: frozenset[str] = NOTHING
    ) -> tuple[Tensor, Tensor, Tensor | None, list[LevelOutput]]:
        """Latents and plans of the groups from the last one complete before this chunk to the last complete in it.

        Then, of those that became complete in it: their latents as reduced, and what became of them above.
        """
        length, batch = self.units, len(x_BNC)
        if cache.latent_BMKD is None or cache.plan_BMHE is None:
            cache.latent_BMKD = self.start_KD.expand(batch, 1, -1, -1)
            cache.plan_BMHE = self.start_HD.expand(batch, 1, -1, -1)
        memory_BMKD, plan_BMHE = cache.latent_BMKD, cache.plan_BMHE
        if cache.open_BNC is not None:
            x_BNC = torch.cat([cache.open_BNC, x_BNC], 1)
        groups, first = x_BNC.shape[1] // length, cache.seen // length
        cache.open_BNC = x_BNC[:, groups * length :]
        if not groups:
            return memory_BMKD, plan_BMHE, None, []
        x_BMUC = x_BNC[:, : groups * length].unflatten(1, (groups, length))
        if self.shares_positions:
            x_BMUC = x_BMUC + self.upsampler.place_GD
        group_M = torch.arange(first, first + groups, device=x_BNC.device)
        reduced_BMKD = self.reducer(x_BMUC)
        latent_BMKD, above = self._latents(reduced_BMKD, group_M, cache, read, ablate)
        memory_BMKD = torch.cat([memory_BMKD, latent_BMKD], 1)
        plan_BMHE = torch.cat([plan_BMHE, self.heads(latent_BMKD)], 1)
        cache.latent_BMKD, cache.plan_BMHE = memory_BMKD[:, -1:], plan_BMHE[:, -1:]
        return memory_BMKD, plan_BMHE, reduced_BMKD, above

    def _latents(
        self, x_BMKD: Tensor, group_M: Tensor, cache: LevelCache, read: Read | None, ablate: frozenset[str]
    ) -> tuple[Tensor, list[LevelOutput]]:
        outputs: list[LevelOutput] = []
        x_BND = self.first_layers(x_BMKD.flatten(1, 2), group_M, cache.first)
        if self.above is not None and cache.above is not None:
            x_BND, outputs = self.above.think(x_BND, cache.above, ablate=ablate)
        visit = None if read is None else self._visit(group_M, read)
        x_BND = self.latent_layers(x_BND, group_M, cache.latents, visit)
        return self.latent_norm(x_BND).view_as(x_BMKD), outputs

    def _visit(self, group_M: Tensor, read: Read) -> Visit:
        """Hand the states of a site to what reads there, with the last token they have seen."""
        latents = self.start_KD.shape[0]
        end_N = (group_M.repeat_interleave(latents) + 1) * self.config.span(self.number) - 1
        return lambda layer, x_BND: read(latent_site(layer), x_BND, end_N)


def ways_to_ablate(*parts: str) -> list[str]:
    """For each part: nothing of it, another row's, or the same for all."""
    return [f"{part}{way}" for part in parts for way in ("", EXCHANGED, STATIC)]


def ablated(state_BMXD: Tensor, part: str, ablate: frozenset[str]) -> Tensor:
    """What readers of a part get instead of it; the part itself where nothing is said of it."""
    if part + EXCHANGED in ablate:
        return state_BMXD.roll(1, 0)
    return state_BMXD.mean((0, 1), keepdim=True).expand_as(state_BMXD) if part + STATIC in ablate else state_BMXD
