"""Any task of lm-eval on a published folder, on the teacher or on a base: `python -m distill.evals.lm_eval_model`.

The tokenizer is taken exactly as tokenizer.json says, the weights from safetensors alone, and nothing is downloaded for
a local folder. A completion that begins inside `<think>` is scored by its answer: stop strings count after `</think>`
only, and one that never got there is an empty answer. Needs the extra `lm-eval`.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.errors import ConfigError, DataError, DistillError

if find_spec("lm_eval") is None:
    _missing = ConfigError(
        "lm-eval is not installed",
        where="distill.evals.lm_eval_model",
        remedy='Run pip install -c constraints.txt -e ".[lm-eval]".',
    )
    if __name__ == "__main__":
        sys.exit(f"error: {_missing}")
    raise _missing

import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, make_table
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from distill.checkpoints import check_checkpoint, resolve_checkpoint
from distill.generate import Generator
from distill.records import CaptureSpec, SampleRequest, SamplingParams, sample_seed
from distill.slots import SlotModel
from distill.tokens import PREFILL, THINK_OPEN, load_tokenizer, split_thinking, stop_ids

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

log = logging.getLogger(__name__)
TOP_TWO = CaptureSpec(k_max=2, tail_bound=0.0)  # the most likely token, and the one that is scored
FIRST_ROUND_TOKENS = 64
SCORED_TOGETHER = 256
NEW_TOKENS = 256  # lm-eval's own budget for tasks that name none


@dataclass
class _Row:
    """One completion under way."""

    index: int
    prompt_ids: list[int]
    thinks: bool
    ids: list[int] = field(default_factory=list)


@register_model("distill")
class DistillLM(TemplateLM):
    """A causal model of a local folder or Hub id, as lm-eval asks for one.

    device "auto" takes a GPU where there is one; dtype "auto" is bfloat16 on a GPU and float32 on a CPU. batch_size:
    completions in flight. seed: of tasks that sample. keep_thinking: return the reasoning too, and stop inside it.
    """

    def __init__(
        self,
        path: str,
        *,
        device: str | None = "auto",
        dtype: str = "auto",
        batch_size: int = 64,
        seed: int = 0,
        keep_thinking: bool = False,
        max_batch_size: int | None = None,  # lm-eval hands it to every model
    ):
        super().__init__()
        if device in (None, "auto"):
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if dtype == "auto":
            dtype = "bfloat16" if device.startswith("cuda") else "float32"
        folder = resolve_checkpoint(path)
        check_checkpoint(folder)
        self.path, self.seed, self.keep_thinking, self._device = str(path), seed, keep_thinking, torch.device(device)
        self.tokenizer = load_tokenizer(folder)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), trust_remote_code=False, local_files_only=True, use_safetensors=True
        )
        self._slots = SlotModel(model.to(self._device).eval(), max(self.tokenizer.get_vocab().values()) + 1)
        self._generator = Generator(self._slots, int(batch_size), stop_ids(self.tokenizer))
        self.cut_contexts = 0  # contexts that lost their beginning because they were too long

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What a text without context is conditioned on: the beginning of sequence, or its end where there is none."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        """Tokens of context and continuation together."""
        return self._slots.max_positions

    @property
    def tokenizer_name(self) -> str:
        return self.path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: object) -> list[int]:
        """Ids; special tokens as the tokenizer's own rule adds them, unless the text has them or False is given."""
        bos = self.tokenizer.bos_token
        if add_special_tokens is None:
            add_special_tokens = not (bos and string.startswith(bos))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as text; it ends with "<think>\\n" where the model is to answer, as in training."""
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        if not add_generation_prompt or text.endswith(PREFILL):
            return text
        return text.removesuffix(THINK_OPEN) + PREFILL

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: object
    ) -> list[tuple[float, bool]]:
        """For each (_, context ids, continuation ids): the sum of log-probabilities in nats, and whether all are top-1.

        float32 log-softmax over the tokenizer's own tokens: padded rows of the head get no mass.
        """
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        pairs = [self._fitted(context, continuation) for _, context, continuation in requests]
        by_length = sorted((i for i, pair in enumerate(pairs) if pair[1]), key=lambda i: -sum(map(len, pairs[i])))
        with tqdm(total=len(by_length), desc="loglikelihood", unit="text", disable=disable_tqdm) as bar:
            for start in range(0, len(by_length), SCORED_TOGETHER):
                chunk = by_length[start : start + SCORED_TOGETHER]
                for i, dists in zip(chunk, self._generator.score([pairs[i] for i in chunk], TOP_TWO)):
                    begins_T = dists.offsets_T1[:-1]
                    top_T = dists.ids_S[begins_T] == dists.sampled_T
                    second_T = (begins_T + 1).clip(max=len(dists.ids_S) - 1)
                    nats_T = dists.logprobs_S[begins_T].astype("float64")
                    nats_T[~top_T] = dists.logprobs_S[second_T[~top_T]]
                    answers[i] = float(nats_T.sum()), bool(top_T.all())
                    if isinstance(requests[i][0], tuple):
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], answers[i])
                bar.update(len(chunk))
        return answers

    def _fitted(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """The pair, its context cut from the left where both do not fit; never without a context."""
        room = self.max_length - len(continuation)
        if room < 1:
            raise DataError(
                f"a continuation of {len(continuation)} tokens leaves no room for a context",
                value=self.max_length,
                remedy="Leave the task out: this model has too few positions.",
            )
        return self._cut(context or [self.prefix_token_id], room), continuation

    def _cut(self, context: list[int], room: int) -> list[int]:
        if len(context) > room:
            self.cut_contexts += 1
            if self.cut_contexts == 1:
                log.warning("a context of %d tokens is cut to its last %d; more may follow", len(context), room)
        return context[-room:]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """For each text, the sum of log-probabilities of all its tokens in nats: windows overlap by one token."""
        windows = [
            [
                make_disjoint_window(pair)
                for pair in get_rolling_token_windows(
                    self.tok_encode(text), self.prefix_token_id, max_seq_len=self.max_length - 1, context_len=1
                )
            ]
            for (text,) in (request.args for request in requests)
        ]
        flat = [(None, context, tokens) for each in windows for context, tokens in each]
        scored = iter(self._loglikelihood_tokens(flat, disable_tqdm))
        answers = [sum(next(scored)[0] for _ in each) for each in windows]
        for request, answer in zip(requests, answers):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
        return answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """For each (context, settings): what the model writes up to a stop string, an end token or the budget.

        Settings: until, max_gen_toks, do_sample, temperature, top_p, top_k. Any other is a DataError, not ignored.
        """
        answers = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        with tqdm(total=len(requests), desc="generate_until", unit="text", disable=disable_tqdm) as bar:
            for settings, indices in groups.items():
                params, until = _generation(json.loads(settings))
                rows = [self._row(index, requests[index].args[0], params.max_new_tokens) for index in indices]
                for index, text in self._complete(rows, params, until):
                    answers[index] = text
                    self.cache_hook.add_partial("generate_until", requests[index].args, text)
                    bar.update()
        return answers

    def _row(self, index: int, context: str, new_tokens: int) -> _Row:
        room = self.max_length - new_tokens
        if room < 1:
            raise DataError(
                f"a budget of {new_tokens} new tokens leaves no room for a prompt",
                value=self.max_length,
                remedy="Lower it: --gen-kwargs max_gen_toks=N.",
            )
        thinks = context.rstrip("\n").endswith(THINK_OPEN) and not self.keep_thinking
        return _Row(index, self._cut(self.tok_encode(context) or [self.prefix_token_id], room), thinks)

    def _complete(self, rows: list[_Row], params: SamplingParams, until: list[str]) -> Iterator[tuple[int, str]]:
        """(index, text) as rows finish. Rounds of doubling length: what holds a stop string leaves between rounds."""
        drawn, budget = 0, FIRST_ROUND_TOKENS if until else params.max_new_tokens
        while rows:
            tokens = min(budget, params.max_new_tokens - drawn)
            last = drawn + tokens == params.max_new_tokens
            waiting, by_key = [], {str(row.index): row for row in rows}
            asked = [
                SampleRequest(key, drawn, (*row.prompt_ids, *row.ids), sample_seed(self.seed, key, drawn))
                for key, row in by_key.items()
            ]
            for sample in self._generator.sample(asked, _with_budget(params, tokens)):
                row, ended = by_key[sample.key], sample.finish_reason == "stop"
                row.ids += sample.completion_ids[:-1] if ended else sample.completion_ids
                text = self.tokenizer.decode(row.ids, skip_special_tokens=True)
                if row.thinks:
                    text = split_thinking(text)[1] or ""
                stops = [at for at in map(text.find, until) if at >= 0]
                if stops or ended or last:
                    yield row.index, text[: min(stops, default=None)]
                else:
                    waiting.append(row)
            rows, drawn, budget = waiting, drawn + tokens, budget * 2


def _with_budget(params: SamplingParams, tokens: int) -> SamplingParams:
    return SamplingParams(params.temperature, params.top_p, params.top_k, tokens)


def _generation(settings: dict[str, Any]) -> tuple[SamplingParams, list[str]]:
    """A task's generation settings as (SamplingParams, stop strings)."""
    given = normalize_gen_kwargs(settings, NEW_TOKENS)
    until, tokens, sampled = given.pop("until", []), given.pop("max_gen_toks"), given.pop("do_sample", False)
    temperature = given.pop("temperature", 0.0)
    top_p, top_k = given.pop("top_p", 1.0), given.pop("top_k", 0)
    if given:
        raise DataError(
            "the task asks for generation settings that this model does not have",
            value=given,
            remedy="Override them: --gen-kwargs with temperature, top_p, top_k, max_gen_toks or until.",
        )
    params = SamplingParams(float(temperature) if sampled else 0.0, float(top_p), max(0, int(top_k)), int(tokens))
    return params, [each for each in until if each]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m distill.evals.lm_eval_model", description=main.__doc__)
    made.add_argument(
        "--model", nargs="+", required=True, metavar="DIR", help="folders or Hub ids, one after the other"
    )
    made.add_argument("--tasks", required=True, metavar="A,B", help="names of tasks, of lm-eval or of --include-path")
    made.add_argument("--include-path", metavar="DIR", help="a folder with task files (YAML) of your own")
    made.add_argument("--chat", action="store_true", help="ask through the chat template, as in training")
    made.add_argument("--num-fewshot", type=int, help="examples in the context; the task's own number if not given")
    made.add_argument("--limit", type=float, help="first documents of each task only")
    made.add_argument("--gen-kwargs", metavar="A=B,...", help="generation settings, over those of the task")
    made.add_argument("--keep-thinking", action="store_true", help="score the reasoning too, not the answer alone")
    made.add_argument("--device", default="auto", help="cpu, cuda or auto")
    made.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    made.add_argument("--batch-size", type=int, default=64, help="completions in flight")
    made.add_argument("--seed", type=int, default=0, help="seed of tasks that sample")
    made.add_argument("--out", metavar="FILE", help="also write the results as JSON")
    return made


