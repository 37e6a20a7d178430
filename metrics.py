"""Score generated images against real ones.

    python metrics.py --weights runs/cifar10 --data cifar10/test           a run or checkpoint against a folder of images
    python metrics.py --weights runs/shapes --data shapes                  against freshly drawn shapes
    python metrics.py --fake cifar10/train --real cifar10/test             two folders: what real images themselves score

The score is the sliced Wasserstein distance between small patches at every level of a Laplacian pyramid (Karras et al. 2018): it needs
no network. Lower is better; two sets of real images show how low it can be. It sees texture, edges and colour, not objects.
Also printed: the mean colour of an image and how much it varies from image to image, which shows a generator fading to grey.

Reading order: distances between distributions, the Laplacian pyramid, signs of collapse (which train.py watches), the command.
"""

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from sample import (Parser, UserError, at_least_one, check_output, draw_seeds, positive, prepare, read_generator, run, save_atomically,
                    seed_number, warn)


# ---------------------------------------------------------------- distances between distributions

def frechet_distance(mu1, cov1, mu2, cov2):
    """Squared Frechet distance between two Gaussians: |mu1 - mu2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)). Means (d,), covariances (d, d).

    With Inception features it is the FID (Heusel et al. 2017). tr (C1 C2)^(1/2) is taken from the eigenvalues of the symmetric
    C1^(1/2) C2 C1^(1/2), which has the same ones: they are real and not negative, also where a covariance has no full rank."""
    mu1, cov1, mu2, cov2 = (np.asarray(a, np.float64) for a in (mu1, cov1, mu2, cov2))
    values, vectors = np.linalg.eigh(cov1)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T          # C1^(1/2); rounding makes zeros slightly negative
    product = root @ cov2 @ root
    trace_of_root = np.sqrt(np.linalg.eigvalsh((product + product.T) / 2).clip(0)).sum()
    return float(max(0, np.square(mu1 - mu2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * trace_of_root))


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
        total += ((a @ u).sort(0).values - (b @ u).sort(0).values).abs().mean(0).sum().item()
    return total / projections


# ---------------------------------------------------------------- the Laplacian pyramid

def blur(x, gain=1.0):
    """Convolve each channel with the binomial filter (1 4 6 4 1) / 16 in both directions, mirrored at the border."""
    line = torch.tensor([1, 4, 6, 4, 1], dtype=x.dtype) / 16
    kernel = (gain * line[:, None] * line).expand(x.shape[1], 1, 5, 5)
    return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), kernel, groups=x.shape[1])


def shrink(x):                                                      # (N, C, H, W) -> (N, C, H/2, W/2)
    return blur(x)[:, :, ::2, ::2]


def enlarge(x):                                                     # (N, C, H, W) -> (N, C, 2H, 2W)
    N, C, H, W = x.shape
    spread = x.new_zeros(N, C, 2 * H, 2 * W)
    spread[:, :, ::2, ::2] = x
    return blur(spread, gain=4)                                     # 4: three of four pixels were zero


def laplacian_pyramid(x, smallest=16):
    """(N, C, R, R) -> list of bands R, R/2, ..., smallest: each is what the next smaller image cannot show; the last is that image.

    Enlarging and adding them up from the last to the first gives x back."""
    bands = []
    while x.shape[-1] >= 2 * smallest:
        small = shrink(x)
        bands.append(x - enlarge(small))
        x = small
    return bands + [x]


def patches(x, per_image=128, side=7, seed=0):
    """(N, C, R, R) -> (N * per_image, C * side * side): square patches at random places."""
    N, C, R, _ = x.shape
    corner = torch.randint(R - side + 1, (2, N, per_image), generator=torch.Generator().manual_seed(seed))
    rows = corner[0][..., None, None] + torch.arange(side)[:, None]     # (N, per_image, side, 1)
    columns = corner[1][..., None, None] + torch.arange(side)           # (N, per_image, 1, side)
    image = torch.arange(N)[:, None, None, None]
    return x[image, :, rows, columns].flatten(0, 1).flatten(1)


