"""Services whose view only puts a job into a queue: which function takes it out, and what the job says there."""

import ast

from .service_code import ServiceCode

FIELDS = {  # names of what a job says, most telling first; without signs, as `names_of` compares them
    "job_id": ("jobid", "analysisid", "requestid", "id"),
    "advisor": ("advisor", "advisorid"),
    "mode": ("mode", "analysismode"),
}


def worker_places(code: ServiceCode, names: set[str]) -> list[tuple]:
    """Return (statement, {"job_id", "advisor", "mode": expression}) for each place where a worker asks the model.

    A worker is a function with a loop that takes jobs from somewhere and leads to the model, which no view calls.
    The place is the first on the way to the model where the job's advisor has a name.
    """
    places = []
    for function in code.functions():
        if _takes_jobs(code, function, names) and not code.routes(function):
            place = _place(code, function, names, [])
            if place is not None and place[0] not in [statement for statement, _ in places]:
                places.append(place)
    return places


def workers(code: ServiceCode, names: set[str]) -> set[str]:
    """Return the names of the functions that take jobs from somewhere, and of the classes that are such threads."""
    found = set()
    for function in code.functions():
        if _takes_jobs(code, function, names):
            found.add(function.name)
            around = code.file.parents[function]
            if isinstance(around, ast.ClassDef):
                found.add(around.name)
    return found


def _takes_jobs(code: ServiceCode, function, names: set[str]) -> bool:
    for loop in ast.walk(function):
        endless = isinstance(loop, ast.While) or (
            isinstance(loop, ast.For) and isinstance(loop.iter, ast.Call) and code.file.source(loop.iter.func) == "iter"
        )
        if endless and code.file.function(loop) is function and code.leads(loop, names - {function.name}):
            return True
    return False


def _place(code: ServiceCode, function, names: set[str], seen: list) -> tuple | None:
    if function in seen:
        return None
    seen.append(function)
    statement = _innermost(code, function.body, names - {function.name})
    if statement is None:
        return None
    advisor = code.variable(function, statement.lineno, "advisor") or _expression(code, function, "advisor")
    if advisor is not None:
        said = {"job_id": code.variable(function, statement.lineno, "job"), "advisor": advisor}
        for field in ("job_id", "mode"):
            said[field] = said.get(field) or _expression(code, function, field)
        if said["mode"] is None and _has_parameter(function, "mode"):
            said["mode"] = "mode"
        return statement, {field: said[field] for field in FIELDS if said.get(field)}
    led_to = code.mentions(statement) & names
    for inner in code.functions():
        if inner.name in led_to and (place := _place(code, inner, names, seen)) is not None:
            return place
    return None


def _has_parameter(function, name: str) -> bool:
    return name in [a.arg for a in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]


def _innermost(code: ServiceCode, block: list, names: set[str]):
    """Return the innermost statement that leads to the model first."""
    found = None
    while (statement := next((s for s in block if code.leads(s, names)), None)) is not None:
        found = statement
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            break
        block = next((b for b in code.blocks(statement) if any(code.leads(s, names) for s in b)), [])
    return found


def _expression(code: ServiceCode, function, field: str) -> str | None:
    """Return how the function may say a field of its job: job["advisor"], job.advisor; None where nothing tells.

    The job is a variable whose advisor the function reads, and its other fields are known by how they are read
    elsewhere under the same name, by the dictionary that makes it, or by the class that it is of.
    """
    for node in ast.walk(function):
        if isinstance(node, ast.Subscript | ast.Attribute | ast.Call) and _key(node) in FIELDS["advisor"]:
            name, form = _root(node), type(node)
            if name is None or (form is ast.Call and not _is_get(node)):
                continue
            key = _name_of(code, name, form, field)
            if key is None:
                return None
            return f"{name}.{key}" if form is ast.Attribute else f"{name}[{key!r}]" if form is ast.Subscript else (
                f"{name}.get({key!r})"
            )  # fmt: skip
    return None


def _is_get(node) -> bool:
    return isinstance(node.func, ast.Attribute) and node.func.attr == "get" and bool(node.args)


def _key(node) -> str | None:
    """Return the field that ``job["advisor"]``, ``job.advisor`` or ``job.get("advisor")`` reads, without signs."""
    value = _plain_key(node)
    return value.replace("_", "").replace("-", "").lower() if value else None


def _plain_key(node) -> str | None:
    if isinstance(node, ast.Attribute):
        return node.attr
    key = node.slice if isinstance(node, ast.Subscript) else node.args[0] if _is_get(node) else None
    return key.value if isinstance(key, ast.Constant) and isinstance(key.value, str) else None


def _root(node) -> str | None:
    value = node.func.value if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else (
        getattr(node, "value", None)
    )  # fmt: skip
    return value.id if isinstance(value, ast.Name) and value.id not in ("self", "request", "args") else None


def _name_of(code: ServiceCode, name: str, form: type, field: str) -> str | None:
    """Return how jobs spell a field: by what is read of them under this name, else by what makes them."""
    read = [
        _plain_key(node) for node in code.walk(form) if _root(node) == name and (form is not ast.Call or _is_get(node))
    ]
    made = []
    if form is ast.Attribute:
        for node in code.walk(ast.ClassDef):
            own = [s.target.id for s in node.body if isinstance(s, ast.AnnAssign) and isinstance(s.target, ast.Name)]
            made += own if any(_plain(key) in FIELDS["advisor"] for key in own) else []
    else:
        for node in code.walk(ast.Dict):
            own = [k.value for k in node.keys if isinstance(k, ast.Constant) and isinstance(k.value, str)]
            answers = isinstance(code.file.statement(node), ast.Return)  # what a view answers is no job
            made += own if not answers and any(_plain(key) in FIELDS["advisor"] for key in own) else []
    found = ((key, wanted) for known in (read, made) for wanted in FIELDS[field] for key in known if key is not None)
    return next((key for key, wanted in found if _plain(key) == wanted), None)


def _plain(key: str) -> str:
    return key.replace("_", "").replace("-", "").lower()
