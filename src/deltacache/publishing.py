"""``push``: an output and its card to the Hugging Face hub.

Large files that the hub has already, from an upload that was interrupted or from any other, are not sent again. The
token is the hub client's business: it is neither read nor written here.
"""

import json
import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from deltacache import __version__
from deltacache.evaluate.output import METRICS, OURS, PARTS, read_metrics
from deltacache.evaluate.report.runs import facts_of, open_runs
from deltacache.evaluate.report.tables import caption, plain_text
from deltacache.models import pca
from deltacache.models.checkpoints import CONFIG_FILE, WEIGHTS_FILE, holds_checkpoint, recorded_config
from deltacache.pipeline.datasets.changes import describe
from deltacache.pipeline.datasets.dataset import open_dataset
from deltacache.pipeline.datasets.verification import verify_dataset
from deltacache.pipeline.datasets.writing import CARD_FILE, DATASET_FILES, is_dataset
from deltacache.pipeline.storage.files import is_temporary
from deltacache.pipeline.storage.locking import read_lock
from deltacache.schemas.datasets import DatasetCard, parse_size, size_text
from deltacache.schemas.errors import DatasetError, DeltacacheError
from deltacache.schemas.hub import HubName, Kind, quiet_client
from deltacache.schemas.jobs import PushSettings
from deltacache.schemas.progress import Reporter
from deltacache.schemas.secrets import without_secrets
from deltacache.schemas.texts import counted, disk_text
from deltacache.train.checkpoints import STATE_FILE, finished_checkpoints

README = "README.md"
_DINOV3_LICENCE = "https://ai.meta.com/resources/models-and-libraries/dinov3-license/"
_OF_RUN = ("config.yaml", "curves.parquet", "curves.png")
_KINDS = "a finished feature or delta dataset, a training output or checkpoint, a PCA, or an evaluation"


@dataclass(frozen=True)
class Package:
    """What is uploaded: files by their place in the repository, and the card.

    Attributes:
        title: what it is, in words.
        identity: of the file that says so: its name, and what of it a newer version has too.
        metadata: of the card, as the hub reads it.
        sections: of the card, by heading.
        replaced: folders in the repository of which nothing else is left.
    """

    kind: Kind
    title: str
    files: Mapping[str, Path]
    identity: tuple[str, Mapping[str, Any]]
    metadata: Mapping[str, Any]
    sections: Mapping[str, str]
    replaced: tuple[str, ...] = ()

    def card(self, repo: str) -> str:
        """``README.md`` for a repository of this name, without credentials."""
        text = f"---\n{yaml.safe_dump(dict(self.metadata), sort_keys=False)}---\n\n# {self.title}\n"
        for heading, body in self.sections.items():
            text += f"\n## {heading}\n\n{body.replace('{repo}', repo)}\n"
        return without_secrets(text)


def push(settings: PushSettings, reporter: Reporter) -> str:
    """Upload what lies at ``settings.path``; returns its name with the commit, ``hf://org/name@commit``.

    Raises:
        DeltacacheError: nothing that can be pushed, a dataset that is damaged or not finished, a repository that holds
            something else or is public where a private one is asked for, or the hub refuses or does not answer.
    """
    from huggingface_hub import HfApi

    package = packed(settings, reporter)
    name = HubName(package.kind, _repo(settings.repo))
    size = sum(path.stat().st_size for path in package.files.values())
    reporter.line(
        f"push: {package.title}, {counted(len(package.files), 'file')}, {disk_text(size)}, to {name.page}"
    )
    api, kind = HfApi(library_name="deltacache", library_version=__version__), package.kind
    with (
        tempfile.TemporaryDirectory(prefix="deltacache-push-") as folder,
        _readable(settings, name),
        quiet_client(),
        warnings.catch_warnings(),
    ):
        for place, path in package.files.items():
            link = Path(folder, place)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path.resolve())
        Path(folder, README).write_text(package.card(name.repo))
        api.create_repo(name.repo, repo_type=kind, private=settings.private or None, exist_ok=True)
        info = api.repo_info(name.repo, repo_type=kind)
        if settings.private and not info.private:
            raise DeltacacheError(
                f"{name.page} is public, and --private was given: give another REPO, make it private in its settings, "
                "or leave --private out"
            )
        _check_same(api, name, package)
        # The client warns of every table in a repository of a model.
        warnings.filterwarnings("ignore", "It seems that you are about to commit a data file")
        done = api.upload_folder(
            repo_id=name.repo,
            repo_type=kind,
            folder_path=folder,
            commit_message=f"{package.title} (deltacache {__version__})",
            delete_patterns=[f"{each}/*" for each in package.replaced],
        )
    pushed = HubName(kind, name.repo, done.oid)
    reporter.line(f"push: {name.page} holds all of it, as {pushed}")
    return str(pushed)