def pyramid_distances(real, fake, smallest=16, per_image=128, projections=512):
    """Two sets of images (N, R, R, 3) uint8 -> {pixels per side: sliced Wasserstein distance of that level's patches}.

    Patches are scaled per colour channel to the mean and variance of the *real* ones. (Karras et al. scale each set by itself,
    which hides wrong contrast and colour.)"""
    pyramids = [laplacian_pyramid(torch.from_numpy(images).permute(0, 3, 1, 2).float(), smallest) for images in (real, fake)]
    distances = {}
    for real_band, fake_band in zip(*pyramids):
        mean, std = real_band.mean((0, 2, 3), keepdim=True), real_band.std((0, 2, 3), keepdim=True).clamp(min=1e-8)
        real_points, fake_points = (patches((band - mean) / std, per_image, seed=k) for k, band in enumerate((real_band, fake_band)))
        distances[real_band.shape[-1]] = sliced_wasserstein(real_points, fake_points, projections)
    return distances


def mean_colours(images):
    """(N, R, R, 3) uint8 -> mean (3,) and standard deviation (3,) over the images of an image's mean colour, in 0..255."""
    colours = images.reshape(len(images), -1, 3).mean(1)
    return colours.mean(0), colours.std(0)


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
    few = 0.5               # diversity: images of a class differ less than this share of what they did at best, or real ones do
    won = 0.02              # D's loss below this share of what guessing costs: D is never wrong, G learns nothing
    blind = 0.003           # D's verdicts on real and generated images closer than this in every line: D sees nothing, G learns nothing
    steps, growth = 300, 2  # a sigma_0 of G's first layers has grown by this factor within so many steps
    worse, looks = 2, 2     # score above this many times the best one, at so many looks in succession
    max_rollbacks = 3

    diversity: float = 0.0                                          # the highest so far; these four are saved in checkpoints
    score: float = math.inf                                         # the best so far ...
    best: int = 0                                                   # ... and its step
    rollbacks: int = 0

    def __post_init__(self):
        self.log = []                                               # the newest lines

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
        scores = [line["score"] for line in self.log if "score" in line][-self.looks:]
        if len(scores) == self.looks and min(scores) > self.worse * self.score:
            reason = f"the score is {scores[-1]:.1f}, at step {self.best} it was {self.score:.1f}"
        measured = {"diversity": entry["diversity"], "score": entry.get("score", 0.0), **entry["sigma_0"]}
        for name, value in measured.items():
            if not math.isfinite(value):
                reason = f"{name} is no longer a finite number"
        if reason:
            self.log = []                                           # it takes new lines to say so again
            return reason, False
        best = entry.get("score", math.inf) < self.score
        if best:
            self.score, self.best = entry["score"], entry["step"]
        return None, best


# ---------------------------------------------------------------- the command
# What reads images comes from train.py, which has already imported this file: hence the imports inside the functions.

def find_images(source):
    """All image files in a folder and the folders below it, in sorted order."""
    from train import is_image
    if not Path(source).is_dir():
        raise UserError(f"{source} is not a folder of images, nor an array FILE.npz; name another")
    paths = sorted(Path(folder, name) for folder, _, names in os.walk(source, followlinks=True) for name in names if is_image(name))
    if not paths:
        raise UserError(f"{source} holds no images")
    return paths


def load_images(source, resolution, n, seed):
    """n images of a folder, packed or not, or freshly drawn shapes that training never sees: (n, R, R, 3) uint8.

    Unreadable files are named."""
    from train import Shapes, load_image, open_packed, some_images
    if source == "shapes":
        shapes = Shapes(resolution)
        return np.stack([shapes[Shapes.length + seed * n + i][0] for i in range(n)])
    if str(source).endswith(".npz"):
        images = open_npz(source)
        if len(images) < n:
            raise UserError(f"{source} has {len(images)} images, fewer than --n {n}; pass --n {len(images)}")
        if images.shape[1] != resolution:
            raise UserError(f"{source} has images of {images.shape[1]} pixels and the others have {resolution}; draw it at their size")
        return images[:n]
    if Path(source, "packed.json").exists():
        packed = open_packed(source, resolution)
        if len(packed) < n:
            raise UserError(f"{source} has {len(packed)} images, fewer than --n {n}; pass --n {len(packed)}")
        return some_images(packed, n, seed)[0].numpy()
    paths, images = find_images(source), []
    for i in np.random.default_rng(seed).permutation(len(paths)):
        if len(images) == n:
            break
        try:
            images.append(load_image(paths[i], resolution))
        except Exception as reason:                                 # Pillow raises whatever its decoders do
            warn(f"skipped {paths[i]}: {reason}")
    if len(images) < n:
        raise UserError(f"{source} has {len(images)} readable images, fewer than --n {n}; pass --n {len(images)}")
    return np.stack(images)


