"""Error budgets against a float64 oracle: what rounding and float32 arithmetic cost, and no more."""

import torch


def rms(t: torch.Tensor) -> float:
    return t.double().square().mean().sqrt().item() if t.numel() else 0.0


def assert_within_budget(
    result: torch.Tensor, oracle: torch.Tensor, float32_result: torch.Tensor, rounded: torch.Tensor | None = None
) -> None:
    """rms(result - oracle) <= 1.5 rms(round(oracle) - oracle) + 2 rms(float32_result - oracle), where below 256
    elements the first term is at least eps * rms(oracle): so few roundings need not be typical. `rounded` is the
    formula in float64 with a rounding on the way that is documented: its error is granted besides."""
    assert oracle.dtype == torch.float64 and result.shape == oracle.shape
    budget = 1.5 * rms(oracle.to(result.dtype).double() - oracle) + 2 * rms(float32_result.double() - oracle)
    if oracle.numel() < 256:
        budget = max(budget, torch.finfo(result.dtype).eps * rms(oracle))
    if rounded is not None:
        budget += rms(rounded - oracle)
    error = rms(result.double() - oracle)
    assert error <= budget, (
        f"rms error {error:.3e} exceeds the budget {budget:.3e} (rms of the oracle {rms(oracle):.3e})"
    )
