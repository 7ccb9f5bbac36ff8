"""Rewards as stages: rules, verifiers in isolated processes, reward models, judges, and their weighted sum."""

from lockstep.rollout.rewards.failures import FailedScore, StepFailures, VerifierError
from lockstep.rollout.rewards.mixture import CORRECT, REWARDS, LocalRewards, build_reward, check_reward
from lockstep.rollout.rewards.models import RewardEngines
from lockstep.rollout.rewards.reward import Completion, Reward
from lockstep.rollout.rewards.rules import correct_reward

__all__ = [
    "CORRECT",
    "REWARDS",
    "Completion",
    "FailedScore",
    "LocalRewards",
    "Reward",
    "RewardEngines",
    "StepFailures",
    "VerifierError",
    "build_reward",
    "check_reward",
    "correct_reward",
]
