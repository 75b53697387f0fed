"""Which cards and cores each group of ranks gets."""

from __future__ import annotations

import pytest

from autotp_serving.config import ConfigError
from autotp_serving.distributed.placement import Topology
from autotp_serving.head.places import ANYWHERE, find_places

FOUR_CORES = Topology(((0, ((0,), (1,), (2,), (3,))),), None)
TWO_NODES = Topology(((0, ((0,), (1,))), (1, ((2,), (3,)))), None)


def read(name: str, num_groups: int, num_ranks: int, **environ: str) -> list[str]:
    places = find_places(num_groups, num_ranks, "auto", environ, FOUR_CORES)
    return [place.environ[name] for place in places]


def test_a_single_group_is_left_as_it_is():
    assert find_places(1, 4, "cuda", {"CUDA_VISIBLE_DEVICES": "0"}, FOUR_CORES) == [ANYWHERE]


@pytest.mark.parametrize("name", ["CUDA_VISIBLE_DEVICES", "ZE_AFFINITY_MASK"])
def test_cards_are_shared_out(name: str):
    assert read(name, 2, 2) == ["0,1", "2,3"]
    assert read(name, 3, 1, **{name: "5, 3,1,0"}) == ["5", "3", "1"]
    assert read(name, 2, 1, **{name: "GPU-aa,GPU-bb"}) == ["GPU-aa", "GPU-bb"]
    assert read(name, 2, 1, **{name: ""}) == ["", ""]
    with pytest.raises(ConfigError, match=f"{name} shows 3 .* need 4: lower --data-parallel-size"):
        read(name, 2, 2, **{name: "0,1,2"})


def test_cores_are_shared_out():
    """Of one memory node by numbers of threads, of several node by node."""
    assert read("OMP_NUM_THREADS", 2, 1) == ["2", "2"]
    assert read("OMP_NUM_THREADS", 2, 2) == ["1", "1"]
    assert read("OMP_NUM_THREADS", 3, 2) == ["1", "1", "1"]
    leftover = {"OMP_NUM_THREADS": "7", "CUDA_VISIBLE_DEVICES": "0"}
    places = find_places(2, 1, "cpu", leftover, TWO_NODES)
    assert [place.cpus for place in places] == [(0, 1), (2, 3)]
    assert not any(place.environ for place in places)
    assert [place.name for place in places] == ["0", "1"]


def test_more_groups_than_cpus_are_refused():
    with pytest.raises(ConfigError, match=r"--data-parallel-size 5: .* may use 4: lower it"):
        find_places(5, 1, "cpu", {}, FOUR_CORES)
