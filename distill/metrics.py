"""Every metric that may be logged: its name, unit and meaning. One place, so that a name means the same everywhere.

A name that ends with /* stands for one metric a set of examples, by the set's name.
"""

from typing import NamedTuple


class Metric(NamedTuple):
    unit: str
    description: str


METRICS: dict[str, Metric] = {
    "prompts/train": Metric("prompts", "training prompts after deduplication and the held-out split"),
    "prompts/eval": Metric("prompts", "held-out prompts"),
    "prompts/duplicates": Metric("prompts", "training prompts dropped because another has the same content"),
    "prompts/overlapping": Metric("prompts", "training prompts dropped because the evaluation holds them"),
    "traces/samples": Metric("samples", "completions drawn so far"),
    "traces/kept": Metric("traces", "traces kept for training so far"),
    "traces/keep_share": Metric("share", "kept traces over samples"),
    "traces/correct_share": Metric("share", "samples whose answer is correct"),
    "traces/truncated_share": Metric("share", "samples that hit the token budget or never closed </think>"),
    "traces/grader_errors": Metric("samples", "samples the grader failed on; not counted as wrong"),
    "traces/mean_tokens": Metric("tokens", "mean length of a completion"),
    "traces/tokens_per_s": Metric("tokens/s", "sampled tokens per second, all ranks"),
    "logits/mean_tail": Metric("probability", "mean teacher mass outside the stored support"),
    "logits/mean_support": Metric("tokens", "mean number of stored tokens of a position"),
    "logits/bytes_per_token": Metric("bytes/token", "size of the teacher cache over its positions"),
    "train/loss": Metric("nats/token", "what is minimised: alpha T^2 divergence + (1 - alpha) cross-entropy"),
    "train/loss/*": Metric("nats/token", "the loss per token of one set of a mixture: traces, general, ..."),
    "train/loss_z": Metric("deviations", "robust z-score of the loss among the steps before: spikes stand out"),
    "train/ce": Metric("nats/token", "cross-entropy on the sampled token"),
    "train/kd": Metric("nats/token", "the divergence as trained, temperature and its square included"),
    "train/kl": Metric("nats/token", "forward KL from the teacher on K+1 outcomes at temperature 1"),
    "train/entropy": Metric("nats/token", "entropy of the student's distribution"),
    "train/top1": Metric("share", "positions whose most likely token is the target's"),
    "train/support_mass": Metric("probability", "student mass on the teacher's stored support"),
    "train/student_tail": Metric("probability", "student mass outside the teacher's stored support"),
    "train/tail": Metric("probability", "teacher mass outside the stored support"),
    "train/teacher_share": Metric("share", "trained positions that have a distribution, the teacher's or the base's"),
    "train/lr": Metric("1/step", "learning rate"),
    "train/grad_norm": Metric("nats/weight", "gradient norm before clipping, over all ranks"),
    "train/epoch": Metric("epochs", "passes over the traces so far"),
    "train/tokens": Metric("tokens", "tokens that bore loss so far, all ranks"),
    "train/tokens_per_s": Metric("tokens/s", "tokens processed per second, padding excluded, all ranks"),
    "train/step_s": Metric("s", "wall time of an optimizer step"),
    "train/data_wait_s": Metric("s", "of it, waiting for micro-batches on rank 0"),
    "train/packing_efficiency": Metric("share", "tokens of the step over the room of its rows"),
    "train/eval_loss": Metric("nats/token", "the loss on held-out traces"),
    "train/eval_ce": Metric("nats/token", "cross-entropy on held-out traces"),
    "train/eval_kl": Metric("nats/token", "forward KL from the teacher on held-out traces"),
    "train/eval_top1": Metric("share", "train/top1 on held-out traces"),
    "train/mfu": Metric("share", "model FLOPs over the peak of the devices"),
    "train/memory_gib": Metric("GiB", "peak device memory of rank 0"),
    "eval/pass_at_1": Metric("share", "mean over prompts of the share of correct samples"),
    "eval/ci_low": Metric("share", "lower end of the interval of pass@1, clustered by prompt"),
    "eval/ci_high": Metric("share", "upper end of the interval of pass@1, clustered by prompt"),
    "eval/pass_at_k": Metric("share", "at least one of k samples is correct"),
    "eval/maj_at_k": Metric("share", "the most frequent answer of k samples is correct"),
    "eval/mean_tokens": Metric("tokens", "mean length of a completion"),
    "eval/truncated_share": Metric("share", "samples that hit the token budget or never closed </think>"),
    "eval/gap_recovered": Metric("share", "(student - base) / (teacher - base) in pass@1"),
    "eval/p_value": Metric("probability", "paired permutation test of student against base"),
    "eval/agreement_kl": Metric("nats/token", "KL(teacher, student) on held-out traces"),
    "eval/agreement_top1": Metric("share", "positions where teacher and student agree on the most likely token"),
    "eval/retention": Metric("share", "pass@1 on the general part"),
    "stage/wall_s": Metric("s", "wall time of a stage"),
    "stage/device_s": Metric("s", "wall time of a stage times its devices"),
    "stage/cost": Metric("currency", "device hours times the price given in the config"),
}


def known(name: str) -> bool:
    """Whether METRICS lists this name, or its group."""
    return name in METRICS or f"{name.rpartition('/')[0]}/*" in METRICS
