"""LeRobot datasets (v2.0, v2.1 and v3) as sources: episodes are the videos, what is known of their frames side arrays.

::

    v2.x  meta/info.json, tasks.jsonl, episodes.jsonl    data and one MP4 a camera for each episode
    v3    meta/info.json, tasks.parquet, episodes/…      data and MP4s of many episodes; meta/episodes says from
                                                         which to which time of the MP4 an episode goes

``info.json`` has the templates of the paths. Times of rows are seconds from the first frame of their episode.
"""

import json
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from io import BytesIO
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from deltacache.pipeline.inputs.folders import ListedFile, VideoSource, source_of
from deltacache.pipeline.inputs.lists import Tell
from deltacache.pipeline.inputs.locations import Episode, episode_version
from deltacache.pipeline.inputs.side_arrays import (
    SideValues,
    column_values,
    is_array_name,
    resampled,
    with_rules,
)
from deltacache.pipeline.storage.errors import read_file
from deltacache.pipeline.storage.storage import client_errors, dataset_root, names_in
from deltacache.pipeline.storage.storage import retried_call as retried
from deltacache.schemas.datasets import SideArray, SideRule, fingerprint_of
from deltacache.schemas.errors import DatasetError, DeltacacheError, SettingsError
from deltacache.schemas.texts import counted

INFO = "meta/info.json"
_NUMBERS = ("float", "int", "uint", "bool")
_TASK = "task"


@dataclass(frozen=True, slots=True)
class _EpisodeOf:
    """What the metadata says of one episode.

    Attributes:
        data: of its rows, below the dataset's folder.
        videos: of each camera the file, and from which to which second of it; None: all of it.
    """

    index: int
    length: int
    tasks: tuple[str, ...]
    data: str
    videos: Mapping[str, tuple[str, tuple[float, float] | None]]


