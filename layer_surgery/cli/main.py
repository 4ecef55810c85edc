"""The command line: its entry point, and what every error comes to."""

import os
import signal
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import NoReturn

try:
    import logging

    import click

    from layer_surgery import __version__
    from layer_surgery.cli import commands, stopping
    from layer_surgery.cli.common import CONTEXT
    from layer_surgery.cli.help import Program
    from layer_surgery.disk.signals import ignore_signals
    from layer_surgery.errors import LayerSurgeryError, describe, exit_code
    from layer_surgery.reporting.text import one_line
except KeyboardInterrupt:
    os.write(2, b"interrupted; nothing half-written is left.\n")
    os._exit(128 + signal.SIGINT)


def main() -> NoReturn:
    """Run the command line; exit code 2 for a mistake in what was asked, 1 for a failure."""
    debug = "--debug" in sys.argv
    _quiet_libraries(debug)
    _first_process_speaks(debug)
    stopping.stop_at_once()
    try:
        with _processes():
            code = _run()
        sys.exit(code)
    except click.ClickException as error:
        if len(sys.argv) == 1:  # the message is the help
            error.show()
        else:
            click.echo(f"error: {one_line(' '.join(error.format_message().split()))}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        stopping.end(signal.SIGINT)
    except stopping.Stopped as stopped:
        stopping.end(stopped.number)
    except LayerSurgeryError as error:
        if debug:
            raise
        click.echo(f"error: {one_line(str(error))}", err=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if debug:
            raise
        click.echo(f"error: {one_line(describe(error))} (--debug shows where)", err=True)
        sys.exit(exit_code(error))
    finally:
        ignore_signals()


@click.group(cls=Program, context_settings=CONTEXT)
@click.version_option(__version__, prog_name="layer-surgery")
def cli() -> None:
    """Make a causal language model smaller by removing its least important layers, and show what that costs.

    MODEL is a local directory or a hub name. Nothing is downloaded unless a hub name is given.
    """


for _name in ("compress", "heal", "score", "evaluate", "sweep", "report", "export", "verify", "completion"):
    cli.add_command(getattr(commands, _name))


def _run() -> int | None:
    """Run the command that was given, and return its exit code."""
    try:
        code: int | None = cli.main(standalone_mode=False, prog_name="layer-surgery")
        return code
    except click.Abort:  # what click makes of it
        raise KeyboardInterrupt from None
    except Exception:
        stopping.raise_again()
        raise


def _processes() -> AbstractContextManager[object]:
    """Return what joins the processes that a launcher has started; nothing, where there is one."""
    if os.environ.get("WORLD_SIZE", "1") in ("", "0", "1"):  # importing torch takes seconds
        return nullcontext()
    from layer_surgery import parallel

    return parallel.joined()


def _first_process_speaks(debug: bool) -> None:
    """Keep the other processes of a job silent, but for tracebacks that were asked for."""
    if os.environ.get("RANK", "0") == "0":
        return
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    if not debug:
        sys.stderr = sys.stdout


def _quiet_libraries(debug: bool) -> None:
    """Keep the libraries' own chatter off the terminal: what matters is checked here and said once."""
    if debug:
        logging.basicConfig(level=logging.INFO)
        logging.getLogger("layer_surgery").setLevel(logging.DEBUG)
        return
    no_bars = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS", "TQDM_DISABLE")  # but our own
    quiet = {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"} | dict.fromkeys(no_bars, "1")
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    chatty = ("transformers", "lm_eval", "datasets", "huggingface_hub", "matplotlib", "torchao", "torch.utils._pytree")
    for name in chatty:
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    main()
