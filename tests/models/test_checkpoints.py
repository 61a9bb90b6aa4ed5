"""Checkpoints: released files, our folders, and everything that must be refused."""

import json
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltacache.models.checkpoints import load_tokenizer, load_world, save_model, weights_fingerprint
from deltacache.models.deltatok import DeltaTok
from deltacache.models.worlds.deltaworld import DeltaWorld
from deltacache.schemas.errors import CheckpointError

LOADERS = {"deltatok": load_tokenizer, "deltaworld": load_world}
VITB = {
    "deltatok": {
        "hidden_size": 768,
        "num_heads": 12,
        "encoder_layers": 12,
        "decoder_layers": 12,
        "qk_norm": True,
        "gated_attention": True,
        "mlp": "swiglu",
        "frame_compression": "off",
    },
    "deltaworld": {"hidden_size": 768, "num_heads": 12, "num_layers": 12, "mlp_ratio": 4.0, "query": "noise"},
}


class _SomebodysClass:
    """What a checkpoint must never be able to bring along."""


@pytest.fixture
def tokenizer() -> DeltaTok:
    return DeltaTok(16, 2, 2, 1, layer_scale_init=0.1, rope_rescale=None)


@pytest.fixture
def folder(tokenizer, tmp_path) -> Path:
    save_model(tmp_path / "saved", tokenizer, "tokenizer", {"step": 7, "patch_grid": [2, 2]})
    return tmp_path / "saved"


def _same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    return weights_fingerprint(one.state_dict()) == weights_fingerprint(other.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deltatok", "deltaworld"])
def test_released_vitb_files_load(name, golden, tmp_path):
    keys = json.loads((golden / f"{name}_vitb_keys.json").read_text())
    # One number stands for each tensor, so that the file stays small; loading makes it whole.
    values = {
        key: torch.tensor(float(place)).expand(shape) for place, (key, shape) in enumerate(keys.items(), 1)
    }
    lightning = {
        "state_dict": OrderedDict(values),
        "epoch": 3,
        "global_step": 500_000,
        "pytorch-lightning_version": "2.5.0",
        "loops": {"fit_loop": {"state_dict": {}}},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(5.0)}}, "param_groups": [{"lr": 1e-3}]}],
        "hyper_parameters": {"img_size": (512, 512)},
    }
    torch.save(values, tmp_path / "pytorch_model.bin")
    torch.save(lightning, tmp_path / "last.ckpt")
    loaded = LOADERS[name](tmp_path)  # the folder means pytorch_model.bin
    assert {key: loaded.model.arguments[key] for key in VITB[name]} == VITB[name]
    for key, parameter in loaded.model.named_parameters():
        assert tuple(parameter.shape) == tuple(keys[key])
        assert parameter.flatten()[-1] == values[key].flatten()[0]
    fingerprint = loaded.fingerprint
    del loaded, parameter
    assert LOADERS[name](tmp_path / "last.ckpt").fingerprint == fingerprint


@pytest.mark.parametrize("variant", ["released", "paper", "frame_compression"])
def test_golden_tokenizers_load_by_name_and_shape(variant, golden, heads, golden_tokenizer):
    expected = golden_tokenizer(variant)
    settled = {"num_heads": heads, "frame_compression": expected.frame_compression}
    arguments = None if variant == "released" else settled
    loaded = load_tokenizer(golden / "tiny" / f"deltatok_{variant}.safetensors", arguments)
    assert loaded.model.arguments == expected.arguments
    assert _same_weights(loaded.model, expected)


@pytest.mark.parametrize("name", ["deltaworld", "deltaworld_discriminative"])
def test_golden_worlds_load_by_name_and_shape(name, golden, heads, golden_world):
    loaded = load_world(golden / "tiny" / f"{name}.safetensors", {"num_heads": heads})
    assert loaded.model.arguments == golden_world(name).arguments
    assert _same_weights(loaded.model, golden_world(name))


def test_our_folders_come_back_whole(folder, tokenizer):
    state = torch.get_rng_state()
    loaded = load_tokenizer(folder)
    assert torch.equal(torch.get_rng_state(), state)
    assert loaded.fingerprint == weights_fingerprint(tokenizer.state_dict())
    assert loaded.model.arguments == tokenizer.arguments
    assert not loaded.model.training
    assert all(p.requires_grad and p.device.type == "cpu" for p in loaded.model.parameters())
    assert (loaded.metadata["step"], loaded.metadata["patch_grid"]) == (7, [2, 2])


