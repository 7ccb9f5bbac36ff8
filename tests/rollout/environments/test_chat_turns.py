"""A conversation put together turn by turn has the tokens of the rendered whole, where a template appends."""

import pytest

from lockstep.rollout.config import TokenizerConfig
from lockstep.rollout.environments.chat_turns import ChatTurns
from lockstep.rollout.environments.environment import Opening
from lockstep.rollout.tokenizer import build_tokenizer, encode_response, render_prompt

# As Qwen writes turns and tool results, with our special tokens: a newline after each turn, results in a user's turn.
QWEN_STYLE = (
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|user|>' }}{% endif %}"
    "{{ '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|end|>\\n' }}{% endif %}"
    "{% else %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
# As Llama does: a fixed header that only a whole conversation has, and blank lines.
HEADER_STYLE = (
    "{{ '<|system|>Today is fine.<|end|>' }}"
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n\\n' + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n\\n' }}{% endif %}"
)
NO_END = "{% for m in messages %}{{ m.role + ': ' + m.content + '. ' }}{% endfor %}"


def tokenizer_with(template: str | None = None):
    tokenizer = build_tokenizer(["What is 3 + 4? higher lower"] * 3, TokenizerConfig(vocab_size=320))
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


OBSERVATIONS = [
    [{"role": "user", "content": "higher"}],
    [{"role": "tool", "name": "calculator", "content": "7"}],
    [{"role": "tool", "content": "7"}, {"role": "tool", "content": "8"}],
]


@pytest.mark.parametrize("template", [None, QWEN_STYLE, HEADER_STYLE], ids=["own", "qwen", "header"])
def test_turns_add_up_to_the_rendered_conversation(template):
    tokenizer = tokenizer_with(template)
    chat = ChatTurns(tokenizer)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 3 + 4?"}]
    ids = chat.opening_ids(Opening(messages))
    for number, observation in enumerate(OBSERVATIONS):
        answer = f"turn {number} <answer>{number}</answer>"
        ids += encode_response(tokenizer, answer) + chat.observation_ids(observation)
        messages += [{"role": "assistant", "content": answer}, *observation]
        assert ids == render_prompt(tokenizer, messages)


def test_what_was_drawn_stays_as_it_was_drawn():
    """The same text in other tokens than the tokenizer's: the transcript keeps the drawn ones."""
    tokenizer = tokenizer_with()
    chat = ChatTurns(tokenizer)
    drawn = [tokenizer.convert_tokens_to_ids(c) for c in "What"]
    assert drawn != tokenizer.encode("What", add_special_tokens=False)
    messages = [{"role": "user", "content": "?"}]
    opening = chat.opening_ids(Opening(messages))
    ids = [*opening, *drawn, tokenizer.eos_token_id, *chat.observation_ids(OBSERVATIONS[0])]
    whole = [*messages, {"role": "assistant", "content": "What"}, *OBSERVATIONS[0]]
    assert tokenizer.decode(ids) == tokenizer.decode(render_prompt(tokenizer, whole))
    assert ids != render_prompt(tokenizer, whole)
    assert ids[len(opening) : len(opening) + 4] == drawn


def test_tokens_are_taken_as_they_are():
    chat = ChatTurns(tokenizer_with())
    assert chat.opening_ids(Opening([5, 6])) == [5, 6]
    assert chat.observation_ids([7]) == [7]


def test_tools_reach_the_template():
    tokenizer = tokenizer_with()
    schema = {"type": "function", "function": {"name": "calculator"}}
    ids = ChatTurns(tokenizer).opening_ids(Opening([{"role": "user", "content": "?"}], [schema]))
    assert '"name": "calculator"' in tokenizer.decode(ids)


def test_what_cannot_be_rendered_is_refused():
    with pytest.raises(ValueError, match="no special token"):
        ChatTurns(tokenizer_with(NO_END)).observation_ids(OBSERVATIONS[0])
    with pytest.raises(ValueError, match="is empty; it needs a message or a token"):
        ChatTurns(tokenizer_with()).observation_ids([])
