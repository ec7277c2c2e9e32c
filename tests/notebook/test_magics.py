"""The magics, in a real IPython shell over one engine in this process, and in real kernels over
two engines."""

from __future__ import annotations

import contextlib
import doctest
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from IPython.core.completer import provisionalcompleter
from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from jupyter_client.manager import start_new_kernel
from traitlets.config import Config

import flexkernel as fk
from flexkernel.errors import (
    CaptureError,
    ClusterError,
    EngineError,
    HookError,
    LayoutError,
    LoadError,
    PromptError,
)
from flexkernel.notebook import completion, display, lines, magics
from tests.support import models
from tests.support.waiting import until

MLP = "model.layers.*.mlp"


class Notebook:
    """An IPython shell. `do` gives a cell's value, or raises what it raised; what it showed is
    then in `shown`."""

    def __init__(self):
        config = Config()
        config.HistoryManager.enabled = False
        self.shell = InteractiveShell.instance(config=config)
        self.shell.colors = "nocolor"
        self.shown = ""

    def do(self, code: str):
        with capture_output(display=False) as shown:
            done = self.shell.run_cell(code, store_history=True)
        self.shown = shown.stdout + shown.stderr
        if not done.success:
            raise done.error_before_exec or done.error_in_exec
        return done.result

    def fails(self, code: str) -> BaseException:
        with pytest.raises(BaseException) as caught:
            self.do(code)
        return caught.value

    def completions(self, code: str) -> list[str]:
        with provisionalcompleter():
            found = list(self.shell.Completer.completions(code, len(code)))
        return [code[: c.start] + c.text for c in found]

    @property
    def magics(self) -> magics.FlexMagics:
        return self.shell.magics_manager.registry["FlexMagics"]


@pytest.fixture(scope="module")
def shell():
    InteractiveShell.clear_instance()
    notebook = Notebook()
    notebook.do("%load_ext flexkernel")
    yield notebook
    InteractiveShell.clear_instance()


@pytest.fixture
def fresh(shell):
    """A notebook in which no session was made."""
    kept, shell.magics.current.session = shell.magics.session, None
    names = {k: v for k, v in shell.shell.user_ns.items() if isinstance(v, fk.Session)}
    for name in names:
        del shell.shell.user_ns[name]
    yield shell
    if shell.magics.session is not None:
        shell.do("%flex_cluster stop")
    shell.magics.current.session = kept
    shell.shell.user_ns.update(names)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The tiny Llama with a tokenizer whose tokens are bytes."""
    return models.reading_bytes("llama", tmp_path_factory.mktemp("m"))


@pytest.fixture(scope="module")
def model(shell, folder):
    shell.do("%flex_cluster local")
    shell.do(f"%flex_load {folder}")
    return shell


@pytest.fixture
def loaded(model, folder):
    """A notebook with the tiny Llama loaded and no hooks."""
    if not model.magics.session.has_model:
        model.do(f"%flex_load {folder}")
    model.do("%flex_unhook")
    return model


def ids_of(run) -> list[list[int]]:
    return [
        [i for i, m in zip(*row, strict=True) if m]
        for row in zip(run.plan.ids, run.plan.mask, strict=True)
    ]


# Loading the extension


def test_loading_the_extension_imports_nothing_heavy():
    code = """
