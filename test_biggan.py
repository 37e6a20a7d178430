"""Proofs of every technique in biggan.py and of the scores in metrics.py, in the order of those files.

A test's name states a fact. Its body checks the code against a closed form, derived in a comment, and against
a witness: another implementation of it, torch's own where there is one.

    technique            closed form                             witness
    spectral norm        diagonal and rank-one matrices          nn.utils.parametrizations.spectral_norm
    resampling           a kernel of a single one                nn.Upsample, nn.AvgPool2d
    batch norm           two numbers, a geometric sum            nn.BatchNorm2d, F.batch_norm
    self-attention       zero queries, one dominant key          F.scaled_dot_product_attention
    losses               the best D on two points                torch's cross-entropy, MSE and hinge losses
    penalties            linear and quadratic D, two filters     torch's Jacobian, finite differences
    augmentation         a shifted image, a box, a square        F.pad, finite differences
    singular values      diagonal matrices, d sigma = u v^T      torch.linalg.svdvals
    truncation           moments of the truncated normal         nn.init.trunc_normal_
    EMA                  a geometric sum                         torch.optim.swa_utils.AveragedModel
    standing statistics  the mean over the batches               nn.BatchNorm2d with momentum None
    scores               Gaussians, points on a line             eigenvalues, F.kl_div, torch.cdist
    a training step      a G and a D of one number               the step again, written naively
    several processes                                            one process, in float64

`make test` runs the functions test_*; other targets run those of other names, in the last sections.
"""

import contextlib
import copy
import dataclasses
import functools
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

os.environ["TORCH_HOME"] = tempfile.mkdtemp()           # before sample.py looks; leaves the user's alone

import biggan
import metrics
import sample
import train
from biggan import (EMA, LOSSES, MODELS, BatchNorm, ConditionalBatchNorm, Discriminator, Generator, Moments,
                    SelfAttention, SNConv2d, SNEmbedding, SNLinear, augment, clamp_sigma, cutout,
                    gradient_penalty, orthogonal_penalty, power_iteration, r1_penalty, sigma_excess,
                    sigma_pull, singular_values, standing_statistics, translate, truncated_normal)

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def close(a, b, atol=1e-6, rtol=1e-6):
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    torch.testing.assert_close(a, b, atol=atol, rtol=rtol)


def agree(ours, theirs, inputs, atol=1e-8):
    """The same values, and the same gradients with respect to all inputs."""
    close(ours, theirs, atol)
    g = torch.randn_like(ours)
    pairs = zip(torch.autograd.grad(ours, inputs, g), torch.autograd.grad(theirs, inputs, g))
    for our_gradient, their_gradient in pairs:
        close(our_gradient, their_gradient, atol)


def leaf(*shape):
    """Normal numbers in float64, with respect to which gradients can be taken."""
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def small(name="biggan32", **changes):
    """A model of the family, narrow enough for a test."""
    return dataclasses.replace(MODELS[name], **{"ch": 8, "n_classes": 4, **changes})


def build(network, name="biggan32", **changes):
    """A small G or D in float64 and in evaluation mode. gamma is not 0, so that attention counts."""
    module = network(small(name, **changes)).double().eval()
    if hasattr(module, "attention"):
        nn.init.constant_(module.attention.gamma, 0.5)
    return module


def parameters(module):
    return sum(p.numel() for p in module.parameters())


# ---------------------------------------------------------------- the numbers

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
    with torch.device("meta"):                          # shapes without memory
        assert parameters(network(MODELS[name])) == count


def test_attention_at_128_pixels_as_in_table_5_has_fewer_parameters():
    # Attention over C channels has 2 C^2/8 + 2 C^2/2 weights and gamma. C is 384 at 64 pixels,
    # 192 at 128.
    with torch.device("meta"):
        of_table_5 = Generator(dataclasses.replace(MODELS["biggan256"], g_attention=128))
    assert 82_235_844 - parameters(of_table_5) == 1.25 * (384**2 - 192**2)


TABLE_1 = [81.5, 81.5, 81.5, 81.5, 173.5, 160.6, 158.3, 158.3, 71.3]       # millions of parameters


@pytest.mark.parametrize("row, millions", [*enumerate(TABLE_1, start=1)])
def test_table_1_counts_g_and_d_without_the_shared_class_vectors(row, millions):
    settings = train.parse_settings(["--preset", f"table1-row{row}", "--data", "x"])
    config = train.model_config(settings, n_classes=1000)
    with torch.device("meta"):
        both = parameters(Generator(config)) + parameters(Discriminator(config))
    assert round((both - 1000 * config.shared_dim) / 1e6, 1) == millions


@pytest.mark.parametrize("name", MODELS)
def test_every_model_draws_and_learns_at_its_resolution(name):
    G, D = build(Generator, name).float(), build(Discriminator, name).float()
    config, sizes = G.config, []
    for network in G, D:
        if hasattr(network, "attention"):
            network.attention.register_forward_hook(lambda layer, args, out: sizes.append(out.shape[-1]))
    for training in False, True:
        y = torch.tensor([1, 3])
        x = G.train(training)(torch.randn(2, config.z_dim), y)
        assert x.shape == (2, 3, config.resolution, config.resolution)
        D.train(training)(x, y).square().sum().backward()
        for parameter_name, p in [*G.named_parameters(), *D.named_parameters()]:
            # In training, batch norm takes away again what a convolution's bias adds to a channel.
            idle = training and parameter_name.endswith("bias")
            assert p.grad.isfinite().all() and (idle or p.grad.any()), parameter_name
            p.grad = None
    assert sizes == [size for size in (config.g_attention, config.d_attention) if size] * 2


@pytest.mark.parametrize("name, changes, message", [
    ("biggan64", {"resolution": 128}, "pixels"),
    ("biggan64", {"z_dim": 128}, "chunks"),
    ("biggan128", {"g_attention": 48}, "attention"),
    ("biggan128", {"shared_dim": 0}, "shared_dim"),
    ("biggan-deep-128", {"shared_dim": 0}, "shared_dim"),
])
def test_a_configuration_that_cannot_work_is_refused(name, changes, message):
    with pytest.raises(AssertionError, match=message):
        dataclasses.replace(MODELS[name], **changes)


def test_weights_start_orthogonal_and_biases_zero():
    layer = Discriminator(small()).blocks[1].conv1
    W = layer.weight.flatten(1)                         # 32 filters of 288 inputs: W W^T = I
    close(W @ W.T, torch.eye(32), 1e-5)
    assert not layer.bias.any()


# ---------------------------------------------------------------- spectral norm

@pytest.mark.parametrize("k", [1, 2, 5, 50])
def test_power_iteration_converges_as_the_ratio_of_singular_values(k):
    # W = diag(s, r) multiplies u = (1, t) by s^2 and r^2 per step: after k steps u ~ (s^2k, t r^2k).
    # sigma = |W v| with v ~ W^T u_before ~ (s^(2k-1), t r^(2k-1)). For many steps u -> (1, 0) and sigma -> s.
    s, r, t = 2.0, 1.5, 7.0
    W, start = torch.tensor([[s, 0], [0, r]]).double(), torch.tensor([1, t]).double()
    sigma, u, _ = power_iteration(W, start, steps=k)
    close(u[1] / u[0], t * (r / s)**(2 * k), 1e-12)
    squared = (s**(4 * k) + t**2 * r**(4 * k)) / (s**(4 * k - 2) + t**2 * r**(4 * k - 2))
    close(sigma, math.sqrt(squared), 1e-12)
    if k == 50:
        close(sigma, s)


def test_rank_one_and_orthogonal_matrices_converge_in_one_step():
    # W = a b^T: W^T u is a multiple of b for any u, so v = b / |b|, u = a / |a| and sigma = |a| |b|.
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0, 2.0])
    close(power_iteration(torch.outer(a, b), torch.randn(2))[0], 5 * 3)
    close(power_iteration(nn.init.orthogonal_(torch.empty(6, 6)), torch.randn(6))[0], 1)


def test_a_normalised_matrix_stretches_no_vector_and_has_the_closed_gradient():
    # d <L, W / sigma> / dW = (L - <L, W / sigma> u v^T) / sigma, with u and v as constants.
    layer = SNLinear(1e-12, 6, 4).double()
    U, S, Vh = torch.linalg.svd(layer.weight.detach())
    layer.u.copy_(U[:, 0])
    W, L = layer.normalized_weight(), leaf(4, 6)
    close(torch.linalg.svdvals(W)[0], 1)
    gradient, = torch.autograd.grad(W, layer.weight, L)
    close(gradient, (L - (L * W).sum() * torch.outer(U[:, 0], Vh[0])) / S[0])


def test_spectral_norm_equals_torchs():
    x, ours, theirs = leaf(2, 3, 8, 8), SNConv2d(1e-12, 3, 5, 3).double(), nn.Conv2d(3, 5, 3, padding=1)
    theirs.weight, theirs.bias = ours.weight, ours.bias
    theirs = nn.utils.parametrizations.spectral_norm(theirs, n_power_iterations=1000)
    theirs.parametrizations.weight.original = ours.weight
    for _ in range(1000):
        ours.normalized_weight()
    agree(ours(x), theirs(x), [x, ours.weight, ours.bias])


@pytest.mark.parametrize("layer, x", [(SNConv2d(1e-4, 3, 5, 3), torch.randn(1, 3, 4, 4)),
                                      (SNLinear(1e-4, 3, 5), torch.randn(1, 3)),
                                      (SNEmbedding(1e-4, 5, 3), torch.tensor([2]))])
def test_u_moves_one_step_per_training_pass_and_is_saved(layer, x):
    before = layer.state_dict()["u"].clone()
    expected = power_iteration(layer.weight.flatten(1), before, eps=1e-4)[1]
    layer.eval()(x)
    assert torch.equal(layer.u, before)
    layer.train()(x)
    assert torch.equal(layer.u, expected) and not torch.equal(layer.u, before)


def test_folding_spectral_norm_keeps_the_output():
    layer, x = SNLinear(1e-4, 3, 5).eval(), torch.randn(2, 3)
    before = layer(x)
    close(biggan.fold_spectral_norm(layer)(x), before)
    assert layer.normalized_weight() is layer.weight    # without eps there is no spectral norm


def test_spectral_norm_is_computed_in_float32_under_autocast():
    layer = SNLinear(1e-4, 64, 64).eval()
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = layer.normalized_weight()
    assert torch.equal(under_autocast, layer.normalized_weight())


# ---------------------------------------------------------------- resampling folded into a convolution

repeat, pool = nn.Upsample(scale_factor=2), nn.AvgPool2d(2)


def test_resampling_and_a_3x3_convolution_are_one_4x4_convolution():
    layer = SNConv2d(None, 3, 5, 3).double()
    for x in leaf(2, 3, 6, 8), leaf(1, 3, 2, 2):        # the second is too small for it to pay
        inputs = [x, layer.weight, layer.bias]
        agree(biggan.upsample_conv3x3(x, layer), layer(repeat(x)), inputs)
        agree(biggan.conv3x3_downsample(x, layer), pool(layer(x)), inputs)


def test_the_mean_of_four_shifted_points_is_a_square():
    W = torch.zeros(1, 1, 3, 3)
    W[0, 0, 1, 1] = 4
    close(biggan.mean_of_four_shifted(W)[0, 0], [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]])


def test_pooling_undoes_upsampling_and_1x1_convolutions_commute_with_both():
    x, conv = leaf(2, 3, 4, 4), nn.Conv2d(3, 5, 1).double()
    close(pool(biggan.upsample(x)), x)
    close(conv(biggan.upsample(x)), biggan.upsample(conv(x)))
    close(conv(pool(x)), pool(conv(x)))


def test_the_blocks_are_the_papers():
    """Tables 4 and 5, one operation at a time."""
    config = small()
    x, c = leaf(2, 8, 8, 8), leaf(2, config.c_dim)
    g = biggan.GBlock(8, 16, config).double().eval()
    h = g.conv1(repeat(F.relu(g.bn1(x, c))))
    close(g(x, c), g.conv2(F.relu(g.bn2(h, c))) + g.conv_sc(repeat(x)))
    for first, down, out in (True, True, 16), (False, True, 16), (False, False, 8):
        d = biggan.DBlock(8, out, first, down, config).double().eval()
        h = d.conv2(F.relu(d.conv1(x if first else F.relu(x))))
        close(d(x), pool(h + d.conv_sc(x)) if down else h + x)


def test_the_deep_blocks_are_the_papers():
    """Tables 7 to 9 and figure 16, one operation at a time: shortcuts that drop or add channels."""
    config = small("biggan-deep-128")
    x, c = leaf(2, 16, 8, 8), leaf(2, config.c_dim)
    for resampled, out in (False, 16), (True, 16), (True, 8):
        g = biggan.DeepGBlock(16, out, resampled, config).double().eval()
        resize = repeat if resampled else nn.Identity()
        h = g.conv1(F.relu(g.bn1(x, c)))
        h = g.conv2(resize(F.relu(g.bn2(h, c))))
        h = g.conv3(F.relu(g.bn3(h, c)))
        close(g(x, c), g.conv4(F.relu(g.bn4(h, c))) + resize(x)[:, :out])
    for resampled, out in (False, 16), (True, 16), (True, 32):
        d = biggan.DeepDBlock(16, out, resampled, config).double().eval()
        resize = pool if resampled else nn.Identity()
        h = d.conv2(F.relu(d.conv1(F.relu(x))))
        h = F.relu(d.conv3(F.relu(h)))
        shortcut = x if out == 16 else torch.cat([x, d.conv_sc(x)], 1)
        close(d(x), d.conv4(resize(h)) + resize(shortcut))


# ---------------------------------------------------------------- batch norm

def test_batch_norm_of_two_numbers():
    # m + a and m - a have mean m, variance a^2 and unbiased variance 2 a^2. They become plus and minus
    # a / sqrt(a^2 + eps) = 1 / sqrt(1 + eps / a^2). Each step keeps 0.9 of the running averages and adds 0.1
    # of the batch's: from 0 and 1, n equal batches give (1 - 0.9^n) m and 0.9^n + (1 - 0.9^n) 2 a^2.
    m, a, eps, bn = 5.0, 3.0, 0.5, BatchNorm(1, 0.5)
    for _ in range(4):
        y = bn(torch.tensor([m + a, m - a]).reshape(2, 1, 1, 1))
    close(y.flatten(), torch.tensor([1, -1]) / math.sqrt(1 + eps / a**2))
    close(bn.running_mean, [(1 - 0.9**4) * m])
    close(bn.running_var, [0.9**4 + (1 - 0.9**4) * 2 * a**2])


def test_batch_norm_equals_torchs():
    x, ours, theirs = 5 + 2 * leaf(4, 3, 5, 5), BatchNorm(3, 1e-4).double(), nn.BatchNorm2d(3, 1e-4).double()
    nn.init.normal_(ours.gain)
    nn.init.normal_(ours.bias)
    theirs.weight, theirs.bias = ours.gain, ours.bias
    agree(ours(x), theirs(x), [x, ours.gain, ours.bias])
    close(ours.running_mean, theirs.running_mean)
    close(ours.running_var, theirs.running_var)
    close(ours.eval()(x), theirs.eval()(x))


def test_the_moments_gradient_is_that_of_finite_differences():
    assert torch.autograd.gradcheck(Moments.apply, leaf(2, 3, 2, 2))


def test_the_moments_of_bfloat16_are_taken_in_float32():
    x = (100 + torch.randn(64, 2, 16, 16)).bfloat16()
    mean, var = Moments.apply(x)
    close(mean, x.double().mean((0, 2, 3)), 1e-4)
    close(var, x.double().var((0, 2, 3), correction=0), 1e-3)


def conditional(channels, shared_dim):
    """Conditional batch norm in training; its linear layers in evaluation mode, so that u does not move."""
    bn = ConditionalBatchNorm(channels, small(shared_dim=shared_dim, skip_z=False)).double().eval()
    bn.training = True
    return bn


def test_the_condition_sets_mean_and_standard_deviation():
    # A channel of mean 0 and variance 1, times gain, plus bias, has standard deviation |gain| and mean bias.
    bn, x, c = conditional(2, 3), 100 * leaf(64, 2, 8, 8), leaf(3)
    y = bn(x, c.expand(64, 3))
    close(y.std((0, 2, 3), correction=0), (1 + bn.gain.normalized_weight() @ c).abs())
    close(y.mean((0, 2, 3)), bn.bias.normalized_weight() @ c)


@pytest.mark.parametrize("shared_dim", [5, 0])
def test_conditional_batch_norm_equals_torchs(shared_dim):
    bn, x, c = conditional(3, shared_dim), 5 + 2 * leaf(4, 3, 5, 5), leaf(4, 5)
    if shared_dim:
        condition, gain, bias = c, c @ bn.gain.normalized_weight().T, c @ bn.bias.normalized_weight().T
    else:                                               # a class table is a linear layer of the one-hot class
        condition = torch.tensor([0, 3, 3, 1])
        one_hot = F.one_hot(condition, 4).double()
        gain, bias = one_hot @ bn.gain.weight, one_hot @ bn.bias.weight
    normal = F.batch_norm(x, None, None, training=True, eps=1e-4)
    expected = normal * (1 + gain)[..., None, None] + bias[..., None, None]
    agree(bn(x, condition), expected, [x, bn.gain.weight, bn.bias.weight] + [c] * (shared_dim > 0))


# ---------------------------------------------------------------- self-attention

