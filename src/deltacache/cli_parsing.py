"""From flags to settings; what cannot be read is wrong usage."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from deltacache.schemas.errors import DeltacacheError
from deltacache.schemas.secrets import without_secrets


def refuse_video_flags(context: typer.Context, source: str) -> None:
    """A feature dataset was sampled when it was made: flags about videos would do nothing."""
    kept = {"source", "out", "tokenizer", "store", "precision", "changed_videos"}
    kept |= {"ray_address", "wait_for_nodes", "encoders", "gpus_per_encoder", "decoders"}
    given = [
        f"--{name.replace('_', '-')}"
        for name in context.params
        if name not in kept and getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    ]
    if given:
        raise typer.BadParameter(
            f"{', '.join(given)} concern videos, but {without_secrets(source)} is a feature dataset, sampled already: "
            "leave them out, or give the videos"
        )


def absolute(source: str) -> str:
    """Workers of a cluster have other working directories.

    Raises:
        DeltacacheError: a url with one slash or of chained protocols, which is no path either.
    """
    from deltacache.pipeline.storage.remote_files import refused_place

    if "://" in source:
        return source
    if refused := refused_place(source):
        raise DeltacacheError(refused)
    return str(Path(source).absolute())


def backbone_source(name: str) -> str:
    return absolute(name) if Path(name).is_dir() else name


def whole_frame_settings(flags: dict[str, Any]) -> Any:
    """How whole frames become features, from the flags of a command."""
    from deltacache.pipeline.work.encoders import resolve_precision
    from deltacache.schemas.foresight import DINOV2, FrameFeatureConfig

    return FrameFeatureConfig(
        backbone=backbone_source(flags["backbone"] or DINOV2),
        layers=flags["layers"],
        pca=flags["pca"],
        image_size=flags["image_size"],
        precision=resolve_precision(flags["device"], flags["precision"].value),
    )


def extraction_settings(flags: dict[str, Any]) -> Any:
    """Settings of extract-features from the flags of a command."""
    from deltacache.schemas.datasets import SamplingSettings
    from deltacache.schemas.jobs import (
        DEFAULT_BACKBONE,
        DecodeLimits,
        ExtractionSettings,
    )

    with usage_errors():
        return ExtractionSettings(
            source=absolute(flags["source"]),
            backbone=backbone_source(flags["backbone"] or DEFAULT_BACKBONE),
            layers=flags["layers"],
            pca=flags["pca"].absolute() if flags["pca"] else None,
            image_size=flags["image_size"],
            views=flags["views"],
            sampling=SamplingSettings(
                frames=flags["frames"],
                spacing_min_s=flags["spacing"][0],
                spacing_max_s=flags["spacing"][1],
                allow_duplicates=flags["duplicates"],
                augment=flags["augment"],
                seed=flags["seed"],
                frames_per_second=flags["frames_per_second"],
            ),
            store=flags["store"].value,
            dtype=flags["dtype"].value if "dtype" in flags else "float16",
            precision=flags["precision"].value,
            videos_per_shard=flags["videos_per_shard"],
            exclude_list=flags["exclude_list"],
            column=flags["column"],
            max_failed_fraction=flags["max_failed_fraction"],
            retry_failed=flags["retry_failed"],
            changed_videos=flags["changed_videos"].value,
            allow_schemes=flags["allow_scheme"] or (),
            limits=DecodeLimits(
                timeout_s=flags["decode_timeout"],
                temporary_share=flags["temporary_share"],
                retry_s=flags["retry_for"],
            ),
            cluster=cluster_settings(flags),
        )


def cluster_settings(flags: dict[str, Any]) -> Any:
    """Where a job runs."""
    from deltacache.schemas.jobs import ClusterSettings

    names = ("ray_address", "encoders", "gpus_per_encoder", "decoders")
    return ClusterSettings(**{name: flags[name] for name in names}, wait_for_nodes_s=flags["wait_for_nodes"])


def as_trained(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags of ``tokenize``: size, spacing, layers and backbone that are not given are those of the tokenizer.

    Raises:
        DeltacacheError: there is no tokenizer, or its backbone was a folder, which it knows by name alone.
    """
    from deltacache.models.checkpoints import recorded_config
    from deltacache.schemas.errors import DeltacacheError
    from deltacache.schemas.images import parse_size, size_text

    said = recorded_config(flags["tokenizer"]) or {}  # a released file says nothing
    backbone = said.get("backbone")
    if flags["backbone"] is None and backbone is not None and backbone != "tiny" and "/" not in backbone:
        raise DeltacacheError(
            f"{flags['tokenizer']} was trained on features of the backbone in a folder {backbone!r}: give --backbone "
            "with the path of that folder"
        )
    layers = said.get("layers")
    recorded = {
        "backbone": backbone,
        "layers": ",".join(map(str, layers)) if layers else None,
        "image_size": size_text(parse_size(said.get("image_size", 512))),
        "spacing": tuple(said.get("spacing_s", (0.04, 0.3333))),
    }
    return flags | {name: value for name, value in recorded.items() if flags[name] is None}