def test_world_folders_come_back_whole(tmp_path):
    world = DeltaWorld(16, 2, 1, query="learned", mlp_ratio=2.0)
    save_model(tmp_path, world, "world", {})
    loaded = load_world(tmp_path)
    assert loaded.model.arguments == world.arguments
    assert _same_weights(loaded.model, world)


def test_equal_weights_give_equal_bytes(folder, tokenizer, tmp_path):
    save_model(tmp_path / "again", tokenizer, "tokenizer", {"step": 7, "patch_grid": [2, 2]})
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_a_training_output_means_its_newest_complete_step(tokenizer, tmp_path):
    for step in (500, 1000, 99_999):
        save_model(tmp_path / f"checkpoints/step-{step:08d}", tokenizer, "tokenizer", {"step": step})
    save_model(tmp_path / "checkpoints/.step-00200000.tmp", tokenizer, "tokenizer", {"step": 200_000})
    (tmp_path / "checkpoints/step-00300000").mkdir()
    for place in (tmp_path, tmp_path / "checkpoints"):
        assert load_tokenizer(place).metadata["step"] == 99_999
    (tmp_path / "checkpoints/step-00099999/model.safetensors").unlink()
    assert load_tokenizer(tmp_path).metadata["step"] == 1000


def test_half_precision_files_become_float32(tokenizer, tmp_path):
    torch.save({name: t.half() for name, t in tokenizer.state_dict().items()}, tmp_path / "half.bin")
    loaded = load_tokenizer(tmp_path / "half.bin")
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}


def test_what_does_not_fit_is_listed(folder, tokenizer, tmp_path):
    weights = tokenizer.state_dict()
    del weights["encoder_blocks.0.norm1.bias"]
    weights["encoder_blocks.1.norm2.bias"] = torch.zeros(5)
    weights["head.weight"] = torch.zeros(1)
    torch.save(weights, tmp_path / "odd.bin")
    save_file(weights, folder / "model.safetensors")
    for path in (tmp_path / "odd.bin", folder):
        with pytest.raises(CheckpointError) as caught:
            load_tokenizer(path)
        message = str(caught.value)
        assert str(path) in message
        assert "does not fit DeltaTok(hidden_size=16, num_heads=2" in message
        assert "1 missing: encoder_blocks.0.norm1.bias\n" in message
        assert "1 unexpected: head.weight\n" in message
        assert "1 misshapen: encoder_blocks.1.norm2.bias is (5,), expected (16,)\n" in message


def test_long_lists_are_cut(tokenizer, tmp_path):
    weights = {name: tensor for name, tensor in tokenizer.state_dict().items() if "decoder" not in name}
    weights |= {f"decoder_blocks.0.{number}": torch.zeros(1) for number in range(20)}
    torch.save(weights, tmp_path / "odd.bin")
    with pytest.raises(
        CheckpointError, match=r"23 missing: .*, and 15 more\n  20 unexpected: .*, and 12 more"
    ):
        load_tokenizer(tmp_path / "odd.bin")


def test_a_block_missing_in_between_is_missing(tmp_path):
    weights = DeltaTok(16, 2, 3, 1).state_dict()
    torch.save(
        {n: t for n, t in weights.items() if not n.startswith("encoder_blocks.1.")}, tmp_path / "odd.bin"
    )
    with pytest.raises(
        CheckpointError, match=r"encoder_layers=3.*\n  23 missing: encoder_blocks\.1\.norm1\.weight"
    ):
        load_tokenizer(tmp_path / "odd.bin")


def test_the_other_model_is_refused(folder, tokenizer, tmp_path):
    with pytest.raises(CheckpointError, match="holds a tokenizer, but a world is needed"):
        load_world(folder)
    save_file(tokenizer.state_dict(), tmp_path / "tokenizer.safetensors")
    with pytest.raises(
        CheckpointError, match=r"tokenizer.safetensors holds no world model: .*encoder_blocks"
    ):
        load_world(tmp_path / "tokenizer.safetensors")
    save_file(DeltaWorld(16, 2, 1).state_dict(), tmp_path / "world.safetensors")
    with pytest.raises(CheckpointError, match=r"world.safetensors holds no tokenizer: .*predictor"):
        load_tokenizer(tmp_path / "world.safetensors")


