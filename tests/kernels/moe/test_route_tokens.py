"""Routing against transformers' routers and the plain formula, its gradient, ties, and the independence of rows."""

import pytest
import torch
from transformers import DeepseekV2Config, DeepseekV3Config, Qwen3MoeConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from lockstep.kernels.linear.linear import linear
from lockstep.kernels.moe.route_tokens import _route_triton, route_tokens, route_tokens_reference

NUM_TOKENS, HIDDEN, EXPERTS = 40, 48, 24
OPTIONS = {
    "plain": {"top_k": 3},
    "normalized, scaled": {"top_k": 4, "normalize": True, "scale": 2.5},
    "best one": {"top_k": 1},
    "all": {"top_k": EXPERTS, "normalize": True},
    "groups by maximum": {"top_k": 3, "num_groups": 4, "top_groups": 2, "scale": 16.0},
    "sigmoid": {"top_k": 3, "scoring": "sigmoid"},
    "sigmoid, bias, groups of top 2": {
        "top_k": 4,
        "scoring": "sigmoid",
        "expert_bias": True,
        "num_groups": 6,
        "top_groups": 3,
        "group_score": "sum_of_top_2",
        "normalize": True,
        "scale": 2.5,
    },
}


def _random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _options(case):
    options = dict(OPTIONS[case])
    if options.get("expert_bias"):
        options["expert_bias"] = 0.2 * _random(EXPERTS, seed=9)
    return options


