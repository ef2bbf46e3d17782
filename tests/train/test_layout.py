import pytest
from herdkit.train import RecipeError
from herdkit.train.hardware import Group, accelerator, gather
from herdkit.train.layout import (
    Layout,
    LayoutError,
    ParallelConfig,
    bubble,
    lay_out,
    passes_in_flight,
    read_parallel,
    run_length,
)


def test_ranks_are_the_papers():
    layout = lay_out(ParallelConfig(tensor=2, context=2, pipeline=2, shard=None), 16)
    assert (layout.processes, layout.data, layout.storage) == (16, 2, 4)
    # Section 3.3.2: GPU0 shares with GPU1 a tensor, with GPU2 a row, with GPU4 the layers, with GPU8 the storage.
    dimensions = ("tensor", "context", "pipeline", "shard")
    assert [layout.peers(0, name) for name in dimensions] == [[0, 1], [0, 2], [0, 4], [0, 8]]
    assert layout.peers(13, "context", "shard") == [5, 7, 13, 15]
    assert layout.coordinates(13) == (1, 0, 1, 1, 0)
    assert [layout.neighbours(8, name) for name in dimensions] == [2, 2, 2, 1]
    assert layout.neighbours(8, "context", "shard") == 2


def test_what_is_left_over_are_replicas():
    layout = lay_out(ParallelConfig(tensor=8, shard=8), 256)
    assert layout == Layout(tensor=8, shard=8, replicate=4)
    assert layout.peers(9, "replicate") == [9, 73, 137, 201]


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (
            {"tensor": 8, "pipeline": 16},
            r"parallel.tensor: 192 processes .* tensor x context x pipeline = 8 x 1 x 16 = 128",
        ),
        ({"tensor": 8, "shard": 16}, r"parallel.shard: 192 processes .* leave 24, not a multiple of 16"),
    ],
)
def test_processes_that_do_not_divide_are_refused(given, problem):
    with pytest.raises(LayoutError, match=problem):
        lay_out(ParallelConfig(**given), 192)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"context": 0}, "context must be at least 1, not 0"),
        ({"pipeline": 4, "chunks": 2}, "chunks must be 2 or more for schedule 'interleaved' and 1 for the others"),
        ({"schedule": "gpipe"}, "schedule 'gpipe' needs pipeline of 2 or more"),
        ({"pipeline": 4, "consecutive": 4}, "consecutive is of schedule 'interleaved'"),
    ],
)
def test_configs_that_contradict_themselves_are_refused(given, problem):
    with pytest.raises(ValueError, match=problem):
        ParallelConfig(**given)


def test_a_layout_is_read_from_keys_or_from_a_block(tmp_path):
    keys = read_parallel("tensor=8 pipeline=16 shard=null schedule=interleaved chunks=8")
    file = tmp_path / "layout.yaml"
    file.write_text("parallel: {tensor: 8, pipeline: 16, shard: null, schedule: interleaved, chunks: 8}\n")
    assert keys == read_parallel(str(file))
    assert keys == ParallelConfig(tensor=8, pipeline=16, shard=None, schedule="interleaved", chunks=8)
    with pytest.raises(RecipeError, match="override 'tensr=8': unknown key 'tensr'; did you mean 'tensor'"):
        read_parallel("tensr=8")
    with pytest.raises(RecipeError, match="no such recipe"):
        read_parallel(str(tmp_path / "other.yaml"))


def simulate(parallel, micro_batches):
    """Runs a schedule by its definition: every process takes its passes in order, each lasts 1 and waits for the stage
    before (forward) or after (backward). Returns the end, and the most passes that each process held."""
    P, V, M = parallel.pipeline, parallel.chunks, micro_batches
    N = M if parallel.schedule == "gpipe" else run_length(parallel, M)
    runs = [range(start, min(start + N, M)) for start in range(0, M, N)]
    done, clock, held, most, queues = {}, [0] * P, [0] * P, [0] * P, []
    for p in range(P):
        forward = [("F", v * P + p, m) for run in runs for v in range(V) for m in run]
        backward = [("B", v * P + p, m) for run in runs for v in reversed(range(V)) for m in run]
        warm = P - p - 1 if V == 1 else 2 * (P - p - 1) + (V - 1) * N
        warm = len(forward) if parallel.schedule == "gpipe" else min(warm, len(forward))
        steady = [each for pair in zip(forward[warm:], backward, strict=False) for each in pair]
        queues.append(forward[:warm] + steady + backward[len(forward) - warm :])
    while any(queues):
        moved = False
        for p, queue in enumerate(queues):
            while queue:
                kind, stage, m = queue[0]
                last = stage == P * V - 1
                needs = (("F", stage, m) if last else ("B", stage + 1, m)) if kind == "B" else ("F", stage - 1, m)
                if stage + (kind == "B") and needs not in done:
                    break
                clock[p] = max(clock[p], done.get(needs, 0)) + 1
                done[kind, stage, m] = clock[p]
                held[p] += 1 if kind == "F" else -1
                most[p] = max(most[p], held[p])
                queue.pop(0)
                moved = True
        assert moved, "the schedule hangs"
    return max(clock), most


@pytest.mark.parametrize(
    ("given", "micro_batches"),
    [
        ({"schedule": "gpipe"}, 6),
        ({"schedule": "1f1b"}, 8),
        ({"schedule": "1f1b"}, 2),
        ({"schedule": "interleaved", "chunks": 2}, 8),
        ({"schedule": "interleaved", "chunks": 3}, 4),
        ({"schedule": "interleaved", "chunks": 2, "consecutive": 5}, 10),
    ],
)
def test_bubble_and_passes_in_flight_are_those_of_the_schedule(given, micro_batches):
    parallel = ParallelConfig(pipeline=4, **given)
    end, most = simulate(parallel, micro_batches)
    work = 2 * parallel.chunks * micro_batches
    assert end / work - 1 == pytest.approx(bubble(parallel, micro_batches))
    assert most == [passes_in_flight(parallel, place, micro_batches) for place in range(4)]


def test_runs_that_are_too_short_are_refused():
    parallel = ParallelConfig(pipeline=4, schedule="interleaved", chunks=2, consecutive=2)
    with pytest.raises(LayoutError, match=r"consecutive: 2 is below min\(pipeline, micro-batches\) = min\(4, 8\) = 4"):
        passes_in_flight(parallel, 0, 8)


def test_a_gathering_is_as_fast_as_its_narrowest_link():
    device = accelerator("h100")
    inside, across = gather(device, Group(8, 8), 8e9), gather(device, Group(16, 8), 16e9)
    assert (inside.server_bytes, inside.network_bytes) == (7e9, 0)
    assert inside.seconds == pytest.approx(7e9 / (0.75 * 450e9), rel=0.01)
    # 8e9 bytes come in over eight cards of the server, 14e9 are handed round in it.
    assert (across.server_bytes, across.network_bytes) == (14e9, 1e9)
    assert across.seconds == pytest.approx(14e9 / (0.75 * 450e9), rel=0.01)
    alone = gather(device, Group(16, 1), 16e9)
    assert (alone.server_bytes, alone.network_bytes) == (0, 15e9)
    assert alone.seconds == pytest.approx(15e9 / (0.8 * 50e9), rel=0.01)
    with pytest.raises(ValueError, match="hardware 'h1000' is not known; there are h100"):
        accelerator("h1000")
