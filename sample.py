"""Draw images with a trained generator.

    python sample.py --class 207 --trunc 0.5                by the newest run in runs/, or biggan-deep-256
    python sample.py --weights biggan-deep-256 --class "golden retriever"   by name, the model's or ImageNet's
    python sample.py --weights shapes --class star heart    the small model that comes along, without network
    python sample.py --weights runs/cifar10 --sheet truncation --class ship
    torchrun --nproc_per_node=8 sample.py --npz 50000       an array for metrics.py, on eight GPUs

One row per class. The noise of column i (--npz: of image i) depends on seed + i alone: --seed 17 draws the
second of --seed 16.

--weights takes a run folder, a checkpoint, a name (shapes, biggan-deep-128, -256, -512), a path or a URL:
BigGAN-deep as converted by Hugging Face, or G_ema.pth of the paper's author's PyTorch code.

--trunc T has two meanings. In the paper, and for weights trained here, components of the noise z outside
[-T, T] are resampled (section 3.1). For the published BigGAN-deep weights z is T times a normal distribution
truncated to [-2, 2], and T is 1 unless given. At 0.5 their standard deviations are 0.28 and 0.44. Batch
norm's statistics must be those of the same noise: stored with the weights (BigGAN-deep's for all T; the
port's and those of --export for untruncated noise), or else gathered at each start.

Reading order: errors, files and processes, which train.py and metrics.py share; weights and their origins;
drawing; classes; sheets; the command. In a hurry: `from_deep`, `prepare`, `draw`.
"""

import argparse
import ctypes
import dataclasses
import inspect
import math
import multiprocessing
import os
import re
import sys
import time
import traceback
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch.distributed.rendezvous import rendezvous

from biggan import (MODELS, Discriminator, Generator, ModelConfig, fold_spectral_norm, processes, rank,
                    scaled_normal, standing_statistics, truncated_normal, widths)


# ---------------------------------------------------------------- errors, files, processes

class UserError(Exception):
    """A user's mistake, as one sentence that names the thing and the remedy. Ends a command with status 2."""


# Of torchrun: how many processes, and which of those on its machine this one is.
WORLD, LOCAL_RANK = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))


def run(main):
    """Run a command. A UserError, a file that cannot be used and the end of memory are one line on stderr and
    status 2."""
    try:
        return main(sys.argv[1:])
    except Exception as error:
        sentence, status = str(error).rpartition("UserError: ")[2], 2       # after a worker's traceback
        no_memory = re.search("ALLOC_FAILED|out of memory|DefaultCPU|Unable to allocate", sentence)
        if no_memory:
            sentence = "memory ran out; in training halve --micro-batch, or choose a smaller --model or --ch"
        elif not isinstance(error, (UserError, OSError, zipfile.BadZipFile)):
            traceback.print_exc()
            status = 1
        # Until the processes have met, all find the same mistake: the first of each machine says it.
        if status == 2 and (no_memory or processes() > 1 or LOCAL_RANK == 0):
            print("error:", " ".join(sentence.split()), file=sys.stderr)
    # A usual exit would wait for the workers, which ignore signals.
    leave = os._exit if multiprocessing.active_children() else sys.exit
    leave(status)


def say(*words):
    """Print, in the first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(*words, flush=True)


def warn(*words):
    print("warning:", *words, file=sys.stderr, flush=True)


def progress(items, total, what):
    """Yield the items, of which there are `total`, and say every ten seconds how far it is."""
    started = said = time.perf_counter()
    for done, item in enumerate(items):
        now = time.perf_counter()
        if done and now - said > 10:
            said = now
            say(f"{what}: {done / total:.0%}, {(now - started) * (total / done - 1) / 60:.1f} minutes left")
        yield item


def read_options(table, arguments, description, choices={}):
    """Command line -> {name: value} of the options typed.

    table: a dataclass whose fields are the options; the comments behind them are what --help says."""
    parser = argparse.ArgumentParser(usage="%(prog)s [options], see --help", description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     argument_default=argparse.SUPPRESS, allow_abbrev=False)
    comments = dict(re.findall(r"^    (\w+): .*?# (.*)", inspect.getsource(table), re.M))
    for f in dataclasses.fields(table):
        kind = {"metavar": "X", "type": f.type}
        if f.type is bool:
            kind = {"action": "store_true"}
        elif f.name in choices:
            kind = {"choices": choices[f.name]}
        elif f.type in (list[str], list[float]):
            kind |= {"nargs": "+", "type": f.type.__args__[0]}
        default = f" (default: {f.default})" if f.default else ""
        parser.add_argument("--" + f.name.strip("_").replace("_", "-"), dest=f.name, **kind,
                            help=comments[f.name] + default)
    return vars(parser.parse_args(arguments))


def check_output(path, suffix):
    """Refuse an output path that could not be written in the end, before any work is done."""
    path = Path(path)
    if path.suffix != suffix or not os.access(path.parent, os.W_OK):
        raise UserError(f"the output {path} must end in {suffix} and lie in a folder that exists and can be "
                        "written to")
    return path


def save_atomically(path, write):
    """write(file), then rename it: whoever opens `path` finds the old file or the new one, whole."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())                    # on the disk before the name points at it
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def pick_device():
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False     # float32 is float32
    torch.cuda.set_device(LOCAL_RANK)
    return torch.device("cuda", LOCAL_RANK)