def attention():
    layer = SelfAttention(16, 1e-4).double().eval()
    nn.init.constant_(layer.gamma, 0.7)
    return layer, leaf(2, 16, 8, 8)


def test_attention_starts_as_the_identity():
    x = torch.randn(2, 16, 8, 8)
    assert torch.equal(SelfAttention(16, 1e-4)(x), x)


def test_zero_queries_give_uniform_attention():
    # theta = 0 makes all scores 0 and all weights equal: every position gets the mean of the pooled values.
    layer, x = attention()
    nn.init.zeros_(layer.theta.weight)
    mean = F.max_pool2d(layer.g(x), 2).mean((2, 3), keepdim=True)
    close(layer(x), x + 0.7 * layer.o(mean))


def test_one_dominant_key_gives_its_value_everywhere():
    # The queries read channel 0, which is 1; the keys channel 1, which is 60 in one place: exp(60) against 1.
    layer, x = attention()
    x = x.detach()
    for part, channel in (layer.theta, 0), (layer.phi, 1):
        part.weight.data.zero_()[0, channel] = 1
        part.u.copy_(torch.tensor([1, 0]))
    x[:, 0], x[:, 1], x[:, 1, 5, 2] = 1, 0, 60
    value = F.max_pool2d(layer.g(x), 2)[:, :, 2:3, 1:2]     # the pooled cell with row 5, column 2
    close(layer(x), x + 0.7 * layer.o(value))


@pytest.mark.parametrize("fused", [False, True])
def test_attention_equals_torchs_with_scale_one(fused):
    layer, x = attention()
    layer.fused = fused
    query = layer.theta(x).flatten(2).mT
    key, value = (F.max_pool2d(part(x), 2).flatten(2).mT for part in (layer.phi, layer.g))
    attended = F.scaled_dot_product_attention(query, key, value, scale=1.0).mT.unflatten(2, (8, 8))
    agree(layer(x), x + layer.gamma * layer.o(attended), [x, *layer.parameters()])


def test_attention_is_equivariant_to_moving_whole_cells():
    # Pooling keeps 2x2 cells together. Without positions, moved cells give the same outputs, moved.
    layer, x = attention()
    close(layer(x.roll(4, dims=3)), layer(x).roll(4, dims=3))
    assert not torch.allclose(layer(x.roll(1, dims=3)), layer(x).roll(1, dims=3), atol=1e-3)


# ---------------------------------------------------------------- generator and discriminator

def g_by_hand(G, first, conditions, attention_after=0):
    h = G.linear(first).unflatten(1, (-1, 4, 4))
    for i, (block, c) in enumerate(zip(G.blocks, conditions), start=1):
        h = block(h, c)
        if i == attention_after:
            h = G.attention(h)
    return G.to_rgb(F.relu(G.output_norm(h)))[:, :3].tanh()


def test_g_gives_each_block_its_own_chunk_of_z():
    G, z, y = build(Generator), leaf(2, 128), torch.tensor([0, 2])
    assert type(G.shared) is nn.Embedding               # no spectral norm on the class vectors
    between = leaf(2, 128)                              # no class vectors, but points between and beyond them
    first, *chunks = z.split(32, dim=1)
    close(G(z, between), g_by_hand(G, first, [torch.cat([between, chunk], 1) for chunk in chunks]))
    close(G(z, y), G(z, G.shared.weight[y]))
    with pytest.raises(ValueError):                     # a chunk too many is not ignored
        G(leaf(2, 160), y)


def test_the_deep_g_gives_all_of_z_and_the_class_to_every_layer():
    G, z, y = build(Generator, "biggan-deep-128"), leaf(2, 128), torch.tensor([0, 2])
    assert [block.up for block in G.blocks] == [False, True] * 5
    c = torch.cat([z, G.shared.weight[y]], 1)           # z first
    close(G(z, y), g_by_hand(G, c, [c] * 10, attention_after=8))


def test_without_skip_z_all_of_z_enters_the_first_layer():
    z, y = leaf(2, 128), torch.tensor([0, 2])
    tables = build(Generator, "sagan128")               # a class table per layer
    assert not hasattr(tables, "shared")
    close(tables(z, y), g_by_hand(tables, z, [y] * 5, attention_after=4))
    with pytest.raises(AssertionError):
        tables(z, leaf(2, 128))                         # it has no class vectors
    shared = build(Generator, "sagan128", shared_dim=12)    # row 6 of table 1: class vectors, no skip-z
    close(shared(z, y), g_by_hand(shared, z, [shared.shared.weight[y]] * 5, attention_after=4))


@pytest.mark.parametrize("name, down, attention_after", [
    ("biggan32", [True, True, False, False], 0),
    ("biggan-deep-128", [True, False] * 5, 2),
])
def test_d_is_its_blocks_relu_sum_and_projection(name, down, attention_after):
    D = build(Discriminator, name)
    x = leaf(2, 3, D.config.resolution, D.config.resolution)
    assert [block.down for block in D.blocks] == down
    h = D.from_rgb(x) if D.config.deep else x
    for i, block in enumerate(D.blocks, start=1):
        h = block(h)
        if i == attention_after:
            h = D.attention(h)
    h, E = F.relu(h).sum((2, 3)), D.embed.normalized_weight()      # sum, not mean, over the positions
    for y in torch.tensor([[0, 2], [3, 1]]):      # classes differ by a scalar product with their vectors
        close(D(x, y), D.linear(h)[:, 0] + (E[y] * h).sum(1))


def test_with_one_class_the_projection_is_one_more_linear_layer():
    D, inputs = build(Discriminator, "biggan32", n_classes=1), []
    D.linear.register_forward_pre_hook(lambda layer, arguments: inputs.append(arguments[0]))
    logits = D(leaf(3, 3, 32, 32), torch.tensor([0, 0, 0]))
    W = D.linear.normalized_weight() + D.embed.normalized_weight()
    close(logits, F.linear(inputs[0], W, D.linear.bias)[:, 0])


def test_sngan_has_a_narrow_d_no_attention_and_no_spectral_norm_in_g():
    G, D = Generator(small("sngan128")), Discriminator(small("sngan128"))
    # All blocks but the first widen in the second convolution.
    assert [block.conv1.out_channels for block in D.blocks] == [8, 8, 16, 32, 64, 128]
    assert not hasattr(G, "attention") and not hasattr(D, "attention")
    assert {layer.eps for layer in biggan.matrix_layers(G).values()} == {None}
    assert {layer.eps for layer in biggan.matrix_layers(D).values()} == {1e-4}


# ---------------------------------------------------------------- losses

def test_hinge_losses_on_paper():
    real = torch.tensor([2, 0.5], requires_grad=True)
    fake = torch.tensor([-3.0, 0], requires_grad=True)
    d_loss, g_loss, _ = LOSSES["hinge"]
    loss = d_loss(real, fake)
    close(loss, (0 + 0.5) / 2 + (0 + 1) / 2)
    loss.backward()
    close(real.grad, [0, -0.5])                         # no gradient beyond the margin
    close(fake.grad, [0, 0.5])
    close(g_loss(fake), (3 - 0) / 2)


@pytest.mark.parametrize("name, best", [
    ("hinge", lambda p, q: math.copysign(1, p - q)),    # p max(0, 1 - d) + q max(0, 1 + d) has its kink there
    ("non-saturating", lambda p, q: math.log(p / q)),   # -p log s(d) - q log(1 - s(d)): s(d) = p / (p + q)
    ("least-squares", lambda p, q: p / (p + q)),        # p (d - 1)^2 + q d^2
])
def test_on_two_points_the_best_d_is_known(name, best):
    # Of 8 real images 5 are at the first point, of 8 generated ones 2. D is two free numbers: any small step
    # away from the best ones raises the loss. The decision threshold lies between them.
    d_loss, _, threshold = LOSSES[name]
    best_d = torch.tensor([best(5, 2), best(3, 6)], dtype=torch.float64)

    def loss(d):
        real, fake = d.repeat_interleave(torch.tensor([5, 3])), d.repeat_interleave(torch.tensor([2, 6]))
        return d_loss(real, fake)
    for step in 1e-3 * torch.tensor([[1, 0], [-1, 0], [0, 1], [0, -1]]):
        assert loss(best_d + step) > loss(best_d)
    assert best_d[0] > threshold > best_d[1]


def test_the_best_linear_d_under_wgan_gp():
    # Real at a, generated at 0, D(x) = w x: loss -w a + weight (w - 1)^2, least at w = 1 + a / (2 weight).
    a, weight = 3.0, 10.0
    w = torch.tensor(1 + a / (2 * weight), requires_grad=True)
    D = lambda x, y: w * x.flatten()
    real, fake = torch.full((1, 1, 1, 1), a), torch.zeros(1, 1, 1, 1)
    penalty = gradient_penalty(D, real, fake, None, torch.rand(1))
    loss = LOSSES["wgan-gp"][0](D(real, None), D(fake, None)) + weight * penalty
    close(loss, -w * a + weight * (w - 1)**2, 1e-5)
    close(torch.autograd.grad(loss, w)[0], 0, 1e-5)


@pytest.mark.parametrize("name, derivative", [
    ("hinge", lambda d: -1),
    ("wgan-gp", lambda d: -1),
    ("least-squares", lambda d: d - 1),
    ("non-saturating", lambda d: -1 / (1 + math.exp(d))),
])
def test_g_losses_push_the_logits_up(name, derivative):
    d = torch.tensor([-1.5, 0.3], requires_grad=True)
    LOSSES[name][1](d).backward()
    close(d.grad, [derivative(-1.5) / 2, derivative(0.3) / 2])


def test_losses_equal_torchs():
    real, fake = leaf(7), leaf(5)
    entropy, hinge = F.binary_cross_entropy_with_logits, F.hinge_embedding_loss
    real_1, fake_1, fake_0 = torch.ones_like(real), torch.ones_like(fake), torch.zeros_like(fake)
    witnesses = {
        "hinge": (hinge(real, -real_1) + hinge(-fake, -fake_1), -fake.mean()),     # target -1: max(0, 1 - x)
        "non-saturating": (entropy(real, real_1) + entropy(fake, fake_0), entropy(fake, fake_1)),
        "least-squares": ((F.mse_loss(real, real_1) + F.mse_loss(fake, fake_0)) / 2,
                          F.mse_loss(fake, fake_1) / 2),
    }
    for name, (of_d, of_g) in witnesses.items():
        agree(LOSSES[name][0](real, fake), of_d, [real, fake])
        agree(LOSSES[name][1](fake), of_g, [fake])


# ---------------------------------------------------------------- penalties

def test_penalties_of_a_linear_d():
    # D(x) = <w, x> + b: the gradient is w everywhere.
    w, x = leaf(3, 4, 4), leaf(5, 3, 4, 4)
    D = lambda x, y: (w * x).sum((1, 2, 3)) + 3
    agree(r1_penalty(D, x, None), w.square().sum() / 2, [w])
    agree(gradient_penalty(D, x, -x, None, torch.rand(5).double()), (w.norm() - 1)**2, [w])


def test_penalties_of_a_quadratic_d():
    # D(x) = x^T A x / 2 with symmetric A: the gradient is A x.
    A, x, fake = leaf(12, 12), leaf(5, 3, 2, 2), leaf(5, 3, 2, 2)
    A = A + A.T
    D = lambda x, y: torch.einsum("ni,ij,nj->n", x.flatten(1), A, x.flatten(1)) / 2
    squared = (x.flatten(1) @ A).square().sum(1)
    close(biggan.squared_gradient_norm(D, x, None), squared)
    close(r1_penalty(D, x, None), squared.mean() / 2)
    # The gradient penalty is taken between the two sets: mix 0 is the real end, mix 1 the generated one.
    for mix in 0.0, 0.25, 1.0:
        where = (1 - mix) * x + mix * fake
        expected = ((where.flatten(1) @ A).norm(dim=1) - 1).square().mean()
        close(gradient_penalty(D, x, fake, None, torch.full((5,), mix).double()), expected)


def test_r1_equals_torchs_jacobian_and_its_gradient_finite_differences():
    D, x, y = build(Discriminator, "shapes32"), leaf(2, 3, 32, 32), torch.tensor([0, 2])
    # (2, 2, 3, 32, 32): the derivative of logit i by image j.
    jacobian = torch.autograd.functional.jacobian(lambda x: D(x, y), x)
    assert not jacobian[0, 1].any()
    close(r1_penalty(D, x, y), jacobian.square().sum() / 2 / 2)

    def penalty(W):
        with_W = lambda x, y: torch.func.functional_call(D, {"blocks.1.conv1.weight": W}, (x, y))
        return r1_penalty(with_W, x, y)
    assert torch.autograd.gradcheck(penalty, D.blocks[1].conv1.weight, fast_mode=True)


@pytest.mark.parametrize("gamma", [0, 1])
def test_a_linear_gan_circles_its_target_and_spirals_in_under_r1(gamma):
    """The Dirac-GAN (Mescheder et al. 2018): real images 2 + z, G(z) = 2 + e + z, D(x) = psi x.

    In infinitely small steps e' = psi and psi' = -e - gamma psi, a pendulum. (e^2 + psi^2)' = -2 gamma psi^2:
    without R1 the distance to the target, e = psi = 0, never changes; R1 is friction, which lets it fall."""
    (e, psi), z, (d_loss, g_loss, _) = leaf(2), torch.tensor([1, -1]), LOSSES["wgan-gp"]
    D = lambda x, y: psi * x.flatten()
    real, fake = (2 + z).reshape(2, 1, 1, 1), 2 + e + z
    loss = d_loss(D(real, None), D(fake.detach(), None)) + gamma * r1_penalty(D, real.double(), None)
    close(-torch.autograd.grad(g_loss(D(fake, None)), e)[0], psi)
    close(-torch.autograd.grad(loss, psi)[0], -e - gamma * psi)


def test_the_orthogonal_penalty_compares_filters():
    # W W^T = [[p^2, pq cos a], [pq cos a, q^2]]: off the diagonal 2 (p q cos a)^2.
    p, q, a = 2.0, 3.0, 0.7
    W = torch.tensor([[p, 0], [q * math.cos(a), q * math.sin(a)]])     # rows are filters
    off_diagonal = 2 * (p * q * math.cos(a))**2
    close(orthogonal_penalty(W), off_diagonal, 1e-4)
    close(orthogonal_penalty(W, off_diagonal=False), off_diagonal + (p**2 - 1)**2 + (q**2 - 1)**2, 1e-4)
    # Rows at right angles, columns not: no penalty. The transpose has one.
    W = torch.tensor([[1.0, 1, 0], [1, -1, 1]])
    assert orthogonal_penalty(W) == 0 and orthogonal_penalty(W.T) > 1


@pytest.mark.parametrize("shape", [(4, 2, 3), (6, 4)])
def test_the_orthogonal_penaltys_gradient_has_a_factor_of_four(shape):
    # Some code has 2, but d || W W^T * (1 - I) ||^2 / dW = 4 (W W^T * (1 - I)) W.
    W, eye = leaf(*shape), torch.eye(shape[0])
    rows = W.flatten(1)
    off_diagonal = rows @ rows.T * (1 - eye)
    agree(orthogonal_penalty(W, off_diagonal=False), (rows @ rows.T - eye).square().sum(), [W])
    gradient, = torch.autograd.grad(orthogonal_penalty(W), W)
    close(gradient.flatten(1), 4 * off_diagonal @ rows)
    agree(orthogonal_penalty(W), off_diagonal.square().sum(), [W])


def test_orthogonal_regularisation_leaves_class_vectors_and_tables_alone():
    for name, ignored in ("biggan32", "shared.weight"), ("sagan128", "blocks.*(gain|bias).weight"):
        G = Generator(small(name))
        biggan.orthogonal_regularisation(G).backward()
        for parameter_name, p in G.named_parameters():
            if p.ndim > 1:
                assert (p.grad is None) == bool(re.fullmatch(ignored, parameter_name))


# ---------------------------------------------------------------- augmentation for few images
# A shift is linear: out = A in B^T with ones where row - column = k; its gradient is A^T . B, the shift back.
# A change of colour leaves the image alone at 1/2, a shift too; cutout always hides a square.

def test_a_translation_is_the_shifted_image_and_its_gradient_the_shift_back():
    x, weights = torch.randn(2, 1, 3, 16, 16, requires_grad=True)       # 5 shifts each way: -2 ... 2
    shifted = translate(x, torch.tensor([[0.1, 0.7, 0]]))               # 2 up, 1 to the right
    assert torch.equal(shifted, F.pad(x, (1, -1, -2, 2)))
    gradient, = torch.autograd.grad((shifted * weights).sum(), x)
    assert torch.equal(gradient, F.pad(weights, (-1, 1, 2, -2)))


def test_a_point_translated_at_random_is_a_box_on_average():
    x = torch.zeros(25, 1, 16, 16)
    x[:, 0, 8, 8] = 1
    numbers = (torch.arange(5) + 0.5) / 5
    box = translate(x, F.pad(torch.cartesian_prod(numbers, numbers), (0, 1))).mean(0)[0]
    expected = torch.zeros(16, 16)
    expected[6:11, 6:11] = 1 / 25
    close(box, expected)


