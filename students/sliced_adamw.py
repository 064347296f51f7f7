"""AdamW one slice of a weight at a time: moments of 8 bits, and bfloat16 weights without a wider copy.

Moments of 8 bits are bitsandbytes' codes with one float32 scale a block of 256 numbers. Its own optimizer counts the
elements of a tensor in 32 bits, and ZeRO hands over a whole model as one tensor: slices keep the kernel within its
range. Within a slice everything is computed in float32. A weight that is stored in bfloat16 is then rounded at random
to one of its two neighbours, the nearer the likelier: updates smaller than a step of bfloat16, which rounding to the
nearest would all drop, add up as they should on average.
"""

from collections.abc import Sequence
from functools import cache
from zlib import crc32

import torch
from torch.optim.adamw import adamw

from distill.errors import CapacityError

SLICE = 1 << 26  # elements; a multiple of BLOCK
BLOCK = 256
MOMENTS = ("exp_avg", "exp_avg_sq")  # of float32, by the names that every Adam has for them


class SlicedAdamW(torch.optim.Optimizer):
    """AdamW for float32 or bfloat16 weights. A group's `moment_bits` is 32 (default) or 8.

    The random rounding is a function of step, parameter and position, so that a resumed training rounds as an
    uninterrupted one and every rank rounds its copy of a weight alike. paged: 8-bit moments lie in memory that CUDA
    moves to the host when the GPU is full. Errors: CapacityError when bitsandbytes is needed and cannot be imported.
    """

    def __init__(self, groups, *, lr: float, betas: tuple, eps: float, weight_decay: float, paged: bool = False):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "moment_bits": 32}
        super().__init__(groups, defaults)
        self._paged = paged
        if any(group["moment_bits"] == 8 for group in self.param_groups):
            self._bitsandbytes = _import_bitsandbytes()

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.numel():
                    self._update(parameter, group)

    def _update(self, parameter: torch.Tensor, group: dict) -> None:
        state = self.state[parameter] or self._begin(parameter, group["moment_bits"])
        state["step"] += 1
        advance = self._advance_narrow if "codes1" in state else _advance_wide
        weights, gradients = parameter.detach().view(-1), parameter.grad.reshape(-1)
        for start in range(0, weights.numel(), SLICE):
            part = slice(start, start + SLICE)
            wide = weights[part].float()  # float32 weights: themselves
            advance(wide, gradients[part].float(), state, part, group)
            if weights.dtype == torch.bfloat16:
                # 32 bits: a CPU generator reads no more of its seed
                seed = crc32(f"{state['step']} {state['stream']} {start}".encode())
                weights[part] = round_at_random(wide, seed)

    def _begin(self, parameter: torch.Tensor, bits: int) -> dict:
        """The state of a parameter before its first step. `stream` sets its random numbers apart from the others'."""
        count, device = parameter.numel(), parameter.device
        state = {"step": 0, "stream": len(self.state)}
        if bits == 8:
            blocks = -(-count // BLOCK)
            for moment in "12":
                state[f"codes{moment}"] = self._codes(count, device)
                state[f"scales{moment}"] = torch.zeros(blocks, device=device)
        else:
            state |= {name: torch.zeros(count, device=device) for name in MOMENTS}
        self.state[parameter] = state
        return state

    def _codes(self, count: int, device: torch.device) -> torch.Tensor:
        """Codes that stand for anything: their scales are zero."""
        if not self._paged:
            return torch.zeros(count, dtype=torch.uint8, device=device)
        codes = self._bitsandbytes.get_paged(count, dtype=torch.uint8, device=device)
        self._bitsandbytes.fill(codes, 0)
        return codes

    def _advance_narrow(self, wide: torch.Tensor, gradient: torch.Tensor, state: dict, part: slice, group: dict):
        beta1, beta2 = group["betas"]
        codes = [state[f"codes{moment}"][part] for moment in "12"]
        for each in codes:
            each.is_paged = self._paged  # bitsandbytes asks the tensor itself, and a slice does not inherit it
        scales = [state[f"scales{moment}"][_blocks(part)] for moment in "12"]
        self._bitsandbytes.optimizer_update_8bit_blockwise(
            "adam", gradient, wide, *codes, beta1, beta2, 0.0, 0.0, group["eps"], state["step"], group["lr"],
            *_numbers(wide.device), *scales, group["weight_decay"],
        )  # fmt: skip

    def load_state_dict(self, state_dict: dict) -> None:
        """Restores what `state_dict` gave, each tensor in its own dtype: torch's would turn codes into weights' dtype.

        ValueError when the parameters are others than those that were saved.
        """
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        owners = [(parameter, group) for group in self.param_groups for parameter in group["params"]]
        if len(numbers) != len(owners):
            raise ValueError(f"the state is of {len(numbers)} parameters, the optimizer has {len(owners)}")
        for group, saved in zip(self.param_groups, state_dict["param_groups"]):
            group.update({name: value for name, value in saved.items() if name != "params"})
        self.state.clear()
        for number, (parameter, group) in zip(numbers, owners):
            if saved := state_dict["state"].get(number):
                state = self._begin(parameter, group["moment_bits"])
                for name, value in saved.items():
                    if torch.is_tensor(value):
                        state[name].copy_(value)
                    else:
                        state[name] = value

    def set_moments(self, parameter: torch.Tensor, group: dict, step: int, moments: Sequence[torch.Tensor]) -> None:
        """Gives a parameter of `group` these first and second moments, flat float32 on any device, after `step` steps.

        Moments of 8 bits are rounded to the nearest code of their block.
        """
        state = self._begin(parameter, group["moment_bits"])
        state["step"] = step
        for moment, name, wide in zip("12", MOMENTS, moments):
            if name in state:
                state[name].copy_(wide)
                continue
            numbers = _numbers(parameter.device)[int(moment) - 1]
            for start in range(0, wide.numel(), SLICE):
                part = slice(start, start + SLICE)
                near = wide[part].to(parameter.device)
                codes, scales = self._bitsandbytes.quantize_blockwise(near, code=numbers, blocksize=BLOCK)
                state[f"codes{moment}"][part] = codes
                state[f"scales{moment}"][_blocks(part)] = scales.absmax


def widened(state: dict) -> dict:
    """A parameter's state with moments of float32 in place of codes: the numbers that they stand for, exactly."""
    wide = {name: value for name, value in state.items() if not name.startswith(("codes", "scales"))}
    if len(wide) == len(state):
        return state
    for moment, name in zip("12", MOMENTS):
        codes, scales = state[f"codes{moment}"], state[f"scales{moment}"]
        numbers = _numbers(codes.device)[int(moment) - 1]
        wide[name] = torch.empty(codes.numel(), device=codes.device)
        for start in range(0, codes.numel(), SLICE):
            part = slice(start, start + SLICE)
            scale = scales[_blocks(part)].repeat_interleave(BLOCK)
            wide[name][part] = numbers[codes[part].int()] * scale[: codes[part].numel()]
    return wide


@cache
def _numbers(device: torch.device) -> list[torch.Tensor]:
    """What the 256 codes stand for, before scaling: of the first moment, -0.993 to 1, and of the second, 0 to 1."""
    maps = (_import_bitsandbytes().create_dynamic_map(signed=signed) for signed in (True, False))
    return [numbers.to(device) for numbers in maps]


def _blocks(part: slice) -> slice:
    """The blocks of a slice of elements that begins with a block."""
    return slice(part.start // BLOCK, -(-part.stop // BLOCK))


def _advance_wide(wide: torch.Tensor, gradient: torch.Tensor, state: dict, part: slice, group: dict) -> None:
    taken = torch.tensor(float(state["step"] - 1), device=wide.device)  # adamw adds the step itself
    moments = [[state["exp_avg"][part]], [state["exp_avg_sq"][part]], [], [taken]]
    beta1, beta2 = group["betas"]
    options = {"lr": group["lr"], "weight_decay": group["weight_decay"], "eps": group["eps"]}
    adamw([wide], [gradient], *moments, fused=True, amsgrad=False, beta1=beta1, beta2=beta2, maximize=False, **options)


def round_at_random(wide: torch.Tensor, seed: int) -> torch.Tensor:
    """bfloat16: of the two numbers around each float32, one at random, so that the mean is the float32 number itself.

    A bfloat16 is the upper half of a float32; a number of 16 random bits added to the lower half carries into the upper
    with just the probability that the lower half says.
    """
    generator = torch.Generator(wide.device).manual_seed(seed)
    noise = torch.randint(0, 1 << 16, wide.shape, dtype=torch.int32, device=wide.device, generator=generator)
    return noise.add_(wide.view(torch.int32)).bitwise_and_(-(1 << 16)).view(torch.float32).bfloat16()


def _import_bitsandbytes():
    try:
        import bitsandbytes.functional
    except ImportError as error:
        raise CapacityError(
            f"8-bit moments need bitsandbytes, which cannot be imported: {error}",
            where="train.optimizer",
            remedy="pip install bitsandbytes, or use train.optimizer=adamw.",
        ) from error
    return bitsandbytes.functional
