"""Train BigGAN on a folder of images, or on shapes that are drawn on the fly.

    python train.py --preset shapes                 ten drawn shapes, minutes on two CPU cores
    python train.py --preset cifar10-small          CIFAR-10, seven hours on two CPU cores
    python train.py --preset cifar10 --data mine --out runs/mine    images, a sub-folder per class
    torchrun --nproc_per_node=8 train.py --data imagenet/train      the paper's run, on eight GPUs
    python train.py --data imagenet/train --pack imagenet128    decode once, for --data imagenet128
    python train.py --init runs/cifar10 --data mine --out runs/mine --batch 64      from weights

Under torchrun each process takes an equal part of every batch, and batch norm sees all of it. So a
run computes the same on any number of processes. The same command again continues a run, also after
a kill. A run is a folder:

    config.json        every setting, and the names of the classes
    log.jsonl          one JSON object per logged step
    samples/*.png      the same noise at growing steps, with EMA weights, a row per class
    checkpoints/*.pt   tensors and plain values; sample.py and metrics.py need nothing else

How to read this file. Part 1: the settings, the training step, the loop. Part 2: what stands
beside them: the command, penalties, signs of collapse, a run's folder. Part 3: data, and in which
order it comes."""

import copy
import dataclasses
import io
import itertools
import json
import math
import multiprocessing
import os
import signal
import sys
import tarfile
import time
import warnings
import zlib
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter, ImageOps

from biggan import (
    AUGMENTATIONS,
    EMA,
    LOSSES,
    MODELS,
    Discriminator,
    Generator,
    ModelConfig,
    UserError,
    augment,
    clamp_sigma,
    fold_spectral_norm,
    gradient_penalty,
    matrix_layers,
    orthogonal_regularisation,
    processes,
    r1_penalty,
    rank,
    require,
    sigma_pull,
    singular_values,
    standing_statistics,
    truncated_normal,
)
from sample import (
    COUNT,
    FRACTION,
    LOCAL_RANK,
    NATURAL,
    NON_NEGATIVE,
    SEED,
    WORLD_SIZE,
    checkpoints_of,
    command_line,
    decoding,
    draw_seeds,
    fetch,
    image_grid,
    in_range,
    newest_checkpoint,
    not_finite,
    pick_device,
    progress,
    read_weights,
    run,
    save_atomically,
    save_text,
    say,
    start_processes,
    sum_over_processes,
    typed_options,
    values_of_all,
    wait_for,
    warn,
)

try:
    import fcntl                        # locks files; Windows has no such module
except ImportError:
    fcntl = None

# ==================================================================================================
# Part 1: the recipe
# ==================================================================================================

# ----------------------------------------------------------------------------------------- settings
# The defaults are the paper's ImageNet run at 128x128.

def make_parser():
    parser = command_line(__doc__)
    add = parser.add_argument
    add("--preset", default="imagenet128", choices=PRESETS, help="named settings")
    add("--data", help="images: a folder with a sub-folder per class; packed; shapes")
    add("--init", help="weights to start from, which decide the architecture")
    add("--model", default="biggan128", choices=MODELS, help="architecture; images get its size")
    add("--ch", type=COUNT, help="width that channels are multiples of; the model's unless given")
    add("--shared-dim", type=NATURAL, help="length of G's class embedding; 0: one in each layer")
    add("--steps", type=COUNT, default=150_000, help="updates of G")
    add("--batch", type=COUNT, default=2048, help="real images per update, and generated ones")
    add("--micro-batch", type=COUNT, help="images at a time, over all processes")
    add("--d-steps", type=COUNT, default=2, help="updates of D per update of G")
    add("--g-lr", type=NON_NEGATIVE, default=5e-5, help="learning rate of G")
    add("--d-lr", type=NON_NEGATIVE, default=2e-4, help="learning rate of D")
    add("--beta1", type=FRACTION, default=0.0, help="Adam's momentum; large runs want none")
    add("--beta2", type=FRACTION, default=0.999, help="Adam's decay of squared gradients")
    add("--loss", default="hinge", choices=LOSSES, help="losses of D and G")
    add("--ortho", type=NON_NEGATIVE, default=1e-4, help="weight of the orthogonal penalty on G")
    add("--ema", type=FRACTION, default=0.9999, help="decay of the EMA weights")
    add("--ema-start", type=NATURAL, default=20_000, help="step until which EMA weights equal G's")
    add("--flip", type=FRACTION, default=0.5, help="probability that a real image is mirrored")
    add("--seed", type=SEED, default=0, help="of the weights, the noise and the order of the data")
    add("--precision", default="auto", choices=PRECISIONS, help="auto: bf16 if the hardware has it")
    # Beyond the recipe.
    add("--augment", default="", help="for few images: colour,translation,cutout or some of them")
    add("--r1", type=NON_NEGATIVE, default=0.0, help="weight of D's R1 gradient penalty")
    add("--sigma-fixed", type=in_range(float, 1e-6), help="lower G's largest sigmas to this")
    add("--sigma-ratio", type=in_range(float, 1e-6), help="or to so many times the second largest")
    add("--sigma-pull", type=NON_NEGATIVE, default=0.0, help="or pull, by a penalty of this weight")
    # Where and how a run goes on.
    add("--out", help="the run's folder; runs/PRESET unless given")
    add("--pack", help="do not train: decode all images once, into this folder")
    add("--held-out", help="images not trained on, to see whether D knows --data by heart")
    add("--compile", action="store_true", help="fuse operations; the first step takes minutes")
    add("--fused-attention", action="store_true", help="less time and memory on a GPU")
    add("--workers", type=in_range(int, 0, 257), help="per process; 8, packed 2, on a CPU 0")
    add("--log-every", type=COUNT, default=50, help="steps between lines of log.jsonl")
    add("--eval-every", type=COUNT, default=1000, help="steps between sigmas, D's accuracy")
    add("--sample-every", type=COUNT, default=1000, help="steps between grids of samples")
    add("--save-every", type=COUNT, default=1000, help="steps between checkpoints")
    add("--keep", type=COUNT, default=3, help="how many of the newest checkpoints remain")
    add("--keep-every", type=COUNT, default=25_000, help="checkpoints at multiples of this remain")
    add("--on-collapse", default="stop", choices=["stop", "warn"], help="when G collapses")
    return parser


CIFAR10 = dict(data="data/cifar10", held_out="data/cifar10-test")
SAGAN = dict(model="sagan128", ortho=0.0)
SMALL_RATES = dict(g_lr=2.5e-5, d_lr=2.5e-5)

