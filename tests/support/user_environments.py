"""An environment of a user's, found by its dotted path."""

from lockstep.rollout.environments import Action, Opening, StepResult


class Echo:
    """Tells the policy how long its turn was, `num_turns` times; a quarter of a point for each turn."""

    def __init__(self, num_turns: int):
        self.num_turns = num_turns
        self.played = 0

    def reset(self, problem) -> Opening:
        return Opening(problem.messages)

    def step(self, action: Action) -> StepResult:
        self.played += 1
        observation = [{"role": "user", "content": f"{len(action.token_ids)} tokens"}]
        return StepResult(observation, reward=0.25, done=self.played == self.num_turns)
