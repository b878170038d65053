import math

import numpy as np
import pytest
import scipy.linalg
import scipy.special
import scipy.stats
import torch
import transformers
from helpers.metrics import TinyFeatures, metrics, random_images, save_tiny_clip, torchmetrics_fid
from torchmetrics.multimodal.clip_score import CLIPScore

from diffusers_infogain.evaluation.features import ClipFeatures
from diffusers_infogain.evaluation.metrics import (
    CaptionVariety,
    ClipScore,
    Diversity,
    FrechetDistance,
    PrecisionRecall,
    accumulation,
    frechet_distance,
)
from diffusers_infogain.evaluation.reference import ReferenceStatistics, set_reference

pytestmark = pytest.mark.filterwarnings("ignore:Metric `:UserWarning")

REAL, FAKE = random_images(60, seed=0), random_images(40, seed=1, high=200)


def moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return features.mean(0), np.cov(features, rowvar=False)


def scipy_distance(real: np.ndarray, fake: np.ndarray) -> float:
    (mu1, sigma1), (mu2, sigma2) = moments(real), moments(fake)
    root = scipy.linalg.sqrtm(sigma1 @ sigma2).real
    return float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2 - 2 * root))


def updated(metric, real=REAL, fake=FAKE, batch: int = 16):
    for images, is_real in ((real, True), (fake, False)):
        for part in images.split(batch):
            metric.update(part, real=is_real)
    return metric


@pytest.mark.parametrize("size", [1, 5, 40])
def test_frechet_distance_equals_scipy(size):
    generator = np.random.default_rng(size)
    real = generator.normal(size=(200, size)) @ generator.normal(size=(size, size))
    fake = generator.normal(size=(150, size)) + 0.3
    (mu1, sigma1), (mu2, sigma2) = moments(real), moments(fake)
    stats = mu1, sigma1.reshape(size, size), mu2, sigma2.reshape(size, size)
    found = frechet_distance(*stats).item()
    root = scipy.linalg.sqrtm(stats[1] @ stats[3]).real
    assert found == pytest.approx(((mu1 - mu2) ** 2).sum() + np.trace(stats[1] + stats[3] - 2 * root), rel=1e-9)
    assert frechet_distance(*stats[2:], *stats[:2]).item() == pytest.approx(found, rel=1e-9)


def test_frechet_distance_of_commuting_covariances_is_known():
    sigma1, sigma2 = torch.diag(torch.tensor([4.0, 9.0, 0.0])), torch.diag(torch.tensor([1.0, 0.0, 0.0]))
    mu1, mu2 = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 0.0, 3.0])
    assert frechet_distance(mu1, sigma1, mu2, sigma2).item() == pytest.approx(4 + (2 - 1) ** 2 + 9)


def test_frechet_distance_is_never_negative():
    for seed in range(20):
        features = torch.randn(10, 30, generator=torch.Generator().manual_seed(seed)).double()
        mu, sigma = features.mean(0), torch.cov(features.T)
        assert 0 <= frechet_distance(mu, sigma, mu, sigma) < 1e-4


def test_frechet_distance_checks_its_arguments():
    mu, sigma = torch.zeros(3), torch.eye(3)
    with pytest.raises(ValueError, match=r"must have shape \(D,\).*got \(3,\), \(2,\), \(3, 3\), \(3, 3\)"):
        frechet_distance(mu, sigma, torch.zeros(2), sigma)
    with pytest.raises(ValueError, match="must be finite"):
        frechet_distance(mu, sigma * math.nan, mu, sigma)


@pytest.mark.parametrize("build", [FrechetDistance, torchmetrics_fid])
def test_frechet_metrics_equal_scipy_on_the_same_features(build):
    extractor = TinyFeatures()
    metric = build(extractor)
    assert extractor.calls == 0  # no dummy image
    expected = scipy_distance(extractor(REAL).double().numpy(), extractor(FAKE).double().numpy())
    assert updated(metric).compute().item() == pytest.approx(expected, rel=1e-5)


def test_frechet_distance_is_titled_by_its_extractor():
    assert FrechetDistance(TinyFeatures()).title == "FD (tiny)"


def test_one_image_has_no_covariance():
    metric = FrechetDistance(TinyFeatures())
    metric.update(REAL, real=True)
    metric.update(FAKE[:1], real=False)
    with pytest.raises(ValueError, match=r"FD \(tiny\) needs at least 2 generated images, got 1"):
        metric.compute()


@pytest.mark.parametrize("build", [FrechetDistance, torchmetrics_fid, metrics.kid, PrecisionRecall])
def test_float_images_are_refused(build):
    with pytest.raises(ValueError, match="`images` must be uint8"):
        build(TinyFeatures()).update(REAL / 255, real=False)