def main(argv: list[str] | None = None) -> int:
    """Runs lm-eval tasks on published folders and prints a table for each; the exit status."""
    args = parser().parse_args(argv)
    found: dict[str, Any] = {}
    try:
        manager = TaskManager(include_path=args.include_path)
        names = args.tasks.split(",")
        if unknown := [name for name in names if not manager.match_tasks([name])]:
            raise ConfigError(
                "no such task", where="--tasks", value=unknown, remedy="See `lm-eval ls tasks`, or give --include-path."
            )
        for path in args.model:
            found[path] = _evaluate(path, names, manager, args)
            print(f"\n{path}\n{make_table(found[path])}", flush=True)
    except DistillError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if args.out:
        kept = {path: {key: each[key] for key in ("results", "n-samples", "versions")} for path, each in found.items()}
        Path(args.out).write_text(json.dumps(kept, indent=2, default=str) + "\n", encoding="utf-8")
    return 0


def _evaluate(path: str, tasks: list[str], manager: TaskManager, args: argparse.Namespace) -> dict[str, Any]:
    lm = DistillLM(
        path,
        device=args.device,
        dtype=args.dtype,
        batch_size=args.batch_size,
        seed=args.seed,
        keep_thinking=args.keep_thinking,
    )
    results = simple_evaluate(
        lm,
        tasks=tasks,
        task_manager=manager,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        gen_kwargs=args.gen_kwargs,
        apply_chat_template=args.chat,
        log_samples=False,
    )
    if lm.cut_contexts:
        log.warning("%s: %d contexts were too long and lost their beginning", path, lm.cut_contexts)
    return results


if __name__ == "__main__":
    sys.exit(main())
