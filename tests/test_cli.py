"""Command lines: precedence, kinds, unknown keys, files, the user's own sections, help."""

import json
import subprocess
import sys
import textwrap

import fastargs
import pytest
from fastargs.validation import And, InRange, Module, OneOf, Or

from datamodels import cli
from datamodels.cli import Option, collect_user, parse
from datamodels.errors import ConfigError, StoreError

SECTIONS = {
    "worker": {
        "index": Option(int, "row to run", min=0),
        "logdir": Option(str, "the store"),
        "batch": Option(int, "rows at once", default=1, min=1, max=64),
        "dry_run": Option(bool, "only show", default=False),
        "rate": Option(float, "a rate"),
        "mode": Option(str, "how", default="auto", choices=("auto", "no")),
    },
    "cfg": {"lr": Option(float, "step size", default=0.5, ignored="the path is exact")},
}


def call(*argv, **more):
    return parse("python -m datamodels.worker", "Trains rows.", SECTIONS, argv, **more)


def refused(*argv, **more):
    with pytest.raises(ConfigError) as error:
        call(*argv, **more)
    return str(error.value)


@pytest.fixture
def write(tmp_path):
    def write(text, name="config.yml"):
        (tmp_path / name).write_text(textwrap.dedent(text))
        return str(tmp_path / name)

    return write


@pytest.fixture
def registry():
    """A fresh global registry, as a process of its own would have."""
    before = fastargs.get_current_config()
    fastargs.set_current_config(fastargs.Config())
    yield
    fastargs.set_current_config(before)


# -- values


@pytest.mark.parametrize(
    ("argv", "key", "value"),
    [
        (["--worker.index=3"], "index", 3),
        (["--worker.index", "3"], "index", 3),
        (["--worker.index=90_000"], "index", 90_000),
        (["--worker.index=1e3"], "index", 1000),
        (["--worker.index=3", "--worker.index=4"], "index", 4),
        (["--worker.rate", "-0.5"], "rate", -0.5),
        (["--worker.rate", "-.5"], "rate", -0.5),
        (["--worker.rate=5e-3"], "rate", 5e-3),
        (["--worker.rate=2"], "rate", 2.0),
        (["--worker.dry_run"], "dry_run", True),
        (["--worker.dry_run=false"], "dry_run", False),
        (["--worker.dry_run", "False"], "dry_run", False),
        (["--worker.dry_run", "--worker.index=1"], "dry_run", True),
        (["--worker.dry_run", "0"], "dry_run", False),
        (["--worker.logdir="], "logdir", ""),
        (["--worker.logdir=a=b --c"], "logdir", "a=b --c"),
        (["--worker.logdir=--x"], "logdir", "--x"),
        (["--worker.logdir", "007"], "logdir", "007"),
        ([], "batch", 1),
        ([], "index", None),
    ],
)
def test_a_value_from_the_command_line(argv, key, value):
    args = call(*argv)
    assert args[f"worker.{key}"] == value
    assert type(args[f"worker.{key}"]) is type(value)
    assert args.section("worker")[key] == value
    assert args.given(f"worker.{key}") == bool(argv)


@pytest.mark.parametrize(
    ("argument", "expected", "got"),
    [
        ("--worker.index=two", "an int >= 0", "'two'"),
        ("--worker.index=2.7", "an int >= 0", "'2.7'"),
        ("--worker.index=-1", "an int >= 0", "'-1'"),
        ("--worker.index=1e300", "an int >= 0", "'1e300'"),
        ("--worker.batch=65", "an int >= 1 and <= 64", "'65'"),
        ("--worker.rate=nan", "a number", "'nan'"),
        ("--worker.dry_run=maybe", "true or false", "'maybe'"),
        ("--worker.mode=atuo", "one of auto, no", "'atuo'; did you mean auto?"),
    ],
)
def test_a_bad_value_says_where_what_was_expected_and_what_came(argument, expected, got):
    key = argument.partition("=")[0]
    assert refused(argument) == f"{key} (command line): expected {expected}, got {got}"


