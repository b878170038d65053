"""Lumina-DiMOO with images in its prompt, and with parts of an image given: against its own implementation, and by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from helpers.checkpoints import LUMINA_TINY, make_lumina_pipeline, make_lumina_tokenizer, make_vqvae
from helpers.commands import run
from helpers.sampling import generators
from safetensors.torch import load_file

from diffusers_infogain import InfoGainLuminaPipeline, InfoGainScheduler
from diffusers_infogain.checkpoints.source import renamed
from diffusers_infogain.editing import closest_grid
from diffusers_infogain.models.llada import KEY_MAPPING, BidirectionalLlama, llama_config
from diffusers_infogain.pipeline_infogain_lumina import PROMPT_TEMPLATE, TASKS

GOLDEN = Path(__file__).parent / "golden"
CODES, MASK, OFFSET, NEWLINE, START, END = 32, 32, 50, 46, 41, 42
INFO = json.loads((GOLDEN / "lumina_tasks_tiny.json").read_text())
WITH_IMAGES = [name for name, case in INFO["cases"].items() if "task" in case]
GREEDY = {"sampler": "maskgit", "choice_temperature": 0, "token_temperature": 0, "entropy_bound": 0}


@pytest.fixture(scope="module")
def stored() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "lumina_tasks_tiny.safetensors")


@pytest.fixture
def golden_pipe() -> InfoGainLuminaPipeline:
    """Lumina-DiMOO's own tiny model, with its sampler at temperature 0."""
    weights = load_file(GOLDEN / "lumina_tiny.safetensors")
    transformer = BidirectionalLlama(llama_config(json.loads((GOLDEN / "lumina_tiny.json").read_text())["config"])).eval()
    model = {renamed(key, KEY_MAPPING): value for key, value in weights.items() if key.startswith("model.")}
    transformer.load_state_dict(model, strict=True)
    vqvae = make_vqvae(codes=CODES, levels=2)
    vqvae.load_state_dict({key[6:]: value for key, value in weights.items() if key.startswith("vqvae.")}, strict=True)
    scheduler = InfoGainScheduler(mask_token_id=MASK, **GREEDY)
    pipe = InfoGainLuminaPipeline(vqvae, make_lumina_tokenizer(), transformer, scheduler, **LUMINA_TINY, sample_size=16)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def recorded_rows(pipe: InfoGainLuminaPipeline) -> list[torch.Tensor]:
    """The inputs of the network, row by row."""
    rows: list[torch.Tensor] = []
    pipe.transformer.model.register_forward_pre_hook(lambda m, a, k: rows.extend(k["input_ids"]), with_kwargs=True)
    return rows


def check_run(pipe: InfoGainLuminaPipeline, stored: dict[str, Any], name: str, kinds: list[str], **arguments: Any) -> None:
    """Runs a case as its authors ran it, and compares inputs, guided logits and decisions of every step."""
    case, logits, rows = INFO["cases"][name], [], recorded_rows(pipe)

    def callback(pipe, step, timestep, kwargs):
        logits.append(kwargs["logits"])
        return {}

    output = pipe(
        case["prompt"],
        num_inference_steps=INFO["timesteps"],
        guidance_scale=case["guidance_scale"],
        output_type="latent",
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["logits"],
        **arguments,
    )
    steps = case["steps"]
    assert len(logits) == steps == INFO["timesteps"]
    assert len(rows) == steps * len(kinds) == output.trace.num_evaluations.sum()
    by_length = {kind: stored[f"{name}.step00.{kind}_ids"].shape[1] for kind in kinds}
    for step in range(steps):
        inputs = rows[step * len(kinds) : (step + 1) * len(kinds)]
        assert [len(ids) for ids in inputs] == list(by_length.values())
        for kind, ids in zip(kinds, inputs, strict=True):
            if step == 0 or kind == "cond":
                assert torch.equal(ids, stored[f"{name}.step{step:02}.{kind}_ids"][0].long())
        expected = stored[f"{name}.step{step:02}.guided_logits"]
        found = logits[step][0]
        torch.testing.assert_close(found[(found != 0).any(-1)], expected, atol=1e-4, rtol=0)
    assert torch.equal(output.images[0].flatten(), stored[f"{name}.codes"].long())


