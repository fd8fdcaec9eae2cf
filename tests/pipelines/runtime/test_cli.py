import ctypes
import errno
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import yaml

from pipelines.benchmarks.options import IngestBenchmark
from pipelines.data.options import IngestOptions
from pipelines.evaluation.options import SemanticOptions, protocol_options
from pipelines.runtime.cli import console, parse, print_table, run
from pipelines.runtime.exit_codes import DONE, FAILED, WRONG_OPTIONS
from pipelines.runtime.signals import STOPS, own_signals
from pipelines.training.options import train_options
from pipelines.training.per_category import own_config
from pipelines.tuning.options import tune_options
from unianom import files
from unianom.data.layouts import LAYOUTS, make_options
from unianom.errors import DataError, ImageError, OptionError
from unianom.methods import METHODS
from unianom.options import Options as Base
from unianom.options import named, to_plain


@dataclass(frozen=True)
class Inner:
    """Inner options.

    Args:
        max_pixels: most pixels.
        mean: three numbers or null.
        kind: which kind.
    """

    max_pixels: int = 3
    mean: tuple[float, float, float] | None = None
    kind: Literal["flat", "ivf"] = "flat"

    def __post_init__(self) -> None:
        if self.max_pixels < 1:
            raise OptionError("max_pixels must be positive")


@dataclass(frozen=True)
class Options:
    """Do a thing.

    Args:
        source_uri: where from.
        categories: names.
        labels: numbers.
        share: a share of all.
        rest: anything.
        inner: options of their own.
    """

    source_uri: str
    categories: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()
    share: float = 0.1
    rest: dict[str, Any] = field(default_factory=dict)
    inner: Inner = field(default_factory=Inner)

    def __post_init__(self) -> None:
        if self.share > 1:
            raise OptionError(f"share={self.share} must be at most 1")


SOURCE = "--source_uri=x"
METHOD_OPTIONS = train_options()
RECIPES = Path(__file__).parents[3] / "jobs" / "recipes"


def exit_of(main, arguments, options=Options):
    with pytest.raises(SystemExit) as caught:
        run(main, options, arguments)
    return caught.value.code


def failing(error):
    def main(_):
        raise error

    return main


def refused(*arguments, options=Options):
    with pytest.raises(OptionError) as caught:
        parse(options, arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def config(tmp_path):
    """Writes a YAML file and gives the arguments that name it."""

    def write(text):
        (tmp_path / "config.yaml").write_text(text)
        return "--config", str(tmp_path / "config.yaml")

    return write


# ---- values -------------------------------------------------------------------------------------------------------


def test_defaults_and_values_of_every_kind():
    assert parse(Options, [SOURCE]) == Options("x")
    arguments = ["--share", "0.5", "--inner.max_pixels", "7", "--inner.kind", "ivf", "--rest", '{"a-b": [1, "c"]}']
    assert parse(Options, [SOURCE, *arguments]) == Options(
        "x", share=0.5, rest={"a-b": [1, "c"]}, inner=Inner(7, kind="ivf")
    )


@pytest.mark.parametrize("value", ["01", "1e3", "null", "true", "s3://bucket/a-b", "a=b", "C:x", "a b", "[x]"])
def test_text_stays_text(value):
    assert parse(Options, ["--source_uri", value]).source_uri == value
    assert parse(Options, [f"--source_uri={value}"]).source_uri == value


def test_dashes_and_underscores_in_names_are_alike():
    for name in ("--source-uri", "--source_uri"):
        assert parse(Options, [name, "a-b_c"]) == parse(Options, [f"{name}=a-b_c"]) == Options("a-b_c")
    assert parse(Options, [SOURCE, "--inner.max-pixels=9"]).inner == Inner(9)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("bolt", ("bolt",)),
        ("bolt,nut", ("bolt", "nut")),
        ("01,02", ("01", "02")),
        ("1,null,true,1e5", ("1", "null", "true", "1e5")),
        ("metal nut,pipe: fryum", ("metal nut", "pipe: fryum")),
        ("[bolt, 'a,b']", ("bolt", "a,b")),
        ("[]", ()),
    ],
)
def test_lists_of_names(given, expected):
    """Names stay names, also where YAML sees numbers, as in the categories 01 and 02."""
    assert parse(Options, [SOURCE, "--categories", given]).categories == expected
    assert parse(Options, [SOURCE, f"--categories={given}"]).categories == expected