PRESETS = {                             # what differs from the defaults above
    "shapes": dict(
        data="shapes", held_out="shapes", model="shapes32",
        steps=3000, batch=64, d_steps=1, g_lr=2e-4, d_lr=4e-4, beta2=0.99,
        ema=0.998, ema_start=200, flip=0.0,
        eval_every=250, sample_every=250, save_every=250,
    ),
    "cifar10": dict(
        **CIFAR10, model="biggan32", steps=100_000, batch=64, d_steps=4, g_lr=2e-4, ema_start=1000,
    ),
    # For two CPU cores, seven hours: found by trying, see docs/notes.md.
    "cifar10-small": dict(
        **CIFAR10, model="shapes32", ch=48, steps=50_000, batch=32,
        g_lr=2e-4, d_lr=4e-4, ema=0.999, ema_start=1000,
    ),
    "imagenet64": dict(model="biggan64"),
    "imagenet128": dict(),
    "imagenet256": dict(model="biggan256"),
    "imagenet512": dict(model="biggan512"),
    "imagenet128-deep": dict(model="biggan-deep-128"),
    "imagenet256-deep": dict(model="biggan-deep-256", **SMALL_RATES),
    "imagenet512-deep": dict(model="biggan-deep-512", **SMALL_RATES),
    # SN-GAN (Miyato & Koyama 2018).
    "sngan128": dict(
        model="sngan128", steps=450_000, batch=64, d_steps=5, g_lr=2e-4, beta2=0.9, ortho=0.0
    ),
    # The paper's table 1. Its first row is SAGAN (Zhang et al. 2019).
    "table1-row1": dict(
        **SAGAN, steps=1_000_000, batch=256, d_steps=1, g_lr=1e-4, d_lr=4e-4, beta2=0.9
    ),
    # Twice the batch, half the rates, two updates of D, another beta2; then larger batches.
    "table1-row2": dict(**SAGAN, steps=1_000_000, batch=512),
    "table1-row3": dict(**SAGAN, steps=1_000_000, batch=1024),
    "table1-row4": dict(**SAGAN, steps=732_000),
    "table1-row5": dict(**SAGAN, steps=295_000, ch=96),         # more channels
    "table1-row6": dict(**SAGAN, steps=185_000, ch=96, shared_dim=128),     # a shared embedding
    "table1-row7": dict(steps=152_000, ortho=0.0),              # z in chunks
    "table1-row8": dict(steps=165_000),                         # the orthogonal penalty
    "table1-row9": dict(steps=371_000, ch=64),                  # fewer channels
}


def parse_settings(arguments):
    """Command line -> settings: the defaults, then the preset's, then what was typed."""
    parser = make_parser()
    # The first parsing finds the preset; the second one, below, has the preset's defaults.
    typed = parser.parse_args(arguments)
    check_typed(typed_options(parser, typed))
    preset = {"out": f"runs/{typed.preset}", **PRESETS[typed.preset]}
    if typed.data:
        preset["held_out"] = None       # the preset's held-out images belong to its data
    if typed.init:
        preset["ema_start"] = 0         # there are no random weights to forget
    parser.set_defaults(**preset)
    args = parser.parse_args(arguments)
    if args.micro_batch is None:
        args.micro_batch = args.batch
    if args.init:                       # the weights decide these
        args.model = None
        args.ch = None
        args.shared_dim = None
    check_settings(args)
    return args


# -------------------------------------------------------------------------------- the training step
# D learns d_steps times, then G once. In D's turn, too, G draws in training mode: its batch norm
# sees the batch. (Its u and running averages move, which does no harm.) A batch that is too large
# for the memory is taken in micro-batches, whose gradients add up. (Batch norm then sees one
# micro-batch.)
#
# With several processes, each takes its part of every micro-batch. In the backward pass of the last
# micro-batch, DistributedDataParallel (DDP) replaces whatever stands in p.grad by its mean over the
# processes. This mean is right
# - for the losses: the batch's loss is the mean of the processes' losses. (By batch norm each loss
#   depends on the images of all processes. In its backward pass each process receives what its own
#   images have done to the losses of the others: `Moments` in part 3 of biggan.py.)
# - for penalties on D's gradient, which add to the same p.grad in the same backward pass;
# - for penalties on G's weights: all processes add the same, and the mean of equals is the same.
# The wrapped networks, parallel_G and parallel_D, are called where their own weights learn.

