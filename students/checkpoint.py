"""Checkpoints that a kill cannot break, and the export of a finished student as a Hugging Face folder.

Everything is written under a temporary name and renamed when it is complete and synced: a folder with a final name is
whole. `latest` names the newest checkpoint and is written last.
"""

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from math import prod
from pathlib import Path
from threading import Thread, main_thread

import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast

from distill import files
from distill.dist import TIMEOUT_S, Ranks
from distill.errors import DistillError, StoreError
from distill.tokens import stop_ids
from students.engine import StudentEngine

STATE, LATEST, BEST = "state.json", "latest", "best"
SHARD_BYTES = 4_000_000_000
RESHARDED = {"ranks", "zero_stage"}  # what a checkpoint can be converted to another value of
POLL_S = 0.02
GIVE_UP_S = 30.0


class Checkpoints:
    """The checkpoints of one training: folder/step-NNNNNN, of which the last `keep` stay, and the best if asked for.

    All ranks call every method at the same time. `save` returns as soon as each rank has copied its part to main
    memory; a thread writes it while the training goes on. The ranks' threads meet through files, so that they disturb
    no communication of the training.
    """

    def __init__(self, folder: Path, ranks: Ranks, keep: int, *, keep_best: bool = False):
        self.folder, self._ranks, self._keep, self._keep_best = folder, ranks, keep, keep_best
        self._thread: Thread | None = None
        self._error: DistillError | None = None
        self._temporary: Path | None = None

    def save(self, engine: StudentEngine, step: int, state: dict) -> None:
        """Begins a checkpoint with weights, optimizer state and `state`; waits for the one before, with its errors.

        state["score"], lower is better, says which checkpoint is the best. A complete one of this step is left alone:
        to replace it there would have to be none for a moment.
        """
        self.wait()
        final = self.folder / f"step-{step:06d}"
        if self._ranks.on_main(lambda: (newest_checkpoint(self.folder, lambda _: None) or [None])[0] == final):
            return
        self._temporary = self._ranks.on_main(lambda: _fresh(files.temporary_path(final)))
        self._error = None
        try:
            with files.disk_errors(self.folder):
                write = engine.snapshot(self.folder, self._temporary.name)
        except DistillError as error:
            self._tell(error)
        else:
            # Not a daemon: a process that ends for another reason still completes the checkpoint.
            self._thread = Thread(target=self._write, args=(write, final, {**state, "step": step}), name="checkpoint")
            self._thread.start()

    @property
    def failed(self) -> bool:
        """Whether this rank's part of the last checkpoint is known to be lost; `wait` raises why, on every rank."""
        return self._error is not None

    def wait(self) -> None:
        """Returns when the last checkpoint is complete; StoreError on every rank if one of them could not write it."""
        if self._temporary is None:
            return
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        errors = [error for error in self._ranks.gather(self._error) if error is not None]
        temporary, self._temporary = self._temporary, None
        if errors:
            # Half a checkpoint would keep a full disk full.
            self._ranks.on_main(lambda: shutil.rmtree(temporary, ignore_errors=True))
            raise errors[0]

    def _write(self, write, final: Path, state: dict) -> None:
        try:
            with files.disk_errors(self.folder):
                write()
                _mark(self._temporary, self._ranks.rank, None)
                if self._ranks.is_main:
                    _wait_for_marks(self._temporary, self._ranks.world)
                    self._complete(self._temporary, final, state)
        except Exception as error:
            self._tell(error if isinstance(error, DistillError) else DistillError(f"a checkpoint failed: {error!r}"))

    def _tell(self, error: DistillError) -> None:
        self._error = error
        _mark(self._temporary, self._ranks.rank, str(error))

    def _complete(self, temporary: Path, final: Path, state: dict) -> None:
        for mark in temporary.glob("rank-*.written"):
            mark.unlink()
        paths = [path for path in sorted(temporary.rglob("*")) if path.is_file()]
        for path in paths:
            files.sync(path)
        sizes = {str(path.relative_to(temporary)): path.stat().st_size for path in paths}
        files.write_json(temporary / STATE, {**state, "files": sizes})
        _put_in_place(temporary, final)
        _point(final.parent / LATEST, final)
        self._drop_old(state["step"])

    def _drop_old(self, step: int) -> None:
        # Later ones are damaged: the training went on from one before them.
        found = [path for path in _newest_first(self.folder) if _step_of(path) <= step]
        kept = found[: self._keep]
        if self._keep_best and (best := best_checkpoint(self.folder)) is not None:
            _point(self.folder / BEST, best)
            kept.append(best)
        for old in found:
            if old not in kept:
                shutil.rmtree(old)

    def resume(self, engine: StudentEngine, identity: dict) -> dict | None:
        """The state saved with the newest checkpoint after loading it, or None when there is none to go on from.

        identity: what must be as it was when the checkpoint was written. It is converted where only the number of
        ranks, the ZeRO stage or the offload to files is another; StoreError where anything else is (the data and their
        order).
        """

        def find() -> tuple[Path, dict] | None:
            if self.folder.is_dir():
                files.remove_stale(self.folder)
            return newest_checkpoint(self.folder, self._ranks.print)

        found = self._ranks.on_main(find)
        if found is None:
            return None
        path, state = found
        was = state["identity"]
        other = {name for name in was.keys() | identity.keys() if was.get(name) != identity.get(name)}
        for name in sorted(other - RESHARDED):
            raise StoreError(
                f"the checkpoint was written with {name} {was.get(name)!r}, this launch has {identity.get(name)!r}",
                where=str(path),
                remedy=f"Launch as before, or delete {self.folder} to train this student from its start.",
            )
        if other or not engine.can_load(path):
            self._reshard(engine, path, state)
        else:
            engine.load(self.folder, path.name)
        return state

    def _reshard(self, engine: StudentEngine, path: Path, state: dict) -> None:
        stage, steps = state["identity"]["zero_stage"], state["step"]
        self._ranks.print(f"{path} is of other ranks, ZeRO stage or offload: converting it for this launch")
        with files.disk_errors(self.folder):
            converted = self._ranks.on_main(lambda: _fresh(files.temporary_path(self.folder / "universal")))
            try:
                self._ranks.on_main(lambda: engine.convert(path, converted, stage, steps))
                engine.load_converted(converted, stage, steps)
                self._ranks.barrier()
            finally:
                if self._ranks.is_main:
                    shutil.rmtree(converted, ignore_errors=True)


