"""The multi-token prediction module of a DeepSeek-V3 checkpoint: a guess at the token after the next.

The checkpoint keeps it as one more layer (61 in DeepSeek-R1) with three norms and a projection of its own (DeepSeek-V3,
arXiv:2412.19437, section 2.2): from the model's final hidden state h_i and the token that was drawn after position i,

    x_i = W [norm_e(embedding(token_{i+1})); norm_h(h_i)],   logits of token_{i+2} = head(norm(layer(x_0 .. x_i)))

Embedding and head are the model's own. Its latents are cached like those of any layer: position i in slot i.

Shape legend: T tokens, A rows, E hidden size, L latent size, G pages of a row.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer, DeepseekV3RMSNorm

from distill.errors import ModelError
from distill.split import Split
from teachers.paged import PagePool
from teachers.runner import Runner, Segment
from teachers.shard import pieces
from teachers.slices import LoadReport, SliceReader, block_of, fill


def load(config: dict, folder: Path, model: nn.Module) -> nn.Module:
    """The module's weights, in the model's dtype and on its device. ModelError if the checkpoint does not hold it.

    config: the checkpoint's config.json; model: the DeepseekV3ForCausalLM that was loaded from it.
    """
    number, reader = model.config.num_hidden_layers, SliceReader(folder, block_of(config, folder))
    if f"model.layers.{number}.eh_proj.weight" not in reader:
        raise ModelError(
            "the checkpoint has no multi-token prediction module",
            where=f"{folder}: model.layers.{number}.eh_proj.weight",
            remedy="Set teacher.speculative to null, or use a checkpoint that was published with the module.",
        )
    size, eps = model.config.hidden_size, model.config.rms_norm_eps
    with torch.device("meta"):
        layer = DeepseekV3DecoderLayer(model.config, number)
        layer.enorm, layer.hnorm = DeepseekV3RMSNorm(size, eps), DeepseekV3RMSNorm(size, eps)
        layer.eh_proj = nn.Linear(2 * size, size, bias=False)
        layer.shared_head = nn.ModuleDict({"norm": DeepseekV3RMSNorm(size, eps)})
    layer.to(model.dtype).to_empty(device=model.device)
    if hasattr(layer.mlp, "experts"):
        gate = layer.mlp.gate  # its correction bias is float32, as the reference keeps it
        gate.e_score_correction_bias = torch.zeros(model.config.n_routed_experts, device=model.device)
    inside = nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleDict({str(number): layer})})})
    fill(reader, pieces(inside, Split()), LoadReport())
    return layer.eval().requires_grad_(False)


class MtpRunner(Runner):
    """A runner that also guesses, over the same pages: the module is one more layer, the pool's last."""

    def __init__(self, model: nn.Module, module: nn.Module, vocab_size: int | None = None):
        super().__init__(model, vocab_size)
        self.module = [(len(self.layers), self._layer(module))]
        self.token_norm, self.hidden_norm = module.enorm.weight, module.hnorm.weight
        self.join, self.guess_norm = module.eh_proj.weight, module.shared_head["norm"].weight

    @torch.inference_mode()
    def prepare_guesses(
        self, next_T: Tensor, hidden_TE: Tensor, positions_T: Tensor, segments: list[Segment], pool: PagePool,
        slots_T: Tensor,
    ) -> None:  # fmt: skip
        """Fills the module's latents of prefilled tokens with final hidden states hidden_TE and successors next_T."""
        attend = lambda i, layer, x_TE: self._attend_prefill(i, layer, x_TE, positions_T, segments, pool, slots_T)  # noqa: E731
        self._guess(next_T, hidden_TE, attend, self.everyone)

    @torch.inference_mode()
    def guess_hidden(
        self, next_A: Tensor, hidden_AE: Tensor, lengths_A: Tensor, tables_AG: Tensor, active_1: Tensor, pool: PagePool
    ) -> Tensor:
        """What `logits` turns into guesses at the tokens after next_A, [A, E]; hidden_AE are the final hidden states of
        the tokens before next_A, which lie at lengths_A of their rows."""
        slots_A = self.slots_of(lengths_A, tables_AG, active_1, pool)
        attend = lambda i, layer, x_AE: self._attend_decode(i, layer, x_AE, lengths_A, slots_A, tables_AG, pool)  # noqa: E731
        parts = self._guess(next_A, hidden_AE, attend, active_1)
        return self.ops.add_norm(*parts, active_1, self.guess_norm, self.eps)

    def _guess(self, next_T: Tensor, hidden_TE: Tensor, attend: Callable, active_1: Tensor) -> tuple:
        norm = lambda x_TE, weight_E: self.ops.add_norm(x_TE, None, None, None, weight_E, self.eps)  # noqa: E731
        both = norm(F.embedding(next_T, self.embed), self.token_norm), norm(hidden_TE, self.hidden_norm)
        return self._through(self.module, F.linear(torch.cat(both, dim=1), self.join), attend, active_1)
