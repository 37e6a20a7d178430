"""Train BigGAN on a folder of images, or on shapes that are drawn on the fly.

    python train.py --preset shapes                        ten drawn shapes, nothing to download, minutes on two CPU cores
    python train.py --preset cifar10                       CIFAR-10, fetched and checked
    python train.py --preset cifar10 --data my_images      a folder with one sub-folder of images per class
    torchrun --nproc_per_node=8 train.py --data imagenet/train      the paper's ImageNet run at 128x128, on eight GPUs
    python train.py --data imagenet/train --pack imagenet128        decode all images once; then --data imagenet128
    python train.py --init runs/cifar10 --data my_images --out runs/mine --batch 64      start from weights that exist

Under torchrun the processes share each batch, and batch norm sees all of it: a run means the same on any number of them.
The same command again continues where the run stopped, also after a kill. A run is a folder:

    config.json        every setting and the class names
    log.jsonl          one JSON object per logged step
    samples/*.png      the same noise at growing steps, a row per class (of 16), drawn by the averaged generator
    checkpoints/*.pt   tensors and plain values only; sample.py and metrics.py need nothing else

Reading order: settings and presets, data, several processes, one training step, a run and its folder, the loop, how fast it is.
"""

import copy
import dataclasses
import fcntl
import hashlib
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import sys
import tarfile
import time
import warnings
import zlib
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch.distributed.rendezvous import rendezvous
from torch.utils.flop_counter import FlopCounterMode

from biggan import (EMA, LOSSES, MODELS, Discriminator, Generator, ModelConfig, clamp_sigma, fold_spectral_norm, gradient_penalty,
                    matrix_layers, orthogonal_regularisation, power_iteration, processes, r1_penalty, rank, sigma_pull, singular_values,
                    standing_statistics, truncated_normal)
from metrics import (INCEPTION, Arrays, Drawn, Given, Inception, Monitor, find_inception, frechet_distance, pyramid_distances, see,
                     see_real, spread_within)
from sample import (STANDING_BATCHES, Parser, UserError, checkpoints_of, draw_seeds, fetch, file_trouble, hours, image_grid, last_line,
                    keep_freed_memory, newest_checkpoint, pick_device, read_checkpoint, read_weights, run, save_atomically, tell, warn)


# ---------------------------------------------------------------- settings

def option(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class Settings:
    """Every setting of a run, its default (the paper's ImageNet run at 128x128; ema_start is the author's code's) and what it does."""
    preset: str = option("imagenet128", "a named set of values for the options below, listed at the end")
    data: str = option(None, "folder with one sub-folder of images per class, or one that --pack wrote, or 'shapes'")
    pack: str = option(None, "do not train: decode all images of --data once, at the model's resolution, into this folder")
    benchmark: int = option(None, "do not train: time this many steps, on noise unless --data is given, and say where the time goes")
    out: str = option(None, "run folder (default: runs/PRESET)")
    init: str = option(None, "start from these weights, which also decide the architecture, instead of random ones: whatever sample.py "
                             "takes for --weights; classes are matched by name")
    model: str = option("biggan128", f"architecture, one of {', '.join(MODELS)}")
    ch: int = option(None, "width: the number all channel counts are multiples of (default: the model's, 96 for biggan128)")
    shared_dim: int = option(None, "length of the class vector all layers of G share; 0: a class table in each (default: the model's)")
    steps: int = option(150_000, "optimiser steps of G")
    batch: int = option(2048, "real images per D step, and generated images per step of either network")
    micro_batch: int = option(None, "images at a time, over all processes, gradients added up to --batch; batch norm then sees only "
                                    "these (default: all)")
    d_steps: int = option(2, "D steps per G step")
    g_lr: float = option(5e-5, "Adam's learning rate for G")
    d_lr: float = option(2e-4, "Adam's learning rate for D")
    beta1: float = option(0.0, "Adam's momentum; anything above 0 destabilises large runs")
    beta2: float = option(0.999, "Adam's memory for squared gradients")
    loss: str = option("hinge", f"one of {', '.join(LOSSES)}")
    ortho: float = option(1e-4, "beta, the weight of orthogonal regularisation on G")
    r1: float = option(0.0, "gamma, the weight of the R1 penalty on D; the paper tried 10 and 1 (section 4.2)")
    sigma_fixed: float = option(None, "after every step, lower the largest singular value of each layer of G to this (section 4.1)")
    sigma_ratio: float = option(None, "lower it to this multiple of the layer's second largest one instead")
    sigma_pull: float = option(0.0, "rather than lowering it, pull it there, from either side, by a penalty of this weight")
    ema: float = option(0.9999, "decay of the averaged generator")
    ema_start: int = option(20_000, "step from which G is averaged; before it the average follows G")
    flip: int = option(1, "1 mirrors each real image with probability 1/2; 0 never does")
    precision: str = option("auto", "bf16, fp16 (with loss scaling), fp32, fp64 (to prove things); auto: bf16 where the hardware has it, "
                                    "else fp32")
    compile: bool = option(False, "let torch.compile fuse G's and D's operations; the first step then takes minutes")
    seed: int = option(0, "of weights, noise and data order")
    workers: int = option(None, "processes that decode images (default: 8 beside a GPU, 0 on a CPU; with --pack all cores)")
    held_out: str = option(None, "folder of held-out images of the same classes: does D take them for real as often as those of --data?")
    fid: int = option(None, "generated images for the FID at every look, which needs Inception's weights (default: 10,000 on a GPU if "
                            "metrics.py has fetched them, else 0)")
    log_every: int = option(50, "steps between lines of log.jsonl")
    eval_every: int = option(1000, "steps between looks at the score, the FID, every layer's singular values and, with --held-out, "
                                   "at D's memory")
    sample_every: int = option(1000, "steps between sample grids")
    save_every: int = option(1000, "steps between checkpoints")
    keep: int = option(3, "how many of the newest checkpoints to keep, besides the one with the best score")
    keep_every: int = option(25_000, "also keep those of every so many steps")
    on_collapse: str = option("stop", "stop, rollback (to the best checkpoint, with half the learning rates, 3 times), or warn and go on")


PRESETS = {  # what differs from the defaults above
    "shapes": dict(data="shapes", model="shapes32", steps=3000, batch=64, d_steps=1, g_lr=2e-4, d_lr=4e-4, beta2=0.99,
                   ema=0.998, ema_start=200, flip=0, sample_every=250, save_every=250, eval_every=250),
    "cifar10": dict(data="data/cifar10", held_out="data/cifar10-test", model="biggan32", steps=100_000, batch=64, d_steps=4, g_lr=2e-4,
                    ema_start=1000),
    "imagenet64": dict(model="biggan64"),
    "imagenet128": dict(),
    "imagenet256": dict(model="biggan256"),
    "imagenet512": dict(model="biggan512"),
    "imagenet128-deep": dict(model="biggan-deep-128"),
    "imagenet256-deep": dict(model="biggan-deep-256", g_lr=2.5e-5, d_lr=2.5e-5),
    "imagenet512-deep": dict(model="biggan-deep-512", g_lr=2.5e-5, d_lr=2.5e-5),

    # The road: SN-GAN (Miyato & Koyama 2018), then the rows of the paper's table 1, each with what is new in it.
    "sngan128": dict(model="sngan128", steps=450_000, batch=64, d_steps=5, g_lr=2e-4, beta2=0.9, ortho=0.0),
    # SAGAN (Zhang et al. 2019) ...
    "table1-row1": dict(model="sagan128", steps=1_000_000, batch=256, d_steps=1, g_lr=1e-4, d_lr=4e-4, beta2=0.9, ortho=0.0),
    # ... half the learning rates and two D steps, on twice the batch; larger batches
    "table1-row2": dict(model="sagan128", steps=1_000_000, batch=512, ortho=0.0),
    "table1-row3": dict(model="sagan128", steps=1_000_000, batch=1024, ortho=0.0),
    "table1-row4": dict(model="sagan128", steps=732_000, ortho=0.0),
    # wider; class vectors shared by all layers of G; z cut into chunks (biggan128); orthogonal regularisation; narrower again
    "table1-row5": dict(model="sagan128", ch=96, steps=295_000, ortho=0.0),
    "table1-row6": dict(model="sagan128", ch=96, shared_dim=128, steps=185_000, ortho=0.0),
    "table1-row7": dict(steps=152_000, ortho=0.0),
    "table1-row8": dict(steps=165_000),
    "table1-row9": dict(ch=64, steps=371_000),
}

# These may differ when a run is continued: they change where and how long, not what is computed.
FREE_TO_CHANGE = {"data", "out", "held_out", "fid", "steps", "workers", "log_every", "sample_every", "save_every",
                  "eval_every", "keep", "keep_every", "on_collapse", "compile"}

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}              # what autocast computes convolutions and products in


