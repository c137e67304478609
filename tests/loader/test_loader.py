"""Loading: what YAML means, how layers merge, and one clear line for every mistake."""

# ruff: noqa: E501 - the lines a user reads are quoted whole

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from agentrl.algo.component import Component, one_of
from agentrl.errors import UsageError
from agentrl.loader import ConfigError, Loaded, load, to_yaml


class Shape(Component):
    point = "test_shape"


class Circle(Shape):
    type: Literal["circle"] = "circle"
    radius: float = 1.0


class Square(Shape):
    type: Literal["square"] = "square"
    side: float = Field(default=1.0, gt=0)
    inner: one_of(Shape) | None = None  # type: ignore[valid-type]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class World(Section):
    id: str
    options: dict[str, Any] = {}


class Path_(Section):
    type: Literal["hf"] = "hf"
    path: str
    rank: int | None = None


class Scratch(Section):
    type: Literal["scratch"] = "scratch"
    width: int = 8


def _bare(value: object) -> object:
    if isinstance(value, str):
        return {"type": "hf", "path": value}
    return {"type": "scratch", **value} if isinstance(value, dict) and "width" in value else value


class Stage(Section):
    lr: float = 1e-3
    name: Literal["sft", "rl"] = "rl"
    warm: bool = False

    @model_validator(mode="after")
    def _sense(self) -> Stage:
        if self.warm and self.name == "sft":
            raise ValueError("warm does nothing in an sft stage; remove it")
        return self


class Run(Section):
    imports: tuple[str, ...] = ()
    title: str = "t"
    seed: int = Field(default=0, ge=0)
    note: str | None = None
    env: Annotated[World, BeforeValidator(lambda v: {"id": v} if isinstance(v, str) else v)] = World(id="none")
    model: Annotated[Annotated[Path_ | Scratch, Field(discriminator="type")], BeforeValidator(_bare)] = Scratch()
    shape: one_of(Shape) = Circle()  # type: ignore[valid-type]
    shapes: tuple[one_of(Shape), ...] = Field(default=("circle",), min_length=1, validate_default=True)  # type: ignore[valid-type]
    stages: list[Stage] = []
    extra: dict[str, float] = {}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def read(text: str | bytes, *overrides: str, name: str = "run.yaml") -> Loaded[Run]:
    Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return load([name], overrides, schema=lambda imports: Run)


