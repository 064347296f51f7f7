"""Which prompts are for training and which for evaluation: one rule, by content, for every family, level and seed."""

from distill.records import Prompt

HELDOUT_ONE_IN = 10


def split_of(prompt: Prompt) -> str:
    """Returns "heldout" for one prompt in ten, by the hash of its text, else "train"; equal texts agree."""
    return "heldout" if int(prompt.key, 16) % HELDOUT_ONE_IN == 0 else "train"


def is_heldout(prompt: Prompt) -> bool:
    """True when the prompt belongs to evaluation and must never be trained on by the bundled models."""
    return split_of(prompt) == "heldout"
