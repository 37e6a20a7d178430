"""Score generated images against real ones.

    python metrics.py --weights runs/cifar10 --data data/cifar10-test       FID, KID, IS, ...
    python metrics.py --weights runs/cifar10/checkpoints/*.pt --data data/cifar10-test    which?
    python metrics.py --weights runs/cifar10 --data data/cifar10-test --trunc 2 1 0.5
    python metrics.py --fake samples.npz --real data/cifar10-test           images of any origin
    python metrics.py --weights runs/shapes --data shapes --inception none  SWD alone
    torchrun --nproc_per_node=8 -- metrics.py ...                           the same numbers, sooner

With --weights, real images are first cropped and reduced to the size of the generated ones, as in
training. With --fake, all images are taken as they are.

FID, KID, precision and recall compare features of images, which the Inception network computes. IS
looks at Inception's class probabilities. Its weights, 91 MB, are fetched once into ~/.cache/torch.
Sliced Wasserstein (SWD) compares small patches of the images and needs no network. Scores can be
compared where the network, the number of images and the real images are the same.

How to read this file. Part 1: what the scores are, and Inception. Part 2: the sliced Wasserstein
distance of images. Part 3: sets of images, and the command."""

import json
import os
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from biggan import rank, require
from sample import (CACHE, SEED, check_output, command_line, decoding, draw_seeds, fetch,
                    gather_rows, in_range, pick_device, read_generator, read_tensors,
                    rows_of_this_process, run, save_atomically, save_text, say, start_processes,
                    sum_over_processes, typed_options, values_of_all, warn)
from train import give_up, open_data, read_npz

# ==================================================================================================
# Part 1: scores
# ==================================================================================================

# ------------------------------------------------------------------ distances between distributions
# Points are features of images: N points of d numbers each, (N, d).

def finite(numbers, what):
    """The numbers, none of which is NaN or infinite. From such, a score may look very good."""
    require(torch.as_tensor(numbers).isfinite().all(), f"{what} are not finite")
    return numbers


def frechet_distance(mu1, cov1, mu2, cov2):
    """Squared Frechet distance of two normal distributions, given their means and covariances:

        |mu1 - mu2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))

    With Inception's features this is the FID (Heusel et al. 2017): fit a normal distribution to the
    features of each set of images, and compare. Lower is better.

    The trace of the root is the sum of the roots of the eigenvalues of C1 C2. To find these, write
    C1 = A A^T and C2 = B B^T, and use that XY and YX have the same eigenvalues, other than 0. With
    X = A and Y = A^T B B^T, XY is C1 C2, and YX is M M^T for M = A^T B. So the roots of the
    eigenvalues are the singular values of M. (A root of the matrix itself, which other codes take,
    may come out complex or fail.)"""
    A = factor(np.asarray(cov1, np.float64))
    B = factor(np.asarray(cov2, np.float64))
    trace_of_root = np.linalg.svd(A.T @ B, compute_uv=False).sum()
    between = np.square(np.subtract(mu1, mu2, dtype=np.float64)).sum()
    traces = np.square(A).sum() + np.square(B).sum()        # tr(A A^T): the sum of A's squares
    distance = between + traces - 2 * trace_of_root
    return float(max(0, finite(distance, "means")))     # rounding may give -1e-12


def factor(cov):
    """A (d, rank) with A A^T = C, from its eigenvectors, each times the root of its eigenvalue."""
    values, vectors = np.linalg.eigh(finite(cov, "covariances"))
    rounding = -1e-3 * values[-1]
    require(values[0] >= rounding, "a covariance is wrong: it has a negative eigenvalue")
    nonzero = values > 1e-12 * values[-1]   # what is left is rounding
    return vectors[:, nonzero] * np.sqrt(values[nonzero])


def inception_score(probs, splits=10):
    """exp E KL(p(y|x) || p(y)) of class probabilities (N, K). Salimans et al. 2016.

    1 if all images look alike to the classifier; K if it is sure of each image, and all K classes
    are equally frequent. -> mean and standard deviation over some splits of the images"""
    require(1 <= splits <= len(probs), f"{len(probs)} images cannot be cut into {splits} splits")
    scores = []
    probs = finite(np.asarray(probs, np.float64), "class probabilities")
    for p in np.array_split(probs, splits):
        log_p = np.log(p.clip(1e-300))
        log_mean = np.log(p.mean(0).clip(1e-300))
        divergence = (p * (log_p - log_mean)).sum(1)        # of each image
        scores.append(np.exp(divergence.mean()))
    return float(np.mean(scores)), float(np.std(scores))


