"""Settings of the models that tests train over the tiny corpus, in seconds."""

from schemas.central import CentralShape
from schemas.compose_model import BridgeConfig, BridgeTraining, ComposeConfig
from schemas.decoder import DecoderShape
from schemas.evaluate_models import EvaluateConfig
from schemas.train_gates import GatesConfig
from schemas.training import TrainingConfig

SHAPE = DecoderShape(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
)
TRAINING = TrainingConfig(
    steps=8, batch_size=6, sequence_length=32, learning_rate=5e-3, engine="torch", precision="fp32", log_every=4
)
CENTRAL = CentralShape(
    group_length=4, latents_per_group=2, encoder_layers=1, latent_layers=2, decoder_layers=2, token_window=8,
    plan_horizon=2,
)  # fmt: skip
COMPOSE = ComposeConfig(
    central=CENTRAL, training=TRAINING, bridge_training=BridgeTraining(bridge_steps=6, bridge_batch_size=6)
)
GATES = GatesConfig(training=TRAINING.model_copy(update={"steps": 4, "weight_decay": 0.0}))
CALM = COMPOSE.model_copy(update={"name": "central-calm", "bridges": BridgeConfig(bridge="calm"), "gates": "none"})
CONTROL = COMPOSE.model_copy(update={"name": "central-control", "experts": "seed-copies", "gates": "independent"})
EVALUATE = EvaluateConfig(tokens=1200, top_k=(1, 2))
