"""How fast a job ran, against what its parts could do alone, and which part was the limit."""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

from deltacache.pipeline.shard_work import ShardResult


@dataclass
class Throughput:
    """Adds up what shards report. Seconds of work are summed over workers; ``wall_s`` is the clock."""

    decoders: int
    encoders: int
    clips: int = 0
    bytes_written: int = 0
    decode_s: float = 0.0
    encode_s: float = 0.0
    write_s: float = 0.0
    _forward_s: list[float] = field(default_factory=list)
    _start: float = field(default_factory=time.perf_counter)
    _end: float = 0.0

    def add(self, result: ShardResult) -> None:
        """Count one committed shard."""
        self.clips += result.clips
        self.bytes_written += result.bytes_written
        self.decode_s += result.decode_s
        self.encode_s += result.encode_s
        self.write_s += result.write_s
        self._forward_s.append(result.forward_s)
        self._end = time.perf_counter()

    @property
    def wall_s(self) -> float:
        """From the first task handed out to the last shard committed, workers' start included."""
        return max(self._end - self._start, 1e-9)

    @property
    def clips_per_s(self) -> float:
        """Clips committed a second of wall time."""
        return self.clips / self.wall_s

    @property
    def forward_clips_per_s(self) -> float:
        """What all encoders together would do with frames in memory; 0 when nothing was measured."""
        measured = [seconds for seconds in self._forward_s if seconds > 0]
        return self.encoders * len(measured) / sum(measured) if measured else 0.0

    def busy(self) -> dict[str, float]:
        """Share of the wall time that each kind of worker was at work."""
        encoder_time = self.encoders * self.wall_s
        return {
            "decoding": self.decode_s / (max(self.decoders, 1) * self.wall_s),
            "the forward": self.encode_s / encoder_time,
            "writing": self.write_s / encoder_time,
        }

    @property
    def limit(self) -> str:
        """The busiest kind of worker; starting up, when all of them mostly waited."""
        shares = self.busy()
        busiest = max(shares, key=lambda name: shares[name])
        return busiest if shares[busiest] > 0.5 else f"starting workers (then {busiest})"

    def line(self) -> str:
        """The last line of a job."""
        ratio = ""
        if self.forward_clips_per_s:
            share = self.clips_per_s / self.forward_clips_per_s
            ratio = f", {share:.2f} of the pure forward rate ({self.forward_clips_per_s:.2f} clips/s)"
        return f"{self.clips_per_s:.2f} clips/s over {self.wall_s:.1f} s{ratio}; limit: {self.limit}"

    def save(self, path: Path) -> None:
        """Write the figures as JSON."""
        figures = {
            "clips": self.clips,
            "bytes_written": self.bytes_written,
            "wall_s": self.wall_s,
            "clips_per_s": self.clips_per_s,
            "forward_clips_per_s": self.forward_clips_per_s,
            "decoders": self.decoders,
            "encoders": self.encoders,
            "busy": self.busy(),
            "limit": self.limit,
        }
        path.write_text(json.dumps(figures, indent=2) + "\n")
