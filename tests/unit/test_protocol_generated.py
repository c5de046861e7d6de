"""The generated gRPC code in the tree is what `shard.proto` generates today."""

from pathlib import Path

from embershard.parameter_server.protocol import generate

TREE = Path(__file__).resolve().parents[2] / "parameter_server" / "protocol"


def test_generated_code_is_current(tmp_path: Path) -> None:
    generate.generate(tmp_path)
    for name in generate.GENERATED:
        assert (tmp_path / name).read_text() == (TREE / name).read_text(), (
            f"{name} differs: run python parameter_server/protocol/generate.py"
        )
