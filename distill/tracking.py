"""Curves, sample tables and reports: to W&B (online, offline, or not at all) and always to a file in the run folder.

Only rank 0 writes. `metrics.jsonl` is the run's own record of every curve and needs no service. W&B offline keeps its
files in the run folder and opens no connection; a run that resumes takes up the id stored there, so that its curves go
on. Secrets are taken out of everything before it reaches either.
"""

from __future__ import annotations

import difflib
import json
import math
import netrc
import os
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from distill import files
from distill.config import Config
from distill.errors import ServiceError, StoreError
from distill.metrics import METRICS, known
from distill.redact import redact, redact_text


class Tracker:
    """Logs one run into `run_folder`/tracking: metrics.jsonl, wandb-id and W&B's files.

    `failures` counts calls that W&B refused after the start: training goes on without them and the first one is said on
    stderr. Errors at the start: ServiceError when online and without a key, with a wrong one, or unreachable;
    StoreError when the folder cannot be written.
    """

    def __init__(self, config: Config, run_folder: str | Path, *, is_main: bool = True, start_timeout_s: float = 60.0):
        self.mode, self.folder, self.is_main = config.tracking.wandb, Path(run_folder) / "tracking", is_main
        self.failures = 0
        self._run: Any = None
        self._curves: set[str] = set()
        if not is_main:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._history = _open_history(self.folder / "metrics.jsonl")
        except OSError as error:
            raise StoreError(
                f"metrics cannot be written: {error.strerror}",
                where=str(self.folder),
                remedy="Make the run folder writable.",
            ) from error
        if self.mode != "disabled":
            self._run = self._start(config, start_timeout_s)

    @property
    def url(self) -> str | None:
        """Where the curves can be seen; None unless online."""
        return self._run.url if self._run is not None and self.mode == "online" else None

    def log(self, values: Mapping[str, float], step: int, scope: str | None = None) -> None:
        """Record the values of metrics at a step. scope: the student or model they belong to.

        In W&B the key is "scope/section/metric" over the axis "scope/section/step", never over W&B's own step, so that
        a resumed run overwrites nothing. Raises ValueError for a name that METRICS does not list, on every rank.
        """
        for name in values:
            if not known(name):
                near = difflib.get_close_matches(name, METRICS, 1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise ValueError(f"unknown metric {name!r}{hint} Add it to distill/metrics.py with unit and meaning.")
        if not self.is_main:
            return
        numbers = {name: _number(value) for name, value in values.items()}
        with files.disk_errors(self.folder):
            self._history.write(json.dumps({"scope": scope, "step": step, **numbers}).encode() + b"\n")
        if self._run is not None:
            self._try(lambda run: run.log(self._with_axes(run, values, step, scope)))

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """A table of rows with equal keys, shown in W&B under `name`. Cells that are lists or objects become JSON."""
        if not self.is_main or self._run is None or not rows:
            return
        columns = list(rows[0])
        data = [[_cell(redact(row[column], column)) for column in columns] for row in rows]

        def send(run: Any) -> None:
            import wandb

            run.log({name: wandb.Table(columns=columns, data=data)})

        self._try(send)

    def artifact(self, name: str, path: str | Path, kind: str = "report") -> None:
        """Attach a file or folder to the run, versioned under `name`."""
        if not self.is_main or self._run is None:
            return
        path = Path(path)
        if not path.exists():
            raise StoreError("the file to attach does not exist", where=str(path))

        def send(run: Any) -> None:
            import wandb

            artifact = wandb.Artifact(name, type=kind)
            (artifact.add_dir if path.is_dir() else artifact.add_file)(str(path))
            run.log_artifact(artifact)

        self._try(send)

    def finish(self, failed: bool = False) -> None:
        """Flush and close; safe to call twice. failed: W&B shows the run as crashed. Says how many calls failed."""
        if not self.is_main:
            return
        self._history.close()
        if self._run is not None:
            self._try(lambda run: run.finish(exit_code=int(failed)))
            self._run = None
        if self.failures:
            print(
                f"tracking: {self.failures} W&B calls failed; {self.folder / 'metrics.jsonl'} is complete",
                file=sys.stderr,
            )
            self.failures = 0

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.finish(failed=kind is not None)

    def _start(self, config: Config, start_timeout_s: float) -> Any:
        online = self.mode == "online"
        if online:
            _require_key()
        os.environ["WANDB_ERROR_REPORTING"] = "false"  # its crash reports go to a third party
        for variable in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR"):  # artifacts are staged here until they are synced
            os.environ[variable] = str((self.folder / "wandb").resolve())
        import wandb

        settings = wandb.Settings(
            silent=True,
            console="off",
            reinit="create_new",
            x_disable_meta=True,  # holds the command line, which --set may have put a secret into
            x_disable_stats=not online,  # looks for a cloud's metadata service
            x_disable_machine_info=not online,
            disable_git=True,
            disable_code=True,
            init_timeout=start_timeout_s,
            finish_timeout=120.0,
        )
        try:
            return wandb.init(
                mode=self.mode,
                dir=str(self.folder),
                id=self._run_id(),
                resume="allow" if online else None,
                project=config.tracking.project,
                entity=config.tracking.entity,
                name=config.run.name,
                config=redact(config.model_dump(mode="json")),
                settings=settings,
            )
        except Exception as error:  # wandb raises many kinds, none of which a user can act on as it is
            raise ServiceError(
                f"W&B did not start: {redact_text(str(error)).splitlines()[0]}",
                where=f"tracking.wandb: {self.mode}",
                remedy="Check WANDB_API_KEY, tracking.entity and the network, or set tracking.wandb: offline.",
            ) from None

    def _run_id(self) -> str:
        """The id stored in the folder, made once: a resumed run must be the same run in W&B."""
        path = self.folder / "wandb-id"
        with suppress(FileNotFoundError):
            stored = path.read_text().strip()
            if stored:
                return stored
        fresh = uuid.uuid4().hex[:8]
        temporary = path.with_suffix(".tmp")
        temporary.write_text(fresh)
        temporary.replace(path)
        return fresh

    def _with_axes(self, run: Any, values: Mapping[str, float], step: int, scope: str | None) -> dict[str, float]:
        prefix = f"{scope}/" if scope else ""
        keyed: dict[str, float] = {}
        for name, value in values.items():
            axis, key = f"{prefix}{name.partition('/')[0]}/step", prefix + name
            if key not in self._curves:
                run.define_metric(key, step_metric=axis)
                self._curves.add(key)
            keyed |= {key: float(value), axis: step}
        return keyed

    def _try(self, send: Callable[[Any], None]) -> None:
        """A failing service must not cost a training run: count it, say it once."""
        try:
            send(self._run)
        except Exception as error:
            self.failures += 1
            if self.failures == 1:
                text = redact_text(f"{type(error).__name__}: {error}")
                print(f"tracking: W&B failed ({text}); going on without it", file=sys.stderr)


def read_history(run_folder: str | Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl in order: {"scope", "step", metric: value or None}.

    Where a resumed run repeated steps, the later record of the same scope, step and metrics replaces the earlier. A
    line cut off by a kill is left out.
    """
    kept: dict[tuple, dict[str, Any]] = {}
    path = Path(run_folder) / "tracking" / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        with suppress(json.JSONDecodeError):
            record = json.loads(line)
            key = (record["scope"], record["step"], frozenset(record))
            kept.pop(key, None)
            kept[key] = record
    return list(kept.values())


def _open_history(path: Path):
    """The file, open to append whole lines: one that a kill cut off is ended, so that it spoils only itself."""
    file = open(path, "ab+", buffering=0)  # noqa: SIM115 (closed by finish)
    if file.tell():
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")
    return file


def _number(value: float) -> float | None:
    """As JSON knows numbers: not-a-number and infinity become null."""
    number = float(value)
    return number if math.isfinite(number) else None


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (list, tuple, dict)) else value


def _require_key() -> None:
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    if os.environ.get("WANDB_API_KEY"):
        return
    with suppress(OSError, netrc.NetrcParseError):
        if netrc.netrc(os.environ.get("NETRC")).authenticators(host):
            return
    raise ServiceError(
        f"W&B online needs a key for {host} and there is none",
        where="tracking.wandb: online",
        remedy="Set WANDB_API_KEY, run `wandb login`, or set tracking.wandb: offline.",
    )
