"""Score generated images against real ones.

    python metrics.py --weights runs/cifar10 --data data/cifar10-test       FID, KID, IS, ...
    python metrics.py --weights runs/cifar10/checkpoints/*.pt --data data/cifar10-test      which is best?
    python metrics.py --weights runs/cifar10 --data data/cifar10-test --trunc 2 1 0.5       fidelity, variety
    python metrics.py --fake samples.npz --real data/cifar10-test           images of any origin
    python metrics.py --weights runs/shapes --data shapes --inception none  SWD only, without Inception
    torchrun --nproc_per_node=8 -- metrics.py ...                           the same numbers, sooner

FID, KID, precision and recall compare the features of the Inception network, and IS its class probabilities.
Its weights, 91 MB, are fetched once into ~/.cache/torch. Sliced Wasserstein (SWD) compares small patches and
needs no network. Scores are comparable where network, number of images and real images are the same.

Reading order: distances between distributions; the Laplacian pyramid; Inception; features of a set of images;
the command. `frechet_distance` and `Inception` are what the FID is.
"""

import json
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from biggan import processes, rank
from sample import (CACHE, UserError, check_output, draw_seeds, fetch, gather_rows, keep_freed_memory,
                    own_rows_of, pick_device, prepare, read_generator, read_options, read_tensors, run,
                    save_atomically, say, start_processes, stop_processes)
from train import open_data


# ---------------------------------------------------------------- distances between distributions

