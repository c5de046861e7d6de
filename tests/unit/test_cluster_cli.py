"""The command line without Ray: exit codes, one-line errors, JSON as the last line."""

import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from embershard.cluster import calls, cli_scale
from embershard.cluster.cli import main
from embershard.cluster.config import RunConfig
from embershard.cluster.run_folder import RunFolder

COMMANDS = ("train", "plan", "evaluate", "export", "compare", "convert", "generate", "inspect", "chaos", "doctor")


class Result:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def error(self) -> str:
        assert self.err.count("\n") == 1, f"not one line: {self.err}"
        assert self.err.startswith("embershard: ")
        return self.err

    @property
    def json(self) -> dict[str, object]:
        return dict(json.loads(self.out.splitlines()[-1]))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)

    def run_command(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["embershard", *arguments])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        return Result(code, *capsys.readouterr())

    return run_command


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(run, command: str) -> None:  # type: ignore[no-untyped-def]
    result = run(command, "--help")
    assert result.code == 0
    assert f"embershard {command}" in result.out.split("Examples:")[1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("trian",), "Did you mean 'train'"),
        (("generate", "out"), "--rows"),
        (("generate", "out", "--rows", "0"), "--rows"),
        (
            ("generate", "out", "--rows", "10", "--cardinalities", "a,b"),
            "--cardinalities: 'a,b' is not kaggle, terabyte or a",
        ),
        (("convert", "criteo", "only-one"), "at least one INPUT and the OUTPUT"),
        (("convert", "avazy", "a", "b"), "avazy"),
        (("convert", "avazu", "a", "b", "--negatives", "2"), "--negatives is for movielens and interactions"),
        (("train", "absent.yaml"), "absent.yaml: no such run or configuration file"),
        (("train", "train.epocs=2"), "did you mean 'train.epochs'"),
        (
            ("train", "--epochs", "2"),
            "No such option: --epochs: settings are given as key=value, such as train.epochs=2.",
        ),
        (("train", "--resume"), "which run?"),
        (("train", "absent", "--resume"), "absent: no such run or configuration file"),
        (("train", "data.path=absent"), "absent"),
        (("train", "run.dir=absent", "data.path=x", "--resume"), "x"),
        (("train", "."), "without config.yaml"),
        (("train", "embedding.method=memcom"), "memcom needs either embedding.rows or embedding.ratio"),
        (("train", "model.name=ranknet"), "model.history: 'history' is not a bag of the data"),
        (("evaluate", "absent", "--data", "absent"), "absent: no such run or checkpoint"),
        (("evaluate", "."), ".: neither a run nor a checkpoint"),
        (("export", "absent", "out"), "absent: no such run or checkpoint"),
        (("inspect", "absent"), "absent"),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(run, arguments: tuple[str, ...], says: str) -> None:  # type: ignore[no-untyped-def]
    result = run(*arguments)
    assert result.code == 2
    assert says in result.error
    assert "Traceback" not in result.err
    assert not Path("runs").exists()


def test_debug_shows_the_traceback(run) -> None:  # type: ignore[no-untyped-def]
    assert "Traceback" in run("inspect", "absent", "--debug").err


def test_without_arguments_help(run) -> None:  # type: ignore[no-untyped-def]
    result = run()
    assert result.code == 2
    assert "train" in result.err


