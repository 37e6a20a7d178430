"""Score generated images against real ones.

    python metrics.py --weights runs/cifar10 --data data/cifar10-test                FID, KID, IS, precision, recall, sliced Wasserstein
    python metrics.py --weights runs/cifar10 --data data/cifar10-test --trunc 2 1.5 1 0.5 0.04 --plot curve.png     fidelity against variety
    python metrics.py --weights runs/a runs/b runs/c --data data/cifar10-test        several runs: mean and deviation
    python metrics.py --fake samples.npz --real data/cifar10-test                    an array or a folder against a folder
    python metrics.py --weights runs/shapes --data shapes --inception none           without Inception: sliced Wasserstein only
    torchrun --nproc_per_node=8 -- metrics.py ...                                    the same numbers, sooner (-- hides --n from torchrun)

FID, KID, precision and recall compare what the Inception network sees in the images, and IS how it classifies them. Its weights, 91 MB, are
fetched once into ~/.cache/biggan. Sliced Wasserstein compares small patches and needs no network. Numbers can be compared if network,
resizer, the number of images and the real images are the same; they are printed and stored with every score.

Reading order: distances between distributions, the Laplacian pyramid, Inception, what is kept of a set of images, signs of collapse (which
train.py watches), the command.
"""

import hashlib
import importlib.util
import itertools
import json
import math
import os
import struct
import zipfile
import zlib
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn

from biggan import Discriminator, processes, rank, truncated_normal
from sample import (CACHE, KINDS, Parser, Progress, UserError, at_least_one, check_output, check_truncation, draw_seeds, fetch_weights,
                    image_grid, keep_freed_memory, last_line, pick_device, positive, prepare, read_generator, read_tensors, read_weights,
                    run, save_atomically, seed_number, tell, warn)


# ---------------------------------------------------------------- distances between distributions

