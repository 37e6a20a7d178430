"""Train BigGAN on a folder of images, or on shapes that are drawn on the fly.

    python train.py --preset shapes                     ten drawn shapes, no data, minutes on two CPU cores
    python train.py --preset cifar10                    CIFAR-10, fetched and checked
    python train.py --preset cifar10 --data my_images   a folder with one sub-folder of images per class
    torchrun --nproc_per_node=8 train.py --data imagenet/train      the paper's run at 128x128, on eight GPUs
    python train.py --data imagenet/train --pack imagenet128        decode once, for --data imagenet128
    python train.py --init runs/cifar10 --data my_images --out runs/mine --batch 64     from other weights

Under torchrun the processes share each batch, and batch norm sees all of it: a run means the same on any
number of them. The same command again continues a run, also after a kill. A run is a folder:

    config.json        every setting and the class names
    log.jsonl          one JSON object per logged step
    samples/*.png      the same noise at growing steps, a row for each of 16 classes, with EMA weights
    checkpoints/*.pt   tensors and plain values only; sample.py and metrics.py need nothing else

Reading order: settings; data; the training step (in a hurry: `step_D`, `step_G`, `update`); signs of
collapse; a run and its folder; the loop; how fast it is.
"""

import copy
import dataclasses
import fcntl
import itertools
import json
import math
import os
import signal
import sys
import tarfile
import time
import warnings
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageFilter, ImageOps
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from biggan import (AUGMENTATIONS, EMA, LOSSES, MODELS, Discriminator, Generator, ModelConfig, augment,
                    clamp_sigma, fold_spectral_norm, gradient_penalty, matrix_layers,
                    orthogonal_regularisation, processes, r1_penalty, rank, sigma_pull, singular_values,
                    standing_statistics, truncated_normal)
from sample import (LOCAL_RANK, WORLD, UserError, checkpoints_of, draw_seeds, fetch, image_grid,
                    keep_freed_memory, newest_checkpoint, pick_device, progress, read_options, read_weights,
                    run, save_atomically, say, start_processes, stop_processes, wait_for, warn)


# ---------------------------------------------------------------- settings

TABLE1 = "--model sagan128 --ortho 0 "

PRESETS = {  # options that differ from the defaults below
    "shapes": "--data shapes --held-out shapes --model shapes32 --steps 3000 --batch 64 --d-steps 1 "
              "--g-lr 2e-4 --d-lr 4e-4 --beta2 0.99 --ema 0.998 --ema-start 200 --flip 0 "
              "--sample-every 250 --save-every 250 --eval-every 250",
    "cifar10": "--data data/cifar10 --held-out data/cifar10-test --model biggan32 --steps 100_000 --batch 64 "
               "--d-steps 4 --g-lr 2e-4 --ema-start 1000",
    "imagenet64": "--model biggan64",
    "imagenet128": "",
    "imagenet256": "--model biggan256",
    "imagenet512": "--model biggan512",
    "imagenet128-deep": "--model biggan-deep-128",
    "imagenet256-deep": "--model biggan-deep-256 --g-lr 2.5e-5 --d-lr 2.5e-5",
    "imagenet512-deep": "--model biggan-deep-512 --g-lr 2.5e-5 --d-lr 2.5e-5",

    # SN-GAN (Miyato & Koyama 2018), then table 1 and what is new in each row: SAGAN (Zhang et al. 2019)
    "sngan128": "--model sngan128 --steps 450_000 --batch 64 --d-steps 5 --g-lr 2e-4 --beta2 0.9 --ortho 0",
    "table1-row1": TABLE1 + "--steps 1_000_000 --batch 256 --d-steps 1 --g-lr 1e-4 --d-lr 4e-4 "
                   "--beta2 0.9",
    # half the learning rates, two D steps, Adam's beta2, twice the batch; larger batches
    "table1-row2": TABLE1 + "--steps 1_000_000 --batch 512",
    "table1-row3": TABLE1 + "--steps 1_000_000 --batch 1024",
    "table1-row4": TABLE1 + "--steps 732_000",
    # wider; a shared class embedding; z in chunks (biggan128); orthogonal regularisation; narrower
    "table1-row5": TABLE1 + "--steps 295_000 --ch 96",
    "table1-row6": TABLE1 + "--steps 185_000 --ch 96 --shared-dim 128",
    "table1-row7": "--steps 152_000 --ortho 0",
    "table1-row8": "--steps 165_000",
    "table1-row9": "--steps 371_000 --ch 64",
}