@pytest.mark.parametrize("numbers, rows, columns", [
    ((0.5, 0.5, 0), slice(4, 12), slice(4, 12)),            # half the side each way: a quarter of the image
    ((0, 0.9999, 0), slice(0, 4), slice(12, 16)),           # centred on a corner: a sixteenth
])
def test_cutout_zeroes_a_square_and_passes_no_gradient_there(numbers, rows, columns):
    x = (torch.rand(1, 3, 16, 16) + 1).requires_grad_()
    left = torch.ones_like(x)
    left[:, :, rows, columns] = 0
    y = cutout(x, torch.tensor([numbers]))
    assert torch.equal(y, x * left) and torch.equal(torch.autograd.grad(y.sum(), x)[0], left)


def test_changes_of_colour_keep_what_they_should():
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    change = lambda *r: biggan.colour(x, torch.tensor([r, [0.5, 0.5, 0.5]], dtype=torch.float64))
    for y in change(0.8, 0.5, 0.5), change(0.5, 0.9, 0.5), change(0.5, 0.5, 0.9):
        close(y[1], x[1], 1e-12)                            # each image has its own numbers
    close(change(0.8, 0.5, 0.5)[0], x[0] + 0.3, 1e-12)      # brightness adds a constant
    grey, mean = x[0].mean(0), x[0].mean()
    close(change(0.5, 0, 0.5)[0], grey.expand(3, 8, 8), 1e-12)
    close(change(0.5, 0.9, 0.5)[0].mean(0), grey, 1e-12)    # saturation keeps the mean over the channels
    close(change(0.5, 0.5, 0.9)[0], mean + 1.4 * (x[0] - mean), 1e-12)      # and contrast the image's


def test_a_policy_names_the_changes_and_gradients_pass_through_them_and_d():
    x, y, r = torch.randn(1, 3, 32, 32, dtype=torch.float64), torch.tensor([1]), torch.rand(1, 3, 3).double()
    assert augment(x, "", r) is x
    assert torch.equal(augment(x, "cutout,colour", r), cutout(biggan.colour(x, r[:, 0]), r[:, 2]))
    D = Discriminator(small("biggan32")).double().eval()
    logit = lambda x: D(augment(x, "colour,translation,cutout", r), y)
    gradient, = torch.autograd.grad(logit(x.requires_grad_()), x)
    step = 1e-6 * torch.randn_like(x)
    close((logit(x + step) - logit(x - step)) / 2, (gradient * step).sum()[None], 1e-10)


# ---------------------------------------------------------------- singular values

def test_singular_values_are_the_diagonals_entries_and_torchs():
    close(singular_values(torch.diag(torch.tensor([1.0, 5.0, 2.0, 3.0]))), [5, 3, 2])
    for shape in (6, 4), (4, 6), (8, 3, 3, 3), (1, 9):
        W = leaf(*shape)
        close(singular_values(W, 4), torch.linalg.svdvals(W.flatten(1))[:4])


def with_singular_values_5_3_2(rows=4, columns=3):
    """A layer whose weight has these singular values, and its first pair of singular vectors."""
    layer = SNLinear(1e-12, columns, rows).double()
    U, _, Vh = torch.linalg.svd(leaf(rows, columns).detach(), full_matrices=False)
    layer.weight.data = U @ torch.diag(torch.tensor([5, 3, 2]).double()) @ Vh
    return layer, U[:, 0], Vh[0]


@pytest.mark.parametrize("rows, columns", [(4, 3), (3, 4)])
def test_the_clamp_lowers_the_largest_singular_value_only(rows, columns):
    layer, _, _ = with_singular_values_5_3_2(rows, columns)
    for goal, expected in [({"fixed": 9}, [5, 3, 2]), ({"ratio": 1.2}, [3.6, 3, 2]),     # one value per call
                           ({"fixed": 2.5}, [3, 2.5, 2]), ({"fixed": 2.5}, [2.5, 2.5, 2])]:
        clamp_sigma(layer, **goal)
        close(torch.linalg.svdvals(layer.weight), expected)


@pytest.mark.parametrize("goal, excess", [({"fixed": 3.5}, 1.5), ({"fixed": 6.0}, -1), ({"ratio": 1.5}, 0.5)])
def test_the_pulls_gradient_is_twice_the_excess_times_u_v(goal, excess):
    # d (sigma_0 - goal)^2 / dW = 2 (sigma_0 - goal) u v^T; a goal of r sigma_1 counts as a constant.
    layer, u, v = with_singular_values_5_3_2()
    pull = sigma_pull(layer, **goal)
    close(pull, excess**2)
    close(torch.autograd.grad(pull, layer.weight)[0], 2 * excess * torch.outer(u, v))


def test_weights_that_are_not_finite_have_no_singular_values():
    W = torch.tensor([[math.nan, 1], [2, 3]])
    for W in W, 1e30 * torch.eye(2):                        # whose squares overflow
        assert singular_values(W).isnan().all()


# ---------------------------------------------------------------- truncation, EMA, standing statistics

def noise(t, n=200_000):
    return truncated_normal((n,), t, torch.Generator().manual_seed(0)).double()


def truncated_variance(t):
    # Of N(0, 1) within t: 1 - 2 t phi(t) / (2 Phi(t) - 1), since x^2 phi = phi - (x phi)'.
    return 1 - 2 * t * math.exp(-t * t / 2) / math.sqrt(2 * math.pi) / math.erf(t / math.sqrt(2))


@pytest.mark.parametrize("t", [2.0, 1.5, 1.0, 0.5, 0.04])
def test_truncated_noise_is_torchs_and_has_the_closed_moments(t):
    z, theirs = noise(t), nn.init.trunc_normal_(torch.empty(200_000), a=-t, b=t)
    assert z.abs().max() <= t
    close(z.mean() / t, 0, 0.01)
    close(z.var(), truncated_variance(t), rtol=0.02)
    close(z.sort().values / t, theirs.sort().values / t, 0.02)      # quantile by quantile
    # Kolmogorov and Smirnov, at the 0.1% level, against (Phi(z) - Phi(-t)) / (2 Phi(t) - 1).
    cdf = (torch.erf(z.sort().values / math.sqrt(2)) / math.erf(t / math.sqrt(2)) + 1) / 2
    close(cdf, torch.linspace(0, 1, 200_000), 1.95 / math.sqrt(200_000))


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
        z, larger = noise(t, 1000), noise(2 * t, 1000)
        assert torch.equal(z.argsort(), larger.argsort()) and (z.abs() < larger.abs()).all()
    with pytest.raises(AssertionError):
        noise(0)


def test_ema_weights_approach_a_constant_geometrically():
    # From x0 with decay d, n steps of c: d^n x0 + (1 - d^n) c. Buffers too; until `start` they are a copy.
    source = BatchNorm(1, 1e-4)
    ema = EMA(source, decay=0.9, start=2)
    for step, value in enumerate([4.0, 7.0, 5.0, 5.0, 5.0], start=1):
        nn.init.constant_(source.gain, value)
        source.running_mean.fill_(value)
        ema.update(source, step)
        expected = value if step <= 2 else 0.9**(step - 2) * 7 + (1 - 0.9**(step - 2)) * 5
        close(ema.model.gain, [expected])
        close(ema.model.running_mean, [expected])
    assert not ema.model.gain.requires_grad


def test_ema_weights_equal_torchs():
    swa, source = torch.optim.swa_utils, nn.Linear(3, 4)
    average = swa.get_ema_multi_avg_fn(0.8)
    ours, theirs = EMA(source, decay=0.8), swa.AveragedModel(source, multi_avg_fn=average)
    theirs.update_parameters(source)                    # torch's first update copies
    for step in range(1, 5):
        nn.init.normal_(source.weight)
        ours.update(source, step)
        theirs.update_parameters(source)
    close(ours.model.weight, theirs.module.weight)


def test_standing_statistics_are_the_mean_over_batches():
    G, inputs, z_and_y = Generator(small()), [], []
    before = {name: p.clone() for name, p in G.state_dict().items() if "running" not in name}
    G.register_forward_pre_hook(lambda module, args: z_and_y.append(args))
    G.blocks[0].bn1.register_forward_pre_hook(lambda module, args: inputs.append(args[0].double()))
    standing_statistics(G, batches=5, batch_size=16, noise=functools.partial(truncated_normal, threshold=0.5))
    ours, theirs = G.blocks[0].bn1, nn.BatchNorm2d(32, momentum=None).double()     # None: the plain mean
    for x in inputs:
        theirs(x)
    close(theirs.running_mean, torch.stack([x.mean((0, 2, 3)) for x in inputs]).mean(0))
    close(ours.running_mean, theirs.running_mean)
    close(ours.running_var, theirs.running_var)
    assert not G.training and ours.momentum == BatchNorm.momentum
    assert all(torch.equal(G.state_dict()[name], p) for name, p in before.items())     # nothing else
    z, y = (torch.cat(part) for part in zip(*z_and_y))
    assert len(z) == 5 * 16 and 0.4 < z.abs().max() <= 0.5 and set(y.tolist()) == {0, 1, 2, 3}


# ---------------------------------------------------------------- scores

def test_frechet_distance_on_paper():
    # Diagonal: |m - n|^2 + sum of (sqrt a - sqrt b)^2. Rotating both covariances changes nothing.
    m, a, b = np.array([1, 2, 0, 2]), np.diag([1, 4, 9, 16]), np.diag([4, 4, 1, 0])
    for Q in np.eye(4), np.linalg.qr(np.vander([1, 2, 3, 4]))[0]:
        close(metrics.frechet_distance(m, Q @ a @ Q.T, 0 * m, Q @ b @ Q.T), 9 + 1 + 0 + 4 + 16)


def test_frechet_distance_equals_the_eigenvalues_of_the_plain_product():
    # (C1 C2)^(1/2) has the square roots of the eigenvalues of C1 C2, which is not symmetric.
    rng = np.random.default_rng(1)
    m, n = rng.normal(size=(2, 4))
    a, b = (np.cov(rng.normal(size=(4, 30)) * rng.uniform(1, 3, (4, 1))) for _ in range(2))
    root = np.sqrt(np.linalg.eigvals(a @ b).real).sum()
    close(metrics.frechet_distance(m, a, n, b), ((m - n)**2).sum() + np.trace(a + b) - 2 * root)


def test_frechet_distance_of_fewer_points_than_dimensions():
    # C1 = X^T X and C2 = Y^T Y have rank 100 of 500. The root's trace is the sum of X Y^T's singular values.
    X, Y = np.random.default_rng(0).normal(size=(2, 100, 500))
    zero, a, b = np.zeros(500), X.T @ X, Y.T @ Y
    root = np.linalg.svd(X @ Y.T, compute_uv=False).sum()
    close(metrics.frechet_distance(zero, a, zero, b), np.trace(a + b) - 2 * root)
    assert 0 <= metrics.frechet_distance(zero, a, zero, a) < 1e-9 * np.trace(a)


def test_inception_score_on_paper_and_from_torchs_divergence():
    # All images alike: 1. Certain of each image, and all k classes equally frequent: k.
    close(metrics.inception_score(np.full((100, 5), 0.2)), [1, 0])
    close(metrics.inception_score(np.tile(np.eye(5), (20, 1))), [5, 0])
    p = torch.rand(50, 6, dtype=torch.float64).softmax(1)
    divergence = F.kl_div(p.mean(0).log().expand(50, 6), p, reduction="batchmean")
    close(metrics.inception_score(p.numpy(), splits=1)[0], divergence.exp())


def test_kernel_distance_of_points_on_paper():
    # One dimension: k(0, 0) = 1, k(1, 1) = (1 + 1)^3 = 8, k(0, 1) = 1. Twice 0 against twice 1: 1 + 8 - 2.
    close(metrics.kernel_distance([[0.0], [0]], [[1.0], [1]]), [7, 0])
    # A point and itself are no pair: {0, 1} has only (0, 1). 1 + 1 - 2 (1 + 1 + 1 + 8) / 4.
    close(metrics.kernel_distance([[0.0], [1]], [[0.0], [1]]), [2 - 5.5, 0])


def test_kernel_distance_is_the_mean_over_all_pairs_and_has_no_bias():
    a, b, pairs = torch.randn(7, 3), torch.rand(7, 3), ~torch.eye(7, dtype=torch.bool)
    k = lambda x, y: ((x[:, None] * y).sum(2) / 3 + 1)**3
    expected = k(a, a)[pairs].mean() + k(b, b)[pairs].mean() - 2 * k(a, b).mean()
    close(metrics.kernel_distance(a, b), [expected, 0])
    # Halves of the same set: zero on average.
    mean, deviation = metrics.kernel_distance(*torch.randn(2, 2000, 20), subsets=50, size=200)
    assert abs(mean) < deviation


def test_precision_and_recall_on_paper():
    # On a line, k = 1. Radii of real 0, 1, 10: 1, 1, 9. Radii of fake 0.5, 30, 31: 29.5, 1, 1.
    real, fake = torch.tensor([[0.0], [1], [10]]), torch.tensor([[0.5], [30], [31]])
    close(metrics.precision_recall(real, fake, k=1), [1 / 3, 1])


def test_precision_and_recall_equal_those_of_torchs_distances():
    def covered(points, centres):
        radii = torch.cdist(centres, centres).kthvalue(4).values       # the first is the distance to itself
        return (torch.cdist(points, centres) <= radii).any(1).double().mean()
    real, fake = leaf(1500, 5), 1.5 * leaf(1200, 5)     # more than are compared at a time
    close(metrics.precision_recall(real, fake), [covered(fake, real), covered(real, fake)])
    assert metrics.precision_recall(real, real) == (1, 1)
    assert metrics.precision_recall(real, real + 100) == (0, 0)


def test_sliced_wasserstein_of_a_shift_is_its_mean_projection():
    # Moving all points by delta moves each projection by <delta, u>. In the plane E |<delta, u>| is
    # 2 / pi |delta|, the mean of |cos|.
    a, delta = torch.randn(500, 2), torch.tensor([3, 4])
    close(metrics.sliced_wasserstein(a, a + delta, projections=20_000), 5 * 2 / math.pi, rtol=0.01)
    close(metrics.sliced_wasserstein(a, a[torch.randperm(500)]), 0)


def test_on_a_line_sorting_is_the_best_of_all_pairings():
    a, b = torch.randn(2, 6, 1)
    costs = [(a - b[list(order)]).abs().mean() for order in itertools.permutations(range(6))]
    close(metrics.sliced_wasserstein(a, b), min(costs))


def test_the_laplacian_pyramid_adds_up_to_the_image():
    x = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    fine, middle, coarse = metrics.laplacian_pyramid(x)
    close(metrics.enlarge(metrics.enlarge(coarse) + middle) + fine, x)
    # The finest stripes are blurred away before halving: 1 - 4 + 6 - 4 + 1 = 0. What is constant stays.
    stripes = (-1.0)**torch.arange(32).expand(1, 3, 32, 32)
    fine, coarse = metrics.laplacian_pyramid(9 + stripes)
    close(fine, stripes, 1e-5)
    close(coarse, 0 * coarse + 9, 1e-5)


def test_patches_are_cut_from_the_image():
    # Pixel (i, j) of image n is 100 n + 10 i + j.
    patches = metrics.patches(torch.arange(200).reshape(2, 1, 10, 10), torch.Generator(), per_image=3, side=2)
    assert (patches - patches[:, :1]).tolist() == [[0, 1, 10, 11]] * 6
    assert (patches[:, 0] // 100).tolist() == [0, 0, 0, 1, 1, 1]
    colours = torch.tensor([1.0, 2, 3]).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    patch, = metrics.patches(colours, torch.Generator(), per_image=1, side=2)
    assert patch.tolist() == [1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3]       # channel after channel


def drawn_shapes(first, end):
    """Shapes on which no model is trained, (n, 32, 32, 3) uint8, classes in turn."""
    data = train.Shapes(32, held_out=True)
    return np.stack([data[i][0] for i in range(first, end)])


def test_worse_images_are_farther_away():
    real, other = drawn_shapes(0, 100), drawn_shapes(100, 200)
    total = lambda images: sum(metrics.pyramid_distances(real, images.clip(0, 255).astype(np.uint8)).values())
    pixel_noise = np.random.default_rng(0).normal(size=other.shape)
    assert total(other) < total(other + 10 * pixel_noise) < total(other + 40 * pixel_noise)
    grey = other.mean(3, keepdims=True).repeat(3, 3)
    assert min(total(grey), total(other / 2)) > 2 * total(other)     # less colour, less contrast


# ---------------------------------------------------------------- commands and their files

TINY = ("--preset shapes --ch 8 --batch 8 --ema-start 0 --precision fp32 --log-every 2 --save-every 2 "
        "--sample-every 6").split()


def words(arguments):
    """The words of a command line that is given in parts."""
    return " ".join(map(str, arguments)).split()


def start(*arguments, module=train):
    """Run a command in this process."""
    module.main(words(arguments))


def refused(monkeypatch, capsys, *arguments, module=train):
    """Run a command that must be refused, as the shell would. Returns the sentence."""
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["command", *words(arguments)])
    with pytest.raises(SystemExit) as stop:
        sample.run(module.main)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "error: " in lines[-1] and len(lines) <= 2, lines
    return lines[-1]


@pytest.fixture
def warned(monkeypatch):
    """The warnings given."""
    lines = []
    for module in sample, train:
        monkeypatch.setattr(module, "warn", lines.append)
    return lines


def run_command(script, *arguments, **options):
    """Start a command in a process of its own."""
    script = script if script in ("-c", "-m") else HERE / script
    arguments = arguments if script == "-c" else words(arguments)
    return subprocess.Popen([sys.executable, script, *arguments], stdout=subprocess.PIPE, text=True,
                            stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}, **options)


def torchrun(n, *arguments, **options):
    run = f"torch.distributed.run --standalone --nproc_per_node {n}"
    return run_command("-m", run, *arguments, **options)


