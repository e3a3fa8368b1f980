"""Self-contained pages by Jinja templates: photographs inside the page, everything in HTML escaped."""

import base64
import io
import json
from pathlib import Path

from common.files import write_text
from integration.lora_patch.photo import load_photo


def embedded(path: str | Path, side: int, quality: int = 75) -> str:
    """Return a photograph as a JPEG in a data: URL, its long side at most ``side`` pixels. PhotoError if unreadable."""
    buffer = io.BytesIO()
    load_photo(path, side).save(buffer, "JPEG", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def write_page(path: Path, template: Path, **values: object) -> None:
    """Fill a Jinja template (.html.j2 or .md.j2) and write the page, atomically. A missing value is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(template.parent),
        autoescape=template.name.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["json"] = lambda value: json.dumps(value, ensure_ascii=False)
    write_text(path, environment.get_template(template.name).render(**values))
