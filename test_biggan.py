"""Tests of every technique in biggan.py, of the scores in metrics.py, and of training and drawing.

How to use this file: open it beside the source. Its first sections have the titles and the order of
biggan.py's, so a question about a line there is answered by the section of the same name here.

A test's name states a fact. Its body checks that the code agrees with two others:
- a closed form: a case so small that its result can be derived on paper. The comment in the test
  derives it.
- a witness: another implementation of the same technique, torch's own where there is one. Values
  are compared, and gradients too (`agree`).

    technique            closed form                         witness
    spectral norm        diagonal and rank-one matrices      nn.utils.parametrizations.spectral_norm
    batch norm           two numbers, a geometric sum        nn.BatchNorm2d, F.batch_norm
    self-attention       zero queries, one dominant key      F.scaled_dot_product_attention
    networks             the published parameter counts      tables 4 to 9, one operation at a time
    hinge loss           four logits                         F.hinge_embedding_loss
    orthogonal penalty   two filters                         the formula, differentiated by torch
    truncation           moments of the truncated normal     nn.init.trunc_normal_
    EMA                  a geometric sum                     torch.optim.swa_utils.AveragedModel
    standing statistics  the mean over the batches           nn.BatchNorm2d with momentum None
    other losses         the best D on two points            torch's cross-entropy and MSE losses
    penalties on D       linear and quadratic D              torch's Jacobian, finite differences
    augmentation         a shifted image, a box, a square    F.pad, finite differences
    singular values      diagonal matrices, d sigma = u v^T  torch.linalg.svdvals
    batch moments        mean and variance of the batch      finite differences
    resampling           a kernel of a single one            nn.Upsample, nn.AvgPool2d
    scores               Gaussians, points on a line         eigenvalues, F.kl_div, torch.cdist
    a training step      a G and a D of one number           the step again, written naively
    several processes                                        one process, in float64

`make test` runs the functions test_*. Other targets run functions of other names, which are in the
last sections."""

import contextlib
import copy
import dataclasses
import functools
import gc
import hashlib
import http.server
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import unittest.mock
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

# An empty folder for downloaded weights, so that the tests never touch the user's own. It must be
# set before sample.py is imported.
os.environ["TORCH_HOME"] = tempfile.mkdtemp()

import biggan
import metrics
import sample
import train
from biggan import (
    EMA,
    LOSSES,
    MODELS,
    BatchNorm,
    ClassBatchNorm,
    ConditionalBatchNorm,
    Discriminator,
    Generator,
    Moments,
    SelfAttention,
    SNConv2d,
    SNEmbedding,
    SNLinear,
    augment,
    clamp_sigma,
    cutout,
    gradient_penalty,
    normalized_weight,
    orthogonal_penalty,
    power_iteration,
    r1_penalty,
    sigma_pull,
    singular_values,
    standing_statistics,
    translate,
    truncated_normal,
)

HERE = Path(__file__).parent
CPU = torch.device("cpu")

# Torch's own resampling: the witnesses of biggan.py's.
repeat = nn.Upsample(scale_factor=2)
pool = nn.AvgPool2d(2)


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same random numbers, whichever tests run before it."""
    torch.manual_seed(0)


def close(a, b, atol=1e-6, rtol=1e-6):
    """Assert that two tensors, or what can be made into tensors, are nearly equal in float64."""
    a = torch.as_tensor(a, dtype=torch.float64)
    b = torch.as_tensor(b, dtype=torch.float64)
    torch.testing.assert_close(a, b, atol=atol, rtol=rtol)


def agree(ours, theirs, inputs, atol=1e-8):
    """Assert that the values are the same, and the gradients with respect to all inputs too."""
    close(ours, theirs, atol)
    upstream = torch.randn_like(ours)
    our_gradients = torch.autograd.grad(ours, inputs, upstream)
    their_gradients = torch.autograd.grad(theirs, inputs, upstream)
    for our_gradient, their_gradient in zip(our_gradients, their_gradients):
        close(our_gradient, their_gradient, atol)


def leaf(*shape):
    """Normal numbers in float64, with respect to which gradients can be taken."""
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def small(name="biggan32", **changes):
    """The configuration of a model, made narrow enough for a test."""
    settings = {"ch": 8, "n_classes": 4}
    settings.update(changes)
    return dataclasses.replace(MODELS[name], **settings)


def build(network, name="biggan32", **changes):
    """A small G or D in float64, in evaluation mode, with a gamma that lets attention count."""
    module = network(small(name, **changes)).double().eval()
    if hasattr(module, "attention"):
        nn.init.constant_(module.attention.gamma, 0.5)
    return module


def parameters(module):
    """How many numbers the module learns."""
    return sum(p.numel() for p in module.parameters())


# ==================================================================================================
# Part 1: the recipe
# ==================================================================================================

# ------------------------------------------------------------------------------------ spectral norm

@pytest.mark.parametrize("k", [1, 2, 5, 50])
def test_power_iteration_converges_as_the_ratio_of_singular_values(k):
    # Let W = diag(s, r) and start from u = (1, t). A step replaces u by a multiple of W W^T u, so
    # it multiplies u's components by s^2 and r^2. After k steps
    #     u ~ (s^2k, t r^2k)
    # The last step's v is a multiple of W^T u, with the u of the step before it:
    #     v ~ (s s^(2k-2), r t r^(2k-2)) = (s^(2k-1), t r^(2k-1))
    # As u = W v / |W v|, sigma = u^T W v is the length of W v, where v has length 1:
    #     sigma^2 = (s^4k + t^2 r^4k) / (s^(4k-2) + t^2 r^(4k-2))
    # With many steps the powers of s win: u becomes (1, 0), and sigma becomes s.
    s, r, t = 2.0, 1.5, 7.0
    W = torch.diag(torch.tensor([s, r])).double()
    start = torch.tensor([1, t]).double()
    sigma, u, _ = power_iteration(W, start, steps=k)

    close(u[1] / u[0], t * (r / s)**(2 * k), 1e-12)
    numerator = s**(4 * k) + t**2 * r**(4 * k)
    denominator = s**(4 * k - 2) + t**2 * r**(4 * k - 2)
    close(sigma, math.sqrt(numerator / denominator), 1e-12)
    if k == 50:
        close(sigma, s)


def test_rank_one_and_orthogonal_matrices_converge_in_one_step():
    # Let W = a b^T. For any u, W^T u is a multiple of b, so v = b / |b|. Then W v is a multiple of
    # a, so u = a / |a|, and sigma = u^T W v = |a| |b|.
    a = torch.tensor([3.0, 4.0])            # of length 5
    b = torch.tensor([1.0, 2.0, 2.0])       # of length 3
    sigma, _, _ = power_iteration(torch.outer(a, b), torch.randn(2))
    close(sigma, 5 * 3)

    # An orthogonal matrix changes no vector's length.
    orthogonal = nn.init.orthogonal_(torch.empty(6, 6))
    sigma, _, _ = power_iteration(orthogonal, torch.randn(6))
    close(sigma, 1)


def test_a_normalised_matrix_stretches_no_vector_and_has_the_closed_gradient():
    # sigma = u^T W v has the derivative u v^T, as u and v count as constants. By the quotient rule
    #     d <L, W / sigma> / dW = L / sigma - <L, W> u v^T / sigma^2
    #                           = (L - <L, W / sigma> u v^T) / sigma
    layer = SNLinear(6, 4, eps=1e-12).double()
    U, S, Vh = torch.linalg.svd(layer.weight.detach())
    u = U[:, 0]
    v = Vh[0]
    layer.u.copy_(u)
    normalised = normalized_weight(layer)
    close(torch.linalg.svdvals(normalised)[0], 1)

    L = leaf(4, 6)
    gradient, = torch.autograd.grad(normalised, layer.weight, L)
    along_uv = (L * normalised).sum() * torch.outer(u, v)
    close(gradient, (L - along_uv) / S[0])


def test_spectral_norm_equals_torchs():
    x = leaf(2, 3, 8, 8)
    ours = SNConv2d(3, 5, 3, eps=1e-12).double()
    theirs = nn.Conv2d(3, 5, 3, padding=1)
    theirs.weight = ours.weight
    theirs.bias = ours.bias
    theirs = nn.utils.parametrizations.spectral_norm(theirs, n_power_iterations=1000)
    # Torch has made a copy of the weight. Let both layers share one, so that its gradients can be
    # compared.
    theirs.parametrizations.weight.original = ours.weight
    for _ in range(1000):
        normalized_weight(ours)
    agree(ours(x), theirs(x), [x, ours.weight, ours.bias])


def test_a_convolution_with_spectral_norm_refuses_a_stride():
    with pytest.raises(TypeError, match="stride"):
        SNConv2d(3, 5, 3, stride=2)


@pytest.mark.parametrize("layer, x", [
    (SNConv2d(3, 5, 3, eps=1e-4), torch.randn(1, 3, 4, 4)),
    (SNLinear(3, 5, eps=1e-4), torch.randn(1, 3)),
    (SNEmbedding(5, 3, eps=1e-4), torch.tensor([2])),
])
def test_u_moves_one_step_per_training_pass_and_is_saved(layer, x):
    before = layer.state_dict()["u"].clone()
    _, expected, _ = power_iteration(layer.weight.flatten(1), before)
    layer.eval()(x)
    assert torch.equal(layer.u, before)
    layer.train()(x)
    assert torch.equal(layer.u, expected)
    assert not torch.equal(layer.u, before)


def test_spectral_norm_is_computed_in_float32_under_autocast():
    layer = SNLinear(64, 64, eps=1e-4).eval()
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = normalized_weight(layer)
    assert torch.equal(under_autocast, normalized_weight(layer))


# --------------------------------------------------------------------------- conditional batch norm

def test_batch_norm_of_two_numbers():
    # The numbers m + a and m - a have mean m, variance a^2 and unbiased variance 2 a^2. Batch norm
    # makes them plus and minus
    #     a / sqrt(a^2 + eps) = 1 / sqrt(1 + eps / a^2)
    # Each step keeps 0.9 of the running averages and adds 0.1 of the batch's moments. What they
    # started from, 0 and 1, is multiplied by 0.9^n in n steps, and n equal batches have together
    # the rest of the weight, 1 - 0.9^n.
    m, a, eps = 5.0, 3.0, 0.5
    batch = torch.tensor([m + a, m - a]).reshape(2, 1, 1, 1)
    bn = BatchNorm(1, eps)
    for _ in range(4):
        y = bn(batch)
    close(y.flatten(), torch.tensor([1, -1]) / math.sqrt(1 + eps / a**2))
    started = 0.9**4                        # the weight of what the averages started from
    close(bn.running_mean, [(1 - started) * m])
    close(bn.running_var, [started + (1 - started) * 2 * a**2])


def test_batch_norm_equals_torchs():
    x = 5 + 2 * leaf(4, 3, 5, 5)
    ours = BatchNorm(3, 1e-4).double()
    theirs = nn.BatchNorm2d(3, 1e-4).double()
    nn.init.normal_(ours.gain)
    nn.init.normal_(ours.bias)
    theirs.weight = ours.gain
    theirs.bias = ours.bias
    agree(ours(x), theirs(x), [x, ours.gain, ours.bias])
    close(ours.running_mean, theirs.running_mean)
    close(ours.running_var, theirs.running_var)
    close(ours.eval()(x), theirs.eval()(x))


def conditional_batch_norm(channels, c_dim):
    """In training, but with linear layers in evaluation mode, so that their u does not move."""
    bn = ConditionalBatchNorm(channels, c_dim, eps=1e-4).double().eval()
    bn.training = True
    return bn


def test_the_condition_sets_mean_and_standard_deviation():
    # A channel of mean 0 and variance 1, times the gain, plus the bias, has the standard deviation
    # |gain| and the mean bias.
    bn = conditional_batch_norm(channels=2, c_dim=3)
    x = 100 * leaf(64, 2, 8, 8)             # so wide that eps does not count
    c = leaf(3)
    y = bn(x, c.expand(64, 3))              # the same condition for every image
    gain = 1 + normalized_weight(bn.gain) @ c
    bias = normalized_weight(bn.bias) @ c
    close(y.std((0, 2, 3), correction=0), gain.abs())
    close(y.mean((0, 2, 3)), bias)


def scale_and_shift_torchs(x, gain, bias):
    """Torch's batch norm of x (N, C, H, W), then gain (N, C) and bias (N, C) for every image."""
    normal = F.batch_norm(x, None, None, training=True, eps=1e-4)
    return gain[:, :, None, None] * normal + bias[:, :, None, None]


def test_conditional_batch_norm_equals_torchs():
    bn = conditional_batch_norm(channels=3, c_dim=5)
    x = 5 + 2 * leaf(4, 3, 5, 5)
    c = leaf(4, 5)
    gain = 1 + c @ normalized_weight(bn.gain).T
    bias = c @ normalized_weight(bn.bias).T
    expected = scale_and_shift_torchs(x, gain, bias)
    agree(bn(x, c), expected, [x, bn.gain.weight, bn.bias.weight, c])


# ----------------------------------------------------------------------------------- self-attention

def attention_layer():
    """A layer whose gamma is not 0, and an input for it."""
    layer = SelfAttention(16).double().eval()
    nn.init.constant_(layer.gamma, 0.7)
    return layer, leaf(2, 16, 8, 8)


def test_attention_starts_as_the_identity():
    x = torch.randn(2, 16, 8, 8)
    assert torch.equal(SelfAttention(16)(x), x)


def test_zero_queries_give_uniform_attention():
    # theta = 0 makes all scores 0 and so all weights equal: every position gets the mean of the
    # pooled values.
    layer, x = attention_layer()
    nn.init.zeros_(layer.theta.weight)
    values = F.max_pool2d(layer.g(x), 2)
    mean = values.mean((2, 3), keepdim=True)
    close(layer(x), x + 0.7 * layer.o(mean))


def test_one_dominant_key_gives_its_value_everywhere():
    # The queries read channel 0, which is 1 everywhere. The keys read channel 1, which is 60 at row
    # 5, column 2, and 0 elsewhere. So every position weighs that place with exp(60) and the others
    # with exp(0) = 1, which is nothing beside it.
    layer, x = attention_layer()
    for convolution, channel in (layer.theta, 0), (layer.phi, 1):
        nn.init.zeros_(convolution.weight)
        convolution.weight.data[0, channel] = 1
        convolution.u.copy_(torch.tensor([1, 0]))       # its singular vector, of sigma = 1
    x = x.detach()
    x[:, 0] = 1
    x[:, 1] = 0
    x[:, 1, 5, 2] = 60
    values = F.max_pool2d(layer.g(x), 2)
    value = values[:, :, 2:3, 1:2]          # the pooled cell with row 5 and column 2
    close(layer(x), x + 0.7 * layer.o(value))


def attention_by_torch(layer, x):
    """What the layer should return, by torch's attention with a scale of one."""
    query = layer.theta(x).flatten(2).mT
    key = F.max_pool2d(layer.phi(x), 2).flatten(2).mT
    value = F.max_pool2d(layer.g(x), 2).flatten(2).mT
    attended = F.scaled_dot_product_attention(query, key, value, scale=1.0)
    image = attended.mT.unflatten(2, x.shape[2:])
    return x + layer.gamma * layer.o(image)


def test_attention_equals_torchs_with_scale_one():
    layer, x = attention_layer()
    agree(layer(x), attention_by_torch(layer, x), [x, *layer.parameters()])


def test_attention_is_equivariant_to_moving_whole_cells():
    # Attention does not know where a position lies, so moved positions give the same outputs,
    # moved. But pooling keeps 2x2 cells together: a move by one pixel makes other cells.
    layer, x = attention_layer()
    close(layer(x.roll(4, dims=3)), layer(x).roll(4, dims=3))
    moved_before = layer(x.roll(1, dims=3))
    moved_after = layer(x).roll(1, dims=3)
    assert not torch.allclose(moved_before, moved_after, atol=1e-3)


# -------------------------------------------------------------------------------------------- sizes

@pytest.mark.parametrize("name, network, count", [
    # The paper prints 70.4, 88.0, 50.4 and 34.6 million at 128 pixels.
    ("biggan128", Generator, 70_433_988),
    ("biggan128", Discriminator, 87_982_370),
    ("biggan256", Generator, 82_235_844),
    ("biggan256", Discriminator, 99_225_890),
    ("biggan-deep-128", Generator, 50_388_609),
    ("biggan-deep-128", Discriminator, 34_590_210),
    ("biggan-deep-256", Generator, 55_880_833),
    ("biggan-deep-512", Generator, 56_163_905),
])
def test_parameter_counts_are_the_published_ones(name, network, count):
    with torch.device("meta"):              # shapes without memory
        assert parameters(network(MODELS[name])) == count


def test_attention_at_128_pixels_as_in_table_5_has_fewer_parameters():
    # Attention over C channels has theta and phi of C^2 / 8 weights each, g and o of C^2 / 2 each,
    # and gamma: 1.25 C^2 + 1. In G, C is 384 at 64 pixels and 192 at 128.
    config = dataclasses.replace(MODELS["biggan256"], g_attention=128)
    with torch.device("meta"):
        of_table_5 = Generator(config)
    assert 82_235_844 - parameters(of_table_5) == 1.25 * (384**2 - 192**2)


# Millions of parameters of G and D together, row by row.
TABLE_1 = [81.5, 81.5, 81.5, 81.5, 173.5, 160.6, 158.3, 158.3, 71.3]


@pytest.mark.parametrize("row, millions", [*enumerate(TABLE_1, start=1)])
def test_table_1_counts_g_and_d_without_the_shared_class_vectors(row, millions):
    settings = train.parse_settings(["--preset", f"table1-row{row}", "--data", "x"])
    config = train.model_config(settings)
    with torch.device("meta"):
        G = Generator(config)
        D = Discriminator(config)
    class_vectors = 1000 * config.shared_dim
    counted = parameters(G) + parameters(D) - class_vectors
    assert round(counted / 1e6, 1) == millions


@pytest.mark.parametrize("name, changes, message", [
    ("biggan64", {"resolution": 128}, "pixels"),
    ("biggan64", {"z_dim": 128}, "chunks"),
    ("biggan128", {"g_attention": 48}, "g_attention"),
    ("biggan128", {"d_attention": 48}, "d_attention"),
    ("biggan128", {"shared_dim": 0}, "shared_dim"),
    ("biggan-deep-128", {"shared_dim": 0}, "shared_dim"),
])
def test_a_configuration_that_cannot_work_is_refused(name, changes, message):
    with pytest.raises(biggan.UserError, match=message), torch.device("meta"):
        config = dataclasses.replace(MODELS[name], **changes)
        Generator(config)
        Discriminator(config)


# ------------------------------------------------------------------------------------- the networks

@pytest.mark.parametrize("name", MODELS)
def test_every_model_draws_and_learns_at_its_resolution(name):
    G = build(Generator, name).float()
    D = build(Discriminator, name).float()
    config = G.config
    attention_sizes = []

    def note_size(layer, inputs, output):
        attention_sizes.append(output.shape[-1])

    for network in G, D:
        if hasattr(network, "attention"):
            network.attention.register_forward_hook(note_size)

    for training in False, True:
        G.train(training)
        D.train(training)
        y = torch.tensor([1, 3])
        x = G(torch.randn(2, config.z_dim), y)
        assert x.shape == (2, 3, config.resolution, config.resolution)
        D(x, y).square().sum().backward()
        for parameter_name, p in [*G.named_parameters(), *D.named_parameters()]:
            assert p.grad.isfinite().all(), parameter_name
            # In training, batch norm subtracts what a convolution's bias adds to a channel. So
            # such a bias may have no gradient.
            may_be_zero = training and parameter_name.endswith("bias")
            if not may_be_zero:
                assert p.grad.any(), parameter_name
            p.grad = None

    expected_sizes = [size for size in (config.g_attention, config.d_attention) if size]
    assert attention_sizes == expected_sizes * 2        # in evaluation and in training


def test_weights_start_orthogonal_and_biases_zero():
    layer = Discriminator(small()).blocks[1].conv1
    W = layer.weight.flatten(1)             # 32 filters of 288 inputs: W W^T = I
    close(W @ W.T, torch.eye(32), 1e-5)
    assert not layer.bias.any()


def test_the_blocks_are_the_papers():
    """Tables 4 and 5, one operation at a time."""
    config = small()
    x = leaf(2, 8, 8, 8)
    c = leaf(2, config.c_dim)
    g = biggan.GBlock(8, 16, config).double().eval()
    h = F.relu(g.bn1(x, c))
    h = g.conv1(repeat(h))
    h = F.relu(g.bn2(h, c))
    h = g.conv2(h)
    close(g(x, c), h + g.conv_sc(repeat(x)))

    for first, down, out_channels in (True, True, 16), (False, True, 16), (False, False, 8):
        d = biggan.DBlock(8, out_channels, first, down, config).double().eval()
        h = x if first else F.relu(x)
        h = F.relu(d.conv1(h))
        h = d.conv2(h)
        if down:
            expected = pool(h + d.conv_sc(x))
        else:
            expected = h + x
        close(d(x), expected)


def g_by_hand(G, first, conditions, attention_after=None):
    """What G should return: its first layer sees `first`, block i sees conditions[i]."""
    h = G.linear(first).unflatten(1, (-1, 4, 4))
    for i, (block, c) in enumerate(zip(G.blocks, conditions)):
        h = block(h, c)
        if i == attention_after:
            h = G.attention(h)
    h = F.relu(G.output_norm(h))
    return G.to_rgb(h)[:, :3].tanh()


def test_g_gives_each_block_its_own_chunk_of_z():
    G = build(Generator)
    z = leaf(2, 128)
    y = torch.tensor([0, 2])
    assert type(G.shared) is nn.Embedding               # no spectral norm on the class vectors
    # Not the vectors of classes, but points between and beyond them.
    e = leaf(2, 128)
    first, *chunks = z.split(32, dim=1)
    conditions = [torch.cat([e, chunk], dim=1) for chunk in chunks]
    close(G(z, e), g_by_hand(G, first, conditions))
    close(G(z, y), G(z, G.shared.weight[y]))
    with pytest.raises(biggan.UserError, match="components"):
        G(leaf(2, 160), y)                  # one chunk too many, which must not be ignored


@pytest.mark.parametrize("name, down, attention_after", [
    ("biggan32", [True, True, False, False], None),
    ("biggan-deep-128", [True, False] * 5, 1),
])
def test_d_is_its_blocks_relu_sum_and_projection(name, down, attention_after):
    D = build(Discriminator, name)
    assert [block.down for block in D.blocks] == down
    x = leaf(2, 3, D.config.resolution, D.config.resolution)
    h = D.from_rgb(x) if D.config.deep else x
    for i, block in enumerate(D.blocks):
        h = block(h)
        if i == attention_after:
            h = D.attention(h)
    s = F.relu(h).sum((2, 3))               # the sum, not the mean, over the positions
    looks_real = D.linear(s)[:, 0]
    vectors = normalized_weight(D.embed)
    # For other classes, only the scalar product with the vector of the class is different.
    for y in torch.tensor([[0, 2], [3, 1]]):
        fits_class = (vectors[y] * s).sum(1)
        close(D(x, y), looks_real + fits_class)


def test_with_one_class_the_projection_is_one_more_linear_layer():
    # With a single vector e, w . s + b + e . s = (w + e) . s + b.
    D = build(Discriminator, "biggan32", n_classes=1)
    sums = []

    def note_input(layer, inputs):
        sums.append(inputs[0])

    D.linear.register_forward_pre_hook(note_input)
    logits = D(leaf(3, 3, 32, 32), torch.tensor([0, 0, 0]))
    W = normalized_weight(D.linear) + normalized_weight(D.embed)
    close(logits, F.linear(sums[0], W, D.linear.bias)[:, 0])


# --------------------------------------------------------------------------------------- hinge loss
# The section "other losses" compares it with torch's, and has the best D on two points.

def test_hinge_losses_on_paper():
    real = torch.tensor([2, 0.5], requires_grad=True)
    fake = torch.tensor([-3.0, 0], requires_grad=True)
    d_loss, g_loss, _ = LOSSES["hinge"]
    loss = d_loss(real, fake)
    close(loss, (0 + 0.5) / 2 + (0 + 1) / 2)
    loss.backward()
    close(real.grad, [0, -0.5])             # there is no gradient beyond the margin
    close(fake.grad, [0, 0.5])
    close(g_loss(fake), (3 - 0) / 2)


# -------------------------------------------------------------------------- orthogonal penalty on G

def test_the_orthogonal_penalty_compares_filters():
    # Two filters of lengths p and q, with the angle a between them, are the rows of W. Then
    #     W W^T = [[p^2,        pq cos a],
    #              [pq cos a,   q^2     ]]
    # and the squares off the diagonal add up to 2 (p q cos a)^2.
    p, q, a = 2.0, 3.0, 0.7
    W = torch.tensor([[p, 0], [q * math.cos(a), q * math.sin(a)]])
    between = 2 * (p * q * math.cos(a))**2
    lengths = (p**2 - 1)**2 + (q**2 - 1)**2
    close(orthogonal_penalty(W), between, 1e-4)
    close(orthogonal_penalty(W, off_diagonal=False), between + lengths, 1e-4)

    # Here the rows are at right angles, but the columns are not. So W has no penalty, and its
    # transpose has one.
    W = torch.tensor([[1.0, 1, 0], [1, -1, 1]])
    assert orthogonal_penalty(W) == 0
    assert orthogonal_penalty(W.T) > 1


@pytest.mark.parametrize("shape", [(4, 2, 3), (6, 4)])
def test_the_orthogonal_penaltys_gradient_has_a_factor_of_four(shape):
    # Let A = W W^T * (1 - I), which is symmetric. A change dW changes W W^T by dW W^T + W dW^T, so
    #     d ||A||^2 = 2 <A, dW W^T + W dW^T> = 4 <A W, dW>
    # and the gradient is 4 A W. (Some code has a factor of 2.)
    W = leaf(*shape)
    eye = torch.eye(shape[0])
    rows = W.flatten(1)
    A = rows @ rows.T * (1 - eye)
    gradient, = torch.autograd.grad(orthogonal_penalty(W), W)
    close(gradient.flatten(1), 4 * A @ rows)
    agree(orthogonal_penalty(W), A.square().sum(), [W])

    older = orthogonal_penalty(W, off_diagonal=False)
    agree(older, (rows @ rows.T - eye).square().sum(), [W])


@pytest.mark.parametrize("name, ignored", [
    ("biggan32", "shared.weight"),
    ("sagan128", "blocks.*(gain|bias).weight"),
])
def test_orthogonal_regularisation_leaves_class_vectors_and_tables_alone(name, ignored):
    G = Generator(small(name))
    biggan.orthogonal_regularisation(G).backward()
    for parameter_name, p in G.named_parameters():
        if p.ndim > 1:                      # a matrix or a kernel, not a bias
            has_no_penalty = p.grad is None
            assert has_no_penalty == bool(re.fullmatch(ignored, parameter_name)), parameter_name


# ----------------------------------------------- good samples: truncation, EMA, standing statistics

def noise(t, n=200_000):
    """n components of noise truncated at t, always from the same seed."""
    return truncated_normal((n,), t, torch.Generator().manual_seed(0)).double()


def truncated_variance(t):
    """The variance of N(0, 1) within +-t.

    Let phi be the normal density. phi' = -x phi, so x^2 phi = phi - (x phi)'. The integral over
    [-t, t] is the probability of lying inside, erf(t / sqrt(2)), minus 2 t phi(t). Divided by that
    probability, it is the variance of what lies inside."""
    density = math.exp(-t * t / 2) / math.sqrt(2 * math.pi)
    inside = math.erf(t / math.sqrt(2))
    return 1 - 2 * t * density / inside


@pytest.mark.parametrize("t", [2.0, 1.5, 1.0, 0.5, 0.04])
def test_truncated_noise_is_torchs_and_has_the_closed_moments(t):
    z = noise(t)
    assert z.abs().max() <= t
    close(z.mean() / t, 0, 0.01)
    close(z.var(), truncated_variance(t), rtol=0.02)

    # Torch's noise has the same quantiles.
    theirs = nn.init.trunc_normal_(torch.empty(200_000), a=-t, b=t)
    quantiles = z.sort().values
    close(quantiles / t, theirs.sort().values / t, 0.02)

    # The test of Kolmogorov and Smirnov: the distribution function at the k-th of n sorted numbers
    # is near k / n, within 1.95 / sqrt(n) in 99.9% of all draws. That function is
    #     (Phi(z) - Phi(-t)) / (2 Phi(t) - 1)   with   Phi(z) = (1 + erf(z / sqrt(2))) / 2
    ratio = torch.erf(quantiles / math.sqrt(2)) / math.erf(t / math.sqrt(2))
    distribution = (ratio + 1) / 2
    close(distribution, torch.linspace(0, 1, 200_000), 1.95 / math.sqrt(200_000))


def test_without_a_threshold_the_noise_is_normal():
    z = noise(math.inf)
    close([z.mean(), z.var(), (z**4).mean()], [0, 1, 3], 0.05)
    assert z.abs().max() > 3.5


def test_the_two_meanings_of_truncation_one_half_differ():
    # The paper cuts N(0, 1) at 0.5. The published deep models halve noise that was cut at 2.
    halved = biggan.scaled_normal((200_000,), 0.5, torch.Generator().manual_seed(0))
    close([noise(0.5).std(), halved.std()], [0.28, 0.44], 0.005)
    close(halved.double().std(), 0.5 * math.sqrt(truncated_variance(2)), 0.003)
    assert halved.abs().max() > 0.99


