"""Draw images with a trained generator.

    python sample.py --class 207 --trunc 0.5                by the newest run in runs/, or where there is none a published BigGAN-deep
    python sample.py --weights biggan-deep-256 --class "golden retriever"      by name: the model's own, or ImageNet's words
    python sample.py --weights shapes --class star heart    the small model that comes along, without any network
    python sample.py --weights runs/cifar10 --sheet truncation --class ship
    torchrun --nproc_per_node=8 sample.py --npz 50000       an array for scores, on eight GPUs

The picture has one row per class; one class alone fills several. The noise of image i depends on seed + i alone, so --seed 17 --n 1
draws the image that is second with --seed 16.

--weights takes a run folder, a checkpoint, a name (shapes, biggan-deep-128, -256, -512), a path or an address of published weights:
BigGAN-deep as converted by Hugging Face, or G_ema.pth of the paper's author's PyTorch code. What is fetched is kept in ~/.cache/biggan.

--trunc T means two things. In the paper, and for weights trained here, every component of the noise z is drawn from a normal
distribution cut off at -T and T (section 3.1); without --trunc it is not cut off, as in training. For the published BigGAN-deep weights
z is T times a normal distribution cut off at -2 and 2, and T is 1 without --trunc. At 0.5 the first has a standard deviation of 0.28,
the second of 0.44. --trunc-kind chooses. Batch norm's statistics always belong to the noise: the published ones where there are any,
else gathered anew and kept in a file beside the weights.

Reading order: errors and files, which train.py and metrics.py share, then weights and their origins, batch norm's statistics, drawing,
classes, sheets, arrays for scores. In a hurry: `from_deep`, `prepare`, `draw`, `interpolation_sheet`.
"""

import argparse
import ctypes
import dataclasses
import difflib
import fcntl
import http.client
import json
import math
import os
import pickle
import re
import shutil
import sys
import time
import traceback
import urllib.request
import zipfile
import zlib
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont

from biggan import (MODELS, Discriminator, Generator, ModelConfig, fold_spectral_norm, matrix_layers, processes, rank, scaled_normal,
                    standing_statistics, truncated_normal)


# ---------------------------------------------------------------- errors and files

class UserError(Exception):
    """A mistake of the user's, as one sentence that names the thing and the remedy. Ends a command with exit status 2."""


class Parser(argparse.ArgumentParser):
    """argparse, with errors in one sentence. Options cannot be abbreviated: a typo must not set another option."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def parse_args(self, arguments):
        if "" in arguments:
            self.error("one of the values is empty; is a shell variable not set?")
        parsed, unknown = self.parse_known_args(arguments)
        if unknown:
            name = unknown[0].split("=")[0]
            options = sorted((option for option in self._option_string_actions if len(option) > 2), key=len, reverse=True)
            near = [option for option in options if name.startswith(option)] or difflib.get_close_matches(name, options, 1, 0.7)
            self.error(f"there is no option {name}" + (f"; did you mean {near[0]}?" if near else "; --help lists them"))
        return parsed

    def error(self, message):
        raise UserError(message)


def run(main):
    """Run a command: a UserError, or a file that cannot be read or written, becomes one line on stderr and exit status 2."""
    status = 0
    try:
        main(sys.argv[1:])
    except UserError as error:
        status = 2
        if processes() > 1 and not getattr(error, "shared", False):
            from train import fail                                  # in this process alone
            fail(str(error), 2)
        if first_process():                                         # of several they all know, and one says it
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    except OSError as error:
        status = 2
        print(f"error: {file_trouble(error)}", file=sys.stderr)
    except KeyboardInterrupt:
        status = 130
    except Exception:
        status = 1
        traceback.print_exc()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # A usual end would wait for exchanges that the others never join. And the threads of a process group outlive it: one that needs
        # the interpreter while that is being taken down would abort the process.
        tell(end="")
        os._exit(status)
    if status:
        sys.exit(status)


def first_process():                                                # also before the processes have met
    return os.environ.get("RANK", "0") == "0"


def file_trouble(error):
    return f"{error.filename or 'a file'} cannot be used: {error.strerror or error}; free or choose another"


def tell(*words, **options):
    """print, but a full disk under the file that it goes to, or a closed terminal, ends nothing."""
    try:
        print(*words, **{"flush": True, **options})
    except OSError:
        pass


def hours(seconds):
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


class Progress:
    """Says every ten seconds how far the first process is with n images that all processes share."""

    def __init__(self, n, what="images"):
        self.n, self.what, self.done = n, what, 0
        self.started = self.said_last = time.perf_counter()

    def __call__(self, images):
        self.done += images
        now, done = time.perf_counter(), min(self.n, self.done * processes())
        if rank() == 0 and (now - self.said_last > 10 or done == self.n and self.said_last > self.started):
            self.said_last = now
            rate = done / (now - self.started)
            tell(f"{done:,}/{self.n:,} {self.what}  {rate:.0f} img/s  {hours((self.n - done) / max(rate, 1e-9))} left")


def last_line(error):
    """What an exception says; one that comes out of a data-loading worker puts a whole traceback before it."""
    return (str(error).splitlines() or [type(error).__name__])[-1].strip().removeprefix("sample.UserError: ")[:300]


def warn(sentence):
    # On a terminal the line of progress is still open.
    tell(("\n" if sys.stdout.isatty() else "") + f"warning: {sentence}", file=sys.stderr)


def number(kind, name, fits, otherwise):
    """A type of numbers for argparse, which puts its name into sentences."""
    def parse(text):
        if not fits(value := kind(text)):
            raise argparse.ArgumentTypeError(f"{text} is {otherwise}")
        return value
    parse.__name__ = name
    return parse


positive = number(float, "positive number", lambda value: value > 0, "not above 0")
at_least_one = number(int, "whole number", lambda value: value >= 1, "below 1")
seed_number = number(int, "whole number", lambda value: 0 <= value < 2**62, "not between 0 and 2^62")     # seed + i fits too


def check_output(path, suffix=".png"):
    """Refuse an output path that could not be written in the end, before any work is done."""
    path = Path(path)
    if path.suffix.lower() != suffix:
        raise UserError(f"the output {path} must end in {suffix}")
    if not path.parent.is_dir():
        raise UserError(f"the folder {path.parent} for the output {path.name} does not exist; create it first")
    if path.is_dir():
        raise UserError(f"the output {path} is a folder; name a file")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"the folder {path.parent} cannot be written to; choose another for the output {path.name}")
    return path


def save_atomically(path, write):
    """write(file) into a temporary file, then rename it: whoever looks at `path` finds the old file or the new one, whole."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())                                    # the bytes are on the disk before the name points at them
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)                                            # and so is the name
        os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def keep_freed_memory():
    """Have the C library keep the memory of freed tensors. By default it gives large blocks back to the system, which clears every
    page of them before it hands them out again: without that, on a CPU, training is 10 to 25% faster and drawing up to twice as fast."""
    on_cpu = sys.platform == "linux" and not torch.cuda.is_available()
    if on_cpu and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(-4, 0)                                              # M_MMAP_MAX: no block outside the heap
        mallopt(-1, -1)                                             # M_TRIM_THRESHOLD: keep all of it


