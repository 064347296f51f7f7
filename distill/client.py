"""A teacher behind HTTP, with the interface of one in this process: sample() and score(). No torch.

Our own service gives what the engine gives: the same samples, and the same distributions to the last bit it computes.
Any other OpenAI-compatible server is asked for what it has (distill.client_peers); what it lacks is an
error, or is said in `limitations`.
"""

import base64
import hashlib
import json
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from distill import tokens, wire
from distill.client_http import Closed, Http
from distill.client_peers import PeerServer, completion_request
from distill.errors import ServiceError
from distill.records import CaptureSpec, Sample, SampleRequest, SamplingParams, TokenDists

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SCORE_TOKENS = 16384  # tokens of one request to score; one sequence may be longer
SCORE_SEQUENCES = 64
Pair = tuple[Sequence[int], Sequence[int]]
T, R = TypeVar("T"), TypeVar("R")


class Server(Protocol):
    """One kind of server: how a sample and scores are asked of it."""

    vocab_size: int
    stop_ids: list[int]
    limitations: list[str]

    def prepare(self, capture: CaptureSpec | None) -> None:
        """Returns if the server can give this; called before the first request."""

    def sample(self, request: SampleRequest, params: SamplingParams, capture: CaptureSpec | None) -> Sample: ...

    def score(self, pairs: Sequence[Pair], capture: CaptureSpec) -> list[TokenDists]: ...


class ServiceTeacher:
    """A teacher service. tokenizer_path: the folder or Hub id of the teacher's tokenizer; concurrency: requests in
    flight; patience_s: how long to go on while nothing at all succeeds.

    ServiceError when it cannot be reached, refuses, is of another tokenizer, or cannot do what is asked of it.
    """

    def __init__(
        self,
        url: str,
        tokenizer_path: str,
        *,
        token: str | None = None,
        concurrency: int = 64,
        patience_s: float = 900.0,
    ):
        self._http, self._concurrency = Http(url, token, patience_s=patience_s), concurrency
        self.url = self._http.url
        self._card = _choose(self._http.get("/v1/models"), tokenizer_path, self.url)
        self._path, self._tokenizer, self._server = tokenizer_path, None, None
        self.is_own = isinstance(self._card.get("distill"), dict)

    @property
    def tokenizer(self) -> "PreTrainedTokenizerFast":
        if self._tokenizer is None:
            self._tokenizer = tokens.load_tokenizer(self._path)
        return self._tokenizer

    @property
    def fingerprint(self) -> str:
        """Of the weights, if the service says it; else of the server's and the model's names."""
        if self.is_own:
            return self._card["distill"]["fingerprint"]
        named = [self._card.get(name) for name in ("owned_by", "id", "root")]
        return hashlib.sha256(json.dumps(["service", *named]).encode()).hexdigest()[:16]

    @property
    def dtype(self) -> str | None:
        """What the service computes in, if it says it."""
        return self._card["distill"]["dtype"] if self.is_own else None

    @property
    def vocab_size(self) -> int:
        return self._asked().vocab_size

    @property
    def stop_ids(self) -> list[int]:
        return self._asked().stop_ids

    def limitations(self, capture: CaptureSpec | None) -> list[str]:
        """What this server cannot give when this is asked of it, for the records of a run; empty for our own."""
        server = self._asked()
        server.prepare(capture)
        return list(server.limitations)

    def sample(
        self, requests: Iterable[SampleRequest], params: SamplingParams, capture: CaptureSpec | None = None
    ) -> Iterator[Sample]:
        """One Sample a request, as they finish; with `capture`, each with the distributions of its tokens."""
        server = self._asked()
        server.prepare(capture)
        return self._each(requests, lambda request: server.sample(request, params, capture))

    def score(self, sequences: Sequence[Pair], capture: CaptureSpec) -> list[TokenDists]:
        """The distributions of each completion's tokens, for (prompt_ids, completion_ids) pairs in the order given."""
        server = self._asked()
        server.prepare(capture)
        parts = list(enumerate(_batches(sequences)))
        found = dict(self._each(parts, lambda part: (part[0], server.score(part[1], capture))))
        return [dists for number in sorted(found) for dists in found[number]]

    def decode(self, completion_ids: Sequence[int]) -> str:
        """The completion's text, `</think>` and the like kept, without the stop token at its end."""
        ids = list(completion_ids)
        if ids and ids[-1] in self.stop_ids:
            ids.pop()
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def close(self) -> None:
        """Ends the connections. The tokenizer and the fingerprint stay."""
        self._http.close()

    def _asked(self) -> Server:
        if self._server is None:
            kind = OwnServer if self.is_own else PeerServer
            self._server: Server = kind(self._http, self._card, self.tokenizer)
        return self._server

    def _each(self, items: Iterable[T], work: Callable[[T], R]) -> Iterator[R]:
        """work(item) of every item, as they finish, `concurrency` at a time; the first error ends all."""
        source, taking, done = iter(items), threading.Lock(), queue.SimpleQueue()
        stopped = threading.Event()

        def take() -> T:
            with taking:
                return _END if stopped.is_set() else next(source, _END)

        def run() -> None:
            try:
                while (item := take()) is not _END:
                    done.put((True, work(item)))
            except Closed:
                if not stopped.is_set():  # closed under those who still wait
                    done.put((False, RuntimeError("this teacher was closed")))
            except BaseException as error:
                stopped.set()
                done.put((False, error))
            done.put((None, None))

        workers = [threading.Thread(target=run, daemon=True, name="client") for _ in range(self._concurrency)]
        return self._collect(workers, done, stopped)

    def _collect(
        self, workers: list[threading.Thread], done: queue.SimpleQueue, stopped: threading.Event
    ) -> Iterator[Any]:
        for worker in workers:
            worker.start()
        running = len(workers)
        try:
            while running:
                good, value = done.get()
                if good is None:
                    running -= 1
                elif good:
                    yield value
                else:
                    raise value
        finally:
            stopped.set()
            if running:
                self._http.abandon()  # those that run give up: nobody waits for them