def test_one_seed_gives_the_same_noise_but_smaller_at_every_threshold():
    for t in 1.0, 0.5:
        z = noise(t, 1000)
        larger = noise(2 * t, 1000)
        assert torch.equal(z.argsort(), larger.argsort())
        assert (z.abs() < larger.abs()).all()
    with pytest.raises(biggan.UserError, match="threshold"):
        noise(0)


def test_ema_weights_approach_a_constant_geometrically():
    # Until step `start` = 2 the average is a copy, so it starts from the second value, 7. With the
    # decay d, n further steps of c make it d^n 7 + (1 - d^n) c. Buffers are averaged too.
    source = BatchNorm(1, 1e-4)
    ema = EMA(source, decay=0.9, start=2)
    for step, value in enumerate([4.0, 7.0, 5.0, 5.0, 5.0], start=1):
        nn.init.constant_(source.gain, value)
        source.running_mean.fill_(value)
        ema.update(source, step)
        if step <= 2:
            expected = value
        else:
            kept = 0.9**(step - 2)
            expected = kept * 7 + (1 - kept) * 5
        close(ema.model.gain, [expected])
        close(ema.model.running_mean, [expected])
    assert not ema.model.gain.requires_grad


def test_ema_weights_equal_torchs():
    source = nn.Linear(3, 4)
    ours = EMA(source, decay=0.8)
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.8)
    theirs = torch.optim.swa_utils.AveragedModel(source, multi_avg_fn=average)
    theirs.update_parameters(source)        # torch's first update copies
    for step in range(1, 5):
        nn.init.normal_(source.weight)
        ours.update(source, step)
        theirs.update_parameters(source)
    close(ours.model.weight, theirs.module.weight)


def test_standing_statistics_are_the_mean_over_batches():
    G = Generator(small())
    ours = G.blocks[0].bn1
    state = G.state_dict()
    before = {name: p.clone() for name, p in state.items() if "running" not in name}
    all_z = []
    all_y = []
    inputs_of_norm = []

    def note_z_and_y(module, inputs):
        z, y = inputs
        all_z.append(z)
        all_y.append(y)

    def note_input(module, inputs):
        inputs_of_norm.append(inputs[0].double())

    G.register_forward_pre_hook(note_z_and_y)
    ours.register_forward_pre_hook(note_input)
    cut_at_half = functools.partial(truncated_normal, threshold=0.5)
    standing_statistics(G, batches=5, batch_size=16, noise=cut_at_half)

    # With momentum None, torch's running averages are plain means over all batches.
    theirs = nn.BatchNorm2d(32, momentum=None).double()
    for x in inputs_of_norm:
        theirs(x)
    means = [x.mean((0, 2, 3)) for x in inputs_of_norm]
    close(theirs.running_mean, torch.stack(means).mean(0))
    close(ours.running_mean, theirs.running_mean)
    close(ours.running_var, theirs.running_var)

    # Nothing else has changed, u included, and G is ready to draw.
    assert not G.training
    assert ours.momentum == BatchNorm.momentum
    after = G.state_dict()
    for name, p in before.items():
        assert torch.equal(after[name], p), name

    # The images were drawn from the noise asked for, and from all classes.
    z = torch.cat(all_z)
    y = torch.cat(all_y)
    assert len(z) == 5 * 16
    assert 0.4 < z.abs().max() <= 0.5
    assert set(y.tolist()) == {0, 1, 2, 3}


# ==================================================================================================
# Part 2: beyond the recipe
# ==================================================================================================

# ------------------------------------------------------------------- other blocks, other batch norm

def test_the_deep_blocks_are_the_papers():
    """Tables 7 to 9 and figure 16, one operation at a time: shortcuts that drop or add channels."""
    config = small("biggan-deep-128")
    x = leaf(2, 16, 8, 8)
    c = leaf(2, config.c_dim)
    for up, out_channels in (False, 16), (True, 16), (True, 8):
        g = biggan.DeepGBlock(16, out_channels, up, config).double().eval()
        resize = repeat if up else nn.Identity()
        h = F.relu(g.bn1(x, c))
        h = g.conv1(h)
        h = F.relu(g.bn2(h, c))
        h = g.conv2(resize(h))
        h = F.relu(g.bn3(h, c))
        h = g.conv3(h)
        h = F.relu(g.bn4(h, c))
        h = g.conv4(h)
        shortcut = resize(x)[:, :out_channels]
        close(g(x, c), h + shortcut)

    for down, out_channels in (False, 16), (True, 16), (True, 32):
        d = biggan.DeepDBlock(16, out_channels, down, config).double().eval()
        resize = pool if down else nn.Identity()
        h = d.conv1(F.relu(x))
        h = d.conv2(F.relu(h))
        h = d.conv3(F.relu(h))
        h = d.conv4(resize(F.relu(h)))
        shortcut = x if out_channels == 16 else torch.cat([x, d.conv_sc(x)], dim=1)
        close(d(x), h + resize(shortcut))


def test_the_deep_g_gives_all_of_z_and_the_class_to_every_layer():
    G = build(Generator, "biggan-deep-128")
    assert [block.up for block in G.blocks] == [False, True] * 5
    z = leaf(2, 128)
    y = torch.tensor([0, 2])
    c = torch.cat([z, G.shared.weight[y]], dim=1)       # z comes first
    close(G(z, y), g_by_hand(G, c, [c] * 10, attention_after=7))


def test_class_batch_norm_equals_torchs():
    # Taking a row of a table is a linear layer of the one-hot class.
    bn = biggan.conditional_norm(3, small("sagan128")).double()
    assert isinstance(bn, ClassBatchNorm)
    x = 5 + 2 * leaf(4, 3, 5, 5)
    y = torch.tensor([0, 3, 3, 1])
    one_hot = F.one_hot(y, 4).double()
    gain = 1 + one_hot @ bn.gain.weight
    bias = one_hot @ bn.bias.weight
    expected = scale_and_shift_torchs(x, gain, bias)
    agree(bn(x, y), expected, [x, bn.gain.weight, bn.bias.weight])


def test_without_skip_z_all_of_z_enters_the_first_layer():
    z = leaf(2, 128)
    y = torch.tensor([0, 2])

    # SAGAN has a class table in each batch norm, and no class vectors.
    tables = build(Generator, "sagan128")
    assert not hasattr(tables, "shared")
    close(tables(z, y), g_by_hand(tables, z, [y] * 5, attention_after=3))
    with pytest.raises(biggan.UserError, match="embedding"):
        tables(z, leaf(2, 128))

    # Row 6 of table 1 has class vectors, but no skip-z.
    shared = build(Generator, "sagan128", shared_dim=12)
    e = shared.shared.weight[y]
    close(shared(z, y), g_by_hand(shared, z, [e] * 5, attention_after=3))


def test_sngan_has_a_narrow_d_no_attention_and_no_spectral_norm_in_g():
    G = Generator(small("sngan128"))
    D = Discriminator(small("sngan128"))
    # All blocks of D but the first widen in the second convolution.
    assert [block.conv1.out_channels for block in D.blocks] == [8, 8, 16, 32, 64, 128]
    assert not hasattr(G, "attention")
    assert not hasattr(D, "attention")
    eps_of_g = {layer.eps for layer in biggan.matrix_layers(G).values()}
    eps_of_d = {layer.eps for layer in biggan.matrix_layers(D).values()}
    assert eps_of_g == {None}               # without eps there is no spectral norm
    assert eps_of_d == {1e-4}


def test_gradients_of_deep_blocks_keep_channels_last_in_memory():
    G = build(Generator, "biggan-deep-128", ch=8)
    layouts = []

    def note_layout(gradient):
        layouts.append(gradient.is_contiguous(memory_format=torch.channels_last))

    def watch(layer, inputs, output):
        output.register_hook(note_layout)

    for layer in biggan.matrix_layers(G).values():
        if isinstance(layer, SNConv2d):
            layer.register_forward_hook(watch)
    G(torch.randn(2, 128).double(), torch.tensor([0, 1])).sum().backward()
    assert len(layouts) >= 30
    assert all(layouts)


# ------------------------------------------------------------------------------------- other losses

def best_logit_hinge(p, q):
    # p max(0, 1 - d) + q max(0, 1 + d) has the slope q - p between its kinks at -1 and 1, falls
    # before them and rises after them. So it is least at 1 if p > q, and at -1 if p < q.
    return math.copysign(1, p - q)


def best_logit_nonsaturating(p, q):
    # With s = sigmoid(d), -p log s - q log(1 - s) has the derivative -p / s + q / (1 - s). That is
    # 0 at s = p / (p + q), and then d = log(s / (1 - s)) = log(p / q).
    return math.log(p / q)


def best_logit_least_squares(p, q):
    # p (d - 1)^2 + q d^2 has the derivative 2 p (d - 1) + 2 q d, which is 0 at d = p / (p + q).
    return p / (p + q)


@pytest.mark.parametrize("name, best_logit", [
    ("hinge", best_logit_hinge),
    ("non-saturating", best_logit_nonsaturating),
    ("least-squares", best_logit_least_squares),
])
def test_on_two_points_the_best_d_is_known(name, best_logit):
    # There are only two different images. Of 8 real ones 5 are the first and 3 the second; of 8
    # generated ones 2 are the first and 6 the second. So D is two free numbers. Any small step away
    # from the best ones raises the loss, and the decision threshold lies between them.
    d_loss, _, threshold = LOSSES[name]
    real_counts = torch.tensor([5, 3])
    fake_counts = torch.tensor([2, 6])
    best_d = torch.tensor([best_logit(5, 2), best_logit(3, 6)], dtype=torch.float64)

    def loss(d):
        real = d.repeat_interleave(real_counts)
        fake = d.repeat_interleave(fake_counts)
        return d_loss(real, fake)

    for step in 1e-3 * torch.tensor([[1, 0], [-1, 0], [0, 1], [0, -1]]):
        assert loss(best_d + step) > loss(best_d)
    assert best_d[0] > threshold > best_d[1]


@pytest.mark.parametrize("name, derivative", [
    ("hinge", lambda d: -1),
    ("wgan-gp", lambda d: -1),
    ("least-squares", lambda d: d - 1),
    ("non-saturating", lambda d: -1 / (1 + math.exp(d))),
])
def test_g_losses_push_the_logits_up(name, derivative):
    d = torch.tensor([-1.5, 0.3], requires_grad=True)
    _, g_loss, _ = LOSSES[name]
    g_loss(d).backward()
    close(d.grad, [derivative(-1.5) / 2, derivative(0.3) / 2])      # halves: the loss is a mean


def hinge_losses_by_torch(real, fake):
    # For the target -1, torch's hinge loss is max(0, 1 - x).
    real_loss = F.hinge_embedding_loss(real, -torch.ones_like(real))
    fake_loss = F.hinge_embedding_loss(-fake, -torch.ones_like(fake))
    return real_loss + fake_loss, -fake.mean()


def nonsaturating_losses_by_torch(real, fake):
    real_as_real = F.binary_cross_entropy_with_logits(real, torch.ones_like(real))
    fake_as_fake = F.binary_cross_entropy_with_logits(fake, torch.zeros_like(fake))
    fake_as_real = F.binary_cross_entropy_with_logits(fake, torch.ones_like(fake))
    return real_as_real + fake_as_fake, fake_as_real


def least_squares_losses_by_torch(real, fake):
    real_to_1 = F.mse_loss(real, torch.ones_like(real))
    fake_to_0 = F.mse_loss(fake, torch.zeros_like(fake))
    fake_to_1 = F.mse_loss(fake, torch.ones_like(fake))
    return (real_to_1 + fake_to_0) / 2, fake_to_1 / 2


@pytest.mark.parametrize("name, by_torch", [
    ("hinge", hinge_losses_by_torch),
    ("non-saturating", nonsaturating_losses_by_torch),
    ("least-squares", least_squares_losses_by_torch),
])
def test_losses_equal_torchs(name, by_torch):
    real = leaf(7)
    fake = leaf(5)
    d_loss, g_loss, _ = LOSSES[name]
    torchs_of_d, torchs_of_g = by_torch(real, fake)
    agree(d_loss(real, fake), torchs_of_d, [real, fake])
    agree(g_loss(fake), torchs_of_g, [fake])


# ----------------------------------------------------------------------------------- penalties on D

def test_penalties_of_a_linear_d():
    # D(x) = <w, x> + b has the gradient w everywhere.
    w = leaf(3, 4, 4)
    x = leaf(5, 3, 4, 4)

    def D(x, y):
        return (w * x).sum((1, 2, 3)) + 3

    agree(r1_penalty(D, x, None), w.square().sum() / 2, [w])
    mix = torch.rand(5).double()
    agree(gradient_penalty(D, x, -x, None, mix), (w.norm() - 1)**2, [w])


def test_penalties_of_a_quadratic_d():
    # D(x) = x^T A x / 2 with a symmetric A has the gradient A x.
    A = leaf(12, 12)
    A = A + A.T
    x = leaf(5, 3, 2, 2)
    fake = leaf(5, 3, 2, 2)

    def D(x, y):
        return torch.einsum("ni,ij,nj->n", x.flatten(1), A, x.flatten(1)) / 2

    squared = (x.flatten(1) @ A).square().sum(1)
    close(biggan.squared_gradient_norm(D, x, None), squared)
    close(r1_penalty(D, x, None), squared.mean() / 2)

    # The gradient penalty is taken between the two sets: mix 0 is the real end, mix 1 the
    # generated one.
    for mix in 0.0, 0.25, 1.0:
        between = (1 - mix) * x + mix * fake
        norm = (between.flatten(1) @ A).norm(dim=1)
        mixes = torch.full((5,), mix).double()
        close(gradient_penalty(D, x, fake, None, mixes), (norm - 1).square().mean())


def test_r1_equals_torchs_jacobian_and_its_gradient_finite_differences():
    D = build(Discriminator, "shapes32")
    x = leaf(2, 3, 32, 32)
    y = torch.tensor([0, 2])

    def logits(x):
        return D(x, y)

    # (2, 2, 3, 32, 32): the derivative of logit i with respect to image j.
    jacobian = torch.autograd.functional.jacobian(logits, x)
    assert not jacobian[0, 1].any()         # a logit depends on its own image only
    mean_squared_norm = jacobian.square().sum() / 2     # over the two images
    close(r1_penalty(D, x, y), mean_squared_norm / 2)

    def penalty(W):
        def D_with_W(x, y):
            return torch.func.functional_call(D, {"blocks.1.conv1.weight": W}, (x, y))
        return r1_penalty(D_with_W, x, y)

    assert torch.autograd.gradcheck(penalty, D.blocks[1].conv1.weight, fast_mode=True)


def test_the_best_linear_d_under_wgan_gp():
    # One real image a, one generated image 0, and D(x) = w x with w > 0, whose gradient is w. Then
    #     loss = -w a + weight (w - 1)^2
    # Its derivative, -a + 2 weight (w - 1), is 0 at w = 1 + a / (2 weight).
    a, weight = 3.0, 10.0
    w = torch.tensor(1 + a / (2 * weight), requires_grad=True)

    def D(x, y):
        return w * x.flatten()

    real = torch.full((1, 1, 1, 1), a)
    fake = torch.zeros(1, 1, 1, 1)
    d_loss, _, _ = LOSSES["wgan-gp"]
    penalty = gradient_penalty(D, real, fake, None, torch.rand(1))
    loss = d_loss(D(real, None), D(fake, None)) + weight * penalty
    close(loss, -w * a + weight * (w - 1)**2, 1e-5)
    gradient, = torch.autograd.grad(loss, w)
    close(gradient, 0, 1e-5)


@pytest.mark.parametrize("gamma", [0, 1])
def test_a_linear_gan_circles_its_target_and_spirals_in_under_r1(gamma):
    """The Dirac-GAN (Mescheder et al. 2018): real images 2 + z, G(z) = 2 + e + z, D(x) = psi x.

    z has mean 0. So D minimises psi (2 + e) - 2 psi + gamma psi^2 / 2, and G minimises
    -psi (2 + e). In infinitely small steps against their gradients,
        e' = psi        psi' = -e - gamma psi
    which is a pendulum. Its distance to the target, e = psi = 0, changes as
        (e^2 + psi^2)' = 2 e psi + 2 psi (-e - gamma psi) = -2 gamma psi^2
    Without R1 it never changes. R1 is friction, which lets it fall."""
    e, psi = leaf(2)
    z = torch.tensor([1, -1])
    real = (2 + z).reshape(2, 1, 1, 1)
    fake = 2 + e + z

    def D(x, y):
        return psi * x.flatten()

    d_loss, g_loss, _ = LOSSES["wgan-gp"]
    loss_of_d = d_loss(D(real, None), D(fake.detach(), None))
    loss_of_d = loss_of_d + gamma * r1_penalty(D, real.double(), None)
    loss_of_g = g_loss(D(fake, None))
    gradient_of_psi, = torch.autograd.grad(loss_of_d, psi)
    gradient_of_e, = torch.autograd.grad(loss_of_g, e)
    close(-gradient_of_e, psi)
    close(-gradient_of_psi, -e - gamma * psi)


# ---------------------------------------------------------------------- augmentation for few images

def test_a_translation_is_the_shifted_image_and_its_gradient_the_shift_back():
    # A shift is linear: out = S x T^T, where S and T have ones where row - column is the shift. So
    # the gradient of <weights, out> is S^T weights T, the weights shifted back.
    x = torch.randn(1, 3, 16, 16, requires_grad=True)
    weights = torch.randn(1, 3, 16, 16)
    # An eighth of 16 pixels is 2, so there are 5 shifts each way, -2 ... 2. The numbers below
    # choose shift number 5 * 0.1 -> 0, which is 2 up, and number 5 * 0.7 -> 3, 1 to the right.
    shifted = translate(x, torch.tensor([[0.1, 0.7, 0]]))
    assert torch.equal(shifted, F.pad(x, (1, -1, -2, 2)))       # left, right, top, bottom
    gradient, = torch.autograd.grad((shifted * weights).sum(), x)
    assert torch.equal(gradient, F.pad(weights, (-1, 1, 2, -2)))


def test_a_point_translated_at_random_is_a_box_on_average():
    # Each of the 5 x 5 shifts once.
    numbers = (torch.arange(5) + 0.5) / 5
    r = F.pad(torch.cartesian_prod(numbers, numbers), (0, 1))
    points = torch.zeros(25, 1, 16, 16)
    points[:, 0, 8, 8] = 1
    box = torch.zeros(16, 16)
    box[6:11, 6:11] = 1 / 25
    mean = translate(points, r).mean(0)
    close(mean[0], box)


@pytest.mark.parametrize("numbers, rows, columns", [
    # The square has half the side: in the middle it is a quarter of the image.
    ((0.5, 0.5, 0), slice(4, 12), slice(4, 12)),
    # Centred on a corner, only a quarter of the square is inside: a sixteenth of the image.
    ((0, 0.9999, 0), slice(0, 4), slice(12, 16)),
])
def test_cutout_zeroes_a_square_and_passes_no_gradient_there(numbers, rows, columns):
    x = torch.rand(1, 3, 16, 16) + 1
    x.requires_grad_()
    left = torch.ones_like(x)
    left[:, :, rows, columns] = 0
    y = cutout(x, torch.tensor([numbers]))
    gradient, = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, x * left)
    assert torch.equal(gradient, left)


def test_changes_of_colour_keep_what_they_should():
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)

    def change(brightness=0.5, saturation=0.5, contrast=0.5):
        """The first image changed, and the second one not: 0.5 leaves an image as it is."""
        numbers = [[brightness, saturation, contrast], [0.5, 0.5, 0.5]]
        return biggan.colour(x, torch.tensor(numbers, dtype=torch.float64))

    for y in change(brightness=0.8), change(saturation=0.9), change(contrast=0.9):
        close(y[1], x[1], 1e-12)            # each image has its own numbers

    # Brightness adds a constant, 0.8 - 0.5.
    brighter, _ = change(brightness=0.8)
    close(brighter, x[0] + 0.3, 1e-12)

    # Saturation keeps each pixel's mean over the channels, its grey. At 0 only that is left.
    grey = x[0].mean(0)
    colourless, _ = change(saturation=0)
    close(colourless, grey.expand(3, 8, 8), 1e-12)
    colourful, _ = change(saturation=0.9)
    close(colourful.mean(0), grey, 1e-12)

    # Contrast keeps the image's mean, and multiplies the distances to it by 0.9 + 0.5.
    mean = x[0].mean()
    contrasting, _ = change(contrast=0.9)
    close(contrasting, mean + 1.4 * (x[0] - mean), 1e-12)


def test_a_policy_names_the_changes_and_gradients_pass_through_them_and_d():
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    y = torch.tensor([1])
    r = torch.rand(1, 3, 3).double()        # three numbers for each of the three changes
    assert augment(x, "", r) is x
    colour_then_cutout = cutout(biggan.colour(x, r[:, 0]), r[:, 2])
    assert torch.equal(augment(x, "cutout,colour", r), colour_then_cutout)

    D = Discriminator(small("biggan32")).double().eval()

    def logit(x):
        return D(augment(x, "colour,translation,cutout", r), y)

    x.requires_grad_()
    gradient, = torch.autograd.grad(logit(x), x)
    step = 1e-6 * torch.randn_like(x)
    difference = (logit(x + step) - logit(x - step)) / 2
    close(difference, [(gradient * step).sum()], 1e-10)


# -------------------------------------------------------------------- singular values (section 4.1)

def test_singular_values_are_the_diagonals_entries_and_torchs():
    diagonal = torch.tensor([1.0, 5.0, 2.0, 3.0])
    close(singular_values(torch.diag(diagonal)), [5, 3, 2])
    for shape in (6, 4), (4, 6), (8, 3, 3, 3), (1, 9):
        W = leaf(*shape)
        close(singular_values(W, 4), torch.linalg.svdvals(W.flatten(1))[:4])


def with_singular_values_5_3_2(rows=4, columns=3):
    """A layer whose weight has these singular values, and its first pair of singular vectors."""
    layer = SNLinear(columns, rows, eps=1e-12).double()
    U, _, Vh = torch.linalg.svd(leaf(rows, columns).detach(), full_matrices=False)
    S = torch.tensor([5, 3, 2]).double()
    layer.weight.data = U @ torch.diag(S) @ Vh
    return layer, U[:, 0], Vh[0]


@pytest.mark.parametrize("rows, columns", [(4, 3), (3, 4)])
def test_the_clamp_lowers_the_largest_singular_value_only(rows, columns):
    layer, _, _ = with_singular_values_5_3_2(rows, columns)
    goals_in_turn = [
        ({"fixed": 9}, [5, 3, 2]),          # it is below this goal already
        ({"ratio": 1.2}, [3.6, 3, 2]),      # 1.2 times the second largest
        ({"fixed": 2.5}, [3, 2.5, 2]),      # now 3 is the largest: each call lowers one value
        ({"fixed": 2.5}, [2.5, 2.5, 2]),
    ]
    for goal, expected in goals_in_turn:
        clamp_sigma(layer, **goal)
        close(torch.linalg.svdvals(layer.weight), expected)


@pytest.mark.parametrize("goal, excess", [
    ({"fixed": 3.5}, 1.5),
    ({"fixed": 6.0}, -1),
    ({"ratio": 1.5}, 0.5),
])
def test_the_pulls_gradient_is_twice_the_excess_times_u_v(goal, excess):
    # The derivative of sigma_0 is u v^T, so by the chain rule
    #     d (sigma_0 - goal)^2 / dW = 2 (sigma_0 - goal) u v^T
    # A goal of ratio * sigma_1 counts as a constant.
    layer, u, v = with_singular_values_5_3_2()
    pull = sigma_pull(layer, **goal)
    close(pull, excess**2)
    gradient, = torch.autograd.grad(pull, layer.weight)
    close(gradient, 2 * excess * torch.outer(u, v))


def test_weights_that_are_not_finite_have_no_singular_values():
    not_a_number = torch.tensor([[math.nan, 1], [2, 3]])
    squares_overflow = torch.full((5, 5), 1e30)
    for W in not_a_number, squares_overflow:
        assert singular_values(W).isnan().all()
        # They must not end the options about sigma with an error: the run stops with a sentence.
        layer = SNLinear(len(W), len(W))
        layer.weight.data = W.clone()
        clamp_sigma(layer, ratio=1.5)
        if W.isnan().any():
            assert sigma_pull(layer, ratio=1.5).isnan()


# ==================================================================================================
# Part 3: the same numbers, faster, and on many GPUs
# ==================================================================================================

# ------------------------------------------------------------------------------------ batch moments
# The moments over several processes are tested in the section "several processes".

def test_the_moments_gradient_is_that_of_finite_differences():
    assert torch.autograd.gradcheck(Moments.apply, leaf(2, 3, 2, 2))


def test_the_moments_of_bfloat16_are_taken_in_float32():
    x = (100 + torch.randn(64, 2, 16, 16)).bfloat16()
    mean, var = Moments.apply(x)
    close(mean, x.double().mean((0, 2, 3)), 1e-4)
    close(var, x.double().var((0, 2, 3), correction=0), 1e-3)


# ------------------------------------------------------------- resampling folded into a convolution

def test_resampling_and_a_3x3_convolution_are_one_4x4_convolution():
    layer = SNConv2d(3, 5, 3, eps=None).double()
    large = leaf(2, 3, 6, 8)
    too_small_to_pay = leaf(1, 3, 2, 2)     # upsample_conv3x3 does it in two steps
    for x in large, too_small_to_pay:
        inputs = [x, layer.weight, layer.bias]
        agree(biggan.upsample_conv3x3(x, layer), layer(repeat(x)), inputs)
        agree(biggan.conv3x3_downsample(x, layer), pool(layer(x)), inputs)


def test_the_mean_of_four_shifted_points_is_a_square():
    W = torch.zeros(1, 1, 3, 3)
    W[0, 0, 1, 1] = 4
    square = [
        [0, 0, 0, 0],
        [0, 1, 1, 0],
        [0, 1, 1, 0],
        [0, 0, 0, 0],
    ]
    close(biggan.mean_of_four_shifted(W)[0, 0], square)


def test_pooling_undoes_upsampling_and_1x1_convolutions_commute_with_both():
    x = leaf(2, 3, 4, 4)
    convolution = nn.Conv2d(3, 5, 1).double()
    close(pool(biggan.upsample(x)), x)
    close(convolution(biggan.upsample(x)), biggan.upsample(convolution(x)))
    close(convolution(pool(x)), pool(convolution(x)))


# -------------------------------------------------------------------- fused attention, folded sigma

def test_fused_attention_equals_torchs_with_scale_one():
    layer, x = attention_layer()
    layer.fused = True
    agree(layer(x), attention_by_torch(layer, x), [x, *layer.parameters()])


def test_folding_spectral_norm_keeps_the_output():
    layer = SNLinear(3, 5, eps=1e-4).eval()
    x = torch.randn(2, 3)
    before = layer(x)
    folded = biggan.fold_spectral_norm(layer)
    close(folded(x), before)
    assert normalized_weight(layer) is layer.weight     # without eps there is no spectral norm


# ------------------------------------------------------------------------------------------- scores

def test_frechet_distance_on_paper():
    # Let C1 = diag(a) and C2 = diag(b). Then (C1 C2)^(1/2) = diag(sqrt(a b)), and as
    #     a + b - 2 sqrt(a b) = (sqrt a - sqrt b)^2
    # the distance is |m - n|^2 plus the sum of (sqrt a - sqrt b)^2. Here n is 0.
    m = np.array([1, 2, 0, 2])
    zero = np.zeros(4)
    a = np.diag([1, 4, 9, 16])
    b = np.diag([4, 4, 1, 0])
    from_means = 1 + 4 + 0 + 4
    from_covariances = (1 - 2)**2 + (2 - 2)**2 + (3 - 1)**2 + (4 - 0)**2

    # Rotating both covariances in the same way changes no trace, so it changes nothing.
    rotation, _ = np.linalg.qr(np.vander([1, 2, 3, 4]))
    for Q in np.eye(4), rotation:
        distance = metrics.frechet_distance(m, Q @ a @ Q.T, zero, Q @ b @ Q.T)
        close(distance, from_means + from_covariances)


def test_frechet_distance_equals_the_eigenvalues_of_the_plain_product():
    # The eigenvalues of (C1 C2)^(1/2) are the square roots of those of C1 C2. The product is not
    # symmetric, so the witness needs an eigenvalue routine for any matrix.
    rng = np.random.default_rng(1)
    m, n = rng.normal(size=(2, 4))
    covariances = []
    for _ in range(2):
        points = rng.normal(size=(4, 30)) * rng.uniform(1, 3, (4, 1))
        covariances.append(np.cov(points))
    a, b = covariances
    eigenvalues = np.linalg.eigvals(a @ b).real
    trace_of_root = np.sqrt(eigenvalues).sum()
    expected = ((m - n)**2).sum() + np.trace(a + b) - 2 * trace_of_root
    close(metrics.frechet_distance(m, a, n, b), expected)


def test_frechet_distance_of_fewer_points_than_dimensions():
    # C1 = X^T X and C2 = Y^T Y have rank 100 of 500. As in the docstring of frechet_distance, with
    # A = X^T and B = Y^T, the trace of the root is the sum of the singular values of A^T B = X Y^T.
    X, Y = np.random.default_rng(0).normal(size=(2, 100, 500))
    zero = np.zeros(500)
    a = X.T @ X
    b = Y.T @ Y
    trace_of_root = np.linalg.svd(X @ Y.T, compute_uv=False).sum()
    close(metrics.frechet_distance(zero, a, zero, b), np.trace(a + b) - 2 * trace_of_root)

    # The distance of a distribution to itself is 0, but for rounding, and never below.
    assert 0 <= metrics.frechet_distance(zero, a, zero, a) < 1e-9 * np.trace(a)