def finish(process, status=0):
    """Wait for a command. Returns its output and its errors."""
    output, error = process.communicate(timeout=600)
    assert process.returncode == status, error
    return output, error


def wait_until(condition, process):
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def weights_of(out, step):
    return sample.read_tensors(out / "checkpoints" / f"step-{step:08d}.pt")


def steps_kept(out):
    return [int(path.stem[5:]) for path in sample.checkpoints_of(out)]


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def listing(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def same(a, b, rounding=0, name=""):
    """All tensors of `a` are those of `b`. (A bias before a batch norm moves by nothing but rounding.)"""
    if isinstance(a, dict):
        for key in a:
            same(a[key], b[key], rounding, str(key))
    elif isinstance(a, torch.Tensor):
        close(a, b, rounding * (100 if re.search(r"conv\w+\.bias", name) else 1e-3), rounding)


# ---------------------------------------------------------------- data

def picture(folder, name, mode="RGB", size=(40, 30), colour=0):
    folder.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(folder / name)
    return folder / name


@pytest.mark.parametrize("mode, name", [("RGB", "a.jpg"), ("CMYK", "a.jpg"), ("L", "a.PNG"), ("LA", "a.png"),
                                        ("P", "a.gif"), ("RGBA", "a.webp")])
def test_any_mode_and_size_becomes_an_rgb_square(tmp_path, mode, name):
    for size in (40, 30), (7, 90), (1, 1):
        path = picture(tmp_path, name, mode, size)
        assert train.images_in(tmp_path) == [bytes(path)]
        assert train.load_image(path, 16).shape == (16, 16, 3)


def test_transparency_shows_white(tmp_path):
    assert (train.load_image(picture(tmp_path, "a.png", "RGBA", colour=(0, 0, 0, 0)), 8) == 255).all()


def test_the_crop_is_central_and_the_reduction_an_average(tmp_path):
    # 8 wide, 4 high: columns 2 to 5 remain; each 2x2 block of them is averaged.
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, 2], pixels[:, 3], pixels[:, 6:] = 100, 200, 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert train.load_image(tmp_path / "a.png", 2)[:, :, 0].tolist() == [[150, 0], [150, 0]]


def test_a_large_jpeg_is_decoded_at_an_eighth_and_looks_the_same(tmp_path, monkeypatch):
    image, _ = train.Shapes(64)[4]
    Image.fromarray(image).resize((2048, 2048), Image.Resampling.NEAREST).save(tmp_path / "a.jpg")
    decoded, convert = [], Image.Image.convert
    monkeypatch.setattr(Image.Image, "convert", lambda im, *a: decoded.append(im.size) or convert(im, *a))
    assert np.abs(train.load_image(tmp_path / "a.jpg", 64) - image.astype(int)).mean() < 2
    assert decoded == [(256, 256)]


def test_classes_are_the_sorted_sub_folders_or_one(tmp_path):
    for name in "b/0.png", "a/0.png", "a/1.png":
        picture((tmp_path / name).parent, name[2:])
    data = train.open_data(tmp_path)
    assert data.classes == ["a", "b"] and data.resolution == 16         # which fits in 40 x 30
    assert [data[i][1] for i in range(3)] == data.labels.tolist() == [0, 0, 1]
    assert train.open_data(tmp_path / "a").classes == ["a"]
    (tmp_path / "a/2.pdf").touch()                                      # which Pillow can only write
    assert len(train.images_in(tmp_path / "a")) == 2


def test_a_corrupt_or_16_bit_file_is_named_once_and_replaced_by_the_next(tmp_path, warned):
    picture(tmp_path / "a", "0.png", colour="red")
    picture(tmp_path / "a", "1.png").write_bytes(b"not an image")
    picture(tmp_path / "a", "2.png", colour="blue")
    picture(tmp_path / "a", "3.png", "I;16")
    picture(tmp_path / "b", "0.png")
    data = train.open_data(tmp_path, 8)
    for _ in range(2):
        assert data[1][0][0, 0].tolist() == [0, 0, 255] and data[1][1] == 0
        assert data[3][1] == 1                                          # with its own label
    assert [re.search(r"a/\d", line)[0] for line in warned] == ["a/1", "a/3"]


def test_a_packed_folder_equals_the_folder_and_trains_to_the_same_weights(tmp_path):
    for i, noise in enumerate(np.random.default_rng(0).integers(0, 255, (66, 32, 32, 3), np.uint8)):
        Image.fromarray(noise).save(picture(tmp_path / "plain" / "ab"[i % 2], f"{i}.png"))
    (tmp_path / "plain/a/8.png").write_bytes(b"not an image")           # the last of its class
    start(f"--preset shapes --data {tmp_path}/plain --pack {tmp_path}/packed")
    plain, packed = train.open_data(tmp_path / "plain"), train.open_data(tmp_path / "packed")
    assert plain.classes == packed.classes
    for i in range(66):
        assert np.array_equal(plain[i][0], packed[i][0]) and plain[i][1] == packed[i][1]
    for name in "plain", "packed":
        start(*TINY, f"--data {tmp_path}/{name} --steps 2 --flip 0.5 --out {tmp_path}/of/{name}")
    same(weights_of(tmp_path / "of/plain", 2), weights_of(tmp_path / "of/packed", 2))


def test_interrupted_packing_leaves_no_data_set_and_may_be_repeated(tmp_path, monkeypatch):
    data, packed = train.Arrays(np.zeros((1, 8, 8, 3), np.uint8), [0], ["a"]), tmp_path / "packed"
    with monkeypatch.context() as interrupted, pytest.raises(TypeError):
        interrupted.setattr(train, "save_atomically", None)
        train.pack(data, packed)
    with pytest.raises(sample.UserError, match="holds no images"):
        train.open_data(packed)
    train.pack(data, packed)
    assert len(train.open_data(packed)) == 1
    picture(tmp_path / "mine", "a.png")
    for folder in packed, tmp_path / "mine":            # nor into images or another pack
        with pytest.raises(sample.UserError, match="holds other files"):
            train.pack(data, folder)


