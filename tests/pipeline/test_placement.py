"""How many workers of which size a cluster gets."""

import pytest

from deltacache.pipeline.work.placement import Node, place
from deltacache.schemas.errors import DeltacacheError
from deltacache.schemas.jobs import ClusterSettings

GPU_NODE = Node(32, 8, 500e9)
CPU_NODE = Node(64, 0, 250e9)


def test_one_encoder_a_gpu_and_the_other_cpus_decode() -> None:
    placement = place(ClusterSettings(), [GPU_NODE, GPU_NODE, CPU_NODE], cores=None, ray_start_s=0)
    assert (placement.encoders, placement.gpus_per_encoder, placement.device) == (16, 1.0, "cuda")
    assert placement.decoders == 32 + 32 + 64 - 16
    assert 2 * placement.encoders * placement.window(2) >= 2 * placement.decoders


def test_parts_of_a_gpu_and_several_gpus() -> None:
    halves = place(ClusterSettings(gpus_per_encoder=0.5), [GPU_NODE], cores=None, ray_start_s=0)
    assert halves.encoders == 16
    threes = place(ClusterSettings(gpus_per_encoder=3), [GPU_NODE, GPU_NODE], cores=None, ray_start_s=0)
    assert threes.encoders == 4  # two on each node, not five over both


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (ClusterSettings(encoders=17), "at most 16 --encoders"),
        (ClusterSettings(gpus_per_encoder=9), "at most 0 --encoders"),
        (ClusterSettings(gpus_per_encoder=1.5), "a part of one GPU"),
    ],
)
def test_what_no_node_can_hold_is_refused(settings: ClusterSettings, message: str) -> None:
    with pytest.raises(DeltacacheError, match=message):
        place(settings, [GPU_NODE, GPU_NODE], cores=None, ray_start_s=0)


def test_on_one_machine_without_gpus_everyone_gets_all_cores() -> None:
    placement = place(ClusterSettings(), [Node(3, 0, 24e9)], cores=2, ray_start_s=0)
    assert (placement.encoders, placement.decoders, placement.device) == (2, 2, "cpu")
    little = place(ClusterSettings(), [Node(65, 0, 16e9)], cores=64, ray_start_s=0)
    assert little.encoders == 4  # as many models as memory holds


def test_decoders_that_were_asked_for_are_not_exceeded() -> None:
    placement = place(ClusterSettings(encoders=2, decoders=8), [CPU_NODE], cores=None, ray_start_s=0)
    assert placement.decoders == 8
    assert placement.encoders * 2 * placement.window(2) <= 8
    assert place(ClusterSettings(decoders=999), [CPU_NODE], cores=None, ray_start_s=0).decoders == 63


def test_no_cpu_for_decoding_is_refused() -> None:
    with pytest.raises(DeltacacheError, match="leave none for decoding"):
        place(ClusterSettings(), [Node(0, 1, 10e9)], cores=None, ray_start_s=0)


def test_few_shards_get_few_encoders() -> None:
    placement = place(ClusterSettings(), [GPU_NODE], cores=None, ray_start_s=0)
    assert placement.for_shards(3).encoders == 3
    assert placement.for_shards(0).encoders == 1
