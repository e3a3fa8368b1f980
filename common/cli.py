"""Command-line habits that all scripts share: spelling of options, help in groups, configuration files, next steps."""

import difflib
import errno
import functools
import inspect
import os
import re
import shlex
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import click
from click.core import ParameterSource

from common.errors import UserError
from common.files import write_text
from common.tables import paragraph
from integration.lora_patch.errors import LoraError

# Set by the Makefile: the variables that its user gave, as typed. Messages then name make's variables.
MAKE_VARIABLES = "MONDRIAN_MAKE_VARIABLES"
IN_ROUND = "MONDRIAN_IN_ROUND"  # set where a script is one phase of a round, which takes the next step itself
MAKE_NAMES = {
    "--advisor": "ADVISOR=",
    "--base_model": "BASE_MODEL=",
    "--db_path": "MONDRIAN=",
    "--hosts": "HOSTS=",
    "--source_dir": "MONDRIAN=",
    "--version": "VERSION=",
}
VERBOSE = "common.cli.verbose"  # key in Context.meta
PATH = click.Path(path_type=Path)

option = functools.partial(click.option, show_default=True)


def option_group(title: str) -> Callable:
    """Put the options below this decorator, down to the next one, under ``title`` in ``--help``."""

    def mark(function: Callable) -> Callable:
        groups = function.__dict__.setdefault("option_groups", {})
        for param in function.__dict__.get("__click_params__", []):
            groups.setdefault(param.name, title)
        return function

    return mark


class ScriptCommand(click.Command):
    """A click command that takes options with underscores, as documented, or with hyphens, and lists them in groups.

    Indented paragraphs of ``help`` are examples and keep their lines. Errors of the serving package and Ctrl-C end
    in one line.
    """

    def __init__(self, *args, **kwargs):
        habits = {
            "help_option_names": ["-h", "--help"],
            "max_content_width": 100,
            "token_normalize_func": lambda token: token.replace("-", "_"),
        }
        kwargs["context_settings"] = habits | kwargs.get("context_settings", {})
        kwargs["help"] = re.sub(r"\n\n( +)", r"\n\n\b\n\1", inspect.cleandoc(kwargs.get("help") or ""))
        self.groups = dict(getattr(kwargs.get("callback"), "option_groups", {}))
        super().__init__(*args, **kwargs)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        records = defaultdict(list)
        for param in self.get_params(ctx):
            if record := param.get_help_record(ctx):
                records[self.groups.get(param.name, "Options")].append(record)
        for title, rows in records.items():
            with formatter.section(title):
                formatter.write_dl(rows)

    def invoke(self, ctx: click.Context) -> object:
        for param in self.params:  # click takes nan for a number in any range, and whole numbers of any length
            value = ctx.params.get(param.name)
            if isinstance(value, int | float) and not abs(value) < 2**63:
                raise click.BadParameter(f"{value} is no number that can be used.", ctx, param)
        try:
            return super().invoke(ctx)
        except LoraError as error:  # the serving package knows no click
            raise UserError(_in_makes_words(str(error))) from error
        except UserError as error:
            error.message = _in_makes_words(error.message)
            raise
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            raise UserError(f"{str(error.filename)[:60]}...: longer than a path can be; name another") from error
        except UnicodeEncodeError as error:
            if not re.search(r"[\udc80-\udcff]", error.object):
                raise
            name = error.object.encode("utf-8", "backslashreplace").decode()[:200]
            raise UserError(f"{name}: no UTF-8 text; rename the folder or file") from error
        except KeyboardInterrupt:
            click.echo("Interrupted", err=True)
            ctx.exit(130)