def wrong(text: str | bytes, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read(text, *overrides)
    lines = str(caught.value).splitlines()
    assert len(lines) == len(caught.value.mistakes), "one line for each mistake"
    return lines


# -- what is read --------------------------------------------------------------------------------


def test_yaml_is_version_1_2() -> None:
    config = read(
        "title: no\nextra: {a: 1e-6, b: 010, c: 0x1f, d: .inf, e: -1_000, f: 12.5}\nnote: 2026-01-01\n"
    ).config
    assert config.title == "no"
    assert config.note == "2026-01-01"
    assert config.extra == {"a": 1e-6, "b": 10.0, "c": 31.0, "d": float("inf"), "e": -1000.0, "f": 12.5}


def test_an_empty_file_is_all_defaults() -> None:
    assert read("").config == Run()
    assert read("# nothing\n").config == Run()


def test_overrides_are_yaml_values_and_know_lists_and_deletion() -> None:
    text = "stages: [{lr: 1}, {lr: 2}, {lr: 3}]\nnote: x\nseed: 4\n"
    config = read(text, "stages.1.lr=5e-1", "note=null", "~seed", "extra={a: 1, b: 2}", "extra.c=3", "~stages.0").config
    assert [stage.lr for stage in config.stages] == [0.5, 3.0]
    assert config.note is None and config.seed == 0
    assert config.extra == {"a": 1, "b": 2, "c": 3}


def test_deletions_mean_the_numbers_of_the_files() -> None:
    text = "stages: [{lr: 0}, {lr: 1}, {lr: 2}, {lr: 3}]\n"
    assert [s.lr for s in read(text, "~stages.0", "~stages.2", "stages.3.lr=9").config.stages] == [1.0, 9.0]


def test_later_files_and_later_overrides_win() -> None:
    Path("a.yaml").write_text("seed: 1\nextra: {a: 1, b: 1}\nstages: [{lr: 1}, {lr: 2}]\n")
    Path("b.yaml").write_text("seed: 2\nextra: {b: 2, c: 2}\nstages: [{lr: 3}]\n")
    loaded = load(["a.yaml", "b.yaml"], ["title=x", "title=y"], schema=lambda imports: Run)
    assert loaded.config.seed == 2 and loaded.config.title == "y"
    assert loaded.config.extra == {"a": 1, "b": 2, "c": 2}, "mappings merge"
    assert len(loaded.config.stages) == 1, "lists are replaced"
    assert loaded.origin["extra.a"] == "a.yaml:2" and loaded.origin["extra.b"] == "b.yaml:2"
    assert loaded.origin["title"] == "title=y" and "note" not in loaded.origin
    assert loaded.place("extra.b.deeper") == "b.yaml:2" and loaded.place("note") is None


def test_base_is_relative_to_its_file_and_lies_under_it(tmp_path: Path) -> None:
    (tmp_path / "sub" / "deep").mkdir(parents=True)
    (tmp_path / "sub" / "deep" / "root.yaml").write_text("seed: 1\ntitle: root\nnote: root\n")
    (tmp_path / "sub" / "mid.yaml").write_text("base: deep/root.yaml\ntitle: mid\nnote: mid\n")
    (tmp_path / "other.yaml").write_text("extra: {a: 1}\n")
    loaded = read("base: [sub/mid.yaml, other.yaml]\nnote: top\n")
    assert (loaded.config.seed, loaded.config.title, loaded.config.note) == (1, "mid", "top")
    assert loaded.config.extra == {"a": 1.0}
    assert loaded.origin["seed"] == "sub/deep/root.yaml:1"


def test_environment_variables_are_put_in_but_not_written_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHO", "me")
    monkeypatch.setenv("SEED", "7")
    loaded = read("title: hello ${env:WHO}, $${env:WHO}\nseed: ${env:SEED}\nmodel: /m/${env:WHO}\n")
    assert loaded.config.title == "hello me, ${env:WHO}"
    assert loaded.config.seed == 7
    assert loaded.config.model == Path_(path="/m/me")
    assert loaded.resolved["title"] == "hello ${env:WHO}, $${env:WHO}"
    assert loaded.resolved["model"]["path"] == "/m/${env:WHO}" and loaded.resolved["seed"] == "${env:SEED}"
    assert read(to_yaml(loaded.resolved), name="again.yaml").config == loaded.config


def test_anchors_and_flow_are_plain_yaml() -> None:
    config = read("stages:\n- &a {lr: 2}\n- *a\n").config
    assert config.stages == [Stage(lr=2), Stage(lr=2)]


# -- components and shorthands -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "overrides", "shape"),
    [
        ("shape: square\n", ["shape.side=3"], Square(side=3)),
        ("shape: {type: circle, radius: 2}\n", ["shape=square"], Square()),
        ("shape: {type: circle, radius: 2}\n", ["shape=circle"], Circle(radius=2)),
        ("shape: {type: circle, radius: 2}\n", ["shape.type=square"], Square()),
        ("shape: {type: circle, radius: 2}\n", ["shape.side=4", "shape.type=square"], Square(side=4)),
        ("shape: {type: circle, radius: 2}\n", ["shape.side=4", "shape=square"], Square(side=4)),
        (
            "shape: {type: square, side: 2}\n",
            ["shape={inner: circle}"],
            Square.model_validate({"side": 2, "inner": "circle"}),
        ),
        (
            "shape: {type: square, inner: circle}\n",
            ["shape.inner.radius=5"],
            Square.model_validate({"inner": {"type": "circle", "radius": 5}}),
        ),
    ],
)
def test_a_component_chosen_anew_leaves_the_keys_of_the_old_one(text: str, overrides: list[str], shape: Shape) -> None:
    assert read(text, *overrides).config.shape == shape


def test_a_shorthand_means_what_the_schema_makes_of_it() -> None:
    assert read("model: {width: 4}\n", "model=some/folder").config.model == Path_(path="some/folder")
    assert read("model: {path: a, type: hf, rank: 2}\n", "model=b").config.model == Path_(path="b", rank=2)
    assert read("model: a\n", "model.rank=2").config.model == Path_(path="a", rank=2)
    assert read("env: orders\n", "env.options.hard=true").config.env == World(id="orders", options={"hard": True})
    assert read("env: {id: orders, options: {hard: 1}}\n", "env=maze").config.env == World(id="maze")
    loaded = read("env: orders\nmodel: a\nshapes: [circle]\n")
    assert loaded.origin["env.id"] == "run.yaml:1" and loaded.origin["model.path"] == "run.yaml:2"
    assert loaded.origin["shapes.0.type"] == "run.yaml:3" and loaded.resolved["shapes"][0]["type"] == "circle"


