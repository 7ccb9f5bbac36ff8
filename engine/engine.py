"""The public engine: requests in, tokens and log-probs out, weights replaced in place between two steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from lockstep.engine.build import build_model, check_parallel, num_kv_pages, rank_device, scheduler_config
from lockstep.engine.checks import Choice, check_device_is_there
from lockstep.engine.config import EngineConfig
from lockstep.engine.foreign_files import has_file
from lockstep.engine.intake import check_is_request, check_not_queued, checked_version, new_requests
from lockstep.engine.memory.kv_memory import KVMemory
from lockstep.engine.models.config import load_model_config
from lockstep.engine.ranks.tensor_parallel import LeadingRunner, LeadingWeights, start_workers
from lockstep.engine.ranks.workers import RankError, Workers
from lockstep.engine.request import Kind, Request, RequestOutput, SamplingParams, no_number
from lockstep.engine.scheduling.scheduler import Scheduler
from lockstep.engine.serving import Serving
from lockstep.engine.speculation.build import load_draft_model, new_eagle, new_speculation
from lockstep.engine.steps.capture import Capture, CaptureConfig
from lockstep.engine.steps.laps import Laps
from lockstep.engine.steps.runner import LaunchedStep, Runner
from lockstep.engine.text.detokenizer import Detokenizer, decode_text, special_ids, unseen_ids
from lockstep.engine.weights import served_weights
from lockstep.kernels.process_state import own_state

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


class Engine(Serving):
    """Serves one model. Not thread-safe: one thread owns an engine.

    A request's tokens and log-probs are a function of the weights, its own tokens and its `SamplingParams`; nothing
    else in the engine (batching, chunking, caching, preemption) can change a bit of them.
    """

    def __init__(self, config: EngineConfig):
        check_device_is_there("EngineConfig.device", config.device)
        self.num_threads = torch.get_num_threads()  # with which the row contract is seen to be kept
        with own_state(torch.device(config.device), builds=True):
            self._build(config)

    def _build(self, config: EngineConfig) -> None:
        self.config = config
        self.model_config = load_model_config(config.model)
        check_parallel(config, self.model_config)
        device = rank_device(config, 0)
        sizes = scheduler_config(config, self.model_config)
        self.max_model_len = sizes.max_model_len
        self.tokenizer = _load_tokenizer(config.model)
        self.special_ids = frozenset() if self.tokenizer is None else special_ids(self.tokenizer)
        self.weight_version = 0
        self.workers: Workers | None = start_workers(config, self.model_config) if config.tp_size > 1 else None
        try:
            self.model = build_model(config, self.model_config, device, self.workers and self.workers.group)
            draft = load_draft_model(config, self.model)
            num_pages = num_kv_pages(config, sizes, self.model, device, draft.config.kv_elements if draft else 0)
            if self.workers is not None:
                with self.workers.watched():
                    num_pages = self.workers.meet(num_pages)
        except BaseException:
            self._end_workers()
            raise
        self.weight_targets = dict(self.model.named_parameters())
        self.update_buffers: dict[str, torch.Tensor] | None = None
        self.aliased: served_weights.AliasedWeights | None = None
        self.rank_weights = self.workers and LeadingWeights(
            self.workers, self.model_config, self.weight_targets, config.ep_size
        )

        self.memory = KVMemory(num_pages, sizes.page_size, sizes.enable_prefix_cache)
        self.scheduler = Scheduler(sizes, self.memory)
        eagle = new_eagle(config, draft, sizes, num_pages)
        runner = Runner if self.workers is None else partial(LeadingRunner, self.workers)
        self.runner = runner(
            self.model,
            sizes,
            num_pages,
            device,
            getattr(torch, config.dtype),
            config.cuda_graphs,
            config.group_prefixes,
            drafter=eagle,
            num_draft_tokens=config.num_draft_tokens,
        )
        self.capture: Capture | None = None
        self.speculation = new_speculation(config, eagle, self.model_config.vocab_size)
        self.overlaps = config.overlap and device.type == "cuda"
        self.in_flight: LaunchedStep | None = None
        self.rewarded: list[Request] = []  # they end once their pages are in the cache, for others with their prefix
        self.editing: list[Request] = []  # requests whose draws depend on their earlier tokens: they do not overlap
        self.next_request_id = 0
        self.generated_tokens = 0
        self.num_steps = 0
        self.busy_s = 0.0
        self.is_asleep = False
        self.is_shut_down = False

    # One step at a time ----------------------------------------------------------------------------------------------

    def prepare(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        kind: Kind = "generate",
    ) -> list[Request]:
        """Requests that wait for `queue`. Raises as `generate` does; a bad prompt leaves nothing behind."""
        self._check_awake()
        requests = new_requests(prompts, params, kind, self.model_config.vocab_size, self.next_request_id, self._check)
        self.next_request_id += len(requests)
        return requests

    def queue(self, requests: Sequence[Request]) -> None:
        """Adds requests of `prepare`, of this engine or of another of the same config.

        Raises ValueError, and adds none, for one that was queued already, here or there, or whose id is in use here.
        """
        self._check_awake()
        check_not_queued(requests)
        for request in requests:
            end_of_sequence = () if request.params.ignore_eos else self.model_config.eos_token_ids
            request.stop_ids = frozenset((*request.params.stop_token_ids, *end_of_sequence))
            if request.params.stop:
                request.detokenizer = Detokenizer(self.tokenizer, request.params.stop, self._unseen_ids(request))
        self.scheduler.add(requests)
        for request in requests:
            if self.capture is not None:
                self.capture.choose(request)
            if request.params.edits_logits:
                self.editing.append(request)

    def step(self) -> list[Request]:
        """One forward pass over the running requests; returns those that were given a token, scores or a reward, and
        those that failed: their `failure` names them and says why, and they have ended. The others of the step go on.

        On a GPU the pass is launched, and the results are those of the pass before, during which this one was prepared
        (of both, a request then named twice, where overlapping has to stop).
        Raises RankError that names a rank which died or did not answer: all ranks have ended then, and the engine
        serves no more.
        """
        with own_state(self.runner.device, self.num_threads):
            return self._step()

    def _step(self) -> list[Request]:
        started = time.perf_counter()
        self.num_steps += 1
        self.editing = [request for request in self.editing if request.finish_reason is None]
        speculates = self.speculation is not None and self.speculation.is_due(self.scheduler.running)
        overlaps = self.overlaps and not self.editing and not speculates
        results = [] if overlaps else self._drain()
        if speculates:
            self.speculation.propose(self.scheduler.running)
        num_generated = self.generated_tokens
        if self.aliased is not None:
            self.aliased.check_current(self.weight_version)
        batch = self.scheduler.schedule()
        launched = self.runner.launch(batch, self.weight_version, speculates) if batch.chunks else None
        due, self.in_flight = (self.in_flight, launched) if overlaps else (launched, None)
        try:
            results += self._collect(due)
        finally:
            self.scheduler.commit(batch)
            self._end_rewarded()
        seconds = time.perf_counter() - started
        self.busy_s += seconds
        if self.speculation is not None:
            self.speculation.record_step(batch, speculates, self.generated_tokens - num_generated, seconds)
        return results

    def abort(self, request: Request) -> None:
        """Ends a request now; what it has generated stays in its output. Does nothing if it has ended already."""
        check_is_request("abort", request)
        if request.finish_reason is None and self.scheduler.has(request):
            self.scheduler.finish(request, "abort")

    def output(self, request: Request) -> RequestOutput:
        """The result of a request that has ended. Raises ValueError for one that has not."""
        check_is_request("output", request)
        if request.finish_reason is None:
            raise ValueError(f"request {request.request_id} has not ended")
        text = self._text(request)
        return RequestOutput(
            request_id=request.request_id,
            prompt_index=request.prompt_index,
            sample_index=request.sample_index,
            prompt_ids=request.prompt_ids,
            token_ids=request.output_ids,
            logprobs=request.logprobs,
            finish_reason=request.finish_reason,
            weight_versions=request.weight_versions,
            text=text,
            num_cached_tokens=request.num_cached,
            num_preemptions=request.num_preemptions,
            num_draft_tokens=request.num_drafted,
            num_accepted_tokens=request.num_accepted,
            error=None if request.failure is None else str(request.failure),
        )

    def _text(self, request: Request) -> str | None:
        """None without a tokenizer, and where it fails: that is the request's error then."""
        if self.tokenizer is None:
            return None
        try:
            if request.detokenizer is not None:
                return request.detokenizer.cut(request.output_ids)
            unseen = self._unseen_ids(request)
            return decode_text(self.tokenizer, request.output_ids, skip_special_tokens=False, unseen=unseen)
        except Exception as error:
            request.failure = request.failure or _own_failure(request, error)
            return None

    def _unseen_ids(self, request: Request) -> frozenset[int]:
        end_ids = (*request.params.stop_token_ids, *self.model_config.eos_token_ids)
        return unseen_ids(self.tokenizer, self.special_ids, end_ids, request.params.stop)

    # Hidden states ---------------------------------------------------------------------------------------------------

    def start_capture(self, config: CaptureConfig) -> Capture:
        """Keeps hidden states of requests that are queued from now on; `Capture.take` gives them. See engine.capture.

        Raises ValueError for layers that the model does not have and with tp_size over 1, and RuntimeError while
        requests are at work.
        """
        self._check_running()
        self._check_idle("start_capture")
        if self.config.tp_size > 1:
            raise ValueError(f"EngineConfig.tp_size={self.config.tp_size}: hidden states are captured with 1 so far")
        last = self.model_config.num_layers
        if not all(0 <= layer <= last for layer in config.aux_layers):
            raise ValueError(f"aux_layers={config.aux_layers}: 0 to {last} can be, where {last} is the final norm")
        self._drain()
        self.capture = Capture(config)
        self.runner.observe(config.aux_layers, self.capture.record)
        return self.capture

    def stop_capture(self) -> None:
        """Raises RuntimeError while requests are at work."""
        self._check_idle("stop_capture")
        self._drain()
        self.capture = None
        self.runner.stop_observing()

    def _check_idle(self, what: str) -> None:
        if self.scheduler.has_work:
            raise RuntimeError(f"{what}: the engine has unfinished requests; finish or abort them first")

    # Weights ---------------------------------------------------------------------------------------------------------

    def update_weights(
        self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int, inflight: str = "keep"
    ) -> dict[str, float | int | str]:
        """Replaces all weights in place, between two steps.

        named_tensors: Megatron names, shapes and dtypes, in any order. version: larger than the version now served.
        inflight, for requests that are running: "keep" goes on over the KV that they have (their outputs record the
        version of each token), "recompute" computes their KV anew under the new weights, "abort" ends them.
        Returns timings in seconds and the checksum of the weights now served ("" where they are shared). Raises
        ValueError that names the tensor if the update is incomplete or does not fit; the old version then serves on.
        """
        version = self._check_update(version, inflight)
        started = time.perf_counter()
        if self.rank_weights is not None:
            staged = served_weights.stage(named_tensors, self.rank_weights.wholes)
            return self._flip_ranks(staged, version, inflight, started)
        if self.aliased is not None:
            self.aliased.check_same(named_tensors)
            self._drain()
            self._set_version(version, inflight)
            self.aliased.set_current()
            return {"version": version, "copy_s": 0.0, "checksum": ""}
        staged = served_weights.stage(named_tensors, self.weight_targets)
        return self._flip(staged, version, inflight, {"stage_s": time.perf_counter() - started})

    def alias_weights(
        self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int, num_changes: Callable[[], int]
    ) -> None:
        """Serves from the given tensors, without a copy, as `version`; they are all of the model's, on its device.

        num_changes: says how often their owner has written to them. From then on `update_weights` of the same tensors
        only changes the version. Their owner may write to them while this engine makes no step; a step before that
        version is published raises RuntimeError. Raises as `update_weights`, and ValueError for tensors that are not
        contiguous or on another device.
        """
        version = self._check_update(version, "keep")
        if self.rank_weights is not None:
            raise NotImplementedError(
                f"Engine.alias_weights takes tp_size=1, and this engine has {self.config.tp_size} ranks"
            )
        staged = served_weights.stage(named_tensors, self.weight_targets)
        for name, tensor in staged.items():
            if not tensor.is_contiguous() or tensor.device != self.weight_targets[name].device:
                raise ValueError(f"{name} cannot be shared: it is on {tensor.device} with strides {tensor.stride()}")
        self._drain()
        for name, tensor in staged.items():
            self.weight_targets[name].data = tensor
        if self.runner.follower is not None:
            self.runner.follower.drafter.draft.share_embedding(self.model.embedding.word_embeddings.weight)
        self.runner.forget_graphs()
        self.aliased = served_weights.AliasedWeights(staged, num_changes)
        self._set_version(version, "recompute")

    def begin_update(self, version: int) -> served_weights.WeightUpdate:
        """Room for new weights beside those that serve on, for `commit_update`. Of one update at a time.

        It holds whole parameters, also where several ranks serve them: an engine is one receiver of a weight plan,
        `engine_layout(model, tp_size=1)`. The memory is kept for the next update; `end_updates` frees it.
        """
        version = self._check_update(version, "keep")
        wholes = self.weight_targets if self.rank_weights is None else self.rank_weights.wholes
        if self.update_buffers is None:
            self.update_buffers = served_weights.new_buffers(wholes, rank_device(self.config, 0))
        return served_weights.WeightUpdate(version, wholes, self.update_buffers)

    def commit_update(
        self, update: served_weights.WeightUpdate, inflight: str = "keep"
    ) -> dict[str, float | int | str]:
        """Flips to an update that has arrived, as `update_weights` does; requests pause for a copy within the device,
        and with several ranks also until each has been sent its part.

        Raises ValueError that names a tensor of which elements are missing; the old version then serves on.
        """
        self._check_update(update.version, inflight)
        update.check_complete()
        if self.rank_weights is not None:
            return self._flip_ranks(update.tensors, update.version, inflight, time.perf_counter())
        return self._flip(update.tensors, update.version, inflight, {})

    def end_updates(self) -> None:
        """Frees the memory of `begin_update`."""
        self.update_buffers = None

    def update_draft(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Replaces the draft model's weights in place, between two steps; no output changes by a bit.

        named_tensors: all of `eagle3.expand`, and "token_map", the target's ids of the draft's vocabulary. version:
        larger than stats()["draft_version"]. Raises ValueError that names the tensor, or says that the version is old,
        or that there is no draft model; the old draft then serves on.
        """
        self._check_running()
        if self.runner.follower is None:
            raise ValueError(f"update_draft: this engine has no draft model, draft_model={self.config.draft_model!r}")
        drafter = self.runner.follower.drafter
        version = checked_version(version, drafter.version, "draft version")
        staged = served_weights.stage(named_tensors, drafter.update_targets())
        self._drain()
        drafter.update(staged, version)

    def _check_update(self, version: int, inflight: str) -> int:
        self._check_running()
        Choice(("keep", "recompute", "abort"))("inflight", inflight)
        return checked_version(version, self.weight_version)

    def _flip(
        self, staged: Mapping[str, torch.Tensor], version: int, inflight: str, timings: dict[str, float]
    ) -> dict[str, float | int | str]:
        """Between two steps, copies all weights and checks what was written against what was read."""
        if self.aliased is not None:
            self.aliased.check_same(staged.items())
        laps = Laps(rank_device(self.config, 0))
        self._drain()
        sent, served = served_weights.copy_in_place(staged, self.weight_targets)
        self._set_version(version, inflight)
        laps.end("copy_s")
        # What the host does until here, a GPU need not wait for.
        labels = served_weights.labels(self.weight_targets)
        sent, served = sent.tolist(), served.tolist()
        if names := served_weights.damaged(staged, sent, served):
            raise RuntimeError(f"weights served after update {version} differ from those sent: {names}")
        checksum = served_weights.digest(labels, dict(zip(staged, served, strict=True)))
        return {**timings, "version": version, **laps.seconds(), "checksum": checksum}

    def _flip_ranks(
        self, staged: Mapping[str, torch.Tensor], version: int, inflight: str, started: float
    ) -> dict[str, float | int | str]:
        """As `_flip`, on all ranks of the engine."""
        hashes = served_weights.hashes_by_name(staged)
        self._drain()
        self.rank_weights.stage(staged, hashes)
        verified = time.perf_counter()
        self.rank_weights.flip()
        self._set_version(version, inflight)
        copied = time.perf_counter()
        served = self.checksum()
        if served != (expected := served_weights.digest(served_weights.labels(staged), hashes)):
            raise RuntimeError(f"weights served after update {version} differ from those sent: {served} != {expected}")
        return {
            "version": version,
            "stage_s": verified - started,
            "copy_s": copied - verified,
            "verify_s": time.perf_counter() - copied,
            "checksum": served,
        }

    def _set_version(self, version: int, inflight: str) -> None:
        if inflight == "abort":
            self.scheduler.abort_all()
        elif inflight == "recompute":
            self.scheduler.preempt_all()
        self.weight_version = version
        self.scheduler.set_version(version)

    def checksum(self) -> str:
        """served_weights.checksum of the whole weights that are served, for any tp_size the same."""
        self._check_running()
        if self.rank_weights is None:
            return served_weights.checksum(self.weight_targets.items())
        return self.rank_weights.checksum()

    # Memory ----------------------------------------------------------------------------------------------------------

    def sleep(self) -> None:
        """Gives back the memory of the KV cache until `wake`, for a trainer on the same device.

        What was cached is forgotten. Weights may be updated meanwhile. Raises RuntimeError while there are unfinished
        requests.
        """
        self._check_running()
        if self.scheduler.has_work:
            raise RuntimeError("an engine with unfinished requests cannot sleep: finish or abort them")
        self._drain()
        if not self.is_asleep:
            self.is_asleep = True
            self.memory.reset()
            if self.workers is not None:
                with self.workers.watched():
                    self.workers.sleep()
            self.runner.free_kv_cache()

    def wake(self) -> None:
        """Takes the memory again. Does nothing for an engine that is awake."""
        self._check_running()
        if self.is_asleep:
            if self.workers is not None:
                with self.workers.watched():
                    self.workers.wake()
            self.runner.take_kv_cache()
            self.is_asleep = False

    # The rest --------------------------------------------------------------------------------------------------------

    def stats(self) -> dict[str, float | int]:
        """Counters since the engine started. `cache_hit_rate`: share of prompt tokens that were found in the cache."""
        return {
            **self.scheduler.stats(),
            **self.memory.stats(),
            "weight_version": self.weight_version,
            "generated_tokens": self.generated_tokens,
            "busy_s": self.busy_s,
            "tokens_per_s": self.generated_tokens / self.busy_s if self.busy_s else 0.0,
            **(self.capture.stats() if self.capture is not None else {}),
            **(self.speculation.stats() if self.speculation is not None else {"accepted_draft_tokens": 0}),
        }

    def shutdown(self) -> None:
        """Ends all requests, frees the model and its KV cache, and ends the ranks. Later calls raise RuntimeError."""
        if not self.is_shut_down:
            self.is_shut_down = True
            self.scheduler.abort_all()
            if self.workers is None or self.workers.ended_by is None:
                self._drain()
            self._end_workers()
            del self.runner, self.model, self.weight_targets, self.update_buffers, self.rank_weights

    def _end_workers(self) -> None:
        if self.workers is not None:
            self.workers.shutdown()

    def _check_awake(self) -> None:
        self._check_running()
        if self.is_asleep:
            raise RuntimeError("this engine is asleep: call wake() before requests")

    def _check_running(self) -> None:
        if self.is_shut_down:
            raise RuntimeError("this engine was shut down")
        if self.workers is not None and self.workers.ended_by is not None:
            raise RankError(f"this engine's ranks have ended: {self.workers.ended_by}")

    def _check(self, request: Request) -> None:
        if (request.kind == "reward") != (self.model_config.head == "scalar"):
            has = (
                "a scalar head, for Engine.reward only" if request.kind != "reward" else "no scalar head to reward with"
            )
            raise ValueError(f"{self.config.model} has {has}")
        if request.params.stop and self.tokenizer is None:
            raise ValueError(f"stop strings need a tokenizer, and {self.config.model} holds none")
        self.scheduler.check(request)

    def _drain(self) -> list[Request]:
        """Collects the pass in flight, if there is one."""
        due, self.in_flight = self.in_flight, None
        try:
            return self._collect(due)
        finally:
            self._end_rewarded()

    def _end_rewarded(self) -> None:
        """Ends requests whose reward has come, after the commit of the batch that it came from."""
        for request in self.rewarded:
            if request.finish_reason is None:
                self.scheduler.finish(request, "stop")
        self.rewarded.clear()

    def _collect(self, launched: LaunchedStep | None) -> list[Request]:
        if launched is None:
            return []
        collected = self.runner.collect(launched)
        for request in collected.served:
            try:
                self._finish_if_done(request)
            except Exception as error:  # a tokenizer's, say: it is this request's and no other's
                self._fail(request, _own_failure(request, error))
        if collected.verified:
            self.speculation.record(collected.verified)
        for request in collected.broken:
            self._fail(request, no_number(request))
        return collected.served + collected.broken

    def _fail(self, request: Request, failure: Exception) -> None:
        """Ends one request; what it has generated stays in its output."""
        request.failure = failure
        if request.finish_reason is None:
            self.scheduler.finish(request, "abort")

    def _finish_if_done(self, request: Request) -> None:
        if request.kind == "reward":
            self.rewarded.append(request)
            return
        reason = self._score_end(request) if request.kind == "score" else self._generation_end(request)
        if reason is not None:
            self.scheduler.finish(request, reason)
            if self.capture is not None:
                self.capture.finished(request)
            if self.speculation is not None and request.kind == "generate":
                self.speculation.drafter.finished(request)

    def _score_end(self, request: Request) -> str | None:
        return "stop" if len(request.logprobs) == len(request.tokens) - 1 else None

    def _generation_end(self, request: Request) -> str | None:
        """Why the request ends with one of its new tokens, if it does; those after that one are forgotten."""
        tokens, first, reason = request.tokens, request.num_judged, None
        for index in range(first, len(tokens)):
            token = tokens[index]
            if token in request.stop_ids or (request.detokenizer is not None and request.detokenizer.append(token)):
                reason = "stop"
            elif index + 1 >= request.max_tokens:
                reason = "length"
            if reason is not None:
                request.cut(index + 1)
                break
        request.num_judged = len(tokens)
        self.generated_tokens += len(tokens) - first
        return reason


def _load_tokenizer(path: str):
    if not any(has_file(Path(path), name) for name in TOKENIZER_FILES):
        return None
    from lockstep.engine.text.tokenizer import load_tokenizer  # a second of imports that token-id users do not need

    return load_tokenizer(path)


def _own_failure(request: Request, error: Exception) -> RuntimeError:
    return RuntimeError(f"request {request.request_id}: {type(error).__name__}: {error}")