def test_kid_of_one_subset_of_everything_is_the_unbiased_estimate():
    extractor = TinyFeatures()
    real, fake = (extractor(images[:40]).double().numpy() for images in (REAL, FAKE))

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    m = 40
    within = [(k.sum() - np.trace(k)) / (m * (m - 1)) for k in (kernel(real, real), kernel(fake, fake))]
    mean, std = updated(metrics.kid(extractor, subsets=2, subset_size=40), real=REAL[:40]).compute()
    assert mean.item() == pytest.approx(sum(within) - 2 * kernel(real, fake).mean(), abs=1e-4)
    assert std.item() < 1e-4


def inception_by_hand(logits: np.ndarray, order: np.ndarray, splits: int) -> list[float]:
    p = scipy.special.softmax(logits[order], axis=1)
    parts = np.array_split(p, splits)
    return [math.exp(scipy.stats.entropy(part.T, part.mean(0)[:, None]).mean()) for part in parts]


def test_inception_score_equals_the_formula():
    extractor = TinyFeatures()
    mean, std = metrics.inception_score(extractor, splits=4, seed=3)(REAL)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(3)).numpy()
    scores = inception_by_hand(extractor(REAL).numpy(), order, 4)
    assert mean.item() == pytest.approx(np.mean(scores), rel=1e-5)
    assert std.item() == pytest.approx(np.std(scores, ddof=1), rel=1e-3)


def results_by_seed(seed: int) -> list[float]:
    extractor = TinyFeatures()
    kid = updated(metrics.kid(extractor, subsets=5, subset_size=10, seed=seed)).compute()
    score = metrics.inception_score(extractor, splits=5, seed=seed)(REAL)
    return [value.item() for value in (*kid, *score)]


def test_random_subsets_depend_on_the_seed_and_leave_the_global_generator_alone():
    state = torch.get_rng_state()
    first = results_by_seed(0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert results_by_seed(0) == first
    assert all(a != b for a, b in zip(results_by_seed(1), first, strict=True))


def test_subsets_and_splits_must_fit_the_images():
    extractor = TinyFeatures()
    with pytest.raises(ValueError, match="`subset_size` must be at most the number of generated images, 40, got 50"):
        updated(metrics.kid(extractor, subset_size=50)).compute()
    with pytest.raises(ValueError, match="`subset_size` must be at least 2, got 1"):
        metrics.kid(extractor, subset_size=1)
    with pytest.raises(ValueError, match="`splits` must be at least 2, got 1"):
        metrics.inception_score(extractor, splits=1)
    for images in (REAL[:4], REAL[:25]):  # torch.chunk makes 4 and 9 parts of them
        with pytest.raises(ValueError, match=rf"`splits` must be a number of parts that {len(images)} images fill, got 10"):
            metrics.inception_score(extractor)(images)


def precision_recall_by_hand(real: np.ndarray, fake: np.ndarray, k: int) -> tuple[float, float]:
    def distance(a, b):
        return math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)))

    def share(points, centres):
        radii = [sorted(distance(c, other) for j, other in enumerate(centres) if j != i)[k - 1] for i, c in enumerate(centres)]
        return np.mean([any(distance(p, c) <= r for c, r in zip(centres, radii, strict=True)) for p in points])

    return share(fake, real), share(real, fake)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_equal_brute_force(monkeypatch, k):
    monkeypatch.setattr(accumulation, "CHUNK", 7)
    extractor = TinyFeatures()
    found = updated(PrecisionRecall(extractor, k=k)).compute()
    expected = precision_recall_by_hand(extractor(REAL).double().tolist(), extractor(FAKE).double().tolist(), k)
    assert (found["precision"].item(), found["recall"].item()) == pytest.approx(expected)
    assert 0 < min(expected) < max(expected) < 1


def test_precision_and_recall_of_copies_are_one():
    # equal images have balls of no extent, which hold them nevertheless
    images = REAL[:2].repeat_interleave(4, 0)
    found = updated(PrecisionRecall(TinyFeatures()), images, images).compute()
    assert (found["precision"], found["recall"]) == (1, 1)


def test_precision_and_recall_need_neighbors():
    with pytest.raises(ValueError, match="Precision and recall needs at least 4 generated images, got 3"):
        updated(PrecisionRecall(TinyFeatures()), fake=FAKE[:3]).compute()
    with pytest.raises(ValueError, match="`k` must be at least 1, got 0"):
        PrecisionRecall(TinyFeatures(), k=0)


