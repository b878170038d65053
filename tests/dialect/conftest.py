"""A tiny pipeline of every family."""

from __future__ import annotations

import pytest
from helpers.dialect import FAMILIES, make_pipe


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture
def pipe(family):
    return make_pipe(family)
