"""The magics: each parses its line, makes one call and returns the object.

A magic is declared by its arguments, its twin in Python and its docstring. Help, completion and
README's table are made from these.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from IPython.core.error import UsageError
from IPython.core.magic import (
    Magics,
    cell_magic,
    line_cell_magic,
    line_magic,
    magics_class,
    no_var_expand,
)
from IPython.core.magic_arguments import argument, magic_arguments

from flexkernel.errors import CaptureError
from flexkernel.wire import AT

from .completion import Completion
from .current import CurrentSession
from .display import Frozen, Growing, Views, as_html, plain
from .lines import (
    Question,
    compile_edit,
    compile_loss,
    numbers,
    options_given,
    options_of,
    parse,
    split_prompt,
    twin,
    unquote,
    variable_note,
    words,
)

if TYPE_CHECKING:
    from flexkernel.experiments import Preview, Verification
    from flexkernel.session.capture import Capture
    from flexkernel.session.run import Run
    from flexkernel.session.session import Session
    from flexkernel.wire import ModelInfo

__all__ = ["FlexMagics", "magics_table", "register", "unregister"]

MOST_VIEWS = 16  # that one line draws
GENERATION_ONLY = ("sample", "temperature", "top_k", "top_p", "seed")
FORWARD_ONLY = ("stop_at", "backward")

# What %flex_cluster does: its action, the method that does it, and the options that belong to it.
ACTIONS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "start": (CurrentSession.start, ("n", "engines", "keep")),
    "attach": (CurrentSession.attach, ("profile", "cluster_id", "take", "read_only")),
    "local": (CurrentSession.local, ()),
    "status": (CurrentSession.status, ()),
    "restart": (CurrentSession.restart, ("rank",)),
    "stop": (CurrentSession.stop, ()),
}

flag = functools.partial(argument, action="store_true", default=None)


def register(shell: Any) -> None:
    """Give a shell the magics, their completion, and tables for what they return."""
    earlier = shell.magics_manager.registry.get(FlexMagics.__name__)
    magics = FlexMagics(shell, earlier.session if earlier else None)
    shell.register_magics(magics)
    shell.Completer.custom_matchers.append(magics.completion.matcher)
    shell.input_transformer_manager.token_transformers.append(Question)
    for mime, draw in {"text/plain": plain, "text/html": as_html}.items():
        formatter = shell.display_formatter.formatters[mime]
        formatter.for_type_by_name("flexkernel.session.session", "Session", draw)
        formatter.for_type_by_name("flexkernel.wire", "ModelInfo", draw)


def unregister(shell: Any) -> None:
    """Take the completion out again. IPython cannot remove the magics, so their session stays."""
    magics = shell.magics_manager.registry[FlexMagics.__name__]
    shell.Completer.custom_matchers.remove(magics.completion.matcher)
    shell.input_transformer_manager.token_transformers.remove(Question)


def magics_table() -> str:
    """README's table of the magics, in Markdown."""
    rows = ["| magic | twin | does |", "| --- | --- | --- |"]
    for name, magic in vars(FlexMagics).items():
        if not hasattr(magic, "twin"):
            continue
        usage = " ".join(magic.parser.format_usage().removeprefix("::").split())
        if name not in FlexMagics.magics["line"]:
            usage = f"%{usage}"
        does = magic.parser.description.partition("\n")[0]
        cells = [cell.replace("|", "\\|") for cell in (f"`{usage}`", magic.twin, does)]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