import json, sys
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
shell.run_line_magic("load_ext", "flexkernel")
shell.complete("x", "%flex_hook model.", 17)
assert "flex_hook" in shell.magics_manager.magics["line"]
heavy = ["torch", "transformers", "ipyparallel", "zmq", "plotly", "ipywidgets", "flexkernel.session.session"]
print(json.dumps([name for name in heavy if name in sys.modules]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == []


def test_loading_again_keeps_the_session_and_doubles_nothing(loaded):
    session = loaded.magics.session
    loaded.do("%reload_ext flexkernel")
    assert session is not None and loaded.magics.session is session
    assert (
        len([m for m in loaded.shell.Completer.custom_matchers if "Completion" in m.__qualname__])
        == 1
    )
    assert loaded.shell.input_transformer_manager.token_transformers.count(lines.Question) == 1


def test_unloading_takes_the_completion_out(loaded):
    loaded.do("%unload_ext flexkernel")
    assert "%flex_hook model.embed_tokens" not in loaded.completions("%flex_hook model.")
    loaded.do("%load_ext flexkernel")
    assert "%flex_hook model.embed_tokens" in loaded.completions("%flex_hook model.")


def test_the_examples_in_the_docstrings_are_true():
    done = [doctest.testmod(module) for module in (lines, completion)]
    assert sum(d.attempted for d in done) >= 3 and all(d.failed == 0 for d in done)


def test_every_magic_is_in_the_table_with_its_twin_and_its_arguments():
    head, rule, *rows = magics.magics_table().splitlines()
    assert (head, rule) == ("| magic | twin | does |", "| --- | --- | --- |")
    names = [re.match(r"\| `%{1,2}(flex_\w+)", row)[1] for row in rows]
    assert names == [
        f"flex_{n}"
        for n in (
            "cluster",
            "load",
            "tree",
            "param",
            "hook",
            "edit",
            "unhook",
            "group",
            "run",
            "show",
            "freeze",
            "verify",
        )
    ]
    for row in rows:
        cells = re.split(r"(?<!\\)\|", row)[1:-1]
        assert len(cells) == 3 and all(cell.strip() for cell in cells)
    assert "%flex_hook [--at output\\|input\\|" in rows[4] and "`session.hook(" in rows[4]


@pytest.mark.parametrize("name", sorted(magics.FlexMagics.magics["line"]))
def test_help_lists_the_options(shell, name, monkeypatch):
    seen = []
    monkeypatch.setitem(
        shell.shell.hooks, "show_in_pager", lambda data, **more: seen.append(data["text/plain"])
    )
    shell.do(f"%{name}?")
    options = lines.options_of(getattr(magics.FlexMagics, name))
    assert len(seen) == 1 and f"%{name}" in seen[0] and all(option in seen[0] for option in options)


# Sessions


@pytest.mark.parametrize(
    "code",
    [
        *(
            "%flex_load x",
            "%flex_tree",
            "%flex_param a",
            "%flex_hook a",
            "%flex_hook",
            "%flex_unhook",
            "%flex_group list",
        ),
        *("%flex_run x", "%%flex_run\nx", "%flex_show a"),
        *("%flex_cluster status", "%flex_cluster stop", "%flex_cluster restart"),
    ],
)
def test_what_needs_engines_says_how_to_get_them(fresh, code):
    error = fresh.fails(code)
    assert (
        type(error) is ClusterError
        and "%flex_cluster start -n 2" in str(error)
        and "local" in str(error)
    )
    assert fresh.shown.strip() == f"ClusterError: {error}"


def test_a_session_is_in_the_notebook_as_flex_until_it_stops(fresh):
    session = fresh.do("x = %flex_cluster local\nx")
    assert isinstance(session, fk.Session) and fresh.do("flex") is session
    assert fresh.do("%flex_cluster stop") is None
    assert "flex" not in fresh.shell.user_ns
    assert type(fresh.fails("%flex_tree")) is ClusterError


def test_before_there_are_engines_flex_can_say_how_to_start_them(fresh):
    fresh.magics.current.promise()
    assert "%flex_cluster start -n 2" in repr(fresh.do("flex"))
    assert type(fresh.fails("flex.run('abc')")) is ClusterError
    fresh.do("%flex_cluster local")
    assert isinstance(fresh.do("flex"), fk.Session)
    fresh.do("%flex_cluster stop")
    assert "%flex_cluster start -n 2" in repr(fresh.do("flex"))
    fresh.do("flex = 7")
    fresh.do("%flex_cluster local")
    assert fresh.do("flex") == 7
    fresh.do("%flex_cluster stop\ndel flex")
    fresh.magics.current._promised = False


def test_a_variable_called_flex_is_the_users(fresh):
    fresh.do("flex = 7")
    fresh.do("%flex_cluster local")
    assert fresh.do("flex") == 7
    fresh.do("%flex_cluster stop\ndel flex")


def test_a_session_made_by_hand_is_found(fresh):
    fresh.do("import flexkernel as fk\nfirst, second = fk.local(), fk.local()")
    assert fresh.do("%flex_cluster").rows == fresh.do("second.status()").rows
    assert fresh.magics.session is fresh.do("second") is fresh.do("flex")
    fresh.do("%flex_cluster stop\nfirst.close()\ndel first, second")


def test_a_new_session_ends_the_one_before(fresh, folder):
    before = fresh.do("%flex_cluster local")
    fresh.do(f"%flex_load {folder}")
    fresh.do("%flex_hook lm_head")
    run = fresh.do("%flex_run abc")
    after = fresh.do("%flex_cluster restart")
    assert after is not before and fresh.magics.session is fresh.do("flex") is after
    assert run.freed and type(fresh.fails("%flex_run abc")) is LoadError


def test_a_session_shows_its_status(fresh):
    fresh.do("%flex_cluster local")
    fresh.do("flex")
    assert re.search(r"engines +1 of 1 alive", fresh.shown)
    html = fresh.shell.display_formatter.format(fresh.do("flex"))[0]["text/html"]
    assert html.startswith("<table") and "alive" in html


# Load


def test_load_gives_what_session_load_gives_and_shows_a_table(loaded, folder):
    info = loaded.do(f"x = %flex_load --dtype bfloat16 --attn eager {folder}\nx")
    assert info is loaded.do("flex.loaded.info") and (info.dtype, info.attention) == (
        "bfloat16",
        "eager",
    )
    assert (
        "LlamaForCausalLM: 201,280 parameters" in loaded.shown
        and "201,280    100%  0.4 MB" in loaded.shown
    )
    data, _ = loaded.shell.display_formatter.format(info)
    assert (
        ">rank</th>" in data["text/html"]
        and ">parameters</th>" in data["text/html"]
        and "201,280" in data["text/html"]
    )
    loaded.do("%flex_load {flex.loaded.info.path}")
    assert loaded.do("flex.loaded.info.dtype") == "float32"


class WatchedBars:
    """Bars in a notebook that is not there: what they showed as (text, html), in which outputs."""

    def __init__(self, monkeypatch):
        self.shown = []
        self.outputs = []
        self.explained = []
        self.callbacks = []
        monkeypatch.setattr(display, "display", self.display)
        events = SimpleNamespace(
            register=lambda _event, callback: self.callbacks.append(callback),
            unregister=lambda _event, callback: self.callbacks.remove(callback),
        )
        shell = SimpleNamespace(kernel=None, events=events)
        self.make = display.Bars(shell, self.explained.append)

    def display(self, thing, display_id):
        self.outputs.append(thing)
        self.update(thing)
        return SimpleNamespace(update=self.update)

    def update(self, thing):
        self.shown.append((repr(thing), thing._repr_html_()))

    def end_of_cell(self):
        for callback in list(self.callbacks):
            callback(None)


@pytest.fixture
def bars(monkeypatch):
    return WatchedBars(monkeypatch)


def test_the_progress_of_a_load_is_one_output_that_is_updated(monkeypatch):
    shown = []

    def show(thing, display_id):
        assert display_id is True
        shown.append(thing._repr_html_())
        return SimpleNamespace(update=lambda thing: shown.append(thing._repr_html_()))

    monkeypatch.setattr(display, "display", show)
    with display.Progress(SimpleNamespace(kernel=None), "a<b", 2, stays=True) as progress:
        progress("loading", 1, 2)
        progress("loaded", 2, 2)
    assert ['value="0"' in shown[0], 'value="1"' in shown[1], "<progress" in shown[2]] == [
        True,
        True,
        False,
    ]
    assert (
        "preparing a&lt;b: 2 engines" in shown[0] and "loading a&lt;b: 1 of 2 engines" in shown[1]
    )
    assert "loaded a&lt;b: 2 engines" in shown[2]


def test_the_bar_of_anything_else_goes_when_it_is_done(monkeypatch):
    monkeypatch.setattr(
        display, "display", lambda shown, display_id: SimpleNamespace(update=lambda shown: None)
    )
    with display.Progress(SimpleNamespace(kernel=None), "sweep", 1, "cell") as progress:
        progress("running", 3, 24)
        assert (
            "running sweep: 3 of 24 cells" in repr(progress)
            and '<progress value="3" max="24"' in progress._repr_html_()
        )
    assert repr(progress) == progress._repr_html_() == ""


def test_a_bar_without_a_total_counts_nothing_but_its_clock_moves(bars, monkeypatch):
    monkeypatch.setattr(display, "TICK_S", 0.01)
    with bars.make("2 engines", stage="starting"):
        until(lambda: len(bars.shown) > 3)
        assert re.fullmatch(r"starting 2 engines, \d\.\d s", bars.shown[-1][0])
        assert "<progress style" in bars.shown[-1][1]
    assert bars.shown[-1] == ("", "")


def test_runs_of_one_cell_share_a_bar_that_appears_when_they_take_long(bars, monkeypatch):
    monkeypatch.setattr(display, "PATIENCE_S", 0.05)
    monkeypatch.setattr(display, "TICK_S", 0.01)
    for _ in range(3):
        with bars.make("", unit="run"):
            pass
    assert bars.shown == [], "they were quick"
    with bars.make("", unit="run"):
        until(lambda: bars.shown)
    assert bars.shown[-1][0].startswith("running run 4, 0.")
    assert len(bars.outputs) == 1
    bars.end_of_cell()
    assert bars.shown[-1] == ("", "")
    with bars.make("", unit="run"):
        until(lambda: len(bars.outputs) == 2)
    bars.end_of_cell()


def test_an_interrupt_is_explained(bars):
    for unit in ("engine", "run"):
        with pytest.raises(KeyboardInterrupt) as caught, bars.make("x", unit=unit):
            raise KeyboardInterrupt
        assert bars.explained.pop() is caught.value
        bars.end_of_cell()


def test_a_load_that_fails_leaves_no_bar(monkeypatch):
    shown = []
    handle = SimpleNamespace(update=lambda thing: shown.append((repr(thing), thing._repr_html_())))
    monkeypatch.setattr(display, "display", lambda thing, display_id: handle)
    with (
        contextlib.suppress(ValueError),
        display.Progress(SimpleNamespace(kernel=None), "m", 2) as progress,
    ):
        progress("loading", 1, 2)
        raise ValueError
    assert "loading m: 1 of 2" in shown[0][0] and shown[1:] == [("", "")]


# Hooks


def test_a_hook_and_its_twin_are_the_same(loaded):
    hooked = loaded.do(
        f"x = %flex_hook {MLP} --at input --index 0 --group a --group b --positions -1,0 --name "
        "mine\nx"
    )
    assert (
        loaded.do(
            f"flex.hook('{MLP}', at='input', index=0, groups=['a', 'b'], positions=[-1, 0], "
            "name='mine')"
        ).spec
        == hooked.spec
    )
    assert [spec.key for spec in loaded.do("%flex_hook")] == ["mine"]
    assert "mine" in loaded.shown and "a, b" in loaded.shown


def test_edits_of_a_glob_add_up_until_one_replaces_them(loaded):
    z = "model.layers.2.self_attn.@z"
    loaded.do(f"%flex_hook {z} --edit zero --heads 0")
    loaded.do(f"%flex_hook {z} --edit zero --heads 1")
    assert "together with" in loaded.shown and "--replace" in loaded.shown
    assert [hook.heads for hook in loaded.do("%flex_hook")] == [(0,), (1,)]
    assert "zero" in loaded.shown and "heads" in loaded.shown
    loaded.do(f"%flex_hook {z} --edit zero --heads 3 --replace")
    assert "replaces" in loaded.shown
    assert [hook.heads for hook in loaded.do("%flex_hook")] == [(3,)]
    error = loaded.fails(f"%flex_hook {z} --edit zero --heads 9")
    assert type(error) is HookError and "heads are 0 to 7" in str(error)


def test_tree_is_the_sessions(loaded):
    loaded.do(f"%flex_hook {MLP}")
    tree = loaded.do("%flex_tree model.layers.1.*")
    assert repr(tree) == repr(loaded.do("flex.tree('model.layers.1.*')")) and MLP in repr(tree)
    assert len(loaded.do("%flex_tree").rows) == len(loaded.do("flex.tree()").rows) > 20


def test_param_is_the_sessions(loaded):
    embedding = loaded.do("%flex_param lm_head.weight")
    assert embedding.shape == (256, 64)
    assert torch.equal(
        embedding.tensor(), loaded.do("flex.parameter('model.embed_tokens.weight')").tensor()
    )
    assert "lm_head.weight (256, 64) float32" in repr(embedding)


def test_verify_is_the_sessions(loaded):
    found = loaded.do("%flex_verify")
    assert found.ok and len(found) > 100 and found.rows == loaded.do("flex.verify()").rows
    assert "░" not in loaded.shown, "the bar is gone when it is done"
    mlps = loaded.do("x = %flex_verify model.layers.*.mlp lm_head --stream\nx")
    assert mlps.streamed and len({row.key.module for row in mlps.rows}) == 5
    assert len(loaded.do("rows = ['abc', 'de']\n%flex_verify lm_head --var rows")) == 2


def test_unhook_takes_a_name_a_glob_or_all(loaded):
    loaded.do(
        f"%flex_hook {MLP}\n%flex_hook {MLP} --at input\n%flex_hook lm_head --name "
        "head\n%flex_hook model.norm"
    )
    assert loaded.do("%flex_unhook head") == ["head"]
    assert loaded.do(f"%flex_unhook {MLP} input") == [f"{MLP} input"]
    assert loaded.do("%flex_unhook") == [MLP, "model.norm"]
    assert len(loaded.do("%flex_hook")) == 0


def test_groups_switch_hooks(loaded):
    loaded.do(f"%flex_hook {MLP} --group a\n%flex_hook lm_head\n%flex_hook model.norm")
    assert loaded.do("%flex_group add b model.norm") == {"a": [MLP], "b": ["model.norm"]}
    assert [
        len(loaded.do(f"%flex_run {o} abc"))
        for o in ("", "--groups a", "--groups a,b --complement")
    ] == [6, 4, 1]
    loaded.do("%flex_group off a")
    assert len(loaded.do("%flex_run abc")) == 2
    loaded.do("%flex_group on a\n%flex_group remove b")
    assert loaded.do("%flex_group list") == {"a": [MLP]}


def test_python_variables_are_expanded_in_globs(loaded):
    assert loaded.do("layer = 2\n%flex_hook model.layers.{layer}.mlp").modules == (
        "model.layers.2.mlp",
    )


# Runs


@pytest.mark.parametrize(
    ("line", "prompt"),
    [
        ("The capital of France is", "The capital of France is"),
        ("What is the capital of France?", "What is the capital of France?"),
        ("why??", "why??"),
        ("It's 5 $ or {5} -- not --chat", "It's 5 $ or {5} -- not --chat"),
        ("$HOME {undefined} {{x}} # ! %time", "$HOME {undefined} {{x}} # ! %time"),
        ("'kept '", "kept "),
        ('"it\'s"', "it's"),
        ("'a' or 'b'", "'a' or 'b'"),
        ("'", "'"),
        ("-- --chat", "--chat"),
        ("--complement -x", "-x"),
        ("a = %flex_run b?", "a = %flex_run b?"),
        ("  two  spaces  ", "two  spaces"),
        (r"back\slash \n", r"back\slash \n"),
        ("é 漢 😀?", "é 漢 😀?"),
    ],
)
def test_the_prompt_is_the_raw_rest_of_the_line(loaded, line, prompt):
    for code in (f"%flex_run {line}", f"x = %flex_run {line}\nx"):
        (ids,) = ids_of(loaded.do(code))
        assert bytes(ids).decode() == prompt


def test_a_question_in_other_lines_still_asks_for_help(shell):
    transform = shell.shell.transform_cell
    assert (
        "pinfo" in transform("%flex_run?")
        and "pinfo2" in transform("%flex_run??")
        and "pinfo" in transform("zip?")
    )
    assert transform("a = '''\n%flex_run x?\n'''") == "a = '''\n%flex_run x?\n'''\n"
    assert (
        transform("if 1:\n    x = %flex_run it?")
        == "if 1:\n    x = get_ipython().run_line_magic('flex_run', 'it?')\n"
    )
    assert "pinfo" in transform("%flex_run it?\nzip?").splitlines()[1]


def test_a_cell_has_one_prompt_a_line(loaded):
    run = loaded.do("%%flex_run\nabc?\n\n  $x {y}  \n' z'\n")
    assert [bytes(ids).decode() for ids in ids_of(run)] == ["abc?", "$x {y}", " z"]


def test_a_variable_holds_what_the_twin_takes(loaded):
    loaded.do("ids = [[5, 6, 7], [8]]\ntexts = ['ab', 'c']")
    assert len(loaded.do("%flex_run --var ids").tokens) == 2
    assert loaded.do("%flex_run --var texts").text == ["ab", "c"]


@pytest.mark.parametrize("prompt", ["{text}", "$text", "${text}"])
def test_a_prompt_that_names_a_variable_is_text_and_says_so(loaded, prompt):
    loaded.do("text = 'abc'")
    (ids,) = ids_of(loaded.do(f"%flex_run {prompt}"))
    assert bytes(ids).decode() == prompt
    assert loaded.shown.startswith(f"Note: the prompt is the text '{prompt}'.")
    assert "%flex_run --var text" in loaded.shown
    loaded.do(f"%flex_run costs {prompt}")
    assert "Note" not in loaded.shown
    loaded.do("del text")
    loaded.do(f"%flex_run {prompt}")
    assert "Note" not in loaded.shown


def test_generated_text_grows_after_its_prompt(monkeypatch):
    monkeypatch.setattr(display, "REDRAW_S", 0)
    shown = []
    handle = SimpleNamespace(update=lambda thing: shown.append(repr(thing)))
    monkeypatch.setattr(display, "display", lambda thing, display_id: handle)
    notebook = SimpleNamespace(kernel=None)
    with display.Growing(notebook, "Once upon") as text:
        text(0, " a")
        text(0, " time")
    assert shown[-1] == "Once upon a time"
    with display.Growing(notebook, ["a", "b"]) as text:
        text(1, "2")
        text(0, "1")
    assert shown[-1] == "0: a1\n1: b2"
    with display.Growing(notebook, "Hello?", chat=True) as text:
        text(0, "Hi")
    assert shown[-1] == "Hello?\n\nHi"
    with display.Growing(notebook, [[5, 6]]) as text:
        text(0, " 7")
    assert shown[-1] == " 7"


def test_a_run_equals_its_twin(loaded):
    loaded.do(f"%flex_hook {MLP}")
    ours, twin = loaded.do("%flex_run abc"), loaded.do("flex.run('abc')")
    assert len(ours) == len(twin) == 4
    for a, b in zip(ours, twin, strict=True):
        torch.testing.assert_close(a.tensor(), b.tensor(), rtol=0, atol=0)


def test_a_preview_runs_nothing(loaded):
    before = len(loaded.magics.session.runs)
    seen = loaded.do("%flex_run --preview --generate 5 The capital of France is")
    twin = loaded.magics.session.preview("The capital of France is", max_new_tokens=5)
    assert (
        seen.num_bytes == twin.num_bytes
        and seen.new == 5
        and len(loaded.magics.session.runs) == before
    )


def test_stop_at_ends_the_run_there(loaded):
    loaded.do(f"%flex_hook {MLP}")
    assert [c.key.module for c in loaded.do("%flex_run --stop-at model.layers.1 abc")] == [
        "model.layers.0.mlp",
        "model.layers.1.mlp",
    ]


def test_an_interrupt_is_one_line_that_says_what_it_left(loaded, monkeypatch):
    def interrupt(self, row, text):
        self.rows[row] = self.rows.get(row, "") + text
        if len(self.rows[row]) > 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(display.Growing, "__call__", interrupt)
    loaded.do(f"%flex_hook {MLP}")
    error = loaded.fails("%flex_run --generate 30 The capital of France is")
    assert type(error) is KeyboardInterrupt
    last = loaded.do("flex.last")
    assert last.partial and 0 < len(last.new_ids[0]) < 30
    loaded.fails("%flex_run --generate 30 The capital of France is")
    tokens = len(loaded.do("flex.last").new_ids[0])
    loaded.fails("%flex_run --generate 30 The capital of France is")
    kept = f"interrupted after {tokens} tokens; what was captured is flex.last"
    assert loaded.shown.strip() == f"KeyboardInterrupt: {kept}"


def test_an_interrupt_before_anything_was_whole_is_one_line_too(loaded, monkeypatch):
    def interrupt(*_args, **_more):
        raise KeyboardInterrupt

    monkeypatch.setattr("flexkernel.session.runner.Runner.run", interrupt)
    loaded.fails("flex.run('abc')")
    assert loaded.shown.strip() == "KeyboardInterrupt: interrupted"


# Show


@pytest.fixture
def drawn(loaded, monkeypatch):
    """Captures that say what is drawn instead of drawing it."""
    monkeypatch.setattr(fk.Capture, "show", lambda self, as_="map": (self.name, as_))
    loaded.do(f"%flex_hook {MLP}\n%flex_hook model.layers.0.mlp --at input --name in")
    loaded.do("%flex_run abc\n%flex_run abcd")
    return loaded


def test_show_draws_a_capture_of_the_last_run_by_the_name_the_run_lists(drawn):
    assert drawn.do("x = %flex_show model.layers.0.mlp\nx") == ("model.layers.0.mlp", "map")
    assert drawn.do("%flex_show model.layers.0.mlp input --as map") == (
        "model.layers.0.mlp input [0]",
        "map",
    )
    assert drawn.do("%flex_show model.layers.0.mlp input [0]") == (
        "model.layers.0.mlp input [0]",
        "map",
    )
    assert drawn.do("%flex_show logits") == ("(root) [logits]", "map")


def test_show_draws_several_by_their_names_or_a_glob(drawn):
    a, b = "model.layers.0.mlp", "model.layers.1.mlp"
    assert drawn.do(f"%flex_show {a} {b}") == [(a, "map"), (b, "map")]
    assert drawn.do(f"%flex_show {a} input {b} logits") == [
        (f"{a} input [0]", "map"),
        (b, "map"),
        ("(root) [logits]", "map"),
    ]
    layers = [(f"model.layers.{i}.mlp", "map") for i in range(4)]
    assert drawn.do("%flex_show 'model.layers.*.mlp' output --as map") == layers
    assert "captured nothing at 'nothing': hook it first" in str(
        drawn.fails(f"%flex_show {a} nothing")
    )


def test_show_of_too_many_draws_none(drawn, monkeypatch):
    monkeypatch.setattr(magics, "MOST_VIEWS", 3)
    assert "means 4 captures; at most 3" in str(drawn.fails(f"%flex_show {MLP} output"))


def test_several_views_are_shown_one_after_another(loaded):
    loaded.do(f"%flex_hook {MLP}\n%flex_run abc")
    loaded.do("%flex_show model.layers.0.mlp model.layers.1.mlp")
    assert loaded.shown.count("model.layers.0.mlp") == loaded.shown.count("model.layers.1.mlp") == 1


def test_show_takes_an_earlier_run(drawn, monkeypatch):
    monkeypatch.setattr(fk.Capture, "show", lambda self: self.shape[1])
    last = drawn.do("flex.runs[-1].number")
    assert (drawn.do("%flex_show logits"), drawn.do(f"%flex_show logits --run {last - 1}")) == (
        4,
        3,
    )
    assert "is not stored; there are" in str(drawn.fails("%flex_show logits --run 99999"))


def test_show_of_what_was_not_captured_names_what_was(drawn):
    error = drawn.fails("%flex_show model.layers.0.mpl")
    assert type(error) is CaptureError and "model.layers.0.mlp" in str(error)


def test_show_before_a_run_says_so(fresh, folder):
    fresh.do(f"%flex_cluster local\n%flex_load {folder}")
    assert "no run is stored: %flex_run PROMPT" in str(fresh.fails("%flex_show lm_head"))


def test_freeze_gives_the_views_it_froze(loaded):
    from flexkernel import views

    views.freeze_all()  # what other tests of this process left live
    loaded.do("%flex_hook lm_head\n%flex_run abc")
    view = views.tensor_map(loaded.do("flex.runs[-1]['lm_head']"))
    assert loaded.do("%flex_freeze") == [view] and view.frozen
    assert loaded.shown.strip().startswith("Out[") and "1 view is static now" in loaded.shown
    assert loaded.do("%flex_freeze") == []
    assert loaded.shown.strip().endswith("no view is live")


# Bad input: one block, and the session goes on


@pytest.mark.parametrize(
    ("code", "kind", "says"),
    [
        (
            "%flex_hook model.layers.*.mpl",
            HookError,
            r"no module matches 'model.layers.\*.mpl'.*nearest: model.layers.\*.mlp",
        ),
        ("%flex_hook lm_head --index 3", HookError, "no tensor at index '3'"),
        ("%flex_tree nothing.here", HookError, "no module matches 'nothing.here'"),
        (
            "%flex_param model.norm.wieght",
            HookError,
            "no parameter or buffer 'model.norm.wieght'; nearest: model.norm.weight",
        ),
        (
            "%flex_param model.norm",
            HookError,
            "'model.norm' is a module; a parameter of it is model.norm.weight",
        ),
        ("%flex_unhook nothing", HookError, "no hook is called 'nothing'"),
        ("%flex_group off nothing", HookError, "there is no group 'nothing'"),
        ("%flex_load /no/such/folder", LoadError, "there is no model folder /no/such/folder"),
        (
            "%flex_load {flex.loaded.info.path} --tp 3",
            LayoutError,
            "tp=3 makes 3 ranks, the cluster has 1 engine",
        ),
        (
            "%flex_load {flex.loaded.info.path} --dtype int7",
            LoadError,
            "dtype 'int7' is not one of torch's",
        ),
        ("%flex_run", PromptError, "the prompt is empty"),
        ("%flex_run ''", PromptError, "the prompt is empty"),
        ("%%flex_run\n\n", PromptError, "the prompt is empty"),
        ("%flex_run --groups nothing abc", HookError, "no hook is in group 'nothing'"),
        ("%flex_run --stop-at nothing abc", HookError, "no module matches 'nothing'"),
        ("%flex_run --chat abc", PromptError, "no chat template"),
        (
            "long = 'x' * 5000\n%flex_run --var long",
            PromptError,
            "the prompt has 5000 tokens and the model 2048",
        ),
        (
            "ids = [[5, 256]]\n%flex_run --var ids",
            PromptError,
            "token id 256 at position 1 is outside the vocabulary",
        ),
        (
            "%flex_cluster attach --cluster-id none-such",
            ClusterError,
            "no cluster to attach to at cluster_id='none-such'",
        ),
        ("%flex_cluster start -n 0", ClusterError, "n=0 engines cannot be started"),
    ],
)
def test_bad_input_is_one_block_and_the_session_goes_on(loaded, code, kind, says):
    session = loaded.magics.session
    error = loaded.fails(code)
    assert type(error) is kind and re.search(says, str(error))
    assert loaded.shown.strip() == f"{kind.__name__}: {error}" and "Traceback" not in loaded.shown
    assert loaded.magics.session is session
    assert session.has_model, "the model is still loaded"
    loaded.do(f"%flex_hook {MLP}")
    assert loaded.do("%flex_run abc")["model.layers.3.mlp"].tensor().shape == (1, 3, 64)


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("%flex_hook lm_head --at nowhere", "argument --at: invalid choice: 'nowhere'"),
        ("%flex_hook lm_head --nothing", "unrecognized arguments: --nothing"),
        ("%flex_hook lm_head --positions a", "argument --positions: invalid numbers value: 'a'"),
        ("%flex_hook --name x", "which modules? %flex_hook GLOB --name x"),
        ("%flex_hook 'lm_head", "No closing quotation"),
        ("%flex_load", "the following arguments are required: PATH_OR_HUB_ID"),
        ("%flex_load a --tp x", "argument --tp: invalid int value: 'x'"),
        ("%flex_load a b", "unrecognized arguments: b"),
        ("%flex_group", "the following arguments are required: on|off|add|remove|list"),
        ("%flex_cluster begin", "invalid choice: 'begin'"),
        ("%flex_cluster attach -n 2", "-n belongs to %flex_cluster start, not to attach"),
        (
            "%flex_cluster start --cluster-id 2",
            "--cluster-id belongs to %flex_cluster attach, not to start",
        ),
        (
            "%flex_run --chats abc",
            "there is no option --chats; there are --groups, --complement, --chat",
        ),
        ("%flex_run --var", "argument --var: expected one argument"),
        ("%flex_run --var nothing_there", "--var nothing_there: there is no variable of that name"),
        ("%flex_run --var x abc", "the prompt is given twice: in --var and in the line"),
        ("%%flex_run abc\nabc", "the prompt is given twice: in the line and in the lines below"),
        ("%flex_show lm_head --as nothing", "--as nothing: there is no such view; views: map"),
        ("%flex_show", "the following arguments are required: NAME"),
        ("%flex_freeze all", "unrecognized arguments: all"),
    ],
)
def test_bad_arguments_are_a_usage_error_without_a_traceback(loaded, code, says):
    error = loaded.fails(code)
    assert type(error) is UsageError and says in str(error)
    assert loaded.shown.strip() == f"UsageError: {error}"


