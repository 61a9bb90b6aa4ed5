"""How many workers of which size a cluster gets."""

import pytest

from deltacache.pipeline.work.placement import Node, NoRoomError, place, place_tasks
from deltacache.schemas.errors import DeltacacheError
from deltacache.schemas.jobs import ClusterSettings

GPU_NODE = Node(32, 8, 500e9)
CPU_NODE = Node(64, 0, 250e9)


def test_one_encoder_a_gpu_and_the_other_cpus_decode() -> None:
    placement = place(ClusterSettings(), [GPU_NODE, GPU_NODE, CPU_NODE], cores=None, ray_start_s=0)
    assert (placement.encoders, placement.gpus_per_encoder, placement.device) == (16, 1.0, "cuda")
    assert placement.decoders == 32 + 32 + 64 - 16
    shares = [placement.decode_share(each, 16 << 20) for each in range(16)]
    assert sum(share.in_flight for share in shares) == placement.in_flight(16 << 20) == 2 * placement.decoders
    assert all(share.at_once == share.in_flight for share in shares)  # Ray's CPUs are the limit


def test_what_is_decoded_ahead_takes_at_most_half_of_the_object_stores() -> None:
    nodes = [Node(64, 8, 500e9, store_bytes=4 << 30), Node(64, 0, 500e9, store_bytes=4 << 30)]
    placement = place(ClusterSettings(), nodes, cores=None, ray_start_s=0)
    assert placement.in_flight(16 << 20) == 2 * placement.decoders == 240
    assert placement.in_flight(32 << 20) == 4096 // 32
    assert placement.in_flight(1 << 30) == 2 * placement.encoders  # never less than two an encoder


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
    placement = place(ClusterSettings(encoders=3, decoders=8), [CPU_NODE], cores=None, ray_start_s=0)
    assert placement.decoders == 8
    shares = [placement.decode_share(each, 16 << 20) for each in range(3)]
    assert [share.at_once for share in shares] == [3, 3, 2]
    assert sum(share.in_flight for share in shares) == 16


def test_more_decoders_than_cpus_are_reduced_and_used_when_nodes_join() -> None:
    placement = place(ClusterSettings(decoders=999), [CPU_NODE], cores=None, ray_start_s=0)
    assert placement.decoders == 63
    assert "not 999" in placement.remarks[-1]
    assert placement.in_flight(16 << 20) == 2 * 999


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([Node(0, 1, 10e9)], "leave none for decoding|no CPU beside them"),
        ([Node(0, 8, 10e9), Node(64, 0, 10e9)], "8 encoders more would find GPUs, but no CPU beside them"),
        ([Node(0, 0, 10e9)], "leave none for decoding"),
        ([], "leave none for decoding"),
        ([Node(1, 0, 10e9)], "leave none for decoding"),
    ],
)
def test_nodes_without_cpus_where_they_are_needed_are_refused(nodes: list[Node], message: str) -> None:
    with pytest.raises(NoRoomError, match=message):
        place(ClusterSettings(), nodes, cores=None, ray_start_s=0)


def test_gpus_beside_which_there_is_no_cpu_are_left_idle_with_a_line() -> None:
    placement = place(ClusterSettings(), [GPU_NODE, Node(0, 8, 10e9)], cores=None, ray_start_s=0)
    assert placement.encoders == 8
    assert "8 encoders, not 16" in placement.remarks[0]


def test_few_cpus_beside_many_gpus_are_shared() -> None:
    placement = place(ClusterSettings(), [Node(4, 8, 500e9), CPU_NODE], cores=None, ray_start_s=0)
    assert placement.encoders == 8
    assert 8 * placement.cpus_per_encoder <= 4  # all of them fit on the node that has the GPUs
    assert placement.decoders == 3 + 64


def test_encoders_leave_whole_cpus_for_decoding() -> None:
    """A decode task needs one CPU of one node: a part of each of four nodes is none."""
    placement = place(ClusterSettings(), [Node(1, 0, 16e9)] * 4, cores=None, ray_start_s=0)
    assert (placement.encoders, placement.decoders) == (3, 1)
    assert "3 encoders, not 4" in placement.remarks[0]


def test_fewer_decoders_than_encoders() -> None:
    placement = place(ClusterSettings(decoders=4), [GPU_NODE], cores=None, ray_start_s=0)
    assert placement.encoders == 4
    assert "4 encoders, not 8: each needs a decoder" in placement.remarks[0]
    with pytest.raises(DeltacacheError, match="--decoders 4 for 5 encoders"):
        place(ClusterSettings(encoders=5, decoders=4), [GPU_NODE], cores=None, ray_start_s=0)


def test_independent_tasks_get_the_room_there_is() -> None:
    assert place_tasks(4, [Node(16, 0, 1e9)]) == (4, 0.0)
    assert place_tasks(8, [Node(2, 0, 1e9), Node(1, 0, 1e9)]) == (3, 0.0)
    assert place_tasks(4, [Node(0, 8, 1e9), Node(16, 2, 1e9)]) == (4, 0.5)  # GPUs without a CPU do not count
    with pytest.raises(NoRoomError, match="offer none"):
        place_tasks(4, [Node(0, 0, 1e9)])


def test_few_shards_get_few_encoders() -> None:
    placement = place(ClusterSettings(), [GPU_NODE], cores=None, ray_start_s=0)
    assert placement.for_shards(3).encoders == 3
    assert placement.for_shards(0).encoders == 1