def test_an_option_without_its_value():
    assert "--worker.index=VALUE" in refused("--worker.index")
    assert "--worker.logdir=VALUE" in refused("--worker.logdir", "--worker.index=2")


# -- files and the environment


@pytest.mark.parametrize("dotted", [False, True])
def test_command_line_beats_file_beats_environment(write, monkeypatch, dotted):
    for key, value in {"index": "1", "batch": "11", "rate": "0.1"}.items():
        monkeypatch.setenv(f"worker.{key}" if dotted else f"DATAMODELS_WORKER_{key.upper()}", value)
    args = call("-C", write("worker: {index: 2, batch: 12}"), "--worker.index=3")
    assert (args["worker.index"], args["worker.batch"], args["worker.rate"]) == (3, 12, 0.1)
    assert args.where("worker.index") == "command line"
    assert args.where("worker.batch").endswith("config.yml, line 1")
    assert args.where("worker.rate").startswith("environment variable ")
    assert args.where("worker.mode") == "default"


def test_a_flag_in_a_file_is_not_undone_by_its_absence_on_the_command_line(write):
    path = write("worker: {dry_run: true}")
    assert call("-C", path)["worker.dry_run"] is True
    assert call("-C", path, "--worker.dry_run=false")["worker.dry_run"] is False


def test_the_last_file_wins(write):
    first, second = write("worker: {index: 1, batch: 2}", "a.yml"), write('{"worker.index": 5}', "b.json")
    args = call("-C", first, f"--config-file={second}")
    assert (args["worker.index"], args["worker.batch"]) == (5, 2)
    for spelling in ([f"-C{first}"], ["--config-file", first], [f"-C={first}"]):
        assert call(*spelling)["worker.index"] == 1


@pytest.mark.parametrize(
    ("text", "value"),
    [("5e-3", 5e-3), ("90_000", 90000.0), ("1E5", 1e5), (".5", 0.5), ("010", 10.0), ("'7'", 7.0)],
)
def test_numbers_in_yaml(write, text, value):
    assert call("-C", write(f"worker:\n  rate: {text}\n"))["worker.rate"] == value


NAMES = {"a": {"keys": Option(list, "keys", default=["x"]), "weights": Option(dict, "weights")}}


@pytest.mark.parametrize("text", ["keys: [x, y]", "keys: x, y", "keys: x,y"])
def test_a_list_of_names(write, text):
    for args in (parse("p", "", NAMES, ["-C", write(f"a:\n    {text}\n")]), parse("p", "", NAMES, ["--a.keys=x, y"])):
        assert args["a.keys"] == ["x", "y"]
    assert parse("p", "", NAMES, [])["a.keys"] == ["x"]
    for bad in ("keys: [x, 1]", "keys: []", "keys: {x: 1}", "keys: 'x,,y'"):
        with pytest.raises(ConfigError, match=r"a.keys .*: expected names, a,b or a list, got"):
            parse("p", "", NAMES, ["-C", write(f"a:\n    {bad}\n")])


@pytest.mark.parametrize("text", ["weights: {x: 0, y: 1.5}", "weights: x=0, y=1.5", "weights:\n     x: 0\n     y: 1.5"])
def test_numbers_by_name(write, text):
    for args in (
        parse("p", "", NAMES, ["-C", write(f"a:\n    {text}\n")]),
        parse("p", "", NAMES, ["--a.weights", "x=0,y=1.5"]),
    ):
        assert args["a.weights"] == {"x": 0.0, "y": 1.5}
    assert parse("p", "", NAMES, [])["a.weights"] is None
    for bad in ("x", "x=a", "x=0,x=1", "=1", "x=1=2", "", "x=nan"):
        with pytest.raises(ConfigError, match=r"--a.weights .*: expected numbers by name, a=0,b=1 or a mapping, got"):
            parse("p", "", NAMES, [f"--a.weights={bad}"])


