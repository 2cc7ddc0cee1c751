"""Drawing the next token.

Shape letters: V vocabulary.
"""

import torch
from torch import Tensor


def draw(log_prob_V: Tensor, temperature: float, top_k: int | None, top_p: float, generator: torch.Generator) -> int:
    """One token id. Temperature 0 takes the likeliest; `top_k` and `top_p` (Holtzman et al. 2020) cut the tail."""
    if temperature == 0:
        return int(log_prob_V.argmax())
    prob_V, id_V = (log_prob_V.double() / temperature).softmax(-1).sort(descending=True, stable=True)
    before_V = prob_V.cumsum(-1) - prob_V
    prob_V = prob_V.masked_fill(before_V >= top_p, 0.0)  # the first token always stays
    if top_k is not None:
        prob_V[top_k:] = 0.0
    return int(id_V[torch.multinomial(prob_V, 1, generator=generator)])
