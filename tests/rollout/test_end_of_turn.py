"""A turn ends where the chat template ends it: taught, stopped at, hidden from rewards, for models of every kind."""

import datetime
import json

import pytest
from chat_shapes import CHATML, GLM, SHAPES, Shape, tokenizer_of

from lockstep.engine.text.chat_template import apply_template, set_chat_options
from lockstep.engine.text.config import ChatConfig
from lockstep.engine.text.end_of_turn import end_of_turn, response_text, stop_token_ids
from lockstep.rollout.config import TokenizerConfig
from lockstep.rollout.environments.chat_turns import ChatTurns
from lockstep.rollout.tokenizer import build_tokenizer, encode_response, load_tokenizer, render_prompt

USER = {"role": "user", "content": "U"}
ANSWER = {"role": "assistant", "content": "A"}


@pytest.fixture(scope="module", params=[False, True], ids=["named", "flagged by tokenizer.json alone"])
def tokenizers(request):
    return {name: tokenizer_of(shape, request.param) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("name", SHAPES)
def test_what_is_taught_is_what_the_template_writes(tokenizers, name):
    shape, tokenizer = SHAPES[name], tokenizers[name]
    end = tokenizer.convert_tokens_to_ids(shape.end)
    taught = encode_response(tokenizer, "A")
    assert tokenizer.decode(taught, skip_special_tokens=False) == shape.turn
    assert taught[-1] == end_of_turn(tokenizer).token_id == end
    whole = apply_template(tokenizer, [USER, ANSWER], add_generation_prompt=False)
    assert whole.startswith(apply_template(tokenizer, [USER]) + shape.turn)
    assert stop_token_ids(tokenizer)[0] == end
    assert set(stop_token_ids(tokenizer)) == {end, *({tokenizer.eos_token_id} - {None})}


@pytest.mark.parametrize("name", SHAPES)
def test_turns_add_up_to_the_conversation(tokenizers, name):
    tokenizer = tokenizers[name]
    ids = render_prompt(tokenizer, [USER]) + encode_response(tokenizer, "A")
    ids += ChatTurns(tokenizer).observation_ids([USER])
    assert tokenizer.decode(ids) == apply_template(tokenizer, [USER, ANSWER, USER])


@pytest.mark.parametrize("name", SHAPES)
def test_rewards_read_everything_but_the_ends(tokenizers, name):
    tokenizer = tokenizers[name]
    text = "<think>é 4</think>" + SHAPES[name].special[0] + "<answer>7</answer>"
    ends = list(stop_token_ids(tokenizer))
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert response_text(tokenizer, [*ids, *ends]) == text.replace(SHAPES[name].end, "")


def test_answer_tags_that_are_special_tokens_are_read():
    tokenizer = tokenizer_of(SHAPES["qwen"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<answer>", "</answer>", "<tool_call>"]})
    ids = encode_response(tokenizer, "<tool_call> so <answer>7</answer>")
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() != "<tool_call> so <answer>7</answer>"
    assert response_text(tokenizer, ids) == "<tool_call> so <answer>7</answer>"


def test_the_tokenizer_made_from_nothing_ends_turns_as_before():
    tokenizer = build_tokenizer(["1 + 2"], TokenizerConfig(vocab_size=300))
    assert stop_token_ids(tokenizer) == (tokenizer.eos_token_id,)
    assert encode_response(tokenizer, " 7 ") == [*tokenizer.encode(" 7 "), tokenizer.eos_token_id]


def saved(tmp_path, shape, generation=None):
    tokenizer_of(shape).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", "eos_token_id": 280}))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    return load_tokenizer(tmp_path)


@pytest.mark.parametrize("generation", [270, [270, 271]])
def test_generation_config_names_further_ends(tmp_path, generation):
    tokenizer = saved(tmp_path, SHAPES["qwen base"], generation)
    expected = (
        end_of_turn(tokenizer).token_id,
        tokenizer.eos_token_id,
        *([generation] if generation == 270 else generation),
    )
    assert set(stop_token_ids(tokenizer)) == set(expected)
    assert stop_token_ids(tokenizer)[0] == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_an_end_that_no_file_names_is_said(tmp_path, caplog):
    end_of_turn(saved(tmp_path, SHAPES["gemma"], generation=270))
    assert "'<end_of_turn>', which neither" in caplog.text


def test_turns_that_end_where_the_next_begins(tmp_path):
    shape = Shape(
        GLM, "<|endoftext|>", "<|user|>", ("<|user|>", "<|assistant|>", "<sop>", "[gMASK]", "<|observation|>"), ""
    )
    user = tokenizer_of(shape).convert_tokens_to_ids("<|user|>")
    tokenizer = saved(tmp_path, shape, [user, user + 4])
    assert end_of_turn(tokenizer).token_id == user
    ids = (
        render_prompt(tokenizer, [USER])
        + encode_response(tokenizer, "A")
        + ChatTurns(tokenizer).observation_ids([USER])
    )
    assert tokenizer.decode(ids) == apply_template(tokenizer, [USER, ANSWER, USER])


BASE = Shape(None, "<|endoftext|>", "<|endoftext|>", (), "A<|endoftext|>")


def test_base_models_need_a_template_or_the_plain_one(tmp_path):
    tokenizer = saved(tmp_path, BASE)
    with pytest.raises(ValueError, match=r"chat\.template=FILE, or set chat\.without_template=plain"):
        render_prompt(tokenizer, [USER])
    plain = load_tokenizer(tmp_path, ChatConfig(without_template="plain"))
    messages = [{"role": "system", "content": "S"}, USER]
    assert apply_template(plain, messages) == "S\nU\n"
    assert plain.decode(encode_response(plain, "A")) == "A<|endoftext|>"
    assert stop_token_ids(plain) == (plain.eos_token_id, 280)
    assert apply_template(plain, [USER, ANSWER, USER]) == "U\nA<|endoftext|>U\n"
    (tmp_path / "own.jinja").write_text("{% for m in messages %}Q: {{ m.content }}{% endfor %} A:")
    own = load_tokenizer(tmp_path, ChatConfig(template=str(tmp_path / "own.jinja"), without_template="plain"))
    assert apply_template(own, [USER]) == "Q: U A:"


def test_nothing_that_ends_a_turn_is_an_error_that_says_what_to_do(tmp_path):
    tokenizer = tokenizer_of(Shape("{{ messages[0].content }}: ", None, "", (), ""))
    with pytest.raises(ValueError, match=r"eos_token\) nor generation_config.json.*chat.template=FILE"):
        end_of_turn(tokenizer)


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"eos_token_id": "</s>"}', '{"eos_token_id": null}', '{"eos_token_id": -1}']
)
def test_a_damaged_generation_config_names_no_end(tmp_path, content):
    tokenizer_of(SHAPES["qwen"]).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(content)
    tokenizer = load_tokenizer(tmp_path)
    assert stop_token_ids(tokenizer) == (tokenizer.eos_token_id,)


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (SHAPES["mistral"].template, [USER, USER], "roles must alternate"),
        (SHAPES["gemma"].template, [{"role": "system", "content": "S"}, USER], "System role not supported"),
        ("{{ messages[0].content", [USER], "unexpected end of template"),
        ("{{ messages[7].content.x }}", [USER], "fails: "),
        ("{{ 1 / 0 }}", [USER], "division by zero"),
        ("{{ messages[0].content + 1 }}", [USER], "fails: "),
        ("{{ ''.__class__.__mro__ }}", [USER], "access to attribute"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", [USER], "it nests without end"),
    ],
)
def test_what_a_template_refuses_is_one_line(template, messages, message):
    tokenizer = tokenizer_of(SHAPES["qwen"])
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=message) as error:
        render_prompt(tokenizer, messages)
    assert "\n" not in str(error.value)