class PhaseCommand(ScriptCommand):
    """One of the four scripts: takes its options from ``--config FILE.yaml`` too, and has ``--verbose``."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.params += [
            click.Option(
                ["--config"],
                type=click.Path(path_type=Path),
                is_eager=True,
                expose_value=False,
                callback=_take_config,
                help="YAML file with options by name; the command line wins",
            ),
            click.Option(
                ["--verbose"],
                is_flag=True,
                expose_value=False,
                callback=lambda ctx, _, value: ctx.meta.update({VERBOSE: value}),
                help="list every setting",
            ),
        ]
        self.groups |= dict.fromkeys(("config", "verbose"), "Output")


# -- configuration files ----------------------------------------------------------------------------------------------


def _take_config(ctx: click.Context, _: click.Parameter, path: Path | None) -> None:
    """Make the values of a YAML file the options' defaults. UserError names the file and what is wrong in it."""
    if path is None:
        return
    options = {_spelled(param): param for param in ctx.command.params if param.name != "config"}
    defaults = {}
    for key, value in _read_yaml(path).items():
        name = key.lstrip("-").replace("-", "_")
        if name not in options:
            near = difflib.get_close_matches(name, options, 1)
            raise UserError(f"{path}: unknown option {key!r}" + (f"; did you mean {near[0]}?" if near else ""))
        if value in ("", "null", "~"):
            continue
        param = options[name]
        if param.multiple and isinstance(value, str):
            value = [value]
        try:
            if not isinstance(value, list if param.multiple else str):
                raise click.BadParameter("a list is not expected" if isinstance(value, list) else "a value is expected")
            param.type_cast_value(ctx, value)
        except click.BadParameter as error:
            raise UserError(f"{path}: {key}: {error.message}") from error
        defaults[param.name] = value
    ctx.default_map = {**(ctx.default_map or {}), **defaults}


def _read_yaml(path: Path) -> dict[str, object]:
    import yaml  # most runs need none

    try:
        # every value as text, which the option's own type reads: YAML alone takes "on" for true and 1e-4 for a text
        values = yaml.load(path.read_text(encoding="utf-8"), yaml.BaseLoader) or {}
    except yaml.YAMLError as error:
        line = getattr(getattr(error, "problem_mark", None), "line", 0) + 1
        raise UserError(f"{path}:{line}: not valid YAML ({getattr(error, 'problem', None) or 'damaged'})") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); name a YAML file") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: lines of the form OPTION: VALUE are expected")
    return values


def write_config(path: Path, leave_out: tuple[str, ...] = ()) -> None:
    """Write the running command's options as YAML that ``--config`` takes; ``leave_out``: names not to repeat."""
    import yaml

    ctx = click.get_current_context()
    values = {_spelled(param): ctx.params.get(param.name) for param in ctx.command.params}
    plain = {
        name: [str(part) for part in value]
        if isinstance(value, tuple)
        else str(value)
        if isinstance(value, Path)
        else value
        for name, value in values.items()
        if value not in (None, ()) and name not in leave_out
    }
    head = f"# The options of this run; {ctx.info_name} --config takes this file.\n"
    write_text(path, head + yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))


def _spelled(param: click.Parameter) -> str:
    """Return an option's documented name, without its hyphens."""
    return max(param.opts, key=len).lstrip("-")


def given_options(ctx: click.Context) -> set[str]:
    """Return the names of the parameters that the user gave, on the command line or in ``--config``."""
    sources = (ParameterSource.COMMANDLINE, ParameterSource.DEFAULT_MAP)
    return {name for name in ctx.params if ctx.get_parameter_source(name) in sources}


# -- what a person reads ----------------------------------------------------------------------------------------------


def print_settings(title: str, settings: dict[str, object], ctx: click.Context | None = None) -> None:
    """Print the settings that the user gave, in a line or two; with ``--verbose`` all of them, a line each."""
    ctx = ctx or click.get_current_context(silent=True)
    given = {name for name in settings if ctx and ctx.get_parameter_source(name) is not ParameterSource.DEFAULT}
    if ctx and not ctx.meta.get(VERBOSE):
        told = ", ".join(f"{name} {_told(settings[name])}" for name in settings if name in given)
        click.echo(paragraph(f"{title}: {told or 'every setting at its default'}", hang="  "))
        return
    click.echo(title)
    width = max(map(len, settings), default=0)
    for name, value in settings.items():
        click.echo(f"  {name:<{width}}  {_told(value)}" + ("" if name in given else "  (default)"))


def _told(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def next_step(made: str, command: str, target: str | None = None) -> None:
    """Print what a phase made, and the next command: ``make target`` where make runs the script, else ``command``.

    Inside a round no command is printed: the round goes on by itself.
    """
    if os.environ.get(IN_ROUND):
        if made:
            click.echo(made)
        return
    variables = os.environ.get(MAKE_VARIABLES)
    if variables is not None and target:
        command = f"make {target} {variables}".strip()
    click.echo(f"{made}\nNext:\n  {command}")


def command_line(*words: object) -> str:
    """Return words as one command that a shell takes, for `next_step`."""
    return shlex.join(map(str, words))


def _in_makes_words(message: str) -> str:
    """Name make's variables instead of options, where make runs the script."""
    if os.environ.get(MAKE_VARIABLES) is None:
        return message
    return re.sub(r"--[a-z_]+", lambda flag: MAKE_NAMES.get(flag[0], flag[0]), message)