class LeRobotDataset:
    """The metadata of one dataset; the files are read where they are first needed.

    Args:
        place: path or url of its folder.
    """

    def __init__(self, place: str) -> None:
        self.place = place.rstrip("/")
        info = read_info(self.place)
        if info is None:
            raise DatasetError(
                f"{self.place} is not a LeRobot dataset: it has no {INFO} with a codebase_version"
            )
        try:
            version = str(info["codebase_version"]).removeprefix("v")
            self.major, self.fps = int(version.partition(".")[0]), float(info["fps"])
            self._chunk = int(info.get("chunks_size") or 1000)
            self._paths = {name: str(info[f"{name}_path"] or "") for name in ("data", "video")}
            self.features: dict[str, dict[str, Any]] = dict(info["features"])
            kinds = {key: str(feature["dtype"]) for key, feature in self.features.items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._damaged(INFO, error) from error
        if self.major not in (2, 3):
            raise DatasetError(
                f"{self.place} is a LeRobot dataset of version {version}: v2.0, v2.1 and v3 are read. Convert it with "
                "LeRobot's own scripts"
            )
        if not (math.isfinite(self.fps) and self.fps > 0):
            raise self._damaged(INFO, ValueError(f"fps is {self.fps}"))
        self.cameras = sorted(key for key, kind in kinds.items() if kind == "video")
        self.pictures = sorted(key for key, kind in kinds.items() if kind == "image")

    def _damaged(self, name: str, error: BaseException) -> DatasetError:
        return DatasetError(
            f"{self.place}/{name} is not what a LeRobot dataset holds ({type(error).__name__}: {error}): download the "
            "dataset again, or convert it with LeRobot's own scripts"
        )

    def chosen(self, asked: Collection[str]) -> list[str]:
        """The keys of the cameras that are asked for: whole, or their last part; the only one if none is.

        Raises:
            SettingsError: there is no such camera, or there are several and none was asked for.
        """
        if not self.cameras:
            pictures = f" ({', '.join(self.pictures)} are pictures in Parquet files)" if self.pictures else ""
            raise DatasetError(
                f"{self.place} has no camera with videos{pictures}: convert it to one with videos, with LeRobot's own "
                "scripts"
            )
        if not asked and len(self.cameras) > 1:
            raise SettingsError(
                f"{self.place} has {len(self.cameras)} cameras: give --camera {' or --camera '.join(self.cameras)}; "
                "several may be given"
            )
        chosen = list[str]()
        for name in asked or self.cameras:
            found = [key for key in self.cameras if name in (key, key.rpartition(".")[2])]
            if len(found) != 1:
                raise SettingsError(
                    f"--camera {name}: {self.place} has {', '.join(self.cameras)}. Give one of these"
                )
            chosen += found
        return sorted(set(chosen))

    @cached_property
    def episodes(self) -> list[_EpisodeOf]:
        """In the order of their numbers.

        Raises:
            DatasetError: the metadata cannot be read.
        """
        try:
            found = self._episodes_of_v2() if self.major == 2 else self._episodes_of_v3()
            return sorted(found, key=lambda episode: episode.index)
        except (KeyError, IndexError, TypeError, ValueError, pa.ArrowException, *client_errors()) as error:
            name = "meta/episodes.jsonl" if self.major == 2 else "meta/episodes"
            raise self._damaged(name, error) from error

    def _episodes_of_v2(self) -> Iterable[_EpisodeOf]:
        for row in self._lines("meta/episodes.jsonl"):
            index = int(row["episode_index"])
            names = {"episode_chunk": index // self._chunk, "episode_index": index}
            videos = {key: (self._path("video", **names, video_key=key), None) for key in self.cameras}
            tasks = tuple(str(task) for task in row.get("tasks") or ())
            yield _EpisodeOf(index, int(row["length"]), tasks, self._path("data", **names), videos)

    def _episodes_of_v3(self) -> Iterable[_EpisodeOf]:
        folder = dataset_root(self.place) / "meta" / "episodes"
        files = [
            f"meta/episodes/{chunk}/{name}"
            for chunk in names_in(folder)
            for name in names_in(folder / chunk)
            if name.endswith(".parquet")
        ]
        if not files:
            raise ValueError("no Parquet file")
        of_camera = ("chunk_index", "file_index", "from_timestamp", "to_timestamp")
        columns = ["episode_index", "length", "data/chunk_index", "data/file_index", "tasks"]
        columns += [f"videos/{key}/{name}" for key in self.cameras for name in of_camera]
        for row in (row for file in files for row in _table(f"{self.place}/{file}", columns).to_pylist()):
            videos = dict[str, tuple[str, tuple[float, float] | None]]()
            length = int(row["length"])
            for key in self.cameras:
                chunk, file, start, end = (row[f"videos/{key}/{name}"] for name in of_camera)
                if None in (chunk, file, start, end):
                    continue  # this camera did not record this episode
                # Times are sums of rounded durations. A frame belongs to it if its middle does.
                span = start - 0.5 / self.fps, min(end, start + length / self.fps) - 0.5 / self.fps
                if not span[0] < span[1]:
                    raise ValueError(f"episode {row['episode_index']} goes from {start} to {end} s of {key}")
                path = self._path("video", chunk_index=int(chunk), file_index=int(file), video_key=key)
                videos[key] = path, span
            names = {name: int(row[f"data/{name}"]) for name in ("chunk_index", "file_index")}
            tasks = tuple(str(task) for task in row["tasks"] or ())
            yield _EpisodeOf(int(row["episode_index"]), length, tasks, self._path("data", **names), videos)

    def _path(self, what: str, **names: Any) -> str:
        path = self._paths[what].format(**names)
        if not path or path.startswith("/") or ".." in PurePosixPath(path).parts:
            raise ValueError(f"{what}_path {self._paths[what]!r} of {INFO} is not a path below the dataset")
        return path

    def _lines(self, name: str) -> list[dict[str, Any]]:
        content = read_file(dataset_root(self.place) / name).decode()
        return [json.loads(line) for line in content.splitlines() if line.strip()]

    @cached_property
    def tasks(self) -> dict[int, str]:
        """Texts by ``task_index``; none where the dataset has no tasks.

        Raises:
            DatasetError: the file cannot be read.
        """
        name = "meta/tasks.jsonl" if self.major == 2 else "meta/tasks.parquet"
        try:
            if self.major == 2:
                return {int(row["task_index"]): str(row["task"]) for row in self._lines(name)}
            table = _table(f"{self.place}/{name}")
            texts = [
                each for each in table.column_names if each != "task_index"
            ]  # pandas names its index freely
            named = _TASK if _TASK in texts else texts[0]
            return dict(zip(table["task_index"].to_pylist(), map(str, table[named].to_pylist()), strict=True))
        except FileNotFoundError:
            return {}
        except (KeyError, IndexError, TypeError, ValueError, pa.ArrowException, *client_errors()) as error:
            raise self._damaged(name, error) from error

    def videos(
        self, asked: Collection[str], files: Mapping[str, ListedFile], tell: Tell | None
    ) -> list[VideoSource]:
        """A video for each episode and camera, named ``<camera>/episode_<number>``.

        Args:
            files: what lies in the dataset, by path below it.
        """
        cameras, sources, lacking = self.chosen(asked), list[VideoSource](), 0
        shares = dict[str, int]()
        for episode in self.episodes:
            for path, _ in episode.videos.values():
                shares[path] = shares.get(path, 0) + 1
        for episode in self.episodes:
            rows = files.get(episode.data, ListedFile(0, ""))
            about = fingerprint_of({"length": episode.length, "tasks": list(episode.tasks)})[:8]
            for camera in cameras:
                if camera not in episode.videos:
                    lacking += 1
                    continue
                path, span = episode.videos[camera]
                file = files.get(path, ListedFile(0, ""))
                start, end = span or (None, None)
                at = Episode(f"{self.place}/{path}", f"{self.place}/{episode.data}", about, start, end)
                version = episode_version(file.version, rows.version, at)
                uri = f"{camera}/episode_{episode.index:06d}"
                sources.append(source_of(uri, at, ListedFile(file.size_bytes // shares[path], version)))
        if tell is not None:
            more = f"; {lacking} more were not recorded by their camera" if lacking else ""
            others = sorted({*self.cameras} - {*cameras})
            also = f"; not taken: {', '.join(others)} (--camera NAME)" if others else ""
            tell(
                f"{self.place}: a LeRobot dataset, {counted(len(sources), 'episode')} of "
                f"{', '.join(cameras)}{more}{also}"
            )
        if not sources:
            raise DatasetError(f"{self.place} has no episode of {', '.join(cameras)}: nothing to extract")
        return sources


def read_info(place: str) -> dict[str, Any] | None:
    """``meta/info.json`` of a folder, if it is a LeRobot dataset; None of anything else."""
    try:
        info = json.loads(read_file(dataset_root(place) / INFO))
    except (*client_errors(), ValueError, DeltacacheError):
        return None  # looking for videos there says what is wrong with it
    return info if isinstance(info, dict) and "codebase_version" in info else None


def _table(place: str, columns: list[str] | None = None) -> pa.Table:
    return pq.read_table(BytesIO(retried(lambda: read_file(dataset_root(place)))), columns=columns)


class LeRobotRows:
    """Actions, states and tasks of the episodes of a dataset. A worker gets the place alone and reads what it needs.

    Args:
        rules: of arrays, by name; the others take the row nearest in time, which is a frame's own.
    """

    def __init__(self, place: str, rules: Mapping[str, SideRule]) -> None:
        self.place, self._rules = place, dict(rules)
        self._file = lru_cache(maxsize=2)(self._read)

    def __reduce__(self) -> tuple[type["LeRobotRows"], tuple[str, dict[str, SideRule]]]:
        return LeRobotRows, (self.place, self._rules)

    @cached_property
    def _dataset(self) -> LeRobotDataset:
        return LeRobotDataset(self.place)

    @cached_property
    def _data(self) -> dict[int, str]:
        return {episode.index: episode.data for episode in self._dataset.episodes}

    @cached_property
    def _columns(self) -> dict[str, str]:
        """Names of arrays, and the columns that hold them."""
        found = dict[str, str]()
        for key, feature in self._dataset.features.items():
            is_known = key == "action" or key.startswith(("action.", "observation."))
            is_numbers = str(feature["dtype"]).startswith(_NUMBERS) and len(feature.get("shape") or ()) == 1
            if is_known and is_numbers:
                name = key.removeprefix("observation.").replace(".", "_")
                whole = key.replace(".", "_")
                name = name if is_array_name(name) and name not in (*found, _TASK) else whole
                if is_array_name(name) and name not in found:
                    found[name] = key
        return found

    @property
    def arrays(self) -> dict[str, SideArray]:
        """What a dataset's card says of them.

        Raises:
            DatasetError: the dataset's metadata cannot be read.
            SettingsError: a rule for an array that is not there, or one that texts cannot have.
        """
        features = self._dataset.features
        widths = {name: int(features[key]["shape"][0]) for name, key in self._columns.items()}
        found = {name: SideArray(width=width if width > 1 else None) for name, width in widths.items()}
        if self._dataset.tasks:
            found[_TASK] = SideArray(kind="text")
        return with_rules(self.place, found, self._rules, "nearest")

    def lacking(self, video_uris: Iterable[str]) -> list[str]:
        """Every episode has rows."""
        return [uri for uri in video_uris if _episode_of(uri) not in self._data]

    def at(self, video_uri: str, times_s: np.ndarray) -> SideValues:
        """What is known at the times (T,) of a clip's frames.

        Raises:
            DatasetError: its rows are not there, or not as ``info.json`` says.
        """
        episode = _episode_of(video_uri)
        file = self._data[episode]
        arrays = self.arrays
        try:
            table = self._file(file).filter(pc.field("episode_index") == episode)
            times = table["timestamp"].cast(pa.float64()).to_numpy()
            order = np.argsort(times, kind="stable")
            values: SideValues = {}
            for name, key in self._columns.items():
                column = column_values(f"{self.place}/{file}", key, table[key].combine_chunks())
                assert isinstance(column, np.ndarray)  # numbers, as info.json says
                values[name] = column.reshape(-1, *arrays[name].shape(1)[1:])[order]
            if _TASK in arrays:
                indices = table["task_index"].to_pylist()
                values[_TASK] = [self._dataset.tasks[indices[row]] for row in order.tolist()]
        except (KeyError, ValueError, AssertionError, pa.ArrowException, *client_errors()) as error:
            raise DatasetError(
                f"{self.place}/{file} cannot be read as rows of episode {episode} ({type(error).__name__}: {error}): "
                f"it must have the columns that {INFO} names. Download the dataset again"
            ) from error
        if not len(times) or not np.isfinite(times).all():
            raise DatasetError(
                f"{self.place}/{file} has no rows of episode {episode}, or some without a time: download the dataset "
                "again"
            )
        frames = times_s.astype(np.float64)
        return {
            name: resampled(times[order], values[name], frames, array.rule) for name, array in arrays.items()
        }

    def _read(self, file: str) -> pa.Table:
        columns = ["episode_index", "timestamp", *self._columns.values()]
        columns += ["task_index"] if self._dataset.tasks else []
        return _table(f"{self.place}/{file}", columns)


def _episode_of(video_uri: str) -> int:
    return int(video_uri.rpartition("_")[2])
