"""Where processes that torchrun starts again find each other, and not what the start before has left."""

from __future__ import annotations

import json
import os
import time
import uuid
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed import DistStoreError

POLL = 0.05  # seconds


def store_of_this_start(timeout: timedelta) -> Store | None:
    """The store to build the process group with; None: torch's own is empty.

    torchrun keeps one store for all starts of its processes (unless TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1), where torch
    would find addresses of processes that are dead and either fail or wait for them
    (https://github.com/pytorch/pytorch/issues/135712). Its count of starts is no help: nodes may differ in it.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False, timeout=timeout)
    return PrefixStore(agree(store, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), timeout), store)


def agree(store: Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """A name that all processes of this start have, and none of an earlier one.

    The first process proposes one and waits until all others have answered it, each with a name of its own; it then
    publishes the answers, among which each of the others must find its own to believe. The dead answer nothing, and
    what they have answered is in no later list.

    Raises:
        TimeoutError: some process did not come.
    """
    own = uuid.uuid4().hex
    if rank == 0:
        store.set("herdkit/proposal", own)
        try:
            answers = [store.get(f"herdkit/{own}/{other}").decode() for other in range(1, world_size)]
        except DistStoreError as error:
            raise TimeoutError(f"of {world_size} processes some did not come within {timeout}") from error
        store.set(f"herdkit/{own}/answers", json.dumps(answers))
        return own
    answered = ""
    end = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < end:
        if store.check(["herdkit/proposal"]):
            proposal = store.get("herdkit/proposal").decode()
            if proposal != answered:
                store.set(f"herdkit/{proposal}/{rank}", own)
                answered = proposal
            answers = f"herdkit/{proposal}/answers"
            if store.check([answers]) and own in json.loads(store.get(answers)):
                return proposal
        time.sleep(POLL)
    raise TimeoutError(f"process 0 of {world_size} did not come within {timeout}")
