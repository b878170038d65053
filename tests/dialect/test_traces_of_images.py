"""Films and figures of how images were decoded, in the pipelines of all families."""

from __future__ import annotations

import copy
import gc
import pickle

import numpy as np
import PIL.Image
import pytest
import torch
from helpers.dialect import GRID_FAMILIES, OTHER, PROMPT, SIDE, call, family_of, seeded

from diffusers_infogain import InfoGainScheduler

WAYS = {
    "plain": {},
    "corrector": {"scheduler": {"sampler": "uniform", "corrector": "remdm_conf", "remdm_eta": 0.3}},
    "retries": {"scheduler": {"retry_below_nats": -3.0, "num_tries": 3}},
    "runs": {"num_runs": 2},
    "beams": {"num_beams": 2},
    "edit": {"edits": True},
}


@pytest.fixture(params=GRID_FAMILIES)
def family(request) -> str:
    return request.param


def prepared(pipe, way: str) -> dict:
    """Sets the pipeline's scheduler for a way of decoding, and returns its arguments."""
    options = dict(WAYS[way])
    scheduler = {"entropy_bound": 0, **options.pop("scheduler", {})}
    pipe.scheduler = InfoGainScheduler.from_config(pipe.scheduler.config, **scheduler)
    if options.pop("edits", False):
        side = SIDE * pipe.vae_scale_factor
        noise = torch.rand(3, side, side, generator=torch.Generator().manual_seed(1))
        mask = torch.zeros(side, side, dtype=torch.bool)
        mask[side // 2 :] = True
        options |= {"image": noise, "mask_image": mask}
    return {"output_type": "pil", "num_inference_steps": 4, **options}


def pixels(image: PIL.Image.Image) -> np.ndarray:
    return np.array(image)


@pytest.mark.parametrize("way", WAYS)
def test_a_film_ends_with_the_image_and_is_the_same_alone(pipe, way):
    arguments = prepared(pipe, way)
    prompts = [PROMPT[family_of(pipe)], OTHER[family_of(pipe)]]
    images = arguments.get("image")
    together = call(pipe, prompts, generator=seeded(1, 2), **arguments)
    for index, prompt in enumerate(prompts):
        alone = call(pipe, prompt, generator=seeded(1 + index), **arguments)
        frames = together.trace.frames(index, size=SIDE * pipe.vae_scale_factor)
        assert [frame.tobytes() for frame in frames] == [
            frame.tobytes() for frame in alone.trace.frames(size=SIDE * pipe.vae_scale_factor)
        ]
        differences = pixels(frames[-1]).astype(int) - pixels(together.images[index].convert("RGB"))
        assert np.abs(differences).max() <= 1, "a level for rounding, which depends on the batch that is decoded"
        assert len(frames) == len(together.trace.states(index)) > 2
        assert len({frame.size for frame in frames}) == 1
    assert together.trace.view.seconds > 0
    assert images is None or together.trace.of_sample(0).decoded_at.count(-1) == SIDE * SIDE // 2


def test_masked_cells_are_hatched_and_new_ones_have_a_border(pipe):
    arguments = prepared(pipe, "plain")
    output = call(pipe, generator=seeded(0), **arguments)
    frames, states = output.trace.frames(size=SIDE * 24), output.trace.states()
    masked = (states == pipe.scheduler.config.mask_token_id).view(-1, SIDE, SIDE)
    checked = 0
    for before, after, frame in zip(masked, masked[1:], frames[1:-1], strict=False):
        for row in range(SIDE):
            for column in range(SIDE):
                cell = pixels(frame.crop((24 * column, 24 * row, 24 * column + 24, 24 * row + 24)))
                assert after[row, column] == (set(map(tuple, cell.reshape(-1, 3))) == {(104, 104, 110), (136, 136, 142)})
                new = before[row, column] and not after[row, column]
                assert not new or (255, 149, 0) in set(map(tuple, cell.reshape(-1, 3)))
                last = frames[-1].crop((24 * column, 24 * row, 24 * column + 24, 24 * row + 24))
                assert new or after[row, column] or np.array_equal(cell, pixels(last))
                checked += int(new)
    assert checked


def test_a_kept_output_keeps_no_pipeline_in_memory(pipe):
    arguments = prepared(pipe, "plain")
    own = type(pipe)(**pipe.components, **pipe.parameters)
    own.set_progress_bar_config(disable=True)
    output = call(own, generator=seeded(0), **arguments)
    frames = output.trace.frames()
    copies = [copy.deepcopy(output), pickle.loads(pickle.dumps(output))]
    assert [frame.tobytes() for frame in copies[0].trace.frames()] == [frame.tobytes() for frame in frames]
    with pytest.raises(ValueError, match=r"^`pipe` must be given: the pipeline that made these images is not in memory any more"):
        copies[1].trace.frames()
    del own
    gc.collect()
    for trace in (output.trace, copies[0].trace, copies[1].trace):
        with pytest.raises(ValueError, match="not in memory any more"):
            trace.frames()
        assert [frame.tobytes() for frame in trace.frames(pipe=pipe)] == [frame.tobytes() for frame in frames]
        with pytest.raises(ValueError, match=r"^`pipe` must be the image pipeline that made these images, got str\.$"):
            trace.frames(pipe="demo")
        assert len(trace.plot().axes) > 3
    assert "StateImages" not in repr(output)


def test_some_of_an_edited_batch_keep_their_own_pixels(pipe):
    arguments = prepared(pipe, "edit")
    arguments["image"] = [arguments["image"], 1 - arguments["image"]]
    prompts = [PROMPT[family_of(pipe)], OTHER[family_of(pipe)]]
    trace = call(pipe, prompts, generator=seeded(1, 2), **arguments).trace
    expected = [frame.tobytes() for frame in trace.frames(1)]
    assert [frame.tobytes() for frame in trace.take(torch.tensor([1])).frames(0)] == expected
