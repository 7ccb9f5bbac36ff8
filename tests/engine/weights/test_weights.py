"""Promise 4: weights change in place, all or nothing, under a version, also while requests run."""

import pytest
import torch
from models import make_hf_model

from lockstep.engine import Engine, EngineConfig, SamplingParams
from lockstep.engine.weights.checksums import checksum
from lockstep.kernels.reductions import content_hash

PROMPT = list(range(1, 40))
NORM = "decoder.final_layernorm.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two directories with the same architecture and other weights."""
    paths = [tmp_path_factory.mktemp(f"model{seed}") for seed in (1, 2)]
    for seed, path in zip((1, 2), paths, strict=True):
        make_hf_model(path, "qwen3", seed=seed)
    return [str(path) for path in paths]


def engine_of(path: str, **settings) -> Engine:
    return Engine(EngineConfig(model=path, **settings))


def weights_of(path: str) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in engine_of(path).weight_targets.items()}


def generate(engine: Engine, **params):
    return engine.generate([PROMPT], SamplingParams(max_tokens=20, seed=5, ignore_eos=True, **params))[0]


def test_an_updated_engine_is_the_other_engine_in_the_same_tensors(models):
    engine, other = engine_of(models[0]), engine_of(models[1])
    before = generate(engine)
    addresses = {name: tensor.data_ptr() for name, tensor in engine.weight_targets.items()}
    report = engine.update_weights(weights_of(models[1]).items(), version=3)
    after = generate(engine)
    expected = generate(other)
    assert (after.token_ids, after.logprobs) == (expected.token_ids, expected.logprobs)
    assert after.token_ids != before.token_ids
    assert set(before.weight_versions) == {0}
    assert set(after.weight_versions) == {3}
    assert {name: tensor.data_ptr() for name, tensor in engine.weight_targets.items()} == addresses
    assert report["version"] == 3


def test_new_requests_never_match_kv_of_another_version(models):
    engine = engine_of(models[0])
    generate(engine)
    assert generate(engine).num_cached_tokens > 0
    engine.update_weights(weights_of(models[1]).items(), version=1)
    assert generate(engine).num_cached_tokens == 0


