"""What a training step costs beside its forward and backward pass: optimizer, clipping, logging, checkpoints.

    python benchmarks/training_overhead.py --batch 64 --candidates 16 --threads 2

The world model at ViT-B size on random delta tokens. A share at a small K bounds that at a larger one from
above, since K makes the step longer and nothing else. Each part is timed by itself, checkpoints as what they
hold up the loop: the copy. How much the thread that writes it slows the steps beside it is not measured.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from deltacache.models.devices import forward_precision
from deltacache.models.worlds.deltaworld import DeltaWorld
from deltacache.schemas.configs import WorldConfig, world_preset
from deltacache.train.data import ResidentClips
from deltacache.train.logs import CheckpointWriter, RunLog
from deltacache.train.loop import Meter
from deltacache.train.optimizer import FiniteGuard, clip_gradients, make_optimizer, set_rate
from deltacache.train.order import MicroBatch, Split, normal_draws
from deltacache.train.world import WorldTask

HIDDEN, FRAMES, CLIPS = 768, 8, 2048


def main() -> None:
    """Print a table of the parts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--candidates", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="processor seconds, for a busy machine; give --threads 1 with it",
    )
    parser.add_argument(
        "--out", type=Path, default=None, help="where checkpoints go; default: a temporary folder"
    )
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(dir=options.out) as folder:
        measure(options, Path(folder))


def measure(options: argparse.Namespace, out: Path) -> None:
    """Time every part on one model and print it as a share of the step."""
    clock = time.process_time if options.cpu_time else time.perf_counter

    def timed(work: Callable[[], object]) -> float:
        """Seconds of one call, the device's work included."""
        wait(device)
        started = clock()
        work()
        wait(device)
        return clock() - started

    device = torch.device(options.device)
    preset = world_preset("released")
    training = preset.training.model_copy(update={"batch_size": options.batch})
    config = WorldConfig.model_validate(
        {**dict(preset), "training": training, "candidates": options.candidates}
    )
    model = DeltaWorld(HIDDEN, **config.model.arguments)
    task = WorldTask(model, drawn(), (1, 1), config, device)
    parameters = list(model.parameters())
    optimizer = make_optimizer(model, training)
    guard = FiniteGuard(optimizer, device)
    parts = list(Split(options.batch).parts_of(range(options.steps + 1)))
    batches = list(zip(parts, task.batches(parts), strict=True))

    def compute(step: int) -> torch.Tensor:
        part, batch = batches[step]
        with forward_precision(device):
            loss, _ = task.training_loss(batch, part)
        loss.backward()
        return loss.detach()

    def update() -> None:
        norm = clip_gradients(parameters, 1e-2)
        guard.look_at(loss, norm)
        set_rate(optimizer, 1e-4)
        optimizer.step()

    def log_row() -> None:
        meter = Meter(0, options.batch)
        for _ in range(training.log_every):
            meter.add({"loss": loss, "gradient_norm": loss}, 1e-4)
        log.add(meter.row())

    loss = compute(0)
    step_s = statistics.median(timed(lambda i=i: compute(i + 1)) for i in range(options.steps))
    update_s = statistics.median(timed(update) for _ in range(7))
    with RunLog(out, "world", 0, training, {}, print) as log:
        row_s = statistics.median(timed(log_row) for _ in range(7))
        for _ in range(20_000):  # a long run's table
            log.add({"step": 1, "loss": 1.0})
        save_rows_s = timed(log.save)
    copy_s, write_s = time_checkpoint(model, optimizer, out, clock)
    size = sum(path.stat().st_size for path in out.rglob("step-*/*"))
    millions = sum(each.numel() for each in parameters) / 1e6
    print(f"{millions:.1f} M parameters, batch {options.batch}, K = {options.candidates}, {device}")
    shares = {
        "clipping, guard and AdamW": update_s,
        f"a row every {training.log_every} steps": row_s / training.log_every,
        f"curves every {training.save_every} steps": save_rows_s / training.save_every,
        f"checkpoint copied every {training.save_every} steps": copy_s / training.save_every,
    }
    show(step_s, shares)
    # One number each: what is left is the host's work, which on a GPU nothing else hides.
    every, host = MicroBatch(1, 0, 1024), torch.device("cpu")
    host_s = statistics.median(
        timed(lambda: normal_draws("noise", 0, every, 1024, (1,), host)) for _ in range(21)
    )
    print(f"host time of drawing the noise of 1,024 positions: {1000 * host_s:.2f} ms")
    print(
        f"checkpoint of {size / 1e9:.2f} GB: copied in {copy_s:.2f} s, written beside the training in {write_s:.2f} s "
        f"(if the training waited for it: {100 * (copy_s + write_s) / training.save_every / step_s:.2f} % of the steps)"
    )


def time_checkpoint(
    model: DeltaWorld, optimizer: torch.optim.Optimizer, out: Path, clock: Callable[[], float]
) -> tuple[float, float]:
    """Seconds that a checkpoint holds up the loop, and that it takes to be written after that."""
    (out / "checkpoints").mkdir()
    with CheckpointWriter(out, "world", {}, keep=1) as writer:
        started = clock()
        writer.save(model, optimizer, 1)
        copied = clock()
        writer.wait()
        return copied - started, clock() - copied


def show(step_s: float, shares: dict[str, float]) -> None:
    """Print seconds a step and their share of the forward and backward pass, part by part and together."""
    print(f"{'forward and backward pass':42} {step_s:10.5f} s per step")
    for name, seconds in {**shares, "together": sum(shares.values())}.items():
        print(f"{name:42} {seconds:10.5f} s per step {100 * seconds / step_s:6.2f} %")


def drawn() -> ResidentClips:
    """Random delta tokens in memory."""
    rng = np.random.default_rng(0)
    tokens = rng.standard_normal((CLIPS, FRAMES, HIDDEN), dtype=np.float32).astype(np.float16)
    times = np.cumsum(rng.uniform(0.04, 0.33, (CLIPS, FRAMES)), axis=1).astype(np.float32)
    return ResidentClips(tokens, times)


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