class Trainer:
    """G, D, their optimisers and the EMA, and the step that moves them. Knows nothing of files."""

    def __init__(self, args, config, device):
        self.args = args
        self.config = config
        self.device = device
        self.step = 0
        # Loss of D, loss of G, and the logit above which D takes an image for real.
        self.loss_d, self.loss_g, self.threshold = LOSSES[args.loss]
        # The 16-bit type that autocast computes with, or None. (`main` has replaced "auto".)
        self.half = PRECISIONS[args.precision]
        self.dtype = torch.float64 if args.precision == "fp64" else torch.float32
        # Which rows of a batch this process takes, how many of them at a time, and the weight of a
        # micro-batch in the mean over all of them.
        self.rows = rows_of_batch(args)
        self.micro = args.micro_batch // processes()
        self.share = self.micro / len(self.rows)

        torch.backends.cudnn.benchmark = True       # all steps have the same shapes
        torch.manual_seed(args.seed)    # the same first weights in every process
        self.G = Generator(config)
        self.D = Discriminator(config)
        for network in self.G, self.D:
            network.to(device, self.dtype, memory_format=torch.channels_last)
            if hasattr(network, "attention"):
                network.attention.fused = args.fused_attention
            if args.compile:
                network.compile(dynamic=False)
        self.ema = EMA(self.G, args.ema, args.ema_start)
        self.G_ema = self.ema.model
        self.parallel_G = in_parallel(self.G)
        self.parallel_D = in_parallel(self.D)

        adam = partial(torch.optim.Adam, betas=(args.beta1, args.beta2), fused=True)
        self.opt_G = adam(self.G.parameters(), args.g_lr)
        self.opt_D = adam(self.D.parameters(), args.d_lr)
        # Many gradients would be too small for float16. The scaler multiplies the loss by a large
        # number and divides the gradients by it. Where they overflow, it skips the update and
        # halves the number. For other precisions it does nothing.
        self.scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")

    def train_step(self, real_batches):
        """d_steps updates of D, then one of G. Returns what the log wants: name -> scalar."""
        self.logged = defaultdict(float)
        for turn in range(1, self.args.d_steps + 1):
            real, real_labels = next(real_batches)
            self.step_D(real, real_labels, turn)
        self.step_G()
        self.step += 1
        self.ema.update(self.G, self.step)
        return self.logged

    def step_D(self, real, real_labels, turn):
        """One update of D. Half of what it sees is real, half is generated."""
        self.D.requires_grad_(True)     # step_G has frozen it
        self.opt_D.zero_grad()
        for batch in self.micro_batches(turn, real, real_labels):
            with self.autocast(self.half):
                with torch.no_grad():   # only D learns: no graph through G
                    fake = self.G(batch.z, batch.labels)
                fake = augment(fake, self.args.augment, batch.r[:, 0])  # not in the recipe
                real_logits, fake_logits = self.discriminate(batch, fake)
            loss = self.loss_d(real_logits, fake_logits)
            penalty = penalties_on_D(self, batch, fake)         # the recipe has none
            self.backward(loss + penalty, self.share)
            self.log_D(real_logits, fake_logits, loss, penalty)
        gradient_norm = self.update(self.D, self.opt_D)
        self.log(1 / self.args.d_steps, D_grad=gradient_norm)

    def step_G(self):
        """One update of G. The gradient flows back through D, whose weights do not move."""
        self.D.requires_grad_(False)
        self.opt_G.zero_grad()
        if self.args.ortho:             # depends on no image, so once; it waits in p.grad
            ortho = orthogonal_regularisation(self.G)
            self.backward(ortho, self.args.ortho)
            self.log(1, ortho=ortho)
        pull_singular_values_of_G(self)         # the recipe does not
        for batch in self.micro_batches(turn=0):
            with self.autocast(self.half):
                fake = self.parallel_G(batch.z, batch.labels)
                fake = augment(fake, self.args.augment, batch.r[:, 0])
                fake_logits = self.D(fake, batch.labels)
            loss = self.loss_g(fake_logits)
            self.backward(loss, self.share)
            self.log(self.share, G_loss=loss)
        gradient_norm = self.update(self.G, self.opt_G)
        self.log(1, G_grad=gradient_norm)
        clamp_singular_values_of_G(self)        # the recipe does not

    def discriminate(self, batch, fake):
        """D's logits for real and generated images, in one call: a large batch is faster.

        (They do not mix: D has no batch norm.)"""
        images = torch.cat([batch.real, fake])
        labels = torch.cat([batch.real_labels, batch.labels])
        return self.parallel_D(images, labels).split(len(batch.real))

    def autocast(self, half):
        return torch.autocast(self.device.type, half, enabled=half is not None)

    def backward(self, loss, weight):
        """Add the gradient of weight * loss to what is there."""
        self.scaler.scale(loss * weight).backward()

    def update(self, network, optimiser):
        """One step of a network's optimiser. Returns the norm of its gradient.

        (Where float16 overflows, there is no step, and the norm is 0.)"""
        self.scaler.unscale_(optimiser)
        grads = [p.grad for p in network.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        if self.scaler.is_enabled():
            norm = norm.nan_to_num(nan=0, posinf=0, neginf=0)
        self.scaler.step(optimiser)
        self.scaler.update()
        return norm

    def log_D(self, real_logits, fake_logits, loss, penalty):
        # The log has the mean over micro-batches and turns.
        weight = self.share / self.args.d_steps
        self.log(weight, D_real=real_logits.mean(), D_fake=fake_logits.mean())
        self.log(weight, D_loss=loss, D_penalty=penalty)

    def log(self, weight, **values):
        """Add weight * value to what this step says under each name."""
        for name, value in values.items():
            self.logged[name] += weight * value.detach()

    def random_numbers(self, turn):
        """z, labels, mix and r of this process's rows. G has turn 0, and D turns 1 to d_steps.

        They depend on the seed, the step and the turn, not on the number of processes: each draws
        those of the whole batch and keeps its own rows. (Beyond the recipe: mix is for the gradient
        penalty, r for augmentation, r[:, 0] of generated images and r[:, 1] of real ones.)"""
        n = self.args.batch
        when = (self.args.seed, self.step, turn)
        noise = generator("noise", *when)
        z = truncated_normal((n, self.config.z_dim), generator=noise).to(self.dtype)
        labels = torch.randint(self.config.n_classes, (n,), generator=noise)
        mix = torch.rand(n, generator=generator("penalty", *when)).to(self.dtype)
        r = torch.rand(n, 2, 3, 3, generator=generator("augmentation", *when)).to(self.dtype)
        return [to_device(numbers[self.rows], self.device) for numbers in (z, labels, mix, r)]

    def micro_batches(self, turn, real=None, real_labels=None):
        """Draw noise and classes, augment real images, and yield both in micro-batches.

        Before the last one, tell DDP to take the mean of the gradients over the processes."""
        z, labels, mix, r = self.random_numbers(turn)
        if real is not None and self.args.loss == "wgan-gp":
            labels = real_labels        # its penalty mixes a real and a generated image
        for first in range(0, len(self.rows), self.micro):
            part = slice(first, first + self.micro)
            batch = MicroBatch(z[part], labels[part], mix[part], r[part])
            if real is not None:
                batch.real = augment(real[part].to(self.dtype), self.args.augment, batch.r[:, 1])
                batch.real_labels = real_labels[part]
            is_last = part.stop == len(self.rows)
            for network in self.parallel_G, self.parallel_D:
                # DDP takes the mean if this is True. (Its no_sync() sets the same.)
                network.require_backward_grad_sync = is_last
            yield batch

    # What a checkpoint holds.

    parts = ["G", "D", "G_ema", "opt_G", "opt_D", "scaler"]

    def state_dict(self):
        state = {name: getattr(self, name).state_dict() for name in self.parts}
        return {"step": self.step, "model": dataclasses.asdict(self.config), **state}

    def load_state_dict(self, state):
        self.step = state["step"]
        for name in self.parts:
            getattr(self, name).load_state_dict(state[name])


@dataclass
class MicroBatch:
    """What goes through the networks at once: n images of this process."""
    z: torch.Tensor                     # (n, z_dim)
    labels: torch.Tensor                # (n,): classes of the generated images
    mix: torch.Tensor                   # (n,): for `gradient_penalty`
    r: torch.Tensor                     # (n, 2, 3, 3): for `augment`
    real: torch.Tensor = None           # (n, 3, R, R), as D sees them
    real_labels: torch.Tensor = None    # (n,)


def in_parallel(network):
    """The network, with gradients that are averaged over the processes."""
    if processes() == 1:
        return network
    # DDP warns of strides of 1x1 kernels, which does no harm.
    warnings.filterwarnings("ignore", "Grad strides do not match|.*broadcast_buffers")
    # gradient_as_bucket_view: p.grad lies in DDP's own buffers, and needs no second copy.
    # broadcast_buffers: u and running averages are the same in all processes, and need not be sent.
    return torch.nn.parallel.DistributedDataParallel(
        network, gradient_as_bucket_view=True, broadcast_buffers=False
    )


# ----------------------------------------------------------------------------------------- the loop
# A run ends when its steps are done, when a signal asks for it, or when G has collapsed: its images
# have suddenly become poor or all alike, and training does not recover from that. So at every line
# of the log, three signs are looked at: `diversity`, how much images of a class differ; D's loss,
# which is 0 once D is never wrong; and sigma_0, the largest singular value of G's first layer.
# (Spectral norm divides by it, so that it does no harm by itself. But in section 4 it grows before
# a collapse: a symptom.) Part 2 has the details.

def train(trainer, data, held_out, args):
    """Train until all steps are done, a signal asks to stop, or G collapses."""
    def is_due(every):
        return trainer.step == args.steps or trainer.step % every == 0

    signals = catch_signals()           # a list, empty until a signal arrives
    real_batches = batches(data, args, trainer.step, trainer.device)
    examples = real_examples(trainer, data, held_out, args)
    lines = read_log(args.out, trainer.step)
    logged = []                         # what each step since the last line has logged
    started = time.perf_counter()
    saved = trainer.step
    collapse = None                     # a sentence, once the first process sees one
    problem = ""                        # a sentence, once this process cannot read its images
    while trainer.step < args.steps:
        real, problem = next_batches(real_batches, args.d_steps)
        if in_any_process(signals or collapse or problem):
            break
        logged.append(trainer.train_step(iter(real)))
        if is_due(args.log_every) or is_due(args.eval_every):
            line = line_of(trainer, logged, started)
            if rank() == 0:
                line |= evaluate(trainer, examples, in_full=is_due(args.eval_every))
                lines.append(line)
                write_log(args, lines)
                collapse = sign_of_collapse(lines, args)
            logged = []
            started = time.perf_counter()
        if is_due(args.sample_every):
            save_samples(trainer, args)
        if is_due(args.save_every) and not collapse:
            if save_checkpoint(trainer, data.classes, args):
                saved = trainer.step

    if in_any_process(collapse):
        give_up(f"collapse at step {trainer.step}: {collapse}. The last step saved is {saved}; "
                f"metrics.py --weights {args.out}/checkpoints/*.pt says which is best")
    if saved < trainer.step and not save_checkpoint(trainer, data.classes, args):
        raise UserError(f"step {trainer.step} is not saved; make room, then type the same command")
    for text in values_of_all(problem):
        if text:
            give_up(f"{text}; the same command continues from step {trainer.step}")
    how = "done" if trainer.step >= args.steps else "stopped"
    say(f"\n{how} after {trainer.step} steps; the same command continues, also with more --steps")


# ==================================================================================================
# Part 2: from the command line to the folder of a run
# ==================================================================================================

# -------------------------------------------------------------------------------------- the command

def main(arguments):
    args = parse_settings(arguments)
    if args.pack:
        return start_packing(args)
    device = pick_device()
    if args.compile:
        try_to_compile(device)
    if args.precision == "auto":
        args.precision = fast_precision(device)
    checkpoint, path = newest_checkpoint(args.out)
    initial = None
    if checkpoint:
        with decoding(path, "is no checkpoint of a run"):
            config = ModelConfig(**checkpoint["model"])     # an edit of MODELS needs another --out
    elif args.init:
        initial = read_weights(args.init, to_train=True)
        config = initial.config
    else:
        config = model_config(args)
    data = open_data(args.data, config.resolution)
    held_out = open_held_out(args, data)
    config = dataclasses.replace(config, n_classes=len(data.classes))
    names = ", ".join(data.classes)[:80]
    say(f"{len(data):,} images in {len(data.classes)} classes: {names}")
    say(f"{args.precision} on {device}")
    described = {**vars(args), "images": len(data), "classes": data.classes}
    if checkpoint:
        check_run(args.out, described)
    # Until here each process finds mistakes by itself, and all find the same. From here on they
    # communicate, and one that ended alone would leave the others waiting.
    start_processes(patience=None)
    # The file stays open, as closing it would release the lock.
    lock = prepare_folder(args.out, described)
    trainer = Trainer(args, config, device)
    if checkpoint:
        with decoding(path, "is no checkpoint of a run"):
            trainer.load_state_dict(checkpoint)
        say(f"continuing {args.out} from step {trainer.step}")
    elif initial:
        start_from(trainer, initial, data.classes)
    if len(set(values_of_all(trainer.step))) > 1:
        give_up(f"the processes have read different checkpoints; {args.out} is on no shared disk")
    del checkpoint, initial             # gigabytes
    train(trainer, data, held_out, args)


def fast_precision(device):
    """bf16 where the hardware has it. (Emulated, it would be slower than float32.)"""
    if device.type == "cpu":
        return "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16"
    say("this GPU has no bf16; --precision fp16 may be several times as fast as fp32")
    return "fp32"


def try_to_compile(device):
    """Compile a trifle, so that what is missing is missed before anything else is done."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2, device=device))
    except Exception as error:          # torch's, of many kinds
        raise UserError(
            "--compile needs a C++ compiler and Python's headers (Debian, Ubuntu: apt install g++ "
            f"python3-dev): {type(error).__name__}"
        ) from None


def open_held_out(args, data):
    """The images of --held-out, if there are any. They have the classes of --data."""
    if not args.held_out:
        return None
    held_out = open_data(args.held_out, data.resolution, held_out=True)
    same = held_out.classes == data.classes
    require(same, f"--held-out {args.held_out} has other classes than --data {args.data}")
    return held_out


def check_settings(args):
    """Refuse settings that cannot work, or not together."""
    require(args.data, "--data DIR is missing, a folder with one sub-folder of images per class")
    folder = args.pack or args.out
    within = Path(folder).resolve().is_relative_to(Path(args.data).resolve())
    require(
        args.data == "shapes" or not within,
        f"{folder} lies within --data {args.data}; choose another",
    )
    require(
        args.batch % args.micro_batch == 0,
        f"--micro-batch {args.micro_batch} does not divide --batch {args.batch}",
    )
    require(
        args.micro_batch % WORLD_SIZE == 0,
        f"{WORLD_SIZE} processes cannot share {args.micro_batch} images equally",
    )
    goals = [goal for goal in (args.sigma_fixed, args.sigma_ratio) if goal is not None]
    require(
        len(goals) == 1 or not (goals or args.sigma_pull),
        "give either --sigma-fixed or --sigma-ratio, with or without --sigma-pull",
    )
    if args.r1 or args.loss == "wgan-gp":
        fused = args.fused_attention
        require(not fused, "leave out --fused-attention: the penalty is on gradients")
    for change in filter(None, args.augment.split(",")):
        possible = ",".join(AUGMENTATIONS)
        require(change in AUGMENTATIONS, f"--augment {args.augment} must be some of {possible}")
    if args.model:
        ch = model_config(args).ch
        require(ch % 8 == 0, "--ch must be a multiple of 8: attention uses an eighth of it")


def check_typed(typed):
    """Refuse options that another one would make ignored. typed: the names of those given."""
    if "init" in typed:
        decided = not typed & {"model", "ch", "shared_dim"}
        require(decided, "--init decides the architecture: no --model, --ch and --shared-dim")
    if "pack" in typed:
        enough = typed <= {"pack", "preset", "data", "model", "workers"}
        require(enough, "--pack takes --data, --preset, --model and --workers alone")
        require(WORLD_SIZE == 1, "--pack is done by one process, without torchrun")


def model_config(args):
    """The architecture that the settings ask for. (For any other, add a line to MODELS.)"""
    changes = {}
    if args.ch is not None:
        changes["ch"] = args.ch
    if args.shared_dim is not None:
        changes["shared_dim"] = args.shared_dim
    return dataclasses.replace(MODELS[args.model], **changes)


PRECISIONS = {                          # what autocast computes with
    "auto": None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": None,
    "fp64": None,
}

# These may change when a run is continued: they decide where and how long it runs, not what it
# computes. (--data may have moved. Its classes and the number of its images may not change.)
FREE_TO_CHANGE = {
    "data",
    "out",
    "held_out",
    "steps",
    "workers",
    "compile",
    "fused_attention",
    "on_collapse",
    "log_every",
    "sample_every",
    "save_every",
    "eval_every",
    "keep",
    "keep_every",
}


# ---------------------------------------------------------------------------------- beside the step

def penalties_on_D(trainer, batch, fake):
    """R1 and the gradient penalty, if asked for. fake: as many images as batch.real. -> scalar"""
    args = trainer.args
    penalty = fake.new_zeros(())
    D = trainer.D.forward               # not compiled: it is differentiated twice
    # In float16 a penalty would underflow.
    half = None if args.precision == "fp16" else trainer.half
    with trainer.autocast(half):
        if args.r1:
            penalty = penalty + args.r1 * r1_penalty(D, batch.real, batch.real_labels)
        if args.loss == "wgan-gp":      # 10: the paper's lambda
            distance = gradient_penalty(D, batch.real, fake, batch.labels, batch.mix)
            penalty = penalty + 10 * distance
    return penalty


def pull_singular_values_of_G(trainer):
    """Add the gradient of --sigma-pull."""
    args = trainer.args
    if args.sigma_pull:
        pull = sigma_pull(trainer.G, args.sigma_fixed, args.sigma_ratio)
        trainer.backward(pull, args.sigma_pull)


def clamp_singular_values_of_G(trainer):
    args = trainer.args
    if not args.sigma_pull and (args.sigma_fixed or args.sigma_ratio):
        clamp_sigma(trainer.G, args.sigma_fixed, args.sigma_ratio)


def start_from(trainer, weights, classes):
    """Take over other weights. If the classes differ, their embeddings stay random."""
    same_classes = classes == weights.classes
    take_over(trainer.G, weights.G or weights.G_ema, same_classes)
    take_over(trainer.G_ema, weights.G_ema, same_classes)
    take_over(trainer.D, weights.D or {}, same_classes)
    say("started from --init" if same_classes else "started from --init, without its classes")
    if not weights.D:
        say(
            "it has no D, whose random weights would spoil G: train D alone for a while "
            "(--g-lr 0), then start from that run"
        )


def take_over(network, state, same_classes):
    """Load a state dict, without the tables of classes unless they are the same classes."""
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Embedding) and not same_classes:
            state = {key: p for key, p in state.items() if not key.startswith(name + ".")}
    network.load_state_dict(state, strict=False)


# -------------------------------------------------------------------------------- signs of collapse
# Sooner or later a GAN collapses: within some hundred steps its images become few, or poor, and
# stay so (section 4). Then one stops, and uses earlier weights. The margins come from healthy runs.

WINDOW_STEPS = 150                      # means over the newest lines cover so many steps
MIN_DIVERSITY = 0.6                     # of the best so far; less: the images have become alike
MIN_D_LOSS = 0.02                       # less: D has won
MAX_GROWTH = 2                          # of sigma_0 in the window; more: it explodes


def collapse_in(lines):
    """Lines of the log, oldest first -> the sign of collapse in the newest ones, or None."""
    first_recent_step = lines[-1]["step"] - WINDOW_STEPS
    earlier = [line for line in lines if line["step"] <= first_recent_step]
    if len(lines) < 4 or not earlier:
        return None
    first_recent = min(len(earlier), len(lines) - 3)        # at least three lines
    recent = lines[first_recent:]
    diversity = mean_of(recent, "diversity")
    D_loss = mean_of(recent, "D_loss")
    best = min(1, max(line["diversity"] for line in earlier))
    sigmas = [line["sigma_0"] for line in recent]
    if not diversity >= MIN_DIVERSITY * best:       # written so that a NaN is a sign, too
        change = f"diversity {diversity:.2f}, before {best:.2f}"
        return f"images of one class have become alike: {change}"
    if 0 <= D_loss < MIN_D_LOSS:        # below 0: Wasserstein's, which is no such sign
        return f"D is never wrong any more: its loss is {D_loss:.4f}"
    if not sigmas[-1] <= MAX_GROWTH * min(sigmas):
        growth = f"from {min(sigmas):.3g} to {sigmas[-1]:.3g}"
        return f"sigma_0 of G's first layer explodes, {growth}"
    return None


def sign_of_collapse(lines, args):
    """What `collapse_in` finds; None if that is expected, or to be a warning only."""
    if args.g_lr == 0:                  # with G frozen, D is expected to win
        return None
    collapse = collapse_in(lines)
    if collapse and args.on_collapse == "warn":
        warn(f"step {lines[-1]['step']}: {collapse}")
        return None
    return collapse


def mean_of(lines, name):
    return sum(line[name] for line in lines) / len(lines)


@torch.no_grad()
def forward_in_eval(trainer, network, inputs, labels):
    """network(input, label) in evaluation mode. inputs: parts of 16 each. -> (N, ...) on the CPU

    By `forward`, which is not compiled: that would take minutes, while other processes wait."""
    network.eval()
    outputs = []
    with trainer.autocast(trainer.half):
        for x, y in zip(inputs, labels.split(16)):
            x = x.to(trainer.device, trainer.dtype)
            out = network.forward(x, y.to(trainer.device))
            outputs.append(out.cpu())
    network.train()
    return torch.cat(outputs)


def accuracy(trainer, images, labels):
    """What part of real images (N, R, R, 3) uint8 does D take for real?"""
    parts = (to_network(x, trainer.device) for x in images.split(16))
    logits = forward_in_eval(trainer, trainer.D, parts, labels)
    return (logits > trainer.threshold).float().mean().item()


def diversity(trainer, images, labels):
    """How much G's images of a class differ, relative to real ones (N, R, R, 3) uint8."""
    noise = generator("diversity", trainer.args.seed)
    z = truncated_normal((len(labels), trainer.config.z_dim), generator=noise)
    fake = forward_in_eval(trainer, trainer.G, z.split(16), labels)
    real = to_network(images, torch.device("cpu"))
    return spread_within(fake, labels) / max(1e-6, spread_within(real, labels))


def spread_within(images, labels):
    """Standard deviation of images (N, 3, R, R) within their classes, after averaging to 8x8.

    Averaged, as a G that has collapsed may still add different noise to the same picture."""
    small = F.adaptive_avg_pool2d(images.float(), 8)        # (N, 3, 8, 8)
    variances = [small[labels == y].var(0, correction=0).mean() for y in labels.unique()]
    variance = torch.stack(variances).mean()
    return variance.sqrt().item()


# ------------------------------------------------------------------------------------------ the log

def read_log(out, step):
    """The lines of log.jsonl up to this step. Those after it are about to be repeated."""
    path = Path(out, "log.jsonl")
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
            numbers = [float(line[name]) for name in ("step", "diversity", "D_loss", "sigma_0")]
            if numbers[0] <= step:
                lines.append(line)
        except (ValueError, LookupError, TypeError):        # half a line
            warn(f"{path} has a line that cannot be read: {text:.40}")
    return lines


def write_log(args, lines):
    """Write all lines to log.jsonl, and show the newest one."""
    path = Path(args.out, "log.jsonl")
    text = "".join(json.dumps(line) + "\n" for line in lines)
    with surviving(path):
        save_text(path, text)
    show(lines[-1], args)


def line_of(trainer, logged, started):
    """The line of the log for some steps: the means of what they have logged, and their time."""
    steps = [torch.stack([*values.values()]) for values in logged]
    means = torch.stack(steps).float().mean(0)      # one number per name
    means = sum_over_processes(means) / processes()
    line = {"step": trainer.step, **dict(zip(logged[0], means.tolist()))}
    stop_if_not_finite(trainer, line)
    line["seconds_per_step"] = (time.perf_counter() - started) / len(logged)
    return line


def real_examples(trainer, data, held_out, args):
    """The real images that G and D are judged by: name in the log -> images, labels. Read once."""
    examples = {"diversity": some_images(data, args.seed, n=64, n_classes=8)}
    # (Without a threshold, as for Wasserstein's loss, only differences of logits mean anything.)
    if held_out and trainer.threshold is not None:
        examples["D_accuracy"] = some_images(data, args.seed, n=256, n_classes=64)
        examples["D_accuracy_held_out"] = some_images(held_out, args.seed, n=256, n_classes=64)
    return examples


def evaluate(trainer, examples, in_full):
    """How much do G's images differ? How large are its weights? Does D know images by heart?

    in_full: singular values of all weights, and D's accuracy."""
    found = {
        "diversity": diversity(trainer, *examples["diversity"]),
        "sigma_0": singular_values(trainer.G.linear.weight, 1).item(),
    }
    if not in_full:
        return found
    sigma = {}
    for letter, network in ("G", trainer.G), ("D", trainer.D):
        for name, layer in matrix_layers(network).items():
            sigma[f"{letter}.{name}"] = singular_values(layer.weight).tolist()
    found["sigma"] = sigma
    for name in examples:
        if name != "diversity":
            found[name] = accuracy(trainer, *examples[name])
    return found


def show(line, args):
    """A line of the log on the screen. On a terminal, each takes the place of the one before."""
    seconds = line["seconds_per_step"]
    hours_left = (args.steps - line["step"]) * seconds / 3600
    words = f"step {line['step']}/{args.steps}  {args.batch / seconds:.0f} img/s"
    words += f"  {hours_left:.1f} h left"
    for name in "D_real", "D_fake", "G_loss", "diversity", "D_accuracy":
        if name in line:
            words += f"  {name} {line[name]:.2f}"
    say(words, end="\033[K\r" if sys.stdout.isatty() else "\n")


# --------------------------------------------------------------------------------------- the folder

def check_run(out, described):
    """Refuse to continue a run with other settings, and list each difference."""
    # An option that is newer than the run is not in its config.json: it had its default.
    before = vars(make_parser().parse_args([]))
    path = Path(out, "config.json")
    with decoding(path, "is damaged; choose another --out"):
        before |= json.loads(path.read_text())
    changed = []
    for name, value in described.items():
        if name not in FREE_TO_CHANGE and before.get(name) != value:
            changed.append(f"{name} was {before.get(name)!s:.60} and is now {value!s:.60}")
    listed = "; ".join(changed)
    require(not changed, f"{out} has other settings: {listed}; choose another --out")


def prepare_folder(out, described):
    """Make the folder and lock it, in the first process, so that no other run works in it.

    Returns the lock, an open file. The system releases it when the process ends."""
    if rank() > 0:
        return None
    for folder in "checkpoints", "samples":
        Path(out, folder).mkdir(parents=True, exist_ok=True)
    lock = open(Path(out, "lock"), "w")
    if fcntl:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(
                f"another process is at work in {out}; stop it or choose another --out"
            ) from None
        except OSError as error:        # a disk without locks
            warn(f"{out} cannot be locked ({error}): start no other run in it")
    # What a process that was killed has left, and nothing else that may lie there.
    for pattern in "config.json.*.tmp", "log.jsonl.*.tmp", "*/step-????????.*.tmp":
        for path in Path(out).glob(pattern):
            path.unlink()
    text = json.dumps(described, indent=1)
    save_text(Path(out, "config.json"), text)
    return lock


@contextmanager
def surviving(path):
    """A full disk, or a folder that has become unwritable, costs a warning, not the run."""
    try:
        yield
    # (torch reports a failed write as a RuntimeError.)
    except (OSError, RuntimeError) as error:
        warn(f"{path} could not be written ({error}); the run goes on without it")


def save_checkpoint(trainer, classes, args):
    """Write the state, then delete what need not be kept. Returns whether it succeeded."""
    stop_if_not_finite(trainer, {})
    path = Path(args.out, "checkpoints", f"step-{trainer.step:08d}.pt")
    with surviving(path):
        if rank() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            content = {"classes": classes, **trainer.state_dict()}
            save_atomically(path, lambda f: torch.save(content, f))
            delete_checkpoints(args, path)
        return True
    return False


def delete_checkpoints(args, newest):
    """Keep the newest --keep checkpoints, and those of every --keep-every steps."""
    paths = [path for path in checkpoints_of(args.out) if path <= newest]
    for path in paths[:-args.keep]:
        step = int(path.stem.removeprefix("step-"))
        if step % args.keep_every > 0:
            path.unlink()


def save_samples(trainer, args):
    """A grid of ten seeds of 16 classes, drawn with EMA weights and standing statistics."""
    G = copy.deepcopy(trainer.G_ema).float()
    standing_statistics(fold_spectral_norm(G))
    if rank() == 0:
        n_classes = min(16, trainer.config.n_classes)
        labels, seeds = np.divmod(np.arange(10 * n_classes), 10)
        grid = image_grid(draw_seeds(G, labels, seeds), columns=10)
        path = Path(args.out, "samples", f"step-{trainer.step:08d}.png")
        with surviving(path):
            save_atomically(path, lambda f: grid.save(f, "PNG"))


# ------------------------------------------------------------------------------------- when to stop

def catch_signals():
    """A list that is no longer empty once a signal asks to stop."""
    received = []

    def note(number, frame):
        received.append(number)

    for number in STOP_SIGNALS:
        signal.signal(number, note)
    return received


STOP_SIGNALS = [signal.SIGINT, signal.SIGTERM]
# A closed terminal. Windows has none, and nohup has told this process to ignore it.
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
    STOP_SIGNALS.append(signal.SIGHUP)


def in_any_process(condition):
    """Does the condition hold in any process? All must ask, and all get the same answer."""
    # The tensor is on the CPU, so that the GPU is not waited for.
    return sum_over_processes(torch.tensor(1 if condition else 0)) > 0


def give_up(sentence):
    """End all processes, for a reason that all of them know. The first one says it."""
    raise UserError(sentence if rank() == 0 else "")


def stop_if_not_finite(trainer, means):
    """Stop before a checkpoint is written that holds a NaN: a network never recovers from one.

    float16 skips an update now and then, and each time the loss scale halves. If that has become
    tiny, it has skipped all of them."""
    wrong = [name for name, mean in means.items() if not math.isfinite(mean)]
    for network in trainer.G, trainer.D, trainer.G_ema:
        wrong += not_finite(network.state_dict())
    if trainer.scaler.get_scale() < 2**-14:
        wrong.append("the scaled loss")
    if wrong:
        give_up(
            f"training has diverged at step {trainer.step}: {wrong[0]} is not finite; nothing of "
            "it was saved. Start from a checkpoint: --init CHECKPOINT --out ANOTHER with lower "
            "learning rates"
        )


# ==================================================================================================
# Part 3: data
# ==================================================================================================

# --------------------------------------------------------------------------- which images, and when

def generator(stream, *numbers):
    """A random generator that depends on the name of the stream and the numbers alone.

    (Give one stream the same count of numbers each time: (1,) and (1, 0) are the same to it.)"""
    words = [zlib.crc32(stream.encode()), *numbers]
    state, = np.random.SeedSequence(words).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state))