def test_words_of_old_yaml_stay_words(write):
    args = call("-C", write("worker: {mode: no, logdir: 12:30:45, dry_run: yes}"))
    assert (args["worker.mode"], args["worker.logdir"], args["worker.dry_run"]) == ("no", "12:30:45", True)


def test_anchors_and_empty_sections(write):
    args = call("-C", write("worker: &x\n  index: 4\n  batch: &b 5\ncfg:\n# nothing\n"))
    assert (args["worker.index"], args["worker.batch"], args.given("cfg.lr")) == (4, 5, False)
    args = call("-C", write("worker:\n  <<: {index: 4, batch: 5}\n  batch: 6\n"))
    assert (args["worker.index"], args["worker.batch"]) == (4, 6)


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("worker:\n  index: 2.7\n", "c.yml", "worker.index (FILE, line 2): expected an int >= 0, got 2.7"),
        ("worker: {index: true}", "c.yml", "worker.index (FILE, line 1): expected an int >= 0, got True"),
        ("worker: {index: [1]}", "c.yml", "worker.index (FILE, line 1): expected an int >= 0, got [1]"),
        ("worker: {dry_run: 2}", "c.yml", "worker.dry_run (FILE, line 1): expected true or false, got 2"),
        (
            "worker: {logdir: 7}",
            "c.yml",
            "worker.logdir (FILE, line 1): expected text, got 7; put it in quotes",
        ),
        ('{"worker": {"index": 2.7}}', "c.json", "worker.index (FILE): expected an int >= 0, got 2.7"),
        ("worker: {indx: 2}", "c.yml", "worker.indx (FILE, line 1): unknown key; did you mean worker.index?"),
        (
            "worker: 5",
            "c.yml",
            "-C FILE: 'worker' should be a section, that is a mapping of names to values, got 5",
        ),
        ("- worker", "c.yml", "-C FILE, line 1: expected a mapping of sections, got \"['worker']\""),
        ("worker: {index: 1", "c.yml", "-C FILE, line 1, column 18: not YAML (expected ',' or '}', but got"),
        ("worker:\n\tindex: 1\n", "c.yml", "-C FILE, line 2, column 1: not YAML (found character '\\t' that"),
        ('{"worker":\n  {"index": }}', "c.json", "-C FILE, line 2, column 13: not JSON: a value is missing"),
        ("[1]", "c.json", "-C FILE, line 1, column 1: expected {"),
        (
            '{"worker": {"index": 1, "index": 2}}',
            "c.json",
            "-C FILE: 'index' is given twice in the same place",
        ),
        ("worker:\n  index: 1\n  index: 2\n", "c.yml", "-C FILE, line 3, column 3: 'index' is given twice"),
        ("worker: {1: 2}", "c.yml", "-C FILE, line 1, column 10: expected a name before the colon, got '1'"),
        ("worker: &a {b: *a}", "c.yml", "-C FILE: a mapping refers to itself"),
        (
            "worker: !!python/object/apply:os.getcwd []",
            "c.yml",
            "-C FILE, line 1, column 9: not YAML (could not",
        ),
        ("worker: {logdir: *nobody}", "c.yml", "-C FILE, line 1, column 18: not YAML (found undefined alias"),
    ],
)
def test_a_file_that_cannot_be_used(write, text, name, message):
    path = write(text, name)
    assert refused("-C", path).startswith(message.replace("FILE", path))


def test_a_file_that_is_not_there(tmp_path):
    path = str(tmp_path / "none.yml")
    assert refused("-C", path) == f"-C {path}: cannot be read (No such file or directory); expected a YAML or JSON file"
    assert "cannot be read" in refused("-C", str(tmp_path))
    (tmp_path / "bytes.yml").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in refused("-C", str(tmp_path / "bytes.yml"))
    assert "expected a YAML or JSON file" in refused("-C")


