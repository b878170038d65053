from __future__ import annotations

from collections import Counter

import pytest

from diffusers_infogain.models.imagenet import imagenet_class_ids, imagenet_class_name

# Classes whose only name another class has too.
AMBIGUOUS = {86, 134, 474, 517, 594, 638, 657}


def test_classes_stand_in_the_order_of_their_ids():
    names = {
        0: "tench, Tinca tinca",
        207: "golden retriever",
        417: "balloon",
        999: "toilet tissue, toilet paper, bathroom tissue",
    }
    assert {i: imagenet_class_name(i) for i in names} == names


@pytest.mark.parametrize(
    ("labels", "ids"),
    [
        (207, [207]),
        ("207", [207]),
        ("golden retriever", [207]),
        ("  Golden  RETRIEVER ", [207]),
        ("Tinca tinca", [0]),
        ("tench, Tinca tinca", [0]),
        ("maillot, tank suit", [639]),
        ([1, "goldfish", "bathroom tissue"], [1, 1, 999]),
        ((388, "giant panda"), [388, 388]),
        ([], []),
    ],
)
def test_ids_and_names_give_ids(labels, ids):
    assert imagenet_class_ids(labels) == ids


def test_a_name_gives_its_class_or_is_said_to_be_ambiguous():
    names = [[name.lower() for name in imagenet_class_name(i).split(", ")] for i in range(1000)]
    uses = Counter(name for several in names for name in several)
    for i, several in enumerate(names):
        for name in several:
            if uses[name] == 1:
                assert imagenet_class_ids(name) == [i]
            else:
                with pytest.raises(ValueError, match=rf"several ImageNet classes.* {i} \("):
                    imagenet_class_ids(name)
    assert {i for i, several in enumerate(names) if all(uses[name] > 1 for name in several)} == AMBIGUOUS


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("crane", r"'crane' is the name of several ImageNet classes: .* 134 \(crane\); 517 \(crane\)"),
        ("Maillot", r"'Maillot' is .* 638 \(maillot\); 639 \(maillot, tank suit\)"),
        ("golden retreiver", r"'golden retreiver' is not the name of an ImageNet class: did you mean 'golden retriever'"),
        ("", r"'' is not the name of an ImageNet class\."),
        (1000, r"must be an integer in \[0, 999\], got 1000"),
        ("1000", r"must be an integer in \[0, 999\], got 1000"),
        (-1, r"must be an integer in \[0, 999\], got -1"),
        ([3, True], r"must be an integer in \[0, 999\], got True"),
        ([2.0], r"must be an integer in \[0, 999\], got 2\.0"),
    ],
)
def test_other_labels_are_refused(label, message):
    with pytest.raises(ValueError, match=message):
        imagenet_class_ids(label)


def test_names_of_other_ids_are_refused():
    with pytest.raises(ValueError, match=r"in \[0, 999\], got 1000"):
        imagenet_class_name(1000)
