"""Measures of the package's structure, in one table, with the worst offenders of each.

python tools/house.py                    the table of this checkout
python tools/house.py --root ../before   the table of another checkout
python tools/house.py --all "arrows up"  every offender of one measure
python tools/house.py --check            exit code 1 if a measure misses its aim

A unit is what stands at the top level of flexkernel/: a folder or a file. `__init__` and `__main__`
are one unit, the door. An arrow is an import of one unit by another. Imports inside functions and
under TYPE_CHECKING count; a module that is imported by a computed name does not.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

PACKAGE = "flexkernel"
DOOR = {"", "__main__"}  # "" is flexkernel/__init__.py
LAYERS = Path("tests", "test_layers.py")
WORST = 5
LONG_LINE = 100
DIALECT = {"known", "found", "told", "said", "held", "there"}
DIALECT |= {"what", "asked", "wanted", "kept", "mine"}

DIM = r"(?:\.\.\.|\*?\w+(?: or \w+)?(?: ?[/*+-] ?\w+)*)"
DIMS = rf"{DIM}(?:,|(?:, ?{DIM})+,?)"
TUPLE = rf"(?<!\w)(?:\({DIMS}\)|\[{DIMS}\])"  # (B, S, D/tp), [B, S], (N,)
SHAPE = re.compile(rf"{TUPLE}|\b\d-[dD]\b|\bscalars?\b|\bshapes?\b", re.IGNORECASE)
TENSOR = re.compile(r"\bTensor\b")

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
SCOPES = (*FUNCTIONS, ast.ClassDef)


# --- what is measured ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Measure:
    name: str
    value: str
    aim: str  # "-" where the value only informs
    ok: bool
    offenders: list[str]  # "path:line name", the worst first


@dataclass(frozen=True)
class Node:
    """A node of a file's syntax, and the classes and functions around it, outermost first."""

    syntax: ast.AST
    outer: tuple[ast.AST, ...]

    @property
    def scope(self) -> str:
        return ".".join(scope.name for scope in self.outer)

    @property
    def nested(self) -> bool:
        return any(isinstance(scope, FUNCTIONS) for scope in self.outer)


@dataclass(frozen=True, eq=False)
class Source:
    """One parsed file. module: "engine.hooks"; package: where its relative imports start."""

    path: str
    module: str
    package: str
    lines: list[str]
    nodes: list[Node]

    @property
    def code_lines(self) -> int:
        return sum(1 for line in self.lines if line.strip() and not line.strip().startswith("#"))

    def at(self, line: int, text: str) -> str:
        return f"{self.path}:{line} {text}"


@dataclass(frozen=True)
class Function:
    source: Source
    node: Node

    @property
    def syntax(self) -> ast.FunctionDef:
        return self.node.syntax

    @property
    def name(self) -> str:
        return f"{self.node.scope}.{self.syntax.name}".lstrip(".")

    @property
    def at(self) -> str:
        return self.source.at(self.syntax.lineno, self.name)

    @property
    def num_lines(self) -> int:
        return self.syntax.end_lineno - self.syntax.lineno + 1

    @property
    def public(self) -> bool:
        parts = f"{self.source.module}.{self.name}".split(".")
        return not self.node.nested and not any(part.startswith("_") for part in parts)

    @property
    def parameters(self) -> list[ast.arg]:
        args = self.syntax.args
        stars = [arg for arg in (args.vararg, args.kwarg) if arg]
        return [*args.posonlyargs, *args.args, *args.kwonlyargs, *stars]

    @property
    def annotations(self) -> list[tuple[str, ast.expr]]:
        """(name of the parameter or "return", annotation), for those that have one."""
        pairs = [(arg.arg, arg.annotation) for arg in self.parameters]
        pairs.append(("return", self.syntax.returns))
        return [(name, unquoted(annotation)) for name, annotation in pairs if annotation]


