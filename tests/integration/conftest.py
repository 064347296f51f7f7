"""The uninterrupted run that the tests of this folder compare with, and the launching of many cases side by side."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from launches import SECRETS, Launch, distill, environment, run, small_config, write_config


@dataclass(frozen=True)
class Reference:
    """The uninterrupted run: its folder, its config file and what its launch said."""

    folder: Path
    config: Path
    scratch: Path
    launch: Launch


@pytest.fixture(scope="session")
def reference(tmp_path_factory) -> Reference:
    """One run from start to end, with secrets in the environment, W&B offline and no network."""
    scratch = tmp_path_factory.mktemp("reference")
    config = small_config(scratch / "runs")
    config["tracking"]["wandb"] = "offline"
    path = write_config(scratch / "small.yaml", config)
    launch = run(distill(path), scratch, environment(scratch, **SECRETS)).ok()
    return Reference(scratch / "runs" / "small", path, scratch, launch)


@pytest.fixture(scope="session")
def workers() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool
        pool.shutdown(cancel_futures=True)


_FUTURES: dict[tuple[str, str], Future] = {}


@pytest.fixture
def ahead(request, workers, tmp_path_factory) -> Callable[[Callable, str], object]:
    """ahead(function, "case"): function(case, scratch) of this test's case; those of all its selected cases start now.

    The test has one parameter, named by the second argument.
    """

    def result(function: Callable, parameter: str) -> object:
        test = request.node.originalname
        for item in request.session.items:
            if item.path == request.node.path and getattr(item, "originalname", None) == test:
                case = item.callspec.params[parameter]
                if (test, item.name) not in _FUTURES:
                    scratch = tmp_path_factory.mktemp("case")
                    _FUTURES[test, item.name] = workers.submit(function, case, scratch)
        return _FUTURES[test, request.node.name].result()

    return result