def test_inception_score_on_paper_and_from_torchs_divergence():
    # If all images have the same probabilities p(y|x), these are their mean p(y), too: the
    # divergence is 0, and the score exp(0) = 1.
    close(metrics.inception_score(np.full((100, 5), 0.2)), [1, 0])

    # If the classifier is certain of each image, and all k classes are equally frequent, each
    # image's divergence is log(1 / (1/k)) = log k, and the score is k.
    close(metrics.inception_score(np.tile(np.eye(5), (20, 1))), [5, 0])

    p = torch.rand(50, 6, dtype=torch.float64).softmax(1)
    log_mean = p.mean(0).log().expand(50, 6)
    divergence = F.kl_div(log_mean, p, reduction="batchmean")
    score, _ = metrics.inception_score(p.numpy(), splits=1)
    close(score, divergence.exp())


def test_kernel_distance_of_points_on_paper():
    # In one dimension the kernel is k(x, y) = (x y + 1)^3:
    #     k(0, 0) = 1    k(0, 1) = 1    k(1, 1) = 8
    # The point 0, twice, against the point 1, twice: within the sets 1 and 8, between them 1.
    close(metrics.kernel_distance([[0.0], [0]], [[1.0], [1]]), [1 + 8 - 2 * 1, 0])

    # A point and itself are no pair. So within {0, 1} there is only k(0, 1) = 1. Between {0, 1} and
    # {0, 1} all four pairs count, and their mean is (1 + 1 + 1 + 8) / 4.
    between = (1 + 1 + 1 + 8) / 4
    close(metrics.kernel_distance([[0.0], [1]], [[0.0], [1]]), [1 + 1 - 2 * between, 0])


def test_kernel_distance_is_the_mean_over_all_pairs_and_has_no_bias():
    def kernel(x, y):
        products = (x[:, None] * y).sum(2)              # x . y of all pairs
        return (products / 3 + 1)**3                    # the points have 3 dimensions

    a = torch.randn(7, 3)
    b = torch.rand(7, 3)
    different = ~torch.eye(7, dtype=torch.bool)         # a point and itself are no pair
    within_a = kernel(a, a)[different].mean()
    within_b = kernel(b, b)[different].mean()
    between = kernel(a, b).mean()
    close(metrics.kernel_distance(a, b), [within_a + within_b - 2 * between, 0])

    # Two samples of one distribution have distance 0 on average.
    a, b = torch.randn(2, 2000, 20)
    mean, deviation = metrics.kernel_distance(a, b, subsets=50, size=200)
    assert abs(mean) < deviation


def test_precision_and_recall_on_paper():
    # Points on a line, and k = 1: a point's radius is the distance to its nearest neighbour.
    #     real 0, 1, 10       radii 1, 1, 9
    #     fake 0.5, 30, 31    radii 29.5, 1, 1
    # The real balls reach from -1 to 2 and from 1 to 19: of the fake points only 0.5 lies in them.
    # The ball around the fake 0.5 reaches from -29 to 30, and all real points lie in it.
    real = torch.tensor([[0.0], [1], [10]])
    fake = torch.tensor([[0.5], [30], [31]])
    precision = 1 / 3
    recall = 1
    close(metrics.precision_recall(real, fake, k=1), [precision, recall])


def test_precision_and_recall_equal_those_of_torchs_distances():
    def covered(points, centres):
        # The smallest distance is the one to the point itself, so the third neighbour is fourth.
        radii = torch.cdist(centres, centres).kthvalue(4).values
        inside = torch.cdist(points, centres) <= radii
        return inside.any(1).double().mean()

    real = leaf(1500, 5)                # more points than are compared at a time
    fake = 1.5 * leaf(1200, 5)
    close(metrics.precision_recall(real, fake), [covered(fake, real), covered(real, fake)])
    assert metrics.precision_recall(real, real) == (1, 1)
    assert metrics.precision_recall(real, real + 100) == (0, 0)


def test_sliced_wasserstein_of_a_shift_is_its_mean_projection():
    # Moving all points by delta moves every projection on u by <delta, u> and keeps their order, so
    # the distance on this line is |<delta, u>|. In the plane <delta, u> = |delta| cos(angle), and
    # the mean of |cos| over all angles is 2 / pi. Here |delta| = sqrt(9 + 16) = 5.
    a = torch.randn(500, 2)
    delta = torch.tensor([3, 4])
    distance = metrics.sliced_wasserstein(a, a + delta, projections=20_000)
    close(distance, 5 * 2 / math.pi, rtol=0.01)

    # The order in which points are listed does not matter.
    close(metrics.sliced_wasserstein(a, a[torch.randperm(500)]), 0)


def test_on_a_line_sorting_is_the_best_of_all_pairings():
    a, b = torch.randn(2, 6, 1)
    costs = []
    for order in itertools.permutations(range(6)):
        moved = (a - b[list(order)]).abs()
        costs.append(moved.mean())
    close(metrics.sliced_wasserstein(a, b), min(costs))


def test_the_laplacian_pyramid_adds_up_to_the_image():
    x = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    fine, middle, coarse = metrics.laplacian_pyramid(x)
    half = metrics.enlarge(coarse) + middle
    close(metrics.enlarge(half) + fine, x)

    # The finest stripes are +1 and -1 in turn. The filter (1 4 6 4 1) / 16 blurs them away before
    # the image is halved, as 1 - 4 + 6 - 4 + 1 = 0: they stay in the fine band. A constant passes
    # the filter unchanged, as 1 + 4 + 6 + 4 + 1 = 16: it is all that is left in the coarse band.
    stripes = (-1.0)**torch.arange(32).expand(1, 3, 32, 32)
    fine, coarse = metrics.laplacian_pyramid(9 + stripes)
    close(fine, stripes, 1e-5)
    close(coarse, torch.full_like(coarse, 9), 1e-5)


