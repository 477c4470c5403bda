"""The help of each command: its group, an example, a page of the documentation, and the command that follows."""

from collections.abc import Callable
from typing import Any, NamedTuple

from typer.core import TyperGroup

from logitcache.cli.common import CommandResult

DOCS = "https://github.com/logitcache/logitcache/blob/main/docs"


class Command(NamedTuple):
    """A function of the command line; `page` is a file below docs/, `follows` the command that comes next."""

    function: Callable[..., CommandResult]
    group: str
    example: str
    page: str
    follows: str


def epilog(example: str, page: str, follows: str) -> str:
    """Return the lines below the options; the mark before them keeps each on its line."""
    return f"\b\nExample:  logitcache {example}\nNext:     {follows}\nMore:     {DOCS}/{page}"


class GroupedCommands(TyperGroup):
    """Commands below the headings of their groups, in the order of registration."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the sections of the help; all of one width."""
        commands = [(name, self.commands[name]) for name in self.list_commands(ctx)]
        width = max(len(name) for name, _ in commands)
        groups = dict.fromkeys(getattr(command, "rich_help_panel", None) or "Commands" for _, command in commands)
        for group in groups:
            with formatter.section(group):
                formatter.write_dl(
                    [
                        (f"{name:{width}}", command.get_short_help_str(formatter.width - width - 6))
                        for name, command in commands
                        if (getattr(command, "rich_help_panel", None) or "Commands") == group
                    ]
                )
