"""Training: one loop for every model, DeepSpeed or plain torch under it, checkpoints without pickle."""