def test_a_bad_value_in_the_environment(monkeypatch):
    monkeypatch.setenv("DATAMODELS_WORKER_INDEX", "x")
    message = "worker.index (environment variable DATAMODELS_WORKER_INDEX): expected an int >= 0, got 'x'"
    assert refused() == message
    assert call("--worker.index=1")["worker.index"] == 1


def test_an_ignored_key_is_named_once_and_never_read(write, capsys):
    args = call("-C", write("cfg: {lr: what}"))
    assert args["cfg.lr"] == 0.5
    note = capsys.readouterr().err
    assert note.startswith("note: cfg.lr (") and note.endswith("does nothing: the path is exact\n")
    assert note.count("\n") == 1
    call()
    assert capsys.readouterr().err == ""


# -- unknown and missing


@pytest.mark.parametrize(
    ("argument", "nearest"),
    [
        ("--worker.indx=1", "--worker.index"),
        ("--worker.dry-run", "--worker.dry_run"),
        ("--worker_index=1", "--worker.index"),
        ("--logdir=x", "--worker.logdir"),
        ("--wroker.mode", "--worker.mode"),
    ],
)
def test_an_unknown_key_names_the_nearest(argument, nearest):
    key = argument.partition("=")[0]
    assert refused(argument) == f"{key} (command line): unknown key; did you mean {nearest}?"


def test_nothing_near():
    assert refused("--zebra=1") == "--zebra (command line): unknown key; see --help for the keys there are"


def test_required():
    sections = {"a": {"b": Option(int, "", required=True), "c": Option(str, "", required=True)}}
    with pytest.raises(ConfigError, match=r"--a.b, --a.c are required; give them .*DATAMODELS_A_B"):
        parse("p", "", sections, [])
    with pytest.raises(ConfigError, match=r"--a.c is required"):
        parse("p", "", sections, ["--a.b=1"])
    # the typo, not the absence, is what to tell
    with pytest.raises(ConfigError, match=r"--a.cc .*did you mean --a.c\?"):
        parse("p", "", sections, ["--a.b=1", "--a.cc=1"], passthrough=True)


def test_positional():
    places = [("command", "what to do"), ("logdir", "where"), ("others...", "more")]
    args = call("merge", "A", "--worker.index=1", "B", "C", positional=places)
    assert args.positional == {"command": "merge", "logdir": "A", "others": ["B", "C"]}
    assert call("a", "--", "-b", positional=places).positional == {
        "command": "a",
        "logdir": "-b",
        "others": [],
    }
    assert call("a", positional=[("x", ""), ("y?", "")]).positional == {"x": "a", "y": None}
    assert refused("a", positional=places).startswith("logdir (command line) is missing; usage: python -m")
    assert "one argument too many" in refused("stray")
    assert "two dashes" in refused("-v")


@pytest.mark.parametrize("bad", [{"kind": tuple}, {"required": True, "default": 1}, {"default": 2.5}, {"default": 0}])
def test_an_option_that_makes_no_sense(bad):
    with pytest.raises(ValueError):
        Option(**{"kind": int, "help": "", "min": 1, **bad})


def test_calls_do_not_share_anything():
    assert call("--worker.index=3")["worker.index"] == 3
    assert call()["worker.index"] is None
    assert ("worker", "index") not in fastargs.get_current_config().entries


# -- passthrough and the user's sections


def test_rest_is_what_we_did_not_consume(write):
    ours, both = (
        write("worker: {index: 2}", "ours.yml"),
        write("worker: {batch: 3}\ntrainer: {lr: 1}", "both.yml"),
    )
    argv = [
        "--worker.dry_run",
        "False",
        "--trainer.lr",
        "-0.5",
        "-C",
        ours,
        "x",
        f"-C{both}",
        "--epochs=3",
        "-v",
    ]
    args = call(*argv, "--worker.rate", "2", passthrough=True)
    assert args.rest == ["--trainer.lr", "-0.5", "x", f"-C{both}", "--epochs=3", "-v"]
    assert [key for key, _ in args.unknown] == ["trainer.lr", "trainer.lr", "epochs"]
    assert (args["worker.index"], args["worker.batch"], args["worker.rate"]) == (2, 3, 2.0)
    assert call("--", "--worker.index=1", passthrough=True).rest == ["--", "--worker.index=1"]


