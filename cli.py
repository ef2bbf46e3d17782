"""The `herdkit` command: thin, one sub-command a function."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .adapters.commands import add_show_command
from .adapters.evaluate_command import add_evaluate_command
from .data.command_line import add_command
from .data.commands import add_shards_commands
from .data.synthetic_command import add_synthetic_command
from .speech.commands import add_transcribe_command

if TYPE_CHECKING:
    from .train.plan import Cluster, Hardware


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, 1 for what went wrong, 2 for wrong usage, 130 when interrupted."""
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse takes all positional arguments before the first option; overrides may come after it too.
    if rest and (not hasattr(options, "overrides") or any(text.startswith("-") for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    try:
        options.run(options)
    except KeyboardInterrupt:
        print(f"herdkit: interrupted; {options.interrupted}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except (ValueError, OSError, LookupError, ModuleNotFoundError, RuntimeError) as error:
        if os.environ.get("HERDKIT_TRACEBACK"):
            raise
        of_rank = f"rank {os.environ.get('RANK')}: " if os.environ.get("WORLD_SIZE", "1") != "1" else ""
        print(f"herdkit: {of_rank}{' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 1
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="herdkit", description="Compositional multimodal models: train, compose, chat.",
        epilog="Set HERDKIT_TRACEBACK=1 to see where an error comes from.",
    )  # fmt: skip
    parser.set_defaults(interrupted="the same command goes on from the last finished point")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run, help: str, example: str) -> argparse.ArgumentParser:
        return add_command(commands, name, run, help, [example])

    demo_parser = command(
        "demo", demo, "Train the tiny herd from random weights on made data and ask it.", "herdkit demo --quick"
    )
    demo_parser.add_argument("--out", type=Path, default=Path("runs/tiny-herd"), help="folder (%(default)s)")
    demo_parser.add_argument("--seed", type=int, default=0, help="of data, weights and order (%(default)s)")
    demo_parser.add_argument("--quick", action="store_true", help="a tenth of the work: every link, poor answers")

    train_parser = command(
        "train",
        train,
        "Train one stage by its recipe; the same command resumes it.",
        "herdkit train recipe.yaml --run-dir runs/sft optimizer.lr=1e-3",
    )
    train_parser.add_argument("recipe", type=Path)
    train_parser.add_argument("--run-dir", type=Path, required=True, help="holds everything about the run")
    train_parser.add_argument("overrides", nargs="*", metavar="key=value", help="replace values of the recipe")

    probe_parser = command(
        "probe",
        probe,
        "Say what a new data set is worth, by annealing a model with it and without it.",
        "herdkit probe text/recipes/tiny_anneal.yaml --new 'data/new/*.tar' --run-dir runs/probe",
    )
    probe_parser.add_argument("recipe", type=Path, help="of an annealing, with what is held out")
    probe_parser.add_argument("--new", required=True, metavar="SHARDS", help="the new data")
    probe_parser.add_argument("--share", type=float, default=0.3, help="of the new data (%(default)s)")
    probe_parser.add_argument("--run-dir", type=Path, required=True, help="holds both runs; the same one resumes them")
    probe_parser.add_argument("overrides", nargs="*", metavar="key=value", help="replace values of the recipe")

    plan_parser = command(
        "plan",
        plan,
        "Say what a recipe costs before it is run: updates, tokens, operations, memory, days. With --hardware, speed "
        "is predicted for a layout, or, where neither --parallel nor the recipe has one, for the fastest that fit.",
        "herdkit plan text/recipes/pretrain_405b.yaml --devices 16384 --hardware h100",
    )
    plan_parser.add_argument("recipe", type=Path)
    plan_parser.add_argument("--model", metavar="PRESET", help="sizes of the model that the stage goes on with")
    plan_parser.add_argument("--devices", type=int, default=1, help="(%(default)s)")
    predicted = plan_parser.add_argument_group("predicted speed").add_argument
    predicted("--hardware", metavar="NAME", help="h100, h200, a100 or h100-500w; with --parallel alone h100")
    predicted(
        "--parallel",
        metavar="LAYOUT",
        help="'tensor=8 shard=null ...', or a YAML file with a block 'parallel' (the recipe's)",
    )
    assumed = plan_parser.add_argument_group("assumed speed").add_argument
    assumed("--data-parallel", type=int, help="groups of devices with rows of their own (all)")
    assumed("--peak-tflops", type=float, help="of a device, dense (989: H100, bfloat16)")
    assumed("--mfu", type=float, help="share of the peak that is reached (0.4)")
    plan_parser.add_argument("overrides", nargs="*", metavar="key=value", help="replace values of the recipe")

    watch_parser = command(
        "watch",
        watch,
        "Show runs while they train, or afterwards, from their files alone. Ends when all are finished.",
        "herdkit watch runs/sft",
    )
    watch_parser.set_defaults(interrupted="the runs go on")
    watch_parser.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR", help="a run, or a folder of runs")
    watch_parser.add_argument("--once", action="store_true", help="show them as they are, and end")
    watch_parser.add_argument("--html", type=Path, metavar="FILE", help="write one page on all of them instead")
    watch_parser.add_argument("--every", type=float, default=3.0, help="seconds between looks (%(default)s)")

    profile_parser = command(
        "profile",
        profile,
        "Trace the next updates of a run that is training, and show what took their time.",
        "herdkit profile runs/sft",
    )
    profile_parser.set_defaults(interrupted="the run goes on; a request that it has not taken is withdrawn")
    profile_parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="of the run")
    profile_parser.add_argument("--updates", type=int, default=3, metavar="N", help="to trace (%(default)s)")
    profile_parser.add_argument("--ranks", type=int, nargs="+", metavar="RANK", help="of the processes to trace (all)")

    scaling_parser = command(
        "scaling-laws",
        scaling_laws,
        "Sweep model sizes at equal compute and fit what is optimal; the same command goes on with the sweep.",
        "herdkit scaling-laws text/recipes/tiny_scaling_laws.yaml --run-dir runs/laws targets=[1e15]",
    )
    scaling_parser.add_argument("recipe", type=Path)
    scaling_parser.add_argument("--run-dir", type=Path, required=True, help="holds a run directory for each size")
    scaling_parser.add_argument("overrides", nargs="*", metavar="key=value", help="replace values of the recipe")

    chat_parser = command(
        "chat",
        chat,
        "Talk to a model about your own files. Without --prompt or --audio it reads lines from standard input; a line "
        "'/audio FILE' is a spoken turn.",
        'herdkit chat runs/tiny-herd/model --image photo.jpg --prompt "what colour is the circle?"',
    )
    chat_parser.add_argument("model", type=Path, help="model directory")
    for kind in ("image", "video", "audio"):
        chat_parser.add_argument(f"--{kind}", action="append", default=[], metavar="FILE", help="may be repeated")
    chat_parser.add_argument("--prompt", help="one question; the answer is printed and the program ends")
    chat_parser.add_argument("--cascade", action="store_true", help="write speech down first, and answer the words")
    chat_parser.add_argument("--language", default="English", help="that --cascade writes down (%(default)s)")
    chat_parser.add_argument("--system", help="system prompt")
    add_sampling(chat_parser, max_new_tokens=128, seed=None)

    generate_parser = command(
        "generate",
        generate,
        "Continue every prompt of a file; the same command goes on where it was stopped.",
        "herdkit generate runs/tiny-herd/model prompts.jsonl --out answers.jsonl --samples 4 --temperature 0.7",
    )
    generate_parser.add_argument("model", type=Path, help="model directory")
    generate_parser.add_argument(
        "prompts", type=Path, help='.jsonl with "prompt" or "messages" (and "id", "seed") in a line, or a text a line'
    )
    generate_parser.add_argument("--out", type=Path, required=True, help=".jsonl to write, in the order of the prompts")
    generate_parser.add_argument("--samples", type=int, default=1, help="completions of each prompt (%(default)s)")
    generate_parser.add_argument("--batch-size", type=int, default=16, help="prompts that run together (%(default)s)")
    generate_parser.add_argument("--compile", action="store_true", help="compile the step first, which takes a minute")
    generate_parser.add_argument("--draft", type=Path, help="smaller model of the same vocabulary, which speeds it up")
    generate_parser.add_argument("--draft-tokens", type=int, default=4, help="it proposes at a time (%(default)s)")
    add_sampling(generate_parser, max_new_tokens=256, seed=0)

    convert_parser = command(
        "convert",
        convert,
        "Write a language model in another layout. It is loaded from any: ours, Hugging Face's, Meta's.",
        "herdkit convert runs/sft/model llama-hf --layout huggingface",
    )
    convert_parser.add_argument("source", type=Path, help="model directory")
    convert_parser.add_argument("target", type=Path, help="new directory")
    convert_parser.add_argument("--layout", choices=("herdkit", "huggingface", "meta"), required=True)
    dtypes = ("float32", "bfloat16", "float16")
    convert_parser.add_argument("--dtype", choices=dtypes, help="of the weights (that of the files)")
    convert_parser.add_argument("--max-shard-bytes", type=int, default=5_000_000_000, help="huggingface (%(default)s)")
    convert_parser.add_argument("--model-parallel", type=int, default=1, help="meta: number of files (%(default)s)")
    add_evaluate_command(commands)
    add_transcribe_command(commands)
    add_show_command(add_shards_commands(commands))
    add_synthetic_command(commands)
    return parser


def add_sampling(parser: argparse.ArgumentParser, max_new_tokens: int, seed: int | None) -> None:
    add = parser.add_argument_group("generation").add_argument
    add("--max-new-tokens", type=int, default=max_new_tokens, help="(%(default)s)")
    add("--temperature", type=float, default=0.0, help="0 is greedy (%(default)s)")
    add("--top-k", type=int, metavar="K", help="only the K most probable tokens")
    add("--top-p", type=float, default=1.0, help="only the most probable tokens of this share (%(default)s)")
    add("--min-p", type=float, default=0.0, help="only tokens with this part of the best one's probability")
    add("--stop", dest="stop_strings", action="append", default=[], metavar="TEXT", help="ends it; may be repeated")
    add("--seed", type=int, default=seed, help="of sampling")
    add("--int8", action="store_true", help='weights of 8 bits (the extra "quantisation")')


def sampling(options: argparse.Namespace) -> dict:
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "stop_strings")
    return {name: getattr(options, name) for name in names}