@pytest.mark.parametrize("name", WITH_IMAGES)
def test_tasks_are_decoded_as_by_the_public_implementation(name, stored, golden_pipe):
    case = INFO["cases"][name]
    on = {"cond": True, "uncond": case["guidance_scale"] > 0, "imageless": case["image_guidance_scale"] > 0}
    arguments = {"image": stored["image"].numpy(), "image_guidance_scale": case["image_guidance_scale"], "task": case["task"]}
    if case["task"] == "style_transfer":
        arguments["style_image"] = stored["style"].numpy()
        # Its authors' script replaces the prompt by this one.
        golden_pipe.tokenizer, words = make_lumina_tokenizer(), INFO["prompts"]["image_ref_transfer"][0]
        case["prompt"] = words.partition("<user>")[2].partition("</user>")[0]
    check_run(golden_pipe, stored, name, [kind for kind in on if on[kind]], **arguments)


@pytest.mark.parametrize("name", ["inpainting", "outpainting"])
def test_parts_of_an_image_are_decoded_as_by_the_public_implementation(name, stored, golden_pipe):
    """Its mask is a rectangle in the middle, or all but that; tokens of which more than half is masked are decoded."""
    case, image = INFO["cases"][name], stored["image"]
    height, width = image.shape[:2]
    rows, columns = round(height * case["mask_h_ratio"]), round(width * case["mask_w_ratio"])
    top, left = (height - rows) // 2, (width - columns) // 2
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[top : top + rows, left : left + columns] = True
    mask = ~mask if name == "outpainting" else mask
    edit = {"image": image.numpy(), "mask_image": mask, "mask_coverage": 0.5, "height": height, "width": width}
    check_run(golden_pipe, stored, name, ["cond", "uncond"], **edit)


def test_the_prompts_are_those_of_the_public_implementation():
    tasks = {
        "edit": "image_editing",
        "control": "control_generation",
        "subject": "subject_generation",
        "ref_transfer": "style_transfer",
        "dense": "dense_prediction",
        "multi_view": "multi_view",
        "pred": "general",
    }
    seen = set()
    for name, (prompt, negative) in INFO["prompts"].items():
        (task,) = {task for part, task in tasks.items() if part in name}
        words = prompt.partition("<user>")[2].partition("</user>")[0]
        assert prompt == PROMPT_TEMPLATE.format(TASKS[task], words)
        assert negative == PROMPT_TEMPLATE.format(TASKS[task], "<uncondition>")
        seen.add(task)
    assert seen == set(TASKS)


def test_sizes_are_chosen_as_by_the_public_implementation():
    for (width, height), (best_width, best_height) in INFO["sizes"]:
        rows, columns = closest_grid(height, width, (512 // 32) ** 2)
        assert (columns * 32, rows * 32) == (best_width, best_height)


# By itself: tiny random weights, canvases of 4 x 4 tokens, references of 2 x 2 by default


@pytest.fixture
def pipe() -> InfoGainLuminaPipeline:
    return make_lumina_pipeline(sampler="confidence", entropy_bound=0)


def picture(seed: int, height: int = 8, width: int = 8) -> torch.Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))


EDIT = {"task": "image_editing", "height": 8, "width": 8, "num_inference_steps": 4, "output_type": "latent"}


def test_images_stand_before_the_last_token_of_the_prompt_each_in_its_own_shape(pipe):
    rows = recorded_rows(pipe)
    content, style = picture(1), picture(2, 4, 16)
    sizes = {"height": 4, "width": 6}
    pipe("fog", image=content, style_image=style, task="style_transfer", num_inference_steps=1, output_type="latent", **sizes)
    prompt = pipe.tokenizer(PROMPT_TEMPLATE.format(TASKS["style_transfer"], "fog")).input_ids
    negative = pipe.tokenizer(PROMPT_TEMPLATE.format(TASKS["style_transfer"], "<uncondition>")).input_ids
    shown = []
    for image, (height, width) in ((content, (4, 6)), (style, (4, 4))):
        (codes,) = pipe.encode_image(image, height, width)
        shown += [START, *(token for row in codes.tolist() for token in (*(code + OFFSET for code in row), NEWLINE)), END]
    answer = [43, START, *([47] * 3 + [NEWLINE]) * 2, END, 44]
    expected = [[*prompt[:-1], *shown, prompt[-1]], [*negative[:-1], *shown, negative[-1]], prompt]
    assert [row.tolist() for row in rows] == [[*ids, *answer] for ids in expected]


