"""Chat templates with the structure of well-known models', and tokenizers made from nothing for them."""

from dataclasses import dataclass

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from lockstep.rollout.config import TokenizerConfig
from lockstep.rollout.tokenizer import build_tokenizer

BAR = "\uff5c"  # DeepSeek's special tokens are written with a wide vertical line


@dataclass(frozen=True)
class Shape:
    """template; bos, eos: of the tokenizer; end: what ends a turn; special: the other special tokens.

    turn: the assistant's message "A" as the template writes it, behind the generation prompt.
    """

    template: str | None
    eos: str | None
    end: str
    special: tuple[str, ...]
    turn: str
    bos: str | None = None


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% if not date_string is defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}{% else %}{% set date_string = '26 Jul 2024' %}{% endif %}"
    "{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '\n\n<|eot_id|>' }}"
    "{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}"
    "{% endif %}{% endfor %}"
)
LLAMA2 = MISTRAL.replace("' ' + m.content + eos_token", "' ' + m.content | trim + ' ' + eos_token")
DEEPSEEK = (
    (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}"
        "{% elif m.role == 'assistant' %}{{ '<|Assistant|>' + m.content + '<|end▁of▁sentence|>' }}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|Assistant|>' }}{% endif %}"
    )
    .replace("<|", f"<{BAR}")
    .replace("|>", f"{BAR}>")
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim }}"
    "{{ '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
GLM = (
    "{{ '[gMASK]<sop>' }}{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

DEEPSEEK_END = f"<{BAR}end▁of▁sentence{BAR}>"
SHAPES = {
    "qwen": Shape(CHATML, "<|im_end|>", "<|im_end|>", ("<|im_start|>", "<|endoftext|>"), "A<|im_end|>"),
    "qwen base": Shape(CHATML, "<|endoftext|>", "<|im_end|>", ("<|im_start|>", "<|im_end|>"), "A<|im_end|>"),
    "llama 3": Shape(
        LLAMA3,
        "<|end_of_text|>",
        "<|eot_id|>",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "A<|eot_id|>",
        bos="<|begin_of_text|>",
    ),
    "mistral": Shape(MISTRAL, "</s>", "</s>", ("[INST]", "[/INST]"), " A</s>", bos="<s>"),
    "llama 2": Shape(LLAMA2, "</s>", "</s>", ("<unk>",), " A </s>", bos="<s>"),
    "deepseek": Shape(
        DEEPSEEK,
        DEEPSEEK_END,
        DEEPSEEK_END,
        (f"<{BAR}User{BAR}>", f"<{BAR}Assistant{BAR}>"),
        "A" + DEEPSEEK_END,
        bos=f"<{BAR}begin▁of▁sentence{BAR}>",
    ),
    "gemma": Shape(
        GEMMA, "<eos>", "<end_of_turn>", ("<start_of_turn>", "<end_of_turn>"), "A<end_of_turn>", bos="<bos>"
    ),
    "phi 3": Shape(
        PHI3, "<|endoftext|>", "<|end|>", ("<|assistant|>", "<|user|>", "<|system|>", "<|end|>"), "A<|end|>"
    ),
    "no eos": Shape(CHATML, None, "<|im_end|>", ("<|im_start|>", "<|im_end|>"), "A<|im_end|>"),
}


def tokenizer_of(shape: Shape, flagged_by_tokenizer_json_alone: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level, with the shape's special tokens; perhaps with none but bos and eos named beside tokenizer.json."""
    made = build_tokenizer(["What is 3 + 4? Today Date: Jul"] * 3, TokenizerConfig(vocab_size=300)).backend_tokenizer
    names = [*shape.special, *filter(None, (shape.bos, shape.eos))]
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    ends = {"bos_token": shape.bos, "eos_token": shape.eos}
    named = {} if flagged_by_tokenizer_json_alone else {"additional_special_tokens": list(shape.special)}
    return PreTrainedTokenizerFast(
        tokenizer_object=made, chat_template=shape.template, **{n: t for n, t in ends.items() if t}, **named
    )
