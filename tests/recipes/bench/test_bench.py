"""The benchmark's own arithmetic, tables and errors, and its suites at a size that a CPU does in seconds."""

import json
import os
import time
from dataclasses import replace

import pytest
import torch

from lockstep.engine.models.config import load_model_config
from lockstep.recipes.bench import decode_profile, own_process, rl_suite
from lockstep.recipes.bench.algorithms_suite import demo_config
from lockstep.recipes.bench.candidates import CANDIDATES, candidates, engine_config
from lockstep.recipes.bench.config import BenchConfig
from lockstep.recipes.bench.decode_profile import busy_us, draw_timeline, gpu_spans, kind_of, length_us, summary
from lockstep.recipes.bench.engine_suite import RECORDED, tokens_per_second
from lockstep.recipes.bench.flops import attention_pairs, forward_flops, matmul_parameters, training_flops
from lockstep.recipes.bench.kernels_suite import Sizes, cases
from lockstep.recipes.bench.publish_suite import _engine_config, _timed, measure
from lockstep.recipes.bench.publish_ways import Pair, PublishJob
from lockstep.recipes.bench.results import Column, Table
from lockstep.recipes.bench.shapes import write_model_directory
from lockstep.recipes.bench.stage import resolved, run
from lockstep.recipes.bench.workloads import CPU_WORKLOADS, ENGINE_WORKLOADS, Workload, chosen, draw, output_lengths


def test_the_drawn_lengths_are_fixed():
    lengths = output_lengths(1024)
    assert (sum(lengths), min(lengths), max(lengths)) == (666_751, 46, 2048)
    assert output_lengths(16) == lengths[:16]


def test_repeats_have_fresh_prompts_and_the_same_lengths():
    workload = ENGINE_WORKLOADS[2]
    first, second, again = (draw(workload, 1000, repeat, scale=0.05) for repeat in (0, 1, 0))
    assert first == again
    assert first.output_tokens == second.output_tokens
    assert not {tuple(prompt) for prompt in first.prompts} & {tuple(prompt) for prompt in second.prompts}
    assert len(first.prompts) == len(first.output_tokens) == 3 * 16
    assert first.prompts[0] == first.prompts[15] != first.prompts[16]
    assert {len(prompt) for prompt in first.prompts} == {26}


