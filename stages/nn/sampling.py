"""Drawing the next token.

Shape letters: V vocabulary.
"""

import torch
from torch import Tensor

from stages.nn.decoder import Decoder
from stages.nn.decoding import begin_text

SAMPLE_TOKENS = 40  # of a sample while training


def draw(log_prob_V: Tensor, temperature: float, top_k: int | None, top_p: float, generator: torch.Generator) -> int:
    """One token id. Temperature 0 takes the likeliest; `top_k` and `top_p` (Holtzman et al. 2020) cut the tail."""
    if temperature == 0:
        return int(log_prob_V.argmax())
    prob_V = (log_prob_V.double() / temperature).softmax(-1)
    sorted_V, id_V = prob_V.sort(descending=True, stable=True)
    cut_V = sorted_V.cumsum(-1) - sorted_V >= top_p  # the first token always stays
    if top_k is not None:
        cut_V[top_k:] = True
    # Drawn in the order of ids: in that of probabilities, a last bit could give two tokens each other's chance.
    return int(torch.multinomial(prob_V.index_fill(0, id_V[cut_V], 0.0), 1, generator=generator))


def likeliest(decoder: Decoder, end: int, ids: list[int]) -> list[int]:
    """A few tokens after `ids`, the likeliest each time, until `end` or until the decoder has no more positions.

    Of a prompt that leaves too few, the end is read. Nothing is drawn at random, and the decoder is left as it is: it
    may be in training.
    """
    limit = decoder.config.max_position_embeddings
    ids = ids[-max(1, limit // 2, limit - SAMPLE_TOKENS) :]
    read, unread, found = begin_text(decoder), ids, list[int]()
    while len(found) < min(SAMPLE_TOKENS, limit - len(ids)) and (token := int(read(unread).argmax())) != end:
        found.append(token)
        unread = [token]
    return found
