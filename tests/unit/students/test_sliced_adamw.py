"""AdamW in slices: equal to torch's where it should be, close where it rounds, the same after a resume."""

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy

from students import sliced_adamw
from students.sliced_adamw import SlicedAdamW, round_at_random

OPTIONS = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def parameters(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((40, 33), (700,), (3, 5, 7))]


def run(optimizer, weights, steps, first=0):
    for step in range(first, first + steps):
        torch.manual_seed(1000 + step)
        for weight in weights:
            weight.grad = torch.randn(weight.shape).to(weight.dtype)
        optimizer.step()


@pytest.fixture
def small_slices(monkeypatch):
    monkeypatch.setattr(sliced_adamw, "SLICE", 512)  # two blocks: every weight above has several slices or one part


def test_wide_moments_and_weights_equal_torch_bit_for_bit(small_slices):
    mine, theirs = parameters(), parameters()
    run(SlicedAdamW(mine, **OPTIONS), mine, 7)
    run(torch.optim.AdamW(theirs, **OPTIONS, fused=True), theirs, 7)
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs))


def test_a_slice_is_as_good_as_the_whole(small_slices, monkeypatch):
    sliced = parameters()
    run(SlicedAdamW([{"params": sliced, "moment_bits": 8}], **OPTIONS), sliced, 5)
    monkeypatch.setattr(sliced_adamw, "SLICE", 1 << 20)
    whole = parameters()
    run(SlicedAdamW([{"params": whole, "moment_bits": 8}], **OPTIONS), whole, 5)
    assert all(torch.equal(a, b) for a, b in zip(sliced, whole))


def test_one_narrow_step_by_hand():
    """At the first step the moments are gradient and its square times 1 - beta, and their ratio is the sign."""
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5, 3.0]))
    weight.grad = torch.tensor([0.3, -0.2, 0.0, 5.0])
    SlicedAdamW([{"params": [weight], "moment_bits": 8}], **OPTIONS).step()
    expected = torch.tensor([1 - 0.01, -2 + 0.01, 0.5, 3 - 0.01]) - 0.01 * 0.1 * torch.tensor([1.0, -2.0, 0.5, 3.0])
    assert (weight - expected).abs().max() < 2e-5


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumed_equals_uninterrupted_bit_for_bit(small_slices, bits, dtype, tmp_path):
    whole = parameters(dtype)
    run(SlicedAdamW([{"params": whole, "moment_bits": bits}], **OPTIONS), whole, 9)
    weights = parameters(dtype)
    first = SlicedAdamW([{"params": weights, "moment_bits": bits}], **OPTIONS)
    run(first, weights, 4)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    again = [torch.nn.Parameter(weight.detach().clone()) for weight in weights]
    resumed = SlicedAdamW([{"params": again, "moment_bits": bits}], **{**OPTIONS, "lr": 1.0})
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    run(resumed, again, 5, first=4)
    assert all(torch.equal(a, b) for a, b in zip(again, whole))


