import json
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist
from herdkit.train import parallel
from herdkit.train.rendezvous import agree, store_of_this_start

LIMIT = timedelta(seconds=20)


def start(port, ranks, world_size, limit=LIMIT):
    """What each of some processes agrees on, each with a connection of its own."""

    def one(rank):
        return agree(dist.TCPStore("127.0.0.1", port, is_master=False, timeout=limit), rank, world_size, limit)

    with ThreadPoolExecutor(len(ranks)) as threads:
        return list(threads.map(one, ranks))


@pytest.fixture
def server():
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=LIMIT)


def test_every_start_agrees_on_a_name_of_its_own(server):
    names = [start(server.port, range(size), size) for size in (3, 3, 2)]
    assert all(len(set(found)) == 1 for found in names)
    assert len({found[0] for found in names}) == 3


def test_what_a_start_that_was_cut_short_has_left_is_not_believed(server):
    # Process 2 died before it answered; of a start before that everything is there.
    start(server.port, range(3), 3)
    server.set("herdkit/proposal", "stale")
    server.set("herdkit/stale/1", "dead")
    server.set("herdkit/stale/answers", json.dumps(["dead", "dead"]))
    found = start(server.port, [1, 2, 0], 3)
    assert len(set(found)) == 1
    assert found[0] != "stale"


@pytest.mark.parametrize(("ranks", "message"), [([0], "of 2 processes some"), ([1], "process 0 of 2")])
def test_one_who_does_not_come(server, ranks, message):
    with pytest.raises(TimeoutError, match=f"{message} did not come within 0:00:00.5"):
        start(server.port, ranks, 2, timedelta(seconds=0.5))


def test_without_a_kept_store_torch_does_it(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    assert store_of_this_start(LIMIT) is None


def test_processes_of_torchrun_join_through_it(server, monkeypatch):
    place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.port)}
    for name, value in {**place, "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(name, value)
    with parallel.process_group():
        assert server.check(["herdkit/proposal"])
