"""The command line: ``batchjac doctor``, ``batchjac demo`` and ``batchjac plan``."""

import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

if TYPE_CHECKING:
    import typer

MISSING = """\
The command line of batchjac needs typer, which is not installed:

    pip install "batchjac[cli]"

Without it, `python -m batchjac.doctor` still examines the installation."""

SHOW = "Show the version and exit."
FACTORY = "module:name of an nn.Module, or of a callable without arguments that makes one."
INPUT = "The shape of one sample, such as 1,224; once for each input. 16:int64 names a dtype."
DEMO_OUT = Path("runs/demo")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line on ``arguments``, or on those of the process; always exits."""
    try:
        app = application()
    except ModuleNotFoundError as error:
        if error.name != "typer":
            raise
        sys.exit(MISSING)
    app(args=None if arguments is None else list(arguments), prog_name="batchjac")


def application() -> "typer.Typer":
    """The typer application; typer is imported here, so that `import batchjac` never loads it."""
    import typer

    app = typer.Typer(
        help="The Jacobian of every sample of a batch, with respect to its own input.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )

    def show_version(wanted: bool) -> None:
        if wanted:
            typer.echo(f"batchjac {version('batchjac')}")
            raise typer.Exit

    @app.callback()
    def top(
        version: Annotated[
            bool, typer.Option("--version", callback=show_version, is_eager=True, help=SHOW)
        ] = False,
    ) -> None:
        pass

    @app.command()
    def doctor() -> None:
        """Versions, threads, devices, kernels, and a self-check; exits 1 if a result is wrong."""
        from batchjac import doctor as examination

        raise typer.Exit(examination.run(typer.echo))

    @app.command()
    def demo(
        out: Annotated[Path, typer.Option(help="The folder the results go to.")] = DEMO_OUT,
        quick: Annotated[bool, typer.Option("--quick", help="A smaller job, to try it.")] = False,
    ) -> None:
        """Train two small models on real and planted data; show what every input matters for."""
        from batchjac.demo.extras import MissingExtraError
        from batchjac.demo.main import run

        try:
            run(out, quick)
        except MissingExtraError as error:  # names the packages and the line that installs them
            sys.exit(str(error))

    @app.command()
    def plan(
        factory: Annotated[str, typer.Argument(help=FACTORY)],
        input: Annotated[list[str], typer.Option(help=INPUT)],
        batch: Annotated[int, typer.Option(help="Samples.", min=1)] = 1,
        outputs: Annotated[int | None, typer.Option(help="Only this output.")] = None,
        mode: Annotated[str, typer.Option(help="auto, forward, reverse or mixed.")] = "auto",
        max_memory: Annotated[str | None, typer.Option(help='Such as "512MiB".')] = None,
    ) -> None:
        """How a model's Jacobian would be computed, from shapes alone; computes nothing."""
        from batchjac.errors import BatchjacError
        from batchjac.factory import FactoryError, planned

        try:
            found = planned(factory, input, batch, outputs=outputs, mode=mode, memory=max_memory)
            typer.echo(found)
        except (FactoryError, BatchjacError) as error:
            sys.exit(f"batchjac plan: {error}")

    return app
