"""Whether llama.cpp reads and computes a GGUF file as transformers does the folder it was made from.

llama.cpp ends its process at a file it does not like, so it runs in one of its own (`python -m distill.gguf_check
FILE`), answers on the loopback interface under a key made for it, and is asked four things: the ids of texts that are
hard to cut, the rendered chat, what it writes greedily, and the log-probabilities of that.
"""

from __future__ import annotations

import json
import math
import secrets
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.request import Request, urlopen

from distill.errors import ModelError
from distill.tokens import load_tokenizer, render_prompt, token_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Digits in runs, contractions, every kind of white space between words, marks joined to letters, scripts without
# spaces, characters beyond the basic plane, LaTeX, code. All in normal form NFC: llama.cpp does not normalise.
TEXTS = (
    "1 12 123 1234 12345 1234567 3.14159 1,000,000 -7 +8 2^10 = 1024, 0x1F, 1e-5, v2.0.1",
    "I'll say we've DON'T they'RE it's o'clock 'tis rock'n'roll",
    "a  b   c    d\te\t\tf\n\ng\r\nh \n i\n\n\n\n  j   \n",
    "  leading and trailing   ",
    "So \\frac{a+b}{2} = \\boxed{42}. </b> <i>x</i> [1](2) {3} $y_1^{2}$ // ok?! #tag @me a_b-c.d/e\\f",
    "Grüße, naïve café, Łódź; Привет; Γειά σου",
    "你好，世界。こんにちは ᄀa 안녕 ١٢٣ ४५ ½ Ⅰ",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 → ∑√ \u00a0\u2003 \u200b \ufeff",
    "def f(x):\n    return {'a': [x, 1]}  # ok\n\n\nclass A(B): pass",
)  # fmt: skip
PROMPT = "What is 17 + 25?"
NEW_TOKENS = 32
# Nats between the log-probabilities of llama.cpp and float32 transformers. Its products round activations to the type
# of the weights; float32 differs by the order of sums alone. Seen: 2e-5, 0.002 and 0.01 on trained students, 0.1 in
# bf16 on random weights; a wrong order of rows or wrong positions make several nats.
TOLERANCE_NATS = {"f32": 0.01, "f16": 0.1, "bf16": 0.5}


@dataclass(frozen=True)
class Answers:
    """What llama.cpp says: ids of each text, the chat rendered, and for each prompt the ids it writes with their nats.

    logprobs: NaN for a token that ends inside a character, of which llama.cpp tells no probability.
    stopped: for each prompt, whether it ended with one of the file's end tokens (which is then the last id).
    """

    ids: list[list[int]]
    rendered: str
    written: list[list[int]]
    logprobs: list[list[float]]
    stopped: list[bool]


def check_gguf(gguf: str | Path, folder: str | Path, *, weights: str) -> dict[str, Any]:
    """Returns {"texts", "tokens", "largest_difference_nats"} when llama.cpp does what the folder's own code does.

    Compared: the ids of TEXTS; the rendered chat; and, along the tokens that llama.cpp writes greedily after PROMPT,
    their log-probabilities in transformers in float32, by TOLERANCE_NATS[weights], each being the most likely there up
    to twice that. Needs memory for the weights in float32 and for the file.
    Errors: ModelError naming the first difference, or what llama.cpp said when it could not load the file.
    """
    tok = load_tokenizer(folder)
    prompt = render_prompt(tok, PROMPT)
    answers = ask_llama_cpp(gguf, tok, list(TEXTS), PROMPT, [prompt], NEW_TOKENS)
    for text, found in zip(TEXTS, answers.ids):
        _same(
            "cuts this text otherwise than its tokenizer", gguf, found, tok.encode(text, add_special_tokens=False), text
        )
    chat = tok.apply_chat_template([{"role": "user", "content": PROMPT}], add_generation_prompt=True, tokenize=False)
    bos = tok.bos_token or ""
    _same("renders the chat otherwise", gguf, answers.rendered.removeprefix(bos), chat.removeprefix(bos), PROMPT)
    difference = _difference(folder, prompt, answers)
    if not difference <= TOLERANCE_NATS[weights]:  # a NaN is a difference too
        raise ModelError(
            f"llama.cpp computes other probabilities than transformers: {difference:.3g} nats apart",
            where=str(gguf),
            remedy=f"At most {TOLERANCE_NATS[weights]} are due to rounding. Set publish.gguf: false.",
        )
    return {"texts": len(TEXTS), "tokens": len(answers.written[0]), "largest_difference_nats": difference}


