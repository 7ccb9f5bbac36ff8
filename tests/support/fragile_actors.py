"""Actors that kill their own process at a given point, once."""

import os
import signal
from pathlib import Path

from lockstep.recipes.cluster.actors import EngineActor, TrainerActor
from lockstep.trainer_bridge.transports import transport


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fragile_engine(deaths: Path) -> type[EngineActor]:
    """Of all engines of this class one dies in its third step of a generation, one when it is about to receive version
    1, and one when it has received version 2; each leaves a file of the name of its death."""

    def is_first(name: str) -> bool:
        try:
            (deaths / name).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    class FragileEngine(EngineActor):
        def generate(self, prompts, params):
            if is_first("generating"):
                step, last = self.engine.step, self.engine.num_steps + 2
                self.engine.step = lambda: _die() if self.engine.num_steps == last else step()
            return super().generate(prompts, params)

        def receive(self, meeting, number, version):
            if version == 1 and is_first("receiving 1"):
                self.engine.begin_update = lambda version: _die()
            return super().receive(meeting, number, version)

        def commit(self, inflight):
            if self._update.version == 2 and is_first("received 2"):
                _die()
            return super().commit(inflight)

    return FragileEngine


def fragile_trainer(stage: str) -> type[TrainerActor]:
    """Dies at its first publish: "joining" the engines, or "sending", when the first engine has its weights."""

    class FragileTrainer(TrainerActor):
        def send(self, meeting, version):
            if stage == "joining":
                _die()
            write = transport.write

            def write_once(*arguments):
                transport.write = lambda *arguments: _die()
                write(*arguments)

            transport.write = write_once
            return super().send(meeting, version)

    return FragileTrainer