def pick_device():
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")


PAUSE = 1.0                                                         # seconds before the second try, twice as long before the third, ...


def fetch(url, path, size=None):
    """Download a file. If the connection is cut it goes on from there; `path` appears when all is there and not before.

    size: the bytes it should have, give or take a hundredth. Raises UserError for another size, OSError where it cannot be had."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part, mark, reason = path.with_name(path.name + ".part"), None, "the connection was cut"
    lock = os.open(path.parent, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)                                # a second process waits here until the first one is done
    try:
        if path.exists():
            return
        with open(part, "wb") as f:
            for attempt in range(5):
                time.sleep(PAUSE * attempt)
                try:
                    # If-Range: the rest, unless the file has changed; then all of it.
                    rest = {"Range": f"bytes={f.tell()}-", "If-Range": mark} if mark and f.tell() else {}
                    with urllib.request.urlopen(urllib.request.Request(url, headers=rest), timeout=60) as answer:
                        if answer.status != 206:
                            f.seek(0)
                            f.truncate()
                        mark, length = answer.headers["ETag"], answer.headers["Content-Length"]
                        total = f.tell() + int(length) if length else None      # not every server says it
                        if size and total and abs(total - size) > size / 100:
                            raise UserError(f"it sends {total:,} bytes, not {size:,}")
                        while block := answer.read(2**20):
                            f.write(block)
                            if sys.stderr.isatty():
                                tell(f"\r{f.tell() / 1e6:.0f} MB of {(total or size or 0) / 1e6:.0f}\033[K", end="", file=sys.stderr)
                    if f.tell() and total in (None, f.tell()):
                        f.flush()
                        os.fsync(f.fileno())
                        return os.replace(part, path)
                except (OSError, ValueError, http.client.HTTPException) as error:
                    reason = getattr(error, "reason", None) or error
                    if isinstance(error, ValueError) or getattr(error, "code", 500) in (401, 403, 404, 410):    # it will say so again
                        break
        raise OSError(str(reason))
    finally:
        part.unlink(missing_ok=True)
        os.close(lock)


# ---------------------------------------------------------------- weights and their origins

HERE = Path(__file__).resolve().parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "biggan")

AMAZON = "https://s3.amazonaws.com/models.huggingface.co/biggan/"
PUBLISHED = {  # name: where it may be had, and its size. DeepMind's generators, converted by Hugging Face
    "biggan-deep-128": ([AMAZON + "biggan-deep-128-pytorch_model.bin",
                         "https://huggingface.co/osanseviero/BigGAN-deep-128/resolve/main/pytorch_model.bin"], 210_848_000),
    "biggan-deep-256": ([AMAZON + "biggan-deep-256-pytorch_model.bin"], 234_410_000),
    "biggan-deep-512": ([AMAZON + "biggan-deep-512-pytorch_model.bin"], 235_772_000),
}

# What others call a tensor -> what it is called here: patterns, applied one after the other.
DEEP_NAMES = [(r"^embeddings", "shared"), (r"^generator\.", ""), (r"^gen_z", "linear"), (r"^conv_to_rgb", "to_rgb"),
              (r"^bn\.weight", "bn.gain"), (r"^bn\.", "output_norm."), (r"^layers\.8\.(snconv1x1_)?", "attention."), (r"o_conv", "o"),
              (r"^layers\.(\d+)", lambda m: f"blocks.{int(m[1]) - (int(m[1]) > 8)}"),      # 8, the attention, is not a block here
              (r"(bn|conv)_(\d)", lambda m: f"{m[1]}{int(m[2]) + 1}"), (r"\.scale\.", ".gain."), (r"\.offset\.", ".bias."),
              (r"running_(mean|var)s", r"running_\1"), (r"weight_orig", "weight"), (r"weight_(u|v)$", r"\1")]
PORT_NAMES = [(r"^output_layer\.0", "output_norm"), (r"^output_layer\.2", "to_rgb"), (r"^blocks\.\d+\.1", "attention"),
              (r"^(blocks\.\d+)\.0", r"\1"), (r"stored_", "running_"), (r"u0$", "u")]


@dataclass
class Weights:
    """What a file of weights holds, whatever its origin, in the names and layouts of biggan.py."""
    source: str                                                     # the file's path
    config: ModelConfig
    classes: list                                                   # their names
    step: int                                                       # how long it has been trained, if that is known
    G_ema: dict                                                     # the averaged generator: name -> tensor
    G: dict = None                                                  # to train on: the generator itself and its D, where they are at hand
    D: dict = None
    kind: str = "resample"                                          # what truncation means to them
    sigmas: dict = None                                             # of published deep weights: layer -> sigma
    moments: dict = field(default_factory=dict)                     # batch norm's: name -> (truncation values, C), where they are known


def read_tensors(path):
    """What torch.save has written into a file, if it is tensors and plain values: never runs code from it. Raises UserError otherwise."""
    path = Path(path)
    with open(path, "rb") as f:
        start = f.read(9)
    if zipped := start.startswith(b"PK"):                           # torch's format is a zip archive, with a checksum per entry
        try:
            with zipfile.ZipFile(path) as archive:
                damaged, foreign = archive.testzip(), not any(name.endswith("data.pkl") for name in archive.namelist())
        except OSError:                                             # unreadable is not damaged: `run` reports it
            raise
        except Exception:                                           # zipfile raises BadZipFile and, on odd bytes, others
            raise UserError(f"{path} is not a checkpoint, or it is cut short; use another one") from None
        if foreign:
            raise UserError(f"{path} is a zip archive but not a checkpoint; use another one")
        if damaged:
            raise UserError(f"the checkpoint {path} is damaged: the checksum of {damaged} is wrong; use another one")
    elif start != b"\x80\x02\x8a\x0al\xfc\x9cF\xf9":                # and was, before 2020, something that begins like this
        raise UserError(f"{path} is not a checkpoint, or it is cut short; use another one")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)     # mmap: what is not used is not read
    except pickle.UnpicklingError:
        raise UserError(f"{path} holds something other than tensors and plain values; "
                        "it was not loaded, since it could run code") from None
    except Exception as error:                                      # torch raises what its parsers do
        reason = " ".join(str(error).split())[:200] or "it is cut short"
        raise UserError(f"{path} is not a checkpoint that torch can load: {reason}; get the file again or use another one") from None


def read_checkpoint(path):
    """A checkpoint of train.py as a dictionary of tensors and plain values. Raises UserError if it is damaged or something else."""
    checkpoint = read_tensors(path)
    if not is_own(checkpoint):
        raise UserError(f"{path} is not a checkpoint of train.py: it lacks step, model, classes or G_ema")
    return checkpoint


def is_own(content):
    return isinstance(content, dict) and {"step", "model", "classes", "G_ema"} <= content.keys()


def checkpoints_of(run_folder):
    """Paths of a run's checkpoints, oldest first. Other files in the folder are none of our business."""
    return sorted(Path(run_folder, "checkpoints").glob("step-" + 8 * "[0-9]" + ".pt"))