def demo(options: argparse.Namespace) -> None:
    from .demos import report, tiny_herd

    results = tiny_herd.run(options.out, seed=options.seed, quick=options.quick)
    talk = report.conversation(Path(results["out"]))
    page = report.write(Path(results["out"]), talk)
    report.print_summary(results, page, talk)
    print(json.dumps({**results, "report": str(page)}))


def train(options: argparse.Namespace) -> None:
    from .train.config import load_recipe
    from .train.layout import lay_out
    from .train.parallel import process_group, rank, world_size
    from .train.recipe import find_stage, read_stage_name

    stage = find_stage(read_stage_name(options.recipe))
    recipe = load_recipe(options.recipe, stage.recipe, options.overrides)
    with process_group():
        lay_out(recipe.parallel, world_size())  # before anything large is made or read
        result = stage.run(recipe, options.run_dir)
        if rank() == 0:
            print(json.dumps(result))


def probe(options: argparse.Namespace) -> None:
    from .data.sources import SourceConfig
    from .text.anneal import AnnealRecipe, probe
    from .train.config import load_recipe
    from .train.parallel import process_group, rank

    recipe = load_recipe(options.recipe, AnnealRecipe, options.overrides)
    with process_group():
        result = probe(recipe, SourceConfig(shards=options.new), options.run_dir, options.share)
        if rank() == 0:
            for name, found in result["gains"].items():
                print(
                    f"{name}: loss {found['without']:.4f} without, gain {found['gain']:.4f} ± {found['interval']:.4f} "
                    f"nats per token over {found['documents']} documents"
                )
            print(json.dumps(result))


