"""Every block of code in README.md and docs/ that says it can run does run, in order, in one folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
BLOCK = re.compile(r"^```(?P<language>[^\n]*)\n(?P<code>.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[str, str]]:
    return [(found["language"].strip(), found["code"]) for found in BLOCK.finditer(page.read_text())]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_blocks_run(page: Path, tmp_path: Path, ray_address: str) -> None:
    """`bash run` and `python` blocks; the others need data or a machine that a test does not have."""
    environment = os.environ | {
        "EMBERSHARD_CLUSTER__ADDRESS": ray_address,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    commands = {"bash run": ["bash", "-e"], "python": [sys.executable, "-"]}
    for language, code in blocks(page):
        if language in commands:
            done = subprocess.run(
                commands[language], input=code, cwd=tmp_path, env=environment, text=True, capture_output=True
            )
            assert done.returncode == 0, f"{code}\n{done.stderr[-2000:]}"


def test_two_set_up_lines() -> None:
    """One ends in the main job, one in the tests, and both go through the constraints."""
    lines = [line for line in (ROOT / "README.md").read_text().splitlines() if "pip install -c constraints.txt" in line]
    assert [line.split()[-1] for line in lines] == ["train", "pytest"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_settings_that_are_mentioned_exist(page: Path) -> None:
    """`embershard X` and `section.key=` anywhere in the text, also in blocks that do not run."""
    from embershard.cluster.cli import app
    from embershard.cluster.config import RunConfig

    text = page.read_text()
    known = {command.callback.__name__ for command in app.registered_commands if command.callback}
    known |= {str(group.name) for group in app.registered_groups}
    assert set(re.findall(r"^(?:\$ )?embershard (\w+)", text, re.MULTILINE)) <= known
    sections = RunConfig.model_fields
    for section, key in re.findall(r"(?<![\w.])(\w+)\.(\w+)[\w.]*=", text):  # also section.key.more=
        assert section in sections, section
        assert key in sections[section].annotation.model_fields, f"{section}.{key}"  # type: ignore[union-attr]
