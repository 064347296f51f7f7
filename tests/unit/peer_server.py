"""A stand-in for other OpenAI-compatible servers: a real model behind their answers, with their faults to choose from.

The shapes are vLLM's: /v1/models, /v1/completions with token ids in and out, log-probabilities keyed "token_id:N",
prompt_logprobs. `faults` switches on what such servers may do instead.
"""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch


class Peer:
    """The model (ids -> logits [T, V]), the texts of its tokens, and what the server was asked."""

    def __init__(self, logits, text, owner="vllm", faults=()):
        self.logits, self.text, self.owner, self.faults = logits, text, owner, set(faults)
        self.asked: list[dict] = []
        self.tokens: set[str | None] = set()
        self.stop_ids: set[int] = set()
        self.models = [{"id": "org/model", "object": "model", "owned_by": owner, "root": "org/model"}]
        self.replies: list = []  # answers given before any real one: (status, headers, body) or "hang up"
        self.lock = threading.Lock()
        self.url = ""

    def complete(self, asked: dict) -> dict:
        ids, drawn, tops = list(asked["prompt"]), [], []
        generator = torch.Generator().manual_seed(asked.get("seed", 0) % 2**63)
        reason = "length"
        for _ in range(asked["max_tokens"]):
            raw_V = self.logits(ids)[-1].double()
            weights_V, shown_V = self.distribution(raw_V, asked)
            token = int(torch.multinomial(weights_V, 1, generator=generator))
            tops.append(self.top(shown_V, asked.get("logprobs"), token))
            ids.append(token)
            drawn.append(token)
            if token in asked.get("stop_token_ids", []):
                reason = "stop"
                break
        shown = drawn[:-1] if reason == "stop" else drawn
        choice = {"index": 0, "text": self.text(shown), "finish_reason": reason, "logprobs": None}
        if asked.get("return_token_ids") and "no ids" not in self.faults:
            choice["token_ids"] = drawn
        if asked.get("logprobs") is not None and "no logprobs" not in self.faults:
            names = self.name if asked.get("return_tokens_as_token_ids") and "text keys" not in self.faults else None
            name = names or (lambda i: self.text([i]))
            choice["logprobs"] = {
                "tokens": [name(i) for i in drawn],
                "token_logprobs": [max(top[i], -9999.0) for i, top in zip(drawn, tops)],
                "top_logprobs": [{name(i): max(x, -9999.0) for i, x in top.items()} for top in tops],
            }
        if asked.get("prompt_logprobs") is not None and "no scores" not in self.faults:
            rows = self.logits(asked["prompt"]).double().log_softmax(-1)
            given = [self.top(rows[t - 1], asked["prompt_logprobs"], i) for t, i in enumerate(asked["prompt"]) if t]
            choice["prompt_logprobs"] = [None, *({str(i): {"logprob": x} for i, x in top.items()} for top in given)]
        return {"id": "x", "choices": [choice], "usage": {}}

    def distribution(self, raw_V, asked):
        """What is drawn from, and the log-probabilities that are shown."""
        scaled_V = raw_V / max(asked.get("temperature", 1.0), 1e-3)
        order = scaled_V.argsort(descending=True)
        mass = scaled_V.softmax(-1)[order].cumsum(0)
        kept_V = scaled_V.clone()
        kept_V[order[1:][mass[:-1] >= asked.get("top_p", 1.0)]] = float("-inf")
        shown_V = kept_V if "processed" in self.faults else scaled_V if "scaled" in self.faults else raw_V
        return kept_V.softmax(-1), shown_V if "logits" in self.faults else shown_V.log_softmax(-1)

    def top(self, shown_V, k, token) -> dict[int, float]:
        limit = 5 if "few" in self.faults else len(shown_V)
        best = shown_V.topk(min(k or 0, limit)).indices.tolist()
        return {i: shown_V[i].item() for i in [*best, *([] if token in best else [token])]}

    @staticmethod
    def name(token: int) -> str:
        return f"token_id:{token}"


class Handler(BaseHTTPRequestHandler):
    peer: Peer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, status, content, headers=()):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **dict(headers)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def planned(self) -> bool:
        with self.peer.lock:
            planned = self.peer.replies.pop(0) if self.peer.replies else None
        if planned == "hang up":
            self.close_connection = True
            self.connection.close()
        elif planned:
            self.reply(*planned)
        return planned is not None

    def do_GET(self):
        self.peer.tokens.add(self.headers.get("Authorization"))
        if not self.planned():
            self.reply(200 if self.path == "/v1/models" else 404, {"object": "list", "data": self.peer.models})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.peer.tokens.add(self.headers.get("Authorization"))
        if self.planned():
            return
        self.peer.asked.append(asked)
        self.reply(200, self.peer.complete(asked))


@contextmanager
def serve(peer: Peer):
    """The peer, listening on a free port of this machine until the block ends."""

    class Server(ThreadingHTTPServer):
        request_queue_size = 256
        daemon_threads = True

        def handle_error(self, *_):
            pass  # clients that hang up

    server = Server(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"peer": peer}))
    peer.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield peer
    finally:
        server.shutdown()
        server.server_close()