def packed(settings: PushSettings, reporter: Reporter) -> Package:
    """What ``push`` would upload; a dataset is verified first."""
    path = settings.path
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise DeltacacheError(f"{path} {what}: push takes the folder of {_KINDS}")
    lock = read_lock(path)
    if lock is not None and lock.alive:
        raise DeltacacheError(
            f"{path} is being written by {lock.command} (process {lock.pid}): push it when it is done"
        )
    if is_dataset(path):
        package = _dataset(path, reporter)
    elif (path / METRICS).is_file():
        package = _evaluation(path)
    elif (path / pca.WEIGHTS_FILE).is_file():
        package = _pca(path)
    elif holds_checkpoint(path) and recorded_config(path) is not None:
        package = _model(path, settings)
    elif holds_checkpoint(path):
        raise DeltacacheError(
            f"{path} holds a released file, which does not record what it was made from: push takes {_KINDS}"
        )
    else:
        raise DeltacacheError(f"{path} is not an output that push knows: give the folder of {_KINDS}")
    idle = [
        flag
        for flag, given in (
            ("--evaluation", settings.evaluation),
            ("--training-state", settings.training_state),
        )
        if given and WEIGHTS_FILE not in package.files
    ]
    if idle:
        raise DeltacacheError(
            f"{idle[0]} is for tokenizers, world models and heads, but {path} is another kind of output: leave it out"
        )
    return package


def _repo(text: str) -> str:
    match = re.fullmatch(r"(?:hf:/{1,2})?(?:(?:datasets|models)/)?([\w][\w.-]*/[\w][\w.-]*)/?", text)
    if match is None or "--" in match[1] or ".." in match[1]:
        raise DeltacacheError(f"{text} is not the name of a repository on the hub: give OWNER/NAME")
    return match[1]


def _check_same(api: Any, name: HubName, package: Package) -> None:
    """Refuse a repository that holds something else; a newer version of the same goes over the older one."""
    file, ours = package.identity
    held = {each.rfilename for each in api.repo_info(name.repo, repo_type=name.kind).siblings or ()}
    others = sorted(held & {CARD_FILE, CONFIG_FILE, METRICS} - {file})
    theirs: Any = {}
    if file in held and file.endswith(".json"):
        theirs = json.loads(Path(api.hf_hub_download(name.repo, file, repo_type=name.kind)).read_bytes())
    differing = [each for each, value in ours.items() if each in theirs and theirs[each] != value]
    if others or differing:
        said = (
            f"{differing[0]} {theirs[differing[0]]}, not {ours[differing[0]]}"
            if differing
            else ", ".join(others)
        )
        raise DeltacacheError(
            f"{name.page} holds something else ({said}): give another REPO, or delete that one first"
        )


@contextmanager
def _readable(settings: PushSettings, name: HubName) -> Iterator[None]:
    """Errors of the upload in words."""
    from huggingface_hub import constants, errors
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

    again = "Run the same command again: what has arrived is not sent again"
    try:
        yield
    except (OSError, HTTPError, RuntimeError, errors.HFValidationError) as error:
        # A file that fails is a RuntimeError with its reason as the cause; those of hf_xet have none.
        cause = (error.__cause__ or error) if isinstance(error, RuntimeError) else error
        if not isinstance(cause, OSError | HTTPError | RuntimeError | errors.HFValidationError):
            raise
        reason = str(cause).strip().split("\n")[0]
        if constants.HF_HUB_OFFLINE:
            said = "offline mode is on (HF_HUB_OFFLINE): push without it"
        elif isinstance(cause, errors.HfHubHTTPError) and cause.response.status_code in (401, 403):
            said = f"access is denied ({reason}): log in with 'hf auth login' and a token that may write to {name.repo}"
        else:
            said = f"{reason}. {again}"
        raise DeltacacheError(f"{settings.path} is not on {name.page}, or not completely: {said}") from error