def parse_settings(arguments):
    """Command line -> Settings: the defaults, then the preset, then what was typed. Refuses what cannot work."""
    parser = Parser(description=__doc__)
    spell = lambda preset: " ".join(f"--{name.replace('_', '-')} {value}" for name, value in preset.items()) or "the defaults"
    parser.epilog = "presets, as the options they stand for:\n" + "\n".join(f"  {name:<18}{spell(p)}" for name, p in PRESETS.items())
    for f in dataclasses.fields(Settings):
        text = f.metadata["help"] + (f" (default: {f.default})" if f.default is not None else "")
        choices = {"preset": list(PRESETS), "model": list(MODELS), "loss": list(LOSSES), "precision": ["auto", *HALF, "fp32", "fp64"],
                   "on_collapse": ["stop", "rollback", "warn"]}
        flag = "--" + f.name.replace("_", "-")
        if f.type is bool:
            parser.add_argument(flag, action="store_true", default=None, help=f.metadata["help"])
        else:
            metavar = {int: "N", float: "X", str: "NAME" if f.name in choices else "DIR"}[f.type]
            parser.add_argument(flag, type=f.type, choices=choices.get(f.name), help=text, metavar=metavar)
    typed = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    preset = typed.get("preset", Settings.preset)
    s = Settings(**{**PRESETS[preset], **typed})
    if "data" in typed or s.loss == "wgan-gp":
        s.held_out = typed.get("held_out")                          # the preset's belongs to its own data
    if s.init:
        for name in {"model", "ch", "shared_dim"} & typed.keys():
            parser.error(f"--{name.replace('_', '-')} does not go with --init, whose weights decide the architecture; leave it out")
        s.model, s.ch, s.shared_dim = None, None, None
        s.ema_start = typed.get("ema_start", 0)                     # no random first weights linger
    else:
        s.ch, s.shared_dim = (getattr(MODELS[s.model], name) if value is None else value
                              for name, value in (("ch", s.ch), ("shared_dim", s.shared_dim)))
    for names, fits, must in (
            ("benchmark ch steps batch micro_batch d_steps log_every sample_every save_every eval_every keep keep_every",
             lambda value: value >= 1, "at least 1"),
            ("g_lr d_lr ortho r1 sigma_pull shared_dim seed ema_start workers fid",
             lambda value: 0 <= value < math.inf, "0 or more and finite"),
            ("beta1 beta2 ema", lambda value: 0 <= value < 1, "at least 0 and below 1"),
            ("sigma_fixed", lambda value: 0 < value < math.inf, "above 0 and finite"),
            ("sigma_ratio", lambda value: 1 <= value < math.inf, "at least 1 and finite, since it is the largest over the second largest"),
            ("fid", lambda value: value != 1, "0 or at least 2, since a distribution is compared"),
            ("seed", lambda value: value < 2**62, "below 2^62"),
            ("flip", lambda value: value in (0, 1), "0 or 1")):
        for name in names.split():
            if (value := getattr(s, name)) is not None and not fits(value):
                parser.error(f"--{name.replace('_', '-')} must be {must}, not {value}")
    try:
        model = None if s.init else model_config(s)
    except ValueError as error:
        parser.error(f"--shared-dim {s.shared_dim} does not go with --model {s.model}: {error}; sagan128 and sngan128 are made for it")
    if model and s.ch % 8 and (model.g_attention or model.d_attention):
        parser.error(f"--ch must be a multiple of 8, not {s.ch}: attention works with an eighth of the channels")
    if s.sigma_fixed is not None and s.sigma_ratio is not None:
        parser.error("--sigma-fixed and --sigma-ratio exclude each other; choose one bound for the singular values")
    if s.sigma_pull and s.sigma_fixed is None and s.sigma_ratio is None:
        parser.error("--sigma-pull needs a goal: --sigma-fixed or --sigma-ratio")
    if s.batch % (s.micro_batch or s.batch):
        parser.error(f"--micro-batch {s.micro_batch} does not divide --batch {s.batch}")
    if s.benchmark:
        s.data, s.held_out = typed.get("data"), None
    elif s.data is None:
        parser.error(f"--preset {preset} needs --data DIR, a folder with one sub-folder of images per class; "
                     "--preset shapes needs no data")
    if s.loss == "wgan-gp" and s.held_out:
        parser.error("--held-out tells nothing under --loss wgan-gp, whose D only says which images are more real; leave it out")
    if s.data == "shapes" and s.loss != "wgan-gp":
        s.held_out = s.held_out or "shapes"
    if s.held_out and s.held_out != "shapes" and Path(s.held_out).resolve() == Path(s.data).resolve():
        parser.error(f"--held-out {s.held_out} is the folder of --data; name images that are not trained on")
    s.out = s.out or f"runs/{preset}"
    if s.init and Path(s.init).resolve() == Path(s.out).resolve():
        parser.error(f"--init and --out are both {s.out}; without --init it continues, with another --out it starts anew from there")
    return s


def model_config(s, n_classes=1):
    """The architecture that the settings ask for. Raises ValueError if they contradict each other."""
    return dataclasses.replace(MODELS[s.model], ch=s.ch, shared_dim=s.shared_dim, n_classes=n_classes)


def first_weights(s):
    """With --init: the architecture and the weights, or None in their place if the run has checkpoints of its own by now."""
    if checkpoints_of(s.out):
        try:
            before = json.loads(Path(s.out, "config.json").read_text())
            return ModelConfig(**{f.name: before[f.name] for f in dataclasses.fields(ModelConfig)}), None
        except (OSError, ValueError, KeyError, TypeError):          # open_run will say what is wrong with it
            pass
    weights = read_weights(s.init, to_train=True)
    return weights.config, weights


# ---------------------------------------------------------------- data

Image.MAX_IMAGE_PIXELS = None                                       # these are the user's own files: any size is meant


def circle(radius=1.0, x=0.0, y=0.0, corners=48):
    angle = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    return np.stack([x + radius * np.cos(angle), y + radius * np.sin(angle)], 1)


def star(points=5, inner=0.42):
    radius = np.where(np.arange(2 * points) % 2, inner, 1.0)
    angle = np.pi * np.arange(2 * points) / points - np.pi / 2
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)


def heart(t=np.linspace(0, 2 * np.pi, 48, endpoint=False)):
    return np.stack([16 * np.sin(t)**3, -13 * np.cos(t) + 5 * np.cos(2 * t) + 2 * np.cos(3 * t) + np.cos(4 * t)], 1) / 17


SHAPES = {  # polygons in a circle of radius 1, y downwards; the first is filled, a second one is cut out of it
    "arrow": [[(0, -1), (.75, -.15), (.28, -.15), (.28, .95), (-.28, .95), (-.28, -.15), (-.75, -.15)]],
    "circle": [circle(0.9)],
    "crescent": [circle(1.0), circle(0.85, 0.5, -0.1)],
    "cross": [[(x * s, y * s) for s in (1, -1) for x, y in ((-.3, -.95), (.3, -.95), (.3, -.3), (.95, -.3), (.95, .3), (.3, .3))]],
    "diamond": [[(0, -1), (.6, 0), (0, 1), (-.6, 0)]],
    "heart": [heart()],
    "ring": [circle(1.0), circle(0.55)],
    "square": [[(-.75, -.75), (.75, -.75), (.75, .75), (-.75, .75)]],
    "star": [star()],
    "triangle": [[(0, -1), (.95, .75), (-.95, .75)]],
}


class Shapes:
    """Ten classes of drawn shapes: bright on dark, of any hue, size, place and a slight tilt. Image i is always the same image."""

    length = 1_000_000

    def __init__(self, resolution, held_out=False):
        self.resolution, self.classes, self.first = resolution, list(SHAPES), self.length if held_out else 0
        self.labels = np.arange(self.length) % len(SHAPES)

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        """-> (R, R, 3) uint8, label."""
        label, rng = i % len(SHAPES), np.random.default_rng(self.first + i)
        fine = 4 * self.resolution                                  # drawn four times too large, then averaged down
        angle, radius = rng.uniform(-0.2, 0.2), rng.uniform(0.28, 0.40)
        turn = radius * np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        place = rng.uniform(0.44, 0.56, 2)
        mask = Image.new("L", (fine, fine))
        for fill, corners in zip((255, 0), SHAPES[self.classes[label]]):
            ImageDraw.Draw(mask).polygon((fine * (np.array(corners) @ turn + place)).ravel().tolist(), fill=fill)
        mask = np.asarray(mask.reduce(4), np.float32)[:, :, None] / 255
        # A saturated colour of any hue (one channel full, one empty to half, one in between) on any dark one.
        bright = 255 * rng.permutation([rng.uniform(0.8, 1.0), rng.uniform(0, 0.4), rng.uniform(0, 1.0)])
        dark = 0.3 * rng.uniform(0, 255, 3)
        return (mask * bright + (1 - mask) * dark + 0.5).astype(np.uint8), label