def test_the_day_is_the_runs(tmp_path, monkeypatch):
    tokenizer = saved(tmp_path, SHAPES["llama 3"])
    rendered = {}
    for date in ("2026-03-01", "2026-03-02"):
        set_chat_options(tokenizer, ChatConfig(date=date))
        rendered[date] = apply_template(tokenizer, [USER])
    assert "Today Date: 01 Mar 2026" in rendered["2026-03-01"]
    assert "Today Date: 02 Mar 2026" in rendered["2026-03-02"]
    set_chat_options(tokenizer, ChatConfig(chat_template_kwargs={"date_string": "26 Jul 2024"}, date="2026-03-01"))
    assert "Today Date: 26 Jul 2024" in apply_template(tokenizer, [USER])


@pytest.mark.parametrize("form", ["%d %b %Y", "%Y-%m-%d", "%A, %B %d, %Y", "%H:%M:%S", "%s"])
def test_no_form_of_the_time_shows_when_it_was_asked(form):
    tokenizer = tokenizer_of(SHAPES["qwen"])
    tokenizer.chat_template = (
        "{% macro day() %}{{ strftime_now('"
        + form
        + "') }}{% endmacro %}{% for m in messages %}{{ day() }}{% endfor %}"
    )
    set_chat_options(tokenizer, ChatConfig(date="2024-02-29"))
    assert apply_template(tokenizer, [USER]) == datetime.datetime(2024, 2, 29).strftime(form)


