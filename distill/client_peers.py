"""Other OpenAI-compatible servers (vLLM, SGLang) as a teacher: what they say is checked, never assumed.

A teacher's distribution is its own at temperature 1, before any filter, over token ids. Servers differ in all three:
some give log-probabilities after temperature and filters, some give raw logits, some name tokens by their text. Each is
found out by asking, before anything is sampled; after that, every answer is checked again as it comes.

Shape legend: T tokens, S support entries of all tokens together.
"""

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from distill.client_http import Http
from distill.errors import ServiceError
from distill.records import CaptureSpec, Sample, SampleRequest, SamplingParams, TokenDists
from distill.tokens import stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOKEN_ID = re.compile(r"token_id:(\d+)")
MASKED = -9000.0  # servers write -9999 for the minus infinity of a token that a filter removed
MASS_SLACK = 2e-3  # probabilities may add up to this much more than 1: logits of bfloat16, printed decimals
DRIFT_NATS = 0.3  # two runs of one prompt may differ by this much in another batch, in bfloat16
COMPARED = 8  # of the most likely tokens; the noise of the others is larger
PROBE_TOKENS = 16
PROBES = (SamplingParams(1.0, 1.0, 0, PROBE_TOKENS), SamplingParams(2.0, 0.5, 0, 1))
NO_LOGSUMEXP = "logsumexp is not given by this server: 0 is stored"
TAIL = "the tail is 1 minus the stored mass, so it is exact to about 1e-6 only"
BATCH = "samples may depend on what else the server runs: the same seed need not give the same sample again"


def completion_request(model: str, request: SampleRequest, params: SamplingParams) -> dict:
    """What every server is told of one sample in /v1/completions."""
    return {
        "model": model,
        "prompt": list(request.prompt_ids),
        "max_tokens": params.max_new_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "min_p": params.min_p,
        "seed": request.seed,
        "return_token_ids": True,
    }


