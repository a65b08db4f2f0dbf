"""A model under a zeroth-order recipe, with its weights perturbed."""

from contextlib import contextmanager

from efftune.methods.zeroth_order._perturbation import Perturbation


@contextmanager
def perturbed(model, optimizer, eps, seed):
    """Within it, `model` computes with w + eps·z(seed); yields the ids of the parameters that were used so."""
    with Perturbation(model, optimizer) as perturbation, perturbation.by(eps, seed) as used:
        yield used
