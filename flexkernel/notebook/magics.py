"""The magics: each parses its line, calls the session, returns the object. Only this file knows
IPython.

A magic is declared by its arguments, its twin and its docstring: help, completion and README's
table come from these.
"""

from __future__ import annotations

import argparse
import functools
import re
import sys
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from IPython.core.completer import (
    CompletionContext,
    SimpleCompletion,
    SimpleMatcherResult,
    context_matcher,
)
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

from flexkernel.errors import CaptureError, ClusterError
from flexkernel.session.hooks import AT

from .completion import MAGIC_LINE, USUAL, children, expected, quoted
from .display import Growing, Progress, Views, as_html, plain
from .lines import (
    Question,
    body,
    given,
    loss_of,
    numbers,
    options_of,
    parsed,
    split_prompt,
    twin,
    unquoted,
    words,
)

if TYPE_CHECKING:
    from flexkernel.experiments.preview import Preview
    from flexkernel.experiments.verify import Verification
    from flexkernel.session.capture import Capture
    from flexkernel.session.run import Run
    from flexkernel.session.session import Session
    from flexkernel.wire import ModelInfo

__all__ = ["FlexMagics", "magics_table", "register", "unregister"]

# under this name the session of the magics is in the notebook, if nothing else is
VARIABLE = "flex"
MOST_VIEWS = 16  # that one line draws
GENERATING = ("sample", "temperature", "top_k", "top_p", "seed")
ACTIONS = ("start", "attach", "local", "status", "restart", "stop")
ACTION_OF = {
    "n": "start",
    "engines": "start",
    "keep": "start",
    "profile": "attach",
    "cluster_id": "attach",
    "take": "attach",
    "read_only": "attach",
    "rank": "restart",
}


def register(shell: Any) -> None:
    """Give a shell the magics, their completion, and tables for what they return."""
    earlier = shell.magics_manager.registry.get(FlexMagics.__name__)
    magics = FlexMagics(shell, getattr(earlier, "session", None))
    shell.register_magics(magics)
    shell.Completer.custom_matchers.append(magics.matcher)
    shell.input_transformer_manager.token_transformers.append(Question)
    for mime, draw in {"text/plain": plain, "text/html": as_html}.items():
        formatter = shell.display_formatter.formatters[mime]
        formatter.for_type_by_name("flexkernel.session.session", "Session", draw)
        formatter.for_type_by_name("flexkernel.wire", "ModelInfo", draw)


def unregister(shell: Any) -> None:
    """Take the completion out again. The magics and their session stay: IPython forgets no
    magic."""
    magics = shell.magics_manager.registry[FlexMagics.__name__]
    shell.Completer.custom_matchers.remove(magics.matcher)
    shell.input_transformer_manager.token_transformers.remove(Question)


# --- the magics -----------------------------------------------------------------------