def newest_checkpoint(run_folder):
    """The newest undamaged checkpoint of a run and its path, or (None, None) if there is none yet. Warns of damaged ones."""
    paths = checkpoints_of(run_folder)
    for path in reversed(paths):
        try:
            return read_checkpoint(path), path
        except UserError as error:
            warn(f"{error}; trying the one before")
    if paths:
        raise UserError(f"all {len(paths)} checkpoints in {run_folder} are damaged; restore one, or start anew in another folder")
    return None, None


def find_weights(weights):
    """What was typed after --weights, or None -> what the file holds, and its path. Fetches what has a name or an address."""
    if weights is None:
        runs = sorted(Path("runs").glob("*/checkpoints/step-*.pt"), key=lambda p: p.stat().st_mtime)
        weights = runs[-1].parent.parent if runs else "biggan-deep-256"
        if first_process():
            tell(f"the newest run is {weights}; --weights chooses another" if runs else
                 f"there is no run in runs/, so this is the published {weights}", file=sys.stderr)
    path = Path(weights)
    if weights == "shapes":
        path = HERE / "docs" / "shapes.pt"
    elif weights in PUBLISHED:
        path = fetch_weights(*PUBLISHED[weights], CACHE / f"{weights}.bin", weights)
    elif str(weights).startswith(("http://", "https://")):
        path = fetch_weights([weights], None, CACHE / f"{zlib.crc32(weights.encode()):08x}-{Path(weights.split('?')[0]).name}", weights)
    elif path.is_dir():
        checkpoint, newest = newest_checkpoint(path)
        if checkpoint:
            return checkpoint, newest
        published = [path / name for name in ("G_ema.pth", "G.pth", "pytorch_model.bin") if (path / name).is_file()]
        if not published:
            raise UserError(f"{path} is not a run folder with a checkpoint in checkpoints/; train on, or name another")
        path = published[0]
    if not path.is_file():
        names = ", ".join(["shapes", *PUBLISHED])
        raise UserError(f"{path} does not exist; --weights needs a run folder, a file of weights, an address, or one of {names}")
    return read_tensors(path), path


def fetch_weights(urls, size, path, name, otherwise="--weights shapes --class star needs no network"):
    """The first of these addresses that answers. Returns the path, where the file may lie already. otherwise: what needs no network."""
    if path.exists() and size and abs(path.stat().st_size - size) > size / 100:
        raise UserError(f"{path} has {path.stat().st_size:,} bytes, not {size:,}; delete it and repeat the command")
    if not path.exists():
        reasons = []
        for url in urls:
            if first_process():
                tell(f"fetching {url}", file=sys.stderr)
            try:
                fetch(url, path, size)
                break
            except (UserError, OSError) as error:
                reasons.append(f"{url}: {error}")
        else:
            size = f", {size / 1e6:.0f} MB," if size else ""
            raise UserError(f"{name} could not be fetched ({'; '.join(reasons)}); fetch {urls[0]}{size} on another machine, "
                            f"put it at {path}, and repeat the command; {otherwise}")
    return path


def moments_of(state):
    """Batch norm's means and variances in a state dictionary, on the CPU."""
    return {name: tensor.cpu() for name, tensor in state.items() if "running_" in name}


def rename(state, patterns):
    renamed = {}
    for name, tensor in state.items():
        for pattern, ours in patterns:
            name = re.sub(pattern, ours, name)
        renamed[name] = tensor
    return renamed


