"""Models and datasets of the hub by their names, and ``push``: against a hub on loopback, in both directions."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import DINOv3ViTConfig, DINOv3ViTModel

import deltacache
from deltacache import chain
from deltacache.descriptions import describe_output
from deltacache.models.backbone import load_backbone
from deltacache.models.checkpoints import save_model
from deltacache.models.deltatok import DeltaTok
from deltacache.models.heads import SegmentationHead
from deltacache.models.rgb_decoder import RgbDecoder
from deltacache.models.worlds.deltaworld import DeltaWorld
from deltacache.pipeline.datasets.verification import verify_dataset
from deltacache.pipeline.jobs.pca_fit import fit_pca
from deltacache.pipeline.storage.files import crc32c_of_npy
from deltacache.publishing import packed
from deltacache.schemas.configs import PRESETS, load_config
from deltacache.schemas.datasets import DatasetCard, SamplingSettings
from deltacache.schemas.errors import CheckpointError, DatasetError, DeltacacheError
from deltacache.schemas.hub import dataset_place, model_path, origin_of, output_place, parsed
from deltacache.schemas.jobs import ExtractionSettings, PushSettings
from deltacache.schemas.progress import SilentReporter
from hub_server import SMALL, Hub, environment, hub_server, use_hub

pytestmark = pytest.mark.filterwarnings(
    "ignore:Use 'content=:DeprecationWarning"
)  # the hub's client, on uploads
SIZE, FRAMES = 32, 8


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One small output of each kind, which belong together."""
    root = tmp_path_factory.mktemp("made")
    backbone = load_backbone("tiny")
    width, grid = backbone.hidden_size, backbone.grid(SIZE)
    black = np.zeros((grid[0] * grid[1], width), np.float16)
    card = DatasetCard(
        kind="features",
        store="webdataset",
        backbone=backbone.card,
        image_size=SIZE,
        patch_grid=grid,
        hidden_size=width,
        sampling=SamplingSettings(frames=FRAMES),
        black_crc32c=crc32c_of_npy(black),
        code_version="0",
    )
    made_from = {
        "backbone": "tiny",
        "backbone_sha256": backbone.weights_sha256,
        "patch_grid": list(grid),
        "image_size": SIZE,
        "spacing_s": [0.1, 0.1],
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_model(root / "tokenizer", DeltaTok(width, 2, 1, 1), "tokenizer", made_from)
        fingerprint = json.loads((root / "tokenizer/config.json").read_text())["fingerprint"]
        of_world = {**made_from, "tokenizer_fingerprint": fingerprint}
        save_model(root / "world", DeltaWorld(width, 2, 1), "world", of_world)
        save_model(
            root / "head", SegmentationHead(width, 19), "head", {"backbone_sha256": backbone.weights_sha256}
        )
        decoder = RgbDecoder(width, 48, 1, 2, 64, image_size=SIZE)
        save_model(root / "rgb", decoder, "rgb_decoder", {"backbone_sha256": backbone.weights_sha256})
        released = deltacache.load_tokenizer(root / "tokenizer", device="cpu").state_dict()
        (root / "released").mkdir()
        torch.save(released, root / "released/pytorch_model.bin")
    rng = np.random.default_rng(0)
    deltas = card.deltas(store="webdataset", tokenizer=fingerprint, code_version="0")
    for name, each in (("features", card), ("deltas", deltas)):
        shape = (FRAMES, len(black), width) if name == "features" else (FRAMES, width)
        with deltacache.DatasetWriter(root / name, each, black, videos_per_shard=2) as out:
            for number in range(5):
                tokens = rng.standard_normal(shape).astype(np.float16)
                out.write(f"{number}.mp4", [(tokens, 0.1 * np.arange(FRAMES, dtype=np.float32))])
    fit_pca(str(root / "features"), root / "pca", 3, SilentReporter(), frames=None, device="cpu")
    training = {"preset": "tiny", "steps": 2, "batch_size": 2, "device": "cpu"}
    deltacache.train_tokenizer(root / "features", root / "training", **training)
    deltacache.evaluate(
        root / "evaluation", {"clips": root / "features"}, tokenizer=root / "tokenizer", world=root / "world",
        samples=2, device="cpu",
    )  # fmt: skip
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="module")
def server(made: dict[str, Path]) -> Iterator[Hub]:
    with hub_server() as running:
        yield running


