"""The promises on a pretrained model, whose activations have the outliers that random weights lack, and real text."""

import functools
import json

import pytest
import torch
from real_model import MODEL, WHY_NOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from lockstep.engine import Engine, EngineConfig, SamplingParams
from lockstep.trainer_bridge import MegatronTrainer, TrainerConfig, publish
from lockstep.trainer_bridge.algorithms.losses import grpo_loss
from lockstep.trainer_bridge.packing import TrainSequence, pack

pytestmark = pytest.mark.skipif(not MODEL.is_dir(), reason=WHY_NOT)

QUESTIONS = [
    "What is 17 + 25?",
    "Écris une phrase sur la mer.",
    "def fibonacci(n):\n    # complete this function\n",
    "日本の首都はどこですか。🙂",
    "List three animals as JSON.",
]


@pytest.fixture(scope="module")
def prompts():
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    conversations = [[{"role": "user", "content": question}] for question in QUESTIONS]
    texts = [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in conversations]
    return [tokenizer.encode(text, add_special_tokens=False) for text in texts]


@pytest.fixture(scope="module")
def engine():
    return Engine(EngineConfig(model=str(MODEL), kv_cache_tokens=4096))


def test_it_stops_where_its_template_ends_a_turn(engine, prompts):
    stop = json.loads((MODEL / "generation_config.json").read_text())["eos_token_id"]
    (output,) = engine.generate([prompts[0]], SamplingParams(max_tokens=64, temperature=0.0))
    assert output.finish_reason == "stop"
    assert output.token_ids[-1] == stop
    assert output.text.startswith("17 + 25 = ")  # and then a wrong number: it is a small model


def test_log_probs_are_near_those_of_transformers(engine, prompts):
    """fp32 products in another order: at most 5.7e-5 was measured on seven languages, code, emoji and 8k tokens."""
    model = AutoModelForCausalLM.from_pretrained(MODEL).eval()
    scored = engine.score(prompts)
    for prompt, ours in zip(prompts, scored, strict=True):
        with torch.inference_mode():
            theirs = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        wanted = theirs[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
        assert torch.tensor(ours[1:]) == pytest.approx(wanted, abs=2e-4)


def test_batch_alone_score_and_trainer_agree_before_and_after_an_update(engine, prompts):
    params = [SamplingParams(max_tokens=16, temperature=t, seed=s) for s, t in enumerate([1.0, 1.0, 0.7, 0.0, 1.3])]
    together = engine.generate(prompts, params)
    alone = [engine.generate([prompt], p)[0] for prompt, p in zip(prompts, params, strict=True)]
    assert [o.token_ids for o in together] == [o.token_ids for o in alone]
    assert [o.logprobs for o in together] == [o.logprobs for o in alone]

    trainer = MegatronTrainer(TrainerConfig(model=str(MODEL), learning_rate=1e-4, max_tokens_per_micro_batch=512))
    sequences = [output.prompt_ids + output.token_ids for output in together]
    before = engine.score(sequences)
    assert trainer.logprobs(sequences) == before
    assert before[0][len(prompts[0]) :] == together[0].logprobs

    batch = [
        TrainSequence(
            token_ids=sequence,
            loss_mask=[False] * len(prompt) + [True] * (len(sequence) - len(prompt)),
            advantage=1.0,
            logprobs=output.logprobs,
        )
        for sequence, prompt, output in zip(sequences[:2], prompts[:2], together[:2], strict=True)
    ]
    stats = trainer.step(pack(batch, 512), functools.partial(grpo_loss, clip_low=0.2, clip_high=0.2))
    assert stats["logprob_diff_max"] == 0.0
    publish(trainer, engine, version=1)
    after = engine.score(sequences)
    assert after != before
    assert trainer.logprobs(sequences) == after
