"""What an exported model gets beside its weights: the template it was trained with, its ends, a place on the hub."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from lockstep.engine.files import write_whole
from lockstep.engine.text.chat_template import templates
from lockstep.engine.text.config import ChatConfig
from lockstep.engine.text.end_of_turn import end_of_turn
from lockstep.engine.text.tokenizer import Tokenizer
from lockstep.rollout.tokenizer import load_tokenizer


def complete_export(path: Path, chat: ChatConfig) -> Tokenizer:
    """Makes an exported directory say how its model was trained. Returns its tokenizer.

    A template of the run's own becomes the model's, and the end of turn that the model was taught stands in its
    generation_config.json, so that other programs stop there too.
    """
    tokenizer = load_tokenizer(path, chat)
    if (chat.template is not None or chat.without_template == "plain") and isinstance(tokenizer.chat_template, str):
        write_whole(path / "chat_template.jinja", tokenizer.chat_template)
    if templates(tokenizer):
        try:
            end = end_of_turn(tokenizer).token_id
        except ValueError:
            return tokenizer  # a reward model's conversations need not end in a token
        _name_end(path, end)
    return tokenizer


def push(path: Path, repo: str) -> str:
    """Uploads a model's directory to a private repository of the hub. Returns its address, or why it is not there.

    Raises nothing: the run has ended, and its model is whole on this machine.
    """
    from huggingface_hub import HfApi

    try:
        address = HfApi().create_repo(repo, private=True, exist_ok=True)
        HfApi().upload_folder(repo_id=repo, folder_path=path)
        return str(address)
    except Exception as error:  # of the network, the hub, the disk; none may lose what the run has made
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        text = f"not pushed to {repo}: {reason}; the model is in {path}, and `hf upload {repo} {path}` pushes it later"
        Console(stderr=True, highlight=False).print(text, markup=False, soft_wrap=True)
        return text


def _name_end(path: Path, end: int) -> None:
    """Adds a token to the eos_token_id of generation_config.json, where it is not there yet."""
    file, config = path / "generation_config.json", json.loads((path / "config.json").read_text(encoding="utf-8"))
    known = ("bos_token_id", "eos_token_id", "pad_token_id")
    generation = {name: config[name] for name in known if config.get(name) is not None}
    if file.exists():
        generation = json.loads(file.read_text(encoding="utf-8"))
    ends = generation.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if end not in ends:
        generation["eos_token_id"] = [*ends, end] if ends else end
        write_whole(file, json.dumps(generation, indent=2) + "\n")