def test_exchanged_weights_are_refused(folder):
    weights = load_file(folder / "model.safetensors")
    weights["norm.bias"][0] += 1e-6
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"has the fingerprint \w{16}, but config.json says \w{16}"):
        load_tokenizer(folder)


def test_python_objects_are_never_run(tmp_path):
    torch.save({"state_dict": {}, "hyper_parameters": _SomebodysClass()}, tmp_path / "last.ckpt")
    with pytest.raises(
        CheckpointError, match="Python objects besides tensors, which are never run"
    ) as caught:
        load_tokenizer(tmp_path / "last.ckpt")
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("content", [[1, 2], {}, {"state_dict": {}}, {"epoch": 3}, {"state_dict": {"a": 1}}])
def test_files_without_parameters_are_refused(content, tmp_path):
    torch.save(content, tmp_path / "odd.bin")
    with pytest.raises(CheckpointError, match="holds no named parameters"):
        load_tokenizer(tmp_path / "odd.bin")


@pytest.mark.parametrize(
    "name", ["file.bin", "file.safetensors", "saved/model.safetensors", "saved/config.json"]
)
def test_damaged_files_are_refused(name, folder, tokenizer, tmp_path):
    torch.save(tokenizer.state_dict(), tmp_path / "file.bin")
    save_file(tokenizer.state_dict(), tmp_path / "file.safetensors")
    whole = (tmp_path / name).read_bytes()
    path = folder if name.startswith("saved") else tmp_path / name
    load_tokenizer(path)
    for damaged in (b"", b"PK\x03\x04", whole[: len(whole) // 2], whole[:-2], b"\xff" * 64, whole[100:]):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(CheckpointError, match=str(tmp_path)):
            load_tokenizer(path)


@pytest.mark.slow
def test_flipped_bytes_are_noticed_or_harmless(folder, tokenizer, tmp_path):
    """A PyTorch file carries checksums of its tensors, a folder of ours a fingerprint."""
    torch.save(tokenizer.state_dict(), tmp_path / "file.bin")
    for path, place in (
        (tmp_path / "file.bin", tmp_path / "file.bin"),
        (folder / "model.safetensors", folder),
    ):
        whole = path.read_bytes()
        for position in range(0, len(whole), len(whole) // 60):
            path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x41]) + whole[position + 1 :])
            try:
                loaded = load_tokenizer(place)
            except CheckpointError:
                continue
            assert _same_weights(loaded.model, tokenizer)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"arguments": {"hidden_size": 16}}, "cannot be built"),
        ({"arguments": {"colour": 1}}, "cannot be built"),
        ({"arguments": [1]}, "cannot be built"),
    ],
)
def test_configs_that_make_no_model_are_refused(folder, changed, message):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changed}))
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(folder)


@pytest.mark.parametrize("content", ["[]", "{}", '{"architectures": ["DINOv3ViTModel"]}'])
def test_configs_of_something_else_are_refused(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match="must hold kind, arguments and fingerprint"):
        load_tokenizer(folder)


def test_places_without_a_checkpoint_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist: give a checkpoint folder"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(
        CheckpointError, match=r"holds no checkpoint: expected config.json and model.safetensors"
    ):
        load_tokenizer(tmp_path)


def test_arguments_are_for_files_without_a_config(folder):
    with pytest.raises(ValueError, match=r"has its own arguments in config.json"):
        load_tokenizer(folder, {"num_heads": 4})


def test_metadata_must_not_describe_the_model(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"must not name \['fingerprint'\]"):
        save_model(tmp_path, tokenizer, "tokenizer", {"fingerprint": "0"})


def test_fingerprints_see_names_shapes_types_and_bytes():
    base = {"a": torch.zeros(2, 3), "b": torch.ones(2)}
    others = [
        {"c": base["a"], "b": base["b"]},
        {"a": base["a"].T, "b": base["b"]},
        {"a": base["a"].half(), "b": base["b"]},
        {"a": base["a"], "b": base["b"] * 2},
        {"a": base["a"]},
    ]
    prints = [weights_fingerprint(one) for one in [base, *others]]
    assert len(set(prints)) == len(prints)
    assert all(len(one) == 16 for one in prints)
    assert weights_fingerprint(dict(reversed(base.items()))) == prints[0]