def test_sections_of_another_program_in_a_shared_file(write, registry):
    path = write("pool: {workers: 2}\nworker: {index: 1}\n")
    args = call("-C", path, passthrough=True, elsewhere=("pool",))
    assert (args.unknown, args.rest) == ([], [])
    args = call("-C", write("pool: {workers: 2}\ntrainer: {lr: 1}\n"), passthrough=True, elsewhere=("pool",))
    fastargs.Section("trainer").params(lr=fastargs.Param(float, "", required=True))
    collect_user(args)
    assert fastargs.get_current_config()["trainer.lr"] == 1.0


def user_sections():
    section = fastargs.Section("trainer", "how to train")
    section.params(
        multiple=fastargs.Param(int, "times", required=True),
        lr=fastargs.Param(float, "step", default=0.1),
        flag=fastargs.Param(bool, "a switch", is_flag=True),
        tta=fastargs.Param(bool, "no switch", default=True),
        name=fastargs.Param(str, "a name"),
        width=fastargs.Param(And(int, InRange(1, 10)), "and", default=2),
        size=fastargs.Param(Or(int, float), "or"),
        kind=fastargs.Param(OneOf(["a", "b"]), "one of"),
    )
    return fastargs.get_current_config()


def test_user_values_from_all_three_places(registry, write, monkeypatch):
    config = user_sections()
    monkeypatch.setenv("DATAMODELS_TRAINER_NAME", "env")
    monkeypatch.setenv("trainer.lr", "9")
    monkeypatch.setenv("trainer.multiple", "9")
    path = write("trainer: {lr: 5e-3, multiple: 8, flag: true, size: 2.7}\n")
    args = call("-C", path, "--trainer.multiple=2", "--trainer.tta", "False", "--trainer.width", "7", passthrough=True)
    collect_user(args)
    assert fastargs.get_current_config() is config
    got = {name: config[f"trainer.{name}"] for name in ("multiple", "lr", "flag", "tta", "name", "width", "size")}
    assert got == {
        "multiple": 2,
        "lr": 5e-3,
        "flag": True,
        "tta": False,
        "name": "env",
        "width": 7,
        "size": 2.7,
    }
    assert config["trainer.kind"] is None


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--trainer.multiple=2.7", "--trainer.multiple (command line): expected an int, got '2.7'"),
        ("--trainer.flag=maybe", "--trainer.flag (command line): expected a boolean, got 'maybe'"),
        (
            "--trainer.width=11",
            "--trainer.width (command line): expected an int and between 1 and 10, got '11'",
        ),
        (
            "--trainer.multiplee=2",
            "--trainer.multiplee (command line): unknown key; did you mean --trainer.multiple?",
        ),
        ("--worker.indx=2", "--worker.indx (command line): unknown key; did you mean --worker.index?"),
        ("--worker_index=2", "--worker_index (command line): unknown key; did you mean --worker.index?"),
        ("--else.where=2", "--else.where (command line): unknown key; see --help"),
    ],
)
def test_user_values_that_cannot_be_used(registry, argument, message):
    user_sections()
    args = call("--trainer.multiple=1", argument, passthrough=True)
    with pytest.raises(ConfigError) as error:
        collect_user(args)
    assert str(error.value).startswith(message)


