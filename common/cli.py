"""Command-line habits that all scripts share."""

import click

from common.errors import UserError
from integration.lora_patch.errors import LoraError


class ScriptCommand(click.Command):
    """A click command that takes every option with underscores, as documented, or with hyphens."""

    def __init__(self, *args, **kwargs):
        kwargs.setdefault("context_settings", {}).setdefault("help_option_names", ["-h", "--help"])
        super().__init__(*args, **kwargs)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, [self._documented(arg) for arg in args])

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except LoraError as error:  # the serving package knows no click
            raise UserError(str(error)) from error

    def _documented(self, arg: str) -> str:
        """Spell ``--foo-bar[=value]`` as the declared ``--foo_bar[=value]``; leave everything else alone."""
        if not arg.startswith("--"):
            return arg
        flag, equals, value = arg.partition("=")
        spelled = "--" + flag[2:].replace("-", "_")
        declared = {opt for param in self.params for opt in (*param.opts, *param.secondary_opts)}
        return spelled + equals + value if flag not in declared and spelled in declared else arg


def print_settings(title: str, settings: dict[str, object], ctx: click.Context | None = None) -> None:
    """Print the resolved settings before work starts, and where each came from if not from the command line."""
    ctx = ctx or click.get_current_context(silent=True)
    width = max(map(len, settings), default=0)
    click.echo(title)
    for name, value in settings.items():
        source = ctx.get_parameter_source(name) if ctx else None
        mark = "  (default)" if source is click.core.ParameterSource.DEFAULT else ""
        click.echo(f"  {name:<{width}}  {value}{mark}")
