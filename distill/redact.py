"""Take secrets out of what leaves this process: configs, tables, messages. No imports beyond the standard library."""

import os
import re
from itertools import pairwise
from typing import Any

REDACTED = "[redacted]"
_SECRET_WORDS = {"token", "secret", "password", "passwd", "apikey", "credential", "credentials", "authorization"}
_SECRET_PAIRS = {("api", "key"), ("access", "key"), ("private", "key")}
# 40 hex digits are a W&B key, but also a git commit; these names say that the value is a digest.
_DIGEST_WORDS = {"commit", "revision", "sha", "sha1", "sha256", "hash", "fingerprint", "inputs"}
_HEX40 = re.compile(r"(?<![0-9A-Za-z])[0-9a-f]{40}(?![0-9A-Za-z])")
_SECRET_VALUES = [
    re.compile(r"\bhf_[A-Za-z0-9]{16,}"),
    re.compile(r"\bsk-[A-Za-z0-9_-]{16,}"),
    re.compile(r"\bwandb_v\d+_[A-Za-z0-9_-]{20,}"),
    re.compile(r"\b(?:ghp|gho|ghs|github_pat)_[A-Za-z0-9_]{20,}"),
    re.compile(r"\bAKIA[0-9A-Z]{16}\b"),
    re.compile(r"(?<=Bearer )[A-Za-z0-9._~+/-]{8,}"),
    re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"),  # user:password@ of a URL
]


def redact(value: Any, name: str = "") -> Any:
    """A copy of a JSON-like value without secrets: strings under secret names, and whatever looks like a key.

    A name is secret when one of its words is (token, api_key, wandbApiKey); numbers under such names
    (max_new_tokens) and names of environment variables (token_env) stay. Values of this process's own secret
    environment variables are removed wherever they stand.
    """
    if isinstance(value, dict):
        return {key: redact(item, str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(redact(item, name) for item in value)
    if not isinstance(value, str):
        return value
    words = _words(name)
    if value and _is_secret(words):
        return REDACTED
    return redact_text(value, hex_keys=not _DIGEST_WORDS & set(words))


def redact_text(text: str, *, hex_keys: bool = True) -> str:
    """The text with everything that looks like a key replaced; hex_keys: 40 hex digits count as one."""
    for secret in _environment_secrets():
        text = text.replace(secret, REDACTED)
    for pattern in [*_SECRET_VALUES, *([_HEX40] if hex_keys else [])]:
        text = pattern.sub(REDACTED, text)
    return text


def _words(name: str) -> list[str]:
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    return [word for word in re.split(r"[^A-Za-z0-9]+", spaced.lower()) if word]


def _is_secret(words: list[str]) -> bool:
    if words and words[-1] == "env":
        return False
    return bool(_SECRET_WORDS & set(words)) or any(pair in _SECRET_PAIRS for pair in pairwise(words))


def _environment_secrets() -> list[str]:
    named = [value for name, value in os.environ.items() if _is_secret(_words(name)) and len(value) >= 8]
    return sorted(named, key=len, reverse=True)
