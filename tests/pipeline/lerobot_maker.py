"""Small LeRobot datasets of numbered frames, v2.1 and v3: what of which episode is where is known exactly.

Frame ``n`` of the dataset shows the number ``n``; its action is ``(n, -n)``, its state ``n / 2``.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import av
import pyarrow as pa
import pyarrow.parquet as pq
from video_maker import number_picture

CAMERA = "observation.images.top"
TASKS = ("pick the cube", "put it back")


def task_of(episode: int) -> str:
    """The task of all frames of an episode."""
    return TASKS[episode % 2]


def write_frames(
    path: Path,
    numbers: Sequence[int],
    fps: int,
    size: int,
    codec: str = "libx264",
    options: Mapping[str, str] | None = None,
) -> None:
    """A video of one frame for each number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options=dict(options or {"g": "2", "bf": "0"}))
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        for place, number in enumerate(numbers):
            frame = av.VideoFrame.from_ndarray(number_picture(number, size), format="rgb24")
            frame.pts = place
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def draw_lerobot(
    root: Path,
    version: str,
    lengths: Sequence[int],
    *,
    files: Sequence[Sequence[int]] = (),
    cameras: Sequence[str] = (CAMERA,),
    fps: int = 10,
    size: int = 64,
    codec: str = "libx264",
    options: Mapping[str, str] | None = None,
) -> Path:
    """Write a dataset of episodes of these lengths.

    Args:
        version: ``v2.1`` or ``v3.0``.
        files: of v3, the episodes of each MP4; all in one when left out.
    """
    starts = [sum(lengths[:episode]) for episode in range(len(lengths))]
    info: dict[str, Any] = {
        "codebase_version": version,
        "fps": fps,
        "chunks_size": 1000,
        "total_episodes": len(lengths),
        "features": {
            "action": {"dtype": "float32", "shape": [2], "names": ["x", "y"]},
            "observation.state": {"dtype": "float32", "shape": [1], "names": ["x"]},
            **{camera: {"dtype": "video", "shape": [size, size, 3]} for camera in cameras},
            **{name: {"dtype": "int64", "shape": [1]} for name in ("episode_index", "index", "task_index")},
            "timestamp": {"dtype": "float32", "shape": [1]},
        },
    }
    rows = [
        {
            "action": [float(start + place), -float(start + place)],
            "observation.state": (start + place) / 2,
            "timestamp": place / fps,
            "episode_index": episode,
            "index": start + place,
            "task_index": episode % 2,
        }
        for episode, start in enumerate(starts)
        for place in range(lengths[episode])
    ]
    schema = pa.schema(
        [
            ("action", pa.list_(pa.float32(), 2)),
            ("observation.state", pa.float32()),
            ("timestamp", pa.float32()),
            *((name, pa.int64()) for name in ("episode_index", "index", "task_index")),
        ]
    )

    def write(path: Path, table: pa.Table) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path)

    (root / "meta").mkdir(parents=True)
    if version == "v2.1":
        info["data_path"] = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
        info["video_path"] = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
        episodes = list[dict[str, Any]]()
        for episode, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            own = [row for row in rows if row["episode_index"] == episode]
            write(
                root / f"data/chunk-000/episode_{episode:06d}.parquet",
                pa.Table.from_pylist(own, schema),
            )
            for camera in cameras:
                path = root / f"videos/chunk-000/{camera}/episode_{episode:06d}.mp4"
                write_frames(path, range(start, start + length), fps, size, codec, options)
            episodes.append({"episode_index": episode, "tasks": [task_of(episode)], "length": length})
        lines = [json.dumps({"task_index": place, "task": task}) for place, task in enumerate(TASKS)]
        (root / "meta/tasks.jsonl").write_text("\n".join(lines) + "\n")
        (root / "meta/episodes.jsonl").write_text("\n".join(map(json.dumps, episodes)) + "\n")
    else:
        info["data_path"] = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
        info["video_path"] = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
        write(root / "data/chunk-000/file-000.parquet", pa.Table.from_pylist(rows, schema))
        write(
            root / "meta/tasks.parquet",
            pa.table({"task_index": list(range(len(TASKS))), "__index_level_0__": list(TASKS)}),
        )
        places = dict[int, tuple[int, float]]()
        for file, held in enumerate(files or [range(len(lengths))]):
            numbers = list[int]()
            for episode in held:
                places[episode] = file, len(numbers) / fps
                numbers += range(starts[episode], starts[episode] + lengths[episode])
            for camera in cameras:
                path = root / f"videos/{camera}/chunk-000/file-{file:03d}.mp4"
                write_frames(path, numbers, fps, size, codec, options)
        about = list[dict[str, Any]]()
        for episode, length in enumerate(lengths):
            file, begin = places[episode]
            row = {"episode_index": episode, "length": length, "tasks": [task_of(episode)]}
            row |= {"data/chunk_index": 0, "data/file_index": 0}
            for camera in cameras:
                row |= {f"videos/{camera}/chunk_index": 0, f"videos/{camera}/file_index": file}
                row |= {f"videos/{camera}/from_timestamp": begin}
                row |= {f"videos/{camera}/to_timestamp": begin + length / fps}
            about.append(row)
        write(root / "meta/episodes/chunk-000/file-000.parquet", pa.Table.from_pylist(about))
    (root / "meta/info.json").write_text(json.dumps(info))
    return root