@magics_class
class FlexMagics(Magics):
    """The magics of one shell. They share its current session."""

    shell: Any

    def __init__(self, shell: Any, session: Session | None = None):
        super().__init__(shell)
        self.current = CurrentSession(shell, session)
        self.completion = Completion(self, self.current)

    @property
    def session(self) -> Session | None:
        return self.current.session

    # --- engines ------------------------------------------------------------------------------

    @magic_arguments()
    @argument(
        "action",
        nargs="?",
        default="status",
        choices=tuple(ACTIONS),
        metavar="|".join(ACTIONS),
        help="what to do",
    )
    @argument("-n", type=int, metavar="N", help="start: how many engines (default: 2)")
    @argument(
        "--engines",
        metavar="NAME",
        help='start: a launcher: slurm, ssh, ...; "slurm --time=1:00:00"',
    )
    @flag("--keep", help="start: engines and model outlive this notebook")
    @argument(
        "--profile", metavar="P", help="attach: the IPython profile that ipcluster was started with"
    )
    @argument("--cluster-id", metavar="C", help="attach: the cluster's id, where it has one")
    @flag("--take", help="attach: also if another notebook has the engines")
    @flag("--read-only", help="attach: look at what another notebook has there")
    @argument(
        "--rank",
        type=int,
        metavar="R",
        help="restart: only this rank's engine, with its part of the model",
    )
    @twin(
        "`fk.start(n=)`, `fk.attach(profile, cluster_id, take, read_only)`, `fk.local()`, "
        "`session.status()`, `session.restart(rank)`, `session.close()`"
    )
    @line_magic
    def flex_cluster(self, line: str) -> Any:
        """Start engines, attach to running ones or use this process; their status; stop them.

        start, attach and local return the session, which the notebook also has as `flex`. It
        replaces the one before: engines that were started for that one stop, attached ones stay
        with their model. attach finds a cluster that `ipcluster start` began. restart stops the
        engines and starts as many new ones, with no model on them; with --rank it replaces one
        engine, and the model stays loaded. Alone it shows the status.
        """
        args = parse(self.flex_cluster, line)
        action, options = ACTIONS[args.action]
        check_options(args, options)
        return action(self.current, **options_given(args, *options))

    # --- the model ----------------------------------------------------------------------------

    @magic_arguments()
    @argument(
        "path",
        metavar="PATH_OR_HUB_ID",
        help="a model folder, or a model's name on the hub; {variable} works",
    )
    @argument("--tp", type=int, metavar="N", help="tensor parallel degree")
    @argument("--pp", type=int, metavar="N", help="pipeline stages")
    @argument("--dp", type=int, metavar="N", help="data parallel degree")
    @argument("--fsdp", type=int, metavar="N", help="fully sharded data parallel degree")
    @argument("--dtype", metavar="DTYPE", help="float32 (default), bfloat16, float16")
    @argument("--device", metavar="DEVICE", help="cpu (default) or cuda")
    @argument("--attn", metavar="KIND", help="attention implementation: sdpa (default) or eager")
    @argument(
        "--timeout",
        type=float,
        metavar="S",
        help="break a run off when nothing moves for S seconds (default: 60)",
    )
    @twin(
        "`session.load(path, tp=, pp=, dp=, fsdp=, dtype=, device=, attn=)`, "
        "`session.engines.timeout_s = S`"
    )
    @line_magic
    def flex_load(self, line: str) -> ModelInfo:
        """Load a model, split over the engines. Returns its layout, and memory by rank.

        The degrees multiply to the number of engines. Each engine reads only its part. The model
        replaces an earlier one.
        """
        args = parse(self.flex_load, line)
        session = self.current.get()
        if args.timeout is not None:
            session.engines.timeout_s = args.timeout
        options = options_given(args, "tp", "pp", "dp", "fsdp", "dtype", "device", "attn")
        return session.load(args.path, **options)

    @magic_arguments()
    @argument("glob", nargs="?", default="**", metavar="GLOB", help="which modules (default: all)")
    @twin("`session.tree(glob)`")
    @line_magic
    def flex_tree(self, line: str) -> Any:
        """The loaded model's modules: class, parameters, output shape, placement, ranks, hooks."""
        return self.current.get().tree(parse(self.flex_tree, line).glob)

    @magic_arguments()
    @argument(
        "parameter",
        metavar="NAME",
        help="as the unsharded model has it: model.layers.0.mlp.gate_proj.weight",
    )
    @twin("`session.parameter(name)`")
    @line_magic
    def flex_param(self, line: str) -> Capture:
        """A whole parameter or buffer as it is now: a capture to slice, draw and save.

        It is read from the ranks that hold it.
        """
        return self.current.get().parameter(parse(self.flex_param, line).parameter)

    # --- hooks --------------------------------------------------------------------------------

    @magic_arguments()
    @argument(
        "glob",
        nargs="?",
        metavar="GLOB",
        help="which modules: model.layers.*.mlp, **.q_proj, *.self_attn.@pattern",
    )
    @argument(
        "--at",
        choices=AT,
        metavar="output|input|grad_output|grad_input|param_grad",
        help="what to capture",
    )
    @argument(
        "--index", metavar="PATH", help="which tensor of a tuple, dict or dataclass: 0, logits, 0.1"
    )
    @argument(
        "--group",
        dest="groups",
        action="append",
        default=[],
        metavar="G",
        help="put it into a group; repeatable",
    )
    @argument(
        "--positions",
        type=numbers,
        metavar="0,-1",
        help="keep only these token positions; edit only these",
    )
    @argument(
        "--reduce",
        metavar="OP:DIMS",
        help="keep only this of it: norm:-1, mean:0,1, amax, last, ...",
    )
    @argument(
        "--name", metavar="NAME", help="a name of your own; a hook of the same name is replaced"
    )
    @argument(
        "--edit",
        metavar="NAME[:VALUE]",
        help="change it: zero, scale:2, add:vector, one of %%%%flex_edit, ...",
    )
    @argument(
        "--heads",
        type=numbers,
        metavar="0,3",
        help="edit only these heads, of @q @k @v @pattern @z",
    )
    @argument("--neurons", type=numbers, metavar="7,9", help="edit only these of the last dim")
    @argument(
        "--capture",
        metavar="after|before|both|none",
        help="what is kept of an edited activation (default: after)",
    )
    @flag("--replace", help="of all edits of the same values only this one stays")
    @twin(
        "`session.hook(glob, at=, index=, edit=, value=, groups=, capture=, positions=, reduce=, "
        "name=, replace=)`, `session.hooks`"
    )
    @line_magic
    def flex_hook(self, line: str) -> Any:
        """Capture, or change, what modules put out or take in, in every run from now on.

        Alone it shows the table of hooks. * matches one dotted segment or a part of it, ** any
        number of segments. An edit is zero, mean, scale:2, add:V, set:V, project_out:V,
        clamp:-1,1, noise:0.1, patch:CAPTURE, or the name of one of yours. What follows the colon
        is Python. Edits of one glob add up; --replace takes the others away.
        """
        args = parse(self.flex_hook, line)
        options = options_given(
            args,
            "at",
            "index",
            "groups",
            "positions",
            "reduce",
            "name",
            "heads",
            "neurons",
            "capture",
            "replace",
        )
        if args.edit is not None:
            options |= self._edit(args.edit)
        if args.glob is not None:
            return self.current.get().hook(args.glob, **options)
        if options:
            raise UsageError(f"which modules? %flex_hook GLOB {line.strip()}")
        return self.current.get().hooks

    def _edit(self, text: str) -> dict[str, Any]:
        """`NAME:VALUE` as the options of a hook."""
        name, colon, value = text.partition(":")
        if not colon:
            return {"edit": name}
        try:
            return {"edit": name, "value": eval(value, self.shell.user_ns)}
        except Exception as error:
            raise UsageError(f"--edit {text}: {value!r} is no Python value here: {error}") from None

    @magic_arguments()
    @argument("name", metavar="NAME", help="what the edit is called")
    @argument(
        "--per",
        choices=("whole", "row", "element"),
        metavar="whole|row|element",
        help="what it sees at once",
    )
    @twin('`@session.edit("name", per="whole")`')
    @no_var_expand
    @cell_magic
    def flex_edit(self, line: str, cell: str) -> Any:
        """Define an edit: the cell is the body of NAME(x, ctx), which returns a tensor like x.

        x is the whole activation, whatever the layout, and the body runs once. ctx has module,
        tokens, mask, positions, and save, a dict that lives on between runs. A last line that is
        an expression is what it returns. `%flex_hook GLOB --edit NAME` uses it.
        """
        args = parse(self.flex_edit, line)
        function = compile_edit(args.name, cell, self.shell.user_ns)
        return self.current.get().edit(args.name, **options_given(args, "per"))(function)

    @magic_arguments()
    @argument(
        "hook", nargs="*", metavar="GLOB_OR_NAME", help="the hook's name, or the glob it was given"
    )
    @twin("`session.unhook(glob_or_name)`")
    @line_magic
    def flex_unhook(self, line: str) -> list[str]:
        """Remove hooks; alone: all of them. Returns the names of those it removed."""
        args = parse(self.flex_unhook, line)
        return self.current.get().unhook(" ".join(args.hook) if args.hook else None)

    @magic_arguments()
    @argument(
        "action",
        choices=("on", "off", "add", "remove", "list"),
        metavar="on|off|add|remove|list",
        help="what to do",
    )
    @argument("group", nargs="?", default="", metavar="G", help="the group")
    @argument(
        "hook",
        nargs="*",
        metavar="GLOB",
        help="add, remove: a hook's name, or a glob over the hooks' globs",
    )
    @twin("`session.hooks.group(action, group, glob)`")
    @line_magic
    def flex_group(self, line: str) -> dict[str, list[str]]:
        """Switch a group of hooks on or off, add or remove hooks, or list the groups."""
        args = parse(self.flex_group, line)
        return self.current.get().hooks.group(args.action, args.group, " ".join(args.hook) or None)

    # --- runs ---------------------------------------------------------------------------------

    @magic_arguments()
    @argument("--groups", type=words, metavar="G,..", help="only the hooks of these groups fire")
    @flag("--complement", help="with --groups: all hooks but those")
    @flag("--chat", help="the prompt is a user's message in the model's template")
    @argument(
        "--generate",
        type=int,
        metavar="N",
        help="go on after the prompt with at most N new tokens, as they come",
    )
    @flag("--sample", help="with --generate: draw the tokens, else take the likeliest")
    @argument(
        "--temperature",
        type=float,
        metavar="T",
        help="with --sample: above 1 flatter, below 1 sharper",
    )
    @argument("--top-k", type=int, metavar="K", help="with --sample: of the K likeliest only")
    @argument(
        "--top-p",
        type=float,
        metavar="P",
        help="with --sample: of the likeliest that come to this probability",
    )
    @argument(
        "--seed",
        type=int,
        metavar="N",
        help="with --sample: draw the same again (run.seed of an earlier one)",
    )
    @flag("--preview", help="run nothing; say what would be kept and if it fits")
    @argument("--stop-at", metavar="MODULE", help="end the forward after this module")
    @argument(
        "--backward",
        metavar="EXPR",
        help="go back from this loss, Python over logits, labels, captures, tokens, mask: "
        "gradients reach the hooks that are --at one; next_token is the mean cross-entropy",
    )
    @argument(
        "--var",
        metavar="NAME",
        help="the prompt is in this Python variable: text, ids, messages, or several",
    )
    @argument(
        "prompt",
        nargs="*",
        metavar="PROMPT",
        help="the rest of the line as it stands: $, { and -- are text in it",
    )
    @twin(
        "`session.run(prompts_or_ids, groups=, complement=, chat=, stop_at=, loss=)`, "
        "`session.generate(prompts_or_ids, max_new_tokens=, do_sample=, temperature=, on_token=, "
        "...)`, `session.preview(prompts_or_ids, groups=, ...)`"
    )
    @no_var_expand
    @line_cell_magic
    def flex_run(self, line: str, cell: str | None = None) -> Run | Preview:
        """Run the prompt, or continue it, and capture what is hooked. %%flex_run: a prompt a line.

        Options come before the prompt; -- by itself ends them. Quotes are not needed. Those that
        enclose the whole prompt are taken off, and keep spaces at its ends.
        """
        options, prompt = split_prompt(line, options_of(self.flex_run))
        args = parse(self.flex_run, options)
        session = self.current.get()
        prompts = self._prompts(args.var, prompt, cell)
        if args.preview:
            return self._preview(session, prompts, args)
        if args.generate is None:
            return self._forward(session, prompts, args)
        return self._generate(session, prompts, args)

    def _preview(self, session: Session, prompts: Any, args: argparse.Namespace) -> Preview:
        return session.preview(
            prompts,
            **options_given(args, "groups", "complement", "chat"),
            max_new_tokens=args.generate or 0,
            loss=args.backward is not None,
        )

    def _forward(self, session: Session, prompts: Any, args: argparse.Namespace) -> Run:
        for name in options_given(args, *GENERATION_ONLY):
            raise UsageError(f"--{name.replace('_', '-')} belongs to --generate N")
        options = options_given(args, "groups", "complement", "chat", "stop_at")
        if args.backward is not None:
            options["loss"] = compile_loss(args.backward, self.shell.user_ns)
        return session.run(prompts, **options)

    def _generate(self, session: Session, prompts: Any, args: argparse.Namespace) -> Run:
        for name in options_given(args, *FORWARD_ONLY):
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"{option} is for one forward: leave it or --generate out")
        options = options_given(
            args, "groups", "complement", "chat", "temperature", "top_k", "top_p", "seed"
        )
        with Growing(self.shell, prompts, args.chat) as text:
            return session.generate(
                prompts, args.generate, do_sample=bool(args.sample), on_token=text, **options
            )

    def _prompts(self, variable: str | None, prompt: str, cell: str | None) -> Any:
        """The prompt or prompts, from the one place that has them."""
        places = {
            "--var": variable is not None,
            "the line": bool(prompt),
            "the lines below": cell is not None,
        }
        given = [place for place, has_it in places.items() if has_it]
        if len(given) > 1:
            raise UsageError(f"the prompt is given twice: in {' and in '.join(given)}")
        if cell is not None:
            return [unquote(row.strip()) for row in cell.splitlines() if row.strip()]
        if variable is None:
            if note := variable_note(prompt, self.shell.user_ns):
                print(f"Note: {note}")
            return prompt
        if variable not in self.shell.user_ns:
            raise UsageError(f"--var {variable}: there is no variable of that name")
        return self.shell.user_ns[variable]

    # --- views --------------------------------------------------------------------------------

    @magic_arguments()
    @argument(
        "name",
        nargs="+",
        metavar="NAME",
        help="as the run lists it: a module, or `MODULE input`; or logits; globs",
    )
    @argument(
        "--as",
        dest="as_",
        metavar="VIEW",
        help="map (default): the whole tensor as pixels to zoom into",
    )
    @argument("--run", type=int, metavar="N", help="of run number N (default: the last one)")
    @twin("`run[name].show(as_)`")
    @line_magic
    def flex_show(self, line: str) -> Any:
        """Draw captures of the last run: a live view of each, with a static picture beside it."""
        args = parse(self.flex_show, line)
        check_view(args.as_)
        options = options_given(args, "as_")
        captures = find_captures(self._run_number(args.run), args.name)
        if not isinstance(captures, list):
            return captures.show(**options)
        if len(captures) > MOST_VIEWS:
            raise UsageError(
                f"{' '.join(args.name)} means {len(captures)} captures; "
                f"at most {MOST_VIEWS} are drawn at once"
            )
        return Views(capture.show(**options) for capture in captures)

    def _run_number(self, number: int | None) -> Run:
        stored = {run.number: run for run in self.current.get().runs}
        if not stored:
            raise CaptureError("no run is stored: %flex_run PROMPT makes one")
        if number is None:
            return stored[max(stored)]
        if number not in stored:
            numbers = ", ".join(map(str, stored))
            raise CaptureError(f"run {number} is not stored; there are {numbers}")
        return stored[number]

    @magic_arguments()
    @twin("`view.freeze()`")
    @line_magic
    def flex_freeze(self, line: str) -> Frozen:
        """Replace every live view by its static picture, in a notebook that is to be kept."""
        parse(self.flex_freeze, line)
        from flexkernel.views import freeze_all

        return Frozen(freeze_all())

    @magic_arguments()
    @argument(
        "glob",
        nargs="*",
        metavar="GLOB",
        help="only the modules of these globs (default: all, and all @ points)",
    )
    @flag("--stream", help="run the unsharded model one layer at a time")
    @argument(
        "--var",
        metavar="NAME",
        help="the rows are in this Python variable: text, ids, or several (default: ours)",
    )
    @twin("`session.verify(prompt, hooks, stream)`")
    @line_magic
    def flex_verify(self, line: str) -> Verification:
        """Compare every module with the unsharded model; name the first that differs.

        A few short rows are run. What is equal has the evidence "verified" in later runs. In half
        precision the drift is compared with the unsharded model's own drift from float32.
        --stream is the default where the unsharded model does not fit.
        """
        args = parse(self.flex_verify, line)
        session = self.current.get()
        prompt = None if args.var is None else self._prompts(args.var, "", None)
        return session.verify(prompt, args.glob or None, **options_given(args, "stream"))


