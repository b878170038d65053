"""The flags of `export`."""

from __future__ import annotations

from ..checks import LARGEST_NUMBER
from .flags import DTYPES, Parser, _add, _add_loading_flags, add_sampler_flags, nonempty, number, path


def add_export(command: Parser) -> None:
    """Adds the flags of `export`."""
    command.add_argument("model", type=nonempty, help="'demo', 'demo-text', a folder or a Hub id of any family")
    command.add_argument("target", type=path, metavar="folder", help="folder to write; must not exist yet")
    _add_loading_flags(command)
    command.add_argument("--dtype", choices=DTYPES, help="of the weights (default: as stored)")
    _add(command, "--max-shard-size", number(1e-3, 1e6), "of a weight file", 5.0, metavar="GB")
    text = (
        "identifier of the licence of the weights for the model card, such as apache-2.0 (default: that of the model's own card)"
    )
    _add(command, "--license", nonempty, text)
    text = "Hub id of the repository that the weights come from, for the model card (default: the model, if it is a Hub id)"
    _add(command, "--base-model", nonempty, text)
    text = "strength of guidance of calls that give none, of image models (default: the model's)"
    _add(command, "--guidance-scale", number(-LARGEST_NUMBER), text)
    add_sampler_flags(command)