def rows_of_batch(args):
    """Which rows of a batch are this process's: an equal part of every micro-batch."""
    part = args.micro_batch // processes()
    return [row for row in range(args.batch) if row // part % processes() == rank()]


def in_order(length, batch, position, seed, rows):
    """Which images come when: epoch after epoch, each in its own order. Yields lists of indices.

    `position` counts the images since the start of the run. It says everything, so a run continues
    with the image that would have come next. Of every batch, this process gets some rows."""
    current_epoch = None
    while True:
        indices = []
        for row in rows:
            epoch, k = divmod(position + row, length)
            if epoch != current_epoch:
                current_epoch = epoch
                permutation = torch.randperm(length, generator=generator("order", seed, epoch))
            indices.append(permutation[k].item())
        yield indices
        position += batch


def batches(data, args, step, device):
    """This process's real images from `step` on, without end: (N, 3, R, R) and labels (N,)."""
    rows = rows_of_batch(args)
    first = step * args.d_steps         # how many batches the run has used
    on_gpu = device.type == "cuda"
    workers = args.workers
    if workers is None:
        workers = (8 if isinstance(data, ImageFolder) else 2) if on_gpu else 0
    can_fork = "fork" in multiprocessing.get_all_start_methods()
    loader = torch.utils.data.DataLoader(
        data,
        batch_sampler=in_order(len(data), args.batch, first * args.batch, args.seed, rows),
        num_workers=workers,
        # A forked worker shares the data set. Any other would be sent a copy.
        multiprocessing_context="fork" if workers and can_fork else None,
        pin_memory=on_gpu,
        worker_init_fn=ignore_signals,
    )
    for number, (images, labels) in enumerate(loader, start=first):
        x = to_network(images, device)  # (N, 3, R, R)
        mirror = generator("mirror", args.seed, number)
        mirrored = torch.rand(args.batch, generator=mirror)[rows] < args.flip
        mirrored = to_device(mirrored, device).view(-1, 1, 1, 1)
        yield torch.where(mirrored, x.flip(3), x), to_device(labels, device)


def next_batches(real_batches, n):
    """The next n batches, and what is wrong if they cannot be had: a list, a sentence or ""."""
    try:
        return [next(real_batches) for _ in range(n)], ""
    except UserError as error:          # that of a worker comes after its traceback
        return [], str(error).rpartition("UserError: ")[2].strip()
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        return [], (
            "a process that reads images was killed: there is too little memory, or shared memory "
            "(docker run --shm-size 8g); or give fewer --workers"
        )


def ignore_signals(worker):
    """Ctrl-C reaches the workers, too. They go on, so that the training process can save."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def to_device(tensor, device):
    """A copy on the device. From pinned memory: else the CPU would wait for the GPU."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def to_network(images, device):
    """(N, R, R, 3) uint8 -> (N, 3, R, R) in [-1, 1], channels last in memory."""
    return to_device(images, device).permute(0, 3, 1, 2).float() / 127.5 - 1


def some_images(data, seed, n, n_classes):
    """At most n images, of some classes chosen at random: (n, R, R, 3) uint8, labels (n,)."""
    chosen = np.random.default_rng(seed).permutation(np.unique(data.labels))[:n_classes]
    pairs = []
    for y in chosen:
        rows = np.flatnonzero(data.labels == y)[:n // len(chosen)]
        pairs += [data[i] for i in rows]
    images, labels = zip(*pairs)
    return torch.from_numpy(np.stack(images)), torch.tensor(labels)


# ---------------------------------------------------------------------------------------- data sets

def open_data(source, resolution=None, held_out=False, labelled=True):
    """`shapes`, a packed folder, an array FILE.npz, or a folder of images, as a data set.

    resolution: that of the images; None for their own. labelled: are their classes needed?"""
    path = Path(source)
    if source == "shapes":
        if path.exists():
            warn("shapes are the drawn ones; for what lies in the folder, type ./shapes")
        return Shapes(resolution or 32, held_out)
    if path == Path("data/cifar10"):
        prepare_cifar10(path)
    if path.suffix.lower() == ".npz":
        arrays = read_npz(path, ["images", "labels", "classes"] if labelled else ["images"])
        require("images" in arrays, f"{path} holds no images, as arr_0, x or images")
        if labelled:
            require("labels" in arrays, f"{path} holds no labels, as arr_1, y or labels")
        with decoding(path, "does not hold images and labels"):
            data = Arrays(**arrays)
    elif (path / "packed.json").exists():
        with decoding(path, "is no packed folder"):
            data = Packed(path)
    else:
        require(path.is_dir(), f"{source} is no folder of images, and no .npz file of arrays")
        data = ImageFolder(path, resolution)
    require(
        resolution in (None, data.resolution),
        f"{source} has images of {data.resolution} pixels, not {resolution}; make it again",
    )
    return data


# What sample.py and other programs call the arrays of images and labels.
ARRAY_NAMES = {"arr_0": "images", "x": "images", "arr_1": "labels", "y": "labels"}


def read_npz(path, wanted):
    """Those of the wanted arrays that a file of np.savez holds: name -> array."""
    with decoding(path, "cannot be used as arrays"), np.load(path) as stored:
        names = {key: ARRAY_NAMES.get(key, key) for key in stored}
        found = {name: stored[key] for key, name in names.items() if name in wanted}
        twice = [name for name in wanted if [*names.values()].count(name) > 1]
        require(not twice, f"several are called {twice}")
        return found


class DataSet:
    """`resolution`, `classes` (names), `labels` (n,). Item i: image (R, R, 3) uint8, label."""

    def __len__(self):
        return len(self.labels)

    def image(self, i):
        """Image i alone, or None if it cannot be read."""
        return self[i][0]


class Arrays(DataSet):
    """Images in a common layout, labels (N,) and the names of the classes."""

    def __init__(self, images, labels=None, classes=None):
        self.images = as_pixels(images)
        n = len(self.images)
        self.labels = np.zeros(n, int) if labels is None else np.asarray(labels)
        n_classes = max(n, 1000) if classes is None else len(classes)
        require(
            self.labels.shape == (n,)
            and self.labels.dtype.kind in "iu"
            and 0 <= self.labels.min() <= self.labels.max() < n_classes,
            f"labels must be {n} whole numbers from 0 to {n_classes - 1}, one for each image",
        )
        if classes is None:
            classes = range(int(self.labels.max()) + 1)
        self.classes = [str(name) for name in classes]
        empty = len(self.classes) - len(np.unique(self.labels))
        if empty:
            warn(f"{empty} of {len(self.classes)} classes have no images")
        self.resolution = self.images.shape[1]

    def __getitem__(self, i):
        # np.array makes a copy, which may be written to.
        return np.array(self.images[i]), int(self.labels[i])


def as_pixels(images):
    """Images (N, 3, R, R), or grey (N, R, R) or (N, 1, R, R) -> (N, R, R, 3). All are uint8."""
    shape = images.shape
    if images.ndim == 3:
        images = images[..., None]      # (N, R, R, 1)
    if images.ndim == 4 and images.shape[1] in (1, 3):
        images = images.transpose(0, 2, 3, 1)
    if images.shape[3:] == (1,):
        images = images.repeat(3, axis=3)
    square = images.shape[1:2] * 2 + (3,)           # (R, R, 3)
    require(
        images.dtype == np.uint8 and images.size > 0 and images.shape[1:] == square,
        f"{images.dtype} of shape {shape}; images must be uint8, 0 to 255, of shape (N, R, R, 3)",
    )
    return images


class Packed(Arrays):
    """A folder that `pack` wrote: images.npy (N, R, R, 3) uint8, packed.json (labels, classes)."""

    def __init__(self, folder):
        self.folder = folder
        described = json.loads((folder / "packed.json").read_text())
        super().__init__(np.load(folder / "images.npy", mmap_mode="r"), **described)

    def __reduce__(self):
        """How it is sent to a worker process: that opens the folder for itself."""
        return Packed, (self.folder,)


def pack(data, folder, workers=1):
    """Decode a data set once, into a packed folder. If it is interrupted, start again."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    require(not own_files(folder), f"{folder} holds files already; choose another")
    shape = (data.resolution, data.resolution, 3)
    labels = []                         # of the images that can be read

    def write_header(f, n):             # always of the same length
        header = {"descr": "|u1", "fortran_order": False, "shape": (n, *shape)}
        np.lib.format.write_array_header_1_0(f, header)

    def write(f):
        write_header(f, len(data))
        if hasattr(os, "posix_fallocate"):  # a disk that is too small says so now
            os.posix_fallocate(f.fileno(), 0, f.tell() + len(data) * math.prod(shape))
        for block in progress(np.arange(len(data)), 512, "packing"):
            for i, image in zip(block, readers.map(data.image, block)):
                if image is not None:
                    f.write(image.tobytes())
                    labels.append(int(data.labels[i]))
        require(labels, "none of the images can be read")
        f.truncate()
        f.seek(0)
        write_header(f, len(labels))
        text = json.dumps({"labels": labels, "classes": data.classes})
        save_text(folder / "packed.json", text)

    with ThreadPool(workers) as readers:    # decoding does not keep other threads waiting
        save_atomically(folder / "images.npy", write)       # gets its name last
    say(f"packed: {len(labels):,} images in {folder}")


def start_packing(args):
    """What --pack does. One process does it alone, so what is left was left by one that is gone."""
    for path in Path(args.pack).glob("images.npy.*.tmp"):
        path.unlink()
    data = open_data(args.data, model_config(args).resolution)
    pack(data, args.pack, args.workers or os.cpu_count())


def own_files(folder):
    """Names in a folder, other than those of attempts of `pack` that were interrupted."""
    temporary = ("images.npy.", "packed.json")
    return [name for name in os.listdir(folder) if not name.startswith(temporary)]


class ImageFolder(DataSet):
    """A folder with one sub-folder of images per class, in sorted order, or of images of one class.

    Any type, colour mode and size that Pillow opens. A file that cannot be decoded is named in a
    warning and replaced by the next of its class. resolution None: each image has its own size."""

    def __init__(self, root, resolution):
        images, folders, left_out = listing(root)
        found = {root: images}
        self.classes = ["images"]       # one name, wherever they lie
        if folders:
            found = {}
            self.classes = [folder.name for folder in folders]
            left_out += len(images)     # beside the sub-folders
        for folder in folders:
            found[folder], deeper, others = listing(folder)
            left_out += len(deeper) + others
        for folder, images in found.items():
            require(
                images,
                f"{folder} holds no images; --data has one sub-folder of images per class, or "
                "images of one class: are they one level down, or up?",
            )
        if left_out:
            warn(f"{left_out} files and folders in {root} are left out: not called like images, "
                 "beside or too deep in the folders of classes, or links that lead nowhere")
        # An array of bytes, which the workers share. A list would be copied into each of them: even
        # reading a Python object writes to its memory, as references to it are counted there.
        lists = [*found.values()]
        self.paths = np.concatenate([np.array(images, dtype=bytes) for images in lists])
        self.labels = np.repeat(np.arange(len(lists)), [len(images) for images in lists])
        self.resolution = resolution
        self.broken = set()

    def image(self, i):
        if i in self.broken:
            return None
        path = os.fsdecode(self.paths[i])
        content = read_patiently(path)
        try:
            with decoding(path, "was skipped"):
                return decode_image(content, self.resolution)
        except UserError as error:
            self.broken.add(i)
            warn(error)
            return None

    def __getitem__(self, i):
        label = int(self.labels[i])
        first, end = np.searchsorted(self.labels, [label, label + 1])       # of its class
        for k in itertools.chain(range(i, end), range(first, i)):
            image = self.image(k)
            if image is not None:
                return image, label
        raise UserError(f"none of the images of class {self.classes[label]} can be read")


def listing(folder):
    """What a folder holds, but for hidden files: images, sub-folders, and how many others.

    Images are files with an ending that Pillow can open. Their paths are bytes, and sorted."""
    known = Image.registered_extensions().items()
    endings = {ending for ending, kind in known if kind in Image.OPEN}
    images = []
    folders = []
    others = 0
    for entry in os.scandir(folder):
        path = Path(entry)
        if path.name[0] == ".":
            continue
        if entry.is_dir():
            folders.append(path)
        elif entry.is_file() and path.suffix.lower() in endings:
            images.append(bytes(path))
        else:
            others += 1
    return sorted(images), sorted(folders), others


WAITS = [0.1, 0.3, 1, 3, 10, 20, 30, None]  # seconds between attempts to read; None: no more


def read_patiently(path):
    """The bytes of a file. A disk may be away for a while, such as one on a network."""
    for seconds in WAITS:
        try:
            return Path(path).read_bytes()
        except OSError as error:
            if seconds is None:
                raise UserError(f"{error}, for a minute") from None
            warn(f"{error}; trying again in {seconds} s")
            time.sleep(seconds)


Image.MAX_IMAGE_PIXELS = None           # the user's own files may have any size


def decode_image(content, resolution=None):
    """The bytes of any image file -> (R, R, 3) uint8: its central square, area-averaged to R
    (appendix C). resolution None: as it is, (H, W, 3)."""
    with Image.open(io.BytesIO(content)) as image:
        if resolution:
            # A large JPEG can be decoded at 1/2, 1/4 or 1/8 of its size, which is much faster.
            image.draft(None, (2 * resolution, 2 * resolution))
        image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":       # 16-bit grey, which Pillow would clip to white
            raise ValueError("its pixels have more than 8 bits per colour")
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        image = image.convert("RGB")
    if resolution is None:
        return np.array(image)
    filtered = Image.Resampling.BICUBIC     # to enlarge
    if min(image.size) >= resolution:
        filtered = Image.Resampling.BOX     # to reduce: the mean of an area
    return np.array(ImageOps.fit(image, (resolution, resolution), filtered))


CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"


def prepare_cifar10(path):
    """Fetch CIFAR-10 into data/cifar10, unless something lies there already."""
    if (path / "images.npy").exists():
        return
    if path.exists() and own_files(path):
        say(f"{path} holds images of its own: name them by --data, or move them to get CIFAR-10")
        return
    if LOCAL_RANK == 0:
        fetch_cifar10(path.parent)
    wait_for(path / "images.npy")


def fetch_cifar10(folder):
    """The official archive of CIFAR-10: fetched once, checked, and packed into two folders."""
    archive = fetch(CIFAR10_URL, folder / "cifar-10-binary.tar.gz", CIFAR10_SHA256)
    training = [f"data_batch_{k}.bin" for k in range(1, 6)]
    with tarfile.open(archive) as tar:
        classes = read_member(tar, "batches.meta.txt").decode().split()
        for name, files in ("cifar10-test", ["test_batch.bin"]), ("cifar10", training):
            content = b"".join(read_member(tar, file) for file in files)
            records = np.frombuffer(content, np.uint8).reshape(-1, 1 + 3 * 32 * 32)
            labels = records[:, 0]
            images = records[:, 1:].reshape(-1, 3, 32, 32)
            if not (folder / name / "images.npy").exists():
                pack(Arrays(images, labels, classes), folder / name)


def read_member(tar, name):
    return tar.extractfile(f"cifar-10-batches-bin/{name}").read()


# ------------------------------------------------------------------------------------- drawn shapes

SHAPES = "arrow circle crescent cross diamond heart ring square star triangle".split()
DRAWN = """
....#.... ..#####.. ...####.. ...###... ....#.... .##...##. ..#####.. ......... ....#.... ....#....
...###... .#######. .####.... ...###... ...###... ####.#### .#######. .#######. ....#.... ....#....
..#####.. ######### ####..... ...###... ..#####.. ######### ###...### .#######. ...###... ...###...
.#######. ######### ###...... ######### .#######. ######### ##.....## .#######. ######### ...###...
...###... ######### ###...... ######### ######### .#######. ##.....## .#######. .#######. ..#####..
...###... ######### ###...... ######### .#######. .#######. ##.....## .#######. ..#####.. ..#####..
...###... ######### ####..... ...###... ..#####.. ..#####.. ###...### .#######. ..#####.. .#######.
...###... .#######. .####.... ...###... ...###... ...###... .#######. .#######. .###.###. .#######.
...###... ..#####.. ...####.. ...###... ....#.... ....#.... ..#####.. ......... .#.....#. #########
"""


class Shapes(DataSet):
    """Ten classes of drawn shapes: bright on dark, of any hue, size and place. Image i is fixed."""

    def __init__(self, resolution, held_out=False):
        self.resolution = resolution
        self.classes = SHAPES
        self.labels = np.arange(1_000_000) % len(SHAPES)
        self.first = len(self.labels) if held_out else 0
        self.masks = [shape_mask(k) for k in range(len(SHAPES))]

    def __getitem__(self, i):
        R = self.resolution
        rng = np.random.default_rng(self.first + i)
        side = int(R * rng.uniform(0.64, 0.84))
        corner = (R - side) / 2 + R * rng.uniform(-0.06, 0.06, 2)
        mask = self.masks[i % 10].rotate(rng.uniform(-12, 12), Image.Resampling.BILINEAR)
        # A saturated colour of any hue has one channel full, one empty to half, one in between.
        bright = rng.permutation(rng.integers((200, 0, 0), (256, 100, 256)))
        dark = rng.integers(0, 77, 3)
        image = Image.new("RGB", (R, R), tuple(dark))
        small = mask.resize((side, side), Image.Resampling.BOX)
        image.paste(tuple(bright), tuple(corner.astype(int)), small)
        return np.array(image), i % 10


def shape_mask(k):
    """Shape k, white on black, 88 pixels wide."""
    lines = [line.split()[k] for line in DRAWN.strip().splitlines()]
    # (9, 9) cells: slopes are stairs. A blur of half a cell makes them slopes again.
    cells = np.array([list(line) for line in lines]) == "#"
    mask = Image.fromarray(np.pad(np.uint8(255 * cells), 1))
    mask = mask.resize((88, 88), Image.Resampling.BICUBIC)
    mask = mask.filter(ImageFilter.GaussianBlur(4))
    return mask.point(lambda value: 255 if value > 127 else 0)


if __name__ == "__main__":
    run(main)