_END: Any = object()


class OwnServer:
    """teachers/serve.py: everything the engine gives, over the wire as it is."""

    def __init__(self, http: Http, card: dict, tokenizer: "PreTrainedTokenizerFast"):
        self._http, self._model = http, card["id"]
        facts = card["distill"]
        self.vocab_size, self.stop_ids = facts["vocab_size"], list(facts["stop_ids"])
        self.limitations: list[str] = []
        found = tokens.fingerprint(tokenizer)
        if found != facts["tokenizer_fingerprint"]:
            raise ServiceError(
                f"the service's tokenizer has the fingerprint {facts['tokenizer_fingerprint']}, teacher.path's {found}",
                where=http.url,
                value=self._model,
                remedy="Set teacher.path to the folder that the service was started with, or a copy of it.",
            )

    def prepare(self, capture: CaptureSpec | None) -> None:
        """Nothing: it can."""

    def sample(self, request: SampleRequest, params: SamplingParams, capture: CaptureSpec | None) -> Sample:
        content = completion_request(self._model, request, params) | {
            "stop": list(params.stop) or None,
            "capture": capture and asdict(capture),
        }
        choice = self._http.post("/v1/completions", content)["choices"][0]
        dists = wire.unpack_all(base64.b64decode(choice["dists"]), self._http.url)[0] if capture else None
        return Sample(
            request.key, request.sample_index, request.seed, choice["token_ids"], choice["finish_reason"], dists
        )

    def score(self, pairs: Sequence[Pair], capture: CaptureSpec) -> list[TokenDists]:
        sequences = [{"prompt_ids": list(prompt), "completion_ids": list(completion)} for prompt, completion in pairs]
        content = {"model": self._model, "sequences": sequences, "capture": asdict(capture), "format": "binary"}
        return wire.unpack_all(self._http.ask("POST", "/v1/score", content, wire.MEDIA_TYPE).body, self._http.url)


def _choose(models: dict, path: str, where: str) -> dict:
    """The model's entry in a server's list: the only one, or the one that is called like teacher.path."""
    cards = [card for card in models.get("data") or [] if isinstance(card, dict) and isinstance(card.get("id"), str)]
    if len(cards) == 1:
        return cards[0]
    named = [card for card in cards if path in (card["id"], card.get("root"))]
    if len(named) == 1:
        return named[0]
    raise ServiceError(
        "the server must offer one model, or one called like teacher.path",
        where=where,
        value=[card["id"] for card in cards][:8],
        remedy="Serve one model there, or set teacher.path to the id of the one that is meant.",
    )


def _batches(sequences: Sequence[Pair]) -> list[list[Pair]]:
    found: list[list[Pair]] = []
    held = 0
    for pair in sequences:
        size = len(pair[0]) + len(pair[1])
        if not found or held + size > SCORE_TOKENS or len(found[-1]) == SCORE_SEQUENCES:
            found.append([])
            held = 0
        found[-1].append(pair)
        held += size
    return found
