"""A tokenizer made from nothing for small models, and what rollouts ask of any tokenizer."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as TokenizerBuilder
from transformers import PreTrainedTokenizerFast

from lockstep.engine.text.answer_tags import ANSWER_CLOSE, ANSWER_OPEN
from lockstep.engine.text.chat_template import CHAT_TEMPLATE, set_chat_options
from lockstep.engine.text.config import ChatConfig
from lockstep.engine.text.end_of_turn import end_of_turn
from lockstep.engine.text.model_output import valid_text
from lockstep.engine.text.plain_content import encode_assistant_text, encode_conversation
from lockstep.engine.text.tokenizer import Tokenizer
from lockstep.engine.text.tokenizer import load_tokenizer as load_foreign_tokenizer
from lockstep.rollout.config import TokenizerConfig

PAD = "<|pad|>"
END = "<|end|>"
ROLES = ("system", "user", "assistant")

# Digits stand alone, so that a number is its digits whatever the training text was; an operator takes the spaces
# around it, so that `4 + 3` is three tokens. Byte-level BPE works inside the other pieces: words, punctuation, space.
_PIECES = Regex(r"\p{N}| ?[-+*/=%^<>()] ?| ?\p{L}+| ?[^\s\p{L}\p{N}]|\s+(?!\S)|\s+")


def build_tokenizer(texts: Iterable[str], config: TokenizerConfig) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `texts`, with a chat template; the same bytes for the same arguments.

    <|pad|> is id 0 and <|end|> (end of turn and of sequence) id 1. Any UTF-8 text survives encode and decode.
    Raises ValueError when vocab_size cannot hold the bytes and the special tokens.
    """
    special = [PAD, END, *(f"<|{role}|>" for role in ROLES)]
    plain = [ANSWER_OPEN, ANSWER_CLOSE]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + len(special) + len(plain)
    if config.vocab_size < smallest:
        raise ValueError(f"vocab_size must be at least {smallest}, got {config.vocab_size}")
    tokenizer = TokenizerBuilder(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_PIECES, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size - len(plain),
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special],
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # Answer tags are single tokens, but text like any other: decoding keeps them.
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=special[2:],
        chat_template=CHAT_TEMPLATE,
        model_max_length=config.max_length,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(path: str | Path, chat: ChatConfig | None = None) -> Tokenizer:
    """The tokenizer saved in a local directory, which renders conversations as `chat` says.

    Raises as the engine's `load_tokenizer` and `set_chat_options` do.
    """
    tokenizer = load_foreign_tokenizer(path)
    set_chat_options(tokenizer, chat or ChatConfig())
    return tokenizer


def render_prompt(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()
) -> list[int]:
    """Token ids of the conversation through the tokenizer's chat template, up to where the response begins.

    tools: JSON schemas for the template. Special tokens that messages write out are plain text (plain_content.py).
    Raises ValueError as `apply_template` does.
    """
    return encode_conversation(tokenizer, messages, tools)


def encode_response(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a whole response as the chat template writes it, the end of turn included.

    Tokens of turns that it writes out are plain text; other special tokens, such as `<think>` may be, stay such.
    """
    end = end_of_turn(tokenizer)
    return [*encode_assistant_text(tokenizer, valid_text(text), end.before, end.after), end.token_id]