@pytest.mark.parametrize("arguments", [["--labels", "0,1"], ["--labels=0,1"], ["--labels", "[0, 1]"]])
def test_lists_of_numbers(arguments):
    assert parse(Options, [SOURCE, *arguments]).labels == (0, 1)


@pytest.mark.parametrize("given", ["0.5,0.25,1", "[0.5, 0.25, 1]"])
def test_optional_lists(given):
    assert parse(Options, [SOURCE, "--inner.mean", given]).inner.mean == (0.5, 0.25, 1.0)
    assert parse(Options, [SOURCE, f"--inner.mean={given}", "--inner.mean", "null"]).inner.mean is None


def test_a_file_sets_and_later_arguments_override(config):
    arguments = config("source_uri: a\nshare: 0.2\ninner:\n  max_pixels: 7\n  kind: ivf\n")
    assert parse(Options, arguments) == Options("a", share=0.2, inner=Inner(7, kind="ivf"))
    assert parse(Options, [*arguments, "--inner.kind", "flat"]).inner == Inner(7)


def test_printed_options_are_a_config_file(config, capsys):
    given = ["--source-uri", "a", "--categories", "01,b", "--inner.mean", "1,2,3", "--rest", '{"k": ["a", null]}']
    expected = parse(Options, given)
    assert exit_of(failing(AssertionError("not to be called")), [*given, "--print-config"]) == DONE
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed) == to_plain(expected)
    assert parse(Options, config(printed)) == expected
    assert parse(Options, config(yaml.safe_dump(to_plain(expected), sort_keys=False))) == expected


@pytest.mark.parametrize("method", METHOD_OPTIONS)
def test_the_options_of_every_method_print_and_come_back(method, config, capsys):
    given = [method, "--shards", "s", "--output", "o", "--method.input.crop", "200"]
    assert exit_of(print, [*given, "--print_config"], METHOD_OPTIONS) == DONE
    again = parse(METHOD_OPTIONS, [method, *config(capsys.readouterr().out)])
    assert again == parse(METHOD_OPTIONS, given)
    assert again.method.input.crop == 200


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_a_config_of_its_method(recipe, capsys):
    """The method is the first word of the file's name; every key must be known and every value stay as written."""
    method = recipe.stem.split("_")[0]
    given = [method, "--config", str(recipe), "--shards", "shards", "--output", "model"]
    assert exit_of(print, [*given, "--print_config"], METHOD_OPTIONS) == DONE
    parsed = yaml.safe_load(capsys.readouterr().out)["method"]

    def check(wanted, found):
        for key, value in wanted.items():
            if isinstance(value, dict):
                check(value, found[key])
            else:
                assert found[key] == value

    check(yaml.safe_load(recipe.read_text())["method"], parsed)
    options = parse(METHOD_OPTIONS, given)
    for category, changes in options.category_options.items():
        assert options.per_category
        check(changes, to_plain(own_config(options.method, [category], options)))


def test_options_of_ingest():
    given = ["--layout", "btad", "--source=s", "--output", "o", "--limits.max-pixels", "9", "--resize", "256"]
    options = parse(IngestOptions, [*given, "--layout-options", '{"categories": ["01", "02"]}'])
    assert (options.layout, options.limits.max_pixels, options.resize) == ("btad", 9, 256)
    assert options.layout_options == {"categories": ["01", "02"]}


