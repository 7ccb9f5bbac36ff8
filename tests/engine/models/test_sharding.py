"""Which rank holds what: every element once, in the places that loading, updates and checksums agree on."""

import threading

import pytest
import torch
from models import EXPERTS, make_hf_model, tiny_config
from safetensors.torch import save_file

from lockstep.engine.checkpoints.checkpoint import iterate_weights
from lockstep.engine.models.config import load_model_config, parse_model_config
from lockstep.engine.models.decoder import Decoder
from lockstep.engine.models.layers.shard import Shard
from lockstep.engine.models.names import expand
from lockstep.engine.models.sharding import check_divides, check_expert_ranks, parameter_shards, shard_config, slices
from lockstep.engine.ranks.rank_group import RankGroup, RankGroupError
from lockstep.engine.ranks.rank_weights import RankWeights
from lockstep.engine.weights import checksums
from lockstep.engine.weights.dummy_weights import initialize_dummy
from lockstep.kernels.linear.linear import linear
from lockstep.kernels.linear.row_parallel_linear import row_parallel_linear

BIASED = {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True, "num_hidden_layers": 1}


def whole_weights(config) -> dict[str, torch.Tensor]:
    model = Decoder(config, "cpu", torch.float32)
    initialize_dummy(model, seed=3)
    return dict(model.named_parameters())


def config_of(**overrides):
    return parse_model_config(tiny_config("llama", **{**BIASED, **overrides}).to_dict())


def on_threads(size: int, function, directory, timeout_s: float = 20.0) -> list:
    """function(RankGroup) as each of `size` connected ranks, in threads of this process; their results or errors."""
    results = [None] * size

    def run(rank):
        group = RankGroup(rank, size)
        try:
            group.connect(directory, torch.device("cpu"), timeout_s)
            results[rank] = function(group)
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return results


MODELS = {
    "llama": ("llama", BIASED),
    "qwen3_moe": ("qwen3_moe", {"num_key_value_heads": 4, "num_experts": 8, "num_hidden_layers": 2}),
    "deepseek_v3": ("deepseek_v3", {**EXPERTS, "num_hidden_layers": 2}),
}


@pytest.mark.parametrize(("size", "expert_ranks"), [(1, 1), (2, 1), (2, 2), (4, 4)])
@pytest.mark.parametrize("name", MODELS)
def test_the_pieces_of_all_ranks_cover_every_element_once(name, size, expert_ranks):
    family, overrides = MODELS[name]
    config = parse_model_config({**tiny_config(family, **overrides).to_dict(), "model_type": family})
    ranks = [parameter_shards(config, Shard(rank, size, expert_ranks)) for rank in range(size)]
    for entry, *held in zip(expand(config), *ranks, strict=True):
        counts = torch.zeros(entry.shape)
        for shard in held:
            assert (shard.name, shard.whole_shape) == (entry.megatron, entry.shape)
            local = torch.zeros(shard.local_shape)
            for piece in shard.pieces:
                counts[slices(piece.whole)] += 1
                local[slices(piece.local)] += 1
            assert (local == 1).all()
        assert (counts == (1 if held[0].is_split else size)).all()
        is_shared_out = expert_ranks > 1 if entry.expert_dim == 0 else entry.shard_dim is not None
        assert held[0].is_split == (size > 1 and is_shared_out)