@magics_class
class FlexMagics(Magics):
    """The magics of one shell. session: the one they work on; also in the notebook as `flex`, if
    that name is free."""

    shell: Any

    def __init__(self, shell: Any, session: Session | None = None):
        super().__init__(shell)
        self.session = session
        self._engines: str | None = None
        self._ended: weakref.WeakSet[Session] = weakref.WeakSet()

    # --- the session

    def needed(self) -> Session:
        """The session there is: of an earlier magic, else the newest that the user made by
        hand."""
        if self.session is None:
            found = self._by_hand()
            if found is None:
                raise ClusterError(
                    "there are no engines yet: %flex_cluster start -n 2 starts two, %flex_cluster attach takes those "
                    "of a running cluster, %flex_cluster local uses this process"
                )
            self._use(found)
        assert self.session is not None
        return self.session

    def _by_hand(self) -> Session | None:
        # not there: nobody can have made one
        module = sys.modules.get("flexkernel.session.session")
        if module is None:
            return None
        there = [v for v in list(self.shell.user_ns.values()) if isinstance(v, module.Session)]
        return next(
            (
                s
                for s in reversed(there)
                if s not in self._ended and not getattr(s, "closed", False)
            ),
            None,
        )

    def _use(self, session: Session) -> Session:
        """Work on this session from here on, and end the one before it."""
        before, self.session = self.session, session
        session.bar = functools.partial(Progress, self.shell)
        names = self.shell.user_ns
        if VARIABLE not in names or names[VARIABLE] is before:
            self.shell.push({VARIABLE: session}, interactive=False)
        if before is not None and before is not session:
            self._end(before)
        return session

    def _end(self, session: Session, end: bool | None = None) -> None:
        self._ended.add(session)
        self.shell.drop_by_id({VARIABLE: session})
        session.close(end)

    @magic_arguments()
    @argument(
        "action",
        nargs="?",
        default="status",
        choices=ACTIONS,
        metavar="|".join(ACTIONS),
        help="what to do",
    )
    @argument("-n", type=int, metavar="N", help="start: how many engines (default: 2)")
    @argument(
        "--engines",
        metavar="NAME",
        help='start: a launcher: slurm, ssh, ...; "slurm --time=1:00:00"',
    )
    @argument(
        "--keep",
        action="store_true",
        default=None,
        help="start: engines and model outlive this notebook",
    )
    @argument(
        "--profile", metavar="P", help="attach: the IPython profile that ipcluster was started with"
    )
    @argument("--cluster-id", metavar="C", help="attach: the cluster's id, where it has one")
    @argument(
        "--take",
        action="store_true",
        default=None,
        help="attach: also if another notebook has the engines",
    )
    @argument(
        "--read-only",
        action="store_true",
        default=None,
        help="attach: look at what another notebook has there",
    )
    @argument(
        "--rank",
        type=int,
        metavar="R",
        help="restart: only this rank's engine, with its part of the model",
    )
    @twin(
        "`fk.start(n=)`, `fk.attach(profile, cluster_id, take, read_only)`, `fk.local()`, `session.status()`, "
        "`session.restart(rank)`, `session.close()`"
    )
    @line_magic
    def flex_cluster(self, line: str) -> Any:
        """Start engines, attach to those that `ipcluster start` began, or use this process; their
        status; stop them.

        start, attach and local give the session, also found as `flex`. It takes the place of the
        one before, which ends: engines that were started for it stop, attached ones stay with
        their model. restart stops the engines and starts as many new ones, with no model on them;
        with --rank it replaces one, and the model stays loaded. Alone it says the status.
        """
        args = parsed(self.flex_cluster, line)
        for name, action in ACTION_OF.items():
            if getattr(args, name) is not None and args.action != action:
                option = f"--{name.replace('_', '-')}" if len(name) > 1 else f"-{name}"
                raise UsageError(
                    f"{option} belongs to %flex_cluster {action}, not to {args.action}"
                )
        return getattr(self, f"_cluster_{args.action}")(args)

    def _cluster_start(self, args: argparse.Namespace) -> Session:
        from flexkernel.session.start import start

        session = self._use(
            start(2 if args.n is None else args.n, args.engines, keep=bool(args.keep))
        )
        self._engines = args.engines
        return session

    def _cluster_attach(self, args: argparse.Namespace) -> Session:
        from flexkernel.session.session import attach

        found, before = (
            attach(args.profile, args.cluster_id, bool(args.take), bool(args.read_only)),
            self.session,
        )
        if before is not None and before.cluster.owned and same_engines(before, found):
            found.close()  # these engines end with the session that started them: it stays the one
            return before
        return self._use(found)

    def _cluster_local(self, _args: argparse.Namespace) -> Session:
        from flexkernel.session.session import local

        return self._use(local())

    def _cluster_status(self, _args: argparse.Namespace) -> Any:
        return self.needed().status()

    def _cluster_restart(self, args: argparse.Namespace) -> Session:
        from flexkernel.session.session import local
        from flexkernel.session.start import start

        cluster = self.needed().cluster
        if args.rank is not None:
            self.needed().restart(args.rank)
            return self.needed()
        if not cluster.owned:
            raise ClusterError(
                "these engines were attached, not started here: restart them where they were started"
            )
        if not hasattr(cluster, "cluster_id"):  # the engine is this process
            return self._use(local())
        self._cluster_stop(args)  # before the new ones: they need the memory
        return self._use(start(cluster.size, self._engines))

    def _cluster_stop(self, _args: argparse.Namespace) -> None:
        session, self.session = self.needed(), None
        self._end(session, end=session.cluster.owned or getattr(session.cluster, "kept", False))

    # --- model

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
        "`session.load(path, tp=, pp=, dp=, fsdp=, dtype=, device=, attn=)`, `session.timeout_s = S`"
    )
    @line_magic
    def flex_load(self, line: str) -> ModelInfo:
        """Load a model, split over the engines; gives its layout, and parameters and memory by
        rank.

        The degrees multiply to the number of engines, each of which reads only its part. Replaces
        an earlier model.
        """
        args = parsed(self.flex_load, line)
        session = self.needed()
        options = given(args, "tp", "pp", "dp", "fsdp", "dtype", "device", "attn")
        if args.timeout is not None:
            session.timeout_s = args.timeout
        with Progress(
            self.shell, args.path.rstrip("/").rpartition("/")[2], session.cluster.size
        ) as progress:
            return session.load(args.path, progress=progress, **options)

    @magic_arguments()
    @argument("glob", nargs="?", default="**", metavar="GLOB", help="which modules (default: all)")
    @twin("`session.tree(glob)`")
    @line_magic
    def flex_tree(self, line: str) -> Any:
        """The modules of the loaded model: class, parameters, output shape, placement, ranks that
        hold it, hooks."""
        return self.needed().tree(parsed(self.flex_tree, line).glob)

    @magic_arguments()
    @argument(
        "parameter",
        metavar="NAME",
        help="as the unsharded model has it: model.layers.0.mlp.gate_proj.weight",
    )
    @twin("`session.parameter(name)`")
    @line_magic
    def flex_param(self, line: str) -> Capture:
        """A whole parameter or buffer as it is now, from whichever ranks hold it: a capture to
        slice, draw and save."""
        return self.needed().parameter(parsed(self.flex_param, line).parameter)

    # --- hooks

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
        help="what is kept of what is edited (default: after)",
    )
    @twin(
        "`session.hook(glob, at=, index=, edit=, value=, groups=, capture=, positions=, reduce=, name=)`, "
        "`session.hooks`"
    )
    @line_magic
    def flex_hook(self, line: str) -> Any:
        """Capture, and change, what modules put out or take in, in every run from here on; alone:
        the table of hooks.

        * stands for one dotted segment or a part of it, ** for any number of segments. An edit is
          one of zero, mean, scale:2, add:V, set:V, project_out:V, clamp:-1,1, noise:0.1,
          patch:CAPTURE, or the name of one of yours; what follows the colon is Python.
        """
        args = parsed(self.flex_hook, line)
        options = given(
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
        )
        if args.edit is not None:
            options |= self._edit(args.edit)
        if args.glob is not None:
            return self.needed().hook(args.glob, **options)
        if options:
            raise UsageError(f"which modules? %flex_hook GLOB {line.strip()}")
        return self.needed().hooks

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
        """Define an edit: the lines below are the body of NAME(x, ctx), which gives a tensor like
        x.

        x is the whole activation, whatever the layout, and the body runs once. ctx has module,
        tokens, mask, positions, and save, a dict that lives on between runs. A last line that is
        an expression is what it gives.
        """
        args = parsed(self.flex_edit, line)
        function = body(args.name, cell, self.shell.user_ns)
        return self.needed().edit(args.name, **given(args, "per"))(function)

    @magic_arguments()
    @argument(
        "hook", nargs="*", metavar="GLOB_OR_NAME", help="the hook's name, or the glob it was given"
    )
    @twin("`session.unhook(glob_or_name)`")
    @line_magic
    def flex_unhook(self, line: str) -> list[str]:
        """Take hooks away; alone: all of them. Gives the names of those that went."""
        args = parsed(self.flex_unhook, line)
        return self.needed().unhook(" ".join(args.hook) if args.hook else None)

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
    @twin("`session.group(action, group, glob)`")
    @line_magic
    def flex_group(self, line: str) -> dict[str, list[str]]:
        """Switch a group of hooks on or off, add hooks to it or remove them, or list the groups
        with their hooks."""
        args = parsed(self.flex_group, line)
        return self.needed().group(args.action, args.group, " ".join(args.hook) or None)

    # --- runs

    @magic_arguments()
    @argument("--groups", type=words, metavar="G,..", help="only the hooks of these groups fire")
    @argument(
        "--complement", action="store_true", default=None, help="with --groups: all hooks but those"
    )
    @argument(
        "--chat",
        action="store_true",
        default=None,
        help="the prompt is a user's message in the model's template",
    )
    @argument(
        "--generate",
        type=int,
        metavar="N",
        help="go on after the prompt with at most N new tokens, as they come",
    )
    @argument(
        "--sample",
        action="store_true",
        default=None,
        help="with --generate: draw them, else the likeliest",
    )
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
    @argument(
        "--preview",
        action="store_true",
        default=None,
        help="run nothing; say what would be kept and if it fits",
    )
    @argument("--stop-at", metavar="MODULE", help="end the forward after this module")
    @argument(
        "--backward",
        metavar="EXPR",
        help="go back from this loss, Python over logits, labels, captures, tokens, mask: gradients reach the hooks "
        "that are --at one; next_token is the mean cross-entropy",
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
        "`session.generate(prompts_or_ids, max_new_tokens=, do_sample=, temperature=, on_token=, ...)`, "
        "`session.preview(prompts_or_ids, groups=, ...)`"
    )
    @no_var_expand
    @line_cell_magic
    def flex_run(self, line: str, cell: str | None = None) -> Run | Preview:
        """One forward over the prompt, or its continuation, with what the hooks capture.
        %%flex_run: one prompt a line.

        Options come before the prompt; -- by itself ends them. Quotes are not needed; those that
        enclose the whole prompt are taken off, and keep spaces at its ends.
        """
        options, prompt = split_prompt(line, options_of(self.flex_run))
        args = parsed(self.flex_run, options)
        session = self.needed()
        prompts = self._prompts(args.var, prompt, cell)
        how = given(args, "groups", "complement", "chat")
        if args.preview:
            return session.preview(
                prompts, **how, max_new_tokens=args.generate or 0, loss=args.backward is not None
            )
        if args.generate is None:
            if alone := given(args, *GENERATING):
                raise UsageError(f"--{next(iter(alone)).replace('_', '-')} belongs to --generate N")
            if args.backward is not None:
                how["loss"] = loss_of(args.backward, self.shell.user_ns)
            return session.run(prompts, **how, **given(args, "stop_at"))
        if alone := given(args, "stop_at", "backward"):
            raise UsageError(
                f"--{next(iter(alone)).replace('_', '-')} is for one forward: leave it or --generate out"
            )
        how |= given(args, "temperature", "top_k", "top_p", "seed")
        with Growing(self.shell) as text:
            return session.generate(
                prompts, args.generate, do_sample=bool(args.sample), on_token=text, **how
            )

    def _prompts(self, variable: str | None, prompt: str, cell: str | None) -> Any:
        sources = {
            "--var": variable is not None,
            "the line": bool(prompt),
            "the lines below": cell is not None,
        }
        found = [name for name, there in sources.items() if there]
        if len(found) > 1:
            raise UsageError(f"the prompt is given twice: in {' and in '.join(found)}")
        if cell is not None:
            return [unquoted(row.strip()) for row in cell.splitlines() if row.strip()]
        if variable is None:
            return prompt
        if variable not in self.shell.user_ns:
            raise UsageError(f"--var {variable}: there is no variable of that name")
        return self.shell.user_ns[variable]

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
        """Draw a capture of the last run, or several: a view of each, with a static picture beside
        it."""
        args = parsed(self.flex_show, line)
        from flexkernel.views import VIEWS

        if args.as_ not in (None, *VIEWS):
            raise UsageError(
                f"--as {args.as_}: there is no such view; there are {', '.join(VIEWS)}"
            )
        found = chosen(self._run_number(args.run), args.name)
        if not isinstance(found, list):
            return found.show(**given(args, "as_"))
        if len(found) > MOST_VIEWS:
            raise UsageError(
                f"{' '.join(args.name)} means {len(found)} captures; at most {MOST_VIEWS} are drawn at once"
            )
        return Views(capture.show(**given(args, "as_")) for capture in found)

    def _run_number(self, number: int | None) -> Run:
        there = {run.number: run for run in self.needed().runs}
        if not there:
            raise CaptureError("no run is stored: %flex_run PROMPT makes one")
        if number is not None and number not in there:
            raise CaptureError(
                f"run {number} is not stored; there are {', '.join(map(str, there))}"
            )
        return there[max(there) if number is None else number]

    @magic_arguments()
    @twin("`view.freeze()`")
    @line_magic
    def flex_freeze(self, line: str) -> list[Any]:
        """Replace every live view in the notebook by its static picture, for a notebook that is to
        be kept."""
        parsed(self.flex_freeze, line)
        from flexkernel.views import freeze_all

        return freeze_all()

    @magic_arguments()
    @argument(
        "glob",
        nargs="*",
        metavar="GLOB",
        help="only the modules of these globs (default: all, and all @ points)",
    )
    @argument(
        "--stream",
        action="store_true",
        default=None,
        help="run the unsharded model one layer at a time",
    )
    @argument(
        "--var",
        metavar="NAME",
        help="the rows are in this Python variable: text, ids, or several (default: ours)",
    )
    @twin("`session.verify(prompt, hooks, stream)`")
    @line_magic
    def flex_verify(self, line: str) -> Verification:
        """Compare every module with the unsharded model on a few short rows; name the first that
        differs.

        What is equal has the evidence "verified" in later runs. In half precision the drift is
        measured by what the unsharded model itself drifts from float32. --stream is taken by
        itself where the unsharded model does not fit.
        """
        args = parsed(self.flex_verify, line)
        session = self.needed()
        prompt = None if args.var is None else self._prompts(args.var, "", None)
        return session.verify(prompt, args.glob or None, **given(args, "stream"))

    # --- completion

    @context_matcher()
    def matcher(self, context: CompletionContext) -> SimpleMatcherResult:
        """What can stand at the cursor in a line of a flex magic; nothing in other lines."""
        asked = MAGIC_LINE.match(context.text_until_cursor)
        magic = getattr(self, asked[1], None) if asked else None
        if asked is None or magic is None:
            return SimpleMatcherResult(completions=[])
        fragment, texts = self._completions(magic, asked[2])
        return SimpleMatcherResult(
            completions=[SimpleCompletion(text=text, type="magic") for text in texts],
            matched_fragment=fragment,
            suppress=True,
            ordered=True,
        )

    def _completions(self, magic: Any, text: str) -> tuple[str, list[str]]:
        """(what is typed of it, what it can become) for the last word of the arguments."""
        *before, typed = re.split(r"[ \t]+", text)
        options = options_of(magic)
        action, in_prompt = expected(magic, before, options)
        if in_prompt:
            return typed, []
        if typed.startswith("-") and (action is None or not action.option_strings):
            name, equals, value = typed.partition("=")
            if not equals or name not in options:
                return typed, [option for option in options if option.startswith(typed)]
            action, typed = options[name], value
        if action is None:
            return typed, []
        typed = typed.rpartition(",")[2] if action.type is words else typed
        return typed, list(self._values(action, typed))

    def _values(self, action: argparse.Action, typed: str) -> Iterator[str]:
        if action.dest in ("glob", "stop_at"):
            return children(self._names(), typed)
        if action.dest == "parameter":
            return (name for name in children(self._parameters(), typed) if "*" not in name)
        texts: Iterable[Any] = action.choices or self._known(action.dest)
        return (quoted(str(text)) for text in texts if str(text).startswith(typed))

    def _names(self) -> list[str]:
        session = self.session or self._by_hand()
        return session.info.names if session is not None and session.info is not None else []

    def _parameters(self) -> Iterable[str]:
        session = self.session or self._by_hand()
        return session.info.parameters if session is not None and session.info is not None else []

    def _known(self, dest: str) -> Iterable[Any]:
        """The values there are now for an argument of that name."""
        if dest in USUAL:
            return USUAL[dest]
        if dest == "var":
            return [name for name in self.shell.user_ns if not name.startswith("_")]
        session = self.session or self._by_hand()
        if session is None:
            return []
        if dest in ("groups", "group"):
            return session.hook_set.groups
        if dest == "hook":
            return [hook.key for hook in session.hook_set.hooks]
        if dest == "run":
            return [run.number for run in session.runs]
        if dest == "name" and session.runs:
            return dict.fromkeys(capture.name for capture in session.runs[-1])
        return []