def test_workloads_have_the_documented_sizes():
    sizes = {}
    for workload in ENGINE_WORKLOADS:
        requests = draw(workload, 50, 1)
        sizes[workload.name] = (len(requests.prompts), sum(map(len, requests.prompts)), sum(requests.output_tokens))
    assert sizes == {
        "W1": (1, 128, 256),
        "W2": (64, 64 * 512, 64 * 512),
        "W3": (1024, 1024 * 512, 666_751),
        "W4": (32, 32 * 4096, 32),
        "W5": (256, 256 * 128, 256 * 256),
    }
    assert all(numbers.keys() == sizes.keys() for numbers in RECORDED.values())
    assert [w.name for w in chosen(ENGINE_WORKLOADS, ["W3", "W1"])] == ["W3", "W1"]
    with pytest.raises(ValueError, match="'W9'; this suite has C32, C128"):
        chosen(CPU_WORKLOADS, ["W9"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shape": "qwen3-9b"}, "unknown shape 'qwen3-9b'; known: qwen3-8b"),
        ({"repeats": 0}, "repeats must be at least 1, got 0"),
        ({"shape": "small", "model": "x"}, "not both"),
        ({"device": "cuda"}, "needs an NVIDIA GPU"),
    ],
)
def test_impossible_settings_are_named(settings, message, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        resolved(BenchConfig(**settings))


def test_the_suite_follows_the_machine(monkeypatch):
    for has_gpu, suite, device in ((False, "cpu", "cpu"), (True, "engine", "cuda")):
        monkeypatch.setattr("torch.cuda.is_available", lambda answer=has_gpu: answer)
        monkeypatch.setattr("torch.version.cuda", "13.0" if has_gpu else None)
        config = resolved(BenchConfig())
        assert (config.suite, config.device) == (suite, device)


def test_a_missing_peer_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the package vllm, which is not here: pip install vllm"):
        candidates("vllm-batch-invariant")
    with pytest.raises(ValueError, match=r"unknown peer 'tgi'; known: .*sglang"):
        candidates("tgi")


def test_unknown_engine_settings_are_named():
    config = BenchConfig(suite="engine", device="cpu", engine={"page_sise": 3})
    with pytest.raises(ValueError, match=r"engine\.page_sise is no field of EngineConfig"):
        engine_config("model", config)


def test_an_engine_that_generates_too_little_is_refused():
    workload = Workload("short", 1, 1, 4, 8)
    with pytest.raises(RuntimeError, match="short: 7 tokens were generated, not 8"):
        tokens_per_second(lambda requests, seed: 7, workload, draw(workload, 10, 0), 0)


# Processes -----------------------------------------------------------------------------------------------------------


def test_results_and_errors_cross_the_process_border():
    call = own_process.call_in_own_process
    assert call("sum", sum, [1, 2], 60) == 3
    with pytest.raises(ValueError, match="parse: invalid literal"):
        call("parse", int, "x", 60)
    with pytest.raises(RuntimeError, match=r"(?s)length failed:.*TypeError"):
        call("length", len, 3, 60)
    with pytest.raises(RuntimeError, match="leave: its process ended with exit code 3"):
        call("leave", os._exit, 3, 60)
    with pytest.raises(TimeoutError, match="sleep did not end within"):
        call("sleep", time.sleep, 60, 0.1)


# FLOPs ---------------------------------------------------------------------------------------------------------------


def test_flops_against_hand_numbers(tmp_path):
    # One layer of Qwen3-8B: qkv 4096 x 6144, proj 4096 x 4096, gate and up 4096 x 24576, down 12288 x 4096.
    layer = 4096 * (6144 + 4096 + 24576 + 12288)
    big = load_model_config(write_model_directory("qwen3-8b", tmp_path / "8b"))
    assert matmul_parameters(big) == 36 * layer + 151936 * 4096
    tied = load_model_config(write_model_directory("qwen3-0.6b", tmp_path / "0.6b"))
    assert matmul_parameters(tied) == 28 * 1024 * (4096 + 2048 + 6144 + 3072) + 151936 * 1024
    assert attention_pairs([1, 4]) == 1 + 10
    # A sequence of 3: 6 pairs, each a dot product and a weighted sum over 36 layers of 32 heads of 128.
    assert forward_flops(big, [3]) == 3 * 2 * matmul_parameters(big) + 6 * 4 * 36 * 32 * 128
    assert training_flops(big, [3]) == 3 * forward_flops(big, [3])


# Tables --------------------------------------------------------------------------------------------------------------


def test_tables_in_markdown():
    columns = [Column("what", "what"), Column("rate", "tokens/s", ",.0f"), Column("share", "share", ".0%")]
    table = Table(
        "A title", columns, [{"what": "a", "rate": 1234.5, "share": 0.5}, {"what": "b", "rate": 2}], ["Note."]
    )
    assert table.markdown().splitlines() == [
        "## A title",
        "Note.",
        "",
        "| what | tokens/s | share |",
        "|---|---:|---:|",
        "| a | 1,234 | 50% |",
        "| b | 2 | - |",
    ]
    assert table.rich().row_count == 2


# The profile ---------------------------------------------------------------------------------------------------------


def event(name, start, duration, category="kernel"):
    return {"name": name, "cat": category, "ts": start, "dur": duration, "ph": "X"}


TRACE = {
    "traceEvents": [
        event("_linear_kernel", 110, 20),
        event("_split_kernel", 100, 15),  # overlaps the one above by 5
        event("Memcpy DtoH", 150, 10, "gpu_memcpy"),
        event("nvjet_hsh_128x64", 180, 20),
        event("aten::mm", 90, 200, "cpu_op"),
        {"name": "process_name", "ph": "M"},
    ]
}


def test_idle_share_of_a_made_up_trace(tmp_path):
    spans = gpu_spans(TRACE)
    assert [span.name for span in spans] == ["_split_kernel", "_linear_kernel", "Memcpy DtoH", "nvjet_hsh_128x64"]
    assert length_us(spans) == 100
    assert busy_us(spans) == 30 + 10 + 20
    rows = {row["what"]: row for row in summary(spans, steps=2, untraced_step_us=40.0).rows}
    assert rows["GPU idle"] == {"what": "GPU idle", "us": 20.0, "share": 0.4}
    assert rows["matrix product"] == {"what": "matrix product", "launches": 1.0, "us": 20.0, "share": 0.4}
    assert rows["a step, traced"] == {"what": "a step, traced", "launches": 2.0, "us": 50.0, "share": 1.0}
    draw_timeline(spans, 4, tmp_path / "timeline.png")
    assert (tmp_path / "timeline.png").read_bytes()[1:4] == b"PNG"


def test_a_trace_without_a_gpu_has_no_shares():
    assert [row["share"] for row in summary([], 2, 40.0).rows] == [None, None, None]


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("_rms_norm_kernel", "norm, rope, KV store"),
        ("_item_kernel", "attention"),
        ("_linear_decode_kernel", "matrix product"),
        ("nvjet_sm90_tst_192x64_64x6_2x1_v_bz_TNT", "matrix product"),
        ("_silu_mul_kernel", "activation"),
        ("Memset (Device)", "copy, fill"),
        ("_draw_kernel", "sampling"),
        ("vectorized_elementwise_kernel", "other"),
    ],
)
def test_kinds_of_kernels(kernel, kind):
    assert kind_of(kernel) == kind