def training_settings(config: Any, flags: dict[str, Any]) -> Any:
    """The training settings with what a trainer's flags change; without --batch-size workers share the recipe's."""
    if flags["init_from"] and flags["continue_from"]:
        raise typer.BadParameter("give --init-from or --continue-from, not both")
    if flags["batch_size"] is None:
        config = config.shared_by(flags["workers"], flags["accumulation"])
    config = scheduled(config, flags)
    names = ("batch_size", "accumulation", "seed", "save_every", "keep", "log_every", "probe_every")
    start = "weights" if flags["init_from"] else "everything" if flags["continue_from"] else None
    wandb = flags["wandb"].value if flags["wandb"] else None
    precision = flags["precision"].value if flags["precision"] else None
    return changed(
        config, start=start, wandb=wandb, precision=precision, **{name: flags[name] for name in names}
    )


def scheduled(config: Any, flags: dict[str, Any]) -> Any:
    """The training settings with the asked steps, warm-up and decay; with --resume the schedule that was begun."""
    from deltacache.train.outputs import continued_schedule

    steps, warmup, decay = (flags[name] for name in ("steps", "warmup_steps", "decay_steps"))
    config = config.in_steps(steps, warmup, decay)
    if not flags["resume"]:
        return config
    given = {"warmup_given": warmup is not None, "decay_given": decay is not None}
    return continued_schedule(flags["out"], config, **given)


def changed(config: Any, **changes: Any) -> Any:
    """The config with the given (not None) fields changed, checked again."""
    given = {name: value for name, value in changes.items() if value is not None}
    with usage_errors():
        return type(config).model_validate({**dict(config), **given})


@contextmanager
def usage_errors() -> Iterator[None]:
    """Values that a config refuses are wrong usage: exit code 2."""
    from pydantic import ValidationError

    from deltacache.schemas.refusals import problems_of

    try:
        yield
    except ValidationError as error:
        raise typer.BadParameter(problems_of(error)) from error


def world_path(text: str) -> tuple[str | None, Path]:
    """Of ``[ARCHITECTURE=]PATH``."""
    name, equals, path = text.partition("=")
    if equals and name.isidentifier():
        return name, Path(path).absolute()
    return None, Path(text).absolute()


def with_name(text: str) -> str:
    return text if "=" in text else f"external={text}"


def named_paths(flag: str, texts: list[str]) -> dict[str, str]:
    """``NAME=PATH`` of a flag that may be repeated."""
    named: dict[str, str] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise typer.BadParameter(
                f"{flag} {text}: give NAME=PATH, such as {_with_guessed_name(flag, text)}"
            )
        if name in named:
            raise typer.BadParameter(f"{flag} {text}: {name} was given already ({named[name]})")
        named[name] = path
    return named


def _with_guessed_name(flag: str, text: str) -> str:
    """``/data/VSPW`` as ``vspw=/data/VSPW``; what one cannot tell is VSPW, or of a generator ``external``."""
    from deltacache.schemas.benchmarks import BENCHMARKS

    name, equals, path = text.partition("=")
    path = path if equals else name
    if equals and name:
        return f"{name}=PATH"
    if flag == "--predictions":
        return f"external={path or 'PATH'}"
    known = ("clips", *BENCHMARKS) if flag == "--data" else BENCHMARKS
    if text in known:
        return f"{text}=PATH"
    guessed = next((each for each in known if each in Path(path).name.lower()), "vspw")
    return f"{guessed}={path or 'PATH'}"


def parsed_horizons(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"--horizons {text}: give whole numbers such as 1,3") from None
