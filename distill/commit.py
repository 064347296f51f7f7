"""Which code runs, for manifests and results."""

import os
import subprocess
from pathlib import Path


def commit() -> str:
    """The commit of the code that runs, with a + when the tree has changes.

    A tree shipped without its history takes it from the variable GIT_COMMIT; "unknown" where that is missing too.
    """
    root, shipped = Path(__file__).parent.parent, os.environ.get("GIT_COMMIT", "unknown")
    try:
        head = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        dirty = subprocess.run(["git", "-C", root, "status", "--porcelain", "-uno"], capture_output=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return shipped
    return head.stdout.strip() + ("+" if dirty.stdout else "") if head.returncode == 0 else shipped
