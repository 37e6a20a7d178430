# make look    draw ten photographs of each of ten classes, with a small generator that comes along
# make demo    train on drawn shapes and show what the generator draws (11 to 20 minutes on two CPU cores)
# make test    the tests, on the CPU also where there is a GPU (3 to 4 minutes)
# make check   the demo's samples judged by a classifier, after make demo (1 minute)
# make trial   thirty kills, a collapse and a full disk (3 minutes, as root)
# make peers   images, scores and speed beside the PyPI packages pytorch-pretrained-biggan and pytorch-fid, which it installs (4 minutes)
# make port PORT=DIR    training speed beside the author's code (ajbrock/BigGAN-PyTorch), checked out in DIR (5 minutes)
# make photos  WEIGHTS=... judged on CIFAR-10 by a small classifier (10 minutes), at truncation TRUNC; PORT=DIR: then training beside the author's code (MINUTES=60)
# make gpu     what runs on a GPU beside the same on the CPU, and how fast it is (5 minutes and --compile; ON=cpu: without a GPU, 3)
# make help    this list
# Each makes its own virtual environment in .venv and installs the pinned packages first, once.

PYTHON ?= python3

look: .venv/ready
	.venv/bin/python sample.py --weights cifar10 --class all --n 10 --trunc 0.7

demo: .venv/ready
	.venv/bin/python train.py --preset shapes
	.venv/bin/python metrics.py --weights runs/shapes --data shapes --inception none
	.venv/bin/python sample.py --weights runs/shapes --class all --n 10 --out shapes.png

test check trial photos: export CUDA_VISIBLE_DEVICES =

test: .venv/ready
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n 2 test_biggan.py

check: .venv/ready
	.venv/bin/python -m pytest -q -s -o python_functions='check_*' test_biggan.py

trial: .venv/ready
	.venv/bin/python -m pytest -q -s -o python_functions='trial_*' test_biggan.py

peers: .venv/ready
	.venv/bin/python -m pip install --quiet pytorch-pretrained-biggan==0.1.1 scipy
	.venv/bin/python -m pip install --quiet --no-deps pytorch-fid==0.3.0 torchvision==0.29.2
	.venv/bin/python -m pytest -q -s -o python_functions='peer_*' test_biggan.py

port: .venv/ready
	PORT="$(PORT)" .venv/bin/python -m pytest -q -s -o python_functions='beside_*' test_biggan.py

photos: .venv/ready
	WEIGHTS="$(WEIGHTS)" TRUNC="$(TRUNC)" PORT="$(PORT)" MINUTES="$(MINUTES)" .venv/bin/python -m pytest -q -s -o python_functions='photos_*' test_biggan.py

gpu: .venv/ready
	@ON=$(ON) .venv/bin/python -c 'import os, torch, sys; os.environ["ON"] or torch.cuda.is_available() or sys.exit("error: torch finds no GPU; make gpu ON=cpu tries everything on the CPU")'
	ON="$(ON)" PORT="$(PORT)" .venv/bin/python -m pytest -q -s -o python_functions='gpu_*' test_biggan.py

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv || { echo "error: $(PYTHON) cannot make a virtual environment; install one that can (Debian, Ubuntu: apt install python3-venv)" >&2; exit 2; }
	.venv/bin/python -m pip install --quiet --requirement requirements.txt
	touch .venv/ready

help:
	@sed -n 's/^# //p' Makefile

.PHONY: help look demo test check trial peers port photos gpu
