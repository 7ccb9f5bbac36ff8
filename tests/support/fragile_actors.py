"""Actors that kill their own process at a given point, once, or that refuse their work."""

import os
import signal
from pathlib import Path

from lockstep.recipes.cluster.actors import EngineActor, TrainerActor
from lockstep.trainer_bridge.transports import transport


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _is_first(file: Path) -> bool:
    try:
        file.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def fragile_engine(deaths: Path) -> type[EngineActor]:
    """Of all engines of this class one dies in its third step of a generation, one when it is about to receive version
    1, and one when it has received version 2; each leaves a file of the name of its death."""

    class FragileEngine(EngineActor):
        def generate(self, prompts, params):
            if _is_first(deaths / "generating"):
                step, last = self.engine.step, self.engine.counters.num_steps + 2
                self.engine.step = lambda: _die() if self.engine.counters.num_steps == last else step()
            return super().generate(prompts, params)

        def receive(self, session, number, version):
            if version == 1 and _is_first(deaths / "receiving 1"):
                self.engine.begin_update = lambda version: _die()
            return super().receive(session, number, version)

        def commit(self, inflight):
            if self._update.version == 2 and _is_first(deaths / "received 2"):
                _die()
            return super().commit(inflight)

    return FragileEngine


def broken_engine(places: Path, number: int) -> type[EngineActor]:
    """The first `number` engines of this class live, and take no weights."""

    class BrokenEngine(EngineActor):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self._is_broken = any(_is_first(places / str(place)) for place in range(number))

        def receive(self, session, number, version):
            if self._is_broken:
                raise OSError("out of order")
            return super().receive(session, number, version)

    return BrokenEngine


def fragile_trainer(stage: str) -> type[TrainerActor]:
    """Dies at its first publish: "joining" the engines, or "sending", when the first engine has its weights."""

    class FragileTrainer(TrainerActor):
        def send(self, session, version):
            if stage == "joining":
                _die()
            write = transport.write

            def write_once(*arguments):
                transport.write = lambda *arguments: _die()
                write(*arguments)

            transport.write = write_once
            return super().send(session, version)

    return FragileTrainer
