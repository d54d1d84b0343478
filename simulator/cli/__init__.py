"""The command line: a lazy group; each command is a module of this package.

A command `foo-bar` lives in `simulator.cli.foo_bar` and is the click command named `command`
there. Commands are imported when used, so that `simulator --help` starts fast.
"""

from __future__ import annotations

import importlib
import sys

import click

from simulator.errors import InputError, nearest

#: Commands in the order `--help` lists them, with their one-line help.
COMMANDS: dict[str, str] = {
    "run": "Simulate one training step of an experiment file.",
    "list": "List models, accelerators, topologies, schedules or frameworks.",
    "show": "Show one model, accelerator, topology, schedule or framework.",
    "collective": "Time one collective on a cluster, as nccl-tests prints it.",
    "schedule": "Study a pipeline schedule under abstract durations.",
    "sweep": "Run an experiment over lists and ranges of its keys.",
    "plan": "Find the best parallel plan for a model on a cluster.",
    "compare": "Compare two runs, or a run and a measured trace.",
    "validate": "Compare simulated with published step times.",
    "validate-kernels": "Compare the cost model with measured kernels and collectives.",
    "calibrate": "Measure this machine and write an accelerator file.",
    "import": "Import a model or a cluster from another tool's files.",
}


class LazyGroup(click.Group):
    """Imports a command's module on first use; turns `InputError` into exit code 2."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name in COMMANDS if _find_module(name)]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS or not _find_module(name):
            return None
        module = importlib.import_module(_module_name(name))
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            guess = nearest(args[0], COMMANDS)
            hint = f"; did you mean {guess!r}?" if guess else ""
            ctx.fail(f"no such command {args[0]!r}{hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name]) for name in self.list_commands(ctx)])


def _module_name(name: str) -> str:
    return f"simulator.cli.{name.replace('-', '_')}" + ("_" if name == "import" else "")


def _find_module(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(_module_name(name)) is not None


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="cluster-simulator")
def group() -> None:
    """Simulate training steps on clusters before renting them."""


def main() -> None:
    """Entry point of the `simulator` script: input errors are one message and exit code 2."""
    try:
        group(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.exceptions.Abort:
        click.echo("aborted", err=True)
        sys.exit(130)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except InputError as error:
        for line in str(error).splitlines():
            click.echo(f"error: {line}", err=True)
        sys.exit(2)
    except BrokenPipeError:
        sys.exit(141)
