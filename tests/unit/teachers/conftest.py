"""Engines over the bundled teacher for all tests of the service: loading takes longer than most of them."""

import pytest


def _engine():
    from service_world import TEACHER

    from teachers.engine import TeacherEngine

    engine = TeacherEngine(TEACHER, batch_size=16)
    yield engine
    engine.close()


bundled = pytest.fixture(scope="session", name="bundled")(_engine)
# An engine runs one service at a time: for tests that start their own beside those of the module.
spare = pytest.fixture(scope="session", name="spare")(_engine)
extra = pytest.fixture(scope="session", name="extra")(_engine)