def frechet_distance(mu1, cov1, mu2, cov2):
    """Squared Frechet distance between two Gaussians: |mu1 - mu2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)). Means (d,), covariances (d, d).

    With Inception's features it is the FID (Heusel et al. 2017). With C1 = A A^T and C2 = B B^T, the eigenvalues of C1 C2 are the
    squares of the singular values of A^T B, whose sum is the trace of the root: real and not negative, whatever the rank."""
    mu1, cov1, mu2, cov2 = (np.asarray(a, np.float64) for a in (mu1, cov1, mu2, cov2))
    trace_of_root = np.linalg.svd(factor(cov1).T @ factor(cov2), compute_uv=False).sum()
    return float(max(0, np.square(mu1 - mu2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * trace_of_root))


def expected_frechet_distance(cov, n, m):
    """What the Frechet distance between samples of n and m points of the same Gaussian is on average, to first order in 1/n and 1/m: how
    far the FID is too high only because there are so few images. With the eigenvalues l of C it is
    (1/n + 1/m) (sum l_i + 1/2 sum (1 + [i = j]) l_i l_j / (l_i + l_j))."""
    values = np.linalg.eigvalsh(cov)
    values = values[values > 1e-12 * values[-1]]
    pairs = np.outer(values, values) / np.add.outer(values, values)
    return float((1 / n + 1 / m) * (values.sum() + (pairs.sum() + np.trace(pairs)) / 2))


def factor(cov):
    """A (d, rank) with A A^T = C."""
    try:
        return np.linalg.cholesky(cov)
    except np.linalg.LinAlgError:                                   # no full rank, since there are no more points than dimensions
        values, vectors = np.linalg.eigh(cov)
        nonzero = values > 1e-12 * values[-1]                       # zeros come out as roundings, whose roots would count
        return vectors[:, nonzero] * np.sqrt(values[nonzero])


def inception_score(probs, splits=10):
    """exp E KL(p(y|x) || p(y)) over class probabilities (N, K): mean and standard deviation over the splits (Salimans et al. 2016).

    1 where all images look alike to the classifier, K where it is sure of each image and all K classes are equally frequent."""
    probs = np.asarray(probs, np.float64)
    if not 1 <= splits <= len(probs):
        raise ValueError(f"{len(probs)} images cannot be cut into {splits} splits")
    scores = []
    for p in np.array_split(probs, splits):
        log_ratio = np.log(p.clip(1e-300)) - np.log(p.mean(0).clip(1e-300))
        scores.append(np.exp((p * log_ratio).sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def kernel_distance(a, b, subsets=100, size=1000, seed=0):
    """Squared maximum mean discrepancy of two sets (N, d), (M, d) under k(x, y) = (x . y / d + 1)^3: mean and standard deviation over
    random subsets of each. With Inception's features it is the KID (Binkowski et al. 2018).

    Unlike the FID it has no bias: for two samples of the same distribution it is 0 on average, and now and then negative."""
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    size, rng, distances = min(size, len(a), len(b)), np.random.default_rng(seed), []
    if size < 2:
        raise ValueError(f"sets of {len(a)} and {len(b)} points are too small")
    kernel = lambda x, y: (x @ y.T / x.shape[1] + 1)**3
    for _ in range(subsets):
        x, y = (s[rng.choice(len(s), size, replace=False)] for s in (a, b))
        xx, yy = kernel(x, x), kernel(y, y)
        within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (size * (size - 1))      # without pairs of a point and itself
        distances.append((within - 2 * kernel(x, y).mean()).item())
    return float(np.mean(distances)), float(np.std(distances))


def nearest(a, b, k=1, same=False, at_a_time=1000):
    """From each point of a (N, d) to its k nearest of b (M, d): distances (N, k), nearest first, and which they are (N, k).

    same: b is a, and a point is not its own neighbour."""
    found = []
    for start in range(0, len(a), at_a_time):
        squared = squared_distances(a[start:start + at_a_time], b)
        if same:
            squared.diagonal(start).fill_(math.inf)
        found.append(squared.topk(k, largest=False))
    return torch.cat([d for d, _ in found]).sqrt(), torch.cat([i for _, i in found])


def squared_distances(a, b):                                        # (N, d), (M, d) -> (N, M)
    return (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp(min=0)


def precision_recall(real, fake, k=3, at_a_time=1000):
    """Precision: the share of fake points (M, d) that lie within reach of a real one (N, d), where a point reaches as far as its k-th
    nearest neighbour of its own set. Recall: the share of real points within reach of a fake one (Kynkaanniemi et al. 2019).

    Precision falls when images are poor, recall when there is no variety."""
    centre = torch.as_tensor(real).mean(0)                          # the distances are the same from anywhere, but rounded less from here
    real, fake = torch.as_tensor(real) - centre, torch.as_tensor(fake) - centre
    if min(len(real), len(fake)) <= k:
        raise ValueError(f"sets of {len(real)} and {len(fake)} points have no {k} neighbours each")

    def share_within_reach(points, centres):
        reach = nearest(centres, centres, k, same=True)[0][:, -1].square()
        return torch.cat([(squared_distances(x, centres) <= reach).any(1) for x in points.split(at_a_time)]).double().mean().item()

    return share_within_reach(fake, real), share_within_reach(real, fake)


def chance_below(a, b):
    """The probability that a number of a (N,) is below one of b (M,), ties counting half. 1/2: neither tends to be smaller."""
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    b = np.sort(b)
    below, not_above = len(b) - np.searchsorted(b, a, "right"), len(b) - np.searchsorted(b, a, "left")
    return float((below + not_above).mean() / (2 * len(b)))


def sliced_wasserstein(a, b, projections=512, seed=0, at_a_time=32):
    """Mean Wasserstein-1 distance between two point sets (N, d) seen along random directions (Rabin et al. 2011).

    On a line the optimal transport is known: the smallest point goes to the smallest, the next to the next, and so on."""
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    if a.shape != b.shape:
        raise ValueError(f"the two sets must be of the same shape, not {tuple(a.shape)} and {tuple(b.shape)}")
    directions = torch.randn(a.shape[1], projections, generator=torch.Generator().manual_seed(seed), dtype=a.dtype)
    directions = F.normalize(directions, dim=0)                     # (d, projections), each of length 1
    total = 0.0
    for u in directions.split(at_a_time, dim=1):
        on_line_a, on_line_b = (np.sort((u.T @ points.T).numpy()) for points in (a, b))     # (at_a_time, N); numpy sorts faster than torch
        total += np.abs(on_line_a - on_line_b).mean(1).sum()
    return float(total / projections)


# ---------------------------------------------------------------- the Laplacian pyramid

def blur(x, gain=1.0):
    """Convolve each channel with the binomial filter (1 4 6 4 1) / 16 in both directions, mirrored at the border."""
    line = torch.tensor([1, 4, 6, 4, 1], dtype=x.dtype) / 16
    kernel = (gain * line[:, None] * line).expand(x.shape[1], 1, 5, 5)
    return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), kernel, groups=x.shape[1])


def enlarge(x):                                                     # (N, C, H, W) -> (N, C, 2H, 2W)
    N, C, H, W = x.shape
    spread = x.new_zeros(N, C, 2 * H, 2 * W)
    spread[:, :, ::2, ::2] = x
    return blur(spread, gain=4)                                     # 4: three of four pixels were zero


def laplacian_pyramid(x):
    """(N, C, R, R) -> list of bands R, R/2, ..., 16: each is what the next smaller image cannot show; the last is that image.

    Enlarging and adding them up from the last to the first gives x back."""
    bands = []
    while x.shape[-1] >= 32:
        small = blur(x)[:, :, ::2, ::2]
        bands.append(x - enlarge(small))
        x = small
    return bands + [x]


def patches(x, generator, per_image=128, side=7):
    """(N, C, R, R) -> (N * per_image, C * side * side): square patches at random places."""
    N, C, R, _ = x.shape
    corner = torch.randint(R - side + 1, (2, N, per_image), generator=generator)
    rows = corner[0][..., None, None] + torch.arange(side)[:, None]     # (N, per_image, side, 1)
    columns = corner[1][..., None, None] + torch.arange(side)           # (N, per_image, 1, side)
    image = torch.arange(N)[:, None, None, None]
    return x[image, :, rows, columns].flatten(0, 1).flatten(1)


def pyramid_patches(images, seed, per_image=128, at_a_time=64):
    """Images (N, R, R, 3) uint8 -> {pixels per side: patches of that level (N * per_image, 3, 49), its mean and deviation (3, 1)}."""
    parts, sums, generator = {}, {}, torch.Generator().manual_seed(seed)
    for start in range(0, len(images), at_a_time):
        x = torch.from_numpy(images[start:start + at_a_time]).permute(0, 3, 1, 2).float()
        for band in laplacian_pyramid(x):
            side, pixels = band.shape[-1], band.double().transpose(0, 1).flatten(1)
            parts.setdefault(side, []).append(patches(band, generator, per_image).unflatten(1, (3, -1)))
            sums[side] = sums.get(side, 0) + torch.stack([pixels.sum(1), pixels.square().sum(1)])
    levels = {}
    for side in parts:
        mean, square = sums[side][..., None] / (len(images) * side**2)
        levels[side] = torch.cat(parts[side]), mean.float(), (square - mean**2).clamp(min=1e-16).sqrt().float()
    return levels


def pyramid_distances(real, fake, per_image=128, projections=512):
    """Two sets of images (N, R, R, 3) uint8 -> {pixels per side: sliced Wasserstein distance of that level's patches}.

    Patches are scaled per colour channel to the mean and variance of the *real* ones. (Karras et al. scale each set by itself,
    which hides wrong contrast and colour.)"""
    real, fake = (pyramid_patches(images, seed, per_image) for seed, images in enumerate((real, fake)))
    distances = {}
    for side, (_, mean, deviation) in real.items():
        distances[side] = sliced_wasserstein(*(((points[side][0] - mean) / deviation).flatten(1) for points in (real, fake)), projections)
    return distances


def mean_colours(images):
    """(N, R, R, 3) uint8 -> mean (3,) and standard deviation (3,) over the images of an image's mean colour, in 0..255."""
    colours = images.reshape(len(images), -1, 3).mean(1)
    return colours.mean(0), colours.std(0)


# ---------------------------------------------------------------- Inception
# FID and IS are defined by one network: Inception v3 as Google trained it in 2015, with 1,008 outputs. In three places it differs from the
# later ones, such as torchvision's: its weights, average pooling, which leaves the border out of its means, and the last block, which pools
# by maximum. Scores with another network, or with images resized in another way, cannot be compared with published ones.

INCEPTION_URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d"                                       # how it begins, as the file's name says
INCEPTION = CACHE / INCEPTION_URL.rpartition("/")[2]                # where it is kept
RESIZERS = {  # name: pixel i of the larger or smaller image lies at which place, in pixels of the one before, `step` of which make one
    "pytorch": lambda i, step: (i + 0.5) * step - 0.5,              # pixels are squares, and those of both images cover the same area
    "tensorflow": lambda i, step: i * step}                         # pixels are points, and the first ones coincide


@contextmanager
def full_precision():
    """float32 without TF32, which training allows: scores are compared in their last digits."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


class Inception(nn.Module):
    """Images (N, 3, H, W) uint8 -> pool features (N, 2048), logits (N, 1008).

    weights: the path of the published file, or a state dictionary with the same names. resizer: how images come to 299 x 299, "pytorch"
    as in the pytorch-fid package, "tensorflow" as in the original of 2015. Raises UserError for weights of another kind."""

    def __init__(self, weights, resizer="pytorch"):
        super().__init__()
        if resizer not in RESIZERS:
            raise UserError(f"there is no resizer {resizer}; there are {' and '.join(RESIZERS)}")
        self.resizer, self.said = resizer, "given as tensors"
        if not isinstance(weights, dict):
            path, weights = Path(weights), read_tensors(weights)
            self.said = sha256(path)
        try:
            for name, tensor in fold_norms(weights).items():
                self.register_buffer(name.replace(".", " "), tensor.contiguous(memory_format=torch.channels_last)
                                     if tensor.dim() == 4 else tensor)
            if self.fc_weight.shape != (1008, 2048):
                raise ValueError(f"it has {len(self.fc_weight)} outputs, not 1,008")
            self(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))      # are all layers there, and do they fit each other?
        except (KeyError, AttributeError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"the Inception weights {self.said} are not those of 2015 ({last_line(error)}); use {INCEPTION_URL}") from None
        if bad := [name for name, tensor in self.named_buffers() if not tensor.isfinite().all()]:
            raise UserError(f"the Inception weights {self.said} hold numbers that are not finite, in {bad[0]}; get the file again")

    @torch.no_grad()
    @full_precision()
    def forward(self, x):
        if x.dtype != torch.uint8 or x.dim() != 4 or x.shape[1] != 3:
            raise ValueError(f"images are (N, 3, H, W) uint8, not {tuple(x.shape)} of {x.dtype}")
        x = resize(x.to(self.fc_bias), 299, RESIZERS[self.resizer])     # (N, 3, 299, 299), still 0 to 255
        x = x / 127.5 - 1 if self.resizer == "pytorch" else x / 128 - 1       # the original has (x - 128) / 128
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.conv(x, "Conv2d_1a_3x3", stride=2, padding=0)      # (N, 32, 149, 149)
        x = self.conv(x, "Conv2d_2a_3x3", padding=0)                # (N, 32, 147, 147)
        x = self.conv(x, "Conv2d_2b_3x3")                           # (N, 64, 147, 147)
        x = F.max_pool2d(x, 3, stride=2)                            # (N, 64, 73, 73)
        x = self.conv(x, "Conv2d_3b_1x1")                           # (N, 80, 73, 73)
        x = self.conv(x, "Conv2d_4a_3x3", padding=0)                # (N, 192, 71, 71)
        x = F.max_pool2d(x, 3, stride=2)                            # (N, 192, 35, 35)
        for block in "Mixed_5b", "Mixed_5c", "Mixed_5d":
            x = self.mixed_35(x, block)                             # (N, 288, 35, 35) in the end
        x = self.halve_35(x, "Mixed_6a")                            # (N, 768, 17, 17)
        for block in "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e":
            x = self.mixed_17(x, block)                             # (N, 768, 17, 17)
        x = self.halve_17(x, "Mixed_7a")                            # (N, 1280, 8, 8)
        x = self.mixed_8(x, "Mixed_7b", average_around(x))          # (N, 2048, 8, 8)
        x = self.mixed_8(x, "Mixed_7c", F.max_pool2d(x, 3, stride=1, padding=1))
        features = x.mean((2, 3))                                   # (N, 2048)
        return features, F.linear(features, self.fc_weight, self.fc_bias)

    def conv(self, x, name, stride=1, padding=None):
        """Convolution (its batch norm is in the weights), ReLU. Unless told otherwise the image keeps its size."""
        weight = getattr(self, name + " weight")
        padding = [side // 2 for side in weight.shape[2:]] if padding is None else padding
        return F.conv2d(x, weight, getattr(self, name + " bias"), stride, padding).relu_()

    def chain(self, x, block, *names):
        for name in names:
            x = self.conv(x, f"{block} {name}")
        return x

    # Branches see the same input at different scales, and their outputs are stacked.
    def mixed_35(self, x, block):
        return torch.cat([self.chain(x, block, "branch1x1"),
                          self.chain(x, block, "branch5x5_1", "branch5x5_2"),
                          self.chain(x, block, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"),
                          self.chain(average_around(x), block, "branch_pool")], 1)

    def halve_35(self, x, block):
        double = self.chain(x, block, "branch3x3dbl_1", "branch3x3dbl_2")
        return torch.cat([self.conv(x, f"{block} branch3x3", stride=2, padding=0),
                          self.conv(double, f"{block} branch3x3dbl_3", stride=2, padding=0),
                          F.max_pool2d(x, 3, stride=2)], 1)

    def mixed_17(self, x, block):                                   # 7x7 kernels as a row of 7 and a column of 7
        return torch.cat([self.chain(x, block, "branch1x1"),
                          self.chain(x, block, "branch7x7_1", "branch7x7_2", "branch7x7_3"),
                          self.chain(x, block, *(f"branch7x7dbl_{k}" for k in range(1, 6))),
                          self.chain(average_around(x), block, "branch_pool")], 1)

    def halve_17(self, x, block):
        narrow = self.chain(x, block, "branch3x3_1")
        wide = self.chain(x, block, "branch7x7x3_1", "branch7x7x3_2", "branch7x7x3_3")
        return torch.cat([self.conv(narrow, f"{block} branch3x3_2", stride=2, padding=0),
                          self.conv(wide, f"{block} branch7x7x3_4", stride=2, padding=0),
                          F.max_pool2d(x, 3, stride=2)], 1)

    def mixed_8(self, x, block, pooled):
        narrow, wide = self.chain(x, block, "branch3x3_1"), self.chain(x, block, "branch3x3dbl_1", "branch3x3dbl_2")
        return torch.cat([self.chain(x, block, "branch1x1"),
                          self.chain(narrow, block, "branch3x3_2a"), self.chain(narrow, block, "branch3x3_2b"),
                          self.chain(wide, block, "branch3x3dbl_3a"), self.chain(wide, block, "branch3x3dbl_3b"),
                          self.chain(pooled, block, "branch_pool")], 1)


def average_around(x):
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def fold_norms(state):
    """Batch norm with fixed statistics scales and shifts each channel, and so can the convolution before it: (W x) s + t = (s W) x + t."""
    folded = {"fc_weight": state["fc.weight"].float(), "fc_bias": state["fc.bias"].float()}
    for name in [name.removesuffix(".conv.weight") for name in state if name.endswith(".conv.weight")]:
        weight, gamma, beta, mean, var = (state[f"{name}.{part}"].double() for part in
                                          ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"))
        s = gamma / (var + 0.001).sqrt()
        folded[f"{name}.weight"], folded[f"{name}.bias"] = (s[:, None, None, None] * weight).float(), (beta - s * mean).float()
    return folded


def resize(x, side, place):
    """(N, C, H, W) -> (N, C, side, side): each pixel a mixture of the two rows and the two columns next to its place. No smoothing."""
    rows, columns = (mixture(length, side, place).to(x) for length in x.shape[2:])
    return rows @ x @ columns.T


def mixture(length, side, place):                                   # -> (side, length), two numbers in each row
    at = place(torch.arange(side, dtype=torch.float64), length / side).clamp(0, length - 1)
    below = at.long().clamp(max=max(0, length - 2))
    rows, M = torch.arange(side), torch.zeros(side, length, dtype=torch.float64)
    M[rows, below] += 1 - (at - below)
    M[rows, (below + 1).clamp(max=length - 1)] += at - below
    return M


def find_inception(path=None, otherwise="--inception none scores without it"):
    """The path of Inception's weights: this one, or the published ones, fetched once and checked."""
    if path:
        if not Path(path).is_file():
            raise UserError(f"the Inception weights {path} do not exist; leave out --inception to fetch them, or name the file")
        return Path(path)
    fetch_weights([INCEPTION_URL], None, INCEPTION, "Inception's network", otherwise)
    if (found := sha256(INCEPTION)) != INCEPTION_SHA256:
        raise UserError(f"{INCEPTION} is damaged or another file: its sha256 begins with {found}, not {INCEPTION_SHA256}; "
                        "delete it and repeat the command")
    return INCEPTION


def sha256(path):                                                   # how it begins: enough to tell files apart
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()[:8]


# ---------------------------------------------------------------- sets of images
# Images come from a folder or from a generator, in blocks, of which every process takes its share. What reads files comes from train.py,
# which has already imported this one: hence the imports inside the functions.

BLOCK = 64                                                          # images: what a process takes at a time
KEPT = 50_000                                                       # the first images, whose features are kept; the FID uses all there are
PATCHED = 32 * BLOCK                                                # the first images, whose patches are compared


class Given:
    """The images of a folder, packed or not, of an array, or drawn shapes that training never sees, in a random order that is always the
    same: all (but no more than `most`), or the first n of them. resolution: None for their own. labels (n,) and classes (names), or None
    where there are none."""

    def __init__(self, source, resolution, n=None, option="--n", most=None):
        from train import Shapes, open_packed
        self.source = str(source)
        if source == "shapes":
            self.data, n = Shapes(resolution or 32, held_out=True), n or PATCHED
        elif self.source.endswith(".npz"):
            self.data = Array(source)
            if resolution not in (None, self.data.resolution):
                raise UserError(f"{source} has images of {self.data.resolution} pixels and the others have {resolution}; "
                                "draw it at their size")
        else:
            self.data = (open_packed if Path(source, "packed.json").exists() else Files)(source, resolution)
        self.resolution = self.data.resolution
        if n and n > len(self.data):
            raise UserError(f"{source} has {len(self.data)} images, fewer than {option} {n}; pass {option} {len(self.data)}")
        self.n, self.classes = n or min(len(self.data), most or len(self.data)), self.data.classes
        # Drawn shapes come class after class as they are.
        self.order = np.arange(self.n) if source == "shapes" else np.random.default_rng(0).permutation(len(self.data))[:self.n]
        self.labels = None if self.data.labels is None else np.asarray(self.data.labels, np.int64)[self.order]

    def __getitem__(self, b):
        """Block b: the rows that could be read, their images (k, R, R, 3) uint8. The others are named."""
        rows, images = [], []
        for row in range(b * BLOCK, min((b + 1) * BLOCK, self.n)):
            try:
                images.append(self.image(row))
                rows.append(row)
            except Exception as reason:                             # Pillow raises whatever its decoders do
                warn(f"skipped {self.data.paths[self.order[row]] if isinstance(self.data, Files) else self.source}: {reason}")
        return rows, np.array(images, np.uint8).reshape(-1, self.resolution, self.resolution, 3)

    def blocks(self, n):
        """This process's share of the first n images."""
        from train import ignore_interrupts
        workers = 8 if torch.cuda.is_available() and isinstance(self.data, Files) else 0
        return torch.utils.data.DataLoader(self, batch_size=None, sampler=own_blocks(n), worker_init_fn=ignore_interrupts,
                                           num_workers=workers)

    def image(self, row):
        return np.asarray(self.data[int(self.order[row])][0])

    def fingerprint(self):
        """Changes with any file's name, size or time."""
        paths = (self.data.paths if isinstance(self.data, Files) else [self.source] if self.source.endswith(".npz") else
                 sorted(Path(self.source).glob("*.*")) if self.source != "shapes" else [])
        entries = (f"{path} {stat.st_size} {stat.st_mtime_ns}" for path in paths for stat in [os.stat(path)])
        return f"{zlib.crc32(chr(10).join(entries).encode()):08x}"


def own_blocks(n):                                                  # which blocks of n images are this process's
    return range(rank(), -(-n // BLOCK), processes())


class Files:
    """All image files in a folder and those below it. If all of them lie in sub-folders, these are the classes."""

    def __init__(self, root, resolution):
        from train import is_image
        if not Path(root).is_dir():
            raise UserError(f"{root} is not a folder of images, nor an array FILE.npz; name another")
        self.paths = sorted(Path(folder, name) for folder, _, names in os.walk(root, followlinks=True) for name in names
                            if is_image(name) and "/." not in folder[len(str(root)):])
        if not self.paths:
            raise UserError(f"{root} holds no images")
        names, self.classes, self.labels = [path.relative_to(root).parts for path in self.paths], None, None
        if all(len(parts) > 1 for parts in names):
            self.classes, self.labels = np.unique([parts[0] for parts in names], return_inverse=True)
            self.classes = self.classes.tolist()
        self.resolution = resolution or self.common_side(root)

    def common_side(self, root):
        """The largest power of two that the first readable image is not smaller than."""
        for path in self.paths:
            try:
                with Image.open(path) as image:
                    side = min(image.size)
            except Exception:                                       # it will be named when it is its turn
                continue
            if side < 16:
                raise UserError(f"{path} is smaller than 16 pixels, too small for these scores")
            return 2**int(math.log2(side))
        raise UserError(f"{root} holds no readable image")

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        from train import load_patiently
        return load_patiently(self.paths[i], self.resolution), None


class Arrays:
    """Images (N, R, R, 3) uint8, labels (N,) and the class names, or None where there are none, as a data set."""

    def __init__(self, images, labels, classes):
        self.images, self.labels, self.classes, self.resolution = images, labels, classes, images.shape[1]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i], None if self.labels is None else int(self.labels[i])


class Array(Arrays):
    """An array file of `sample.py --npz` or of anyone else: first images (n, R, R, 3) uint8, then perhaps their labels (n,)."""

    def __init__(self, path):
        try:
            with np.load(path) as arrays:
                images = self.mapped(path, arrays.zip.infolist()[0])
                images = arrays[arrays.files[0]] if images is None else images      # compressed
                labels = arrays[arrays.files[1]] if len(arrays.files) > 1 else None
                self.made_of = str(arrays["arr_2"]) if "arr_2" in arrays.files else None
        except FileNotFoundError:
            raise UserError(f"the array {path} does not exist; draw it with sample.py --npz, or name another") from None
        except Exception:                                           # numpy and zipfile raise what their parsers do
            raise UserError(f"{path} is not an array of images as sample.py --npz writes it; name another") from None
        shape = images.shape
        if images.dtype != np.uint8 or len(shape) != 4 or shape[1] != shape[2] or shape[3] != 3:
            raise UserError(f"{path} holds {images.dtype} of shape {shape}, not (n, R, R, 3) uint8; name another")
        if shape[1] < 16 or shape[1] % 2**((shape[1] // 16).bit_length() - 1):      # halving must end between 16 and 31
            raise UserError(f"{path} holds images of {shape[1]} pixels; a size like 32, 48, 64, ... that can be halved is needed")
        if labels is not None and (labels.shape != shape[:1] or labels.dtype.kind not in "iu"):
            labels = None
        super().__init__(images, labels, None)

    @staticmethod
    def mapped(path, entry):
        """An array in a zip archive, left on the disk; None if it is compressed."""
        if entry.compress_type != zipfile.ZIP_STORED:
            return None
        with open(path, "rb") as f:
            f.seek(entry.header_offset + 26)
            f.seek(sum(struct.unpack("<HH", f.read(4))), os.SEEK_CUR)       # the lengths of name and extra field, which come next
            version = np.lib.format.read_magic(f)
            read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read_header(f)
            return np.memmap(path, dtype, "r", f.tell(), shape, "F" if fortran else "C")


class Drawn:
    """n images of a generator, the classes in turn, image i from its own seed: seed * n + i, so that no two sets share one."""

    def __init__(self, G, n, seed=0, noise=truncated_normal, moments=None):
        self.G, self.n, self.first, self.noise, self.resolution = G, n, seed * n, noise, G.config.resolution
        self.moments = moments or {}                                # batch norm's, for this noise
        self.labels, self.classes = np.arange(n) % G.config.n_classes, getattr(G, "classes", None)

    def __getitem__(self, b):
        """Block b: its rows, their images (k, R, R, 3) uint8."""
        rows = np.arange(b * BLOCK, (b + 1) * BLOCK)                # a whole block, whose end may be more than what is wanted
        images = draw_seeds(self.G, rows % self.G.config.n_classes, (self.first + rows).tolist(), self.noise)
        return rows[rows < self.n].tolist(), images[rows < self.n]

    def blocks(self, n):
        self.G.load_state_dict({**self.G.state_dict(), **self.moments})
        return (self[b] for b in own_blocks(n))

    def image(self, row):
        return self[row // BLOCK][1][row % BLOCK]


@dataclass
class Seen:
    """What is kept of a set of images."""
    n: int                                                          # images
    skipped: int = 0                                                # those that could not be read
    mu: np.ndarray = None                                           # mean (2048,) and covariance (2048, 2048) of Inception's features
    cov: np.ndarray = None
    features: np.ndarray = None                                     # of the first images (k, 2048)
    labels: np.ndarray = None                                       # theirs (k,), if they have any
    rows: np.ndarray = None                                         # and their places in the set (k,)
    score: np.ndarray = None                                        # Inception score: mean and deviation
    made_from: dict = None                                          # what is known of where stored ones come from
    pixels: np.ndarray = None                                       # the first images themselves (p, R, R, 3) uint8


def see(images, inception=None, what="", moments_only=False):
    """Look at a set of images, every process at its blocks. Without Inception only the first images are kept, for their patches;
    moments_only: only mean and covariance."""
    n = images.n if inception else min(images.n, PATCHED)
    (kept, patched), R = (0, 0) if moments_only else (min(n, KEPT), min(n, PATCHED)), images.resolution
    there, pixels = torch.zeros(n, dtype=torch.uint8), torch.zeros(patched, R, R, 3, dtype=torch.uint8)
    progress = Progress(n, what)
    if inception:
        device = inception.fc_bias.device
        total, products = torch.zeros(2048, dtype=torch.float64), torch.zeros(2048, 2048, dtype=torch.float64, device=device)
        features, probs = torch.zeros(kept, 2048), torch.zeros(kept, 1008)
    for rows, x in images.blocks(n):
        x, rows = torch.as_tensor(x), torch.tensor(rows, dtype=torch.int64)     # the loader has made it a tensor, Drawn has not
        there[rows] = 1
        pixels[rows[rows < patched]] = x[rows < patched]
        if inception and len(x):
            # 16 at a time fit into a CPU's cache. Always as many: a convolution of fewer may add up in another order.
            batch = BLOCK if device.type == "cuda" else 16
            filled_up = F.pad(x.permute(0, 3, 1, 2), (0, 0, 0, 0, 0, 0, 0, -len(x) % batch))
            parts = [inception(part.to(device)) for part in filled_up.split(batch)]
            f, logits = (torch.cat(both)[:len(x)] for both in zip(*parts))
            total += f.double().sum(0).cpu()
            products += f.double().T @ f.double()
            features[rows[rows < kept]] = f[rows < kept].cpu()
            # Published scores leave out the bias of the last layer, as the code of Salimans et al. did.
            probs[rows[rows < kept]] = (logits - inception.fc_bias).softmax(1)[rows < kept].cpu()
        progress(BLOCK)
    for tensor in (there, pixels, total, products, features, probs) if inception else (there, pixels):
        if processes() > 1:
            dist.all_reduce(tensor)                                 # where another process has its numbers, this one has zeros
    seen, there = int(there.sum()), there.bool()
    if seen < 2:
        raise UserError(f"of {n} images {seen} can be read, too few to compare; name others")
    found = Seen(seen, n - seen, pixels=pixels[there[:patched]].numpy())
    if inception:
        found.mu = (total / seen).numpy()
        found.cov = (products.cpu().numpy() - seen * np.outer(found.mu, found.mu)) / (seen - 1)
    if inception and kept:
        found.rows = torch.nonzero(there[:kept]).flatten().numpy()
        found.features = features[there[:kept]].numpy()
        found.labels = None if images.labels is None else images.labels[:kept][found.rows]
        found.score = np.array(inception_score(probs[there[:kept]].numpy(), min(10, len(found.rows))))
    return found


def see_real(images, inception, what="real images"):
    """`see` for real images, which stay the same: what Inception sees in them is kept in a file, with what it was made from, and reused.

    Only the first process may use the result."""
    from train import together
    if not inception:
        return see(images, what=what)
    source = images.source if images.source == "shapes" else str(Path(images.source).resolve())
    made_from = json.dumps({"images": source, "fingerprint": images.fingerprint(), "n": images.n, "resolution": images.resolution,
                            "network": inception.said, "resizer": inception.resizer})
    path = CACHE / "statistics" / f"{zlib.crc32(made_from.encode()):08x}.npz"
    found = read_statistics(path, made_from) if rank() == 0 and path.exists() else None
    if together(lambda: found is not None, first_only=True):
        pixels = see(images, what=what).pixels
        if rank() == 0:
            found.pixels = pixels
        return found
    found = see(images, inception, what)
    if rank() == 0:
        arrays = {name: getattr(found, name) for name in STORED if getattr(found, name) is not None}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_atomically(path, lambda f: np.savez(f, sigma=found.cov, made_from=made_from, **arrays))
            tell(f"kept for the next time: {path}")
        except OSError as error:
            warn(f"the statistics of {images.source} cannot be kept in {path}: {error.strerror}")
    return found


STORED = ["n", "skipped", "mu", "features", "labels", "rows", "score"]       # and the covariance, as sigma, which pytorch-fid reads too


def read_statistics(path, made_from=None):
    """What `see_real` has kept, if it was made from this, or the mu and sigma of any other program. None if it is something else."""
    try:
        with np.load(path) as arrays:
            if made_from and str(arrays["made_from"]) != made_from:
                return None
            found = Seen(**{name: arrays[name] for name in STORED if name in arrays.files} |
                         {name: int(arrays[name]) if name in arrays.files else 0 for name in ("n", "skipped")})
            found.cov, found.made_from = arrays["sigma"], json.loads(str(arrays.get("made_from", "{}")))
        shaped = found.mu.shape == (2048,) and found.cov.shape == (2048, 2048)
        return found if shaped and np.isfinite(found.mu).all() and np.isfinite(found.cov).all() else None
    except Exception:                                               # numpy and zipfile raise what their parsers do
        return None


# ---------------------------------------------------------------- scores

PER_CLASS = 1000                                                    # images of a class, real and generated, for an FID of its own


def compare(real, fake, classes=None):
    """Every score that these two sets, as `see` describes them, allow: a dictionary. classes: names, if both sets have the same ones."""
    scores = {}
    if real.mu is not None and fake.mu is not None:
        scores["fid"] = frechet_distance(real.mu, real.cov, fake.mu, fake.cov)
        scores["is"], scores["is_deviation"] = map(float, fake.score)
        scores["features"] = [0 if s.features is None else len(s.features) for s in (real, fake)]     # that the others come from
        if real.n:
            scores["fid_of_real"] = expected_frechet_distance(real.cov, real.n, fake.n)
    if real.score is not None and fake.score is not None:
        scores["real_is"] = float(real.score[0])
    if real.features is not None and fake.features is not None:
        fewest = min(len(real.features), len(fake.features))
        both = [torch.from_numpy(s.features).to(pick_device()) for s in (real, fake)]
        size = min(1000, max(2, fewest // 2))                       # of all images all subsets would be the same, without a deviation
        scores["kid_x1000"], scores["kid_x1000_deviation"] = (1000 * d for d in kernel_distance(*both, size=size))
        if fewest > 3:
            scores["precision"], scores["recall"] = precision_recall(*both)
        if classes and real.labels is not None and fake.labels is not None:
            of_class = [[s.features[s.labels == k].astype(np.float64) for s in (real, fake)] for k in range(len(classes))]
            if all(min(map(len, pair)) >= PER_CLASS for pair in of_class):
                scores["fid_per_class"] = {name: frechet_distance(*(m for x in pair for m in (x.mean(0), np.cov(x.T))))
                                           for name, pair in zip(classes, of_class)}
    if real.pixels is not None and fake.pixels is not None:
        n = min(len(real.pixels), len(fake.pixels))
        distances = pyramid_distances(real.pixels[:n], fake.pixels[:n])
        scores["swd_n"], scores["swd_x1000"] = n, {str(side): round(1000 * d, 2) for side, d in distances.items()}
        scores["swd_x1000_mean"] = round(1000 * sum(distances.values()) / len(distances), 2)
        for name, pixels in ("real", real.pixels), ("fake", fake.pixels):
            mean, spread = mean_colours(pixels)
            scores[name + "_colour"] = {"mean": mean.round(1).tolist(), "spread": spread.round(1).tolist()}
    return scores


# ---------------------------------------------------------------- signs of collapse
# Sooner or later a GAN collapses: within some hundred steps its images become few, or poor, and they stay so (section 4). What to do then
# is to stop and use the weights from before. `Monitor` reads every line of a run's log and says when.

def spread_within(images, labels):
    """How much images of one class differ: the standard deviation of their 8x8 averages, over images of a class. Images (N, 3, R, R).

    Averaged down, since a G that has collapsed may still put different noise on always the same picture."""
    small = F.adaptive_avg_pool2d(images.float(), 8)
    return torch.stack([small[labels == y].var(0).mean() for y in labels.unique()]).mean().sqrt().item()


@dataclass
class Monitor:
    """Judges a run by its log. The numbers are margins around what healthy runs did (README, "Watching a run")."""

    window, lines = 150, 3  # the means over so many steps are judged, but over no fewer lines than this
    few = 0.6               # diversity: images of a class differ less than this share of what they did at best, or real ones do
    won = 0.02              # D's loss below this share of what guessing costs: D is never wrong, G learns nothing
    blind = 0.003           # D's verdicts on real and generated images closer than this in every line: D sees nothing, G learns nothing
    steps, growth = 300, 2  # a sigma_0 of G's first layers has grown by this factor within so many steps
    worse, looks = 2, 2     # score above this many times the best one, at so many looks in succession
    max_rollbacks = 3
    log = ()                # the newest lines

    diversity: float = 0.0                                          # the highest so far; these five are saved in checkpoints
    score: float = math.inf                                         # the best so far (the FID, where it is measured) ...
    judged_by: str = "score"
    best: int = 0                                                   # ... and its step
    rollbacks: int = 0

    def state_dict(self):
        return asdict(self)

    def load_state_dict(self, state):
        vars(self).update(state)

    def judge(self, entry):
        """A line of the log -> (the reason why this is a collapse, or None; whether this is the best score so far)."""
        self.log = [line for line in self.log if line["step"] < entry["step"]][-2499:] + [entry]
        reason, recent = None, [line for line in self.log if line["step"] > entry["step"] - self.window]
        newest = recent if len(recent) > self.lines else self.log[-self.lines:]
        mean = lambda name: sum(line[name] for line in newest) / len(newest)
        if len(newest) >= self.lines and entry["step"] - newest[0]["step"] >= 2 / 3 * self.window:      # not before there are as many
            self.diversity = max(self.diversity, min(mean("diversity"), 1.0))
            if self.diversity > 0.5 and mean("diversity") < self.few * self.diversity:      # what never was cannot be lost
                reason = (f"images of one class have become alike: they differ {mean('diversity'):.2f} times as much as real ones, "
                          f"and did {self.diversity:.2f} times")
            if entry["D_guessing"] is not None and mean("D_loss") < self.won * entry["D_guessing"]:
                reason = f"D is never wrong any more: its loss is {mean('D_loss'):.3f}, where guessing would cost {entry['D_guessing']:.3f}"
            if all(abs(line["D_real"] - line["D_fake"]) < self.blind for line in newest):
                reason = (f"D no longer tells real from generated images: its mean verdicts are {mean('D_real'):.3f} "
                          f"and {mean('D_fake'):.3f}")
        for layer, sigma in entry["sigma_0"].items():
            earlier = [line for line in self.log if line["step"] >= entry["step"] - self.steps] + self.log[-2:]
            before, step = min((line["sigma_0"][layer], line["step"]) for line in earlier)
            if sigma > self.growth * before:
                reason = f"the largest singular value of {layer} explodes: {before:.3g} at step {step}, {sigma:.3g} now"
        judge = "fid" if "fid" in entry else "score"
        judged_by = f"FID of {entry['fid_n']:,} images" if "fid" in entry else "score" if "score" in entry else self.judged_by
        if judged_by != self.judged_by:
            self.judged_by, self.score = judged_by, math.inf        # the two cannot be compared
        scores = [line[judge] for line in self.log if judge in line and line.get("fid_n") == entry.get("fid_n")][-self.looks:]
        if len(scores) == self.looks and min(scores) > self.worse * self.score:
            reason = f"the {judged_by} is {scores[-1]:.1f}, at step {self.best} it was {self.score:.1f}"
        for name, value in {"diversity": entry["diversity"], judge: entry.get(judge, 0.0), **entry["sigma_0"]}.items():
            if not math.isfinite(value):
                reason = f"{name} is no longer a finite number"
        if reason:
            self.log = []                                           # it takes new lines to say so again
            return reason, False
        best = entry.get(judge, math.inf) < self.score
        if best:
            self.score, self.best = entry[judge], entry["step"]
        return None, best


# ---------------------------------------------------------------- the command

COLUMNS = {"FID": ("fid", 2), "KID x 1000": ("kid_x1000", 2), "IS": ("is", 2), "precision": ("precision", 3), "recall": ("recall", 3),
           "SWD x 1000": ("swd_x1000_mean", 2)}                     # heading: score, digits


def table(results, heading):
    """Lines of text, a column for every score that there is."""
    columns = {title: column for title, column in COLUMNS.items() if any(column[0] in result for _, result in results)}
    lines = [[heading, *columns]]
    for name, result in results:
        lines.append([name, *(" ± ".join(f"{result[k]:.{digits}f}" for k in (key, key + "_deviation") if k in result)
                              for key, digits in columns.values())])
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:]))]) for line in lines)


def averages(results):
    """Mean and deviation of every score over several results."""
    found = {}
    for key, _ in COLUMNS.values():
        values = [result[key] for result in results if key in result]
        if len(values) == len(results):
            found[key], found[key + "_deviation"] = float(np.mean(values)), float(np.std(values, ddof=1))
    return found


def memory_of(weights, real, held_out):
    """The probability that D takes a training image for more real than a held-out one, or None without a D.

    1/2: D has learnt what images look like. Near 1: it knows its training images by heart (section 4.2)."""
    from train import to_network
    found, device = read_weights(weights, to_train=True), pick_device()
    if not found.D:
        return None
    for images in real, held_out:
        if images.labels is None or images.classes not in (None, found.classes) or images.labels.max() >= len(found.classes):
            raise UserError(f"{images.source} does not have the classes of {found.source}, which its discriminator needs; "
                            "--data and --held-out need one sub-folder per class, or leave out --held-out")
    D = Discriminator(found.config)
    D.load_state_dict(found.D)
    D.requires_grad_(False).eval().to(device)
    verdicts = []
    for images in real, held_out:
        verdicts.append([])
        for b in range(-(-min(PATCHED, images.n) // BLOCK)):
            rows, x = images[b]
            verdicts[-1] += D(to_network(torch.from_numpy(x), device), torch.from_numpy(images.labels[rows]).to(device)).tolist()
    return chance_below(verdicts[1], verdicts[0])


def plot(results, path):
    """FID against IS, a point for each truncation, a line for each generator and seed (figure 17 of the paper)."""
    from matplotlib.figure import Figure
    figure = Figure((6, 4.5), layout="constrained")
    axes = figure.subplots()
    for images, seed in dict.fromkeys((r["images"], r["seed"]) for _, r in results):
        line = [(name, r["is"], r["fid"]) for name, r in results if (r["images"], r["seed"]) == (images, seed)]
        axes.plot([x for _, x, _ in line], [y for _, _, y in line], "o-", label=f"{images}, seed {seed}")
        for name, *place in line:
            axes.annotate(name, place, xytext=(5, 5), textcoords="offset points")
    axes.legend(fontsize="x-small")
    axes.set(xlabel="Inception score: fidelity, higher is better", ylabel="FID: fidelity and variety, lower is better",
             title="truncation of the noise")
    save_atomically(path, lambda f: figure.savefig(f, format="png", dpi=100))


def parse(arguments):
    parser = Parser(__doc__)
    parser.add_argument("--weights", nargs="+", metavar="W", help="what to draw the images with: whatever sample.py takes, one or several "
                                                                  "(default: the newest run in runs/, or else biggan-deep-256)")
    parser.add_argument("--fake", metavar="DIR", help="score the images in this folder, or in FILE.npz, instead; they are brought to the "
                                                      "largest power of two that the first one is not smaller than")
    parser.add_argument("--data", "--real", dest="data", metavar="DIR",
                        help="real images: a folder, packed or not, an array FILE.npz, 'shapes', or statistics, mu and sigma in FILE.npz")
    parser.add_argument("--n", type=at_least_one, help="generated images; compare only scores of equal n "
                                                       f"(default: 10,000, or all of --fake; {PATCHED:,} without Inception)")
    parser.add_argument("--n-real", type=at_least_one, metavar="N", help="real images (default: all there are)")
    parser.add_argument("--trunc", type=positive, nargs="+", metavar="T", help="truncate the noise at T, one or several (see sample.py)")
    parser.add_argument("--trunc-kind", choices=KINDS, help="what T means (see sample.py)")
    parser.add_argument("--seed", type=seed_number, nargs="+", help="numbers of sets of n noise vectors each (default: 0)")
    parser.add_argument("--inception", metavar="FILE", help="Inception's weights (default: the published ones, fetched once), or none")
    parser.add_argument("--resizer", choices=RESIZERS,
                        help="how images come to Inception's size: as in pytorch-fid, or as in the original of 2015 (default: pytorch)")
    parser.add_argument("--held-out", metavar="DIR", help="images like those of --data that were not trained on: does G or D know the "
                                                          "training images by heart?")
    parser.add_argument("--neighbours", metavar="FILE.png", help="a picture of the samples that come closest to real images, beside these")
    parser.add_argument("--plot", metavar="FILE.png", help="a picture of the curve over several --trunc (needs matplotlib)")
    parser.add_argument("--out", default="metrics.json", metavar="FILE.json", help="(default: metrics.json)")
    args = parser.parse_args(arguments)
    if not args.data:
        parser.error("--data DIR, the folder of real images to compare with, is missing")
    for name, value in ("--weights", args.weights), ("--trunc", args.trunc), ("--trunc-kind", args.trunc_kind), ("--seed", args.seed):
        if args.fake and value:
            parser.error(f"--fake excludes {name}: score a folder or a generator")
    for name, value in ("--plot", args.plot), ("--neighbours", args.neighbours), ("--resizer", args.resizer):
        if args.inception == "none" and value:
            parser.error(f"{name} needs Inception; leave out --inception none")
    for name, number in ("--n", args.n), ("--n-real", args.n_real):
        if number == 1:
            parser.error(f"{name} must be at least 2, since a distribution is compared")
    args.seed, args.resizer = args.seed or [0], args.resizer or "pytorch"
    if args.plot and len(args.trunc or []) < 2:
        parser.error("--plot draws a curve over several truncations; give --trunc two or more")
    if args.plot and not importlib.util.find_spec("matplotlib"):
        parser.error("--plot needs matplotlib; pip install matplotlib, or leave it out")
    if args.neighbours and max(len(args.weights or []), len(args.trunc or []), len(args.seed)) > 1:
        parser.error("--neighbours shows one set of samples; give --weights, --trunc and --seed one value each")
    if max(args.seed) >= 2**62 // (args.n or 10_000) or not all(map(math.isfinite, args.trunc or [])):
        parser.error("--seed and --trunc must be smaller numbers")
    for path, suffix in (args.out, ".json"), (args.plot, ".png"), (args.neighbours, ".png"):
        if path:
            check_output(path, suffix)
    for images in args.data, args.fake, args.held_out:
        if images not in (None, "shapes") and not Path(images).exists():
            parser.error(f"{images} does not exist; name a folder of images or an array FILE.npz")
    if args.held_out and Path(args.held_out).resolve() == Path(args.data).resolve():
        parser.error(f"--held-out {args.held_out} is the same as --data; name images that were not trained on")
    return args


def main(arguments):
    args = parse(arguments)
    keep_freed_memory()

    # What is compared, and can it be? All of it is looked at before anything is fetched or drawn.
    Gs = [] if args.fake else [read_generator(weights) for weights in args.weights or [None]]
    for G, t in itertools.product(Gs, args.trunc or []):
        check_truncation(t, args.trunc_kind or G.kind)
    given = Given(args.fake, None, args.n) if args.fake else None
    resolutions = {given.resolution} if given else {G.config.resolution for G in Gs}
    if len(resolutions) > 1:
        raise UserError("the generators of --weights draw at different resolutions; score them one by one")
    resolution = resolutions.pop()
    stored = read_statistics(args.data) if args.data.endswith(".npz") else None
    if stored and (args.held_out or args.neighbours or args.n_real or args.inception == "none"):
        raise UserError(f"{args.data} holds statistics; --held-out, --neighbours, --n-real and --inception none need the images themselves")
    n = args.n or (PATCHED if args.inception == "none" else 10_000)
    real = None if stored else Given(args.data, resolution, args.n_real or (n if args.data == "shapes" else None), "--n-real")
    held_out = Given(args.held_out, resolution) if args.held_out else None
    inception = Inception(find_inception(args.inception), args.resizer) if args.inception != "none" else None
    for name, value in ("resolution", resolution), ("network", inception and inception.said), ("resizer", args.resizer):
        if stored and stored.made_from.get(name, value) != value:
            raise UserError(f"the statistics {args.data} were made with {name} {stored.made_from[name]}, not {value}; "
                            "give --data the images themselves")

    # Generators get batch norm statistics for each truncation before the processes meet, so that these do not depend on how many there are.
    jobs = []
    for G, t in itertools.product(Gs, args.trunc or [None]):
        if n < G.config.n_classes:
            warn(f"{n} images of {G.config.n_classes} classes: the later classes are missing; pass a larger --n")
        prepare(G, t, args.trunc_kind)
        said = {"truncation": t, "noise": G.noise_said, "batch_norm": G.statistics_said}
        moments = {name: tensor.clone() for name, tensor in G.state_dict().items() if "running_" in name}
        jobs += [(G.noise_said if t is None else f"{t:g}", Drawn(G, n, seed, G.noise, moments),
                  {"images": G.source, "seed": seed, **said}) for seed in args.seed]
    if args.fake:
        jobs = [(Path(args.fake).name, given, {"images": args.fake, "made_of": getattr(given.data, "made_of", None)})]

    from train import any_process, join_processes, together
    device, own = join_processes(timedelta(days=1)), [G.fingerprint for G in Gs]    # the others wait while the first one compares
    if any_process(together(lambda: own, first_only=True) != own):  # the run has a new checkpoint since the first process looked
        raise UserError("the processes have read different weights; give --weights one checkpoint, not a run that goes on")
    if inception:
        inception.to(device)
    seen_real = stored or see_real(real, inception, f"of {args.data}")
    seen_held_out = see_real(held_out, inception, f"of {args.held_out}") if held_out and inception else None
    memory = together(lambda: {G.source: memory_of(G.source, real, held_out) for G in Gs} if held_out else {}, first_only=True)
    to_real = lambda seen, k: [x.cpu().numpy() for x in
                               nearest(*(torch.from_numpy(s.features).to(device) for s in (seen, seen_real)), k)]
    held_out_distances = to_real(seen_held_out, 1)[0][:, 0] if held_out and inception and rank() == 0 else None
    results = []
    for name, fake, said in jobs:
        seen = see(fake, inception, f"of {said['images']}" + (f", {name}" if Gs else ""))
        if rank() > 0:
            continue
        same_classes = real and (fake.classes == real.classes or None in (fake.classes, real.classes))
        result = {**said, "n": seen.n, "skipped": seen.skipped, "real": args.data, "n_real": seen_real.n, "real_skipped": seen_real.skipped,
                  "resolution": resolution, "network": inception and inception.said, "resizer": inception and args.resizer,
                  **compare(seen_real, seen, (real.classes or fake.classes) if same_classes else None)}
        if inception and (held_out or args.neighbours):
            distances, which = to_real(seen, min(5, len(seen_real.features)))
            if held_out:
                result["nearer_than_held_out"] = chance_below(distances[:, 0], held_out_distances)
            if args.neighbours:                                     # the ten that come closest, each with its nearest real images
                images = [image for i in np.argsort(distances[:, 0])[:10] for image in
                          [fake.image(int(seen.rows[i])), *(real.image(int(seen_real.rows[j])) for j in which[i])]]
                picture = image_grid(np.stack(images), 1 + which.shape[1])
                save_atomically(args.neighbours, lambda f: picture.save(f, "PNG"))
        if memory:
            result["D_memory"] = memory[said["images"]]
        results.append((name, result))
        means = write_scores(results, args.out)                     # now: what is scored is not lost if the next one fails
    if rank() == 0:
        report(results, means)
        tell(f"written to {args.out}")
        if args.plot:
            plot(results, args.plot)
    if processes() > 1:
        dist.barrier()                                              # until all is written
        dist.destroy_process_group()


def write_scores(results, out):
    """Write all that has been scored, and for each truncation of which there are several, their mean. Returns these."""
    means = []
    for name in dict.fromkeys(name for name, _ in results):
        of_name = [result for other, result in results if other == name]
        if len(of_name) > 1:
            means.append((f"{name}, mean of {len(of_name)}", averages(of_name)))
    content = {"results": [result for _, result in results], "means": [{"of": name, **mean} for name, mean in means]}
    save_atomically(out, lambda f: f.write(json.dumps(content, indent=1).encode()))
    return means


def report(results, means):
    """Print the scores, and what makes them comparable."""
    first, several = results[0][1], len({r["images"] for _, r in results}) > 1
    rows = [(name + (f", {r['images']}" if several else "") + (f", seed {r['seed']}" if means else ""), r) for name, r in results]
    tell(f"{first['n']:,} images of {'several' if several else first['images']} against {first['n_real'] or 'the statistics'} "
         f"of {first['real']}, {first['resolution']}x{first['resolution']}")
    if "fid" in first:
        tell(f"network {first['network']}, resizer {first['resizer']}")
    if "batch_norm" in first:
        for noise, moments in dict.fromkeys((r["noise"], r["batch_norm"]) for _, r in results):
            tell(f"noise {noise}, batch norm's statistics {moments}")
        tell(f"seeds {', '.join(map(str, dict.fromkeys(r['seed'] for _, r in results)))}")
    tell(table(rows + means, "truncation" if "truncation" in first else "images"))
    if "fid_of_real" in first and min(first["n"], first["n_real"]) > 2048:
        tell(f"other real images, as many, would have an FID of about {first['fid_of_real']:.2f}, and a KID of 0")
    if "fid" in first and (fewest := min(first["n"], first["n_real"] or first["n"])) <= 2048:
        tell(f"FID: {fewest:,} images are too few for 2,048 features, whose covariance has rank {fewest - 1:,} then; it is far too high, "
             "and comparable only at the same numbers of images; KID is not biased")
    for name, r in results if len(results) == 1 else []:
        if "real_is" in r:
            tell(f"the real images have an IS of {r['real_is']:.2f}")
        if "fid_per_class" in r:
            tell("FID per class, far too high for want of images: " + ", ".join(f"{k} {fid:.1f}" for k, fid in r["fid_per_class"].items()))
        if "swd_x1000" in r:
            tell(f"SWD x 1000 of {r['swd_n']:,} images: " + ", ".join(f"{side}x{side} {d}" for side, d in r["swd_x1000"].items()))
            for kind in "real", "fake":
                c = r[kind + "_colour"]
                tell(f"mean colour of {kind} images: {c['mean']}, varying by {c['spread']}")
        if "nearer_than_held_out" in r:
            tell(f"a generated image lies nearer to the training images (to {r['features'][0]:,} of them) than a held-out one: "
                 f"{r['nearer_than_held_out']:.1%} (copies: near 100%)")
        if r.get("D_memory") is not None:
            tell(f"D takes a training image for more real than a held-out one: {r['D_memory']:.1%} (knows nothing by heart: 50%)")
    for kind in "skipped", "real_skipped":
        if first[kind]:
            tell(f"{first[kind]} of the {'real' if kind == 'real_skipped' else 'generated'} images could not be read and are left out")


if __name__ == "__main__":
    run(main)
