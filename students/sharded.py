"""A student that no rank ever holds: built under DeepSpeed's zero.Init, then each rank reads its part from the files.

ZeRO-3 gives a rank one run of each parameter's numbers, as they lie in memory; a safetensors file holds them in that
order too. So a rank reads the bytes of its run and nothing else, and the ranks send each other nothing.
"""

import struct
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from distill.checkpoints import read_header, weight_files
from distill.config import Student, Train
from distill.errors import ModelError
from students import attention, swapped
from students.model import check_student
from students.optim import offload_places

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def shards_at_load(train: Train, student: Student) -> bool:
    """Whether this student is loaded in parts. Adapters need whole weights to stand beside."""
    return train.zero_stage == 3 and student.adapter is None


def load_parts(path: str | Path, dtype: torch.dtype, train: Train, offload_dir: Path | None = None) -> PreTrainedModel:
    """The student of a folder or Hub id in train mode, of whose parameters this rank holds its part alone.

    Together the ranks hold one copy in `dtype`, on their devices, or in host memory with train.offload_params cpu, or
    in files of `offload_dir` with nvme.
    At most one whole parameter exists at a time, while the model is built. All ranks call it at the same time.
    Errors: as load_student; ModelError too when the files lack a parameter or have it in another shape.
    """
    from deepspeed.runtime.zero.partition_parameters import DeepSpeedTensorOverride, Init

    folder, config, _ = check_student(path)
    places = offload_places(train, offload_dir)
    places.pop("offload_optimizer", None)
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3, **places}}
    settings["bf16"] = {"enabled": dtype == torch.bfloat16}  # else float32
    build = partial(AutoModelForCausalLM.from_config, config, dtype=dtype, attn_implementation=attention.NAME)
    if train.offload_params == "nvme":
        with torch.device("meta"):
            swapped.settle(build(), settings["zero_optimization"])
        init = swapped.initializer(settings, dtype)
    else:
        # Buffers keep their own dtype: rotary frequencies in bfloat16 would turn long traces' positions into noise.
        init = Init(config_dict_or_path=settings, tensor_overrides=[DeepSpeedTensorOverride.device])
    with init, no_init_weights():
        model = build()
    model.tie_weights()
    files = {name: (file, entry) for file in weight_files(folder) for name, entry in read_header(file).items()}
    for name, parameter in model.named_parameters():
        if name not in files:
            raise ModelError(
                "the weight files lack a parameter of the model",
                where=str(folder),
                value=name,
                remedy="Save the whole model (with its head, unless it is tied) with save_pretrained.",
            )
        with swapped.in_memory(parameter):
            _read_part(*files[name], name, parameter)
    return model.train()


@torch.no_grad()
def _read_part(file: Path, entry: dict, name: str, parameter: nn.Parameter) -> None:
    """Fills this rank's run of the parameter; the last ranks' runs may reach past its end, or lie behind it."""
    if entry["shape"] != list(parameter.ds_shape) or entry["dtype"] not in DTYPES:
        raise ModelError(
            f"{name} is {entry['dtype']} {entry['shape']}, the config says {list(parameter.ds_shape)}",
            where=str(file),
            remedy="Use the config.json that was saved with these weights, and weights of 16 bits or more.",
        )
    part, dtype = parameter.ds_tensor, DTYPES[entry["dtype"]]
    first = part.numel() * parameter.ds_process_group.rank()
    count = min(part.numel(), prod(entry["shape"]) - first)
    if count <= 0:
        return
    with file.open("rb") as stream:
        (header_bytes,) = struct.unpack("<Q", stream.read(8))
        stream.seek(8 + header_bytes + entry["data_offsets"][0] + first * dtype.itemsize)
        raw = bytearray(count * dtype.itemsize)
        stream.readinto(raw)
    part[:count].copy_(torch.frombuffer(raw, dtype=dtype))