def test_an_existing_run_needs_resume(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    folder = RunFolder.open(tmp_path / "old", resume=False)
    folder.save_config("seed: 3\n")
    folder.close("finished")
    result = run("train", "old")
    assert result.code == 2
    assert "already a run; add --resume" in result.error


def test_workers_are_asked_for_in_the_range_of_the_run(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    assert "--workers N" in run("scale", "r").error
    folder = RunFolder.open(tmp_path / "r", resume=False)
    folder.save_config(RunConfig.load(None, "cluster.workers=[1,4]").to_yaml())
    outside = run("scale", "r", "--workers", "5")
    assert (outside.code, "cluster.workers=[1, 4], and 5 is outside" in outside.error) == (2, True)
    asked: list[object] = []

    def ask(coordinator: str, method: str, *arguments: object) -> dict[str, int]:
        asked.extend([coordinator, method, *arguments])
        return {"workers": 1, "wanted": 3}

    monkeypatch.setattr(calls, "ask", ask)
    monkeypatch.setattr(cli_scale, "_coordinator", lambda folder: nullcontext("coordinator"))
    result = run("scale", "r", "--workers", "3", "--json")
    assert asked == ["coordinator", "want_workers", 3]
    assert result.json == {"workers": 1, "wanted": 3}
    folder.close("finished")


def test_giving_up_a_scaling_is_asked_for_alone(run, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    asked: list[str] = []
    monkeypatch.setattr(calls, "ask", lambda coordinator, method: asked.append(method) or True)
    monkeypatch.setattr(cli_scale, "_coordinator", lambda folder: nullcontext("coordinator"))
    both = run("scale", "r", "--shards", "3", "--give-up")
    assert (both.code, "alone --give-up" in both.error, asked) == (2, True, [])
    result = run("scale", "r", "--give-up", "--json")
    assert asked == ["give_up_scaling"] and result.json == {"given_up": True}


def test_status_is_that_of_the_last_run(run) -> None:  # type: ignore[no-untyped-def]
    assert "runs: no run in here" in run("status").error
    for name, written in (("b", 1), ("a", 3), ("c", 2)):
        RunFolder.open(Path("runs", name), resume=False).close("finished")
        os.utime(Path("runs", name, "run.json"), (written, written))  # no two at one tick of the clock
    result = run("status", "--json")
    assert result.code == 0 and result.json["run_dir"] == "runs/a" and result.json["status"] == "finished"


def test_plan_says_what_a_run_will_need_and_starts_nothing(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    assert "data.path: nothing to plan for" in run("plan", "cluster.shards=3").error
    run("generate", "log", "--rows", "500")
    result = run("plan", "data.path=log", "cluster.shards=3", "embedding.method=hash", "embedding.ratio=8", "--json")
    assert result.code == 0, result.err
    assert result.json["shards"] == 3 and "3 shards" in result.out
    assert 7 * int(str(result.json["embedding_bytes"])) < int(str(result.json["full_embedding_bytes"]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log"]


@pytest.mark.parametrize("log", ["log", "memory://generated-log"])
def test_generate_then_inspect(run, log: str) -> None:  # type: ignore[no-untyped-def]
    made = run("generate", log, "--rows", "3000", "--cardinalities", "50,9", "--json")
    assert made.code == 0
    assert made.json["rows"] == 3000
    seen = run("inspect", log, "--verify", "--json")
    assert (seen.code, seen.json["kind"], seen.json["rows"]) == (0, "dataset", 3000)
    assert seen.json["problems"] == []
    again = run("generate", log, "--rows", "3000")
    assert again.code == 2 and "log" in again.error


@pytest.mark.parametrize(("name", "ids"), [("kaggle", 33_762_577), ("terabyte", 187_767_399)])
def test_generate_with_the_cardinalities_of_criteo(run, monkeypatch: pytest.MonkeyPatch, name: str, ids: int) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("embershard.datasets.synthetic._CALIBRATION_ROWS", 1000)
    monkeypatch.setattr("embershard.datasets.synthetic._BLOCK_ROWS", 1000)
    assert run("generate", "log", "--rows", "100", "--cardinalities", name).code == 0
    columns = [column for column in run("inspect", "log", "--json").json["columns"] if column["role"] == "categorical"]
    assert (len(columns), sum(column["cardinality"] for column in columns)) == (26, ids)


def test_doctor(run) -> None:  # type: ignore[no-untyped-def]
    result = run("doctor", "--json")
    findings = result.json["findings"]
    assert isinstance(findings, list)
    assert {"torch", "ray", "cpus", "memory", "kernel cache", "loopback"} <= {finding["name"] for finding in findings}
    assert result.json["ok"] is (result.code == 0)


def test_doctor_says_what_guards_the_shards(run, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    from embershard.cluster.doctor import _tls, _token

    for name in ("RAY_USE_TLS", "RAY_TLS_SERVER_CERT", "RAY_AUTH_MODE", "EMBERSHARD_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    secret = "0123456789abcdef"
    monkeypatch.setenv("EMBERSHARD_TOKEN", secret)
    assert _tls().level == "ok" and _tls().value.startswith("off: ")
    assert _token().value.endswith("given by EMBERSHARD_TOKEN") and secret not in repr(_token())
    monkeypatch.setenv("RAY_USE_TLS", "1")
    monkeypatch.setenv("EMBERSHARD_TOKEN", "short")
    result = run("doctor")
    assert result.code == 1
    assert "RAY_TLS_SERVER_CERT is not set" in result.out and "at least 16 printable" in result.out


def test_an_interrupt_is_130_and_one_line(run, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """typer turns KeyboardInterrupt into a value that it returns; it must not become exit code 0."""

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("embershard.cluster.doctor.examine", interrupted)
    result = run("doctor")
    assert (result.code, result.error) == (130, "embershard: interrupted\n")