def open_npz(path):
    """The images (n, R, R, 3) uint8 in an array file of `sample.py --npz` or of anyone else, where they are the first array."""
    try:
        with np.load(path) as arrays:
            images = arrays[arrays.files[0]]
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] != images.shape[2] or images.shape[3] != 3:
            raise UserError(f"{path} holds {images.dtype} of shape {images.shape}, not (n, R, R, 3) uint8; name another")
    except FileNotFoundError:
        raise UserError(f"the array {path} does not exist; draw it with sample.py --npz, or name another") from None
    except UserError:
        raise
    except Exception:                                               # numpy and zipfile raise what their parsers do
        raise UserError(f"{path} is not an array of images as sample.py --npz writes it; name another") from None
    return images


def common_side(source):
    """The largest power of two that the first readable image of a folder is not smaller than."""
    from train import open_packed
    if str(source).endswith(".npz"):
        return open_npz(source).shape[1]
    if Path(source, "packed.json").exists():
        return open_packed(source).images.shape[1]
    for path in find_images(source):
        try:
            with Image.open(path) as image:
                side = min(image.size)
        except Exception:                                           # load_images will name it
            continue
        if side < 16:
            raise UserError(f"{path} is smaller than 16 pixels, too small for these scores")
        return 2**int(math.log2(side))
    raise UserError(f"{source} holds no readable image")


def main(arguments):
    parser = Parser(__doc__)
    parser.add_argument("--weights", help="run folder or checkpoint to draw the images with (default: the newest run in runs/)")
    parser.add_argument("--fake", metavar="DIR", help="score the images in this folder, or in FILE.npz, instead")
    parser.add_argument("--data", "--real", dest="data", metavar="DIR", help="folder of real images, or 'shapes'")
    parser.add_argument("--n", type=at_least_one, default=2000, help="images of each kind; compare only scores of equal n (default: 2000)")
    parser.add_argument("--trunc", type=positive, metavar="T", help="truncate the noise at T (default: not truncated; see sample.py)")
    parser.add_argument("--seed", type=seed_number, default=0, help="of the noise and the choice of images (default: 0)")
    parser.add_argument("--out", default="metrics.json", metavar="FILE.json", help="(default: metrics.json)")
    args = parser.parse_args(arguments)
    if not args.data:
        parser.error("--data DIR, the folder of real images to compare with, is missing")
    if args.fake and (args.weights or args.trunc):
        parser.error("--fake excludes --weights and --trunc: score a folder or a generator")
    if args.n < 2:
        parser.error("--n must be at least 2, since a distribution is compared")
    out = check_output(args.out, ".json")

    if args.fake:
        source = args.fake
        resolution = 32 if source == "shapes" else common_side(source)
        real = load_images(args.data, resolution, args.n, args.seed)
        fake = load_images(source, resolution, args.n, args.seed)
    else:
        G = read_generator(args.weights)
        source, resolution = G.source, G.config.resolution
        real = load_images(args.data, resolution, args.n, args.seed)
        prepare(G, args.trunc)
        labels = [i % G.config.n_classes for i in range(args.n)]    # every class equally often
        fake = draw_seeds(G, labels, range(args.seed * args.n, (args.seed + 1) * args.n), G.noise)

    distances = pyramid_distances(real, fake)
    result = {"fake": source, "real": args.data, "n": args.n, "resolution": resolution, "seed": args.seed,
              "truncation": args.trunc, "noise": None if args.fake else G.noise_said,
              "swd_x1000": {str(side): round(1000 * d, 2) for side, d in distances.items()},
              "swd_x1000_mean": round(1000 * sum(distances.values()) / len(distances), 2)}
    for name, images in ("real", real), ("fake", fake):
        mean, spread = mean_colours(images)
        result[name + "_colour"] = {"mean": mean.round(1).tolist(), "spread": spread.round(1).tolist()}
    save_atomically(out, lambda f: f.write(json.dumps(result, indent=1).encode()))
    levels = ", ".join(f"{side}x{side} {d}" for side, d in result["swd_x1000"].items())
    print(f"{args.n} images of {source} against {args.data}")
    print(f"sliced Wasserstein distance x 1000: {levels}, mean {result['swd_x1000_mean']}")
    for name in "real", "fake":
        c = result[name + "_colour"]
        print(f"mean colour of {name} images: {c['mean']}, varying by {c['spread']}")
    print(f"written to {out}")


if __name__ == "__main__":
    run(main)