class PeerServer:
    """A server that is not ours. `prepare` raises ServiceError for what it cannot give; `limitations` has the rest."""

    def __init__(self, http: Http, card: dict, tokenizer: "PreTrainedTokenizerFast"):
        self._http, self._model, self._tokenizer = http, card["id"], tokenizer
        self._kind = str(card.get("owned_by") or "server")
        self.vocab_size = max(tokenizer.get_vocab().values()) + 1
        self.stop_ids = stop_ids(tokenizer)
        self.limitations = [BATCH]
        self._prepared: set[CaptureSpec | None] = set()

    # --- What it can --------------------------------------------------------------------------------------------------

    def prepare(self, capture: CaptureSpec | None) -> None:
        """Asks the server for a few tokens twice, and compares."""
        if capture in self._prepared:
            return
        if capture and capture.tail_draws:
            raise self._cannot(
                "it gives the most likely tokens alone, so nothing can be drawn from the tail",
                "Set teacher.capture.tail_draws to 0, or use teachers/serve.py.",
                capture.tail_draws,
            )
        prompt = tuple(self._tokenizer.encode("The first prime numbers are 2, 3,", add_special_tokens=False))
        request = SampleRequest("probe", 0, prompt, 1)
        first, second = self._probed(request, capture)
        self._check_tokenizer(first)
        if capture:
            plain, heated = (self._entries(choice, 0) for choice in (first, second))
            likely = sorted(plain.keys() & heated.keys(), key=plain.get)[-COMPARED:]
            drift = max((abs(plain[i] - heated[i]) for i in likely), default=math.inf)
            masked = min(heated.values()) < MASKED
            if drift > DRIFT_NATS or masked:
                raise self._cannot(
                    "its log-probabilities change with temperature and top_p, but the teacher's own are wanted",
                    "Start vLLM with --logprobs-mode raw_logprobs, SGLang with SGLANG_RETURN_ORIGINAL_LOGPROB=1.",
                    "masked tokens" if masked else f"{drift:.2f} nats between temperature 1 and 2",
                )
            self._dists(first, _ids(first), capture)
            self.limitations = [BATCH, TAIL, NO_LOGSUMEXP]
        self._prepared.add(capture)

    def _probed(self, request: SampleRequest, capture: CaptureSpec | None) -> list[dict]:
        try:
            return [self._choice(request, params, capture) for params in PROBES]
        except ServiceError as error:
            if capture is None or "logprobs" not in error.what:
                raise
            remedy = f"Start vLLM with --max-logprobs {capture.k_max}, or lower teacher.capture.k_max."
            raise self._cannot(error.what, remedy, capture.k_max) from None

    def _check_tokenizer(self, choice: dict) -> None:
        ids = _ids(choice)
        if ids and ids[-1] in self.stop_ids:
            ids = ids[:-1]
        text = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if max(ids, default=0) >= self.vocab_size or text.strip() != str(choice.get("text")).strip():
            raise self._cannot(
                "its token ids are not those of teacher.path's tokenizer: the same ids are other text there",
                "Set teacher.path to the tokenizer of the model that is served.",
                (text[:40], str(choice.get("text"))[:40]),
            )

    # --- Samples ------------------------------------------------------------------------------------------------------

    def sample(self, request: SampleRequest, params: SamplingParams, capture: CaptureSpec | None) -> Sample:
        choice = self._choice(request, params, capture)
        ids, reason = _ids(choice), choice.get("finish_reason")
        if reason not in ("stop", "length"):
            raise self._cannot("a sample ended for a reason of its own", "Read the server's log.", reason)
        if reason == "stop" and not params.stop and ids[-1:] and ids[-1] not in self.stop_ids:
            raise self._cannot(
                "a sample ended with a token that is no stop token of teacher.path's tokenizer",
                "Serve the model with its own generation settings, or use its own tokenizer in teacher.path.",
                ids[-1],
            )
        dists = self._dists(choice, ids, capture) if capture else None
        return Sample(request.key, request.sample_index, request.seed, ids, reason, dists)

    def _choice(self, request: SampleRequest, params: SamplingParams, capture: CaptureSpec | None) -> dict:
        """What the server answers. All settings are sent: servers take missing ones from the model's own files."""
        content = completion_request(self._model, request, params) | {
            "top_k": params.top_k or -1,
            "repetition_penalty": 1.0,
            "frequency_penalty": 0.0,
            "presence_penalty": 0.0,
            "stop_token_ids": self.stop_ids,
            "skip_special_tokens": False,
        }
        if params.stop:
            content["stop"] = list(params.stop)
        if capture:
            content |= {"logprobs": capture.k_max, "return_tokens_as_token_ids": True}
        choice = self._first_choice(content)
        if not isinstance(choice.get("token_ids"), list):
            raise self._cannot(
                "it does not return token ids, and text does not tell them",
                "Use a server that knows return_token_ids (vLLM from 0.10.2, SGLang), or teachers/serve.py.",
            )
        return choice

    def _first_choice(self, content: dict) -> dict:
        found = self._http.post("/v1/completions", content)
        choices = found.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise self._cannot("the answer has no choices", "Check that it is an OpenAI-compatible server.")
        return choices[0]

    def _entries(self, choice: dict, t: int) -> dict[int, float]:
        """Token -> log-probability of the most likely tokens at position t, the drawn one among them."""
        logprobs = choice.get("logprobs") or {}
        top, drawn, own = (logprobs.get(name) or [] for name in ("top_logprobs", "tokens", "token_logprobs"))
        if len(top) <= t or len(drawn) <= t or len(own) <= t or top[t] is None:
            raise self._cannot(
                "it returned fewer log-probabilities than tokens",
                "Set teacher.capture to null, or use a server that returns them (vLLM, teachers/serve.py).",
                (len(top), t + 1),
            )
        found = {}
        for name, logprob in [*top[t].items(), (drawn[t], own[t])]:
            matched = TOKEN_ID.fullmatch(str(name))
            if matched is None:
                raise self._cannot(
                    "it names tokens by their text, and several tokens may have the same text",
                    "Set teacher.capture to null, or use a server that knows return_tokens_as_token_ids (vLLM), or "
                    "teachers/serve.py.",
                    name,
                )
            found[int(matched[1])] = float(logprob)
        return found

    def _dists(self, choice: dict, ids: list[int], capture: CaptureSpec) -> TokenDists:
        return self._stored([self._entries(choice, t) for t in range(len(ids))], ids, capture)

    # --- Scores -------------------------------------------------------------------------------------------------------

    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], capture: CaptureSpec) -> list[TokenDists]:
        return [self._score(tuple(prompt), tuple(completion), capture) for prompt, completion in pairs]

    def _score(self, prompt: tuple[int, ...], completion: tuple[int, ...], capture: CaptureSpec) -> TokenDists:
        content = {
            "model": self._model,
            "prompt": [*prompt, *completion],
            "max_tokens": 1,
            "temperature": 1.0,
            "prompt_logprobs": capture.k_max,
        }
        given = self._first_choice(content).get("prompt_logprobs")
        if not isinstance(given, list) or len(given) != len(prompt) + len(completion):
            raise self._cannot(
                "it cannot score: it does not know prompt_logprobs",
                "Use vLLM or teachers/serve.py to score sequences.",
            )
        entries = [{int(i): float(each["logprob"]) for i, each in (at or {}).items()} for at in given[len(prompt) :]]
        return self._stored(entries, list(completion), capture)

    # --- What is stored -----------------------------------------------------------------------------------------------

    def _stored(self, entries: list[dict[int, float]], ids: list[int], capture: CaptureSpec) -> TokenDists:
        """The adaptive support of each token, cut as the engine cuts it."""
        sizes, kept_ids, kept_logprobs, tails = [], [], [], []
        for entry, drawn in zip(entries, ids, strict=True):
            support, tail = self._support(entry, drawn, capture)
            sizes.append(len(support))
            kept_ids += [token for token, _ in support]
            kept_logprobs += [logprob for _, logprob in support]
            tails.append(tail)
        return TokenDists(
            offsets_T1=np.cumsum([0, *sizes], dtype=np.int64),
            ids_S=np.array(kept_ids, np.int32),
            logprobs_S=np.array(kept_logprobs, np.float32),
            tail_T=np.array(tails, np.float32),
            logsumexp_T=np.zeros(len(ids), np.float32),
            sampled_T=np.array(ids, np.int32),
        )

    def _support(
        self, entry: dict[int, float], drawn: int, capture: CaptureSpec
    ) -> tuple[list[tuple[int, float]], float]:
        """(most likely tokens until the rest is below the bound, the drawn one among them; the mass of the rest)."""
        if drawn not in entry:
            raise self._cannot("a drawn token has no log-probability", "Use another server.", drawn)
        if not all(math.isfinite(x) for x in entry.values()) or entry[drawn] < MASKED:
            raise self._cannot("a log-probability is not finite", "Use raw log-probabilities.", entry[drawn])
        whole = sum(math.exp(min(x, 50.0)) for x in entry.values())
        if whole > 1 + MASS_SLACK:
            raise self._cannot(
                "its log-probabilities are none: they add up to more than 1",
                "Start vLLM with --logprobs-mode raw_logprobs.",
                whole,
            )
        ranked = sorted((each for each in entry.items() if each[0] < self.vocab_size), key=lambda e: (-e[1], e[0]))
        kept, mass = [], 0.0
        for token, logprob in ranked[: capture.k_max]:
            kept.append((token, logprob))
            mass += math.exp(logprob)
            if 1 - mass <= capture.tail_bound:
                break
        if drawn not in (token for token, _ in kept):
            kept = [*kept[: capture.k_max - 1], (drawn, entry[drawn])]
        left = 1 - sum(math.exp(logprob) for _, logprob in kept)
        if len(ranked) <= len(kept) and len(ranked) < capture.k_max and left > capture.tail_bound:
            raise self._cannot(
                f"it returned {len(ranked)} log-probabilities a token, and {capture.k_max} were asked for",
                "Lower teacher.capture.k_max, or let the server return more (vLLM: --max-logprobs).",
            )
        return kept, max(0.0, left)

    def _cannot(self, what: str, remedy: str, value: object = None) -> ServiceError:
        return ServiceError(what, where=f"{self._kind} at {self._http.url}", value=value, remedy=remedy)


def _ids(choice: dict) -> list[int]:
    return [int(token) for token in choice["token_ids"]]