@pytest.mark.parametrize("groups", [None, [0, 1, 2, 0, 1, 0, 7, 1, 1, 0]])
def test_diversity_equals_brute_force(groups):
    extractor = TinyFeatures()
    images = random_images(10)
    images[3] = images[0]  # of the same group
    images[6] = images[1]  # of another group, where groups are told apart
    metric = Diversity(extractor)
    for part in (slice(0, 4), slice(4, 10)):
        metric.update(images[part], None if groups is None else torch.tensor(groups[part]))
    features, numbers = extractor(images).double(), groups or [0] * 10
    pairs = [(i, j) for i in range(10) for j in range(i) if numbers[i] == numbers[j]]
    found = metric.compute()
    assert found["distance"].item() == pytest.approx(np.mean([(features[i] - features[j]).norm() for i, j in pairs]), rel=1e-5)
    assert found["distinct"].item() == pytest.approx((8 if groups is None else 9) / 10)


def test_one_pixel_makes_an_image_distinct():
    images = random_images(1).repeat(3, 1, 1, 1)
    images[2, 0, 0, 0] ^= 1
    assert Diversity(TinyFeatures())(images)["distinct"].item() == pytest.approx(2 / 3)


def test_diversity_needs_a_pair_and_a_group_for_each_image():
    with pytest.raises(ValueError, match="Diversity needs at least 2 images of one group, got 2 images without a pair"):
        Diversity(TinyFeatures())(FAKE[:2], [0, 1])
    with pytest.raises(ValueError, match=r"`groups` must be of shape \(2,\), got \(3,\)"):
        Diversity(TinyFeatures()).update(FAKE[:2], [0, 1, 2])


def test_variety_within_a_caption_equals_brute_force():
    extractor = TinyFeatures()
    real, fake = random_images(12), random_images(9, seed=1)
    real_texts, fake_texts = list("aaaabbbccdee"), list("aaabbcdde")  # of "c" and "e" there is one image, of "d" one real one
    metric = CaptionVariety(extractor)
    for part in (slice(0, 5), slice(5, None)):
        metric.update(real[part], real_texts[part], real=True)
        metric.update(fake[part], fake_texts[part], real=False)
    y, x = (extractor(images).double() for images in (real, fake))

    def mean_distance(a, b, same):
        return np.mean([float((a[i] - b[j]).norm()) for i in range(len(a)) for j in range(len(b)) if not (same and i == j)])

    within = within_real = between = 0.0
    for caption, weight in (("a", 3 / 5), ("b", 2 / 5)):
        own = x[[text == caption for text in fake_texts]]
        others = y[[text == caption for text in real_texts]]
        within += weight * mean_distance(own, own, True)
        within_real += weight * mean_distance(others, others, True)
        between += weight * mean_distance(own, others, False)
    found = metric.compute()
    assert found["variety"].item() == pytest.approx(within / within_real, rel=1e-5)
    assert found["energy"].item() == pytest.approx((2 * between - within - within_real) / within_real, rel=1e-4)


def test_variety_of_the_real_images_is_one_and_of_copies_nothing():
    images, texts = random_images(8), list("aaaabbbb")
    metric = CaptionVariety(TinyFeatures(), reset_real_features=False)
    metric.update(images, texts, real=True)
    metric.update(images, texts, real=False)
    found = metric.figures()
    assert found["variety within a caption"].item() == pytest.approx(1)
    # a distance of 0 to itself is among the 4 x 4 of X to Y, and not among the 4 x 3 of X to X'
    assert found["energy distance within a caption"].item() == pytest.approx(2 * 3 / 4 - 2)
    metric.reset()  # which keeps the real images
    metric.update(images[[0, 0, 4, 4]], list("aabb"), real=False)
    found = metric.compute()
    assert found["variety"].item() == 0
    assert found["energy"].item() > 0
    metric.reset()
    metric.update(images[[0, 1, 4, 5]], list("aabb"), real=False)
    assert metric.compute()["variety"].item() > 0


def test_variety_needs_two_images_of_a_caption_and_a_text_for_each():
    metric = CaptionVariety(TinyFeatures())
    with pytest.raises(ValueError, match="`texts` must be a list of one text for each of the 2 images, got 'ab'"):
        metric.update(FAKE[:2], "ab", real=False)
    metric.update(FAKE[:2], ["a", "b"], real=False)
    metric.update(REAL[:2], ["a", "a"], real=True)
    message = "needs at least 2 generated and 2 real images of one, got 2 generated and 2 real images without such a caption"
    with pytest.raises(ValueError, match=message):
        metric.compute()


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> str:
    return save_tiny_clip(tmp_path_factory.mktemp("clip"))


class Pooled:
    """What torchmetrics expects of a CLIP model, also from transformers 5."""

    def __init__(self, clip: ClipFeatures):
        self.clip, self.config = clip, clip.network.config

    def to(self, device):
        return self

    def get_image_features(self, pixel_values):
        found = self.clip.network.get_image_features(pixel_values=pixel_values)
        return getattr(found, "pooler_output", found)

    def get_text_features(self, input_ids, attention_mask):
        found = self.clip.network.get_text_features(input_ids=input_ids, attention_mask=attention_mask)
        return getattr(found, "pooler_output", found)


