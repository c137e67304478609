"""A run folder belongs to one process at a time, and says what made it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from agentrl.errors import RunFailed, UsageError
from agentrl.store import RunFolder
from agentrl.store.run import git_commit, read_info, write_atomic


def make(path: Path, resume: bool = False, config: str = "seed: 0\n") -> RunFolder:
    return RunFolder.create(path, config, config_version=1, command=["agentrl", "train"], resume=resume)


def test_a_new_folder_says_what_made_it(tmp_path: Path) -> None:
    with make(tmp_path / "deep" / "run") as run:
        assert {path.name for path in run.path.iterdir()} >= {
            "run.json",
            "config.resolved.yaml",
            "seg",
            "media",
            "checkpoints",
        }
        info = json.loads((run.path / "run.json").read_text())
        assert set(info) == {
            "id", "created", "command", "config_version", "git_commit", "versions", "machine", "resumed",
        }  # fmt: skip
        assert info["command"] == ["agentrl", "train"] and info["versions"]["python"] == sys.version.split()[0]
        assert info["machine"]["cores"] >= 1
        assert run.config_path.read_text() == "seed: 0\n"
        assert read_info(run.path) == run.info and run.attempt == 0


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "run").close()
    with pytest.raises(UsageError, match="holds a run already: use --resume"):
        make(tmp_path / "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    for resume in (False, True):
        with pytest.raises(UsageError, match="is not empty and holds no run"):
            make(tmp_path / "other", resume)
    with pytest.raises(UsageError, match="is a file"):
        make(tmp_path / "other" / "thesis.tex")
    (tmp_path / "empty").mkdir()
    make(tmp_path / "empty").close()


def test_resuming_keeps_the_identity_and_counts(tmp_path: Path) -> None:
    with make(tmp_path / "run", resume=True) as first:  # nothing to resume yet: a new run
        assert first.attempt == 0
    for attempt in (1, 2):
        with make(tmp_path / "run", resume=True, config="seed: 1\n") as again:
            assert (again.info.id, again.attempt) == (first.info.id, attempt)
            assert again.config_path.read_text() == "seed: 1\n"
    with RunFolder.open(tmp_path / "run") as run:
        assert run.attempt == 2
    with pytest.raises(UsageError, match="holds no run"):
        RunFolder.open(tmp_path)
    (tmp_path / "run" / "run.json").write_text("{")
    with pytest.raises(UsageError, match="cannot be read"):
        RunFolder.open(tmp_path / "run")


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    with make(tmp_path / "run"):
        code = (
            "import sys; from pathlib import Path; from agentrl.store import RunFolder\n"
            "from agentrl.errors import UsageError\n"
            "try: RunFolder.open(Path(sys.argv[1]))\n"
            "except UsageError as error: print(error)\n"
        )
        command = [sys.executable, "-c", code, str(tmp_path / "run")]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert re.search(rf"is in use by process {os.getpid()}; wait for it, stop it", said)
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == ""


def test_a_killed_process_leaves_the_folder_free(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from agentrl.store import RunFolder\n"
        "run = RunFolder.create(Path(sys.argv[1]), '', config_version=1); print('ready', flush=True); time.sleep(60)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    with pytest.raises(UsageError, match=f"in use by process {child.pid}"):
        make(tmp_path / "run", resume=True)
    child.kill()
    child.wait()
    child.stdout.close()
    make(tmp_path / "run", resume=True).close()


def test_files_are_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.json"
    write_atomic(path, "old")

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RunFailed, match="No space left"):
            write_atomic(path, "new")
    assert path.read_text() == "old"
    write_atomic(path, "new")
    assert path.read_text() == "new"


def test_the_commit_of_a_repository(tmp_path: Path) -> None:
    assert git_commit(tmp_path) is None
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run([*git, "init", "-q"], cwd=tmp_path, check=True)
    (tmp_path / "a").write_text("1")
    subprocess.run([*git, "add", "a"], cwd=tmp_path, check=True)
    subprocess.run([*git, "commit", "-q", "-m", "a"], cwd=tmp_path, check=True)
    commit = git_commit(tmp_path)
    assert commit is not None and re.fullmatch(r"[0-9a-f]{40}", commit)
    (tmp_path / "a").write_text("2")
    assert git_commit(tmp_path) == commit + "+"