def test_template_variables(tmp_path):
    tokenizer = saved(tmp_path, SHAPES["qwen"])
    set_chat_options(tokenizer, ChatConfig(chat_template_kwargs={"enable_thinking": False}))
    assert apply_template(tokenizer, [USER]).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert tokenizer.decode(encode_response(tokenizer, "A")) == "A<|im_end|>"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"date": "today"}, "chat.date must be a day as YYYY-MM-DD, got 'today'"),
        ({"date": "2026-02-30"}, "chat.date must be a day"),
        ({"date": 20260301}, "chat.date must be a text"),
        ({"without_template": "chatml"}, "chat.without_template must be one of error, plain"),
        ({"chat_template_kwargs": {"messages": []}}, "'messages' cannot be set"),
        ({"chat_template_kwargs": {"strftime_now": "x"}}, "use chat.date"),
    ],
)
def test_bad_chat_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ChatConfig(**options)


@pytest.mark.parametrize("template", ["{{ ['a', 'b'] | random }}", "{{ lipsum(n=1) }}", "{{ messages|random }}"])
def test_templates_that_draw_at_random_are_refused(tmp_path, template):
    (tmp_path / "own.jinja").write_text(template)
    with pytest.raises(ValueError, match="draws at random"):
        set_chat_options(tokenizer_of(SHAPES["qwen"]), ChatConfig(template=str(tmp_path / "own.jinja")))
    with pytest.raises(ValueError, match=r"chat\.template=.*absent.jinja: No such file"):
        set_chat_options(tokenizer_of(SHAPES["qwen"]), ChatConfig(template=str(tmp_path / "absent.jinja")))


def test_a_template_among_several():
    tokenizer = tokenizer_of(SHAPES["qwen"])
    tokenizer.chat_template = {"default": CHATML, "tool_use": "{{ tools | length }} tools<|im_end|>"}
    assert end_of_turn(tokenizer).token_id == tokenizer.eos_token_id
    assert apply_template(tokenizer, [USER], tools=[{"a": 1}]) == "1 tools<|im_end|>"
    tokenizer.chat_template = {"rag": CHATML}
    with pytest.raises(ValueError, match="multiple chat templates with no default"):
        apply_template(tokenizer, [USER])


@pytest.mark.parametrize("content", ["m.content | upper", "''"])
def test_a_template_that_does_not_show_the_message_does_not_end_turns_with_what_it_begins_with(content):
    template = CHATML.replace("m.content", f"(m.content if m.role == 'user' else {content})")
    tokenizer = tokenizer_of(Shape(template, "<|endoftext|>", "<|im_end|>", ("<|im_start|>",), ""))
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert (end_of_turn(tokenizer).token_id, stop_token_ids(tokenizer)) == (end, (end,))