@pytest.mark.parametrize("stacked", [False, True])  # transformers' names for experts in files, or in memory
@pytest.mark.parametrize(
    ("family", "overrides", "expert_ranks"),
    [
        ("qwen3", {"attention_bias": True}, 1),
        ("qwen3_moe", {}, 1),
        ("qwen3_moe", {}, 2),
        ("deepseek_v3", EXPERTS, 2),
    ],
)
def test_a_rank_reads_from_files_what_the_pieces_say(tmp_path, family, overrides, expert_ranks, stacked):
    model = make_hf_model(tmp_path, family, seed=1, **overrides)
    if stacked:
        save_file(dict(model.state_dict()), tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = load_model_config(tmp_path)
    wholes = dict(iterate_weights(tmp_path, config))
    for rank in range(2):
        shard = Shard(rank, 2, expert_ranks)
        model = Decoder(config, "cpu", torch.float32, 2, RankGroup(rank, 2), expert_ranks > 1)
        assert {n: p.shape for n, p in model.named_parameters()} == {
            s.name: torch.Size(s.local_shape) for s in parameter_shards(config, shard)
        }
        read = dict(iterate_weights(tmp_path, config, shard=shard))
        for held in parameter_shards(config, shard):
            expected = torch.empty(held.local_shape)
            held.copy_from_whole(expected, wholes[held.name])
            assert torch.equal(read[held.name], expected), held.name
            assert (
                family != "qwen3"
                or held.name != "decoder.layers.0.mlp.linear_fc1.weight"
                or torch.equal(read[held.name], wholes[held.name].view(2, 2, 48, 64)[:, rank].reshape(96, 64))
            )


def test_dummy_weights_are_parts_of_the_whole_ones():
    config = config_of()
    wholes = whole_weights(config)
    for rank in range(2):
        shards = parameter_shards(config, Shard(rank, 2))
        model = Decoder(config, "cpu", torch.float32, 2, RankGroup(rank, 2))
        initialize_dummy(model, 3, shards)
        parameters = dict(model.named_parameters())
        for held in shards:
            expected = torch.empty(held.local_shape)
            held.copy_from_whole(expected, wholes[held.name])
            assert torch.equal(parameters[held.name], expected), held.name


@pytest.mark.parametrize(
    ("overrides", "tp_size", "splits", "message"),
    [
        ({}, 2, 1, "tp_size=2 must be at least 1 and divide row_parallel_splits=1"),
        ({}, 0, 1, "tp_size=0"),
        ({}, 1, 3, "power of two, got 3"),
        ({}, 8, 8, "num_key_value_heads = 4"),
        ({"intermediate_size": 90}, 2, 4, "row_parallel_splits=4 does not divide the model's intermediate_size = 90"),
        ({"vocab_size": 5}, 4, 4, "without a part of vocab_size = 5"),
    ],
)
def test_what_cannot_be_shared_out_is_refused_by_name(overrides, tp_size, splits, message):
    with pytest.raises(ValueError, match=message):
        check_divides(config_of(**overrides), tp_size, splits)


@pytest.mark.parametrize(
    ("expert_ranks", "tp_size", "overrides", "message"),
    [
        (2, 1, {}, r"ep_size=2 must be 1 \(every rank holds all experts\) or tp_size=1"),
        (2, 4, {}, "ep_size=2 must be 1 .* or tp_size=4"),
        (4, 4, {"num_experts": 6}, "ep_size=4 does not divide the model's 6 experts"),
    ],
)
def test_ranks_that_cannot_share_the_experts_are_refused_by_name(expert_ranks, tp_size, overrides, message):
    config = parse_model_config(tiny_config("qwen3_moe", **overrides).to_dict())
    with pytest.raises(ValueError, match=message):
        check_expert_ranks(config, "ep_size", expert_ranks, "tp_size", tp_size)
    with pytest.raises(ValueError, match="ep_size=2 does not divide the model's 0 experts"):
        check_expert_ranks(config_of(), "ep_size", 2, "tp_size", 2)


def test_an_odd_vocabulary_leaves_the_last_rank_less():
    assert [Shard(rank, 2).part_of(131) for rank in range(2)] == [slice(0, 66), slice(66, 131)]
    assert shard_config(config_of(), Shard(1, 2)).vocab_size == 65


def test_four_ranks_sum_as_one_does_and_another_order_shows(tmp_path):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(9, 64, generator=generator), torch.randn(50, 64, generator=generator)
    parts = list(zip(x.split(16, 1), weight.split(16, 1), strict=True))

    def product(group: RankGroup) -> torch.Tensor:
        own_x, own_weight = parts[group.rank]
        return row_parallel_linear(own_x, own_weight.contiguous(), splits=1, sum_over_ranks=group.sum)

    expected = row_parallel_linear(x, weight, splits=4)
    assert all(torch.equal(result, expected) for result in on_threads(4, product, tmp_path))
    one_by_one = sum(linear(own_x, own_weight.contiguous()) for own_x, own_weight in parts)
    assert not torch.equal(one_by_one, expected)
    assert not torch.equal(row_parallel_linear(x, weight, splits=2), expected)


def test_disjoint_sums_keep_every_bit(tmp_path):
    values = torch.tensor([[-0.0, 1.5, float("nan")], [float("-inf"), -0.0, 3e-40]])

    def own_rows(group: RankGroup) -> torch.Tensor:
        mine = torch.zeros_like(values)
        mine[group.rank] = values[group.rank]
        return group.sum_disjoint(mine)

    for result in on_threads(2, own_rows, tmp_path):
        assert torch.equal(result.view(torch.int32), values.view(torch.int32))


@pytest.mark.parametrize("ffn", [96, 90])  # 90: the ranks' parts are no whole words of the hash
@pytest.mark.parametrize("damage", ["none", "split", "whole"])
def test_an_update_over_ranks_is_staged_verified_and_flipped(tmp_path, ffn, damage):
    config = config_of(intermediate_size=ffn)
    update = whole_weights(config)
    expected = checksums.hashes_by_name(update)
    damaged = {
        "none": None,
        "split": "decoder.layers.0.mlp.linear_fc2.weight",
        "whole": "decoder.final_layernorm.weight",
    }

    def rank(group: RankGroup):
        shards = parameter_shards(config, Shard(group.rank, group.size))
        targets = {held.name: torch.zeros(held.local_shape) for held in shards}
        held = RankWeights(config, group, targets)
        held.stage(range(len(shards)), None if group.rank else update)
        if group.rank == 1 and damage != "none":
            held._staged[damaged[damage]].view(-1)[5] += 1
        staged = held.hashes(of_staged=True)
        assert all(not tensor.any() for tensor in targets.values())
        held.flip()
        return staged, held.hashes(of_staged=False), targets, shards

    (staged, served, *_), *others = results = on_threads(2, rank, tmp_path)
    assert staged == served
    assert {name for name in expected if staged[name] != expected[name]} == {damaged[damage]} - {None}
    assert all(other[0] is None for other in others)
    for _, _, targets, shards in results[:1]:
        for held in shards:
            local = torch.empty(held.local_shape)
            held.copy_from_whole(local, update[held.name])
            assert torch.equal(targets[held.name], local)


def test_a_rank_that_stays_away_ends_the_wait_of_the_others(tmp_path):
    def one_stays_away(group: RankGroup) -> torch.Tensor | None:
        if group.rank:
            threading.Event().wait(2.0)  # connected, but silent
            return None
        return group.sum(torch.ones(3))

    waiting, _ = on_threads(2, one_stays_away, tmp_path, timeout_s=0.5)
    assert isinstance(waiting, RankGroupError)
