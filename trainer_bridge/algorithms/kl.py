"""Estimates of the KL divergence from the policy to another model, of one sampled token; by name.

All take d = logprob - other_logprob of a token drawn from the policy, as a tensor or a number. Source: Schulman 2020
(joschu.net/blog/kl-approx.html). As a penalty in the loss, the gradient counts: that of k1 is 0 in expectation, that
of k2 is the gradient of KL(policy || other), that of k3 the gradient of KL(other || policy).
"""

import math
from collections.abc import Callable
from typing import Any

import torch


def k1(difference: Any) -> Any:
    """d: without bias, and of large variance; may be negative."""
    return difference


def k2(difference: Any) -> Any:
    """d^2 / 2: of small variance, with a bias."""
    return 0.5 * difference * difference


def k3(difference: Any) -> Any:
    """exp(-d) + d - 1: without bias, and never negative."""
    exponential = torch.exp(-difference) if isinstance(difference, torch.Tensor) else math.exp(-difference)
    return exponential + difference - 1.0


KL_ESTIMATORS: dict[str, Callable[[Any], Any]] = {"k1": k1, "k2": k2, "k3": k3}
