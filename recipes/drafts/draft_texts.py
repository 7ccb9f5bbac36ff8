"""The texts that a draft learns from: the rollouts of a run, or a file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lockstep.recipes.runs.run_directory import read_rollouts, rollout_steps
from lockstep.rollout.tasks.data_files import READERS, read_rows
from lockstep.rollout.tokenizer import encode_response, load_tokenizer


@dataclass(frozen=True)
class DraftText:
    """Tokens, of which the first num_prompt are given and not learned."""

    token_ids: tuple[int, ...]
    num_prompt: int

    @property
    def loss_mask(self) -> list[bool]:
        return [index >= self.num_prompt for index in range(len(self.token_ids))]


def read_texts(rollouts: str | None, file: str | None, model: str, max_tokens: int) -> list[DraftText]:
    """The samples of all steps of the run directory `rollouts`, or the lines of `file`, in order.

    file: .jsonl, .json or .parquet rows with "text", or with "prompt" and "response", of which the response is learned;
    any other file is a text a line. max_tokens: what is longer is cut. Texts without a token to draft are left out.
    Raises ValueError unless exactly one source is given, for a line that is neither, and where nothing is left.
    """
    if (rollouts is None) == (file is None):
        raise ValueError("draft: give either rollouts=RUN_DIRECTORY or texts=FILE")
    found = _of_run(rollouts) if rollouts is not None else _of_file(Path(file), model)
    cut = [DraftText(text.token_ids[:max_tokens], text.num_prompt) for text in found]
    texts = [text for text in cut if any(text.loss_mask[2:])]
    if len(texts) < 2:
        raise ValueError(f"draft: {rollouts or file} has {len(texts)} texts to learn from")
    return texts


def _of_run(path: str) -> Iterator[DraftText]:
    for step in rollout_steps(path):
        for sample in read_rollouts(path, step):
            prompt, response = sample["prompt_ids"], sample["response_ids"]
            yield DraftText((*prompt, *response), len(prompt))


def _of_file(path: Path, model: str) -> Iterator[DraftText]:
    tokenizer = load_tokenizer(model)
    if path.suffix.lower() not in READERS:
        for line in _lines(path):
            yield DraftText(tuple(tokenizer.encode(line, add_special_tokens=False)), 0)
        return
    for row in read_rows(path):
        if "text" in row.values:
            yield DraftText(tuple(tokenizer.encode(row.text("text", "text"), add_special_tokens=False)), 0)
        elif "prompt" in row.values and "response" in row.values:
            prompt = tokenizer.encode(row.text("prompt", "prompt"), add_special_tokens=False)
            response = encode_response(tokenizer, row.text("response", "response"))
            yield DraftText((*prompt, *response), len(prompt))
        else:
            row.fail('has neither a column "text" nor "prompt" and "response"')


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise ValueError(f"draft: no file {path}")
    try:
        return path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"cannot read {path}: byte {error.start + 1} is not UTF-8; save it as UTF-8") from None
