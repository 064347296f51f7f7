"""Laws of tracking: known names only, secrets never leave, offline is offline, curves go on after a resume."""

import json
import math
import os
import socket
import struct
import subprocess
import sys
import threading

import pytest

from distill.config import Config
from distill.errors import ServiceError, StoreError
from distill.metrics import METRICS
from distill.redact import REDACTED, redact
from distill.tracking import Tracker, read_history

HF = "hf_" + "AbCdEfGhIjKlMnOpQrSt"
SK = "sk-" + "proj-abcdefghij0123456789"
WB = "0123456789abcdef0123456789abcdef01234567"


def config(mode, **more):
    source = [{"kind": "jsonl", "path": "p.jsonl"}]
    return Config.model_validate(
        {
            "run": {"name": "r"},
            "prompts": {"train": source, "eval": source},
            "teacher": {"path": "t"},
            "students": [{"name": "s", "path": "b"}],
            "tracking": {"wandb": mode},
        }
        | more
    )


def files_under(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def bytes_under(folder):
    return b"".join(path.read_bytes() for path in files_under(folder))


# --- redaction -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"token": "anything"}, {"token": REDACTED}),
        ({"a": {"hfToken": "x", "WANDB_API_KEY": "y"}}, {"a": {"hfToken": REDACTED, "WANDB_API_KEY": REDACTED}}),
        ({"client_secret": ["x", "y"]}, {"client_secret": [REDACTED, REDACTED]}),
        ({"password": {"value": 7}}, {"password": {"value": 7}}),
        (
            {"max_new_tokens": 512, "token": None, "tokenizer": "a/b"},
            {"max_new_tokens": 512, "token": None, "tokenizer": "a/b"},
        ),
        ({"token_env": "HF_TOKEN"}, {"token_env": "HF_TOKEN"}),
        ({"note": f"use {HF} or {SK}"}, {"note": f"use {REDACTED} or {REDACTED}"}),
        ({"key": WB, "commit": WB}, {"key": REDACTED, "commit": WB}),
        ({"url": "https://me:pw123@host/v1"}, {"url": f"https://{REDACTED}@host/v1"}),
        ({"headers": "Bearer abc.def-123456"}, {"headers": f"Bearer {REDACTED}"}),
        ({"path": "runs/demo", "lr": 1e-3, "on": True}, {"path": "runs/demo", "lr": 1e-3, "on": True}),
    ],
)
def test_redaction(config, expected, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert redact(config) == expected


def test_values_of_secret_environment_variables_are_removed_wherever_they_stand(monkeypatch):
    monkeypatch.setenv("MY_SERVICE_TOKEN", "plainlookingvalue")
    assert redact({"args": ["--x=plainlookingvalue"]}) == {"args": [f"--x={REDACTED}"]}


def test_redaction_leaves_its_argument_alone():
    config = {"token": "x", "list": [HF]}
    redact(config)
    assert config == {"token": "x", "list": [HF]}


# --- names -----------------------------------------------------------------------------------------------------------


def test_every_metric_has_a_section_a_unit_and_a_meaning():
    for name, metric in METRICS.items():
        assert name.removesuffix("/*").count("/") == 1 and metric.unit and len(metric.description) > 8


@pytest.mark.parametrize("is_main", [True, False])
def test_unknown_metric_raises_on_every_rank_and_suggests_the_nearest(tmp_path, is_main):
    tracker = Tracker(config("disabled"), tmp_path, is_main=is_main)
    with pytest.raises(ValueError, match="did you mean train/loss"):
        tracker.log({"train/los": 1.0}, 0)
    tracker.finish()
    assert read_history(tmp_path) == []


# --- the run's own record --------------------------------------------------------------------------------------------


def test_other_ranks_write_nothing(tmp_path):
    with Tracker(config("offline"), tmp_path / "t", is_main=False) as tracker:
        tracker.log({"train/loss": 1.0}, 0)
        tracker.table("samples", [{"a": 1}])
        tracker.artifact("report", tmp_path / "missing")
    assert not (tmp_path / "t").exists()


def test_history_keeps_what_was_logged_and_later_records_replace_repeated_steps(tmp_path):
    with Tracker(config("disabled"), tmp_path) as tracker:
        tracker.log({"train/loss": 3.0, "train/lr": 0.5}, 1, scope="a")
        tracker.log({"train/loss": 2.0, "train/lr": 0.5}, 2, scope="a")
        tracker.log({"train/loss": 9.0, "train/lr": 0.5}, 2, scope="b")
        tracker.log({"eval/pass_at_1": math.nan}, 2, scope="a")
    with open(tmp_path / "tracking" / "metrics.jsonl", "a") as file:
        file.write('{"scope": "a", "step": 3, "train/lo')  # killed here
    with Tracker(config("disabled"), tmp_path) as tracker:  # resumed from the checkpoint of step 1
        tracker.log({"train/loss": 1.5, "train/lr": 0.25}, 2, scope="a")
    assert read_history(tmp_path) == [
        {"scope": "a", "step": 1, "train/loss": 3.0, "train/lr": 0.5},
        {"scope": "b", "step": 2, "train/loss": 9.0, "train/lr": 0.5},
        {"scope": "a", "step": 2, "eval/pass_at_1": None},
        {"scope": "a", "step": 2, "train/loss": 1.5, "train/lr": 0.25},
    ]


def test_history_of_a_folder_without_one_is_empty(tmp_path):
    assert read_history(tmp_path) == []


def test_disabled_imports_no_wandb(tmp_path):
    code = f"""
import sys
from distill.config import Config
from distill.tracking import Tracker
with Tracker(Config.model_validate_json({config("disabled").model_dump_json()!r}), {str(tmp_path)!r}) as t:
    t.log({{"train/loss": 1.0}}, 0); t.table("x", [{{"a": 1}}])
print("wandb" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_unwritable_folder_is_a_store_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        Tracker(config("disabled"), tmp_path / "file" / "below")


# --- W&B offline -----------------------------------------------------------------------------------------------------

OFFLINE = """
import sys
from distill.config import Config
from distill.tracking import Tracker
config = Config.model_validate_json(sys.argv[3])
for segment in range(2):
    with Tracker(config, sys.argv[1]) as tracker:
        for step in range(3):
            tracker.log({"train/loss": 7 - step - 3 * segment}, step + 3 * segment, scope="stud")
        tracker.table("samples", [{"prompt": "zebra-prompt", "api_key": "horse-battery", "pieces": ["x", "%(hf)s"]}])
        tracker.artifact("report", sys.argv[2])
        assert tracker.failures == 0
"""


@pytest.fixture(scope="module")
def offline_run(tmp_path_factory):
    """A run and its resumption, in a process whose every proxied or default connection would reach our socket."""
    root = tmp_path_factory.mktemp("offline")
    (root / "report.json").write_text('{"answer": "quagga-report"}')
    contacts = []
    server = socket.create_server(("127.0.0.1", 0))

    def accept():
        while True:
            try:
                contacts.append(server.accept())
            except OSError:
                return

    threading.Thread(target=accept, daemon=True).start()
    url = f"http://127.0.0.1:{server.getsockname()[1]}"
    env = os.environ | {
        name: url for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "WANDB_BASE_URL")
    }
    env |= {"HOME": str(root / "home"), "WANDB_API_KEY": "c" * 40, "NO_PROXY": "", "no_proxy": ""}
    teacher = {"path": f"x/{HF}", "url": "https://me:horse-battery@host/v1"}
    settings = config("offline", teacher=teacher, run={"name": "kept-in-clear"}).model_dump_json()
    command = [sys.executable, "-c", OFFLINE % {"hf": HF}, str(root), str(root / "report.json"), settings]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, cwd=root)
    server.close()
    assert done.returncode == 0, done.stderr
    return root, done, contacts


def test_offline_opens_no_connection(offline_run):
    assert offline_run[2] == []


def test_offline_says_nothing_on_the_console(offline_run):
    assert offline_run[1].stdout + offline_run[1].stderr == ""


def test_offline_writes_only_below_its_folder(offline_run):
    root = offline_run[0]
    outside = [p for p in files_under(root) if (root / "tracking") not in p.parents and p.name != "report.json"]
    assert outside == []


def test_offline_holds_config_tables_and_artifacts_but_no_secret(offline_run):
    content = bytes_under(offline_run[0] / "tracking")
    for kept in (b"kept-in-clear", b"zebra-prompt", b"quagga-report", b"stud/train/loss", REDACTED.encode()):
        assert kept in content, kept
    for secret in (b"horse-battery", HF.encode(), b"c" * 40):
        assert secret not in content, secret


def wandb_records(path):
    """The records of a .wandb file: a LevelDB log (blocks of 32 KiB, chunks of crc, size, type) after 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the last chunk of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def test_resumed_run_has_the_same_id_and_its_curve_goes_on(offline_run):
    folder = offline_run[0] / "tracking"
    stored_id = (folder / "wandb-id").read_text()
    segments = sorted(folder.rglob("*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    assert len(segments) == 2 and all(path.name == f"run-{stored_id}.wandb" for path in segments)
    points, axes = [], set()
    for record in (record for path in segments for record in wandb_records(path)):
        row = {"/".join([i.key, *i.nested_key]).strip("/"): json.loads(i.value_json) for i in record.history.item}
        if "stud/train/loss" in row:
            points.append((row["stud/train/step"], row["stud/train/loss"]))
        if record.metric.name == "stud/train/loss":
            axes.add(record.metric.step_metric)
    assert points == [(0, 7), (1, 6), (2, 5), (3, 4), (4, 3), (5, 2)]
    assert axes == {"stud/train/step"}


# --- W&B online: errors ----------------------------------------------------------------------------------------------


def test_online_without_a_key_is_an_error_with_a_remedy_before_wandb_is_asked(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(ServiceError, match="wandb login"):
        Tracker(config("online"), tmp_path)


def test_online_with_an_unreachable_service_is_an_error_at_the_start_that_shows_no_key(tmp_path):
    key = "d" * 40
    code = f"""
from distill.config import Config
from distill.errors import ServiceError
from distill.tracking import Tracker
try:
    Tracker(Config.model_validate_json({config("online").model_dump_json()!r}), {str(tmp_path)!r}, start_timeout_s=2)
except ServiceError as error:
    print(error)
"""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        env = os.environ | {"WANDB_API_KEY": key, "WANDB_BASE_URL": url}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert "W&B did not start" in done.stdout and "tracking.wandb: offline" in done.stdout, done.stderr
    assert key not in done.stdout + done.stderr


def test_failures_after_the_start_are_counted_and_said_once(tmp_path, capsys):
    """The real W&B run is closed behind the tracker's back: each later call fails, and the run's own record goes on."""
    tracker = Tracker(config("offline"), tmp_path)
    tracker._run.finish()
    for step in range(4):
        tracker.log({"train/loss": 1.0}, step)
    assert tracker.failures == 4
    tracker.finish()
    assert [record["step"] for record in read_history(tmp_path)] == [0, 1, 2, 3]
    err = capsys.readouterr().err
    assert err.count("going on without it") == 1
    assert "4 W&B calls failed" in err


def test_attaching_a_missing_file_is_an_error(tmp_path):
    with Tracker(config("offline"), tmp_path) as tracker, pytest.raises(StoreError, match="does not exist"):
        tracker.artifact("report", tmp_path / "nothing.html")