@dataclass(frozen=True)
class Import:
    """One module's import of another, without the package's name: "engine.hooks", "wire"."""

    importer: str
    target: str
    where: str  # "path:line"

    @property
    def modules(self) -> tuple[str, str]:
        return self.importer, self.target

    @property
    def units(self) -> tuple[str, str]:
        return unit_of(self.importer), unit_of(self.target)


@dataclass(frozen=True)
class House:
    """A checkout. order: unit -> row, the lowest 0; None where tests/test_layers.py has none."""

    sources: list[Source]
    order: dict[str, int] | None
    exceptions: dict[tuple[str, str], str]

    @cached_property
    def functions(self) -> list[Function]:
        return [Function(source, node) for source, node in self.select(FUNCTIONS)]

    @cached_property
    def imports(self) -> list[Import]:
        modules = {parent for source in self.sources for parent in parents(source.module)}
        pairs = [pair for source in self.sources for pair in imports_of(source, modules)]
        return [pair for pair in pairs if not DOOR & set(pair.units) and len(set(pair.modules)) > 1]

    @cached_property
    def counted(self) -> list[Import]:
        """The imports that are not excepted."""
        return [pair for pair in self.imports if pair.modules not in self.exceptions]

    def select(self, kinds: type | tuple[type, ...]) -> Iterator[tuple[Source, Node]]:
        for source in self.sources:
            for node in source.nodes:
                if isinstance(node.syntax, kinds):
                    yield source, node

    @property
    def code_lines(self) -> int:
        return sum(source.code_lines for source in self.sources)


# --- reading a checkout -------------------------------------------------------------------------


def read(root: Path) -> House:
    folder = root / PACKAGE
    sources = [read_source(path, root) for path in sorted(folder.rglob("*.py"))]
    if not sources:
        raise SystemExit(f"{folder} has no .py file: give --root the folder of a checkout")
    rows = read_literal(root / LAYERS, "ORDER")
    exceptions = read_literal(root / LAYERS, "EXCEPTIONS") or {}
    return House(sources, rows and row_of_each(rows), exceptions)


def read_source(path: Path, root: Path) -> Source:
    parts = path.relative_to(root / PACKAGE).with_suffix("").parts
    is_package = parts[-1] == "__init__"
    module = ".".join(parts[:-1] if is_package else parts)
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text, str(path))
    return Source(
        path=path.relative_to(root).as_posix(),
        module=module,
        package=".".join((PACKAGE, *parts[:-1])),
        lines=text.splitlines(),
        nodes=list(walk(tree)),
    )


def walk(tree: ast.AST, outer: tuple[ast.AST, ...] = ()) -> Iterator[Node]:
    for child in ast.iter_child_nodes(tree):
        yield Node(child, outer)
        yield from walk(child, (*outer, child) if isinstance(child, SCOPES) else outer)


def read_literal(path: Path, name: str) -> object:
    """The value of a module-level `name = literal`, or None."""
    if not path.exists():
        return None
    for statement in ast.parse(path.read_text(encoding="utf-8"), str(path)).body:
        targets = [getattr(statement, "target", None), *getattr(statement, "targets", [])]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return ast.literal_eval(statement.value)
    return None


def row_of_each(rows: list[str]) -> dict[str, int]:
    return {unit: row for row, units in enumerate(rows) for unit in units.split()}


# --- imports as a graph -------------------------------------------------------------------------


def unit_of(module: str) -> str:
    return module.split(".")[0]


def parents(module: str) -> list[str]:
    """The module, the packages around it and the door: a.b -> a.b, a, ""."""
    parts = module.split(".")
    return [".".join(parts[:length]) for length in range(len(parts), -1, -1)]


def imports_of(source: Source, modules: set[str]) -> Iterator[Import]:
    for node in source.nodes:
        for name in imported_names(source, node.syntax):
            first, _, rest = name.partition(".")
            if first == PACKAGE:
                target = next(module for module in parents(rest) if module in modules)
                yield Import(source.module, target, f"{source.path}:{node.syntax.lineno}")


