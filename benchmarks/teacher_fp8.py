"""bench_teacher's model with its routed experts in block-scaled FP8, as R1's checkpoint stores them."""

from torch import Tensor, nn

from teachers.runner import Runner
from teachers.scaled import BLOCK, FLOAT8, ScaledWeights

LARGEST = 448.0  # of e4m3


def to_fp8(model: nn.Module, runner: Runner) -> None:
    """Quantises the routed experts of a runner and drops those of the model that it was made from."""
    for module, layer in zip(model.model.layers, runner.layers):
        if layer.experts:
            layer.experts.gate_up = quantised(layer.experts.gate_up, 2)
            layer.experts.down = quantised(layer.experts.down, 1)
            for parameter in module.mlp.experts.parameters():
                parameter.data = parameter.data.new_empty(0)


def quantised(weights_XNK: Tensor, parts: int) -> ScaledWeights:
    """The largest magnitude of every block becomes 448. The sizes must be whole blocks."""
    experts, rows, columns = weights_XNK.shape
    found = ScaledWeights.empty(experts, parts, rows // parts, columns, weights_XNK.device)
    for values_PNK, scales_PRC, matrix_NK in zip(found.values_XPNK, found.scales_XPRC, weights_XNK):
        blocks_PRBCB = matrix_NK.view(parts, -1, BLOCK, columns // BLOCK, BLOCK).float()
        scales_PRC.copy_(blocks_PRBCB.abs().amax((2, 4)) / LARGEST)
        scaled_PRBCB = blocks_PRBCB / scales_PRC[:, :, None, :, None]
        values_PNK.copy_(scaled_PRBCB.clamp(-LARGEST, LARGEST).reshape(values_PNK.shape).to(FLOAT8))
    return found