def from_deep(state, path, to_train):
    """DeepMind's BigGAN-deep as converted by Hugging Face. There is no D."""
    state = rename(state, DEEP_NAMES)
    steps = len({name.split(".")[1] for name in state if name.startswith("blocks.")}) // 2
    classes, shared_dim = state["shared.weight"].shape[::-1]
    config = dataclasses.replace(MODELS[f"biggan-deep-{4 * 2**steps}"], ch=len(state["output_norm.gain"]), n_classes=classes,
                                 shared_dim=shared_dim, z_dim=state["linear.weight"].shape[1] - shared_dim,
                                 rgb_filters=len(state["to_rgb.weight"]))
    vs = {name[:-2]: state.pop(name) for name in list(state) if name.endswith(".v")}
    # sigma as it was when they were published: u^T W v. Another step of the power iteration would change the images.
    sigmas = {name: state[name + ".u"] @ (state[name + ".weight"].flatten(1) @ v) for name, v in vs.items()}
    state["shared.weight"] = state["shared.weight"].T.contiguous()  # a linear layer on one-hot vectors there, a table here
    for name in "linear.weight", "linear.bias", "linear.u":         # channels were the last of 4 x 4 x C there and are the first here
        rows = state[name]
        state[name] = rows.view(16, len(rows) // 16, -1).transpose(0, 1).reshape(rows.shape)
    state["attention.gamma"] = state["attention.gamma"].squeeze()
    moments = moments_of(state)                                     # at t = 0, 0.02, ... 1
    state.update({name: table[-1] for name, table in moments.items()})
    return Weights(path, config, class_names(classes), None, state, kind="scale", sigmas=sigmas, moments=moments)


def from_port(state, path, to_train):
    """The paper's author's PyTorch code: G_ema.pth or G.pth and, to train on, G.pth and D.pth beside it."""
    beside = [path.with_name(re.sub("^G(_ema)?", network, path.name)) for network in "GD"]   # any suffix, as in G_ema_best0.pth, is kept
    states = [state, *(read_tensors(other) if to_train and path.name.startswith("G") and other.is_file() else {} for other in beside)]
    G_ema, G, D = ({name: tensor.flatten() if name.endswith(".u") else tensor
                    for name, tensor in rename(s, PORT_NAMES).items() if not name.endswith(".sv0")} for s in states)
    blocks = len({name.split(".")[1] for name in G_ema if name.startswith("blocks.")})
    model, (classes, shared_dim) = MODELS[f"biggan{4 * 2**blocks}"], G_ema["shared.weight"].shape
    config = dataclasses.replace(model, ch=G_ema["to_rgb.weight"].shape[1] // model.g_channels[-1], n_classes=classes,
                                 shared_dim=shared_dim, z_dim=G_ema["linear.weight"].shape[1] * (blocks + 1), sn_eps=1e-6, bn_eps=1e-5)
    moments = {name: tensor[None] for name, tensor in moments_of(G_ema).items()}    # without truncation
    return Weights(path, config, class_names(classes), None, G_ema, G or None, D or None, moments=moments)


def from_own(checkpoint, path, to_train):
    classes, state = checkpoint["classes"], checkpoint["G_ema"]
    config = ModelConfig(**checkpoint["model"])
    if not isinstance(classes, list) or [type(name) for name in classes] != [str] * config.n_classes:
        raise UserError(f"{path} does not name its {config.n_classes} classes: the names are {str(classes)[:80]}")
    moments = {name: tensor[None] for name, tensor in moments_of(state).items()} if checkpoint.get("standing") else {}
    G, D = (checkpoint.get(network) if to_train else None for network in "GD")
    return Weights(path, config, classes, checkpoint["step"], state, G, D, moments=moments)


def read_weights(weights=None, to_train=False):
    """--weights, or None for the newest run -> Weights, all of them finite and of the right shape. Raises UserError for others."""
    content, path = find_weights(weights)
    origin = (from_own if is_own(content) else from_deep if isinstance(content, dict) and "embeddings.weight" in content else
              from_port if isinstance(content, dict) and "shared.weight" in content else None)
    if not origin:
        raise UserError(f"{path} holds no weights: neither a checkpoint of train.py nor a generator of a published kind")
    try:
        found = origin(content, path, to_train)
        with torch.device("meta"):                                  # shapes without memory: nothing is allocated for a bad file
            for state, kind in (found.G_ema, Generator), (found.G, Generator), (found.D, Discriminator):
                if state is not None:
                    network = kind(found.config)
                    network.load_state_dict(state, assign=True)
                    if found.sigmas and kind is Generator and found.sigmas.keys() != matrix_layers(network).keys():
                        raise KeyError("a weight_v")
        for part in found.G_ema, found.G, found.D, found.moments, found.sigmas:
            for name, tensor in (part or {}).items():
                if not tensor.is_floating_point() or not tensor.isfinite().all():
                    raise UserError(f"{path} holds numbers that are not finite, in {name}; use an earlier checkpoint or get the file again")
                if "running_var" in name and (tensor < 0).any():
                    raise UserError(f"{path} holds negative variances, in {name}; use another one")
    except KeyError as error:
        raise UserError(f"the weights in {path} are not complete: {error} is missing; get the file again") from None
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        raise UserError(f"the weights in {path} do not fit its configuration: {last_line(error)}; "
                        "get the file again or use another one") from None
    return found


def read_generator(weights=None):
    """The averaged generator of these weights, on the GPU if there is one, ready to be fitted to its noise by `prepare`.

    It has G.classes (names), G.source (path), G.kind (what truncation means to it) and G.moments (published batch norm statistics)."""
    keep_freed_memory()
    torch.backends.cudnn.allow_tf32 = False                         # an image must not depend on the batch that it is drawn in
    found = read_weights(weights)
    with torch.device("meta"):
        G = Generator(found.config)
    G.load_state_dict(found.G_ema, assign=True)
    G.requires_grad_(False).eval().float()
    G.fingerprint = 0                                               # tells these weights from others
    for p in G.parameters():
        G.fingerprint = zlib.crc32(p.contiguous().numpy(), G.fingerprint)
    fold_spectral_norm(G, found.sigmas)
    G.classes, G.source, G.kind, G.moments = found.classes, str(found.source), found.kind, found.moments
    return G.to(pick_device(), memory_format=torch.channels_last)


def load_generator(weights=None, truncation=None, kind=None):
    """A generator in eval mode, whatever its weights' origin, on the GPU if there is one: G(z, y) for z and y that are there, or
    draw(G, z, y) for any, with z = G.noise((N, G.config.z_dim)).

    weights: what --weights takes. Its batch norm statistics are those of this truncation."""
    return prepare(read_generator(weights), truncation, kind)


# ---------------------------------------------------------------- batch norm's statistics

STANDING_BATCHES = 16                                               # of 64 images, to gather batch norm statistics before drawing
KINDS = ["resample", "scale"]                                       # the two meanings of truncation


def prepare(G, truncation=None, kind=None):
    """Fit the batch norms of G to the noise it will be given, and give it that noise: G.noise(shape, generator=None) -> z.

    truncation: None for the widest that the weights were made for. Returns G."""
    kind = kind or G.kind
    if truncation is None:
        truncation = 1.0 if kind == "scale" else math.inf
    check_truncation(truncation, kind)
    G.noise = partial(truncated_normal, threshold=truncation) if kind == "resample" else partial(scaled_normal, scale=truncation)
    G.noise_said = "not truncated" if truncation == math.inf else f"{'truncated at' if kind == 'resample' else 'scaled by'} {truncation:g}"
    if G.moments and kind == G.kind and (kind == "scale" or truncation == math.inf):
        G.load_state_dict({name: interpolate(table, truncation) for name, table in G.moments.items()}, strict=False)
        G.statistics_said = "those of the weights"
        return G
    G.statistics_said = f"gathered from {64 * STANDING_BATCHES:,} images of this noise"
    path = Path(f"{G.source}.{kind}-{truncation:g}.stats")
    try:
        kept = read_tensors(path)
        whole = all(tensor.isfinite().all() for tensor in kept["moments"].values())
        if whole and kept["weights"] == G.fingerprint and kept["batches"] == STANDING_BATCHES:
            G.load_state_dict({**G.state_dict(), **kept["moments"]})
            return G
    except (UserError, OSError, KeyError, TypeError, AttributeError, RuntimeError):
        pass                                                        # missing, damaged or of other weights: gathered anew
    if first_process():
        tell(f"gathering batch norm's statistics from {64 * STANDING_BATCHES:,} images, {G.noise_said}", file=sys.stderr)
    standing_statistics(G, STANDING_BATCHES, noise=G.noise)
    moments = moments_of(G.state_dict())
    if first_process():
        try:
            save_atomically(path, lambda f: torch.save({"weights": G.fingerprint, "batches": STANDING_BATCHES, "moments": moments}, f))
        except (OSError, RuntimeError):
            pass                                                    # a folder of others, a full disk: next time they are gathered again
    return G


def check_truncation(truncation, kind):
    if kind not in KINDS:
        raise UserError(f"there is no truncation of kind {kind}; there are {' and '.join(KINDS)}")
    if not truncation > 0:
        raise UserError(f"truncation {truncation:g} is not above 0; 0.5 is a good beginning")
    if kind == "scale" and truncation > 1:
        raise UserError(f"truncation {truncation:g} is above 1, the widest that scaled noise has; --trunc-kind resample takes any")


def interpolate(table, truncation):
    """Moments (values, C), published for evenly spaced truncations from 0 to 1 or for none -> those for this truncation (C,)."""
    if len(table) == 1:
        return table[0]
    position = truncation * (len(table) - 1)
    below = min(int(position), len(table) - 2)
    return torch.lerp(table[below], table[below + 1], position - below)


# ---------------------------------------------------------------- drawing

@torch.no_grad()
def draw(G, z, y, batch=None):
    """G(z, y) as pixels (N, R, R, 3) uint8, so many at a time (default: what is likely to fit)."""
    device, images = next(G.parameters()).device, []
    if batch is None:
        batch = max(1, min(64, 2**20 // G.config.resolution**2)) * (4 if device.type == "cuda" else 1)
    while (done := sum(map(len, images))) < len(z):
        try:
            x = G(z[done:done + batch].to(device), y[done:done + batch].to(device))     # (n, 3, R, R) in [-1, 1]
        except torch.OutOfMemoryError:
            if batch == 1:
                raise UserError("the GPU's memory is too small to draw one image; free it, "
                                "or hide the GPU: CUDA_VISIBLE_DEVICES=-1") from None
            batch //= 2
            continue
        if not x.isfinite().all():                                  # which a byte would hide
            raise UserError(f"{getattr(G, 'source', 'the generator')} draws pixels that are not finite numbers; use an earlier checkpoint")
        images.append(((x + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy())
    return np.concatenate(images)


def draw_seeds(G, labels, seeds, noise=truncated_normal, batch=None):
    """Images of these labels and seeds (N, R, R, 3) uint8: the same image whatever else is drawn with it."""
    return draw(G, seeded_noise(seeds, G.config.z_dim, noise), torch.as_tensor(labels), batch)


def draw_rows(G, classes, n, seed):
    """The same n seeds for each class, class after class, with the noise that G was prepared for."""
    return draw_seeds(G, np.repeat(classes, n), [*range(seed, seed + n)] * len(classes), G.noise)


def seeded_noise(seeds, z_dim, noise=truncated_normal):
    """z (N, z_dim), row i from seeds[i] alone."""
    return torch.cat([noise((1, z_dim), generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def image_grid(images, columns):
    """(N, R, R, 3) uint8 -> a Pillow image of them in rows, on white."""
    R, rows, gap = images.shape[1], -(-len(images) // columns), 2
    sheet = np.full((rows * (R + gap) + gap, columns * (R + gap) + gap, 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = gap + i // columns * (R + gap), gap + i % columns * (R + gap)
        sheet[top:top + R, left:left + R] = image
    return Image.fromarray(sheet)


# ---------------------------------------------------------------- classes

@cache
def imagenet_words():
    """WordNet's name of each ImageNet class -> its words, in the order of the indices."""
    lines = (HERE / "docs" / "imagenet.txt").read_text().splitlines()
    return {line.split(" ", 1)[0]: line.split(" ", 1)[1].split(", ") for line in lines if not line.startswith("#")}


def class_names(n):
    """Names for the classes of weights that come without: ImageNet's, or numbers."""
    return list(imagenet_words()) if n == 1000 else [str(k) for k in range(n)]


def words_of(classes):
    """What each class may be called: its own name, and ImageNet's words if that is what the name stands for."""
    words = imagenet_words() if any(re.fullmatch("n[0-9]{8}", name) for name in classes) else {}
    return [[name, *words.get(name, [])] for name in classes]


def class_title(classes, k):
    words = words_of(classes)[k]
    return f"{words[1 if len(words) > 1 else 0]} ({k})"


def class_indices(wanted, classes):
    """What was typed after --class -> class indices. Raises UserError for a class that the model does not have, or for several."""
    words, wanted = words_of(classes), [text.rstrip(",") for text in wanted]
    called = lambda text: [k for k, names in enumerate(words) if text.lower() in map(str.lower, names)]
    if len(wanted) > 1 and len(whole := called(" ".join(wanted))) == 1:     # golden retriever, typed without quotes
        return whole
    indices, imagenet = [], {word.lower() for words_of_class in imagenet_words().values() for word in words_of_class}
    for text in wanted:
        found = called(text)
        elsewhere = "" if len(classes) == 1000 or not (text.isdecimal() and int(text) < 1000 or text.lower() in imagenet) else (
            "; among ImageNet's classes there is one: --weights biggan-deep-256")
        if text.lower() == "all":
            found, indices = [], indices + [*range(len(classes))]
        elif not found and re.fullmatch("-?[0-9]+", text):
            if not 0 <= int(text) < len(classes):
                raise UserError(f"there is no class {text}; this model has classes 0 to {len(classes) - 1}{elsewhere}")
            found = [int(text)]
        elif not found:
            found = [k for k, names in enumerate(words) if re.search(rf"\b{re.escape(text)}\b", ", ".join(names), re.I)]
            if not found:
                known = {name.lower(): name for names in words for name in names}
                near = [known[name] for name in difflib.get_close_matches(text.lower(), known, 3)]
                raise UserError(f"there is no class named {text}; " + ("did you mean " if near else "this model knows ")
                                + ", ".join(near or [names[-1] for names in words[:10]])
                                + ("?" if near else ", ..." if len(classes) > 10 else "") + elsewhere)
        if len(found) > 1:
            candidates = ", ".join(class_title(classes, k) for k in found[:20]) + (", ..." if len(found) > 20 else "")
            raise UserError(f"{text} could be {candidates}; type the number")
        indices += found
    return indices


# ---------------------------------------------------------------- sheets

def labelled(images, columns, labels, title):
    """A grid with a title above it and a label in front of each row."""
    grid, R = image_grid(images, columns), images.shape[1]
    font = ImageFont.load_default(max(12, R // 9))
    left, top = round(max(map(font.getlength, labels))) + 12, 2 * font.size
    sheet = Image.new("RGB", (max(left + grid.width, round(font.getlength(title)) + 12), top + grid.height), "white")
    sheet.paste(grid, (left, top))
    pen = ImageDraw.Draw(sheet)
    pen.text((6, top / 2), title, "black", font, anchor="lm")
    for row, label in enumerate(labels):
        pen.text((left - 6, top + 2 + row * (R + 2) + R / 2), label, "black", font, anchor="rm")
    return sheet


def classes_sheet(G, classes, n, seed, truncations, kind):
    """A row per class, a column per seed."""
    prepare(G, *truncations, kind)
    images = draw_rows(G, classes, n, seed)
    return labelled(images, n, [class_title(G.classes, k) for k in classes], f"seeds {seed} to {seed + n - 1}, {G.noise_said}")


def truncation_sheet(G, classes, n, seed, truncations, kind):
    """A row per truncation, the same seeds in each: from variety to typicality (figure 2)."""
    drawn = []                                                      # for each truncation, for each class: n images
    for t in truncations:
        prepare(G, t, kind)
        drawn.append(np.split(draw_rows(G, classes, n, seed), len(classes)))
    several = len(classes) > 1
    return labelled(np.concatenate([images for of_class in zip(*drawn) for images in of_class]), n,
                    [(f"{class_title(G.classes, k)}, " if several else "") + f"{t:g}" for k in classes for t in truncations],
                    f"truncation{'' if several else ' of ' + class_title(G.classes, classes[0])}, seeds {seed} to {seed + n - 1}")


def interpolation_sheet(G, classes, n, seed, truncations, kind):
    """From one noise vector to another, from one class to another, and both at once (figure 8)."""
    if not G.config.shared_dim:
        raise UserError(f"{G.source} has a class table in every layer and nothing between two classes; "
                        "interpolation needs weights with shared class vectors")
    if len(classes) != 2:
        raise UserError(f"interpolation leads from one class to another; give --class two of them, not {len(classes)}")
    prepare(G, *truncations, kind)
    t = torch.linspace(0, 1, n)[:, None]
    z_start, z_end = seeded_noise([seed, seed + 1], G.config.z_dim, G.noise)
    y_start, y_end = G.shared.weight[classes].cpu()
    # The root keeps the variance of the noise, to which batch norm's statistics belong.
    z = ((1 - t) * z_start + t * z_end) / ((1 - t)**2 + t**2).sqrt()
    y = torch.lerp(y_start, y_end, t)
    z = torch.cat([z, z_start.expand(n, -1), z])
    y = torch.cat([y_start.expand(n, -1), y, y])
    start, end = (class_title(G.classes, k) for k in classes)
    return labelled(draw(G, z, y), n, ["noise", "class", "both"], f"from {start}, seed {seed}, to {end}, seed {seed + 1}; {G.noise_said}")


SHEETS = {"classes": classes_sheet, "truncation": truncation_sheet, "interpolation": interpolation_sheet}


def timelapse(run, out):
    """A run's sample grids, one after the other, as an animated picture."""
    if not Path(run).is_dir():
        raise UserError(f"there is no run folder {run}, which a time-lapse needs; make demo makes runs/shapes")
    frames = []
    for path in sorted(Path(run, "samples").glob("step-" + 8 * "[0-9]" + ".png")):
        try:
            grid = Image.open(path).convert("RGB")
        except Exception as reason:                                 # Pillow raises whatever its decoders do
            warn(f"skipped {path}: {reason}")
            continue
        frame = Image.new("RGB", (grid.width, grid.height + 18), "white")
        frame.paste(grid, (0, 18))
        ImageDraw.Draw(frame).text((4, 9), f"step {int(path.stem[5:]):,}", "black", ImageFont.load_default(12), anchor="lm")
        frames.append(frame)
    if not frames:
        raise UserError(f"{run} holds no samples/step-*.png; --weights needs a run folder for a time-lapse")
    how = {"save_all": True, "append_images": frames[1:], "duration": [400] * (len(frames) - 1) + [3000], "loop": 0, "quality": 60}
    save_atomically(out, lambda f: frames[0].save(f, "WEBP", **how))
    return frames


# ---------------------------------------------------------------- arrays for scores

NPZ_BLOCK = 64

def write_npz(G, classes, n, seed, out):
    """n images, the classes in turn, as arr_0 (n, R, R, 3) uint8 and arr_1 (n,) labels; arr_2 says what they are.

    They go to the disk as they are drawn. Killed, the same command continues; under torchrun all processes draw."""
    R, part = G.config.resolution, out.with_name(out.name + ".part")
    described = json.dumps({"weights": G.fingerprint, "classes": [*map(int, classes)], "n": n, "seed": seed,
                            "noise": G.noise.func.__name__, "truncation": G.noise_said})
    from train import together
    first, missing = together(start_npz, out, part, described, n, R, first_only=True)
    if first != described:                                          # the run has a new checkpoint since the first process looked
        raise UserError(f"{G.source} is not what the other processes draw with; give --weights one checkpoint, not a run that goes on")
    if missing is None:
        return tell(f"{out} is complete already") if rank() == 0 else None
    labels = np.resize(classes, n)
    images, done = (np.load(part / f"{name}.npy", mmap_mode="r+") for name in ("images", "done"))
    progress = Progress(len(missing) * NPZ_BLOCK)
    for block in missing[rank()::processes()]:
        rows = range(block * NPZ_BLOCK, min(n, (block + 1) * NPZ_BLOCK))
        images[rows.start:rows.stop] = draw_seeds(G, labels[rows.start:rows.stop], [seed + i for i in rows], G.noise)
        images.flush()                                              # on the disk before the mark that says so
        done[block] = 1
        progress(NPZ_BLOCK)
    if processes() > 1:
        dist.barrier()
    if rank() == 0:                                                 # savez takes 16 MB at a time from an array on the disk
        save_atomically(out, lambda f: np.savez(f, np.load(part / "images.npy", mmap_mode="r"), labels, described))
        shutil.rmtree(part)
        tell(f"{n:,} images in {out}")


def start_npz(out, part, described, n, R):
    """Make the folder in which the array grows, or check that it is of the same images.

    Returns what it is of, and the numbers of the blocks that are missing; None if the array is finished."""
    from train import lock_run
    if out.exists():
        try:
            same = str(np.load(out)["arr_2"]) == described
        except Exception:                                           # not ours
            same = False
        if not same:
            raise UserError(f"{out} exists and holds something else; move it away or choose another --out")
        shutil.rmtree(part, ignore_errors=True)                     # of a process that was killed at the very end
        return described, None
    part.mkdir(exist_ok=True)
    lock_run(part)
    if (part / "settings.json").exists():
        if (part / "settings.json").read_text() != described:
            raise UserError(f"{part} holds the beginning of other images; delete it or choose another --out")
        return described, np.flatnonzero(np.load(part / "done.npy") == 0)
    if (free := shutil.disk_usage(out.parent).free) < (size := 2 * n * R * R * 3):
        shutil.rmtree(part)
        raise UserError(f"{n:,} images need {size / 1e6:,.0f} MB while they are drawn, half of it in the end, and {out.parent} has "
                        f"{free / 1e6:,.0f} MB; make room or choose another --out")
    for name, shape in ("images", (n, R, R, 3)), ("done", (-(-n // NPZ_BLOCK),)):
        np.lib.format.open_memmap(part / f"{name}.npy", "w+", np.uint8, shape)
        with open(part / f"{name}.npy", "r+b") as f:                # now, since a full disk under mapped memory kills without a word
            os.posix_fallocate(f.fileno(), 0, os.fstat(f.fileno()).st_size)
    save_atomically(part / "settings.json", lambda f: f.write(described.encode()))
    return described, np.arange(-(-n // NPZ_BLOCK))


def export(weights, out):
    """The averaged generator alone, for others to draw with: matrices in half precision, statistics of untruncated noise."""
    found = read_weights(weights)
    if found.kind != "resample":
        raise UserError(f"{found.source} is a generator alone already; copy the file")
    if out.exists() and out.samefile(found.source):
        raise UserError(f"the output {out} is the file of --weights; choose another --out")
    state = {**found.G_ema, **moments_of(load_generator(found.source).state_dict())}
    state = {name: tensor.half() if tensor.dim() > 1 else tensor for name, tensor in state.items()}
    content = {"step": found.step, "model": dataclasses.asdict(found.config), "classes": found.classes, "G_ema": state, "standing": True}
    save_atomically(out, lambda f: torch.save(content, f))


# ---------------------------------------------------------------- the command

def main(arguments):
    parser = Parser(__doc__)
    parser.add_argument("--weights", help="run folder, checkpoint, published name, path or address (default: the newest run in runs/, "
                                          "or else biggan-deep-256)")
    parser.add_argument("--class", dest="classes", nargs="+", metavar="CLASS",
                        help="class numbers, names, ImageNet words, or all (default: all, but of more than 20 classes ten)")
    parser.add_argument("--trunc", type=positive, nargs="+", metavar="T",
                        help="truncate the noise at T, such as 0.5; several for --sheet truncation (default: not truncated; "
                             "1 for published BigGAN-deep weights)")
    parser.add_argument("--trunc-kind", choices=KINDS,
                        help="what T means, see above: resample (the paper's) or scale (default: what it means to these weights)")
    parser.add_argument("--n", type=at_least_one, help="images per class (default: 8)")
    parser.add_argument("--seed", type=seed_number, default=0, help="seed of the first image (of every class; --npz: of all; default: 0)")
    parser.add_argument("--sheet", choices=[*SHEETS, "timelapse"],
                        help="a picture with labels: classes x seeds; classes at several truncations; from one class and noise to "
                             "another; or a run's sample grids as an animation")
    parser.add_argument("--npz", type=at_least_one, metavar="N",
                        help="instead of a picture, N images of the classes in turn as an array for scores")
    parser.add_argument("--export", action="store_true", help="instead of a picture, the generator alone as a small file: half precision, "
                                                              "with batch norm statistics of untruncated noise")
    parser.add_argument("--out", metavar="FILE", help="(default: sample.png, timelapse.webp, sample.npz or generator.pt)")
    args = parser.parse_args(arguments)
    modes = [name for name in ("sheet", "npz", "export") if getattr(args, name)]
    if len(modes) > 1:
        parser.error(f"--{modes[0]} and --{modes[1]} exclude each other; run the command twice")
    if args.npz and args.n:
        parser.error(f"--npz {args.npz} already says how many images; leave out --n")
    for name, value in ("class", args.classes), ("trunc", args.trunc), ("trunc-kind", args.trunc_kind), ("n", args.n):
        if value and (args.export or args.sheet == "timelapse"):
            parser.error(f"--{name} has no meaning for {'--export' if args.export else '--sheet timelapse'}; leave it out")
    args.n = args.n or 8
    usual = "sample.npz" if args.npz else "generator.pt" if args.export else "timelapse.webp" if args.sheet == "timelapse" else "sample.png"
    out = check_output(args.out or usual, Path(usual).suffix)
    if args.trunc and len(args.trunc) > 1 and args.sheet != "truncation":
        parser.error("--trunc takes several values for --sheet truncation only")

    if args.sheet == "timelapse":
        if not args.weights:
            parser.error("--sheet timelapse needs --weights RUN_DIR")
        frames = timelapse(args.weights, out)
        return print(f"{len(frames)} grids of {args.weights} in {out}")
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if several and not args.npz:
        parser.error("several processes can only share --npz; run this without torchrun")
    if args.export:
        export(args.weights, out)
        return print(f"the generator alone in {out}")
    G = read_generator(args.weights)
    classes = class_indices(args.classes or ["all"], G.classes)
    if args.npz:
        prepare(G, *(args.trunc or [None]), args.trunc_kind)        # each process by itself: the same statistics however many there are
        from train import join_processes
        join_processes()
        write_npz(G, classes, args.npz, args.seed, out)
        return dist.destroy_process_group() if several else None
    if not args.classes and len(classes) > 20:
        classes = classes[::len(classes) // 10][:10]
    widest = {"resample": [2, 1.5, 1, 0.5, 0.04], "scale": [1, 0.8, 0.6, 0.4, 0.04]}[args.trunc_kind or G.kind]
    truncations = args.trunc or (widest if args.sheet == "truncation" else [None])
    for t in args.trunc or []:
        check_truncation(t, args.trunc_kind or G.kind)
    if args.sheet == "interpolation" and not args.classes:
        classes = classes[:2]
    count, limit = args.n * (3 if args.sheet == "interpolation" else len(classes) * len(truncations)), 2**27 // G.config.resolution**2
    if count > limit:
        raise UserError(f"{count:,} images do not fit into one picture; ask for {limit:,} at most")
    if args.sheet:
        sheet = SHEETS[args.sheet](G, classes, args.n, args.seed, truncations, args.trunc_kind)
    else:
        prepare(G, *truncations, args.trunc_kind)
        images = draw_rows(G, classes, args.n, args.seed)
        side = math.ceil(math.sqrt(args.n))                         # one class alone: about a square, without a hole if that can be
        sheet = image_grid(images, args.n if len(classes) > 1 else next((c for c in range(side, 2 * side) if args.n % c == 0), side))
    save_atomically(out, lambda f: sheet.save(f, "PNG"))
    names = ", ".join(class_title(G.classes, k) for k in classes[:10]) + (", ..." if len(classes) > 10 else "")
    how = G.noise_said if len(truncations) == 1 else f"truncations {', '.join(f'{t:g}' for t in truncations)}"
    print(f"{out}: {f'{args.n} steps from one to the other, of' if args.sheet == 'interpolation' else f'{count} images of'} {names}, {how}")


if __name__ == "__main__":
    import sample                                                   # this file as train.py knows it, with the same UserError
    sample.run(sample.main)
