"""Chat templates: the text that transformers gives, and an end for those that have none."""

import json
import os
import time
from datetime import datetime

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from lockstep.engine.text.chat_renderer import ChatRenderer

MESSAGES = [
    {"role": "system", "content": "Be brief. ½ \ud800"},
    {"role": "user", "content": "  What is 2 + 2?\n"},
    {"role": "assistant", "content": "4", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2}}}]},
]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"b": [1.5, None, True], "a": "<&>"}}}]
TEMPLATES = {
    "chatml": (
        "{%- for message in messages %}\n    {{- '<|im_start|>' + message.role + '\\n' + message['content'] }}\n"
        "  {%- if loop.last and add_generation_prompt %}\n<|im_start|>assistant\n{% endif %}{%- endfor %}"
    ),
    "tools": "{{ tools | tojson }}|{{ tools | tojson(indent=2) }}|{{ tools[0].function.parameters.a | upper }}",
    "loopcontrols": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content | trim }}{% endgeneration %}{% endfor %}",
    "macro": "{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f(bos_token) }}{{ f(messages | length) }}{{ missing }}",
    "methods": "{{ messages[1].content.strip().split(' ')[-1] }}{{ messages[0].get('x', 'none') }}{{ [1, 2][::-1] }}",
    "blocks": "a\n  {% if true %}\nb\n  {% endif %}\nc\n",
}


@pytest.fixture(scope="module")
def renderer():
    renderer = ChatRenderer(deadline_s=5.0)
    yield renderer
    renderer.close()


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_is_that_of_transformers(name, renderer):
    variables = {"tools": TOOLS, "add_generation_prompt": True, "bos_token": "<s>", "documents": None}
    (expected,), _ = render_jinja_template([MESSAGES], chat_template=TEMPLATES[name], **variables)
    assert renderer.render(TEMPLATES[name], {"messages": MESSAGES, **variables}) == expected


def test_now_is_what_is_given(renderer):
    template = "{{ strftime_now('%d %b %Y') }}"
    assert renderer.render(template, {}, datetime(2024, 7, 26)) == "26 Jul 2024"
    assert renderer.render("{{ strftime_now('%Y') }}", {}) >= "2024"


HOSTILE = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a power": "{{ 9**(9**(9**9)) }}",
    "a string": "{{ 'a' * 10**12 }}",
    "doubling": "{% set ns = namespace(a='a') %}{% for i in range(60) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}",
    "padding": "{{ '%1000000000000d' % 1 }}",
    "centre": "{{ 'a' | center(10**11) }}",
    "much text": "{% for i in range(99999) %}{{ 'a' * 10000 }}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a function": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "format": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "syntax": "{% for %}",
    "deep": "{{ " + "(" * 5000 + ")" * 5000 + " }}",
    "its own error": "{{ raise_exception('roles must alternate') }}",
    "a zero": "{{ 1 // 0 }}",
    "a file": "{% include '/etc/passwd' %}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_any_template_ends(name, renderer):
    short = ChatRenderer(deadline_s=1.0) if name in ("loops", "a power") else renderer
    started = time.monotonic()
    with pytest.raises(ValueError, match=r".") as refused:
        short.render(HOSTILE[name], {"messages": MESSAGES})
    assert "\n" not in str(refused.value)
    assert time.monotonic() - started < 30
    short.close() if short is not renderer else None
    assert renderer.render("{{ 1 + 1 }}", {}) == "2"


def test_what_python_hides_is_undefined(renderer):
    assert renderer.render("{{ raise_exception.__globals__ }}|{{ messages.__class__ }}", {"messages": []}) == "|"


def test_messages_that_are_no_json_are_refused(renderer):
    with pytest.raises(ValueError, match="plain JSON"):
        renderer.render("{{ messages }}", {"messages": [object()]})


def test_a_process_that_was_killed_is_started_again(renderer):
    assert renderer.render("a", {}) == "a"
    os.kill(renderer._process.pid, 9)
    renderer._process.wait()
    assert renderer.render("b", {}) == "b"


def test_the_process_sees_neither_this_one_nor_its_environment(renderer, monkeypatch):
    monkeypatch.setenv("SECRET", "1")
    renderer.close()
    renderer.render("a", {})
    with open(f"/proc/{renderer._process.pid}/environ", "rb") as file:
        assert b"SECRET" not in file.read()
    assert len(json.dumps(renderer.render("{{ x }}", {"x": {"a": [1]}}))) > 0
