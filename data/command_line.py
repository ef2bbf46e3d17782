"""How the sub-commands of `herdkit` are declared, wherever they live."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any


def add_command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], None],
    help: str,
    examples: Sequence[str],
    *,
    details: str = "",
    **defaults: Any,
) -> argparse.ArgumentParser:
    """Adds a sub-command to the sub-parsers of a parser.

    Args:
        run: what it does; called with the options.
        help: a sentence or two.
        examples: command lines.
        details: follow the sentence in the command's own help.
        defaults: of the options, such as `interrupted`, what is said when it is interrupted.
    """
    parser = commands.add_parser(
        name,
        help=help,
        description=f"{help}\n\n{details}" if details else help,
        epilog="\n  ".join(["example:" if len(examples) == 1 else "examples:", *examples]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run, **defaults)
    return parser