def plan(options: argparse.Namespace) -> None:
    from .train.config import load_recipe
    from .train.plan import as_text
    from .train.recipe import find_stage, read_stage_name

    name = read_stage_name(options.recipe)
    stage = find_stage(name)
    if stage.plan is None:
        raise ValueError(f"{options.recipe}: nobody has said yet what the stage {name!r} costs")
    recipe = load_recipe(options.recipe, stage.recipe, options.overrides)
    hardware = planned_hardware(options)
    made = stage.plan(recipe, hardware, options.model)
    print(as_text(made, hardware))
    print(json.dumps(made))


def planned_hardware(options: argparse.Namespace) -> Hardware | Cluster:
    from .train.layout import read_parallel
    from .train.plan import Cluster, Hardware

    assumed = {"data_parallel": options.data_parallel, "peak_tflops": options.peak_tflops, "mfu": options.mfu}
    given = {name: value for name, value in assumed.items() if value is not None}
    if options.hardware is None and options.parallel is None:
        if "peak_tflops" in given:
            given["peak_flops"] = 1e12 * given.pop("peak_tflops")
        return Hardware(devices=options.devices, **given)
    if given:
        said = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(f"{said}: with --hardware or --parallel this is predicted; leave it out")
    parallel = None if options.parallel is None else read_parallel(options.parallel)
    return Cluster(devices=options.devices, name=options.hardware or "h100", parallel=parallel)