@dataclass
class Settings:
    """Every setting, its default (the paper's ImageNet run at 128x128) and what --help says of it."""
    preset: str = "imagenet128"     # named options, listed above; those typed beside it win
    data: str = None                # folder with a sub-folder of images per class, or packed; or shapes
    pack: str = None                # do not train: decode all images of --data once, into this folder
    benchmark: int = None           # do not train: time this many steps on noise
    out: str = None                 # run folder, runs/PRESET unless given
    init: str = None                # weights to start from, any of sample.py's; they decide the architecture
    model: str = "biggan128"        # architecture
    ch: int = None                  # width that all channel counts are multiples of; the model's unless given
    shared_dim: int = None          # length of G's class embedding; 0: each layer has its own
    steps: int = 150_000            # optimiser steps of G
    batch: int = 2048               # real images per D step, and generated images per step of either network
    micro_batch: int = None         # images at a time, over all processes; also what batch norm sees
    d_steps: int = 2                # D steps per G step
    g_lr: float = 5e-5              # Adam's learning rate for G
    d_lr: float = 2e-4              # Adam's learning rate for D
    beta1: float = 0.0              # Adam's momentum, 0 unless given; more makes large runs unstable
    beta2: float = 0.999            # Adam's decay of squared gradients
    loss: str = "hinge"             # losses of D and G
    ortho: float = 1e-4             # beta, the weight of orthogonal regularisation on G
    r1: float = 0.0                 # gamma, weight of the R1 penalty on D; 0: none, the paper tried 10 and 1
    sigma_fixed: float = None       # after each step, lower the largest singular value of G's layers to this
    sigma_ratio: float = None       # lower it to this multiple of the second largest (section 4.1)
    sigma_pull: float = 0.0         # rather than lowering it, pull it there by a penalty of this weight
    ema: float = 0.9999             # decay of the EMA weights
    ema_start: int = 20_000         # step until which the EMA weights equal G's (as in the author's code)
    flip: float = 0.5               # probability that a real image is mirrored
    augment: str = ""               # for few images: colour,translation,cutout of all that D sees, or some
    precision: str = "auto"         # auto: bf16 where the hardware has it, else fp32; fp16 scales the loss
    compile: bool = False           # let torch.compile fuse operations; the first step then takes minutes
    fused_attention: bool = False   # torch's kernel for attention: less memory and time on a GPU
    seed: int = 0                   # of weights, noise and data order; 0 unless given
    workers: int = None             # processes that decode images; unless given 8 beside a GPU, else 0
    held_out: str = None            # folder of images that are not trained on: has D memorised --data?
    log_every: int = 50             # steps between lines of log.jsonl
    eval_every: int = 1000          # steps between evaluations: singular values and D's accuracy
    sample_every: int = 1000        # steps between sample grids
    save_every: int = 1000          # steps between checkpoints
    keep: int = 3                   # how many of the newest checkpoints remain
    keep_every: int = 25_000        # those of every so many steps remain, too
    on_collapse: str = "stop"       # what to do when G collapses


CHOICES = {"preset": PRESETS, "model": MODELS, "loss": LOSSES, "on_collapse": ["stop", "warn"],
           "precision": ["auto", "bf16", "fp16", "fp32", "fp64"]}

# These may differ when a run is continued: they change where and how long, not what is computed. (data: the
# folder may have moved; the number of its images and the classes may not change.)
FREE_TO_CHANGE = {"data", "out", "held_out", "steps", "workers", "log_every", "sample_every", "save_every",
                  "eval_every", "keep", "keep_every", "on_collapse", "compile", "fused_attention"}


def parse_settings(arguments):
    """Command line -> Settings: the defaults, then the preset, then what was typed. Raises UserError."""
    presets = "\n".join(f"  {name:<18}{options}" for name, options in PRESETS.items())
    description = f"{__doc__}\nPresets, as the options they stand for:\n{presets}"
    read = partial(read_options, Settings, description=description, choices=CHOICES)
    typed = read(arguments)
    preset = PRESETS[typed.get("preset", Settings.preset)].split()
    s = Settings(**read(preset + arguments))
    s.out, s.micro_batch = s.out or f"runs/{s.preset}", s.micro_batch or s.batch
    if "data" in typed:                             # the preset's held-out images belong to its data
        s.held_out = typed.get("held_out")
    if s.init:
        s.model = s.ch = s.shared_dim = None        # the weights' own
        s.ema_start = typed.get("ema_start", 0)     # there are no random first weights to forget
    try:
        check_settings(s)
    except AssertionError as mistake:
        raise UserError(mistake) from None
    return s


def check_settings(s):
    """Asserts, with sentences for the user, that these settings can work together."""
    missing = [s.sigma_fixed, s.sigma_ratio].count(None)
    counts = [s.steps, s.micro_batch, s.d_steps, s.keep, s.keep_every, s.log_every, s.eval_every,
              s.sample_every, s.save_every]
    assert min(counts) >= 1, "--batch, --steps, --keep and all counts of steps must be at least 1"
    assert min(s.g_lr, s.d_lr, s.ortho, s.r1, s.seed) >= 0, "rates, penalties and --seed must be at least 0"
    second = s.r1 or s.loss == "wgan-gp"            # derivatives of gradients
    assert not (s.fused_attention and second), "leave out --fused-attention: the penalty is on gradients"
    assert not (s.benchmark and s.init), "--benchmark times --model: leave out --init"
    assert s.data or s.benchmark, "--data DIR is missing, with one sub-folder of images per class"
    assert s.batch % s.micro_batch == 0, f"--micro-batch {s.micro_batch} does not divide --batch {s.batch}"
    assert s.micro_batch % WORLD == 0, f"{WORLD} processes cannot share {s.micro_batch} images equally"
    assert missing == 1 or missing == 2 and not s.sigma_pull, "give one of --sigma-fixed and --sigma-ratio"
    unknown = set(filter(None, s.augment.split(","))) - AUGMENTATIONS.keys()
    assert not unknown, f"--augment {s.augment} must be some of {','.join(AUGMENTATIONS)}"
    assert s.init or model_config(s).ch % 8 == 0, "--ch must be a multiple of 8, for attention's eighth of it"


def model_config(s, n_classes=1):
    """The architecture that the settings ask for. AssertionError if they contradict each other."""
    typed = {name: getattr(s, name) for name in ("ch", "shared_dim") if getattr(s, name) is not None}
    return dataclasses.replace(MODELS[s.model], n_classes=n_classes, **typed)


# ---------------------------------------------------------------- data

Image.MAX_IMAGE_PIXELS = None                       # the user's own files may have any size


class DataSet:
    """`resolution`, `classes` (names), `labels` (n,), and items: an image (R, R, 3) uint8 and its label."""

    def __len__(self):
        return len(self.labels)