@pytest.fixture
def hub(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """Empty, with an empty cache."""
    for name, value in vars(Hub(url=server.url)).items():
        setattr(server, name, value)
    use_hub(server, tmp_path / "cache", monkeypatch)
    monkeypatch.chdir(tmp_path)
    return server


# ----------------------------------------------------------------------------------------------------
# From the hub.
# ----------------------------------------------------------------------------------------------------


def test_models_are_loaded_by_name(hub: Hub, made: dict[str, Path]) -> None:
    commit = hub.put_folder("lab/tokenizer", made["tokenizer"])
    hub.repo("lab/tokenizer").refs["v1"] = commit
    inner = {f"a/{name}": content for name, content in files_of(made["released"]).items()}
    other = hub.repo("lab/tokenizer").commit(inner | {"big.bin": bytes(5000)})
    expected = deltacache.load_tokenizer(made["tokenizer"], device="cpu").card.fingerprint
    names = (
        "lab/tokenizer@v1",
        f"hf://lab/tokenizer@{commit}",
        "hf://lab/tokenizer/a",
        "hf://lab/tokenizer/a@main",
    )
    names += (Path("hf://lab/tokenizer/a/pytorch_model.bin"), "hf://models/lab/tokenizer@v1")
    for name in names:
        assert deltacache.load_tokenizer(name, device="cpu").card.fingerprint == expected, name
    assert not any("big.bin" in each for each in hub.asked), "only what is needed"
    assert not list(Path("cache").rglob("training_state.pt"))
    asked = len(hub.asked)
    deltacache.load_tokenizer(f"hf://lab/tokenizer@{commit}", device="cpu")
    assert len(hub.asked) == asked, "a commit that is in the cache asks nothing"
    assert other != commit


def test_what_cannot_be_had_says_what_was_looked_for(
    hub: Hub, made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.put_folder("lab/tokenizer", made["tokenizer"])
    hub.put_folder("lab/gated", made["tokenizer"])
    hub.repo("lab/gated").gated = True
    hub.repo("lab/secret").private = True
    hub.repo("lab/text").commit({"README.md": b"words"})
    page, here = f"{hub.url}/lab", f"({tmp_path / 'lab'}"

    def refused(name: str, *words: str) -> None:
        with pytest.raises(CheckpointError) as caught:
            deltacache.load_tokenizer(name)
        for word in words:
            assert word in str(caught.value), str(caught.value)

    refused(
        "lab/nothing",
        "lab/nothing is not a path here",
        f"{here}/nothing)",
        f"({page}/nothing)",
        "does not exist",
    )
    refused("lab/secret", "does not exist there, or is private", "hf auth login")
    refused("hf://lab/nothing", f"hf://lab/nothing ({page}/nothing): it does not exist there")
    refused("lab/tokenizer@v9", "no revision 'v9'", "branch, tag or commit")
    refused("lab/gated", "gated: accept its licence at", f"{page}/gated", "hf auth login")
    refused("lab/text", "hf://lab/text holds no model", "pytorch_model.bin", "It holds README.md")
    with pytest.raises(DatasetError, match=r"lab/tokenizer is not a path here .* as a dataset on the hub"):
        deltacache.open_dataset("lab/tokenizer")
    with pytest.raises(DeltacacheError, match=r"lab/nothing is not a path here .* as a model on the hub"):
        output_place("lab/nothing")
    with pytest.raises(DeltacacheError, match="must be hf://OWNER/NAME") as caught:
        deltacache.load_tokenizer("hf://me:hf_plantedplantedplantedplanted@lab/tokenizer")
    assert "planted" not in str(caught.value)
    use_hub(replace(hub, url="http://127.0.0.1:9"), tmp_path / "cache", monkeypatch)
    refused(
        "lab/tokenizer",
        "not (completely) in the hub's cache",
        str(tmp_path / "cache"),
        "could not be fetched",
    )
    use_hub(hub, tmp_path / "cache", monkeypatch, offline=True)
    refused("lab/tokenizer", "not (completely) in the hub's cache", str(tmp_path / "cache"), "HF_HUB_OFFLINE")
    use_hub(hub, tmp_path / "cache", monkeypatch)
    deltacache.load_tokenizer("lab/tokenizer")
    use_hub(hub, tmp_path / "cache", monkeypatch, offline=True)
    deltacache.load_tokenizer("lab/tokenizer")  # as it is in the cache


def test_names_in_yaml(hub: Hub, made: dict[str, Path], tmp_path: Path) -> None:
    """A backbone and a PCA; what is made with the backbone says its commit, which changes no fingerprint."""
    commit = hub.put_folder("lab/pca", made["pca"])
    yaml_file = tmp_path / "chain.yaml"
    yaml_file.write_text("source: videos\nbackbone: lab/vit\npca: hf://lab/pca\n")
    settings = load_config(yaml_file, ExtractionSettings)
    assert origin_of(settings.pca or "") == f"hf://lab/pca@{commit}"
    assert settings.backbone == "lab/vit"
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        DINOv3ViTModel(DINOv3ViTConfig(**shape, image_size=32, patch_size=16)).save_pretrained(
            tmp_path / "vit"
        )
    commit = hub.put_folder("lab/vit", tmp_path / "vit")
    here, there = load_backbone(str(tmp_path / "vit")).card, load_backbone("hf://lab/vit@main").card
    assert there.source == f"hf://lab/vit@{commit}"
    assert "source" not in here.model_dump()
    card = deltacache.open_dataset(made["features"]).card
    same = [card.model_copy(update={"backbone": each}).fingerprint for each in (here, there)]
    assert same[0] == same[1]


def test_a_chain_asks_the_hub_when_it_runs_and_not_when_its_file_is_read(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos/a.mp4").write_bytes(b"a video")
    commit = hub.put_folder("lab/videos", tmp_path / "videos", "datasets")
    content = yaml.safe_load((PRESETS / "released" / "chain.yaml").read_text())
    for name in ("train_videos", "test_videos"):
        content[name]["source"] = "lab/videos"
    (tmp_path / "chain.yaml").write_text(yaml.safe_dump(content))
    with monkeypatch.context() as patch:
        use_hub(replace(hub, url="http://127.0.0.1:9"), tmp_path / "empty", patch)
        config = load_config(tmp_path / "chain.yaml", chain.ChainConfig)
    assert config.train_videos.source == "lab/videos"
    asked: list[str] = []

    def seen(settings: ExtractionSettings, *_: Any) -> None:
        asked.append(settings.source)
        raise KeyboardInterrupt

    monkeypatch.setattr(chain, "extract_features", seen)
    with pytest.raises(KeyboardInterrupt):
        chain.run_chain(config, tmp_path / "out", SilentReporter())
    assert (Path(asked[0]) / "a.mp4").read_bytes() == b"a video"
    assert commit in asked[0]


def test_a_path_that_exists_wins(hub: Hub, made: dict[str, Path], tmp_path: Path) -> None:
    hub.put_folder("lab/model", made["world"])
    hub.put_folder("lab/data", made["features"], "datasets")
    shutil.copytree(made["tokenizer"], tmp_path / "lab/model")
    shutil.copytree(made["deltas"], tmp_path / "lab/data")
    deltacache.load_tokenizer("lab/model")
    assert deltacache.open_dataset("lab/data").card.kind == "deltas"
    assert not hub.asked
    assert deltacache.open_dataset("hf://lab/data").card.kind == "features"
    for path in (
        "./lab/other",
        "lab/other/",
        "/lab/other",
        "lab/other/more",
        "s3://lab/other",
        "lab/*.mp4",
        "tiny",
    ):
        assert parsed(path, "model") is None


def test_a_wrong_hash_is_refused_and_fetched_again(hub: Hub, made: dict[str, Path]) -> None:
    hub.put_folder("lab/tokenizer", made["tokenizer"])
    for name in ("model.safetensors", "config.json"):
        content = (made["tokenizer"] / name).read_bytes()
        hub.altered = {name: content[:-1] + bytes([content[-1] ^ 1])}
        with pytest.raises(
            CheckpointError, match=rf"arrived damaged: {name} has the hash .* removed from the cache"
        ):
            deltacache.load_tokenizer("lab/tokenizer")
        hub.altered = {}
        deltacache.load_tokenizer("lab/tokenizer")
        shutil.rmtree("cache/hub")  # for the other file


def test_datasets_are_read_by_name(hub: Hub, made: dict[str, Path], tmp_path: Path) -> None:
    """Downloaded once, also when it is interrupted; what is made of them says where they came from."""
    commit = hub.put_folder("lab/features", made["features"], "datasets")
    hub.put_folder("lab/tokenizer", made["tokenizer"])
    shards = [name for name in hub.files("lab/features", "datasets") if name.endswith(".tar")]
    hub.altered = {shards[1]: b"less"}  # the connection breaks
    with pytest.raises(DatasetError, match="could not be fetched"):
        deltacache.open_dataset("lab/features")
    hub.altered, hub.asked[:] = {}, []
    here, there = deltacache.open_dataset(made["features"]), deltacache.open_dataset("lab/features")
    fetched = [each for each in hub.asked if each.startswith("GET") and each.endswith(".tar")]
    assert 0 < len(fetched) < len(shards), "what had arrived is not fetched again"
    assert all(np.array_equal(here.read(row).patch_tokens, there.read(row).patch_tokens) for row in range(5))
    assert origin_of(there.root) == f"hf://datasets/lab/features@{commit}"
    assert not verify_dataset(there.root)
    assert f"hub                    hf://datasets/lab/features@{commit}" in describe_output(there.root)
    out = deltacache.train_tokenizer(
        ["lab/features:1"], "trained", preset="tiny", steps=1, batch_size=2, device="cpu", init_from="lab/tokenizer",
        assignments=["model.num_heads=2", "model.encoder_layers=1", "model.decoder_layers=1"],
    )  # fmt: skip
    made_from = json.loads((out / "config.json").read_text())
    assert made_from["sources"] == {"data": f"hf://datasets/lab/features@{commit}"}
    assert made_from["started_from"]["source"].startswith("hf://lab/tokenizer@")
    with pytest.raises(DeltacacheError, match="is on the hub, where no command writes"):
        deltacache.extract_features("videos", "hf://lab/out", backbone="tiny")
    assert not list((tmp_path / "cache").rglob("*.lock.json"))


def test_evaluate_and_predict_take_names(hub: Hub, made: dict[str, Path]) -> None:
    commits = {
        name: hub.put_folder(f"lab/{name}", made[name], "datasets" if name == "features" else "models")
        for name in ("features", "tokenizer", "world", "head", "rgb")
    }
    results = deltacache.evaluate(
        "results", {"clips": "lab/features"}, tokenizer="lab/tokenizer", world="deltaworld=lab/world", samples=2,
        device="cpu",
    )  # fmt: skip
    assert results.metrics.column("value").equals(
        deltacache.api.Evaluated(made["evaluation"]).metrics.column("value")
    )
    record = json.loads(Path("results/models.json").read_text())["sources"]
    assert record == {
        "features": f"hf://datasets/lab/features@{commits['features']}",
        "tokenizer": f"hf://lab/tokenizer@{commits['tokenizer']}",
        "worlds.0": f"hf://lab/world@{commits['world']}",
    }
    futures = deltacache.predict(
        "lab/features", "futures", tokenizer="lab/tokenizer", world="lab/world", steps=2, samples=2, device="cpu",
        head={"cityscapes": "lab/head"}, rgb_decoder="lab/rgb", movie="gif",
    )  # fmt: skip
    assert f"hf://lab/rgb@{commits['rgb']}" in describe_output(futures.folder)
    hub.put_folder("lab/results", made["evaluation"], "datasets")
    page = deltacache.write_report(["results", "lab/results"], "both.html")
    assert f"from hf://lab/world@{commits['world']}" in page.read_text()
    saved = Path("results/config.yaml")
    saved.write_text(re.sub(r"tokenizer: .*", "tokenizer: out/tokenizer", saved.read_text()))
    asked = len(hub.asked)
    deltacache.write_report("results")  # from another folder, a path that was given is no name of the hub
    assert len(hub.asked) == asked


def test_a_stream_of_the_hub_keeps_its_position(hub: Hub, made: dict[str, Path]) -> None:
    hub.put_folder("lab/features", made["features"], "datasets")
    here = [clip["tokens"] for clip in deltacache.ClipStream(made["features"], seed=3)]
    stream = deltacache.ClipStream("lab/features", seed=3)
    clips = iter(stream)
    first = [next(clips)["tokens"] for _ in range(2)]
    position = stream.state_dict()
    hub.repo("lab/features", "datasets").commit({})  # a later commit does not change a stream that goes on
    rest = deltacache.ClipStream(
        f"hf://lab/features@{stream._datasets[0].root.path.partition('@')[2]}", seed=3
    )
    rest.load_state_dict(position)
    there = [*first, *(clip["tokens"] for clip in rest)]
    assert len(there) == 5
    assert all(torch.equal(one, other) for one, other in zip(here, there, strict=True))
    assert not list(Path("cache").rglob("*.tar"))
    shards = sum(path.stat().st_size for path in made["features"].glob("shards/*"))
    read = sum(size for path, size in hub.sent if path.endswith(".tar"))
    assert read < 1.5 * shards, "what was yielded before is not read again, and nothing is read ahead"


# ----------------------------------------------------------------------------------------------------
# To the hub.
# ----------------------------------------------------------------------------------------------------


def log_in(cache: Path) -> None:
    """As ``hf auth login`` does."""
    cache.mkdir(exist_ok=True)
    (cache / "token").write_text("hf_planted" + "planted" * 4)


def card_of(hub: Hub, name: str, kind: str = "models") -> tuple[dict[str, Any], str]:
    """The metadata of a card, and its text."""
    _, metadata, text = hub.files(name, kind)["README.md"].decode().split("---\n", 2)
    return yaml.safe_load(metadata), text


@pytest.mark.parametrize(
    "name", ["features", "deltas", "evaluation", "tokenizer", "world", "head", "rgb", "pca"]
)
def test_what_is_pushed_comes_back_byte_for_byte(
    hub: Hub, made: dict[str, Path], tmp_path: Path, name: str
) -> None:
    log_in(tmp_path / "cache")
    kind = "datasets" if name in ("features", "deltas", "evaluation") else "models"
    pushed = deltacache.push(made[name], f"lab/{name}", private=True)
    before = {each: content for each, content in files_of(made[name]).items() if each != ".lock"}
    held = hub.files(f"lab/{name}", kind)
    assert held.keys() - before.keys() == {"README.md", ".gitattributes"}
    assert {each: held[each] for each in before} == before
    assert hub.repos[kind, f"lab/{name}"].private
    place = Path(dataset_place(pushed) if kind == "datasets" else model_path(pushed))
    there = files_of(place)
    assert {each: there[each] for each in before} == before
    assert pushed == origin_of(place)
    if name in ("features", "deltas"):
        assert not verify_dataset(place)
    assert pushed in describe_output(output_place(f"lab/{name}"))
    metadata, text = card_of(hub, f"lab/{name}", kind)
    assert "random weights" in text
    assert "deltacache" in metadata["tags"]
    assert f"lab/{name}" in text.partition("## Use")[2]
    sent = hub.uploads
    assert deltacache.push(made[name], f"lab/{name}") == pushed, "nothing new, no commit"
    assert hub.uploads == sent
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != "token"]
    written += [
        content for files in hub.repos[kind, f"lab/{name}"].commits.values() for content in files.values()
    ]
    assert hub.tokens, "the token was used"
    assert not any(b"planted" in content for content in written)


def test_a_training_is_pushed_as_its_newest_checkpoint(
    hub: Hub, made: dict[str, Path], tmp_path: Path
) -> None:
    log_in(tmp_path / "cache")
    deltacache.push(made["training"], "lab/trained", training_state=True)
    held, newest = hub.files("lab/trained"), sorted((made["training"] / "checkpoints").iterdir())[-1]
    for name in ("config.json", "model.safetensors", "training_state.pt"):
        assert held[name] == (newest / name).read_bytes()
    assert held["curves.parquet"] == (made["training"] / "curves.parquet").read_bytes()
    metadata, text = card_of(hub, "lab/trained")
    assert metadata["library_name"] == "deltacache"
    for words in (
        'load_tokenizer("lab/trained")',
        "| steps | 2 |",
        "| clips | 5 |",
        "batch_size: 2",
        "0.04 to 0.3333",
    ):
        assert words in text, text
    out = deltacache.train_tokenizer(
        made["features"],
        "on",
        preset="tiny",
        steps=3,
        batch_size=2,
        device="cpu",
        continue_from="lab/trained",
    )
    assert out.name == "step-00000003"


def test_the_card_of_a_model_has_metrics_with_intervals(
    hub: Hub, made: dict[str, Path], tmp_path: Path
) -> None:
    log_in(tmp_path / "cache")
    deltacache.push(made["world"], "lab/world", evaluation=made["evaluation"])
    text = card_of(hub, "lab/world")[1]
    assert "deltaworld" in text
    assert "95 % intervals over videos" in text
    assert "[" in text.partition("## Metrics")[2]
    with pytest.raises(DeltacacheError, match=r"is not one of .*training"):
        deltacache.push(made["training"], "lab/other", evaluation=made["evaluation"])
    with pytest.raises(DeltacacheError, match="--evaluation is for tokenizers"):
        deltacache.push(made["features"], "lab/other", evaluation=made["evaluation"])
    assert ("models", "lab/other") not in hub.repos


def test_a_card_says_the_licence_of_the_backbone(made: dict[str, Path], tmp_path: Path) -> None:
    config = json.loads((made["tokenizer"] / "config.json").read_text())
    shutil.copytree(made["tokenizer"], tmp_path / "tokenizer")
    backbone = "facebook/dinov3-vitb16-pretrain-lvd1689m"
    (tmp_path / "tokenizer/config.json").write_text(json.dumps({**config, "backbone": backbone}))
    card = packed(PushSettings(path=tmp_path / "tokenizer", repo="lab/x"), SilentReporter()).card("lab/x")
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert metadata["license_name"] == "dinov3-license"
    assert metadata["base_model"] == backbone
    assert "[DINOv3 License](https://ai.meta.com/" in card


def test_what_cannot_be_pushed(hub: Hub, made: dict[str, Path], tmp_path: Path, monkeypatch: Any) -> None:
    log_in(tmp_path / "cache")
    deltacache.push(made["features"], "lab/data")

    def refused(path: Path, repo: str, words: str, **settings: Any) -> None:
        with pytest.raises(DeltacacheError, match=words) as caught:
            deltacache.push(path, repo, **settings)
        assert "planted" not in str(caught.value), "signatures of the addresses for uploads"

    refused(made["deltas"], "lab/data", r"holds something else \(kind features, not deltas\)")
    refused(made["evaluation"], "lab/data", r"holds something else \(dataset.json\)")
    refused(made["features"], "lab/data", "is public, and --private was given", private=True)
    refused(made["features"], "data", "give OWNER/NAME")
    refused(made["released"], "lab/released", "a released file")
    refused(tmp_path, "lab/x", "is not an output that push knows")
    refused(tmp_path / "none", "lab/x", "does not exist")
    hub.closed = True
    refused(
        made["deltas"],
        "lab/more",
        r"access is denied \(.*'hf auth login' and a token that may write to lab/more",
    )
    shutil.copytree(made["features"], tmp_path / "damaged")
    shard = next((tmp_path / "damaged/shards").iterdir())
    shard.write_bytes(shard.read_bytes().replace(b"NUMPY", b"NUNPY"))
    refused(tmp_path / "damaged", "lab/damaged", "is damaged")
    use_hub(hub, tmp_path / "cache", monkeypatch, offline=True)
    refused(made["features"], "lab/data", "offline mode is on")


@pytest.mark.slow
def test_an_upload_that_was_killed_goes_on(hub: Hub, made: dict[str, Path], tmp_path: Path) -> None:
    log_in(tmp_path / "cache")
    hub.hold_upload = 4
    command = [sys.executable, "-m", "deltacache", "push", str(made["features"]), "lab/features"]
    with subprocess.Popen(command, env={**os.environ, **environment(hub, tmp_path / "cache")}) as process:
        assert hub.held.wait(120)
        process.kill()
    hub.go_on.set()
    there = set(hub.lfs)
    assert there, "some arrived"
    assert hub.files("lab/features", "datasets").keys() == {".gitattributes"}, "nothing is there in parts"
    sent = hub.uploads
    deltacache.push(made["features"], "lab/features")
    before = files_of(made["features"])
    large = {name for name, content in before.items() if len(content) > SMALL and name != ".lock"}
    assert hub.uploads - sent <= len(large) + 1 - len(there), "what had arrived is not sent again"
    held = hub.files("lab/features", "datasets")
    assert all(held[name] == content for name, content in before.items() if name != ".lock")


@pytest.mark.slow
def test_load_dataset_streams_the_tars(hub: Hub, made: dict[str, Path], tmp_path: Path) -> None:
    """``datasets`` streams the tars by what the card says; it reads the hub's address when it is imported."""
    log_in(tmp_path / "cache")
    deltacache.push(made["deltas"], "lab/deltas")
    code = (
        "import json, datasets, numpy\n"
        "clips = list(datasets.load_dataset('lab/deltas', split='train', streaming=True))\n"
        "print(json.dumps([[each['__key__'] for each in clips], numpy.stack(clips[0]['delta_tokens.npy']).tolist()]))"
    )
    env = {**os.environ, **environment(hub, tmp_path / "cache")}
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    keys, tokens = json.loads(ran.stdout.splitlines()[-1])
    dataset = deltacache.open_dataset(made["deltas"])
    assert sorted(keys) == sorted(dataset.clip_ids)
    first = dataset.read(dataset.clip_ids.index(keys[0])).delta_tokens
    assert np.array_equal(np.asarray(tokens, np.float16), first)