def test_a_size_is_chosen_by_the_shape_of_the_image(pipe):
    pipe.register_to_config(sample_size=16)
    call = {"task": "general", "num_inference_steps": 1, "output_type": "latent"}
    pipe.register_to_config(max_sequence_length=400)
    assert pipe("fog", image=picture(1, 50, 200), **call).images.shape == (1, 4, 16)
    assert pipe("fog", image=picture(1, 50, 200), height=8, **call).images.shape == (1, 4, 16)
    assert pipe("fog", image=picture(1, 50, 200), height=8, width=12, **call).images.shape == (1, 4, 6)
    latents = torch.full((1, 3, 5), MASK)
    assert pipe("fog", image=picture(1, 50, 200), latents=latents, **call).images.shape == (1, 3, 5)


@pytest.mark.parametrize("sampler", ["confidence", "info_gain"])
@pytest.mark.parametrize(("g", "h"), [(2.5, 4.0), (0.0, 1.5), (1.5, 0.0), (0.0, 0.0)])
def test_images_are_the_same_alone_and_in_batches_and_take_a_row_for_each_condition(sampler, g, h):
    pipe = make_lumina_pipeline(sampler=sampler, entropy_bound=0, token_temperature=0.7)
    pipe.register_to_config(max_sequence_length=400)
    prompts, images = ["a red cat on the mat", "fog"], [picture(1), picture(2)]
    call = {**EDIT, "guidance_scale": g, "image_guidance_scale": h}
    together = pipe(prompts, image=images, num_images_per_prompt=2, generator=generators(0, 1, 2, 3), **call)
    chunked = pipe(
        prompts, image=images, num_images_per_prompt=2, generator=generators(0, 1, 2, 3), lookahead_batch_size=3, **call
    )
    assert torch.equal(together.images, chunked.images)
    for i in range(4):
        alone = pipe(prompts[i // 2], image=images[i // 2], generator=generators(i), **call)
        assert torch.equal(alone.images[0], together.images[i])
        if sampler == "confidence":
            assert alone.trace.num_evaluations.sum() == 4 * (1 + (g > 0) + (h > 0))


def test_logits_are_guided_by_text_and_by_image(pipe):
    """cond + g · (cond - uncond) + h · (cond - imageless), of three calls without guidance."""
    logits: list[torch.Tensor] = []

    def callback(pipe, step, timestep, kwargs):
        logits.append(kwargs["logits"])
        return {}

    call = {**EDIT, "num_inference_steps": 1, "image": picture(1)}
    seen = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["logits"]}
    off = {"guidance_scale": 0, "image_guidance_scale": 0}
    pipe("fog", **call, **seen, **off)
    pipe("mud", **call, **seen, **off)
    pipe("fog", negative_prompt="mud", guidance_scale=1.5, image_guidance_scale=0, **call, **seen)
    pipe("fog", negative_prompt="mud", guidance_scale=0, image_guidance_scale=3.0, **call, **seen)
    pipe("fog", negative_prompt="mud", guidance_scale=1.5, image_guidance_scale=3.0, **call, **seen)
    cond, uncond, by_text, by_image, by_both = logits
    torch.testing.assert_close(by_text, cond + 1.5 * (cond - uncond), atol=1e-4, rtol=0)
    assert not torch.allclose(by_image, cond, atol=1e-2)
    torch.testing.assert_close(by_both, by_text + by_image - cond, atol=1e-4, rtol=0)


def test_schedules_and_unguided_lookahead_are_those_of_both_kinds_of_guidance():
    pipe = make_lumina_pipeline(sampler="info_gain", num_candidates=3, entropy_bound=0, lazy_threshold=None, tokens_per_step=4)
    pipe.register_to_config(max_sequence_length=400)
    call = {**EDIT, "num_inference_steps": None, "image": picture(1)}
    full, half, unguided = (
        pipe("fog", generator=generators(0), **call, **more)
        for more in ({}, {"guidance_interval": (0.5, 1.0)}, {"guided_lookahead": False})
    )
    assert full.trace.num_evaluations.sum() == 3 * full.trace.num_states.sum()
    assert half.trace.num_states.sum() < half.trace.num_evaluations.sum() < 3 * half.trace.num_states.sum()
    # The state that a step begins with takes three rows, candidates one.
    assert unguided.trace.num_evaluations.sum() == unguided.trace.num_states.sum() + 2 * len(unguided.trace.winner)


@pytest.mark.parametrize("cache", ["context:0", "ml_cache:0.5:1.0:1"])
def test_a_cache_that_reuses_nothing_guides_as_none(pipe, cache):
    call = {**EDIT, "image": picture(1)}
    exact, cached = (pipe("fog", approximate_cache=one, generator=generators(0), **call) for one in (None, cache))
    assert torch.equal(exact.images, cached.images)
    assert exact.trace.num_evaluations.sum() == cached.trace.num_evaluations.sum()


def test_a_cache_keeps_a_branch_for_each_condition(pipe):
    call = {**EDIT, "image": [picture(1), picture(2)], "generator": generators(0, 1)}
    output = pipe(["fog", "mud"], approximate_cache="context:0.5", **call)
    assert (output.images < CODES).all()
    assert output.trace.num_evaluations.sum() > 0


@pytest.mark.parametrize("search", [{"num_beams": 2}, {"num_runs": 2}])
def test_searches_see_the_images(search):
    pipe = make_lumina_pipeline(sampler="info_gain", entropy_bound=0, token_temperature=1.0)
    output = pipe("fog", image=picture(1), generator=generators(0)[0], **search, **EDIT)
    assert (output.images < CODES).all()


def test_callbacks_change_either_scale_and_cannot_switch_on_what_began_off(pipe):
    call = {**EDIT, "image": picture(1), "return_dict": True}
    scales = []

    def lower(pipe, step, timestep, kwargs):
        scales.append((pipe.guidance_scale, pipe.image_guidance_scale, pipe.do_classifier_free_guidance))
        if step == 0:
            pipe._image_guidance_scale = 0.0
        if step == 1:
            pipe._guidance_scale = 0.0
        return {}

    output = pipe("fog", callback_on_step_end=lower, **call)
    assert scales == [(2.5, 4.0, True), (2.5, 0.0, True), (0.0, 0.0, False), (0.0, 0.0, False)]
    assert output.trace.num_evaluations.sum() == 3 + 2 + 1 + 1

    def raise_it(pipe, step, timestep, kwargs):
        pipe._image_guidance_scale = 2.0
        return {}

    with pytest.raises(ValueError, match=r"`_image_guidance_scale` must stay at 0 or below in a call that began so, got 2\.0\."):
        pipe("fog", callback_on_step_end=raise_it, image_guidance_scale=0, **call)
    pipe("fog", num_inference_steps=1, output_type="latent")
    assert pipe.image_guidance_scale == 0


def test_an_instruction_can_be_kept_to_a_part(pipe):
    """The model sees all of the image, and decodes what the mask covers; the other pixels come out as they were."""
    image, mask = picture(1), torch.zeros(8, 8, dtype=torch.bool)
    mask[2:6, 2:6] = True
    rows = recorded_rows(pipe)
    call = {**EDIT, "output_type": "pt", "image": image, "mask_image": mask}
    output = pipe("fog", **call).images[0]
    assert torch.equal(output[:, ~mask], image[:, ~mask])
    codes = [code + OFFSET for code in pipe.encode_image(image, 8, 8).flatten().tolist()]
    first = rows[0].tolist()
    place = first.index(START)
    assert [token for token in first[place + 1 : place + 21] if token != NEWLINE] == codes
    assert first[place + 21] == END
    assert first.count(47) == 4


def test_files_record_the_task_and_the_images(pipe):
    call = {**EDIT, "output_type": "pil", "image": [picture(1), picture(2)], "num_images_per_prompt": 2}
    first, second, third, _ = pipe(["fog", "mud"], **call).images
    assert {name: first.settings[name] for name in ("task", "guidance_scale", "image_guidance_scale")} == {
        "task": "image_editing",
        "guidance_scale": 2.5,
        "image_guidance_scale": 4.0,
    }
    digests = [image.settings["image_sha256"] for image in (first, second, third)]
    assert digests[0] == digests[1] != digests[2]
    plain = pipe("fog", num_inference_steps=1).images[0].settings
    assert not plain.keys() & {"task", "image_guidance_scale", "image_sha256"}


def test_the_command_line_shows_images_to_the_model_and_makes_them_again(pipe, tmp_path, capsys):
    pipe.save_pretrained(tmp_path / "model")
    for seed, name in enumerate(("photo", "style")):
        pixels = (picture(seed).movedim(0, -1) * 255).byte().numpy()
        PIL.Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    files = ["--image", tmp_path / "photo.png", "--style-image", tmp_path / "style.png"]
    call = [
        "generate",
        "fog",
        "--model",
        tmp_path / "model",
        "--output",
        tmp_path,
        "--steps",
        2,
        "--device",
        "cpu",
        "--height",
        4,
    ]
    capsys.readouterr()  # the bar of saving
    code, _, err = run(capsys, *call, "--width", 4, "--task", "style_transfer", *files)
    assert (code, err) == (0, "")
    (made,) = tmp_path.glob("*seed0.png")
    record = json.loads(PIL.Image.open(made).text["infogain"])
    assert {name: record[name] for name in ("task", "image", "style_image", "guidance_scale", "image_guidance_scale")} == {
        "task": "style_transfer",
        "image": "photo.png",
        "style_image": "style.png",
        "guidance_scale": 2.5,
        "image_guidance_scale": 4.0,
    }
    code, _, err = run(capsys, "show", made, "--again", "--device", "cpu", "--output", tmp_path / "again")
    assert (code, err) == (0, "")
    code, _, err = run(
        capsys, "generate", "fog", "--model", "demo", "--output", tmp_path / "no", "--task", "general", "--device", "cpu"
    )
    assert code == 2
    assert "`task` is not an argument of InfoGainPipeline." in err


IMAGE = picture(1)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"task": "painting", "image": IMAGE}, "`task` must be one of image_editing, control_generation, subject_generation, "),
        ({"task": "image_editing"}, "`image` must be given with `task`, got None with 'image_editing'."),
        ({"image": IMAGE, "image_guidance_scale": 2.0}, "`image_guidance_scale` must be None without `task`, such as 'image_edi"),
        ({"image_guidance_scale": "x"}, "`image_guidance_scale` must be a number in [-1e+06, 1e+06], got 'x'."),
        ({"task": "style_transfer", "image": IMAGE}, "`style_image` must be given with the task 'style_transfer'."),
        (
            {"task": "general", "image": IMAGE, "style_image": IMAGE},
            "`style_image` must be None without the task 'style_transfer'",
        ),
        (
            {"style_image": IMAGE},
            "`style_image` must be None without the task 'style_transfer', got Tensor of torch.float32 (3, 8",
        ),
        (
            {"task": "general", "image": IMAGE, "strength": 0.5},
            "`strength` must be None with `task` and no `mask_image`, got 0.5.",
        ),
        ({"task": "general", "image": IMAGE, "outpaint": {"left": 2}}, "`outpaint` must be None with `task`, got {'left': 2}."),
        ({"task": "general", "image": [IMAGE] * 3}, "`image` must be one, or one for each of the 1 prompts, got 3."),
        (
            {"task": "general", "image": [IMAGE, picture(1, 8, 64)]},
            "`height` and `width` must be given with images of different shapes, whose sizes would be 16 x 4 and 8 x 8 pixels.",
        ),
        ({"task": "general", "image": "photo.png"}, "`image` must be a PIL image, an array"),
        (
            {"task": "general", "image": IMAGE, "mask_blur": 2.0},
            "`mask_blur` must be 0 without `mask_image` or `outpaint`, got 2.0.",
        ),
        (
            {"task": "general", "image": IMAGE, "height": 16, "width": 16},
            "need 64 image tokens, which make a sequence of 164 with the prompt; the model takes 100",
        ),
    ],
)
def test_arguments_that_mean_nothing_together_are_refused(pipe, arguments, text):
    pipe.register_to_config(sample_size=8)
    with pytest.raises(ValueError) as error:
        pipe("fog", **arguments)
    assert text in str(error.value)


def test_prompts_are_encoded_for_a_task_that_there_is(pipe):
    ids, _ = pipe.encode_prompt(["fog"], "general")
    assert ids[0].tolist() == pipe.tokenizer(PROMPT_TEMPLATE.format(TASKS["general"], "fog")).input_ids
    with pytest.raises(ValueError, match=r"`task` must be one of image_editing, .*, got nan"):
        pipe.encode_prompt(["fog"], float("nan"))


def test_every_image_must_have_its_tokens(pipe):
    pipe.vqvae = None
    with pytest.raises(ValueError, match="vqvae"):
        pipe("fog", image=IMAGE, **EDIT)