def test_patches_are_cut_from_the_image():
    # Pixel (i, j) of image n is 100 n + 10 i + j. So the four pixels of a 2x2 patch are its first
    # one plus 0, 1, 10, 11, and the hundreds tell the image.
    images = torch.arange(200).reshape(2, 1, 10, 10)
    patches = metrics.patches(images, torch.Generator(), per_image=3, side=2)
    first = patches[:, :1]
    assert (patches - first).tolist() == [[0, 1, 10, 11]] * 6
    assert (first.flatten() // 100).tolist() == [0, 0, 0, 1, 1, 1]

    # Rows and columns are drawn independently: not all patches lie on the diagonal.
    rows = first // 10 % 10
    columns = first % 10
    assert not torch.equal(rows, columns)

    # A patch of several channels lists its pixels channel after channel.
    colours = torch.tensor([1.0, 2, 3]).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    patch, = metrics.patches(colours, torch.Generator(), per_image=1, side=2)
    assert patch.tolist() == [1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3]


def drawn_shapes(first, end):
    """Shapes on which no model is trained, (n, 32, 32, 3) uint8, classes in turn."""
    data = train.Shapes(32, held_out=True)
    return np.stack([data[i][0] for i in range(first, end)])


def test_worse_images_are_farther_away():
    real = drawn_shapes(0, 100)
    other = drawn_shapes(100, 200)

    def distance(images):
        images = images.clip(0, 255).astype(np.uint8)
        return sum(metrics.pyramid_distances(real, images).values())

    pixel_noise = np.random.default_rng(0).normal(size=other.shape)
    little_noise = other + 10 * pixel_noise
    much_noise = other + 40 * pixel_noise
    unchanged = distance(other)
    assert unchanged < distance(little_noise) < distance(much_noise)

    no_colour = other.mean(3, keepdims=True).repeat(3, 3)
    low_contrast = other / 2
    assert distance(no_colour) > 2 * unchanged
    assert distance(low_contrast) > 2 * unchanged


# ------------------------------------------------------------------------- commands and their files

# Options of a run that takes seconds: a narrow model of drawn shapes, small batches.
TINY = (
    "--preset shapes --ch 8 --batch 8 --ema-start 0 --precision fp32 "
    "--log-every 2 --save-every 2 --sample-every 6"
).split()


def words(arguments):
    """The words of a command line that is given in parts: strings, paths or numbers."""
    return " ".join(map(str, arguments)).split()


def start(*arguments, module=train):
    """Run a command in this process."""
    module.main(words(arguments))


def refused(monkeypatch, capsys, *arguments, module=train):
    """Run a command that must be refused, as the shell would. Returns the sentence that says why.

    It is all that goes to stderr, but for one warning at most."""
    capsys.readouterr()                     # forget what was printed before
    monkeypatch.setattr(sys, "argv", ["command", *words(arguments)])
    with pytest.raises(SystemExit) as stop:
        sample.run(module.main)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2, lines
    assert "error: " in lines[-1], lines
    assert len(lines) <= 2, lines
    return lines[-1]


@pytest.fixture
def warned(monkeypatch):
    """A list that collects the warnings given during the test."""
    lines = []
    for module in sample, train:
        monkeypatch.setattr(module, "warn", lines.append)
    return lines


def run_command(script, *arguments, **options):
    """Start a command in a process of its own.

    script: the name of one of the project's files; or `-c`, and the argument is code; or `-m`, and
    the arguments are a module and its own."""
    if script != "-c":
        arguments = words(arguments)
    if script not in ("-c", "-m"):
        script = HERE / script
    return subprocess.Popen(
        [sys.executable, script, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **options,
    )


def torchrun(n, *arguments, **options):
    """Start a command in n processes that work together."""
    launcher = f"torch.distributed.run --standalone --nproc_per_node {n}"
    return run_command("-m", launcher, *arguments, **options)


def finish(process, status=0):
    """Wait for a command, which must end with this status. Returns its output and its errors."""
    output, errors = process.communicate(timeout=600)
    assert process.returncode == status, errors
    return output, errors


def wait_until(condition, process):
    """Wait until condition() is true. The process must not end before that."""
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def weights_of(out, step):
    """What the checkpoint of this step of a run holds."""
    return sample.read_tensors(out / "checkpoints" / f"step-{step:08d}.pt")


def steps_kept(out):
    """The steps of which a run's folder has checkpoints, in order."""
    names = [path.stem for path in sample.checkpoints_of(out)]
    return [int(name.removeprefix("step-")) for name in names]


def log_of(out):
    """The lines of a run's log, each a dictionary."""
    lines = (out / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def listing(folder):
    """All paths in a folder, and when each was changed: equal if nothing was written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def same(a, b, rounding=0, name=""):
    """Assert that all tensors of `a`, which may be nested dictionaries, are those of `b`.

    rounding: the relative difference that is allowed; 0 asks for the same bits.

    The bias of a convolution before a batch norm may differ more. Batch norm subtracts the mean,
    and the bias with it, so its true gradient is 0 and the computed one nothing but rounding. Adam
    divides a gradient by its size, so these biases move, in a direction that rounding decides."""
    if isinstance(a, dict):
        for key in a:
            same(a[key], b[key], rounding, str(key))
    elif isinstance(a, torch.Tensor):
        moved_by_rounding = re.search(r"conv\w+\.bias", name)
        atol = rounding * (100 if moved_by_rounding else 1e-3)
        close(a, b, atol, rtol=rounding)


# --------------------------------------------------------------------------------------------- data

def picture(folder, name, mode="RGB", size=(40, 30), colour=0):
    """Save an image of one colour, and make the folder if there is none. Returns the path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    Image.new(mode, size, colour).save(path)
    return path


@pytest.mark.parametrize("mode, name", [
    ("RGB", "a.jpg"),
    ("CMYK", "a.jpg"),
    ("L", "a.PNG"),
    ("LA", "a.png"),
    ("P", "a.gif"),
    ("RGBA", "a.webp"),
])
def test_any_mode_and_size_becomes_an_rgb_square(tmp_path, mode, name):
    for size in (40, 30), (7, 90), (1, 1):
        path = picture(tmp_path, name, mode, size)
        assert train.listing(tmp_path) == ([bytes(path)], [], 0)
        assert train.decode_image(path.read_bytes(), 16).shape == (16, 16, 3)


def test_transparency_shows_white(tmp_path):
    transparent_black = (0, 0, 0, 0)
    path = picture(tmp_path, "a.png", "RGBA", colour=transparent_black)
    assert (train.decode_image(path.read_bytes(), 8) == 255).all()


def test_the_crop_is_central_and_the_reduction_an_average(tmp_path):
    # The image is 8 wide and 4 high, so its central square has the columns 2 to 5: 100, 200, 0, 0.
    # Each 2x2 block of it becomes the mean of its four pixels: (100 + 200) / 2 = 150, and 0.
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, 2] = 100
    pixels[:, 3] = 200
    pixels[:, 6:] = 255                     # is cut off
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    red = train.decode_image(path.read_bytes(), 2)[:, :, 0]
    assert red.tolist() == [[150, 0], [150, 0]]


def test_a_large_jpeg_is_decoded_at_an_eighth_and_looks_the_same(tmp_path, monkeypatch):
    image, _ = train.Shapes(64)[4]
    path = tmp_path / "a.jpg"
    large = Image.fromarray(image).resize((2048, 2048), Image.Resampling.NEAREST)
    large.save(path)

    decoded = []                            # the sizes of the images that are decoded
    original_convert = Image.Image.convert

    def convert(self, *arguments):
        decoded.append(self.size)
        return original_convert(self, *arguments)

    monkeypatch.setattr(Image.Image, "convert", convert)
    difference = train.decode_image(path.read_bytes(), 64) - image.astype(int)
    assert np.abs(difference).mean() < 2
    assert decoded == [(2048 // 8, 2048 // 8)]


def test_classes_are_the_sorted_sub_folders_or_one(tmp_path):
    picture(tmp_path / "b", "0.png")
    picture(tmp_path / "a", "0.png")
    picture(tmp_path / "a", "1.png")
    data = train.open_data(tmp_path)
    assert data.classes == ["a", "b"]
    assert data.resolution is None          # each image has its own size
    assert data[0][0].shape == (30, 40, 3)
    assert data.labels.tolist() == [0, 0, 1]
    assert [data[i][1] for i in range(3)] == [0, 0, 1]

    # A folder of images without sub-folders is one class, which is called the same in any folder.
    assert train.open_data(tmp_path / "a").classes == train.open_data(tmp_path / "b").classes

    # Pillow can write PDF but not read it, so such a file is no image.
    (tmp_path / "a/2.pdf").touch()
    images, folders, others = train.listing(tmp_path / "a")
    assert (len(images), folders, others) == (2, [], 1)


def test_a_corrupt_or_16_bit_file_is_named_once_and_replaced_by_the_next(tmp_path, warned):
    picture(tmp_path / "a", "0.png", colour="red")
    picture(tmp_path / "a", "1.png").write_bytes(b"not an image")
    picture(tmp_path / "a", "2.png", colour="blue")
    picture(tmp_path / "a", "3.png", "I;16")
    picture(tmp_path / "b", "0.png")
    data = train.open_data(tmp_path, 8)
    for _ in range(2):
        image, label = data[1]
        assert image[0, 0].tolist() == [0, 0, 255]      # the blue of a/2.png
        assert label == 0
        image, label = data[3]
        assert image[0, 0].tolist() == [255, 0, 0]      # after the last of a class comes its first
        assert label == 0
    named = [re.search(r"a/\d", str(line))[0] for line in warned]
    assert named == ["a/1", "a/3"]
    assert "(cannot identify image file)" in str(warned[0])


def test_a_class_without_a_readable_image_is_refused(tmp_path, warned):
    data = tmp_path / "data"
    picture(data / "a", "0.png")
    picture(data / "b", "0.png").write_bytes(b"not an image")
    with pytest.raises(sample.UserError, match="none of the images of class b can be read"):
        start(*TINY, f"--data {data} --steps 2 --out {tmp_path}/run")
    # If it is packed, the class has no images.
    start(f"--preset shapes --data {data} --pack {tmp_path}/packed")
    train.open_data(tmp_path / "packed")
    assert "1 of 2 classes have no images" in warned[-1]


def test_a_packed_folder_equals_the_folder_and_trains_to_the_same_weights(tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (66, 32, 32, 3), np.uint8)
    for i, image in enumerate(images):
        label = "ab"[i % 2]
        path = picture(tmp_path / "plain" / label, f"{i}.png")
        Image.fromarray(image).save(path)
    # What cannot be read is not packed, and does not count.
    broken = tmp_path / "plain/a/0.png"
    broken.write_bytes(b"not an image")
    start(f"--preset shapes --data {tmp_path}/plain --pack {tmp_path}/packed")
    broken.unlink()
    plain = train.open_data(tmp_path / "plain")
    packed = train.open_data(tmp_path / "packed")
    assert plain.classes == packed.classes
    assert len(plain) == len(packed) == 65
    for i in range(65):
        plain_image, plain_label = plain[i]
        packed_image, packed_label = packed[i]
        assert np.array_equal(plain_image, packed_image)
        assert plain_label == packed_label

    for name in "plain", "packed":
        data = f"--data {tmp_path}/{name}"
        start(*TINY, data, "--steps 2 --flip 0.5", f"--out {tmp_path}/of/{name}")
    same(weights_of(tmp_path / "of/plain", 2), weights_of(tmp_path / "of/packed", 2))


def test_a_packed_folder_is_sent_to_a_worker_without_its_images(tmp_path):
    # DataLoader pickles a data set for its worker processes where they cannot inherit it.
    images = np.random.default_rng(0).integers(0, 255, (20, 32, 32, 3), np.uint8)
    labels = np.arange(20) % 2
    train.pack(train.Arrays(images, labels, ["a", "b"]), tmp_path / "packed")
    data = train.open_data(tmp_path / "packed")
    sent = pickle.dumps(data)
    assert len(sent) < 1000 < images.nbytes

    received = pickle.loads(sent)
    assert received.classes == data.classes == ["a", "b"]
    assert received.resolution == data.resolution == 32
    assert len(received) == len(data) == 20
    for i in range(20):
        image, label = received[i]
        assert np.array_equal(image, images[i])
        assert label == labels[i]


def test_interrupted_packing_leaves_no_data_set_and_may_be_repeated(tmp_path, monkeypatch):
    data = train.Arrays(np.zeros((1, 8, 8, 3), np.uint8), [0], ["a"])
    packed = tmp_path / "packed"
    # Calling None is a TypeError. It comes at the last moment, when packed.json gets its name.
    with monkeypatch.context() as interrupted, pytest.raises(TypeError):
        interrupted.setattr(os, "replace", None)
        train.pack(data, packed)
    with pytest.raises(sample.UserError, match="holds no images"):
        train.open_data(packed)

    train.pack(data, packed)
    assert len(train.open_data(packed)) == 1

    # What a process that was killed has left is removed, and so is half of a finished one.
    again = tmp_path / "again"
    picture(tmp_path / "data", "a.png")
    again.mkdir()
    (again / "images.npy.0123.tmp").touch()
    (again / "packed.json").touch()
    start(f"--preset shapes --data {tmp_path}/data --pack {again}")
    assert sorted(os.listdir(again)) == ["images.npy", "packed.json"]

    # Nothing is packed into a folder that holds a finished pack, or other files.
    picture(tmp_path / "mine", "a.png")
    (tmp_path / "array").mkdir()
    (tmp_path / "array/images.npy").touch()
    for folder in packed, tmp_path / "mine", tmp_path / "array":
        with pytest.raises(sample.UserError, match="holds files already"):
            train.pack(data, folder)


def test_cifar_10_is_fetched_checked_and_packed(server, tmp_path, monkeypatch):
    # The official layout of an image: its label, then 1024 numbers each of red, green and blue.
    # Here each file has one image. That of file k has the label 9 - k. Its red is k everywhere, its
    # green is the number of the row, and its blue is 200.
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    classes = "airplane automobile bird cat deer dog frog horse ship truck".split()
    (folder / "batches.meta.txt").write_text("\n".join(classes) + "\n\n")
    names = [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]
    rows = [pixel // 32 for pixel in range(1024)]
    for k, name in enumerate(names):
        record = [9 - k] + 1024 * [k] + rows + 1024 * [200]
        (folder / f"{name}.bin").write_bytes(bytes(record))
    served, address = server
    archive = Path(shutil.make_archive(served / "c", "gztar", tmp_path, folder.name))

    monkeypatch.setattr(train, "CIFAR10_URL", f"{address}/c.tar.gz")
    with pytest.raises(sample.UserError, match="invalid hash"):
        train.fetch_cifar10(tmp_path / "data")

    right_hash = hashlib.sha256(archive.read_bytes()).hexdigest()
    monkeypatch.setattr(train, "CIFAR10_SHA256", right_hash)
    train.fetch_cifar10(tmp_path / "data")
    data = train.open_data(tmp_path / "data/cifar10")
    test = train.open_data(tmp_path / "data/cifar10-test")
    assert data.classes == test.classes == classes
    items = [data[k] for k in range(5)] + [test[0]]
    for k, (image, label) in enumerate(items):
        assert label == 9 - k
        for row in range(32):
            assert (image[row] == [k, row, 200]).all()


def test_shapes_lie_inside_the_picture_are_reproducible_and_others_than_the_held_out_ones():
    shapes = train.Shapes(32)
    shapes_again = train.Shapes(32)
    others = train.Shapes(32, held_out=True)
    for i in range(200):
        image, label = shapes[i]
        again, _ = shapes_again[i]
        held_out, held_out_label = others[i]
        assert label == held_out_label == i % 10
        assert np.array_equal(image, again)
        assert not np.array_equal(image, held_out)

        # The border shows the background alone, and the shape stands out from it.
        background = image[0, 0]
        assert (image[[0, -1]] == background).all()
        assert (image[:, [0, -1]] == background).all()
        contrast = np.abs(image.astype(int) - background)
        assert contrast.max() > 60


def test_every_epoch_shows_each_image_once_and_may_be_entered_anywhere():
    def images_from(position, n_batches, batch=4):
        """The next images from a position on, of ten."""
        order = train.in_order(10, batch, position, seed=1, rows=range(batch))
        items = []
        for indices in itertools.islice(order, n_batches):
            items += indices
        return items

    items = images_from(0, n_batches=10)
    epochs = [items[k:k + 10] for k in range(0, 40, 10)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(10))
    assert epochs[0] != epochs[1]

    # From position 12 on, the same images come as in a run from the start. So they do in batches of
    # another size.
    assert images_from(12, n_batches=2) == items[12:20]
    assert images_from(0, n_batches=5, batch=8) == items


def test_streams_of_other_names_or_numbers_have_other_seeds():
    # The streams of training, and how many numbers tell the generators of each apart.
    streams = {
        "noise": 3,                         # seed, step, turn
        "penalty": 3,
        "augmentation": 3,
        "order": 2,                         # seed, epoch
        "mirror": 2,                        # seed, batch
        "diversity": 1,                     # seed
    }
    seeds = []
    for name, count in streams.items():
        for numbers in itertools.product([0, 1, 3], repeat=count):
            seed = train.generator(name, *numbers).initial_seed()
            assert seed == train.generator(name, *numbers).initial_seed()
            seeds.append(seed)
    assert len(seeds) == 3 * 27 + 2 * 9 + 3
    assert len(set(seeds)) == len(seeds)


def test_batches_are_the_images_in_order_from_any_step_on():
    t, _ = trainer("--flip 0.5 --d-steps 2")
    data = train.Shapes(32)
    images_before = 3 * 2 * 8               # three steps, two updates of D in each, a batch of 8
    order = train.in_order(len(data), 8, images_before, seed=0, rows=range(8))
    batches = train.batches(data, t.args, 3, t.device)
    mirrored = []
    for (x, y), indices in itertools.islice(zip(batches, order), 4):
        for image, label, i in zip(x, y, indices, strict=True):
            pixels, expected_label = data[i]
            expected = torch.tensor(pixels).permute(2, 0, 1).float() / 127.5 - 1
            is_mirrored = torch.equal(image, expected.flip(2))
            assert label == expected_label
            assert is_mirrored or torch.equal(image, expected)
            mirrored.append(is_mirrored)

    # About half of the 32 images are mirrored, and not the same ones in every batch.
    assert 8 < sum(mirrored) < 24
    assert mirrored[:8] != mirrored[8:16]


# -------------------------------------------------------------------------------- the training step

def trainer(*arguments):
    """A Trainer of a small model of drawn shapes, and its endless real batches."""
    args = train.parse_settings(words([*TINY, *arguments]))
    config = train.model_config(args)
    t = train.Trainer(args, config, torch.device("cpu"))
    return t, train.batches(train.Shapes(32), args, 0, t.device)


# The whole step again, written as naively as possible: an image at a time where gradients of images
# are needed, separate passes for real and generated images, torch's Adam as it comes, and no
# network frozen.

def naive_gradient_norms(D, x, y):
    """|d D(x, y) / dx| of each image: x (N, 3, R, R), y (N,) -> (N,). Can be differentiated."""
    norms = []
    for image, label in zip(x.split(1), y.split(1)):
        image = image.clone().requires_grad_()
        gradient, = torch.autograd.grad(D(image, label), image, create_graph=True)
        norms.append(gradient.norm())
    return torch.stack(norms)


def naive_loss_d(loss, gamma, D, real, real_labels, fake, fake_labels, mix):
    """D's loss and its penalty, as the papers write them."""
    real_logits = D(real, real_labels)
    fake_logits = D(fake, fake_labels)
    if loss == "hinge":
        hinge = F.relu(1 - real_logits) + F.relu(1 + fake_logits)
        r1 = gamma / 2 * naive_gradient_norms(D, real, real_labels)**2
        return (hinge + r1).mean()
    if loss == "non-saturating":
        p_real = real_logits.sigmoid()
        p_fake = fake_logits.sigmoid()
        return -(p_real.log() + (1 - p_fake).log()).mean()
    # WGAN-GP: the penalty is taken on lines from real images to generated ones.
    mix = mix[:, None, None, None]
    between = (1 - mix) * real + mix * fake
    penalty = 10 * (naive_gradient_norms(D, between, real_labels) - 1)**2
    return (fake_logits - real_logits + penalty).mean()


def naive_loss_g(loss, fake_logits):
    if loss == "non-saturating":
        return -fake_logits.sigmoid().log().mean()
    return -fake_logits.mean()


def naive_orthogonal_penalty(G):
    """|| W W^T * (1 - I) ||^2, summed over all of G's weights but the class embedding."""
    total = 0
    for name, W in G.named_parameters():
        if W.ndim > 1 and name != "shared.weight":
            W = W.flatten(1)
            products = W @ W.T * (1 - torch.eye(len(W)))
            total = total + products.square().sum()
    return total


@pytest.mark.parametrize("loss, r1, policy", [
    ("hinge", 0, ""),
    ("hinge", 10, ""),
    ("wgan-gp", 0, "colour"),
    ("non-saturating", 0, "translation,cutout"),
])
def test_a_step_is_two_updates_of_d_one_of_g_and_one_of_the_ema(loss, r1, policy):
    # Adam's first updates are little more than the signs of the gradients, so a gradient near 0, of
    # which rounding decides the sign, would move a weight to another place. Hence float64, and a
    # seed with which no gradient is that small.
    t, real_batches = trainer(
        "--d-steps 2 --ortho 0.01 --ema 0.9 --g-lr 1e-3 --d-lr 1e-3 --precision fp64 --seed 3",
        f"--loss {loss} --r1 {r1}",
        f"--augment {policy}" if policy else "",
    )
    # D's u would move in every forward pass, and the naive step needs more of them. In evaluation
    # mode it rests. (D has nothing else that depends on the mode.)
    t.D.eval()
    G = copy.deepcopy(t.G)
    D = copy.deepcopy(t.D)
    ema = copy.deepcopy(t.ema.model)
    adam_G = torch.optim.Adam(G.parameters(), lr=1e-3, betas=(0.0, 0.99))
    adam_D = torch.optim.Adam(D.parameters(), lr=1e-3, betas=(0.0, 0.99))

    # What the step works with: two real batches for D, and random numbers for G's turn and D's two.
    batches = [next(real_batches), next(real_batches)]
    random_numbers = [t.random_numbers(turn) for turn in range(3)]
    for_G, *for_D = random_numbers
    t.train_step(iter(batches))

    # Two updates of D.
    for (real, real_labels), (z, labels, mix, r) in zip(batches, for_D):
        if loss == "wgan-gp":
            labels = real_labels
        fake = G(z, labels).detach()
        fake = augment(fake, policy, r[:, 0])
        real = augment(real.double(), policy, r[:, 1])
        adam_D.zero_grad()
        naive_loss_d(loss, r1, D, real, real_labels, fake, labels, mix).backward()
        adam_D.step()
    # D's gradients are still those of its second update: G's has added nothing to them.
    for ours, naive in zip(t.D.parameters(), D.parameters()):
        close(ours.grad, naive.grad, 1e-9)

    # One update of G.
    z, labels, _, r = for_G
    fake = augment(G(z, labels), policy, r[:, 0])
    loss_g = naive_loss_g(loss, D(fake, labels))
    (loss_g + 0.01 * naive_orthogonal_penalty(G)).backward()
    adam_G.step()

    # One update of the EMA, of its buffers too.
    for average, newest in zip(ema.state_dict().values(), G.state_dict().values()):
        average.copy_(0.9 * average + 0.1 * newest)

    same(t.G.state_dict(), G.state_dict(), 1e-8)
    same(t.D.state_dict(), D.state_dict(), 1e-8)
    same(t.ema.model.state_dict(), ema.state_dict(), 1e-8)


def test_every_turn_of_every_step_draws_other_random_numbers():
    t, real_batches = trainer("--d-steps 2 --precision fp64")
    drawn = [t.random_numbers(turn) for turn in range(3)]
    t.train_step(real_batches)
    drawn += [t.random_numbers(turn) for turn in range(2)]
    sums_of_z = {z.sum().item() for z, _, _, _ in drawn}
    assert len(sums_of_z) == 5
    # Generated and real images are augmented by other numbers, too.
    sums_of_r = {r[:, 0].sum().item() for _, _, _, r in drawn}
    sums_of_r |= {r[:, 1].sum().item() for _, _, _, r in drawn}
    assert len(sums_of_r) == 10


class Scalar(nn.Module):
    """A network with one parameter: function(value, x)."""

    def __init__(self, value, function):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))
        self.function = function

    def forward(self, x, y):
        return self.function(self.value, x)


def test_a_step_of_two_parameters_on_paper():
    # G makes every number of an image theta. D is psi times the mean of an image's n numbers. With
    # m, the mean of the real images, D's logits are psi m on average for real images and psi theta
    # for generated ones. Both lie between -1 and 1, where hinge's max is never 0.
    #
    # D's loss is 1 - psi m + 1 + psi theta = 2 + psi (theta - m).
    # d D(x) / dx is psi / n in each of n numbers, so R1 is gamma / 2 * n (psi / n)^2
    # = gamma psi^2 / (2 n). The derivatives of loss and penalty by psi add up to
    #     theta - m + gamma psi / n
    # G's loss is -psi theta, with the psi that D has now. Its derivative by theta is -psi.
    theta, psi, lr, gamma = 0.4, 0.3, 0.1, 50
    n = 3 * 32 * 32
    t, real_batches = trainer("--ortho 0 --r1", gamma)
    t.G = Scalar(theta, lambda theta, z: theta.expand(len(z), 3, 32, 32))
    t.D = Scalar(psi, lambda psi, x: psi * x.mean((1, 2, 3)))
    t.parallel_G = t.G
    t.parallel_D = t.D
    t.opt_G = torch.optim.SGD(t.G.parameters(), lr)
    t.opt_D = torch.optim.SGD(t.D.parameters(), lr)
    t.ema = EMA(t.G, 0.9)

    real, real_labels = next(real_batches)
    m = real.mean().item()
    logged = t.train_step(iter([(real, real_labels)]))

    new_psi = psi - lr * (theta - m + gamma * psi / n)
    new_theta = theta - lr * -new_psi
    close(t.D.value.detach(), new_psi, 1e-5)
    close(t.G.value.detach(), new_theta, 1e-5)
    close(t.ema.model.value.detach(), 0.9 * theta + 0.1 * new_theta, 1e-5)
    expected = {
        "D_real": psi * m,
        "D_loss": 2 + psi * (theta - m),
        "D_penalty": gamma * psi**2 / (2 * n),
        "G_loss": -new_psi * theta,
        "G_grad": new_psi,                  # a norm, so without its sign
    }
    for name, value in expected.items():
        close(logged[name], value, 1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("penalty", ["--r1 10", "--loss wgan-gp"])
def test_penalties_on_augmented_images_are_nearly_those_of_float32(precision, penalty):
    exact, real_batches = trainer("--augment translation --precision fp32", penalty)
    rounded, _ = trainer("--augment translation --precision", precision, penalty)
    batch = next(real_batches)
    expected = exact.train_step(iter([batch]))["D_penalty"].item()
    found = rounded.train_step(iter([batch]))["D_penalty"].item()
    assert expected > 1e-2
    assert found == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_takes_nearly_the_step_of_float32(precision):
    exact, real_batches = trainer("--ortho 1e-2 --precision fp32")
    rounded, _ = trainer("--ortho 1e-2 --precision", precision)
    rounded.scaler._init_scale = 64.0       # so small that nothing overflows
    batch = next(real_batches)
    expected = exact.train_step(iter([batch]))
    logged = rounded.train_step(iter([batch]))
    # The scale of the loss appears in none of these numbers.
    for name in expected:
        assert logged[name].item() == pytest.approx(expected[name].item(), rel=0.1, abs=0.01)

    for rounded_network, exact_network in (rounded.G, exact.G), (rounded.D, exact.D):
        theirs = dict(exact_network.named_parameters())
        for name, p in rounded_network.named_parameters():
            if name == "attention.gamma":   # its gradient is a sum whose terms cancel
                continue
            ours = p.grad.flatten()
            exactly = theirs[name].grad.flatten()
            if exactly.norm() >= 1e-3:
                assert F.cosine_similarity(ours, exactly, dim=0) > 0.9
                assert 0.9 < ours.norm() / exactly.norm() < 1.1


def test_an_overflow_in_float16_skips_the_update_and_halves_the_scale_of_the_loss():
    t, real_batches = trainer("--precision fp16")
    t.scaler._init_scale = 2.0**60
    weights = {
        "G": dict(t.G.named_parameters()),
        "D": dict(t.D.named_parameters()),
    }
    before = copy.deepcopy(weights)
    logged = t.train_step(real_batches)
    assert logged["D_grad"] == logged["G_grad"] == 0
    assert t.scaler.get_scale() == 2.0**58              # halved after D's overflow and after G's
    same(before, weights)


def test_gradients_of_micro_batches_add_up():
    # D has no batch norm, and in evaluation mode G's batch norm mixes no images. So it makes no
    # difference how many images a network sees at a time.
    found = []
    for size in 8, 2:
        t, real_batches = trainer(f"--g-lr 0 --d-lr 0 --ortho 0.01 --micro-batch {size}")
        t.D.eval()
        t.G.eval()
        logged = t.train_step(real_batches)
        gradients = [p.grad for p in (*t.D.parameters(), *t.G.parameters())]
        found.append([*logged.values(), *gradients])
    for whole, added_up in zip(*found, strict=True):
        close(whole.detach(), added_up.detach(), 1e-5, 1e-3)


def test_the_bound_on_singular_values_holds_in_training():
    # Fast steps let sigma_0 grow. In each step the largest value is lowered, while several grow: so
    # the bound gives a little.
    def largest_sigma_and_ratio(options):
        t, real_batches = trainer("--g-lr 2e-3", options)
        for _ in range(30):
            t.train_step(real_batches)
        layers = biggan.matrix_layers(t.G).values()
        sigmas = torch.stack([singular_values(layer.weight, 2) for layer in layers])
        ratios = sigmas[:, 0] / sigmas[:, 1]
        return sigmas[:, 0].max(), ratios.max()

    sigma, ratio = largest_sigma_and_ratio("")
    assert sigma > 1.15
    assert ratio > 1.08
    sigma, _ = largest_sigma_and_ratio("--sigma-fixed 1.02")
    assert sigma < 1.1
    _, ratio = largest_sigma_and_ratio("--sigma-ratio 1.05")
    assert ratio < 1.06
    sigma, _ = largest_sigma_and_ratio("--sigma-fixed 1 --sigma-pull 100")
    assert sigma < 1.15


def test_five_steps_with_4x4_kernels_equal_five_with_the_papers_operations(monkeypatch):
    ours, real_batches = trainer("--precision fp64")
    papers, _ = trainer("--precision fp64")
    batches = [next(real_batches) for _ in range(5)]
    for batch in batches:
        ours.train_step(iter([batch]))

    def upsample_then_convolve(x, layer):
        return layer(biggan.upsample(x))

    def convolve_then_average(x, layer):
        return F.avg_pool2d(layer(x), 2)

    monkeypatch.setattr(biggan, "upsample_conv3x3", upsample_then_convolve)
    monkeypatch.setattr(biggan, "conv3x3_downsample", convolve_then_average)
    for batch in batches:
        papers.train_step(iter([batch]))
    same(ours.state_dict(), papers.state_dict(), 1e-9)
    # They are not equal to the last bit, as they did not compute in the same way.
    assert not torch.equal(ours.G.linear.weight, papers.G.linear.weight)


@pytest.mark.parametrize("options", [
    "",
    "--r1 1",
    "--loss wgan-gp",
    "--micro-batch 4",
    "--sigma-ratio 1.1",
    "--augment colour,translation,cutout",
    "--ortho 0 --model sngan128",
])
def test_a_step_mixes_no_devices_and_reads_no_number_from_its_own(monkeypatch, options):
    # Tensors on the device `meta` have no numbers. So reading one, as by .item(), fails here. On a
    # GPU it would make the CPU wait. Of autocast and fused Adam, `meta` knows nothing.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    args = train.parse_settings(words([*TINY, options]))
    config = train.model_config(args)
    t = train.Trainer(args, config, torch.device("meta"))
    t.opt_G = torch.optim.Adam(t.G.parameters())
    t.opt_D = torch.optim.Adam(t.D.parameters())
    real = torch.empty(8, 3, config.resolution, config.resolution, device="meta")
    real_labels = torch.empty(8, dtype=torch.int64, device="meta")
    logged = t.train_step(itertools.repeat((real, real_labels)))
    assert t.step == 1
    assert {value.device.type for value in logged.values()} == {"meta"}


class Widened(TorchFunctionMode):
    """Notes the functions of 16-bit tensors whose results autocast, on a GPU, makes float32.

    (On a CPU autocast lets some of them be, such as interpolate, so the results here tell nothing.)
    """

    names = (
        "interpolate softmax log_softmax sum prod cumsum norm vector_norm normalize exp log pow "
        "rsqrt reciprocal softplus cosine_similarity layer_norm group_norm mse_loss l1_loss"
    ).split()

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_function__(self, function, types, arguments=(), options=None):
        dtypes = [x.dtype for x in arguments if isinstance(x, torch.Tensor)]
        if torch.is_autocast_enabled("cpu") and torch.bfloat16 in dtypes:
            self.found |= {function.__name__} & {*self.names}
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("options", [
    "--r1 1 --augment colour,translation,cutout",
    "--model biggan-deep-128 --batch 2",
    "--model sngan128 --batch 2",
])
def test_what_has_16_bits_keeps_them_on_a_gpu(options):
    t, _ = trainer("--precision bf16", options)
    x, y = noise_for_real_images(t.args.batch, t.config, CPU)
    with Widened() as widened:
        t.train_step(itertools.repeat((x, y)))
    assert not widened.found


def test_torch_compile_finds_no_graph_break_and_changes_nothing():
    plain, _ = trainer("--precision fp64")
    compiled, _ = trainer("--precision fp64")
    for network in compiled.G, compiled.D:
        network.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    z, y, _, _ = plain.random_numbers(0)
    for t in plain, compiled:
        images = t.G(z, y)
        t.D(images, y).sum().backward()
    for ours, theirs in zip(plain.G.parameters(), compiled.G.parameters()):
        close(ours.grad, theirs.grad, 1e-9)


def test_evaluation_compiles_nothing():
    # The first process evaluates alone, and the others would wait for its compiler for minutes.
    def refuse(graph, inputs):
        raise AssertionError("this compiles")

    t, _ = trainer()
    for network in t.G, t.D:
        network.compile(backend=refuse)
    shapes = train.Shapes(32)
    examples = train.real_examples(t, shapes, shapes, t.args)
    assert train.evaluate(t, examples, in_full=True)["D_accuracy"] <= 1
    with pytest.raises(Exception, match="this compiles"):
        t.D(torch.zeros(1, 3, 32, 32), torch.tensor([0]))


@pytest.mark.parametrize("preset", train.PRESETS)
def test_every_preset_describes_a_model_that_exists(preset):
    args = train.parse_settings(["--data=x", "--preset", preset])
    config = train.model_config(args)
    with torch.device("meta"):              # shapes without memory
        Generator(config)
        Discriminator(config)


def test_ds_accuracy_is_the_part_of_logits_above_the_decision_threshold():
    t, _ = trainer()
    images, labels = train.some_images(train.Shapes(32), 0, 100, 10)
    x = train.to_network(images, t.device)
    logits = t.D.eval()(x, labels)
    # A threshold between two logits, with 31 of 100 below it.
    t.threshold = logits.sort().values[30:32].mean()
    assert train.accuracy(t, images, labels) == pytest.approx(0.69)
    assert t.D.training                     # and D is ready for the next step


def test_spread_is_the_deviation_within_classes_of_what_is_left_after_averaging():
    # Class 0 has an image of 0.5 and one of -0.1, with the standard deviation 0.3. Class 1 has
    # three of 0, of which one has a fine checkerboard on it. Averaging to 8x8 takes that away, so
    # the deviation is 0. The variances of the classes are averaged: (0.3^2 + 0) / 2.
    x = torch.zeros(5, 3, 16, 16)
    x[0] = 0.5
    x[1] = -0.1
    line = torch.arange(16)
    x[3] = (-1)**(line + line[:, None])
    labels = torch.tensor([0, 0, 1, 1, 1])
    close(train.spread_within(x, labels), math.sqrt(0.3**2 / 2))


# --------------------------------------------------------------------------------------------- runs

def test_the_log_holds_means_over_its_steps_and_evaluation_changes_nothing(tmp_path):
    start(*TINY, f"--out {tmp_path}/a --steps 5 --eval-every 3 --sample-every 2")
    start(*TINY, f"--out {tmp_path}/b --steps 5")
    same(weights_of(tmp_path / "a", 5), weights_of(tmp_path / "b", 5))

    lines = log_of(tmp_path / "a")
    assert [line["step"] for line in lines] == [2, 3, 4, 5]
    # The first line belongs to two steps.
    t, real_batches = trainer()
    first = t.train_step(real_batches)
    second = t.train_step(real_batches)
    for name in first:
        mean = (first[name] + second[name]) / 2
        close(lines[0][name], mean.item(), 1e-5, 1e-5)
    # Steps 3 and 5, the last, are evaluated.
    always = {*first, "step", "seconds_per_step", "diversity", "sigma_0"}
    evaluated = {"sigma", "D_accuracy", "D_accuracy_held_out"}
    further = [line.keys() - always for line in lines]
    assert further == [set(), evaluated, set(), evaluated]


def test_continuing_equals_never_stopping(tmp_path):
    a = tmp_path / "a"
    b = tmp_path / "b"
    start(*TINY, f"--out {a} --steps 6 --workers 1")
    start(*TINY, f"--out {b} --steps 4")
    start(*TINY, f"--out {b} --steps 6")
    same(weights_of(a, 6), weights_of(b, 6))
    assert [line["step"] for line in log_of(b)] == [2, 4, 6]
    assert steps_kept(b) == [2, 4, 6]
    assert Image.open(b / "samples/step-00000006.png")


def test_the_same_command_again_on_a_finished_run_says_that_it_is_done(tmp_path, capsys):
    for steps in 4, 4, 2:
        start(*TINY, f"--out {tmp_path} --steps {steps}")
        assert "done after 4 steps" in capsys.readouterr().out
    assert steps_kept(tmp_path) == [2, 4]


def kill_again_and_again(folder, kills, options):
    """Kill a run at random moments, and continue it. It must equal a run that was left alone.

    The first kill comes after the first checkpoint, the others at random moments of about the same
    time. Returns how many kills met the run alive, and the step it had saved after the last one."""
    alone = folder / "alone"
    run = folder / "killed"
    command = ["train.py", *TINY, options, "--out"]
    killed = 0
    for kill in range(kills):
        started = time.perf_counter()
        process = run_command(*command, run)
        if kill == 0:
            wait_until(lambda: steps_kept(run), process)
            seconds = 1.6 * (time.perf_counter() - started)
        else:
            time.sleep(random.uniform(0, seconds))
        if process.poll() is None:
            killed += 1
        process.kill()
        process.communicate()
        for step in steps_kept(run):
            weights_of(run, step)           # every checkpoint can be read

    reached = steps_kept(run)[-1]
    left_alone = run_command(*command, alone)
    output, _ = finish(run_command(*command, run))
    finish(left_alone)
    assert f"killed from step {reached}\n" in output
    assert steps_kept(run) == steps_kept(alone)
    newest = steps_kept(run)[-1]
    same(weights_of(run, newest), weights_of(alone, newest))
    return killed, reached


def test_sigkill_at_any_moment_costs_no_checkpoint_and_changes_nothing(tmp_path):
    # (At other moments, and more often, by `make trial`.)
    killed, reached = kill_again_and_again(tmp_path, 1, "--steps 10")
    assert killed == 1
    assert reached


@pytest.mark.parametrize("number, send", [
    (signal.SIGINT, os.kill),
    (signal.SIGTERM, os.kill),
    (signal.SIGTERM, os.killpg),
])
def test_a_signal_to_the_process_or_its_group_saves_and_exits_with_status_0(tmp_path, number, send):
    options = f"--out {tmp_path} --steps 10000 --save-every 10000 --workers 2"
    process = run_command("train.py", *TINY, options, start_new_session=True)
    wait_until((tmp_path / "log.jsonl").exists, process)
    send(process.pid, number)
    output, error = finish(process)
    assert "stopped after" in output
    assert not error
    assert steps_kept(tmp_path)[0] >= 2


def test_a_damaged_checkpoint_is_passed_over_with_a_warning_and_costs_no_other(tmp_path, warned):
    start(*TINY, f"--out {tmp_path} --steps 6")
    newest = tmp_path / "checkpoints/step-00000006.pt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1         # flips one bit, somewhere in the weights
    newest.write_bytes(content)
    start(*TINY, f"--out {tmp_path} --steps 5 --keep 2")
    assert "step-00000006.pt was not loaded: it is damaged" in warned[0]
    # The damaged one is not counted as one of the two newest.
    assert steps_kept(tmp_path) == [4, 5, 6]


def test_a_second_process_in_the_same_folder_is_refused(tmp_path, monkeypatch, capsys):
    command = [*TINY, f"--out {tmp_path} --steps 10000"]
    first = run_command("train.py", *command)
    wait_until(lambda: steps_kept(tmp_path), first)
    assert "another process is at work" in refused(monkeypatch, capsys, *command)
    first.kill()
    first.communicate()


def test_a_failed_save_costs_a_warning_and_no_older_checkpoint(
    tmp_path, monkeypatch, capsys, warned
):
    def write_to_a_full_disk(state, f):
        f.write(b"half")
        raise OSError(28, "No space left on device")

    command = [*TINY, f"--out {tmp_path} --keep 1 --steps"]
    start(*command, 2)
    monkeypatch.setattr(torch, "save", write_to_a_full_disk)
    assert "step 5 is not saved; make room" in refused(monkeypatch, capsys, *command, 5)
    assert "step-00000004.pt could not be written ([Errno 28]" in warned[0]
    assert steps_kept(tmp_path) == [2]
    assert not [*tmp_path.rglob("*.tmp")]


def test_the_newest_and_every_nth_checkpoint_remain(tmp_path):
    t, _ = trainer(f"--out {tmp_path} --keep 2 --keep-every 5")
    (tmp_path / "checkpoints").mkdir()
    for step in range(1, 14):
        t.step = step
        train.save_checkpoint(t, [], t.args)
    assert steps_kept(tmp_path) == [5, 10, 12, 13]


def test_other_settings_are_listed_and_nothing_is_written(tmp_path, monkeypatch, capsys):
    command = [*TINY, f"--out {tmp_path} --steps"]
    start(*command, 2)
    before = listing(tmp_path)
    error = refused(monkeypatch, capsys, *command, "9 --seed 5 --r1 1 --log-every 1")
    assert "other settings: seed was 0 and is now 5; r1 was 0.0 and is now 1.0;" in error
    assert listing(tmp_path) == before


def test_nan_stops_a_run_by_name_and_is_not_saved(tmp_path, monkeypatch, capsys):
    options = f"--g-lr 1e30 --steps 9 --save-every 1 --log-every 9 --out {tmp_path}"
    error = refused(monkeypatch, capsys, *TINY, options)
    assert re.search(r"training has diverged at step 2: [\w.]+\.weight is not finite", error)
    assert steps_kept(tmp_path) == [1]
    saved = weights_of(tmp_path, 1)
    for tensor in (*saved["G"].values(), *saved["D"].values()):
        assert tensor.isfinite().all()


def healthy(step, **changes):
    """A line of the log of a healthy run. D's loss falls below 0, as Wasserstein's may."""
    line = {
        "step": step,
        "diversity": 0.9,
        "D_loss": 1.5 if step < 600 else -1.5,
        "sigma_0": 1.5,
    }
    return {**line, **changes}


@pytest.mark.parametrize("sick, sign", [
    # What is wrong in the k-th sick line, and how it is said.
    (
        lambda k: {"diversity": 0.4},
        "images of one class have become alike: diversity 0.40, before 0.90",
    ),
    (
        lambda k: {"D_loss": 0.01},
        "D is never wrong any more: its loss is 0.0100",
    ),
    (
        lambda k: {"sigma_0": 1.9**k},
        "sigma_0 of G's first layer explodes",
    ),
])
def test_collapse_names_each_sign_of_it_and_none_in_health(sick, sign):
    lines = [healthy(step) for step in range(50, 1050, 50)]
    for k in range(1, 21):
        assert not train.collapse_in(lines[:k])
    sick_lines = [healthy(1000 + 50 * k, **sick(k)) for k in range(1, 6)]
    # One line may be chance, five are not.
    assert not train.collapse_in(lines + sick_lines[:1])
    assert train.collapse_in(lines + sick_lines).startswith(sign)


def test_a_collapsed_run_stops_or_warns(tmp_path, monkeypatch, capsys, warned):
    # Every run has collapsed by these measures, and it shows after four lines.
    monkeypatch.setattr(train, "MIN_DIVERSITY", 9.0)
    monkeypatch.setattr(train, "WINDOW_STEPS", 4)
    error = refused(monkeypatch, capsys, *TINY, f"--steps 12 --out {tmp_path}/a")
    expected = r"collapse at step 8: images of one class .*\. The last step saved is 6;"
    assert re.search(expected, error)
    assert steps_kept(tmp_path / "a") == [2, 4, 6]
    start(*TINY, f"--steps 9 --on-collapse warn --out {tmp_path}/b")
    assert warned[0].startswith("step 8: images of one class")
    assert steps_kept(tmp_path / "b")[-1] == 9


# -------------------------------------------------------------------------------- several processes

def free_port():
    with socket.create_server(("localhost", 0)) as server:
        _, port = server.getsockname()
    return port


def normalise_a_half(rank, port, folder):
    """This process's half of the batch through a batch norm, and back; compiled as one graph."""
    torch.distributed.init_process_group(
        "gloo", f"tcp://localhost:{port}", rank=rank, world_size=2
    )
    batch, upstream = torch.load(folder / "batch.pt")
    x = batch.chunk(2)[rank].clone().requires_grad_()
    bn = BatchNorm(3, 1e-4).double()
    bn.compile(backend="aot_eager", fullgraph=True)
    y = bn(x)
    y.backward(upstream.chunk(2)[rank])
    results = {
        "y": y.detach(),
        "gradient": x.grad,
        "running_mean": bn.running_mean,
        "running_var": bn.running_var,
    }
    torch.save(results, folder / f"{rank}.pt")
    # As in sample.run: Python's own way out now and then aborts beside the threads of gloo.
    torch.distributed.barrier()
    os._exit(0)


def test_cross_replica_batch_norm_is_that_of_the_whole_batch(tmp_path):
    x = leaf(8, 3, 4, 4)
    x.data[:4] += 5                         # so that the two halves have different moments
    upstream = torch.randn_like(x)
    torch.save([x.detach(), upstream], tmp_path / "batch.pt")
    port = free_port()
    torch.multiprocessing.spawn(normalise_a_half, (port, tmp_path), nprocs=2)
    first = torch.load(tmp_path / "0.pt")
    second = torch.load(tmp_path / "1.pt")

    witness = nn.BatchNorm2d(3, 1e-4).double()
    y = witness(x)
    y.backward(upstream)
    close(torch.cat([first["y"], second["y"]]), y.detach(), 1e-12)
    close(torch.cat([first["gradient"], second["gradient"]]), x.grad, 1e-12)
    close(first["running_mean"], witness.running_mean, 1e-12)
    close(first["running_var"], witness.running_var, 1e-12)


@pytest.fixture
def group_of_one():
    """This process is a process group by itself, in which DDP works as in a larger one."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:Grad strides do not match")     # as in train.in_parallel
def test_gradients_are_sent_with_the_last_micro_batch_only(group_of_one):
    # DDP calls its communication hook whenever it is about to send gradients to other processes.
    events = []

    def note_and_return(name, bucket):
        events.append(f"{name} sends")
        sent = torch.futures.Future()
        sent.set_result(bucket.buffer())
        return sent

    def in_parallel(name, network):
        network = nn.parallel.DistributedDataParallel(network)
        network.register_forward_hook(lambda *_: events.append(f"{name} computes"))
        network.register_comm_hook(name, note_and_return)
        return network

    t, real_batches = trainer("--d-steps 2 --micro-batch 2")        # four micro-batches of 8
    t.parallel_D = in_parallel("D", t.D)
    t.parallel_G = in_parallel("G", t.G)
    t.train_step(real_batches)
    turn_of_D = 4 * ["D computes"] + ["D sends"]
    turn_of_G = 4 * ["G computes"] + ["G sends"]
    assert events == turn_of_D + turn_of_D + turn_of_G


def on_two_processes(code):
    """Run code in two processes that have met, as two machines would. Returns what each prints.

    Their counts of restarts differ, and torch's own patience is short."""
    port = free_port()
    both = []
    for number in 0, 1:
        first = f"""
import os, sys, time
os.environ |= {{"RANK": "{number}", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}}
os.environ |= {{"MASTER_PORT": "{port}", "TORCHELASTIC_RESTART_COUNT": "{number}"}}
import torch.distributed, numpy as np
from datetime import timedelta
torch.distributed.distributed_c10d.default_pg_timeout = timedelta(seconds=1)
import sample
sample.start_processes()
rank = {number}
"""
        last = "\ntorch.distributed.barrier(); sys.stdout.flush(); os._exit(0)"
        both.append(run_command("-c", first + code + last, cwd=HERE))
    return [finish(process)[0].strip() for process in both]


def test_machines_that_have_counted_different_restarts_meet():
    # As they do after torchrun --nnodes 2 --max-restarts, where a machine counts those of its own.
    assert on_two_processes("print(sample.values_of_all(rank))") == ["[0, 1]", "[0, 1]"]


def test_others_wait_as_long_as_the_first_needs():
    slow = "time.sleep(3 if rank == 0 else 0); print(sample.values_of_all(rank))"
    assert on_two_processes(slow) == ["[0, 1]", "[0, 1]"]


def test_rows_are_gathered_in_the_first_process_alone():
    code = "print(sample.gather_rows([np.array([2 * rank]), np.array([2 * rank + 1])]))"
    assert on_two_processes(code) == ["[0 1 2 3]", "None"]


SHARED = [
    *TINY,
    "--precision fp64 --d-steps 2 --ema 0.9 --save-every 1 --log-every 1 --keep 9 --steps 5",
    "--augment colour,translation,cutout --out",
]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """Runs on one process, by commands: rounding depends on the number of threads."""
    folder = tmp_path_factory.mktemp("one_process")
    whole = run_command("train.py", *SHARED, folder / "whole")
    split = run_command("train.py", *SHARED, folder / "split", "--micro-batch 4")
    finish(split)
    finish(whole)
    return folder


@pytest.mark.parametrize("n, name, options", [
    (4, "whole", ""),
    (2, "split", "--micro-batch 4"),
])
def test_several_processes_compute_what_one_does(one_process, tmp_path, n, name, options):
    output, _ = finish(torchrun(n, HERE / "train.py", *SHARED, tmp_path, options))
    assert output.count("done after 5 steps") == 1
    same(weights_of(one_process / name, 5), weights_of(tmp_path, 5), 1e-9)
    for ours, theirs in zip(log_of(tmp_path), log_of(one_process / name), strict=True):
        for field in ours.keys() - {"seconds_per_step", "sigma"}:
            assert ours[field] == pytest.approx(theirs[field], 1e-4, 1e-6)


def test_a_run_may_continue_on_two_processes(one_process, tmp_path):
    out = shutil.copytree(one_process / "whole", tmp_path / "r")
    for step in 4, 5:
        (out / "checkpoints" / f"step-0000000{step}.pt").unlink()
    output, _ = finish(torchrun(2, HERE / "train.py", *SHARED, out))
    assert output.count("from step 3") == 1
    same(weights_of(one_process / "whole", 5), weights_of(out, 5), 1e-9)


@pytest.mark.parametrize("option, sentence", [
    ("--batch 9", "2 processes cannot share 9 images"),     # found before the processes have met
    ("--d-lr 1e30 --workers 1", "training has diverged"),   # found after that
])
def test_a_mistake_is_reported_once_by_several_processes(tmp_path, option, sentence):
    process = torchrun(2, HERE / "train.py", *SHARED, tmp_path, option)
    _, error = finish(process, status=1)
    reports = re.findall("^error: .*" + sentence, error, re.M)
    assert len(reports) == 1
    assert 'train.py", line' not in error   # there is no traceback


def test_processes_that_have_read_different_checkpoints_stop(tmp_path):
    # As on two machines that share no disk: each process has a folder of its own, and only the
    # first one's holds a checkpoint.
    start(*TINY, f"--out {tmp_path}/0/run --steps 2")
    (tmp_path / "1").mkdir()
    script = """
import os, sys
sys.path.append(sys.argv.pop())
import sample, train
os.chdir(os.environ["RANK"])
sample.run(train.main)
"""
    (tmp_path / "apart.py").write_text(script)
    process = torchrun(2, "apart.py", *TINY, "--out run --steps 4", HERE, cwd=tmp_path)
    _, error = finish(process, status=1)
    assert "different checkpoints; run is on no shared disk" in error
    assert steps_kept(tmp_path / "0/run") == [2]


def test_a_killed_process_is_replaced_and_nothing_changes(one_process, tmp_path):
    run = tmp_path / "killed"
    process = torchrun(2, "--max-restarts 3", HERE / "train.py", *SHARED, run)
    wait_until(lambda: len(steps_kept(run)) > 1, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    _, second = children.split()
    os.kill(int(second), signal.SIGKILL)
    output, _ = finish(process)
    assert output.count("continuing") == 1
    assert "done after 5 steps" in output
    same(weights_of(one_process / "whole", 5), weights_of(run, 5), 1e-9)


# ----------------------------------------------------------------- starting from weights that exist

def states_of(t):
    """The weights of a trainer's networks, under the names that a checkpoint gives them."""
    state = t.state_dict()
    return {name: state[name] for name in ("G", "G_ema", "D")}


@pytest.mark.parametrize("classes, options, stays", [
    # The names of the new run's classes, and a pattern of the tensors that remain its own.
    ("abcdefghij", "", "nothing"),          # the same classes
    ("jabcdefghi", "", "shared.*|embed.*"),
    ("jabcdefghi", "--model sagan128 --shared-dim 0", r".*(gain|bias)\.weight|embed.*"),
])
def test_init_takes_all_weights_but_the_embeddings_of_other_classes(classes, options, stays):
    old, _ = trainer(options, "--seed 0")
    new, _ = trainer(options, "--seed 1")
    theirs = states_of(old)
    for state in theirs.values():
        for tensor in state.values():
            tensor += 1                     # so that no two numbers are equal by chance
    own = copy.deepcopy(states_of(new))
    weights = sample.Weights(old.config, classes=[*"abcdefghij"], **theirs)
    train.start_from(new, weights, [*classes])
    for network, state in states_of(new).items():
        for name, tensor in state.items():
            source = own if re.fullmatch(stays, name) else theirs
            assert torch.equal(tensor, source[network][name]), name


def test_a_run_from_weights_without_d_continues_without_their_file(tmp_path, capsys):
    weights = shutil.copy(HERE / "docs/shapes.pt", tmp_path / "w.pt")
    command = f"--preset shapes --init {weights} --batch 8 --g-lr 0 --out {tmp_path} --steps"
    start(command, 1)
    assert "it has no D" in capsys.readouterr().out
    theirs = sample.read_tensors(weights)["G_ema"]["linear.weight"]
    assert torch.equal(weights_of(tmp_path, 1)["G"]["linear.weight"], theirs)
    weights.unlink()
    start(command, 2)
    assert "continuing" in capsys.readouterr().out
    assert steps_kept(tmp_path) == [1, 2]


# -------------------------------------------------------- mistakes: one sentence, and exit status 2

@pytest.mark.parametrize("options, sentence", [
    ("--data nowhere", "nowhere is no folder of images, and no .npz file"),
    ("--data empty", "empty holds no images"),
    ("--data high", "high/a holds no images; --data has one sub-folder of images per class"),
    ("--data gap", "gap/dog holds no images"),
    ("--preset imagenet64", "--data DIR is missing"),
    ("--data a --held-out b", "--held-out b has other classes than --data a"),
    ("--pre shapes", "unrecognized arguments: --pre"),
    ("--preset cifra10", "invalid choice: 'cifra10'"),
    ("--steps 0", "must be at least 1"),
    ("--augment color", "must be some of colour,translation,cutout"),
    ("--g-lr nan", "must be at least 0"),
    ("--d-lr nan", "must be at least 0"),
    ("--ch 12", "multiple of 8"),
    ("--micro-batch 3", "--micro-batch 3 does not divide --batch 8"),
    ("--sigma-fixed 2 --sigma-ratio 2", "give either --sigma-fixed or --sigma-ratio"),
    ("--sigma-pull 1", "give either --sigma-fixed or --sigma-ratio"),
    ("--shared-dim 0", "shared_dim above 0"),
    ("--init nothing", "--init decides the architecture"),
    ("--out a/cat/0.png", "Not a directory"),
])
def test_a_mistake_is_one_sentence_and_nothing_is_written(
    tmp_path, monkeypatch, capsys, options, sentence
):
    monkeypatch.chdir(tmp_path)
    for folder in "a/cat", "b/dog", "high/a/cat", "gap/cat":
        picture(tmp_path / folder, "0.png")
    Path("empty").mkdir()
    Path("gap/dog").mkdir()
    before = listing(tmp_path)
    assert sentence in refused(monkeypatch, capsys, *TINY, options)
    assert listing(tmp_path) == before


def exceed_the_memory(arguments):
    np.empty(1 << 50)


def exceed_the_memory_of_a_gpu(arguments):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


@pytest.mark.parametrize("main", [exceed_the_memory, exceed_the_memory_of_a_gpu])
def test_the_end_of_memory_is_one_sentence(monkeypatch, capsys, main):
    # Any process may say it, not the first of its machine alone: it may be this card's memory.
    monkeypatch.setattr(sample, "LOCAL_RANK", 3)
    command = unittest.mock.Mock(main=main)
    assert "halve --micro-batch" in refused(monkeypatch, capsys, module=command)


def test_the_end_of_another_process_is_left_to_that_to_explain(monkeypatch, capsys):
    error = RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer")
    assert sample.report(error) == 1        # alone, this process must explain it
    assert capsys.readouterr().err
    monkeypatch.setattr(sample, "processes", lambda: 2)
    assert sample.report(error) == 2
    assert capsys.readouterr().err == ""


@pytest.fixture
def another_machine(monkeypatch):
    """The device is looked for once more, and later again."""
    sample.pick_device.cache_clear()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    yield
    sample.pick_device.cache_clear()


def test_a_gpu_that_torch_does_not_find_is_warned_of(
    another_machine, monkeypatch, capsys, tmp_path
):
    smi = tmp_path / "nvidia-smi"
    smi.touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    for _ in range(2):
        assert sample.pick_device() == CPU
    assert capsys.readouterr().err.count("finds no GPU, but there is one") == 1

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")          # hidden by the user
    sample.pick_device.cache_clear()
    assert sample.pick_device() == CPU
    assert capsys.readouterr().err == ""


def test_more_processes_than_gpus_are_refused(another_machine, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(sample, "LOCAL_WORLD_SIZE", 8)
    error = refused(monkeypatch, capsys, *TINY, "--out", tmp_path / "run")
    assert "8 processes" in error
    assert error.endswith("give --nproc_per_node 2")


def test_a_gpu_without_bf16_is_told_of_fp16(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert train.fast_precision(torch.device("cuda")) == "fp32"
    assert "--precision fp16" in capsys.readouterr().out


def test_make_test_hides_gpus_and_make_gpu_does_not(tmp_path):
    shutil.copy(HERE / "Makefile", tmp_path)
    (tmp_path / "requirements.txt").touch()
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "visible: <$CUDA_VISIBLE_DEVICES>"')
    python.chmod(0o755)
    (tmp_path / ".venv/ready").touch()
    expected = [("test", ""), ("check", ""), ("trial", ""), ("gpu", "0")]
    for target, visible in expected:
        output = subprocess.check_output(
            ["make", "--silent", target],
            cwd=tmp_path,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "0"},
            text=True,
        )
        assert set(output.splitlines()) == {f"visible: <{visible}>"}


def test_ctrl_c_is_no_traceback(capsys):
    def interrupt(arguments):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        sample.run(interrupt)
    assert stop.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_an_error_that_is_no_mistake_of_the_user_is_a_traceback_and_status_1(capsys):
    def fail(arguments):
        raise RuntimeError("shapes do not match")

    with pytest.raises(SystemExit) as stop:
        sample.run(fail)
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("Traceback")
    assert error.endswith("RuntimeError: shapes do not match\n")


# --------------------------------------------------------------------- long trials, by `make trial`

def trial_thirty_kills(tmp_path):
    options = "--steps 600 --save-every 3 --sample-every 600 --log-every 60"
    killed, reached = kill_again_and_again(tmp_path, 30, options)
    assert killed == 30
    assert reached >= 30


def trial_collapse_is_declared_and_health_is_not(tmp_path):
    """A run with usual learning rates, and one that must collapse.

    In the second one, G learns ten times as fast as usual, and D four times as slowly."""
    command = "--preset shapes --ch 16 --batch 16 --steps 600 --out"
    healthy = run_command("train.py", command, tmp_path / "healthy")
    sick = run_command("train.py", command, tmp_path / "sick", "--g-lr 2e-3 --d-lr 1e-4")
    _, error = finish(sick, status=2)
    finish(healthy)
    print(error)
    assert "error: collapse at step" in error

    # It is declared at most 300 steps after the images have first become alike.
    lines = log_of(tmp_path / "sick")
    best = max(line["diversity"] for line in lines)
    alike = [line for line in lines if line["diversity"] < train.MIN_DIVERSITY * best]
    assert lines[-1]["step"] - alike[0]["step"] <= 300


def trial_a_small_disk_costs_no_checkpoint(tmp_path):
    """The run folder is a file system of 5 MB, which only root can make."""
    subprocess.run(words(["mount -t tmpfs -o size=5m tmpfs", tmp_path]), check=True)
    try:
        process = run_command("train.py", *TINY, f"--out {tmp_path} --steps 12 --keep 9")
        _, error = finish(process, status=2)
        assert error.count("could not be written") >= 3
        assert "error: step 12 is not saved" in error
        kept = steps_kept(tmp_path)
        assert len(kept) >= 2
        for step in kept:
            weights_of(tmp_path, step)                      # each checkpoint is whole
    finally:
        subprocess.run(["umount", tmp_path], check=True)


# -------------------------------------------------------------------------------- published weights
# These functions compute what the published networks compute. They are written with torch's
# functions, one operation at a time, and take their weights under the names in the published files.
# `make peers` compares with the PyPI package itself, at full size.

class State(dict):
    """A state dict laid out like a published one. What it lacks is drawn when it is asked for.

    So running a network once on an empty State fills it with random weights of the right shapes."""

    def tensor(self, name, *shape):
        if name not in self:
            if re.search("var|bn.weight", name):            # variances and gains are positive
                self[name] = torch.rand(shape) + 0.5
            elif len(shape) > 1:                            # keeps the outputs' variance near 1
                self[name] = math.sqrt(2 / math.prod(shape[1:])) * torch.randn(shape)
            else:
                self[name] = 0.3 * torch.randn(shape)
        return self[name]

    def layer(self, name, x, outputs, *size, bias=True):
        """A linear layer, or a convolution with kernels of this size."""
        W = self.normalized(name, outputs, x.shape[1], *size)
        bias = self.tensor(f"{name}.bias", outputs) if bias else None
        if size:
            return F.conv2d(x, W, bias, padding=size[0] // 2)
        return F.linear(x, W, bias)

    def norm(self, x, name, c=None):
        """Batch norm and ReLU. If there is a condition c, gain and bias are computed from it."""
        C = x.shape[1]
        if c is None:
            gain, bias = [self.tensor(f"{name}.{part}", C) for part in self.FIXED]
        else:
            layers = [f"{name}.{part}" for part in self.CONDITIONAL]
            gain, bias = [self.layer(layer, c, C, bias=False) for layer in layers]
            gain = 1 + gain
        mean, var = self.moments(name, C)
        x = F.batch_norm(x, mean, var, eps=self.EPS)
        return F.relu(x * gain[..., None, None] + bias[..., None, None])

    def attention(self, name, x, o="o"):
        """SAGAN's attention, before it is multiplied by gamma and added to x."""
        N, C, H, W = x.shape
        query = self.layer(name + "theta", x, C // 8, 1, 1, bias=False)
        key = self.layer(name + "phi", x, C // 8, 1, 1, bias=False)
        value = self.layer(name + "g", x, C // 2, 1, 1, bias=False)
        query = query.flatten(2)                            # (N, C/8, HW)
        key = F.max_pool2d(key, 2).flatten(2)               # (N, C/8, HW/4)
        value = F.max_pool2d(value, 2).flatten(2)           # (N, C/2, HW/4)
        weights = (query.mT @ key).softmax(2)               # (N, HW, HW/4)
        attended = (value @ weights.mT).view(N, C // 2, H, W)
        return self.layer(name + o, attended, C, 1, 1, bias=False)


class DeepState(State):
    """The weights of BigGAN-deep, laid out as by Hugging Face."""

    CONDITIONAL = ("scale", "offset")
    FIXED = ("weight", "bias")
    EPS = 1e-4
    truncation = 1.0

    def moments(self, name, C):
        """Mean and variance, interpolated between those of the truncations 0, 0.02, ... 1.

        The row of truncation k / 50 has a weight that falls from 1, where it is the truncation
        asked for, to 0 at its neighbours. So only the two nearest rows count."""
        steps_away = (torch.arange(51) - 50 * self.truncation).abs()
        weights = (1 - steps_away).clamp(min=0)
        means = self.tensor(f"{name}.running_means", 51, C)
        variances = self.tensor(f"{name}.running_vars", 51, C)
        return weights @ means, weights @ variances

    def normalized(self, name, *shape):
        """W / sigma, where sigma = u^T W v with the vectors u and v that are in the file."""
        W = self.tensor(f"{name}.weight_orig", *shape)
        rows = W.flatten(1)
        if f"{name}.weight_u" not in self:
            _, u, v = power_iteration(rows, torch.randn(len(W)), steps=3)
            self[f"{name}.weight_u"] = u
            self[f"{name}.weight_v"] = v
        u = self[f"{name}.weight_u"]
        v = self[f"{name}.weight_v"]
        return W / (u @ rows @ v)


class PortState(State):
    """The weights of BigGAN, laid out as by the PyTorch code of the paper's author."""

    CONDITIONAL = ("gain", "bias")
    FIXED = ("gain", "bias")
    EPS = 1e-5

    def moments(self, name, C):
        mean = self.tensor(f"{name}.stored_mean", C)
        var = self.tensor(f"{name}.stored_var", C)
        return mean, var

    def normalized(self, name, *shape):
        """W / sigma after one step of power iteration from the stored u0.

        That code takes this step in evaluation mode, too."""
        W = self.tensor(f"{name}.weight", *shape).flatten(1)
        if f"{name}.u0" not in self:
            _, u, _ = power_iteration(W, torch.randn(len(W)), steps=3)
            self[f"{name}.u0"] = u[None]                    # a row
            self[f"{name}.sv0"] = torch.ones(1)             # an old sigma, which nobody reads
        v = F.normalize(self[f"{name}.u0"] @ W)
        u = F.normalize(v @ W.T)
        sigma = u @ W @ v.T
        return (W / sigma).view(shape)


def deep_block(state, name, x, c, outputs, doubles):
    """A block of BigGAN-deep. Its shortcut drops the last channels."""
    middle = x.shape[1] // 4
    h = x
    for k, (filters, size) in enumerate([(middle, 1), (middle, 3), (middle, 3), (outputs, 1)]):
        h = state.norm(h, f"{name}.bn_{k}", c)
        if k == 1 and doubles:
            h = repeat(h)
            x = repeat(x)
        h = state.layer(f"{name}.conv_{k}", h, filters, size, size)
    return h + x[:, :outputs]


def deep_images(state, z, y, ch=8, n_classes=6, model="biggan-deep-128"):
    """What BigGAN-deep draws. Every second block doubles the image and changes its channels."""
    embedding = state.tensor("embeddings.weight", 128, n_classes)       # a column per class
    c = torch.cat([z, embedding.T[y]], 1)
    h = state.layer("generator.gen_z", c, 4 * 4 * 16 * ch)
    h = h.view(len(z), 4, 4, -1).permute(0, 3, 1, 2)
    pairs = itertools.pairwise(MODELS[model].g_channels)
    widths = [*itertools.chain.from_iterable(pairs)]        # of each block's output, in units of ch
    for i, width in enumerate(widths):
        if i == 8:                                          # in the file, attention is layer 8
            attended = state.attention("generator.layers.8.snconv1x1_", h, "o_conv")
            h = h + state.tensor("generator.layers.8.gamma", 1) * attended
        layer = i if i < 8 else i + 1
        doubles = i % 2 == 1
        h = deep_block(state, f"generator.layers.{layer}", h, c, width * ch, doubles)
    h = state.norm(h, "generator.bn")
    rgb = state.layer("generator.conv_to_rgb", h, ch, 3, 3)[:, :3]
    return rgb.tanh()


def port_images(state, z, y, ch=8, n_classes=6):
    """What G of BigGAN at 128 pixels draws."""
    first, *chunks = z.split(20, 1)
    h = state.layer("linear", first, 4 * 4 * 16 * ch).view(len(z), -1, 4, 4)
    for i, (chunk, width) in enumerate(zip(chunks, [16, 8, 4, 2, 1])):
        name = f"blocks.{i}.0"
        x = repeat(h)
        embedding = state.tensor("shared.weight", n_classes, 128)
        c = torch.cat([embedding[y], chunk], 1)
        h = repeat(state.norm(h, f"{name}.bn1", c))
        h = state.layer(f"{name}.conv1", h, width * ch, 3, 3)
        h = state.norm(h, f"{name}.bn2", c)
        h = state.layer(f"{name}.conv2", h, width * ch, 3, 3)
        h = h + state.layer(f"{name}.conv_sc", x, width * ch, 1, 1)
        if i == 3:
            gamma = state.tensor("blocks.3.1.gamma")
            h = h + gamma * state.attention("blocks.3.1.", h)
    h = state.norm(h, "output_layer.0")
    return state.layer("output_layer.2", h, 3, 3, 3).tanh()


def port_logits(state, x, y, ch=8, n_classes=6):
    """What D of BigGAN at 128 pixels returns."""
    for i, width in enumerate([1, 2, 4, 8, 16, 16]):
        name = f"blocks.{i}.0"
        h = x if i == 0 else F.relu(x)
        h = state.layer(f"{name}.conv1", h, width * ch, 3, 3)
        h = state.layer(f"{name}.conv2", F.relu(h), width * ch, 3, 3)
        if i < 5:
            x = pool(h + state.layer(f"{name}.conv_sc", x, width * ch, 1, 1))
        else:
            x = h + x
        if i == 0:
            gamma = state.tensor("blocks.0.1.gamma")
            x = x + gamma * state.attention("blocks.0.1.", x)
    h = F.relu(x).sum((2, 3))
    class_vectors = state.normalized("embed", n_classes, 16 * ch)
    looks_real = state.layer("linear", h, 1)[:, 0]
    fits_class = (class_vectors[y] * h).sum(1)
    return looks_real + fits_class


@functools.cache
def deep_state():
    """Random weights of a narrow BigGAN-deep."""
    state = DeepState()
    deep_images(state, torch.randn(1, 128), torch.tensor([0]))
    return state


def saved(content, new_format=True):
    """The bytes that torch.save writes. Published files are in its old format."""
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=new_format)
    return file.getvalue()


@pytest.mark.parametrize("truncation, new_format", [
    (0.4, False),
    (0.437, True),                                          # between two rows of the tables
    (1.0, True),
    (None, False),
])
def test_published_weights_draw_what_their_own_network_draws(tmp_path, truncation, new_format):
    state = deep_state()
    path = tmp_path / "deep.bin"
    path.write_bytes(saved(dict(state), new_format))
    G = sample.load_generator(path, truncation)
    state.truncation = truncation or 1.0
    z = G.noise((2, 128))
    y = torch.tensor([3, 0])
    # Their noise is cut at 2, then multiplied by the truncation.
    assert state.truncation < z.abs().max() <= 2 * state.truncation
    expected = deep_images(state, z, y)
    close(G(z, y), expected, 1e-5)
    assert expected.std() > 0.1


def test_the_authors_weights_draw_and_judge_as_his_code_does(tmp_path):
    y = torch.tensor([3, 0])
    state_of_G = PortState()
    state_of_D = PortState()
    port_logits(state_of_D, port_images(state_of_G, torch.randn(2, 120), y), y)
    torch.save(dict(state_of_G), tmp_path / "G_ema.pth")
    torch.save(dict(state_of_D), tmp_path / "D.pth")

    G = sample.load_generator(tmp_path / "G_ema.pth")
    z = G.noise((2, 120))
    x = port_images(state_of_G, z, y)
    close(G(z, y), x, 1e-5)
    assert x.std() > 0.05

    # D is found beside G.
    found = sample.read_weights(tmp_path / "G_ema.pth", to_train=True)
    D = Discriminator(found.config).eval()
    D.load_state_dict(found.D)
    close(D(x, y), port_logits(state_of_D, x, y), 1e-5, 1e-5)


class Trap:
    """Is pickled as an instruction to create a file, which a careless loader would follow."""

    def __reduce__(self):
        return open, ("trapped", "w")


def without(state, name):
    return {key: tensor for key, tensor in state.items() if key != name}


BIAS = "generator.bn.bias"                                  # in deep_state: 8 numbers, 32 bytes


@pytest.mark.parametrize("new_format", [False, True])
@pytest.mark.parametrize("spoil, sentence", [
    # Functions that make bytes give the whole file. What others make is saved with torch.save.
    (lambda state: b"", "damaged"),
    (lambda state: pickle.dumps(Trap()), "could run code"),
    (lambda state: state | {"x": Trap()}, "could run code"),
    (lambda state: saved(state)[:100_000], "damaged"),
    (lambda state: saved(state).replace(state[BIAS].numpy().tobytes(), bytes(32)), "damaged"),
    (lambda state: [], "BigGAN"),
    (lambda state: without(state, BIAS), "Missing key.*output_norm.bias"),
    (
        lambda state: without(state, "generator.layers.0.conv_0.weight_v"),
        "weight_v|blocks.0.conv1.v",
    ),
    (lambda state: state | {BIAS: torch.ones(3)}, "size mismatch"),
    (lambda state: state | {BIAS: torch.full((8,), math.nan)}, "output_norm.bias.* not finite"),
    (lambda state: {"G_ema": state, "model": {"colour": "red"}, "classes": []}, "colour"),
])
def test_a_file_of_no_sound_weights_is_refused(
    tmp_path, monkeypatch, capsys, spoil, sentence, new_format
):
    monkeypatch.chdir(tmp_path)
    content = spoil(dict(deep_state()))
    if not isinstance(content, bytes):
        content = saved(content, new_format)
    Path("bad.bin").write_bytes(content)
    error = refused(monkeypatch, capsys, "--weights", "bad.bin", module=sample)
    assert re.search(sentence, error)
    assert os.listdir() == ["bad.bin"]                      # the trap has made no file


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Offers files without logging every request."""

    def log_message(self, *words):
        pass


@pytest.fixture
def server(tmp_path_factory):
    """A folder, and the address at which a server on this machine offers its files."""
    folder = tmp_path_factory.mktemp("served")
    handler = functools.partial(QuietHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("localhost", 0), handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield folder, f"http://localhost:{served.server_port}"
        served.shutdown()


def test_a_file_is_fetched_once_and_checked(server, tmp_path, monkeypatch, capsys):
    folder, address = server
    path = tmp_path / "cache" / "w"
    (folder / "w").write_bytes(b"content")
    hash_prefix = hashlib.sha256(b"content").hexdigest()[:8]

    # A file with another hash is not kept.
    with pytest.raises(sample.UserError, match="hash.* put it at .*cache/w"):
        sample.fetch(f"{address}/w", path, "0123")
    assert not any(path.parent.iterdir())
    monkeypatch.setattr(metrics, "INCEPTION_URL", f"{address}/w")
    assert "hash" in refused(monkeypatch, capsys, "--data", "shapes", module=metrics)

    # A file that was fetched once is there when the server has it no more.
    sample.fetch(f"{address}/w", path, hash_prefix)
    (folder / "w").unlink()
    assert sample.fetch(f"{address}/w", path, hash_prefix).read_bytes() == b"content"

    with pytest.raises(sample.UserError, match=f"{address}/none: .*404.* put it at .*cache/none"):
        sample.fetch(f"{address}/none", path.with_name("none"))


def test_without_weights_the_newest_run_draws_or_else_published_ones(
    server, tmp_path, monkeypatch, capsys
):
    folder, address = server
    cache = tmp_path / "cache"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "CACHE", cache)
    monkeypatch.setitem(sample.BY_NAME, "biggan-deep-256", f"{address}/deep.bin")
    monkeypatch.setitem(sample.PUBLISHED, "biggan-deep-256", None)
    (folder / "deep.bin").write_bytes(saved(dict(deep_state())))
    for weights in None, "biggan-deep-256":
        assert sample.read_weights(weights).scaled_noise
        assert len(os.listdir(cache)) == 1

    for run, time_saved in ("newer", 2), ("older", 1):
        path = tmp_path / "runs" / run / "checkpoints" / "step-00000001.pt"
        path.parent.mkdir(parents=True)
        path.write_bytes(saved(run))                        # the checkpoint is the run's name
        (tmp_path / "runs" / run / "config.json").write_text('{"classes": ["cat", "dog"]}')
        os.utime(path, (time_saved, time_saved))
    content, _ = sample.find_weights(None)
    assert content == "newer"
    assert "runs/newer" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------- sampling

@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """The folder of a run of four steps."""
    out = tmp_path_factory.mktemp("run") / "shapes"
    start(*TINY, "--out", out, "--steps", 4)
    return out


@pytest.mark.parametrize("truncation", [None, 0.5])
def test_samples_are_drawn_by_ema_weights_with_statistics_of_their_noise(tiny_run, truncation):
    checkpoint, _ = sample.newest_checkpoint(tiny_run)
    expected = Generator(biggan.ModelConfig(**checkpoint["model"]))
    expected.load_state_dict(checkpoint["G_ema"])
    threshold = truncation or math.inf
    noise = functools.partial(truncated_normal, threshold=threshold)
    standing_statistics(expected, noise=noise)

    G = sample.load_generator(tiny_run, truncation)
    z = G.noise((4, G.config.z_dim))
    y = torch.arange(4)
    if truncation is not None:
        assert 0.4 < z.abs().max() <= truncation
    close(G(z, y), expected(z, y), 1e-5)
    assert G.classes == train.SHAPES


def test_one_seed_is_one_image_in_any_batch(tiny_run):
    G = sample.load_generator(tiny_run)
    seeds = torch.arange(64)
    labels = seeds % 10
    images = {}
    for n in 1, 7, 64:
        parts = []
        for some_seeds, some_labels in zip(seeds.split(n), labels.split(n)):
            z = sample.seeded_noise(some_seeds, G.config.z_dim)
            parts.append(G(z, some_labels))
        images[n] = torch.cat(parts)
    close(images[1], images[64], 1e-5)
    close(images[7], images[64], 1e-5)
    assert len(sample.seeded_noise(seeds, 20).unique(dim=0)) == 64

    # From [-1, 1] to 0 ... 255. Rounding to whole numbers changes a pixel by 0.5 at most.
    pixels = ((images[1] + 1) * 127.5).permute(0, 2, 3, 1)
    close(sample.draw_seeds(G, labels, seeds), pixels, 0.51)

    G.to_rgb.bias.fill_(math.nan)
    with pytest.raises(sample.UserError, match="not finite"):
        sample.draw_seeds(G, [0], [0])


def test_arrays_are_the_same_on_one_and_three_processes(tiny_run, tmp_path):
    options = ["--weights", tiny_run, "--trunc", 0.7, "--seed", 3]
    options += ["--class", 8, 0, 3, "--npz", 51, "--out"]
    start(*options, tmp_path / "1.npz", module=sample)
    finish(torchrun(3, "--", HERE / "sample.py", *options, tmp_path / "3.npz"))

    labels = np.resize([8, 0, 3], 51)                       # the classes in turn
    G = sample.load_generator(tiny_run, 0.7)
    expected = sample.draw_seeds(G, labels, range(3, 54), G.noise)
    for n in 1, 3:
        found = np.load(tmp_path / f"{n}.npz")
        close(found["arr_0"], expected, 1)                  # they may be rounded differently
        assert found["arr_0"].dtype == np.uint8
        assert found["arr_1"].tolist() == labels.tolist()


def same_grid(path, images, columns):
    """Assert that a sheet shows these images of 32 pixels, each in a white border of one pixel."""
    sheet = np.asarray(Image.open(path))
    cells = sheet.reshape(-1, 34, columns, 34, 3)           # (rows, 34, columns, 34, 3)
    cells = cells.swapaxes(1, 2).reshape(-1, 34, 34, 3)
    close(cells[:, 1:33, 1:33], images, 1)
    assert (cells[:, [0, 33]] == 255).all()


@pytest.mark.parametrize("sheet, truncations", [
    ("classes", [None]),
    ("truncation", [2, 1.5, 1, 0.5, 0.04]),
])
def test_a_sheet_has_a_row_per_truncation_and_class(tiny_run, tmp_path, sheet, truncations):
    path = tmp_path / "a.png"
    options = ["--class", "star", 3, "--n", 2, "--seed", 5, "--sheet", sheet, "--out", path]
    start("--weights", tiny_run, *options, module=sample)
    labels = [8, 8, 3, 3]                                   # the star is class 8
    seeds = [5, 6, 5, 6]
    images = []
    for truncation in truncations:
        G = sample.load_generator(tiny_run, truncation)
        images.append(sample.draw_seeds(G, labels, seeds, G.noise))
    same_grid(path, np.concatenate(images), columns=2)


def test_interpolations_lead_half_way_through_noise_and_class(tiny_run, tmp_path):
    path = tmp_path / "a.png"
    options = ["--class", "star", "ring", "--n", 3, "--sheet", "interpolation", "--out", path]
    start("--weights", tiny_run, *options, module=sample)

    # From noise a by way of b to c, and from star by way of the half-way point to ring.
    G = sample.load_generator(tiny_run)
    a, c = sample.seeded_noise([0, 1], G.config.z_dim)
    b = (a + c) / math.sqrt(2)                              # has variance 1, as a and c have
    star, ring = G.shared.weight[[8, 6]]
    between = (star + ring) / 2
    rows = [
        [(a, star), (b, star), (c, star)],                  # the noise changes
        [(a, star), (a, between), (a, ring)],               # the class changes
        [(a, star), (b, between), (c, ring)],               # both change
    ]
    z, y = zip(*itertools.chain.from_iterable(rows))
    same_grid(path, sample.draw(G, torch.stack(z), torch.stack(y)), columns=3)


def test_classes_are_found_by_number_name_and_imagenet_word():
    synsets = sample.class_names(1000)

    def find(*wanted):
        return sample.class_indices(wanted, synsets)

    retrievers = find("207", "n02099601", "Golden Retriever")
    assert retrievers == [207, 207, 207]
    assert find("tench", "goldfinch") == [0, 11]
    assert find("golden") == [207]                          # a word that no other name has
    assert find("all") == [*range(1000)]

    refused_texts = {
        "crane": r"crane \(134\), crane \(517\)",           # the bird and the machine
        "1000": "must be one of 1000",
        "retriever": r"golden retriever \(207\)",           # a word of several names
        "retriev": r"tench \(0\)",                          # no whole word: the list begins
    }
    for text, sentence in refused_texts.items():
        with pytest.raises(sample.UserError, match=sentence):
            find(text)
    # A name comes before a number. Below, the first class is called 1, and the second one 0.
    assert sample.class_indices(["3", "5"], ["5", "3"]) == [1, 0]
    assert sample.class_indices(["1", "0"], ["1", "0"]) == [0, 1]


def test_an_exported_generator_is_small_and_draws_the_same(tiny_run, tmp_path):
    path = tmp_path / "g.pt"
    start("--weights", tiny_run, "--export", "--out", path, module=sample)
    _, checkpoint = sample.newest_checkpoint(tiny_run)
    assert path.stat().st_size < 0.15 * checkpoint.stat().st_size
    images = []
    for weights in tiny_run, path:
        G = sample.load_generator(weights)
        drawn = sample.draw_seeds(G, range(10), range(10))
        images.append(drawn.astype(int))
    difference = np.abs(images[0] - images[1])
    assert difference.mean() < 1


def recognised(images, labels):
    """The part of the images that a classifier gives these labels.

    Each image gets the class of its nearest neighbour among 2,000 drawn shapes, whose classes come
    in turn. The nearest is the one whose brightness, the brightest colour of each pixel, has the
    highest correlation with the image's."""
    shapes = drawn_shapes(10_000, 12_000)
    brightness = np.concatenate([images, shapes]).max(3).reshape(-1, 32 * 32)
    n = len(images)
    correlation = np.corrcoef(brightness)[:n, n:]           # (images, shapes)
    classes = correlation.argmax(1) % 10
    return (classes == labels).mean()


def test_the_model_that_comes_along_draws_recognisable_shapes_in_an_empty_folder(tmp_path):
    command = ["sample.py", "--weights", "shapes", "--class", "star", "--n", 7]
    finish(run_command(*command, cwd=tmp_path))
    assert os.listdir(tmp_path) == ["sample.png"]
    sheet = Image.open(tmp_path / "sample.png")
    assert sheet.size == (3 * 34, 3 * 34)                   # seven images, in about a square

    G = sample.load_generator("shapes")
    labels = np.arange(200) % 10
    images = sample.draw_seeds(G, labels, range(200))
    assert recognised(images, labels) > 0.9


@pytest.mark.parametrize("picture, rows, columns", [
    ("cifar10", 10, 10),
    ("shapes", 10, 10),
    ("truncation", 5, 8),
    ("interpolation", 3, 8),
])
def test_the_readmes_pictures_are_what_its_commands_draw(picture, rows, columns, tmp_path):
    readme = (HERE / "README.md").read_text()
    [options] = re.findall(f"python sample.py (.*) --out docs/{picture}.png", readme)
    out = tmp_path / "drawn.png"
    start(*options.split(), "--out", out, module=sample)
    drawn = np.array(Image.open(out)).astype(int)
    shown = np.array(Image.open(HERE / f"docs/{picture}.png").convert("RGB")).astype(int)
    assert drawn.shape == shown.shape == (34 * rows, 34 * columns, 3)
    assert np.abs(drawn - shown).mean() < 1


# ------------------------------------------------------------------------- scores of sets of images

def plain_inception(x, state):
    """The network of 2015 on images (N, 3, 299, 299) in [-1, 1]. -> features, logits

    A layer is written as its name, filters, kernel height, kernel width and, unless it is 1, the
    stride. Layers of stride 1 keep H and W. The published network has two that have no padding: it
    is the same to pad there, too, and to cut the border off afterwards."""

    def conv(x, layer):
        """A convolution without a bias, batch norm and ReLU."""
        name, *numbers = layer.split()
        filters, height, width, *stride = [int(number) for number in numbers]
        W = state.tensor(f"{name}.conv.weight", filters, x.shape[1], height, width)
        if stride:
            x = F.conv2d(x, W, stride=stride[0])
        else:
            x = F.conv2d(x, W, padding=(height // 2, width // 2))
        mean = state.tensor(f"{name}.bn.running_mean", filters)
        var = state.tensor(f"{name}.bn.running_var", filters)
        gain = state.tensor(f"{name}.bn.weight", filters)
        bias = state.tensor(f"{name}.bn.bias", filters)
        return F.relu(F.batch_norm(x, mean, var, gain, bias, eps=0.001))

    def cut_border(x):
        return x[:, :, 1:-1, 1:-1]

    def block(name, pooled, *branches):
        """Several chains of layers on the same input x, and what was pooled from it, stacked."""
        outputs = []
        for branch in branches:
            h = x
            for layer in branch.split(", "):
                h = conv(h, f"{name}.branch{layer}")
            outputs.append(h)
        outputs.append(pooled)
        return torch.cat(outputs, 1)

    def pooled(name, filters, maximum=False):
        """A pooling that keeps H and W, the mean unless it is the maximum, and a convolution."""
        if maximum:
            h = F.max_pool2d(x, 3, stride=1, padding=1)
        else:
            h = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        return conv(h, f"{name}.branch_pool {filters} 1 1")

    x = conv(x, "Conv2d_1a_3x3 32 3 3 2")
    x = cut_border(conv(x, "Conv2d_2a_3x3 32 3 3"))
    x = conv(x, "Conv2d_2b_3x3 64 3 3")
    x = F.max_pool2d(x, 3, 2)
    x = conv(x, "Conv2d_3b_1x1 80 1 1")
    x = cut_border(conv(x, "Conv2d_4a_3x3 192 3 3"))
    x = F.max_pool2d(x, 3, 2)
    for name, filters in ("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64):
        x = block(
            name,
            pooled(name, filters),
            "1x1 64 1 1",
            "5x5_1 48 1 1, 5x5_2 64 5 5",
            "3x3dbl_1 64 1 1, 3x3dbl_2 96 3 3, 3x3dbl_3 96 3 3",
        )
    x = block(
        "Mixed_6a",
        F.max_pool2d(x, 3, 2),
        "3x3 384 3 3 2",
        "3x3dbl_1 64 1 1, 3x3dbl_2 96 3 3, 3x3dbl_3 96 3 3 2",
    )
    for name, c in ("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192):
        x = block(
            name,
            pooled(name, 192),
            "1x1 192 1 1",
            f"7x7_1 {c} 1 1, 7x7_2 {c} 1 7, 7x7_3 192 7 1",
            f"7x7dbl_1 {c} 1 1, 7x7dbl_2 {c} 7 1, 7x7dbl_3 {c} 1 7, "
            f"7x7dbl_4 {c} 7 1, 7x7dbl_5 192 1 7",
        )
    x = block(
        "Mixed_7a",
        F.max_pool2d(x, 3, 2),
        "3x3_1 192 1 1, 3x3_2 320 3 3 2",
        "7x7x3_1 192 1 1, 7x7x3_2 192 1 7, 7x7x3_3 192 7 1, 7x7x3_4 192 3 3 2",
    )
    for name, maximum in ("Mixed_7b", False), ("Mixed_7c", True):
        x = block(
            name,
            pooled(name, 192, maximum),
            "1x1 320 1 1",
            "3x3_1 384 1 1, 3x3_2a 384 1 3",
            "3x3_1 384 1 1, 3x3_2b 384 3 1",
            "3x3dbl_1 448 1 1, 3x3dbl_2 384 3 3, 3x3dbl_3a 384 1 3",
            "3x3dbl_1 448 1 1, 3x3dbl_2 384 3 3, 3x3dbl_3b 384 3 1",
        )
    features = x.mean((2, 3))
    W = state.tensor("fc.weight", 1008, 2048)
    bias = state.tensor("fc.bias", 1008)
    return features, F.linear(features, W, bias)


@functools.cache
def inception_state():
    """Random weights, laid out like the published file."""
    torch.manual_seed(0)
    state = State()
    plain_inception(torch.zeros(1, 3, 299, 299), state)
    return state


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    path.write_bytes(saved(dict(inception_state())))
    return path


def features_of(images):
    """What metrics.py computes of images (n, R, R, 3), with random Inception weights."""
    inception = metrics.Inception(inception_state())
    return metrics.features_of(lambda rows: images[rows], len(images), inception, "test")


@pytest.mark.parametrize("height, width", [(32, 32), (299, 299), (256, 341)])
def test_inception_equals_one_operation_at_a_time(height, width):
    x = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8)
    state = inception_state()
    resized = F.interpolate(x.float(), (299, 299), mode="bilinear", align_corners=False)
    expected_features, expected_logits = plain_inception(resized / 127.5 - 1, state)
    features, logits = metrics.Inception(state)(x)
    close(features, expected_features, 1e-5, 1e-5)
    close(logits, expected_logits, 1e-4, 1e-5)
    assert (expected_features[0] - expected_features[1]).std() > 0.01

    # So many weights are in the published file.
    assert sum(W.numel() for W in state.values() if W.dim() > 1) == 23_815_520


@pytest.mark.parametrize("change, sentence", [
    (
        lambda state: without(state, "Mixed_6c.branch7x7dbl_3.bn.running_var"),
        "7x7dbl_3.bn.running_var",
    ),
    (
        # The later Inception has 1,000 outputs.
        lambda state: state | {"fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)},
        "1,008",
    ),
    (lambda state: state | {"fc.bias": torch.full((1008,), math.inf)}, "finite"),
    (lambda state: state | {"x": Trap()}, "could run code"),
])
def test_other_weights_than_inceptions_are_refused(tmp_path, change, sentence):
    torch.save(change(dict(inception_state())), tmp_path / "bad.pth")
    with pytest.raises(sample.UserError, match=sentence):
        metrics.Inception(tmp_path / "bad.pth")


def test_features_are_gathered_from_all_images(monkeypatch):
    monkeypatch.setattr(metrics, "N_KEPT", 18)
    images = drawn_shapes(0, 21)
    found = features_of(images)

    # At most 16 images are computed at once, so 21 images make two blocks, of 11 and 10.
    inception = metrics.Inception(inception_state())
    parts = torch.from_numpy(images).permute(0, 3, 1, 2).split(11)
    f = torch.cat([inception(x)[0] for x in parts])
    close(found.mu, f.double().mean(0))
    close(found.cov, np.cov(f.double().numpy().T))
    close(found.kept, f[:18])
    logits = f[:18] @ inception_state()["fc.weight"].T      # without the last bias
    close(found.probs, logits.softmax(1), 1e-5)
    assert found.n == 21
    assert np.array_equal(found.pixels, images)


def test_every_score_notices_worse_images():
    images = drawn_shapes(0, 12)
    pixel_noise = np.random.default_rng(0).normal(size=images.shape)

    def noisy(deviation):
        return (images + deviation * pixel_noise).clip(0, 255).astype(np.uint8)

    def coarse(side):
        """Each square of this side has the colour of its first pixel."""
        return images[:, ::side, ::side].repeat(side, 1).repeat(side, 2)

    def few(n):
        """The first n images, again and again."""
        return np.resize(images[:n], images.shape)

    real = features_of(images)
    best = metrics.compare(real, real)
    spoiled = noisy(40), coarse(8), few(3), few(1)
    found = [metrics.compare(real, features_of(images)) for images in spoiled]
    noise, squares, bad, worse = found
    for score in "FID", "SWD":
        assert best[score] < min(noise[score], squares[score], bad[score])
        assert bad[score] < worse[score]
    for spoiled in noise, squares, worse:
        assert best["KID"] < spoiled["KID"]

    # The last of these sets repeats one real image. It is typical, but has no variety, and all of
    # it belongs to one class.
    assert best["precision"] == worse["precision"] == 1
    assert best["recall"] == 1
    assert best["recall"] > bad["recall"] > worse["recall"]
    assert best["IS"] > worse["IS"]


def scores_of(tmp_path, *arguments):
    """What metrics.py writes after these options: a list with a dictionary per set of images."""
    start(*arguments, "--out", tmp_path / "m.json", module=metrics)
    return json.loads((tmp_path / "m.json").read_text())


def test_scores_are_the_same_on_one_and_two_processes(inception_file, tiny_run, tmp_path):
    options = ["--weights", tiny_run, "--data", "shapes", "--n", 9, "--trunc", 0.9]
    options += ["--inception", inception_file]
    one, = scores_of(tmp_path, *options)
    finish(torchrun(2, "--", HERE / "metrics.py", *options, "--out", tmp_path / "2.json"))
    two, = json.loads((tmp_path / "2.json").read_text())
    for name in "FID", "KID", "IS", "precision", "recall", "SWD":
        close(two[name], one[name], rtol=1e-4)
    assert two["n"] == two["n_real"] == 9
    assert two["truncation"] == 0.9


def test_an_array_is_scored_against_a_folder_whose_statistics_are_kept(inception_file, tmp_path):
    real = drawn_shapes(0, 9)
    fake = drawn_shapes(20, 28)
    folder = tmp_path / "real"
    folder.mkdir()
    for i, image in enumerate(real):
        Image.fromarray(image).save(folder / f"{i}.png")
    array = tmp_path / "fake.npz"
    np.savez(array, fake, np.zeros(8, int))
    stats = tmp_path / "stats.npz"
    options = ["--fake", array, "--real", folder, "--save-stats", stats]
    result, = scores_of(tmp_path, *options, "--inception", inception_file)
    a = features_of(real)
    b = features_of(fake)
    close(result["FID"], metrics.frechet_distance(a.mu, a.cov, b.mu, b.cov), rtol=1e-4)
    assert result["n"] == 8
    assert result["n_real"] == 9
    assert result["SWD"] > 0
    kept = np.load(stats)
    close(kept["mu"], a.mu, 1e-5)
    close(kept["sigma"], a.cov, 1e-5)
    assert kept["side"] == 32               # said if it is compared with images of another size


def test_each_set_of_weights_and_truncation_has_its_line_and_the_best_is_named(
    tiny_run, tmp_path, capsys
):
    options = ["--trunc", 1, 0.5, "--data", "shapes", "--n", 20, "--seed", 2, "--inception", "none"]
    results = scores_of(tmp_path, "--weights", tiny_run, "shapes", *options)
    output = capsys.readouterr().out

    real = metrics.features_of_data(train.Shapes(32, held_out=True), 20, None).pixels
    i = np.arange(20)
    seeds = 2 * 20 + i                                      # the sets 0 and 1 have those before
    pairs = itertools.product((str(tiny_run), "shapes"), (1, 0.5))
    for result, (weights, truncation) in zip(results, pairs, strict=True):
        assert result["images"] == weights
        assert result["truncation"] == truncation
        G = sample.load_generator(weights, truncation)
        fake = sample.draw_seeds(G, i % 10, seeds, G.noise)
        distances = metrics.pyramid_distances(real, fake)
        close(result["SWD"], 1000 * np.mean([*distances.values()]), rtol=1e-3)
        assert f"SWD {result['SWD']:.4g}" in output

    best = min(results, key=lambda result: result["SWD"])
    assert f"best: shapes, truncation {best['truncation']}" in output


# ----------------------------------------------------------------------------------------- mistakes

@pytest.mark.parametrize("module, arguments, sentence", [
    (sample, "--class 10", "must be one of 10"),
    (sample, "--truncation 0.5", "unrecognized arguments: --truncation"),
    (sample, "--trunc 0", "--trunc 0 must be above 0"),
    (sample, "--trunc 2 --weights deep.bin", "at most 1"),
    (sample, "--n 0", "--n: 0 must be at least 1"),
    (sample, "--out nowhere/a.png", "nowhere/a.png must"),
    (sample, "--npz 5 --out a.png", "must end in .npz"),
    (sample, "--trunc 1 --export", "choose a truncation when you draw"),
    (sample, "--trunc 0 --export", "choose a truncation when you draw"),
    (sample, "--seed 1 --export", "--export takes --weights and --out alone"),
    (sample, "--sheet truncation --npz 5", "--npz takes no --sheet"),
    (sample, "--trunc 1 --sheet truncation", "needs no --trunc"),
    (sample, "--sheet interpolation --class star", "two classes"),
    (sample, "--weights nothing.pt", "nothing.pt"),
    (metrics, "--inception none", "--data"),
    (metrics, "--data nowhere --inception none", "nowhere"),
    (metrics, "--data shapes --n 7", "--n: 7 must be at least 8"),
    (metrics, "--data shapes --inception nothing.pth", "nothing.pth"),
    (metrics, "--data shapes --fake deep.bin --inception none", "no --weights"),
])
def test_a_mistake_is_one_sentence(tmp_path, monkeypatch, capsys, module, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    Path("deep.bin").write_bytes(saved(dict(deep_state())))
    arguments = ["--weights", "shapes", *arguments.split()]
    assert sentence in refused(monkeypatch, capsys, *arguments, module=module)
    assert os.listdir() == ["deep.bin"]                     # nothing was written


# ==================================================================================================
# What comes from outside: disks, terminals, files of others
# ==================================================================================================

# ------------------------------------------------------------------------ numbers that mean nothing

TWO = np.eye(2)


@pytest.mark.parametrize("score", [
    lambda bad: metrics.frechet_distance([0, bad], TWO, [0, 0], TWO),
    lambda bad: metrics.frechet_distance([0, 0], TWO, [0, 0], [[bad, 0], [0, 1]]),
    lambda bad: metrics.inception_score([[0.5, bad], [1, 0]], 1),
    lambda bad: metrics.kernel_distance([[bad], [1], [2]], [[0], [1], [2]]),
    lambda bad: metrics.precision_recall(torch.ones(5, 1), torch.full((5, 1), bad)),
    lambda bad: metrics.sliced_wasserstein(torch.full((3, 2), bad), torch.zeros(3, 2)),
])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_no_score_is_made_of_a_number_that_is_not_finite(score, bad):
    with pytest.raises(sample.UserError, match="not finite"):
        score(bad)


def test_what_has_a_negative_variance_is_no_covariance():
    with pytest.raises(sample.UserError, match="negative"):
        metrics.frechet_distance([0, 0], TWO, [0, 0], [[1, 0], [0, -1]])
    close(metrics.frechet_distance([0, 0], TWO, [0, 0], [[1, 0], [0, -1e-9]]), 1)
    # Many small ones do not make a distance smaller: they count as 0.
    almost = np.diag([1] + 99 * [-9e-4])
    close(metrics.frechet_distance(np.zeros(100), almost, np.zeros(100), np.eye(100)), 99)


@pytest.mark.parametrize("name", ["diversity", "sigma_0"])
def test_a_sign_of_collapse_that_is_not_a_number_is_one(name):
    lines = [dict(step=s, diversity=1.0, D_loss=1.0, sigma_0=1.0) for s in range(0, 500, 50)]
    assert train.collapse_in(lines) is None
    lines[-1][name] = math.nan
    assert train.collapse_in(lines)


# ---------------------------------------------------------------------- a disk that does not answer

@pytest.fixture
def photos(tmp_path):
    """A folder of 8 images of two classes."""
    for label in "ab":
        for i in range(4):
            picture(tmp_path / "photos" / label, f"{i}.png", colour=(i, ord(label), 0))
    return tmp_path / "photos"


def move_back(folder, away, seconds):
    threading.Timer(seconds, away.rename, [folder]).start()


def test_a_file_that_is_away_for_a_moment_is_waited_for_and_not_forgotten(
    photos, monkeypatch, warned
):
    monkeypatch.setattr(train, "WAITS", [0.05] * 100 + [None])
    data = train.open_data(photos, 8)
    away = photos.rename(photos.with_name("away"))
    move_back(photos, away, 0.3)
    image, label = data[6]
    assert (image[0, 0].tolist(), label) == ([2, ord("b"), 0], 1)
    assert not data.broken
    assert "trying again" in str(warned[0])

    # It is tried once more after the last wait.
    away = photos.rename(photos.with_name("away"))
    monkeypatch.setattr(train, "WAITS", [1.0, None])
    move_back(photos, away, 0.3)
    assert data[6][1] == 1

    # A file system may refuse in other ways, too.
    monkeypatch.setattr(train, "WAITS", [0, None])
    with monkeypatch.context() as broken_disk, pytest.raises(sample.UserError, match="Errno 5"):
        def read(path):
            raise OSError(5, "Input/output error", str(path))

        broken_disk.setattr(Path, "read_bytes", read)
        data[0]
    assert data[0][1] == 0


IMPATIENT = "import sample, sys, train; train.WAITS = [0.1, 0.1, None]; sample.run(train.main)"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_whose_images_stay_away_is_saved_and_continues_when_they_are_back(
    photos, tmp_path, workers
):
    options = [*TINY, f"--data {photos} --workers {workers} --save-every 100000 --out"]
    run = run_command("-c", IMPATIENT, *words([*options, tmp_path / "run", "--steps 100000"]))
    wait_until((tmp_path / "run/log.jsonl").exists, run)
    away = photos.rename(photos.with_name("away"))
    _, errors = finish(run, status=2)
    assert re.search("error: .*No such file.*, for a minute; the same command continues", errors)
    assert "Traceback" not in errors
    step, = steps_kept(tmp_path / "run")
    away.rename(photos)
    start(*options, tmp_path / "run", f"--steps {step + 1}")
    assert steps_kept(tmp_path / "run") == [step, step + 1]


def test_a_checkpoint_that_the_disk_does_not_give_is_not_taken_for_a_damaged_one(
    tmp_path, monkeypatch
):
    (tmp_path / "a.pt").write_bytes(saved({"a": torch.ones(1)}))

    def load(*arguments, **options):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(OSError, match="Input/output error: .*a.pt"):
        sample.read_tensors(tmp_path / "a.pt")


@pytest.mark.parametrize("length", [0, 1000, 20_000, 50_000, 100_000])
def test_weights_that_were_cut_short_are_damaged(tmp_path, length):
    content = (HERE / "docs/shapes.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(content[:length])
    with pytest.raises(sample.UserError, match="it is damaged"):
        sample.read_tensors(tmp_path / "a.pt")


def test_what_goes_wrong_in_a_worker_is_one_sentence(photos, tmp_path):
    for path in photos.glob("*/*.png"):
        path.write_bytes(b"broken")
    data = train.open_data(photos, 8)
    loader = torch.utils.data.DataLoader(data, num_workers=1)
    _, problem = train.next_batches(iter(loader), 1)
    assert problem == "none of the images of class a can be read"
    with pytest.raises(sample.UserError, match="none of the images can be read"):
        train.pack(data, tmp_path / "packed", workers=2)
    assert os.listdir(tmp_path / "packed") == []


def test_a_worker_that_is_killed_ends_the_run_with_a_sentence(photos, tmp_path, monkeypatch):
    # So does a worker for which shared memory is too small.
    def kill(self, i):
        os.kill(os.getpid(), signal.SIGBUS)

    monkeypatch.setattr(train.ImageFolder, "__getitem__", kill)
    monkeypatch.setattr(train, "some_images", lambda *_, **__: [torch.zeros(1, 32, 32, 3), [0]])
    with pytest.raises(sample.UserError, match="--shm-size.*continues from step 0"):
        start(*TINY, f"--data {photos} --workers 1 --steps 2 --out {tmp_path}/run")


# --------------------------------------------------------------------- a screen that takes no words

def test_a_run_goes_on_where_nothing_can_be_printed(tmp_path):
    processes = []
    for name in "a full disk", "closed", "a pipe without an end":
        command = [sys.executable, HERE / "train.py", *TINY, "--steps", "2"]
        command += ["--out", tmp_path / name]
        if name == "closed":
            command = ["sh", "-c", 'exec "$@" >&-', "sh", *command]
        stdout = open("/dev/full", "w") if name == "a full disk" else subprocess.PIPE
        process = subprocess.Popen(
            command, stdout=stdout, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        if process.stdout:
            process.stdout.close()          # who reads the pipe is gone
        processes.append((name, process))
    for name, process in processes:
        assert process.stderr.read() == ""
        assert process.wait() == 0
        assert steps_kept(tmp_path / name) == [2]


def test_ctrl_c_that_ends_the_reader_of_the_output_first_saves_all_the_same(tmp_path):
    process = run_command("train.py", *TINY, f"--out {tmp_path} --steps 10000 --save-every 10000")
    wait_until((tmp_path / "log.jsonl").exists, process)
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait() == 0
    assert steps_kept(tmp_path)


def test_folders_whose_names_are_no_text_are_trained_on_and_drawn_with(tmp_path):
    picture(tmp_path / "data" / os.fsdecode(b"\xff"), "0.png")
    run = tmp_path / os.fsdecode(b"run\xff")
    process = subprocess.run(
        [sys.executable, HERE / "train.py", *TINY, "--steps", "2", "--sample-every", "2",
         "--data", tmp_path / "data", "--out", run],
        env={**os.environ, "PYTHONIOENCODING": "ascii:strict"}, capture_output=True,
    )
    assert process.returncode == 0, process.stderr
    assert rb"\udcff" in process.stdout
    G = sample.load_generator(run)
    assert os.fsencode(G.classes[0]) == b"\xff"


# --------------------------------------------------------------------------------- arrays of others

N_SMALL = 10


def small_images(side=8):
    return np.random.default_rng(0).integers(0, 256, (N_SMALL, side, side, 3), np.uint8)


@pytest.mark.parametrize("layout", [
    # name -> array, and how it is called: here, the author's, ADM's, by itself
    lambda x, y: dict(arr_0=x, arr_1=y),
    lambda x, y: dict(x=x.transpose(0, 3, 1, 2), y=y),
    lambda x, y: dict(images=x, labels=y.astype(np.uint8), classes=["a", "b", "c"]),
])
def test_arrays_in_common_layouts_are_read(tmp_path, layout):
    x = small_images()
    y = np.arange(N_SMALL) % 3
    np.savez(tmp_path / "a.npz", **layout(x, y))
    data = train.open_data(tmp_path / "a.npz", 8)
    assert len(data) == N_SMALL
    assert len(data.classes) == 3
    for i in range(N_SMALL):
        image, label = data[i]
        assert np.array_equal(image, x[i])
        assert label == y[i]


@pytest.mark.parametrize("grey", [lambda x: x, lambda x: x[..., None], lambda x: x[:, None]])
def test_grey_arrays_have_three_equal_colours(tmp_path, grey):
    x = small_images()[..., 0]
    np.savez_compressed(tmp_path / "a.npz", arr_0=grey(x))
    data = train.open_data(tmp_path / "a.npz", labelled=False)
    for colour in range(3):
        assert np.array_equal(data[5][0][..., colour], x[5])


@pytest.mark.parametrize("change, sentence", [
    (lambda x, y: dict(arr_0=x / 255, arr_1=y), "float64 .* must be uint8, 0 to 255"),
    (lambda x, y: dict(arr_0=x.astype(int), arr_1=y), "int64 .* must be uint8"),
    (lambda x, y: dict(arr_0=x[:, :7], arr_1=y), "must be uint8, .*(N, R, R, 3)"),
    (lambda x, y: dict(arr_0=x[..., [0, 1, 2, 2]], arr_1=y), "(N, R, R, 3)"),
    (lambda x, y: dict(arr_0=x[:0], arr_1=y[:0]), "(N, R, R, 3)"),
    (lambda x, y: dict(arr_0=x[0, 0, 0], arr_1=y), "(N, R, R, 3)"),
    (lambda x, y: dict(arr_0=x, arr_1=y[1:]), "10 whole numbers .* one for each image"),
    (lambda x, y: dict(arr_0=x, arr_1=y - 1), "from 0 to 999"),
    (lambda x, y: dict(arr_0=x, arr_1=y + 10**9), "from 0 to 999"),
    (lambda x, y: dict(arr_0=np.uint8(3), arr_1=y), "does not hold images"),
    (lambda x, y: dict(arr_0=x, arr_1=y / 2), "whole numbers"),
    (lambda x, y: dict(arr_0=x, arr_1=y, classes=["a"]), "from 0 to 0"),
    (lambda x, y: dict(arr_0=x), "no labels"),
    (lambda x, y: dict(pictures=x), "no images"),
    (lambda x, y: dict(arr_0=np.array([x, None], object)), "cannot be used as arrays"),
    (lambda x, y: dict(arr_0=x, x=x, arr_1=y), "several are called ['images']"),
])
def test_other_arrays_are_refused(tmp_path, change, sentence):
    np.savez(tmp_path / "a.npz", **change(small_images(), np.arange(N_SMALL) % 3))
    for bracket in "()[]":
        sentence = sentence.replace(bracket, "\\" + bracket)
    with pytest.raises(sample.UserError, match=sentence):
        train.open_data(tmp_path / "a.npz")


@pytest.mark.parametrize("content", [b"", b"text", "half", "an array alone"])
def test_what_is_no_npz_is_refused(tmp_path, content):
    path = tmp_path / "a.npz"
    np.savez(path, small_images())
    if content == "half":
        content = path.read_bytes()[:900]
    if content == "an array alone":
        np.save(tmp_path / "a.npy", small_images())
        content = (tmp_path / "a.npy").read_bytes()
    path.write_bytes(content)
    with pytest.raises(sample.UserError, match="a.npz cannot be used as arrays"):
        train.open_data(path)


MU = np.zeros(2048)
SIGMA = np.eye(2048)


@pytest.mark.parametrize("options, sentence", [
    ("--fake fake.npz --real nan.npz", "must be finite numbers"),
    ("--fake fake.npz --real infinite.npz", "must be finite numbers"),
    ("--fake fake.npz --real short.npz", "short.npz holds mu (2047,)"),
    ("--fake fake.npz --real good.npz --save-stats b.npz", "leave out --save-stats"),
    ("--fake fake.npz --real good.npz --inception none", "statistics need Inception"),
    ("--fake good.npz --real fake.npz", "good.npz holds no images"),
    ("--fake fake.npz --real fake.npz --n 9", "no --n"),
    ("--fake fake.npz --real fake.npz --trunc 1 --weights shapes", "no --trunc, --weights"),
    ("--fake few.npz --real fake.npz", "scores need at least 8"),
    ("--fake fake.npz --real few.npz", "3 images in few.npz can be read; scores need at least 8"),
    ("--fake fake.npz --real lower.npz", "sigma symmetric"),
    ("--fake fake.npz --real fake.npz --save-stats fake.npz", "would overwrite fake.npz"),
    ("--fake tiny.npz --real tiny.npz --inception none", "no score is possible"),
    ("--fake array.npy --real fake.npz", "array.npy is no folder of images, and no .npz file"),
    ("--fake= --real fake.npz", "--fake has no value"),
])
def test_what_cannot_be_scored_is_refused(
    tmp_path, monkeypatch, capsys, inception_file, options, sentence
):
    monkeypatch.chdir(tmp_path)
    np.savez("good.npz", mu=MU, sigma=SIGMA)
    np.savez("nan.npz", mu=MU * math.nan, sigma=SIGMA * math.nan)
    np.savez("infinite.npz", mu=MU, sigma=SIGMA + math.inf)
    np.savez("lower.npz", mu=MU, sigma=np.tri(2048))
    np.savez("short.npz", mu=MU[1:], sigma=SIGMA[1:, 1:])
    np.savez("fake.npz", small_images())
    np.savez("few.npz", small_images()[:3])
    np.savez("tiny.npz", small_images(4))
    np.save("array.npy", small_images())
    if "--inception" not in options:
        options += f" --inception {inception_file}"
    monkeypatch.setattr(metrics, "warn", lambda *_: None)
    assert sentence in refused(monkeypatch, capsys, options, module=metrics)
    assert not Path("metrics.json").exists()


def test_statistics_beside_images_count_and_labels_are_not_needed_for_scores(
    tmp_path, monkeypatch, inception_file
):
    monkeypatch.chdir(tmp_path)
    # Wrong labels, and names of classes, which nobody needs.
    np.savez("fake.npz", small_images(), np.zeros(3), classes=["a", "b"])
    np.savez("reference.npz", mu=MU, sigma=SIGMA, arr_0=small_images(), mu_s=MU)
    monkeypatch.setattr(train, "warn", pytest.fail)         # nothing is missing
    start("--fake fake.npz --real reference.npz --inception", inception_file, module=metrics)
    result, = json.loads(Path("metrics.json").read_text())
    fake = features_of(small_images())
    close(result["FID"], metrics.frechet_distance(MU, SIGMA, fake.mu, fake.cov), rtol=1e-6)
    assert "SWD" not in result              # statistics have no pixels


# ------------------------------------------------------------------------- images of their own size

def test_a_folder_is_scored_at_its_own_size_like_the_array_of_its_images(
    tmp_path, monkeypatch, inception_file
):
    monkeypatch.chdir(tmp_path)
    x = small_images(33)                    # no power of two, and odd
    for i, image in enumerate(x):
        path = picture(tmp_path / "folder", f"{i}.png")
        Image.fromarray(image).save(path)
    np.savez("array.npz", x)
    start("--fake folder --real array.npz --inception", inception_file, module=metrics)
    result, = json.loads(Path("metrics.json").read_text())
    expected = features_of(x)
    assert result["FID"] < 1e-6 * np.trace(expected.cov)
    assert (result["precision"], result["recall"]) == (1, 1)
    assert result["SWD_levels"].keys() == {"33", "17"}


def test_other_sizes_in_a_folder_are_counted_and_broken_files_are_no_images(
    tmp_path, monkeypatch
):
    for i in range(6):
        picture(tmp_path, f"{i}.png", size=(16, 16))
    for i in range(6, 9):
        picture(tmp_path, f"{i}.png", size=(20, 10))
    (tmp_path / "9.png").write_bytes(b"no image")
    data = train.open_data(tmp_path, labelled=False)
    lines = []
    monkeypatch.setattr(metrics, "warn", lines.append)
    inception = metrics.Inception(inception_state())
    found = metrics.features_of_data(data, None, inception)
    assert found.n == len(found.kept) == 9
    assert found.pixels is None
    assert "10x20: 3, 16x16: 6" in lines[0]
    for i in range(6):                      # all images are black, whatever their size
        close(found.kept[i], found.kept[0], 1e-5)


def test_pyramids_of_any_size_add_up():
    for side in 32, 33, 75, 97:
        x = torch.randn(1, 3, side, side)
        *fine, total = metrics.laplacian_pyramid(x)
        for band in reversed(fine):
            total = band + metrics.enlarge(total)[:, :, :band.shape[2], :band.shape[3]]
        close(total, x, 1e-5)


# ----------------------------------------------------------------------------------- names, classes

def test_a_flat_folder_has_one_class_wherever_it_lies(tmp_path):
    for name in "train", "val":
        picture(tmp_path / name, "0.png")
    options = [*TINY, f"--held-out {tmp_path}/val --out {tmp_path}/run"]
    start(*options, f"--data {tmp_path}/train --steps 1")
    (tmp_path / "train").rename(tmp_path / "elsewhere")
    start(*options, f"--data {tmp_path}/elsewhere --steps 2")
    assert steps_kept(tmp_path / "run") == [1, 2]


def test_what_is_left_out_of_a_folder_is_mentioned(photos, warned):
    assert len(train.open_data(photos, 8)) == 8
    assert not warned
    picture(photos, "beside.png")
    picture(photos / "a/deeper", "0.png")
    (photos / "a/without_an_ending").touch()
    (photos / "b/3.png").unlink()
    (photos / "b/3.png").symlink_to("nowhere")
    (photos / "c").symlink_to("nowhere")
    (photos / ".hidden").touch()
    data = train.open_data(photos, 8)
    assert data.classes == ["a", "b"]
    assert len(data) == 7
    assert "5 files and folders" in warned[0]


def test_own_images_in_the_folder_of_cifar_10_are_used_and_said_to_be(
    tmp_path, monkeypatch, capsys, warned
):
    monkeypatch.chdir(tmp_path)
    picture(Path("data/cifar10/cat"), "0.png")
    assert train.open_data("data/cifar10", 32).classes == ["cat"]
    assert "holds images of its own" in capsys.readouterr().out

    # A name that is also a folder's: what is used is said.
    picture(Path("shapes/cat"), "0.png")
    assert len(train.open_data("shapes").classes) == 10
    assert "./shapes" in warned[0]
    assert train.open_data("./shapes").classes == ["cat"]
    sample.find_weights("shapes")
    assert "./shapes" in warned[1]


def test_half_an_archive_is_refused_where_the_whole_one_should_lie(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("data/cifar-10-binary.tar.gz").write_bytes(b"half")
    with pytest.raises(sample.UserError, match="cifar-10-binary.tar.gz is not .*delete it"):
        train.open_data("data/cifar10")
    # The same for published weights.
    monkeypatch.setattr(sample, "CACHE", tmp_path)
    (tmp_path / "biggan-deep-256-pytorch_model.bin").write_bytes(b"half")
    with pytest.raises(sample.UserError, match="is not .*delete it"):
        sample.find_weights("biggan-deep-256")


# --------------------------------------------------------------------------- weights and their runs

def test_256_classes_may_have_labels_of_8_bits(warned):
    data = train.Arrays(np.zeros((256, 8, 8, 3), np.uint8), np.arange(256, dtype=np.uint8))
    assert len(data.classes) == 256
    assert not warned


def test_classes_without_images_are_mentioned(warned):
    data = train.Arrays(small_images(), np.arange(N_SMALL) * 2)
    assert len(data.classes) == 19
    assert "9 of 19 classes have no images" in warned[0]


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_names_of_wrapped_networks_are_understood(tmp_path, prefix, tiny_run):
    path = tmp_path / "wrapped.bin"
    for content in dict(deep_state()), sample.newest_checkpoint(tiny_run)[0]:
        plain = sample.read_weights(saved_at(tmp_path / "plain.bin", content)).G_ema
        if "G_ema" in content:
            content["G_ema"] = {prefix + name: p for name, p in content["G_ema"].items()}
        else:
            content = {prefix + name: p for name, p in content.items()}
        same(sample.read_weights(saved_at(path, content)).G_ema, plain)


def saved_at(path, content):
    path.write_bytes(saved(content))
    return path


def test_d_is_read_where_it_is_needed_alone(tmp_path):
    state = PortState()
    y = torch.tensor([3, 0])
    port_images(state, torch.randn(2, 120), y)
    torch.save(dict(state), tmp_path / "G_ema.pth")
    (tmp_path / "D.pth").write_bytes(b"half of D")
    assert sample.read_weights(tmp_path / "G_ema.pth").D is None
    with pytest.raises(sample.UserError, match="D.pth was not loaded"):
        sample.read_weights(tmp_path / "G_ema.pth", to_train=True)


def run_of(folder, classes, age):
    """A folder like a run's, whose checkpoint says whose it is."""
    path = folder / "checkpoints" / "step-00000001.pt"
    path.parent.mkdir(parents=True)
    path.write_bytes(saved(folder.name))
    os.utime(path, (1e9 - age, 1e9 - age))
    (folder / "config.json").write_text(json.dumps({"classes": classes}))


@pytest.mark.parametrize("wanted, used", [
    (["all"], "new"),
    (["star"], "new"),
    (["cat"], "old"),
    (["1"], "new"),
    (["2"], "old"),
    (["207"], "published"),
    (["golden retriever"], "published"),
    (["2", "ring", "arrows"], "none"),
    (["5000"], "none"),
])
def test_the_newest_run_with_the_classes_draws(tmp_path, monkeypatch, capsys, wanted, used):
    monkeypatch.chdir(tmp_path)
    run_of(tmp_path / "runs/old", ["dog", "cat", "cow"], age=3)
    run_of(tmp_path / "runs/new", ["ring", "star"], age=2)
    weights = "checkpoints/step-00000001.pt"
    for name, damage in ("no config", "config.json"), ("no weights", weights):
        run_of(tmp_path / "runs" / name, ["star", "cat"], age=1)
        (tmp_path / "runs" / name / damage).write_text("damaged")
    run_of(tmp_path / "runs/linked", ["star", "cat"], age=1)
    Path("runs/linked", weights).unlink()
    Path("runs/linked", weights).symlink_to("nowhere")
    Path("runs/empty/checkpoints").mkdir(parents=True)

    def fetch(url, *_):
        raise sample.UserError("fetched")

    monkeypatch.setattr(sample, "fetch", fetch)
    if used in ("old", "new"):
        content, _ = sample.find_weights(None, wanted)
        assert content == used
        assert f"drawing with runs/{used}" in capsys.readouterr().out
    else:
        sentence = "fetched" if used == "published" else "must be one of 1000"
        with pytest.raises(sample.UserError, match=sentence):
            sample.find_weights(None, wanted)
        with pytest.raises(sample.UserError, match=sentence):
            sample.find_weights("biggan-deep-256", wanted)


# --------------------------------------------------------------------------- locks, and two at once

def test_a_disk_without_locks_costs_a_warning(tmp_path, monkeypatch, warned):
    def lockf(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(train.fcntl, "lockf", lockf)
    start(*TINY, f"--steps 1 --out {tmp_path}")
    assert "No locks available" in warned[0]
    assert steps_kept(tmp_path) == [1]


def test_a_system_without_what_only_some_have_trains(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "fcntl", None)
    monkeypatch.setattr(train, "STOP_SIGNALS", [signal.SIGINT, signal.SIGTERM])
    monkeypatch.delattr(os, "posix_fallocate")
    monkeypatch.setattr(sample.ctypes, "CDLL", lambda name: object())   # has no mallopt
    monkeypatch.setattr(train.multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    x = small_images(32)
    train.pack(train.Arrays(x, np.arange(N_SMALL) % 2), tmp_path / "packed")
    start(*TINY, f"--data {tmp_path}/packed --workers 1 --steps 1 --out {tmp_path}/run")
    assert steps_kept(tmp_path / "run") == [1]


def test_a_full_disk_is_a_sentence_that_names_the_file(tmp_path):
    def fail(f):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left on device: .*a.png"):
        sample.save_atomically(tmp_path / "a.png", fail)
    assert os.listdir(tmp_path) == []


def test_the_end_of_memory_is_no_fault_of_a_file():
    with pytest.raises(torch.OutOfMemoryError), sample.decoding("a.pt", "is damaged"):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_two_that_write_one_file_at_once_do_not_meet(tmp_path):
    def write_slowly(f):
        f.write(b"first")
        sample.save_text(tmp_path / "a", "second")          # another process, meanwhile

    sample.save_atomically(tmp_path / "a", write_slowly)
    assert (tmp_path / "a").read_text() == "first"
    assert os.listdir(tmp_path) == ["a"]


def test_what_a_killed_process_left_is_removed_when_the_run_continues(tmp_path):
    start(*TINY, f"--steps 1 --out {tmp_path}")
    left = tmp_path / "checkpoints/step-00000002.pt.0123.tmp"
    of_the_log = tmp_path / "log.jsonl.0123.tmp"
    of_others = tmp_path / "mine.tmp"
    for path in left, of_the_log, of_others:
        path.touch()
    start(*TINY, f"--steps 2 --out {tmp_path}")
    assert not left.exists()
    assert not of_the_log.exists()
    assert of_others.exists()


def test_half_a_line_of_the_log_is_passed_over(tmp_path, warned):
    start(*TINY, f"--steps 4 --out {tmp_path}")
    log = tmp_path / "log.jsonl"
    log.write_bytes(log.read_bytes()[:-9] + b"\n[]\n\xff\n{\"step\": 3}\n")
    start(*TINY, f"--steps 6 --out {tmp_path}")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 6]
    assert "cannot be read" in warned[0]
    assert len(warned) == 4


@pytest.mark.parametrize("damage", ["", "{", "[1]", "[" * 100_000])
def test_a_damaged_config_is_a_sentence(tmp_path, damage):
    start(*TINY, f"--steps 1 --out {tmp_path}")
    (tmp_path / "config.json").write_text(damage)
    with pytest.raises(sample.UserError, match="config.json is damaged"):
        start(*TINY, f"--steps 2 --out {tmp_path}")


@pytest.mark.parametrize("lost", ["model", "step", "opt_D"])
def test_a_file_that_is_no_checkpoint_is_a_sentence(tmp_path, lost):
    start(*TINY, f"--steps 1 --out {tmp_path}")
    path = tmp_path / "checkpoints/step-00000001.pt"
    path.write_bytes(saved(without(sample.read_tensors(path), lost)))
    with pytest.raises(sample.UserError, match="step-00000001.pt is no checkpoint of a run"):
        start(*TINY, f"--steps 2 --out {tmp_path}")


def test_an_export_overwrites_nothing(tmp_path, tiny_run):
    path = tmp_path / "a.pt"
    path.write_bytes(b"mine")
    with pytest.raises(sample.UserError, match="a.pt exists"):
        start(f"--weights {tiny_run} --export --out", path, module=sample)
    assert path.read_bytes() == b"mine"


# ------------------------------------------------------------------------------------ what is typed

@pytest.mark.parametrize("options, sentence", [
    ("--workers -1", "--workers: -1 must be at least 0"),
    ("--workers 1000000", "and less than 257"),
    ("--beta1 1.5", "--beta1: 1.5 must be at least 0 and less than 1"),
    ("--beta2 1", "--beta2: 1 must be at least 0 and less than 1"),
    ("--ema nan", "--ema: nan must be"),
    ("--flip 3", "--flip: 3 must be"),
    ("--ch 0", "--ch: 0 must be at least 1"),
    ("--d-lr inf", "--d-lr: inf must be at least 0 and finite"),
    ("--seed 99999999999999999999", "less than 4294967296"),
    ("--sigma-fixed 0", "--sigma-fixed: 0 must be"),
    ("--out a/cat/run --data a", "a/cat/run lies within --data a"),
    ("--pack=", "--pack has no value"),
    ("--keep-every 0", "--keep-every: 0 must be at least 1"),
    ("--pack packed", "--pack takes"),
    ("--init w --model biggan32", "--init decides the architecture"),
])
def test_a_number_out_of_range_is_refused(options, sentence, monkeypatch, capsys):
    typed = " ".join(TINY)
    if "--init" in options:
        typed = typed.replace("--ch 8", "")
    assert sentence in refused(monkeypatch, capsys, typed, options)


def test_mistakes_are_refused_also_without_asserts():
    code = "import sample, train; assert False; sample.run(train.main)"
    process = subprocess.run(
        [sys.executable, "-O", "-c", code, "--flip", "3"], cwd=HERE, capture_output=True, text=True,
        env={**os.environ, "RANK": "1", "LOCAL_RANK": "1"},     # means nothing without a world size
    )
    assert process.returncode == 2
    assert process.stderr.startswith("error: argument --flip: 3 must be")


@pytest.mark.parametrize("module", [train, sample, metrics])
def test_a_world_that_no_torchrun_made_is_refused(module, monkeypatch, capsys):
    monkeypatch.setattr(sample, "WORLD_SIZE", 4)
    assert "WORLD_SIZE is 4, but not set by" in refused(monkeypatch, capsys, "", module=module)


def test_compile_without_a_compiler_is_a_sentence(tmp_path, monkeypatch, capsys):
    def fail(function):
        raise torch._inductor.exc.InvalidCxxCompiler()

    monkeypatch.setattr(torch, "compile", fail)
    sentence = refused(monkeypatch, capsys, *TINY, f"--compile --out {tmp_path}/run")
    assert "apt install g++ python3-dev" in sentence


def test_two_processes_score_readable_images_as_one_does(photos, tmp_path):
    options = f"--fake {photos}/a --real {photos}/a --inception none --out {tmp_path}"
    for i in range(8):
        picture(photos / "a", f"{i}.png", size=(30, 30), colour=(40 * i, 0, 0))
    for i in range(8, 12):
        (photos / "a" / f"{i}.png").write_bytes(b"broken")
    scores = []
    start(options + "/1.json", module=metrics)
    finish(torchrun(2, HERE / "metrics.py", options + "/2.json"))
    for n in 1, 2:
        scores.append(json.loads((tmp_path / f"{n}.json").read_text()))
    assert scores[0] == scores[1]


# -------------------------------------------------------------------- make check: is the demo good?

def check_the_demos_samples_are_the_shapes_that_were_asked_for():
    """To be run after `make demo`: 2,000 samples are recognised, and close to drawn shapes."""
    real = drawn_shapes(0, 2000)
    labels = np.arange(2000) % 10
    G = sample.load_generator(HERE / "runs/shapes")
    sets = {
        "drawn shapes": drawn_shapes(2000, 4000),
        "samples": sample.draw_seeds(G, labels, range(2000)),
    }
    part = {}
    distance = {}
    for name, images in sets.items():
        part[name] = recognised(images, labels)
        distances = metrics.pyramid_distances(real, images)
        distance[name] = 1000 * np.mean([*distances.values()])
        print(f"\n{name}: {part[name]:.1%} recognised, SWD {distance[name]:.1f}")
    assert part["drawn shapes"] > 0.99
    assert part["samples"] >= 0.99
    assert distance["samples"] <= 32


# ------------------------------------------------------------------- beside others, by `make peers`
# Two PyPI packages compute what sample.py and metrics.py do: pytorch-pretrained-biggan draws with
# BigGAN-deep, and pytorch-fid sees with Inception. Ours must give the same numbers, and sooner.

def time_when_done(device):
    """The time in seconds, once the device has done all that it was asked to do."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def median_seconds(work, rounds, device=CPU):
    """The median of the seconds that some work takes, each round measured alone."""
    seconds = []
    for _ in range(2 + rounds):
        started = time_when_done(device)
        work()
        seconds.append(time_when_done(device) - started)
    return np.median(seconds[2:])                   # the first two rounds allocate memory


def command_of(call):
    """The command that calls a function of this file."""
    return [sys.executable, "-c", f"import {__name__} as tests; tests.{call}"]


def printed_by(call):
    """What a function of this file prints in a process of its own, as its users would run it."""
    process = subprocess.run(
        command_of(call),
        cwd=HERE,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def number_printed_by(call):
    """The number that such a function prints last."""
    return float(printed_by(call).split()[-1])


def published_package(resolution):
    """The PyPI package's model with random weights, and these weights as a state dict."""
    from pytorch_pretrained_biggan import BigGAN, BigGANConfig

    model = f"biggan-deep-{resolution}"
    state = DeepState()                             # drawing fills it with random weights
    deep_images(
        state,
        torch.randn(1, 128),
        torch.tensor([0]),
        ch=128,
        n_classes=1000,
        model=model,
    )
    # The package lists a layer as (does it upsample?, width of its input, width of its output).
    layers = []
    for in_width, out_width in itertools.pairwise(MODELS[model].g_channels):
        layers.append((False, in_width, in_width))
        layers.append((True, in_width, out_width))
    package = BigGAN(BigGANConfig(output_dim=resolution, layers=layers))
    package.eval().requires_grad_(False)
    package.load_state_dict(state)
    return package, dict(state)


@pytest.mark.parametrize("resolution", [128, 256, 512])
def peer_the_published_package_draws_the_same_images(tmp_path, resolution):
    package, state = published_package(resolution)
    path = tmp_path / "w.bin"
    path.write_bytes(saved(state, new_format=False))
    y = torch.tensor([207])
    one_hot = F.one_hot(y, 1000).float()
    for truncation in 0.4, 1.0:
        G = sample.load_generator(path, truncation)
        z = G.noise((1, 128))
        theirs = package(z, one_hot, truncation)
        difference = (G(z, y) - theirs).abs().max()
        print(f"\n{resolution}, truncation {truncation}: {difference:.1e}")
        assert theirs.std() > 0.05                  # there is something to see
        assert difference < 1e-4


def images_per_second(whose, path, batch):
    """Print at which rate biggan-deep-128 draws: "ours" with the weights in path, or "theirs"."""
    z = biggan.scaled_normal((batch, 128), 0.4)
    y = torch.arange(batch)
    if whose == "ours":
        G = sample.load_generator(path, 0.4)

        def draw():
            G(z, y)
    else:
        package, _ = published_package(128)
        one_hot = F.one_hot(y, 1000).float()

        def draw():
            package(z, one_hot, 0.4)

    repeats = max(1, 8 // batch)                    # one small batch is too short to be timed

    def draw_repeatedly():
        for _ in range(repeats):
            draw()

    print(repeats * batch / median_seconds(draw_repeatedly, rounds=8))


# Measured: 1.7 to 2.0 times as fast for one image at a time, 2.8 to 3.5 times for sixteen.
@pytest.mark.parametrize("batch, times", [(1, 1.5), (16, 2.5)])
def peer_drawing_is_faster_than_the_package(tmp_path, batch, times):
    path = str(tmp_path / "w.bin")
    _, state = published_package(128)
    torch.save(state, path)
    rates = {"ours": [], "theirs": []}
    for whose in ["ours", "theirs"] * 2:            # in turn: a busy machine slows down both
        rate = number_printed_by(f"images_per_second({whose!r}, {path!r}, {batch})")
        rates[whose].append(rate)
    ours = np.median(rates["ours"])
    ratio = ours / np.median(rates["theirs"])
    print(f"\nbatch {batch}: {ours:.1f} images per second, {ratio:.2f} times the package's")
    assert ratio >= times


def pytorch_fids_network(state):
    """pytorch-fid's Inception with these weights."""
    # It imports torchvision, which needs two operators to be declared. Beside a torch for CPUs
    # nobody declares them.
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in "nms", "qnms":
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor a, Tensor b, float c) -> Tensor")
    from pytorch_fid import inception

    def load_state_dict_from_url(*arguments, **options):
        return state

    inception.load_state_dict_from_url = load_state_dict_from_url
    return inception.InceptionV3([3]).eval().requires_grad_(False)


def peer_pytorch_fid_sees_the_same_features():
    theirs = pytorch_fids_network(inception_state())
    ours = metrics.Inception(inception_state())
    for side in 32, 128, 256, 512:
        shapes = train.Shapes(side)
        images = np.stack([shapes[i][0] for i in range(16)])
        x = torch.from_numpy(images).permute(0, 3, 1, 2)
        our_features, _ = ours(x)
        their_features = theirs(x / 255)[0].flatten(1)
        difference = (our_features - their_features).abs().max()
        print(f"\n{side} pixels: features differ by {difference:.1e}")
        assert difference < 1e-4

    # How fast they are with the largest images.
    our_seconds = []
    their_seconds = []
    for _ in range(4):                              # in turn
        our_seconds.append(median_seconds(lambda: ours(x), 1))
        their_seconds.append(median_seconds(lambda: theirs(x / 255), 1))
    here = np.median(our_seconds)
    there = np.median(their_seconds)
    print(f"{there / here:.2f} times as fast")
    assert there > 0.9 * here                       # equally fast


# --------------------------------------------------------- beside the author's code, by `make port`
# The environment variable PORT names the folder with the PyTorch code of the paper's author.

def authors_code(arguments, config, device):
    """The author's G, D and EMA of G for our config, and a step that trains them.

    The step is a function of images and labels. arguments: options of his train.py. On a GPU his
    code has its fastest settings."""
    for name in "torchvision", "torchvision.transforms", "datasets", "animal_hash":
        sys.modules[name] = unittest.mock.MagicMock()       # imported there, but not needed here
    sys.path.insert(0, os.environ["PORT"])
    import BigGAN
    import train_fns
    import utils

    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    arguments += f" --dim_z {config.z_dim} --G_ch {config.ch} --D_ch {config.ch} --ema"
    options = vars(utils.prepare_parser().parse_args(arguments.split()))
    options["resolution"] = config.resolution
    options["n_classes"] = config.n_classes
    G = BigGAN.Generator(**options).to(device)
    G_ema = BigGAN.Generator(**options).to(device)
    D = BigGAN.Discriminator(**options).to(device)

    n = options["batch_size"]
    z, y = utils.prepare_z_y(n, G.dim_z, config.n_classes, device=str(device))
    ema = utils.ema(G, G_ema, options["ema_decay"], options["ema_start"])
    state = {"itr": 0}
    G_and_D = BigGAN.G_D(G, D)
    update = train_fns.GAN_training_function(G, D, G_and_D, z, y, ema, state, options)

    def step(images, labels):
        state["itr"] += 1
        update(images, labels)

    return G, D, G_ema, step


def authors_step(args, config, device):
    """A training step by the author's code, with networks, batch and recipe of our settings."""
    G, D, _, step = authors_code(
        f"""--batch_size {args.batch} --num_D_steps {args.d_steps} --G_ortho {args.ortho}
        --G_attn {config.g_attention} --D_attn {config.d_attention}
        --shared_dim {config.shared_dim} --G_shared --hier
        --ema_decay {args.ema} --ema_start {args.ema_start}""",
        config,
        device,
    )
    assert parameters(G) == parameters(Generator(config))
    assert parameters(D) == parameters(Discriminator(config))
    return step


def noise_for_real_images(n, config, device):
    """Images (n, 3, R, R) in [-1, 1] and labels (n,), on the device. Enough to measure speed."""
    R = config.resolution
    x = torch.rand(n, 3, R, R, device=device) * 2 - 1
    y = torch.randint(config.n_classes, (n,), device=device)
    return x, y


def training_rate(precision, arguments, steps):
    """Print how many real images a second are trained on; with "port", by the author's code."""
    args = train.parse_settings([*arguments.split(), "--d-steps", "1", "--data", "x"])
    config = train.model_config(args)
    device = torch.device("cpu")
    if precision != "port" or torch.cuda.is_available():
        device = sample.pick_device()       # on a CPU it keeps freed memory; the port does not
    x, y = noise_for_real_images(args.batch, config, device)
    if precision == "port":
        step = authors_step(args, config, device)

        def work():
            step(x, y)
    else:
        args.precision = precision
        trainer = train.Trainer(args, config, device)
        x = x.to(memory_format=torch.channels_last)     # as `train.batches` gives them
        real_batches = itertools.repeat((x, y))

        def work():
            trainer.train_step(real_batches)

    print(args.batch / median_seconds(work, steps, device))


@pytest.mark.parametrize("arguments, steps, fp32, bf16", [
    ("--preset cifar10 --ch 16 --batch 64", 12, 2, 3.2),
    ("--preset imagenet128 --ch 32 --batch 8", 5, 2, 3.2),
])
def beside_the_authors_code_training_is_faster(arguments, steps, fp32, bf16):
    """The same architecture and batch, each in a process of its own."""
    rates = {"port": [], "fp32": [], "bf16": []}
    for whose in ["port", "fp32", "bf16"] * 3:      # in turn
        rate = number_printed_by(f"training_rate({whose!r}, {arguments!r}, {steps})")
        rates[whose].append(rate)
    port = np.median(rates["port"])
    in_fp32 = np.median(rates["fp32"])
    in_bf16 = np.median(rates["bf16"])
    print(f"\n{arguments}: {port:.1f} images per second by the author's code")
    print(f"here {in_fp32:.1f} in fp32, {in_fp32 / port:.2f} times as many")
    print(f"here {in_bf16:.1f} in bf16, {in_bf16 / port:.2f} times as many")
    assert in_fp32 / port >= fp32
    assert in_bf16 / port >= bf16


# -------------------------------------------------------------------- photographs, by `make photos`
# How good are images of CIFAR-10's classes? A small classifier judges them, which is trained on the
# training images first and then recognises 83% of the test images. Its 128 features take the place
# of Inception's in the Frechet and the kernel distance: these are no FID and KID of papers.
# WEIGHTS names what is judged, TRUNC the truncation. With PORT, training beside the author's code
# follows.

DRAWN = 10_000                                      # images of each generator that are judged


def cifar10(folder):
    """Images (n, 32, 32, 3) uint8 and labels (n,) of data/cifar10 or data/cifar10-test."""
    train.open_data("data/cifar10", 32)             # fetches both, if they are not there
    data = train.open_data(f"data/{folder}", 32)
    return np.array(data.images), data.labels


def as_input(images):
    """(n, R, R, 3) uint8 -> (n, 3, R, R) in [-1, 1]."""
    return train.to_network(torch.from_numpy(images), CPU)


class Judge(nn.Module):
    """x (N, 3, 32, 32) in [-1, 1] -> features (N, 128) and logits (N, 10)."""

    def __init__(self):
        super().__init__()
        layers = []
        in_channels = 3
        for out_channels in 32, 64, 128:
            for _ in range(2):
                layers += [
                    nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
                    nn.BatchNorm2d(out_channels),
                    nn.ReLU(),
                ]
                in_channels = out_channels
            layers.append(nn.MaxPool2d(2))
        layers[-1] = nn.AdaptiveAvgPool2d(1)        # the mean over 8x8 pixels
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.classes = nn.Linear(128, 10)
        self.to(memory_format=torch.channels_last)

    def forward(self, x):
        features = self.features(x)
        return features, self.classes(features)


@functools.cache
def trained_judge(path=HERE / "runs/judge.pt"):
    """The classifier, trained for six epochs once."""
    judge = Judge()
    if path.exists():
        judge.load_state_dict(torch.load(path, weights_only=True))
        return judge.eval()
    path.parent.mkdir(exist_ok=True)
    images, labels = cifar10("cifar10")
    labels = torch.as_tensor(labels)
    fast = train.fast_precision(CPU) == "bf16"
    batches = [rows for _ in range(6) for rows in torch.randperm(len(images)).split(128)]
    adam = torch.optim.AdamW(judge.parameters(), weight_decay=0.05)
    rates = torch.optim.lr_scheduler.OneCycleLR(adam, max_lr=4e-3, total_steps=len(batches))
    for rows in batches:
        x = as_input(images[rows])
        x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(3), x)
        down, right = np.random.default_rng(int(rows[0])).integers(5, size=2)
        x = F.pad(x, (2, 2, 2, 2))[:, :, down:down + 32, right:right + 32]
        with torch.autocast("cpu", torch.bfloat16, enabled=fast):
            _, logits = judge(x)
        loss = F.cross_entropy(logits.float(), labels[rows])
        adam.zero_grad()
        loss.backward()
        adam.step()
        rates.step()
    torch.save(judge.state_dict(), path)
    return judge.eval()


def judged(images):
    """What the classifier makes of images: features (n, 128) and classes (n,)."""
    judge = trained_judge()             # with gradients, if it has to be trained first
    with torch.no_grad():
        parts = [judge(as_input(images[i:i + 250])) for i in range(0, len(images), 250)]
    features = torch.cat([part[0] for part in parts])
    logits = torch.cat([part[1] for part in parts])
    return features.double().numpy(), logits.argmax(1).numpy()


def spread(images, labels):
    """How much images of a class differ, as in the log's diversity."""
    return train.spread_within(as_input(images), torch.as_tensor(labels))


@functools.cache
def of_test_images():
    """Features of the test images, and their spread."""
    images, labels = cifar10("cifar10-test")
    features, _ = judged(images)
    return features, spread(images, labels)


def print_scores(name, images, labels):
    """A row: distances to the test images, what part is recognised, diversity."""
    features, classes = judged(images)
    real_features, real_spread = of_test_images()
    moments = []
    for a in features, real_features:
        moments += [a.mean(0), np.cov(a, rowvar=False)]
    frechet = metrics.frechet_distance(*moments)
    kernel, _ = metrics.kernel_distance(features, real_features)
    right = classes == labels
    diversity = spread(images, labels) / real_spread
    row = f"{name:30} {frechet:6.3f} {1000 * kernel:6.2f} {right.mean():6.1%} {diversity:5.2f}"
    of_class = [f"{right[labels == k].mean():4.0%}" for k in range(10)]
    print(row, *of_class, flush=True)
    return frechet, right.mean()


def print_header():
    classes = train.open_data("data/cifar10", 32).classes
    names = " ".join(name[:4] for name in classes)
    print(f"\n{'':30} {'FD':>6} {'KID':>6} {'all':>6} {'div.':>5} {names}")


def drawn_with(weights, truncation=None):
    """Images to be judged, the classes in turn, and their labels."""
    G = sample.load_generator(weights, truncation)
    labels = np.arange(DRAWN) % G.config.n_classes
    return sample.draw_seeds(G, labels, range(DRAWN), G.noise), labels


def photos_of_weights():
    """Scores of test images, training images and samples."""
    print_header()
    print_scores("test images", *cifar10("cifar10-test"))
    images, labels = cifar10("cifar10")
    print_scores("training images", images[::5], labels[::5])
    typed = os.environ.get("TRUNC")
    truncation = float(typed) if typed else None
    for weights in (os.environ.get("WEIGHTS") or "cifar10").split():
        frechet, recognised = print_scores(weights, *drawn_with(weights, truncation))
        if weights == "cifar10" and truncation is None:
            assert frechet < 0.4
            assert recognised > 0.75


# The author's options for CIFAR-10, in scripts/launch_cifar_ema.sh, and his networks for it, made
# narrower. (At full width, ch = 64, they are for a GPU: an hour on a core was 82 steps.)
AUTHORS_NETWORKS = small("biggan32", ch=16, n_classes=10)
AUTHORS_RECIPE = """--batch_size 50 --num_D_steps 4 --G_lr 2e-4 --D_lr 2e-4 --G_attn 0 --D_attn 0
    --G_init N02 --D_init N02 --ema_start 1000"""


def on_one_core(core):
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {core})


def train_and_draw_ours(minutes, folder):
    """Train by our recipe on the first core, then draw."""
    on_one_core(0)
    threading.Timer(60 * minutes, os.kill, (os.getpid(), signal.SIGTERM)).start()
    train.main(["--preset", "cifar10-small", "--out", folder])
    np.savez(f"{folder}/samples.npz", *drawn_with(folder))


def train_and_draw_theirs(minutes, folder):
    """The same by the author's code and recipe, on the second core."""
    on_one_core(1)
    end = time.monotonic() + 60 * minutes
    _, _, G_ema, step = authors_code(AUTHORS_RECIPE, AUTHORS_NETWORKS, CPU)
    images, labels = cifar10("cifar10")
    labels = torch.as_tensor(labels)
    steps = 0
    while time.monotonic() < end:
        rows = torch.randint(len(images), (4 * 50,))
        step(as_input(images[rows]), labels[rows])
        steps += 1
    print(f"the author's code: {steps} steps")
    # As in his sample.py, batch norm takes the moments of each batch that is drawn.
    labels = torch.arange(DRAWN) % 10
    drawn = []
    with torch.no_grad():
        for y in labels.split(250):
            x = G_ema(torch.randn(250, G_ema.dim_z), G_ema.shared(y))
            pixels = ((x + 1) * 127.5).round().byte()
            drawn.append(pixels.permute(0, 2, 3, 1).numpy())
    np.savez(f"{folder}/samples.npz", np.concatenate(drawn), labels)


def photos_beside_the_authors_code():
    """His code and ours, each with its recipe for CIFAR-10, a core each, MINUTES each (60)."""
    if not os.environ.get("PORT"):
        return print("without PORT, no comparison with the author's code")
    minutes = float(os.environ.get("MINUTES") or 60)
    folders = {}
    running = []
    for whose in "ours", "theirs":
        folders[whose] = tempfile.mkdtemp(prefix=f"{whose}-", dir=HERE / "runs")
        command = command_of(f"train_and_draw_{whose}({minutes}, {folders[whose]!r})")
        running.append(subprocess.Popen(command, cwd=HERE))
    for process in running:
        assert process.wait() == 0
    print_header()
    frechet = {}
    for whose, folder in folders.items():
        stored = np.load(f"{folder}/samples.npz")
        frechet[whose], _ = print_scores(whose, stored["arr_0"], stored["arr_1"])
        grid = stored["arr_0"][:100].reshape(10, 10, 32, 32, 3)
        grid = grid.swapaxes(0, 1).reshape(100, 32, 32, 3)          # a row for each class
        sample.image_grid(grid, 10).save(f"{folder}/samples.png")
        print(f"{folder}/samples.png")
    assert frechet["ours"] <= 0.3 * frechet["theirs"]


# -------------------------------------------------------------------------- on a GPU, by `make gpu`
# Does a GPU compute the right numbers, and how fast? Numbers are printed as they are found, and a
# failure does not stop what comes after it. With ON=cpu everything runs on the CPU, with small
# networks, so that no line waits for a GPU to be tried.
#
# First come comparisons, in float64, where two devices differ by rounding alone. (In float32, too,
# they do. But there, rounding turns some input of a ReLU from just below 0 to just above, and
# gradients change by more than 1e-3.)

ON = torch.device(os.environ.get("ON") or "cuda")
CARD = ON.type == "cuda"


class OneOfSeveral(int):
    """The number 1, for which `> 1` is true and `== 1` is false.

    As the number of processes it takes the way of several, with collectives and DDP."""

    def __gt__(self, other):
        return True

    def __eq__(self, other):
        return False

    def __ne__(self, other):
        return True


@pytest.fixture
def a_group_of_one(monkeypatch, tmp_path):
    """A group of processes of which this one is the only member."""
    torch.distributed.init_process_group(
        "nccl" if CARD else "gloo",
        f"file://{tmp_path}/store",
        rank=0,
        world_size=1,
    )
    for module in biggan, train:
        monkeypatch.setattr(module, "processes", lambda: OneOfSeveral(1))
    yield
    torch.distributed.destroy_process_group()


def trained(device, *options, steps=1, state=None):
    """A trainer after some steps on the same images, and the gradients of the last step.

    In float64, unless options say otherwise. state: what it starts from, else random weights.
    Gradients: name -> tensor on the CPU."""
    # D's weights stay as they are. Adam's first step is about the sign of the gradient, also where
    # the gradient is but a rounding error. So a D that had learned would differ between devices.
    usual = "--data x --batch 4 --ch 16 --d-steps 1 --ema-start 0 --g-lr 1e-4 --d-lr 0"
    sample.pick_device()                            # which switches TF32 off
    args = train.parse_settings(words([usual, "--precision fp64", *options]))
    config = dataclasses.replace(train.model_config(args), n_classes=10)
    t = train.Trainer(args, config, device)
    t.scaler._init_scale = 64.0                     # so low that nothing overflows
    for network in t.G, t.D:
        if hasattr(network, "attention"):
            nn.init.constant_(network.attention.gamma, 0.5)     # at 0 attention would not count
    if state:
        t.load_state_dict(state)
    for _ in range(steps):
        t.train_step(same_images(t))
    return t, gradients_of(t)


def gradients_of(trainer):
    """Those of the trainer's last step: name -> a copy on the CPU."""
    gradients = {}
    for network in "G", "D":
        for name, p in getattr(trainer, network).named_parameters():
            if p.grad is not None:
                gradients[f"{network}.{name}"] = p.grad.cpu().clone()
    return gradients


def same_images(trainer):
    """Images and labels, the same on every device, again and again."""
    R = trainer.config.resolution
    n = trainer.args.batch
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(n, 3, R, R, generator=generator, dtype=torch.float64) * 2 - 1
    x = x.to(trainer.device, trainer.dtype)
    y = torch.arange(n).to(trainer.device)
    return itertools.repeat((x, y))


def distance(ours, theirs):
    """The largest relative distance of tensors of the same name. ours, theirs: name -> tensor.

    Relative to the norm of the tensor. Where that is less than a hundredth of the norm of all
    tensors together, it may be nothing but rounding, and that hundredth takes its place."""
    assert ours.keys() == theirs.keys()
    squares = [tensor.norm().square() for tensor in theirs.values()]
    smallest_norm = 1e-2 * sum(squares).sqrt()
    distances = []
    for name in ours:
        norm = max(theirs[name].norm(), smallest_norm)
        distances.append((ours[name] - theirs[name]).norm() / norm)
    return max(distances)


def cosine(ours, theirs):
    """The cosine between all gradients of G, or between all of D: the smaller one."""
    cosines = []
    for network in "G", "D":
        names = [name for name in ours if name.startswith(network)]
        our_vector = torch.cat([ours[name].double().flatten() for name in names])
        their_vector = torch.cat([theirs[name].double().flatten() for name in names])
        cosines.append(F.cosine_similarity(our_vector, their_vector, dim=0))
    return min(cosines)


def report(what, value):
    start_of_line = "\n" if what else ""            # behind pytest's dots
    print(f"{start_of_line}{what:<60}{value}", flush=True)


def gpu_which_machine():
    report("torch", torch.__version__)
    report("C compiler, for --compile", shutil.which("gcc") or shutil.which("cc"))
    header = Path(sysconfig.get_path("include"), "Python.h")
    report("Python's headers, for --compile", header.exists())
    report("shared memory, for workers that decode images", f"{disk_space('/dev/shm'):.1f} GB")
    if CARD:
        card = torch.cuda.get_device_properties(0)
        report(card.name, f"{card.total_memory / 1e9:.0f} GB")
        report("cuDNN", torch.backends.cudnn.version())


def disk_space(path):
    return shutil.disk_usage(path).total / 1e9


@functools.cache
def gradients_of_the_cpu(model):
    return trained(CPU, "--model", model)[1]


@pytest.mark.parametrize("model", ["biggan32", "biggan128", "biggan-deep-128"])
def gpu_a_step_is_the_cpus(model):
    _, ours = trained(ON, "--model", model)
    found = distance(ours, gradients_of_the_cpu(model))
    report(f"{model}: distance of gradients in fp64", f"{found:.1g}")
    assert found < 1e-6


@pytest.mark.parametrize("precision, limit", [("fp32", 0.9999), ("bf16", 0.98), ("fp16", 0.98)])
@pytest.mark.parametrize("model", ["biggan32", "biggan128"])
def gpu_a_rounded_step_has_nearly_the_direction_of_the_cpus(model, precision, limit):
    _, ours = trained(ON, "--model", model, "--precision", precision)
    found = cosine(ours, gradients_of_the_cpu(model))
    report(f"{model}: cosine of gradients in {precision}", f"{found:.5f}")
    assert found > limit


@pytest.mark.parametrize("model", ["biggan128", "biggan-deep-128"])
def gpu_blocks_pass_16_bits_on(model):
    t, _ = trained(ON, "--precision bf16 --model", model)
    widths = set()
    for block in [*t.G.blocks, *t.D.blocks]:
        block.register_forward_hook(lambda _, inputs, output: widths.add(output.dtype))
    t.train_step(same_images(t))
    report(f"{model}: what blocks return", widths)
    assert widths == {torch.bfloat16}


def gpu_fused_attention_changes_nothing():
    precision = "fp32" if CARD else "fp64"          # torch's GPU kernels know no float64
    options = f"--model biggan128 --precision {precision}"
    _, plain = trained(ON, options)
    _, fused = trained(ON, options, "--fused-attention")
    found = distance(fused, plain)
    report(f"--fused-attention: distance of gradients in {precision}", f"{found:.1g}")
    assert found < (2e-2 if CARD else 1e-6)


@pytest.mark.parametrize("options", ["", "--micro-batch 2"])
def gpu_collectives_and_ddp_change_nothing(request, options):
    _, alone = trained(ON, "--model biggan32", options)
    request.getfixturevalue("a_group_of_one")
    t, together = trained(ON, "--model biggan32", options)
    for network in t.parallel_G, t.parallel_D:
        assert isinstance(network, nn.parallel.DistributedDataParallel)
    found = distance(together, alone)
    report(f"collectives and DDP {options}: distance of gradients", f"{found:.1g}")
    assert found < 1e-6


def gpu_a_run_moves_from_card_to_cpu_and_back():
    def matrices_of_G(tensors):
        # Biases before a batch norm move by nothing but rounding, so they are not compared.
        return {name: p.detach().cpu() for name, p in tensors.items() if p.dim() > 1}

    options = "--model biggan32"
    t, _ = trained(ON, options, steps=3)
    stayed = matrices_of_G(dict(t.G.named_parameters()))
    state = None
    for device in ON, CPU, ON:
        t, _ = trained(device, options, state=state)
        checkpoint = saved(t.state_dict())
        state = torch.load(io.BytesIO(checkpoint), map_location="cpu")
    moved = {name: state["G"][name] for name in stayed}
    found = distance(moved, stayed)
    report("a run moved twice: distance of G's weights", f"{found:.1g}")
    assert found < 1e-6


def gpu_images_and_features_are_the_cpus():
    G = sample.load_generator("shapes").to(ON)
    z = G.noise((10, G.config.z_dim))
    y = torch.arange(10)
    on_cpu = copy.deepcopy(G).cpu()(z, y)
    on_card = G(z.to(ON), y.to(ON)).cpu()
    of_images = (on_card - on_cpu).abs().max()

    pixels = ((on_cpu + 1) * 127.5).byte()
    inception = metrics.Inception(inception_state())
    features_on_cpu, _ = inception(pixels)
    features_on_card, _ = inception.to(ON)(pixels.to(ON))
    largest = features_on_cpu.abs().max()
    of_features = (features_on_card.cpu() - features_on_cpu).abs().max() / largest

    report("images: largest difference", f"{of_images:.1g}")
    report("Inception's features: largest difference", f"{of_features:.1g}")
    assert of_images < 1e-3
    assert of_features < 1e-4


def gpu_scores_of_features_are_the_cpus():
    n = 3000 if CARD else 300
    real = torch.randn(n, 2048)
    fake = torch.randn(n, 2048) + 0.03
    for score in metrics.kernel_distance, metrics.precision_recall:
        on_cpu = score(real, fake)
        started = time_when_done(ON)
        on_card = score(real.to(ON), fake.to(ON))
        seconds = time_when_done(ON) - started
        report(f"{score.__name__} of {n} features, in {seconds:.1f} s", on_card)
        close(on_card, on_cpu, atol=2e-3)           # a point more or less in a ball


@pytest.mark.parametrize("options", [
    "",
    "--precision fp16",
    "--micro-batch 2",
    "--ortho 0",
    "--augment colour,cutout",
    "--r1 1",
    "--loss wgan-gp",
    "--augment translation --r1 1",
])
def gpu_a_step_never_waits_for_the_card(options):
    t, _ = trained(ON, "--model biggan32 --workers 0 --precision fp32", options)
    real_batches = train.batches(train.Shapes(32), t.args, 1, ON)
    next(real_batches)                              # starting may wait, as the first step may
    if CARD:
        torch.cuda.set_sync_debug_mode("error")     # to wait for the card is now an error
    try:
        t.train_step(real_batches)
    finally:
        if CARD:
            torch.cuda.set_sync_debug_mode("default")


def gpu_sigterm_to_torchrun_saves(tmp_path):
    options = "--steps 100000 --save-every 100000 --workers 2 --log-every 1"
    process = torchrun(1, HERE / "train.py", *TINY, options, "--out", tmp_path)
    log = tmp_path / "log.jsonl"
    wait_until(log.exists, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert steps_kept(tmp_path)


# Then times. They are those of one trainer, with other settings each time.

@functools.cache
def large_trainer(preset):
    """A trainer as train.py would make it, but with random weights made on the card itself."""
    options = f"--data x --preset {preset}"
    if not CARD:
        options += " --ch 8 --batch 4"
    args = train.parse_settings(options.split())
    sample.pick_device()
    if args.precision == "auto":
        args.precision = train.fast_precision(ON)
    with ON:
        return train.Trainer(args, train.model_config(args), ON)


def make_room():
    """Let go of the trainers, so that the card's memory is free."""
    large_trainer.cache_clear()
    gc.collect()
    if CARD:
        torch.cuda.empty_cache()


def change(trainer, batch, **settings):
    """Give a trainer another batch and other settings. Returns images without end."""
    if not CARD:
        batch = min(batch, 4)
    sizes = {"batch": batch, "micro_batch": batch}
    usual = train.parse_settings(["--data", "x", "--preset", trainer.args.preset])
    for name, value in {**vars(usual), **sizes, **settings}.items():
        if name not in ("precision", "ch"):
            setattr(trainer.args, name, value)
    trainer.rows = train.rows_of_batch(trainer.args)
    trainer.micro = batch
    for network in trainer.G, trainer.D:
        if hasattr(network, "attention"):
            network.attention.fused = trainer.args.fused_attention
    x, y = noise_for_real_images(batch, trainer.config, ON)
    x = x.to(memory_format=torch.channels_last)     # as `train.batches` gives them
    return itertools.repeat((x, y))


def mean_seconds(work, times):
    """The mean of the seconds that some work takes, many times in a row.

    The device is waited for at the end alone: in training, the CPU prepares the next step while
    the device computes this one."""
    for _ in range(2):
        work()                                      # to warm up
    started = time_when_done(ON)
    for _ in range(times):
        work()
    return (time_when_done(ON) - started) / times


@functools.cache
def peak_rate(dtype):
    """Tera-operations per second of a product of large matrices. Hardly anything is faster."""
    # Each of the (side, side) numbers is a sum of `side` products: 2 side^3 operations.
    side = 8192 if CARD else 1024
    matrix = torch.randn(side, side, device=ON, dtype=dtype)
    return 2e-12 * side**3 / mean_seconds(lambda: matrix @ matrix, 10)


@functools.cache
def measured_step(preset, batch, **settings):
    """Print the time and the memory of a training step. Returns its seconds."""
    trainer = large_trainer(preset)
    real_batches = change(trainer, batch, **settings)
    report(f"{preset}, {trainer.args.batch} images", settings or "")
    try:
        trainer.train_step(real_batches)            # in which cuDNN tries what needs much memory
    except torch.OutOfMemoryError:
        pytest.skip("memory ran out")
    if CARD:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds = mean_seconds(lambda: trainer.train_step(real_batches), 10 if CARD else 1)
    # What torch has taken from the card, and filled, before anything else takes more.
    reserved = torch.cuda.max_memory_reserved() / 1e9
    allocated = torch.cuda.max_memory_allocated() / 1e9
    rate = trainer.args.batch * trainer.args.d_steps / seconds
    report("", f"{1000 * seconds:.0f} ms per step, {rate:.1f} real images per second")
    report("", f"{reserved:.2f} GB of GPU memory reserved, {allocated:.2f} GB allocated")
    return seconds


def measure(preset, batch, **settings):
    """Print also how many operations a step has, and how far it is from the card's best."""
    seconds = measured_step(preset, batch, **settings)
    trainer = large_trainer(preset)
    real_batches = change(trainer, batch, **settings)
    # A multiplication and an addition count as 2 operations, also where they are with a zero.
    with FlopCounterMode(display=False) as counter:
        trainer.train_step(real_batches)
    tera = counter.get_total_flops() / 1e12
    peak = peak_rate(trainer.half or trainer.dtype)
    share = tera / seconds / peak
    report("", f"{tera:.4f} TFLOP, {share:.0%} of a matrix product's {peak:.2f} per second")
    assert 0 < share < 1.5


@pytest.mark.parametrize("batch", [64, 256])
def gpu_speed_of_training(batch):
    measure("imagenet128", batch)


def gpu_speed_with_fused_attention():
    measure("imagenet128", 256, fused_attention=True)


def price(preset, batch, **settings):
    """Print how many times as slow a step is with other settings."""
    plain = measured_step(preset, batch)
    seconds = measured_step(preset, batch, **settings)
    report(f"{settings}: times as slow as without", f"{seconds / plain:.2f}")


def gpu_price_of_smaller_sigmas():
    price("imagenet128", 64, sigma_ratio=1.5)


def gpu_speed_of_deep():
    make_room()
    measure("imagenet128-deep", 128)


@pytest.mark.parametrize("model", ["biggan-deep-128", "biggan-deep-256"])
def gpu_speed_of_drawing(model):
    sample.pick_device()
    torch.backends.cudnn.benchmark = False          # as sample.py has it; a Trainer has set it
    config = dataclasses.replace(MODELS[model], ch=128 if CARD else 8)
    with ON:
        G = Generator(config).eval().requires_grad_(False)
    G = biggan.fold_spectral_norm(G)
    G = G.to(memory_format=torch.channels_last)
    for batch in 1, 16:
        z = torch.randn(batch, 128)
        y = torch.arange(batch)
        seconds = median_seconds(lambda: sample.draw(G, z, y), 5, ON)
        report(f"{model}: images per second, {batch} at a time", f"{batch / seconds:.1f}")


def in_its_own_process(call, seconds):
    """Call a function of this file in another process, for so long at most, with its output."""
    make_room()
    subprocess.run(command_of(call), cwd=HERE, timeout=seconds, check=True)


def authors_code_beside_ours():
    trainer = large_trainer("imagenet128")
    ours = measured_step("imagenet128", 64, d_steps=1)
    images, labels = next(change(trainer, 64, d_steps=1))
    images = images.contiguous()                    # the usual layout, as in `make port`
    with ON:
        step = authors_step(trainer.args, trainer.config, ON)
    theirs = mean_seconds(lambda: step(images, labels), 10 if CARD else 1)
    rate = trainer.args.batch / theirs
    report("the author's code: real images per second", f"{rate:.1f}")
    report("ours, in bf16: times as many", f"{theirs / ours:.2f}")


def gpu_speed_beside_the_authors_code():
    if not os.environ.get("PORT"):
        return report("without PORT", "no comparison with the author's code")
    in_its_own_process("authors_code_beside_ours()", 120)


def gpu_price_of_r1():
    # Its second derivative asks for convolutions with kernels as large as an image. What cuDNN has
    # for them may be very slow.
    in_its_own_process("price('imagenet128', 16, r1=10.0)", 90)


def gpu_largest_kernels():
    trainer = large_trainer("imagenet128")
    real_batches = change(trainer, 256)
    trainer.train_step(real_batches)
    with torch.profiler.profile() as profile:
        started = time_when_done(ON)
        trainer.train_step(real_batches)
        seconds = time_when_done(ON) - started
    report("a step under the profiler", f"{seconds:.2f} s, of which the card is busy as below")
    kernels = profile.key_averages()
    column = "self_cuda_time_total" if CARD else "self_cpu_time_total"
    table = kernels.table(sort_by=column, row_limit=25, max_name_column_width=60)
    report("the largest kernels", table)


def compiled_beside_plain():
    """Print how long compiling takes, and what it gains. The gradients must remain the same."""
    trainer = large_trainer("imagenet128" if CARD else "cifar10")
    real_batches = change(trainer, 256, d_steps=1)
    trainer.opt_D.param_groups[0]["lr"] = 0.0       # as in `trained`
    start = copy.deepcopy(trainer.state_dict())
    gradients = []
    for way in "plain", "compiled":
        trainer.load_state_dict(start)
        started = time_when_done(ON)
        trainer.train_step(real_batches)
        report(f"first step, {way}: seconds", f"{time_when_done(ON) - started:.1f}")
        gradients.append(gradients_of(trainer))
        seconds = mean_seconds(lambda: trainer.train_step(real_batches), 10 if CARD else 1)
        report(f"a step, {way}: ms", f"{1000 * seconds:.0f}")
        for network in trainer.G, trainer.D:
            network.compile(dynamic=False)
    found = cosine(*gradients)
    report("cosine of gradients", f"{found:.4f}")
    assert found > 0.98


def gpu_compile_comes_last():
    in_its_own_process("compiled_beside_plain()", 400)
