"""Rewards as stages: rules, verifiers in isolated processes, reward models, judges, and their weighted sum.

The names below are imported at their first use: a task's config has no need of reward models.
"""

from lockstep.lazy_names import lazy_names

_HOMES = {
    "CORRECT": "mixture",
    "REWARDS": "mixture",
    "Completion": "reward",
    "FailedScore": "failures",
    "LocalRewards": "mixture",
    "Reward": "reward",
    "RewardEngines": "models",
    "StepFailures": "failures",
    "VerifierError": "failures",
    "build_reward": "mixture",
    "check_reward": "mixture",
    "correct_reward": "rules",
}
__all__ = list(_HOMES)
__getattr__ = lazy_names(__name__, _HOMES)
