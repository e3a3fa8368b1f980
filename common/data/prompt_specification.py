"""The prompt that training data are prepared for, and what an answer to it must look like.

prompt = service_prompt("ansel", [Path("mondrian.db")], None, None)
target = make_target(prompt.text, None)
"""

from dataclasses import dataclass
from pathlib import Path

from common.data.database import open_database
from common.data.quality import Target, placeholders_of
from common.errors import UserError
from integration.lora_patch.prompts import DEFAULT_SYSTEM_PROMPT, build_prompt, demands_html, read_specification


@dataclass(frozen=True)
class Prompt:
    """The service's prompt for an advisor, and where it came from."""

    text: str
    source: str
    warnings: tuple[str, ...] = ()


def service_prompt(advisor: str, databases: list[Path], system_file: Path | None, prompts_db: Path | None) -> Prompt:
    """Return the prompt that the service would send, from the newest database that has a JSON system prompt.

    A database of the HTML era gets the built-in JSON system prompt in its place, with a warning.
    """
    places = [prompts_db] if prompts_db else databases
    if not places:
        raise UserError("the manifest names no database; say where the prompts are with --prompts_db")
    found = []
    for path in places:
        if not path.exists():
            raise UserError(f"{path}: no such database; name another with --prompts_db")
        with open_database(path) as database:
            found.append((path, database.prompts(advisor)))
    usable = [(path, prompts) for path, prompts in found if prompts.advisor_prompt]
    if not usable:
        names = ", ".join(map(str, places))
        raise UserError(f"{names}: no prompt of {advisor!r} in table advisors; name a database with --prompts_db")
    if system_file:
        try:
            system = system_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{system_file}: cannot be read as UTF-8 text ({error})") from error
        path, prompts = usable[0]
        return Prompt(build_prompt(system, advisor, prompts.advisor_prompt), f"{system_file}, advisor from {path}")
    for path, prompts in usable:
        if prompts.system_prompt and not demands_html(prompts.system_prompt):
            return Prompt(build_prompt(prompts.system_prompt, advisor, prompts.advisor_prompt), str(path))
    path, prompts = usable[0]
    what = "demands HTML" if prompts.system_prompt else "is missing"
    warning = (
        f"the system prompt in {path} {what}: the project's own JSON system prompt takes its place; name another with "
        "--system_prompt FILE or --prompts_db OTHER.db"
    )
    text = build_prompt(DEFAULT_SYSTEM_PROMPT, advisor, prompts.advisor_prompt)
    return Prompt(text, f"built-in system prompt, advisor from {path}", (warning,))


def make_target(prompt: str, dimensions: str | None, score_range: str | None = None) -> Target:
    """Return what responses must look like: what the prompt demands, or what --dimensions and --score_range say."""
    return Target(read_specification(prompt, dimensions, score_range), placeholders_of(prompt))
