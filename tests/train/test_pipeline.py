import itertools

import pytest
from herdkit.train.layout import ParallelConfig, passes_in_flight
from herdkit.train.pipeline import order_of_passes

INTERLEAVED = [("interleaved", chunks, run) for chunks in (2, 3) for run in (None, 2, 3, 5, 8)]
SCHEDULES = [("1f1b", 1, None), ("gpipe", 1, None), *INTERLEAVED]


def run(orders, stages):
    """What is left of each process's passes once none can go on."""
    done, left = set(), [list(order) for order in orders]
    moved = True
    while moved:
        moved = False
        for order in left:
            while order:
                stage, forward, number = order[0]
                if forward:
                    ready = stage == 0 or (stage - 1, True, number) in done
                else:
                    after = stage + 1 == stages or (stage + 1, False, number) in done
                    ready = after and (stage, True, number) in done
                if not ready:
                    break
                done.add(order.pop(0))
                moved = True
    return left


@pytest.mark.parametrize(("schedule", "chunks", "consecutive"), SCHEDULES)
def test_every_number_of_micro_batches_comes_through(schedule, chunks, consecutive):
    tried = 0
    for pipeline, count in itertools.product((2, 3, 4, 8), range(1, 18)):
        parallel = ParallelConfig(pipeline=pipeline, schedule=schedule, chunks=chunks, consecutive=consecutive)
        try:
            orders = order_of_passes(parallel, count)
        except ValueError:  # fewer in a row than there are processes
            continue
        assert not any(run(orders, pipeline * chunks)), (pipeline, count)
        for process, order in enumerate(orders):
            stages = range(process, pipeline * chunks, pipeline)
            assert sorted(order) == sorted(itertools.product(stages, (True, False), range(count)))
            held = itertools.accumulate(1 if forward else -1 for _, forward, _ in order)
            assert max(held) == passes_in_flight(parallel, process, count)
        tried += 1
    assert tried > 10
