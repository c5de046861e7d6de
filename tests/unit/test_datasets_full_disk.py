"""Commands that write data on a disk without room: the system itself refuses the bytes, through a limit on the size of
a file that a process of its own sets after its kernels are compiled (their cache would hit the limit too)."""

import json
import subprocess
import sys
import textwrap

import pytest

CASES = ("begin", "rows", "footer")
COMMANDS = ("generate", "convert", "histories")

WRITER = """
    import json, resource, sys
    from pathlib import Path
    from embershard.datasets import synthetic
    from embershard.datasets.criteo import convert_criteo
    from embershard.datasets.histories import convert_histories

    synthetic._CALIBRATION_ROWS = synthetic._BLOCK_ROWS = 1000
    folder = Path(sys.argv[1])
    logs = [folder / "day_0", folder / "day_1", folder / "ratings.csv"]
    for log, lines in zip(logs[:2], (1, 500)):
        rows = (["1", *[str(n * k) for k in range(13)], *[f"{n * f:08x}" for f in range(26)]] for n in range(lines))
        log.write_text("".join("\\t".join(row) + "\\n" for row in rows))
    logs[2].write_text("".join(f"{user},{item},5\\n" for user in range(40) for item in range(20)))
    commands = {
        "generate": lambda out: synthetic.generate(out, rows=5000, cardinalities=[50, 9], dense=2),
        "convert": lambda out: convert_criteo([str(log) for log in logs[:2]], out),
        "histories": lambda out: convert_histories([str(logs[2])], out),
    }
    limits, found = resource.getrlimit(resource.RLIMIT_FSIZE), {}
    for name, command in commands.items():
        command(str(folder / name))
        size = max(path.stat().st_size for path in (folder / name).rglob("*.parquet"))
        for case, room in (("begin", 2), ("rows", 100), ("footer", size - 20)):
            here = folder / f"{name}-{case}"
            here.mkdir()
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
            try:
                command(str(here / "out"))
            except Exception as error:
                found[name, case] = type(error).__name__, str(error)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    print(json.dumps([[*key, *value] for key, value in found.items()]))
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory):
    """The folder, and {(command, case): (name of the error, its message)}."""
    folder = tmp_path_factory.mktemp("full")
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(WRITER), str(folder)], capture_output=True, text=True, check=False
    )
    assert (process.returncode, process.stderr) == (0, "")
    return folder, {(name, case): (kind, text) for name, case, kind, text in json.loads(process.stdout)}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("command", COMMANDS)
def test_full_disk_is_one_line_and_leaves_nothing(written, command, case):
    folder, found = written
    kind, message = found[command, case]
    here = folder / f"{command}-{case}"
    output = here / ("out/train" if command == "histories" else "out")
    assert kind == "DataError"
    assert message == (
        f"{output}: cannot be written, the disk of {output.parent} is full (File too large): make room there and start "
        "again, nothing of it was left"
    )
    assert not [path for path in here.rglob("*") if path.is_file()]
