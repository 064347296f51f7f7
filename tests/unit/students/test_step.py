"""The loss of packed traces against the plain one: each trace alone through transformers, in float64."""

import json

import pytest
import torch
import torch.nn.functional as F
from student_world import make_model, make_stages, make_traces
from transformers import AutoModelForCausalLM

from distill.config import Train
from distill.errors import ModelError
from distill.losses.metrics import LossMetrics
from students.data import load_traces
from students.layers import prepare_layers
from students.model import load_student
from students.step import LossSettings, StudentStep


@pytest.fixture(scope="module", params=["qwen3", "qwen2", "llama"])
def packed(request, tmp_path_factory):
    """(folder, StudentStep, TraceData, one batch of all traces)."""
    root = tmp_path_factory.mktemp(request.param)
    make_model(root / "model", family=request.param, tie=request.param != "llama")
    model, tokenizer = load_student(root / "model")
    data = load_traces(*make_stages(root, tokenizer, make_traces(tokenizer, 8)), tokenizer, 96)
    batch = data.collate([list(range(len(data.examples)))], model.get_input_embeddings().weight.shape[0])
    return root / "model", StudentStep(model, LossSettings(alpha=0.7)), data, batch


def alone(folder, data):
    """Logits [M, V] in float64 at the trained positions, each trace in its own forward of the plain model."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").double()
    logits = []
    for example in data.examples:
        ids = torch.tensor([example.prompt_ids + example.completion_ids])
        logits.append(model(ids[:, :-1]).logits[0, len(example.prompt_ids) - 1 :])
    return model, torch.cat(logits)


def test_packed_logits_equal_those_of_each_trace_alone(packed):
    folder, step, data, batch = packed
    with torch.no_grad():
        _, expected = alone(folder, data)
        found = step.model.lm_head(step.hidden(batch)[batch.trained_M])
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 2e-5 * expected.abs().max()


def test_loss_metrics_and_gradients_equal_the_plain_formula(packed):
    folder, step, data, batch = packed
    model, logits = alone(folder, data)
    logp = logits.log_softmax(1)
    ce = F.nll_loss(logp, batch.labels_M, reduction="sum")
    targets, kl = batch.targets, 0
    for row in range(len(logp)):
        real = targets.logprobs_NK[row] > -torch.inf
        ids, t = targets.ids_NK[row][real], targets.logprobs_NK[row][real].double().exp()
        rest, tail = 1 - logp[row, ids].exp().sum(), targets.tail_N[row].double()
        t, tail = t / (t.sum() + tail), tail / (t.sum() + tail)  # stored masses are rounded
        kl = kl + (t * (t.log() - logp[row, ids])).sum() + (tail * (tail.log() - rest.log()) if tail > 0 else 0)
    total = (0.7 * kl + 0.3 * ce) / 1000
    total.backward()

    step.zero_grad()
    loss, sums = step(batch, 1000.0)
    loss.backward()
    metrics = LossMetrics.from_tensor(sums)
    assert float(metrics.tokens) == float(metrics.teacher_tokens) == len(batch.labels_M)
    assert float(metrics.ce) == pytest.approx(ce.item(), rel=1e-5)
    assert float(metrics.kl) == pytest.approx(kl.item(), rel=1e-5)
    assert loss.item() == pytest.approx(total.item(), rel=1e-5)
    expected = dict(model.named_parameters())
    for name, parameter in step.model.named_parameters():
        want = expected[name].grad
        assert (parameter.grad - want).abs().max() <= 2e-5 * want.abs().max(), name


@pytest.mark.parametrize("kept", ["attention", "products"])
@pytest.mark.parametrize("tiles", [1, 3])
def test_activation_checkpointing_and_tiles_change_no_gradient(packed, kept, tiles):
    _, step, _, batch = packed
    step.zero_grad()
    step(batch, 100.0)[0].backward()
    expected = {name: p.grad.clone() for name, p in step.named_parameters()}
    step.zero_grad()
    layers = step.model.base_model.layers
    plain, mlp = [layer.forward for layer in layers], type(layers[0].mlp)
    train = Train(activation_checkpointing=True, kept_activations=kept, mlp_tiles=tiles)
    prepare_layers(step.model, train, torch.device("cpu"))
    step(batch, 100.0)[0].backward()
    for layer, forward in zip(layers, plain):
        layer.forward, layer.mlp.__class__ = forward, mlp
    for name, parameter in step.named_parameters():
        if tiles == 1:
            assert torch.equal(parameter.grad, expected[name]), name
        else:  # a matrix's gradient is added up in another order
            assert (parameter.grad - expected[name]).abs().max() <= 3e-6 * expected[name].abs().max(), name


def test_a_batch_without_loss_has_zero_gradients(packed):
    _, step, data, _ = packed
    step.zero_grad()
    loss, sums = step(data.collate([], 400), 10.0)
    loss.backward()
    assert loss.item() == 0 and not sums.any()
    assert all(p.grad is not None and not p.grad.any() for p in step.parameters())


def test_checkpoints_that_are_no_student_are_refused(packed, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM

    from students.model import load_student

    folder = make_model(tmp_path / "other")
    GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=8, n_layer=1, n_head=1)).save_pretrained(folder)
    with pytest.raises(ModelError, match=r"dense language model.*gpt2"):
        load_student(folder)
    small = Qwen3Config(vocab_size=200, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    Qwen3ForCausalLM(small).save_pretrained(folder)
    with pytest.raises(ModelError, match="the embedding has 200 rows but the tokenizer has ids up to 329"):
        load_student(folder)


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"model_type": "wobble"}, "dense language model.*wobble"),
        ({"hidden_size": "wide"}, "the config is refused: .*hidden_size"),
        ({"rope_parameters": 5}, "the config is refused: .*rope_parameters"),
    ],
)
def test_a_config_that_makes_no_student_is_told_before_there_are_traces(tmp_path, changed, what):
    from types import SimpleNamespace

    from students.model import check_students

    folder = make_model(tmp_path / "other")
    config = SimpleNamespace(
        students=[SimpleNamespace(path=str(folder))], teacher=SimpleNamespace(path=str(folder), capture=None)
    )
    check_students(config)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises(ModelError, match=what) as error:
        check_students(config)
    assert str(folder) in str(error.value) and error.value.remedy