def test_user_values_that_cannot_be_used_in_a_file(registry, write):
    user_sections()
    with pytest.raises(ConfigError, match=r"^trainer.width .* got 2.7$"):
        collect_user(call("-C", write("trainer: {multiple: 2, width: 2.7}"), passthrough=True))
    with pytest.raises(ConfigError, match=r"^trainer.multiple \(.*config.yml, line 2\): expected an int, got 2.7$"):
        collect_user(call("-C", write("trainer:\n  multiple: 2.7\n"), passthrough=True))
    with pytest.raises(ConfigError, match=r"^trainer.multipel .*line 1\): unknown key; did you mean trainer.multiple"):
        collect_user(call("-C", write("trainer: {multiple: 2, multipel: 2}"), passthrough=True))


def test_a_required_user_value_is_missed(registry):
    user_sections()
    with pytest.raises(ConfigError, match=r"^--trainer.multiple is required; .*DATAMODELS_TRAINER_MULTIPLE"):
        collect_user(call(passthrough=True))


def test_enable_if(registry):
    fastargs.Section("model").params(kind=fastargs.Param(str, "", default="mlp"))
    section = fastargs.Section("conv").enable_if(lambda config: config["model.kind"] == "conv")
    section.params(width=fastargs.Param(int, "", required=True))
    collect_user(call("--conv.width=x", passthrough=True))  # disabled: neither required nor judged
    assert fastargs.get_current_config()["conv.width"] is None
    with pytest.raises(ConfigError, match="conv.width"):
        collect_user(call("--model.kind=conv", "--conv.width=x", passthrough=True))
    collect_user(call("--model.kind=conv", "--conv.width=3", passthrough=True))
    assert fastargs.get_current_config()["conv.width"] == 3


def test_a_module_checker_may_bring_sections(registry, tmp_path, monkeypatch):
    (tmp_path / "brings_sections.py").write_text(
        "from fastargs import Param, Section\nSection('extra').params(a=Param(int, '', required=True))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    fastargs.Section("model").params(code=fastargs.Param(Module(), ""))
    collect_user(call("--extra.a=4", "--model.code=brings_sections", passthrough=True))
    assert fastargs.get_current_config()["extra.a"] == 4


def test_arguments_in_no_section_are_left_to_main(registry, capsys):
    user_sections()
    args = call("--epochs", "3", "--trainer.multiple=2", passthrough=True)
    collect_user(args)
    assert args.rest == ["--epochs", "3", "--trainer.multiple=2"]
    assert capsys.readouterr().err == "note: --epochs (command line) is in no section; left for main() to read\n"


def test_a_module_without_sections_reads_for_itself(registry, capsys):
    collect_user(call("--model.width=3", passthrough=True))
    assert "--model.width (command line) is in no section" in capsys.readouterr().err
    for key in ("indx", "zzz"):
        with pytest.raises(ConfigError, match=rf"^--worker.{key} \(command line\): unknown key"):
            collect_user(call(f"--worker.{key}=3", passthrough=True))


def test_user_code_may_ask_for_our_keys(registry):
    """In the released code all sections were in one registry."""
    user_sections()
    fastargs.Section("worker").params(batch=fastargs.Param(int, "declared again", default=9))
    collect_user(call("--worker.index=3", "--worker.batch=4", "--trainer.multiple=1", passthrough=True))
    assert fastargs.get_current_config()["worker.index"] == 3
    assert fastargs.get_current_config()["worker.batch"] == 4
    with pytest.raises(KeyError):
        fastargs.get_current_config()["worker.nothing"]


def test_a_main_that_collects_again_gets_the_same(registry, write, monkeypatch, capsys):
    """The pattern of the released examples; fastargs alone would now let the environment win and undo the flag."""
    from argparse import ArgumentParser

    config = user_sections()
    monkeypatch.setenv("trainer.multiple", "9")
    path = write("trainer: {flag: true, lr: 5e-3}\n")
    args = call("-C", path, "--trainer.multiple=2", "--trainer.tta=False", "--own", "1", passthrough=True)
    collect_user(args)
    monkeypatch.setattr(sys, "argv", ["prog", *args.rest])
    for _ in range(2):
        parser = ArgumentParser()
        config.augment_argparse(parser)
        config.collect_argparse_args(parser)
        config.validate(mode="stderr")
        assert [config[f"trainer.{name}"] for name in ("multiple", "lr", "flag", "tta")] == [
            2,
            5e-3,
            True,
            False,
        ]
    config.summary()
    assert config.get().trainer.multiple == 2
    config.content["trainer", "multiple"] = "x"
    with pytest.raises(SystemExit) as exit:
        config.validate(mode="stderr")
    assert exit.value.code == 2
    assert "trainer.multiple: expected an int, got 'x'" in capsys.readouterr().err
    assert list(config.validate(mode="errordict")) == [("trainer", "multiple")]


# -- run and help


PROGRAM = """
import sys
from datamodels.cli import Option, parse, collect_user, run
from datamodels.errors import StoreError
def main():
    args = parse("python -m datamodels.worker", "Trains rows.", {"worker": {
        "index": Option(int, "row", min=0), "main_import": Option(str, "module")}},
        passthrough=True, help_later="worker.main_import")
    if args["worker.main_import"] is not None:
        __import__(args["worker.main_import"])
    collect_user(args)
    index = args["worker.index"]
    if index == 1: raise StoreError("row 1:\\n  no such store")
    if index == 2: raise KeyboardInterrupt
    if index == 3:
        sys.stdin.read()
        print("line")
    return index
run(main)
"""


def program(*argv, **more):
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *argv],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **more,
    )


