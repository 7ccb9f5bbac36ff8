"""The inference engine. See docs/design.md for the promises; `Engine` is the public class."""

from lockstep.engine.engine import Engine, EngineConfig, TokenEvent
from lockstep.engine.replicated_engine import ReplicatedEngine
from lockstep.engine.request import RequestOutput, SamplingParams

__all__ = ["Engine", "EngineConfig", "ReplicatedEngine", "RequestOutput", "SamplingParams", "TokenEvent"]