SHAPES = "arrow circle crescent cross diamond heart ring square star triangle".split()
DRAWN = """\
....#.... ..#####.. ...####.. ...###... ....#.... .##...##. ..#####.. ......... ....#.... ....#....
...###... .#######. .####.... ...###... ...###... ####.#### .#######. .#######. ....#.... ....#....
..#####.. ######### ####..... ...###... ..#####.. ######### ###...### .#######. ...###... ...###...
.#######. ######### ###...... ######### .#######. ######### ##.....## .#######. ######### ...###...
...###... ######### ###...... ######### ######### .#######. ##.....## .#######. .#######. ..#####..
...###... ######### ###...... ######### .#######. .#######. ##.....## .#######. ..#####.. ..#####..
...###... ######### ####..... ...###... ..#####.. ..#####.. ###...### .#######. ..#####.. .#######.
...###... .#######. .####.... ...###... ...###... ...###... .#######. .#######. .###.###. .#######.
...###... ..#####.. ...####.. ...###... ....#.... ....#.... ..#####.. ......... .#.....#. #########"""


class Shapes(DataSet):
    """Ten classes of drawn shapes: bright on dark, of any hue, size and place. Image i is fixed."""

    def __init__(self, resolution, held_out=False):
        self.resolution, self.classes, self.first = resolution, SHAPES, 1_000_000 * held_out
        self.labels, self.masks = np.arange(1_000_000) % len(SHAPES), []
        drawn = np.array([[list(shape) for shape in line.split()] for line in DRAWN.splitlines()])
        for cells in np.uint8(255 * (drawn == "#")).swapaxes(0, 1):     # (9, 9), with stairs for slopes
            mask = Image.fromarray(np.pad(cells, 1)).resize((88, 88), Image.Resampling.BICUBIC)
            mask = mask.filter(ImageFilter.GaussianBlur(4))             # half a cell: stairs become slopes
            self.masks.append(mask.point(lambda value: 255 * (value > 127)))

    def __getitem__(self, i):
        R, rng = self.resolution, np.random.default_rng(self.first + i)
        side = int(R * rng.uniform(.64, .84))
        corner = ((R - side) / 2 + R * rng.uniform(-.06, .06, 2)).astype(int)
        mask = self.masks[i % 10].rotate(rng.uniform(-12, 12), Image.Resampling.BILINEAR)
        # A saturated colour of any hue (one channel full, one empty to half, one in between) on any dark one.
        bright, dark = rng.permutation(rng.integers((200, 0, 0), (256, 100, 256))), rng.integers(0, 77, 3)
        image = Image.new("RGB", (R, R), tuple(dark))
        image.paste(tuple(bright), tuple(corner), mask.resize((side, side), Image.Resampling.BOX))
        return np.array(image), i % 10


class ImageFolder(DataSet):
    """A folder with one sub-folder of images per class, in sorted order, or of images of one class.

    Any file type, colour mode and size that Pillow opens. A file that cannot be decoded is named in a warning
    and replaced by the next. resolution: None for the power of two that fits the first image."""

    def __init__(self, root, resolution):
        folders = sorted(d for d in root.iterdir() if d.is_dir() and d.name[0] != ".") or [root]
        files = [images_in(d) for d in folders]
        if [] in files:
            raise UserError(f"{folders[files.index([])]} holds no images; --data has one sub-folder of "
                            "images per class, or images of one class: are they one level down, or up?")
        self.classes, self.broken = [d.name for d in folders], set()
        # An array, not a list, which workers would copy: reading an object changes its reference count.
        self.paths = np.array(list(itertools.chain(*files)), dtype=bytes)
        self.labels = np.repeat(np.arange(len(folders)), [len(paths) for paths in files])
        self.resolution = resolution or 2**int(math.log2(min(Image.open(self.paths[0]).size)))

    def __getitem__(self, i):
        for i in itertools.chain(range(i, len(self)), range(i)):
            path = os.fsdecode(self.paths[i])
            try:
                if i not in self.broken:
                    return load_image(path, self.resolution), int(self.labels[i])
            except Exception as reason:             # Pillow raises whatever its decoders do
                self.broken.add(i)
                warn(f"skipped {path}: {reason}")
        raise UserError("none of the images can be read")


def images_in(folder):
    """Paths, as bytes, of the files in a folder that Pillow opens by their ending, sorted."""
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    return sorted(bytes(p) for p in folder.iterdir() if p.suffix.lower() in endings and p.name[0] != ".")


def load_image(path, resolution):
    """Any image file -> (R, R, 3) uint8: its central square, area-averaged to R (appendix C)."""
    with Image.open(path) as image:
        # A large JPEG can be decoded at 1/2, 1/4, 1/8 of its size, much faster.
        image.draft(None, (2 * resolution, 2 * resolution))
        image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":                   # 16-bit grey, which Pillow would clip to white
            raise ValueError("its pixels have more than 8 bits per colour")
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        image = image.convert("RGB")
    how = Image.Resampling.BOX if min(image.size) >= resolution else Image.Resampling.BICUBIC
    return np.array(ImageOps.fit(image, (resolution, resolution), how))


class Arrays(DataSet):
    """Images (N, R, R, 3) uint8 in memory or on the disk, labels (N,) and the class names."""

    def __init__(self, images, labels, classes=None):
        self.images, self.labels, self.resolution = images, np.asarray(labels), images.shape[1]
        self.classes = classes or [str(k) for k in range(self.labels.max() + 1)]

    def __getitem__(self, i):
        return np.array(self.images[i]), int(self.labels[i])    # a copy, which may be written to


# A packed folder: images.npy (N, R, R, 3) uint8 and, written last, packed.json with labels and classes.

