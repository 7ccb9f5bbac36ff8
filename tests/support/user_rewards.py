"""A user's own reward, found by its dotted path."""


def length_reward(problem, response: str) -> float:
    return len(response) / 100


def parity_reward(problem, response: str) -> float:
    return float(len(response) % 2)