def test_an_engines_error_shows_its_own_traceback_only(loaded, monkeypatch):
    def broken(*args, **kwargs):
        raise EngineError(
            "ValueError on rank 0: boom", 0, "Traceback of the engine\nValueError: boom\n"
        )

    monkeypatch.setattr(loaded.magics.session.engines, "call", broken)
    loaded.fails("%flex_run abc")
    head, *rest = loaded.shown.strip().splitlines()
    assert head == "EngineError: ValueError on rank 0: boom"
    assert rest == ["--- traceback of rank 0 ---", "Traceback of the engine", "ValueError: boom"]


# Completion

TAKE_NOTHING = ("zero", "mean")
TAKE_A_VALUE = ("scale:", "noise:", "add:", "set:", "project_out:", "clamp:", "patch:")


@pytest.mark.parametrize(
    ("code", "offers"),
    [
        ("%flex_cluster st", ["start", "status", "stop"]),
        ("%flex_cluster start --e", ["--engines"]),
        ("%flex_cluster start --engines sl", ["slurm"]),
        ("%flex_load --d", ["--dp", "--dtype", "--device"]),
        ("%flex_load x --dtype b", ["bfloat16"]),
        ("%flex_load x --dtype=b", ["bfloat16"]),
        ("%flex_hook ", ["model", "lm_head"]),
        ("%flex_hook mod", ["model"]),
        ("%flex_hook model.layers.", [f"model.layers.{i}" for i in "*0123"]),
        (
            "%flex_hook model.layers.0.self_attn.@",
            [f"model.layers.0.self_attn.@{p}" for p in ("q", "k", "v", "pattern", "z")],
        ),
        ("%flex_hook model.layers.*.m", ["model.layers.*.mlp"]),
        ("%flex_hook **.q", ["**.q_proj"]),
        (
            "%flex_hook lm_head --at ",
            ["output", "input", "grad_output", "grad_input", "param_grad"],
        ),
        ("%flex_hook lm_head --group ", ["red", "blue"]),
        ("%flex_unhook m", ["model.layers.*.mlp", "'model.norm input'"]),
        ("%flex_group o", ["on", "off"]),
        ("%flex_group off r", ["red"]),
        ("%flex_group add new he", ["head"]),
        ("%flex_tree model.n", ["model.norm"]),
        ("%flex_param model.layers.3.mlp.d", ["model.layers.3.mlp.down_proj"]),
        ("%flex_param model.norm.", ["model.norm.weight"]),
        ("%flex_param model.layers.", [f"model.layers.{i}" for i in range(4)]),
        (
            "%flex_run --",
            [
                f"--{option}"
                for option in ["groups", "complement", "chat", "generate", "sample", "temperature"]
            ]
            + [
                f"--{option}"
                for option in ["top-k", "top-p", "seed", "preview", "stop-at", "backward", "var"]
            ],
        ),
        ("%flex_run --groups red,b", ["blue"]),
        ("%flex_run --stop-at model.layers.*.se", ["model.layers.*.self_attn"]),
        ("%flex_run --chat --var my_p", ["my_prompt"]),
        ("%%flex_run --comp", ["--complement"]),
        ("%flex_show model.layers.2", ["model.layers.2.mlp"]),
        ("%flex_show lm_head --as ", ["map"]),
        ("%flex_hook lm_head --edit ", [*TAKE_NOTHING, *TAKE_A_VALUE, "mine"]),
        ("%flex_hook lm_head --edit z", ["zero"]),
        ("%flex_hook lm_head --capture n", ["none"]),
        ("%flex_group on ", ["red", "blue"]),
    ],
)
@pytest.mark.parametrize("before", ["", "x = ", "a = 1\n", "    "])
def test_completion_offers_what_can_stand_there(loaded, code, offers, before):
    if "--edit" in code:
        loaded.do("%%flex_edit mine\nx")
    loaded.do(
        f"my_prompt = 'abc'\n%flex_hook {MLP} --group red\n%flex_hook lm_head --group blue --name "
        "head"
    )
    loaded.do("%flex_hook model.norm --at input\n%flex_run abc")
    if code.startswith("%%"):
        before = ""
    typed = code.rpartition(" ")[2]
    stem = code.removesuffix(typed) + (typed.rpartition(",")[0] + "," if "," in typed else "")
    stem += "--dtype=" if typed.startswith("--dtype=") else ""
    found = loaded.completions(before + code)
    assert [c for c in found if c.startswith(before + stem)] == [
        before + stem + offer for offer in offers
    ]
    assert len(found) == len(offers)


