"""Checkpoints that a kill cannot break, and the export of a finished student as a Hugging Face folder.

Everything is written under a temporary name and renamed when it is complete and synced: a folder with a final name is
whole. `latest` names the newest checkpoint and is written last.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from math import prod
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast

from distill import files
from distill.dist import Ranks
from distill.errors import StoreError
from distill.tokens import stop_ids
from students.engine import StudentEngine

STATE, LATEST = "state.json", "latest"
SHARD_BYTES = 4_000_000_000


def save_checkpoint(engine: StudentEngine, folder: Path, step: int, state: dict, ranks: Ranks, keep: int) -> Path:
    """folder/step-NNNNNN with weights, optimizer state and `state`; then drops all but the last `keep` checkpoints."""
    final = folder / f"step-{step:06d}"
    temporary = None
    try:
        with files.disk_errors(folder):
            temporary = ranks.on_main(lambda: _fresh(files.temporary_path(final)))
            engine.save(folder, temporary.name)
            ranks.barrier()
            ranks.on_main(lambda: _complete(temporary, final, {**state, "step": step}, keep))
    except BaseException:
        if temporary is not None and ranks.is_main:
            shutil.rmtree(temporary, ignore_errors=True)  # half a checkpoint would keep a full disk full
        raise
    return final


def _fresh(temporary: Path) -> Path:
    temporary.parent.mkdir(parents=True, exist_ok=True)
    if temporary.exists():
        shutil.rmtree(temporary)
    return temporary


def _complete(temporary: Path, final: Path, state: dict, keep: int) -> None:
    sizes = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
    for name in sizes:
        files.sync(temporary / name)
    files.write_json(temporary / STATE, {**state, "files": sizes})
    _put_in_place(temporary, final)
    with files.replacing(final.parent / LATEST) as path:
        path.write_text(final.name + "\n")
    for old in _newest_first(final.parent)[keep:]:
        shutil.rmtree(old)


def _put_in_place(temporary: Path, final: Path) -> None:
    files.sync(temporary)
    if final.exists():
        shutil.rmtree(final)
    os.replace(temporary, final)
    files.sync(final.parent)


def _newest_first(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=lambda path: -int(path.name[5:]))


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


def resume(engine: StudentEngine, folder: Path, identity: dict, ranks: Ranks) -> dict | None:
    """The state saved with the newest checkpoint after loading it, or None when there is none to go on from.

    identity: what must be as it was when the checkpoint was written (data order, ranks, ZeRO stage). StoreError else.
    """

    def find() -> tuple[Path, dict] | None:
        if folder.is_dir():
            files.remove_stale(folder)
        return newest_checkpoint(folder, ranks.print)

    found = ranks.on_main(find)
    if found is None:
        return None
    path, state = found
    for name, now in identity.items():
        if state["identity"].get(name) != now:
            raise StoreError(
                f"the checkpoint was written with {name} {state['identity'].get(name)!r}, this launch has {now!r}",
                where=str(path),
                remedy=f"Launch as before, or delete {folder} to train this student from its start.",
            )
    engine.load(folder, path.name)
    return state


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
    for path in temporary.iterdir():
        files.sync(path)
    _put_in_place(temporary, final)
