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
        """Return the white space before a node, None when something else stands before it on its line."""
        before = self.lines[node.lineno - 1][: node.col_offset]
        return before if not before.strip() else None

    def end_of_line(self, line: int) -> bytes:
        return b"\r\n" if self.lines[line - 1].endswith(b"\r\n") else b"\n"

    def statement(self, node):
        while not isinstance(node, ast.stmt):
            node = self.parents[node]
        return node

    def function(self, node):
        """Return the innermost function around a node, or None."""
        node = self.parents.get(node)
        while node is not None and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node = self.parents.get(node)
        return node

    def encode(self, text: bytes) -> bytes:
        return self.bom + text.decode().encode(self.encoding)


def uninstalled(raw: bytes, path: Path) -> bytes:
    """Return a service file without our lines, whatever else was changed in it since."""
    file = SourceFile(raw, path)
    edits = []

    def ours(node, *names) -> bool:
        return (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "lora_patch"
            and (not names or node.attr in names)
        )

    def drop_lines(first: int, last: int) -> None:
        edits.append((file.starts[first - 1], file.starts[last], b""))

    dropped = set()
    for node in ast.walk(file.tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if names == ["lora_patch"]:
            around = file.parents[node]
            if isinstance(around, ast.ExceptHandler):
                continue
            node = around if isinstance(around, ast.Try) else node
            drop_lines(node.lineno, node.end_lineno)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and ours(node.value.func):
            drop_lines(node.lineno, node.end_lineno)
            dropped.add(node.value)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for decorator in node.decorator_list:
                if ours(decorator, "generation"):
                    drop_lines(decorator.lineno, decorator.end_lineno)
        elif isinstance(node, ast.Call) and ours(node.func) and node not in dropped and node.args:
            (start, end), (inner, inner_end) = file.span(node), file.span(node.args[0])
            edits.append((start, inner, b""))
            edits.append((inner_end, end, b""))
    text = file.text
    for start, end, new in sorted(edits, reverse=True):
        text = text[:start] + new + text[end:]
    return file.encode(text)


def inserted(raw: bytes, path: Path) -> set[str]:
    """Return which of our lines a file has (keys of BY_HAND)."""
    tree = SourceFile(raw, path).tree
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom) and any(alias.name == "lora_patch" for alias in node.names):
            found.add("import")
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "lora_patch":
            found.add(node.attr)
    return found & set(BY_HAND)