def test_a_path_completes_to_what_lies_there_and_nothing_else(loaded, tmp_path):
    for name in ("model-b", "model-a", ".hidden", "with space"):
        (tmp_path / name).mkdir()
    (tmp_path / "model.lock").touch()
    loaded.do("model_variable = 1")

    def completions(typed):
        start = f"%flex_load {tmp_path}/"
        found = loaded.completions(start + typed)
        return [c.removeprefix(start).replace(f"{tmp_path}/", "") for c in found]

    assert completions("m") == ["model-a/", "model-b/", "model.lock"]
    assert completions("") == ["model-a/", "model-b/", "%flex_load 'with space/'", "model.lock"]
    assert completions(".h") == [".hidden/"]
    assert completions("nothing") == []


def test_a_path_in_the_home_folder_keeps_its_tilde(loaded, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "models").mkdir()
    assert loaded.completions("%flex_load ~/mo") == ["%flex_load ~/models/"]


def test_where_nothing_can_stand_no_words_of_python_are_offered(loaded):
    assert loaded.completions("%flex_group on ") == []
    assert loaded.completions("%flex_tree model.norm i") == []


@pytest.mark.parametrize(
    ("code", "offers"),
    [
        ('run["mod', ["model"]),
        ('run["model.layers.', [f"model.layers.{i}" for i in "*0123"]),
        ("flex.hook('model.layers.*.m", ["model.layers.*.mlp"]),
        ('x = [flex.hook( "lm', ["lm_head"]),
        ('flex.tree("lm', ["lm_head"]),
        ('flex.parameter("lm_head.', ["lm_head.weight"]),
    ],
)
def test_names_are_completed_in_python_too(loaded, code, offers):
    loaded.do(f"%flex_hook {MLP}\nrun = %flex_run abc")
    typed = re.split("[\"']", code)[-1]
    stem = code.removesuffix(typed)
    assert loaded.completions(code) == [stem + offer for offer in offers]


