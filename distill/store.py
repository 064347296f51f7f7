"""The run folder: runs/NAME/<n>-<stage> with atomic shards, a manifest per stage, resume and a lock.

What is on disk is always a finished shard (a data file and its sidecar `<name>.json`) or left-overs that count as
nothing (a temporary dot-file, a data file without sidecar). So a launch may be killed at any instruction.
"""

import contextlib
import importlib.metadata
import os
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from distill import files
from distill.errors import StoreError
from distill.records import SCHEMA_VERSION
from distill.spec_changes import changes

STAGES = {
    "prompts": "1-prompts",
    "traces": "2-traces",
    "logits": "3-logits",
    "train": "4-student",
    "eval": "5-eval",
    "publish": "6-publish",
}
_STATE, _MANIFEST = "stage.json", "manifest.json"
_COMMAND = {"logits": "traces"}  # captured while traces are sampled: no command names that stage alone


@dataclass(frozen=True)
class Shard:
    """One finished data file of a stage; `info` is what its writer said of it, wall_s and device_s what it cost."""

    name: str
    path: Path
    sha256: str
    bytes: int
    info: dict
    wall_s: float
    device_s: float
    launch: int
    rank: int


_RECORDED = [field.name for field in fields(Shard) if field.name not in ("name", "path")]  # what a sidecar holds


class RunFolder:
    """runs/NAME. `rank` 0 locks the run and writes its state; the others open a stage after it (the caller's barrier).

    With `overwrite`, a stage made by another config is deleted together with all later ones instead of refused.
    """

    def __init__(self, root: Path | str, name: str, *, commit: str, overwrite: bool = False, rank: int = 0):
        self.path = Path(root) / _folder_name(name, "run.name")
        self.commit, self.overwrite, self.rank = commit, overwrite, rank

    def stage(self, name: str, part: str | None = None) -> "StageFolder":
        """The folder of stage `name` (a key of STAGES), or of one `part` of it, such as one student.

        A part has its own state and manifest. Nothing is created before `open`.
        """
        return StageFolder(self, _known_stage(name), part and _folder_name(part, f"{self.path / STAGES[name]}/"))

    def check_writable(self) -> None:
        """Raises StoreError unless a file can be created in the run folder; called before any work."""
        with files.disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            probe = files.temporary_path(self.path / "probe")
            try:
                probe.write_bytes(b"x")
            finally:
                with contextlib.suppress(OSError):
                    probe.unlink(missing_ok=True)

    def lock(self) -> None:
        """Takes runs/NAME/.lock for this process, or raises StoreError naming the pid that holds it."""
        with files.disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            if files.take_lock(self.path / ".lock"):
                files.remove_stale(self.path)

    def release(self) -> None:
        """Gives the lock back; also done by leaving `with RunFolder(...)` and, by the kernel, by the process's end."""
        files.release_lock(self.path / ".lock")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def restart(self, stage: str) -> list[str]:
        """Deletes `stage` and every later one, last first; returns the names of those that existed. Rank 0 only."""
        doomed = _stages_from(_known_stage(stage))
        self.lock()
        existing = [name for name in doomed if (self.path / STAGES[name]).exists()]
        for name in reversed(existing):
            folder = self.path / STAGES[name]
            with files.disk_errors(self.path):
                # First out of sight, in one step: a kill in the middle of rmtree must not leave half a stage.
                hidden = files.temporary_path(folder)
                os.replace(folder, hidden)
                shutil.rmtree(hidden)
        return existing


