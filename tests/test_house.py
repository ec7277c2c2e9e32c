"""The measures of tools/house.py, on small packages that break them: each can fail."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest

TOOL = Path(__file__).parent.parent / "tools" / "house.py"
ORDER = 'ORDER = ["errors names", "engine", "session"]\n'

Build = Callable[..., Path]


def load_tool():
    spec = importlib.util.spec_from_file_location("house", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules["house"] = module  # dataclasses look their module up here
    spec.loader.exec_module(module)
    return module


house = load_tool()


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Write a checkout: file -> text below flexkernel/, and the map in test_layers.py."""

    def write(files: dict[str, str], layers: str = "") -> Path:
        texts = {f"flexkernel/{name}": text for name, text in files.items()}
        texts["tests/test_layers.py"] = layers
        texts.setdefault("flexkernel/__init__.py", "")
        for name, text in texts.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(dedent(text))
        return tmp_path

    return write


def measure(root: Path, name: str):
    measures = [function(house.read(root)) for function in house.MEASURES]
    return {one.name: one for one in measures}[name]


def test_the_door_and_a_folder_are_one_unit_each(build: Build):
    root = build({"__main__.py": "", "wire.py": "", "engine/__init__.py": "", "engine/run.py": ""})
    assert measure(root, "units").value == "3"


def test_more_units_than_the_aim_miss_it(build: Build):
    root = build({f"unit{number}.py": "" for number in range(14)})
    units = measure(root, "units")
    assert units.value == "15"
    assert not units.ok


def test_an_import_of_the_door_is_no_arrow(build: Build):
    root = build({"a.py": "from . import __version__\nfrom . import b", "b.py": ""})
    assert measure(root, "arrows").offenders == ["flexkernel/a.py:2 a -> b"]


def test_an_arrow_against_the_order_is_listed_with_its_line(build: Build):
    files = {"engine/run.py": "\nfrom ..session import Session", "session.py": "import flexkernel"}
    arrows = measure(build(files, ORDER), "arrows up")
    assert arrows.offenders == ["flexkernel/engine/run.py:2 engine -> session"]
    assert (arrows.value, arrows.ok) == ("1", False)


def test_an_arrow_down_is_not_counted(build: Build):
    files = {"engine/run.py": "import flexkernel.errors", "errors.py": ""}
    root = build(files, ORDER)
    assert measure(root, "arrows").value == "1"
    assert measure(root, "arrows up").ok


def test_an_arrow_within_a_row_counts_as_up(build: Build):
    root = build({"names.py": "from .errors import FlexError", "errors.py": ""}, ORDER)
    assert measure(root, "arrows up").value == "1"


def test_a_unit_without_a_row_is_imported_by_all_and_imports_none(build: Build):
    root = build({"names.py": "from ._version import version", "_version.py": ""}, ORDER)
    assert measure(root, "arrows up").ok
    root = build({"_version.py": "from . import errors", "errors.py": ""}, ORDER)
    assert not measure(root, "arrows up").ok


def test_an_excepted_pair_of_modules_is_counted_apart(build: Build):
    files = {"engine/run.py": "from .. import session", "session.py": "from . import engine"}
    excepted = 'EXCEPTIONS = {("engine.run", "session"): "only a type"}\n'
    root = build(files, ORDER + excepted)
    assert measure(root, "arrows up").ok
    assert measure(root, "rings").ok
    assert measure(root, "arrows").value == "2"
    assert measure(root, "excepted").value == "1"
    assert measure(root, "excepted").offenders == [
        "flexkernel/engine/run.py:1 engine.run -> session: only a type"
    ]


def test_without_an_order_a_ring_has_one_arrow_up(build: Build):
    root = build({"a.py": "from . import b", "b.py": "from . import c", "c.py": "from . import a"})
    assert measure(root, "arrows up").value == "1"
    assert measure(root, "rings").offenders[0] == "ring of 3: a b c"


def test_a_chain_without_an_order_has_no_arrow_up(build: Build):
    root = build({"a.py": "from . import b, c", "b.py": "from . import c", "c.py": ""})
    assert measure(root, "arrows").value == "3"
    assert measure(root, "arrows up").ok
    assert measure(root, "rings").ok


def test_a_type_only_import_and_a_late_one_make_a_ring(build: Build):
    type_only = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .b import B"
    late = "def f():\n    from flexkernel.a import A"
    root = build({"a.py": type_only, "b.py": late})
    rings = measure(root, "rings")
    assert not rings.ok
    assert rings.offenders == [
        "ring of 2: a b",
        "flexkernel/a.py:3 a -> b",
        "flexkernel/b.py:2 b -> a",
    ]


def test_a_ring_inside_a_folder_is_one_of_modules_only(build: Build):
    files = {"engine/a.py": "from . import b", "engine/b.py": "from .a import f"}
    root = build(files)
    assert measure(root, "rings").ok
    assert measure(root, "module rings").offenders[0] == "ring of 2: engine.a engine.b"


def test_relative_imports_in_a_package_file_start_at_the_package(build: Build):
    files = {"engine/__init__.py": "from .run.loop import f\nfrom ..wire import g"}
    root = build({**files, "engine/run/loop.py": "from ...wire import g", "wire.py": ""})
    assert {pair.modules for pair in house.read(root).imports} == {
        ("engine", "engine.run.loop"),
        ("engine", "wire"),
        ("engine.run.loop", "wire"),
    }


def test_conditional_expressions_and_tuple_assignments_are_counted_per_hundred_lines(build: Build):
    text = """
    # a comment and a blank line are no code

    def f(x):
        a, b = 1, 2
        c, d = x
        return a if b else 0
    """
    root = build({"a.py": text})
    assert measure(root, "IfExp per 100").value == "25.00"
    assert measure(root, "IfExp per 100").offenders == ["flexkernel/a.py:7 f"]
    assert measure(root, "a, b = x, y per 100").offenders == ["flexkernel/a.py:5 f"]