def check_options(args: argparse.Namespace, allowed: Sequence[str]) -> None:
    """UsageError: the line has an option of another action of %flex_cluster."""
    owner = {option: action for action, (_, options) in ACTIONS.items() for option in options}
    for option in options_given(args, *owner):
        if option not in allowed:
            written = f"--{option.replace('_', '-')}" if len(option) > 1 else f"-{option}"
            action = owner[option]
            raise UsageError(f"{written} belongs to %flex_cluster {action}, not to {args.action}")


def check_view(name: str | None) -> None:
    """UsageError: there is no view of that name."""
    from flexkernel.views import VIEWS

    if name not in (None, *VIEWS):
        raise UsageError(f"--as {name}: there is no such view; views: {', '.join(VIEWS)}")


def find_captures(run: Run, words: Sequence[str]) -> Capture | list[Capture]:
    """The capture that the words name, as the run's own table writes it.

    A list for several names or a glob. A name may have spaces (`MODULE input [0]`), so each takes
    as many words as it can. CaptureError: there is none of that name.
    """
    found: list[Any] = []
    rest = list(words)
    while rest:
        length, captures = longest_name(run, rest)
        found.append(captures)
        rest = rest[length:]
    if len(found) == 1:
        return found[0]
    return [capture for one in found for capture in (one if isinstance(one, list) else [one])]


def longest_name(run: Run, words: Sequence[str]) -> tuple[int, Any]:
    """(how many of the words name something in the run, what they name)."""
    for length in range(len(words), 0, -1):
        captures = captures_named(run, words[:length])
        if captures is not None:
            return length, captures
    return 1, run[words[0]]  # raises the error that says what there is


def captures_named(run: Run, words: Sequence[str]) -> Any:
    """What these words together name in the run; None: nothing."""
    if list(words) == ["logits"]:
        return run.logits
    listed = [capture for capture in run if capture.name == " ".join(words)]
    if listed:
        return listed[-1]
    key = words[0] if len(words) == 1 else tuple(words)
    return run[key] if len(words) <= 4 and key in run else None
