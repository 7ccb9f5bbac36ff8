"""The game, and its positions as problems."""

import pytest

from lockstep.rollout.environments.environment import Action
from lockstep.rollout.environments.guess_number import GuessNumberConfig, GuessNumberEnvironment
from lockstep.rollout.tasks import GuessNumberTaskConfig, Problem, build_task
from lockstep.rollout.tasks.answers import extract_answer, format_answer


def turn(guess) -> Action:
    return Action(format_answer(str(guess)), [1])


def test_a_game_of_bisection_is_won_in_four_guesses_from_fifteen():
    held_out = build_task(GuessNumberTaskConfig(held_out_size=15)).held_out
    for index in range(15):
        environment, problem = GuessNumberEnvironment(GuessNumberConfig(miss_reward=-0.1)), held_out.problem(index)
        assert environment.reset(problem).prompt == problem.messages
        low, high = 1, 15
        for _ in range(4):
            guess = (low + high) // 2
            result = environment.step(turn(guess))
            if result.done:
                break
            assert result.reward == -0.1
            low, high = (guess + 1, high) if result.observation[0]["content"] == "higher" else (low, guess - 1)
        assert result.done
        assert held_out.score(problem, str(guess)) == 1.0
    assert sorted(int(held_out.problem(i).answer) for i in range(15)) == list(range(1, 16))


@pytest.mark.parametrize("text", ["", "seven", format_answer("seven"), format_answer("-3"), format_answer("9" * 5000)])
def test_nonsense_ends_the_game(text):
    environment = GuessNumberEnvironment(GuessNumberConfig())
    environment.reset(build_task(GuessNumberTaskConfig()).train.problem(0))
    result = environment.step(Action(text, [1]))
    assert (result.reward, result.done) == (-0.5, True)


def test_positions_are_games_so_far_and_solutions_are_possible_guesses():
    task = build_task(GuessNumberTaskConfig()).train
    played = set()
    for index in range(300):
        problem = task.problem(index)
        assert problem == task.problem(index)
        low, high, number = 1, 15, int(problem.answer)
        for guessed, said in zip(problem.messages[1::2], problem.messages[2::2], strict=True):
            guess = int(extract_answer(guessed["content"]))
            assert low <= guess <= high
            assert said["content"] == ("higher" if number > guess else "lower")
            low, high = (guess + 1, high) if number > guess else (low, guess - 1)
        assert low <= number <= high
        assert problem.metadata == {"higher_than": low - 1, "lower_than": high + 1}
        assert low <= int(extract_answer(problem.solution)) <= high
        played.add(len(problem.messages) // 2)
    assert played == {0, 1, 2, 3}


def test_another_tasks_problem_is_refused():
    with pytest.raises(ValueError, match="guess_number environment plays"):
        GuessNumberEnvironment(GuessNumberConfig()).reset(Problem("sums/0", (), "1"))
