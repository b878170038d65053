import pytest
import torch
from helpers.amused import make_components
from helpers.sampling import generators, make_scheduler, random_logits

from diffusers_infogain import InfoGainPipeline, InfoGainScheduler, load, reductions, scoring
from diffusers_infogain.reductions import Reader, divergences, log_distributions, statistics

EAGER = (("backend", "eager"), ("dynamic", True))


@pytest.fixture
def pipe():
    pipe = InfoGainPipeline(**make_components())
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Rows(torch.nn.Module):
    """A model that notes how many states it is given."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.seen = []

    def __getattr__(self, name):
        return super().__getattr__(name) if name in ("model", "seen") else getattr(self.model, name)

    @torch.compiler.disable  # it is the sizes that matter here, and tracing takes seconds
    def forward(self, tokens, **kwargs):
        self.seen.append(len(tokens))
        return self.model(tokens, **kwargs)


@pytest.mark.parametrize("size", [1, 5, 64])
def test_compiled_reductions_are_the_plain_ones(size):
    logits, before = random_logits(size, 12, 30), random_logits(size, 12, 30, seed=1)
    before[..., 3] = logits[..., 3] = -torch.inf
    where = torch.rand(size, 12, generator=torch.Generator().manual_seed(0)) < 0.7
    where[0, 0] = True
    readers = Reader(logits, where, 5), Reader(before, where, 5)
    for plain, found in zip(statistics(readers[0]), statistics(readers[0], EAGER), strict=True):
        torch.testing.assert_close(found, plain, atol=1e-5, rtol=0)
    log_q, place = log_distributions(readers[1]), torch.arange(len(readers[1]))
    kl, top = divergences(readers[0], log_q, place, EAGER)
    expected = scoring.kl_divergence(*(reader.read() for reader in readers))
    torch.testing.assert_close(kl, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(top, statistics(readers[0]).top)


def test_a_compiled_scheduler_decides_alike_and_keeps_its_config():
    settings = {"sampler": "info_gain", "certainty": "uniform", "gain_reduction": "kl", "num_candidates": 4}
    plain, compiled = (make_scheduler(9, 3, **settings) for _ in range(2))
    compiled.compile(backend="eager")
    assert compiled.config == plain.config
    assert compiled.with_timesteps(2).compile_options == compiled.compile_options
    assert InfoGainScheduler.from_config(compiled.config).compile_options is None
    logits, after = random_logits(2, 6, 9), random_logits(2, 4, 6, 9, seed=1)
    proposals = [each.propose(logits, 2, torch.full((2, 6), 9), generator=generators(1, 2)) for each in (plain, compiled)]
    assert torch.equal(proposals[0].candidates, proposals[1].candidates)
    objectives = [each.select(after, 2, proposals[0]).objective for each in (plain, compiled)]
    torch.testing.assert_close(objectives[0], objectives[1], atol=1e-5, rtol=0)


def test_a_compiled_pipeline_draws_the_same_images_from_batches_of_a_power_of_two(pipe, tmp_path):
    pipe.scheduler = InfoGainScheduler.from_config(pipe.scheduler.config, lazy_threshold=None, num_candidates=3)
    options = {"prompt": ["a", "b", "c"], "num_inference_steps": 3, "output_type": "latent"}
    expected = pipe(**options, generator=generators(1, 2, 3))
    pipe.transformer = Rows(pipe.transformer)
    plain = pipe(**options, generator=generators(1, 2, 3))
    sizes = pipe.transformer.seen
    pipe.transformer.seen = []
    pipe.compile(backend="eager")
    compiled = pipe(**options, generator=generators(1, 2, 3))
    for output in (plain, compiled):
        assert torch.equal(output.images, expected.images)
        assert torch.equal(output.trace.num_evaluations, expected.trace.num_evaluations)
    assert pipe.transformer._orig_mod.seen == [1 << (size - 1).bit_length() for size in sizes]
    assert not {size.bit_count() for size in sizes} <= {1}  # else nothing was filled up


def test_compiling_again_takes_the_new_options_and_a_scheduler_set_later_is_compiled(pipe):
    model = pipe.transformer
    pipe.compile(backend="eager")
    pipe.compile(backend="aot_eager")
    assert pipe.transformer._orig_mod is model
    pipe.scheduler = InfoGainScheduler.from_config(pipe.scheduler.config)
    assert pipe.scheduler_for_call(pipe.scheduler).compile_options == (("dynamic", True), ("backend", "aot_eager"))
    assert pipe.scheduler.compile_options is None


def test_a_compiled_text_pipeline_writes_the_same_text():
    pipe = load("demo-text")
    pipe.set_progress_bar_config(disable=True)
    ids = pipe.tokenizer("M" + 16 * "_").input_ids
    expected = pipe(input_ids=[ids] * 2, max_new_tokens=0, generator=generators(1, 2))
    pipe.compile(backend="eager")
    assert pipe(input_ids=[ids] * 2, max_new_tokens=0, generator=generators(1, 2)).texts == expected.texts


def test_a_pipeline_without_a_model_cannot_be_compiled():
    pipe = InfoGainPipeline(**{**make_components(), "transformer": None})
    with pytest.raises(ValueError, match="The pipeline's `transformer` must not be None"):
        pipe.compile()


def test_kernels_are_compiled_once():
    assert reductions._compiled(scoring.moments, EAGER) is reductions._compiled(scoring.moments, EAGER)