def frechet_distance(mu1, cov1, mu2, cov2):
    """Squared Frechet distance between two Gaussians: |mu1 - mu2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)).

    With Inception's features it is the FID (Heusel et al. 2017). With C1 = A A^T and C2 = B B^T, the
    eigenvalues of C1 C2 are the squares of the singular values of A^T B, whose sum is the trace of the root:
    real, not negative, whatever the rank."""
    mu1, cov1, mu2, cov2 = (np.asarray(a, np.float64) for a in (mu1, cov1, mu2, cov2))
    trace_of_root = np.linalg.svd(factor(cov1).T @ factor(cov2), compute_uv=False).sum()
    return float(max(0, np.square(mu1 - mu2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * trace_of_root))


def factor(cov):
    """A (d, rank) with A A^T = C."""
    values, vectors = np.linalg.eigh(cov)
    nonzero = values > 1e-12 * values[-1]           # no rounded zeros, whose roots would count
    return vectors[:, nonzero] * np.sqrt(values[nonzero])


def inception_score(probs, splits=10):
    """exp E KL(p(y|x) || p(y)) over class probabilities (N, K): mean and deviation over splits (Salimans
    2016).

    1 where all images look alike to the classifier, K where it is sure of each image and all K classes are
    frequent."""
    assert 1 <= splits <= len(probs), f"{len(probs)} images cannot be cut into {splits} splits"
    scores = []
    for p in np.array_split(np.asarray(probs, np.float64), splits):
        log_ratio = np.log(p.clip(1e-300)) - np.log(p.mean(0).clip(1e-300))
        scores.append(np.exp((p * log_ratio).sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def kernel_distance(a, b, subsets=100, size=1000, seed=0):
    """Squared maximum mean discrepancy of (N, d), (M, d) under k(x, y) = (x . y / d + 1)^3: mean and
    deviation over random subsets of each. With Inception's features it is the KID (Binkowski et al. 2018).

    Unlike the FID it has no bias: for two samples of one distribution it is 0 on average."""
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    size, rng, distances = min(size, len(a), len(b)), np.random.default_rng(seed), []
    kernel = lambda x, y: (x @ y.T / x.shape[1] + 1)**3
    pairs = lambda k: (k.sum() - k.trace()) / (size * (size - 1))   # the mean without a point and itself
    for _ in range(subsets):
        x, y = (points[rng.choice(len(points), size, replace=False)] for points in (a, b))
        distance = pairs(kernel(x, x)) + pairs(kernel(y, y)) - 2 * kernel(x, y).mean()
        distances.append(distance.item())
    return float(np.mean(distances)), float(np.std(distances))


def precision_recall(real, fake, k=3):
    """Precision: the part of fake points (M, d) within reach of a real one (N, d), where a point reaches as
    far as its k-th nearest neighbour of its own set. Recall: the part of real points within reach of a fake
    one (Kynkaanniemi et al. 2019). Precision falls when images are poor, recall when there is no variety."""
    centre = torch.as_tensor(real).mean(0)          # distances stay the same, and round less
    real, fake = torch.as_tensor(real) - centre, torch.as_tensor(fake) - centre

    def within_reach(points, centres):
        reach = [torch.cdist(x, centres).kthvalue(k + 1).values for x in centres.split(1000)]
        inside = [(torch.cdist(x, centres) <= torch.cat(reach)).any(1) for x in points.split(1000)]
        return torch.cat(inside).double().mean().item()

    return within_reach(fake, real), within_reach(real, fake)


def sliced_wasserstein(a, b, projections=512, seed=0):
    """Mean Wasserstein-1 distance between point sets (N, d) along random directions (Rabin et al. 2011).

    On a line the optimal transport is known: the smallest point goes to the smallest, and so on."""
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    assert a.shape == b.shape, f"sets of different shapes: {tuple(a.shape)}, {tuple(b.shape)}"
    generator = torch.Generator().manual_seed(seed)
    directions = F.normalize(torch.randn(projections, a.shape[1], generator=generator, dtype=a.dtype), dim=1)
    total = 0.0
    for u in directions.split(32):
        line_a, line_b = (np.sort((u @ points.T).numpy()) for points in (a, b))     # (32, N)
        total += np.abs(line_a - line_b).mean(1).sum()
    return float(total / projections)


# ---------------------------------------------------------------- the Laplacian pyramid

def blur(x, gain=1.0):
    """Convolve each channel with the binomial filter (1 4 6 4 1) / 16 both ways, mirrored at the border."""
    line = torch.tensor([1, 4, 6, 4, 1], dtype=x.dtype) / 16
    kernel = (gain * line[:, None] * line).expand(x.shape[1], 1, 5, 5)
    return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), kernel, groups=x.shape[1])


def enlarge(x):                                     # (N, C, H, W) -> (N, C, 2H, 2W)
    one = x.new_ones(x.shape[1], 1, 1, 1)
    spread = F.conv_transpose2d(x, one, stride=2, output_padding=1, groups=x.shape[1])
    return blur(spread, gain=4)                     # 4: three of four pixels were zero


def laplacian_pyramid(x):
    """(N, C, R, R) -> list of bands R, R/2, ..., 16: each is what the next smaller image cannot show; the
    last is that image. Enlarging and adding them up from the last to the first gives x back."""
    bands = []
    while x.shape[-1] >= 32:
        small = blur(x)[:, :, ::2, ::2]
        bands.append(x - enlarge(small))
        x = small
    return bands + [x]


def patches(x, generator, per_image=128, side=7):
    """(N, C, R, R) -> (N * per_image, C * side * side): square patches at random places."""
    windows = x.unfold(2, side, 1).unfold(3, side, 1)       # (N, C, R - 6, R - 6, 7, 7), a view of x
    row, column = torch.randint(windows.shape[2], (2, len(x), per_image), generator=generator)
    return windows[torch.arange(len(x))[:, None], :, row, column].flatten(0, 1).flatten(1)


def pyramid_distances(real, fake):
    """Two sets of images (N, R, R, 3) uint8 -> {pixels per side: sliced Wasserstein distance of its patches}.

    Patches are scaled per colour channel to the mean and variance of the *real* ones. (Karras et al. scale
    each set by itself, which hides wrong contrast and colour.)"""
    levels = []                                     # of each set: side -> patches (N * 128, 3, 49)
    for seed, images in enumerate((real, fake)):
        generator, found = torch.Generator().manual_seed(seed), {}
        for x in torch.from_numpy(images).split(64):
            for band in laplacian_pyramid(x.permute(0, 3, 1, 2).float()):
                found.setdefault(band.shape[-1], []).append(patches(band, generator).unflatten(1, (3, -1)))
        levels.append({side: torch.cat(parts) for side, parts in found.items()})
    distances = {}
    for side, points in levels[0].items():
        mean, deviation = points.mean((0, 2), keepdim=True), points.std((0, 2), keepdim=True).clamp(min=1e-8)
        scaled = [((level[side] - mean) / deviation).flatten(1) for level in levels]
        distances[side] = sliced_wasserstein(*scaled)
    return distances


# ---------------------------------------------------------------- Inception
# FID and IS are defined by one network: Inception v3 as Google trained it in 2015, with 1,008 outputs. In
# three places it differs from later ones, such as torchvision's: its weights, average pooling, which leaves
# the border out of its means, and the last block, which pools by maximum. Scores of another network, or of
# images resized in another way (here as in the package pytorch-fid), cannot be compared with published ones.

INCEPTION = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
             "pt_inception-2015-12-05-6726825d.pth")

