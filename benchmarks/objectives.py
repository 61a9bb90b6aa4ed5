"""Objectives of world models on the demo's world: do samples come as often as they should (docs/objectives.md)?

    python benchmarks/objectives.py prepare OUT          once: videos, features, tokenizer, delta tokens
    python benchmarks/objectives.py train OUT            all cells not there yet; --only, --odds and --seed choose
    python benchmarks/objectives.py table OUT            means over seeds, as docs/objectives.md has them
    python benchmarks/objectives.py cost                 a step of ViT-B size, counted and measured here

Every scene is drawn with both outcomes, and features and delta tokens are cached once. A cell trains one recipe on one
outcome of each scene, drawn with the odds, in as many steps as have the FLOP of 1,500 steps of best-of-many, and
scores it on scenes that it has not seen. The two futures of a test scene count by their odds.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import deltacache
from deltacache.demo.demo import FRAMES, IMAGE_SIZE
from deltacache.demo.world import FRAMES_PER_SECOND, draw_world
from deltacache.models.devices import shapes_only
from deltacache.models.flops import training_step_cost, training_step_flops
from deltacache.models.worlds import world_class
from deltacache.schemas.configs import world_preset

SCENES, TEST_SCENES, STEPS = 800, 60, 1500
ODDS, SEEDS = (0.5, 0.8, 0.95), (0, 1, 2)
HORIZONS = (1, 3)
FEW, MANY = 20, 200
"""Samples: those of every table, and those that tell odds."""
Stage = tuple[float, str, dict[str, Any]]
RECIPES: dict[str, tuple[Stage, ...]] = {
    "best-of-many": ((1.0, "tiny", {}),),
    "energy": (
        (1 / 3, "tiny", {"noise_std": 0.1}),
        (2 / 3, "energy-tiny", {"noise_std": 0.1, "candidates": 4}),
    ),
    "flow": ((1.0, "flow-tiny", {}),),
    "best-of-many, σ = 0.1": ((1.0, "tiny", {"noise_std": 0.1}),),
    "best-of-many, σ = 1": ((1.0, "tiny", {"noise_std": 1.0}),),
    "energy alone, K = 4, σ = 0.1": ((1.0, "energy-tiny", {"noise_std": 0.1, "candidates": 4}),),
    "energy alone, K = 8, σ = 0.1": ((1.0, "energy-tiny", {"noise_std": 0.1}),),
    "energy alone, K = 8, σ = 1": ((1.0, "energy-tiny", {"noise_std": 1.0}),),
    "energy, K = 8": (
        (1 / 3, "tiny", {"noise_std": 0.1}),
        (2 / 3, "energy-tiny", {"noise_std": 0.1, "candidates": 8}),
    ),
}
"""Stages: share of the FLOP, preset, changes of it; each goes on with weights and moments of the one before."""
MAIN = ("best-of-many", "energy", "flow")


def prepare(out: Path) -> None:
    """Videos of every scene and outcome; ``train`` and ``test`` features, tokenizer, delta tokens."""
    for outcome, odds in (("left", 1.0), ("right", 0.0)):
        draw_world(
            out / outcome,
            seed=0,
            train_videos=SCENES,
            test_scenes=TEST_SCENES,
            image_size=IMAGE_SIZE,
            odds=odds,
        )
        (out / "train").mkdir(exist_ok=True)
        for video in (out / outcome / "videos" / "train").glob("*.mp4"):
            video.replace(out / "train" / f"{video.stem}-{outcome}.mp4")
    sampling: dict[str, Any] = {
        "backbone": "tiny",
        "image_size": IMAGE_SIZE,
        "frames": FRAMES,
        "spacing": (1 / FRAMES_PER_SECOND, 1 / FRAMES_PER_SECOND),
        "augment": False,
        "encoders": 0,
    }
    deltacache.extract_features(out / "train", out / "features", **sampling)
    deltacache.extract_features(out / "left" / "videos" / "test", out / "test-features", **sampling)
    deltacache.train_tokenizer(out / "features", out / "tokenizer", preset="tiny", device="cpu")
    deltacache.tokenize(out / "features", out / "deltas", out / "tokenizer", encoders=0)


def train_cell(out: Path, name: str, odds: float, seed: int) -> None:
    """Train and score one recipe; leaves ``cells/<...>.json``."""
    cell = out / "cells" / f"{name} {odds:g} {seed}"
    result = cell.with_name(cell.name + ".json")
    if result.exists():
        return
    lefts = np.random.default_rng((seed, round(1000 * odds))).random(SCENES) < odds
    chosen = {f"train-{index:04d}-{'left' if left else 'right'}.mp4" for index, left in enumerate(lefts)}
    dataset = deltacache.open_dataset(out / "deltas", "deltas")
    uris = [uri for uri in dataset.index["video_uri"].to_pylist() if Path(uri).name in chosen]
    begun, steps, world = time.perf_counter(), 0, None
    for number, (share, preset, changes) in enumerate(RECIPES[name]):
        steps += round(share * STEPS * _flops("tiny", {}) / _flops(preset, changes))
        world = deltacache.train_world(
            out / "deltas",
            cell / f"world-{number}",
            preset=preset,
            steps=steps,
            warmup_steps=100,
            seed=seed,
            where="video_uri IN (" + ", ".join(f"'{uri}'" for uri in uris) + ")",
            continue_from=world,
            device="cpu",
            save_every=steps,
            probe_every=steps,
            **changes,
        )
    trained_s = time.perf_counter() - begun
    futures = cell / "futures.csv"
    rows = [
        f"scene-{scene:03d}-{outcome}.mp4,scene-{scene:03d},{outcome},{chance:.3f}"
        for scene in range(TEST_SCENES)
        for outcome, chance in (("left", odds), ("right", 1 - odds))
    ]
    futures.write_text("\n".join(["video_uri,scene,outcome,probability", *rows]) + "\n")
    found: dict[str, Any] = {"steps": steps, "seconds": trained_s, "lefts": float(lefts.mean())}
    for samples in (FEW, MANY):
        results = deltacache.evaluate(
            cell / f"of-{samples}",
            {"clips": out / "test-features"},
            tokenizer=out / "tokenizer",
            world=world,
            futures=futures,
            samples=samples,
            horizons=HORIZONS,
            examples=2 if samples == FEW else 0,
            device="cpu",
        )
        for row in results.metrics.to_pylist():
            if row["metric"] in ("odds_error", "mode_coverage") and row["world"] is not None:
                found[f"{row['metric']}/{samples}/{row['horizon']}"] = row["value"]
        _weighted(results.folder / "sequences.parquet", samples, odds, found)
    result.write_text(json.dumps(found, indent=1))


def _weighted(sequences: Path, samples: int, odds: float, found: dict[str, Any]) -> None:
    """Means over test videos in which the two futures of a scene count by their odds."""
    import pyarrow.parquet as pq

    metric, aggregation, key = (
        ("energy_score", "single", f"energy/{MANY}")
        if samples == MANY
        else ("smooth_l1", "best", f"best/{FEW}")
    )
    for row in pq.read_table(sequences).to_pylist():
        if row["world"] is None or (row["metric"], row["aggregation"]) != (metric, aggregation):
            continue
        weight = odds if "-left" in str(row["unit"]) else 1 - odds
        at = f"{key}/{row['horizon']}"
        found[at] = found.get(at, 0.0) + weight * row["value"] / TEST_SCENES


def _flops(preset: str, changes: dict[str, Any]) -> int:
    """Counted, of all that a step of this package multiplies, of one clip."""
    config = world_preset(preset)
    model = config.model.model_copy(
        update={name: value for name, value in changes.items() if name != "candidates"}
    )
    made: Any = world_class(model.architecture)
    world = made(64, **model.arguments)
    return training_step_flops(world, FRAMES, (4, 4), changes.get("candidates", config.candidates)).here


def table(out: Path) -> None:
    """Means and standard deviations over seeds."""
    cells = {path.stem: json.loads(path.read_text()) for path in sorted((out / "cells").glob("*.json"))}
    columns = {
        "odds error": (f"odds_error/{MANY}", 3),
        "energy score": (f"energy/{MANY}", 4),
        "best of 20": (f"best/{FEW}", 4),
        "coverage": (f"mode_coverage/{FEW}", 2),
    }
    heading = ["objective (seeds)", "steps", *columns, "energy score, best of 20 against best-of-many"]
    for odds in ODDS:
        print(f"\nOdds {odds:g}, horizons 1 / 3:\n\n| {' | '.join(heading)} |\n|{'---|' * len(heading)}")
        base = _values(cells, "best-of-many", odds)
        for name in RECIPES:
            if not (own := _values(cells, name, odds)):
                continue
            texts = [
                " / ".join(_text(own[f"{key}/{horizon}"], digits) for horizon in HORIZONS)
                for key, digits in columns.values()
            ]
            against = [
                " / ".join(
                    f"{100 * (statistics.mean(own[f'{key}/{h}']) / statistics.mean(base[f'{key}/{h}']) - 1):+.0f} %"
                    for h in HORIZONS
                )
                for key in (f"energy/{MANY}", f"best/{FEW}")
            ]
            steps = f"{own['steps'][0]:,}"
            print(f"| {name} ({len(own['steps'])}) | {steps} | {' | '.join(texts)} | {', '.join(against)} |")


def _text(values: list[float], digits: int) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def _values(cells: dict[str, dict[str, float]], name: str, odds: float) -> dict[str, list[float]]:
    own = [cell for stem, cell in cells.items() if stem.rsplit(" ", 2)[:2] == [name, f"{odds:g}"]]
    return {key: [cell[key] for cell in own] for key in own[0]} if own else {}


def cost(clips: int = 4) -> None:
    """A training step of a ViT-B predictor on clips of 8 delta tokens: counted, and measured side by side here."""
    cpu, grid = torch.device("cpu"), (32, 32)
    cases = [
        ("best_of_many", 256),
        ("best_of_many", 16),
        ("energy", 8),
        ("energy", 16),
        ("flow", 4),
        ("flow", 16),
    ]
    print(
        "| objective | K | GFLOP per clip, this package | definition | ms per clip |\n|---|---|---|---|---|"
    )
    for objective, candidates in cases:
        config = world_preset("released").model.model_copy(update={"objective": objective, "noise_std": 1.0})
        made: Any = world_class("deltaworld")
        with shapes_only():
            world = made(768, **config.arguments)
        flops = training_step_flops(world, 8, grid, candidates)
        taken = training_step_cost(world, 8, grid, candidates, clips, cpu).seconds / clips
        print(
            f"| {objective} | {candidates} | {flops.here / 1e9:.2f} | {flops.plain / 1e9:.2f} | {1e3 * taken:.0f} |",
            flush=True,
        )


def main() -> None:
    """Parse, then one of the four."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("prepare", "train", "table", "cost"))
    parser.add_argument("out", type=Path, nargs="?", default=Path("objectives"))
    parser.add_argument("--only", nargs="+", choices=list(RECIPES), default=list(MAIN))
    parser.add_argument("--odds", nargs="+", type=float, default=list(ODDS))
    parser.add_argument("--seed", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    if asked.what == "prepare":
        prepare(asked.out)
    elif asked.what == "table":
        table(asked.out)
    elif asked.what == "cost":
        cost()
    else:
        for seed in asked.seed:
            for odds in asked.odds:
                for name in asked.only:
                    train_cell(asked.out, name, odds, seed)


if __name__ == "__main__":
    main()
