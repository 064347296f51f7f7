"""Dense models over two ranks, each with its part, against the whole model: `launch_dense.py FOLDER...` by torchrun.

Prints, on rank 0, one line a checkpoint: the largest gap of the logits of a prefill, of a prefill after a past and of
decode steps, over both ranks.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

sys.path.append(str(Path(__file__).parents[3]))

from distill.checkpoints import check_checkpoint
from distill.dist import init_ranks
from distill.split import Split
from teachers.paged import PagePool
from teachers.runner import Segment
from teachers.runners import runner_of
from teachers.shard import load

LENGTH, PAST, DECODED = 60, 25, 12


def gaps(folder: Path, rank: int) -> list[float]:
    """Of this rank's logits: over all positions at once, over those after a past, and of decode steps."""
    ids_T = torch.randint(0, 700, (LENGTH,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        wanted_TV = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids_T[None]).logits[0]
    split = Split(2, 1, rank, 2)
    loaded = load(check_checkpoint(folder), folder, torch.float32, torch.device("cpu"), split)
    runner = runner_of(loaded.model, 700, split)
    assert runner.entry_size == runner.config.num_key_value_heads * runner.size  # half of the heads, keys and values
    pool = PagePool(len(runner.layers), 9, runner.entry_size, dtype=torch.float32, device=runner.device, page_tokens=8)
    pages = pool.take(8)
    slots_T = torch.from_numpy(pool.slots(pages, 0, LENGTH))

    def prefill(start: int, stop: int, *where) -> torch.Tensor:
        segment = Segment(0, stop - start, slots_T[:start] if start else None)
        parts = runner.prefill(ids_T[start:stop], torch.arange(start, stop), [segment], *where)
        return (runner.logits(runner.finish(parts)) - wanted_TV[start:stop]).abs().max()

    found, last = [prefill(0, LENGTH, None, None)], LENGTH - DECODED
    prefill(0, PAST, pool, slots_T[:PAST])
    found.append(prefill(PAST, last, pool, slots_T[PAST:last]))
    tables, steps = torch.tensor([pages], dtype=torch.int32), []
    for place in range(last, LENGTH):
        length_1 = torch.tensor([place], dtype=torch.int32)
        logits_1V = runner.decode(ids_T[place : place + 1], length_1, tables, runner.everyone, pool)
        steps.append((logits_1V[0] - wanted_TV[place]).abs().max())
    return [float(gap) for gap in (*found, max(steps))]


def main() -> None:
    ranks = init_ranks("cpu")
    torch.set_num_threads(1)
    for folder in map(Path, sys.argv[1:]):
        both = ranks.gather(gaps(folder, ranks.rank))
        ranks.print(json.dumps({"folder": folder.name, "gaps": [max(pair) for pair in zip(*both)]}))
    dist.barrier()


if __name__ == "__main__":
    main()
