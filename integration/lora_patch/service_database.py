"""Which database a service keeps its jobs in: an expression of its own that names it, found by the syntax tree."""

import ast
import re

from .service_code import ServiceCode
from .source_file import parameters

WRAPPERS = ("str", "Path", "fspath", "abspath", "expanduser")  # of a path that stays the same database
DEPTH = 6  # calls that are followed back to where a parameter's value comes from


def jobs_databases(code: ServiceCode) -> list[str]:
    """Return the expressions that may name the jobs' database; one where it is clear, none where there is none.

    Each can be evaluated in the module: a name of its own or an imported one, an attribute, a text. A parameter
    (db_path) is followed to its default and to what its callers give.
    """
    finder = _Finder(code)
    found = []  # (whether the function speaks of jobs, expression)
    for call in sorted(code.calls(), key=lambda call: call.lineno):
        named = [k.value for k in call.keywords if k.arg == "database"]
        node = call.args[0] if call.args else named[0] if named else None
        if node is not None and code.file.source(call.func) in finder.connects:
            function = code.file.function(call)
            jobs = function is not None and re.search(r"\bjobs\b", code.file.source(function)) is not None
            found += [(jobs, expression) for expression in finder.resolve(node, function, DEPTH)]
    chosen = [expression for jobs, expression in found if jobs] or [expression for _, expression in found]
    if not chosen and not finder.connects:  # another module connects: by a name that is handed to it
        handed = [node for call in code.calls() for node in (*call.args, *(k.value for k in call.keywords))]
        chosen = [
            expression
            for node in handed
            if re.search(r"(^|[_.])(DB|DATABASE)([_.]|$)", code.file.source(node), re.I)
            for expression in finder.resolve(node, code.file.function(node), DEPTH)
        ]
    return list(dict.fromkeys(chosen))


def uses_jobs_table(code: ServiceCode) -> bool:
    """Tell whether the service's own SQL reads or writes a table of jobs."""
    texts = (node.value for node in code.walk(ast.Constant) if isinstance(node.value, str))
    return any(re.search(r"\b(FROM|INTO|UPDATE|TABLE)\s+(IF\s+NOT\s+EXISTS\s+)?jobs\b", text, re.I) for text in texts)


class _Finder:
    """Follows a value back to an expression that the module can evaluate."""

    def __init__(self, code: ServiceCode):
        self.code, self.file = code, code.file
        self.connects, self.level = set(), set()
        for node in self.file.tree.body:
            self._add_names(node)
        for node in code.walk(ast.Import | ast.ImportFrom):
            for alias in node.names:
                if isinstance(node, ast.Import) and alias.name == "sqlite3":
                    self.connects.add(f"{alias.asname or alias.name}.connect")
                elif isinstance(node, ast.ImportFrom) and node.module == "sqlite3" and alias.name == "connect":
                    self.connects.add(alias.asname or alias.name)

    def _add_names(self, node) -> None:
        """Add what a statement of the module defines, also within if and try."""
        if isinstance(node, ast.Import | ast.ImportFrom):
            self.level |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            self.level |= {one.id for target in targets for one in ast.walk(target) if isinstance(one, ast.Name)}
        elif isinstance(node, ast.If | ast.Try | ast.With):
            for inner in ast.iter_child_nodes(node):
                for one in [inner, *getattr(inner, "body", [])] if isinstance(inner, ast.ExceptHandler) else [inner]:
                    self._add_names(one)

    def resolve(self, node, function, depth: int) -> list[str]:
        """Return the expressions of the module that a value in ``function`` (None: the module) may come from."""
        if depth == 0 or (isinstance(node, ast.Constant) and not isinstance(node.value, str)):
            return []
        if isinstance(node, ast.Constant):
            return [] if node.value == ":memory:" else [repr(node.value)]
        if isinstance(node, ast.Name):
            return self._name(node.id, function, depth)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
            return self._attribute_of_self(node.attr, function, depth)
        if isinstance(node, ast.Call) and self.file.last_name(node.func) in WRAPPERS and node.args:
            return self.resolve(node.args[0], function, depth)
        roots = {one.id for one in ast.walk(node) if isinstance(one, ast.Name)}
        if isinstance(node, ast.Attribute | ast.Subscript | ast.BinOp | ast.Call) and roots <= self.level:
            return [self.file.source(node)] if node.lineno == node.end_lineno else [ast.unparse(node)]
        return []

    def _name(self, name: str, function, depth: int) -> list[str]:
        while function is not None:
            if name in parameters(function):
                return self._parameter(name, function, depth)
            for node in ast.walk(function):
                if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
                    return self.resolve(node.value, function, depth - 1)
            function = self.file.function(function)
        return [name] if name in self.level else []

    def _parameter(self, name: str, function, depth: int) -> list[str]:
        """Follow a parameter to its default and to what the function's callers give."""
        positional = [*function.args.posonlyargs, *function.args.args]
        defaults = dict(zip(reversed([a.arg for a in positional]), reversed(function.args.defaults), strict=False))
        defaults |= {a.arg: d for a, d in zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True) if d}
        around = self.file.parents.get(function)
        is_method = isinstance(around, ast.ClassDef)
        called = around.name if is_method and function.name == "__init__" else function.name
        at = [a.arg for a in positional].index(name) - is_method if name in [a.arg for a in positional] else None
        found, omitted = [], False
        for call in self.code.calls():
            if self.file.last_name(call.func) != called:
                continue
            given = [k.value for k in call.keywords if k.arg == name]
            given += call.args[at : at + 1] if at is not None and not given else []
            omitted = omitted or not given
            for node in given:
                found += self.resolve(node, self.file.function(call), depth - 1)
        if name in defaults and (omitted or not found):
            found += self.resolve(defaults[name], None, depth - 1)
        return found

    def _attribute_of_self(self, attribute: str, function, depth: int) -> list[str]:
        around = self.file.parents.get(function)
        for node in ast.walk(around) if isinstance(around, ast.ClassDef) else ():
            for target in node.targets if isinstance(node, ast.Assign) else ():
                if self.file.source(target) == f"self.{attribute}":
                    return self.resolve(node.value, self.file.function(node), depth - 1)
        return []
