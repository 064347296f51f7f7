"""The teacher as a service: `deepspeed teachers/serve.py --config configs/demo.yaml`, or `python -m teachers.serve`.

OpenAI's routes (/v1/completions, /v1/chat/completions, /v1/models), /v1/score, /health and /metrics, over the teacher
of a run's config and within the limits of its section `serve`. A run on another machine points teacher.url at it.
"""

import argparse
import os
import sys
from pathlib import Path

# `deepspeed teachers/serve.py` puts this folder first on the path, where its files would shadow other packages.
_here, _root = str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(_here)]
if _root not in sys.path:
    sys.path.insert(0, _root)

from distill.dist import Ranks, add_launcher_arguments, init_ranks  # noqa: E402
from distill.errors import DistillError  # noqa: E402


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="teachers/serve.py", description="Serve the teacher of a config over HTTP.")
    parser.add_argument("--config", metavar="FILE", required=True, help="a YAML file, see configs/README.md")
    parser.add_argument("--set", metavar="A.B=C", action="append", default=[], help="change one setting; repeatable")
    add_launcher_arguments(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0 stopped, 1 a rank died, 2 something a person must change."""
    args = parse(argv)
    try:
        return serve(args)
    except DistillError as error:
        print(f"\nerror: {error}", file=sys.stderr, flush=True)
        return error.exit_code


def serve(args: argparse.Namespace) -> int:
    from distill.config import load_config

    config = load_config(args.config, args.set)
    ranks = init_ranks(config.hardware.device)
    try:
        return _serve(config, ranks)
    finally:
        if ranks.world == 1:  # of several, a rank that ends must not wait for one that has died
            ranks.close()


def _serve(config, ranks: Ranks) -> int:
    from distill.plan import teacher_split
    from teachers.engine import TeacherEngine
    from teachers.service_ranks import Team, follow
    from teachers.service_server import ServiceProcess, address_of, listen, raise_file_limit, read_token

    limits, held = config.serve, []
    token = read_token(limits.token_env)
    ranks.on_main(lambda: held.append(listen(limits.host, limits.port)))
    settings = config.teacher.model_copy(update={"url": None})  # where runs find this service; it has its own weights
    split = teacher_split(config.model_copy(update={"teacher": settings}), ranks.rank, ranks.world)
    engine = TeacherEngine(
        settings.path,
        dtype=settings.dtype,
        device=ranks.device,
        batch_size=settings.batch_size,
        split=split,
        speculative=settings.speculative,
    )
    if not ranks.is_main:
        return follow(engine, ranks, split)
    raise_file_limit()
    name = Path(settings.path).name if Path(settings.path).is_dir() else settings.path
    service = ServiceProcess(engine, limits, name, token, Team(engine, ranks, split))
    rows = f"{service.desk.slots} sequences at once on {ranks.world} rank{'s' * (ranks.world > 1)}"

    def ready() -> None:
        asks = f"asks for the token in {limits.token_env}" if token else "asks for no token"
        print(f"serving {name} at {address_of(held[0])} (process {os.getpid()}): {rows}, {asks}", flush=True)

    status = service.run(held[0], ready)
    print("the service has ended", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
