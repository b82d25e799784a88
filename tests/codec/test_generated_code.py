"""The generated protobuf code is what proto/ gives, and is on the wire what Bazel speaks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from wrapper.worker_protocol import worker_protocol_pb2


def test_the_checked_in_code_is_current(repository: Path) -> None:
    done = subprocess.run(
        [sys.executable, repository / "tools" / "generate_protos.py", "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_change_of_the_definitions_is_noticed(repository: Path, tmp_path: Path) -> None:
    for name in ("proto/worker_protocol.proto", "proto/cri_runtime.proto", "tools/generate_protos.py"):
        copy = tmp_path / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((repository / name).read_bytes())
    proto = tmp_path / "proto" / "worker_protocol.proto"
    script = tmp_path / "tools" / "generate_protos.py"
    (tmp_path / "wrapper" / "worker_protocol").mkdir(parents=True)
    for name in ("worker_protocol_pb2.py", "worker_protocol_pb2.pyi"):
        source = repository / "wrapper" / "worker_protocol" / name
        (tmp_path / "wrapper" / "worker_protocol" / name).write_bytes(source.read_bytes())
    proto.write_text(proto.read_text().replace("bool cancel = 4", "bool cancel = 7"))
    done = subprocess.run(
        [sys.executable, script, "--check"], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 1
    assert "worker_protocol_pb2.py is not what proto/ gives" in done.stderr


def test_fields_have_the_numbers_and_wire_types_of_bazels_protocol() -> None:
    request = worker_protocol_pb2.WorkRequest(
        arguments=[b"a"],
        inputs=[worker_protocol_pb2.Input(path=b"p", digest=b"d")],
        request_id=1,
        cancel=True,
        verbosity=2,
        sandbox_dir=b"s",
    )
    assert request.SerializeToString() == bytes.fromhex("0a0161 1206 0a0170 120164 1801 2001 2802 320173")
    response = worker_protocol_pb2.WorkResponse(exit_code=1, output=b"o", request_id=2, was_cancelled=True)
    assert response.SerializeToString() == bytes.fromhex("0801 12016f 1802 2001")


def test_messages_know_the_module_that_they_are_imported_from() -> None:
    assert worker_protocol_pb2.WorkRequest.__module__ == "wrapper.worker_protocol.worker_protocol_pb2"
    assert worker_protocol_pb2.DESCRIPTOR.package == "nativelink_worker_wrapper.worker_protocol"