def imported_names(source: Source, syntax: ast.AST) -> list[str]:
    """Absolute dotted names; the last part may be a module or what a module defines."""
    if isinstance(syntax, ast.Import):
        return [alias.name for alias in syntax.names]
    if not isinstance(syntax, ast.ImportFrom):
        return []
    base = syntax.module or ""
    if syntax.level:
        package = source.package.split(".")
        kept_parts = package[: len(package) - syntax.level + 1]
        base = ".".join([*kept_parts, *base.split(".")]).rstrip(".")
    return [f"{base}.{alias.name}" for alias in syntax.names]


def graph_of(pairs: Iterable[tuple[str, str]]) -> dict[str, set[str]]:
    graph: dict[str, set[str]] = defaultdict(set)
    for importer, target in pairs:
        if importer != target:
            graph[importer].add(target)
            graph[target].update()  # every node has an entry
    return dict(graph)


def reach(graph: dict[str, set[str]], start: str) -> set[str]:
    """The nodes that an arrow or several lead to."""
    reached: set[str] = set()
    waiting = [start]
    while waiting:
        fresh = graph[waiting.pop()] - reached
        reached |= fresh
        waiting.extend(fresh)
    return reached


def rings_of(graph: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected components of more than one node, the largest first."""
    reached = {node: reach(graph, node) for node in graph}
    rings = set()
    for node in graph:
        ring = frozenset(other for other in reached[node] if node in reached[other])
        if ring:
            rings.add(ring)
    return sorted((sorted(ring) for ring in rings), key=lambda ring: (-len(ring), ring))


def back_arrows(graph: dict[str, set[str]], start: str) -> set[tuple[str, str]]:
    """The arrows that go back in the order in which a depth-first search leaves the nodes."""
    left: dict[str, int] = {}
    entered: set[str] = set()

    def visit(node: str) -> None:
        if node in entered:
            return
        entered.add(node)
        for target in sorted(graph[node]):
            visit(target)
        left[node] = len(left)

    for node in [start, *sorted(graph)]:
        visit(node)
    return {(node, to) for node in graph for to in graph[node] if left[to] > left[node]}


def arrows_against(house: House) -> set[tuple[str, str]]:
    """Arrows up: against the order, else as few as a depth-first search finds to go back.

    A unit without a row stands below all rows, so it may be imported and may import no unit."""
    graph = graph_of(pair.units for pair in house.counted)
    if house.order is None:
        searches = [back_arrows(graph, start) for start in sorted(graph)]
        return min(searches, key=len, default=set())
    row = {unit: house.order.get(unit, -1) for unit in graph}
    return {(unit, to) for unit in graph for to in graph[unit] if row[to] >= row[unit]}


# --- helpers of the measures --------------------------------------------------------------------


def at_most(name: str, number: float, limit: float, offenders: list[str]) -> Measure:
    value = f"{number:.2f}" if isinstance(number, float) else str(number)
    aim = f"<= {limit}" if limit else "0"
    return Measure(name, value, aim, number <= limit, offenders)


def inform(name: str, value: object, offenders: list[str]) -> Measure:
    return Measure(name, str(value), "-", True, offenders)


def unquoted(annotation: ast.expr) -> ast.expr:
    """The annotation; of a forward reference, what stands in the quotes."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        return ast.parse(annotation.value, mode="eval").body
    return annotation


def is_any(annotation: ast.expr) -> bool:
    """Whether the whole is Any or a union with Any: `Any | None`, `Optional[Any]`."""
    if isinstance(annotation, ast.BinOp):
        return is_any(annotation.left) or is_any(annotation.right)
    if isinstance(annotation, ast.Subscript):
        union = ast.unparse(annotation.value).endswith(("Optional", "Union"))
        parts = getattr(annotation.slice, "elts", [annotation.slice])
        return union and any(map(is_any, parts))
    return ast.unparse(annotation) in ("Any", "typing.Any")


def by_scope(places: Iterable[tuple[Source, Node]]) -> list[str]:
    """One line a function: where the nodes stand, those with the most first."""
    lines = defaultdict(list)
    for source, node in places:
        lines[source.path, node.scope or "module level"].append(node.syntax.lineno)
    offenders = []
    for (path, scope), numbers in sorted(lines.items(), key=lambda item: -len(item[1])):
        more = f" and lines {' '.join(map(str, numbers[1:]))}" if len(numbers) > 1 else ""
        offenders.append(f"{path}:{numbers[0]} {scope}{more}")
    return offenders


def per_hundred(house: House, places: list[tuple[Source, Node]]) -> float:
    return 100 * len(places) / max(1, house.code_lines)


def arrow_lines(imports: list[Import], arrows: set[tuple[str, str]]) -> list[str]:
    """One line an arrow: its first import and how many more there are, the most first."""
    places = defaultdict(list)
    for pair in imports:
        if pair.units in arrows:
            places[pair.units].append(pair)
    offenders = []
    for (unit, to), pairs in sorted(places.items(), key=lambda item: (-len(item[1]), item[0])):
        more = f", and {len(pairs) - 1} more" if len(pairs) > 1 else ""
        offenders.append(f"{pairs[0].where} {unit} -> {to}{more}")
    return offenders


def ring_lines(imports: list[Import], rings: list[list[str]], ends: str) -> list[str]:
    """The members of each ring, then every import inside it. ends: "units" or "modules"."""
    heads = [f"ring of {len(ring)}: {' '.join(ring)}" for ring in rings]
    inside = []
    for ring in map(set, rings):
        for pair in imports:
            importer, target = getattr(pair, ends)
            if importer != target and {importer, target} <= ring:
                inside.append(f"{pair.where} {pair.importer} -> {pair.target}")
    return heads + inside


# --- the measures -------------------------------------------------------------------------------


def units(house: House) -> Measure:
    first = {unit_of(source.module): source.path for source in reversed(house.sources)}
    names = [unit for unit in first if unit not in DOOR]
    door = len(names) < len(first)
    offenders = [f"{first[unit]}:1 {unit}" for unit in sorted(names)]
    return at_most("units", len(names) + door, 14, offenders)


def arrows(house: House) -> Measure:
    pairs = {pair.units for pair in house.imports if len(set(pair.units)) > 1}
    return inform("arrows", len(pairs), arrow_lines(house.imports, pairs))


def arrows_up(house: House) -> Measure:
    against = arrows_against(house)
    return at_most("arrows up", len(against), 0, arrow_lines(house.counted, against))


def excepted(house: House) -> Measure:
    places = {pair.modules: pair.where for pair in house.imports}
    used = house.exceptions.keys() & places.keys()
    offenders = []
    for modules, reason in house.exceptions.items():
        where = places.get(modules, "no such import:")
        offenders.append(f"{where} {' -> '.join(modules)}: {reason}")
    return inform("excepted", len(used), offenders)


def rings(house: House) -> Measure:
    circles = rings_of(graph_of(pair.units for pair in house.counted))
    return at_most("rings", len(circles), 0, ring_lines(house.counted, circles, "units"))


def module_rings(house: House) -> Measure:
    circles = rings_of(graph_of(pair.modules for pair in house.counted))
    return at_most("module rings", len(circles), 0, ring_lines(house.counted, circles, "modules"))


def longest_file(house: House) -> Measure:
    ranked = sorted(house.sources, key=lambda source: -len(source.lines))
    long = [source for source in ranked if len(source.lines) > 700]
    offenders = [source.at(1, f"{len(source.lines)} lines") for source in long]
    return at_most("longest file", len(ranked[0].lines), 700, offenders)


def longest_function(house: House) -> Measure:
    ranked = sorted(house.functions, key=lambda function: function.num_lines)
    lengths = [function.num_lines for function in ranked] or [0]
    p50, p95 = (lengths[int(len(lengths) * share)] for share in (0.5, 0.95))
    long = [function for function in reversed(ranked) if function.num_lines > p95]
    offenders = [f"{function.at}: {function.num_lines} lines" for function in long]
    return inform("longest function", f"{lengths[-1]} (p50 {p50}, p95 {p95})", offenders)


def long_lines(house: House) -> Measure:
    total = sum(1 for source in house.sources for line in source.lines if line.strip())
    long = []
    for source in house.sources:
        for number, line in enumerate(source.lines, 1):
            if len(line) >= LONG_LINE:
                long.append((len(line), source.at(number, f"{len(line)} characters")))
    offenders = [text for _, text in sorted(long, key=lambda pair: -pair[0])]
    return at_most("% of lines >= 100", 100 * len(long) / max(1, total), 2, offenders)


def conditional_expressions(house: House) -> Measure:
    places = list(house.select(ast.IfExp))
    return at_most("IfExp per 100", per_hundred(house, places), 1.5, by_scope(places))


def tuple_assignments(house: House) -> Measure:
    places = [place for place in house.select(ast.Assign) if tuple_to_tuple(place[1].syntax)]
    return at_most("a, b = x, y per 100", per_hundred(house, places), 0.2, by_scope(places))


def tuple_to_tuple(statement: ast.Assign) -> bool:
    to_tuple = any(isinstance(target, ast.Tuple) for target in statement.targets)
    return to_tuple and isinstance(statement.value, ast.Tuple)


def lambdas(house: House) -> Measure:
    places = list(house.select(ast.Lambda))
    return inform("lambdas per 100", f"{per_hundred(house, places):.2f}", by_scope(places))


def public_any(house: House) -> Measure:
    offenders = []
    for function in filter(lambda function: function.public, house.functions):
        loose = [name for name, hint in function.annotations if is_any(hint)]
        offenders += [f"{function.at}: {name}" for name in loose]
    return inform("public Any", len(offenders), offenders)


def runtime_any(house: House) -> Measure:
    offenders = []
    for function in house.functions:
        if any(name == "runtime" and is_any(hint) for name, hint in function.annotations):
            offenders.append(function.at)
    return at_most("runtime: Any", len(offenders), 0, offenders)


def not_none_asserts(house: House) -> Measure:
    places = [place for place in house.select(ast.Assert) if compares_with_none(place[1].syntax)]
    return at_most("assert x is not None", len(places), 14, by_scope(places))


def compares_with_none(statement: ast.Assert) -> bool:
    """Whether it asserts `x is not None`, alone or in an `and` or `or`."""
    test = statement.test
    parts = test.values if isinstance(test, ast.BoolOp) else [test]
    compared = [part for part in parts if isinstance(part, ast.Compare)]
    return any(ast.unparse(part).endswith(" is not None") for part in compared)


def session_attributes(house: House) -> Measure:
    classes = {
        node.syntax.name: (source, node.syntax) for source, node in house.select(ast.ClassDef)
    }
    if "Session" not in classes:
        return Measure("Session attributes", "no class", "<= 24", False, [])
    attributes: dict[str, str] = {}
    waiting = ["Session"]
    for name in waiting:  # grows by the bases
        source, syntax = classes[name]
        for attribute, line in own_attributes(syntax):
            attributes.setdefault(attribute, source.at(line, attribute))
        bases = [ast.unparse(base).split("[")[0].split(".")[-1] for base in syntax.bases]
        waiting += [base for base in bases if base in classes and base not in waiting]
    offenders = [attributes[name] for name in sorted(attributes)]
    return at_most("Session attributes", len(offenders), 24, offenders)


def own_attributes(syntax: ast.ClassDef) -> Iterator[tuple[str, int]]:
    """(name, line) of the public methods, class attributes and `self.name = ` of a class."""
    for node in walk(syntax):
        part = node.syntax
        in_body = not node.outer
        if any(isinstance(scope, ast.ClassDef) for scope in node.outer):
            continue
        name = ""
        if isinstance(part, FUNCTIONS) and in_body:
            name = part.name
        elif isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store) and in_body:
            name = part.id
        elif isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store):
            name = part.attr if ast.unparse(part.value) == "self" else ""
        if name and not name.startswith("_"):
            yield name, part.lineno


