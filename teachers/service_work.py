"""From a body to an answer: what is asked is checked in full, drawn or scored, and told in OpenAI's shapes."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from fastapi.responses import JSONResponse, Response
from jinja2 import TemplateError

from distill import wire
from distill.config import Serve
from distill.errors import DataError, DistillError
from distill.generate import Row
from distill.records import CaptureSpec, SampleRequest, SamplingParams, TokenDists
from distill.tokens import fingerprint, render_chat, token_bytes
from teachers import service_requests as asked
from teachers.engine import TeacherEngine
from teachers.service_answers import DONE, Shape, event
from teachers.service_desk import Desk, Ticket
from teachers.service_guard import until_gone
from teachers.service_metrics import Metrics
from teachers.service_refusals import Refused
from teachers.service_text import Choice, Tokens

INLINE_CHARACTERS = 20_000  # longer texts are encoded in a thread, so that they keep nobody waiting
DEFAULT_MAX_TOKENS = 16  # of /v1/completions, as at OpenAI
STALLED_S = 120.0  # a client that does not read its stream for so long has left


@dataclass
class Service:
    """What the routes work with: the model's own facts, the limits, and the desk."""

    engine: TeacherEngine
    name: str
    limits: Serve
    desk: Desk
    metrics: Metrics
    encoder: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "encode"))
    started_s: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        self.tokens = Tokens(token_bytes(self.engine.tokenizer), self.engine.stop_ids)
        self.longest_token_bytes = max(map(len, self.tokens.bytes))
        self.card = {
            "id": self.name,
            "object": "model",
            "created": int(self.started_s),
            "owned_by": "distill",
            "max_model_len": self.engine.max_positions,
            "distill": {
                "fingerprint": self.engine.fingerprint,
                "tokenizer_fingerprint": fingerprint(self.engine.tokenizer),
                "vocab_size": self.engine.vocab_size,
                "stop_ids": self.engine.stop_ids,
                "dtype": str(self.engine.dtype).removeprefix("torch."),
                "logprobs": "temperature 1, before any filter",
                "limits": {k: v for k, v in self.limits.model_dump().items() if k.startswith("max_")},
            },
        }

    # --- What is asked ------------------------------------------------------------------------------------------------

    async def completion(self, body: bytes) -> "Answer":
        fields = asked.parse(asked.CompletionFields, body)
        asked.check_model(fields.model, self.name)
        prompts = await self._prompts(fields.prompt)
        budget = fields.max_tokens or DEFAULT_MAX_TOKENS
        return self._answer(fields, prompts, budget, fields.logprobs, chat=False)

    async def chat(self, body: bytes) -> "Answer":
        fields = asked.parse(asked.ChatFields, body)
        asked.check_model(fields.model, self.name)
        prompt = await self._conversation(fields.messages)
        room = max(1, self.engine.max_positions - len(prompt))
        budget = fields.max_completion_tokens or fields.max_tokens or min(room, self.limits.max_tokens)
        if fields.top_logprobs and not fields.logprobs:
            raise Refused(
                "it needs logprobs", param="top_logprobs", code="contradiction", remedy='Set "logprobs": true.'
            )
        top = (fields.top_logprobs or 0) if fields.logprobs else None
        return self._answer(fields, [prompt], budget, top, chat=True)

    def _answer(self, fields, prompts: list[tuple[int, ...]], budget: int, top: int | None, chat: bool) -> "Answer":
        limits, n = self.limits, fields.n or 1
        asked.limited("n", n * len(prompts), limits.max_n, "max_n")
        asked.limited("max_tokens", budget, limits.max_tokens, "max_tokens")
        if top is not None:
            asked.limited("top_logprobs" if chat else "logprobs", top, limits.max_top_logprobs, "max_top_logprobs")
        if fields.stream_options is not None and not fields.stream:
            raise Refused("it needs stream", param="stream_options", code="contradiction", remedy="Leave it out.")
        stops = asked.stop_texts(fields.stop)
        params = SamplingParams(
            temperature=1.0 if fields.temperature is None else fields.temperature,
            top_p=1.0 if fields.top_p is None else fields.top_p,
            top_k=max(0, fields.top_k or 0),
            max_new_tokens=budget,
            min_p=fields.min_p or 0.0,
            stop=stops,
        )
        capture = asked.capture_spec(fields.capture, top, limits.max_top_logprobs)
        rows = [
            Row(SampleRequest("", i, prompt, asked.choice_seed(fields.seed, i)), params, capture, bool(fields.stream))
            for prompt in prompts
            for i in range(n)
        ]
        for number, prompt in enumerate(prompts):
            self._check_prompt(rows[number * n], "messages" if chat else f"prompt {number}", len(prompt))
        shape = Shape(
            model=self.name,
            fingerprint=self.engine.fingerprint,
            tokens=self.tokens,
            chat=chat,
            with_logprobs=top is not None,
            with_ids=bool(fields.return_token_ids),
            with_dists=fields.capture is not None,
            tokens_as_ids=bool(fields.return_tokens_as_token_ids),
            prompts=prompts,
            n=n,
        )
        choices = [Choice(i, self.tokens, stops, top) for i in range(len(rows))]
        usage = bool(fields.stream_options and fields.stream_options.include_usage)
        return Answer(self, rows, shape, choices, bool(fields.stream), usage)

    def _check_prompt(self, row: Row, where: str, tokens: int) -> None:
        asked.limited(where, tokens, self.limits.max_prompt_tokens, "max_prompt_tokens")
        try:
            self.engine.check(row, where)
        except DistillError as error:
            told = {"value": error.value, "remedy": error.remedy}
            raise Refused(error.what, param=where, code="not_runnable", **told) from None

    async def _prompts(self, value: object) -> list[tuple[int, ...]]:
        if isinstance(value, str):
            return [await self._encoded(value, "prompt")]
        if not isinstance(value, list) or not value:
            raise Refused(
                "it must be a text, a list of token ids, or a list of such",
                param="prompt",
                code="invalid_type",
                remedy='Use "prompt": "..." or "prompt": [1, 2, 3].',
            )
        if type(value[0]) is int:
            return [asked.token_ids("prompt", value, self.engine.vocab_size)]
        asked.limited("prompt", len(value), self.limits.max_n, "max_n")
        return [
            await self._encoded(each, f"prompt.{i}")
            if isinstance(each, str)
            else asked.token_ids(f"prompt.{i}", each, self.engine.vocab_size)
            for i, each in enumerate(value)
        ]

    async def _encoded(self, text: str, name: str) -> tuple[int, ...]:
        self._check_length(text, name)
        # The backend itself: its encode only reads, so it may run beside others in a thread.
        encode = lambda: self.engine.tokenizer.backend_tokenizer.encode(text).ids  # noqa: E731
        ids = tuple(await self._run(encode, len(text)))
        if not ids:
            raise Refused("it has no tokens", param=name, code="empty", remedy="Give at least one character.")
        return ids

    async def _conversation(self, messages: list[asked.Message]) -> tuple[int, ...]:
        plain = [{"role": each.role, "content": _content(each.content, i)} for i, each in enumerate(messages)]
        characters = "".join(each["content"] for each in plain)
        self._check_length(characters, "messages")
        try:
            return tuple(await self._run(lambda: render_chat(self.engine.tokenizer, plain), len(characters)))
        except DataError as error:
            raise Refused(error.what, param="messages", code="special_token", remedy=error.remedy) from None
        except TemplateError as error:
            raise _template_refused(error) from None

    def _check_length(self, text: str, name: str) -> None:
        least = len(text) // self.longest_token_bytes
        if least > self.limits.max_prompt_tokens:
            asked.limited(name, least, self.limits.max_prompt_tokens, "max_prompt_tokens")

    async def _run(self, work: Callable[[], list[int]], characters: int) -> list[int]:
        if characters <= INLINE_CHARACTERS:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self.encoder, work)

    # --- Scores -------------------------------------------------------------------------------------------------------

    async def score(self, body: bytes, accept: str) -> Response:
        fields = asked.parse(asked.ScoreFields, body)
        asked.check_model(fields.model, self.name)
        asked.limited("sequences", len(fields.sequences), self.limits.max_n, "max_n")
        spec = asked.capture_spec(fields.capture, None, self.limits.max_top_logprobs)
        pairs = [self._pair(each, f"sequences.{i}", spec) for i, each in enumerate(fields.sequences)]
        scored: dict[int, list[TokenDists]] = {}
        with self.desk.score(pairs, spec) as ticket:
            self.metrics.prompt_tokens.inc(sum(len(prompt) for prompt, _ in pairs))
            async for number, news in ticket:
                scored[number] = news.scored
        dists = [each for number in sorted(scored) for each in scored[number]]
        self.metrics.scored_tokens.inc(sum(map(len, dists)))
        if fields.format == "binary" or (fields.format is None and wire.MEDIA_TYPE in accept):
            return Response(wire.pack_all(dists), media_type=wire.MEDIA_TYPE)
        return JSONResponse({"object": "scores", "model": self.name, "data": list(map(_plain, dists))})

    def _pair(self, sequence: asked.Sequence, name: str, spec: CaptureSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
        vocab, limits = self.engine.vocab_size, self.limits
        prompt = asked.token_ids(f"{name}.prompt_ids", sequence.prompt_ids, vocab)
        completion = asked.token_ids(f"{name}.completion_ids", sequence.completion_ids, vocab)
        asked.limited(f"{name}.prompt_ids", len(prompt), limits.max_prompt_tokens, "max_prompt_tokens")
        asked.limited(f"{name}.completion_ids", len(completion), limits.max_tokens, "max_tokens")
        whole = SampleRequest("", 0, prompt + completion, 0)
        params = SamplingParams(max_new_tokens=0)
        self._check_prompt(Row(whole, params, spec), name, 0)
        return prompt, completion


@dataclass
class Answer:
    """A request that was understood: its rows, and how what is drawn is told."""

    service: Service
    rows: list[Row]
    shape: Shape
    choices: list[Choice]
    streamed: bool
    with_usage: bool

    async def respond(self) -> Response:
        ticket = self.service.desk.draw(self.rows)
        self.service.metrics.prompt_tokens.inc(sum(map(len, self.shape.prompts)))
        if self.streamed:
            return EventStream(self._events(ticket), ticket)
        with ticket:
            pieces = {}
            async for number, news in ticket:
                pieces[number] = self.choices[number].add(news.drawn)
        return Response(
            self.shape.whole([pieces[i] for i in sorted(pieces)], self._count()), media_type="application/json"
        )

    async def _events(self, ticket: Ticket) -> AsyncIterator[bytes]:
        started_s, fresh = time.monotonic(), set(range(len(self.rows)))
        shape = self.shape
        try:
            for chunk in shape.opening():
                yield event(chunk)
            async for number, news in ticket:
                if len(fresh) == len(self.rows):
                    self.service.metrics.first_token_s.observe(time.monotonic() - started_s)
                piece, first = self.choices[number].add(news.drawn), number in fresh
                fresh.discard(number)
                if piece.text or piece.finish_reason or shape.with_ids or shape.with_dists or piece.logprobs:
                    yield event(shape.chunk(piece, first))
            if self.with_usage:
                yield event(shape.closing(self._count()))
            else:
                self._count()
            yield DONE
        except Refused as error:  # the engine has died: the status is long sent
            yield event(error.body())

    def _count(self) -> int:
        tokens = sum(choice.completion_tokens for choice in self.choices)
        self.service.metrics.completion_tokens.inc(tokens)
        return tokens


class EventStream(Response):
    """Server-sent events. Ends, and with it the ticket, when the client leaves or stops reading."""

    def __init__(self, events: AsyncIterator[bytes], ticket: Ticket):
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self.events, self.ticket = events, ticket

    async def __call__(self, scope, receive, send) -> None:
        with self.ticket:
            sending = asyncio.ensure_future(self._send_all(send))
            leaving = asyncio.ensure_future(until_gone(receive))
            try:
                await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                leaving.cancel()
                sending.cancel()
                await asyncio.gather(sending, leaving, return_exceptions=True)
            if not sending.cancelled() and sending.exception():
                raise sending.exception()

    async def _send_all(self, send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for part in self.events:
            async with asyncio.timeout(STALLED_S):
                await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def _content(value: object, number: int) -> str:
    """The text of a message: a text, or a list of parts of type text."""
    if isinstance(value, str):
        return value
    parts = value if isinstance(value, list) else [None]
    if parts and all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in parts):
        return "".join(part["text"] for part in parts)
    raise Refused(
        "it must be a text, or a list of parts of type text",
        param=f"messages.{number}.content",
        code="invalid_type",
        remedy='Use "content": "...".',
    )


def _template_refused(error: Exception) -> Refused:
    return Refused(
        f"the model's chat template refuses this conversation: {str(error)[:200]}",
        param="messages",
        code="template",
        remedy="Use the roles and the order that it knows.",
    )


def _plain(dists: TokenDists) -> dict:
    """Distributions as JSON: one list of ids and one of log-probabilities a token, floats exactly as they are."""
    bounds = list(zip(dists.offsets_T1.tolist(), dists.offsets_T1[1:].tolist()))
    ids, logprobs = dists.ids_S.tolist(), dists.logprobs_S.tolist()
    return {
        "sampled": dists.sampled_T.tolist(),
        "ids": [ids[first:last] for first, last in bounds],
        "logprobs": [logprobs[first:last] for first, last in bounds],
        "tail": dists.tail_T.tolist(),
        "logsumexp": dists.logsumexp_T.tolist(),
    }
