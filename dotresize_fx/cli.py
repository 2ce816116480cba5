"""The command line. Exit codes are those of :mod:`dotresize_fx.errors`; 130 is Ctrl-C.

Under torchrun (``torchrun --nproc-per-node N -m dotresize_fx export ... --effort heal``) N processes heal together:
rank 0 does all else and says all, the others leave with code 0 once healing is done.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import os
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TextIO

from dotresize_fx.bench_command import bench_options, run_bench
from dotresize_fx.errors import (
    HUNG_UP,
    INTERRUPTED,
    TERMINATED,
    DotresizeError,
    OutOfMemoryError,
    OutputError,
    RanksError,
    UsageError,
)
from dotresize_fx.export_arguments import chosen_options, export_options
from dotresize_fx.launched import one_is_enough, rank_and_count
from dotresize_fx.process_start import process_start
from dotresize_fx.stop import Stop

if TYPE_CHECKING:
    from dotresize_fx.options import Options

# How a process is ended, by its exit code.
ENDED = {INTERRUPTED: "interrupted", TERMINATED: "terminated", HUNG_UP: "hung up"}
NOTHING_LEFT = "nothing half-written was left behind"
NO_ROOM = "the GPU has no memory left: take a shorter --sequence-length, fewer --calibration-tokens, or --device cpu"


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit: 0, the error's own code, or a signal's. No traceback for a user's mistake."""
    stop = Stop()
    # A process that is not this command's own has run for something else before.
    started = process_start() if arguments is None else time.perf_counter()
    try:
        try:
            options = _parsed(arguments, started)
            options.run(options, stop)
        finally:
            if not _flushed(sys.stderr):
                _silence(sys.stderr)
            sys.stdout.flush()  # here, where what goes wrong with it is still handled
    except SystemExit as error:
        if stop.code is None:  # --help, or a mistake on the command line
            raise
        _end(stop.code, *getattr(error, "__notes__", ()))
    except BrokenPipeError:
        _silence(sys.stdout)  # the reader went away (`| head`), which is no mistake
    except Exception as error:
        if stop.code is not None:  # what a signal broke off has failed: half an import, say
            _end(stop.code)
        if isinstance(error, DotresizeError):
            _fail(str(error), error.exit_code)
        if "torch" in sys.modules and isinstance(error, sys.modules["torch"].OutOfMemoryError):
            _fail(NO_ROOM, OutOfMemoryError.exit_code)
        if not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _silence(sys.stdout)
        where = f" ({error.filename})" if error.filename else ""
        _fail(f"the disk is full{where}: free some space and run again", OutputError.exit_code)
    finally:
        stop.end(restore=arguments is not None)
    raise SystemExit(0)


def _flushed(stream: TextIO) -> bool:
    try:
        stream.flush()
    except OSError:
        return False
    return True


def _silence(stream: TextIO) -> None:
    """What is still buffered goes nowhere, so that the interpreter does not fail on it at exit."""
    with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


def _end(code: int, *notes: str) -> NoReturn:
    """By the signal of this code."""
    if not _flushed(sys.stdout):
        _silence(sys.stdout)
    _fail("; ".join([ENDED[code], NOTHING_LEFT, *notes]), code)


def _fail(message: str, code: int) -> NoReturn:
    """Of several ranks the first one says what all do wrong, and others only what went wrong with them alone."""
    try:
        if rank_and_count()[0] == 0 or code == RanksError.exit_code:
            print(f"dotresize-fx: {' '.join(message.split())}", file=sys.stderr)
    except OSError:  # nobody listens; the exit code still tells
        _silence(sys.stderr)
    raise SystemExit(code)


def _mistake(message: str, command: str) -> NoReturn:
    _fail(f"{message} (see `{command} --help`)", UsageError.exit_code)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        _mistake(message, self.prog)