def ask_llama_cpp(
    gguf: str | Path,
    tok: PreTrainedTokenizerFast,
    texts: list[str],
    chat: str,
    prompts: list[list[int]],
    new_tokens: int,
) -> Answers:
    """What llama.cpp makes of a GGUF file, on CPU with a float32 cache. ModelError with its words where it fails."""
    import torch

    question = {"texts": texts, "chat": chat, "prompts": prompts, "new_tokens": new_tokens}
    question["threads"] = torch.get_num_threads()
    child = subprocess.run(
        [sys.executable, "-m", "distill.gguf_check", str(Path(gguf).resolve())],
        input=json.dumps(question),
        capture_output=True,
        text=True,
        errors="replace",
        cwd=Path(__file__).resolve().parents[1],
    )
    if child.returncode != 0:
        said = [line for line in child.stderr.splitlines() if " E " in line or "rror" in line] or [child.stderr[-300:]]
        raise ModelError(f"llama.cpp cannot run this file: {said[0].strip()}", where=str(gguf), value=child.returncode)
    said = json.loads(child.stdout.splitlines()[-1])
    silent = {i for i, token in tok.added_tokens_decoder.items() if token.special}  # no text, as rows without a token
    pieces = {i: piece for i, piece in enumerate(token_bytes(tok)) if i not in silent}
    written = [each["tokens"] for each in said["done"]]
    logprobs = [
        _aligned(ids, each["nats"], [pieces.get(i, b"") for i in ids], gguf) for ids, each in zip(written, said["done"])
    ]
    return Answers(said["ids"], said["rendered"], written, logprobs, [each["stopped"] for each in said["done"]])


def _aligned(ids: list[int], nats: list[list], pieces: list[bytes], gguf: str | Path) -> list[float]:
    """The nats of each id: llama.cpp lists (id, nats) of those tokens only after which the text is whole characters."""
    text, found, listed = b"", [], iter(nats)
    for index, piece in zip(ids, pieces):
        text += piece
        if _ends_inside_a_character(text):
            found.append(math.nan)
            continue
        named, value = next(listed, (None, None))
        if named != index:
            raise ModelError("llama.cpp names other tokens than it wrote", where=str(gguf), value=(named, index))
        found.append(-math.inf if value is None else value)  # its NaN comes as null
    return found


def _ends_inside_a_character(text: bytes) -> bool:
    """Whether one of the last bytes announces more than follow: llama.cpp's rule, which looks at four."""
    last = ((back, text[-back]) for back in range(1, min(4, len(text)) + 1))
    return any(back < 2 + (lead >= 0xE0) + (lead >= 0xF0) for back, lead in last if 0xC0 <= lead < 0xF8)


def _same(what: str, gguf: str | Path, found: object, expected: object, text: str) -> None:
    if found != expected:
        remedy = f"Text: {text!r}; expected: {str(expected)[:200]}. Set publish.gguf: false."
        raise ModelError(f"llama.cpp {what}", where=str(gguf), value=str(found)[:200], remedy=remedy)


def _difference(folder: str | Path, prompt: list[int], answers: Answers) -> float:
    """The largest of |nats here - nats there|, where there are any, and half of what a token lacks to the top one."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False, local_files_only=True, use_safetensors=True
    ).eval()
    (written,), (theirs,) = answers.written, answers.logprobs
    with torch.inference_mode():
        logits_TV = model(torch.tensor([prompt + written])).logits[0, len(prompt) - 1 : -1]
    ours_TV = logits_TV.log_softmax(-1)
    ours_T = ours_TV.gather(1, torch.tensor(written)[:, None]).squeeze(1)
    theirs_T = torch.tensor(theirs)
    apart_T = (ours_T - theirs_T).abs().masked_fill(theirs_T.isnan(), 0.0)
    lacking_T = (ours_TV.amax(-1) - ours_T) / 2
    return torch.maximum(apart_T, lacking_T).max().item()


# --- the process that runs llama.cpp ---------------------------------------------------------------------------------


def _serve(gguf: str, question: dict[str, Any]) -> dict[str, Any]:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = gguf
    params.n_ctx = max(map(len, question["prompts"])) + question["new_tokens"] + 8
    params.n_parallel, params.n_gpu_layers, params.warmup = 1, 0, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = question["threads"]
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it sums in float16
    params.hostnames, params.port = ["127.0.0.1"], 0
    params.api_keys = [secrets.token_hex(16)]
    server = xllamacpp.Server(params)

    def post(path: str, body: dict[str, Any]) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {params.api_keys[0]}", "Content-Type": "application/json"}
        with urlopen(Request(server.listening_address + path, json.dumps(body).encode(), headers)) as answer:
            return json.load(answer)

    def cut(text: str) -> list[int]:
        return post("/tokenize", {"content": text, "add_special": False, "parse_special": True})["tokens"]

    def complete(ids: list[int]) -> dict[str, Any]:
        # n_probs: probabilities before any filter; without the cache, what is asked first changes nothing.
        greedy = {"temperature": 0, "n_predict": question["new_tokens"], "n_probs": 1, "cache_prompt": False}
        return post("/completion", {"prompt": ids, "return_tokens": True} | greedy)

    done = [complete(ids) for ids in question["prompts"]]
    return {
        "ids": [cut(text) for text in question["texts"]],
        "rendered": post("/apply-template", {"messages": [{"role": "user", "content": question["chat"]}]})["prompt"],
        "done": [
            {
                "tokens": each["tokens"],
                "nats": [(step["id"], step["logprob"]) for step in each["completion_probabilities"]],
                "stopped": each["stop_type"] == "eos",
            }
            for each in done
        ],
    }


if __name__ == "__main__":
    print(json.dumps(_serve(sys.argv[1], json.load(sys.stdin))), flush=True)