def test_strings_that_name_no_module_are_left_alone(loaded):
    loaded.do("d = {'model': 1}")
    for code in ('d["mod', 'flex.nothing("mod', 'print("mod'):
        assert loaded.magics.completion.matcher(context(code))["completions"] == []
    assert loaded.completions('d["mod') == ['d["model']


def test_the_views_that_completion_offers_are_those_there_are():
    from flexkernel.views import VIEWS

    assert list(completion.USUAL["as_"]) == list(VIEWS)


def test_a_prompt_is_not_completed(loaded):
    assert (
        loaded.magics.completion.matcher(context("%flex_run --chat The --c"))["completions"] == []
    )
    assert loaded.magics.completion.matcher(context("%flex_run The mod"))["completions"] == []


def test_completion_in_other_lines_is_left_alone(loaded):
    for line in (
        "model.layers.",
        "%timeit model.layers.",
        "x = y % flex_hook model.",
        "%flex_nothing model.",
    ):
        assert loaded.magics.completion.matcher(context(line))["completions"] == []


def test_completion_before_there_is_anything_is_empty_or_static(fresh):
    assert fresh.magics.completion.matcher(context("%flex_hook mod"))["completions"] == []
    assert [
        c.text for c in fresh.magics.completion.matcher(context("%flex_hook --a"))["completions"]
    ] == ["--at"]


