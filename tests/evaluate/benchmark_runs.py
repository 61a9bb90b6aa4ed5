"""Evaluations of the miniature benchmarks with the golden models."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.torch import load_file

from deltacache.evaluate.settings import BenchmarkEvaluation, benchmark_evaluation
from deltacache.models.checkpoints import save_model
from deltacache.models.rgb_decoder import RgbDecoder
from deltacache.schemas.benchmarks import BENCHMARKS
from golden_sizes import golden_sizes

SAMPLES = 4
TABLES = ("metrics", "sequences", "statistics", "samples")


def mini_settings(golden: Path, mini: Path, out: Path, **changes: Any) -> BenchmarkEvaluation:
    """All three benchmarks with heads, tokenizer and world model, on the CPU."""
    fields: dict[str, Any] = {
        "out": out,
        "data": {name: mini / name for name in BENCHMARKS},
        "heads": {name: golden / "eval" / f"head_{name}.safetensors" for name in BENCHMARKS},
        "backbone": str(golden / "tiny" / "backbone"),
        "tokenizer": golden / "tiny" / "deltatok_released.safetensors",
        "worlds": (golden / "tiny" / "deltaworld.safetensors",),
        "image_size": golden_sizes(golden)[0],
        "samples": SAMPLES,
        "examples": 0,
        "device": "cpu",
    }
    return benchmark_evaluation(**(fields | changes))


def table(out: Path, name: str) -> pa.Table:
    """A table without what differs between runs by design."""
    read = pq.read_table(out / f"{name}.parquet")
    return read.drop_columns([column for column in ("created_at",) if column in read.column_names])


def same_tables(one: Path, other: Path) -> bool:
    """Whether all tables of two evaluations are equal to the last bit."""
    return all(table(one, name).equals(table(other, name)) for name in TABLES)


def saved_decoder(golden: Path, folder: Path, shift: float = 0.0) -> Path:
    """The golden decoder, whose pictures are ``shift`` brighter."""
    side, patches, hidden = golden_sizes(golden)
    decoder = RgbDecoder(
        hidden, width=48, layers=2, num_heads=4, mlp_width=96, patch_size=side // patches, image_size=side
    )
    decoder.load_state_dict(load_file(golden / "tiny" / "head_rgb.safetensors"), strict=False)
    for name, parameter in decoder.named_parameters():
        if name.endswith("bias"):
            parameter.data += shift
    save_model(folder, decoder, "rgb_decoder", {})
    return folder
