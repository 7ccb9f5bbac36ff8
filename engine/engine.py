"""The public engine: requests in, tokens and log-probs out, weights replaced in place between two steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch

from lockstep.engine.config import EngineConfig
from lockstep.engine.counters import Counters
from lockstep.engine.endings import end_reason
from lockstep.engine.fields.values import Choice, check_device_is_there
from lockstep.engine.generator import SteppedGenerator
from lockstep.engine.intake import check_is_request, check_is_served, check_not_queued, checked_version, new_requests
from lockstep.engine.models.config import load_model_config
from lockstep.engine.parts import build_parts
from lockstep.engine.ranks.workers import RankError
from lockstep.engine.request import Kind, Request, RequestOutput, SamplingParams, failure_of, no_number, output_of
from lockstep.engine.steps.capture import Capture, CaptureConfig, NoCapture, check_capture
from lockstep.engine.steps.results import LaunchedStep
from lockstep.engine.text.request_text import RequestText, find_tokenizer
from lockstep.engine.text.tokenizer import Tokenizer
from lockstep.engine.weights.aliased_weights import AliasedWeights
from lockstep.engine.weights.served_weights import UpdateReport
from lockstep.engine.weights.staging import NamedTensors, Staged, WeightUpdate
from lockstep.kernels.process_state import own_state


class Engine(SteppedGenerator):
    """Serves one model. Not thread-safe: one thread owns an engine.

    A request's tokens and log-probs are a function of the weights, its own tokens and its `SamplingParams`; nothing
    else in the engine (batching, chunking, caching, preemption) can change a bit of them.
    """

    def __init__(self, config: EngineConfig):
        check_device_is_there("EngineConfig.device", config.device)
        self.num_threads = torch.get_num_threads()  # with which the row contract is seen to be kept
        self.config = config
        with own_state(torch.device(config.device), builds=True):
            self.model_config = load_model_config(config.model)
            self.tokenizer = find_tokenizer(config.model)
            parts = build_parts(config, self.model_config)
        self.workers = parts.workers
        self.model = parts.model
        self.weights = parts.weights
        self.memory = parts.memory
        self.scheduler = parts.scheduler
        self.runner = parts.runner
        self.draft = parts.draft
        self.speculation = parts.speculation
        self.capture: Capture | NoCapture = NoCapture()
        self.overlaps = config.overlap and self.runner.device.type == "cuda"
        self.in_flight: LaunchedStep | None = None
        self.late_results: list[Request] = []  # of a pass that was collected between two steps
        self.editing: list[Request] = []  # their draws depend on their earlier tokens, so they do not overlap
        self.counters = Counters()
        self.state: Literal["awake", "asleep", "shut down"] = "awake"

    # What others read ------------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Of the model's directory; requests may have stop strings, and outputs a text, where there is one."""
        return self.text.tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Tokenizer | None) -> None:
        self.text = RequestText(tokenizer, self.model_config.eos_token_ids)

    @property
    def max_model_len(self) -> int:
        """The most tokens of a request, prompt and output."""
        return self.scheduler.config.max_model_len

    @property
    def weight_version(self) -> int:
        return self.weights.version

    @property
    def weight_targets(self) -> Mapping[str, torch.Tensor]:
        return self.weights.targets

    # One step at a time ----------------------------------------------------------------------------------------------

    def prepare(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        kind: Kind = "generate",
    ) -> list[Request]:
        """Requests that wait for `queue`. Raises as `generate` does; a bad prompt leaves nothing behind."""
        self._check_awake()
        vocab_size, counters = self.model_config.vocab_size, self.counters
        requests = new_requests(prompts, params, kind, vocab_size, counters.num_requests, self._check)
        counters.num_requests += len(requests)
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
            request.detokenizer = self.text.detokenizer(request)
        self.scheduler.add(requests)
        for request in requests:
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
        self.weights.check_current()
        self.counters.begin_step()
        speculates = self.speculation.is_due(self.scheduler.running)
        overlaps = self._may_overlap() and not speculates
        if not overlaps:
            self._settle()
        if speculates:
            self.speculation.propose(self.scheduler.running)
        self.counters.begin_schedule()
        batch = self.scheduler.schedule()
        launched = self.runner.launch(batch, self.weights.version, speculates) if batch.chunks else None
        due, self.in_flight = (self.in_flight, launched) if overlaps else (launched, None)
        try:
            collected = self._collect(due)
        finally:
            self.scheduler.commit(batch)
        self._end_rewarded(collected)
        self.speculation.record_step(batch, speculates, *self.counters.end_step())
        results, self.late_results = self.late_results + collected, []
        return results

    def _may_overlap(self) -> bool:
        self.editing = [request for request in self.editing if request.finish_reason is None]
        return self.overlaps and not self.editing

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
        return output_of(request, self.text.of(request))

    # Hidden states ---------------------------------------------------------------------------------------------------

    def start_capture(self, config: CaptureConfig) -> Capture:
        """Keeps hidden states of requests that are queued from now on; `Capture.take` gives them.

        Raises ValueError as `check_capture`, and RuntimeError while requests are at work.
        """
        self._check_running()
        self._check_idle("start_capture")
        check_capture(config, self.config.tp_size, self.model_config.num_layers)
        self._settle()
        self.capture = Capture(config)
        self.runner.observe(config.aux_layers, self.capture.record)
        return self.capture

    def stop_capture(self) -> None:
        """Raises RuntimeError while requests are at work."""
        self._check_idle("stop_capture")
        self._settle()
        self.capture = NoCapture()
        self.runner.stop_observing()

    def _check_idle(self, what: str) -> None:
        if self.scheduler.has_work:
            raise RuntimeError(f"{what}: the engine has unfinished requests; finish or abort them first")

    # Weights ---------------------------------------------------------------------------------------------------------

    def update_weights(
        self, named_tensors: NamedTensors, version: int, inflight: str = "keep", partial: bool = False
    ) -> UpdateReport:
        """Replaces weights in place, between two steps: all that the update brings, or none.

        named_tensors: Megatron names, shapes and dtypes, in any order. version: larger than the version now served.
        inflight, for requests that are running: "keep" goes on over the KV that they have (their outputs record the
        version of each token), "recompute" computes their KV anew under the new weights, "abort" ends them.
        partial: tensors that the update lacks stay as they are served.
        Returns timings in seconds, the checksum of the weights now served ("" where they are shared), and what
        served_weights.checksum_report says. Raises ValueError that names the tensor if the update is incomplete or
        does not fit; the old version then serves on.
        """
        version = self._check_update(version, inflight)
        return self._flip(self.weights.stage(named_tensors, partial), version, inflight)

    def begin_update(self, version: int, partial: bool = False, encoded: bool = False) -> WeightUpdate:
        """Room for new weights beside those that serve on, for `commit_update`. Of one update at a time.

        It holds whole parameters, also where several ranks serve them: an engine is one receiver of a weight plan,
        `engine_layout(model, tp_size=1)`. The memory is kept for the next update; `end_updates` frees it.
        encoded: for the parts that are served, where they differ from the parameters.
        """
        return self.weights.room(self._check_update(version, "keep"), partial, encoded)

    def commit_update(self, update: WeightUpdate, inflight: str = "keep") -> UpdateReport:
        """Flips to an update that has arrived, as `update_weights` does; requests pause for a copy within the device,
        and with several ranks also until each has been sent its part.

        Raises ValueError that names a tensor of which elements are missing; the old version then serves on.
        """
        self._check_update(update.version, inflight)
        self.weights.check_arrived(update)
        return self._flip(self.weights.stage(update.arrived(), update.partial), update.version, inflight)

    def end_updates(self) -> None:
        """Frees the memory of `begin_update`."""
        self.weights.free_room()

    def alias_weights(self, named_tensors: NamedTensors, version: int, num_changes: Callable[[], int]) -> None:
        """Serves from the given tensors, without a copy, as `version`; they are all of the model's, on its device.

        num_changes: says how often their owner has written to them. From then on `update_weights` of the same tensors
        only changes the version. Their owner may write to them while this engine makes no step; a step before that
        version is published raises RuntimeError. Raises as `update_weights`, and ValueError for tensors that are not
        contiguous or on another device.
        """
        version = self._check_update(version, "keep")
        if (ranks := self.config.tp_size) > 1:
            raise NotImplementedError(f"Engine.alias_weights takes tp_size=1, and this engine has {ranks} ranks")
        shared = AliasedWeights(named_tensors, self.weights.targets, num_changes)
        self._settle()
        shared.begin(version)
        self.weights = shared
        self.draft.share_embedding(self.model.embedding.word_embeddings.weight)
        self.runner.forget_graphs()
        self._begin_version("recompute")

    def update_draft(self, named_tensors: NamedTensors, version: int) -> None:
        """Replaces the draft model's weights in place, between two steps; no output changes by a bit.

        named_tensors: all of `eagle3.expand`, and "token_map", the target's ids of the draft's vocabulary. version:
        larger than stats()["draft_version"]. Raises ValueError that names the tensor, or says that the version is old,
        or that there is no draft model; the old draft then serves on.
        """
        self._check_running()
        version = self.draft.next_version(version)
        staged = self.draft.stage(named_tensors)
        self._settle()
        self.draft.update(staged, version)

    def checksum(self) -> str:
        """checksums.checksum of the whole weights that are served, for any tp_size the same."""
        self._check_running()
        return self.weights.checksum()

    def _check_update(self, version: int, inflight: str) -> int:
        self._check_running()
        Choice(("keep", "recompute", "abort"))("inflight", inflight)
        return checked_version(version, self.weights.version)

    def _flip(self, staged: Staged, version: int, inflight: str) -> UpdateReport:
        """Between two steps, serves what is staged; then checks what was written against what was read."""
        self._settle()
        verified = self.weights.flip(staged, version)
        self._begin_version(inflight)
        return {"version": version, **verified()}

    def _begin_version(self, inflight: str) -> None:
        if inflight == "abort":
            self.scheduler.abort_all()
        elif inflight == "recompute":
            self.scheduler.preempt_all()
        self.scheduler.set_version(self.weights.version)

    # Memory ----------------------------------------------------------------------------------------------------------

    def sleep(self) -> None:
        """Gives back the memory of the KV cache until `wake`, for a trainer on the same device.

        What was cached is forgotten. Weights may be updated meanwhile. Raises RuntimeError while there are unfinished
        requests.
        """
        self._check_running()
        if self.scheduler.has_work:
            raise RuntimeError("an engine with unfinished requests cannot sleep: finish or abort them")
        self._settle()
        if self.state == "awake":
            self.state = "asleep"
            self.memory.reset()
            with self.workers.watched():
                self.workers.sleep()
            self.runner.free_kv_cache()

    def wake(self) -> None:
        """Takes the memory again. Does nothing for an engine that is awake."""
        self._check_running()
        if self.state == "asleep":
            with self.workers.watched():
                self.workers.wake()
            self.runner.take_kv_cache()
            self.state = "awake"

    # The rest --------------------------------------------------------------------------------------------------------

    def stats(self) -> dict[str, float | int]:
        """Counters since the engine started. `cache_hit_rate`: share of prompt tokens that were found in the cache."""
        return {
            **self.scheduler.stats(),
            **self.memory.stats(),
            "weight_version": self.weight_version,
            **self.counters.stats(),
            **self.capture.stats(),
            **self.speculation.stats(),
        }

    def shutdown(self) -> None:
        """Ends all requests, frees the model and its KV cache, and ends the ranks. Later calls raise RuntimeError."""
        if self.state != "shut down":
            self.state = "shut down"
            self.scheduler.abort_all()
            if self.workers.ended_by is None:
                self._settle()
            self.workers.shutdown()
            self.weights.release()
            del self.runner, self.model, self.draft

    def _check_awake(self) -> None:
        self._check_running()
        if self.state == "asleep":
            raise RuntimeError("this engine is asleep: call wake() before requests")

    def _check_running(self) -> None:
        if self.state == "shut down":
            raise RuntimeError("this engine was shut down")
        if self.workers.ended_by is not None:
            raise RankError(f"this engine's ranks have ended: {self.workers.ended_by}")

    def _check(self, request: Request) -> None:
        check_is_served(request, self.config.model, self.model_config.head, self.tokenizer is not None)
        self.scheduler.check(request)

    def _settle(self) -> None:
        """Collects the pass in flight, between two steps; the next step returns what it gave."""
        due, self.in_flight = self.in_flight, None
        self._end_rewarded(results := self._collect(due))
        self.late_results += results

    def _collect(self, launched: LaunchedStep | None) -> list[Request]:
        if launched is None:
            return []
        collected = self.runner.collect(launched)
        for request in collected.served:
            try:
                self._finish_if_done(request)
            except Exception as error:  # a tokenizer's, say: it is this request's and no other's
                self._fail(request, failure_of(request, error))
        if collected.verified:
            self.speculation.record(collected.verified)
        for request in collected.broken:
            self._fail(request, no_number(request))
        return collected.served + collected.broken

    def _finish_if_done(self, request: Request) -> None:
        first = request.num_judged
        reason = end_reason(request)
        self.counters.generated_tokens += request.num_judged - first
        if reason is not None:
            self.scheduler.finish(request, reason)
            self.capture.finished(request)
            self.speculation.finished(request)

    def _end_rewarded(self, results: Sequence[Request]) -> None:
        """Ends those whose reward has come: once their batch is committed, and its pages cached for others."""
        if self.model_config.head == "scalar":
            for request in results:
                if request.finish_reason is None:
                    self.scheduler.finish(request, "stop")

    def _fail(self, request: Request, failure: Exception) -> None:
        """Ends one request; what it has generated stays in its output."""
        request.failure = failure
        if request.finish_reason is None:
            self.scheduler.finish(request, "abort")