NAMES = ["0", "007", "1e3", "0x10", "2020-01-01", "NO", "on", "null", "~", "true"]
FOLDERS = ["--layout", "folder", "--source", "s", "--output", "o"]


@pytest.mark.parametrize("quote", ["", "'", '"'])
@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_looks_like_a_number_is_the_name(name, quote, config):
    """However it is given: alone, in a list, in a dict or in a file, in quotes or not."""
    text = f"{quote}{name}{quote}"
    expected = {"normal": name, "abnormal": ["bad", name]}
    for given in (
        ["--layout_options.normal", text, "--layout_options.abnormal", f"[bad, {text}]"],
        [f"--layout-options.normal={text}", f"--layout_options.abnormal=bad,{text}"],
        ["--layout_options", f"{{normal: {text}, abnormal: [bad, {text}]}}"],
        f"layout_options:\n  normal: {text}\n  abnormal:\n  - bad\n  - {text}\n",
        f"layout_options: {{normal: {text}}}\nlayout_options.abnormal: [bad, {text}]",
    ):
        given = config(given) if isinstance(given, str) else given
        assert parse(IngestOptions, [*FOLDERS, *given]).layout_options == expected
        if "--config" not in given:
            assert parse(IngestBenchmark, [*FOLDERS[:4], "--output=b", *given]).layout_options == expected
    assert parse(Options, [SOURCE, "--categories", f"{text},b"]).categories == (name, "b")
    assert parse(Options, config(f"source_uri: {text}\ncategories: [{text}]")) == Options(name, (name,))


def test_layout_options_that_are_no_text_keep_their_types():
    given = [
        "--layout_options.category",
        "[a]",
        "--layout_options.mask_threshold=010",
        "--layout_options.unlabelled",
        "no",
    ]
    options = parse(IngestOptions, [*FOLDERS, *given, "--layout_options.train_fraction", "1"]).layout_options
    assert options == {"category": "[a]", "mask_threshold": 10, "unlabelled": False, "train_fraction": 1}
    assert [type(value) for value in options.values()] == [str, int, bool, int]
    with pytest.raises(OptionError, match="option seed of layout folder cannot be 'x'; it takes a whole number"):
        make_options(LAYOUTS["folder"], parse(IngestOptions, [*FOLDERS, "--layout_options.seed=x"]).layout_options)


def test_printed_layout_options_are_a_config_file(config, capsys):
    given = [*FOLDERS, "--layout_options.normal", "007", "--layout_options.abnormal", "1e3,no"]
    assert exit_of(print, [*given, "--print_config"], IngestOptions) == DONE
    assert parse(IngestOptions, config(capsys.readouterr().out)) == parse(IngestOptions, given)


def test_dicts_are_taken_from_the_command_line():
    options = protocol_options(SemanticOptions)
    given = ["uniformaly", "--shards", "S", "--output", "D"]
    for text in ("{pets: [cat, dog], 1: [0, '1', 007]}", '{"pets": ["cat", "dog"], "1": [0, "1", "007"]}'):
        found = parse(options, [*given, "--normal_classes", text]).normal_classes
        assert found == {"pets": ["cat", "dog"], "1": [0, "1", "007"]}
    one = [*given, "--normal_classes.my-pets", "[cat, dog]", "--normal_classes.no=on,off"]
    assert parse(options, one).normal_classes == {"my-pets": ["cat", "dog"], "no": ["on", "off"]}
    assert "--normal_classes: " in refused(*given, "--normal_classes", "cat", options=options)
    campaign = ["uniformaly", "--shards", "S", "--output", "D", "--objective", "{image_auroc: 2}"]
    assert parse(tune_options(), campaign).objective == {"image_auroc": 2.0}