# Branches see the same input at different scales; each is a chain of convolutions; outputs are stacked.
AT_35 = "1x1", "5x5_1 5x5_2", "3x3dbl_1 3x3dbl_2 3x3dbl_3"
TO_17 = "3x3", "3x3dbl_1 3x3dbl_2 3x3dbl_3"
AT_17 = "1x1", "7x7_1 7x7_2 7x7_3", "7x7dbl_1 7x7dbl_2 7x7dbl_3 7x7dbl_4 7x7dbl_5"
TO_8 = "3x3_1 3x3_2", "7x7x3_1 7x7x3_2 7x7x3_3 7x7x3_4"
AT_8 = ("1x1", "3x3_1 3x3_2a", "3x3_1 3x3_2b", "3x3dbl_1 3x3dbl_2 3x3dbl_3a", "3x3dbl_1 3x3dbl_2 3x3dbl_3b")


class Inception(nn.Module):
    """Images (N, 3, H, W) uint8 -> pool features (N, 2048), logits (N, 1008).

    weights: the path of the published file, or a state dictionary of the same names. Raises UserError."""

    def __init__(self, weights):
        super().__init__()
        state = weights if isinstance(weights, dict) else read_tensors(weights)
        try:
            for name, tensor in fold_norms(state).items():
                self.register_buffer(name, tensor)
            self.to(memory_format=torch.channels_last)
            logits = self(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))[1]
            assert logits.shape == (1, 1008) and logits.isfinite().all(), "not 1,008 finite outputs"
        except (AssertionError, AttributeError, KeyError, RuntimeError) as error:
            raise UserError(f"not the Inception network of 2015 ({error}), which is {INCEPTION}") from None

    @torch.no_grad()
    def forward(self, x):
        x = F.interpolate(x.to(self.fc_bias), (299, 299), mode="bilinear", align_corners=False)
        x = (x / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        x = self.conv(x, "Conv2d_1a_3x3", 2, 0)     # (N, 32, 149, 149)
        x = self.conv(x, "Conv2d_2a_3x3", 1, 0)     # (N, 32, 147, 147)
        x = self.conv(x, "Conv2d_2b_3x3")           # (N, 64, 147, 147)
        x = F.max_pool2d(x, 3, stride=2)            # (N, 64, 73, 73)
        x = self.conv(x, "Conv2d_3b_1x1")           # (N, 80, 73, 73)
        x = self.conv(x, "Conv2d_4a_3x3", 1, 0)     # (N, 192, 71, 71)
        x = F.max_pool2d(x, 3, stride=2)            # (N, 192, 35, 35)
        for block in "Mixed_5b", "Mixed_5c", "Mixed_5d":
            x = self.mixed(x, block, AT_35)         # (N, 288, 35, 35) in the end
        x = self.halve(x, "Mixed_6a", TO_17)        # (N, 768, 17, 17)
        for block in "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e":
            x = self.mixed(x, block, AT_17)         # (N, 768, 17, 17)
        x = self.halve(x, "Mixed_7a", TO_8)         # (N, 1280, 8, 8)
        x = self.mixed(x, "Mixed_7b", AT_8)         # (N, 2048, 8, 8)
        x = self.mixed(x, "Mixed_7c", AT_8, F.max_pool2d(x, 3, stride=1, padding=1))
        features = x.mean((2, 3))                   # (N, 2048)
        return features, F.linear(features, self.fc_weight, self.fc_bias)

    def conv(self, x, name, stride=1, padding="same"):
        """Convolution, with its batch norm in the weights, and ReLU."""
        return F.conv2d(x, getattr(self, name), getattr(self, name + "_bias"), stride, padding).relu_()

    def chain(self, x, block, names, *last):
        *names, final = names.split()
        for name in names:
            x = self.conv(x, f"{block}_branch{name}")
        return self.conv(x, f"{block}_branch{final}", *last)

    def mixed(self, x, block, branches, pooled=None):
        if pooled is None:
            pooled = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        chains = [self.chain(x, block, names) for names in branches]
        return torch.cat(chains + [self.chain(pooled, block, "_pool")], 1)

    def halve(self, x, block, branches):
        chains = [self.chain(x, block, names, 2, 0) for names in branches]
        return torch.cat(chains + [F.max_pool2d(x, 3, stride=2)], 1)


def fold_norms(state):
    """Batch norm with fixed statistics scales and shifts each channel, and so can the convolution before it:
    (W x) s + t = (s W) x + t."""
    folded = {"fc_weight": state["fc.weight"].float(), "fc_bias": state["fc.bias"].float()}
    for name in [name.removesuffix(".conv.weight") for name in state if name.endswith(".conv.weight")]:
        parts = "weight", "bias", "running_mean", "running_var"
        norm = [state[f"{name}.bn.{part}"].double() for part in parts]
        s, ours = norm[0] / (norm[3] + 0.001).sqrt(), name.replace(".", "_")
        folded[ours] = (s[:, None, None, None] * state[name + ".conv.weight"]).float()
        folded[ours + "_bias"] = (norm[1] - s * norm[2]).float()
    return folded


# ---------------------------------------------------------------- features of a set of images

KEPT = 50_000                   # the first images, for KID, precision, recall and IS
PATCHED = 2048                  # the first images, for the sliced Wasserstein distance


@dataclass
class Features:
    """What the scores need of n images."""
    n: int
    mu: np.ndarray = None           # mean (2048,) of all features
    cov: np.ndarray = None          # and covariance (2048, 2048)
    kept: torch.Tensor = None       # features of the first images (KEPT, 2048)
    probs: np.ndarray = None        # class probabilities of these (KEPT, 1008)
    pixels: np.ndarray = None       # the first images (PATCHED, R, R, 3) uint8


def features_of(images, n, inception, what):
    """Features of n images, of which images(rows) gives some (k, R, R, 3) uint8, in every process its own."""
    n = n if inception else min(n, PATCHED)
    pixels, kept, probs, moments = [], [], [], 0
    for rows in own_rows_of(n, 16, what):           # 16 images fit into a CPU's cache
        x = images(rows)
        pixels.append(x[rows < PATCHED])
        if inception:
            f, logits = inception(torch.from_numpy(x).permute(0, 3, 1, 2).to(inception.fc_bias.device))
            both = torch.cat([torch.ones_like(f[:, :1]), f], 1).double()
            moments = moments + both.T @ both[:, 1:]  # the sum of f, and below it that of f f^T
            kept.append(f.cpu().numpy()[rows < KEPT])
            # The IS leaves the last bias out, as its authors' code did.
            probs.append((logits - inception.fc_bias).softmax(1).cpu().numpy()[rows < KEPT])
    pixels = gather_rows(pixels)
    if not inception:
        return Features(n, pixels=pixels)
    moments = moments.cpu()
    if processes() > 1:
        dist.all_reduce(moments)
    mu, products = moments[0].numpy() / n, moments[1:].numpy()
    cov = (products - n * np.outer(mu, mu)) / (n - 1)
    return Features(n, mu, cov, torch.from_numpy(gather_rows(kept)), gather_rows(probs), pixels)


def features_of_data(data, n, inception):
    """Of the first n images in a fixed random order, or all if there are fewer."""
    order = np.random.default_rng(0).permutation(len(data))[:n]
    images = lambda rows: np.stack([data[i][0] for i in order[rows]])
    return features_of(images, len(order), inception, "real images")


def features_of_samples(G, n, seed, inception):
    """Of n samples, the classes in turn, image i from seed * n + i alone, so that no two seeds share one."""
    images = lambda rows: draw_seeds(G, rows % G.config.n_classes, seed * n + rows, G.noise)
    return features_of(images, n, inception, "samples")


def compare(real, fake):
    """Every score that these two sets allow, as a dictionary; KID and SWD times 1000."""
    scores = {}
    if fake.mu is not None:
        scores["FID"] = frechet_distance(real.mu, real.cov, fake.mu, fake.cov)
        scores["IS"], scores["IS_deviation"] = inception_score(fake.probs, min(10, len(fake.probs)))
    if real.kept is not None:
        half = min(len(real.kept), len(fake.kept)) // 2     # subsets of all would all be the same
        kid = kernel_distance(real.kept, fake.kept, size=min(1000, half))
        scores["KID"], scores["KID_deviation"] = 1000 * kid[0], 1000 * kid[1]
        scores["precision"], scores["recall"] = precision_recall(real.kept, fake.kept)
    if real.pixels is not None:
        n = min(len(real.pixels), len(fake.pixels))
        distances = pyramid_distances(real.pixels[:n], fake.pixels[:n])
        scores["SWD"] = 1000 * sum(distances.values()) / len(distances)
        scores["SWD_levels"] = {side: 1000 * distance for side, distance in distances.items()}
    return scores


# ---------------------------------------------------------------- the command

@dataclass
class Options:
    weights: list[str] = None       # as for sample.py, one or several
    fake: str = None                # score the images in this folder or FILE.npz instead
    data: str = None                # real images: a folder, packed, shapes, FILE.npz of images or statistics
    real: str = None                # the same as --data
    n: int = 10_000                 # samples; compare only scores of equal n
    trunc: list[float] = None       # truncations, see sample.py
    seed: int = 0                   # which set of n noise vectors; 0 unless given
    inception: str = None           # Inception's weights, fetched unless given; or none
    save_stats: str = None          # FILE.npz: keep the statistics of --data, to be used as --data
    out: str = "metrics.json"       # FILE.json


def parse(arguments):
    o = Options(**read_options(Options, arguments, __doc__))
    o.data = o.data or o.real
    if o.n < 8 or o.seed < 0 or not o.data:
        raise UserError("name real images by --data; --n must be at least 8 and --seed at least 0")
    check_output(o.out, ".json")
    if o.save_stats:
        check_output(o.save_stats, ".npz")
    if o.save_stats and o.inception == "none":
        raise UserError("--save-stats keeps what Inception needs: leave out --inception none")
    return o


def real_features(o, resolution, inception):
    """Of --data, or the statistics that --save-stats or another program wrote."""
    stored = np.load(o.data) if o.data.endswith(".npz") else {}
    if "mu" in stored:
        return Features(0, stored["mu"], stored["sigma"])
    data = open_data(o.data, resolution, held_out=True)
    real = features_of_data(data, o.n if o.data == "shapes" else None, inception)
    if o.save_stats and rank() == 0:
        save_atomically(o.save_stats, lambda f: np.savez(f, mu=real.mu, sigma=real.cov))
    return real


def sets_to_score(o, inception):
    """Yields (name, truncation, resolution, features) of each set of weights and truncation, or of --fake."""
    if o.fake:
        data = open_data(o.fake)
        yield o.fake, None, data.resolution, features_of_data(data, None, inception)
        return
    for weights in o.weights or [None]:
        G = read_generator(weights)
        for truncation in o.trunc or [None]:
            samples = features_of_samples(prepare(G, truncation), o.n, o.seed, inception)
            yield weights or "the newest run", truncation, G.config.resolution, samples


def main(arguments):
    o = parse(arguments)
    device, inception, real, results = pick_device(), None, None, []
    keep_freed_memory()
    if o.inception != "none":
        path = o.inception or fetch(INCEPTION, CACHE / INCEPTION.rpartition("/")[2], "6726825d")
        inception = Inception(path).to(device)
    start_processes()
    for name, truncation, resolution, fake in sets_to_score(o, inception):
        real = real or real_features(o, resolution, inception)
        if rank() == 0:
            if results and results[0]["resolution"] != resolution:
                raise UserError("score weights of different resolutions one by one")
            scores = compare(real, fake)
            if not scores:
                raise UserError("statistics need Inception: leave out --inception none")
            results.append({"images": name, "truncation": truncation, "n": fake.n, "seed": o.seed,
                            "data": o.data, "n_real": real.n, "resolution": resolution,
                            "inception": o.inception or INCEPTION, **scores})
            numbers = [f"{score} {value:.4g}" for score, value in scores.items() if isinstance(value, float)]
            say(f"{name}, truncation {truncation}, n {fake.n:,}: {'  '.join(numbers)}")
            save_atomically(o.out, lambda f: f.write(json.dumps(results, indent=1).encode()))
    if len(results) > 1:
        best = min(results, key=lambda result: result["FID" if inception else "SWD"])
        say(f"best: {best['images']}, truncation {best['truncation']}")
    say("written:", o.out)
    stop_processes()


if __name__ == "__main__":
    run(main)
