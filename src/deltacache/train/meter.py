"""What the steps of an interval gave and where their time went, as one row of the curves."""

import statistics
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from deltacache.schemas.errors import DeltacacheError

SPIKE_FACTORS: Mapping[str, float] = {"loss": 3.0, "gradient_norm": 10.0}
"""A value is a spike from this many times the median of the steps before it."""
_REMEMBERED, _LEAST_REMEMBERED = 200, 20


class NonFiniteError(DeltacacheError):
    """A loss or gradient norm is not finite.

    Attributes:
        done: finished steps before it, which is the state that the weights are in.
        row: the row of those of them that no row had yet, if any.
    """

    def __init__(self, message: str, done: int, row: dict[str, float] | None) -> None:
        super().__init__(message)
        self.done = done
        self.row = row


class SpikeWatch:
    """Compares each step with the median of up to 200 steps before it."""

    def __init__(self) -> None:
        self._past = {name: deque[float](maxlen=_REMEMBERED) for name in SPIKE_FACTORS}

    def found(self, first_step: int, values: Mapping[str, Sequence[float]]) -> list[str]:
        """A message for each spike among consecutive steps, the first of which is ``first_step``."""
        messages: list[str] = []
        for name, past in self._past.items():
            median = statistics.median(past) if len(past) >= _LEAST_REMEMBERED else float("inf")
            for step, value in enumerate(values[name], first_step):
                if value > SPIKE_FACTORS[name] * median:
                    messages.append(
                        f"spike at step {step}: {name.replace('_', ' ')} {value:.4g} is {value / median:.1f} times "
                        f"the median of the {len(past)} steps before ({median:.4g})"
                    )
            past.extend(values[name])
        return messages


class Meter:
    """Collects what the steps of one interval gave, and where their time went.

    Values stay on the device until the interval ends, so that a GPU is not waited for at every step.
    """

    def __init__(self, first_step: int, effective_batch: int) -> None:
        self._step = first_step
        self._effective_batch = effective_batch
        self._watch = SpikeWatch()
        self.total_steps = 0
        self.total_s = 0.0
        self._total_wait_s = 0.0
        self.spikes: list[str] = []  # of the last row
        self.restart_clock()

    def restart_clock(self) -> None:
        """Begin an interval: time since the last one (saving, probing) belongs to no step."""
        self._values: list[dict[str, Tensor]] = []
        self._rates: list[float] = []
        self._wait_s = 0.0
        self._started = time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around asking for a batch."""
        asked = time.perf_counter()
        yield
        self._wait_s += time.perf_counter() - asked

    @property
    def interval_steps(self) -> int:
        """Steps since the interval began."""
        return len(self._values)

    def add(self, values: dict[str, Tensor], learning_rate: float) -> None:
        """One step is done; ``values`` are scalars, ``loss`` and ``gradient_norm`` among them."""
        self._values.append(values)
        self._rates.append(learning_rate)

    def row(self) -> dict[str, float]:
        """The interval as a row.

        Raises:
            NonFiniteError: a loss or gradient norm is not finite; names the first step where.
        """
        names = list(self._values[0])
        table = torch.stack([torch.stack([v[name].float() for name in names]) for v in self._values]).cpu()
        elapsed_s = time.perf_counter() - self._started  # after the copy: the device has finished
        checked = table[:, [names.index("loss"), names.index("gradient_norm")]]
        bad = (~checked.isfinite()).any(dim=1).nonzero()
        if len(bad) == 0:
            return self._row(names, table, elapsed_s)
        steps = int(bad[0, 0])
        loss, norm = checked[steps].tolist()
        done = self._step + steps
        row = self._row(names, table[:steps], elapsed_s * steps / len(table)) if steps else None
        raise NonFiniteError(
            f"step {done + 1} has loss {loss} and gradient norm {norm}: both must be finite, so training stopped "
            f"with a checkpoint of the state before it, step {done}; go on from there in another folder with "
            "--continue-from and a lower learning rate, a longer warm-up or a smaller gradient_clip",
            done,
            row,
        )

    def _row(self, names: Sequence[str], table: Tensor, elapsed_s: float) -> dict[str, float]:
        steps = len(table)
        columns = dict(zip(names, table.double().T.tolist(), strict=True))
        self.spikes = self._watch.found(self._step + 1, columns)
        self._step += steps
        self.total_steps += steps
        self.total_s += elapsed_s
        wait_s = self._wait_s * steps / len(self._values)  # fewer steps than values where one was not finite
        self._total_wait_s += wait_s
        return {
            "step": self._step,
            **dict(zip(names, table.double().mean(0).tolist(), strict=True)),
            "loss_max": max(columns["loss"]),
            "gradient_norm_max": max(columns["gradient_norm"]),
            "spikes": len(self.spikes),
            "learning_rate": self._rates[steps - 1],
            "step_time_s": elapsed_s / steps,
            "data_wait_s": wait_s / steps,
            "clips_per_s": self._effective_batch * steps / max(elapsed_s, 1e-9),
        }

    def summary(self) -> str:
        """All intervals in one line."""
        seconds = max(self.total_s, 1e-9)
        return (
            f"{self.total_steps} steps, {self._effective_batch * self.total_steps / seconds:,.0f} clips/s, "
            f"{100 * self._total_wait_s / seconds:.1f} % of the time waiting for data"
        )