# ----------------------------------------------------------------------------------------------------
# What there is to push, and its card.
# ----------------------------------------------------------------------------------------------------


def _dataset(path: Path, reporter: Reporter) -> Package:
    card = open_dataset(path).card  # refuses what is not finished
    reporter.line(f"push: {path} is verified first")
    if problems := verify_dataset(path, reporter):
        raise DatasetError(
            f"{path} is damaged ({problems[0]}; {counted(len(problems), 'problem')}): run `deltacache verify {path}`, "
            "and push it when nothing is found"
        )
    found = describe(path)
    files = _files(path, DATASET_FILES)
    tokens = (
        "one delta token a frame"
        if card.tokens_per_frame == 1
        else f"{card.tokens_per_frame} delta tokens a frame"
    )
    what = "Patch tokens" if card.kind == "features" else "Delta tokens"
    facts = {
        "clips": f"{found.clips} of {counted(found.videos, 'video')}, {card.sampling.frames} frames each, "
        f"{card.sampling.spacing_min_s:g} to {card.sampling.spacing_max_s:g} s apart",
        "rejected": ", ".join(f"{reason} {count}" for reason, count in found.failures.items()) or "none",
        "size": f"{disk_text(found.bytes)} in {counted(found.shards, 'shard')} ({card.store})",
        "tokens": f"{' x '.join(map(str, card.patch_grid))} patches, {card.hidden_size} wide, {card.dtype}"
        if card.kind == "features"
        else f"{tokens}, {card.hidden_size} wide",
        "image size": f"{size_text(card.image_size)} px, {'augmented' if card.sampling.augment else 'not augmented'}",
        "backbone": card.backbone.name,
        "tokenizer": card.tokenizer_fingerprint,
        "fingerprint": card.fingerprint,
        **_from_hub(card),
        "made by": f"deltacache {card.code_version}",
    }
    configs: list[dict[str, Any]] = [
        {"config_name": "index", "data_files": [{"split": "train", "path": "index.parquet"}]}
    ]
    load = "import deltacache\ndataset = deltacache.open_dataset({repo})\nclip = dataset.read(0)  # verified"
    loading = _python(load.replace("{repo}", '"{repo}"'))
    loading += (
        "\nThe name goes wherever deltacache takes a dataset, such as `deltacache train-"
        f"{'tokenizer' if card.kind == 'features' else 'world'} {{repo}} OUT`. "
        '`deltacache.ClipStream("{repo}")` reads clips without downloading the dataset.'
    )
    if card.store == "webdataset":
        # alone: `datasets` reads all configurations of a repository in one way
        configs = [{"config_name": "default", "data_files": [{"split": "train", "path": "shards/*.tar"}]}]
        loading += "\n\nWithout deltacache, streaming:\n\n" + _python(
            'from datasets import load_dataset\nclips = load_dataset("{repo}", split="train", streaming=True)\n'
            f'next(iter(clips))["{"patch" if card.kind == "features" else "delta"}_tokens.npy"]'
        )
    title = f"{what} of {counted(found.videos, 'video')}, {_short(card.backbone.id)} at {size_text(card.image_size)} px"
    metadata = {**_licence(card.backbone.id), "tags": [*_TAGS, "webdataset"], "configs": configs}
    sections = {
        "Use": loading,
        "What it holds": _table(facts),
        "Licence": _licence_text(card.backbone.id, "tokens"),
    }
    identity = {"kind": card.kind, "fingerprint": card.fingerprint}
    replaced = ("shards", "receipts", "parts")
    return Package("dataset", title, files, (CARD_FILE, identity), metadata, sections, replaced)