def test_a_loaded_state_is_a_copy_and_of_its_own_dtypes():
    weights = parameters(torch.bfloat16)
    optimizer = SlicedAdamW([{"params": weights, "moment_bits": 8}], **OPTIONS)
    run(optimizer, weights, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    held = optimizer.state_dict()
    optimizer.load_state_dict(held)
    run(optimizer, weights, 1, first=2)
    assert all(
        torch.equal(held["state"][i][name], saved["state"][i][name])
        for i in saved["state"]
        for name in ("codes1", "scales1", "codes2", "scales2")
    )
    assert {t.dtype for t in optimizer.state[weights[0]].values() if torch.is_tensor(t)} == {torch.uint8, torch.float32}
    with pytest.raises(ValueError, match="3 parameters, the optimizer has 2"):
        SlicedAdamW(weights[:2], **OPTIONS).load_state_dict(held)


def test_widened_codes_are_the_numbers_and_given_moments_the_nearest_codes(small_slices):
    """Moments that were codes are found again but for rounding; those of 32 bits are kept as they are."""
    weights = parameters()
    groups = [{"params": weights[:2], "moment_bits": 8}, {"params": weights[2:]}]
    optimizer = SlicedAdamW(groups, **OPTIONS)
    run(optimizer, weights, 3)
    expected = [sliced_adamw.widened(optimizer.state[weight]) for weight in weights]
    other = SlicedAdamW(groups, **OPTIONS)
    for weight, group, wide in zip(weights, [groups[0], *groups], expected):
        other.set_moments(weight, group, 3, [wide[name] for name in sliced_adamw.MOMENTS])
        found = sliced_adamw.widened(other.state[weight])
        assert found["step"] == 3 and wide["exp_avg"].abs().max() > 0
        for name, gap in (("exp_avg", 0.0142), ("exp_avg_sq", 0.0071)):  # between codes, over the block's largest
            gap = 0.0 if group is groups[1] else gap
            for got, want in zip(found[name].split(sliced_adamw.BLOCK), wide[name].split(sliced_adamw.BLOCK)):
                assert (got - want).abs().max() <= gap / 2 * want.abs().max()


def test_random_rounding_is_right_on_average_and_exact_on_bfloat16():
    exact = torch.randn(1000).bfloat16().float()
    assert torch.equal(round_at_random(exact, 3).float(), exact)
    for value in (1.0 + 2**-9, -(1.0 + 2**-9), 3.1415926, -1e-20, 6.5e4):
        wide = torch.full((200_000,), value)
        narrow = round_at_random(wide, 5)
        around = narrow.unique().float()
        step = float(around[-1] - around[0])
        assert len(around) == 2 and around[0] < value < around[1]
        # the share of one of two outcomes has a standard deviation of at most 0.5 / sqrt(n)
        assert abs(float(narrow.double().mean()) - float(wide[0].double())) < 5 * step * 0.5 / 200_000**0.5
    assert torch.equal(round_at_random(wide, 5), narrow) and not torch.equal(round_at_random(wide, 6), narrow)


def test_updates_too_small_for_bfloat16_add_up():
    """200 steps of 1e-4 from 1.0, where bfloat16 knows 1.0 and 0.99609: to the nearest nothing would ever move."""
    weight = torch.nn.Parameter(torch.ones(1 << 16, dtype=torch.bfloat16))
    optimizer = SlicedAdamW([weight], **{**OPTIONS, "lr": 1e-4, "weight_decay": 0.0})
    for _ in range(200):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    # a weight goes down 0.0039 with probability 0.0256 a step: the mean of 65536 has a standard deviation of 3.4e-5
    assert float(weight.detach().double().mean()) == pytest.approx(1 - 200e-4, abs=2e-4)


def test_narrow_states_take_two_bytes_and_a_64th_of_a_float_a_weight():
    weight = torch.nn.Parameter(torch.zeros(256 * 100))
    optimizer = SlicedAdamW([{"params": [weight], "moment_bits": 8}], **OPTIONS)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    held = sum(t.numel() * t.element_size() for t in optimizer.state[weight].values() if torch.is_tensor(t))
    assert held == weight.numel() * (2 + 2 * 4 / 256)


def test_a_small_student_learns_with_narrow_states_as_with_wide_ones():
    """30 steps on a two-layer network: the losses stay within 2 % of those of float32 AdamW."""
    losses = {}
    for bits in (32, 8):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(20, 128), torch.nn.Tanh(), torch.nn.Linear(128, 50))
        inputs, labels = torch.randn(256, 20), torch.randint(0, 50, (256,))
        groups = [{"params": list(net.parameters()), "moment_bits": bits}]
        optimizer, losses[bits] = SlicedAdamW(groups, **OPTIONS), []
        for _ in range(30):
            loss = cross_entropy(net(inputs), labels)
            losses[bits].append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert losses[32][-1] < losses[32][0] / 2
    assert losses[8] == pytest.approx(losses[32], rel=0.02)
    assert losses[8] != losses[32]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pages_change_nothing_and_resume_exactly_on_a_gpu(dtype, tmp_path):
    """Weights large enough for bitsandbytes to page (100,000 numbers and more); a GPU draws the same numbers again."""

    def drawn(seed):
        return torch.randn(400, 512, generator=torch.Generator().manual_seed(seed))

    def begin(paged):
        weights = [torch.nn.Parameter(drawn(0).to("cuda", dtype))]
        return weights, SlicedAdamW([{"params": weights, "moment_bits": 8}], **OPTIONS, paged=paged)

    def advance(weights, optimizer, first, steps):
        for step in range(first, first + steps):
            weights[0].grad = drawn(step).to("cuda", dtype)
            optimizer.step()
        torch.cuda.synchronize()

    (plain, one), (paged, two) = begin(False), begin(True)
    advance(plain, one, 0, 6)
    advance(paged, two, 0, 3)
    torch.save({"weight": paged[0].detach(), "optimizer": two.state_dict()}, tmp_path / "state.pt")
    held = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed, three = begin(True)
    resumed[0].data.copy_(held["weight"])
    three.load_state_dict(held["optimizer"])
    advance(resumed, three, 3, 3)
    assert torch.equal(resumed[0], plain[0])
    on_cpu = [torch.nn.Parameter(drawn(0))]
    beside = SlicedAdamW([{"params": on_cpu, "moment_bits": 8}], **OPTIONS)
    for step in range(6):
        on_cpu[0].grad = drawn(step).to(dtype).float()
        beside.step()
    # six updates of about lr each; a bfloat16 weight around 1 has steps of 0.008, of which it takes one or the other
    assert (plain[0].cpu().float() - on_cpu[0]).abs().mean() < (1e-4 if dtype == torch.float32 else 0.01)