def test_cifar_10_is_fetched_checked_and_packed(server, tmp_path, monkeypatch):
    # The official layout: a label, then 1024 numbers each of red (here the file), green (the row) and blue.
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    (folder / "batches.meta.txt").write_text("airplane\nautomobile\n\n")
    for k, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
        record = [9 - k] + 1024 * [k] + [i // 32 for i in range(1024)] + 1024 * [200]
        (folder / f"{name}.bin").write_bytes(bytes(record))
    served, address = server
    archive = Path(shutil.make_archive(served / "c", "gztar", tmp_path, folder.name))
    monkeypatch.setattr(train, "CIFAR10", f"{address}/c.tar.gz")
    with pytest.raises(sample.UserError, match="invalid hash"):
        train.fetch_cifar10(tmp_path / "data")
    monkeypatch.setattr(train, "CIFAR10_SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())
    train.fetch_cifar10(tmp_path / "data")
    data, test = (train.open_data(tmp_path / "data" / name) for name in ("cifar10", "cifar10-test"))
    assert data.classes == test.classes == ["airplane", "automobile"]
    for k, (image, label) in enumerate([*map(data.__getitem__, range(5)), test[0]]):
        assert label == 9 - k and all((image[row] == [k, row, 200]).all() for row in range(32))


def test_shapes_lie_inside_the_picture_are_reproducible_and_others_than_the_held_out_ones():
    for i in range(200):
        image, label = train.Shapes(32)[i]
        background, (other, other_label) = image[0, 0], train.Shapes(32, held_out=True)[i]
        assert label == i % 10 and np.array_equal(image, train.Shapes(32)[i][0])
        assert label == other_label and not np.array_equal(image, other)
        assert (image[[0, -1]] == background).all() and (image[:, [0, -1]] == background).all()
        assert np.abs(image.astype(int) - background).max() > 60        # the shape stands out


def test_every_epoch_shows_each_image_once_and_may_be_entered_anywhere():
    def first(position, batches, batch=4):
        order = train.in_order(10, batch, position, seed=1, rows=range(batch))
        return [item for _ in range(batches) for item in next(order)]
    items = first(0, 10)
    epochs = [items[k:k + 10] for k in range(0, 40, 10)]
    assert all(sorted(epoch) == [*range(10)] for epoch in epochs) and epochs[0] != epochs[1]
    assert first(12, 2) == items[12:20] and first(0, 5, batch=8) == items
    streams = (0,), (0, 3), (0, 3, 0), (3, 0), (0, 3, 0, 0)
    assert len({train.generator_for(*numbers).initial_seed() for numbers in streams}) == 5


def test_batches_are_the_images_in_order_from_any_step_on():
    t, _ = trainer("--flip 0.5 --d-steps 2")
    data, mirrored = train.Shapes(32), []
    order = train.in_order(len(data), 8, 3 * 2 * 8, 0, range(8))
    for (x, y), indices, _ in zip(train.batches(data, t.s, 3, t.device), order, range(4)):
        for image, label, i in zip(x, y, indices, strict=True):
            expected = torch.tensor(data[i][0]).permute(2, 0, 1).float() / 127.5 - 1
            mirrored.append(torch.equal(image, expected.flip(2)))
            assert label == data[i][1] and (mirrored[-1] or torch.equal(image, expected))
    assert 8 < sum(mirrored) < 24 and mirrored[:8] != mirrored[8:16]


# ---------------------------------------------------------------- the training step

def trainer(*arguments):
    """A small model of drawn shapes, and its endless real batches."""
    s = train.parse_settings(words([*TINY, *arguments]))
    t = train.Trainer(s, train.model_config(s, n_classes=10), torch.device("cpu"))
    return t, train.batches(train.Shapes(32), s, 0, t.device)


def naive_loss_d(loss, r1, D, x, y, fake, fake_y, mix):
    """D's loss as the papers write it, with the gradient of one logit at a time."""
    def slopes(x):
        x = x.clone().requires_grad_()
        logits = [D(x[i:i + 1], y[i:i + 1]) for i in range(len(x))]
        return torch.stack([torch.autograd.grad(logit, x, create_graph=True)[0].norm() for logit in logits])
    real_logits, fake_logits = D(x, y), D(fake, fake_y)
    if loss == "hinge":
        return (F.relu(1 - real_logits) + F.relu(1 + fake_logits)).mean() + r1 / 2 * (slopes(x)**2).mean()
    if loss == "non-saturating":
        return -(real_logits.sigmoid().log() + (1 - fake_logits.sigmoid()).log()).mean()
    mix = mix[:, None, None, None]
    return (fake_logits - real_logits + 10 * (slopes((1 - mix) * x + mix * fake) - 1)**2).mean()


@pytest.mark.parametrize("loss, r1, policy", [
    ("hinge", 0, ""), ("hinge", 10, ""), ("wgan-gp", 0, "colour"),
    ("non-saturating", 0, "translation,cutout"),
])
def test_a_step_is_two_updates_of_d_one_of_g_and_one_of_the_ema(loss, r1, policy):
    """The whole step again, written naively: separate passes, torch's Adam as it comes, nothing frozen. In
    float64, as Adam's first steps are the signs of the gradients. D's u rests: D is called more often."""
    t, real = trainer("--d-steps 2 --ortho 0.01 --ema 0.9 --g-lr 1e-3 --d-lr 1e-3 --precision fp64",
                      f"--loss {loss} --r1 {r1}", f"--augment {policy}" * bool(policy))
    t.D.eval()
    G, D, ema = (copy.deepcopy(network) for network in (t.G, t.D, t.ema.model))
    adam_G, adam_D = (torch.optim.Adam(network.parameters(), 1e-3, (0.0, 0.99)) for network in (G, D))
    batches, noise = [next(real), next(real)], [next(t.noise(part)) for part in range(3)]
    t.train_step(iter(batches))
    for (x, y), (z, fake_y, mix, r) in zip(batches, noise[1:]):
        fake_y = y if loss == "wgan-gp" else fake_y
        x, fake = augment(x.double(), policy, r[:, 1]), augment(G(z, fake_y).detach(), policy, r[:, 0])
        adam_D.zero_grad()
        naive_loss_d(loss, r1, D, x, y, fake, fake_y, mix).backward()
        adam_D.step()
    for p, naive in zip(t.D.parameters(), D.parameters()):
        close(p.grad, naive.grad, 1e-9)                 # G's step has added nothing
    z, y, _, r = noise[0]
    logits = D(augment(G(z, y), policy, r[:, 0]), y)
    g_loss = -(logits.sigmoid().log() if loss == "non-saturating" else logits).mean()
    ortho = sum(((W.flatten(1) @ W.flatten(1).T) * (1 - torch.eye(len(W)))).square().sum()
                for name, W in G.named_parameters() if W.ndim > 1 and name != "shared.weight")
    (g_loss + 0.01 * ortho).backward()
    adam_G.step()
    for p, newest in zip(ema.state_dict().values(), G.state_dict().values()):
        p.copy_(0.9 * p + 0.1 * newest)
    for ours, theirs in (t.G, G), (t.D, D), (t.ema.model, ema):
        same(ours.state_dict(), theirs.state_dict(), 1e-8)
    # Every part of a step draws other noise, and the next step too.
    later = [*noise, *t.noise(0), *t.noise(1)]
    assert len({z.sum().item() for z, *_ in later}) == 5
    assert len({r[:, k].sum().item() for *_, r in later for k in (0, 1)}) == 10     # real and fake: others


class Scalar(nn.Module):
    """A network with one parameter."""

    def __init__(self, value, function):
        super().__init__()
        self.value, self.function = nn.Parameter(torch.tensor(value)), function

    def forward(self, x, y):
        return self.function(self.value, x)


def test_a_step_of_two_parameters_on_paper():
    # G draws theta everywhere, D is psi times the mean of the n pixels. Within the margin, D's loss
    # relu(1 - psi m) + relu(1 + psi theta) has the slope theta - m, and G's -psi.
    # R1: |dD/dx|^2 / 2 = n (psi / n)^2 / 2, whose slope is psi / n.
    theta, psi, lr, gamma, n = 0.4, 0.3, 0.1, 50, 3 * 32 * 32
    t, real = trainer("--ortho 0 --r1", gamma)
    t.G = t.parallel_G = Scalar(theta, lambda theta, z: theta.expand(len(z), 3, 32, 32))
    t.D = t.parallel_D = Scalar(psi, lambda psi, x: psi * x.mean((1, 2, 3)))
    t.opt_G, t.opt_D = (torch.optim.SGD(network.parameters(), lr) for network in (t.G, t.D))
    t.ema = EMA(t.G, 0.9)
    x, y = next(real)
    logged, m = t.train_step(iter([(x, y)])), x.mean().item()
    slope = theta - m + gamma * psi / n
    new_psi = psi - lr * slope
    new_theta = theta + lr * new_psi
    expected = {"D_real": psi * m, "D_loss": 2 + psi * (theta - m), "D_penalty": gamma * psi**2 / n / 2,
                "G_loss": -new_psi * theta, "G_grad": new_psi}
    found = [t.D.value, t.G.value, t.ema.model.value, *(logged[name] for name in expected)]
    close(torch.stack(found).detach(),
          [new_psi, new_theta, 0.9 * theta + 0.1 * new_theta, *expected.values()], 1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("penalty", ["--r1 10", "--loss wgan-gp"])
def test_penalties_on_augmented_images_are_nearly_those_of_float32(precision, penalty):
    (exact, real), (t, _) = (trainer("--augment translation --precision", name, penalty)
                             for name in ("fp32", precision))
    batch = next(real)
    ours, theirs = (each.train_step(iter([batch]))["D_penalty"].item() for each in (t, exact))
    assert theirs > 1e-2 and ours == pytest.approx(theirs, rel=0.05)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_takes_nearly_the_step_of_float32(precision):
    (exact, real), (t, _) = (trainer("--ortho 1e-2 --precision", name) for name in ("fp32", precision))
    t.scaler._init_scale = 64.0                             # nothing overflows
    batch = next(real)
    expected, logged = (each.train_step(iter([batch])) for each in (exact, t))
    for name in expected:                               # the scale drops out, also from the log
        assert logged[name].item() == pytest.approx(expected[name].item(), rel=0.1, abs=0.01)
    for network in "GD":
        ours, theirs = (dict(getattr(u, network).named_parameters()) for u in (t, exact))
        for name in theirs.keys() - {"attention.gamma"}:        # a sum that cancels
            a, b = ours[name].grad.flatten(), theirs[name].grad.flatten()
            assert b.norm() < 1e-3 or F.cosine_similarity(a, b, 0) > 0.9 and 0.9 < a.norm() / b.norm() < 1.1


def test_an_overflow_in_float16_skips_the_update_and_halves_the_scale_of_the_loss():
    t, real = trainer("--precision fp16")
    t.scaler._init_scale = 2.0**60
    weights = lambda: {**dict(t.D.named_parameters()), **dict(t.G.named_parameters(prefix="G"))}
    before = copy.deepcopy(weights())
    logged = t.train_step(real)
    assert logged["D_grad"] == logged["G_grad"] == 0 and t.scaler.get_scale() == 2.0**58    # D's, then G's
    same(before, weights())


def test_gradients_of_micro_batches_add_up():
    # D has no batch norm, and in evaluation mode G has none that mixes images.
    found = []
    for size in 8, 2:
        t, real = trainer(f"--g-lr 0 --d-lr 0 --ortho 0.01 --micro-batch {size}")
        t.D.eval(), t.G.eval()
        logged = t.train_step(real)
        found.append([*logged.values(), *(p.grad for network in (t.D, t.G) for p in network.parameters())])
    for a, b in zip(*found):
        close(a.detach(), b.detach(), 1e-5, 1e-3)


def test_the_bound_on_singular_values_holds_in_training():
    # Fast steps let sigma_0 grow. One value is lowered per step while several grow: the bound gives a little.
    def largest(options):
        t, real = trainer("--g-lr 2e-3", options)
        for _ in range(30):
            t.train_step(real)
        sigmas = torch.stack([singular_values(m.weight, 2) for m in biggan.matrix_layers(t.G).values()])
        return sigmas[:, 0].max(), (sigmas[:, 0] / sigmas[:, 1]).max()
    free, free_ratio = largest("")
    assert free > 1.15 and free_ratio > 1.08
    assert largest("--sigma-fixed 1.02")[0] < 1.1
    assert largest("--sigma-ratio 1.05")[1] < 1.06
    assert largest("--sigma-fixed 1 --sigma-pull 100")[0] < 1.15


def test_five_steps_with_4x4_kernels_equal_five_with_the_papers_operations(monkeypatch):
    (t, real), (naive, _) = (trainer("--precision fp64") for _ in range(2))
    batches = [next(real) for _ in range(5)]
    for each in t, naive:
        for batch in batches:
            each.train_step(iter([batch]))
        monkeypatch.setattr(biggan, "upsample_conv3x3", lambda x, layer: layer(biggan.upsample(x)))
        monkeypatch.setattr(biggan, "conv3x3_downsample", lambda x, layer: F.avg_pool2d(layer(x), 2))
    same(t.state_dict(), naive.state_dict(), 1e-9)
    assert not torch.equal(t.G.linear.weight, naive.G.linear.weight)    # it was another way


@pytest.mark.parametrize("options", ["", "--r1 1", "--loss wgan-gp", "--micro-batch 4", "--sigma-ratio 1.1",
                                     "--augment colour,translation,cutout", "--ortho 0 --model sngan128"])
def test_a_step_mixes_no_devices_and_reads_no_number_from_its_own(monkeypatch, options):
    # Tensors on `meta` have no numbers: reading one, as by .item(), fails here. On a GPU it would wait.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())   # unknown to meta
    s = train.parse_settings(words([*TINY, options]))
    t = train.Trainer(s, train.model_config(s, n_classes=10), torch.device("meta"))
    for name, network in ("opt_G", t.G), ("opt_D", t.D):
        setattr(t, name, torch.optim.Adam(network.parameters()))        # fused is unknown to meta, too
    R = t.config.resolution
    real = torch.empty(8, 3, R, R, device="meta"), torch.empty(8, dtype=torch.int64, device="meta")
    logged = t.train_step(itertools.repeat(real))
    assert t.step == 1 and {value.device.type for value in logged.values()} == {"meta"}


def test_torch_compile_finds_no_graph_break_and_changes_nothing():
    (t, _), (compiled, _) = (trainer("--precision fp64") for _ in range(2))
    (z, y, *_), = t.noise(0)
    for network in compiled.G, compiled.D:
        network.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    for each in t, compiled:
        each.D(each.G(z, y), y).sum().backward()
    for a, b in zip(t.G.parameters(), compiled.G.parameters()):
        close(a.grad, b.grad, 1e-9)


@pytest.mark.parametrize("preset", train.PRESETS)
def test_every_preset_describes_a_model_that_exists(preset):
    config = train.model_config(train.parse_settings(["--data=x", "--preset", preset]))
    with torch.device("meta"):
        Generator(config), Discriminator(config)


def test_ds_accuracy_is_the_part_of_logits_above_the_decision_threshold():
    t, _ = trainer()
    images, labels = train.some_images(train.Shapes(32), 0, 100, 10)
    logits = t.D.eval()(train.to_network(images, t.device), labels)
    t.threshold = logits.sort().values[30:32].mean()                    # 31 of 100 lie below
    assert t.accuracy(images, labels) == pytest.approx(0.69) and t.D.training


def test_spread_is_the_deviation_within_classes_of_what_is_left_after_averaging():
    # Class 0: 0.5 and -0.1, whose deviation is 0.3. Class 1: three equal ones, but for a fine checkerboard.
    x = torch.zeros(5, 3, 16, 16)
    x[0], x[1] = 0.5, -0.1
    x[3] = (-1)**(torch.arange(16) + torch.arange(16)[:, None])
    close(train.spread_within(x, torch.tensor([0, 0, 1, 1, 1])), math.sqrt((0.3**2 + 0) / 2))


def test_the_benchmark_prints_its_numbers(capsys):
    start("--preset shapes --ch 8 --batch 8 --benchmark 2")
    said = r"[\d.]+ real images per second; \d+ ms per step: 1 times \d+ for D, \d+ for G; .* TFLOP"
    assert re.match(said, capsys.readouterr().out)


# ---------------------------------------------------------------- runs

def test_the_log_holds_means_over_its_steps_and_evaluation_changes_nothing(tmp_path):
    start(*TINY, f"--out {tmp_path}/a --steps 5 --eval-every 3 --sample-every 2")
    start(*TINY, f"--out {tmp_path}/b --steps 5")
    same(weights_of(tmp_path / "a", 5), weights_of(tmp_path / "b", 5))
    lines, (t, real) = log_of(tmp_path / "a"), trainer()
    assert [line["step"] for line in lines] == [2, 3, 4, 5]
    first, second = t.train_step(real), t.train_step(real)
    for name in first:
        close(lines[0][name], (first[name] + second[name]).item() / 2, 1e-5, 1e-5)
    always = {*first, "step", "seconds_per_step", "diversity", "sigma_0"}
    evaluated = {"sigma", "D_accuracy", "D_accuracy_held_out"}
    assert [line.keys() - always for line in lines] == [set(), evaluated] * 2


def test_continuing_equals_never_stopping(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    start(*TINY, f"--out {a} --steps 6 --workers 1")
    start(*TINY, f"--out {b} --steps 4")
    start(*TINY, f"--out {b} --steps 6")
    same(weights_of(a, 6), weights_of(b, 6))
    assert [line["step"] for line in log_of(b)] == steps_kept(b) == [2, 4, 6]
    assert Image.open(b / "samples/step-00000006.png")


def kill_again_and_again(folder, kills, options):
    """Kill a run at random moments, the first after its first checkpoint. It must equal a run left alone.
    Returns how many kills met it alive, and the step after the last one."""
    alone, run, killed = folder / "alone", folder / "killed", 0
    command = ["train.py", *TINY, options, "--out"]
    for kill in range(kills):
        started, process = time.perf_counter(), run_command(*command, run)
        if kill == 0:
            wait_until(lambda: steps_kept(run), process)
            seconds = 1.6 * (time.perf_counter() - started)
        else:
            time.sleep(random.uniform(0, seconds))
        killed += process.poll() is None
        process.kill()
        process.communicate()
        for step in steps_kept(run):
            weights_of(run, step)
    reached, other = steps_kept(run)[-1], run_command(*command, alone)
    output, _ = finish(run_command(*command, run))
    finish(other)
    assert f"killed from step {reached}\n" in output and steps_kept(run) == steps_kept(alone)
    newest = steps_kept(run)[-1]
    same(weights_of(run, newest), weights_of(alone, newest))
    return killed, reached


def test_sigkill_at_any_moment_costs_no_checkpoint_and_changes_nothing(tmp_path):
    killed, reached = kill_again_and_again(tmp_path, 2, "--steps 16")
    assert killed and reached


@pytest.mark.parametrize("number, send", [(signal.SIGINT, os.kill), (signal.SIGTERM, os.kill),
                                          (signal.SIGTERM, os.killpg)])
def test_a_signal_to_the_process_or_its_group_saves_and_exits_with_status_0(tmp_path, number, send):
    options = f"--out {tmp_path} --steps 10000 --save-every 10000 --workers 2"
    process = run_command("train.py", *TINY, options, start_new_session=True)
    wait_until((tmp_path / "log.jsonl").exists, process)
    send(process.pid, number)
    output, error = finish(process)
    assert "stopped after" in output and not error and steps_kept(tmp_path)[0] >= 2


def test_a_damaged_checkpoint_is_passed_over_with_a_warning_and_costs_no_other(tmp_path, warned):
    start(*TINY, f"--out {tmp_path} --steps 6")
    newest = tmp_path / "checkpoints/step-00000006.pt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1                     # one bit, somewhere in the weights
    newest.write_bytes(content)
    start(*TINY, f"--out {tmp_path} --steps 5 --keep 2")
    assert "step-00000006.pt was not loaded: it is damaged" in warned[0]
    assert steps_kept(tmp_path) == [4, 5, 6]            # the damaged one does not count as newest


def test_a_second_process_in_the_same_folder_is_refused(tmp_path, monkeypatch, capsys):
    command = [*TINY, f"--out {tmp_path} --steps 10000"]
    first = run_command("train.py", *command)
    wait_until(lambda: steps_kept(tmp_path), first)
    assert "another process is at work" in refused(monkeypatch, capsys, *command)
    first.kill()
    first.communicate()


def test_a_failed_save_costs_a_warning_and_no_older_checkpoint(tmp_path, monkeypatch, capsys, warned):
    def full(state, f):
        f.write(b"half")
        raise OSError(28, "No space left on device")
    command = [*TINY, f"--out {tmp_path} --keep 1 --steps"]
    start(*command, 2)
    monkeypatch.setattr(torch, "save", full)
    assert "step 5 is not saved; make room" in refused(monkeypatch, capsys, *command, 5)
    assert "step-00000004.pt could not be written ([Errno 28]" in warned[0]
    assert steps_kept(tmp_path) == [2] and not [*tmp_path.rglob("*.tmp")]


def test_the_newest_and_every_nth_checkpoint_remain(tmp_path):
    t, _ = trainer(f"--out {tmp_path} --keep 2 --keep-every 5")
    (tmp_path / "checkpoints").mkdir()
    for t.step in range(1, 14):
        train.save_checkpoint(t, [], t.s)
    assert steps_kept(tmp_path) == [5, 10, 12, 13]


def test_other_settings_are_listed_and_nothing_is_written(tmp_path, monkeypatch, capsys):
    command = [*TINY, f"--out {tmp_path} --steps"]
    start(*command, 2)
    before = listing(tmp_path)
    error = refused(monkeypatch, capsys, *command, "9 --seed 5 --r1 1 --log-every 1")
    assert "other settings: r1 was 0.0 and is now 1.0; seed was 0 and is now 5;" in error
    assert listing(tmp_path) == before


def test_nan_stops_a_run_by_name_and_is_not_saved(tmp_path, monkeypatch, capsys):
    options = f"--g-lr 1e30 --steps 9 --save-every 1 --log-every 9 --out {tmp_path}"
    error = refused(monkeypatch, capsys, *TINY, options)
    assert re.search(r"training has diverged at step 2: [\w.]+\.weight is not finite", error)
    assert steps_kept(tmp_path) == [1]
    saved = weights_of(tmp_path, 1)
    assert all(p.isfinite().all() for p in [*saved["G"].values(), *saved["D"].values()])


def healthy(step, **changes):
    """A line of the log of a run in good health. Wasserstein's loss is below 0."""
    return {"step": step, "diversity": 0.9, "D_loss": 1.5 if step < 600 else -1.5, "sigma_0": 1.5, **changes}


@pytest.mark.parametrize("sick, sign", [
    (lambda k: {"diversity": 0.4}, "images of one class have become alike: diversity 0.40, before 0.90"),
    (lambda k: {"D_loss": 0.01}, "D is never wrong any more: its loss is 0.0100"),
    (lambda k: {"sigma_0": 1.9**k}, "sigma_0 of G's first layer explodes"),
])
def test_collapse_names_each_sign_of_it_and_none_in_health(sick, sign):
    lines = [healthy(step) for step in range(50, 1050, 50)]
    assert not any(train.collapse(lines[:k]) for k in range(1, 21))
    assert not train.collapse([*lines, healthy(1050, **sick(1))])       # one line may be chance
    assert train.collapse(lines + [healthy(1000 + 50 * k, **sick(k)) for k in range(1, 6)]).startswith(sign)


def test_a_collapsed_run_stops_or_warns(tmp_path, monkeypatch, capsys, warned):
    monkeypatch.setattr(train, "FEW", 9.0)              # every run has collapsed ...
    monkeypatch.setattr(train, "WINDOW", 4)             # ... after four lines
    error = refused(monkeypatch, capsys, *TINY, f"--steps 12 --out {tmp_path}/a")
    assert re.search(r"collapse at step 8: images of one class .*\. The last step saved is 6;", error)
    assert steps_kept(tmp_path / "a") == [2, 4, 6]
    start(*TINY, f"--steps 9 --on-collapse warn --out {tmp_path}/b")
    assert warned[0].startswith("step 8: images of one class") and steps_kept(tmp_path / "b")[-1] == 9


# ---------------------------------------------------------------- several processes

def normalise_a_half(rank, port, folder):
    """This process's half of the batch through a batch norm, and back; compiled as one graph."""
    torch.distributed.init_process_group("gloo", f"tcp://localhost:{port}", rank=rank, world_size=2)
    x, g = (part.chunk(2)[rank] for part in torch.load(folder / "batch.pt"))
    bn, x = BatchNorm(3, 1e-4).double(), x.clone().requires_grad_()
    bn.compile(backend="aot_eager", fullgraph=True)
    y = bn(x)
    y.backward(g)
    torch.save([y.detach(), x.grad, bn.running_mean, bn.running_var], folder / f"{rank}.pt")


def test_cross_replica_batch_norm_is_that_of_the_whole_batch(tmp_path):
    x, g = leaf(8, 3, 4, 4), leaf(8, 3, 4, 4).detach()
    x.data[:4] += 5                                     # the halves differ
    torch.save([x.detach(), g], tmp_path / "batch.pt")
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    torch.multiprocessing.spawn(normalise_a_half, (port, tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    witness = nn.BatchNorm2d(3, 1e-4).double()
    y = witness(x)
    y.backward(g)
    for a, b, whole in zip(first, second, (y, x.grad)):
        close(torch.cat([a, b]), whole.detach(), 1e-12)
    close(torch.stack(first[2:]), torch.stack([witness.running_mean, witness.running_var]), 1e-12)


SHARED = [*TINY, "--precision fp64 --d-steps 2 --ema 0.9 --save-every 1 --log-every 1 --keep 9 --steps 5",
          "--augment colour,translation,cutout --out"]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """Runs on one process, by commands: rounding depends on the number of threads."""
    folder = tmp_path_factory.mktemp("one_process")
    whole = run_command("train.py", *SHARED, folder / "whole")
    finish(run_command("train.py", *SHARED, folder / "split", "--micro-batch 4"))
    finish(whole)
    return folder


@pytest.mark.parametrize("n, name, options", [(4, "whole", ""), (2, "split", "--micro-batch 4")])
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
    ("--batch 9", "2 processes cannot share 9 images"),                 # before they have met
    ("--d-lr 1e30", "training has diverged"),                           # and after
])
def test_a_mistake_is_reported_once_by_several_processes(tmp_path, option, sentence):
    _, error = finish(torchrun(2, HERE / "train.py", *SHARED, tmp_path, option), status=1)
    assert len(re.findall("^error: .*" + sentence, error, re.M)) == 1 and 'train.py", line' not in error


def test_processes_that_have_read_different_checkpoints_stop(tmp_path):
    """As on two machines that share no disk: each process has a folder of its own."""
    start(*TINY, f"--out {tmp_path}/0/run --steps 2")
    (tmp_path / "1").mkdir()
    script = "import os, sys; sys.path.append(sys.argv.pop()); import sample, train; "
    (tmp_path / "apart.py").write_text(script + "os.chdir(os.environ['RANK']); sample.run(train.main)")
    process = torchrun(2, "apart.py", *TINY, "--out run --steps 4", HERE, cwd=tmp_path)
    _, error = finish(process, status=1)
    assert "different checkpoints; run must be on a disk" in error and steps_kept(tmp_path / "0/run") == [2]


def test_a_killed_process_is_replaced_and_nothing_changes(tmp_path):
    command, run = [HERE / "train.py", *TINY, "--steps 10 --out"], tmp_path / "killed"
    alone = torchrun(2, *command, tmp_path / "alone")
    process = torchrun(2, "--max-restarts 3", *command, run)
    wait_until(lambda: len(steps_kept(run)) > 1, process)
    _, second = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(second), signal.SIGKILL)
    output, _ = finish(process)
    finish(alone)
    assert output.count("continuing") == 1 and "done after 10 steps" in output
    same(weights_of(tmp_path / "alone", 10), weights_of(run, 10))


# ---------------------------------------------------------------- starting from weights that exist

@pytest.mark.parametrize("classes, options, stays", [
    ("abcdefghij", "", "nothing"),                      # the same classes
    ("jabcdefghi", "", "shared.*|embed.*"),
    ("jabcdefghi", "--model sagan128 --shared-dim 0", r".*(gain|bias)\.weight|embed.*"),
])
def test_init_takes_all_weights_but_the_embeddings_of_other_classes(classes, options, stays):
    (old, _), (new, _) = (trainer(options, "--seed", seed) for seed in (0, 1))
    theirs = {network: getattr(old, network).state_dict() for network in ("G", "G_ema", "D")}
    own = {network: copy.deepcopy(getattr(new, network).state_dict()) for network in theirs}
    for state in theirs.values():
        for p in state.values():
            p += 1
    new.start_from(sample.Weights(old.config, classes=[*"abcdefghij"], **theirs), [*classes])
    for network in theirs:
        for name, p in getattr(new, network).state_dict().items():
            source = own if re.fullmatch(stays, name) else theirs
            assert torch.equal(p, source[network][name]), name


def test_a_run_from_weights_without_d_continues_without_their_file(tmp_path, capsys):
    weights = shutil.copy(HERE / "docs/shapes.pt", tmp_path / "w.pt")
    command = f"--preset shapes --init {weights} --batch 8 --g-lr 0 --out {tmp_path} --steps"
    start(command, 1)
    assert "it has no D" in capsys.readouterr().out
    theirs = sample.read_tensors(weights)["G_ema"]["linear.weight"]
    assert torch.equal(weights_of(tmp_path, 1)["G"]["linear.weight"], theirs)
    weights.unlink()
    start(command, 2)
    assert "continuing" in capsys.readouterr().out and steps_kept(tmp_path) == [1, 2]


# ---------------------------------------------------------------- mistakes: one sentence and status 2

@pytest.mark.parametrize("options, sentence", [
    ("--data nowhere", "No such file"),
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
    ("--ch 12", "multiple of 8"),
    ("--micro-batch 3", "--micro-batch 3 does not divide --batch 8"),
    ("--sigma-fixed 2 --sigma-ratio 2", "give one of --sigma-fixed and --sigma-ratio"),
    ("--sigma-pull 1", "give one of --sigma-fixed and --sigma-ratio"),
    ("--shared-dim 0", "shared_dim above 0"),
    ("--init nothing", "nothing is neither a run folder"),
    ("--out a/cat/0.png", "Not a directory"),
])
def test_a_mistake_is_one_sentence_and_nothing_is_written(tmp_path, monkeypatch, capsys, options, sentence):
    monkeypatch.chdir(tmp_path)
    for folder in "a/cat", "b/dog", "high/a/cat", "gap/cat":
        picture(tmp_path / folder, "0.png")
    Path("empty").mkdir()
    Path("gap/dog").mkdir()
    before = listing(tmp_path)
    assert sentence in refused(monkeypatch, capsys, *TINY, options)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("said", ["", "CUDA out of memory. Tried to", "CUBLAS_STATUS_ALLOC_FAILED when",
                                  "CUDNN_STATUS_ALLOC_FAILED", "CUDA error: out of memory"])
def test_the_end_of_memory_is_one_sentence(monkeypatch, capsys, said):
    monkeypatch.setattr(sample, "LOCAL_RANK", 3)        # it may be this card's alone
    command = unittest.mock.Mock(main=lambda _: np.empty(1 << 50))
    if said:
        command.main = unittest.mock.Mock(side_effect=RuntimeError(said))
    assert "halve --micro-batch" in refused(monkeypatch, capsys, module=command)


# ---------------------------------------------------------------- long trials, by `make trial`

def trial_thirty_kills(tmp_path):
    options = "--steps 600 --save-every 3 --sample-every 600 --log-every 60"
    killed, reached = kill_again_and_again(tmp_path, 30, options)
    assert killed == 30 and reached >= 30


def trial_collapse_is_declared_and_health_is_not(tmp_path):
    """G's learning rate ten times too high, D's four times too low."""
    command = "--preset shapes --ch 16 --batch 16 --steps 600 --out"
    well = run_command("train.py", command, tmp_path / "well")
    sick = run_command("train.py", command, tmp_path / "sick", "--g-lr 2e-3 --d-lr 1e-4")
    _, error = finish(sick, status=2)
    finish(well)
    print(error)
    lines = log_of(tmp_path / "sick")
    few = train.FEW * max(line["diversity"] for line in lines)
    lost = next(line["step"] for line in lines if line["diversity"] < few)
    assert "error: collapse at step" in error and lines[-1]["step"] - lost <= 300


def trial_a_small_disk_costs_no_checkpoint(tmp_path):
    """A file system of 5 MB as run folder (as root)."""
    subprocess.run(words(["mount -t tmpfs -o size=5m tmpfs", tmp_path]), check=True)
    try:
        _, error = finish(run_command("train.py", *TINY, f"--out {tmp_path} --steps 12 --keep 9"), status=2)
        assert error.count("could not be written") >= 3 and "error: step 12 is not saved" in error
        assert len([weights_of(tmp_path, step) for step in steps_kept(tmp_path)]) >= 2
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "shapes"
    start(*TINY, "--out", out, "--steps", 4)
    return out


# ---------------------------------------------------------------- published weights
# What the published networks compute, in torch's functions and with the names of their tensors. `make peers`
# compares with the PyPI packages themselves, at full size.

class State(dict):
    """A state dict laid out like a published one. What it lacks is drawn at random when it is asked for."""

    def tensor(self, name, *shape):
        if name not in self:
            scale = math.sqrt(2 / math.prod(shape[1:])) if len(shape) > 1 else 0.3
            positive = re.search("var|bn.weight", name)
            self[name] = torch.rand(shape) + 0.5 if positive else scale * torch.randn(shape)
        return self[name]

    def layer(self, name, x, outputs, *size, bias=True):
        """A linear layer, or a convolution with kernels of this size."""
        W = self.normalized(name, outputs, x.shape[1], *size)
        bias = self.tensor(f"{name}.bias", outputs) if bias else None
        return F.conv2d(x, W, bias, padding=size[0] // 2) if size else F.linear(x, W, bias)

    def norm(self, x, name, c=None):
        """Batch norm and ReLU. With a condition c, it sets gain and bias."""
        C = x.shape[1]
        if c is None:
            gain, bias = (self.tensor(f"{name}.{part}", C) for part in self.FIXED)
        else:
            gain, bias = (self.layer(f"{name}.{part}", c, C, bias=False) for part in self.CONDITIONAL)
            gain = 1 + gain
        x = F.batch_norm(x, *self.moments(name, C), eps=self.EPS)
        return F.relu(x * gain[..., None, None] + bias[..., None, None])

    def attention(self, name, x, o="o"):
        """SAGAN's, without gamma and the shortcut."""
        N, C, H, W = x.shape
        parts = ("theta", C // 8), ("phi", C // 8), ("g", C // 2)
        query, key, value = (self.layer(name + part, x, filters, 1, 1, bias=False) for part, filters in parts)
        key, value = (F.max_pool2d(h, 2).flatten(2) for h in (key, value))
        weights = (query.flatten(2).mT @ key).softmax(2)
        return self.layer(name + o, (value @ weights.mT).view(N, C // 2, H, W), C, 1, 1, bias=False)


class DeepState(State):
    """BigGAN-deep as Hugging Face lays it out."""
    CONDITIONAL, FIXED, EPS, truncation = ("scale", "offset"), ("weight", "bias"), 1e-4, 1.0

    def moments(self, name, C):
        """Of truncations 0, 0.02, ... 1, interpolated."""
        weights = (1 - (torch.arange(51) - 50 * self.truncation).abs()).clamp(min=0)
        return [weights @ self.tensor(f"{name}.running_{part}", 51, C) for part in ("means", "vars")]

    def normalized(self, name, *shape):
        """W / sigma with sigma = u^T W v, as it was when they were published."""
        W = self.tensor(f"{name}.weight_orig", *shape)
        if f"{name}.weight_u" not in self:
            u_and_v = power_iteration(W.flatten(1), torch.randn(len(W)), steps=3)[1:]
            self[f"{name}.weight_u"], self[f"{name}.weight_v"] = u_and_v
        return W / (self[f"{name}.weight_u"] @ W.flatten(1) @ self[f"{name}.weight_v"])


class PortState(State):
    """BigGAN as the paper's author's PyTorch code lays it out."""
    CONDITIONAL, FIXED, EPS = ("gain", "bias"), ("gain", "bias"), 1e-5

    def moments(self, name, C):
        return [self.tensor(f"{name}.stored_{part}", C) for part in ("mean", "var")]

    def normalized(self, name, *shape):
        """One step of power iteration from the stored u0, as that code takes it in evaluation mode, too."""
        W = self.tensor(f"{name}.weight", *shape).flatten(1)
        if f"{name}.u0" not in self:
            self[f"{name}.u0"] = power_iteration(W, torch.randn(len(W)), steps=3)[1][None]
            self[f"{name}.sv0"] = torch.ones(1)
        v = F.normalize(self[f"{name}.u0"] @ W)
        u = F.normalize(v @ W.T)
        return (W / (u @ W @ v.T)).view(shape)


def deep_images(state, z, y, ch=8, n_classes=6, model="biggan-deep-128"):
    """BigGAN-deep, in which every other block upsamples."""
    c = torch.cat([z, state.tensor("embeddings.weight", 128, n_classes).T[y]], 1)
    h = state.layer("generator.gen_z", c, 256 * ch).view(len(z), 4, 4, -1).permute(0, 3, 1, 2)
    for i, width in enumerate(sum(itertools.pairwise(biggan.widths(MODELS[model].g_channels, 1)), ())):
        if i == 8:
            attended = state.attention("generator.layers.8.snconv1x1_", h, "o_conv")
            h = h + state.tensor("generator.layers.8.gamma", 1) * attended
        name, x, middle = f"generator.layers.{i + (i >= 8)}", h, h.shape[1] // 4
        for k, (filters, size) in enumerate([(middle, 1), (middle, 3), (middle, 3), (width * ch, 1)]):
            h = state.norm(h, f"{name}.bn_{k}", c)
            if k == 1 and i % 2:
                h, x = repeat(h), repeat(x)
            h = state.layer(f"{name}.conv_{k}", h, filters, size, size)
        h = h + x[:, :width * ch]
    return state.layer("generator.conv_to_rgb", state.norm(h, "generator.bn"), ch, 3, 3)[:, :3].tanh()


def port_images(state, z, y, ch=8, n_classes=6):
    """G of BigGAN at 128 pixels."""
    first, *chunks = z.split(20, 1)
    h = state.layer("linear", first, 256 * ch).view(len(z), -1, 4, 4)
    for i, (chunk, width) in enumerate(zip(chunks, [16, 8, 4, 2, 1])):
        name, x = f"blocks.{i}.0", repeat(h)
        c = torch.cat([state.tensor("shared.weight", n_classes, 128)[y], chunk], 1)
        h = state.layer(f"{name}.conv1", repeat(state.norm(h, f"{name}.bn1", c)), width * ch, 3, 3)
        h = state.layer(f"{name}.conv2", state.norm(h, f"{name}.bn2", c), width * ch, 3, 3)
        h = h + state.layer(f"{name}.conv_sc", x, width * ch, 1, 1)
        if i == 3:
            h = h + state.tensor("blocks.3.1.gamma") * state.attention("blocks.3.1.", h)
    return state.layer("output_layer.2", state.norm(h, "output_layer.0"), 3, 3, 3).tanh()


def port_logits(state, x, y, ch=8, n_classes=6):
    """D of BigGAN at 128 pixels."""
    for i, width in enumerate([1, 2, 4, 8, 16, 16]):
        name = f"blocks.{i}.0"
        h = state.layer(f"{name}.conv1", F.relu(x) if i else x, width * ch, 3, 3)
        h = state.layer(f"{name}.conv2", F.relu(h), width * ch, 3, 3)
        x = pool(h + state.layer(f"{name}.conv_sc", x, width * ch, 1, 1)) if i < 5 else h + x
        if i == 0:
            x = x + state.tensor("blocks.0.1.gamma") * state.attention("blocks.0.1.", x)
    h = F.relu(x).sum((2, 3))
    class_vectors = state.normalized("embed", n_classes, 16 * ch)
    return state.layer("linear", h, 1)[:, 0] + (class_vectors[y] * h).sum(1)


@functools.cache
def deep_state():
    state = DeepState()
    deep_images(state, torch.randn(1, 128), torch.tensor([0]))
    return state


def saved(content, new_format=True):
    """What torch.save writes; published files are in its old format."""
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=new_format)
    return file.getvalue()


@pytest.mark.parametrize("truncation, new_format", [(0.4, False), (0.437, True), (1.0, True), (None, False)])
def test_published_weights_draw_what_their_own_network_draws(tmp_path, truncation, new_format):
    state, path, y = deep_state(), tmp_path / "deep.bin", torch.tensor([3, 0])
    path.write_bytes(saved(dict(state), new_format))
    G = sample.load_generator(path, truncation)
    state.truncation = truncation or 1.0
    z = G.noise((2, 128))
    assert state.truncation < z.abs().max() <= 2 * state.truncation
    expected = deep_images(state, z, y)
    close(G(z, y), expected, 1e-5)
    assert expected.std() > 0.1


def test_the_authors_weights_draw_and_judge_as_his_code_does(tmp_path):
    states, y = (PortState(), PortState()), torch.tensor([3, 0])
    port_logits(states[1], port_images(states[0], torch.randn(2, 120), y), y)
    for name, state in zip(("G_ema.pth", "D.pth"), states):
        torch.save(dict(state), tmp_path / name)
    G, found = sample.load_generator(tmp_path / "G_ema.pth"), sample.read_weights(tmp_path / "G_ema.pth")
    D = Discriminator(found.config).eval()
    D.load_state_dict(found.D)
    z = G.noise((2, 120))
    x = port_images(states[0], z, y)
    close(G(z, y), x, 1e-5)
    close(D(x, y), port_logits(states[1], x, y), 1e-5, 1e-5)
    assert x.std() > 0.05


class Trap:
    """Pickles to an instruction that would create a file when it is loaded."""

    def __reduce__(self):
        return open, ("trapped", "w")


def without(state, name):
    return {key: tensor for key, tensor in state.items() if key != name}


BIAS = "generator.bn.bias"


@pytest.mark.parametrize("new_format", [False, True])
@pytest.mark.parametrize("spoil, sentence", [
    (lambda state: b"", "damaged"),
    (lambda state: pickle.dumps(Trap()), "could run code"),
    (lambda state: state | {"x": Trap()}, "could run code"),
    (lambda state: saved(state)[:100_000], "damaged"),
    (lambda state: saved(state).replace(state[BIAS].numpy().tobytes(), bytes(32)), "damaged"),
    (lambda state: [], "BigGAN"),
    (lambda state: without(state, BIAS), "Missing key.*output_norm.bias"),
    (lambda state: without(state, "generator.layers.0.conv_0.weight_v"), "weight_v|blocks.0.conv1.v"),
    (lambda state: state | {BIAS: torch.ones(3)}, "size mismatch"),
    (lambda state: state | {BIAS: torch.full((8,), math.nan)}, "output_norm.bias.* not finite"),
    (lambda state: {"G_ema": state, "model": {"colour": "red"}, "classes": []}, "colour"),
])
def test_a_file_of_no_sound_weights_is_refused(tmp_path, monkeypatch, capsys, spoil, sentence, new_format):
    monkeypatch.chdir(tmp_path)
    content = spoil(dict(deep_state()))
    Path("bad.bin").write_bytes(content if isinstance(content, bytes) else saved(content, new_format))
    assert re.search(sentence, refused(monkeypatch, capsys, "--weights", "bad.bin", module=sample))
    assert os.listdir() == ["bad.bin"]                  # the trap has made no file


class QuietHandler(http.server.SimpleHTTPRequestHandler):
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
    (folder, address), path = server, tmp_path / "cache" / "w"
    (folder / "w").write_bytes(b"content")
    hash_prefix = hashlib.sha256(b"content").hexdigest()[:8]
    with pytest.raises(sample.UserError, match="hash.* put it at .*cache/w"):
        sample.fetch(f"{address}/w", path, "0123")
    assert not any(path.parent.iterdir())
    sample.fetch(f"{address}/w", path, hash_prefix)
    monkeypatch.setattr(metrics, "INCEPTION", f"{address}/w")
    assert "hash" in refused(monkeypatch, capsys, "--data", "shapes", module=metrics)
    (folder / "w").unlink()
    assert sample.fetch(f"{address}/w", path, hash_prefix).read_bytes() == b"content"
    with pytest.raises(sample.UserError, match=f"{address}/none: .*404.* put it at .*cache/none"):
        sample.fetch(f"{address}/none", path.with_name("none"))


def test_without_weights_the_newest_run_draws_or_else_published_ones(server, tmp_path, monkeypatch, capsys):
    (folder, address), cache = server, tmp_path / "cache"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "CACHE", cache)
    monkeypatch.setitem(sample.BY_NAME, "biggan-deep-256", f"{address}/deep.bin")
    (folder / "deep.bin").write_bytes(saved(dict(deep_state())))
    for weights in None, "biggan-deep-256":
        assert sample.read_weights(weights).scaled and len(os.listdir(cache)) == 1
    for run, time_saved in ("newer", 2), ("older", 1):
        path = tmp_path / "runs" / run / "checkpoints" / "step-00000001.pt"
        path.parent.mkdir(parents=True)
        path.write_bytes(saved(run))
        os.utime(path, (time_saved, time_saved))
    assert sample.find_weights(None)[0] == "newer" and "runs/newer" in capsys.readouterr().out


# ---------------------------------------------------------------- sampling

@pytest.mark.parametrize("truncation", [None, 0.5])
def test_samples_are_drawn_by_ema_weights_with_statistics_of_their_noise(tiny_run, truncation):
    checkpoint, y = sample.newest_checkpoint(tiny_run)[0], torch.arange(4)
    expected = Generator(biggan.ModelConfig(**checkpoint["model"]))
    expected.load_state_dict(checkpoint["G_ema"])
    standing_statistics(expected, noise=functools.partial(truncated_normal, threshold=truncation or math.inf))
    G = sample.load_generator(tiny_run, truncation)
    z = G.noise((4, G.config.z_dim))
    assert truncation is None or 0.4 < z.abs().max() <= truncation
    close(G(z, y), expected(z, y), 1e-5)
    assert G.classes == train.SHAPES


def test_one_seed_is_one_image_in_any_batch(tiny_run):
    G, seeds, images = sample.load_generator(tiny_run), torch.arange(64), {}
    for n in 1, 7, 64:
        parts = [G(sample.seeded_noise(part, G.config.z_dim), part % 10) for part in seeds.split(n)]
        images[n] = torch.cat(parts)
    close(images[1], images[64], 1e-5)
    close(images[7], images[64], 1e-5)
    assert len(sample.seeded_noise(seeds, 20).unique(dim=0)) == 64
    pixels = ((images[1] + 1) * 127.5).permute(0, 2, 3, 1)
    close(sample.draw_seeds(G, seeds % 10, seeds), pixels, 0.51)        # rounded
    G.to_rgb.bias.fill_(math.nan)
    with pytest.raises(sample.UserError, match="not finite"):
        sample.draw_seeds(G, [0], [0])


def test_arrays_are_the_same_on_one_and_three_processes(tiny_run, tmp_path):
    options = ["--weights", tiny_run, "--trunc", 0.7, "--seed", 3, "--class", 8, 0, 3, "--npz", 150, "--out"]
    start(*options, tmp_path / "1.npz", module=sample)
    finish(torchrun(3, "--", HERE / "sample.py", *options, tmp_path / "3.npz"))
    labels, G = np.resize([8, 0, 3], 150), sample.load_generator(tiny_run, 0.7)
    expected = sample.draw_seeds(G, labels, range(3, 153), G.noise)
    for n in 1, 3:
        found = np.load(tmp_path / f"{n}.npz")
        close(found["arr_0"], expected, 1)              # a rounding
        assert found["arr_1"].tolist() == labels.tolist() and found["arr_0"].dtype == np.uint8


def same_grid(path, images, columns):
    """A sheet of 32 pixels shows these images, each with one white pixel around it."""
    cells = np.asarray(Image.open(path)).reshape(-1, 34, columns, 34, 3).swapaxes(1, 2).reshape(-1, 34, 34, 3)
    close(cells[:, 1:33, 1:33], images, 1)
    assert (cells[:, [0, 33]] == 255).all()


@pytest.mark.parametrize("sheet, truncations", [("classes", [None]), ("truncation", [2, 1.5, 1, 0.5, 0.04])])
def test_a_sheet_has_a_row_per_truncation_and_class(tiny_run, tmp_path, sheet, truncations):
    path, images = tmp_path / "a.png", []
    options = ["--class", "star", 3, "--n", 2, "--seed", 5, "--sheet", sheet, "--out", path]
    start("--weights", tiny_run, *options, module=sample)
    for truncation in truncations:
        G = sample.load_generator(tiny_run, truncation)
        images.append(sample.draw_seeds(G, [8, 8, 3, 3], [5, 6, 5, 6], G.noise))
    same_grid(path, np.concatenate(images), 2)


def test_interpolations_lead_half_way_through_noise_and_class(tiny_run, tmp_path):
    path = tmp_path / "a.png"
    options = ["--class", "star", "ring", "--n", 3, "--sheet", "interpolation", "--out", path]
    start("--weights", tiny_run, *options, module=sample)
    G = sample.load_generator(tiny_run)
    (a, c), (p, r) = sample.seeded_noise([0, 1], G.config.z_dim), G.shared.weight[[8, 6]]
    b, q = (a + c) / math.sqrt(2), (p + r) / 2          # half-way noise has variance 1, too
    z, y = [a, b, c, a, a, a, a, b, c], [p, p, p, p, q, r, p, q, r]     # noise, class, both
    same_grid(path, sample.draw(G, torch.stack(z), torch.stack(y)), 3)


def test_classes_are_found_by_number_name_and_imagenet_word():
    synsets = sample.class_names(1000)
    find = lambda *wanted: sample.class_indices(wanted, synsets)
    assert find("207", "n02099601", "Golden Retriever", "tench", "goldfinch") == [207, 207, 207, 0, 11]
    assert find("golden") == [207] and find("all") == [*range(1000)]    # a part that is unique
    for text, sentence in (("crane", r"crane \(134\), crane \(517\)"), ("1000", "must be one of 1000"),
                           ("retriever", r"golden retriever \(207\)"), ("retriev", r"tench \(0\)")):
        with pytest.raises(sample.UserError, match=sentence):
            find(text)
    assert sample.class_indices(["3", "5"], ["5", "3"]) == [1, 0]       # a name comes before a number


def test_an_exported_generator_is_small_and_draws_the_same(tiny_run, tmp_path):
    path = tmp_path / "g.pt"
    start("--weights", tiny_run, "--export", "--out", path, module=sample)
    assert path.stat().st_size < 0.15 * sample.newest_checkpoint(tiny_run)[1].stat().st_size
    ours, exported = (sample.load_generator(weights) for weights in (tiny_run, path))
    images = [sample.draw_seeds(G, range(10), range(10)).astype(int) for G in (ours, exported)]
    assert np.abs(images[0] - images[1]).mean() < 1


def recognised(images, labels):
    """The part of images whose nearest neighbour among 2,000 drawn shapes, in brightness, has their label."""
    brightness = np.concatenate([images, drawn_shapes(10_000, 12_000)]).max(3).reshape(-1, 32 * 32)
    likeness = np.corrcoef(brightness)[:len(images), len(images):]
    return (likeness.argmax(1) % 10 == labels).mean()


def test_the_model_that_comes_along_draws_recognisable_shapes_in_an_empty_folder(tmp_path):
    finish(run_command("sample.py", "--weights", "shapes", "--class", "star", "--n", 7, cwd=tmp_path))
    assert os.listdir(tmp_path) == ["sample.png"]
    assert Image.open(tmp_path / "sample.png").size == (3 * 34, 3 * 34)     # about a square
    labels = np.arange(200) % 10
    assert recognised(sample.draw_seeds(sample.load_generator("shapes"), labels, range(200)), labels) > 0.9


# ---------------------------------------------------------------- scores of sets of images

def plain_inception(x, state):
    """The network of 2015 on images in [-1, 1], (N, 3, 299, 299): features, logits.

    A layer is written as its name, filters, height, width and, unless it is 1, stride. Two layers have no
    padding, as if the border were cut off afterwards."""
    def conv(x, layer):
        name, *numbers = layer.split()
        filters, height, width, stride = map(int, [*numbers, 1][:4])
        W = state.tensor(f"{name}.conv.weight", filters, x.shape[1], height, width)
        x = F.conv2d(x, W, stride=stride, padding=(height // 2, width // 2) if stride == 1 else 0)
        parts = "running_mean", "running_var", "weight", "bias"
        norm = (state.tensor(f"{name}.bn.{part}", filters) for part in parts)
        return F.relu(F.batch_norm(x, *norm, eps=0.001))

    def block(name, pooled, *branches):
        outputs = [functools.reduce(lambda h, layer: conv(h, f"{name}.branch{layer}"), branch.split(", "), x)
                   for branch in branches]
        return torch.cat([*outputs, pooled], 1)

    def pooled(name, filters, of=functools.partial(F.avg_pool2d, count_include_pad=False)):
        return conv(of(x, 3, stride=1, padding=1), f"{name}.branch_pool {filters} 1 1")

    x = conv(x, "Conv2d_1a_3x3 32 3 3 2")
    x = F.pad(conv(x, "Conv2d_2a_3x3 32 3 3"), 4 * [-1])
    x = F.max_pool2d(conv(x, "Conv2d_2b_3x3 64 3 3"), 3, 2)
    x = conv(x, "Conv2d_3b_1x1 80 1 1")
    x = F.max_pool2d(F.pad(conv(x, "Conv2d_4a_3x3 192 3 3"), 4 * [-1]), 3, 2)
    for name, filters in ("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64):
        x = block(name, pooled(name, filters), "1x1 64 1 1", "5x5_1 48 1 1, 5x5_2 64 5 5",
                  "3x3dbl_1 64 1 1, 3x3dbl_2 96 3 3, 3x3dbl_3 96 3 3")
    x = block("Mixed_6a", F.max_pool2d(x, 3, 2), "3x3 384 3 3 2",
              "3x3dbl_1 64 1 1, 3x3dbl_2 96 3 3, 3x3dbl_3 96 3 3 2")
    for name, c in ("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192):
        x = block(name, pooled(name, 192), "1x1 192 1 1", f"7x7_1 {c} 1 1, 7x7_2 {c} 1 7, 7x7_3 192 7 1",
                  f"7x7dbl_1 {c} 1 1, 7x7dbl_2 {c} 7 1, 7x7dbl_3 {c} 1 7, 7x7dbl_4 {c} 7 1, 7x7dbl_5 192 1 7")
    x = block("Mixed_7a", F.max_pool2d(x, 3, 2), "3x3_1 192 1 1, 3x3_2 320 3 3 2",
              "7x7x3_1 192 1 1, 7x7x3_2 192 1 7, 7x7x3_3 192 7 1, 7x7x3_4 192 3 3 2")
    double = "3x3dbl_1 448 1 1, 3x3dbl_2 384 3 3, 3x3dbl_3"
    branches = "1x1 320 1 1", "3x3_1 384 1 1, 3x3_2a 384 1 3", "3x3_1 384 1 1, 3x3_2b 384 3 1", \
        f"{double}a 384 1 3", f"{double}b 384 3 1"
    x = block("Mixed_7b", pooled("Mixed_7b", 192), *branches)
    x = block("Mixed_7c", pooled("Mixed_7c", 192, F.max_pool2d), *branches)
    features = x.mean((2, 3))
    return features, F.linear(features, state.tensor("fc.weight", 1008, 2048), state.tensor("fc.bias", 1008))


@functools.cache
def inception_state():
    """Random weights laid out like the published file."""
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
    inception = metrics.Inception(inception_state())
    return metrics.features_of(lambda rows: images[rows], len(images), inception, "test")


@pytest.mark.parametrize("height, width", [(32, 32), (299, 299), (256, 341)])
def test_inception_equals_one_operation_at_a_time(height, width):
    x, state = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8), inception_state()
    resized = F.interpolate(x.float(), (299, 299), mode="bilinear", align_corners=False)
    features, logits = plain_inception(resized / 127.5 - 1, state)
    found = metrics.Inception(state)(x)
    close(found[0], features, 1e-5, 1e-5)
    close(found[1], logits, 1e-4, 1e-5)
    assert (features[0] - features[1]).std() > 0.01
    assert sum(W.numel() for W in state.values() if W.dim() > 1) == 23_815_520      # the published file's


@pytest.mark.parametrize("change, sentence", [
    (lambda state: without(state, "Mixed_6c.branch7x7dbl_3.bn.running_var"), "7x7dbl_3.bn.running_var"),
    (lambda state: state | {"fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}, "1,008"),
    (lambda state: state | {"fc.bias": torch.full((1008,), math.inf)}, "finite"),
    (lambda state: state | {"x": Trap()}, "could run code"),
])
def test_other_weights_than_inceptions_are_refused(tmp_path, change, sentence):
    torch.save(change(dict(inception_state())), tmp_path / "bad.pth")
    with pytest.raises(sample.UserError, match=sentence):
        metrics.Inception(tmp_path / "bad.pth")


def test_features_are_gathered_from_all_images(monkeypatch):
    monkeypatch.setattr(metrics, "KEPT", 18)
    images, inception = drawn_shapes(0, 21), metrics.Inception(inception_state())
    seen = features_of(images)
    parts = torch.from_numpy(images).permute(0, 3, 1, 2).split(11)      # in two blocks, 16 at most
    f = torch.cat([inception(x)[0] for x in parts])
    close(seen.mu, f.double().mean(0))
    close(seen.cov, np.cov(f.double().numpy().T))
    close(seen.kept, f[:18])
    close(seen.probs, (f[:18] @ inception_state()["fc.weight"].T).softmax(1), 1e-5)     # without the bias
    assert seen.n == 21 and np.array_equal(seen.pixels, images)


def test_every_score_notices_worse_images():
    """Growing noise, growing pixels, ever fewer images again and again."""
    images = drawn_shapes(0, 12)
    noise, real = np.random.default_rng(0).normal(size=images.shape), features_of(images)
    series = [[(images + s * noise).clip(0, 255) for s in (10, 40)],
              [images[:, ::n, ::n].repeat(n, 1).repeat(n, 2) for n in (2, 8)],
              [np.resize(images[:n], images.shape) for n in (3, 1)]]
    best = metrics.compare(real, real)
    for sets in series:
        bad, worse = (metrics.compare(real, features_of(images.astype(np.uint8))) for images in sets)
        assert best["FID"] < bad["FID"] < worse["FID"] and best["SWD"] < bad["SWD"] < worse["SWD"]
        assert best["KID"] < worse["KID"]
    # Of the few: one image is typical, but has no variety, and belongs to one class.
    assert best["precision"] == worse["precision"] == best["recall"] == 1 > bad["recall"] > worse["recall"]
    assert best["IS"] > worse["IS"]


def scores_of(tmp_path, *arguments):
    start(*arguments, "--out", tmp_path / "m.json", module=metrics)
    return json.loads((tmp_path / "m.json").read_text())


def test_scores_are_the_same_on_one_and_two_processes(inception_file, tiny_run, tmp_path):
    options = ["--weights", tiny_run, "--data", "shapes", "--n", 23, "--trunc", 0.9]
    options += ["--inception", inception_file]
    one, = scores_of(tmp_path, *options)
    finish(torchrun(2, "--", HERE / "metrics.py", *options, "--out", tmp_path / "2.json"))
    two, = json.loads((tmp_path / "2.json").read_text())
    for name in "FID", "KID", "IS", "precision", "recall", "SWD":
        close(two[name], one[name], rtol=1e-4)
    assert (two["n"], two["n_real"], two["truncation"]) == (23, 23, 0.9)


def test_arrays_folders_and_statistics_give_the_same_scores(inception_file, tmp_path):
    real, fake = drawn_shapes(0, 12), drawn_shapes(20, 30)
    stats, folder = tmp_path / "stats.npz", tmp_path / "real"
    folder.mkdir()
    for i, image in enumerate(real):
        Image.fromarray(image).save(folder / f"{i}.png")
    np.savez(tmp_path / "fake.npz", fake, np.zeros(10, int))
    a, b, inception = features_of(real), features_of(fake), ("--inception", inception_file)
    options = ["--fake", tmp_path / "fake.npz", "--real", folder, "--save-stats", stats]
    result, = scores_of(tmp_path, *options, *inception)
    close(result["FID"], metrics.frechet_distance(a.mu, a.cov, b.mu, b.cov), rtol=1e-4)
    close(np.load(stats)["mu"], a.mu, 1e-5)
    close(np.load(stats)["sigma"], a.cov, 1e-5)
    itself, = scores_of(tmp_path, "--fake", folder, "--real", stats, *inception)
    assert itself["FID"] < 1e-3 * result["FID"] and "SWD" not in itself
    assert (result["n"], result["n_real"]) == (10, 12) and result["SWD"] > 0


def test_each_set_of_weights_and_truncation_has_its_line_and_the_best_is_named(tiny_run, tmp_path, capsys):
    options = ["--trunc", 1, 0.5, "--data", "shapes", "--n", 40, "--seed", 2, "--inception", "none"]
    results, lines = scores_of(tmp_path, "--weights", tiny_run, "shapes", *options), capsys.readouterr().out
    real = metrics.features_of_data(train.Shapes(32, held_out=True), 40, None).pixels
    pairs = itertools.product((str(tiny_run), "shapes"), (1, 0.5))
    for result, (weights, truncation) in zip(results, pairs, strict=True):
        assert (result["images"], result["truncation"]) == (weights, truncation)
        G, i = sample.load_generator(weights, truncation), np.arange(40)
        levels = metrics.pyramid_distances(real, sample.draw_seeds(G, i % 10, 80 + i, G.noise))
        close(result["SWD"], 1000 * np.mean([*levels.values()]), rtol=1e-3)
        assert f"SWD {result['SWD']:.4g}" in lines
    best = min(results, key=lambda result: result["SWD"])
    assert f"best: shapes, truncation {best['truncation']}" in lines


# ---------------------------------------------------------------- mistakes

@pytest.mark.parametrize("module, arguments, sentence", [
    (sample, "--class 10", "must be one of 10"),
    (sample, "--truncation 0.5", "unrecognized arguments: --truncation"),
    (sample, "--trunc 0", "--trunc 0 must be above 0"),
    (sample, "--trunc 2 --weights deep.bin", "1 at most"),
    (sample, "--n 0", "--n must be at least 1"),
    (sample, "--out nowhere/a.png", "nowhere/a.png must"),
    (sample, "--npz 5 --out a.png", "must end in .npz"),
    (sample, "--trunc 1 --export", "choose a truncation when you draw"),
    (sample, "--trunc 1 --sheet truncation", "needs no --trunc"),
    (sample, "--sheet interpolation --class star", "two classes"),
    (sample, "--weights nothing.pt", "nothing.pt"),
    (metrics, "--inception none", "--data"),
    (metrics, "--data nowhere --inception none", "nowhere"),
    (metrics, "--data shapes --n 7", "--n must be at least 8"),
    (metrics, "--data shapes --inception nothing.pth", "nothing.pth"),
    (metrics, "--data shapes --fake deep.bin --inception none", "deep.bin"),
])
def test_a_mistake_is_one_sentence(tmp_path, monkeypatch, capsys, module, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    Path("deep.bin").write_bytes(saved(dict(deep_state())))
    arguments = ["--weights", "shapes", *arguments.split()]
    assert sentence in refused(monkeypatch, capsys, *arguments, module=module)
    assert os.listdir() == ["deep.bin"]


# ---------------------------------------------------------------- make check: is the demo good?

def check_the_demos_samples_are_the_shapes_that_were_asked_for():
    """After `make demo`, 2,000 samples: recognised, and near to drawn shapes."""
    real, labels = drawn_shapes(0, 2000), np.arange(2000) % 10
    G = sample.load_generator(HERE / "runs/shapes")
    fake, agreed, distance = sample.draw_seeds(G, labels, range(2000)), {}, {}
    for name, images in ("drawn shapes", drawn_shapes(2000, 4000)), ("samples", fake):
        agreed[name] = recognised(images, labels)
        distance[name] = 1000 * np.mean([*metrics.pyramid_distances(real, images).values()])
        print(f"\n{name}: {agreed[name]:.1%} recognised, SWD {distance[name]:.1f}")
    assert agreed["drawn shapes"] > 0.99 and agreed["samples"] >= 0.99 and distance["samples"] <= 32


# ---------------------------------------------------------------- beside others, by `make peers`

CPU = torch.device("cpu")


def median_seconds(work, rounds, device=CPU):
    seconds = []
    for _ in range(rounds + 2):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return np.median(seconds[2:])                       # the first ones allocate


def in_own_process(call):
    """The number that a function of this file prints in a process of its own, as its users would run it."""
    command = [sys.executable, "-c", f"import {__name__} as tests; tests.{call}"]
    output = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=True).stdout
    return float(output.split()[-1])


def published_package(resolution):
    """The PyPI package's model, and random weights for it."""
    from pytorch_pretrained_biggan import BigGAN, BigGANConfig
    model, state = f"biggan-deep-{resolution}", DeepState()
    deep_images(state, torch.randn(1, 128), torch.tensor([0]), 128, 1000, model)
    pairs = itertools.pairwise(biggan.widths(MODELS[model].g_channels, 1))
    layers = [layer for a, b in pairs for layer in ((False, a, a), (True, a, b))]
    package = BigGAN(BigGANConfig(output_dim=resolution, layers=layers)).eval().requires_grad_(False)
    package.load_state_dict(state)
    return package, dict(state)


@pytest.mark.parametrize("resolution", [128, 256, 512])
def peer_the_published_package_draws_the_same_images(tmp_path, resolution):
    (package, state), path, y = published_package(resolution), tmp_path / "w.bin", torch.tensor([207])
    path.write_bytes(saved(state, new_format=False))
    for truncation in 0.4, 1.0:
        G = sample.load_generator(path, truncation)
        z = G.noise((1, 128))
        theirs = package(z, F.one_hot(y, 1000).float(), truncation)
        difference = (G(z, y) - theirs).abs().max()
        print(f"\n{resolution}, truncation {truncation}: {difference:.1e}")
        assert theirs.std() > 0.05 and difference < 1e-4


def images_per_second(whose, path, batch):
    """Of biggan-deep-128."""
    z, y = biggan.scaled_normal((batch, 128), 0.4), torch.arange(batch)
    if whose == "ours":
        G = sample.load_generator(path, 0.4)
        draw = lambda: G(z, y)
    else:
        package, one_hot = published_package(128)[0], F.one_hot(y, 1000).float()
        draw = lambda: package(z, one_hot, 0.4)
    n = max(1, 8 // batch)
    print(n * batch / median_seconds(lambda: [draw() for _ in range(n)], 8))


@pytest.mark.parametrize("batch, times", [(1, 1.8), (16, 3)])     # measured: 1.9 to 2.0, 3.2 to 3.5
def peer_drawing_is_faster_than_the_package(tmp_path, batch, times):
    path, rates = str(tmp_path / "w.bin"), {"ours": [], "theirs": []}
    torch.save(published_package(128)[1], path)
    for whose in [*rates] * 2:                          # in turn
        rates[whose].append(in_own_process(f"images_per_second({whose!r}, {path!r}, {batch})"))
    ours, theirs = map(np.median, rates.values())
    print(f"\nbatch {batch}: {ours:.1f} images per second, {ours / theirs:.2f} times the package's")
    assert ours / theirs >= times


def pytorch_fids_network(state):
    """pytorch-fid's Inception with these weights."""
    # torchvision, which it imports, wants operators declared that it lacks beside a torch for CPUs.
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in "nms", "qnms":
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor a, Tensor b, float c) -> Tensor")
    from pytorch_fid import inception
    inception.load_state_dict_from_url = lambda *_, **__: state
    return inception.InceptionV3([3]).eval().requires_grad_(False)


def peer_pytorch_fid_sees_the_same_features():
    theirs, ours = pytorch_fids_network(inception_state()), metrics.Inception(inception_state())
    for side in 32, 128, 256, 512:
        images = np.stack([train.Shapes(side)[i][0] for i in range(16)])
        x = torch.from_numpy(images).permute(0, 3, 1, 2)
        difference = (ours(x)[0] - theirs(x / 255)[0].flatten(1)).abs().max()
        print(f"\n{side} pixels: features differ by {difference:.1e}")
        assert difference < 1e-4
    work = (lambda: ours(x)), (lambda: theirs(x / 255))
    here, there = np.median([[median_seconds(network, 1) for network in work] for _ in range(4)], 0)
    print(f"{there / here:.2f} times as fast")
    assert there > here


# ---------------------------------------------------------------- beside the author's code, by `make port`

def authors_step(s, config, device):
    """A step of the author's PyTorch code in the folder PORT; on a GPU with its fastest settings."""
    for name in "torchvision", "torchvision.transforms", "datasets", "animal_hash":     # imported, not needed
        sys.modules[name] = unittest.mock.MagicMock()
    sys.path.insert(0, os.environ["PORT"])
    import BigGAN
    import train_fns
    import utils
    torch.backends.cudnn.benchmark = torch.backends.cuda.matmul.allow_tf32 = True
    arguments = f"""--batch_size {s.batch} --num_D_steps {s.d_steps} --G_ortho {s.ortho}
        --dim_z {config.z_dim} --G_ch {config.ch} --D_ch {config.ch} --G_attn {config.g_attention}
        --D_attn {config.d_attention} --shared_dim {config.shared_dim} --G_shared --hier --ema"""
    options = vars(utils.prepare_parser().parse_args(arguments.split()))
    options |= {"resolution": config.resolution, "n_classes": config.n_classes}
    networks = BigGAN.Generator, BigGAN.Generator, BigGAN.Discriminator
    G, G_ema, D = (network(**options).to(device) for network in networks)
    for theirs, ours in (G, Generator), (D, Discriminator):
        assert parameters(theirs) == parameters(ours(config))
    z, y = utils.prepare_z_y(s.batch, G.dim_z, config.n_classes, device=str(device))
    ema = utils.ema(G, G_ema, s.ema, s.ema_start)
    return train_fns.GAN_training_function(G, D, BigGAN.G_D(G, D), z, y, ema, {"itr": 1}, options)


def training_rate(precision, arguments, steps):
    """Real images per second; by the author's code if precision is "port"."""
    s = train.parse_settings([*arguments.split(), "--d-steps", "1", "--data", "x"])
    config, device = train.model_config(s, MODELS[s.model].n_classes), sample.pick_device()
    x = torch.rand(s.batch, 3, config.resolution, config.resolution, device=device) * 2 - 1
    y = torch.randint(config.n_classes, (s.batch,), device=device)
    if precision == "port":
        step = authors_step(s, config, device)
        work = lambda: step(x, y)
    else:
        sample.keep_freed_memory()                      # as train.py does
        s.precision = precision
        trainer, real = train.Trainer(s, config, device), (x.to(memory_format=torch.channels_last), y)
        work = lambda: trainer.train_step(itertools.repeat(real))
    print(s.batch / median_seconds(work, steps, device))


@pytest.mark.parametrize("arguments, steps, fp32, bf16", [
    ("--preset cifar10 --ch 16 --batch 64", 12, 2, 3.2),
    ("--preset imagenet128 --ch 32 --batch 8", 5, 2, 3.2),
])
def beside_the_authors_code_training_is_faster(arguments, steps, fp32, bf16):
    """The same architecture and batch, each in a process of its own, in turn."""
    rates = {"port": [], "fp32": [], "bf16": []}
    for whose in [*rates] * 3:
        rates[whose].append(in_own_process(f"training_rate({whose!r}, {arguments!r}, {steps})"))
    port, ours32, ours16 = map(np.median, rates.values())
    print(f"\n{arguments}: {port:.1f} images per second by the author's code, here {ours32:.1f} in fp32 "
          f"({ours32 / port:.2f} times), {ours16:.1f} in bf16 ({ours16 / port:.2f} times)")
    assert ours32 / port >= fp32 and ours16 / port >= bf16


# ---------------------------------------------------------------- on a GPU, by `make gpu`
# With ON=cpu everything runs on the CPU, small, so that no line waits for a GPU to be tried.

ON = torch.device(os.environ.get("ON") or "cuda")
CARD = ON.type == "cuda"


class OneOfSeveral(int):
    """The number 1, which takes the way of several processes: collectives and DDP."""
    __gt__ = lambda self, other: True


@pytest.fixture
def a_group_of_one(monkeypatch, tmp_path):
    backend = "nccl" if CARD else "gloo"
    torch.distributed.init_process_group(backend, f"file://{tmp_path}/store", rank=0, world_size=1)
    for module in biggan, train:
        monkeypatch.setattr(module, "processes", lambda: OneOfSeveral(1))
    yield
    torch.distributed.destroy_process_group()


def trained(device, *options, steps=1, state=None):
    """A trainer after some steps on the same images, and the gradients of the last."""
    # D rests: Adam's first step is the sign of the gradient, also where that is rounding.
    options = "--data x --batch 8 --ch 16 --d-steps 1 --ema-start 0 --g-lr 1e-4 --d-lr 0", *options
    sample.pick_device()                                    # without TF32
    s = train.parse_settings(words(options))
    t = train.Trainer(s, train.model_config(s, n_classes=10), device)
    t.scaler._init_scale = 64.0                             # nothing overflows
    for network in t.G, t.D:
        if hasattr(network, "attention"):
            nn.init.constant_(network.attention.gamma, 0.5)     # at 0 attention would not count
    if state:
        t.load_state_dict(state)
    for _ in range(steps):
        t.train_step(some_images(t))
    return t, {f"{network}.{name}": p.grad.cpu() for network in "GD"
               for name, p in getattr(t, network).named_parameters() if p.grad is not None}


def some_images(trainer):
    R, generator = trainer.config.resolution, torch.Generator().manual_seed(1)
    x = torch.rand(8, 3, R, R, generator=generator) * 2 - 1
    return itertools.repeat((x.to(trainer.device), torch.arange(8).to(trainer.device)))


def distance(ours, theirs):
    """The largest distance of two lists of tensors, relative to the tensors' own norms."""
    assert ours.keys() == theirs.keys()
    whole = sum(theirs[name].norm().square() for name in theirs).sqrt()
    return max((ours[name] - theirs[name]).norm() / max(theirs[name].norm(), 1e-2 * whole) for name in ours)


def cosine(ours, theirs):
    """Of all gradients of G, and of all of D, the smaller one."""
    flat = lambda grads, network: torch.cat([grads[name].flatten() for name in grads if name[0] == network])
    return min(F.cosine_similarity(flat(ours, network), flat(theirs, network), 0) for network in "GD")


def report(what, value):
    print(f"\n{what:<60}{value}")


@pytest.mark.parametrize("model", ["biggan32", "biggan128"])
def gpu_a_step_is_the_cpus(model):
    _, exact = trained(CPU, "--precision fp32 --model", model)
    _, ours = trained(ON, "--precision fp32 --model", model)
    found = {"fp32": distance(ours, exact)}
    assert found["fp32"] < 1e-3
    for precision in "bf16", "fp16":
        found[precision] = cosine(trained(ON, "--precision", precision, "--model", model)[1], exact)
        assert found[precision] > 0.99
    report(f"{model}: distance of gradients in fp32, their cosines", [f"{x:.2g}" for x in found.values()])


@pytest.mark.parametrize("options", ["", "--micro-batch 4"])
def gpu_collectives_and_ddp_change_nothing(request, options):
    alone = trained(ON, "--precision fp32 --model biggan32", options)[1]
    request.getfixturevalue("a_group_of_one")
    together = trained(ON, "--precision fp32 --model biggan32", options)[1]
    report(f"collectives and DDP {options}: distance of gradients", f"{distance(together, alone):.1g}")
    assert distance(together, alone) < 1e-3


@pytest.mark.parametrize("option, model", [("--compile", "biggan128" if CARD else "biggan32"),
                                           ("--fused-attention", "biggan128")])
def gpu_faster_ways_change_nothing(option, model):
    options = f"--precision fp32 --model {model}"
    plain, other = trained(ON, options)[1], trained(ON, options, option)[1]
    report(f"{option}: distance of gradients", f"{distance(other, plain):.1g}")
    assert distance(other, plain) < 1e-3


def gpu_a_run_moves_from_card_to_cpu_and_back():
    options, state = "--precision fp32 --model biggan32", None
    stayed = trained(ON, options, steps=3)[0].G.named_parameters()
    stayed = {name: p.detach().cpu() for name, p in stayed if p.dim() > 1}  # rounding alone moves biases
    for device in ON, CPU, ON:
        t, _ = trained(device, options, state=state)
        state = torch.load(io.BytesIO(saved(t.state_dict())), map_location="cpu")
    off = distance({name: state["G"][name] for name in stayed}, stayed)
    report("a run moved twice: distance of G's weights", f"{off:.1g}")
    assert off < 1e-3


def gpu_images_and_features_are_the_cpus():
    G = sample.load_generator("shapes").to(ON)
    z, y = G.noise((10, G.config.z_dim)), torch.arange(10)
    theirs = copy.deepcopy(G).cpu()(z, y)
    images = (G(z.to(ON), y.to(ON)).cpu() - theirs).abs().max()
    inception, x = metrics.Inception(inception_state()), ((theirs + 1) * 127.5).byte()
    features = inception(x)[0]
    off = ((inception.to(ON)(x.to(ON))[0].cpu() - features).abs().max() / features.abs().max()).item()
    report("images, Inception's features: largest difference", f"{images:.1g}, {off:.1g}")
    assert images < 1e-3 and off < 1e-4


@pytest.mark.parametrize("options", ["", "--precision fp16", "--r1 1", "--loss wgan-gp", "--micro-batch 4",
                                     "--ortho 0", "--augment translation --r1 1", "--augment colour,cutout"])
def gpu_a_step_never_waits_for_the_card(options):
    t, _ = trained(ON, "--model biggan32 --workers 0", options)
    real = train.batches(train.Shapes(32), t.s, 1, ON)
    next(real)
    if CARD:
        torch.cuda.set_sync_debug_mode("error")
    try:
        t.train_step(real)
    finally:
        if CARD:
            torch.cuda.set_sync_debug_mode("default")


def gpu_sigterm_to_torchrun_saves(tmp_path):
    options = f"--out {tmp_path} --steps 100000 --save-every 100000 --workers 2 --log-every 1"
    process = torchrun(1, HERE / "train.py", *TINY, options)
    wait_until((tmp_path / "log.jsonl").exists, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert steps_kept(tmp_path)


def gpu_speed_of_training():
    size, batches = ("--preset imagenet128", (32, 64, 128, 256)) if CARD else ("--preset shapes --ch 8", (8,))
    ways = itertools.product(["", "--fused-attention"], ["", "--compile"] if CARD else [""])
    for fused, compiled in ways:
        for batch in batches:
            options = f"{size} --batch {batch} --benchmark 10 {fused} {compiled}"
            output, error = run_command("train.py", options).communicate()
            report(options, output or error)
            if "memory ran out" in error:
                break
            assert "real images per second" in output
    if os.environ.get("PORT"):
        for precision in "port", "fp32", "bf16":
            call = f"training_rate({precision!r}, '--preset imagenet128 --batch 32', 5)"
            report(f"{precision}: images per second at 128x128, batch 32", f"{in_own_process(call):.1f}")


def gpu_largest_kernels():
    options = "--precision bf16 --model biggan128" + " --ch 96" * CARD
    t, _ = trained(ON, options)
    with torch.profiler.profile() as profile:
        t.train_step(some_images(t))
    column = "self_cuda_time_total" if CARD else "self_cpu_time_total"
    report("the largest kernels", profile.key_averages().table(sort_by=column, row_limit=5))


@pytest.mark.parametrize("model", ["biggan-deep-128", "biggan-deep-256"])
def gpu_speed_of_drawing(model):
    sample.pick_device()
    G = Generator(dataclasses.replace(MODELS[model], ch=128 if CARD else 8)).eval().requires_grad_(False)
    G = biggan.fold_spectral_norm(G).to(ON, memory_format=torch.channels_last)
    for batch in 1, 16:
        z, y = torch.randn(batch, 128), torch.arange(batch)
        seconds = median_seconds(lambda: sample.draw(G, z, y), 5, ON)
        report(f"{model}: images per second, {batch} at a time", f"{batch / seconds:.1f}")
