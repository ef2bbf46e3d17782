import base64
import io
import json
import os
import re
import shutil

import pytest
from herdkit.cli import main
from herdkit.train import FreezeRule, train
from herdkit.train import watch as watching
from herdkit.train.run_report import moving_average, thin, write_report
from herdkit.train.run_view import duration, read_run
from herdkit.train.watch import course, watch
from rich.console import Console


class KilledError(BaseException):
    pass


def die():
    raise KilledError


def make(toys, path, at=10**6, **kwargs):
    return train(
        toys.Toy(),
        toys.ToyLoader(8),
        toys.at_step(at, die),
        run_dir=path,
        freeze=[FreezeRule(pattern="image.0.*", trainable=False)],
        evaluate=lambda model, step: {"score<i>": step / 10},
        resolved_recipe={"stage": "<script>alert(1)</script>"},
        **toys.configs(12, **kwargs),
    )


@pytest.fixture(scope="module")
def made(toys, tmp_path_factory):
    """A folder with a run that was killed after step 7 and then finished, and one that was killed for good."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.raises(KilledError):
        make(toys, folder / "a$b<c>", at=7)
    killed(folder / "a$b<c>")
    make(toys, folder / "a$b<c>")
    with pytest.raises(KilledError):
        make(toys, folder / "deep" / "killed", at=10)
    killed(folder / "deep" / "killed")
    return folder


def killed(run):
    """Leaves of a run what a process killed with signal 9 does, which writes no end."""
    starts = (run / "starts.jsonl").read_text().splitlines(keepends=True)
    assert '"end"' in starts.pop()
    (run / "starts.jsonl").write_text("".join(starts))


@pytest.fixture
def runs(made, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(made, tmp_path / "runs")


@pytest.fixture
def finished(runs):
    return runs / "a$b<c>"


@pytest.fixture
def unfinished(runs):
    return runs / "deep" / "killed"


def once(capsys, *paths):
    assert main(["watch", "--once", *map(str, paths)]) == 0
    return capsys.readouterr().out


def row(text, name):
    return next(" ".join(line.split()) for line in text.splitlines() if line.startswith(name))


def test_a_finished_run_in_full(finished, capsys):
    shown = once(capsys, finished)
    result = json.loads((finished / "result.json").read_text())
    assert row(shown, "state") == "state finished"
    assert row(shown, "step").startswith("step 12 of 12")
    assert f"{result['last']['loss']:.4g}" in row(shown, "loss")
    assert f"{result['last']['accuracy']:.4g}" in row(shown, "accuracy")
    assert f"{result['last']['effective_time']:.1%} 2 starts, 2 updates made again" in row(shown, "effective time")
    assert row(shown, "checkpoint").startswith("checkpoint 12 written")
    assert row(shown, "evaluation") == "evaluation 12 score<i> 1.2"
    assert "remaining" not in shown


def test_starts_and_what_became_of_them(finished):
    first, second = read_run(finished).starts()
    assert (first.step, first.reached, first.lost, first.ending, first.idle) == (0, 6, 0, "killed", None)
    assert (second.step, second.reached, second.lost, second.ending) == (4, 12, 2, "finished")
    assert second.idle >= 0


def test_a_line_that_is_being_written_is_not_read(unfinished, capsys):
    before = once(capsys, unfinished)
    for name in ("metrics.jsonl", "starts.jsonl", "bad_samples.jsonl"):
        with (unfinished / name).open("a") as file:
            file.write('{"step": 11, "lo')
    after = once(capsys, unfinished)
    for name in ("step", "loss", "bad samples", "remaining"):
        assert row(before, name) == row(after, name)
    assert row(after, "step").startswith("step 9 of 12")


def test_bad_samples_are_counted_without_the_faults_of_shards(unfinished, capsys):
    lines = [{"step": 0, "shard": "a", "offset": 3}, {"step": 2, "position": 7}, {"step": 4, "position": 9}]
    (unfinished / "bad_samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert row(once(capsys, unfinished), "bad samples") == "bad samples 2"


def test_silence_is_told_from_work(unfinished, capsys):
    assert row(once(capsys, unfinished), "state") == "state running"
    grow_old(unfinished, 3600)
    assert row(once(capsys, unfinished), "state") == "state silent for 1 h 0 min: stalled or dead"
    # Where a line comes every half hour, an hour is nothing.
    lines = [json.loads(line) for line in (unfinished / "metrics.jsonl").read_text().splitlines()]
    for i, line in enumerate(lines):
        line["wall_seconds"] = 1800.0 * i
    (unfinished / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    grow_old(unfinished, 3600)
    shown = once(capsys, unfinished)
    assert row(shown, "state") == "state running"
    assert row(shown, "remaining").startswith("remaining 30 min 0 s 600 s per step")


def grow_old(run, seconds):
    for path in [*run.iterdir(), *(run / "checkpoints").iterdir()]:
        written = path.stat().st_mtime - seconds
        os.utime(path, (written, written))


def test_an_error_that_ended_a_run_is_shown(unfinished, capsys):
    with (unfinished / "starts.jsonl").open("a") as file:
        file.write(json.dumps({"time": 2.0, "event": "end", "reason": "ValueError: [bold] no"}) + "\n")
    assert re.search(r"state stopped \d+ s ago: ValueError: \[bold\] no", row(once(capsys, unfinished), "state"))


def test_a_longer_run_is_not_finished_by_the_result_of_the_shorter(finished, capsys):
    recipe = json.loads((finished / "recipe.json").read_text())
    recipe["trainer"]["steps"] = 24
    (finished / "recipe.json").write_text(json.dumps(recipe))
    assert "finished" not in row(once(capsys, finished), "step")
    assert row(once(capsys, finished), "state") != "state finished"


def test_a_run_of_which_there_is_only_a_recipe(unfinished, capsys):
    for name in ("metrics.jsonl", "starts.jsonl", "environment.json"):
        (unfinished / name).unlink()
    shutil.rmtree(unfinished / "checkpoints")
    shown = once(capsys, unfinished)
    assert row(shown, "state") == "state running"
    assert row(shown, "checkpoint") == "checkpoint - none yet"


def test_a_folder_of_runs_has_a_line_for_each(runs, capsys):
    shown = once(capsys, runs)
    assert re.match(r"a\$b<c> +12 +12 .* finished", row(shown, "a$b"))
    assert re.match(r"killed +9 +12 .* running", row(shown, "killed"))


def test_without_a_terminal_it_prints_a_line_when_there_is_news_and_ends_with_the_run(unfinished, monkeypatch):
    out = io.StringIO()
    log = unfinished / "metrics.jsonl"
    last = json.loads(log.read_text().splitlines()[-1])
    looks = []

    def sleep(seconds):
        looks.append(seconds)
        if len(looks) == 2:
            with log.open("a") as file:
                file.write(json.dumps({**last, "step": 12, "loss": 0.125}) + "\n")
        if len(looks) == 4:
            (unfinished / "result.json").write_text('{"steps": 12}')

    monkeypatch.setattr(watching.time, "sleep", sleep)
    watch([unfinished], every=7, console=Console(file=out))
    assert looks == [7] * 4
    first, second, third = out.getvalue().splitlines()
    assert " 9/12 " in first
    assert " 12/12  loss 0.125 " in second
    assert third.endswith("finished")


def test_in_a_terminal_it_ends_with_the_run_and_fits_any_encoding(finished):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    watch([finished], console=Console(file=out, force_terminal=True, width=100))
    out.flush()
    assert b"12 of 12" in " ".join(out.buffer.getvalue().decode("ascii").split()).encode()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere", "nowhere: no such directory; give the --run-dir"),
        ("empty", "empty: no run in it"),
        ("file", "file: is a file; give the directory of a run"),
    ],
)
def test_what_is_not_a_run_is_one_line_that_says_what_to_do(tmp_path, capsys, path, message):
    (tmp_path / "empty" / "deeper").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    assert main(["watch", str(tmp_path / path)]) == 1
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1


def test_a_damaged_recipe_is_named(unfinished, capsys):
    (unfinished / "recipe.json").write_text("{")
    assert main(["watch", "--once", str(unfinished)]) == 1
    assert "recipe.json: is not JSON" in capsys.readouterr().err


def test_the_page_holds_everything_and_links_to_nothing(runs, tmp_path, capsys):
    page = tmp_path / "new" / "report.html"
    assert main(["watch", str(runs), "--html", str(page)]) == 0
    assert json.loads(capsys.readouterr().out) == {"report": str(page)}
    text = page.read_text()
    assert "<script" not in text
    assert "<c>" not in text
    assert "a$b&lt;c&gt;" in text
    assert "http" not in re.sub(r'src="data:[^"]*"', "", text)
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", text)
    assert captions[:3] == ["loss", "accuracy", "images"]
    assert {"lr", "grad_norm", "tokens_per_second", "effective_time", "evaluation: score&lt;i&gt;"} <= set(captions)
    for cell in ("killed", "image.0.*", "frozen", "checkpoint_every", "packages"):
        assert cell in text
    # Parts of the toy: all of the image part but the frozen layer's 4 x 16 + 16 trains.
    assert "<td>image</td><td class=n>352</td><td class=n>272</td>" in text


def test_runs_are_drawn_over_each_other(runs, tmp_path):
    views = [read_run(runs / "a$b<c>"), read_run(runs / "deep" / "killed")]
    drawn = []
    for chosen in (views[:1], views):
        write_report(chosen, tmp_path / "page.html")
        text = (tmp_path / "page.html").read_text()
        source = re.search(r'alt="loss" src="data:image/svg\+xml;base64,([^"]*)"', text)
        drawn.append(base64.b64decode(source[1]).decode())
    assert "#1f77b4" in drawn[0]
    assert "#ff7f0e" not in drawn[0]
    assert "#ff7f0e" in drawn[1]


def test_thinning_keeps_spikes():
    points = [(step, 0.0) for step in range(100_000)]
    points[54_321] = (54_321, 9.0)
    points[54_322] = (54_322, -9.0)
    kept = thin(points)
    assert len(kept) <= 1000
    assert {points[54_321], points[54_322]} <= set(kept)
    assert kept == sorted(kept)


def test_the_moving_average_is_centred():
    line = [(step, 3.0 * step) for step in range(300)]
    smooth = moving_average(line)
    assert smooth[150] == (150, pytest.approx(450))
    assert [step for step, _ in smooth] == list(range(300))
    spike = [(step, float(step == 150)) for step in range(300)]
    assert moving_average(spike)[150][1] == pytest.approx(1 / 7)


def test_the_course_of_a_metric():
    assert course([8.0, None, 1.0, 4.5]) == "█▁▅"
    assert course([0.0, 0.0, 7.0, 7.0], width=2) == "▁█"
    assert course([2.0, 2.0]) == "▁▁"
    assert course([None]) == ""


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(59.4, "59 s"), (61, "1 min 1 s"), (3599.6, "1 h 0 min"), (90_000, "1 d 1 h")],
)
def test_durations(seconds, words):
    assert duration(seconds) == words
