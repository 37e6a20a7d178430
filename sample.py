"""Draw images with a trained generator.

    python sample.py --class 3 --n 8                        class number 3, from the newest run in runs/
    python sample.py --class star heart --trunc 0.5         classes by name; truncated noise: less variety, better images
    python sample.py --weights runs/cifar10 --class all --n 10 --out grid.png

The picture has one row per class; one class alone fills a square. Image number i depends on the seed + i and on nothing else, so
--seed 17 --n 1 draws the image that is second with --seed 16.

--trunc T draws every component of the noise z from a normal distribution cut off at -T and T, the paper's truncation trick
(section 3.1). Without it the noise is not truncated, as in training. Batch norm's statistics are gathered anew for every T.

Reading order: errors and files, which train.py and metrics.py share, then checkpoints, then drawing.
"""

import argparse
import difflib
import math
import os
import pickle
import re
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from biggan import Generator, ModelConfig, standing_statistics, truncated_normal


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
            near = difflib.get_close_matches(name, self._option_string_actions, 1)
            self.error(f"there is no option {name}" + (f"; did you mean {near[0]}?" if near else "; --help lists them"))
        return parsed

    def error(self, message):
        raise UserError(message)


def run(main):
    """Run a command: a UserError, or a file that cannot be read or written, becomes one line on stderr and exit status 2."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":                      # of several processes they all know, and one says it
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"error: {file_trouble(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def file_trouble(error):
    return f"{error.filename or 'a file'} cannot be used: {error.strerror or error}; free or choose another"


def tell(*words, **options):
    """print, but a full disk under the file that it goes to, or a closed terminal, ends nothing."""
    try:
        print(*words, **{"flush": True, **options})
    except OSError:
        pass


def warn(sentence):
    # On a terminal the line of progress is still open.
    tell(("\n" if sys.stdout.isatty() else "") + f"warning: {sentence}", file=sys.stderr)


def positive(text):
    value = float(text)
    if not 0 < value:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def at_least_one(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return value


def seed_number(text):
    value = int(text)
    if not 0 <= value < 2**62:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 2^62")
    return value


# argparse puts these names into its sentences.
positive.__name__, at_least_one.__name__, seed_number.__name__ = "number above 0", "whole number", "whole number"


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


def pick_device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# ---------------------------------------------------------------- checkpoints

STANDING_BATCHES = 16                                               # of 64 images, to gather batch norm statistics before drawing

def read_checkpoint(path):
    """A checkpoint file as a dictionary of tensors and plain values. Never runs code from it. Raises UserError if it is damaged."""
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:                      # torch's format is a zip archive, with a checksum per entry
            damaged, foreign = archive.testzip(), not any(name.endswith("data.pkl") for name in archive.namelist())
    except OSError:                                                 # unreadable is not damaged: `run` reports it
        raise
    except Exception:                                               # zipfile raises BadZipFile and, on odd bytes, others
        raise UserError(f"{path} is not a checkpoint, or it is cut short; use another one") from None
    if foreign:
        raise UserError(f"{path} is a zip archive but not a checkpoint; use another one")
    if damaged:
        raise UserError(f"the checkpoint {path} is damaged: the checksum of {damaged} is wrong; use another one")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path} holds something other than tensors and plain values; "
                        "it was not loaded, since it could run code") from None
    except (RuntimeError, EOFError, KeyError) as error:
        raise UserError(f"{path} is not a checkpoint that torch can load: {str(error).splitlines()[0]}") from None
    if not isinstance(checkpoint, dict) or not {"step", "model", "classes", "G_ema"} <= checkpoint.keys():
        raise UserError(f"{path} is not a checkpoint of train.py: it lacks step, model, classes or G_ema")
    return checkpoint


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


def find_checkpoint(weights):
    """weights: a run folder, a checkpoint, or None for the newest run in runs/. Returns the checkpoint and its path."""
    if weights is None:
        runs = sorted(Path("runs").glob("*/checkpoints/step-*.pt"), key=lambda p: p.stat().st_mtime)
        if not runs:
            raise UserError("there is no trained run in runs/ yet; train one (python train.py --preset shapes) "
                            "or pass --weights RUN_DIR or CHECKPOINT")
        weights = runs[-1].parent.parent
    if Path(weights).is_file():
        return read_checkpoint(weights), Path(weights)
    if not Path(weights).is_dir():
        raise UserError(f"{weights} does not exist; --weights needs a run folder or a checkpoint")
    checkpoint, path = newest_checkpoint(weights)
    if checkpoint is None:
        raise UserError(f"{weights} is not a run folder with a checkpoint in checkpoints/; train on, or name another")
    return checkpoint, path


def read_generator(weights=None):
    """The averaged generator of a run or checkpoint, on the GPU if there is one, with G.classes (names) and G.source (path).

    Its batch norm statistics are those that training left behind. Raises UserError for weights that are damaged or do not fit."""
    checkpoint, path = find_checkpoint(weights)
    state, classes = checkpoint["G_ema"], checkpoint["classes"]
    try:
        config = ModelConfig(**checkpoint["model"])
        with torch.device("meta"):                                  # shapes without memory: nothing is allocated for a bad file
            G = Generator(config)
        G.load_state_dict(state, assign=True)
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise UserError(f"the weights in {path} do not fit its configuration: {str(error).splitlines()[-1].strip()}") from None
    for name, tensor in state.items():
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise UserError(f"{path} holds numbers that are not finite, in {name}; use an earlier checkpoint")
    if not isinstance(classes, list) or [type(name) for name in classes] != [str] * config.n_classes:
        raise UserError(f"{path} does not name its {config.n_classes} classes: the names are {str(classes)[:80]}")
    G = G.requires_grad_(False).eval().to(pick_device(), torch.float32, memory_format=torch.channels_last)
    G.classes, G.source = classes, str(path)
    return G


def load_generator(weights=None, truncation=math.inf):
    """A generator in eval mode, ready for G(z, y) with z = truncated_normal((N, z_dim), truncation), whatever its weights' origin.

    Its batch norm statistics are gathered for this truncation. weights: a run folder, a checkpoint, or None for the newest run."""
    return standing_statistics(read_generator(weights), STANDING_BATCHES, truncation=truncation)


# ---------------------------------------------------------------- drawing

def seeded_noise(seeds, z_dim, truncation=math.inf):
    """z (N, z_dim), row i from seeds[i] alone: the same image whatever else is drawn with it."""
    return torch.cat([truncated_normal((1, z_dim), truncation, torch.Generator().manual_seed(seed)) for seed in seeds])


@torch.no_grad()
def draw(G, labels, seeds, truncation=math.inf, batch=64):
    """Images of the given labels and seeds: (N, R, R, 3) uint8."""
    device = next(G.parameters()).device
    images = []
    for start in range(0, len(labels), batch):
        z = seeded_noise(seeds[start:start + batch], G.config.z_dim, truncation).to(device)
        x = G(z, torch.as_tensor(labels[start:start + batch], device=device))           # (n, 3, R, R) in [-1, 1]
        images.append(((x + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy())
    return np.concatenate(images)


def image_grid(images, columns, gap=2):
    """(N, R, R, 3) uint8 -> a Pillow image of them in rows, on white."""
    R, rows = images.shape[1], -(-len(images) // columns)
    sheet = np.full((rows * (R + gap) + gap, columns * (R + gap) + gap, 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = gap + i // columns * (R + gap), gap + i % columns * (R + gap)
        sheet[top:top + R, left:left + R] = image
    return Image.fromarray(sheet)


def class_indices(wanted, classes):
    """What was typed after --class -> class indices. Raises UserError for a class that the model does not have."""
    lower = [name.lower() for name in classes]
    indices = []
    for text in wanted:
        if text.lower() == "all":
            indices += range(len(classes))
        elif text.lower() in lower:
            indices.append(lower.index(text.lower()))
        elif re.fullmatch("-?[0-9]+", text):
            if not 0 <= int(text) < len(classes):
                raise UserError(f"there is no class {text}; this model has classes 0 to {len(classes) - 1}")
            indices.append(int(text))
        else:
            near = difflib.get_close_matches(text.lower(), lower, 3)
            names = [classes[lower.index(name)] for name in near] or classes[:10]
            raise UserError(f"there is no class named {text}; " + ("did you mean " if near else "this model knows ")
                            + ", ".join(names) + ("?" if near else ", ..." if len(classes) > 10 else ""))
    return indices


def main(arguments):
    parser = Parser(__doc__)
    parser.add_argument("--weights", help="run folder or checkpoint (default: the newest run in runs/)")
    parser.add_argument("--class", dest="classes", nargs="+", default=["all"], metavar="CLASS",
                        help="class indices or names, or all (default: all)")
    parser.add_argument("--trunc", type=positive, default=math.inf, metavar="T",
                        help="truncate the noise at T, such as 0.5; useful between 2 and 0.04 (default: not truncated)")
    parser.add_argument("--n", type=at_least_one, default=8, help="images per class (default: 8)")
    parser.add_argument("--seed", type=seed_number, default=0, help="seed of the first image of every class (default: 0)")
    parser.add_argument("--out", default="sample.png", metavar="FILE.png", help="(default: sample.png)")
    args = parser.parse_args(arguments)
    out = check_output(args.out)
    G = read_generator(args.weights)
    classes = class_indices(args.classes, G.classes)
    if len(classes) * args.n > 10_000:
        raise UserError(f"{len(classes)} classes x {args.n} images do not fit into one picture; ask for 10,000 images at most")
    standing_statistics(G, STANDING_BATCHES, truncation=args.trunc)
    labels = [label for label in classes for _ in range(args.n)]
    seeds = [args.seed + i for _ in classes for i in range(args.n)]
    images = draw(G, labels, seeds, args.trunc)
    columns = args.n if len(classes) > 1 else math.ceil(math.sqrt(args.n))
    save_atomically(out, lambda f: image_grid(images, columns).save(f, "PNG"))
    names = ", ".join(G.classes[k] for k in classes[:10]) + (", ..." if len(classes) > 10 else "")
    print(f"{out}: {len(images)} images of {names}")


if __name__ == "__main__":
    run(main)
