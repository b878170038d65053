from __future__ import annotations

import itertools

import numpy as np

from diffusers_infogain.evaluation.labels import overlap, place_boxes

FRAME = (0.0, 0.0, 600.0, 400.0)


def test_boxes_of_points_that_coincide_do_not_overlap():
    """Six names of one point, and of points drawn at random."""
    generator = np.random.default_rng(0)
    sizes = [(width, 12.0) for width in generator.uniform(40, 160, 6)]
    for trial in range(20):
        spread = 0.0 if trial == 0 else 150.0
        anchors = [np.array([[300.0, 200.0]]) + generator.uniform(-spread, spread, (1, 2)) for _ in sizes]
        boxes = place_boxes(sizes, anchors, np.zeros((0, 2)), FRAME)
        assert not any(overlap(first, second, 0) for first, second in itertools.combinations(boxes, 2))
        assert all(box[0] >= 0 and box[1] >= 0 and box[2] <= 600 and box[3] <= 400 for box in boxes)


def test_a_box_in_a_corner_stays_in_the_frame():
    (box,) = place_boxes([(100.0, 12.0)], [np.array([[599.0, 399.0]])], np.zeros((0, 2)), FRAME)
    assert box[2] <= 600
    assert box[3] <= 400


def test_a_box_keeps_off_the_data_and_near_its_point():
    point = np.array([[300.0, 200.0]])
    wall = np.stack([np.full(50, 330.0), np.linspace(100, 300, 50)], 1)  # on the right
    (box,) = place_boxes([(100.0, 12.0)], [point], wall, FRAME)
    assert not ((wall >= box[:2]) & (wall <= box[2:])).all(-1).any()
    assert np.hypot(*(point[0] - np.clip(point[0], box[:2], box[2:]))) < 30
    (free,) = place_boxes([(100.0, 12.0)], [point], np.zeros((0, 2)), FRAME)
    assert free[0] > 300
    assert free[1] < 200 < free[3]  # to the right, where nothing is in the way