def _parsed(arguments: Sequence[str] | None, started: float) -> argparse.Namespace:
    """What is not known is told by the command that it was given to."""
    parser = _parser()
    options, unknown = parser.parse_known_args(arguments, argparse.Namespace(started=started))
    if unknown:
        _mistake(f"unrecognized arguments: {' '.join(unknown)}", f"{parser.prog} {options.command}")
    return options


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="dotresize-fx", description="Make a transformer narrower: a smaller, proved ONNX out.")
    parser.add_argument("--version", action="version", version=f"dotresize-fx {version('dotresize-fx')}")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    model = (
        "a Hugging Face folder, a GGUF file, a hub id, a program that torch.export.save wrote (.pt2), "
        "or a built-in name: smollm2-135m, minilm-l6"
    )

    export = commands.add_parser("export", help="slim MODEL and write ONNX, config, tokenizer and report into OUT")
    export.set_defaults(run=_export)
    export.add_argument("model", metavar="MODEL", help=model)
    export.add_argument("out", metavar="OUT", type=Path, help="folder to write; must not exist or be empty")
    export_options(export)
    _common(export)

    inspect = commands.add_parser("inspect", help="show what would be matched, and why the rest would not")
    inspect.set_defaults(run=_inspect)
    inspect.add_argument(
        "model", metavar="MODEL", help=f"{model}; or an ONNX file, or a folder of a model.onnx without config.json"
    )
    _common(inspect)

    evaluate = commands.add_parser("eval", help="perplexity of a model or of an exported OUT on a text")
    evaluate.set_defaults(run=_evaluate)
    evaluate.add_argument("model", metavar="MODEL_OR_OUT", help=f"{model}, or a folder that export wrote")
    evaluate.add_argument("--text", metavar="FILE", type=Path, action="append", required=True)
    evaluate.add_argument("--sequence-length", type=int, default=512, metavar="N", help="(512)")
    evaluate.add_argument("--tokens", type=int, default=None, metavar="N", help="spread over the text (all)")
    _common(evaluate)

    generate = commands.add_parser("generate", help="go on with a prompt, greedily, from an exported decoder")
    generate.set_defaults(run=_generate)
    generate.add_argument("out", metavar="OUT", type=Path, help="a folder that export wrote")
    generate.add_argument(
        "prompt", metavar="PROMPT", help="the text to go on with, or - to read it from standard input"
    )
    generate.add_argument("--max-tokens", type=int, default=128, metavar="N", help="that are written at most (128)")
    generate.add_argument("--threads", type=int, metavar="N", help="of ONNX Runtime (one a physical core)")
    generate.add_argument("--quiet", action="store_true", help="no speed on standard error")

    bench = commands.add_parser("bench", help="time ONNX files side by side, with memory and MACs")
    bench.set_defaults(run=_bench)
    bench_options(bench)
    return parser


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quiet", action="store_true", help="no progress on standard error")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")


def _export(arguments: argparse.Namespace, stop: Stop) -> None:
    options = chosen_options(arguments)
    if arguments.dry_run:
        _dry_run(arguments, options, stop)
        return
    from dotresize_fx.compiler import export
    from dotresize_fx.memory import LARGE_BLOCK, LARGE_BLOCK_IN_BUDGET, give_large_blocks_back
    from dotresize_fx.progress import Progress
    from dotresize_fx.report.terminal_table import terminal_table

    give_large_blocks_back(LARGE_BLOCK if options.memory_budget is None else LARGE_BLOCK_IN_BUDGET)
    report = export(
        arguments.model,
        arguments.out,
        options,
        force=arguments.force,
        trust_remote_code=arguments.trust_remote_code,
        progress=Progress(quiet=arguments.quiet, check=stop.check),
        started=arguments.started,
    )
    print(terminal_table(report))
    print(f"\nwrote {arguments.out} (report.html shows all of it)")


def _dry_run(arguments: argparse.Namespace, options: Options, stop: Stop) -> None:
    from dotresize_fx.export.dry_run import dry_run
    from dotresize_fx.progress import Progress

    progress = Progress(quiet=arguments.quiet, check=stop.check)
    one_is_enough(progress.show)
    found = dry_run(arguments.model, options, trust_remote_code=arguments.trust_remote_code, progress=progress)
    print(found.text)


def _inspect(arguments: argparse.Namespace, stop: Stop) -> None:
    from dotresize_fx.compiler import inspect
    from dotresize_fx.match_table import match_table
    from dotresize_fx.progress import Progress

    progress = Progress(quiet=arguments.quiet, check=stop.check)
    one_is_enough(progress.show)
    matches, reasons = inspect(
        arguments.model,
        trust_remote_code=arguments.trust_remote_code,
        progress=progress,
    )
    print(match_table(matches, reasons))


def _evaluate(arguments: argparse.Namespace, stop: Stop) -> None:
    from dotresize_fx.export.evaluation import evaluate
    from dotresize_fx.progress import Progress

    progress = Progress(quiet=arguments.quiet, check=stop.check)
    one_is_enough(progress.show)
    value, tokens = evaluate(
        arguments.model,
        arguments.text,
        sequence_length=arguments.sequence_length,
        tokens=arguments.tokens,
        trust_remote_code=arguments.trust_remote_code,
        progress=progress,
    )
    print(f"perplexity {value:.4f} over {tokens} tokens")


def _bench(arguments: argparse.Namespace, stop: Stop) -> None:
    from dotresize_fx.export.bench import bench

    run_bench(bench, arguments, stop.check)


def _generate(arguments: argparse.Namespace, stop: Stop) -> None:
    from dotresize_fx.export.generate import Generator, Speed

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # what the terminal's encoding lacks
    if isinstance(sys.stdin, io.TextIOWrapper):
        # Bytes that are no text go on as lone surrogates, as those of arguments do, and are refused there.
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    speed = Speed()
    for piece in Generator(arguments.out, threads=arguments.threads).pieces(prompt, arguments.max_tokens, speed):
        stop.check()
        print(piece, end="", flush=True)
    print()
    if not arguments.quiet:
        print(speed, file=sys.stderr)
