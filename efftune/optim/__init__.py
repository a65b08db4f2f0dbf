"""Optimizers, all true torch.optim.Optimizers."""