# Whole suites --------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path):
    """Settings of a benchmark of seconds, and where its results go."""
    return {
        "device": "cpu",
        "shape": "small",
        "scale": 0.02,
        "repeats": 1,
        "output": str(tmp_path / "results"),
        "images": str(tmp_path / "images"),
    }


def read(tmp_path, name):
    results = tmp_path / "results" / f"bench_{name}"
    return json.loads(results.with_suffix(".json").read_text()), results.with_suffix(".md").read_text()


def test_the_engine_suite_beside_a_peer(tiny, tmp_path):
    run(BenchConfig(suite="engine", workloads=["W1", "W4"], peer="transformers", **tiny))
    result, text = read(tmp_path, "engine_small")
    w1, w4 = result["tables"]["Tokens per second"]
    assert w1["ratio"] == w1["lockstep"] / w1["transformers"]
    assert len(w4["all"]["lockstep"]) == 1
    assert "recorded" not in w1, "records are of another shape and machine"
    assert "| W4: 32 requests, in 4096, out 1 |" in text
    assert result["config"]["scale"] == 0.02
    assert result["machine"] in text
    assert result["commit"] in text


def test_the_profile_without_a_gpu(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(decode_profile, "WARM_UP_STEPS", 2)
    monkeypatch.setattr(decode_profile, "TRACED_STEPS", 3)
    monkeypatch.setattr(decode_profile, "WORKLOAD", Workload("decode", 3, 1, 8, 20))
    config = resolved(BenchConfig(suite="engine", **tiny))
    model = write_model_directory("small", tmp_path / "model")
    rows = decode_profile.run(decode_profile.ProfileJob(model, config)).rows
    assert [row["what"] for row in rows] == ["GPU idle", "a step, traced", "a step, untraced"]
    assert rows[-1]["us"] > 0


def test_the_cpu_suite_takes_turns(tiny, tmp_path):
    run(BenchConfig(suite="cpu", workloads=["C32"], peer="transformers", **tiny))
    result, text = read(tmp_path, "cpu")
    (row,) = result["tables"]["Output tokens per second"]
    assert row["all"].keys() == {"lockstep", "transformers"} < CANDIDATES.keys()
    assert "| 4 x 16 samples, in 32, out 128 |" in text


def test_the_trainer_suite(tiny, tmp_path):
    run(BenchConfig(suite="trainer", **tiny))
    result, text = read(tmp_path, "trainer")
    rows = result["tables"]["Training"]
    assert [row["recompute"] for row in rows] == ["no", "yes"]
    for row in rows:
        assert row["tokens_per_s"] == pytest.approx(8 * 41 / row["seconds"])
        assert row["share"] == pytest.approx(row["tflops"] / row["matmul_tflops"])
        assert row["mfu"] is None, "the datasheet is not of a CPU"
    assert "8 packed sequences of 41 tokens" in text
    with pytest.raises(ValueError, match="suite=trainer takes no peer, got 'vllm'"):
        run(BenchConfig(suite="trainer", peer="vllm", **tiny))


def test_the_publish_suite(tiny, tmp_path):
    run(BenchConfig(suite="publish", workloads=["distributed"], **tiny))
    result, text = read(tmp_path, "publish_small")
    (row,) = result["tables"]["Weight updates"]
    assert min(row[part] for part in ("pack_s", "wire_s", "unpack_s", "copy_s")) > 0
    assert "target_ms" not in row, "targets are of another shape and machine"
    assert "| two processes, torch.distributed |" in text
    for settings, message in (
        ({"workloads": ["nccl"]}, "'nccl'; suite publish has copy"),
        ({"peer": "vllm"}, "takes no peer"),
    ):
        with pytest.raises(ValueError, match=message):
            run(BenchConfig(suite="publish", **settings, **tiny))


def test_updates_in_one_process(tiny, tmp_path):
    config = resolved(BenchConfig(suite="publish", **tiny))
    model = write_model_directory("small", tmp_path / "model")
    copy, alias = (measure(PublishJob(way, model, _engine_config(model, config), config)) for way in ("copy", "alias"))
    for row in (copy, alias):
        assert row["gigabytes"] == pytest.approx(0.0034, abs=1e-4)
        assert row["pause_ms"] == pytest.approx(max(0.0, row["gap_ms"] - row["step_ms"]))
        assert row["step_ms"] > 0
    assert 0 < copy["copy_share"] < 1
    assert copy["check_ms"] != 0
    assert alias["copy_s"] == alias["check_ms"] == 0


def test_an_update_that_brings_other_weights_is_no_result():
    pair = Pair(None, lambda version, meanwhile: {"checksum": "a"}, "b")
    with pytest.raises(RuntimeError, match="after update 1 the engine serves a, not b"):
        _timed(pair, 1)


def test_the_speculation_suite(tiny, tmp_path):
    run(BenchConfig(suite="speculation", num_draft_tokens=3, acceptance=1.0, **{**tiny, "scale": 0.06}))
    result, _ = read(tmp_path, "speculation_small")
    plain, draft, free = result["tables"]["Speculation"]
    assert plain["ratio"] == plain["tokens_per_step"] == 1.0
    assert draft["tokens_per_step"] > 3.2, "a step without drafts, then three true ones and a draw a step"
    assert free["tokens_per_step"] > 3.6
    assert draft["draft_ms"] == pytest.approx(draft["step_ms"] - free["step_ms"])


def test_the_rl_suite(tmp_path, monkeypatch):
    demo = demo_config(tmp_path / "runs", scale=2 / 3)
    small = replace(
        demo,
        warmup=replace(demo.warmup, steps=2),
        rollout=replace(demo.rollout, prompts_per_step=2, samples_per_prompt=2, max_tokens=4),
        evaluation=replace(demo.evaluation, num_problems=2, max_tokens=4),
    )
    monkeypatch.setattr(rl_suite, "demo_config", lambda runs_dir, scale: small)
    monkeypatch.setattr(rl_suite, "train_ahead", rl_suite.train_here)  # a cluster has tests of its own
    (rows,) = run(BenchConfig(suite="rl", device="cpu", repeats=1, output=str(tmp_path)))["tables"].values()
    assert [row["trainer"] for row in rows] == ["lockstep", "lockstep, one step ahead"]
    assert rows[0]["reward_last"] == rows[1]["reward_last"], "the same samples, as it is the same training here"
    assert all(row["step_s"] > 0 for row in rows)
    assert "2 steps of 2 x 2 samples" in (tmp_path / "bench_rl.md").read_text()


def test_the_kernels_suite(tiny, tmp_path):
    run(BenchConfig(suite="kernels", **tiny))
    result, text = read(tmp_path, "kernels_small")
    rows = result["tables"]["Kernels"]
    assert len({row["kernel"] for row in rows}) == 6 + 2 + 3 + 3 + 1
    assert all(row["us"] > 0 and row["share"] > 0 for row in rows)
    assert "| linear qkv | 1 x 128 -> 256 |" in text


def test_kernel_cases_count_bytes_and_flops(tmp_path):
    model = load_model_config(write_model_directory("qwen3-8b", tmp_path))
    found = {(case.kernel, case.size): case for case in cases(Sizes(model, torch.device("meta"), torch.bfloat16, 1.0))}
    product = found["linear fc1", "64 x 4096 -> 24576"]
    assert product.num_bytes == 2 * (64 * 4096 + 24576 * 4096 + 64 * 24576)
    assert product.num_flops == 2 * 64 * 4096 * 24576
    decode = found["attention, decode", "64 x 1024 tokens"]
    assert decode.num_bytes == 2 * 64 * (2 * 1024 * 8 * 128 + 2 * 32 * 128)
    assert decode.num_flops == 4 * 32 * 128 * 64 * 1024
    grouped = found["attention, decode", "32 x 16 samples of 512 shared + 400 tokens"]
    assert grouped.num_bytes == 2 * 32 * (2 * (512 + 16 * 400) * 8 * 128 + 2 * 16 * 32 * 128)
    assert grouped.num_flops == 4 * 32 * 128 * 512 * 912
    prefill = found["attention, prefill", "4 x 4096 tokens"]
    assert prefill.num_flops == 4 * 32 * 128 * 4 * (4096 * 4097 // 2)
    assert found["add_rms_norm", "8192 rows"].num_bytes == 2 * 4 * 8192 * 4096