class ImageFolder:
    """A folder with one sub-folder per class; the classes are the sub-folders' names in sorted order.

    Any file type, colour mode and size that Pillow opens. A file that cannot be decoded is named in a warning and replaced by the
    next one of its class. Raises UserError where the folder is not of this shape."""

    def __init__(self, root, resolution, option="--data"):
        root, self.resolution, self.broken = Path(root), resolution, set()
        if not root.is_dir():
            raise UserError(f"the data folder {root} does not exist; give {option} another" if not root.exists() else
                            f"{root} is a file; {option} needs a folder with one sub-folder of images per class")
        folders = sorted(d for d in root.iterdir() if d.is_dir() and not d.name.startswith("."))
        files = {d: images_in(d) for d in folders}
        if not any(files.values()):
            if images_in(root):
                raise UserError(f"{root} holds images but no class folders; move them into one sub-folder per class")
            if deeper := [str(d) for d in folders if any(images_in(sub) for sub in d.iterdir() if sub.is_dir())]:
                raise UserError(f"{root} is one folder too high, the classes seem to be one level down; "
                                f"pass {option} {f' or {option} '.join(deeper)}")
            raise UserError(f"{root} holds no images; {option} needs a folder with one sub-folder of images per class")
        for d in folders:
            if not files[d]:
                raise UserError(f"the class folder {d} holds no images; fill it or remove it")
        self.classes = [d.name for d in folders]
        # Not a list: every worker would come to have its own copy of those million objects, as reading one counts its readers in it.
        self.paths = np.array([os.fsencode(path) for d in folders for path in files[d]])
        self.labels = np.repeat(np.arange(len(folders)), [len(files[d]) for d in folders])
        self.first_of = np.searchsorted(self.labels, np.arange(len(folders) + 1))   # class k's images: first_of[k] to first_of[k+1]
        for label in range(len(folders)):
            self[int(self.first_of[label])]                         # raises now, not in an hour, if a class has no readable image

    def __len__(self):
        return len(self.paths)

    def path(self, i):
        return Path(os.fsdecode(self.paths[i]))

    def __getitem__(self, i):
        """-> (R, R, 3) uint8, label."""
        label = int(self.labels[i])
        first, end = int(self.first_of[label]), int(self.first_of[label + 1])
        for j in [*range(i, end), *range(first, i)]:
            if j not in self.broken:
                try:
                    return load_patiently(self.path(j), self.resolution), label
                except Exception as reason:                         # Pillow raises whatever its decoders do
                    self.broken.add(j)
                    warn(f"skipped {self.path(j)}: {reason}")
        raise UserError(f"none of the {end - first} images in the class folder {self.path(i).parent} can be read; replace or remove it")


def images_in(folder):
    with os.scandir(folder) as entries:
        return sorted(Path(e.path) for e in entries if is_image(e.name) and e.is_file())


def is_image(name, known=Image.registered_extensions()):
    """Whether a file of this name is one that Pillow opens (it also registers some that it only writes)."""
    return known.get(Path(name).suffix.lower()) in Image.OPEN and not name.startswith(".")


def load_image(path, resolution):
    """Any image file -> (R, R, 3) uint8: the centre square along the long edge, area-averaged down to R (appendix C)."""
    with Image.open(path) as image:
        # A large JPEG can be decoded at a half, a quarter or an eighth of its size, several times faster. Two pixels per wanted one are
        # left for the averaging below. Only JPEGs have a draft.
        image.draft(None, (2 * resolution, 2 * resolution))
        if image.mode == "F":
            raise ValueError("its pixels are floating-point numbers, of which nobody knows what is white")
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16") or image.mode == "I":      # 16-bit grey, which Pillow would clip to white
            image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).astype(np.uint8))
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        image = image.convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    how = Image.Resampling.BOX if side >= resolution else Image.Resampling.BICUBIC
    return np.asarray(image.resize((resolution, resolution), how, (left, top, left + side, top + side)))


def load_patiently(path, resolution):
    """`load_image`, but trouble of the disk or the network, unlike a broken image, may pass: it is waited for, a minute or so."""
    for wait in 1, 10, 60, None:
        try:
            return load_image(path, resolution)
        except OSError as error:                                    # Pillow's own, for broken images, have no errno
            if error.errno is None or isinstance(error, (FileNotFoundError, PermissionError)) or wait is None:
                raise
            warn(f"{path} cannot be read now: {error.strerror}; trying again in {wait} s")
            time.sleep(wait)


# Decoding a JPEG takes a core about a millisecond, which keeps many cores busy beside fast GPUs. `--pack` does it once for all. A packed
# folder: images.npy (N, R, R, 3) uint8 and labels.npy (N,), which numpy reads, packed.json (resolution, class names) and
# checksums.npy, one CRC-32 per 256 images, -1 where they are still missing.

PACK_BLOCK = 256


def share_missing(folder):
    """Of a packed folder, the share that is not packed yet."""
    try:
        return (np.load(folder / "checksums.npy") < 0).mean() if (folder / "packed.json").exists() else 1.0
    except Exception:                                               # damaged; numpy raises what its parsers do
        return 1.0


def open_packed(folder, resolution=None):
    """A packed folder, of this or of any resolution, as a data set; its images stay on the disk until they are wanted."""
    folder = Path(folder)
    try:
        described = json.loads((folder / "packed.json").read_text())
        labels, side = np.load(folder / "labels.npy"), described["resolution"]
        images = np.load(folder / "images.npy", mmap_mode="r")
        if (images.shape != (len(labels), side, side, 3) or images.dtype != np.uint8
                or zlib.crc32(labels.tobytes()) != described["labels"] or labels.max() >= len(described["classes"])):
            raise ValueError("its files do not fit each other")
    except Exception as error:                                      # numpy raises what its parsers do
        raise UserError(f"the packed folder {folder} is damaged ({error}); delete it and pack again") from None
    if resolution not in (None, side):
        raise UserError(f"{folder} holds images of {side} pixels and the model draws {resolution}; "
                        "pack the folder that it was made of again, for this model")
    if missing := share_missing(folder):
        raise UserError(f"the packed folder {folder} lacks {missing:.0%} of its images; repeat the command with --pack that wrote it")
    return Arrays(images, labels, described["classes"])


class Blocks:
    """Number b -> the checksum of block b, after reading it back if it is there, or else after decoding and writing its images."""

    def __init__(self, data, folder, resolution, checksums):
        self.data, self.file, self.resolution, self.checksums = data, folder / "images.npy", resolution, checksums
        # Where the pixels begin. They are written as to any file: through a memory map, a full disk would kill without a word.
        self.header = np.load(self.file, mmap_mode="r").offset

    def __getitem__(self, b):
        block = range(b * PACK_BLOCK, min((b + 1) * PACK_BLOCK, len(self.data)))
        with open(self.file, "r+b") as f:
            f.seek(self.header + block.start * self.resolution**2 * 3)
            if self.checksums[b] >= 0:
                if zlib.crc32(f.read(len(block) * self.resolution**2 * 3)) == self.checksums[b]:
                    return b, self.checksums[b]
                warn(f"images {block.start} to {block.stop - 1} in {self.file} have changed since; they are packed again")
                f.seek(self.header + block.start * self.resolution**2 * 3)
            pixels = np.stack([self.data[i][0] for i in block]).tobytes()
            f.write(pixels)
            f.flush()
            os.fsync(f.fileno())                                    # on the disk before its checksum is
        return b, zlib.crc32(pixels)


def pack(data, folder, resolution, workers):
    """Write a data set into a packed folder, with so many processes. Repeated, it checks what is there and writes what is missing."""
    folder, size = Path(folder), len(data) * resolution**2 * 3
    described = {"resolution": resolution, "images": len(data), "classes": data.classes,
                 "labels": zlib.crc32(np.asarray(data.labels, np.int64).tobytes()),
                 "files": zlib.crc32(b"\n".join(b"/".join(path.split(b"/")[-2:]) for path in getattr(data, "paths", [])))}
    say(f"{len(data):,} images at {resolution}x{resolution}: {size / 1e9:,.2f} GB in {folder}")
    checksums = np.full(-(-len(data) // PACK_BLOCK), -1, np.int64)
    if (folder / "packed.json").exists():
        try:
            before, checksums = json.loads((folder / "packed.json").read_text()), np.load(folder / "checksums.npy")
            whole = np.load(folder / "images.npy", mmap_mode="r").shape == (before["images"], *2 * [before["resolution"]], 3)
        except Exception:                                           # numpy raises what its parsers do
            whole = False
        if not whole:
            raise UserError(f"the packed folder {folder} is damaged; delete it and repeat the command")
        if before != described:
            raise UserError(f"{folder} was packed from other images or at another size; delete it or choose another --pack")
    elif folder.exists() and (not folder.is_dir() or {p.name.removesuffix(".tmp") for p in folder.iterdir()}
                              - {"images.npy", "labels.npy", "checksums.npy", "packed.json"}):      # of a pack killed at its beginning
        raise UserError(f"{folder} is in use for something else; choose another --pack")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(folder).free) < size:
            raise UserError(f"there is room for {free / 1e9:,.2f} GB only in {folder}; make room or choose another --pack")
        np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, (len(data), resolution, resolution, 3))
        for name, array in ("labels", np.asarray(data.labels, np.int64)), ("checksums", checksums):
            save_atomically(folder / f"{name}.npy", lambda f: np.save(f, array))
        save_atomically(folder / "packed.json", lambda f: f.write(json.dumps(described, indent=1).encode()))
    blocks = torch.utils.data.DataLoader(Blocks(data, folder, resolution, checksums.copy()), batch_size=None,
                                         sampler=range(len(checksums)), num_workers=workers)
    started = said = time.perf_counter()
    try:
        for done, (b, checksum) in enumerate(blocks, start=1):
            if checksums[b] != checksum:
                checksums[b] = checksum
                save_atomically(folder / "checksums.npy", lambda f: np.save(f, checksums))
            if time.perf_counter() - said > 10:
                said = time.perf_counter()
                say(f"{done / len(checksums):.0%}, {(said - started) * (len(checksums) / done - 1) / 60:.1f} minutes left")
    except (UserError, OSError, RuntimeError) as error:             # a class without an image, a full disk, a killed worker
        raise UserError(f"packing {folder} was interrupted: {last_line(error)}; when that is mended, the same command continues") from None
    say(f"packed, each block checked: --data {folder}")


CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"


def fetch_cifar10(folder=Path("data"), url=CIFAR10_URL, md5=CIFAR10_MD5):
    """The official archive of CIFAR-10, fetched once, checked, and packed into data/cifar10 and data/cifar10-test."""
    if not share_missing(folder / "cifar10") and not share_missing(folder / "cifar10-test"):
        return
    archive = folder / url.rpartition("/")[2]
    folder.mkdir(exist_ok=True)
    if not archive.exists():
        say(f"fetching {url}, 170 MB")
        try:
            fetch(url, archive)
        except OSError as error:
            raise UserError(f"{url} could not be fetched ({error}); "
                            f"fetch it on another machine, put it at {archive}, and repeat the command") from None
    with open(archive, "rb") as f:
        if (found := hashlib.file_digest(f, "md5").hexdigest()) != md5:
            raise UserError(f"{archive} is not the official archive or not all of it: its md5 is {found}, not {md5}; "
                            "delete it and repeat the command")
    with tarfile.open(archive) as tar:
        read = lambda name: tar.extractfile(f"cifar-10-batches-bin/{name}").read()
        classes = read("batches.meta.txt").decode().split()
        for name, files in ("cifar10", [f"data_batch_{k}.bin" for k in range(1, 6)]), ("cifar10-test", ["test_batch.bin"]):
            records = np.frombuffer(b"".join(map(read, files)), np.uint8).reshape(-1, 1 + 3 * 32 * 32)    # label, red, green, blue
            images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
            pack(Arrays(images, records[:, 0], classes), folder / name, 32, workers=0)


def open_data(source, resolution, held_out=False):
    """'shapes', a packed folder or a folder of images, as a data set."""
    if source == "shapes":
        return Shapes(resolution, held_out)
    if Path(source, "packed.json").exists():
        return open_packed(source, resolution)
    return ImageFolder(source, resolution, "--held-out" if held_out else "--data")


def some_images(data, n, seed):
    """n images chosen at random, or all if there are fewer: (n, R, R, 3) uint8, labels (n,)."""
    chosen = np.random.default_rng(seed).permutation(len(data))[:n]
    images, labels = zip(*[data[int(i)] for i in chosen])
    return torch.from_numpy(np.stack(images)), torch.tensor(labels)


def to_network(images, device):
    """(N, R, R, 3) uint8 -> (N, 3, R, R) in [-1, 1], channels last in memory as it should be."""
    return images.to(device, non_blocking=True).permute(0, 3, 1, 2).float() / 127.5 - 1


