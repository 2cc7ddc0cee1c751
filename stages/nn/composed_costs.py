"""What a composed model costs, in FLOPs per token, counted on passes of one text.

- experts are frozen: of a training step, they cost a forward pass
- where only some are asked, what an expert reads is paid for as often as it is read, catching up included
"""

from stages.nn.composed import ComposedModel
from stages.nn.flops import BACKWARD_AND_FORWARD, forward_flops


class ComposedCosts:
    """Of texts of so many tokens."""

    def __init__(self, composed: ComposedModel, length: int) -> None:
        self.forward = forward_flops(lambda ids: composed.log_probs(ids, ids)[0], length)
        self._frozen = forward_flops(lambda ids: composed.consult(ids, composed.new_cache(), None, ids), length)
        self._others = len(composed.experts) - 1
        self._first_alone = forward_flops(lambda ids: composed.log_probs(ids, ids, active=(0,))[0], length)

    def training(self, tokens: int) -> float:
        """Of all tokens that bridges, and perhaps the central model, were trained on."""
        return tokens * (self._frozen + BACKWARD_AND_FORWARD * (self.forward - self._frozen))

    def with_few(self, read_per_token: float) -> float:
        """Of a token of which the experts together read so many."""
        return self._first_alone + (read_per_token - 1) * (self.forward - self._first_alone) / max(1, self._others)
