"""What workers tell each other: gloo processes, no Ray."""

import os
from collections.abc import Iterator
from functools import partial
from itertools import islice

import pytest
import torch.distributed as dist

from hrm_ray.errors import UserError
from hrm_ray.world import World
from tests.training.processes import start


def _refuse(size: int, values: Iterator[int]) -> None:
    raise UserError(f"seen by the first of {size}")


def _worker(rank: int, size: int, meeting_point: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=size)
    world = World(rank, size, rank)
    own = {"rank": rank, "content": bytes([rank]) * 10**rank}  # of different sizes
    assert world.merge_objects(own, list) == world.gather_objects(own)
    # Of a merge that does not ask for all of them, the rest is on no account taken for the next one's.
    assert world.merge_objects(rank, lambda ranks: list(islice(ranks, 2))) == [0, 1]
    assert world.merge_objects(None, lambda values: rank) == 0  # it is the first that merges
    with pytest.raises(UserError, match="seen by the first of 3"):  # on all, and none is left waiting
        world.merge_objects(rank, partial(_refuse, size))
    assert world.merge_objects(rank, sum) == sum(range(size))
    dist.barrier()
    os._exit(0)


def test_the_first_worker_merges_what_all_have_in_the_order_of_ranks():
    start(_worker, 3)


def test_one_worker_merges_its_own():
    assert World().merge_objects("own", list) == World().gather_objects("own") == ["own"]