BROKEN = {
    "missing": (lambda w: w.pop("decoder.final_layernorm.weight"), "lacks 1 tensors.*final_layernorm"),
    "unknown": (lambda w: w.update({"decoder.extra": torch.zeros(1)}), "unknown tensor 'decoder.extra'"),
    "shape": (lambda w: w.update({"output_layer.weight": torch.zeros(3, 3)}), r"output_layer.weight.*shape \(3, 3\)"),
    "dtype": (lambda w: w.update({"output_layer.weight": w["output_layer.weight"].double()}), "float64"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_bad_update_names_the_tensor_and_leaves_the_old_version_serving(models, name):
    engine = engine_of(models[0], enable_prefix_cache=False)
    before = generate(engine)
    update = weights_of(models[1])
    breaks, message = BROKEN[name]
    breaks(update)
    with pytest.raises(ValueError, match=message):
        engine.update_weights(update.items(), version=1)
    after = generate(engine)
    assert (after.token_ids, after.logprobs) == (before.token_ids, before.logprobs)
    assert engine.weight_version == 0


def test_a_sender_that_dies_leaves_the_old_version_serving(models):
    engine = engine_of(models[0], enable_prefix_cache=False)
    before = generate(engine)

    def dying():
        yield from list(weights_of(models[1]).items())[:3]
        raise ConnectionError("sender died")

    with pytest.raises(ConnectionError, match="sender died"):
        engine.update_weights(dying(), version=1)
    assert generate(engine).logprobs == before.logprobs


def test_versions_must_grow(models):
    engine = engine_of(models[0])
    with pytest.raises(ValueError, match="must grow: 0 after 0"):
        engine.update_weights(weights_of(models[1]).items(), version=0)
    with pytest.raises(ValueError, match="'pause'"):
        engine.update_weights(weights_of(models[1]).items(), version=1, inflight="pause")


def run_across_an_update(models, inflight: str):
    """A request of which 8 tokens are drawn before an update and the rest after it."""
    engine = engine_of(models[0])
    (request,) = engine.submit([PROMPT], SamplingParams(max_tokens=20, seed=5, ignore_eos=True))
    while len(request.logprobs) < 8:
        engine.step()
    engine.update_weights(weights_of(models[1]).items(), version=1, inflight=inflight)
    while request.finish_reason is None:
        engine.step()
    return request


def test_keep_goes_on_and_records_the_version_of_each_token(models):
    request = run_across_an_update(models, "keep")
    assert request.weight_versions == [0] * 8 + [1] * 12
    assert request.logprobs[:8] == generate(engine_of(models[0])).logprobs[:8]


def test_recompute_continues_as_if_the_new_weights_had_read_the_whole_prefix(models):
    request = run_across_an_update(models, "recompute")
    assert request.weight_versions == [0] * 8 + [1] * 12
    scored = engine_of(models[1]).score([request.tokens])[0]
    assert request.logprobs[8:] == scored[len(PROMPT) + 8 :]


def test_abort_ends_running_requests_with_what_they_have(models):
    request = run_across_an_update(models, "abort")
    assert request.finish_reason == "abort"
    assert len(request.logprobs) == 8


def test_kv_of_a_request_that_was_kept_is_never_shared(models):
    engine = engine_of(models[0])
    (request,) = engine.submit([PROMPT], SamplingParams(max_tokens=60, seed=5, ignore_eos=True))
    while len(request.logprobs) < 8:
        engine.step()
    engine.update_weights(weights_of(models[1]).items(), version=1, inflight="keep")
    while request.finish_reason is None:
        engine.step()
    params = SamplingParams(max_tokens=5, seed=1, ignore_eos=True)
    (output,) = engine.generate([request.tokens], params)
    (expected,) = engine_of(models[1]).generate([request.tokens], params)
    assert output.logprobs == expected.logprobs


# An update that arrives beside the serving weights --------------------------------------------------------------------


def fill(update, tensors):
    for name, tensor in tensors.items():
        update.tensors[name].copy_(tensor)
        update.received(name, tensor.numel())


def test_requests_run_on_while_an_update_arrives_and_pause_only_for_the_flip(models):
    engine, other = engine_of(models[0]), engine_of(models[1])
    (request,) = engine.submit([PROMPT], SamplingParams(max_tokens=30, seed=5, ignore_eos=True))
    new = weights_of(models[1])
    update = engine.begin_update(1)
    for name, tensor in new.items():  # each tensor's arrival is followed by a step
        fill(update, {name: tensor})
        if len(request.output_ids) < 10:
            engine.step()
    before = list(request.output_ids)
    assert len(before) == 10
    engine.commit_update(update, inflight="recompute")
    while request.finish_reason is None:
        engine.step()
    output = engine.output(request)
    assert output.token_ids[:10] == before
    assert output.weight_versions == [0] * 10 + [1] * 20
    # What follows is what the new weights alone say after the same tokens.
    expected = other.score([output.prompt_ids + output.token_ids])[0][len(PROMPT) + 10 :]
    assert output.logprobs[10:] == expected
    assert checksum(engine.weight_targets.items()) == checksum(new.items())


@pytest.mark.parametrize("in_slices", [False, True])
def test_a_partial_update_leaves_the_rest_as_it_is_served(models, in_slices):
    engine = engine_of(models[0])
    old, new = weights_of(models[0]), weights_of(models[1])
    some = {name: tensor for name, tensor in new.items() if "layers.1" in name}
    generate(engine)
    if in_slices:
        update = engine.begin_update(1, partial=True)
        fill(update, some)
        report = engine.commit_update(update)
    else:
        report = engine.update_weights(some.items(), version=1, partial=True)
    served = checksum({**old, **some}.items())
    assert report["checksum"] == engine.checksum() == checksum(engine.weight_targets.items()) == served
    assert report["received_checksum"] == checksum(some.items())
    assert report["received"] == {name: report["served"][name] for name in some}
    mixed = engine_of(models[1])
    mixed.update_weights({**old, **some}.items(), version=1)
    after, expected = generate(engine), generate(mixed)
    assert (after.token_ids, after.logprobs) == (expected.token_ids, expected.logprobs)
    assert after.num_cached_tokens == 0


def test_what_an_update_collects_is_a_result_of_the_next_step(models):
    engine = engine_of(models[0])
    engine.overlaps = True  # as on a GPU: a pass is in flight between two steps
    (request,) = engine.submit([PROMPT], SamplingParams(max_tokens=3, seed=5, ignore_eos=True))
    while len(request.logprobs) < 2:
        engine.step()
    engine.update_weights(weights_of(models[0]).items(), version=1)
    assert request.finish_reason == "length", "the pass in flight was its last"
    assert engine.step() == [request]
    assert engine.step() == []


def test_an_incomplete_or_overfull_update_is_refused_and_the_old_version_serves(models):
    engine = engine_of(models[0], enable_prefix_cache=False)
    before = generate(engine)
    new = weights_of(models[1])
    update = engine.begin_update(1)
    lacking = dict(new)
    del lacking["decoder.final_layernorm.weight"]
    fill(update, lacking)
    with pytest.raises(ValueError, match=r"64 elements of decoder.final_layernorm.weight are missing"):
        engine.commit_update(update)
    with pytest.raises(ValueError, match=r"output_layer.weight was sent 1 elements too many"):
        update.received("output_layer.weight", 1)
    after = generate(engine)
    assert (after.token_ids, after.logprobs, after.weight_versions) == (
        before.token_ids,
        before.logprobs,
        before.weight_versions,
    )
    with pytest.raises(ValueError, match="must grow"):
        engine.begin_update(0)


def test_bytes_that_change_between_reading_and_serving_are_noticed(models, monkeypatch):
    engine = engine_of(models[0])
    copy = content_hash._copy_each

    def slip(sources, targets):
        copy(sources, targets)
        next(target for target in targets if target is engine.weight_targets[NORM])[3] += 1

    monkeypatch.setattr(content_hash, "_copy_each", slip)
    with pytest.raises(RuntimeError, match=f"differ from those sent: {NORM}"):
        engine.update_weights(weights_of(models[1]).items(), version=1)


def test_an_engine_sleeps_without_kv_memory_takes_weights_and_wakes_to_the_same_bits(models):
    engine, other = engine_of(models[0]), engine_of(models[1])
    generate(engine)
    (request,) = engine.submit([PROMPT], SamplingParams(max_tokens=5))
    with pytest.raises(RuntimeError, match="unfinished requests cannot sleep"):
        engine.sleep()
    engine.abort(request)
    engine.sleep()
    assert engine.runner.target.kv_caches == []
    with pytest.raises(RuntimeError, match="asleep"):
        generate(engine)
    engine.update_weights(weights_of(models[1]).items(), version=1)
    engine.wake()
    after, expected = generate(engine), generate(other)
    assert (after.token_ids, after.logprobs) == (expected.token_ids, expected.logprobs)
    assert after.num_cached_tokens == 0