def same_engines(a: Session, b: Session) -> bool:
    return getattr(a.cluster, "pids", None) == getattr(b.cluster, "pids", ())


def chosen(run: Run, words: Sequence[str]) -> Any:
    """The capture that the words name, as the run's own table writes it; a list of them for
    several names or a glob.

    A name may have spaces (`MODULE input [0]`), so each takes as many words as it can."""
    found, rest = [], list(words)
    while rest:
        parts = ((n, named(run, rest[:n])) for n in range(len(rest), 0, -1))
        length, one = next(((n, one) for n, one in parts if one is not None), (1, None))
        found.append(run[rest[0]] if one is None else one)  # which says that it is not there
        rest = rest[length:]
    if len(found) == 1:
        return found[0]
    return [capture for one in found for capture in (one if isinstance(one, list) else [one])]


def named(run: Run, words: Sequence[str]) -> Any:
    """What these words together name in the run, or None."""
    if list(words) == ["logits"]:
        return run.logits
    found = [capture for capture in run if capture.name == " ".join(words)]
    if found:
        return found[-1]
    key = words[0] if len(words) == 1 else tuple(words)
    return run[key] if len(words) <= 4 and key in run else None


def magics_table() -> str:
    """README's table of the magics, in Markdown."""
    lines = ["| magic | twin | does |", "| --- | --- | --- |"]
    for name in FlexMagics.magics["line"]:
        magic = getattr(FlexMagics, name)
        usage = " ".join(magic.parser.format_usage().removeprefix("::").split()).replace("|", "\\|")
        first_paragraph = magic.parser.description.partition("\n\n")[0]
        does = " ".join(first_paragraph.split()).replace("|", "\\|")
        lines.append(f"| `{usage}` | {magic.twin} | {does} |")
    return "\n".join(lines)
