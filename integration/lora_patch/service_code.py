"""What a service file says: its routes, its functions, where it loads the model and asks it, by the syntax tree."""

import ast
import functools
import re
from pathlib import Path

from .source_file import SourceFile, parameters

VERBS = ("get", "post", "put")  # methods of a view class; too common as names to follow by name
MOST_FILES = 60  # modules of the service's own that are followed


class ServiceCode:
    """A service file, read; `read_model_calls` says where it loads the model and asks it."""

    def __init__(self, raw: bytes, path: Path):
        self.path, self.file = path, SourceFile(raw, path)
        self.asking: list = []  # nodes that stand for mlx_vlm.generate or stream_generate
        self.decorable: list = []  # functions that answer in their place where there are none
        self.generating: set[str] = set()  # names of the functions around them
        self.loads = self.calls_of({"load"})

    def read_model_calls(self) -> None:
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
        answers = [f for f in self.functions() if f.name == "run_model_mlx"]
        self.decorable = answers if not self.asking and not self.using_modules("generate") else []
        self.generating = {f.name for f in self.decorable}
        self.generating |= {f.name for n in self.asking if (f := self.file.function(n))}
        self.generating -= set(VERBS)

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
            if isinstance(node.value, ast.Call) and self.file.last_name(node.value.func) in makers:
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
        for node in self.walk(ast.Assign):  # vlm = importlib.import_module("mlx_vlm")
            made = isinstance(node.value, ast.Call) and re.search(
                r"(import_module|__import__)$", self.file.source(node.value.func)
            )
            if made and self.constant(node.value, "name") == "mlx_vlm":
                names.update(f"{self.file.source(target)}.{name}" for target in node.targets for name in wanted)
        return names

    def calls_of(self, wanted: set[str]) -> list:
        names = self.mlx_names(wanted)
        return [call for call in self.calls() if self.file.source(call.func).replace(" ", "") in names]

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
        in_class = isinstance(around, ast.ClassDef)
        is_method = in_class and function.name in VERBS
        name = around.name if is_method else function.name
        for call in self.calls():
            if isinstance(call.func, ast.Attribute) and call.func.attr == "add_url_rule":
                named = [*call.args[2:3], *(k.value for k in call.keywords if k.arg == "view_func")]
                whole = (name, f"{name}.as_view") if is_method else (f"self.{name}",) if in_class else (name,)
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
        names = self.generating | self.leading_imports()
        while True:
            more = {f.name for f in self.functions() if f.name not in names and self.mentions(f) & names} - set(VERBS)
            more -= {f.name for f in self.functions() if self.is_factory(f)}
            if "__call__" in more:  # backend = Backend(); backend(prompt)
                callable_ = [self.file.parents[f] for f in self.functions() if f.name == "__call__"]
                more |= self.made_by(*(around.name for around in callable_ if isinstance(around, ast.ClassDef)))
            if not more:
                return names
            names |= more

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
        for name in parameters(view):
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
        # a request's field surely is the advisor's id; the job's id may be the view's own
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

    def is_plain(self, function) -> bool:
        """Tell whether a function is the module's own and can be called without arguments."""
        arguments = function.args
        required = len(arguments.posonlyargs) + len(arguments.args) - len(arguments.defaults)
        required += sum(default is None for default in arguments.kw_defaults)
        return self.file.parents[function] is self.file.tree and required == 0

    def package(self) -> str | None:
        """Return the dotted name of the package that contains the service; None for a script of its own."""
        parts, folder = [], self.path.resolve().parent
        while (folder / "__init__.py").is_file():
            parts.insert(0, folder.name)
            folder = folder.parent
        return ".".join(parts) or None

    # the service's own modules

    def leading_imports(self) -> set[str]:
        """Return the names that the file imports from modules of its own that ask the model, however far behind."""
        return {
            alias.asname or alias.name.split(".")[0]
            for alias, files in self.imports()
            if any(self.asks_model(file) for file in self.closure(files))
        }

    def imports(self) -> list[tuple]:
        """Return (name imported, files of the service's own that it may mean) of each import."""
        found = []
        for node in self.walk(ast.Import | ast.ImportFrom):
            module = "." * getattr(node, "level", 0) + (getattr(node, "module", None) or "")
            for alias in node.names:
                inner = f"{module}{'' if module.endswith('.') else '.'}{alias.name}" if module else alias.name
                files = self.own_modules(self.path, module) if module else []
                found.append((alias, [*files, *self.own_modules(self.path, inner)]))
        return found

    def imported_files(self) -> list[Path]:
        """Return the modules of the service's own that it imports, however far behind."""
        return self.closure([file for _, files in self.imports() for file in files])

    def using_modules(self, function: str) -> list[Path]:
        """Return those among them that use this function of mlx_vlm (or stream_generate, for generate)."""
        texts = ((file, self.text_of(file)) for file in self.imported_files())
        return [f for f, text in texts if re.search(r"\bmlx_vlm\b", text) and re.search(rf"(\b|_){function}\b", text)]

    @staticmethod
    def own_modules(importer: Path, module: str) -> list[Path]:
        """Return the files that an import may mean: beside the importing file, or below a folder above it."""
        level = len(module) - len(module.lstrip("."))
        folder = importer.resolve().parent
        folders = [[folder, *folder.parents][level - 1]] if level else [folder, *list(folder.parents)[:3]]
        parts = [part for part in module.lstrip(".").split(".") if part]
        found = []
        for base in folders:
            target = base.joinpath(*parts)
            for file in (target.with_suffix(".py") if parts else target, target / "__init__.py"):
                if file.is_file():
                    found.append(file)
        return found

    def closure(self, files: list[Path]) -> list[Path]:
        """Return modules of the service's own with those that they import, and the neighbours in their package."""
        seen: list[Path] = []
        while files and len(seen) < MOST_FILES:
            file, *files = files
            if file in seen or file == self.path.resolve() or "lora_patch" in file.parts:
                continue
            seen.append(file)
            if (file.parent / "__init__.py").is_file() and file.parent != self.path.resolve().parent:
                files += sorted(file.parent.glob("*.py"))
            for level, module in re.findall(r"^\s*(?:from|import)\s+(\.*)([\w.]*)", self.text_of(file), re.M):
                files += self.own_modules(file, level + module)
        return seen

    def asks_model(self, file: Path) -> bool:
        names = "|".join(sorted(map(re.escape, self.generating)))
        text = self.text_of(file)
        return bool(names and re.search(rf"\b({names})\b", text)) or bool(re.search(r"\bmlx_vlm\b", text))

    @staticmethod
    @functools.cache
    def text_of(file: Path) -> str:
        try:
            return file.read_text(encoding="utf-8", errors="replace")[: 1 << 20]
        except OSError:
            return ""
