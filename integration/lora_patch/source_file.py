"""A Python source as bytes and syntax tree, and what our lines in a service file look like."""

import ast
import io
import re
import tokenize
from pathlib import Path

from .errors import LoraError, one_line

BY_HAND = {
    "import": "with the other imports:                import lora_patch",
    "add_arguments": "before parser.parse_args():            lora_patch.add_arguments(parser)",
    "attach": "after model, processor = load(NAME):   lora_patch.attach((model, processor), NAME)",
    "generation": "where mlx_vlm.generate(...) is called: lora_patch.generation(mlx_vlm.generate)(...)",
    "choose": "in /analyze, before run_model_mlx():   lora_patch.choose(job_id=job_id, advisor=advisor)",
    "start": "before app.run(...):                   lora_patch.start(app, get_mlx_model)",
}


class Refusal(LoraError):
    """The service file is not understood; ``missing`` names the lines (keys of BY_HAND) that have no place yet.

    ``placed``: the line numbers of those that have one; ``have``: those that are there already.
    """

    def __init__(self, problems: list[str], missing: list[str], placed: dict | None = None, have: set | None = None):
        super().__init__("; ".join(problems))
        self.problems, self.missing, self.placed, self.have = problems, missing, placed or {}, have or set()

    def by_hand(self) -> list[str]:
        """Return all six lines with what is known of their places; [] where adding them would not help."""
        if not self.missing:
            return []
        known = {key: f"  (before line {line})" for key, line in self.placed.items()}
        known |= dict.fromkeys(self.have, "  (there already)")
        return [f"{text}{known.get(key, '')}" for key, text in BY_HAND.items()]


class SourceFile:
    """A Python source: its bytes, its syntax tree, and where in the bytes a node of the tree stands."""

    def __init__(self, raw: bytes, path: Path):
        try:
            encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
            self.bom = b"\xef\xbb\xbf" if encoding == "utf-8-sig" else b""
            self.encoding = "utf-8" if self.bom else encoding
            self.text = raw[len(self.bom) :].decode(self.encoding).encode()  # what the tree's columns count
            self.tree = ast.parse(raw)
        except (SyntaxError, UnicodeDecodeError, LookupError, ValueError) as error:
            line = f":{error.lineno}" if getattr(error, "lineno", None) else ""
            raise Refusal([f"{path}{line}: not valid Python ({one_line(error)})"], []) from error
        if re.search(rb"\r(?!\n)", self.text):
            raise Refusal([f"{path}: lines end in a bare carriage return; convert the line ends first"], [])
        self.lines = re.findall(rb"[^\n]*\n|[^\n]+", self.text)  # not splitlines: a form feed ends no line
        self.starts = [0]
        for line in self.lines:
            self.starts.append(self.starts[-1] + len(line))
        self.nodes = list(ast.walk(self.tree))
        self.parents = {child: node for node in self.nodes for child in ast.iter_child_nodes(node)}

    def at(self, line: int, column: int) -> int:
        return self.starts[line - 1] + column

    def span(self, node) -> tuple[int, int]:
        return self.at(node.lineno, node.col_offset), self.at(node.end_lineno, node.end_col_offset)

    def source(self, node) -> str:
        start, end = self.span(node)
        return self.text[start:end].decode()

    def indent(self, node) -> bytes | None:
        """Return the white space before a node, None when something else precedes it on its line."""
        before = self.lines[node.lineno - 1][: node.col_offset]
        return before if not before.strip() else None

    def end_of_line(self, line: int) -> bytes:
        return b"\r\n" if self.lines[line - 1].endswith(b"\r\n") else b"\n"

    def statement(self, node):
        while not isinstance(node, ast.stmt):
            node = self.parents[node]
        return node

    def last_name(self, node) -> str:
        """Return the name that a function is called by, without its prefix: Flask of flask.Flask."""
        return self.source(node).rsplit(".", 1)[-1]

    def function(self, node):
        """Return the innermost function around a node, or None."""
        node = self.parents.get(node)
        while node is not None and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node = self.parents.get(node)
        return node

    def edited(self, edits: list[tuple[int, int, bytes]]) -> bytes:
        """Return the source with edits (from, to, replacement); those at one place in their order."""
        text = self.text
        for start, end, new in reversed(sorted(edits, key=lambda edit: edit[0])):
            text = text[:start] + new + text[end:]
        return self.bom + text.decode().encode(self.encoding)


def parameters(function) -> list[str]:
    """Return the names of a function's parameters, *args and **kwargs left out."""
    arguments = function.args
    return [one.arg for one in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]


def uninstalled(raw: bytes, path: Path) -> bytes:
    """Return a service file without our lines, whatever else was changed in it since."""
    file = SourceFile(raw, path)
    edits, lines, dropped = [], [], set()  # lines: nodes whose whole lines go
    for node in file.nodes:
        if isinstance(node, ast.Import | ast.ImportFrom) and [alias.name for alias in node.names] == ["lora_patch"]:
            around = file.parents[node]
            if not isinstance(around, ast.ExceptHandler):
                lines.append(around if isinstance(around, ast.Try) else node)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and _is_ours(node.value.func):
            lines.append(node)
            dropped.add(node.value)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines += [one for one in node.decorator_list if _is_ours(one) and one.attr == "generation"]
        elif isinstance(node, ast.Call) and _is_ours(node.func) and node not in dropped and node.args:
            (start, end), (inner, inner_end) = file.span(node), file.span(node.args[0])
            edits += [(start, inner, b""), (inner_end, end, b"")]
    edits += [(file.starts[node.lineno - 1], file.starts[node.end_lineno], b"") for node in lines]
    return file.edited(edits)


def inserted(raw: bytes, path: Path) -> set[str]:
    """Return which of our lines a file has (keys of BY_HAND)."""
    found = set()
    for node in SourceFile(raw, path).nodes:
        if isinstance(node, ast.Import | ast.ImportFrom) and any(alias.name == "lora_patch" for alias in node.names):
            found.add("import")
        if _is_ours(node):
            found.add(node.attr)
    return found & set(BY_HAND)


def _is_ours(node) -> bool:
    """Tell whether a node is lora_patch.NAME."""
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "lora_patch"