def test_options_of_one_category_and_spaces_keep_text(config):
    text = "category_options: {007: {mask: off, temperature: 1, backbone: {weights: 1e3}}}"
    given = ["uniformaly", "--shards", "S", "--output", "D"]
    options = parse(METHOD_OPTIONS, [*given, *config(text)])
    assert options.category_options == {"007": {"mask": "off", "temperature": 1, "backbone": {"weights": "1e3"}}}
    space = parse(tune_options(), [*given, "--space", "{mask: [off, soft], temperature: {low: 1e-2, high: 1}}"]).space
    assert space == {"mask": ["off", "soft"], "temperature": {"low": 0.01, "high": 1}}


# ---- wrong options ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "near"),
    [
        ("--sauce_uri", "--source_uri"),
        ("--source-url", "--source_uri"),
        ("--categorys", "--categories"),
        ("--inner.max_pixel", "--inner.max_pixels"),
        ("--inner.knd", "--inner.kind"),
        ("--max_pixels", "--inner.max_pixels"),
        ("--inner.labels", "--labels"),
    ],
)
def test_an_unknown_option_names_the_nearest(argument, near):
    message = refused(SOURCE, argument, "5")
    assert argument.replace("-", "_")[2:] in message
    assert message.endswith(f"did you mean {near}?")


def test_options_cannot_be_shortened():
    assert "unrecognized arguments: --cat" in refused(SOURCE, "--cat", "a")


def test_where_nothing_is_near_nothing_is_suggested():
    assert refused(SOURCE, "--zzz", "5") == "unrecognized arguments: --zzz 5"
    assert "did you mean" not in refused(SOURCE, "--inner.zzz", "5")


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("sauce_uri: x", "--source_uri"),
        ("source_uri: x\nshares: 1", "--share"),
        ("source_uri: x\ninner: {max_pixel: 1}", "--inner.max_pixels"),
        ("source_uri: x\nmax_pixels: 1", "--inner.max_pixels"),
    ],
)
def test_an_unknown_key_of_a_file_names_the_nearest(config, text, near):
    assert refused(*config(text)).endswith(f"did you mean {near}?")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["required", "source_uri"]),
        ([SOURCE, "--share", "much"], ["--share", "a number", "much"]),
        ([SOURCE, "--share", "2"], ["share=2.0 must be at most 1"]),
        ([SOURCE, "--inner.max_pixels", "0"], ["max_pixels must be positive"]),
        ([SOURCE, "--inner.kind", "fat"], ["--inner.kind", "flat", "ivf", "fat"]),
        ([SOURCE, "--inner.mean", "1,2"], ["--inner.mean", "3 elements"]),
        ([SOURCE, "--labels", "a"], ["--labels", "a whole number", "a"]),
        ([SOURCE, "more"], ["more"]),
        (["--config", "absent.yaml"], ["--config", "absent.yaml"]),
    ],
)
def test_refused_values_name_the_option(arguments, words):
    message = refused(*arguments)
    assert all(word in message for word in words)
    assert "<class" not in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: b: c", ["mapping values are not allowed"]),
        ("- a", ["- a"]),
        ("", ["config"]),
        ("source_uri: x\nshare: much", ["--share", "a number"]),
        ("source_uri: x\ncategories: 01", ["--categories", "a list of text", "1"]),
        ("source_uri: x\ncategories: [[a]]", ["--categories", "text", "['a']"]),
        ("source_uri:", ["--source_uri", "text", "None"]),
        ("source_uri: !!python/name:os.system x", ["--config", "not YAML", "python/name"]),
        ("source_uri: x\ninner: 3", ["--inner", "max_pixels", "3"]),
        ("source_uri: x\ninner: null", ["--inner", "max_pixels", "None"]),
        ("source_uri: x\nshare: 7", ["share=7"]),
    ],
)
def test_files_that_cannot_be_used(config, text, words):
    message = refused(*config(text))
    assert all(word in message for word in words)


