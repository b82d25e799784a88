"""A pytest plugin: the fixture `engine`, one private containerd for a whole run, with the tests' images.

A test that asks for it is marked `engine`. It skips where there can be no engine. Knows nothing of the tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.oci_image import HOST_IMAGE, PAUSE_IMAGE, host_image, pause_image


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "engine" in getattr(item, "fixturenames", ()) and item.get_closest_marker("engine") is None:
            item.add_marker(pytest.mark.engine)


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    """A `PrivateContainerd` that runs and has HOST_IMAGE and PAUSE_IMAGE.

    It is everybody's: a test that kills or restarts it leaves it running, and removes its own pods.
    """
    from tests.support.engine import PrivateContainerd, why_no_engine

    reason = why_no_engine()
    if reason is not None:
        pytest.skip(reason)
    archives: Path = tmp_path_factory.mktemp("images")
    pause_image(archives / "pause.tar")
    host_image(archives / "host.tar")
    engine = PrivateContainerd()
    try:
        engine.start()
        engine.import_image(archives / "pause.tar", PAUSE_IMAGE)
        engine.import_image(archives / "host.tar", HOST_IMAGE)
        yield engine
    finally:
        engine.stop()
