"""A whole node: NativeLink's part played by the harness, the client as it is installed, and a real daemon."""

from __future__ import annotations

import io
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from tests.node.cas import Cas
from tests.node.node import Node, NodeAction
from tests.support.daemon import PYTHON, WORKER_ID, WORKERS, Daemon
from wrapper.install_entrypoint import PROGRAM, install

KEY = {"persistentWorkerKey": "key"}


class WarmNode:
    """`with` starts the daemon and ends it; afterwards nothing may be left, which is looked at."""

    def __init__(
        self,
        *pools: Mapping[str, Any],
        owner: int = 0,
        python_client: bool = False,
        policy: Mapping[str, str] | None = None,
        actions: Mapping[str, Any] | None = None,
        **node_options: Any,
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="nlww-warm-"))
        self.folder.chmod(0o711)
        self.tools = self.folder / "tools"
        shutil.copytree(WORKERS, self.tools, ignore=shutil.ignore_patterns("__pycache__"))
        self.cas = Cas(self.folder / "cas", owner)
        self.socket = str(self.folder / "pool.sock")
        work = self.folder / "work"
        places = {"socket": self.socket, "work_roots": [str(work)]}
        install(str(self.folder / "bin"), in_python=python_client, out=io.StringIO(), **places)  # type: ignore[arg-type]
        self.client = str(self.folder / "bin" / PROGRAM)
        with open(f"{self.client}.conf", "a", encoding="utf-8") as file:
            file.writelines(f"{name} = {value}\n" for name, value in (policy or {}).items())
        self.node = Node(work, self.cas, self.client, **node_options)
        self.plain = Node(self.folder / "plain", self.cas, None)
        """The same without entrypoint and daemon."""
        usual = {
            "language": "custom(test)",
            "keys": ["key"],
            "worker_command": [],
            "tools": [{"pattern": "action_worker.py"}],
            "isolation": {"run_as_user": WORKER_ID},
        }
        self.document = {
            "actions": {"work_roots": [{"path": str(work), "trust_domain": "main"}], **(actions or {})},
            "pools": [{"name": f"pool{n}", **usual, **pool} for n, pool in enumerate(pools or [{}])],
            "state_dir": str(self.folder / "state"),
            "drain_timeout_s": 10,
        }
        self.daemon = Daemon(self, self.document)  # type: ignore[arg-type]

    @property
    def work(self) -> Path:
        return self.node.work_directory

    def leftovers(self) -> list[str]:
        """What is left where actions and workers were."""
        places = [self.work, self.folder / "plain", self.folder / ".nativelink_worker_wrapper"]
        return [str(path) for place in places if place.exists() for path in place.iterdir()]

    def __enter__(self) -> Self:
        self.daemon.start().wait_ready()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            self.daemon.__exit__(kind, *rest)
            if kind is None:
                assert self.leftovers() == []
                assert self.node.stuck == []
                assert self.cas.damage() == []
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    # ---- actions ---------------------------------------------------------------------------------------

    def tool(self, *flags: str) -> list[str]:
        """The start of the tool's command line, as it lies on the node."""
        return [PYTHON, "-I", "-S", str(self.tools / "action_worker.py"), *flags]

    def action(self, *lines: str, inputs: Mapping[str, bytes] | None = None, **fields: Any) -> NodeAction:
        """An action of that tool that does what these lines say."""
        flags = "".join(f"{line}\n" for line in lines).encode()
        tool = fields.pop("tool", self.tool())
        fields.setdefault("properties", KEY)
        return NodeAction([*tool, "@flags"], inputs={"flags": flags, **(inputs or {})}, **fields)

    def was_served(self) -> int:
        """How many actions workers have answered so far, as the daemon's log tells."""
        return self.daemon.log.read_text().count("worker ready")