def start_processes():
    """Join the other processes, if torchrun has started several. Returns when all have joined."""
    if WORLD > 1:
        # A prefix per restart: torchrun --max-restarts keeps the dead processes' addresses in the store.
        store, own_rank, size = next(rendezvous("env://"))
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=own_rank, world_size=size)


def stop_processes():
    if processes() > 1:
        dist.barrier()
        dist.destroy_process_group()


def own_rows_of(n, at_once, what):
    """Yields this process's part of the rows 0 to n - 1, some at once, and says how far it is."""
    own = np.array_split(np.arange(n), processes())[rank()]
    blocks = np.array_split(own, -(-len(own) // at_once))
    return progress(blocks, len(blocks), what)


def gather_rows(own):
    """Each process's rows, in blocks -> the whole array, in all processes."""
    own = np.concatenate(own)
    parts = [own] * processes()
    if processes() > 1:
        dist.all_gather_object(parts, own)
    return np.concatenate(parts)


def keep_freed_memory():
    """Have the C library keep the memory of freed tensors. Else the system clears every page of a large block
    before handing it out again: on a CPU that costs training 10 to 25% and drawing up to half."""
    if sys.platform == "linux" and not torch.cuda.is_available():
        c_library = ctypes.CDLL(None)
        c_library.mallopt(-4, 0)                    # M_MMAP_MAX: no block outside the heap
        c_library.mallopt(-1, -1)                   # M_TRIM_THRESHOLD: keep all of it


# ---------------------------------------------------------------- weights and their origins

HERE = Path(__file__).resolve().parent
CACHE = Path(torch.hub.get_dir(), "biggan")          # in ~/.cache/torch

DEEP = "https://s3.amazonaws.com/models.huggingface.co/biggan/{}-pytorch_model.bin"
BY_NAME = {name: DEEP.format(name) for name in MODELS if "deep" in name}
BY_NAME["shapes"] = f"{HERE}/docs/shapes.pt"

# What others call a tensor, and what it is called here: patterns, applied one after the other.
DEEP_NAMES = r"""
    ^generator\.layers\.8\.snconv1x1_     attention.
    ^generator\.layers\.8\.               attention.
    ^generator\.layers\.9                 blocks.8
    ^generator\.layers\.10                blocks.9
    ^generator\.layers\.11                blocks.10
    ^generator\.layers\.12                blocks.11
    ^generator\.layers\.13                blocks.12
    ^generator\.layers\.14                blocks.13
    ^generator\.layers                    blocks
    ^generator\.bn\.weight                output_norm.gain
    ^generator\.bn                        output_norm
    ^generator\.gen_z                     linear
    ^generator\.conv_to_rgb               to_rgb
    ^embeddings                           shared
    (bn|conv)_3                           \g<1>4
    (bn|conv)_2                           \g<1>3
    (bn|conv)_1                           \g<1>2
    (bn|conv)_0                           \g<1>1
    o_conv                                o
    \.scale                               .gain
    \.offset                              .bias
    running_(mean|var)s                   running_\1
    weight_orig                           weight
    weight_(u|v)                          \1
"""
PORT_NAMES = r"""
    ^output_layer\.0                      output_norm
    ^output_layer\.2                      to_rgb
    ^blocks\.\d+\.1                       attention
    ^(blocks\.\d+)\.0                     \1
    stored_                               running_
    u0$                                   u
"""


@dataclass
class Weights:
    """What a file of weights holds, whatever its origin, in the names and layouts of biggan.py."""
    config: ModelConfig
    G_ema: dict                     # name -> tensor
    classes: list = None            # their names
    G: dict = None                  # to train on, where they are at hand
    D: dict = None
    scaled: bool = False            # of BigGAN-deep: truncation scales the noise, and W is divided by sigma
    moments: dict = None            # batch norm's: name -> (C,) or (truncation values, C)


def read_tensors(path):
    """What torch.save wrote, if it is tensors and plain values; never runs code. Raises UserError."""
    try:
        zipped = zipfile.is_zipfile(path)           # torch's format since 2020, with checksums
        if zipped and zipfile.ZipFile(path).testzip():
            raise ValueError("wrong checksum")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception:                               # torch and zipfile raise what their parsers do
        raise UserError(f"{path} was not loaded: it is damaged, no file of weights, or holds more than "
                        "tensors and plain values and could run code") from None


def checkpoints_of(run_folder):
    """Paths of a run's checkpoints, oldest first."""
    return sorted(Path(run_folder, "checkpoints").glob("step-" + 8 * "[0-9]" + ".pt"))


def newest_checkpoint(run_folder):
    """The newest undamaged checkpoint of a run and its path, or (None, None). Warns of damaged ones."""
    paths = checkpoints_of(run_folder)
    for path in reversed(paths):
        try:
            return read_tensors(path), path
        except UserError as error:
            warn(f"{error}; trying the one before")
    if paths:
        raise UserError(f"all checkpoints in {run_folder} are damaged; restore one or choose another folder")
    return None, None


def wait_for(path):
    """Until the first process of this machine has made this file."""
    while not path.exists():
        time.sleep(0.5)
    return path


def fetch(url, path, hash_prefix=None):
    """Download a file, once; the first process of each machine does it. Returns the path."""
    if LOCAL_RANK == 0 and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        print("fetching", url, file=sys.stderr)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix, progress=sys.stderr.isatty())
        except Exception as error:                  # no network, no such file, another hash
            raise UserError(f"{url}: {error}; fetch it elsewhere and put it at {path}") from None
    return wait_for(path)


def find_weights(weights):
    """What was typed after --weights, or None -> the content of the file, and its path."""
    if weights is None:
        newest = max(Path("runs").glob("*/checkpoints/step-*.pt"), key=os.path.getmtime, default=None)
        weights = newest.parent.parent if newest else "biggan-deep-256"
        say(f"drawing with {weights}; --weights chooses another")
    source = BY_NAME.get(weights, str(weights))
    path = fetch(source, CACHE / re.sub(r"\W+", "-", source)) if "://" in source else Path(source)
    if checkpoints_of(path):
        return newest_checkpoint(path)
    if not path.is_file():
        raise UserError(f"--weights {weights} is neither a run folder with a checkpoint, nor a file, a URL "
                        f"or one of {', '.join(BY_NAME)}")
    return read_tensors(path), path


def rename(state, patterns):
    """Another's state -> one with our names, without sigma (sv0), which u tells as well."""
    renamed = {}
    for name, tensor in state.items():
        for line in patterns.strip().splitlines():
            name = re.sub(*line.split(), name)
        renamed[name] = tensor.flatten() if name.endswith(".u") else tensor
    return {name: tensor for name, tensor in renamed.items() if "sv0" not in name}


def moments_of(state):
    return {name: tensor for name, tensor in state.items() if "running_" in name}


def count_blocks(state):
    return len({name.split(".")[1] for name in state if name.startswith("blocks.")})


def from_deep(state):
    """DeepMind's BigGAN-deep as converted by Hugging Face. There is no D."""
    state = rename(state, DEEP_NAMES)
    for name in [name[:-1] for name in state if name.endswith(".u")]:
        # sigma as it was when they were published, u^T W v: another power iteration would change the images.
        W, v = state[name + "weight"], state.pop(name + "v")
        state[name + "weight"] = W / (state[name + "u"] @ W.flatten(1) @ v)
    state["shared.weight"] = state["shared.weight"].T.contiguous()  # there a linear layer on one-hot vectors
    for name in "linear.weight", "linear.bias", "linear.u":         # there rows are 4 x 4 x C, here C x 4 x 4
        rows = state[name]
        state[name] = rows.view(16, len(rows) // 16, -1).transpose(0, 1).reshape(rows.shape)
    state["attention.gamma"] = state["attention.gamma"].squeeze()
    moments = moments_of(state)                     # of truncations 0, 0.02, ... 1
    state |= {name: table[-1] for name, table in moments.items()}
    model, ch = MODELS[f"biggan-deep-{4 * 2**(count_blocks(state) // 2)}"], len(state["output_norm.gain"])
    config = dataclasses.replace(model, ch=ch, n_classes=len(state["shared.weight"]), rgb_filters=ch)
    return Weights(config, state, scaled=True, moments=moments)


def from_port(state, path):
    """The paper's author's PyTorch code: G_ema.pth or G.pth, and D.pth beside it."""
    beside = path.with_name(re.sub("^G(_ema)?", "D", path.name))
    G, D = rename(state, PORT_NAMES), None
    if beside != path and beside.is_file():
        D = rename(read_tensors(beside), PORT_NAMES)
    model, n_classes = MODELS[f"biggan{4 * 2**count_blocks(G)}"], len(G["shared.weight"])
    ch = G["to_rgb.weight"].shape[1] // widths(model.g_channels, 1)[-1]
    config = dataclasses.replace(model, ch=ch, n_classes=n_classes, sn_eps=1e-6, g_sn_eps=1e-6,
                                 bn_eps=1e-5)
    return Weights(config, G, D=D, moments=moments_of(G))


def from_own(content):
    """A checkpoint of train.py, or a file that --export wrote."""
    config, G_ema = ModelConfig(**content["model"]), content["G_ema"]
    moments = moments_of(G_ema) if "standing" in content else None
    return Weights(config, G_ema, content["classes"], content.get("G"), content.get("D"), moments=moments)


def read_weights(weights=None):
    """--weights, or None for the newest run -> Weights, finite and of the right shapes. Raises UserError."""
    content, path = find_weights(weights)
    try:
        if "G_ema" in content:
            found = from_own(content)
        elif "embeddings.weight" in content:
            found = from_deep(content)
        else:
            found = from_port(content, path)
        found.classes = found.classes or class_names(found.config.n_classes)
        assert len(found.classes) == found.config.n_classes, "not as many names as classes"
        for state, network in (found.G_ema, Generator), (found.G, Generator), (found.D, Discriminator):
            if state:
                with torch.device("meta"):          # shapes without memory
                    network(found.config).load_state_dict(state, assign=True)
                wrong = [name for name, tensor in state.items() if not tensor.isfinite().all()]
                assert not wrong, f"{wrong} are not finite"
    except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{path} holds no BigGAN ({str(error)[:200]}); name another") from None
    return found


# ---------------------------------------------------------------- drawing

def read_generator(weights=None):
    """The EMA generator of these weights in eval mode, on the GPU if there is one, for `prepare`."""
    keep_freed_memory()
    found = read_weights(weights)
    config = dataclasses.replace(found.config, g_sn_eps=None) if found.scaled else found.config
    with torch.device("meta"):
        G = Generator(config)
    G.load_state_dict(found.G_ema, assign=True)
    fold_spectral_norm(G.requires_grad_(False).eval().float())
    G.classes, G.scaled, G.moments = found.classes, found.scaled, found.moments
    return G.to(pick_device(), memory_format=torch.channels_last)


def prepare(G, truncation=None):
    """Give G its noise, G.noise(shape, generator=None) -> z, and batch norm statistics for it. Returns G.

    truncation: None for the widest that the weights were made for."""
    noise, widest = (scaled_normal, 1.0) if G.scaled else (truncated_normal, math.inf)
    t = widest if truncation is None else truncation
    if not 0 < t <= widest:
        raise UserError(f"--trunc {truncation:g} must be above 0; these weights allow {widest:g} at most")
    G.noise = lambda shape, generator=None: noise(shape, t, generator)
    if G.moments and (G.scaled or truncation is None):
        G.load_state_dict({name: interpolate(m, t) for name, m in G.moments.items()}, strict=False)
        return G
    return standing_statistics(G, noise=G.noise)


def interpolate(moments, truncation):
    """Moments (C,), or (values, C) published for evenly spaced truncations in [0, 1] -> (C,) for this one."""
    if moments.dim() == 1:
        return moments
    position = truncation * (len(moments) - 1)
    below, above = moments[math.floor(position)], moments[math.ceil(position)]
    return torch.lerp(below, above, position % 1)


def load_generator(weights=None, truncation=None):
    """A generator in eval mode, whatever its weights' origin, on the GPU if there is one, with the statistics
    of this truncation: G(z, y) with z = G.noise((N, G.config.z_dim)), or draw(G, z, y)."""
    return prepare(read_generator(weights), truncation)


@torch.no_grad()
def draw(G, z, y):
    """G(z, y) as pixels (N, R, R, 3) uint8, 16 images at a time."""
    device, images = next(G.parameters()).device, []
    for part_z, part_y in zip(z.split(16), y.split(16)):
        x = G(part_z.to(device), part_y.to(device))  # (16, 3, R, R) in [-1, 1]
        if not x.isfinite().all():                  # a byte would hide it
            raise UserError("the generator draws pixels that are not finite; use an earlier checkpoint")
        images.append(((x + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy())
    return np.concatenate(images)


def seeded_noise(seeds, z_dim, noise=truncated_normal):
    """z (N, z_dim), row i from seeds[i] alone."""
    generators = (torch.Generator().manual_seed(int(seed)) for seed in seeds)
    return torch.cat([noise((1, z_dim), generator=generator) for generator in generators])


def draw_seeds(G, labels, seeds, noise=truncated_normal):
    """Images of these labels and seeds (N, R, R, 3) uint8: the same image whatever else is drawn with it."""
    return draw(G, seeded_noise(seeds, G.config.z_dim, noise), torch.as_tensor(labels))


def image_grid(images, columns):
    """(N, R, R, 3) uint8 -> a Pillow image of them in rows, on white."""
    images = np.pad(images, ((0, -len(images) % columns), (1, 1), (1, 1), (0, 0)), constant_values=255)
    N, H, W, _ = images.shape
    rows = images.reshape(N // columns, columns, H, W, 3).swapaxes(1, 2)
    return Image.fromarray(rows.reshape(-1, columns * W, 3))


def write_npz(G, classes, n, seed, out):
    """n images, the classes in turn, as arr_0 (n, R, R, 3) uint8 and arr_1 (n,). All processes draw."""
    labels = np.resize(classes, n)
    drawn = [draw_seeds(G, labels[rows], seed + rows, G.noise) for rows in own_rows_of(n, 16, "drawing")]
    images = gather_rows(drawn)
    if rank() == 0:
        save_atomically(out, lambda f: np.savez(f, images, labels))


def export(weights, out):
    """The EMA generator alone, to give away: matrices in half precision, statistics of untruncated noise."""
    found = read_weights(weights)
    if found.scaled:
        raise UserError("these weights are a generator alone already; copy the file")
    state = found.G_ema | moments_of(load_generator(weights).cpu().state_dict())
    state = {name: tensor.half() if tensor.dim() > 1 else tensor for name, tensor in state.items()}
    content = {"model": dataclasses.asdict(found.config), "classes": found.classes, "standing": True}
    save_atomically(out, lambda f: torch.save({**content, "G_ema": state}, f))


# ---------------------------------------------------------------- classes

@cache
def imagenet_words():
    """WordNet's name of each ImageNet class -> its words, in the order of the indices."""
    lines = Path(HERE, "docs/imagenet.txt").read_text().splitlines()
    return {line[:9]: line[10:].split(", ") for line in lines if line[0] != "#"}


def class_names(n):
    """Names for the classes of weights that come without: ImageNet's, or numbers."""
    return list(imagenet_words()) if n == 1000 else [str(k) for k in range(n)]


def class_title(classes, k):
    return f"{imagenet_words().get(classes[k], [classes[k]])[0]} ({k})"


def class_indices(wanted, classes):
    """What was typed after --class -> class indices: a name, ImageNet word, number, or part of one name."""
    names = [[word.lower() for word in (name, *imagenet_words().get(name, []))] for name in classes]
    indices = []
    for text in map(str.lower, wanted):
        exact = [k for k, words in enumerate(names) if text in words or text == "all"]
        number = [k for k in range(len(classes)) if text == str(k)]
        part = re.compile(rf"\b{re.escape(text)}\b")
        found = exact or number or [k for k, words in enumerate(names) if part.search(" ".join(words))]
        if len(found) != 1 and text != "all":
            titles = ", ".join(class_title(classes, k) for k in (found or range(len(classes)))[:20])
            raise UserError(f"--class {text} must be one of {len(classes)}, by number or name: {titles}")
        indices += found
    return indices


# ---------------------------------------------------------------- sheets

def seed_rows(G, classes, n, seed, truncations):
    """A row for each truncation and class, a column per seed: from variety to typicality (figure 2)."""
    labels, seeds, images = np.repeat(classes, n), np.resize(range(seed, seed + n), n * len(classes)), []
    titles = ", ".join(class_title(G.classes, k) for k in classes)
    for truncation in truncations:
        prepare(G, truncation)
        say(f"drawing {titles}" + f", truncation {truncation}" * bool(truncation))
        images.append(draw_seeds(G, labels, seeds, G.noise))
    return np.concatenate(images)


def interpolation_rows(G, classes, n, seed):
    """From one noise vector to the next, from one class to another, and both at once (figure 8)."""
    if len(classes) != 2 or not G.config.shared_dim:
        raise UserError("interpolation needs two classes, --class A B (and no SAGAN or SN-GAN)")
    t = torch.linspace(0, 1, n)[:, None]
    z = torch.lerp(*seeded_noise([seed, seed + 1], G.config.z_dim, G.noise), t)
    z = z / (t**2 + (1 - t)**2).sqrt()              # keeps the noise's variance
    y = torch.lerp(*G.shared.weight[classes].cpu(), t)
    z0, y0 = z[:1].expand_as(z), y[:1].expand_as(y)
    say("drawing one row in which the noise changes, one in which the class does, one in which both do")
    return draw(G, torch.cat([z, z0, z]), torch.cat([y0, y, y]))


# ---------------------------------------------------------------- the command

@dataclass
class Options:
    weights: str = None             # what to draw with; unless given the newest run, or biggan-deep-256
    class_: list[str] = None        # classes: numbers, names, ImageNet words, all
    trunc: float = None             # truncation, such as 0.5
    n: int = 8                      # images per class
    seed: int = 0                   # seed of the first image; 0 unless given
    sheet: str = "classes"          # what the rows of the picture are
    npz: int = 0                    # not a picture: so many images, the classes in turn
    export: bool = False            # not a picture: the generator alone, as a small file
    out: str = None                 # sample.png, sample.npz or generator.pt unless given


def parse(arguments):
    sheets = {"sheet": ["classes", "truncation", "interpolation"]}
    typed = read_options(Options, arguments, __doc__, sheets)
    o = Options(**typed)
    if o.n < 1 or min(o.npz, o.seed) < 0:
        raise UserError("--n must be at least 1, --npz and --seed at least 0")
    if o.export and typed.keys() - {"export", "weights", "out"}:
        raise UserError("--export takes --weights and --out alone; choose a truncation when you draw")
    if o.sheet != "classes" and o.npz or o.sheet == "truncation" and o.trunc:
        raise UserError("--npz draws no --sheet, and --sheet truncation needs no --trunc: leave out one")
    if WORLD > (o.npz or 1):
        raise UserError(f"{WORLD} processes share --npz, of at least {WORLD} images, and nothing else")
    usual = "sample.npz" if o.npz else "sample.png"
    if o.export:
        usual = "generator.pt"
    o.out = check_output(o.out or usual, Path(usual).suffix)
    return o


def picture(G, classes, o):
    """What --sheet asks for; one class alone makes about a square."""
    if o.sheet == "interpolation":
        images = interpolation_rows(prepare(G, o.trunc), classes, o.n, o.seed)
    else:
        truncations = [o.trunc]
        if o.sheet == "truncation":
            truncations = [1, 0.8, 0.6, 0.4, 0.04] if G.scaled else [2, 1.5, 1, 0.5, 0.04]
        images = seed_rows(G, classes, o.n, o.seed, truncations)
    return image_grid(images, o.n if len(images) > o.n else math.ceil(math.sqrt(o.n)))


def main(arguments):
    o = parse(arguments)
    if o.export:
        export(o.weights, o.out)
    else:
        G = read_generator(o.weights)
        classes = class_indices(o.class_ or ["all"], G.classes)
        start_processes()
        if o.npz:
            write_npz(prepare(G, o.trunc), classes, o.npz, o.seed, o.out)
        else:
            sheet = picture(G, classes if o.class_ else classes[:10], o)
            save_atomically(o.out, lambda f: sheet.save(f, "PNG"))
    say("written:", o.out)
    stop_processes()


if __name__ == "__main__":
    run(main)
