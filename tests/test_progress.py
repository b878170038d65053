"""Bars where they are watched, lines in logs."""

from __future__ import annotations

import io
from contextlib import redirect_stderr

import diffusers
import huggingface_hub
import pytest
import torch
import transformers

from diffusers_infogain import InfoGainPipeline, progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_no_bar_and_a_line_now_and_then(monkeypatch):
    with redirect_stderr(io.StringIO()) as log:
        for _ in progress.Progress(range(3), desc="evaluate", unit="image"):
            pass
        assert log.getvalue() == ""
        clock = iter(range(0, 1000, 30))
        monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
        assert list(progress.Progress(range(5), desc="evaluate", unit="image")) == [0, 1, 2, 3, 4]
        assert log.getvalue() == "evaluate: 2 of 5 images after 01:00\nevaluate: 4 of 5 images after 02:00\n"


def test_nothing_is_told_where_it_is_switched_off(monkeypatch):
    with redirect_stderr(io.StringIO()) as log:
        monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
        with progress.Progress(total=2, desc="convert", unit="part", disable=True) as bar:
            bar.update()
        assert log.getvalue() == ""
        with progress.Progress(total=2, desc="convert", unit="part") as bar:
            bar.update(2)
        assert log.getvalue() == "convert: 2 of 2 parts after 00:00\n"


def test_a_terminal_gets_a_bar():
    with redirect_stderr(Terminal()) as terminal:
        for _ in progress.Progress(range(3), desc="evaluate", unit="image"):
            pass
        assert "evaluate: 100%|" in terminal.getvalue()


@pytest.mark.parametrize(("main", "shown"), [(True, True), (False, False)])
def test_loading_bars_are_those_of_the_main_process(monkeypatch, main, shown):
    disabled = []
    for place in (diffusers.utils.logging, transformers.utils.logging):
        monkeypatch.setattr(place, "disable_progress_bar", lambda: disabled.append(1))
    monkeypatch.setattr(huggingface_hub.utils, "disable_progress_bars", lambda: disabled.append(1))
    with redirect_stderr(Terminal()):
        progress.quiet_libraries(main)
    assert len(disabled) == (0 if shown else 3)


def run(pipe) -> None:
    pipe("a", generator=torch.Generator().manual_seed(0), num_inference_steps=3, output_type="latent")


def test_a_pipelines_bar_is_for_terminals_unless_it_is_asked_for(components):
    with redirect_stderr(io.StringIO()) as log:
        pipe = InfoGainPipeline(**components)
        run(pipe)
        assert log.getvalue() == ""
        pipe.set_progress_bar_config(desc="named")
        run(pipe)
        assert log.getvalue() == ""
        pipe.set_progress_bar_config(disable=False)
        run(pipe)
        assert "%|" in log.getvalue()


def test_a_pipelines_bar_moves_on_a_terminal(components):
    with redirect_stderr(Terminal()) as terminal:
        run(InfoGainPipeline(**components))
        assert "%|" in terminal.getvalue()
