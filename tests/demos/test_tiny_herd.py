"""The quick demo from end to end, killed once on the way, and what a user then does with it."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import wave
from pathlib import Path

import herdkit
import numpy as np
import psutil
import pytest
import torch
from herdkit.data.shards import ShardReader
from herdkit.demos import tiny_herd
from herdkit.demos.chain import Chain, ChainError
from PIL import Image
from rich.console import Console

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "120"}


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "herdkit", *map(str, arguments)]


def call(*arguments: str | Path, text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), input=text, capture_output=True, text=True, timeout=600, env=ENVIRONMENT)


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> Path:
    """The folder of a quick demo that was killed within its fourth stage and started again."""
    out = tmp_path_factory.mktemp("demo") / "herd"
    log = out.parent / "first.log"
    with log.open("w") as file:
        first = subprocess.Popen(
            command("demo", "--quick", "--out", out), stdout=file, stderr=subprocess.STDOUT, env=ENVIRONMENT
        )
        until = time.monotonic() + 500
        while not (out / "stages" / tiny_herd.CHAIN[2].name / "stage.json").exists():
            assert first.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.2)
        children = psutil.Process(first.pid).children(recursive=True)
        assert children
        first.send_signal(signal.SIGKILL)
        first.wait()
        _, left = psutil.wait_procs(children, timeout=20)
        assert not left, "a stage trains on without its demo"
    second = call("demo", "--quick", "--out", out)
    assert second.returncode == 0, second.stderr
    assert second.stderr.count("finished before") in (3, 4)
    (out.parent / "second.json").write_text(second.stdout)
    return out


def test_every_exam_is_graded_beside_chance_and_beside_the_same_without_input(demo):
    results = json.loads((demo / "results.json").read_text())
    assert [exam["set"] for exam in results["exams"]] == [exam.set for exam in tiny_herd.EXAMS]
    for exam, graded in zip(tiny_herd.EXAMS, results["exams"], strict=True):
        assert graded["count"] == tiny_herd.QUICK_SIZES.held_out
        assert set(graded["without"]) == {"+".join(kinds) for kinds in exam.without}
        if exam.transcripts:
            assert graded["word_error_rate"] > 0
        else:
            assert 0 <= graded["accuracy"] <= 1
            assert 0 < graded["chance"] < 1


def test_the_language_model_is_untouched_by_all_that_was_grafted_onto_it(demo):
    assert json.loads((demo / "results.json").read_text())["text_unchanged"] == {
        "checkpoint_bytes": True,
        "logits_bits": True,
    }
    before, after = (herdkit.load(path) for path in (demo / "stages" / "text-sft" / "model", demo / "model"))
    assert list(after.adapters) == ["image", "video", "speech"]
    tokens = torch.randint(before.text.config.vocab_size, (3, 50))
    with torch.inference_mode():
        assert torch.equal(before(tokens), after(tokens))


def test_a_second_run_reuses_everything(demo):
    started = time.monotonic()
    again = call("demo", "--quick", "--out", demo)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("finished before") == len(tiny_herd.CHAIN)
    assert time.monotonic() - started < 90
    first, second = (json.loads(text) for text in ((demo.parent / "second.json").read_text(), again.stdout))
    assert first["exams"] == second["exams"]


def test_another_seed_in_the_same_place_is_refused(demo):
    other = call("demo", "--quick", "--seed", "1", "--out", demo)
    assert other.returncode == 1
    assert re.fullmatch(r"herdkit: .*holds a demo with .*'seed': 0.*--out.*\n", other.stderr)


def test_the_report_stands_alone(demo):
    page = (demo / "report.html").read_text()
    assert page.count("data:image/png;base64,") > 20
    assert "http" not in page.replace("http-equiv", "")
    assert "<script" not in page
    for exam in tiny_herd.EXAMS:
        assert exam.title in page
        assert exam.title.capitalize() in page


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> Path:
    """Files as users have them: sizes and modes that no training picture has, a stereo recording, a clip."""
    folder = tmp_path_factory.mktemp("files")
    pixels = np.random.default_rng(0).integers(0, 255, (331, 517, 4), dtype=np.uint8)
    Image.fromarray(pixels, "RGBA").save(folder / "alpha.png")
    rotated = Image.Exif()
    rotated[0x0112] = 6
    Image.fromarray(pixels[..., :3]).save(folder / "rotated.jpg", exif=rotated)
    with wave.open(str(folder / "stereo.wav"), "wb") as file:
        file.setparams((2, 2, 44_100, 0, "NONE", ""))
        file.writeframes(np.random.default_rng(0).integers(-9000, 9000, 60_000, dtype=np.int16).tobytes())
    (folder / "empty.jpg").touch()
    (folder / "text.mp4").write_text("no film")
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., :3]).save(buffer, "PNG")
    (folder / "cut.png").write_bytes(buffer.getvalue()[:5000])
    return folder


def test_chat_takes_any_number_of_files_of_every_sense(demo, files):
    sample = ShardReader(str(demo / "data" / "video_questions_new" / "*.tar"))[0]
    container, data = next(entry for entry in sample.members.items() if entry[0] in ("mp4", "webm"))
    film = files / f"clip.{container}"
    film.write_bytes(data)
    media = ["--image", files / "alpha.png", "--image", files / "rotated.jpg", "--video", film]
    said = call("chat", demo / "model", *media, "--audio", files / "stereo.wav", "--max-new-tokens", "5")
    assert said.returncode == 0, said.stderr
    assert said.stderr == ""
    several = call("chat", demo / "model", "--image", files / "alpha.png", text="what is it\n\nhello\n")
    assert several.returncode == 0
    assert len(several.stdout.splitlines()) >= 2


@pytest.mark.parametrize(
    ("option", "name"),
    [
        ("--image", "missing.jpg"),
        ("--image", "empty.jpg"),
        ("--image", "cut.png"),
        ("--image", "stereo.wav"),
        ("--video", "text.mp4"),
        ("--video", "missing.mp4"),
        ("--audio", "alpha.png"),
        ("--audio", "empty.jpg"),
    ],
)
def test_bad_files_get_one_line_that_names_them(demo, files, option, name):
    said = call("chat", demo / "model", option, files / name, "--prompt", "what is it")
    assert said.returncode == 1
    assert said.stdout == ""
    (line,) = said.stderr.splitlines()
    assert line.startswith("herdkit: ")
    assert name in line


@pytest.mark.parametrize("name", ["image", "video", "speech"])
def test_demo_scripts_run_on_a_held_out_file(demo, tmp_path, name):
    sets = {
        "image": "image_questions_new",
        "video": "video_questions_new",
        "speech": "spoken_questions_heldout_voice",
    }
    sample = ShardReader(str(demo / "data" / sets[name] / "*.tar"))[0]
    suffix, data = next((k, v) for k, v in sample.members.items() if k in ("png", "mp4", "webm", "flac"))
    file = tmp_path / f"file.{suffix}"
    file.write_bytes(data)
    question = [] if name == "speech" else ["what is it"]
    said = subprocess.run(
        [sys.executable, "-m", f"herdkit.demos.{name}", str(demo / "model"), str(file), *question],
        capture_output=True,
        text=True,
        timeout=120,
        env=ENVIRONMENT,
    )
    assert said.returncode == 0, said.stderr


class Ended:
    """A process that ended as soon as it was started."""

    def __init__(self, exitcode=0):
        self.exitcode = exitcode
        self.sentinel, other_end = os.pipe()
        os.close(other_end)  # so that it is ready to be read

    def is_alive(self):
        return False

    def join(self):
        pass

    def __del__(self):
        os.close(self.sentinel)


def test_a_stage_is_trained_anew_when_it_or_what_it_builds_on_is_planned_otherwise(tmp_path, monkeypatch):
    ran = []

    def launch(self, stage, recipe, run_dir, threads):
        ran.append(run_dir.name)
        (run_dir / "weights").touch()
        return Ended()

    monkeypatch.setattr(Chain, "launch", launch)
    links = [link for link in tiny_herd.CHAIN if link.name in ("text-pretrain", "text-sft", "speech-bestrq")]

    def train(quick):
        ran.clear()

        def recipe(link):
            return tiny_herd.tiny_recipe(link, tmp_path, 0, quick and link.name == "text-pretrain")

        console = Console(file=io.StringIO())
        Chain(links, tmp_path / "stages", recipe, console, lambda: tiny_herd.discard_end(tmp_path)).train()
        return list(ran)

    assert train(quick=False) == ["text-pretrain", "text-sft", "speech-bestrq"]
    assert train(quick=False) == []
    (tmp_path / "model").mkdir()
    assert train(quick=True) == ["text-pretrain", "text-sft"]
    assert not (tmp_path / "model").exists()
    assert train(quick=True) == []
    (tmp_path / "stages" / "text-sft" / "stage.json").unlink()  # as if it had been killed
    (tmp_path / "stages" / "text-sft" / "checkpoint").touch()
    assert train(quick=True) == ["text-sft"]
    assert (tmp_path / "stages" / "text-sft" / "checkpoint").exists()


def test_what_is_ready_runs_side_by_side_after_what_it_reads_and_alone_where_it_should(tmp_path, monkeypatch):
    running, together = set(), []

    class Slow(Ended):
        def __init__(self, name):
            super().__init__()
            self.name, self.asked = name, 0
            running.add(name)
            together.append(frozenset(running))

        def is_alive(self):
            self.asked += 1
            return self.asked < 2

        def join(self):
            running.discard(self.name)

    monkeypatch.setattr(Chain, "launch", lambda self, stage, recipe, run_dir, threads: Slow(run_dir.name))
    monkeypatch.setattr("herdkit.demos.chain.wait", lambda sentinels, timeout: None)

    def recipe(link):
        return tiny_herd.tiny_recipe(link, tmp_path, 0, False)

    chain = Chain(tiny_herd.CHAIN, tmp_path / "stages", recipe, Console(file=io.StringIO()), lambda: None)
    chain.train()
    assert set(chain.seconds) == {link.name for link in tiny_herd.CHAIN}
    assert max(map(len, together)) == 2
    assert {next(iter(names)) for names in together if len(names) == 1} >= {"text-pretrain", "text-sft", "together"}
    assert not any(names & {"text-pretrain", "text-sft", "together"} for names in together if len(names) > 1)
    assert {"image-pretrain", "speech-transcription"} in together


def test_a_stage_that_fails_stops_the_others(tmp_path, monkeypatch):
    class Endless(Ended):
        stopped = False

        def is_alive(self):
            return True

        def terminate(self):
            self.stopped = True

    endless = Endless()

    def launch(self, stage, recipe, run_dir, threads):
        (run_dir / "log.txt").write_text("one\nout of luck\n")
        return {"vision-contrastive": endless, "speech-bestrq": Ended(1)}.get(run_dir.name) or Ended()

    monkeypatch.setattr(Chain, "launch", launch)
    chain = Chain(
        tiny_herd.CHAIN,
        tmp_path / "stages",
        lambda link: tiny_herd.tiny_recipe(link, tmp_path, 0, False),
        Console(file=io.StringIO()),
        lambda: None,
    )
    with pytest.raises(ChainError, match=r"BEST-RQ failed: out of luck .*log\.txt"):
        chain.train()
    assert endless.stopped
    assert sorted(chain.seconds) == ["text-pretrain", "text-sft"]


def test_a_stage_that_fails_in_its_process_is_named_with_its_log(tmp_path):
    def recipe(link):
        made = tiny_herd.tiny_recipe(link, tmp_path, 0, True)
        made.data.sources = []
        return made

    links = [link for link in tiny_herd.CHAIN if link.name == "speech-bestrq"]
    with pytest.raises(ChainError, match=r"BEST-RQ failed: .*sources.*log\.txt"):
        Chain(links, tmp_path / "stages", recipe, Console(file=io.StringIO()), lambda: None).train()
    assert not (tmp_path / "stages" / "speech-bestrq" / "stage.json").exists()


def test_links_in_the_wrong_order_are_refused(tmp_path):
    first, second = (link for link in tiny_herd.CHAIN if link.name in ("text-pretrain", "text-sft"))

    def recipe(link):
        return tiny_herd.tiny_recipe(link, tmp_path, 0, True)

    with pytest.raises(ValueError, match="no link can start of text-sft, text-pretrain"):
        Chain([second, first], tmp_path / "stages", recipe, Console(file=io.StringIO()), lambda: None).train()
