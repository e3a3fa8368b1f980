"""Find the places for our lines in a service file by its syntax tree, and insert them; no other byte changes."""

import ast
from pathlib import Path

from .flags import NAMES
from .service_code import ServiceCode
from .service_database import jobs_databases, uses_jobs_table
from .service_workers import worker_places, workers
from .source_file import BY_HAND, Refusal, inserted, uninstalled


class Installer(ServiceCode):
    """Inserts the lines into a service file; those that it has already stay as they are.

    ``database``: the expression that names the jobs' database; None: it is looked for.
    """

    def __init__(self, raw: bytes, path: Path, database: str | None = None):
        super().__init__(raw, path)
        self.database, self.have = database, inserted(raw, path)
        self.edits: list[tuple[int, int, bytes]] = []  # (from, to, replacement); from == to inserts
        self.problems, self.missing, self.notes, self.placed = [], [], [], {}

    def problem(self, node, text: str, *keys: str) -> None:
        if keys and set(keys) <= self.have:
            return
        where = f"{self.path}:{node.lineno}" if node is not None else str(self.path)
        self.problems.append(f"{where}: {text}")
        self.missing.extend(key for key in keys if key not in self.missing)

    # editing

    def line_before(self, key: str, statement, text: str) -> bool:
        if key in self.have:
            return True
        indent, line = self.file.indent(statement), statement.lineno
        if key != "generation":  # which is a decorator itself, and the innermost
            line = min([line, *(node.lineno for node in getattr(statement, "decorator_list", []))])
        start = self.file.at(line, 0)
        if indent is None or self.file.text[start + len(indent) :].startswith(b"elif"):
            return False
        self.insert(key, start, indent + text.encode() + self.file.end_of_line(line), line)
        return True

    def line_after(self, key: str, statement, text: str) -> bool:
        if key in self.have:
            return True
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
        around = self.file.parents[node]
        if (key in self.have and key != "generation") or (
            isinstance(around, ast.Call) and self.file.source(around.func) == f"lora_patch.{call}"
        ):
            return
        start, end = self.file.span(node)
        self.edits.append((start, start, f"lora_patch.{call}(".encode()))
        self.edits.append((end, end, f"{more})".encode()))
        self.placed.setdefault(key, []).append(node.lineno)

    # the places

    def plan(self) -> bytes:
        """Return the service with the lines in it; Refusal, with everything that is not understood."""
        self.refuse_torch()
        self.refuse_own_lora()
        self.read_model_calls()
        self.place_arguments()
        self.place_attach()
        self.place_generation()
        self.place_choose()
        self.place_start()
        self.place_import()
        if self.problems:
            raise Refusal(self.problems, self.missing, {key: lines[0] for key, lines in self.placed.items()}, self.have)
        new = self.file.edited(self.edits)
        try:
            compile(new, str(self.path), "exec")
        except SyntaxError as error:  # our own error, but better said than written
            raise Refusal(
                [f"{self.path}:{error.lineno}: the lines do not fit in ({error.msg})"], list(BY_HAND)
            ) from error
        if uninstalled(new, self.path) != uninstalled(self.file.edited([]), self.path):
            raise Refusal([f"{self.path}: the lines could not be taken out again"], list(BY_HAND))
        return new

    def refuse_own_lora(self) -> None:
        """Say what to remove from a service that has flags of the same names, or loads an adapter by itself."""
        for call in self.calls():
            if not isinstance(call.func, ast.Attribute) or call.func.attr != "add_argument":
                continue
            for value in call.args:
                flag = value.value if isinstance(value, ast.Constant) and isinstance(value.value, str) else ""
                name = flag.lstrip("-").replace("-", "_")
                if f"--{name}" in NAMES:
                    uses = [node for node in self.walk(ast.Attribute) if node.attr == name]
                    lines = ", ".join(str(node.lineno) for node in sorted(uses, key=lambda node: node.lineno))
                    also = f", and what uses it in line {lines}" if lines else ""
                    self.problem(call, f"the service has a flag {flag} of its own; remove it{also}")
        for call in self.loads:
            for keyword in call.keywords:
                if keyword.arg == "adapter_path":
                    text = f"remove {self.file.source(keyword)} from this call"
                    self.problem(keyword.value, f"the service loads an adapter of its own; {text}")

    def refuse_torch(self) -> None:
        """Say of a service that runs its model with PyTorch that it cannot be served; nothing else matters then."""
        imports = [
            node
            for node in self.walk(ast.Import | ast.ImportFrom)
            for name in [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            if name.split(".")[0] in ("torch", "transformers", "peft")
        ]
        if imports and not self.mlx_names({"load", "generate", "stream_generate"}):
            line = self.file.source(imports[0]).splitlines()[0]
            raise Refusal([f"{self.path}:{imports[0].lineno}: torch, not MLX: the service runs its model with PyTorch "
                           f"({line}); adapters are served by a service that uses mlx_vlm"], [])  # fmt: skip

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
        if not known or self.loads_at_import():
            self.place_own_arguments()
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

    def loads_at_import(self) -> bool:
        """Tell whether a module of its own loads the model when it is imported: our flags must be known by then."""
        for file in self.using_modules("load"):
            code = ServiceCode(file.read_bytes(), file)
            if any(code.file.function(call) is None for call in code.loads):
                return True
            at_import = {code.file.source(c.func).split(".")[0] for c in code.calls() if code.file.function(c) is None}
            classes = {getattr(code.file.parents.get(code.file.function(call)), "name", None) for call in code.loads}
            if at_import & (classes | {code.file.function(call).name for call in code.loads}):
                return True
        return False

    def place_own_arguments(self) -> None:
        """Put the import and the flags first of all: nobody parses them here, so they are taken from sys.argv."""
        if "add_arguments" in self.have:
            return
        body = self.file.tree.body
        first = next((s for s in body if not self.is_docstring(s) and not self.is_future(s)), None)
        if first is None or self.file.indent(first) is None:
            self.problem(first, "no place for the flags found", "add_arguments")
            return
        lines = [] if "import" in self.have else self.import_lines()
        end = self.file.end_of_line(first.lineno).decode()
        self.line_before("add_arguments", first, end.join([*lines, "lora_patch.add_arguments()"]))
        if lines:
            self.placed["import"] = self.placed["add_arguments"]
        self.notes.append("the flags are taken out of the command line before the service sees it: --help omits them")

    @staticmethod
    def is_docstring(statement) -> bool:
        return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)

    @staticmethod
    def is_future(statement) -> bool:
        return isinstance(statement, ast.ImportFrom) and statement.module == "__future__"

    def place_attach(self) -> None:
        self.loaders, simple_target = [], (ast.Name, ast.Attribute, ast.Subscript)
        if not self.loads and not self.is_done_at_run_time("load", "loaded"):
            self.problem(None, "no call of mlx_vlm.load found", "attach")
        for call in self.loads:
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

    def is_done_at_run_time(self, function: str, done: str) -> bool:
        """Tell whether modules of the service's own call this function of mlx_vlm: no line is needed for that."""
        if files := self.using_modules(function):
            self.notes.append(f"the model is {done} in {', '.join(map(str, files))}: followed there at run time")
        return bool(files)

    def place_generation(self) -> None:
        if not self.asking and not self.decorable and not self.is_done_at_run_time("generate", "asked"):
            self.problem(None, "no call of mlx_vlm.generate and no run_model_mlx found", "generation")
        for function in [*self.decorable, *filter(None, map(self.file.function, self.asking))]:
            if isinstance(function, ast.AsyncFunctionDef):
                self.problem(
                    function, f"{function.name} is async; the model must be asked in a plain function", "generation"
                )
        for function in self.decorable:
            self.line_before("generation", function, "@lora_patch.generation")

    def place_choose(self) -> None:
        names = self.reaching()
        taking = workers(self, names)
        names -= taking
        places = worker_places(self, self.reaching()) if taking else []
        views = [f for f in self.functions() if any("analy" in path for path in self.routes(f))]
        views = [f for f in views if self.leads(f, names - {f.name})]
        if not views and not places:
            self.look_for_views()
        for statement, said in places:
            given = ", ".join(f"{field}={value}" for field, value in said.items())
            if not self.line_before("choose", statement, f"lora_patch.choose({given})"):
                self.problem(statement, "shares its line with other code", "choose")
        for view in views:
            if isinstance(view, ast.AsyncFunctionDef):
                self.problem(view, f"{view.name} is async; the request's arm cannot be kept", "choose")
                continue
            self.choose_in(view, names - {view.name})
        self.carry_threads(names)
        for node in self.asking:
            self.wrap("generation", node, "generation")

    def look_for_views(self) -> None:
        """Note that a module of the service's own has the view: there the request's fields are read at run time."""
        for file in self.imported_files():
            code = ServiceCode(file.read_bytes(), file)
            if any("analy" in path for function in code.functions() for path in code.routes(function)):
                self.notes.append(
                    f"the view of /analyze is in {file}: the request's fields advisor and job_id are used"
                )
                return
        self.problem(None, "no view of /analyze found that leads to the model", "choose")

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

    def carry_threads(self, names: set[str]) -> None:
        """Wrap what is handed to another thread and leads to the model: the thread must know its request."""
        for call in self.calls():
            kind = self.file.last_name(call.func)
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
        factories = {"create_app", "make_app", "build_app"} | {f.name for f in self.functions() if self.is_factory(f)}
        runs = {}  # statement -> where the app stands in it
        for node in self.walk(ast.Attribute):  # app.run(...), or Thread(target=app.run), or create_app().run(...)
            made = isinstance(node.value, ast.Call) and self.file.source(node.value.func) in factories
            if node.attr == "run" and (made or self.file.source(node.value) in apps):
                runs.setdefault(self.file.statement(node), node.value)
        for call in self.calls():
            if self.file.last_name(call.func) in servers:
                for node in call.args:
                    if self.file.source(node) in apps:
                        runs.setdefault(self.file.statement(call), node)
        if not runs:
            self.problem(None, "no app.run(...) found", "start")
        getter = next((f for f in self.loaders if f is not None and self.is_plain(f)), None)
        if getter is None and any(f is not None for f in self.loaders):
            self.notes.append("the model is loaded in a place that cannot be called from here: with its first request")
        more = f", {getter.name}" if getter is not None else ""
        if database := self.database or self.find_database():
            more += f", db_path={database}"
        for statement, app in runs.items():
            named = isinstance(app, ast.Name | ast.Attribute)
            if not named or not self.line_before(
                "start", statement, f"lora_patch.start({self.file.source(app)}{more})"
            ):
                self.wrap("start", app, "start", more)

    def find_database(self) -> str | None:
        found = jobs_databases(self)
        if len(found) > 1 or (not found and uses_jobs_table(self)):
            among = f" ({', '.join(found)})" if found else ""
            self.problem(None, f"which database holds the jobs is not clear{among}; name it with --db, by an "
                         "expression of the service (--db DB_PATH) or a path", "start")  # fmt: skip
        return found[0] if len(found) == 1 else None

    def import_lines(self) -> list[str]:
        package = self.package()
        if package is None:
            return ["import lora_patch"]
        return ["try:", "    import lora_patch", "except ImportError:", f"    from {package} import lora_patch"]

    def place_import(self) -> None:
        if "import" in self.placed:
            return
        body = self.file.tree.body
        first_edit = min((start for start, _, _ in self.edits), default=len(self.file.text))
        last = None
        for statement in body:
            if self.file.span(statement)[1] >= first_edit:
                break
            if isinstance(statement, ast.Import | ast.ImportFrom):
                last = statement
        lines = self.import_lines()
        if last is not None:
            end = self.file.end_of_line(last.end_lineno).decode()
            if self.line_after("import", last, end.join(lines)):
                return
        documented = body and self.is_docstring(body[0])
        anchor = body[1] if documented and len(body) > 1 else body[0] if body else None
        if anchor is not None and not self.is_future(anchor):
            end = self.file.end_of_line(anchor.lineno).decode()
            if self.line_before("import", anchor, end.join(lines)):
                return
        self.problem(anchor, "no place for an import found", "import")