def tensor_functions(house: House) -> list[tuple[Function, str]]:
    """The functions that take or return a tensor, with their docstrings; no nested, no dunder."""
    pairs = []
    for function in house.functions:
        dunder = function.syntax.name.startswith("__")
        mentions = any(TENSOR.search(ast.unparse(hint)) for _, hint in function.annotations)
        if mentions and not dunder and not function.node.nested:
            pairs.append((function, ast.get_docstring(function.syntax) or ""))
    return pairs


def tensors_undocumented(house: House) -> Measure:
    offenders = [function.at for function, text in tensor_functions(house) if not text]
    return at_most("tensors, no docstring", len(offenders), 0, offenders)


def tensors_without_shape(house: House) -> Measure:
    documented = [(function, text) for function, text in tensor_functions(house) if text]
    offenders = [function.at for function, text in documented if not SHAPE.search(text)]
    return at_most("tensors, no shape", len(offenders), 0, offenders)


def dialect(house: House) -> Measure:
    odd = [function for function in house.functions if function.syntax.name.strip("_") in DIALECT]
    return at_most("dialect names", len(odd), 0, [function.at for function in odd])


def repeated_classes(house: House) -> Measure:
    classes = [
        (node.syntax.name, source, node.syntax) for source, node in house.select(ast.ClassDef)
    ]
    modules = Counter(name for name, _ in {(name, source.module) for name, source, _ in classes})
    repeated = [entry for entry in classes if modules[entry[0]] > 1]
    repeated.sort(key=lambda entry: entry[0])
    offenders = [source.at(syntax.lineno, name) for name, source, syntax in repeated]
    return at_most("repeated classes", len({name for name, _, _ in repeated}), 0, offenders)


