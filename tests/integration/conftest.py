"""The uninterrupted run that the tests of this folder compare with, and the launching of all cases side by side.

A test marked `ahead(outcome=function)` gets function(case, reference, scratch) as its `outcome`: `case` is its
parameter of that name, `reference()` waits for the uninterrupted run. The outcomes of all selected tests are worked out
from the first test of this folder on, two at a time; tests that share function and case share it.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from launches import SECRETS, Launch, distill, environment, run, small_config, write_config
from training_worlds import trainings, world  # noqa: F401  (fixtures)

CORES = 2


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "ahead(outcome): `outcome` is function(case, reference, scratch)")


@dataclass(frozen=True)
class Reference:
    """The uninterrupted run: its folder, its config file and what its launch said."""

    folder: Path
    config: Path
    scratch: Path
    launch: Launch


def run_reference(scratch: Path) -> Reference:
    """One run from start to end, with secrets in the environment, W&B offline and no network."""
    config = small_config(scratch / "runs")
    config["tracking"]["wandb"] = "offline"
    path = write_config(scratch / "small.yaml", config)
    launch = run(distill(path), scratch, environment(scratch, **SECRETS)).ok()
    return Reference(scratch / "runs" / "small", path, scratch, launch)


def wanted(item: pytest.Item) -> tuple[Callable, str | None] | None:
    """(function, case) of a test that is marked ahead."""
    marker = item.get_closest_marker("ahead")
    params = getattr(getattr(item, "callspec", None), "params", {})
    return marker and (marker.kwargs["outcome"], params.get("case"))


@pytest.fixture(scope="session")
def started(request, tmp_path_factory) -> Iterator[dict[tuple[Callable, str | None] | None, Future]]:
    """The future of every outcome that a selected test wants; that of the reference run under None."""
    with ThreadPoolExecutor(CORES) as pool:
        futures = {None: pool.submit(run_reference, tmp_path_factory.mktemp("reference"))}
        for item in request.session.items:
            if (key := wanted(item)) is not None and key not in futures:
                function, case = key
                futures[key] = pool.submit(function, case, futures[None].result, tmp_path_factory.mktemp("case"))
        yield futures
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="session")
def reference(started) -> Reference:
    return started[None].result()


@pytest.fixture
def outcome(request, started):
    return started[wanted(request.node)].result()
