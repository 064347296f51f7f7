"""What a request may be told instead of an answer: OpenAI's error shape, with what, where, value and remedy inside."""

from distill.errors import DistillError

INVALID, AUTHENTICATION, NOT_FOUND = "invalid_request_error", "authentication_error", "not_found_error"
LIMITED, FAILED = "rate_limit_error", "server_error"


class Refused(DistillError):
    """A request that gets no answer: an HTTP status, and OpenAI's type, code and param."""

    def __init__(
        self,
        what: str,
        *,
        status: int = 400,
        kind: str = INVALID,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
        value: object = None,
        remedy: str | None = None,
    ):
        super().__init__(what, where=param, value=value, remedy=remedy)
        self.status, self.kind, self.code, self.param = status, kind, code, param
        self.headers = headers or {}

    def body(self) -> dict:
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


def busy(waiting: int, limit: int, retry_after_s: int) -> Refused:
    return Refused(
        f"{waiting} sequences wait already, at most {limit} may",
        status=429,
        kind=LIMITED,
        code="too_many_waiting",
        headers={"Retry-After": str(retry_after_s)},
        remedy=f"Come back in {retry_after_s} s.",
    )


def no_room(why: str) -> Refused:
    return Refused(why, code="no_room")


def stopping() -> Refused:
    return Refused(
        "the service is stopping and takes no more requests",
        status=503,
        kind=FAILED,
        code="stopping",
        headers={"Retry-After": "30"},
        remedy="Ask again when it is up, or ask another one.",
    )


def unauthorised(variable: str) -> Refused:
    return Refused(
        "the token is missing or wrong",
        status=401,
        kind=AUTHENTICATION,
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
        remedy=f"Send `Authorization: Bearer TOKEN` with the token that the service has in {variable}.",
    )


def foreign_host() -> Refused:
    return Refused(
        "the Host header does not name this machine's loopback address",
        status=403,
        kind=AUTHENTICATION,
        code="foreign_host",
        remedy="Ask for http://127.0.0.1 or http://localhost, or set serve.token_env.",
    )


def unknown_route(method: str, path: str) -> Refused:
    return Refused(
        f"there is no {method} {path[:80]}",
        status=404,
        kind=NOT_FOUND,
        code="unknown_url",
        remedy="There are /v1/completions, /v1/chat/completions, /v1/score, /v1/models, /health and /metrics.",
    )


def wrong_method(method: str, path: str, allowed: str) -> Refused:
    return Refused(
        f"{path[:80]} does not take {method}",
        status=405,
        code="method_not_allowed",
        headers={"Allow": allowed},
        remedy=f"Use {allowed}.",
    )


def too_large(limit_bytes: int) -> Refused:
    return Refused(
        f"the body has more than {limit_bytes} bytes",
        status=413,
        code="body_too_large",
        remedy="Send fewer or shorter prompts, or raise serve.max_body_bytes.",
    )


def too_slow(limit_s: float) -> Refused:
    return Refused(
        f"the body did not arrive within {limit_s:.0f} s",
        status=408,
        code="body_too_slow",
        remedy="Send the whole body at once.",
    )


def died(name: str, why: str) -> Refused:
    return Refused(
        f"{name} of the service has died: {why}",
        status=500,
        kind=FAILED,
        code="engine_died",
        remedy="Read the service's log, and start it again.",
    )
