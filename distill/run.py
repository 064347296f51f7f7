"""The stages in order: `deepspeed distill/run.py --config configs/demo.yaml`, or `python -m distill.run` for one rank.

Every rank runs this file. It validates the whole config before any work, then runs prompts, traces, train, eval and
publish; a stage that is finished is skipped, one that was interrupted goes on.
"""

import argparse
import os
import sys
import time
from pathlib import Path

# `deepspeed distill/run.py` puts this folder first on the path, where store.py or plan.py would shadow other packages.
_here, _root = str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(_here)]
if _root not in sys.path:
    sys.path.insert(0, _root)

from distill.dist import add_launcher_arguments  # noqa: E402
from distill.errors import ConfigError, DistillError  # noqa: E402
from distill.preemption import sigterm_ends  # noqa: E402

STAGES = ("prompts", "traces", "train", "eval", "publish")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; heavy imports wait until it is known to be right."""
    parser = argparse.ArgumentParser(
        prog="distill/run.py", description="Distil a reasoning teacher into dense students and measure what they kept."
    )
    parser.add_argument("--config", metavar="FILE", help="a YAML file, see configs/README.md")
    parser.add_argument("--set", metavar="A.B=C", action="append", default=[], help="change one setting; repeatable")
    parser.add_argument("--stages", metavar="A,B", help=f"run only these, in order (default: {','.join(STAGES)})")
    parser.add_argument("--restart", metavar="STAGE", choices=STAGES, help="delete this stage and all later ones first")
    parser.add_argument("--plan", action="store_true", help="print memory, time and cost of every stage; start nothing")
    parser.add_argument("--gpus", type=int, metavar="N", help="with --plan: plan for N GPUs")
    parser.add_argument("--gpu", metavar="KIND", help="with --plan: h100, h200, a100, l40s or b200")
    parser.add_argument("--json", action="store_true", help="with --plan: print JSON")
    parser.add_argument("--help-config", action="store_true", help="print every setting with unit, default and bounds")
    add_launcher_arguments(parser)
    args = parser.parse_args(argv)
    if not args.config and not args.help_config:
        parser.error("--config FILE is needed; configs/demo.yaml is a good start")
    if not args.plan and (args.gpus or args.gpu or args.json):
        parser.error("--gpus, --gpu and --json belong to --plan; a run takes its devices from the launcher")
    args.stages = args.stages.split(",") if args.stages else list(STAGES)
    if unknown := [s for s in args.stages if s not in STAGES]:
        parser.error(f"unknown stage {unknown[0]!r} in --stages; stages are {', '.join(STAGES)}")
    args.stages.sort(key=STAGES.index)
    return args


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0 done, or told to stop by SIGTERM; 2 something a person must change; 130 interrupted."""
    args = parse(argv)
    try:
        return dispatch(args)
    except DistillError as error:
        tell(error, started="distill.pipeline" in sys.modules)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nstopped; run the same command again to go on", file=sys.stderr)
        return 130


def tell(error: DistillError, *, started: bool) -> None:
    """Print it once a node where all ranks have it. What another rank alone found once they started, it tells itself:
    the others only learn that it is gone."""
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0 or os.environ.get("LOCAL_RANK") == "0":
        print(f"\nerror: {error}", file=sys.stderr, flush=True)
    elif started and error.own:
        print(f"\nerror on rank {rank}: {error}", file=sys.stderr, flush=True)


def dispatch(args: argparse.Namespace) -> int:
    from distill import config as configuration

    if args.help_config:
        print(configuration.describe())
        return 0
    config = configuration.load_config(args.config, args.set)
    if args.plan:
        return show_plan(config, args)
    with sigterm_ends():
        configuration.check_machine(config)
        from distill.pipeline import Pipeline

        started = time.monotonic()
        with Pipeline(config, command=command_line(), restart=args.restart) as pipeline:
            for stage in args.stages:
                getattr(pipeline, stage)()
            pipeline.close(time.monotonic() - started)
    return 0


def show_plan(config, args: argparse.Namespace) -> int:
    from distill.plan import plan

    result = plan(config, gpus=args.gpus, gpu=args.gpu)
    print(result.to_json() if args.json else result.render())
    return 0 if result.fits else ConfigError.exit_code


def command_line() -> str:
    """How this process was started, for manifests and model cards (no secrets stand on the command line)."""
    return " ".join(["python", "-m", "distill.run", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