@pytest.mark.parametrize(
    ("argv", "code", "stderr"),
    [
        ([], 0, ""),
        (["--worker.index=7"], 7, ""),
        (["--worker.index=1"], 1, "error: row 1: no such store\n"),
        (["--worker.index=x"], 2, "error: --worker.index (command line): expected an int >= 0, got 'x'\n"),
        (["--worker.index=2"], 130, "interrupted\n"),
    ],
)
def test_exit_codes(argv, code, stderr):
    done = program(*argv)
    assert (done.returncode, done.stderr) == (code, stderr)


def test_a_reader_that_goes_away_is_not_an_error(monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # what is still in the buffer is the hard part
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", PROGRAM, "--worker.index=3"], text=True, **pipes) as process:
        process.stdout.close()
        process.stdin.close()  # now it prints
        assert process.stderr.read() == ""
        assert process.wait(30) == 141


@pytest.mark.parametrize("columns", ["40", "80", "200"])
def test_help_tells_everything(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit) as exit:
        call("--help", "--worker.index=x", "-C", "/none.yml")
    assert exit.value.code == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= min(100, max(80, int(columns)))
    flat = " ".join(text.split())
    for section, options in SECTIONS.items():
        for name, option in options.items():
            assert f"--{section}.{name}" in flat
            assert option.help in flat
    for fact in ("INT", "FLOAT", "BOOL", "TEXT", "default auto", "one of auto, no", "an int >= 1 and <= 64", "-C",
                 "DATAMODELS_WORKER_INDEX", "does nothing: the path is exact"):  # fmt: skip
        assert fact in flat


def test_help_of_the_users_module(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from fastargs import Param, Section\n"
        "Section('trainer', 'how to train').params(multiple=Param(int, 'how often', required=True))\n"
    )
    done = program("--help", "--worker.main_import=mine", env={"PYTHONPATH": f"{tmp_path}:."})
    assert (done.returncode, done.stderr) == (0, "")
    assert "--worker.index=INT" in done.stdout
    assert "trainer: how to train" in done.stdout
    assert "how often [required; an int]" in " ".join(done.stdout.split())
    alone = program("--help", env={"PYTHONPATH": "."})
    assert (alone.returncode, alone.stderr) == (0, "")
    assert "--worker.main_import=MODULE" in alone.stdout


def test_while_help_is_asked_for_nothing_is_judged():
    sections = {"a": {"module": Option(str, ""), "b": Option(int, "", required=True)}}
    argv = ["--help", "--a.module=m", "--a.bb=2"]
    args = parse("p", "", sections, argv, passthrough=True, help_later="a.module")
    assert args.help_requested and args["a.module"] == "m"
    assert not parse("p", "", sections, ["--a.b=1"], passthrough=True, help_later="a.module").help_requested


def test_importing_is_light():
    heavy = "{'torch', 'numpy', 'yaml', 'sklearn', 'scipy'}"
    code = f"import sys, datamodels.cli; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_json_and_yaml_say_the_same(write):
    values = {"worker": {"index": 3, "rate": 5e-3, "dry_run": True, "logdir": "x y"}}
    assert (
        call("-C", write(json.dumps(values), "a.json")).section("worker")
        == call("-C", write(json.dumps(values), "a.yml")).section("worker")
        == {"batch": 1, "mode": "auto", **values["worker"]}
    )


def test_errors_are_of_the_family():
    assert issubclass(ConfigError, cli.DatamodelsError)
    assert issubclass(StoreError, cli.DatamodelsError)


# -- verbs


def run_verb(*argv):
    verbs = {
        "look": cli.Verb("see what is there", lambda args: print(args.positional, args.section("store")) or 0),
        "grow": cli.Verb(
            "make it larger",
            lambda args: print(args.positional, args.section("store")) or 7,
            {"num_models": Option(int, "rows", required=True), "dry": Option(bool, "only show", default=False)},
            (("dir", "the store"), ("more...", "others")),
            "Nothing is rewritten.",
        ),
    }
    return cli.run_verb("python -m datamodels.store", "Look after a store.", "store", verbs, argv)


@pytest.mark.parametrize("option", ["--num_models=3", "--store.num_models=3"])
def test_each_verb_has_its_own_options_with_and_without_the_sections_name(option, capsys):
    assert run_verb("grow", "a", "b", option, "--dry") == 7
    assert capsys.readouterr().out == "{'dir': 'a', 'more': ['b']} {'num_models': 3, 'dry': True}\n"
    assert run_verb("grow", "--num_models", "3", "a", "--", "--dry") == 7
    assert capsys.readouterr().out == "{'dir': 'a', 'more': ['--dry']} {'num_models': 3, 'dry': False}\n"


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        ((), "verb (command line) is missing; expected one of look, grow; see python -m datamodels.store --help"),
        (("grew", "a"), "verb (command line): expected one of look, grow, got 'grew'; did you mean grow?"),
        (("--dry", "grow"), "verb (command line): expected one of look, grow, got '--dry'"),
        (("grow", "a"), "--num_models is required"),
        (("grow", "a", "--num_model=3"), "--num_model (command line): unknown key; did you mean --num_models?"),
        (("grow", "a", "--num_models=x"), "--num_models (command line): expected an int, got 'x'"),
        (("look", "--num_models=3"), "--num_models (command line): unknown key"),
        (("look", "a"), "'a' (command line): one argument too many; see python -m datamodels.store look --help"),
    ],
)
def test_what_a_verb_refuses(argv, why):
    with pytest.raises(ConfigError) as error:
        run_verb(*argv)
    assert str(error.value).startswith(why)


def test_help_of_all_verbs_and_of_one(capsys):
    with pytest.raises(SystemExit, match="0"):
        run_verb("--help")
    out = capsys.readouterr().out
    assert "  look                          see what is there\n  grow DIR [MORE ...]           make it larger\n" in out
    with pytest.raises(SystemExit, match="0"):
        run_verb("grow", "--help")
    out = capsys.readouterr().out
    assert out.startswith("usage: python -m datamodels.store grow DIR [MORE ...] [--name=value ...]")
    assert (
        "Make it larger.\n\nNothing is rewritten.\n" in out and "  --num_models=INT              rows [required]" in out
    )
    assert "--store." not in out