def test_completion_is_fast_with_the_names_of_a_large_model(loaded, monkeypatch):
    parts = [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.@q",
        "mlp",
        "mlp.gate_proj",
    ]
    names = [f"model.layers.{i}.{part}" for i in range(126) for part in parts * 4]
    monkeypatch.setattr(loaded.magics.completion, "_module_names", lambda: names)
    best = min(
        seconds(lambda: loaded.magics.completion.matcher(context("%flex_hook model.layers.*.m")))
        for _ in range(5)
    )
    assert best < 0.100, f"{best * 1e3:.1f} ms for {len(names)} names"


def context(line: str) -> SimpleNamespace:
    return SimpleNamespace(text_until_cursor=line)


def seconds(function) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


# Real kernels, real engines, the real model


class Kernel:
    """A notebook's kernel. `do` gives what a cell showed as text/plain; `fails` the one block of
    its error."""

    def __init__(self, env: dict[str, str]):
        self.manager, self.client = start_new_kernel(kernel_name="python3", env=env)
        self.mimes: list[dict] = []
        self.do("%load_ext flexkernel")

    def execute(self, code: str) -> tuple[dict, str]:
        shown: list[str] = []
        self.mimes = []

        def collect(message):
            content = message["content"]
            self.mimes.append(content.get("data", {}))
            if message["msg_type"] not in ("update_display_data", "display_data"):
                text = content.get("data", {}).get("text/plain", "")
                shown.extend([content.get("text", ""), *content.get("traceback", []), text])

        reply = self.client.execute_interactive(code, output_hook=collect, timeout=240)["content"]
        return reply, "".join(shown)

    def do(self, code: str) -> str:
        reply, shown = self.execute(code)
        assert reply["status"] == "ok", shown
        return shown

    def fails(self, code: str) -> tuple[str, str]:
        reply, shown = self.execute(code)
        assert reply["status"] == "error"
        return reply["ename"], shown

    def completions(self, code: str) -> list[str]:
        return self.client.complete(code, reply=True, timeout=60)["content"]["matches"]

    def restart(self) -> None:
        self.manager.restart_kernel()
        self.client.wait_for_ready(timeout=60)
        self.do("%load_ext flexkernel")

    def close(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel()


@contextlib.contextmanager
def kernel(folder: Path):
    env = {**os.environ, "IPYTHONDIR": str(folder), "OMP_NUM_THREADS": "1"}
    started = Kernel(env)
    try:
        yield started
    finally:
        started.close()


@pytest.mark.slow
def test_two_engines_started_from_a_notebook(smollm2, tmp_path):
    with kernel(tmp_path) as k:
        assert "2 of 2 alive" in k.do("%flex_cluster start -n 2")
        assert k.fails("%flex_hook lm_head")[0] == "LoadError"
        assert k.fails(f"%flex_load {smollm2} --tp 2")[1].startswith(
            "LayoutError: tp=2 does not divide"
        )
        assert "9 attention heads" in k.fails(f"%flex_load {smollm2} --tp 2")[1]
        assert "the degrees must multiply to 2" in k.fails(f"%flex_load {smollm2} --pp 3")[1]
        assert "can have fsdp=2, pp=2 or dp=2" in k.fails(f"%flex_load {smollm2} --tp 2")[1]
        assert "no model folder" in k.fails(f"%flex_load {smollm2}-none --pp 2")[1]
        table = k.do(f"%flex_load {smollm2} --pp 2")
        assert "pp=2" in table and "rank  pp" in table
        assert [m for m in k.mimes if "<progress" in m.get("text/html", "")]
        name, block = k.fails("%flex_hook model.layers.*.mpl")
        assert (
            name == "HookError"
            and block.startswith("HookError: no module matches")
            and "\n" not in block
        )
        assert "30 modules" in k.do(f"%flex_hook {MLP}")
        assert (
            k.do("r = %flex_run The capital of France is\nr.next_tokens(1)[0][0][0]") == "' Paris'"
        )
        assert k.do("tuple(r['model.layers.29.mlp'].tensor().shape)") == "(1, 5, 576)"
        assert k.completions("r = %flex_hook model.layers.*.self_attn.q") == [
            "model.layers.*.self_attn.q_proj"
        ]
        assert k.do("%flex_cluster attach --cluster-id {flex.engines.cluster_id}") == k.do("flex")
        assert k.do("len(flex.runs)") == "1"
        assert "model  " in k.do("%flex_cluster restart")
        assert k.fails("%flex_run abc")[0] == "LoadError"
        k.do("before = flex.engines.pids")
        assert "1 of 1 alive" in k.do("%flex_cluster start -n 1")
        assert k.do("import psutil\n[pid for pid in before if psutil.pid_exists(pid)]") == "[]"
        k.do("%flex_cluster stop")
        assert k.fails("%flex_run abc")[0] == "ClusterError"


class IPCluster:
    """What a user types into a shell: `ipcluster start -n 2`, with an IPython folder of its
    own."""

    def __init__(self, folder: Path):
        self.folder = folder
        env = {**os.environ, "IPYTHONDIR": str(folder), "OMP_NUM_THREADS": "1"}
        command = [
            sys.executable,
            "-m",
            "ipyparallel.cluster",
            "start",
            "-n",
            "2",
            "--log-level=ERROR",
        ]
        with open(folder / "ipcluster.log", "w") as log:
            self.process = psutil.Popen(
                command, env=env, stdout=log, stderr=log, start_new_session=True
            )
        until(lambda: list(folder.glob("profile_default/security/cluster-*.json")))

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)

    def kill(self) -> None:
        """End it as a crash would: the file stays."""
        for process in [*self.process.children(recursive=True), self.process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(30)


@pytest.fixture
def ipcluster(tmp_path):
    cluster = IPCluster(tmp_path)
    yield cluster
    if cluster.process.poll() is None:
        cluster.stop()


@pytest.mark.slow
def test_a_restarted_notebook_attaches_again_and_finds_model_hooks_and_runs(smollm2, ipcluster):
    with kernel(ipcluster.folder) as k:
        assert "attached: it stays" in k.do("%flex_cluster attach")
        k.do(f"%flex_load {smollm2} --pp 2")
        k.do(f"%flex_hook {MLP} --group red\n%flex_hook lm_head --name head --positions -1")
        k.do("r = %flex_run The capital of France is")
        k.do("%flex_group off red")
        first = k.do("float(r['model.layers.20.mlp'].tensor().double().sum())")

        k.restart()
        assert k.fails("%flex_hook")[0] == "ClusterError"
        k.do("%flex_cluster attach")
        assert "red (off)" in k.do("%flex_hook")
        assert (
            k.do("len(flex.runs), flex.runs[0].text, len(flex.runs[0])")
            == "(1, ['The capital of France is'], 31)"
        )
        assert k.do("float(flex.runs[0]['model.layers.20.mlp'].tensor().double().sum())") == first
        assert (
            k.do("r = %flex_run The capital of France is\nlen(r), r.next_tokens(1)[0][0][0]")
            == "(1, ' Paris')"
        )
        k.do("%flex_group on red\nr = %flex_run The capital of France is")
        assert k.do("float(r['model.layers.20.mlp'].tensor().double().sum())") == first
        assert k.do("float(flex.runs[0]['model.layers.20.mlp'].tensor().double().sum())") == first

        k.do("%flex_cluster attach")  # a second time, while attached: the runs are still there
        assert k.do("float(flex.runs[0]['model.layers.20.mlp'].tensor().double().sum())") == first
        k.do("%flex_cluster stop")
        assert "LlamaForCausalLM" in k.do("%flex_cluster attach")


@pytest.mark.slow
def test_the_file_of_a_dead_cluster_is_one_block(ipcluster):
    with kernel(ipcluster.folder) as k:
        k.do("%flex_cluster local")
        ipcluster.kill()
        name, block = k.fails("%flex_cluster attach")
        assert name == "ClusterError" and "no cluster to attach to at the default profile" in block
        assert block.splitlines()[-1].startswith("ClusterError: ") and "Traceback" not in block
        assert "1 of 1 alive" in k.do("%flex_cluster")
