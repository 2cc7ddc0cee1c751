"""Where a training stands, and the guard over its steps: which are left out, and when it has to end.

- counted in a row: the weights never take part in a step that was left out, so a bad row costs its own step only, and
  many in a row mean that the weights themselves give no finite loss any more
"""

import math
from collections.abc import Callable

from loguru import logger
from torch import Tensor

from schemas.failures import DivergedFailure
from schemas.training import TrainingConfig
from stages.engine.checkpoints import Progress
from stages.engine.optimizer import Outcome


class Course:
    """Steps done and left out, and losses so far."""

    def __init__(
        self, progress: Progress, config: TrainingConfig, label: str, batch_at: Callable[[int], Tensor]
    ) -> None:
        self.step = progress.step
        self.losses = list(progress.losses)
        self.skipped = progress.skipped
        self._in_a_row = progress.skipped_in_a_row
        self._config = config
        self._label = label
        self._describe: Callable[[int], str] | None = getattr(batch_at, "describe", None)

    def advance(self, loss: float, outcome: Outcome) -> None:
        """Take in the next step. Raises DivergedFailure when too many in a row were left out."""
        self.step += 1
        if math.isfinite(loss):
            self.losses.append(loss)
        if outcome.applied and math.isfinite(loss):
            self._in_a_row = 0
            return
        self.skipped += 1
        if outcome.rescaled and math.isfinite(loss):
            logger.debug("{}: step {} is left out: the loss scale was too large, and is halved", self._label, self.step)
            return
        self._in_a_row += 1
        name, value = ("gradient", outcome.norm) if math.isfinite(loss) else ("loss", loss)
        found = f"the {name} of step {self.step} is {value}"
        rows = f" on {self._describe(self.step - 1)}" if self._describe else ""
        too_many = self._in_a_row > self._config.skipped_steps
        if too_many or outcome.applied or (self.step == self._config.steps and not self.losses):
            raise DivergedFailure(
                f"{self._label}: {found}{rows}{self._before()}: lower --learning-rate, or mend the text; the last "
                "checkpoint is kept"
            )
        logger.warning("{}: left out a step: {}{}", self._label, found, rows)

    def _before(self) -> str:
        return f", and {self._in_a_row - 1} before it were left out" if self._in_a_row > 1 else ""

    @property
    def tokens(self) -> int:
        """Tokens trained on so far."""
        return (self.step - self.skipped) * self._config.tokens_per_step

    def progress(self) -> Progress:
        """What a checkpoint says."""
        return Progress(
            step=self.step,
            tokens=self.tokens,
            losses=tuple(self.losses),
            skipped=self.skipped,
            skipped_in_a_row=self._in_a_row,
        )