class StageFolder:
    """One stage's folder. Reading (shards, manifest, check_shard) needs no `open`; writing does."""

    def __init__(self, run: RunFolder, name: str, part: str | None = None):
        self.run, self.name = run, name
        self.title = STAGES[name] + (f"/{part}" if part else "")
        self.path = run.path / self.title
        self.hash: str | None = None
        self._identity: dict = {}
        self._launch = 0

    def open(self, spec: dict, inputs: dict[str, str]) -> Self:
        """Itself, bound to its resolved config `spec` and to what the stage reads (`inputs`: name -> hash).

        Rank 0 takes the run's lock, removes temporary files of dead processes and writes stage.json; the others call
        this after it. StoreError if another spec or other inputs made what is there: each differing key, both values.
        """
        main = self.run.rank == 0
        identity = files.plain({"schema": SCHEMA_VERSION, "spec": spec, "inputs": inputs}, self.path)
        if main:
            self.run.lock()
        found = self._state_on_disk()
        if found and _identity_of(found) != identity:
            if main and self.run.overwrite:
                self.run.restart(self.name)
            elif not (main and self._holds_nothing()):
                raise self._made_by_another(_identity_of(found), identity)
            found = None
        if not main and found is None:
            remedy = "Put a barrier between rank 0's open and this one."
            raise StoreError("rank 0 has not opened this stage", where=str(self.path), remedy=remedy)
        self._identity, self.hash = identity, files.digest(identity)
        self._launch = (found or {}).get("launches", 0)
        if main:
            self._begin_launch()
        return self

    def _begin_launch(self) -> None:
        with files.disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            files.remove_stale(self.path)
            if not self.done:
                self._launch += 1
                state = {**self._identity, "hash": self.hash, "commit": self.run.commit, "launches": self._launch}
                files.write_json(self.path / _STATE, state)

    @property
    def done(self) -> bool:
        """True if the manifest is there, is of this spec, and every shard that it lists is still there."""
        if not (self.path / _MANIFEST).exists():
            return False
        manifest = self.manifest
        same = self.hash in (None, manifest["hash"])
        return same and all(self.has_shard(shard["name"]) for shard in manifest["shards"])

    @property
    def manifest(self) -> dict:
        """manifest.json of a finished stage; StoreError if the stage has not finished."""
        path = self.path / _MANIFEST
        if not path.exists():
            raise StoreError("this stage has not finished", where=str(self.path), remedy=self._run_remedy())
        manifest = files.read_json(path, self._restart_remedy())
        if missing := {"hash", "content_hash", "shards"} - manifest.keys():
            raise StoreError(f"lacks {sorted(missing)}", where=str(path), remedy=self._restart_remedy())
        return manifest

    @property
    def manifest_hash(self) -> str:
        """What a later stage gives as input: sha256 over this stage's hash, shards and fingerprints, not its costs.
        StoreError if the stage has not finished or lost a shard: a later stage must not do with less."""
        manifest = self.manifest
        if lost := [shard["name"] for shard in manifest["shards"] if not self.has_shard(shard["name"])]:
            what = f"the shard is gone ({len(lost)} of {len(manifest['shards'])} are)"
            raise StoreError(what, where=str(self._path_of(lost[0])), remedy=self._run_remedy())
        return manifest["content_hash"]

    def has_shard(self, name: str) -> bool:
        """True if the shard is finished: data file and sidecar. Its bytes are not read; check_shard does."""
        path = self._path_of(name)
        return path.is_file() and _sidecar(path).is_file()

    def shards(self) -> list[Shard]:
        """The finished shards sorted by name."""
        sidecars = self.path.glob("*.json") if self.path.is_dir() else []
        names = sorted(sidecar.name.removesuffix(".json") for sidecar in sidecars)
        return [self._shard(name) for name in names if name and not name.startswith(".") and self.has_shard(name)]

    def check_shard(self, name: str) -> Shard:
        """The shard, after its size and sha256 were compared with the sidecar; StoreError names the file and both."""
        shard = self._shard(name)
        remedy = _delete_remedy(shard.path)
        size = shard.path.stat().st_size
        if size != shard.bytes:
            what = f"the shard is damaged: {shard.bytes} bytes were written, {size} are there"
            raise StoreError(what, where=str(shard.path), remedy=remedy)
        found = files.file_sha256(shard.path)
        if found != shard.sha256:
            what = f"the shard is damaged: its sha256 was {shard.sha256} when written and is {found} now"
            raise StoreError(what, where=str(shard.path), remedy=remedy)
        return shard

    def write_shard(
        self,
        name: str,
        writer: Callable[[Path], Any],
        info: dict | None = None,
        *,
        wall_s: float | None = None,
        device_s: float = 0.0,
    ) -> Shard:
        """Calls writer(temporary path), puts the file in place durably, then its sidecar; returns the finished shard.

        wall_s is what the shard cost from its first sample on (default: the writer's own time), device_s that times the
        devices. A writer that raises leaves nothing behind. StoreError on a full disk.
        """
        path = self._path_of(name)
        self._require_open()
        if path.suffix == ".json":
            raise StoreError("a shard cannot be a .json file", where=str(path), remedy="Use write_json for it.")
        started_s = time.monotonic()
        with files.disk_errors(self.path):
            with files.replacing(path) as temporary:
                writer(temporary)
                if not temporary.is_file():
                    raise StoreError("the writer made no file", where=str(temporary), remedy="It must write this one.")
                record = {"sha256": files.file_sha256(temporary), "bytes": temporary.stat().st_size, "info": info or {}}
                _sidecar(path).unlink(missing_ok=True)  # an old sidecar must never describe new bytes
            record["wall_s"] = time.monotonic() - started_s if wall_s is None else wall_s
            record |= {"device_s": device_s, "launch": self._launch, "rank": self.run.rank, "date": _now()}
            try:
                files.write_json(_sidecar(path), record)
            except BaseException:
                path.unlink(missing_ok=True)  # useless without its sidecar, and the disk may be full
                raise
        return self._shard(name)

    def write_json(self, name: str, value: Any) -> Path:
        """Writes `value` under `name` (*.json) in one step; returns the path. For reports, not for shards."""
        path = self._path_of(name)
        if path.suffix != ".json" or name in (_STATE, _MANIFEST) or path.with_suffix("").is_file():
            raise StoreError("this name is not free for a report", where=str(path), remedy="Use another name in .json.")
        with files.disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            files.write_json(path, value)
        return path

    def finish(
        self,
        counts: dict,
        *,
        fingerprints: dict[str, str] | None = None,
        wall_s: float = 0.0,
        device_s: float = 0.0,
        **extra: Any,
    ) -> dict:
        """Writes manifest.json (rank 0; the other ranks return {} at once) and returns it.

        wall_s and device_s are added to what the shards cost. Shards that several ranks made at the same time count
        once in wall_s (the slowest rank of each launch): a run that was killed and went on adds up to what its shards
        took; work on a shard that a kill threw away is in no sidecar and not counted.
        """
        self._require_open()
        if self.run.rank != 0:
            return {}
        shards = self.shards()
        listed = [{"name": shard.name, "sha256": shard.sha256, "bytes": shard.bytes} for shard in shards]
        content = {"hash": self.hash, "shards": listed, "fingerprints": fingerprints or {}}
        manifest = {**extra, "stage": self.title, **self._identity, **content, "content_hash": files.digest(content)}
        manifest |= {"commit": self.run.commit, "counts": counts, "launches": self._launch}
        manifest["wall_s"] = wall_s + _wall_s(shards)
        manifest["device_s"] = device_s + sum(shard.device_s for shard in shards)
        manifest |= {"versions": _versions(), "date": _now()}
        with files.disk_errors(self.path):
            files.write_json(self.path / _MANIFEST, manifest)
        return manifest

    def _shard(self, name: str) -> Shard:
        path = self._path_of(name)
        if not self.has_shard(name):
            raise StoreError("the shard is not there or not finished", where=str(path), remedy=self._run_remedy())
        record = files.read_json(_sidecar(path), _delete_remedy(path))
        try:
            return Shard(name, path, **{key: record[key] for key in _RECORDED})
        except KeyError as error:
            raise StoreError(f"lacks {error}", where=str(_sidecar(path)), remedy=_delete_remedy(path)) from error

    def _path_of(self, name: str) -> Path:
        if not name or name.startswith(".") or "/" in name:
            raise StoreError("is not a file name", where=str(self.path), value=name, remedy="No /, no leading dot.")
        return self.path / name

    def _require_open(self) -> None:
        if self.hash is None:
            raise StoreError("the stage is written before it was opened", where=str(self.path), remedy="Open it first.")

    def _state_on_disk(self) -> dict | None:
        for name in (_STATE, _MANIFEST):
            if (self.path / name).exists():
                return files.read_json(self.path / name, self._restart_remedy())
        if self.path.is_dir() and any(not entry.name.startswith(".") for entry in self.path.iterdir()):
            what = "the folder holds files but no stage.json: something else made it"
            raise StoreError(what, where=str(self.path), remedy=self._restart_remedy())
        return None

    def _holds_nothing(self) -> bool:
        """Whether a launch opened the stage and wrote nothing: it may be opened again with a corrected config."""
        return all(entry.name == _STATE or entry.name.startswith(".") for entry in self.path.iterdir())

    def _run_remedy(self) -> str:
        return f"Run it first: --stages {_COMMAND.get(self.name, self.name)}; what is there is kept."

    def _restart_remedy(self) -> str:
        if self.title.startswith(f"{STAGES['logits']}/"):  # texts that the teacher read: no trace hangs on them
            return f"Delete {self.path} and run again: only this set is read again; or set another run.name."
        name = _COMMAND.get(self.name, self.name)
        later = _stages_from(name)[1:]
        if name == "train" and self.title != STAGES[name]:
            own, after = self.title.split("/")[1], " and ".join(later)
            return (
                f"Delete {self.run.path / STAGES[name] / own} and pass --restart eval: this student alone is trained "
                f"again; or pass --restart train: it deletes every student, {after}; or set another run.name."
            )
        others = f" and all later ones ({', '.join(later)})" if later else ""
        return f"Pass --restart {name}: it deletes this stage{others}; or set another run.name."

    def _made_by_another(self, found: dict, wanted: dict) -> StoreError:
        what = "this stage was made by another config: " + "; ".join(changes(found, wanted))
        return StoreError(what, where=str(self.path), remedy=self._restart_remedy())


def _known_stage(name: str) -> str:
    if name not in STAGES:
        raise StoreError("is not a stage", where="--stages", value=name, remedy=f"The stages are {', '.join(STAGES)}.")
    return name


def _stages_from(name: str) -> list[str]:
    """That stage and all later ones."""
    names = list(STAGES)
    return names[names.index(name) :]


def _folder_name(name: str, where: str) -> str:
    if not name or name.startswith(".") or "/" in name or "\0" in name:
        raise StoreError("is not a folder name", where=where, value=name, remedy="Use letters, digits, - and _.")
    return name


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _delete_remedy(path: Path) -> str:
    return f"Delete {path} and run again: only this shard is made again."


def _identity_of(state: dict) -> dict:
    return {key: state.get(key) for key in ("schema", "spec", "inputs")}


def _wall_s(shards: list[Shard]) -> float:
    by_launch: dict[int, dict[int, float]] = {}
    for shard in shards:
        ranks = by_launch.setdefault(shard.launch, {})
        ranks[shard.rank] = ranks.get(shard.rank, 0.0) + shard.wall_s
    return sum(max(ranks.values()) for ranks in by_launch.values())


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("torch", "transformers", "deepspeed"):
        versions[package] = None
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
