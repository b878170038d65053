"""The flags of `show`."""

from __future__ import annotations

from pathlib import Path

from . import flags

FILMS = ("gif", "webp", "mp4")


def add_show(command: flags.Parser) -> None:
    """Adds the flags of `show`."""
    text = "PNG of this package, or the JSON lines of `text --output`"
    command.add_argument("file", type=flags.path, help=text)
    command.add_argument("--output", type=flags.path, default=Path("outputs"), help="folder to write to (default: outputs)")
    text = "run the model again, which also draws the entropies before the steps"
    command.add_argument("--again", action="store_true", help=text)
    text = "write the film of the image, too, for which the model is run again"
    command.add_argument("--film", choices=FILMS, help=text)
    text = "longer side of the film in pixels (default: the image's, or a multiple of at least 256)"
    command.add_argument("--size", type=flags.integer(1, 2**14), help=text)
    text = "number of the text, from 1, in a file of texts (default: 1)"
    command.add_argument("--line", type=flags.integer(1), default=1, help=text)
    text = "the folder or Hub id of the model (default: the one that the file names)"
    command.add_argument("--model", type=flags.nonempty, help=text)
    text = "the image that was edited, and its mask (default: as recorded, beside the PNG or in this folder)"
    command.add_argument("--image", type=flags.path, help=text)
    command.add_argument("--mask", type=flags.path, help="see --image")
    command.add_argument("--style-image", type=flags.path, help="see --image")
    command.add_argument("--device", type=flags.nonempty, help="such as cpu or cuda (default: cuda if there is one, else cpu)")
    command.add_argument("--dtype", choices=flags.DTYPES, help="of the weights (default: as recorded, else float32)")