def kernel_distance(a, b, subsets=100, size=1000):
    """How alike are points within each set (N, d), (M, d), compared with points of different sets?

    `kernel` is large for points that are alike. Its mean within a, plus that within b, minus twice
    that between a and b is the squared maximum mean discrepancy, and with Inception's features the
    KID (Binkowski et al. 2018). If both sets come from one distribution, pairs across them are as
    alike as pairs within them, and it is 0 on average, for any number of images. (The FID of few
    images is too high, since their covariance is not yet that of all.)
    -> mean and standard deviation over random subsets"""
    a = torch.as_tensor(a, dtype=torch.float64)
    b = torch.as_tensor(b, dtype=torch.float64)
    size = min(size, len(a), len(b))
    require(size >= 2, "the kernel distance needs two points of each kind")
    rng = np.random.default_rng(0)
    distances = []
    for _ in range(subsets):
        x = a[rng.choice(len(a), size, replace=False)]
        y = b[rng.choice(len(b), size, replace=False)]
        within = mean_of_pairs(kernel(x, x)) + mean_of_pairs(kernel(y, y))
        between = kernel(x, y).mean()
        distances.append((within - 2 * between).item())
    finite(distances, "features")
    return float(np.mean(distances)), float(np.std(distances))


def kernel(x, y):
    """(x . y / d + 1)^3 of all pairs: (N, d), (M, d) -> (N, M)"""
    return (x @ y.T / x.shape[1] + 1)**3


def mean_of_pairs(k):
    """The mean of k (N, N) without its diagonal: a point and itself are no pair."""
    n = len(k)
    return (k.sum() - k.trace()) / (n * (n - 1))


def precision_recall(real, fake, k=3):
    """Precision: what part of fake points (M, d) is near a real one? Recall: of real ones (N, d)?

    A set covers the balls around its points, each as large as the distance to the point's k-th
    nearest neighbour in the set (Kynkaanniemi et al. 2019). Precision falls when images are poor,
    recall when they lack variety."""
    centre = torch.as_tensor(real).mean(0)  # distances stay the same, and round less
    real = torch.as_tensor(real) - centre
    fake = torch.as_tensor(fake) - centre
    return covered(fake, real, k), covered(real, fake, k)


def covered(points, centres, k):
    """The part of the points (M, d) that lies in a ball around one of the centres (N, d)."""
    require(len(centres) > k, f"{len(centres)} points have no {k} neighbours")
    finite(points.sum() + centres.sum(), "features")
    radii = []
    for x in centres.split(1000):           # k + 1: the nearest centre is the point itself
        radii.append(torch.cdist(x, centres).kthvalue(k + 1).values)
    radii = torch.cat(radii)                # (N,)
    inside = []
    for x in points.split(1000):
        inside.append((torch.cdist(x, centres) <= radii).any(1))
    part = torch.cat(inside).double().mean()
    return part.item()


def sliced_wasserstein(a, b, projections=512):
    """How far must points (N, d) move, on average, to become other points (N, d)?

    That is the Wasserstein-1 distance, which takes an optimal pairing. On a line it is known: the
    smallest point goes to the smallest, and so on. So the points are projected on random lines, and
    the mean over these is taken. Rabin et al. 2011."""
    a = torch.as_tensor(a)
    b = torch.as_tensor(b)
    require(a.shape == b.shape, f"sets of different shapes: {tuple(a.shape)}, {tuple(b.shape)}")
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(projections, a.shape[1], generator=generator, dtype=a.dtype)
    directions = F.normalize(directions, dim=1)
    total = 0.0
    for some in directions.split(32):       # (32, d)
        line_a = np.sort((some @ a.T).numpy())      # (32, N); numpy sorts faster
        line_b = np.sort((some @ b.T).numpy())
        total += np.abs(line_a - line_b).mean(1).sum()
    return float(finite(total, "points") / projections)