def _model(path: Path, settings: PushSettings) -> Package:
    checkpoints = finished_checkpoints(path)
    folder = checkpoints[-1] if checkpoints else path
    config = recorded_config(folder) or {}
    files = {name: folder / name for name in (CONFIG_FILE, WEIGHTS_FILE)}
    if settings.training_state:
        if not (folder / STATE_FILE).is_file():
            raise DeltacacheError(f"{folder} has no {STATE_FILE}: leave --training-state out")
        files[STATE_FILE] = folder / STATE_FILE
    files |= {name: path / name for name in _OF_RUN if checkpoints and (path / name).is_file()}
    kind, backbone = config["kind"], str(config.get("backbone") or "")
    architecture = config.get("architecture", "deltaworld") if kind == "world" else kind
    used = {
        "tokenizer": 'tokenizer = deltacache.load_tokenizer("{repo}")\n'
        "deltas = tokenizer.encode(previous, current)  # (B, N, D) each",
        "world": 'world = deltacache.load_world("{repo}")\n'
        "noise = world.draw_noise((1, 20, 4, world.noise_width()), generator)  # for world.rollout",
    }
    loading = _python(f"import deltacache\n{used[kind]}") + "\n" if kind in used else ""
    of_predict = {
        "tokenizer": "--tokenizer {repo} --world WORLD",
        "world": "--tokenizer TOKENIZER --world {repo}",
        "head": "--tokenizer TOKENIZER --world WORLD --head "
        + f"{(config.get('trained_on') or {}).get('benchmark', 'vspw')}={{repo}}",
        "rgb_decoder": "--tokenizer TOKENIZER --world WORLD --rgb-decoder {repo}",
    }
    loading += f"On the command line: `deltacache predict VIDEO OUT {of_predict[kind]}`."
    facts = {
        "kind": kind,
        "architecture": architecture if kind == "world" else None,
        "steps": config.get("step"),
        "image size": size_text(parse_size(config["image_size"])) + " px"
        if config.get("image_size")
        else None,
        "frames": " to ".join(f"{each:g}" for each in config["spacing_s"]) + " s apart"
        if config.get("spacing_s")
        else None,
        "clips": (config.get("clips") or {}).get("count"),
        "backbone": backbone or None,
        "backbone's weights": config.get("backbone_sha256"),
        "features": config.get("features_fingerprint"),
        "data": config.get("data_fingerprint"),
        "tokenizer": config.get("tokenizer_fingerprint"),
        "fingerprint": config["fingerprint"],
        **{f"{name} from": value for name, value in (config.get("sources") or {}).items()},
        "started from": (config.get("started_from") or {}).get("source"),
        "made by": f"deltacache {config['code_version']}" if config.get("code_version") else None,
    }
    sections = {"Use": loading, "What it was made from": _table(facts)}
    if settings.evaluation is not None:
        sections["Metrics"] = _metrics(Path(settings.evaluation), config["fingerprint"], path)
    if config.get("config"):
        sections["Recipe"] = f"```yaml\n{yaml.safe_dump(config['config'], sort_keys=False)}```"
    sections["Licence"] = _licence_text(backbone, "weights")
    title = {
        "tokenizer": "DeltaTok",
        "world": "World model",
        "head": "Linear head",
        "rgb_decoder": "RGB decoder",
    }[kind]
    title += f" ({architecture})" if kind == "world" else ""
    title += f" on {_short(backbone)}" if backbone else ""
    base = {"base_model": backbone} if re.fullmatch(r"[\w.-]+/[\w.-]+", backbone) else {}
    metadata = {"library_name": "deltacache", **_licence(backbone), **base, "tags": list(_TAGS)}
    return Package("model", title, files, (CONFIG_FILE, {"kind": kind}), metadata, sections)


def _pca(path: Path) -> Package:
    config = json.loads((path / CONFIG_FILE).read_bytes())
    backbone = str((config.get("backbone") or {}).get("id", ""))
    facts = {name: config.get(name) for name in ("components", "channels", "explained", "fingerprint")}
    return Package(
        "model",
        f"PCA of patch tokens of {_short(backbone)}",
        {name: path / name for name in (CONFIG_FILE, pca.WEIGHTS_FILE)},
        (CONFIG_FILE, {"kind": "pca"}),
        {"library_name": "deltacache", **_licence(backbone), "tags": list(_TAGS)},
        {
            "Use": "`deltacache extract-features VIDEOS OUT --layers … --pca {repo}`",
            "What it was made from": _table({**facts, "backbone": backbone}),
            "Licence": _licence_text(backbone, "components"),
        },
    )


