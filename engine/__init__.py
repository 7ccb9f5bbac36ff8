"""The inference engine. See docs/design.md for the promises; `Engine` is the public class."""

from lockstep.engine.config import EngineConfig
from lockstep.engine.engine import Engine
from lockstep.engine.generator import Generator, TokenEvent
from lockstep.engine.replicated_engine import ReplicatedEngine
from lockstep.engine.request import RequestOutput, SamplingParams

__all__ = ["Engine", "EngineConfig", "Generator", "ReplicatedEngine", "RequestOutput", "SamplingParams", "TokenEvent"]