def test_lines_of_100_characters_are_long(build: Build):
    root = build({"a.py": f"\n#{'x' * 98}\n#{'x' * 99}\n"})
    assert measure(root, "% of lines >= 100").value == "50.00"
    assert measure(root, "% of lines >= 100").offenders == ["flexkernel/a.py:3 100 characters"]


def test_a_file_of_701_lines_is_too_long(build: Build):
    assert measure(build({"a.py": "\n" * 700}), "longest file").ok
    assert not measure(build({"a.py": "\n" * 701}), "longest file").ok


def test_only_a_bare_any_in_a_public_signature_is_loose(build: Build):
    text = """
    def f(a: Any, b: Any | None, c: dict[str, Any], *d: "Any") -> Optional[Any]:
        def inner(e: Any): ...
    def _private(a: Any): ...
    class Run:
        def g(self) -> typing.Any: ...
        def __getattr__(self, name) -> Any: ...
    """
    loose = measure(build({"a.py": text, "_b.py": "def h(a: Any): ..."}), "public Any").offenders
    assert [line.split(" ", 1)[1] for line in loose] == [
        "f: a",
        "f: b",
        "f: d",
        "f: return",
        "Run.g: return",
    ]


def test_an_untyped_runtime_is_counted_anywhere(build: Build):
    text = "def _f():\n    def g(runtime: Any): ...\ndef h(runtime: Runtime): ..."
    assert measure(build({"a.py": text}), "runtime: Any").offenders == ["flexkernel/a.py:2 _f.g"]


def test_asserts_against_none_are_counted(build: Build):
    text = (
        "assert x is not None and y\nassert x is None\nassert z\n" + "assert x is not None\n" * 14
    )
    asserts = measure(build({"a.py": text}), "assert x is not None")
    assert (asserts.value, asserts.ok) == ("15", False)


def test_session_has_the_attributes_of_its_bases_in_the_package(build: Build):
    session = """
    class Session(hooking.Hooking, dict):
        bar: int = 0
        def __init__(self):
            self.cluster, self._held = 1, 2
            self.cluster.name = "x"
        @property
        def closed(self): ...
        def _private(self): ...
    """
    base = "class Hooking:\n    def hook(self):\n        self.hooks: list = []"
    root = build({"session/main.py": session, "hooking.py": base})
    listed = measure(root, "Session attributes").offenders
    names = [line.split()[-1] for line in listed]
    assert names == ["bar", "closed", "cluster", "hook", "hooks"]


def test_a_package_without_a_session_misses_the_aim(build: Build):
    assert not measure(build({"a.py": ""}), "Session attributes").ok


def test_tensor_functions_need_a_docstring_with_a_shape(build: Build):
    text = '''
    def bare(x: torch.Tensor): ...
    def vague() -> "Tensor | None":
        """The mask (or nothing), of call(x, y)."""
    def clear(x: Tensor):
        """x: (B, S, D/tp) float32."""
    def __add__(self, x: Tensor): ...
    def other(x: DTensorSpec):
        def inner(x: Tensor): ...
    '''
    root = build({"a.py": text})
    assert measure(root, "tensors, no docstring").offenders == ["flexkernel/a.py:2 bare"]
    assert measure(root, "tensors, no shape").offenders == ["flexkernel/a.py:3 vague"]


@pytest.mark.parametrize(
    "text",
    [
        "(B, S, D)",
        "(rows, positions)",
        "[B, S]",
        "(N,)",
        "(B or 1, ..., K)",
        "(S, D/tp)",
        "0-d",
        "a scalar",
        "same shape",
        "of 2-D weights",
    ],
)
def test_a_docstring_says_a_shape(text: str):
    assert house.SHAPE.search(f"Before {text} after.")


@pytest.mark.parametrize("text", ["", "gather(local, group)", "(where it lies)", "x[0, 1]"])
def test_a_docstring_says_no_shape(text: str):
    assert not house.SHAPE.search(f"Before {text} after.")


def test_dialect_names_and_classes_of_one_name_are_found(build: Build):
    root = build({"a.py": "class Held: ...\ndef _told(): ...", "b.py": "class Held: ..."})
    assert measure(root, "dialect names").offenders == ["flexkernel/a.py:2 _told"]
    assert measure(root, "repeated classes").offenders == [
        "flexkernel/a.py:1 Held",
        "flexkernel/b.py:1 Held",
    ]


def test_check_fails_only_where_an_aim_is_missed(build: Build, capsys: pytest.CaptureFixture):
    files = {"session.py": "class Session: ...\n"}
    arguments = ["--check", "--root", str(build(files))]
    assert house.main(arguments) == 0
    build({"session.py": "class Session: ...\ndef known(): ...\n"})
    assert house.main(arguments) == 1
    assert house.main(arguments[1:]) == 0
    assert "flexkernel/session.py:2 known" in capsys.readouterr().out


def test_all_lists_every_offender_of_one_measure(build: Build, capsys: pytest.CaptureFixture):
    root = build({"a.py": "def known(): ...\n" * 7})
    house.main(["--root", str(root), "--all", "dialect names"])
    assert capsys.readouterr().out.count("flexkernel/a.py:") == 7
    with pytest.raises(SystemExit):
        house.main(["--root", str(root), "--all", "nothing"])
    assert "is not one of units, arrows" in capsys.readouterr().err


@pytest.mark.slow
def test_it_reads_this_checkout_and_its_order():
    project = house.read(TOOL.parent.parent)
    assert len(project.sources) > 50
    assert project.order
    assert project.exceptions
