"""The demo world: captions about colored shapes, and images of them.

The world is so small that `diffusers_infogain.demo.checker` can check the composition of an image, in the categories of GenEval:
single object, two objects, counting, colors, position, attribute binding.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from dataclasses import dataclass
from typing import Literal

import torch

from ..checks import check_bool, check_choice, check_integer, check_list, check_type
from ..choices import SPLITS
from ..printing import shown

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 160, 70),
    "blue": (45, 85, 215),
    "yellow": (240, 195, 30),
    "purple": (140, 60, 180),
    "cyan": (40, 190, 215),
}
BACKGROUND = (246, 246, 242)
SHAPES = ("circle", "square", "triangle", "diamond")
RELATIONS = ("left of", "right of", "above", "below")
COUNTS = {"two": 2, "three": 3, "four": 4}
CATEGORIES = ("single object", "two objects", "counting", "colors", "position", "attribute binding")

IMAGE_SIZE = 64
MAX_OBJECTS = 4
# Half of an object's width, in pixels, chosen so that the shapes look equally large.
HALF_WIDTH = {"circle": 8.0, "square": 7.0, "triangle": 9.0, "diamond": 9.0}
# Objects are centred in cells of 8 x 8 pixels, at a Chebyshev distance at which no two objects share a cell.
_CENTRES = torch.arange(12, 53, 8)
_MIN_DISTANCE = 24
# "Left of" means clearly left of: the first object is in the left half of the image, the second in the right half, and the offset
# along the axis is at least twice the offset across it.
_RELATION_CLEARANCE = 2

Category = Literal["single object", "two objects", "counting", "colors", "position", "attribute binding"]


@dataclass(frozen=True)
class ObjectSpec:
    """`count` objects of one shape and color; with `color` None, any color that they share."""

    shape: str
    color: str | None = None
    count: int = 1

    @property
    def text(self) -> str:
        """Such as "a red circle" or "two squares"."""
        words = [self.color] if self.color else []
        if self.count == 1:
            return " ".join(["a", *words, self.shape])
        number = next(word for word, count in COUNTS.items() if count == self.count)
        return " ".join([number, *words, self.shape + "s"])


@dataclass(frozen=True)
class Caption:
    """One or two object specifications, and where the first one is relative to the second (None: anywhere)."""

    objects: tuple[ObjectSpec, ...]
    relation: str | None = None

    @property
    def text(self) -> str:
        """The prompt."""
        return f" {self.relation or 'and'} ".join(spec.text for spec in self.objects)

    @property
    def category(self) -> Category:
        """The GenEval category of the caption."""
        first = self.objects[0]
        if len(self.objects) == 1:
            if first.count > 1:
                return "counting"
            return "colors" if first.color else "single object"
        if self.relation:
            return "position"
        return "attribute binding" if first.color else "two objects"

    @property
    def held_out(self) -> bool:
        """Whether the combination was held out of training.

        Every color, shape, count and relation is trained, except for a quarter of the combinations of color, shape and count, of
        the pairs of colored shapes, and of such pairs with a relation.
        """
        if self.category not in ("counting", "position", "attribute binding") or self.objects[0].color is None:
            return False
        code = sum(list(COLORS).index(spec.color) + SHAPES.index(spec.shape) for spec in self.objects if spec.color)
        if self.category == "counting":
            code += self.objects[0].count
        if self.relation:
            code += RELATIONS.index(self.relation)
        return code % 4 == 0

    @property
    def split(self) -> str | None:
        """The one of `choices.SPLITS` that a held-out caption belongs to; None for a caption that may be trained on.

        The held-out captions of a category are dealt to the splits in the order of the SHA-256 of their texts, so that splits are
        of equal size and have nothing in common but what all captions have.
        """
        return _splits().get(self)

    def __str__(self) -> str:
        return self.text


def parse_caption(text: str) -> Caption:
    """The `Caption` of a text such as "two red squares" or "a circle left of a cyan diamond".

    Raises:
        ValueError: If the text is not a caption of the demo world.
    """
    check_type("text", text, str, "a string")

    def parse_object(words: list[str]) -> ObjectSpec:
        number, *color, noun = words
        count = 1 if number in ("a", "an") else COUNTS[number]
        shape = noun if count == 1 else noun.removesuffix("s")
        if (count > 1 and shape == noun) or shape not in SHAPES or len(color) > 1 or not set(color) <= set(COLORS):
            raise KeyError(noun)
        return ObjectSpec(shape, color[0] if color else None, count)

    plain = " ".join(text.lower().split()).rstrip(".")
    try:
        for joint in ("and", *RELATIONS):
            first, found, second = plain.partition(f" {joint} ")
            if found:
                specs = (parse_object(first.split()), parse_object(second.split()))
                if any(spec.count > 1 for spec in specs):
                    raise KeyError(joint)
                return Caption(specs, None if joint == "and" else joint)
        return Caption((parse_object(plain.split()),))
    except (KeyError, ValueError):
        raise ValueError(
            f"`text` is not a caption of the demo world: {shown(text)}. Captions look like 'a red circle', 'three blue squares', "
            f"'a circle and a square' or 'a green triangle left of a yellow diamond', with colors {', '.join(COLORS)}; shapes "
            f"{', '.join(SHAPES)}; counts {', '.join(COUNTS)}; relations {', '.join(RELATIONS)}."
        ) from None


@functools.cache
def all_captions() -> tuple[Caption, ...]:
    """Every caption of the world, in a fixed order; no caption names the same object twice."""
    plain = [ObjectSpec(shape) for shape in SHAPES]
    colored = [ObjectSpec(shape, color) for color in COLORS for shape in SHAPES]
    captions = [Caption((spec,)) for spec in plain + colored]
    captions += [Caption((ObjectSpec(s.shape, s.color, n),)) for n in COUNTS.values() for s in plain + colored]
    for specs in (plain, colored):
        for pair in itertools.permutations(specs, 2):
            captions += [Caption(pair, relation) for relation in (None, *RELATIONS)]
    return tuple(captions)


@functools.cache
def _splits() -> dict[Caption, str]:
    """The split of every held-out caption."""
    found: dict[Caption, str] = {}
    for category in CATEGORIES:
        own = [caption for caption in all_captions() if caption.held_out and caption.category == category]
        own.sort(key=lambda caption: hashlib.sha256(caption.text.encode()).digest())
        found.update(zip(own, itertools.cycle(SPLITS)))
    return found


def sample_captions(
    num: int,
    generator: torch.Generator,
    *,
    held_out: bool = False,
    categories: tuple[str, ...] | None = None,
    split: str | None = None,
) -> list[Caption]:
    """`num` random captions, with equally many of each category.

    Args:
        held_out: Whether to draw from the combinations that were held out of training (of counting, position and attribute
            binding), instead of from the trained ones.
        categories: The categories to draw from; by default all that have such captions.
        split: One of `choices.SPLITS`, to draw from that third of the held-out captions; None: from all.

    Raises:
        ValueError: If there are no such captions, or the split is unknown.
    """
    check_integer("num", num, 0)
    check_bool("held_out", held_out)
    check_type("generator", generator, torch.Generator, "a torch.Generator")
    if categories is not None:
        check_list("categories", categories, str, "a tuple of categories or None")
    if split is not None:
        check_choice("split", split, SPLITS)
        if not held_out:
            raise ValueError(f"`held_out` must be True for the split {split!r} of the held-out captions, got {held_out}.")
    groups: dict[str, list[Caption]] = {}
    for caption in all_captions():
        wanted = categories is None or caption.category in categories
        if caption.held_out == held_out and wanted and split in (None, caption.split):
            groups.setdefault(caption.category, []).append(caption)
    if not groups:
        raise ValueError(f"`categories` {shown(categories)} hold no caption with held_out={held_out}.")
    names = [name for name in CATEGORIES if name in groups]
    draws = torch.rand(num, generator=generator).tolist()
    return [(group := groups[names[i % len(names)]])[int(u * len(group))] for i, u in enumerate(draws)]


@dataclass
class Scenes:
    """A batch of scenes with up to 4 objects each.

    Attributes:
        color, shape: (B, 4) long, indices into `COLORS` and `SHAPES`; -1 for no object.
        x, y: (B, 4) long, the centres in pixels.
    """

    color: torch.Tensor
    shape: torch.Tensor
    x: torch.Tensor
    y: torch.Tensor


@functools.cache
def _lattice() -> tuple[torch.Tensor, torch.Tensor, dict[str | None, torch.Tensor]]:
    """Lattice points x, y (P,), and for each relation which second point may go with a first one, (P, P) bool."""
    y, x = (axis.flatten() for axis in torch.meshgrid(_CENTRES, _CENTRES, indexing="ij"))
    right, down = x[None] - x[:, None], y[None] - y[:, None]
    apart = torch.maximum(right.abs(), down.abs()) >= _MIN_DISTANCE
    wide = right.abs() >= _RELATION_CLEARANCE * down.abs()
    tall = down.abs() >= _RELATION_CLEARANCE * right.abs()
    left, top = x < IMAGE_SIZE / 2, y < IMAGE_SIZE / 2
    allowed: dict[str | None, torch.Tensor] = {
        None: apart,
        "left of": apart & wide & left[:, None] & ~left[None],
        "right of": apart & wide & ~left[:, None] & left[None],
        "above": apart & tall & top[:, None] & ~top[None],
        "below": apart & tall & ~top[:, None] & top[None],
    }
    return x, y, allowed


def sample_scenes(captions: list[Caption], generator: torch.Generator) -> Scenes:
    """A random scene for every caption, in which no two objects touch; colors that a caption leaves open are drawn too."""
    x, y, allowed = _lattice()
    colors, batch = list(COLORS), len(captions)
    free = torch.randint(len(colors), (batch, 2), generator=generator).tolist()
    color = torch.full((batch, MAX_OBJECTS), -1)
    shape = color.clone()
    for i, caption in enumerate(captions):
        slot = 0
        for j, spec in enumerate(caption.objects):
            color[i, slot : slot + spec.count] = colors.index(spec.color) if spec.color else free[i][j]
            shape[i, slot : slot + spec.count] = SHAPES.index(spec.shape)
            slot += spec.count
    beside = torch.stack([allowed[relation] for relation in (None, *RELATIONS)])
    relation = torch.tensor([RELATIONS.index(c.relation) + 1 if c.relation else 0 for c in captions])
    point = torch.zeros(batch, MAX_OBJECTS, dtype=torch.long)
    pending = torch.arange(batch)
    # Objects are placed one after the other on points that are still allowed; a scene that runs out of points is drawn again.
    while len(pending):
        first = torch.randint(len(x), (len(pending),), generator=generator)
        open_, placed, ok = beside[relation[pending], first], [first], torch.ones(len(pending), dtype=torch.bool)
        for slot in range(1, MAX_OBJECTS):
            wanted = shape[pending, slot] >= 0
            possible = open_.any(-1)
            ok &= possible | ~wanted
            weights = torch.where(possible[:, None], open_, True).float()
            placed.append(torch.multinomial(weights, 1, generator=generator)[:, 0])
            open_ = open_ & allowed[None][placed[-1]]
        point[pending] = torch.stack(placed, 1)
        pending = pending[~ok]
    return Scenes(color, shape, x[point], y[point])


def _signed_distance(shape: str, dx: torch.Tensor, dy: torch.Tensor, half: float) -> torch.Tensor:
    """Signed distance in pixels to the outline of a shape centred at 0, negative inside; exact near its edges."""
    if shape == "circle":
        return (dx.square() + dy.square()).sqrt() - half
    if shape == "square":
        return torch.maximum(dx.abs(), dy.abs()) - half
    if shape == "diamond":
        return (dx.abs() + dy.abs() - half) / 2**0.5
    # An upright isosceles triangle whose width and height are twice `half`; dy grows downwards.
    return torch.maximum((2 * dx.abs() - dy - half) / 5**0.5, dy - half)


def render(scenes: Scenes) -> torch.Tensor:
    """Images (B, 3, 64, 64) of scenes, float32 in [0, 1], with anti-aliased edges."""
    grid = torch.arange(IMAGE_SIZE) + 0.5
    palette = torch.tensor(list(COLORS.values())) / 255
    images = (torch.tensor(BACKGROUND) / 255).view(1, 3, 1, 1).expand(len(scenes.x), 3, IMAGE_SIZE, IMAGE_SIZE)
    for slot in range(MAX_OBJECTS):
        dx = grid.view(1, 1, -1) - scenes.x[:, slot].view(-1, 1, 1)
        dy = grid.view(1, -1, 1) - scenes.y[:, slot].view(-1, 1, 1)
        dx, dy = torch.broadcast_tensors(dx, dy)
        distances = torch.stack([_signed_distance(s, dx, dy, HALF_WIDTH[s]) for s in SHAPES])
        index = scenes.shape[:, slot]
        distance = distances[index.clamp(min=0), torch.arange(len(index))]
        coverage = (0.5 - distance).clamp(0, 1) * (index >= 0).view(-1, 1, 1)
        ink = palette[scenes.color[:, slot].clamp(min=0)][:, :, None, None]
        images = torch.lerp(images, ink.expand_as(images), coverage[:, None])
    return images