# ---------------------------------------------------------------------------------------- Inception
# FID and IS are defined by one network: Inception v3 as Google trained it in 2015, with 1,008
# outputs. It differs from later ones, such as torchvision's, in three places: its weights; its
# average pooling, which does not count the border; and its last block, which pools by maximum. With
# another network, or images resized in another way (here as in the package pytorch-fid), scores
# cannot be compared with published ones.

INCEPTION_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"
)

# A block sends its input through several chains of convolutions, which see it at different scales,
# and stacks their outputs. These are the chains of each kind of block: strings of layers, with the
# names that they have in the file of weights. AT_35 keeps 35x35 positions, TO_17 makes 17x17.
AT_35 = ["1x1", "5x5_1 5x5_2", "3x3dbl_1 3x3dbl_2 3x3dbl_3"]
TO_17 = ["3x3", "3x3dbl_1 3x3dbl_2 3x3dbl_3"]
AT_17 = ["1x1", "7x7_1 7x7_2 7x7_3", "7x7dbl_1 7x7dbl_2 7x7dbl_3 7x7dbl_4 7x7dbl_5"]
TO_8 = ["3x3_1 3x3_2", "7x7x3_1 7x7x3_2 7x7x3_3 7x7x3_4"]
AT_8 = [
    "1x1",
    "3x3_1 3x3_2a",
    "3x3_1 3x3_2b",
    "3x3dbl_1 3x3dbl_2 3x3dbl_3a",
    "3x3dbl_1 3x3dbl_2 3x3dbl_3b",
]


