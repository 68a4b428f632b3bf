"""The command `expert-speculation`: its verbs, how names are spelled, and what failures look like."""

import contextlib
import errno
import shlex
import sys
from typing import NoReturn

import click

from expert_speculation import __version__
from expert_speculation.verbs.collect import collect
from expert_speculation.verbs.demo import demo
from expert_speculation.verbs.evaluate import evaluate
from expert_speculation.verbs.export import export
from expert_speculation.verbs.generate import generate
from expert_speculation.verbs.import_ import import_
from expert_speculation.verbs.info import info
from expert_speculation.verbs.pack import pack
from expert_speculation.verbs.pretrain import pretrain
from expert_speculation.verbs.report import report
from expert_speculation.verbs.simulate import simulate
from expert_speculation.verbs.train import train
from expert_speculation.verbs.verify import verify
from groundwork.errors import ConfigurationError, ExpertSpeculationError
from groundwork.interrupt import raise_on_signals

INTERRUPTED = 130


class VerbGroup(click.Group):
    """A group that lists its verbs in the order of a user's work, and names them when one is unknown."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError:
            ctx.fail(f"no verb '{args[0]}'; known verbs: {', '.join(self.commands)}")


@click.group(
    cls=VerbGroup,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 110,
        "show_default": True,
        "token_normalize_func": lambda token: token.replace("-", "_"),
    },
)
@click.version_option(__version__, prog_name="expert-speculation")
def cli() -> None:
    """Trace, predict and study which experts a mixture-of-experts model needs next.

    \b
    A first tour:     expert-speculation demo
    The main job:     collect -> train -> evaluate -> simulate -> report
    Exit codes:       0 done, 1 failed while running, 2 wrong usage or input,
                      3 finished but incomplete or faulty, 130 interrupted
    """


_VERBS = (
    demo, collect, train, evaluate, simulate, report, verify, info, import_, export, pack, pretrain, generate,
)  # fmt: skip
for _verb in _VERBS:
    cli.add_command(_verb)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command and exit with DESIGN.md's codes; errors that a user can mend are one sentence on stderr."""
    arguments = sys.argv[1:] if arguments is None else arguments
    raise_on_signals()
    try:
        code = cli.main(args=arguments, prog_name="expert-speculation", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except ExpertSpeculationError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        with contextlib.suppress(OSError):  # the terminal may be what has gone
            click.echo(_how_to_go_on(arguments), err=True)
        sys.exit(INTERRUPTED)
    except OSError as error:
        if error.filename is None and error.strerror is None:
            raise
        where = f"{error.filename}: " if error.filename else ""
        refused = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
        remedy = "; give this user access to it, or name another path" if refused else ""
        click.echo(f"Error: {where}{error.strerror or error}{remedy}", err=True)
        sys.exit(ConfigurationError.exit_code if refused else ExpertSpeculationError.exit_code)
    sys.exit(code if isinstance(code, int) else 0)


def _how_to_go_on(arguments: list[str]) -> str:
    words = shlex.join(arguments)
    if arguments and arguments[0] in {"collect", "import", "train", "pretrain"}:
        resume = "" if "--resume" in arguments else " --resume"
        return f"Interrupted. Go on with: expert-speculation {words}{resume}"
    return f"Interrupted. Run it again with: expert-speculation {words}"
