"""Which code runs, for manifests and results."""

import os
import subprocess
from pathlib import Path


def commit() -> str:
    """The commit of the code that runs, with a + when the tree has changes.

    The variable GIT_COMMIT says it for a tree that was shipped without its history; "unknown" where both are missing.
    """
    shipped = os.environ.get("GIT_COMMIT")
    if shipped:
        return shipped
    root = Path(__file__).parent.parent
    try:
        head = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        dirty = subprocess.run(["git", "-C", root, "status", "--porcelain", "-uno"], capture_output=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return head.stdout.strip() + ("+" if dirty.stdout else "") if head.returncode == 0 else "unknown"