class Inception(nn.Module):
    """Images (N, 3, H, W), 0 to 255 -> pool features (N, 2048), logits (N, 1008).

    weights: the path of the published file, or a state dict with the same names. There are no
    layers as sub-modules: `forward` looks up each weight by its name."""

    def __init__(self, weights):
        super().__init__()
        state = weights if isinstance(weights, dict) else read_tensors(weights)
        with decoding("the file", f"is not Inception of 2015, which is {INCEPTION_URL}"):
            for name, tensor in fold_norms(state).items():
                self.register_buffer(name, tensor)
            self.to(memory_format=torch.channels_last)
            _, logits = self(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
            require(logits.shape == (1, 1008), "not 1,008 outputs")
            finite(logits, "its outputs")

    @torch.no_grad()
    def forward(self, x):                   # (N, 3, H, W), 0 to 255
        x = resized(x.to(self.fc_bias))     # to the weights' device and dtype
        x = (x / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        x = self.conv(x, "Conv2d_1a_3x3", stride=2, padding=0)      # (N, 32, 149, 149)
        x = self.conv(x, "Conv2d_2a_3x3", padding=0)                # (N, 32, 147, 147)
        x = self.conv(x, "Conv2d_2b_3x3")   # (N, 64, 147, 147)
        x = F.max_pool2d(x, 3, stride=2)    # (N, 64, 73, 73)
        x = self.conv(x, "Conv2d_3b_1x1")   # (N, 80, 73, 73)
        x = self.conv(x, "Conv2d_4a_3x3", padding=0)                # (N, 192, 71, 71)
        x = F.max_pool2d(x, 3, stride=2)    # (N, 192, 35, 35)
        for block in "Mixed_5b", "Mixed_5c", "Mixed_5d":
            x = self.mixed(x, block, AT_35)         # (N, 288, 35, 35) in the end
        x = self.halve(x, "Mixed_6a", TO_17)        # (N, 768, 17, 17)
        for block in "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e":
            x = self.mixed(x, block, AT_17)         # (N, 768, 17, 17)
        x = self.halve(x, "Mixed_7a", TO_8)         # (N, 1280, 8, 8)
        x = self.mixed(x, "Mixed_7b", AT_8)         # (N, 2048, 8, 8)
        maximum = F.max_pool2d(x, 3, stride=1, padding=1)
        x = self.mixed(x, "Mixed_7c", AT_8, maximum)
        features = x.mean((2, 3))           # (N, 2048)
        return features, F.linear(features, self.fc_weight, self.fc_bias)

    def conv(self, x, name, stride=1, padding="same"):
        """A convolution, which its batch norm has been folded into, and ReLU."""
        W = getattr(self, name)
        bias = getattr(self, name + "_bias")
        return F.conv2d(x, W, bias, stride, padding).relu_()

    def chain(self, x, block, names, **options):
        """Some convolutions, one after the other. The last one has the options."""
        *names, last = names.split()
        for name in names:
            x = self.conv(x, f"{block}_branch{name}")
        return self.conv(x, f"{block}_branch{last}", **options)

    def mixed(self, x, block, chains, pooled=None):
        """The chains, and one more that begins with a pooling. Keeps H and W."""
        if pooled is None:
            pooled = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        outputs = [self.chain(x, block, names) for names in chains]
        outputs.append(self.chain(pooled, block, "_pool"))
        return torch.cat(outputs, 1)

    def halve(self, x, block, chains):
        """The chains, which end with stride 2 here, and a pooling. Halves H and W."""
        outputs = [self.chain(x, block, names, stride=2, padding=0) for names in chains]
        outputs.append(F.max_pool2d(x, 3, stride=2))
        return torch.cat(outputs, 1)


def resized(x):                             # (N, 3, H, W) -> (N, 3, 299, 299)
    return F.interpolate(x, (299, 299), mode="bilinear", align_corners=False)


def fold_norms(state):
    """Batch norm with fixed statistics scales and shifts each channel. So can the convolution
    before it: s (W x) + t = (s W) x + t."""
    folded = {"fc_weight": state["fc.weight"].float(), "fc_bias": state["fc.bias"].float()}
    for key in [key for key in state if key.endswith(".conv.weight")]:
        name = key.removesuffix(".conv.weight")
        W = state[key]
        gain = state[f"{name}.bn.weight"].double()
        bias = state[f"{name}.bn.bias"].double()
        mean = state[f"{name}.bn.running_mean"].double()
        var = state[f"{name}.bn.running_var"].double()
        scale = gain / (var + 0.001).sqrt()         # (out,)
        ours = name.replace(".", "_")
        folded[ours] = (scale[:, None, None, None] * W).float()
        folded[ours + "_bias"] = (bias - scale * mean).float()
    return folded


# ==================================================================================================
# Part 2: the sliced Wasserstein distance of images
# ==================================================================================================
# Images are taken apart into bands, from fine to coarse, and compared patch by patch in each band.
# Karras et al. 2018.

def blur(x):
    """Convolve each channel with the binomial filter (1 4 6 4 1) / 16 both ways."""
    line = torch.tensor([1, 4, 6, 4, 1], dtype=x.dtype) / 16
    kernel = (line[:, None] * line).expand(x.shape[1], 1, 5, 5)
    return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), kernel, groups=x.shape[1])


def enlarge(x):                             # (N, C, H, W) -> (N, C, 2H, 2W)
    N, C, H, W = x.shape
    spread = x.new_zeros(N, C, 2 * H, 2 * W)
    spread[:, :, ::2, ::2] = x
    return 4 * blur(spread)                 # 4, as three of four pixels are zero


def laplacian_pyramid(x):
    """(N, C, R, R) -> list of bands with sides R, R/2, ... 16.

    The last one is the image, made small. Each of the others is what is lost in the next step of
    making it smaller. Enlarging and adding them up, from the last to the first, gives x back."""
    bands = []
    while x.shape[-1] >= 32:
        small = blur(x)[:, :, ::2, ::2]
        bands.append(x - enlarge(small)[:, :, :x.shape[2], :x.shape[3]])    # of an odd size
        x = small
    return bands + [x]


def patches(x, generator, per_image=128, side=7):
    """(N, C, R, R) -> (N * per_image, C * side * side): squares at random places."""
    windows = x.unfold(2, side, 1).unfold(3, side, 1)       # (N, C, R - 6, R - 6, 7, 7), a view
    places = torch.randint(windows.shape[2], (2, len(x), per_image), generator=generator)
    image = torch.arange(len(x))[:, None]
    chosen = windows[image, :, places[0], places[1]]        # (N, per_image, C, 7, 7)
    return chosen.flatten(0, 1).flatten(1)