@dataclass(frozen=True)
class Placed(Base):
    """Look at a folder.

    Args:
        folder: of images.
        model: that knows them.
        layout: of the folder.
    """

    positional = ("folder",)

    folder: str
    model: str | None = None
    layout: str = field(default="own", metadata=named(["own", "mvtec"]))


def test_options_by_their_place(capsys):
    for arguments in (["007", "--model", "m"], ["--model", "m", "007"], ["--folder", "007", "--model", "m"]):
        assert parse(Placed, arguments) == Placed("007", "m")
    assert refused("a", "b", options=Placed) == "unrecognized arguments: b"
    assert refused(options=Placed) == "the option --folder is required"
    assert exit_of(print, ["--help"], Placed) == DONE
    shown = " ".join(capsys.readouterr().out.split())
    assert " FOLDER [options] Look at a folder. required: --folder of images options:" in shown
    assert "--layout of the folder (one of own, mvtec; default: own)" in shown


def test_methods_by_name():
    options = {"patchcore": Options, "uniformaly": Inner}
    assert parse(options, ["patchcore", SOURCE]) == Options("x")
    assert parse(options, ["uniformaly", "--max_pixels", "4"]) == Inner(4)
    assert refused("uniformally", options=options) == "unknown 'uniformally'; did you mean 'uniformaly'?"
    assert refused("qqq", options=options) == "unknown 'qqq'; known: patchcore, uniformaly"
    for arguments in ([], ["--max_pixels", "4"]):
        assert refused(*arguments, options=options) == "the first argument must be one of: patchcore, uniformaly"


def test_help(capsys):
    assert exit_of(print, ["--help"]) == DONE
    shown = capsys.readouterr().out
    assert "Do a thing." in shown
    assert "--inner.max_pixels" in shown
    assert "most pixels" in shown
    options = {"patchcore": Options, "uniformaly": Inner}
    assert exit_of(print, ["--help"], options) == DONE
    assert "\n  patchcore   Do a thing\n  uniformaly  Inner options\n" in capsys.readouterr().out
    assert exit_of(print, ["uniformaly", "-h"], options) == DONE
    assert "Inner options." in capsys.readouterr().out


# ---- exit codes and messages --------------------------------------------------------------------------------------


def test_done(capsys):
    seen = []
    assert exit_of(seen.append, [SOURCE]) == DONE
    assert seen == [Options("x")]
    assert capsys.readouterr().err == ""


def test_wrong_options_never_reach_the_job(capsys):
    assert exit_of(failing(AssertionError("not to be called")), ["--zzz"]) == WRONG_OPTIONS
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (DataError("no such shards"), FAILED, "no such shards"),
        (ImageError("corrupt", "cannot decode"), FAILED, "cannot decode"),
        (OptionError("crop exceeds size"), WRONG_OPTIONS, "crop exceeds size"),
        (KeyboardInterrupt(), FAILED, "interrupted; the same command continues"),
        (ValueError("odd\nthing"), FAILED, "ValueError: odd thing (unexpected; --debug shows where)"),
        (ValueError(), FAILED, "ValueError: no message (unexpected; --debug shows where)"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/a/b"),
            FAILED,
            "the disk is full at /a/b; free space and run the same command again, it continues",
        ),
        (
            OSError(errno.EDQUOT, "Disk quota exceeded"),
            FAILED,
            "the disk is full; free space and run the same command again, it continues",
        ),
    ],
)
def test_every_error_is_one_line_and_a_code(own_ray, capsys, error, code, message):
    assert exit_of(failing(error), [SOURCE]) == code
    shown = capsys.readouterr()
    assert shown.err == f"error: {message}\n"
    assert shown.out == ""


def test_a_job_may_choose_its_own_exit():
    assert exit_of(failing(SystemExit(7)), [SOURCE]) == 7


@pytest.mark.parametrize("error", [DataError("no such shards"), ValueError("odd")])
def test_debug_shows_the_traceback(capsys, error):
    assert exit_of(failing(error), ["--debug", SOURCE]) == FAILED
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert "in main" in shown
    assert shown.splitlines()[-1].startswith("error: ")


