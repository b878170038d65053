"""Options of pytest, and the fixtures of most folders."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # a core each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from diffusers import AmusedPipeline
from helpers.amused import make_components

import diffusers_infogain
from diffusers_infogain import InfoGainPipeline


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also measure the demo model on many images")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow") is not None:  # keywords also hold the names of folders
                item.add_marker(pytest.mark.skip(reason="runs with --slow"))


@pytest.fixture
def components() -> dict:
    return make_components()


@pytest.fixture
def pipe(components) -> InfoGainPipeline:
    pipe = InfoGainPipeline(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def exact_pipe(pipe) -> InfoGainPipeline:
    """In float64, where sums in another order (of another batch, say) differ by far less than any two scores do."""
    return pipe.to(torch.float64)


@pytest.fixture(scope="session")
def stock_repository(tmp_path_factory) -> str:
    """A folder as `AmusedPipeline.save_pretrained` writes it."""
    folder = tmp_path_factory.mktemp("repositories") / "stock"
    AmusedPipeline(**make_components()).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def demo_pipe() -> InfoGainPipeline:
    pipe = diffusers_infogain.InfoGainPipeline.from_pretrained("demo")
    pipe.set_progress_bar_config(disable=True)
    return pipe