def patches_by_side(images, seed):
    """Images (N, R, R, 3) uint8 -> {side of a band: its patches (N * 128, 3, 49)}."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for some in torch.from_numpy(images).split(64):
        for band in laplacian_pyramid(some.permute(0, 3, 1, 2).float()):
            cut = patches(band, generator).unflatten(1, (3, -1))
            found.setdefault(band.shape[-1], []).append(cut)
    return {side: torch.cat(parts) for side, parts in found.items()}


def pyramid_distances(real, fake):
    """Two sets of images (N, R, R, 3) uint8 -> {side of a band: distance of its patches}.

    Patches are scaled, per colour, by mean and deviation of the *real* ones. (Karras et al. scale
    each set by its own, which hides wrong contrast and colour.)"""
    real_patches = patches_by_side(real, seed=0)
    fake_patches = patches_by_side(fake, seed=1)
    distances = {}
    for side, points in real_patches.items():
        mean = points.mean((0, 2), keepdim=True)            # (1, 3, 1)
        deviation = points.std((0, 2), keepdim=True).clamp(min=1e-8)
        scaled_real = (points - mean) / deviation
        scaled_fake = (fake_patches[side] - mean) / deviation
        distances[side] = sliced_wasserstein(scaled_real.flatten(1), scaled_fake.flatten(1))
    return distances


# ==================================================================================================
# Part 3: sets of images, and the command
# ==================================================================================================

N_KEPT = 50_000                 # of at most so many images features are kept, for KID, IS, ...
N_PATCHED = 2048                # of at most so many pixels, for the sliced Wasserstein distance


@dataclass
class Features:
    """What the scores need of n images. The last three are in the first process alone."""
    n: int
    side: int = None                        # R, if all are R x R; else there are no pixels
    mu: np.ndarray = None                   # mean (2048,) of all features
    cov: np.ndarray = None                  # and covariance (2048, 2048)
    kept: np.ndarray = None                 # features of the first images (N_KEPT, 2048)
    probs: np.ndarray = None                # and class probabilities (N_KEPT, 1008)
    pixels: np.ndarray = None               # the first images (N_PATCHED, R, R, 3) uint8


def features_of(images, n, inception, what):
    """Features of n images, shared among the processes. inception None: pixels alone.

    images(rows): a function that gives the images of some rows, (H, W, 3) uint8 each, or None for
    one that cannot be read."""
    if inception is None:
        n = min(n, N_PATCHED)
    sizes = []                              # height and width of each image
    pixels = []                             # the first images
    kept = []
    probs = []
    device = inception.fc_bias.device if inception else None
    zeros = partial(torch.zeros, dtype=torch.float64, device=device)
    total = zeros(2048)                     # the sum of all features f
    products = zeros(2048, 2048)            # and of all f f^T
    for rows in rows_of_this_process(n, what):
        pairs = [(row, x) for row, x in zip(rows, images(rows)) if x is not None]
        sizes += [x.shape[:2] for _, x in pairs]
        pixels += [x[None] for row, x in pairs if row < N_PATCHED and len(x) <= 512]
        if inception and pairs:
            x = [for_inception(image, inception) for _, image in pairs]
            f, logits = inception(torch.cat(x))
            f64 = f.double()
            total += f64.sum(0)
            products += f64.T @ f64
            # The IS leaves out the last bias, as its authors' code does.
            p = (logits - inception.fc_bias).softmax(1)
            first = [row < N_KEPT for row, _ in pairs]
            kept.append(f.cpu().numpy()[first])
            probs.append(p.cpu().numpy()[first])
    sizes = sum(values_of_all(sizes), [])   # one list
    n = len(sizes)
    if n < 8:
        give_up(f"{n} {what} can be read; scores need at least 8")
    found = Features(n, side=common_side(sizes, what))
    if found.side:
        found.pixels = gather_rows(pixels)
    if inception:
        found.mu = sum_over_processes(total) / n
        squares = n * np.outer(found.mu, found.mu)
        found.cov = (sum_over_processes(products) - squares) / (n - 1)
        found.kept = gather_rows(kept)
        found.probs = gather_rows(probs)
    return found


def for_inception(image, inception):
    """An image of any size (H, W, 3) uint8 -> (1, 3, 299, 299), to be stacked with others."""
    x = torch.from_numpy(image).permute(2, 0, 1)[None]
    return resized(x.to(inception.fc_bias))


def common_side(sizes, what):
    """Sizes (n, 2) of images -> the side that all have, or None with a warning."""
    different, counts = np.unique(sizes, axis=0, return_counts=True)
    H, W = different[0]
    if len(different) == 1 and 7 <= H == W <= 512:
        return H
    if rank() == 0:
        listed = ", ".join(f"{h}x{w}: {n}" for (h, w), n in zip(different[:9], counts))
        warn(f"no SWD: {what} are not squares of one size, 7x7 to 512x512 ({listed})")
    return None


def features_of_data(data, n, inception, what="real images"):
    """Of the first n images in a fixed random order, or of all if there are fewer."""
    order = np.random.default_rng(0).permutation(len(data))[:n]

    def images(rows):
        return [data.image(i) for i in order[rows]]

    return features_of(images, len(order), inception, what)


def features_of_samples(G, n, seed, inception):
    """Of n samples, the classes in turn. With another --seed, no image is the same."""
    def images(rows):
        return draw_seeds(G, rows % G.config.n_classes, seed * n + rows, G.noise)

    return features_of(images, n, inception, "samples")


def compare(real, fake):
    """Every score that these two sets allow, as a dictionary; KID and SWD times 1000."""
    scores = {}
    if fake.mu is not None:
        scores["FID"] = frechet_distance(real.mu, real.cov, fake.mu, fake.cov)
        splits = min(10, len(fake.probs))
        scores["IS"], scores["IS_deviation"] = inception_score(fake.probs, splits)
    if real.kept is not None:
        # Subsets of half the points at most: with all of them, each subset would be the same.
        half = min(len(real.kept), len(fake.kept)) // 2
        device = pick_device()          # a GPU takes seconds, one thread of a CPU minutes
        real_points = torch.from_numpy(real.kept).to(device)
        fake_points = torch.from_numpy(fake.kept).to(device)
        mean, deviation = kernel_distance(real_points, fake_points, size=min(1000, half))
        scores["KID"] = 1000 * mean
        scores["KID_deviation"] = 1000 * deviation
        scores["precision"], scores["recall"] = precision_recall(real_points, fake_points)
    if real.side and fake.side and real.side != fake.side:
        warn(f"no SWD: real images have {real.side} pixels, generated ones {fake.side}")
    elif real.pixels is not None and fake.pixels is not None:
        n = min(len(real.pixels), len(fake.pixels))
        distances = pyramid_distances(real.pixels[:n], fake.pixels[:n])
        scores["SWD"] = 1000 * sum(distances.values()) / len(distances)
        scores["SWD_levels"] = {side: 1000 * value for side, value in distances.items()}
    return scores


def parse(arguments):
    parser = command_line(__doc__)
    add = parser.add_argument
    add("--weights", nargs="+", help="as for sample.py, one or several")
    add("--fake", help="instead, score the images in this folder or FILE.npz")
    add("--data", "--real", help="real images: a folder, shapes, FILE.npz of images or statistics")
    add("--n", type=in_range(int, 8), default=10_000, help="samples; compare scores of equal n")
    add("--trunc", type=float, nargs="+", help="truncations, see sample.py")
    add("--seed", type=SEED, default=0, help="which set of n noise vectors")
    add("--inception", help="Inception's weights, fetched unless given; or none")
    add("--save-stats", help="FILE.npz: keep the statistics of --data, to be used as --data")
    add("--out", default="metrics.json", help="FILE.json")
    args = parser.parse_args(arguments)
    require(args.data, "name real images by --data")
    of_weights = typed_options(parser, args) & {"weights", "n", "seed", "trunc"}
    require(
        not args.fake or not of_weights,
        f"--fake takes all images that are there, and no --{', --'.join(sorted(of_weights))}",
    )
    check_output(args.out, ".json")
    if args.save_stats:
        check_output(args.save_stats, ".npz")
        exists = os.path.exists(args.save_stats)
        require(not exists, f"--save-stats would overwrite {args.save_stats}: name another file")
        has_inception = args.inception != "none"
        require(has_inception, "--save-stats needs Inception: leave out --inception none")
    return args


def read_statistics(args):
    """mu and sigma in --data, that --save-stats or another program wrote; or None."""
    if not args.data.lower().endswith(".npz"):
        return None
    stored = read_npz(args.data, ["mu", "sigma", "side"])
    if not {"mu", "sigma"} <= stored.keys():
        return None
    mu = stored["mu"]
    sigma = stored["sigma"]
    require(
        (mu.shape, sigma.shape) == ((2048,), (2048, 2048))
        and mu.dtype.kind == sigma.dtype.kind == "f"
        and np.isfinite(mu + sigma).all()
        and np.allclose(sigma, sigma.T, rtol=1e-3, atol=1e-3 * np.abs(sigma).max()),
        f"{args.data} holds mu {mu.shape} and sigma {sigma.shape}; they must be finite numbers "
        "(2048,) and (2048, 2048), and sigma symmetric",
    )
    require(not args.save_stats, f"{args.data} has statistics already: leave out --save-stats")
    require(args.inception != "none", "statistics need Inception: leave out --inception none")
    say(f"{args.data} has statistics, which give FID and IS alone")
    return Features(None, int(stored.get("side", 0)), mu, sigma)


def real_features(args, resolution, inception):
    """Of the images in --data, at the resolution of the weights, or at their own for --fake."""
    data = open_data(args.data, resolution, held_out=True, labelled=False)
    n = args.n if args.data == "shapes" else None
    real = features_of_data(data, n, inception, f"images in {args.data}")
    if args.save_stats and rank() == 0:
        arrays = {"mu": real.mu, "sigma": real.cov, "side": real.side or 0}
        save_atomically(args.save_stats, lambda f: np.savez(f, **arrays))
    return real


def sets_to_score(args, inception):
    """Yields (name, truncation, resolution, features()) of each set of weights and truncation."""
    if args.fake:
        data = open_data(args.fake, labelled=False)
        what = f"images in {args.fake}"
        features = partial(features_of_data, data, None, inception, what)
        yield args.fake, None, data.resolution, features
        return
    for weights in args.weights or [None]:
        G = read_generator(weights)
        for truncation in args.trunc or [None]:
            G.set_truncation(truncation)
            features = partial(features_of_samples, G, args.n, args.seed, inception)
            yield weights or "the newest run", truncation, G.config.resolution, features


def main(arguments):
    args = parse(arguments)
    device = pick_device()
    real = read_statistics(args)
    inception = None
    if args.inception != "none":
        file = CACHE / INCEPTION_URL.rpartition("/")[2]
        inception = Inception(args.inception or fetch(INCEPTION_URL, file, "6726825d")).to(device)
    start_processes()
    results = []
    for name, truncation, resolution, features in sets_to_score(args, inception):
        if real is None:
            real_size = resolution
            if args.fake and args.data != "shapes":
                real_size = None            # real images, too, as they are
            real = real_features(args, real_size, inception)
        fake = features()
        if rank() > 0:
            continue
        if results:
            same = results[0]["resolution"] == resolution
            require(same, "score weights of different resolutions one by one")
        scores = compare(real, fake)
        require(scores, "no score is possible without Inception, see the warnings")
        settings = {
            "images": name,
            "truncation": truncation,
            "n": fake.n,
            "seed": args.seed,
            "data": args.data,
            "n_real": real.n,
            "resolution": resolution,
            "inception": args.inception or INCEPTION_URL,
        }
        results.append(settings | scores)
        numbers = [f"{key} {value:.4g}" for key, value in scores.items() if key != "SWD_levels"]
        say(f"{name}, truncation {truncation}, n {fake.n:,}: {'  '.join(numbers)}")
        text = json.dumps(results, indent=1)
        save_text(args.out, text)
    if len(results) > 1:
        key = "FID" if inception else "SWD"
        best = min(results, key=lambda result: result[key])
        say(f"best: {best['images']}, truncation {best['truncation']}")
    say("written:", args.out)


if __name__ == "__main__":
    run(main)