def watch(options: argparse.Namespace) -> None:
    if not options.every > 0:
        raise ValueError(f"--every must be above 0, not {options.every}")
    from .train.watch import read_runs, watch

    if options.html is None:
        watch(options.runs, once=options.once, every=options.every)
        return
    from .train.run_report import write_report

    write_report(read_runs(options.runs), options.html)
    print(json.dumps({"report": str(options.html)}))


def profile(options: argparse.Namespace) -> None:
    from .train.profile_request import ProfileRequest, ask
    from .train.profiles import traces_of

    request = ProfileRequest(updates=options.updates, ranks=options.ranks)
    table = ask(options.run_dir, request, say=lambda text: print(text, file=sys.stderr))
    print(table.read_text(encoding="utf-8"))
    print(json.dumps({"table": str(table), "traces": [str(path) for path in traces_of(table)]}))


def convert(options: argparse.Namespace) -> None:
    import torch

    from .adapters.model_directory import load, save

    if options.target.exists():
        raise FileExistsError(f"{options.target} exists; choose another path")
    model = load(options.source, dtype=getattr(torch, options.dtype) if options.dtype else None)
    settings = {name: getattr(options, name) for name in ("layout", "max_shard_bytes", "model_parallel")}
    print(json.dumps({"model": str(save(model, options.target, **settings)), "layout": options.layout}))


def scaling_laws(options: argparse.Namespace) -> None:
    from .text.scaling_laws import ScalingLawRecipe, run
    from .train.config import load_recipe
    from .train.parallel import process_group, rank

    recipe = load_recipe(options.recipe, ScalingLawRecipe, options.overrides)
    with process_group():
        result = run(recipe, options.run_dir)
        if rank() == 0:
            print(json.dumps({key: result[key] for key in ("curves", "diverged", "law", "predictions", "forecast")}))


def generate(options: argparse.Namespace) -> None:
    from .text.generate_file import generate_file
    from .text.model_directory import load_text
    from .text.sampling import SamplingOptions
    from .text.speculative import Speculation

    settings = SamplingOptions(**sampling(options))
    model, tokenizer = load_text(options.model)
    speculation = None
    if options.draft is not None:
        speculation = Speculation(draft=load_text(options.draft)[0], length=options.draft_tokens)
    if options.int8:
        from .text.quantisation import quantise

        quantise(model)
    step = None
    if options.compile:
        from .text.compiled import compile_step

        step = compile_step(model, freeze=model.output_weight.device.type == "cpu")
    result = generate_file(
        model,
        tokenizer,
        options.prompts,
        options.out,
        settings,
        samples=options.samples,
        seed=options.seed,
        batch_size=options.batch_size,
        step=step,
        speculation=speculation,
        settings={"model": str(options.model.resolve()), "draft": str(options.draft), "int8": options.int8},
    )
    print(json.dumps(result))


def chat(options: argparse.Namespace) -> None:
    from .adapters.model_directory import load
    from .text.generate import KeptPrompt

    model = load(options.model)
    if options.int8:
        from .adapters.quantisation import quantise

        quantise(model)
    cascade = None
    if options.cascade:
        from .speech.cascade import Cascade
        from .speech.transcribe import TranscriptionConfig

        cascade = Cascade(model, TranscriptionConfig(language=options.language))
    settings = {**sampling(options), "seed": options.seed, "kept": KeptPrompt()}
    messages: list[Any] = [{"role": "system", "content": options.system}] if options.system else []
    media = [{"type": kind, kind: file} for kind in ("image", "video", "audio") for file in getattr(options, kind)]

    def turn(text: str) -> None:
        messages.append({"role": "user", "content": [*media, *([{"type": "text", "text": text}] if text else [])]})
        media.clear()
        if cascade is not None:
            messages[:] = cascade.written(messages)
            print(f"heard: {messages[-1].text}", file=sys.stderr)
        answer = ""
        for piece in model.stream_chat(messages, **settings):
            answer += piece
            print(piece, end="", flush=True)
        print()
        messages.append({"role": "assistant", "content": answer})

    if options.prompt is not None or options.audio:
        turn(options.prompt or "")
        return
    interactive = sys.stdin.isatty()
    while True:
        if interactive:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.startswith("/audio "):
            media.append({"type": "audio", "audio": line.removeprefix("/audio ").strip()})
            turn("")
        elif line.strip():
            turn(line.strip())
