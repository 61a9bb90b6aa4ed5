"""What several workers and the command that started them tell each other. Free of Ray: a Ray actor holds one."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from deltacache.schemas.progress import ProgressStage, Reporter
from deltacache.schemas.texts import counted

MOST_LOST = 3
"""Losses in a row without a new checkpoint between them, after which the training is given up."""
Event = tuple[str, tuple[Any, ...], dict[str, Any]]
"""A call of a reporter: its name and arguments."""


@dataclass(frozen=True, slots=True)
class Standing:
    """How a training stands.

    Attributes:
        started: workers began at least once, so the output folder is theirs.
        alive: they work, as far as is known.
        placed: they have found room, and may still read their data.
        refusal: why the training cannot go on; workers that find it end at once.
        stop: somebody asked the training to stop.
        stopped: it did, and the state is saved.
        settled: nothing is being saved any more, so the workers may be ended.
    """

    started: bool = False
    alive: bool = False
    placed: bool = False
    refusal: str | None = None
    stop: bool = False
    stopped: bool = False
    settled: bool = False

    @property
    def over(self) -> bool:
        """Nothing is left to do for a worker that starts now."""
        return self.stopped or self.refusal is not None


class Relay:
    """State of a training under several workers, whichever of them live."""

    def __init__(self) -> None:
        self.standing = Standing()
        self._events: list[Event] = []
        self._newest = -1  # step that a start went on from
        self._lost: list[str] = []  # since a start went on from a newer checkpoint

    def arrive(self) -> None:
        """The workers have found room."""
        self._now(placed=True)

    def start(self, step: int, workers: int) -> None:
        """The workers begin after ``step`` steps."""
        if self.standing.started:
            self.tell("line", f"{counted(workers, 'worker goes', 'workers go')} on from step {step}")
        if step > self._newest:
            self._newest = step
            self._lost.clear()
        self._now(started=True, alive=True, placed=True)

    def lose(self, what: str) -> None:
        """A worker was lost; those left end, and all start again, unless that happened too often."""
        self._now(alive=False, placed=False)
        if self.standing.over:
            return
        self._lost.append(what)
        if len(self._lost) < MOST_LOST:
            self.tell("line", f"a worker was lost ({what}): all start again when there is room")
            return
        self.refuse(
            f"workers were lost {MOST_LOST} times without a new checkpoint after step {max(self._newest, 0)} (the "
            f"last: {what}): look at that error and at the workers' memory, or give a smaller --save-every; "
            "--resume continues",
            settled=True,
        )

    def refuse(self, why: str, *, settled: bool) -> None:
        """The training cannot go on; the first reason counts. Not ``settled``: the first worker still saves."""
        self._now(refusal=self.standing.refusal or why, settled=self.standing.settled or settled)

    def ask_to_stop(self) -> None:
        """Somebody wants the training to stop."""
        self._now(stop=True)

    def end(self) -> None:
        """It was stopped, and the state is saved."""
        self._now(stopped=True, settled=True)

    def _now(self, **changes: Any) -> None:
        self.standing = replace(self.standing, **changes)

    def tell(self, name: str, *arguments: Any, **keywords: Any) -> None:
        """A call for the reporter of the command."""
        self._events.append((name, arguments, keywords))

    def take(self) -> list[Event]:
        """What was told since the last call."""
        taken, self._events = self._events, []
        return taken


class RelayActor:
    """Actor: holds the relay, on the node of the command. It stands here so that its process imports no torch."""

    def __init__(self) -> None:
        self._relay = Relay()

    def call(self, name: str, *arguments: Any, **keywords: Any) -> Any:
        """A method of the relay."""
        return getattr(self._relay, name)(*arguments, **keywords)

    def standing(self) -> Standing:
        """How the training stands."""
        return self._relay.standing


class RelayReporter:
    """The reporter of a worker: passes every call to ``tell``."""

    def __init__(self, tell: Callable[..., Any]) -> None:
        self._tell = tell

    @contextmanager
    def stage(self, name: str, total: int | None, *, done: int = 0) -> Iterator[ProgressStage]:
        self._tell("stage", name, total, done=done)
        try:
            yield _RelayStage(self._tell)
        finally:
            self._tell("end")

    def line(self, text: str) -> None:
        self._tell("line", text)


class _RelayStage:
    def __init__(self, tell: Callable[..., Any]) -> None:
        self._tell = tell

    def advance(self, items: int = 1, **status: float | str) -> None:
        self._tell("advance", items, **status)


class Replay(AbstractContextManager["Replay"]):
    """Does on a reporter what workers did on theirs. A stage whose worker was lost ends where the next begins."""

    def __init__(self, reporter: Reporter, prefix: str) -> None:
        self._reporter, self._prefix = reporter, prefix
        self._stack = ExitStack()
        self._stage: ProgressStage | None = None

    def __exit__(self, *error: object) -> None:
        self._end()

    def show(self, events: list[Event]) -> None:
        """In their order."""
        for name, arguments, keywords in events:
            if name == "stage":
                self._end()
                self._stage = self._stack.enter_context(self._reporter.stage(*arguments, **keywords))
            elif name == "advance" and self._stage is not None:
                self._stage.advance(*arguments, **keywords)
            elif name == "end":
                self._end()
            elif name == "line":
                text: str = arguments[0]
                self._reporter.line(text if text.startswith(self._prefix) else f"{self._prefix}: {text}")

    def _end(self) -> None:
        self._stage = None
        self._stack.close()
