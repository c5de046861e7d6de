"""Generates the gRPC code beside `shard.proto`: `python parameter_server/protocol/generate.py` (needs grpcio-tools)."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGE = "embershard/parameter_server/protocol"
GENERATED = ("shard_pb2.py", "shard_pb2.pyi", "shard_pb2_grpc.py")


def generate(target: Path) -> None:
    """Writes the generated files into the folder `target`.

    Raises:
        RuntimeError: protoc failed; its own messages are on stderr.
    """
    from grpc_tools import protoc

    with tempfile.TemporaryDirectory() as folder:
        # The proto is registered under the package's path, so that the generated imports work inside the package.
        outputs = [f"--{kind}={folder}" for kind in ("python_out", "pyi_out", "grpc_python_out")]
        if protoc.main(["protoc", f"-I{PACKAGE}={HERE}", *outputs, f"{PACKAGE}/shard.proto"]):
            raise RuntimeError("protoc refused shard.proto")
        for name in GENERATED:
            shutil.copy(Path(folder) / PACKAGE / name, target / name)


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