def pack(data, folder, workers=0):
    """Decode a data set once, into a packed folder. If it is interrupted, start again."""
    folder, R, labels = Path(folder), data.resolution, []
    folder.mkdir(parents=True, exist_ok=True)
    if {path.name for path in folder.iterdir()} - {"images.npy"}:      # which an interrupted one leaves
        raise UserError(f"{folder} holds other files, or is packed already; choose another")
    loader = torch.utils.data.DataLoader(data, batch_size=64, num_workers=workers)
    with open(folder / "images.npy", "wb") as f:
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(data), R, R, 3)}
        np.lib.format.write_array_header_1_0(f, header)
        os.posix_fallocate(f.fileno(), 0, f.tell() + len(data) * R * R * 3)     # a disk too small says so now
        for images, y in progress(loader, len(loader), "packing"):
            f.write(images.numpy())
            labels += y.tolist()
        f.flush()
        os.fsync(f.fileno())
    described = json.dumps({"labels": labels, "classes": data.classes})
    save_atomically(folder / "packed.json", lambda f: f.write(described.encode()))
    say("packed:", folder)


CIFAR10 = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"


def fetch_cifar10(folder):
    """The official archive of CIFAR-10, fetched once, checked, and packed into two folders."""
    with tarfile.open(fetch(CIFAR10, folder / "cifar-10-binary.tar.gz", CIFAR10_SHA256)) as tar:
        read = lambda name: tar.extractfile(f"cifar-10-batches-bin/{name}").read()
        classes = read("batches.meta.txt").decode().split()
        training = [f"data_batch_{k}.bin" for k in range(1, 6)]
        for name, files in ("cifar10-test", ["test_batch.bin"]), ("cifar10", training):
            records = np.frombuffer(b"".join(map(read, files)), np.uint8).reshape(-1, 1 + 3 * 32 * 32)
            images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)    # after the label
            if not (folder / name / "packed.json").exists():
                pack(Arrays(images, records[:, 0], classes), folder / name)


def open_data(source, resolution=None, held_out=False):
    """'shapes', a packed folder, an array FILE.npz or a folder of images, as a data set. Raises UserError.

    resolution: None for the images' own."""
    path = Path(source)
    if source == "shapes":
        return Shapes(resolution or 32, held_out)
    if source == "data/cifar10" and not (path / "packed.json").exists():
        if LOCAL_RANK == 0:
            fetch_cifar10(path.parent)
        wait_for(path / "packed.json")
    try:
        if path.suffix == ".npz":
            data = Arrays(*np.load(path).values())
        elif (path / "packed.json").exists():
            described = json.loads((path / "packed.json").read_text())
            data = Arrays(np.load(path / "images.npy", mmap_mode="r"), **described)
        else:
            data = ImageFolder(path, resolution)
    except (TypeError, ValueError) as error:
        raise UserError(f"{source} does not hold images and labels: {error}") from None
    if resolution not in (None, data.resolution):
        raise UserError(f"{source} has images of {data.resolution} pixels, not {resolution}; make it again")
    return data