# -- what is wrong -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("seed: 1\ntitel: x\n", "run.yaml:2: titel: unknown key; did you mean 'title'?"),
        ("seed: 1\nside: 2\n", "run.yaml:2: side: unknown key; did you mean 'shape.side'?"),
        ("stages:\n- lr: 1\n- lrr: 2\n", "run.yaml:3: stages.1.lrr: unknown key; did you mean 'lr'?"),
        ("shape:\n  type: square\n  sode: 2\n", "run.yaml:3: shape.sode: unknown key; did you mean 'side'?"),
        ("shape:\n  type: circle\n  side: 2\n", "run.yaml:3: shape.side: unknown key; it does not belong to type 'circle'"),
        ("shape: sqare\n", "run.yaml:1: shape: there is no 'sqare'; did you mean 'square'?"),
        ("shapes:\n- circle\n- {type: ring}\n", "run.yaml:3: shapes.1: there is no 'ring'; it is one of circle, square"),
        ("shapes: []\n", "run.yaml:1: shapes: should have at least 1 entries, not 0"),
        ("shape: {radius: 1}\n", "run.yaml:1: shape: name a type; it is one of circle, square"),
        ("shape: {type: square, side: -1}\n", "run.yaml:1: shape.side: should be greater than 0, not -1"),
        ("seed: x\n", "run.yaml:1: seed: should be a whole number, not 'x'"),
        ("seed: 1.5\n", "run.yaml:1: seed: should be a whole number, not 1.5"),
        ("stages:\n\n- lr: fast\n", "run.yaml:3: stages.0.lr: should be a number, not 'fast'"),
        ("stages: 3\n", "run.yaml:1: stages: should be a list, not 3"),
        ("shapes: 3\n", "run.yaml:1: shapes: should be a list, not 3"),
        ("stages: [3]\n", "run.yaml:1: stages.0: should be a mapping of keys to values, not 3"),
        ("stages: [{name: rll}]\n", "run.yaml:1: stages.0.name: should be 'sft' or 'rl', not 'rll'; did you mean 'rl'?"),
        (
            "stages:\n- name: sft\n  warm: true\n",
            "run.yaml:3: stages.0: warm does nothing in an sft stage; remove it",
        ),
        ("env: {}\n", "run.yaml:1: env.id: this key is required; add it"),
        ("seed: 1\nseed: 2\n", "run.yaml:2: key 'seed' stands here twice; keep one"),
        ("seed:\n\t1\n", "run.yaml:2: a tab cannot indent YAML; use spaces"),
        ("title: a: b\n", "run.yaml:1: a ':' that YAML does not expect here; put the text in quotes or mend the indentation"),
        ("extra: {a: 1\nseed: 2\n", "run.yaml:2: not valid YAML: expected ',' or '}', but got ':' (while parsing a flow mapping, begun on line 1)"),
        ("a: 1\n---\nb: 2\n", "run.yaml:2: a second document begins here ('---'); keep one document a file"),
        ("title: *x\n", "run.yaml:1: not valid YAML: found undefined alias 'x'"),
        ("title: &x [*x]\n", "run.yaml:1: an alias must not contain itself"),
        ("<<: {seed: 1}\n", "run.yaml:1: '<<' is not supported; put what is shared into a file and name it in base:"),
        ("title: !!python/none x\n", "run.yaml:1: tag tag:yaml.org,2002:python/none is not supported; write plain YAML"),
        ("[1, 2]: 3\n", "run.yaml:1: a key must be a word"),
        ("- 1\n", "run.yaml:1: the top level must be a mapping of keys to values"),
        ("seed: 1\ntitle: ${env:NOT_SET_HERE}\n", "run.yaml:2: environment variable NOT_SET_HERE is not set; export it first"),
        ("title: ${seed}\n", "run.yaml:1: ${seed} is not understood: only ${env:NAME} is (a literal '${' is '$${')"),
        ("base: run.yaml\n", "run.yaml:1: base: files include each other in a circle: run.yaml → run.yaml"),
        ("base: nosuch.yaml\n", "run.yaml:1: nosuch.yaml no such file; did you mean 'run.yaml'?"),
        ("base: 3\n", "run.yaml:1: base: takes a file or a list of files, relative to this one"),
        (b"seed: 1\ntitle: \xff\n", "run.yaml:2: byte 0xff is not UTF-8; save the file as UTF-8"),
        (b"seed: 1\ntitle: \x00\n", "run.yaml:2: character U+0000 is not allowed in YAML; remove it"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_file_is_one_line_with_its_place(text: str | bytes, line: str) -> None:
    assert wrong(text)[0] == line
    assert len(wrong(text)) == 1


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("seed=x", "seed=x: seed: should be a whole number, not 'x'"),
        ("sed=1", "sed=1: sed: unknown key; did you mean 'seed'?"),
        ("stages.0.lrr=1", "stages.0.lrr=1: stages.0.lrr: unknown key; did you mean 'lr'?"),
        ("stages.1.lr=1", "stages.1.lr=1: stages is a list and has no entry '1': its entries are 0 to 0"),
        ("stages.x.lr=1", "stages.x.lr=1: stages is a list and has no entry 'x': its entries are 0 to 0"),
        ("+seed=1", "+seed=1: write seed=1 without '+': it sets the key whether or not a file has it"),
        ("++seed=1", "++seed=1: write seed=1 without '+': it sets the key whether or not a file has it"),
        ("~sead", "~sead: the configuration sets no key 'sead', so nothing is taken out; did you mean 'seed'?"),
        ("seed", "seed: an override is written path.to.key=value, or ~path.to.key to take a key out"),
        ("stages..lr=1", "stages..lr=1: an override is written path.to.key=value, or ~path.to.key to take a key out"),
        ("base=x.yaml", "base=x.yaml: base: belongs in a file; name the other file before the overrides"),
        ("title=a #b", "title=a #b: '#' starts a comment in YAML; put the value in quotes"),
        ("extra={a: 1", "extra={a: 1: not valid YAML: expected ',' or '}', but got '<stream end>' (while parsing a flow mapping, begun on line 1)"),
        ("title=${env:NOT_SET_HERE}", "title=${env:NOT_SET_HERE}: environment variable NOT_SET_HERE is not set; export it first"),
        ("shape.type=sqare", "shape.type=sqare: shape: there is no 'sqare'; did you mean 'square'?"),
        ("shapes.0.radius=2", "shapes.0.radius=2: shapes is set nowhere, so it has no entry '0' to change; set the whole list"),
        ("model.rank=2", "model.rank=2: model: name a type; it is one of hf, scratch"),
    ],
)  # fmt: skip
def test_a_mistake_in_an_override_is_named_by_its_text(override: str, line: str) -> None:
    assert wrong("seed: 1\nstages: [{lr: 1}]\n", override) == [line]


