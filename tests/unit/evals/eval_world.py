"""A small real world for the evaluation tests: a byte tokenizer, prompts, a run folder, samplers that follow a plan."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from distill.evals.harness import evaluate
from distill.evals.results import Candidate
from distill.grade import Grader
from distill.records import Prompt, Sample, SamplingParams
from distill.store import RunFolder
from distill.tokens import encode_completion, end_id

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% if m['role'] == 'assistant' %}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
CHAT = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<think>", "</think>")
PARAMS = SamplingParams(temperature=0.6, top_p=0.95, max_new_tokens=64)


def byte_tokenizer():
    """256 bytes and the chat tokens: the smallest real byte-level tokenizer."""
    return merged_tokenizer()


def pair_tokenizer(letters):
    """The same with a token for every pair of these letters."""
    return merged_tokenizer(*((a, b) for a in letters for b in letters))


def merged_tokenizer(*merges):
    """The same with these pairs merged."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate([*alphabet, *(a + b for a, b in merges)])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(c, special="think" not in c, normalized=False) for c in CHAT])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", chat_template=TEMPLATE)


def sums(count):
    """`count` prompts of two families and two levels; prompt i asks for i + i."""
    return [
        Prompt(f"What is {i}+{i}?", str(2 * i), ("even", "odd")[i % 2], level=1 + i % 4 // 2, grader="integer")
        for i in range(count)
    ]


def answer(text):
    return f"think about it</think>\n\\boxed{{{text}}}"


class Scripted:
    """A sampler whose completion of (prompt, index) is `write(prompt, index)`: text, or (text, "length") when cut off.

    Samples come in the order in which a batch would finish them: short ones first, so never shard by shard.
    """

    def __init__(self, tokenizer, prompts, write, dists=None):
        self.tokenizer, self.write, self.dists = tokenizer, write, dists
        self.by_key = {prompt.key: prompt for prompt in prompts}
        self.requests = []

    def sample(self, requests, params, capture):
        samples = [self._one(request, capture) for request in requests]
        self.requests += requests
        yield from sorted(samples, key=lambda s: (len(s.completion_ids), s.key))

    def _one(self, request, capture):
        text = self.write(self.by_key[request.key], request.sample_index)
        text, reason = text if isinstance(text, tuple) else (text, "stop")
        ids = encode_completion(self.tokenizer, text)
        if reason == "stop":
            ids.append(end_id(self.tokenizer))
        dists = self.dists(ids) if capture else None
        return Sample(request.key, request.sample_index, request.seed, ids, reason, dists)


def open_run(root, stage="eval", spec=None):
    return RunFolder(root, "run", commit="abc1234").stage(stage).open(spec or {"eval": 1}, {})


def run_eval(folder, tokenizer, prompts, write, name="teacher", k=3, **options):
    """Evaluates a scripted model; returns (result, sampler)."""
    role = options.pop("role", "teacher")
    candidate = Candidate(name, role, options.pop("base", ""), options.pop("loss", ""), options.pop("print", "w0"))
    sampler = Scripted(tokenizer, prompts, write, options.pop("dists", None))
    options = {"shard_prompts": 4, "progress": False, "params": PARAMS} | options
    with Grader(1) as grader:
        result = evaluate(candidate, sampler, tokenizer, prompts, options.pop("params"), k, grader, folder, **options)
    return result, sampler