def _mark(folder: Path, rank: int, error: str | None) -> None:
    with contextlib.suppress(OSError):  # without its mark rank 0 gives up by itself
        files.write_json(folder / f"rank-{rank}.written", {"error": error})


def _wait_for_marks(folder: Path, world: int) -> None:
    """Returns when every rank has written its part; StoreError if one failed or none comes any more."""
    until_s = time.monotonic() + TIMEOUT_S
    for rank in range(world):
        mark = folder / f"rank-{rank}.written"
        while not mark.exists():
            if not main_thread().is_alive():  # this rank ended by an error, so the other may never come
                until_s = min(until_s, time.monotonic() + GIVE_UP_S)
            if time.monotonic() > until_s:
                raise StoreError(f"rank {rank} did not write its part of a checkpoint", where=str(folder))
            time.sleep(POLL_S)
        if error := files.read_json(mark, "Run again.")["error"]:
            raise StoreError(f"rank {rank} could not write its part of a checkpoint: {error}", where=str(folder))


def _fresh(temporary: Path) -> Path:
    temporary.parent.mkdir(parents=True, exist_ok=True)
    if temporary.exists():
        shutil.rmtree(temporary)
    return temporary


def _put_in_place(temporary: Path, final: Path) -> None:
    files.sync(temporary)
    if final.exists():
        shutil.rmtree(final)
    os.replace(temporary, final)
    files.sync(final.parent)


def _point(pointer: Path, target: Path) -> None:
    with files.replacing(pointer) as path:
        path.write_text(target.name + "\n")


