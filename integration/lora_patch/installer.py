"""Find the places for our lines in a service file by its syntax tree, and insert them; no other byte changes."""

import ast
import functools
import re
from pathlib import Path

from .flags import NAMES
from .source_file import BY_HAND, Refusal, SourceFile, uninstalled

VERBS = ("get", "post", "put")  # methods of a view class; too common as names to follow by name


class Installer:
    """Finds the places in a service file by its syntax tree and inserts the lines; changes no other byte."""

    def __init__(self, raw: bytes, path: Path):
        self.path, self.file = path, SourceFile(raw, path)
        self.edits: list[tuple[int, int, bytes]] = []  # (from, to, replacement); from == to inserts
        self.problems, self.missing, self.notes, self.placed = [], [], [], {}

    # looking around

    @functools.cache  # noqa: B019 - an installer lives as long as one command
    def walk(self, kind):
        return [node for node in self.file.nodes if isinstance(node, kind)]

    def calls(self):
        return self.walk(ast.Call)

    def functions(self):
        return self.walk(ast.FunctionDef | ast.AsyncFunctionDef)

    def made_by(self, *makers: str) -> set[str]:
        """Return the variables that are assigned from a call of one of these functions or classes."""
        found = set()
        for node in self.walk(ast.Assign | ast.AnnAssign):
            if isinstance(node.value, ast.Call) and self.file.source(node.value.func).rsplit(".", 1)[-1] in makers:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found.update(self.file.source(target) for target in targets)
        return found

    def mlx_names(self, wanted: set[str]) -> set[str]:
        """Return how the file may call functions of mlx_vlm: {"generate", "mlx_vlm.generate", "mv.generate"}."""
        names = set()
        for node in self.walk(ast.Import | ast.ImportFrom):
            for alias in node.names:
                if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mlx_vlm":
                    if alias.name in wanted:
                        names.add(alias.asname or alias.name)
                    elif alias.name in ("generate", "utils"):  # a module of that name
                        names.update(f"{alias.asname or alias.name}.{name}" for name in wanted)
                elif isinstance(node, ast.Import) and alias.name.split(".")[0] == "mlx_vlm":
                    names.update(f"{alias.asname or alias.name}.{name}" for name in wanted)
                    names.update(f"mlx_vlm.{part}{name}" for part in ("", "utils.", "generate.") for name in wanted)
        return names

    def calls_of(self, wanted: set[str]) -> list:
        names = self.mlx_names(wanted)
        return [call for call in self.calls() if self.file.source(call.func).replace(" ", "") in names]

    def problem(self, node, text: str, *keys: str) -> None:
        where = f"{self.path}:{node.lineno}" if node is not None else str(self.path)
        self.problems.append(f"{where}: {text}")
        self.missing.extend(key for key in keys if key not in self.missing)

    # editing

    def line_before(self, key: str, statement, text: str) -> bool:
        indent, line = self.file.indent(statement), statement.lineno
        if key != "generation":  # which is a decorator itself, and the innermost
            line = min([line, *(node.lineno for node in getattr(statement, "decorator_list", []))])
        start = self.file.at(line, 0)
        if indent is None or self.file.text[start + len(indent) :].startswith(b"elif"):
            return False
        self.insert(key, start, indent + text.encode() + self.file.end_of_line(line), line)
        return True

    def line_after(self, key: str, statement, text: str) -> bool:
        indent, last = self.file.indent(statement), self.file.lines[statement.end_lineno - 1]
        rest = last[statement.end_col_offset :].strip()
        if indent is None or (rest and not rest.startswith(b"#")) or not last.endswith(b"\n"):
            return False
        start = self.file.starts[statement.end_lineno]
        self.insert(
            key, start, indent + text.encode() + self.file.end_of_line(statement.end_lineno), statement.end_lineno + 1
        )
        return True

    def insert(self, key: str, start: int, text: bytes, line: int) -> None:
        self.edits.append((start, start, text))
        self.placed.setdefault(key, []).append(line)

    def wrap(self, key: str, node, call: str, more: str = "") -> None:
        start, end = self.file.span(node)
        self.edits.append((start, start, f"lora_patch.{call}(".encode()))
        self.edits.append((end, end, f"{more})".encode()))
        self.placed.setdefault(key, []).append(node.lineno)

    # the places

    def plan(self) -> bytes:
        """Return the service with the lines in it; Refusal, with everything that is not understood."""
        self.refuse_own_lora()
        self.place_arguments()
        self.place_attach()
        self.place_generation()
        self.place_choose()
        self.place_start()
        self.place_import()
        if self.problems:
            raise Refusal(self.problems, self.missing)
        text = self.file.text
        for start, end, new in reversed(sorted(self.edits, key=lambda edit: edit[0])):
            text = text[:start] + new + text[end:]  # at one place: the last first, so that they end up in order
        new = self.file.encode(text)
        try:
            compile(new, str(self.path), "exec")
        except SyntaxError as error:  # our own error, but better said than written
            raise Refusal(
                [f"{self.path}:{error.lineno}: the lines do not fit in ({error.msg})"], list(BY_HAND)
            ) from error
        if uninstalled(new, self.path) != self.file.encode(self.file.text):
            raise Refusal([f"{self.path}: the lines could not be taken out again"], list(BY_HAND))
        return new

    def refuse_own_lora(self) -> None:
        ours = set(NAMES)
        for call in self.calls():
            if isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument":
                for value in call.args:
                    if isinstance(value, ast.Constant) and value.value in ours:
                        self.problem(
                            call, f"the service has a flag {value.value} of its own; rename or remove it first"
                        )
        for call in self.calls_of({"load"}):
            if any(keyword.arg == "adapter_path" for keyword in call.keywords):
                self.problem(call, "the service loads an adapter of its own (adapter_path); remove that first")

    def place_arguments(self) -> None:
        parses = ("parse_args", "parse_known_args", "parse_intermixed_args", "parse_known_intermixed_args")
        found = [c for c in self.calls() if isinstance(c.func, ast.Attribute) and c.func.attr in parses]
        makers = self.made_by("ArgumentParser")
        known = [c for c in found if self.file.source(c.func.value) in makers] or found
        with_model = {
            self.file.source(c.func.value)
            for c in self.calls()
            if isinstance(c.func, ast.Attribute) and c.func.attr == "add_argument" and c.args
            if isinstance(c.args[0], ast.Constant) and c.args[0].value in ("--mlx_model", "--mlx-model", "--port")
        }
        if len(known) > 1:
            known = [c for c in known if self.file.source(c.func.value) in with_model] or known
        if not known:
            self.problem(None, "no parser.parse_args() found", "add_arguments")
            return
        if len(known) > 1 and len({(self.file.function(c), self.file.source(c.func.value)) for c in known}) > 1:
            self.problem(known[0], "several parsers; which one is the service's is not clear", "add_arguments")
            return
        call = min(known, key=lambda c: c.lineno)
        receiver, statement = call.func.value, self.file.statement(call)
        plain = isinstance(receiver, ast.Name | ast.Attribute) and statement.lineno == call.lineno
        text = f"lora_patch.add_arguments({self.file.source(receiver)})"
        if not plain or not self.line_before("add_arguments", statement, text):
            self.wrap("add_arguments", receiver, "add_arguments")

    def place_attach(self) -> None:
        self.loaders, simple_target = [], (ast.Name, ast.Attribute, ast.Subscript)
        loads = self.calls_of({"load"})
        if not loads:
            self.problem(None, "no call of mlx_vlm.load found", "attach")
        for call in loads:
            self.loaders.append(self.file.function(call))
            model = call.args[0] if call.args and not isinstance(call.args[0], ast.Starred) else None
            model = model or next((k.value for k in call.keywords if k.arg == "path_or_hf_repo"), None)
            simple = isinstance(model, ast.Name | ast.Attribute | ast.Constant | ast.Subscript) or (
                isinstance(model, ast.Call) and self.file.source(model.func) in ("str", "Path", "os.path.expanduser")
            )
            name = f", {ast.unparse(model)}" if simple else ""
            statement = self.file.statement(call)
            target = statement.targets[0] if isinstance(statement, ast.Assign) and len(statement.targets) == 1 else None
            names = isinstance(target, ast.Tuple) and all(isinstance(e, simple_target) for e in target.elts)
            if names and statement.value is call:
                loaded = ", ".join(self.file.source(element) for element in target.elts)
                if self.line_after("attach", statement, f"lora_patch.attach(({loaded}){name})"):
                    continue
            self.wrap("attach", call, "attach", name)

    def place_generation(self) -> None:
        names = self.mlx_names({"generate", "stream_generate"})
        names |= {  # ask = mlx_vlm.generate
            target.id
            for node in self.walk(ast.Assign)
            if self.file.source(node.value).replace(" ", "") in names
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        self.asking = [  # calls, and mentions such as executor.submit(generate, ...)
            node
            for node in self.walk(ast.Name | ast.Attribute)
            if self.file.source(node).replace(" ", "") in names and not isinstance(node.ctx, ast.Store)
            if isinstance(self.file.parents[node], ast.Call | ast.keyword)
        ]
        functions = [f for f in self.functions() if f.name == "run_model_mlx"] if not self.asking else []
        if not self.asking and not functions:
            self.problem(None, "no call of mlx_vlm.generate and no run_model_mlx found", "generation")
        for function in [*functions, *filter(None, map(self.file.function, self.asking))]:
            if isinstance(function, ast.AsyncFunctionDef):
                self.problem(
                    function, f"{function.name} is async; the model must be asked in a plain function", "generation"
                )
        self.generating = {f.name for f in functions} | {f.name for n in self.asking if (f := self.file.function(n))}
        self.generating -= set(VERBS)
        for function in functions:
            self.line_before("generation", function, "@lora_patch.generation")

    def is_factory(self, function) -> bool:
        """Tell whether a function makes the app: its inner functions are the service's, not steps of its own."""
        return any(self.file.function(f) is function and self.routes(f) for f in self.functions()) or any(
            self.file.function(c) is function and self.file.source(c.func) in ("Flask", "flask.Flask")
            for c in self.calls()
        )

    def routes(self, function) -> list[str]:
        """Return the paths that a function answers, by decorator, by app.add_url_rule or as a view class's method."""
        paths = []
        for call in function.decorator_list:
            routes = isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)
            if routes and call.func.attr in ("route", "get", "post", "put"):
                paths.append(self.constant(call, "rule"))
        around = self.file.parents.get(function)
        is_method = isinstance(around, ast.ClassDef) and function.name in VERBS
        name = around.name if is_method else function.name
        for call in self.calls():
            if isinstance(call.func, ast.Attribute) and call.func.attr == "add_url_rule":
                named = [*call.args[2:3], *(k.value for k in call.keywords if k.arg == "view_func")]
                whole = (name, f"{name}.as_view") if is_method else (name,)
                if any(self.file.source(getattr(node, "func", node)) in whole for node in named):
                    paths.append(self.constant(call, "rule"))
            given = [self.file.source(node) for node in call.args[:1]]  # flask-restful's api.add_resource(Class, path)
            if is_method and given == [name] and self.file.source(call.func).endswith(".add_resource"):
                paths += [node.value for node in call.args[1:] if isinstance(node, ast.Constant)]
        return [path for path in paths if isinstance(path, str)]

    @staticmethod
    def constant(call, keyword: str) -> str:
        nodes = [*call.args[:1], *(k.value for k in call.keywords if k.arg == keyword)]
        return next((n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)), "?")

    def mentions(self, node) -> set[str]:
        names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
        return names | {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}

    def reaching(self) -> set[str]:
        """Return the names of all functions from which the model is asked in the end."""
        names = set(self.generating)
        while True:
            more = {f.name for f in self.functions() if f.name not in names and self.mentions(f) & names} - set(VERBS)
            more -= {f.name for f in self.functions() if self.is_factory(f)}
            if not more:
                return names
            names |= more

    def place_choose(self) -> None:
        names = self.reaching()
        views = [f for f in self.functions() if any("analy" in path for path in self.routes(f))]
        views = [f for f in views if self.leads(f, names - {f.name})]
        if not views:
            self.problem(None, "no view of /analyze found that leads to the model", "choose")
        for view in views:
            if isinstance(view, ast.AsyncFunctionDef):
                self.problem(view, f"{view.name} is async; the request's arm cannot be kept", "choose")
                continue
            self.choose_in(view, names - {view.name})
        self.carry_threads(names)
        for node in self.asking:
            self.wrap("generation", node, "generation")

    def choose_in(self, view, names: set[str]) -> None:
        """Insert the line before the first statement of the view that leads to the model, with the view's own names."""
        block = view.body
        while True:
            index = next((i for i, s in enumerate(block) if self.leads(s, names)), None)
            if index is None:
                self.problem(view, f"{view.name} does not say how it asks the model", "choose")
                return
            statement = block[index]
            advisor = self.variable(view, statement.lineno, "advisor")
            local = isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            loops = any(
                isinstance(node, ast.For) and "advisor" in self.file.source(node.iter) and self.leads(node, names)
                for node in ast.walk(statement)
            )
            if local or (advisor is not None and not loops):
                break
            inner = [b for b in self.blocks(statement) if any(self.leads(s, names) for s in b)]
            if not inner:
                break
            block = inner[0]
        job_id = self.variable(view, statement.lineno, "job")
        texts = {node.value for node in ast.walk(view) if isinstance(node, ast.Constant)}
        if advisor is None and not texts & {"advisor", "advisor_id"}:  # those the request is asked for at run time
            self.problem(statement, f"which variable of {view.name} holds the advisor is not clear", "choose")
            return
        if advisor is None:
            self.notes.append(f"{view.name} has no variable with the advisor: the request's field is used")
        if job_id is None:
            self.notes.append(f"{view.name} has no variable with the job's id: the request's field job_id is used")
        values = [f"{name}={value}" for name, value in (("job_id", job_id), ("advisor", advisor)) if value]
        if not self.line_before("choose", statement, f"lora_patch.choose({', '.join(values)})"):
            self.problem(statement, "shares its line with other code", "choose")

    def leads(self, node, names: set[str]) -> bool:
        """Tell whether a piece of code asks the model, itself or through one of the functions of these names."""
        return bool(self.mentions(node) & names) or any(inner in self.asking for inner in ast.walk(node))

    @staticmethod
    def blocks(statement) -> list[list]:
        handlers = [handler.body for handler in getattr(statement, "handlers", [])]
        cases = [case.body for case in getattr(statement, "cases", [])]
        return (
            [b for name in ("body", "orelse", "finalbody") if (b := getattr(statement, name, None))] + handlers + cases
        )

    def variable(self, view, before: int, kind: str) -> str | None:
        """Return the view's variable for the advisor ("advisor") or the job's id ("job"), set above line ``before``.

        That is what is read from a request field of that name, or a parameter, variable or loop's target so called.
        """
        fields = {"advisor": ("advisor", "advisorid"), "job": ("jobid", "xjobid", "analysisid")}[kind]
        read, named = None, None
        parameters = [a.arg for a in (*view.args.posonlyargs, *view.args.args, *view.args.kwonlyargs)]
        for name in parameters:
            if name.replace("_", "").lower() in fields:
                named = name
        for node in ast.walk(view):
            if isinstance(node, ast.Assign) and node.end_lineno < before:
                pairs = [pair for target in node.targets for pair in self.pairs(target, node.value)]
            elif (
                isinstance(node, ast.AnnAssign | ast.NamedExpr) and node.value is not None and node.end_lineno < before
            ):
                pairs = [(node.target, node.value)]
            elif isinstance(node, ast.For) and node.lineno < before <= node.end_lineno:
                pairs = [(node.target, node.iter)]
                if kind == "advisor" and isinstance(node.target, ast.Name) and "advisor" in self.file.source(node.iter):
                    named, read = node.target.id, None  # for one in request.form["advisors"].split(",")
            else:
                continue
            if self.file.function(node) is not view:
                continue
            for target, value in pairs:
                if isinstance(target, ast.Name):
                    if self.is_field(value, fields):
                        read = read or target.id
                    if target.id.replace("_", "").lower() in fields:
                        named = target.id
                for element in target.elts if isinstance(target, ast.Tuple) else []:
                    if isinstance(element, ast.Name) and element.id.replace("_", "").lower() in fields:
                        named = element.id
        # a field of the request is an advisor's id for sure; of the job's id the view may have made one itself
        return (read or named) if kind == "advisor" else (named or read)

    def is_field(self, value, fields: tuple[str, ...]) -> bool:
        """Tell whether a value is a request's field of one of these names, as it is or tidied (.lower())."""
        if isinstance(value, ast.BoolOp):
            return self.is_field(value.values[0], fields)
        if isinstance(value, ast.IfExp):
            return self.is_field(value.body, fields)
        key = None
        if isinstance(value, ast.Subscript):
            key = value.slice
        elif isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute):
            if value.func.attr in ("get", "pop"):
                key = value.args[0] if value.args else None
            elif value.func.attr in ("lower", "strip", "casefold", "replace"):
                return self.is_field(value.func.value, fields)
        elif isinstance(value, ast.Call) and self.file.source(value.func) == "str" and value.args:
            return self.is_field(value.args[0], fields)
        text = key.value if isinstance(key, ast.Constant) and isinstance(key.value, str) else ""
        return re.sub(r"[_-]", "", text).lower() in fields

    @staticmethod
    def pairs(target, value) -> list[tuple]:
        """Take ``a, b = x, y`` apart."""
        both = isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
        alike = both and len(target.elts) == len(value.elts)
        return list(zip(target.elts, value.elts, strict=True)) if alike else [(target, value)]

    def carry_threads(self, names: set[str]) -> None:
        """Wrap what is handed to another thread and leads to the model: the thread must know its request."""
        for call in self.calls():
            kind = self.file.source(call.func).rsplit(".", 1)[-1]
            if kind in ("Thread", "Timer"):
                handed = [k.value for k in call.keywords if k.arg in ("target", "function")] or call.args[1:2]
            elif kind in ("submit", "apply_async", "start_new_thread", "start_background_task", "spawn"):
                handed = call.args[:1]
            elif kind == "run_in_executor":
                handed = call.args[1:2]
            else:
                continue
            for node in handed:
                if self.leads(node, names):
                    self.wrap("carry", node, "carry")

    def place_start(self) -> None:
        apps = self.made_by("Flask", "create_app", "make_app", "build_app") or {"app", "application"}
        servers = ("serve", "run", "run_simple", "make_server", "WSGIServer", "serve_forever")
        runs = {}  # statement -> where the app stands in it
        for node in self.walk(ast.Attribute):  # app.run(...), or Thread(target=app.run)
            if node.attr == "run" and self.file.source(node.value) in apps:
                runs.setdefault(self.file.statement(node), node.value)
        for call in self.calls():
            if self.file.source(call.func).rsplit(".", 1)[-1] in servers:
                for node in call.args:
                    if self.file.source(node) in apps:
                        runs.setdefault(self.file.statement(call), node)
        if not runs:
            self.problem(None, "no app.run(...) found", "start")
        getter = next((f for f in self.loaders if f is not None and self.is_plain(f)), None)
        if getter is None and any(f is not None for f in self.loaders):
            self.notes.append("the model is loaded in a place that cannot be called from here: with its first request")
        more = f", {getter.name}" if getter is not None else ""
        if database := self.database():
            more += f", db_path={database}"
        for statement, app in runs.items():
            if not self.line_before("start", statement, f"lora_patch.start({self.file.source(app)}{more})"):
                self.wrap("start", app, "start", more)

    def is_plain(self, function) -> bool:
        """Tell whether a function is the module's own and can be called without arguments."""
        arguments = function.args
        required = len(arguments.posonlyargs) + len(arguments.args) - len(arguments.defaults)
        required += sum(default is None for default in arguments.kw_defaults)
        return self.file.parents[function] is self.file.tree and required == 0

    def database(self) -> str | None:
        """Return the module's variable that names the database, by its sqlite3.connect calls."""
        level = {
            t.id for s in self.file.tree.body if isinstance(s, ast.Assign) for t in s.targets if isinstance(t, ast.Name)
        }
        connects = [c for c in self.calls() if self.file.source(c.func) in ("sqlite3.connect", "connect") and c.args]
        names = [c.args[0].id for c in connects if isinstance(c.args[0], ast.Name) and c.args[0].id in level]
        return min(names, key=lambda name: not re.search("DB|DATABASE", name.upper()), default=None)

    def place_import(self) -> None:
        body = self.file.tree.body
        first_edit = min((start for start, _, _ in self.edits), default=len(self.file.text))
        last = None
        for statement in body:
            if self.file.span(statement)[1] >= first_edit:
                break
            if isinstance(statement, ast.Import | ast.ImportFrom):
                last = statement
        package = self.package()
        if package is None:
            lines = ["import lora_patch"]
        else:
            lines = ["try:", "    import lora_patch", "except ImportError:", f"    from {package} import lora_patch"]
        if last is not None:
            end = self.file.end_of_line(last.end_lineno).decode()
            if self.line_after("import", last, end.join(lines)):
                return
        documented = body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
        anchor = body[1] if documented and len(body) > 1 else body[0] if body else None
        if anchor is not None and not (isinstance(anchor, ast.ImportFrom) and anchor.module == "__future__"):
            end = self.file.end_of_line(anchor.lineno).decode()
            if self.line_before("import", anchor, end.join(lines)):
                return
        self.problem(anchor, "no place for an import found", "import")

    def package(self) -> str | None:
        """Return the dotted name of the package that the service lies in; None for a script of its own."""
        parts, folder = [], self.path.resolve().parent
        while (folder / "__init__.py").is_file():
            parts.insert(0, folder.name)
            folder = folder.parent
        return ".".join(parts) or None