def generator_for(*numbers):
    """A random generator that depends on these numbers only: (seed, step, ...) gives the same noise on any machine."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]))


def in_order(length, batch, position, seed, flip, rows):
    """Which real image comes when: epoch after epoch, each in an order of its own, as lists of (index, mirror) per batch.

    A position in this endless sequence says everything, so a run continues with the image that would have come next. Of every batch
    this process gets the given rows only."""
    drawn = None                                                    # the epoch whose order is at hand
    for start in range(position, sys.maxsize, batch):
        items = []
        for row in rows:
            epoch, k = divmod(start + row, length)
            if epoch != drawn:
                drawn, generator = epoch, generator_for(seed, epoch)
                permutation = torch.randperm(length, generator=generator).numpy()
                mirror = torch.rand(length, generator=generator).numpy() < 0.5 * flip
            items.append((int(permutation[k]), bool(mirror[k])))
        yield items


def own_rows(s):
    """Which rows of a whole batch are this process's: an equal share of every micro-batch."""
    share = (s.micro_batch or s.batch) // processes()
    return [row for row in range(s.batch) if row // share % processes() == rank()]


class Mirrored:
    """A data set addressed by (index, mirror)."""

    def __init__(self, data):
        self.data = data

    def __getitem__(self, item):
        image, label = self.data[item[0]]
        return torch.from_numpy(image[:, ::-1].copy() if item[1] else image.copy()), label


def batches(data, s, step, device):
    """This process's part of the endless sequence of real batches from `step` on: images (N, 3, R, R) in [-1, 1], labels (N,)."""
    order = in_order(len(data), s.batch, step * s.d_steps * s.batch, s.seed, s.flip, own_rows(s))
    workers = s.workers if s.workers is not None else 8 if device.type == "cuda" else 0
    loader = torch.utils.data.DataLoader(Mirrored(data), batch_sampler=order, num_workers=workers,
                                         pin_memory=device.type == "cuda", worker_init_fn=ignore_interrupts)
    for x, y in loader:
        yield to_network(x, device), y.to(device, non_blocking=True)


def ignore_interrupts(worker):
    signal.signal(signal.SIGINT, signal.SIG_IGN)                    # Ctrl-C is for the main process, which saves first


# ---------------------------------------------------------------- several processes

store = None                                                       # what the processes can leave for one another, if there are several


def join_processes(timeout=None):
    """Find the other processes, if torchrun has started several. Returns this one's device. timeout: how long they wait for each other."""
    global store
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return pick_device()
    # The strides of a 1x1 kernel can be written in two ways, which DDP takes for a difference.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # After --max-restarts the new processes meet in the same store as the dead ones and would find their addresses: an own name space.
    store, own_rank, size = next(rendezvous("env://"))
    if store.check(["given up"]):
        sys.exit(1)                                                 # see give_up
    store = dist.PrefixStore("attempt " + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=timeout,
                            store=store, rank=own_rank, world_size=size)
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def say(*words, **options):
    if rank() == 0:
        tell(*words, **options)


def fail(sentence, status=1):
    """End this process at once, without a word to the others. Where several fail for the same reason, the first one says it."""
    if store is None or store.add(sentence, 1) == 1:
        tell(f"error: {sentence}", file=sys.stderr)
    os._exit(status) if processes() > 1 else sys.exit(status)       # a usual end would wait for the other processes


def give_up(sentence):
    """End all processes, and those that torchrun may start in their place, which would only come to the same end."""
    if store is not None and rank() == 0:
        store.underlying_store.set("given up", sentence)
    raise SystemExit(1 if rank() else f"error: {sentence}")


def together(work, *arguments, first_only=False):
    """Do something that may end in a UserError in every process (or in the first only, for all): then it does in all of them.

    Returns the result: each process its own, or the first one's."""
    result = error = None
    if rank() == 0 or not first_only:
        try:
            result = work(*arguments)
        except UserError as mistake:
            error = str(mistake)
        except OSError as trouble:
            error = file_trouble(trouble)
    if processes() > 1:
        everyone = [None] * processes()
        dist.all_gather_object(everyone, (result if first_only else None, error))
        error = next((e for _, e in everyone if e), None)
        result = everyone[0][0] if first_only else result
    if error:
        error = UserError(error)
        error.shared = True                                         # `run`: everyone has it, so one will say it
        raise error
    return result


def any_process(flag):
    """Whether the flag is set in any process."""
    if processes() == 1:
        return flag
    flag = torch.tensor(float(flag))                                # on the CPU: the GPU is not waited for
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return flag.item() > 0


# ---------------------------------------------------------------- one training step
# D learns d_steps times: loss_d of D(real) and D(G(z)), while G stands still. Then G learns once: loss_g of D(G(z)), while D stands
# still. A batch that does not fit into memory is taken in micro-batches, whose gradients add up.

class Trainer:
    """G, D, their optimisers and the averaged G, and the step that moves them. Knows nothing about files."""

    def __init__(self, s, config, device):
        torch.manual_seed(s.seed)                                   # the same first weights in every process
        self.s, self.config, self.device = s, config, device
        self.dtype = torch.float64 if s.precision == "fp64" else torch.float32
        self.G = Generator(config).to(device, self.dtype, memory_format=torch.channels_last)
        self.D = Discriminator(config).to(device, self.dtype, memory_format=torch.channels_last)
        self.opt_G = torch.optim.Adam(self.G.parameters(), s.g_lr, (s.beta1, s.beta2), fused=True)
        self.opt_D = torch.optim.Adam(self.D.parameters(), s.d_lr, (s.beta1, s.beta2), fused=True)
        self.ema = EMA(self.G, s.ema, s.ema_start)
        self.loss_d, self.loss_g, self.border = LOSSES[s.loss]
        self.step, self.monitor = 0, Monitor()
        self.rows, self.micro = own_rows(s), (s.micro_batch or s.batch) // processes()
        self.half = HALF.get(s.precision)
        # What autocast leaves in float32 may round to TF32 where the rest is coarser anyway; under fp32, float32 means float32.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = self.half is not None
        torch.backends.cudnn.benchmark = True                       # all steps have the same shapes: the fastest algorithm of each is kept
        # Half of the gradients would be too small for float16: the scaler multiplies the loss by a large number, divides the gradients
        # by it, and lowers it where they overflow. In any precision it leaves out an update whose gradient is not finite.
        scale = {} if self.half == torch.float16 else {"init_scale": 1.0, "growth_interval": 2**31 - 1}     # else 1, for ever
        self.scaler_G, self.scaler_D = (torch.amp.GradScaler(device.type, **scale) for _ in "GD")
        self.not_finite = {}                                        # of each network: in how many updates each gradient was not finite
        # Called in place of G and D in training: compiled, and averaging gradients over the processes. Both share the weights.
        self.fast_G, self.fast_D = (torch.compile(network, dynamic=False) if s.compile else network for network in (self.G, self.D))
        self.parallel_G, self.parallel_D = (
            torch.nn.parallel.DistributedDataParallel(network, gradient_as_bucket_view=True)
            if processes() > 1 else network for network in (self.fast_G, self.fast_D))
        say(f"{s.precision} on {torch.cuda.get_device_name() if device.type == 'cuda' else 'the CPU'}"
            f"{f', {processes()} processes' if processes() > 1 else ''}; "
            f"G {sum(p.numel() for p in self.G.parameters()):,} and D {sum(p.numel() for p in self.D.parameters()):,} parameters")

    def start_from(self, weights, classes):
        """Take over weights that exist. Classes keep what they had under the same name; new ones are drawn at random, like the old ones."""
        names = [weights.classes.index(name) if name in weights.classes else None for name in classes]
        for network, state in (self.G, weights.G or weights.G_ema), (self.ema.model, weights.G_ema), (self.D, weights.D):
            if state:
                network.load_state_dict(match_classes(network, state, names, generator_for(self.s.seed, 1)))
        new, left_out = ([name for name in ours if name not in theirs] for ours, theirs in
                         ((classes, weights.classes), (weights.classes, classes)))
        say(f"starting from {weights.source}: all weights of G{' and D' if weights.D else ''}"
            + (f", but for the vectors of the classes {short(', '.join(left_out))}" if left_out else "")
            + (f"; those of the new classes {short(', '.join(new))} start at random, with mean and variance of the old ones" if new else "")
            + "; the optimisers start anew; all weights are trained")
        if not weights.D and rank() == 0:
            warn(f"{weights.source} has no discriminator: D starts from random weights, and what it teaches at first undoes some of what G "
                 "knows; to spare G, train D alone for a while (--g-lr 0) and start from that run with --init")

    def noise(self, part):
        """z, y and mix (for `gradient_penalty`) of this process's rows, in micro-batches. Decided by the seed, the step, its part (0 for G,
        1, 2, ... for D's turns) and the number of rollbacks, so that a second try sees other noise."""
        generator = generator_for(self.s.seed, self.step, part, self.monitor.rollbacks)
        z = truncated_normal((self.s.batch, self.config.z_dim), generator=generator)
        y = torch.randint(self.config.n_classes, (self.s.batch,), generator=generator)
        mix = torch.rand(self.s.batch, generator=generator)
        own = [drawn[self.rows] for drawn in (z.to(self.dtype), y, mix.to(self.dtype))]
        if self.device.type == "cuda":                              # pinned, or the CPU would wait here until the GPU has caught up
            own = [drawn.pin_memory() for drawn in own]
        return zip(*(drawn.to(self.device, non_blocking=True).split(self.micro) for drawn in own))

    def autocast(self, half):
        return torch.autocast(self.device.type, half, enabled=half is not None)

    def communicating(self, network, last):
        """Around the forward and backward pass of a micro-batch: only the last one sends its gradients to the other processes."""
        return nullcontext() if last or processes() == 1 else network.no_sync()

    def train_step(self, real_batches):
        """d_steps updates of D, then one of G. Returns what the log wants, as tensors."""
        logged = dict.fromkeys(("D_real", "D_fake", "D_loss", "D_penalty", "D_grad", "D_skipped",
                                "G_loss", "ortho", "G_grad", "G_skipped"), 0)
        for part in range(1, self.s.d_steps + 1):
            self.step_D(*next(real_batches), part, logged)
        self.step_G(logged)
        return logged

    def step_D(self, real, real_y, part, logged):
        s, share = self.s, self.micro / len(self.rows)              # share: of one micro-batch in the whole gradient
        self.D.requires_grad_(True)                                 # see step_G
        self.opt_D.zero_grad()
        micro_batches = list(zip(real.to(self.dtype).split(self.micro), real_y.split(self.micro), self.noise(part)))
        for k, (x, y, (z, fake_y, mix)) in enumerate(micro_batches, start=1):
            if s.loss == "wgan-gp":
                fake_y = y                                          # the penalty's lines join images of one class
            with self.communicating(self.parallel_D, last=k == len(micro_batches)):
                with self.autocast(self.half):
                    with torch.no_grad():                           # nothing of D's turn reaches G
                        fake = self.fast_G(z, fake_y)
                    # Real and fake in one call: D has no batch norm, so they do not meet, and one large batch is faster.
                    both = torch.cat([x, fake]), torch.cat([y, fake_y])
                    real_logits, fake_logits = self.parallel_D(*both).chunk(2)
                penalty = real_logits.new_zeros(())
                with self.autocast(None if s.precision == "fp16" else self.half):       # slopes are too small for float16
                    if s.r1:
                        penalty += s.r1 * r1_penalty(self.D, x, y)
                    if s.loss == "wgan-gp":
                        penalty += 10 * gradient_penalty(self.D, x, fake.to(x.dtype), y, mix)    # the weight of its authors
                loss = self.loss_d(real_logits, fake_logits)
                self.scaler_D.scale((loss + penalty) * share).backward()
            for name, value in (("D_real", real_logits.mean()), ("D_fake", fake_logits.mean()), ("D_loss", loss),
                                ("D_penalty", penalty)):
                logged[name] += value.detach() * share / s.d_steps
        self.update("D", logged, share=1 / s.d_steps)

    def step_G(self, logged):
        s, share = self.s, self.micro / len(self.rows)
        bound = {"fixed": s.sigma_fixed, "ratio": s.sigma_ratio}
        self.D.requires_grad_(False)                                # G's gradient passes through D but none is kept there
        self.opt_G.zero_grad()
        if s.ortho:                                                 # of the weights alone: once, not for every micro-batch
            ortho = orthogonal_regularisation(self.G)
            self.scaler_G.scale(s.ortho * ortho).backward()
            logged["ortho"] = ortho.detach()
        if s.sigma_pull:
            self.scaler_G.scale(s.sigma_pull * sigma_pull(self.G, **bound)).backward()
        micro_batches = list(self.noise(0))
        for k, (z, y, _) in enumerate(micro_batches, start=1):
            with self.communicating(self.parallel_G, last=k == len(micro_batches)):
                with self.autocast(self.half):
                    fake_logits = self.fast_D(self.parallel_G(z, y), y)
                loss = self.loss_g(fake_logits)
                self.scaler_G.scale(loss * share).backward()
            logged["G_loss"] += loss.detach() * share
        self.update("G", logged, share=1)
        if (s.sigma_fixed or s.sigma_ratio) and not s.sigma_pull:
            clamp_sigma(self.G, **bound)
        self.step += 1
        self.ema.update(self.G, self.step)

    def update(self, network, logged, share):
        """One step of a network's optimiser, unless its gradient is not finite. Logs the gradient's length, as that of one vector."""
        optimiser, scaler = getattr(self, f"opt_{network}"), getattr(self, f"scaler_{network}")
        scaler.unscale_(optimiser)
        lengths = torch.stack(torch._foreach_norm([p.grad for p in getattr(self, network).parameters() if p.grad is not None]))
        length = lengths.norm()
        # Counted where the numbers are: reading them would make the CPU wait for the GPU at every update.
        counts = self.not_finite.setdefault(network, torch.zeros_like(lengths))
        counts += ~lengths.isfinite()
        logged[f"{network}_skipped"] += (~length.isfinite()).float() * share
        logged[f"{network}_grad"] += torch.where(length.isfinite(), length, 0) * share
        scaler.step(optimiser)
        scaler.update()

    def micro_batch_that_fits(self):
        """After memory ran out: the largest --micro-batch with which a step works, at most half, quarter, ... of the present one.

        Tried out, which spoils the weights. The other processes are no longer in step, so nothing here may wait for them: neither
        batch norm, hence eval mode, nor the hooks that DDP has attached to the weights, hence copies of them."""
        self.opt_G.zero_grad(), self.opt_D.zero_grad()
        if processes() > 1:
            self.G, self.D = copy.deepcopy(self.G).eval(), copy.deepcopy(self.D)
            self.opt_G, self.opt_D = (torch.optim.Adam(network.parameters(), fused=True) for network in (self.G, self.D))
        self.fast_G, self.fast_D = self.parallel_G, self.parallel_D = self.G, self.D
        share, limit = len(self.rows), self.micro
        while limit := max((n for n in range(1, limit // 2 + 1) if share % n == 0), default=0):
            self.opt_G.zero_grad(), self.opt_D.zero_grad()
            self.scaler_G, self.scaler_D = (torch.amp.GradScaler(self.device.type, init_scale=1.0) for _ in "GD")
            rows, micro, self.rows, self.micro = self.rows, self.micro, self.rows[:limit], limit
            try:
                x = torch.zeros(limit, 3, self.config.resolution, self.config.resolution, device=self.device)
                self.train_step(iter([(x, torch.zeros(limit, dtype=torch.int64, device=self.device))] * self.s.d_steps))
                return limit * processes()
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
            finally:
                self.rows, self.micro = rows, micro

    @torch.no_grad()
    def first_not_finite(self):
        """What to look at after a divergence, in words. Every process must ask."""
        found = [f"the weight {network}.{name}" for network in "GD" for name, p in getattr(self, network).named_parameters()
                 if not p.isfinite().all()]
        hooks = [module.register_forward_hook(lambda module, inputs, output, name=f"{network}.{name}":
                                              None if output.isfinite().all() else found.append(f"the output of {name}"))
                 for network in "GD" for name, module in getattr(self, network).named_modules() if name]
        z, y, _ = next(iter(self.noise(0)))
        with self.autocast(self.half):
            self.D(self.G(z, y), y)
        for hook in hooks:
            hook.remove()
        for network, counts in self.not_finite.items():
            names = [name for name, p in getattr(self, network).named_parameters() if p.grad is not None]
            # Backward, the trouble spreads from the last layer that has it to the first.
            found += [f"the gradient of {network}.{name}" for name, count in zip(names[::-1], counts.tolist()[::-1]) if count]
        return found[0] if found else None

    def spectra(self):
        """The first three singular values of every layer's weight, before spectral norm: {"G.linear": [sigma_0, sigma_1, sigma_2], ...}."""
        return {f"{network}.{name}": [float(f"{sigma:.5g}") for sigma in singular_values(layer.weight)]
                for network in ("G", "D") for name, layer in matrix_layers(getattr(self, network)).items()}

    @torch.no_grad()
    def signs(self, real, labels):
        """For `Monitor`: how much G's images of one class differ, relative to real ones (N, R, R, 3) uint8, sigma_0 of G's first layers,
        and D's loss if it said of all images that they might be either."""
        z = truncated_normal((len(labels), self.config.z_dim), generator=generator_for(self.s.seed)).to(self.device, self.dtype)
        self.G.eval()
        with self.autocast(self.half):
            fake = torch.cat([self.G(z, y) for z, y in zip(z.split(16), labels.to(self.device).split(16))])
        self.G.train()
        # Classes of which there is one image only say nothing: then all images count as one class.
        classes = labels if labels.bincount().max() > 1 else torch.zeros_like(labels)
        border = None if self.border is None else torch.full((1,), self.border)
        return {"diversity": spread_within(fake.cpu(), classes) / max(1e-6, spread_within(to_network(real, "cpu"), classes)),
                "sigma_0": {name: singular_values(layer.weight, 1).item() for name, layer in matrix_layers(self.G).items()
                            if name in ("linear", "blocks.0.conv1")},
                "D_guessing": None if border is None else self.loss_d(border, border).item()}

    @torch.no_grad()
    def share_called_real(self, images, labels):
        """Of real images (N, R, R, 3) uint8, the share that D takes for real."""
        self.D.eval()
        with self.autocast(self.half):
            logits = [self.D(to_network(x, self.device).to(self.dtype), y.to(self.device))
                      for x, y in zip(images.split(64), labels.split(64))]
        self.D.train()
        return (torch.cat(logits) > self.border).float().mean().item()

    def parts(self):
        return {"G": self.G, "D": self.D, "G_ema": self.ema.model, "opt_G": self.opt_G, "opt_D": self.opt_D,
                "scaler_G": self.scaler_G, "scaler_D": self.scaler_D, "monitor": self.monitor}

    def load_state(self, state):
        for name, part in self.parts().items():
            part.load_state_dict(state[name])
        self.step = state["step"]


def match_classes(network, state, names, generator):
    """Someone else's state of this network -> one for other classes. names: which of its classes each of ours was, or None for new ones."""
    state, known = dict(state), [k for k in names if k is not None]
    for name, table in network.named_modules():
        if isinstance(table, torch.nn.Embedding):
            old = state[f"{name}.weight"].float()
            rows = old.mean(0) + old.std(0, correction=0) * torch.randn(len(names), old.shape[1], generator=generator)
            rows[[k is not None for k in names]] = old[known]
            state[f"{name}.weight"] = rows
            if name == "embed":                                     # D's table has a spectral norm, whose u has a component per class
                state["embed.u"] = power_iteration(rows, table.u.cpu().float(), steps=50)[1]
    return state


def out_of_memory(error):
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)


def has_bf16(device):
    """Whether bfloat16 is computed in hardware; emulated, it would be slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability()[0] >= 8
    return getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()


# ---------------------------------------------------------------- a run and its folder

def open_run(s, described):
    """Make the run folder, or check that it holds a run with the same settings. Returns the path of the checkpoint to continue from."""
    out = Path(s.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; choose another --out")
    if checkpoints_of(out):
        try:
            before = dict(json.loads((out / "config.json").read_text()))
        except (ValueError, TypeError, FileNotFoundError):
            raise UserError(f"{out} has checkpoints but no readable config.json; restore it or choose another --out") from None
        # A setting that did not exist yet when the run began had its default.
        before = {**{f.name: f.default for kind in (ModelConfig, Settings) for f in dataclasses.fields(kind)}, **before}
        differences = [f"{name} was {short(before.get(name))} and is now {short(value)}" for name, value in described.items()
                       if name not in FREE_TO_CHANGE and before.get(name) != value]
        if differences:
            raise UserError(f"{out} holds a run with other settings: {'; '.join(differences)}; "
                            "repeat the old ones to continue that run, or choose another --out")
    elif not (out / "config.json").exists() and any(p.is_file() for p in out.rglob("*") if p.name != "lock"):
        raise UserError(f"{out} is not empty and holds no run; choose another --out")
    for folder in "checkpoints", "samples":
        (out / folder).mkdir(parents=True, exist_ok=True)
    lock_run(out)
    for leftover in out.glob("*/step-*.tmp"):                       # of a process that was killed while saving
        leftover.unlink()
    checkpoint, path = newest_checkpoint(out)
    for damaged in checkpoints_of(out):
        if checkpoint and damaged > path:                           # passed over: out of the way of what will be saved
            damaged.rename(damaged.with_suffix(".damaged"))
    return path


def lock_run(out):
    """Keep a second process from working in the same folder. The lock goes when the process does, however it ends."""
    global lock                                                     # closing the file would give up the lock
    lock = open(out / "lock", "w")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(f"another process is at work in {out}; stop it or choose another --out") from None


def short(value):
    text = str(value)
    return text if len(text) < 60 else text[:57] + "..."


@contextmanager
def surviving(path):
    """A full disk or a folder that has become unwritable costs a warning, not the run."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except (OSError, RuntimeError) as error:                        # torch reports a failed write as a RuntimeError of its own
        reason = getattr(error, "strerror", None) or "is the disk full?"
        warn(f"{path} could not be written ({reason}); the run goes on without it")


class Log:
    """log.jsonl: one JSON object per line. Continuing a run drops the lines of steps that are about to be repeated."""

    def __init__(self, path, step):
        self.path, self.newest, kept = path, [], []
        for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
            try:
                if line.endswith(b"\n") and (entry := json.loads(line))["step"] <= step:
                    kept.append(line)
                    self.newest += [entry] if "sigma_0" in entry else []
            except (ValueError, KeyError, TypeError):               # cut off by a kill or a full disk
                pass
        save_atomically(path, lambda f: f.writelines(kept))

    def write(self, entry):
        with surviving(self.path), open(self.path, "a") as f:
            f.write(json.dumps(entry) + "\n")


def save_checkpoint(trainer, classes, s):
    """Write the state and, once that has succeeded, delete what --keep and --keep-every do not keep. Returns whether it has succeeded.

    The first process does it."""
    stop_if_not_finite(trainer, {}, s)
    if rank() > 0:
        return True
    path = checkpoint_path(s, trainer.step)
    content = {"model": dataclasses.asdict(trainer.config), "classes": classes, "step": trainer.step,
               **{name: part.state_dict() for name, part in trainer.parts().items()}}
    with surviving(path):
        save_atomically(path, lambda f: torch.save(content, f))
        for old in checkpoints_of(s.out)[:-s.keep]:
            if old != checkpoint_path(s, trainer.monitor.best) and int(old.stem[5:]) % s.keep_every:
                for file in old, *old.parent.glob(old.name + ".*.stats"):
                    file.unlink()
        return True
    return False


def checkpoint_path(s, step):
    return Path(s.out, "checkpoints", f"step-{step:08d}.pt")


def roll_back(trainer, classes, s):
    """After a collapse: the weights with the best score, half the learning rates, other noise. Later checkpoints are put aside."""
    collapsed, rollbacks = trainer.step, trainer.monitor.rollbacks + 1
    trainer.load_state(together(read_checkpoint, checkpoint_path(s, trainer.monitor.best)))
    trainer.monitor.rollbacks = rollbacks
    for optimiser, lr in (trainer.opt_G, s.g_lr), (trainer.opt_D, s.d_lr):
        for group in optimiser.param_groups:
            group["lr"] = lr / 2**rollbacks
    save_checkpoint(trainer, classes, s)                            # before: else, killed now, the run would continue from the collapse
    if rank() == 0:
        for path in checkpoints_of(s.out):
            if path > checkpoint_path(s, trainer.step):
                path.rename(path.with_suffix(".collapsed"))
    say(f"rolled back from step {collapsed} to {trainer.step}; learning rates {s.g_lr / 2**rollbacks:.3g} and {s.d_lr / 2**rollbacks:.3g}")


def draw_together(G, labels, seeds):
    """`draw_seeds`, every process its share. Returns all images in every process."""
    own_labels, own_seeds = (np.array_split(numbers, processes())[rank()] for numbers in (labels, seeds))
    images = draw_seeds(G, own_labels, own_seeds.tolist())
    if processes() > 1:
        shares = [None] * processes()
        dist.all_gather_object(shares, images)
        images = np.concatenate(shares)
    return images


def save_samples(trainer, G, s, rows=16, columns=10):
    """A grid of fixed noise, a row for each of the first classes. Returns its path."""
    rows = min(rows, trainer.config.n_classes)
    images = draw_together(G, [label for label in range(rows) for _ in range(columns)], list(range(columns)) * rows)
    path = Path(s.out, "samples", f"step-{trainer.step:08d}.png")
    if rank() == 0:
        with surviving(path):
            save_atomically(path, lambda f: image_grid(images, columns).save(f, "PNG"))
    return path


# ---------------------------------------------------------------- the loop

def main(arguments):
    s = parse_settings(arguments)
    device = join_processes()
    if (s.micro_batch or s.batch) % processes():
        raise UserError(f"{processes()} processes cannot share {'--micro-batch' if s.micro_batch else '--batch'} "
                        f"{s.micro_batch or s.batch} equally; choose a multiple of {processes()}")
    keep_freed_memory()
    if s.precision == "auto":
        s.precision = "bf16" if has_bf16(device) else "fp32"
    config, initial = together(first_weights, s) if s.init else (model_config(s, MODELS[s.model].n_classes), None)
    resolution = config.resolution
    if s.benchmark and not s.data:
        noise = np.random.default_rng(0).integers(0, 256, (s.batch, resolution, resolution, 3), np.uint8)
        data = Arrays(noise, np.arange(s.batch) % config.n_classes, [str(k) for k in range(config.n_classes)])
        return benchmark(Trainer(s, config, device), data, s)
    if Path(s.data) == Path(PRESETS["cifar10"]["data"]) and (not Path(s.data).exists() or Path(s.data, "packed.json").exists()):
        together(fetch_cifar10, first_only=True)
    data = together(open_data, s.data, resolution)
    if s.pack:
        if processes() > 1:
            raise UserError("--pack starts as many processes as there are cores by itself; run it without torchrun")
        if Path(s.pack).resolve().is_relative_to(Path(s.data).resolve()):
            raise UserError(f"--pack {s.pack} lies in the folder of --data, where it would pass for a class; choose another")
        return pack(data, s.pack, resolution, s.workers or len(os.sched_getaffinity(0)))
    names = ", ".join(data.classes[:5]) + (", ..." if len(data.classes) > 5 else "")
    counts = np.bincount(data.labels, minlength=len(data.classes))
    say(f"{s.data}: {len(data):,} images in {len(data.classes)} classes: {names}\n{counts.min():,} to {counts.max():,} images per class; "
        "each is seen once per epoch, so classes come as often as they have images, and generated ones equally often")
    held_out = together(open_data, s.held_out, resolution, True) if s.held_out else None
    if held_out and held_out.classes != data.classes:
        odd = sorted(set(held_out.classes) ^ set(data.classes))[0]
        raise UserError(f"the held-out images in {s.held_out} have other classes than {s.data}: only one of the two has {odd}; "
                        "--held-out needs the same sub-folders")
    config = dataclasses.replace(config, n_classes=len(data.classes))
    if s.benchmark:
        return benchmark(Trainer(s, config, device), data, s)
    if s.fid:
        together(find_inception, None, "leave out --fid to train without it")
    described = {**dataclasses.asdict(s), **dataclasses.asdict(config), "images": len(data), "classes": data.classes}
    described = json.loads(json.dumps(described))                   # as it is read back: with lists for tuples
    path = together(open_run, s, described, first_only=True)
    try:
        trainer = Trainer(s, config, device)
    except (MemoryError, RuntimeError) as error:
        if out_of_memory(error):
            fail(f"the networks of {s.init or f'--model {s.model} --ch {s.ch}'} do not fit into memory; choose "
                 f"{'a smaller --init' if s.init else 'a smaller --ch or --model'}", 2)
        raise
    if path:
        checkpoint = together(read_checkpoint, path)
        if missing := trainer.parts().keys() - checkpoint.keys():
            raise UserError(f"the newest checkpoint in {s.out} cannot be continued: it lacks {', '.join(sorted(missing))}; "
                            "choose another --out")
        trainer.load_state(checkpoint)
        del checkpoint                                              # which would stay in memory for weeks
        say(f"continuing {s.out} from step {trainer.step}")
    elif initial:
        trainer.start_from(initial, data.classes)
    initial = None                                                  # frees the memory of the weights it started from
    if trainer.step >= s.steps:
        say(f"{s.out} has {trainer.step} steps already; a larger --steps trains on, another --out starts anew")
    else:
        if rank() == 0:
            save_atomically(Path(s.out, "config.json"), lambda f: f.write(json.dumps(described, indent=1).encode()))
        memory_ran_out = False
        try:
            train(trainer, data, held_out, s)
        except UserError as error:                                  # in this process alone; a worker's comes with its whole traceback
            fail(last_line(error), 2)
        except (MemoryError, RuntimeError) as error:
            if out_of_memory(error):
                memory_ran_out = True
            elif "DataLoader worker" in str(error):
                fail("a process that decodes images has been killed, perhaps for want of memory; the same command continues, "
                     "if need be with fewer --workers")
            elif processes() > 1 and re.search("onnection|NCCL|[Tt]imed out", str(error)):
                fail("a process has lost another one, whose own message says why; the same command continues, "
                     "and torchrun --max-restarts N repeats it by itself")
            else:
                raise
        if memory_ran_out:                                          # said here, where the exception no longer holds any tensor
            step, saved, fitting = trainer.step, checkpoints_of(s.out), trainer.micro_batch_that_fits()
            fail(f"memory ran out after {step} steps, with {trainer.micro * processes()} images at a time; " + (
                 "the same command continues; if it happens again, start anew with a smaller --micro-batch" if saved else
                 f"--micro-batch {fitting} fits; batch norm then sees {fitting} images" if fitting else
                 "not even one image at a time fits; choose " + ("other weights for --init" if s.init else "a smaller --ch or --model")), 2)
    if processes() > 1:
        dist.destroy_process_group()


SCORED = 256                                                        # images: a score in a second


def references(data, seed):
    """Real images to compare the spread of G's with: of up to 8 classes 8 images each, or one each of 64, and their labels."""
    rng, counts = np.random.default_rng(seed), np.bincount(data.labels)
    enough = min(2, counts.max())                                   # one image of a class says nothing, unless there is no more of any
    classes = rng.permutation(np.flatnonzero(counts >= enough))[:8 if enough == 2 else 64]
    chosen = [i for y in classes for i in rng.permutation(np.flatnonzero(data.labels == y))[:8]]
    images, labels = zip(*[data[int(i)] for i in chosen])
    return torch.from_numpy(np.stack(images)), torch.tensor(labels)


def fid_of(trainer, s):
    """A function from G to what the log says of its FID, for all processes to call, of which the first one knows the result."""
    at_hand = together(INCEPTION.exists, first_only=True)           # the first one's answer: all must do the same
    wanted = s.fid if s.fid is not None else 10_000 if trainer.device.type == "cuda" and at_hand else 0
    if not wanted:
        return lambda G: {}
    inception = Inception(together(find_inception)).to(trainer.device)
    real = see_real(Given(s.data, trainer.config.resolution, wanted if s.data == "shapes" else None, most=50_000), inception)
    moments = (real.mu, real.cov) if rank() == 0 else None

    def measure(G):
        fake = see(Drawn(G, wanted), inception, moments_only=True)
        return {"fid": frechet_distance(*moments, fake.mu, fake.cov), "fid_n": wanted} if rank() == 0 else {}
    return measure


def look_closer(trainer, data, held_out, fake, s):
    """What is measured now and then: the score, every layer's singular values, and whether D knows its training images by heart."""
    real = some_images(data, SCORED, s.seed)[0].numpy()
    entry = {"score": 1000 * float(np.mean(list(pyramid_distances(real, fake[:len(real)], per_image=32, projections=128).values()))),
             "sigma": trainer.spectra()}
    highest = {network: max((sigmas[0], name) for name, sigmas in entry["sigma"].items() if name.startswith(network)) for network in "GD"}
    text = f"score {entry['score']:.1f}; largest sigma_0: " + ", ".join(f"{sigma:.3g} in {name}" for sigma, name in highest.values())
    if held_out:
        for name, images in ("training", data), ("held_out", held_out):
            entry[f"D_calls_{name}_real"] = trainer.share_called_real(*some_images(images, 512, s.seed))
        text += (f"; D calls {entry['D_calls_training_real']:.0%} of training "
                 f"and {entry['D_calls_held_out_real']:.0%} of held-out images real")
    return entry, text


def train(trainer, data, held_out, s):
    """The loop: steps, a line of progress, log, samples, checkpoints; until the steps are done, a signal asks to stop, or G collapses."""
    measure_fid, stop = fid_of(trainer, s), []

    def ask_to_stop(number, frame):
        stop.append(number)
        if rank() == 0:
            os.write(2, b"\nstopping after this step\n")           # print could be interrupted within a print

    for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:      # nohup means: go on
            signal.signal(number, ask_to_stop)
    log = Log(Path(s.out, "log.jsonl"), trainer.step) if rank() == 0 else None
    if log:
        trainer.monitor.log = log.newest
        real, labels = references(data, s.seed)
    real_batches = batches(data, s, trainer.step, trainer.device)
    sums, since, started = 0, trainer.step, time.perf_counter()
    saved = trainer.step                                            # the newest step that is on the disk
    end_of_line = "\033[K\r" if sys.stdout.isatty() else "\n"
    while trainer.step < s.steps and not any_process(bool(stop)):
        logged = trainer.train_step(real_batches)
        sums = sums + torch.stack([torch.as_tensor(value, dtype=torch.float32, device=trainer.device) for value in logged.values()])
        step = trainer.step
        due = lambda every: step % every == 0 or step == s.steps
        best = reason = None
        if due(s.eval_every) or due(s.sample_every):
            stop_if_not_finite(trainer, {}, s)
            # The averaged G with batch norm statistics of its own, which all processes gather together.
            G = standing_statistics(fold_spectral_norm(copy.deepcopy(trainer.ema.model).float()), STANDING_BATCHES)
        if due(s.log_every) or due(s.eval_every):
            if processes() > 1:
                dist.all_reduce(sums)
            means = dict(zip(logged, (sums / processes() / (step - since)).tolist()))
            stop_if_not_finite(trainer, means, s)
            seconds = (time.perf_counter() - started) / (step - since)
            entry = {"step": step, **means, "seconds_per_step": seconds, "images_per_second": s.batch / seconds}
            fake = draw_together(G, [k % trainer.config.n_classes for k in range(SCORED)], range(SCORED)) if due(s.eval_every) else None
            fid = measure_fid(G) if due(s.eval_every) else {}
            if log:
                entry |= trainer.signs(real, labels)
                say(f"step {step}/{s.steps}  {s.batch / seconds:.0f} img/s  {hours((s.steps - step) * seconds)} left  "
                    f"D real {means['D_real']:+.2f}  D fake {means['D_fake']:+.2f}  G {means['G_loss']:+.2f}  "
                    f"diversity {entry['diversity']:.2f}", end=end_of_line)
                if due(s.eval_every):
                    measured, text = look_closer(trainer, data, held_out, fake, s)
                    entry |= measured | fid
                    text = f"FID {fid['fid']:.2f}; {text}" if fid else text
                    say(f"step {step}: {text}\033[K" if sys.stdout.isatty() else text)
            before = trainer.monitor.state_dict()
            reason, best, state = together(lambda: (*trainer.monitor.judge(entry), trainer.monitor.state_dict()), first_only=True)
            trainer.monitor.load_state_dict(state)                  # the first process's, in all of them
            reason = reason if s.g_lr else None                     # with G standing still, D alone is trained: it ought to win
            if log:
                log.write({**entry, "collapse": reason} if reason else entry)
            sums, since, started = 0, step, time.perf_counter()
        if (best or due(s.save_every)) and not reason:
            if save_checkpoint(trainer, data.classes, s):
                saved = step
            elif best:
                trainer.monitor.load_state_dict(before)             # the best one on the disk is still the one before
        if due(s.sample_every):
            grid = save_samples(trainer, G, s)
        if reason and collapsed(trainer, reason, s):
            roll_back(trainer, data.classes, s)
            if log:
                log = Log(log.path, trainer.step)                   # without the lines of the steps that are now undone
                log.write({"step": trainer.step, "rolled_back_from": step, "because": reason})
            real_batches, since, saved = batches(data, s, trainer.step, trainer.device), trainer.step, trainer.step
    say()
    if trainer.step > saved and not save_checkpoint(trainer, data.classes, s):
        raise SystemExit(f"error: step {trainer.step} is not saved, see above; make room, then the same command continues")
    if trainer.step < s.steps:
        say(f"stopped at step {trainer.step}; the same command continues")
    else:
        say(f"done: {trainer.step} steps\nsamples: {grid}\nmore:    python sample.py --weights {shlex.quote(s.out)}")


def collapsed(trainer, reason, s):
    """Say that the run has collapsed, and why. Returns whether to roll back; or stops; or lets the run go on, as --on-collapse wants."""
    monitor = trainer.monitor
    sentence = f"collapse at step {trainer.step}: {reason}"
    best = together(lambda: monitor.best if checkpoint_path(s, monitor.best).exists() else 0, first_only=True)
    back = s.on_collapse == "rollback" and best and monitor.rollbacks < monitor.max_rollbacks
    if back or s.on_collapse == "warn":
        if rank() == 0:
            warn(sentence if back else f"{sentence}; --on-collapse warn says to go on")
        return back
    if monitor.rollbacks:
        what_now = f"it has been rolled back {monitor.rollbacks} times already; start anew with smaller learning rates or --r1"
    elif best:
        what_now = (f"the best weights are those of step {best} (python sample.py --weights {shlex.quote(str(checkpoint_path(s, best)))}); "
                    "to train on from there with half the learning rates, add --on-collapse rollback")
    else:
        what_now = "no checkpoint is better; start anew with smaller learning rates or --r1"
    give_up(f"{sentence}; {what_now}")


def stop_if_not_finite(trainer, means, s):
    """A network that has produced a NaN never recovers, and a checkpoint of it is worth nothing: stop before one is written.

    Under float16 single updates are left out as a matter of course; there it is time to stop when no loss scale is small enough."""
    # The scale begins at 1 but for float16, and an update that was left out halves it: then a single one says it.
    lowest_scale = min(trainer.scaler_G.get_scale(), trainer.scaler_D.get_scale())
    if (all(map(math.isfinite, means.values())) and lowest_scale >= (2**-14 if s.precision == "fp16" else 1)
            and torch.stack([p.isfinite().all() for network in (trainer.G, trainer.D) for p in network.parameters()]).all()):
        return
    what = trainer.first_not_finite() or next(name for name, value in means.items() if not math.isfinite(value))
    earlier = f"the checkpoints in {s.out} are from before" if checkpoints_of(s.out) else "there is no checkpoint from before"
    give_up(f"training has diverged at step {trainer.step}: {what} is no longer finite; nothing of it was saved, "
            f"{earlier}; start a new run with smaller learning rates or penalties")


# ---------------------------------------------------------------- how fast is it?

def benchmark(trainer, data, s):
    """Time s.benchmark training steps; count their operations; compare with what the hardware reaches in one product or convolution."""
    device, batches_of = trainer.device, batches(data, s, 0, trainer.device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(3):                                              # the first ones choose algorithms, compile and allocate
        trainer.train_step(batches_of)
    logged, seconds = dict.fromkeys(trainer.train_step(batches_of), 0), {"D": 0.0, "G": 0.0}
    update = {"D": lambda: trainer.step_D(*next(batches_of), 1, logged), "G": lambda: trainer.step_G(logged)}
    for network in (["D"] * s.d_steps + ["G"]) * s.benchmark:
        seconds[network] += seconds_of(update[network], device)
    step = sum(seconds.values()) / s.benchmark
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        trainer.train_step(batches_of)
    flops = counter.get_total_flops()                               # 2 for a multiplication and an addition, of this process
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if device.type == "cuda" else activity.CPU]) as profile:
        seconds_of(lambda: trainer.train_step(batches_of), device)
    own_time = lambda entry: entry.self_device_time_total if device.type == "cuda" else entry.self_cpu_time_total
    entries = sorted(profile.key_averages(), key=own_time, reverse=True)
    total = sum(map(own_time, entries))
    convolutions = sum(own_time(entry) for entry in entries if re.search("conv|dgrad|wgrad|fprop", entry.key))
    product, convolution = peaks(device, trainer.half or trainer.dtype)
    peak, tera = max(product, convolution), 1e12
    say(f"{s.batch / step * s.d_steps:.1f} real images per second; {1000 * step:.0f} ms per step: {s.d_steps} times "
        f"{1000 * seconds['D'] / s.benchmark / s.d_steps:.0f} ms for D, {1000 * seconds['G'] / s.benchmark:.0f} ms for G")
    say(f"{flops / 1e9:,.1f} GFLOP per step in each process: {flops / step / tera:.2f} TFLOP/s, {flops / step / peak:.0%} of the "
        f"{peak / tera:.2f} measured here (a matrix product {product / tera:.2f}, a 3x3 convolution {convolution / tera:.2f})")
    say(f"at most {memory / 1e9:.2f} GB\n{1 - convolutions / total:.0%} of the time is outside convolutions; the five largest entries:")
    for entry in entries[:5]:
        say(f"  {own_time(entry) / total:4.0%}  {entry.count:5} x  {entry.key[:100]}")


def peaks(device, dtype):
    """FLOP/s of a large matrix product and of a 3x3 convolution of 256 channels, in this precision."""
    n = 8192 if device.type == "cuda" else 2048
    a, w = torch.randn(n, n, device=device, dtype=dtype), torch.randn(256, 256, 3, 3, device=device, dtype=dtype)
    x = torch.randn(n // 64, 256, 32, 32, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    return [flops / min(seconds_of(work, device) for _ in range(10)) for work, flops in
            ((lambda: a @ a, 2 * n**3), (lambda: F.conv2d(x, w, padding=1), 2 * x.numel() * 256 * 9))]


def seconds_of(work, device):
    """How long some work takes, until the device has done it."""
    finish = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    finish()
    started = time.perf_counter()
    work()
    finish()
    return time.perf_counter() - started


if __name__ == "__main__":
    import train as this_file                                       # as sample.py and metrics.py know it, with the same `store`
    run(this_file.main)
