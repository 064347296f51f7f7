"""Laws of what a config may hold as text: YAML that grows, numbers nobody means, paths for a shell, URLs with more."""

import time

import pytest

from distill.config import load_config
from distill.errors import ConfigError
from distill.plan import plan

VALID = """
run: {name: t}
prompts:
  train: [{kind: reasoning_gym, families: {chain_sum: 20}}]
  eval: [{kind: reasoning_gym, families: {chain_sum: 5}}]
teacher: {path: teachers/tiny/teacher, sampling: {max_new_tokens: 100}}
students:
  - {name: a, path: teachers/tiny/student-same, loss: {kind: response}}
"""


@pytest.fixture
def told(tmp_path):
    """What a config with these lines below, and these overrides, is told; "" when it loads."""

    def load(more: str = "", *overrides: str) -> str:
        path = tmp_path / "c.yaml"
        path.write_text(VALID + more, encoding="utf-8")
        try:
            load_config(path, overrides)
        except ConfigError as error:
            return str(error)
        return ""

    return load


@pytest.mark.parametrize(
    "more",
    [
        "".join(f"x{i}: &x{i} [{', '.join(f'*x{i - 1}' if i else '1' for _ in range(9))}]\n" for i in range(9)),
        "x: &x {a: *x}\n",
        "x: &x [*x]\n",
    ],
    ids=["doubling", "mapping in itself", "list in itself"],
)
def test_aliases_that_grow_without_end_are_an_error_at_once(told, more):
    started_s = time.monotonic()
    assert "with what its aliases repeat it holds over 100,000 values" in told(more)
    assert time.monotonic() - started_s < 5


def test_aliases_are_fine_otherwise(told):
    assert told("eval: &e {k: 2}\nserve: {}\n") == ""
    assert told("", "train.betas=[&b 0.9, *b]") == ""


@pytest.mark.parametrize("value", ["010", "1:30", "0o17", "-01"])
def test_numbers_in_eights_and_sixties_are_words(told, value):
    assert "--set run.seed is" in (text := told("", f"run.seed={value}")) and "whole number" in text


@pytest.mark.parametrize(("value", "number"), [("0", 0), ("1_000", 1000), ("0x10", 16), ("+7", 7), ("1e3", 1000)])
def test_whole_numbers_are_read_as_they_are_meant(tmp_path, value, number):
    (tmp_path / "c.yaml").write_text(VALID.replace("name: t", f"name: t, seed: {value}"))
    assert load_config(tmp_path / "c.yaml").run.seed == number


@pytest.mark.parametrize("value", ["1" + "0" * 400, "1e300", "-1e30", str(2**63)])
def test_a_number_beyond_64_bits_is_refused_where_it_stands(told, value):
    assert told("", f"train.epochs={value}").startswith("--set train.epochs: the number is too large for 64 bits.")


@pytest.mark.parametrize("key", ["1", "null", "2.5", "true"])
def test_a_key_that_is_no_text_is_no_setting(told, key):
    assert "is not a setting. The settings there are run, hardware" in told(f"{key}: 2\n")


@pytest.mark.parametrize("path", ["~/runs", "$HOME/runs", "${HOME}/runs", '"a\\0b"'])
@pytest.mark.parametrize(
    "setting", ["run.dir={}", "teacher.path={}", "students.0.path={}", "train.trace_sets=[{{name: m, run: {}}}]",
                "prompts.train.0={{kind: jsonl, path: {}}}", "prompts.eval.0={{kind: hf, path: {}}}",
                "train.general={{sources: [{{kind: jsonl, path: {}}}]}}"],
)  # fmt: skip
def test_a_path_that_only_a_shell_reads_as_meant_is_refused(told, setting, path):
    path = path if setting.endswith("={}") or path.startswith('"') else f"'{path}'"
    assert "a path is taken as it stands" in told("", setting.format(path))


def test_other_paths_are_taken_as_they_are(told):
    for path in ("/data/a~b", "a$", "cost$5", "ü/ b"):
        assert told("", f"run.dir='{path}'") == ""


@pytest.mark.parametrize(
    "url", ["http://[::1", "http://127.0.0.1:99999", "http://h:x", "http://127.0.0.1:0", "http://:8000"]
)
def test_a_url_that_is_no_address_is_told_once(told, url):
    assert told("", f"teacher.url='{url}'") == f"--set teacher.url is {url!r}, which is no address. " + (
        "Use http://HOST:PORT."
    )


@pytest.mark.parametrize("url", ["http://h:1/v1?api_key=abcdef", "http://h:1#abcdef", "https://abcdef@h/v1"])
def test_a_url_with_more_than_an_address_is_refused_and_not_repeated(told, url):
    text = told("", f"teacher.url='{url}'")
    assert text.startswith("--set teacher.url says more than an address.") and "abcdef" not in text


def test_a_host_that_is_no_address_asks_for_a_token_as_others_do(told):
    assert "serve.host is 'x:y:z'; a service that other machines reach must ask for a token" in told(
        "", "serve.host='x:y:z'"
    )


def test_a_plan_for_no_gpus_is_refused(tmp_path):
    (tmp_path / "c.yaml").write_text(VALID)
    config = load_config(tmp_path / "c.yaml")
    for count in (0, -4):
        with pytest.raises(ConfigError, match=f"--gpus is {count}; it must be >= 1. Use 8"):
            plan(config, gpus=count)
