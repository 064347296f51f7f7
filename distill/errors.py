"""The one family of errors a user may meet: each says what is wrong, where, the value found, and the remedy."""


class DistillError(Exception):
    """An error meant for a person: `what` is wrong `where`, the `value` found, and the `remedy`.

    `str(error)` is one sentence for the first three and one for the remedy; the entry point prints it, no traceback.
    """

    exit_code = 2
    own = True  # found by this process; False for the copy of one that another rank found

    def __init__(self, what: str, *, where: str | None = None, value: object = None, remedy: str | None = None):
        self.what, self.where, self.value, self.remedy = what, where, value, remedy
        text = f"{where}: {what}" if where else what
        if value is not None:
            text += f" (found {value!r})"
        if remedy:
            text = f"{text.rstrip('.')}. {remedy}"
        super().__init__(text)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state | {"own": False})


class ConfigError(DistillError):
    """A setting is unknown, has the wrong type or bounds, or contradicts another; raised before any work."""


class DataError(DistillError):
    """Prompts, traces or cached logits cannot be used as they are: empty, overlapping, truncated, other tokenizer."""


class StoreError(DistillError):
    """The run folder cannot be read or written: other config, damaged shard, full or read-only disk."""


class ModelError(DistillError):
    """A checkpoint is missing, not safetensors, of an unsupported architecture, or does not fit its tokenizer."""


class GradeError(DistillError):
    """The grader itself failed; counted apart from wrong answers."""


class ServiceError(DistillError):
    """A teacher service, W&B or the Hub refused or cannot be reached."""


class CapacityError(DistillError):
    """The machine lacks what the config needs: a GPU, memory, disk."""
