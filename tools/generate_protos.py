#!/usr/bin/env python3
"""Generates the Python code of proto/*.proto into the package; `--check` only compares.

The generated files are checked in, so that using the package needs no compiler. Needs grpcio-tools
(the `dev` extra). Exit code 1: with `--check`, something is not current; else the compiler failed.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

TARGETS = {
    "worker_protocol.proto": "wrapper/worker_protocol",
    "cri_runtime.proto": "wrapper/runtime",
}
"""Which file of proto/ goes to which package.

The compiler gets each file under the path of its package: the name under which a file registers with
the protobuf runtime is then `wrapper/...`, which clashes with nobody else's, and the messages know
the module that they can be imported from.
"""


def generate(into: Path) -> list[Path]:
    """Generate everything below `into`; returns the generated files, relative to it."""
    from grpc_tools import protoc  # type: ignore[import-untyped, unused-ignore]

    generated: list[Path] = []
    with tempfile.TemporaryDirectory(prefix="protos-") as staging:
        for name, package in TARGETS.items():
            staged = Path(staging, package, name)
            staged.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / "proto" / name, staged)
            argv = ["protoc", f"-I{staging}", f"--python_out={into}", f"--pyi_out={into}", str(staged)]
            if protoc.main(argv) != 0:
                raise SystemExit(f"protoc failed on proto/{name}")
            stem = staged.stem
            stub = into / package / f"{stem}_pb2.pyi"
            stub.write_text('# mypy: disable-error-code="type-arg"\n' + stub.read_text())
            generated += [Path(package, f"{stem}_pb2.py"), Path(package, f"{stem}_pb2.pyi")]
    return generated


def stale_files() -> list[Path]:
    """The checked-in files that differ from what proto/ gives now."""
    with tempfile.TemporaryDirectory(prefix="protos-") as scratch:
        fresh = generate(Path(scratch))
        return [
            path
            for path in fresh
            if not (ROOT / path).exists() or (ROOT / path).read_bytes() != Path(scratch, path).read_bytes()
        ]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with the checked-in files")
    if not parser.parse_args().check:
        for path in generate(ROOT):
            print(f"wrote {path}")
        return 0
    stale = stale_files()
    for path in stale:
        print(f"{path} is not what proto/ gives; run tools/generate_protos.py", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
