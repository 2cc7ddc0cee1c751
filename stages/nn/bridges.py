"""Bridges: how states of the central model read the hidden states of experts.

Shape letters: B batch, N states that read, T new tokens, D central width, E expert width, X experts, F priors per
expert, H heads, C head width, K keys: the null key and one per token and expert so far, W = C + X.

- a bridge is an ordinary module: everything it reads is an argument, and only a cache given to it outlives a call
- whoever has seen tokens up to and including `end` may read experts' states up to `end`
- bridges start open: experts share a seed with each other and with the central model, so their states are worth
  something untransformed, and a gate that starts near zero stays there
- an expert may rest: its state is None then, and no reader of the tokens it rests at gives it weight
- priors are what is known about the experts at a token without looking at the reader: the gates' log-weights, evidence
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

States = Sequence[Tensor | None]  # of each expert; None where it rests

STEEPEST = 4.0  # slope of the recency bias of the first head: the token before weighs e^-4
SHARE_INSIDE = 0.3  # what experts have at first between layers
SHARE_AT_HEAD = 0.5  # and in the end
NULL = -1  # in the place of the last token the null key has seen
READERS = 256  # that attend at a time
RESTING = -1e4  # log-probability of an expert at rest: no weight in any precision, yet a number, and 0 times it is 0


def unit_scale(x_BTD: Tensor) -> Tensor:
    """States divided by their root mean square."""
    return F.rms_norm(x_BTD.float(), (x_BTD.shape[-1],), eps=1e-6)


def scale_of(x_BTD: Tensor) -> Tensor:
    """Root mean square [B, T, 1] of states."""
    return x_BTD.float().square().mean(-1, keepdim=True).sqrt()


def identity_linear(inner: int, outer: int) -> nn.Linear:
    """A linear map that changes nothing at first; between unequal widths it keeps lengths as far as possible."""
    linear = nn.Linear(inner, outer, bias=False)
    if inner == outer:
        nn.init.eye_(linear.weight)
    else:
        nn.init.orthogonal_(linear.weight)
    return linear


def at_rest(state_XBTE: States) -> list[int]:
    """The experts that have no states."""
    return [index for index, state_BTE in enumerate(state_XBTE) if state_BTE is None]


def without(score_BNX: Tensor, resting: Sequence[int]) -> Tensor:
    """Scores, or log-probabilities, that give some experts no weight."""
    if not resting:
        return score_BNX
    rests_X = torch.zeros(score_BNX.shape[-1], dtype=torch.bool, device=score_BNX.device)
    rests_X[list(resting)] = True
    return score_BNX.masked_fill(rests_X, RESTING)


class Prior(nn.Module):
    """Log-probabilities of the experts from priors: a learned weight for each kind and a learned bias per expert."""

    def __init__(self, experts: int, kinds: int) -> None:
        super().__init__()
        self.weight_F = nn.Parameter(torch.full((kinds,), 1 / kinds)) if kinds else None
        self.bias_X = nn.Parameter(torch.zeros(experts))

    def forward(self, prior_BNXF: Tensor) -> Tensor:
        """[B, N, X]."""
        if self.weight_F is None:
            return self.bias_X.expand(prior_BNXF.shape[:-1])
        return (prior_BNXF.float() * self.weight_F).sum(-1) + self.bias_X


class Shares(nn.Module):
    """How much of what is read comes from whom, the reader's own part among it: by its state, and by the priors."""

    def __init__(self, width: int, experts: int, priors: int, opened: float) -> None:
        """`opened`: what experts have at first, all together."""
        super().__init__()
        self.prior = Prior(experts, priors)
        self.choose = nn.Linear(width, experts, bias=False)
        self.open = nn.Linear(width, 1)
        nn.init.zeros_(self.choose.weight)
        nn.init.zeros_(self.open.weight)
        nn.init.constant_(self.open.bias, torch.logit(torch.tensor(opened)).item())

    def scores(self, x_BND: Tensor, prior_BNXF: Tensor, resting: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """Log-odds [B, N, 1] of the experts together, and scores [B, N, X] among them."""
        unit_BND = unit_scale(x_BND)
        score_BNX = self.choose(unit_BND).float() + self.prior(prior_BNXF)
        return self.open(unit_BND).float(), without(score_BNX, resting)

    def shares(self, x_BND: Tensor, prior_BNXF: Tensor, resting: Sequence[int] = ()) -> Tensor:
        """[B, N, 1 + X], summing to one: the reader's own share, then the experts'."""
        open_BN1, score_BNX = self.scores(x_BND, prior_BNXF, resting)
        open_BN1 = open_BN1.sigmoid()
        return torch.cat([1 - open_BN1, open_BN1 * score_BNX.softmax(-1)], -1)

    def log_shares(self, x_BND: Tensor, prior_BNXF: Tensor, resting: Sequence[int] = ()) -> Tensor:
        """Their logarithms, which have a gradient where a share vanishes."""
        open_BN1, score_BNX = self.scores(x_BND, prior_BNXF, resting)
        return torch.cat([F.logsigmoid(-open_BN1), F.logsigmoid(open_BN1) + score_BNX.log_softmax(-1)], -1)


class StitchBridge(Shares):
    """Mix each state with the experts' at its last token: `g_0 x + Σ g_e W_e h_e` (BTS, arXiv 2502.00075), Σ g = 1.

    `before_head`: the state is normed and goes straight into the output layer, as the experts' last states do into
    theirs; all are taken at the scale they have, so with g_e = 1 the logits are those of expert e.
    """

    def __init__(self, width: int, expert_widths: list[int], priors: int, *, before_head: bool = False) -> None:
        super().__init__(width, len(expert_widths), priors, SHARE_AT_HEAD if before_head else SHARE_INSIDE)
        self.before_head = before_head
        self.project = nn.ModuleList(identity_linear(inner, width) for inner in expert_widths)

    def forward(self, x_BND: Tensor, state_XBNE: States, prior_BNXF: Tensor) -> Tensor:
        """The mixed states [B, N, D]; `state_XBNE` are the experts' at the last token of each state."""
        share_BNX = self.shares(x_BND, prior_BNXF, at_rest(state_XBNE))
        mixed_BND = share_BNX[..., :1] * x_BND
        for index, (project, state_BNE) in enumerate(zip(self.project, state_XBNE, strict=True), start=1):
            if state_BNE is None:
                continue
            if not self.before_head:
                state_BNE = unit_scale(state_BNE) * scale_of(x_BND)
            mixed_BND = mixed_BND + share_BNX[..., index : index + 1] * project(state_BNE)
        return mixed_BND


class CalmCache:
    """Keys and values [B, H, K, W] of the experts' states so far, at one site, and the token each key has seen last.

    Their order does not matter: an expert that comes back adds what it has missed after what others have said since.
    """

    def __init__(self) -> None:
        self.k_BHKW: Tensor | None = None
        self.v_BHKW: Tensor | None = None
        self.end_K: Tensor | None = None

    def append(self, k_BHKW: Tensor, v_BHKW: Tensor, end_K: Tensor) -> None:
        """Add those of new tokens."""
        if self.k_BHKW is not None and self.v_BHKW is not None and self.end_K is not None:
            k_BHKW, v_BHKW = torch.cat([self.k_BHKW, k_BHKW], 2), torch.cat([self.v_BHKW, v_BHKW], 2)
            end_K = torch.cat([self.end_K, end_K])
        self.k_BHKW, self.v_BHKW, self.end_K = k_BHKW, v_BHKW, end_K


class CalmBridge(nn.Module):
    """Cross-attention of central states to the states of all experts, added to the residual (CALM, arXiv 2401.02412).

    Beyond the paper: a causal mask, one softmax over all experts' keys and a learned null key whose value is zero, the
    experts' priors and a recency bias per head (fixed slopes as in ALiBi; the last head has none) in that softmax, and
    a value path that starts as the identity.
    """

    slope_H: Tensor

    def __init__(self, width: int, heads: int, expert_widths: list[int], priors: int) -> None:
        super().__init__()
        self.heads = heads
        self.project = nn.ModuleList(identity_linear(inner, width) for inner in expert_widths)
        self.prior = Prior(len(expert_widths), priors)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = identity_linear(width, width)
        self.o_proj = identity_linear(width, width)
        for linear in (self.q_proj, self.k_proj):
            nn.init.normal_(linear.weight, std=0.02)
        self.null_HC = nn.Parameter(torch.zeros(heads, width // heads))
        self.open = nn.Parameter(torch.full((1,), SHARE_INSIDE))  # a vector: DeepSpeed cannot send a scalar
        slopes = [STEEPEST * 4.0**-head for head in range(heads - 1)] + [0.0]
        self.register_buffer("slope_H", torch.tensor(slopes), persistent=False)

    def remember(self, state_XBTE: States, start: int, cache: CalmCache) -> None:
        """Put the experts' states of tokens from `start` on into the cache, whether or not anyone reads at them."""
        given = zip(self.project, state_XBTE, strict=True)
        state_BTXD = torch.stack([project(unit_scale(state)) for project, state in given if state is not None], 2)
        tokens, active = state_BTXD.shape[1], [index for index, state in enumerate(state_XBTE) if state is not None]
        k_BHKC, v_BHKC = (
            self._heads(projection(state_BTXD.flatten(1, 2))) for projection in (self.k_proj, self.v_proj)
        )
        # A prior is a term of the score like any other: a coordinate of the query that only its expert's keys have.
        name_KX = torch.eye(len(self.project), device=k_BHKC.device, dtype=k_BHKC.dtype)[active].repeat(tokens, 1)
        end_K = torch.arange(start, start + tokens, device=k_BHKC.device).repeat_interleave(len(active))
        if cache.end_K is None:
            null_BH1C = self.null_HC[:, None].expand(len(k_BHKC), -1, -1, -1).to(k_BHKC.dtype)
            k_BHKC, v_BHKC = torch.cat([null_BH1C, k_BHKC], 2), F.pad(v_BHKC, (0, 0, 1, 0))
            name_KX, end_K = F.pad(name_KX, (0, 0, 1, 0)), F.pad(end_K, (1, 0), value=NULL)
        k_BHKW = torch.cat([k_BHKC, name_KX.expand(*k_BHKC.shape[:2], -1, -1)], -1)
        # Values are as wide as keys, or there would be no fused kernel.
        cache.append(k_BHKW, F.pad(v_BHKC, (0, len(self.project))), end_K)

    def forward(
        self, x_BND: Tensor, end_N: Tensor, prior_BNXF: Tensor, cache: CalmCache, resting: Sequence[int] = ()
    ) -> Tensor:
        """The states [B, N, D] with what they read from the cache added; `resting` experts are not read."""
        assert cache.k_BHKW is not None and cache.v_BHKW is not None and cache.end_K is not None, "nothing remembered"
        q_BHNC = self._heads(self.q_proj(unit_scale(x_BND)))
        prior_BNX = without(without(self.prior(prior_BNXF), resting).log_softmax(-1), resting)
        prior_BHNX = prior_BNX[:, None].expand(-1, self.heads, -1, -1)
        q_BHNW = torch.cat([q_BHNC * q_BHNC.shape[-1] ** -0.5, prior_BHNX], -1)
        parts = [  # or there would be a bias for all readers and all keys
            F.scaled_dot_product_attention(
                q, cache.k_BHKW, cache.v_BHKW, attn_mask=self._recency(end, cache.end_K)[None], scale=1.0
            )
            for q, end in zip(q_BHNW.split(READERS, 2), end_N.split(READERS), strict=True)
        ]
        read_BND = self.o_proj(torch.cat(parts, 2)[..., : q_BHNC.shape[-1]].transpose(1, 2).flatten(2))
        return x_BND + self.open * scale_of(x_BND) * read_BND

    def _heads(self, x_BND: Tensor) -> Tensor:
        return x_BND.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _recency(self, end_N: Tensor, end_K: Tensor) -> Tensor:
        """Bias [H, N, K] by distance, minus infinity after the reader's end; the null key is at no distance."""
        distance_NK = (end_N[:, None] - end_K).float().masked_fill(end_K == NULL, 0.0)
        return (-self.slope_H[:, None, None] * distance_NK).masked_fill(distance_NK < 0, float("-inf"))
