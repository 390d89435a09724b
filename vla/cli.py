"""`concord VERB`: one function a verb, the same ones that the files in scripts/ call.

Each reads its flags before it imports what it needs, so help and mistakes are answered at once, and returns the JSON file that holds
its result, or None. With `--json` among the flags, standard output is that result and
nothing else; what people read goes to standard error.
"""

import io
import json
import os
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from safetensors import SafetensorError

from vla.config_io import HelpRequested, load_config, parse_flags, split_flags
from vla.files import is_disk_full
from vla.types import UserError

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def collect(argv: list[str]) -> Path | None:
    """Collect demonstrations with the scripted expert."""
    from vla.config import CollectConfig

    config = load_config(CollectConfig, argv)
    from vla.integrations.collect import collect as run

    return run(config) / "meta" / "info.json"


def align(argv: list[str]) -> Path | None:
    """Stage one: align the encoders on vision-language-action triplets."""
    from vla.config import AlignConfig

    config = load_config(AlignConfig, argv)
    from vla.training.align import train_align as run
    from vla.training.processes import leave_group
    from vla.training.unused import refuse_unused

    if not config.resume:  # a run that an older version began goes on as it is
        refuse_unused(config, given(argv))
    folder = run(config)
    leave_group()
    return folder.parent / "alignment.json"


def policy(argv: list[str]) -> Path | None:
    """Stage two: train the action head by behaviour cloning."""
    from vla.config import PolicyTrainConfig

    config = load_config(PolicyTrainConfig, argv)
    from vla.training.policy import train_policy as run
    from vla.training.processes import leave_group
    from vla.training.unused import refuse_unused

    if not config.resume:
        refuse_unused(config, given(argv))
    folder = run(config)
    leave_group()
    return folder / "concord.json"


def evaluate(argv: list[str]) -> Path | None:
    """Evaluate a policy in closed loop."""
    from vla.config import EvalConfig

    config = load_config(EvalConfig, argv)
    if config.workers > 1:
        from vla.workers import worker_context

        worker_context()  # imports in the background, while this process does, too
    from vla.eval.evaluate import evaluate as run

    return run(config) / "eval.json"


def compare(argv: list[str]) -> Path | None:
    """The matched comparison of arms, encoders and policies."""
    from vla.config import CompareConfig

    config = load_config(CompareConfig, argv)
    from vla.comparison.compare import compare as run

    report = run(config)
    return report.parent / "comparison.json" if report else None


def sweep(argv: list[str]) -> Path | None:
    """All stages once for every value of a field."""
    from vla.config import SweepConfig

    swept, rest = split_flags(argv)
    config = load_config(SweepConfig, rest)
    from vla.comparison.sweep import sweep as run

    folder = run(config, swept)
    return folder and folder / "sweep.json"


def doctor(argv: list[str]) -> Path | None:
    """Check the machine, a data set and checkpoints."""
    from vla.config import DoctorConfig

    config = load_config(DoctorConfig, argv)
    from vla.doctor import doctor as run

    run(config)
    return None


def bench(argv: list[str]) -> Path | None:
    """Measure throughput beside the peers, in one run."""
    from vla.config import BenchConfig

    config = load_config(BenchConfig, argv)
    from vla.bench import bench as run

    return run(config)


def pipeline(argv: list[str]) -> Path | None:
    """The four stages one after the other."""
    from vla.config import PipelineConfig

    config = load_config(PipelineConfig, argv)
    from vla.pipeline import pipeline as run

    return run(config).parent / "eval.json"


def results(argv: list[str]) -> Path | None:
    """Write the tables of the documentation from result files."""
    from vla.config import ResultsConfig

    config = load_config(ResultsConfig, argv)
    from vla.comparison.page import comparison_page
    from vla.eval.results import results as run

    pages = run(config), comparison_page(config)
    if not any(pages):
        raise UserError(
            f"{config.runs}: no eval/**/eval.json, compare/*/comparison.json or sweep/*/sweep.json; run `make tabletop` first"
        )
    return None


VERBS: dict[str, Callable[[list[str]], Path | None]] = {
    function.__name__: function
    for function in (collect, align, policy, evaluate, compare, sweep, doctor, bench, pipeline, results)
}


def run(verb: str, argv: list[str] | None = None) -> int:
    """Run a verb and turn what users can mend into one line and exit status 2."""
    argv = sys.argv[1:] if argv is None else argv
    as_json, first = "--json" in argv, os.environ.get("RANK", "0") == "0"
    again = "run the same command again (training: with --resume=true; pipeline: without --fresh)"
    argv = [argument for argument in argv if argument != "--json"]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a log file has each line as soon as it is printed
    try:
        with stdout_to_stderr() if as_json else nullcontext():
            result = VERBS[verb](argv)
        if as_json and first:
            print(json.dumps(result_of(result)))
    except HelpRequested as request:
        show(str(request))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except BrokenPipeError:
        if not silence_unread_output():
            raise
        return 141  # as a program that the signal ends
    except (OSError, SafetensorError) as error:
        if not is_disk_full(error):
            raise
        where = getattr(error, "filename", None) or "output"
        print(f"{where}: disk full; free some space and {again}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\ninterrupted; {again} to go on", file=sys.stderr)
        return 130
    return 0


def given(argv: list[str]) -> list[str]:
    """The fields that flags set; a file may hold a whole configuration."""
    return [name for name, _ in parse_flags(argv) if name != "config_path"]


def show(text: str) -> None:
    """Print as much as the reader wants, who may be `head`."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        silence_unread_output()


def silence_unread_output() -> bool:
    """Send what is still printed nowhere if standard output is a pipe that nobody reads any more; returns whether it is."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    gone = any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more at its end
    return gone


def result_of(path: Path | None) -> dict:
    """The result in a file, and its path; an evaluation's episodes stay in the file."""
    if path is None:
        return {}
    return {"file": str(path)} | {
        key: value for key, value in json.loads(path.read_text()).items() if key != "episodes"
    }


@contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Send standard output to standard error, also that of libraries in C and of processes started meanwhile."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(saved, 1)
        os.close(saved)


def main() -> int:
    """Entry point of the `concord` command."""
    argv = sys.argv[1:]
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: concord VERB [--config_path FILE] [--field=value ...] [--json]\n")
        for verb, function in VERBS.items():
            print(f"  {verb:10} {function.__doc__}")
        return 0
    if argv[0] not in VERBS:
        print(f"concord: {argv[0]!r} is not a verb; known: {', '.join(VERBS)}", file=sys.stderr)
        return 2
    return run(argv[0], argv[1:])


if __name__ == "__main__":
    sys.exit(main())
