"""Load a dense student: weights from safetensors, the packed attention, the tokenizer that fits."""

from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from distill import align_fit
from distill.checkpoints import check_checkpoint, resolve_checkpoint
from distill.config import Config
from distill.errors import ModelError
from distill.tokens import load_tokenizer
from students import attention

FAMILIES = ("qwen2", "qwen3", "llama")
SAFELY = {"trust_remote_code": False, "local_files_only": True}


def train_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of weights in the forward pass; "auto" is bfloat16 on a GPU and float32 on a CPU."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return getattr(torch, name)


def load_student(
    path: str | Path, dtype: torch.dtype = torch.float32, *, packed: bool = True
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """(model in train mode on CPU, its tokenizer) of a folder or Hub id. No remote code and no pickle is ever run.

    packed: the attention of training, which takes traces one behind the other; else rows with a mask, for evaluation.

    Errors: ModelError when the checkpoint is damaged or not safetensors, the architecture is not a dense Qwen2, Qwen3
    or Llama with full attention, or the embedding has fewer rows than the tokenizer has ids.
    """
    folder, config, tokenizer = check_student(path)
    implementation = attention.NAME if packed else "sdpa"
    model = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=dtype, use_safetensors=True, attn_implementation=implementation, **SAFELY
    )
    return model.train(), tokenizer


def check_students(config: Config) -> None:
    """Returns if every student can be loaded, and take what this teacher says: asked before the hours that traces take.
    A checkpoint that has to be fetched first is judged when it is trained. Errors: those of load_student and align_fit.
    """
    for student in config.students:
        if Path(student.path).is_dir():
            check_student(student.path)
    align_fit.check_tokenizers(config)


def check_student(path: str | Path) -> tuple[Path, PretrainedConfig, PreTrainedTokenizerFast]:
    """(folder, config, tokenizer) of a checkpoint that `load_student` can load; the errors are its."""
    folder = resolve_checkpoint(path)
    found = check_checkpoint(folder)
    if found["model_type"] not in FAMILIES:
        raise ModelError(
            "a student must be a dense language model of one of the families " + ", ".join(FAMILIES),
            where=str(folder),
            value=found["model_type"],
            remedy="Set students.N.path to a Qwen2, Qwen2.5, Qwen3 or Llama checkpoint.",
        )
    try:
        config = AutoConfig.from_pretrained(folder, **SAFELY)
    except (ValueError, TypeError, StrictDataclassError) as error:
        remedy = "Copy config.json again from where the model is published."
        raise ModelError(f"the config is refused: {error}", where=f"{folder}/config.json", remedy=remedy) from error
    _check_architecture(config, folder)
    tokenizer = load_tokenizer(folder)
    check_vocabulary(config.vocab_size, tokenizer, folder)
    return folder, config, tokenizer


def check_vocabulary(rows: int, tokenizer: PreTrainedTokenizerFast, path: str | Path) -> None:
    """Returns if each of the tokenizer's ids has a row; ModelError otherwise. More rows than ids is usual: padding."""
    needed = max(tokenizer.get_vocab().values()) + 1
    if rows < needed:
        raise ModelError(
            f"the embedding has {rows} rows but the tokenizer has ids up to {needed - 1}",
            where=str(path),
            remedy="The tokenizer belongs to another model: use the one that was saved with these weights.",
        )


def _check_architecture(config, path: str | Path) -> None:
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    if layers != {"full_attention"}:
        raise ModelError(
            "only full attention is trained; this model has other layers",
            where=f"{path}/config.json layer_types",
            value=sorted(layers),
            remedy="Use a checkpoint without sliding-window layers.",
        )
    if dropout := getattr(config, "attention_dropout", 0.0):
        raise ModelError(
            "attention dropout is not applied to packed traces",
            where=f"{path}/config.json attention_dropout",
            value=dropout,
            remedy="Set it to 0.0.",
        )