def _by_hand(logits, options):
    """As _route_triton takes its options, by position; on the GPU where there is one, else in the interpreter."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bias = options.get("expert_bias")
    results = _route_triton(
        logits.to(device),
        bias if bias is None else bias.to(device),
        options["top_k"],
        options.get("scoring") == "sigmoid",
        options.get("num_groups", 1),
        options.get("top_groups", 1),
        options.get("group_score") == "sum_of_top_2",
        options.get("normalize", False),
        options.get("scale", 1.0),
    )
    return tuple(result.to(logits.device) for result in results)


@pytest.mark.parametrize("case", OPTIONS)
def test_equals_the_formula_in_fp64(case):
    options, logits = _options(case), 2 * _random(NUM_TOKENS, EXPERTS)
    expert_ids, weights = route_tokens_reference(logits.double(), **options)
    for ours in (route_tokens(logits, **options), _by_hand(logits, options)):
        assert torch.equal(ours[0], expert_ids)
        assert ours[1].dtype == torch.float32
        torch.testing.assert_close(ours[1].double(), weights, rtol=1e-5, atol=1e-7)
    assert (expert_ids.diff() > 0).all(), "ascending and distinct"


@pytest.mark.parametrize("case", OPTIONS)
def test_gradient_matches_fp64(case):
    options, logits = _options(case), 2 * _random(NUM_TOKENS, EXPERTS)
    ours, oracle = logits.clone().requires_grad_(), logits.double().requires_grad_()
    dweights = _random(NUM_TOKENS, options["top_k"], seed=1)
    route_tokens(ours, **options)[1].backward(dweights)
    route_tokens_reference(oracle, **options)[1].backward(dweights.double())
    torch.testing.assert_close(ours.grad.double(), oracle.grad, rtol=1e-4, atol=1e-6)


def _sorted_by_id(expert_ids, weights):
    order = expert_ids.argsort(1)
    return expert_ids.gather(1, order), weights.gather(1, order)


def _router(kind):
    """(transformers' router, our options)."""
    shape = {"hidden_size": HIDDEN, "num_experts_per_tok": 4, "num_attention_heads": 4}
    if kind.startswith("qwen3"):
        normalize = kind.endswith("normalized")
        config = Qwen3MoeConfig(**shape, num_experts=EXPERTS, norm_topk_prob=normalize)
        return Qwen3MoeTopKRouter(config), {"normalize": normalize}
    deepseek = {**shape, "n_routed_experts": EXPERTS, "routed_scaling_factor": 2.5}
    if kind == "deepseek v2":
        return DeepseekV2TopkRouter(DeepseekV2Config(**deepseek, topk_method="greedy")), {"scale": 2.5}
    if kind == "deepseek v2, groups":
        config = DeepseekV2Config(**deepseek, topk_method="group_limited_greedy", n_group=6, topk_group=2)
        return DeepseekV2TopkRouter(config), {"scale": 2.5, "num_groups": 6, "top_groups": 2}
    config = DeepseekV3Config(**deepseek, n_group=6, topk_group=2, norm_topk_prob=True)
    router = DeepseekV3TopkRouter(config)
    router.e_score_correction_bias.copy_(0.2 * _random(EXPERTS, seed=9))
    options = {"scoring": "sigmoid", "expert_bias": router.e_score_correction_bias, "normalize": True, "scale": 2.5}
    return router, {**options, "num_groups": 6, "top_groups": 2, "group_score": "sum_of_top_2"}


@pytest.mark.parametrize(
    "kind", ["qwen3", "qwen3, normalized", "deepseek v2", "deepseek v2, groups", "deepseek v3, groups and bias"]
)
def test_equals_transformers_routers(kind):
    router, options = _router(kind)
    x, weight = _random(300, HIDDEN), _random(EXPERTS, HIDDEN, seed=1) / HIDDEN**0.5
    with torch.no_grad():
        router.weight.copy_(weight)
        _, their_weights, their_ids = router(x)
    their_ids, their_weights = _sorted_by_id(their_ids, their_weights)
    expert_ids, weights = route_tokens(linear(x, weight), 4, **options)
    assert torch.equal(expert_ids, their_ids)
    torch.testing.assert_close(weights, their_weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("route", [lambda logits, options: route_tokens(logits, **options), _by_hand])
def test_equal_choices_go_to_the_lower_id(case, route):
    options = {**_options(case), "expert_bias": None}
    expert_ids, weights = route(torch.zeros(3, EXPERTS), options)
    assert torch.equal(expert_ids, torch.arange(options["top_k"]).expand(3, -1))
    assert weights.isfinite().all()
    # Two values only, so that every choice is among equals.
    logits = torch.randint(0, 2, (50, EXPERTS), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(route(logits, options)[0], route_tokens_reference(logits, **options)[0])


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("route", [lambda logits, options: route_tokens(logits, **options), _by_hand])
def test_rows_are_independent_and_a_row_of_nan_gets_valid_experts(case, route):
    options, logits = _options(case), 2 * _random(NUM_TOKENS, EXPERTS)
    expected = route(logits, options)
    rows = torch.randperm(NUM_TOKENS, generator=torch.Generator().manual_seed(1))[:21]
    assert all(
        torch.equal(part, whole[rows]) for part, whole in zip(route(logits[rows], options), expected, strict=True)
    )
    logits[7] = torch.nan
    expert_ids, weights = route(logits, options)
    assert expert_ids[7].min() >= 0
    assert expert_ids[7].max() < EXPERTS
    assert (expert_ids[7].diff() > 0).all()
    assert weights[7].isnan().all()
    others = torch.arange(NUM_TOKENS) != 7
    assert torch.equal(expert_ids[others], expected[0][others])
    assert torch.equal(weights[others], expected[1][others])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"top_k": 25}, "top_k = 25"),
        ({"top_k": 2, "num_groups": 5}, "num_groups = 5"),
        ({"top_k": 2, "num_groups": 4, "top_groups": 5}, "top_groups = 5"),
        ({"top_k": 7, "num_groups": 4, "top_groups": 1}, "6 experts are eligible"),
        ({"top_k": 2, "scoring": "relu"}, "relu"),
        ({"top_k": 2, "group_score": "mean"}, "mean"),
        ({"top_k": 2, "num_groups": 24, "top_groups": 2, "group_score": "sum_of_top_2"}, "groups of two"),
    ],
)
def test_impossible_options_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        route_tokens(torch.zeros(1, EXPERTS), **options)
    with pytest.raises(ValueError, match="bfloat16"):
        route_tokens(torch.zeros(1, EXPERTS, dtype=torch.bfloat16), 1)
