"""Environments are found by file, module and id; whatever is not found is answered with what exists."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from agentrl import Env
from agentrl.envs.calculator import Calculator
from agentrl.errors import UsageError
from agentrl.registry import find_env, list_envs, load_file

ONE = "from agentrl import Env\nclass Orders(Env):\n    pass\n"
TWO = ONE + "class Offers(Env):\n    pass\nclass Helper:\n    pass\n"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_by_file_module_and_id(here: Path) -> None:
    (here / "my_one_env.py").write_text(ONE)
    by_file = find_env("my_one_env.py:Orders")
    assert find_env("my_one_env.py") is by_file
    assert find_env(f"{here}/my_one_env.py:Orders") is by_file
    assert find_env("my_one_env.py", base=here) is by_file
    by_module = find_env("my_one_env:Orders")
    assert issubclass(by_file, Env)
    assert issubclass(by_module, Env)
    assert find_env("calculator") is Calculator
    assert find_env("agentrl.envs.calculator:Calculator") is Calculator


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("calculater", r"did you mean calculator\?; the ids are calculator, code_interpreter, guess"),
        ("envs_two.py", r"holds several environments; write envs_two.py:Class with one of Offers, Orders"),
        ("envs_two.py:Order", r"has no 'Order'; did you mean Orders\?; it holds Offers, Orders"),
        ("envs_two.py:Helper", "is not an environment: it must subclass agentrl.Env; it holds Offers, Orders"),
        ("envs_too.py:Orders", r"there is no file envs_too.py; did you mean envs_two.py\?"),
        ("no.such.module:Orders", "there is no module 'no.such.module'"),
        ("agentrl.envs.calculator:Calculater", r"did you mean Calculator\?"),
        ("envs_empty.py", "holds no environment"),
        ("envs_syntax.py", r"envs_syntax.py:2: the file cannot be imported: SyntaxError"),
        ("envs_raises.py", r"envs_raises.py:3: the file cannot be imported: ZeroDivisionError"),
        ("envs_exits.py", r"envs_exits.py:2: the file cannot be imported: SystemExit"),
        ("envs_imports.py:X", "there is no module|cannot be imported: ModuleNotFoundError: No module named 'nowhere'"),
        ("", "no environment is called ''"),
    ],
)
def test_what_is_wrong_is_said(here: Path, spec: str, message: str) -> None:
    (here / "envs_two.py").write_text(TWO)
    (here / "envs_empty.py").write_text("from agentrl import Env\n")
    (here / "envs_syntax.py").write_text("x = 1\nx = = 2\n")
    (here / "envs_raises.py").write_text("def f():\n    return 1\ny = f() / 0\n")
    (here / "envs_exits.py").write_text("import sys\nsys.exit(1)\n")
    (here / "envs_imports.py").write_text("import nowhere\n")
    with pytest.raises(UsageError, match=message):
        find_env(spec)


def test_files_may_import_their_neighbours_and_are_loaded_once(here: Path) -> None:
    (here / "sub").mkdir()
    (here / "sub" / "neighbour_of_env.py").write_text("value = 3\n")
    (here / "sub" / "an_env.py").write_text("from neighbour_of_env import value\n" + ONE)
    assert load_file("sub/an_env.py").value == 3
    assert load_file("sub/an_env.py") is load_file(here / "sub" / "an_env.py")


def test_installed_packages_register_and_cannot_take_over(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        importlib.metadata.EntryPoint("calculator", "bad.place:Calculator", "agentrl.envs"),
        importlib.metadata.EntryPoint("mine", "agentrl.envs.guess:Guess", "agentrl.envs"),
    ]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points)
    entries = {entry.id: entry.target for entry in list_envs()}
    assert entries["calculator"] == "agentrl.envs.calculator:Calculator"
    assert find_env("mine").__name__ == "Guess"