def _evaluation(path: Path) -> Package:
    (run,) = open_runs([path])
    backbone = str(run.rows[0]["backbone"])
    tables = {"metrics": METRICS, "sequences": "sequences.parquet"}
    configs = [
        {"config_name": name, "data_files": [{"split": "train", "path": file}]}
        for name, file in tables.items()
        if (path / file).is_file()
    ]
    loading = _python(
        "import pandas as pd\n"
        'metrics = pd.read_parquet("hf://datasets/{repo}/metrics.parquet")\n'
        'metrics[["method", "metric", "horizon", "value", "ci_low", "ci_high"]]'
    )
    loading += (
        "\n`deltacache report {repo} OTHER-RESULTS/ --out report.html` shows it beside another evaluation."
    )
    sources = (
        {} if run.models is None else {f"{name} from": each for name, each in run.models.sources.items()}
    )
    return Package(
        "dataset",
        f"Evaluation on {', '.join(dict.fromkeys(row['dataset'] for row in run.rows))}",
        _files(path, OURS - {PARTS}),
        (METRICS, {}),
        {"tags": list(_TAGS), "configs": configs},
        {
            "Metrics": _metrics(path),
            "What was evaluated": _table({**facts_of(run), **sources}),
            "Use": loading,
            "Licence": _licence_text(backbone, "features that were scored"),
        },
        ("examples", "curves"),
    )


def _metrics(path: Path, fingerprint: str | None = None, model: Path | None = None) -> str:
    """The tables of an evaluation, with intervals; it must be one of ``model``, whose fingerprint is given."""
    metrics = read_metrics(path)
    if fingerprint is not None:
        took_part = {each for name in ("tokenizer", "world") for each in metrics[name].unique().to_pylist()}
        if fingerprint not in took_part:
            raise DeltacacheError(
                f"the evaluation {path} is not one of {model} ({fingerprint}): give --evaluation one in which "
                "it took part"
            )
    return f"```\n{plain_text(metrics)}\n```\n\n{caption(metrics)}"


_TAGS = ("deltacache", "world-model", "video", "delta-tokens")


def _files(path: Path, names: Iterable[str]) -> dict[str, Path]:
    """Below ``path`` those with one of these names at the top; neither locks nor what a write left behind."""
    found: dict[str, Path] = {}
    for each in sorted(path.rglob("*")):
        place = each.relative_to(path)
        hidden = any(part.startswith(".") or is_temporary(part) for part in place.parts)
        if each.is_file() and not hidden and place.parts[0] in names:
            found[place.as_posix()] = each
    return found


def _from_hub(card: DatasetCard) -> dict[str, str]:
    sources = {f"{name} from": value for name, value in card.sources.items()}
    return {"backbone from": card.backbone.source, **sources} if card.backbone.source else sources


def _short(backbone: str) -> str:
    return backbone.rpartition("/")[2] or "an unknown backbone"


def _python(text: str) -> str:
    return f"```python\n{text}\n```\n"


def _table(facts: Mapping[str, Any]) -> str:
    rows = [
        f"| {name} | {str(value).replace('|', '/')} |" for name, value in facts.items() if value is not None
    ]
    return "\n".join(["| | |", "|---|---|", *rows])


def _licence(backbone: str) -> dict[str, str]:
    """For the card's metadata: that of DINOv3, where it is the backbone."""
    if "dinov3" not in backbone.lower():
        return {}
    return {"license": "other", "license_name": "dinov3-license", "license_link": _DINOV3_LICENCE}


def _licence_text(backbone: str, what: str) -> str:
    if not backbone or backbone.startswith("tiny"):
        own = "The backbone is built into deltacache and has random weights: no licence follows from it."
    elif _licence(backbone):
        own = (
            f"The backbone {backbone} is under the [DINOv3 License]({_DINOV3_LICENCE}). These {what} were made with "
            "it: whoever uses or passes them on keeps to its terms."
        )
    else:
        own = f"These {what} were made with the backbone {backbone}: its licence says what may be done with them."
    return f"{own} The videos' own licences stay as they are."