def test_clip_score_equals_torchmetrics_where_no_image_is_clamped(clip_folder):
    clip = ClipFeatures(clip_folder)
    processor = transformers.CLIPProcessor(image_processor=clip.image_processor, tokenizer=clip.tokenizer)
    images = random_images(12, size=20)
    texts = [chr(ord("a") + i) * (i % 3 + 1) for i in range(12)]
    cosine = torch.nn.functional.cosine_similarity(clip(images), clip.text_features(texts))
    positive = (cosine > 0).nonzero()[:, 0]
    assert 1 < len(positive) < 12
    theirs, ours = CLIPScore(lambda: (Pooled(clip), processor)), ClipScore(clip_folder)
    for metric in (theirs, ours):
        for i in positive.tolist():
            metric.update(images[i : i + 1], [texts[i]])
    assert ours.compute().item() == pytest.approx(theirs.compute().item(), rel=1e-4)
    # and images that do not fit their text count as 0, each of them
    assert ClipScore(clip)(images, texts).item() == pytest.approx(100 * cosine.clamp(min=0).mean().item(), rel=1e-5)


def test_clip_score_checks_images_and_texts(clip_folder):
    metric = ClipScore(clip_folder)
    with pytest.raises(ValueError, match="`images` must be uint8"):
        metric.update(torch.rand(1, 3, 16, 16), ["a"])
    for texts in (["a"], "ab"):
        with pytest.raises(ValueError, match="`texts` must be a list of one text for each of the 2 images"):
            metric.update(random_images(2), texts)
    with pytest.raises(ValueError, match="CLIP score needs at least 1 captioned images, got 0"):
        metric.compute()


def results_on_rank(rank: int, ranks: int, store: str = "", queue=None) -> list[float]:
    """Every metric, where rank 0 has all batches but the last, rank 1 has that one, and others have none; one rank has all."""
    torch.set_num_threads(1)
    if ranks > 1:
        torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=ranks)

    def share(images: torch.Tensor) -> list[torch.Tensor]:
        parts = list(images.split(16))
        return parts if ranks == 1 else [parts[:-1], parts[-1:], []][rank]

    extractor = TinyFeatures()
    of_pairs = [FrechetDistance(extractor), PrecisionRecall(extractor), metrics.kid(extractor, subsets=2, subset_size=40)]
    of_pairs += [metrics.FrechetDistanceAtInfinity(extractor), metrics.Cmmd(extractor)]
    of_fakes = [metrics.inception_score(extractor, splits=2), Diversity(extractor), FrechetDistance(extractor)]
    set_reference(of_fakes[-1], ReferenceStatistics(np.zeros(6), np.eye(6)))  # on every rank
    for metric in of_pairs:
        for images in share(REAL[:40]):
            metric.update(images, real=True)
        for images in share(FAKE):
            metric.update(images, real=False)
    for images in share(FAKE):
        of_fakes[0].update(images)
        of_fakes[1].update(images, torch.arange(len(images)) % 3)
        of_fakes[2].update(images, real=False)
    variety = CaptionVariety(extractor)
    for real, chosen in ((True, REAL[:40]), (False, FAKE)):
        for images in share(chosen):
            variety.update(images, [str(int(image[0, 0, 0]) % 3) for image in images], real=real)
    values = []
    for metric in [*of_pairs, *of_fakes, variety]:
        found = metric.compute()
        found = found.values() if isinstance(found, dict) else found if isinstance(found, tuple) else [found]
        values += [value.item() for value in found]
    if queue is not None:
        queue.put((rank, values))
    return values


@pytest.mark.filterwarnings("ignore:The ``compute`` method:UserWarning")
def test_ranks_with_unequal_numbers_of_updates_agree_with_one_process(tmp_path):
    context = torch.multiprocessing.get_context("forkserver")
    # what takes long to import, once for all three
    context.set_forkserver_preload(["diffusers_infogain.evaluation.features", "diffusers_infogain.pipeline_infogain"])
    queue = context.Queue()
    processes = [context.Process(target=results_on_rank, args=(rank, 3, str(tmp_path / "store"), queue)) for rank in range(3)]
    for process in processes:
        process.start()
    try:
        found = dict(queue.get(timeout=120) for _ in processes)
    finally:
        for process in processes:
            process.join(10)
            process.kill()
    expected = results_on_rank(0, 1)
    assert len(expected) == 16
    for rank in range(3):
        assert found[rank] == pytest.approx(expected, rel=1e-5, abs=1e-6)
