"""Plain torch on one device: nothing between torch and the model."""

from torch import Tensor, nn
from torch.optim import Optimizer

from schemas.training import TrainingConfig
from stages.engine.optimizer import Outcome, mean_parts, poisoned, read_state, trained, write_state
from stages.engine.precision import LossScale


class TorchEngine:
    """One device, nothing between torch and the model."""

    name = "torch"

    def __init__(self, module: nn.Module, optimizer: Optimizer, config: TrainingConfig, scale: LossScale) -> None:
        self.module = module
        self._optimizer = optimizer
        self._clipping = config.gradient_clipping
        self._scale = scale

    def step(self, micro_batches: list[Tensor], rate: float) -> Outcome:
        """See Engine."""
        parts = []
        for rows in micro_batches:
            parts.append(self.module(rows))
            (self._scale.raised(poisoned(parts[-1]["loss"])) / len(micro_batches)).backward()
        self._scale.lower(trained(self.module).values())
        norm = nn.utils.clip_grad_norm_(trained(self.module).values(), self._clipping)
        applied = bool(norm.isfinite())
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        if applied:
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return Outcome(mean_parts(parts), float(norm), applied, self._scale.update(applied))

    def state(self) -> dict[str, Tensor]:
        """See Engine."""
        state = self._scale.state()
        for name, parameter in trained(self.module).items():
            state.update(read_state(name, parameter, self._optimizer))
        return state

    def load_state(self, state: dict[str, Tensor], steps: int) -> None:
        """See Engine."""
        self._scale.load_state(state)
        for name, parameter in trained(self.module).items():
            write_state(name, parameter, self._optimizer, state, steps)
