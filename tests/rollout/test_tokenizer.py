"""The tokenizer made from nothing: lossless, deterministic, digits alone, loadable by AutoTokenizer."""

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from lockstep.engine.text.detokenizer import decode_text
from lockstep.rollout.config import TokenizerConfig
from lockstep.rollout.tasks import ReasoningGymConfig, build_task
from lockstep.rollout.tokenizer import build_tokenizer, encode_response, load_tokenizer, render_prompt


def training_text() -> list[str]:
    train = build_task(ReasoningGymConfig("chain_sum", {"max_digits": 2})).train
    problems = [train.problem(index) for index in range(200)]
    return [text for problem in problems for text in (problem.question, problem.solution)]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(training_text(), TokenizerConfig(vocab_size=384))


@settings(deadline=None, max_examples=300)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


@pytest.mark.parametrize(
    "text", ["<|end|> literal <answer>7</answer>", " leading", "trailing ", "a  b\n\n c\t", "Ġ½ 漢字 🙂", "1 , 2 . 3 !"]
)
def test_awkward_text_survives(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_digits_and_operators_stand_alone(tokenizer):
    pieces = [tokenizer.decode([token]) for token in tokenizer.encode("120+34 - 5=-7")]
    assert pieces == ["1", "2", "0", "+", "3", "4", " - ", "5", "=", "-", "7"]
    for token in range(len(tokenizer)):
        text = tokenizer.decode([token])
        assert len(text) == 1 or not any(character.isdigit() for character in text)


def test_a_question_is_short(tokenizer):
    question = "State the final answer to the following arithmetic problem: 4 - 3 + 7 ="
    assert len(tokenizer.encode(question)) <= 20


def test_answer_tags_are_single_tokens_that_decoding_keeps(tokenizer):
    response = encode_response(tokenizer, "1+2=3\n<answer>3</answer>")
    assert response[-1] == tokenizer.eos_token_id
    assert len(response) == 5 + 1 + 3 + 1
    assert decode_text(tokenizer, response) == "1+2=3\n<answer>3</answer>"


def test_chat_template(tokenizer):
    messages = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+2"}]
    prompt = render_prompt(tokenizer, messages)
    assert tokenizer.decode(prompt) == "<|system|>Add.<|end|><|user|>1+2<|end|><|assistant|>"
    roles = tokenizer.convert_tokens_to_ids(["<|system|>", "<|user|>", "<|assistant|>"])
    assert prompt[0] == roles[0]
    assert prompt[-1] == roles[2]
    assert prompt.count(tokenizer.eos_token_id) == 2


def test_prompt_needs_a_chat_template(tokenizer):
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="no chat template"):
        render_prompt(bare, [{"role": "user", "content": "1"}])


def test_same_arguments_same_tokenizer(tokenizer):
    again = build_tokenizer(training_text(), TokenizerConfig(vocab_size=384))
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_saved_beside_a_model_it_loads_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "eos_token_id": 1})
    )
    loaded = load_tokenizer(tmp_path)
    messages = [{"role": "user", "content": "What is 12 + 30?"}]
    assert render_prompt(loaded, messages) == render_prompt(tokenizer, messages)
    assert (loaded.pad_token_id, loaded.eos_token_id) == (0, 1)
    text = "12 + 30=42\n<answer>42</answer>"
    assert encode_response(loaded, text) == encode_response(tokenizer, text)
    assert decode_text(loaded, encode_response(loaded, text)) == text


def test_vocabulary_bounds(tokenizer):
    assert len(tokenizer) <= 384
    assert len(build_tokenizer(["abc"], TokenizerConfig(vocab_size=263))) == 263
    with pytest.raises(ValueError, match="at least 263"):
        build_tokenizer(["abc"], TokenizerConfig(vocab_size=262))


def test_missing_tokenizer_is_an_error(tmp_path):
    with pytest.raises((OSError, ValueError)):
        load_tokenizer(tmp_path / "nowhere")


@pytest.mark.parametrize("template", [5, {"default": 1}])
def test_a_template_that_is_no_text_is_refused(tokenizer, tmp_path, template):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": template}))
    with pytest.raises(ValueError, match="is a int, not a text"):
        load_tokenizer(tmp_path)


def test_what_a_template_says_in_an_error_does_not_reach_the_terminal(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.chat_template = "{{ raise_exception('" + chr(27) + "[2J') }}"
    with pytest.raises(ValueError, match=r"fails: .*\\x1b\[2J"):
        render_prompt(other, ({"role": "user", "content": "hi"},))
