"""The demo with its pool in containers: the same bytes, its table, and a speed-up all the same."""

from __future__ import annotations

import glob
import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.support.cri import engine_is_empty
from tests.support.engine import ROOT, PrivateContainerd
from tests.support.oci_image import HOST_IMAGE

DEMO = ROOT / "examples" / "java-persistent-worker" / "demo"


def run_demo(*options: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [DEMO, *options], capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=900
    )


@pytest.mark.engine
def test_the_quick_demo_in_containers_gives_identical_bytes_and_a_table(
    engine: PrivateContainerd, tmp_path: Path
) -> None:
    figures = tmp_path / "figures.json"
    # Of the machine, the image lacks a C library; the JDK is the demo's own business.
    libraries = ["/usr/lib64", "/etc/ld.so.cache", *glob.glob("/usr/lib/*-linux-gnu")]
    mounts = [word for path in libraries if os.path.exists(path) for word in ("--mount", path)]
    done = run_demo(
        *("--quick", "--input", "own", "--json", figures),
        *("--runtime", "cri", "--cri-socket", engine.socket, "--container-image", HOST_IMAGE),
        *mounts,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(figures.read_text())
    assert (found["identical"], found["runtime"], found["actions"]) == (True, "cri", 40)
    assert found["steady_median_s"] < found["process_c1_median_s"]
    for line in (
        "one process an action, C1 + serial GC",
        "warm pool in containers, C1 + serial GC",
        "identical bytes: yes",
    ):
        assert line in done.stdout
    assert engine_is_empty(engine)


@pytest.mark.engine
def test_an_image_that_the_engine_cannot_have_ends_the_demo_with_its_name(engine: PrivateContainerd) -> None:
    done = run_demo(
        *("--quick", "--input", "own", "--actions", "2"),
        *("--runtime", "cri", "--cri-socket", engine.socket, "--container-image", "localhost/no/such:1"),
    )
    assert done.returncode == 1
    assert "localhost/no/such:1" in done.stderr
    assert engine_is_empty(engine)


@pytest.mark.parametrize("given", [(), ("--cri-socket", "/run/x.sock"), ("--container-image", "x")])
def test_without_an_engine_or_an_image_the_demo_says_what_to_give(given: tuple[str, ...]) -> None:
    done = run_demo("--runtime", "cri", *given)
    assert done.returncode == 2
    assert "--cri-socket PATH" in done.stderr
    assert "--container-image REF" in done.stderr