def _newest_first(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=lambda path: -_step_of(path))


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def newest_checkpoint(folder: Path, say=print) -> tuple[Path, dict] | None:
    """(path, its state) of the newest complete checkpoint; an incomplete one is named and passed over. None without."""
    for path in _newest_first(folder):
        try:
            state = json.loads((path / STATE).read_text())
            damaged = [n for n, size in state["files"].items() if (path / n).stat().st_size != size]
        except (OSError, ValueError, KeyError) as error:
            damaged = [str(error)]
        if not damaged:
            return path, state
        say(f"checkpoint {path} is damaged ({', '.join(damaged)}): going back to the one before")
    return None


def best_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint with the lowest score, the earlier of equals; None where none has a score."""
    scores: dict[Path, float] = {}
    for path in reversed(_newest_first(folder)):
        with contextlib.suppress(OSError, ValueError):
            score = json.loads((path / STATE).read_text()).get("score")
            if score is not None:
                scores[path] = score
    return min(scores, key=scores.__getitem__, default=None)


def export(
    engine: StudentEngine, tokenizer: PreTrainedTokenizerFast, folder: Path, dtype: torch.dtype, ranks: Ranks
) -> None:
    """Writes `folder`: config, generation_config, weights in `dtype` as safetensors shards, tokenizer with template.

    Loads with AutoModelForCausalLM and gives the same logits. No rank but 0 holds weights, and it holds one shard.
    """
    with files.disk_errors(folder.parent):
        temporary = ranks.on_main(lambda: _fresh(files.temporary_path(folder)))
        if ranks.is_main:
            temporary.mkdir()
        _write_weights(engine, temporary, dtype, SHARD_BYTES)
        ranks.on_main(lambda: _write_rest(engine, tokenizer, temporary, folder, dtype))


def _write_weights(engine: StudentEngine, folder: Path, dtype: torch.dtype, shard_bytes: int) -> None:
    """All ranks: parameters are gathered one by one, rank 0 writes a shard as soon as it is full."""
    shards = list(plan_shards(engine.shapes(), dtype.itemsize, shard_bytes))
    owner = {name: shard for shard, names in enumerate(shards) for name in names}
    held: dict[str, torch.Tensor] = {}
    index: dict[str, str] = {}
    for name, tensor in engine.whole_weights(dtype):
        if tensor is None:
            continue
        held[name] = tensor.contiguous()
        if name == shards[owner[name]][-1]:
            number = f"-{owner[name] + 1:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
            file = f"model{number}.safetensors"
            save_file(held, folder / file, metadata={"format": "pt"})
            index |= dict.fromkeys(held, file)
            held.clear()
    if len(shards) > 1 and index:
        total = sum(prod(shape) for shape in engine.shapes().values()) * dtype.itemsize
        files.write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index}
        )


def plan_shards(shapes: dict[str, torch.Size], item_bytes: int, shard_bytes: int) -> Iterator[list[str]]:
    """Names shard by shard, in order: as many as fit into shard_bytes, at least one."""
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        more = prod(shape) * item_bytes
        if names and size + more > shard_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += more
    if names:
        yield names


def _write_rest(
    engine: StudentEngine, tokenizer: PreTrainedTokenizerFast, temporary: Path, final: Path, dtype: torch.dtype
) -> None:
    model = engine.module.model
    config, generation = model.config, model.generation_config
    config.dtype = dtype
    config.architectures = [type(model).__name__]
    generation.eos_token_id = stop_ids(tokenizer)
    generation.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    generation.do_sample, generation.temperature, generation.top_p = True, 0.6, 0.95
    config.save_pretrained(temporary)
    generation.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    mode = (temporary / "config.json").stat().st_mode
    for path in temporary.iterdir():
        with contextlib.suppress(OSError):  # a file system without modes
            path.chmod(mode)  # safetensors lets nobody but the owner read what it writes
        files.sync(path)
    _put_in_place(temporary, final)