class RemoteError(Exception):
    """As Ray's RayTaskError: the text is a remote traceback, the error is its `cause`."""

    def __init__(self, cause):
        super().__init__("ray::task() (pid=1)\nTraceback (most recent call last):\n  File …\nValueError: remote")
        self.cause = cause


def remote(cause):
    """As RayTaskError.as_instanceof_cause: also of its cause's class, but with its own text."""
    cls = type(f"RemoteError({type(cause).__name__})", (RemoteError, type(cause)), {"__init__": RemoteError.__init__})
    return cls(cause)


def chained(outer, inner):
    outer.__cause__ = inner
    return outer


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (RemoteError(DataError("no such shards")), FAILED, "no such shards"),
        (remote(DataError("no such shards")), FAILED, "no such shards"),
        (remote(OptionError("crop exceeds size")), WRONG_OPTIONS, "crop exceeds size"),
        (RemoteError(RemoteError(chained(RuntimeError("UDF failed"), DataError("inner")))), FAILED, "inner"),
        (chained(RuntimeError("outer"), remote(DataError("inner"))), FAILED, "inner"),
        (remote(OSError(errno.ENOSPC, "No space left on device")), FAILED,
         "the disk is full; free space and run the same command again, it continues"),
        (RemoteError(ValueError("odd")), FAILED, "ValueError: odd (unexpected; --debug shows where)"),
        (RemoteError("no exception"), FAILED, "RemoteError: ValueError: remote (unexpected; --debug shows where)"),
    ],
)  # fmt: skip
def test_the_users_error_is_found_inside_what_was_wrapped_around_it(capsys, error, code, message):
    assert exit_of(failing(error), [SOURCE]) == code
    assert capsys.readouterr().err == f"error: {message}\n"


def test_an_error_while_handling_another_is_found_too(capsys):
    def main(_):
        try:
            raise DataError("the first")
        except DataError:
            raise RuntimeError("the second")  # noqa: B904

    assert exit_of(main, [SOURCE]) == FAILED
    assert capsys.readouterr().err == "error: the first\n"


def test_errors_that_cause_each_other_end():
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first
    assert exit_of(failing(first), [SOURCE]) == FAILED


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fills_up_ends_the_job_in_one_sentence(tmp_path, monkeypatch, capsys, call):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    assert exit_of(lambda _: files.write_json(tmp_path / "x.json", {}), [SOURCE]) == FAILED
    told = f"error: the disk is full at {tmp_path / 'x.json'}; free space and run the same command again"
    assert capsys.readouterr().err.startswith(told)
    assert list(tmp_path.iterdir()) == []


# ---- signals ------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def own_handlers():
    """What a job sets is taken back."""
    held = {number: signal.getsignal(number) for number in STOPS}
    hook = threading.excepthook
    yield
    threading.excepthook = hook
    os.environ.pop("RAY_ENABLE_AUTO_CONNECT", None)
    for number, handler in held.items():
        signal.signal(number, handler)


def send(*numbers):
    def main(_):
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.2)

    return main


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (signal.SIGINT, "interrupted"),
        (signal.SIGTERM, "terminated"),
        (signal.SIGHUP, "hung up (its terminal was closed)"),
    ],
)
def test_every_signal_to_stop_ends_the_job_in_one_sentence(own_ray, capsys, number, words):
    assert exit_of(send(number), [SOURCE]) == FAILED
    assert capsys.readouterr().err == f"error: {words}; the same command continues\n"


@pytest.mark.parametrize("made", [RuntimeError("what a library makes of it"), SystemExit(0), SystemExit(1)])
def test_a_signal_is_told_whatever_libraries_make_of_it(own_ray, capsys, made):
    def main(_):
        try:
            send(signal.SIGTERM)(_)
        except KeyboardInterrupt:
            raise made from None

    assert exit_of(main, [SOURCE]) == FAILED
    assert capsys.readouterr().err == "error: terminated; the same command continues\n"


