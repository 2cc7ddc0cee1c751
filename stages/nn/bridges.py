"""Bridges: how states of the central model read the hidden states of experts.

Shape letters: B batch, N states that read, T new tokens, S tokens so far, D central width, E expert width, X experts,
F priors per expert, H heads, C head width.

- a bridge is an ordinary module: everything it reads is an argument, and only a cache given to it outlives a call
- whoever has seen tokens up to and including `end` may read experts' states up to `end`
- bridges start open: experts share a seed with each other and with the central model, so their states are worth
  something untransformed, and a gate that starts near zero stays there
- priors are what is known about the experts at a token without looking at the reader: the gates' log-weights, evidence
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STEEPEST = 4.0  # slope of the recency bias of the first head: the token before weighs e^-4
SHARE_INSIDE = 0.3  # what experts have at first between layers
SHARE_BEFORE_HEAD = 0.5  # and before the output layer


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


class StitchBridge(nn.Module):
    """Mix each state with the experts' at its last token: `g_0 x + Σ g_e W_e h_e` (BTS, arXiv 2502.00075), Σ g = 1.

    `before_head`: the state is normed and goes straight into the output layer, as the experts' last states do into
    theirs; all are taken at the scale they have, so with g_e = 1 the logits are those of expert e.
    """

    def __init__(self, width: int, expert_widths: list[int], priors: int, *, before_head: bool = False) -> None:
        super().__init__()
        self.before_head = before_head
        self.project = nn.ModuleList(identity_linear(inner, width) for inner in expert_widths)
        self.prior = Prior(len(expert_widths), priors)
        self.choose = nn.Linear(width, len(expert_widths), bias=False)
        self.open = nn.Linear(width, 1)
        share = torch.tensor(SHARE_BEFORE_HEAD if before_head else SHARE_INSIDE)
        nn.init.zeros_(self.choose.weight)
        nn.init.zeros_(self.open.weight)
        nn.init.constant_(self.open.bias, torch.logit(share).item())

    def shares(self, x_BND: Tensor, prior_BNXF: Tensor) -> Tensor:
        """[B, N, 1 + X], summing to one: the central model's own share, then the experts'."""
        unit_BND = unit_scale(x_BND)
        open_BN1 = self.open(unit_BND).float().sigmoid()
        expert_BNX = (self.choose(unit_BND).float() + self.prior(prior_BNXF)).softmax(-1)
        return torch.cat([1 - open_BN1, open_BN1 * expert_BNX], -1)

    def forward(self, x_BND: Tensor, state_XBNE: list[Tensor], prior_BNXF: Tensor) -> Tensor:
        """The mixed states [B, N, D]; `state_XBNE` are the experts' at the last token of each state."""
        share_BNX = self.shares(x_BND, prior_BNXF)
        mixed_BND = share_BNX[..., :1] * x_BND
        for index, (project, state_BNE) in enumerate(zip(self.project, state_XBNE, strict=True), start=1):
            if not self.before_head:
                state_BNE = unit_scale(state_BNE) * scale_of(x_BND)
            mixed_BND = mixed_BND + share_BNX[..., index : index + 1] * project(state_BNE)
        return mixed_BND


class CalmCache:
    """Keys and values [B, H, S, X, C] of the experts' states so far, at one site."""

    def __init__(self) -> None:
        self.k_BHSXC: Tensor | None = None
        self.v_BHSXC: Tensor | None = None

    def append(self, k_BHTXC: Tensor, v_BHTXC: Tensor) -> None:
        """Add those of new tokens."""
        self.k_BHSXC = k_BHTXC if self.k_BHSXC is None else torch.cat([self.k_BHSXC, k_BHTXC], 2)
        self.v_BHSXC = v_BHTXC if self.v_BHSXC is None else torch.cat([self.v_BHSXC, v_BHTXC], 2)


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

    def remember(self, state_XBTE: list[Tensor], cache: CalmCache) -> None:
        """Put the experts' states of new tokens into the cache, whether or not anyone reads at these tokens."""
        state_BTXD = torch.stack(
            [project(unit_scale(state)) for project, state in zip(self.project, state_XBTE, strict=True)], 2
        )
        k_BHTXC, v_BHTXC = (
            projection(state_BTXD).unflatten(-1, (self.heads, -1)).permute(0, 3, 1, 2, 4)
            for projection in (self.k_proj, self.v_proj)
        )
        cache.append(k_BHTXC, v_BHTXC)

    def forward(self, x_BND: Tensor, end_N: Tensor, prior_BNXF: Tensor, cache: CalmCache) -> Tensor:
        """The states [B, N, D] with what they read from the cache added."""
        assert cache.k_BHSXC is not None and cache.v_BHSXC is not None, "nothing remembered yet"
        k_BHSXC, v_BHSXC = cache.k_BHSXC, cache.v_BHSXC
        tokens, experts = k_BHSXC.shape[2:4]
        q_BHNC = self._heads(self.q_proj(unit_scale(x_BND)))
        prior_BHNX = self.prior(prior_BNXF).log_softmax(-1)[:, None].expand(-1, self.heads, -1, -1)
        # A prior is a term of the score like any other: a coordinate of the query that only its expert's keys have.
        name_SX = torch.eye(experts, device=x_BND.device).repeat(tokens, 1)
        k_BHKC = _with_null(k_BHSXC.flatten(2, 3), self.null_HC[:, None])
        k_BHKC = torch.cat([k_BHKC, F.pad(name_SX, (0, 0, 1, 0)).expand(*k_BHKC.shape[:2], -1, -1)], -1)
        v_BHKC = _with_null(v_BHSXC.flatten(2, 3), torch.zeros_like(self.null_HC)[:, None])
        out_BHNC = F.scaled_dot_product_attention(
            torch.cat([q_BHNC * q_BHNC.shape[-1] ** -0.5, prior_BHNX], -1),
            k_BHKC,
            v_BHKC,
            attn_mask=self._recency(end_N, tokens, experts),
            scale=1.0,
        )
        read_BND = self.o_proj(out_BHNC.transpose(1, 2).flatten(2))
        return x_BND + self.open * scale_of(x_BND) * read_BND

    def _heads(self, x_BND: Tensor) -> Tensor:
        return x_BND.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _recency(self, end_N: Tensor, tokens: int, experts: int) -> Tensor:
        """Bias [H, N, 1 + S X] by distance, minus infinity after the reader's end. The null key comes first."""
        key_end_S = torch.arange(tokens, device=end_N.device)
        distance_NS = (end_N[:, None] - key_end_S).float()
        bias_HNS = -self.slope_H[:, None, None] * distance_NS
        bias_HNS = bias_HNS.masked_fill(distance_NS < 0, float("-inf"))
        return F.pad(bias_HNS.repeat_interleave(experts, -1), (1, 0))


def _with_null(x_BHKC: Tensor, null_H1C: Tensor) -> Tensor:
    return torch.cat([null_H1C.expand(len(x_BHKC), -1, -1, -1).to(x_BHKC.dtype), x_BHKC], 2)