def test_setting_and_taking_out_the_same_key_is_refused() -> None:
    assert wrong("", "extra.a=1", "~extra") == ["~extra: takes out what extra.a=1 sets; give one of the two"]


def test_all_mistakes_come_at_once() -> None:
    lines = wrong("titel: x\nseed: x\nnote: ${env:NOT_SET_HERE}\nseed: 1\n", "stages.0=1", "shape=sqare", "+a=1")
    places = [line.split(": ")[0] for line in lines]
    assert places == ["run.yaml:3", "run.yaml:4", "+a=1", "stages.0=1", "run.yaml:2", "shape=sqare", "run.yaml:1"]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").write_text("")
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "config.resolved.yaml").write_text("")
    for path, line in {
        "quikstart.yaml": "quikstart.yaml: no such file; did you mean 'quickstart.yaml'?",
        "lr": "lr: no such file; a configuration file ends in .yaml, an override is written lr=value",
        "done": "done: is a directory; the configuration of that run is done/config.resolved.yaml",
        ".": ".: is a directory; give a YAML file",
    }.items():
        with pytest.raises(ConfigError) as caught:
            load([path], schema=lambda imports: Run)
        assert str(caught.value) == line


def test_every_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: [\n")
    (tmp_path / "b.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError) as caught:
        load(["a.yaml", "b.yaml", "c.yaml"], ["+x=1"], schema=lambda imports: Run)
    assert [str(each).split(":")[0] for each in caught.value.mistakes] == ["a.yaml", "b.yaml", "c.yaml", "+x=1"]


def test_a_failing_import_points_to_the_imports() -> None:
    def schema(imports: list[str]) -> type[Run]:
        assert imports == ["nosuch"]
        raise UsageError("imports: 'nosuch' cannot be imported")

    Path("run.yaml").write_text("seed: 1\nimports: [nosuch]\n")
    with pytest.raises(ConfigError, match=r"^run.yaml:2: imports: 'nosuch' cannot be imported$"):
        load(["run.yaml"], schema=schema)


def test_a_recipe_named_without_its_folder_is_pointed_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "brief.yaml").write_text("seed: 1\n")
    for said in ("brief", "brief.yaml", "config/brief.yaml"):
        with pytest.raises(UsageError, match=r"did you mean 'configs/brief.yaml'\?"):
            load([said], schema=lambda imports: Run)