@pytest.fixture
def own_ray(monkeypatch):
    """No job of a test ends the Ray of the others."""
    ended = []
    monkeypatch.setitem(
        sys.modules, "ray", SimpleNamespace(is_initialized=lambda: True, shutdown=lambda: ended.append(1))
    )
    return ended


def test_what_ray_started_is_ended(own_ray, capsys):
    assert exit_of(send(signal.SIGTERM), [SOURCE]) == FAILED
    assert own_ray == [1]


def test_a_second_signal_while_the_job_is_left_ends_it_at_once(monkeypatch, capsys):

    def end(code):
        raise SystemExit(code + 41)  # so that nothing after it is done here, either

    monkeypatch.setattr(os, "_exit", end)
    busy = SimpleNamespace(is_initialized=lambda: True, shutdown=lambda: send(signal.SIGTERM)(None))
    monkeypatch.setitem(sys.modules, "ray", busy)
    assert exit_of(send(signal.SIGINT), [SOURCE]) == FAILED + 41
    assert capsys.readouterr().err == "error: interrupted; the same command continues\n"


def test_a_signal_that_is_ignored_stays_so(capsys):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    assert exit_of(send(signal.SIGHUP), [SOURCE]) == DONE
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_library_that_sets_handlers_of_its_own_does_not_keep_them(own_ray, capsys, number):
    def main(_):
        with own_signals():
            signal.signal(number, lambda *_: sys.exit(0))  # as Ray Train does
            ctypes.CDLL(None).signal(int(number), None)  # as native code does
        send(number)(_)

    assert exit_of(main, [SOURCE]) == FAILED
    assert capsys.readouterr().err == f"error: {STOPS[number]}; the same command continues\n"


def test_other_signals_are_the_librarys():
    held = signal.getsignal(signal.SIGUSR1)
    try:
        with own_signals():
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR1, held)


def test_tables_show_every_cell(capsys):
    """Also where no terminal tells its width."""
    print_table("scores", ["category", "AUROC"], [["a" * 90, "99.1"], ["mean", "98.0"]], footer=1)
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert shown == [["scores"], ["category", "AUROC"], ["a" * 90, "99.1"], ["mean", "98.0"]]


@pytest.mark.parametrize("preset", ["paper", "reference"])
@pytest.mark.parametrize("name", METHODS)
def test_a_preset_fills_in_what_is_left_open(name: str, preset: str) -> None:
    """The defaults that the parser shows come from the default preset, and must not stand in the way of another."""
    given = parse(train_options(), [name, "--shards", "s", "--output", "o", "--method.preset", preset])
    assert given.method == METHODS[name].Config(preset=preset)


def test_what_follows_from_another_option_follows_from_it_on_the_command_line() -> None:
    given = parse(train_options(), ["uninet", "--shards", "s", "--output", "o", "--method.decision", "literal"])
    assert given.method.beta == 0.03


def test_a_switch_may_stand_alone() -> None:
    name = ["uniformaly", "--shards", "s", "--output", "o"]
    assert parse(train_options(), [*name, "--overwrite", "--seed", "3"]).overwrite
    assert parse(train_options(), [*name, "--per-category"]).per_category
    assert not parse(train_options(), [*name, "--overwrite", "false"]).overwrite


def test_what_is_printed_is_data(capsys):
    """Brackets are no markup and colons no pictures: in lines, and in every part of a table."""
    name = "run [a]/[/b] [red]x :smile: [link=y]"
    console.print(f"shard set written: {name}")
    assert capsys.readouterr().out == f"shard set written: {name}\n"
    print_table(name, [name, f"2 {name}"], [[name, name], [name, "98.0"]], footer=1)
    assert capsys.readouterr().out.count(name) == 6
