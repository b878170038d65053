"""`diffusers-infogain app`."""

from __future__ import annotations

import argparse
import os
import traceback

from ..app.serve import free_port, load_gradio, serving, wait
from ..app.work import Limits
from . import common, errors


def app(args: argparse.Namespace) -> None:
    """Loads a model and serves its page until it is interrupted."""
    load_gradio()  # what is missing is said before a model is loaded
    port = free_port(args.host, args.port)
    pipe = common.load_any_pipeline(args)
    limits = Limits(args.max_steps, args.max_samples, args.max_new_tokens, args.max_waiting)
    share = args.share == "yes"
    with serving(pipe, args.model, host=args.host, port=port, share=share, limits=limits, explain=_explain) as address:
        print(f"The page of {args.model} is at {address} (Ctrl+C ends it).", flush=True)
        wait()


def _explain(error: Exception) -> str:
    """The sentence that visitors see; the log gets more of a bug if that is wanted."""
    sentence, code = errors.explain(error, None)
    if code == errors.INTERNAL and os.environ.get(errors.TRACEBACK):
        traceback.print_exception(error)
    return sentence
