"""Draft training and capture on a GPU: gradients against fp32, equal bits each time, captured states as served."""

import pytest
import torch

from lockstep.engine import SamplingParams
from lockstep.engine.models.config import load_model_config
from lockstep.engine.models.eagle3 import Eagle3Config, Eagle3Draft, default_aux_layers, initialize
from lockstep.engine.steps.capture import CaptureConfig
from lockstep.kernels.attention.chain_attention import chain_attention, chain_attention_reference
from lockstep.trainer_bridge.drafts.config import DraftTrainerConfig
from lockstep.trainer_bridge.drafts.draft_batch import DraftSequence
from lockstep.trainer_bridge.drafts.draft_loss import LOSSES
from lockstep.trainer_bridge.drafts.draft_trainer import DraftTrainer

pytestmark = pytest.mark.gpu


def test_chain_attention_is_that_of_the_dense_form(setup):
    lengths, steps = (130, 1, 257), 3
    cu_seqlens = torch.tensor([0, *lengths], device=setup.device).cumsum(0).int()
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, setup.dtype)
    tensors = [
        torch.randn(sum(lengths), heads, 64, generator=generator).to(setup.device, dtype).requires_grad_()
        for heads in (8, *[2] * (2 * steps))
    ]
    out = chain_attention(tensors[0], tensors[1 : steps + 1], tensors[steps + 1 :], cu_seqlens, 0.125)
    grad = torch.randn(out.shape, generator=generator).to(out)
    found = torch.autograd.grad(out, tensors, grad)
    wide = [tensor.detach().float().requires_grad_() for tensor in tensors]
    expected = chain_attention_reference(wide[0], wide[1 : steps + 1], wide[steps + 1 :], cu_seqlens, 0.125)
    expected_grads = torch.autograd.grad(expected, wide, grad.float())
    # bf16 has eight bits: a few roundings of values of this size
    torch.testing.assert_close(out.float(), expected, rtol=0.02, atol=0.02)
    for got, want in zip(found, expected_grads, strict=True):
        torch.testing.assert_close(got.float(), want, rtol=0.05, atol=0.05)


def train(setup, loss, num_updates=2):
    target = load_model_config(setup.path)
    hidden, dtype = target.hidden_size, getattr(torch, setup.dtype)
    generator = torch.Generator().manual_seed(1)
    embedding = torch.randn(target.vocab_size, hidden, generator=generator).mul_(0.02).to(setup.device, dtype)
    draft = Eagle3Draft(Eagle3Config.of_target(target, min(32000, target.vocab_size)), embedding, dtype)
    initialize(draft, seed=2)
    trainer = DraftTrainer(DraftTrainerConfig(loss=loss, num_steps=3), draft, embedding)
    lengths = (300, 64, 129)
    tokens = torch.randint(target.vocab_size, (sum(lengths),), generator=generator).split(lengths)
    states = torch.randn(sum(lengths), 4 * hidden, generator=generator).to(dtype).split(lengths)
    sequences = [
        DraftSequence(t.tolist(), [True] * len(t), s[:-1, : 3 * hidden], s[:-1, 3 * hidden :])
        for t, s in zip(tokens, states, strict=True)
    ]
    losses = [trainer.step(sequences)["loss"] for _ in range(num_updates)]
    return losses, trainer.weights_hash()


@pytest.mark.parametrize("loss", LOSSES)
def test_training_repeats_to_the_bit(setup, loss):
    losses, digest = train(setup, loss)
    assert losses[1] < losses[0]
    assert train(setup, loss) == (losses, digest)


def test_captured_states_are_those_of_a_prefill(setup, workload):
    part = workload.first(64)
    with setup.engine() as engine:
        expected = engine.generate(part.prompts, part.params)
    with setup.engine() as engine:
        layers = default_aux_layers(engine.model_config.num_layers)
        capture = engine.start_capture(CaptureConfig(layers))
        outputs = engine.generate(part.prompts, part.params)
        assert [(o.token_ids, o.logprobs) for o in outputs] == [(o.token_ids, o.logprobs) for o in expected]
        decoded = {tuple(sequence.token_ids): sequence.states for sequence in capture.take()}
        engine.generate([list(text[:-1]) for text in decoded if len(text) > 1], SamplingParams(max_tokens=1))
        prefilled = {tuple(s.token_ids[: s.num_prompt]): s.states for s in capture.take()}
    for text, states in decoded.items():
        assert torch.equal(states, prefilled[text[:-1]])
