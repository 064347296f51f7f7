"""What ranks of a service say to each other: a JSON head, and the bytes of distributions behind it."""

import json
import struct
from collections.abc import Sequence
from dataclasses import asdict

from distill import wire
from distill.generate import Row
from distill.records import CaptureSpec, SampleRequest, SamplingParams
from distill.step_log import Drawn
from teachers.service_loop import Cancel, Command, Draw, News, Score, Stop

_LENGTH = struct.Struct("<I")


def pack(head: dict, blob: bytes = b"") -> bytes:
    text = json.dumps(head).encode()
    return _LENGTH.pack(len(text)) + text + blob


def unpack(message: bytes) -> tuple[dict, bytes]:
    (size,) = _LENGTH.unpack_from(message)
    end = _LENGTH.size + size
    return json.loads(message[_LENGTH.size : end]), message[end:]


def pack_command(share: int, command: Command) -> bytes:
    head = {"is": type(command).__name__, "share": share}
    if isinstance(command, Draw):
        row = command.row
        head |= {"job": command.job, "ids": row.request.prompt_ids, "seed": row.request.seed, "live": row.live}
        head |= {"params": asdict(row.params), "capture": row.capture and asdict(row.capture)}
    elif isinstance(command, Score):
        head |= {"job": command.job, "pairs": command.pairs, "capture": asdict(command.capture)}
    elif isinstance(command, Cancel):
        head["jobs"] = command.jobs
    return pack(head)


def unpack_command(head: dict) -> tuple[int, Command]:
    kind, share = head["is"], head["share"]
    if kind == "Draw":
        params = SamplingParams(**head["params"] | {"stop": tuple(head["params"]["stop"])})
        capture = head["capture"] and CaptureSpec(**head["capture"])
        request = SampleRequest("", 0, tuple(head["ids"]), head["seed"])
        return share, Draw(head["job"], Row(request, params, capture, head["live"]))
    if kind == "Score":
        pairs = tuple((tuple(prompt), tuple(completion)) for prompt, completion in head["pairs"])
        return share, Score(head["job"], pairs, CaptureSpec(**head["capture"]))
    return share, Cancel(tuple(head["jobs"])) if kind == "Cancel" else Stop()


def pack_news(news: Sequence[News]) -> bytes:
    heads, blob = [], b""
    for each in news:
        drawn = each.drawn
        dists = each.scored or [] if drawn is None else [] if drawn.dists is None else [drawn.dists]
        coded = wire.pack_all(dists)
        row = drawn and [drawn.token_ids, drawn.finish_reason, drawn.stop]
        heads.append({"job": each.job, "row": row, "bytes": len(coded), "refused": each.refused})
        blob += coded
    return pack({"is": "News", "news": heads}, blob)


def unpack_news(head: dict, blob: bytes) -> list[News]:
    found, at = [], 0
    for each in head["news"]:
        dists = wire.unpack_all(blob[at : at + each["bytes"]], "a message of another rank")
        at += each["bytes"]
        if each["row"] is None:
            found.append(News(each["job"], scored=dists, refused=each["refused"]))
        else:
            ids, reason, stop = each["row"]
            drawn = Drawn(0, SampleRequest("", 0, (), 0), ids, dists[0] if dists else None, reason, stop)
            found.append(News(each["job"], drawn))
    return found