def some_images(data, seed, n, classes):
    """n images at most, the first ones of some classes chosen at random: (n, R, R, 3) uint8, labels (n,)."""
    chosen = np.random.default_rng(seed).permutation(len(data.classes))[:classes]
    rows = [i for y in chosen for i in np.flatnonzero(data.labels == y)[:n // len(chosen)]]
    images, labels = zip(*(data[i] for i in rows))
    return torch.from_numpy(np.stack(images)), torch.tensor(labels)


def to_device(tensor, device):
    """A copy on the device. From pinned memory: else the CPU would wait for the GPU."""
    tensor = tensor.pin_memory() if device.type == "cuda" else tensor
    return tensor.to(device, non_blocking=True)


def to_network(images, device):
    """(N, R, R, 3) uint8 -> (N, 3, R, R) in [-1, 1], channels last in memory."""
    return to_device(images, device).permute(0, 3, 1, 2).float() / 127.5 - 1


def generator_for(*numbers):
    """A random generator that depends on these numbers only: (seed, step, ...)."""
    # Their number counts, too: (0, 3) and (0, 3, 0) would give the same.
    state, = np.random.SeedSequence([len(numbers), *numbers]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state))


def in_order(length, batch, position, seed, rows):
    """Which real image comes when: epoch after epoch, each in its own order. Lists of indices.

    A position in this endless sequence says everything, so a run continues with the image that would have
    come next. Of every batch this process gets the given rows only."""
    drawn = None                                    # the epoch whose order is at hand
    for start in range(position, sys.maxsize, batch):
        indices = []
        for row in rows:
            epoch, k = divmod(start + row, length)
            if epoch != drawn:
                drawn = epoch
                permutation = torch.randperm(length, generator=generator_for(seed, epoch))
            indices.append(permutation[k].item())
        yield indices


def own_rows(s):
    """Which rows of a batch are this process's: an equal part of every micro-batch."""
    part = s.micro_batch // processes()
    return [row for row in range(s.batch) if row // part % processes() == rank()]


def batches(data, s, step, device):
    """This process's part of the real batches from `step` on, endless: images (N, 3, R, R), labels (N,)."""
    cuda, rows, first = device.type == "cuda", own_rows(s), step * s.d_steps
    order = in_order(len(data), s.batch, first * s.batch, s.seed, rows)
    workers = s.workers if s.workers is not None else 8 * cuda
    loader = torch.utils.data.DataLoader(data, batch_sampler=order, num_workers=workers, pin_memory=cuda,
                                         worker_init_fn=ignore_signals)
    for number, (x, y) in enumerate(loader, start=first):
        x, generator = to_network(x, device), generator_for(s.seed, number, 0, 1)   # four: not the noise
        mirrored = torch.rand(s.batch, generator=generator)[rows] < s.flip
        x = torch.where(to_device(mirrored, device).view(-1, 1, 1, 1), x.flip(3), x)
        yield x, to_device(y, device)


STOP_SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


def ignore_signals(worker):
    """Workers ignore what asks to stop: their training process saves first. Ctrl-C reaches all."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


# ---------------------------------------------------------------- the training step
# D learns d_steps times: loss_d of D(real) and D(G(z)), with G's weights frozen. Then G learns once: loss_g
# of D(G(z)), with D's frozen. In D's turns, too, G draws in training mode: its u and running averages move. A
# batch that does not fit into memory is taken in micro-batches, whose gradients add up; batch norm sees one.
# DDP averages gradients over the processes after each micro-batch; no_sync would save traffic and cost lines.

class Trainer:
    """G, D, their optimisers and the EMA, and the step that moves them. Knows nothing about files."""

    SAVED = "G", "D", "G_ema", "opt_G", "opt_D", "scaler"

    def __init__(self, s, config, device):
        torch.manual_seed(s.seed)                   # the same first weights in every process
        self.s, self.config, self.device, self.step = s, config, device, 0
        self.dtype = torch.float64 if s.precision == "fp64" else torch.float32
        self.half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(s.precision)    # for autocast
        self.G = Generator(config).to(device, self.dtype, memory_format=torch.channels_last)
        self.D = Discriminator(config).to(device, self.dtype, memory_format=torch.channels_last)
        adam = partial(torch.optim.Adam, betas=(s.beta1, s.beta2), fused=True)
        self.opt_G, self.opt_D = adam(self.G.parameters(), s.g_lr), adam(self.D.parameters(), s.d_lr)
        self.ema = EMA(self.G, s.ema, s.ema_start)
        self.G_ema = self.ema.model
        self.loss_d, self.loss_g, self.threshold = LOSSES[s.loss]
        self.rows, self.micro = own_rows(s), s.micro_batch // processes()
        for network in self.G, self.D:
            if hasattr(network, "attention"):
                network.attention.fused = s.fused_attention
            if s.compile:
                network.compile(dynamic=False)
        matmul = torch.backends.cuda.matmul         # sums of 16-bit products are float32, too
        matmul.allow_bf16_reduced_precision_reduction = matmul.allow_fp16_reduced_precision_reduction = False
        torch.backends.cudnn.benchmark = True       # all steps have the same shapes
        # Many gradients would be too small for float16: the scaler multiplies the loss by a large number,
        # divides the gradients by it, and where they overflow skips the update and halves the number.
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.half == torch.float16)
        self.parallel_G, self.parallel_D = self.G, self.D  # with gradients averaged over the processes
        if processes() > 1:
            # The strides of a 1x1 kernel can be written in two ways, which DDP takes for a difference.
            warnings.filterwarnings("ignore", "Grad strides do not match|.*broadcast_buffers")
            parallel = partial(torch.nn.parallel.DistributedDataParallel, gradient_as_bucket_view=True,
                               broadcast_buffers=False)  # u and running averages are the same everywhere
            self.parallel_G, self.parallel_D = parallel(self.G), parallel(self.D)

    def noise(self, turn):
        """z, y, mix (for `gradient_penalty`) and two r (for `augment`) of this process's rows, in
        micro-batches. They depend on the seed, the step and the turn in it alone: 0 is G's, 1, 2, ... D's."""
        generator = generator_for(self.s.seed, self.step, turn)
        z = truncated_normal((self.s.batch, self.config.z_dim), generator=generator).to(self.dtype)
        y = torch.randint(self.config.n_classes, (self.s.batch,), generator=generator)
        mix = torch.rand(self.s.batch, generator=generator).to(self.dtype)
        r = torch.rand(self.s.batch, 2, 3, 3, generator=generator).to(self.dtype)
        own = [to_device(drawn[self.rows], self.device) for drawn in (z, y, mix, r)]
        return zip(*(drawn.split(self.micro) for drawn in own))

    def autocast(self, half):
        return torch.autocast(self.device.type, half, enabled=half is not None)

    def train_step(self, real_batches):
        """d_steps updates of D, then one of G. Returns what the log wants, as tensors."""
        logged = defaultdict(float)
        for turn in range(1, self.s.d_steps + 1):
            self.step_D(*next(real_batches), turn, logged)
        self.step_G(logged)
        return logged

    def step_D(self, real, real_y, turn, logged):
        s, weight = self.s, self.micro / len(self.rows)  # weight of a micro-batch
        self.D.requires_grad_(True)                 # step_G has frozen it
        self.opt_D.zero_grad()
        real, real_y = real.to(self.dtype).split(self.micro), real_y.split(self.micro)
        for x, y, (z, fake_y, mix, r) in zip(real, real_y, self.noise(turn)):
            if s.loss == "wgan-gp":
                fake_y = y                          # the penalty's lines join images of one class
            with self.autocast(self.half):
                with torch.no_grad():               # only D learns: no graph through G
                    fake = augment(self.G(z, fake_y), s.augment, r[:, 0])
                x = augment(x, s.augment, r[:, 1])
                # In one call: D has no batch norm, so they do not mix, and a large batch is faster.
                both = torch.cat([x, fake]), torch.cat([y, fake_y])
                real_logits, fake_logits = self.parallel_D(*both).chunk(2)
            penalty = real_logits.new_zeros(())
            with self.autocast(None if s.precision == "fp16" else self.half):   # float16 would underflow
                if s.r1:
                    penalty += s.r1 * r1_penalty(self.D.forward, x, y)      # .forward is uncompiled
                if s.loss == "wgan-gp":
                    penalty += 10 * gradient_penalty(self.D.forward, x, fake, y, mix)
            loss = self.loss_d(real_logits, fake_logits)
            self.scaler.scale((loss + penalty) * weight).backward()
            for name, value in (("D_real", real_logits.mean()), ("D_fake", fake_logits.mean()),
                                ("D_loss", loss), ("D_penalty", penalty)):
                logged[name] += value.detach() * weight / s.d_steps
        self.update("D", logged, 1 / s.d_steps)

    def step_G(self, logged):
        s, weight = self.s, self.micro / len(self.rows)
        self.D.requires_grad_(False)                # frozen: G's gradient passes through
        self.opt_G.zero_grad()
        if s.ortho:                                 # depends on the weights alone: once
            ortho = orthogonal_regularisation(self.G)
            self.scaler.scale(s.ortho * ortho).backward()
            logged["ortho"] = ortho.detach()
        if s.sigma_pull:
            self.scaler.scale(s.sigma_pull * sigma_pull(self.G, s.sigma_fixed, s.sigma_ratio)).backward()
        for z, y, _, r in self.noise(0):
            with self.autocast(self.half):
                fake = self.parallel_G(z, y)
                fake_logits = self.D(augment(fake, s.augment, r[:, 0]), y)
            loss = self.loss_g(fake_logits)
            self.scaler.scale(loss * weight).backward()
            logged["G_loss"] += loss.detach() * weight
        self.update("G", logged, 1)
        if (s.sigma_fixed or s.sigma_ratio) and not s.sigma_pull:
            clamp_sigma(self.G, s.sigma_fixed, s.sigma_ratio)
        self.step += 1
        self.ema.update(self.G, self.step)

    def update(self, network, logged, share):
        """One step of a network's optimiser. Logs the gradient's norm, 0 where float16 skips the update."""
        optimiser = getattr(self, f"opt_{network}")
        self.scaler.unscale_(optimiser)
        grads = [p.grad for p in getattr(self, network).parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        if self.scaler.is_enabled():
            norm = norm.nan_to_num(0, 0, 0)
        logged[f"{network}_grad"] += norm * share
        self.scaler.step(optimiser)
        self.scaler.update()

    def state_dict(self):
        state = {name: getattr(self, name).state_dict() for name in self.SAVED}
        return {"step": self.step, "model": dataclasses.asdict(self.config), **state}

    def load_state_dict(self, state):
        self.step = state["step"]
        for name in self.SAVED:
            getattr(self, name).load_state_dict(state[name])

    def start_from(self, weights, classes):
        """Take over other weights; for other classes, all but the class embeddings, which stay random."""
        G, D, same = weights.G or weights.G_ema, weights.D or {}, classes == weights.classes
        for network, state in (self.G, G), (self.G_ema, weights.G_ema), (self.D, D):
            tables = [name for name, m in network.named_modules() if isinstance(m, torch.nn.Embedding)]
            state = {name: p for name, p in state.items() if same or name.rpartition(".")[0] not in tables}
            network.load_state_dict(state, strict=False)
        say("started from --init" + " but for the embeddings of its classes" * (not same))
        if not weights.D:
            say("it has no D, whose random weights would spoil G: train D alone for a while (--g-lr 0), then "
                "start from that run")

    @torch.no_grad()
    def evaluated(self, network, inputs, labels):
        """network(input, label) in evaluation mode, on the CPU; inputs come 16 at a time."""
        network.eval()
        with self.autocast(self.half):
            parts = [network(x.to(self.device, self.dtype), y.to(self.device)).cpu()
                     for x, y in zip(inputs, labels.split(16))]
        network.train()
        return torch.cat(parts)

    def accuracy(self, images, labels):
        """Of real images (N, R, R, 3) uint8, the part whose logits are above the decision threshold."""
        inputs = (to_network(x, self.device) for x in images.split(16))
        return (self.evaluated(self.D, inputs, labels) > self.threshold).float().mean().item()

    def diversity(self, real, labels):
        """The spread of G's images within classes, relative to that of real ones (N, R, R, 3) uint8."""
        z = truncated_normal((len(labels), self.config.z_dim), generator=generator_for(self.s.seed))
        fake, real = self.evaluated(self.G, z.split(16), labels), to_network(real, torch.device("cpu"))
        return spread_within(fake, labels) / max(1e-6, spread_within(real, labels))


# ---------------------------------------------------------------- signs of collapse
# Sooner or later a GAN collapses: within some hundred steps its images become few, or poor, and stay so
# (section 4). Then stop, and use earlier weights. The margins come from healthy runs.

WINDOW, FEW, WON, GROWTH = 150, 0.6, 0.02, 2        # steps; of the best diversity; D's loss; factor


def spread_within(images, labels):
    """Standard deviation, over the images of a class, of 8x8 averages of images (N, 3, R, R).

    Averaged down, since a G that has collapsed may still add different noise to the same picture."""
    small = F.adaptive_avg_pool2d(images.float(), 8)
    variances = [small[labels == y].var(0, correction=0).mean() for y in labels.unique()]
    return torch.stack(variances).mean().sqrt().item()


def collapse(lines):
    """Lines of the log, oldest first -> how the last of them show collapse, in words, or None."""
    earlier = [line for line in lines if line["step"] <= lines[-1]["step"] - WINDOW]
    recent = lines[min(len(earlier), len(lines) - 3):]  # WINDOW steps, but at least three lines
    if len(lines) < 4 or not earlier:
        return None
    mean = lambda name: sum(line[name] for line in recent) / len(recent)
    best, sigmas = min(1, max(line["diversity"] for line in earlier)), [line["sigma_0"] for line in recent]
    if mean("diversity") < FEW * best:
        return f"images of one class have become alike: diversity {mean('diversity'):.2f}, before {best:.2f}"
    if 0 <= mean("D_loss") < WON:                   # Wasserstein's is below 0
        return f"D is never wrong any more: its loss is {mean('D_loss'):.4f}"
    if sigmas[-1] > GROWTH * min(sigmas):
        return f"sigma_0 of G's first layer explodes, from {min(sigmas):.3g} to {sigmas[-1]:.3g}"
    return None


# ---------------------------------------------------------------- a run and its folder

def check_run(out, described):
    """Refuse to continue a run with other settings, listing each difference."""
    # Options newer than the run had their default.
    before = {**dataclasses.asdict(Settings()), **json.loads((out / "config.json").read_text())}
    changed = [f"{name} was {str(before.get(name))[:60]} and is now {str(value)[:60]}"
               for name, value in described.items()
               if name not in FREE_TO_CHANGE and before.get(name) != value]
    if changed:
        raise UserError(f"{out} has other settings: {'; '.join(changed)}; choose another --out")


def lock_run(out, described):
    """Make the folder and keep a second process from working in it. The lock goes when this process does."""
    for folder in "checkpoints", "samples":
        (out / folder).mkdir(parents=True, exist_ok=True)
    lock = open(out / "lock", "w")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"another process is at work in {out}; stop it or choose another --out") from None
    save_atomically(out / "config.json", lambda f: f.write(json.dumps(described, indent=1).encode()))
    return lock                                     # closed, it would be free


@contextmanager
def surviving(path):
    """A full disk or a folder that has become unwritable costs a warning, not the run."""
    try:
        yield
    except (OSError, RuntimeError) as error:        # torch reports a failed write as a RuntimeError
        warn(f"{path} could not be written ({error}); the run goes on without it")


def read_log(path, step):
    """The lines of log.jsonl up to this step; those after it are about to be repeated."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [line for line in map(json.loads, lines) if line["step"] <= step]


def save_checkpoint(trainer, classes, s):
    """Write the state, then delete what --keep and --keep-every do not keep. Returns whether it succeeded."""
    stop_if_not_finite(trainer, {})
    path = Path(s.out, "checkpoints", f"step-{trainer.step:08d}.pt")
    with surviving(path):
        if rank() == 0:
            save_atomically(path, lambda f: torch.save({"classes": classes, **trainer.state_dict()}, f))
            for old in [old for old in checkpoints_of(s.out) if old <= path][:-s.keep]:
                if int(old.stem[5:]) % s.keep_every:
                    old.unlink()
        return True
    return False


def save_samples(trainer, s, rows=16, columns=10):
    """A grid of fixed noise, a row per class, drawn with the EMA weights and statistics of their own."""
    G = standing_statistics(fold_spectral_norm(copy.deepcopy(trainer.G_ema).float()))
    path = Path(s.out, "samples", f"step-{trainer.step:08d}.png")
    if rank() == 0:
        k = np.arange(columns * min(rows, trainer.config.n_classes))
        images = draw_seeds(G, k // columns, k % columns)
        with surviving(path):
            save_atomically(path, lambda f: image_grid(images, columns).save(f, "PNG"))


# ---------------------------------------------------------------- the loop

def give_up(sentence):
    """End all processes for a reason that all of them know; the first one says it."""
    raise UserError(sentence) if rank() == 0 else SystemExit(2)


def stop_if_not_finite(trainer, means):
    """A network that has produced a NaN never recovers: stop before a checkpoint of it is written. float16
    skips single updates as a matter of course, halving the loss scale: stop when that is tiny."""
    wrong = [name for name, mean in means.items() if not math.isfinite(mean)]
    for network in trainer.G, trainer.D, trainer.G_ema:
        wrong += [name for name, p in network.state_dict().items() if not p.isfinite().all()]
    if trainer.scaler.get_scale() < 2**-14:
        wrong += ["the scaled loss"]
    if wrong:
        give_up(f"training has diverged at step {trainer.step}: {wrong[0]} is not finite; nothing of it was "
                "saved. Start from a checkpoint: --init CHECKPOINT --out ANOTHER with lower learning rates")


def agreed(number):
    """The largest of all processes' numbers."""
    if processes() > 1:
        number = torch.tensor(int(number))              # on the CPU: the GPU is not waited for
        dist.all_reduce(number, dist.ReduceOp.MAX)
    return int(number)


def catch_signals():
    """A list that is no longer empty once a signal asks to stop."""
    stop = []
    for number in STOP_SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup means: go on
            signal.signal(number, lambda number, frame: stop.append(number))
    return stop


def train(trainer, data, held_out, s):
    """Steps, log, samples, checkpoints; until the steps are done, a signal asks to stop, or G collapses."""
    stop, path = catch_signals(), Path(s.out, "log.jsonl")
    log = read_log(path, trainer.step)
    real_batches = batches(data, s, trainer.step, trainer.device)
    references, saved, verdict, reason = some_images(data, s.seed, 64, 8), trainer.step, 0, None
    sums, since, started = 0, trainer.step, time.perf_counter()
    while trainer.step < s.steps and not verdict:
        logged = trainer.train_step(real_batches)
        sums = sums + torch.stack([*logged.values()]).float()
        due = lambda every: trainer.step % every == 0 or trainer.step == s.steps
        if due(s.log_every) or due(s.eval_every):
            steps, seconds = trainer.step - since, time.perf_counter() - started
            if processes() > 1:
                dist.all_reduce(sums)
            means = dict(zip(logged, (sums / processes() / steps).tolist()))
            stop_if_not_finite(trainer, means)
            if rank() == 0:
                line = {"step": trainer.step, **means, "seconds_per_step": seconds / steps,
                        "diversity": trainer.diversity(*references),
                        "sigma_0": singular_values(trainer.G.linear.weight, 1).item()}
                log.append(line | evaluate(trainer, data, held_out, s) if due(s.eval_every) else line)
                with surviving(path):
                    text = "".join(json.dumps(line) + "\n" for line in log)
                    save_atomically(path, lambda f: f.write(text.encode()))
                show(log[-1], s)
                reason = collapse(log) if s.g_lr else None      # alone, D ought to win
                if reason and s.on_collapse == "warn":
                    warn(f"step {trainer.step}: {reason}")
                    reason = None
            sums, since, started = 0, trainer.step, time.perf_counter()
        if due(s.sample_every):
            save_samples(trainer, s)
        if due(s.save_every) and not reason and save_checkpoint(trainer, data.classes, s):
            saved = trainer.step
        verdict = agreed(2 if reason else bool(stop))   # 0: go on, 1: a signal, 2: collapse
    if verdict == 2:
        give_up(f"collapse at step {trainer.step}: {reason}. The last step saved is {saved}; "
                f"metrics.py --weights {s.out}/checkpoints/*.pt says which is best")
    if saved < trainer.step and not save_checkpoint(trainer, data.classes, s):
        raise UserError(f"step {trainer.step} is not saved; make room, then the same command continues")
    ending = "stopped" if verdict else "done"
    say(f"\n{ending} after {trainer.step} steps; the same command, or one with more --steps, continues")


def evaluate(trainer, data, held_out, s):
    """The first three singular values of every weight; and whether D has memorised its training images."""
    found = {"sigma": {f"{network}.{name}": singular_values(layer.weight).tolist() for network in "GD"
                       for name, layer in matrix_layers(getattr(trainer, network)).items()}}
    for name, images in ("D_accuracy", data), ("D_accuracy_held_out", held_out):
        if held_out and trainer.threshold is not None:
            found[name] = trainer.accuracy(*some_images(images, s.seed, 512, 64))
    return found


def show(line, s):
    """A line of the log on the screen; on a terminal, each takes the place of the one before."""
    seconds, names = line["seconds_per_step"], ("D_real", "D_fake", "G_loss", "diversity", "D_accuracy")
    print(f"step {line['step']}/{s.steps}  {s.batch / seconds:.0f} img/s "
          f" {(s.steps - line['step']) * seconds / 3600:.1f} h left",
          *(f" {name} {line[name]:.2f}" for name in names if name in line),
          end="\033[K\r" if sys.stdout.isatty() else "\n", flush=True)


def main(arguments):
    s = parse_settings(arguments)
    device = pick_device()
    keep_freed_memory()
    if s.precision == "auto":                       # emulated, bf16 would be slower than float32
        cuda = device.type == "cuda"
        fast = torch.cuda.is_bf16_supported(False) if cuda else torch.cpu._is_avx512_bf16_supported()
        s.precision = "bf16" if fast else "fp32"
    if s.benchmark:
        start_processes()
        benchmark(Trainer(s, model_config(s, MODELS[s.model].n_classes), device), s)
        return stop_processes()
    out, (checkpoint, _) = Path(s.out), newest_checkpoint(s.out)
    initial = read_weights(s.init) if s.init and not checkpoint else None
    if checkpoint:
        config = ModelConfig(**checkpoint["model"])
    else:
        config = initial.config if initial else model_config(s)
    data = open_data(s.data, config.resolution)
    if s.pack:
        return pack(data, s.pack, s.workers or os.cpu_count())
    held_out = open_data(s.held_out, config.resolution, held_out=True) if s.held_out else None
    if held_out and held_out.classes != data.classes:
        raise UserError(f"--held-out {s.held_out} has other classes than --data {s.data}")
    config = dataclasses.replace(config, n_classes=len(data.classes))
    say(f"{len(data):,} images in {len(data.classes)} classes: {', '.join(data.classes)[:80]}\n"
        f"{s.precision} on {device}")
    described = {**dataclasses.asdict(s), "images": len(data), "classes": data.classes}
    if checkpoint:
        check_run(out, described)
    start_processes()
    lock = lock_run(out, described) if rank() == 0 else None
    trainer = Trainer(s, config, device)
    if checkpoint:
        trainer.load_state_dict(checkpoint)
        say(f"continuing {s.out} from step {trainer.step}")
    elif initial:
        trainer.start_from(initial, data.classes)
    if agreed(trainer.step != agreed(trainer.step)):
        give_up(f"the processes have read different checkpoints; {s.out} must be on a disk that they share")
    del checkpoint, initial                         # which would stay mapped, and on the disk, for weeks
    train(trainer, data, held_out, s)
    stop_processes()


# ---------------------------------------------------------------- how fast is it?

def benchmark(trainer, s):
    """Time steps on noise, count their operations, compare with one large matrix product."""
    device, R, n = trainer.device, trainer.config.resolution, len(trainer.rows)
    y = torch.zeros(n, dtype=torch.int64, device=device)
    real = itertools.repeat((torch.rand(n, 3, R, R, device=device) * 2 - 1, y))
    step = seconds_of(lambda: trainer.train_step(real), s.benchmark)
    step_G = seconds_of(lambda: trainer.step_G(defaultdict(float)), s.benchmark)
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        trainer.train_step(real)
    side = 8192 if device.type == "cuda" else 2048
    a = torch.randn(side, side, device=device, dtype=trainer.half or trainer.dtype)
    peak = 2e-12 * side**3 / seconds_of(lambda: a @ a, 10)
    tera = counter.get_total_flops() / 1e12         # 2 for a multiplication and an addition, also of zeros
    say(f"{s.batch * s.d_steps / step:.1f} real images per second; {1000 * step:.0f} ms per step: "
        f"{s.d_steps} times {1000 * (step - step_G) / s.d_steps:.0f} for D, {1000 * step_G:.0f} for G; "
        f"{torch.cuda.max_memory_allocated() / 1e9:.2f} GB of GPU memory; {tera:.3f} TFLOP per process, "
        f"{tera / step / peak:.0%} of a matrix product's {peak:.2f} per second")


def seconds_of(work, times):
    """Mean seconds that some work takes, in which the device is not waited for; twice before to warm up."""
    timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
    return timer.timeit(times).mean


if __name__ == "__main__":
    run(main)
