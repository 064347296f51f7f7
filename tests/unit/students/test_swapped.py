"""Weights and state in files: what needs no files of DeepSpeed's own. The rest is in test_resharding and test_optim."""

import pytest
import torch
from safetensors.torch import save_file
from student_world import make_model

from distill.files import write_json
from students import swapped
from students.model import load_student


def test_parts_of_ranks_are_joined_to_whole_tensors(tmp_path):
    """Two groups of two weights each, cut among three ranks as ZeRO-3 cuts them: the last parts are filled up."""
    torch.manual_seed(5)
    sizes = {"a.weight": 10, "b": 7, "c": 1, "d.weight": 12}
    whole = {(name, part): torch.randn(size) for name, size in sizes.items() for part in swapped.PARTS}
    for rank in range(3):
        places, flat = {}, {}
        for number, names in enumerate((["b", "d.weight"], ["c", "a.weight"])):
            at = 0
            for name in names:
                size = -(-sizes[name] // 3)
                count = max(0, min(size, sizes[name] - rank * size))
                places[name] = (number, at, count)
                for part in swapped.PARTS:
                    mine = torch.full((size,), torch.nan)
                    mine[:count] = whole[name, part][rank * size : rank * size + count]
                    flat.setdefault((number, part), []).append(mine)
                at += size
        for (number, part), parts in flat.items():
            save_file({part: torch.cat(parts)}, tmp_path / f"{part}_group_{number:05d}_rank_{rank:05d}.safetensors")
        write_json(tmp_path / f"swapped_rank_{rank:05d}.json", {"steps": 4, "places": places})
    assert swapped.is_written(tmp_path) and not swapped.is_written(tmp_path / "other")
    swapped.convert(tmp_path, tmp_path / "out")
    for (name, part), expected in whole.items():
        assert torch.equal(torch.load(tmp_path / "out" / "zero" / name / f"{part}.pt")["param"], expected)


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_there_is_a_buffer_for_every_weight_of_a_layer(ranks, tmp_path, family):
    model, _ = load_student(make_model(tmp_path, family=family))
    zero = {"offload_param": {"device": "nvme", "nvme_path": "x"}}
    swapped.settle(model, zero)
    layer = [parameter.numel() for parameter in model.base_model.layers[0].parameters()]
    buffers = zero["offload_param"]
    assert buffers["buffer_count"] >= len(layer) and buffers["buffer_size"] == max(layer)
    assert buffers["buffer_size"] < model.lm_head.weight.numel()
