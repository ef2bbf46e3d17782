import json
from dataclasses import asdict

import torch
from herdkit.data.bad_samples import BadSample
from herdkit.data.loader import Loader
from herdkit.data.mixture import Mixture
from herdkit.data.shards import Fault, Sample
from herdkit.train import latest_complete, parallel, train
from herdkit.train.bad_samples import BadSampleLog

BAD = {3, 10, 11, 30}


class Samples(list):
    def __init__(self, *items):
        super().__init__(*items)
        self.faults = []


def toy_loader(toys, batch_size=8):
    samples = Samples(Sample(str(i), "a.tar", {}) for i in range(40))

    def collate(pairs):
        for _, one in pairs:
            if int(one.key) in BAD:
                raise ValueError(f"{one.key} is broken")
        made = [toys.sample(int(one.key), torch.float32, range(40)) for _, one in pairs]
        return {key: torch.stack([one[key] for one in made]) for key in made[0]}

    return Loader(Mixture([("a", samples, 1)]), collate, batch_size, seed=0, on_bad="skip", prefetch=0)


def lines(run_dir):
    return [json.loads(line) for line in (run_dir / "bad_samples.jsonl").read_text().splitlines()]


def test_a_run_writes_down_what_was_left_out(toys, tmp_path):
    loader = toy_loader(toys)
    result = train(toys.Toy(), loader, toys.objective, run_dir=tmp_path / "run", **toys.configs(steps=5))
    assert result["bad_samples"] == 4
    written = lines(tmp_path / "run")
    assert {line["key"] for line in written} == {str(i) for i in BAD}
    assert all(line.keys() == {"step", "position", "shard", "key", "member", "reason"} for line in written)
    for line in written:  # known at the next line of the log, every 3 updates, or checkpoint, every 4
        taken = line["position"] // 8 + 1
        assert line["step"] == min(step for step in (3, 4, 5) if step >= taken)
    assert (
        train(toys.Toy(), toy_loader(toys), toys.objective, run_dir=tmp_path / "run", **toys.configs(steps=5)) == result
    )


def test_a_resumed_run_has_each_bad_sample_once(toys, tmp_path):
    def stops(model, batch):
        stops.left -= 1
        if not stops.left:
            raise KeyboardInterrupt
        return toys.objective(model, batch)

    stops.left = 7  # in the seventh update; the checkpoint is of the fourth, and the sixth has been logged
    settings = toys.configs(steps=10)
    try:
        train(toys.Toy(), toy_loader(toys), stops, run_dir=tmp_path / "run", **settings)
    except KeyboardInterrupt:
        assert max(line["step"] for line in lines(tmp_path / "run")) == 6
    result = train(toys.Toy(), toy_loader(toys), toys.objective, run_dir=tmp_path / "run", **settings)
    train(toys.Toy(), toy_loader(toys), toys.objective, run_dir=tmp_path / "straight", **settings)
    assert lines(tmp_path / "run") == lines(tmp_path / "straight")
    assert result["bad_samples"] == 8
    state = json.loads((latest_complete(tmp_path / "run") / "state.json").read_text())
    assert state["loader"]["bad"] == 8


def test_faults_of_shards_come_first_and_once(toys, tmp_path):
    fault = Fault("a.tar", 512, "damaged header at byte 512", "7", "json", 1024)

    def faulty_loader():
        loader = toy_loader(toys)
        loader.mixture.readers[0].faults.append(fault)
        return loader

    for _ in range(2):  # the second run begins anew, since the first was killed before its first checkpoint
        BadSampleLog(tmp_path, faulty_loader())
        assert lines(tmp_path) == [{"step": 0, **asdict(fault)}]
    train(toys.Toy(), faulty_loader(), toys.objective, run_dir=tmp_path, **toys.configs(steps=5))
    BadSampleLog(tmp_path, faulty_loader(), step=4)
    written = lines(tmp_path)
    assert written[0] == {"step": 0, **asdict(fault)}
    assert len(written) > 1
    assert all(line["step"] > 0 for line in written[1:])


def test_what_other_processes_left_out_is_written_and_told(tmp_path, monkeypatch):
    class Reading:
        def __init__(self, *bad):
            self.bad = [BadSample(position, "a.tar", str(position), "json", "is broken") for position in bad]
            self.bad_elsewhere = 0

    ranks = [Reading(1, 2), Reading(2, 9), Reading()]
    logs = [BadSampleLog(tmp_path / "run", reading) for reading in [Reading(), Reading(), Reading()]]
    (tmp_path / "run").mkdir()
    mine = []
    monkeypatch.setattr(parallel, "gather", lambda value: (mine.append(value), [value])[1])
    for log, reading in zip(logs, ranks, strict=True):
        log.loader = reading
        monkeypatch.setattr(parallel, "rank", lambda: 1)
        log.collect(4)
    assert [len(found) for found in mine] == [2, 2, 0]
    for number, (log, reading) in enumerate(zip(logs, ranks, strict=True)):
        log._heard_of = 0
        monkeypatch.setattr(parallel, "gather", lambda value: mine[:3])
        monkeypatch.setattr(parallel, "rank", lambda number=number: number)
        log.collect(4)
        assert reading.bad_elsewhere == 3 - len(reading.bad)
    assert [line["position"] for line in lines(tmp_path / "run")] == [1, 2, 9]