MEASURES: list[Callable[[House], Measure]] = [
    units,
    arrows,
    arrows_up,
    excepted,
    rings,
    module_rings,
    longest_file,
    longest_function,
    long_lines,
    conditional_expressions,
    tuple_assignments,
    lambdas,
    public_any,
    runtime_any,
    not_none_asserts,
    session_attributes,
    tensors_undocumented,
    tensors_without_shape,
    dialect,
    repeated_classes,
]


# --- the program --------------------------------------------------------------------------------


def table(measures: list[Measure]) -> str:
    rows = [("measure", "value", "aim", "")]
    for measure in measures:
        rows.append((measure.name, measure.value, measure.aim, "" if measure.ok else "missed"))
    name_width, value_width, aim_width = (max(len(row[i]) for row in rows) for i in range(3))
    lines = []
    for name, value, aim, verdict in rows:
        line = f"{name:{name_width}} | {value:{value_width}} | {aim:{aim_width}}  {verdict}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def offenders_text(measure: Measure, most: int | None = None) -> str:
    lines = [f"{measure.name}: {measure.value}, aim {measure.aim}"]
    lines += [f"    {offender}" for offender in measure.offenders[:most]]
    left_out = len(measure.offenders) - len(lines) + 1
    if left_out:
        lines.append(f'    and {left_out} more: --all "{measure.name}"')
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    here = Path(__file__).resolve().parent.parent
    parser.add_argument("--root", type=Path, default=here, help="folder of a checkout")
    parser.add_argument("--check", action="store_true", help="exit 1 if a measure misses its aim")
    parser.add_argument("--all", metavar="MEASURE", help="list every offender of one measure")
    options = parser.parse_args(arguments)
    house = read(options.root)
    measures = [measure(house) for measure in MEASURES]
    missed = [measure for measure in measures if not measure.ok]
    if options.all:
        chosen = {measure.name: measure for measure in measures}
        if options.all not in chosen:
            parser.error(f"--all {options.all!r} is not one of {', '.join(chosen)}")
        print(offenders_text(chosen[options.all]))
    else:
        print(table(measures))
        for measure in missed:
            print("\n" + offenders_text(measure, WORST))
    return int(options.check and bool(missed))


if __name__ == "__main__":
    sys.exit(main())
