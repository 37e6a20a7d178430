"""The proofs. Each test's name is a statement about BigGAN; the body checks it against arithmetic one can do on paper, or against
torch's own version of the technique, which appears nowhere else in this project.

Order: the techniques as in biggan.py, then scores, data, runs, samples and weights, and what happens when things go wrong.
`make test` runs the functions named test_*; check_*, road_*, trial_*, peer_* and beside_* take longer, see the Makefile.
"""

import concurrent.futures
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
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import unittest.mock
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageFont
from torch import nn

os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()                       # before sample.py looks: tests neither use nor change the user's

import biggan
import metrics
import sample
import train
from biggan import (EMA, LOSSES, MODELS, BatchNorm, ConditionalBatchNorm, Discriminator, Generator, Moments, SelfAttention, SNConv2d,
                    SNEmbedding, SNLinear, SpectralNorm, clamp_sigma, gradient_penalty, hinge_loss_d, hinge_loss_g, orthogonal_penalty,
                    power_iteration, r1_penalty, sigma_excess, sigma_pull, singular_values, standing_statistics, truncated_normal)

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def close(a, b, atol=1e-6, rtol=1e-6):
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    torch.testing.assert_close(a, b, atol=atol, rtol=rtol)
    return True


def small(name="biggan32", **changes):
    """A model of the family, narrow enough for a test."""
    return dataclasses.replace(MODELS[name], **{"ch": 8, "n_classes": 4, **changes})


def parameters(module):
    return sum(p.numel() for p in module.parameters())


# ---------------------------------------------------------------- the numbers

def test_parameter_counts_are_the_published_ones():
    """To the unit where that is known, and to the digit that the paper prints. `pytest -s` shows the table."""
    table = [  # model, network, parameters, in millions as the paper prints them
        ("biggan128", Generator, 70_433_988, "70.4"),
        ("biggan128", Discriminator, 87_982_370, "88.0"),
        ("biggan256", Generator, 82_235_844, ""),
        ("biggan256", Discriminator, 99_225_890, ""),
        ("biggan-deep-128", Generator, 50_388_609, "50.4"),
        ("biggan-deep-128", Discriminator, 34_590_210, "34.6"),
        ("biggan-deep-256", Generator, 55_880_833, ""),
        ("biggan-deep-512", Generator, 56_163_905, "")]
    print(f"\n{'':34}{'here':>12}{'published':>12}{'printed':>9}")
    with torch.device("meta"):                  # shapes without memory
        for name, network, published, printed in table:
            here = parameters(network(MODELS[name]))
            print(f"{name + ', ' + network.__name__:34}{here:12,}{published:12,}{printed:>9}")
            assert here == published and printed in ("", f"{here / 1e6:.1f}")
        for row, printed in enumerate(["81.5", "81.5", "81.5", "81.5", "173.5", "160.6", "158.3", "158.3", "71.3"], start=1):
            config = train.model_config(train.parse_settings(["--preset", f"table1-row{row}", "--data", "x"]), n_classes=1000)
            # Table 1 counts G and D, without the shared class vectors.
            here = parameters(Generator(config)) + parameters(Discriminator(config)) - config.n_classes * config.shared_dim
            print(f"{f'table 1, row {row}, both':34}{here:12,}{'':12}{printed:>9}")
            assert f"{here / 1e6:.1f}" == printed


def test_g_at_256_pixels_with_attention_where_table_5_has_it_is_smaller():
    # Attention over C channels has 2 C^2/8 + 2 C^2/2 weights and gamma. At 64 pixels C = 4 * 96, at 128 pixels C = 2 * 96.
    with torch.device("meta"):
        other = parameters(Generator(dataclasses.replace(MODELS["biggan256"], g_attention=128)))
    assert 82_235_844 - other == 1.25 * ((4 * 96)**2 - (2 * 96)**2)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_draws_judges_and_learns_at_its_true_resolution(name):
    config = small(name)
    G, D = Generator(config), Discriminator(config)
    for network in G, D:
        if hasattr(network, "attention"):
            nn.init.constant_(network.attention.gamma, 0.5)             # at its first value, 0, nothing reaches the other weights
    y = torch.tensor([1, 3])
    x = G(torch.randn(2, config.z_dim), y)
    assert x.shape == (2, 3, config.resolution, config.resolution) and x.dtype == torch.float32 and x.abs().max() <= 1
    logits = D(x, y)
    assert logits.shape == (2,)
    before = {p: p.detach().clone() for network in (G, D) for p in network.parameters()}
    logits.square().sum().backward()
    for n, network in ("G", G), ("D", D):
        for p_name, p in network.named_parameters():
            # What a convolution's bias adds to a channel, a later batch norm takes away again: its gradient is zero but for rounding.
            idle = n == "G" and re.search(r"blocks.*conv\w+\.bias", p_name)
            assert p.grad.isfinite().all() and (idle or p.grad.abs().sum() > 0), (n, p_name)
        torch.optim.Adam(network.parameters(), 1e-3).step()
        for p_name, p in network.named_parameters():
            assert p.isfinite().all() and (p.grad.abs().sum() == 0 or not torch.equal(p, before[p])), (n, p_name)
    # With fixed statistics in the norms the biases do count, each of them.
    G.eval().zero_grad()
    D(G(torch.randn(2, config.z_dim), y), y).square().sum().backward()
    for p_name, p in G.named_parameters():
        assert p.grad.isfinite().all() and p.grad.abs().sum() > 0, p_name


def test_a_configuration_that_cannot_work_is_refused():
    with pytest.raises(ValueError, match="64 pixels, not 128"):
        dataclasses.replace(MODELS["biggan64"], resolution=128)
    with pytest.raises(ValueError, match="125 could"):
        dataclasses.replace(MODELS["biggan64"], z_dim=128)
    with pytest.raises(ValueError, match=r"one of \[8, 16, 32, 64, 128\]"):
        dataclasses.replace(MODELS["biggan128"], g_attention=48)
    with pytest.raises(ValueError, match="needs skip_z and deep to be False"):
        dataclasses.replace(MODELS["biggan128"], shared_dim=0)
    with pytest.raises(ValueError, match="skip_z must be False"):
        dataclasses.replace(MODELS["biggan128"], deep=True)
    with pytest.raises(ValueError, match="needs skip_z and deep to be False"):
        dataclasses.replace(MODELS["biggan-deep-128"], shared_dim=0)
    with pytest.raises(ValueError, match="never grow"):
        dataclasses.replace(MODELS["biggan-deep-128"], g_channels=(16, 8, 16, 4, 2, 1))
    with pytest.raises(ValueError, match="rgb_filters"):
        dataclasses.replace(MODELS["biggan128"], rgb_filters=1)


def test_weights_begin_orthogonal_and_biases_zero():
    D = Discriminator(small())
    W = D.blocks[1].conv1.weight.flatten(1)                             # 32 filters of 288 inputs: W W^T = I
    close(W @ W.T, torch.eye(32), 1e-5)
    assert not D.blocks[1].conv1.bias.any()


# ---------------------------------------------------------------- spectral norm

def test_power_iteration_finds_the_largest_entry_of_a_diagonal_matrix():
    sigma, u, v = power_iteration(torch.diag(torch.tensor([1.0, 5.0, 2.0])), torch.ones(3), steps=30)
    close(sigma, 5)
    close(u.abs(), [0, 1, 0])
    close(v.abs(), [0, 1, 0])


def test_rank_one_converges_in_one_step():
    # W = a b^T: whatever u is, W^T u is a multiple of b, so v = b / |b|, u = a / |a| and sigma = |a| |b|.
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0, 2.0])
    close(power_iteration(torch.outer(a, b), torch.randn(2), steps=1)[0], 5 * 3)


def test_the_error_shrinks_as_the_ratio_of_singular_values_to_the_power_4():
    # diag(s1, s2), u = (1, 1): after k steps u ~ (s1^2k, s2^2k), and sigma = |W v| with v ~ W^T u_before = (s1^(2k-1), s2^(2k-1)):
    # sigma^2 = (s1^4k + s2^4k) / (s1^(4k-2) + s2^(4k-2)).
    s1, s2 = 2.0, 1.5
    for k in (1, 2, 5):
        W = torch.diag(torch.tensor([s1, s2], dtype=torch.float64))
        sigma, *_ = power_iteration(W, torch.ones(2, dtype=torch.float64), steps=k)
        close(sigma, math.sqrt((s1**(4*k) + s2**(4*k)) / (s1**(4*k - 2) + s2**(4*k - 2))), 1e-12)


def test_the_angle_to_the_right_direction_shrinks_as_the_squared_ratio_per_step():
    # Each step multiplies the two components of u by s1^2 and s2^2: tan(angle) is multiplied by (s2 / s1)^2.
    W, s1, s2, tangent = torch.diag(torch.tensor([2.0, 1.5], dtype=torch.float64)), 2.0, 1.5, 7.0
    for k in (1, 3, 10):
        _, u, _ = power_iteration(W, torch.tensor([1.0, tangent], dtype=torch.float64), steps=k)
        close(u[1] / u[0], tangent * (s2 / s1)**(2 * k), 1e-12)


def test_an_orthogonal_matrix_has_norm_one_at_once():
    close(power_iteration(nn.init.orthogonal_(torch.empty(6, 6)), torch.randn(6))[0], 1)


def test_the_gradient_through_the_norm_is_the_closed_form():
    # d <L, W / sigma> / dW = (L - <L, W / sigma> u v^T) / sigma, with u and v as constants.
    layer = SNLinear(3, 4, 1e-12).double()
    layer.u.copy_(torch.linalg.svd(layer.weight)[0][:, 0])
    L = torch.randn(4, 3, dtype=torch.float64)
    normalized = layer.normalized_weight()
    (normalized * L).sum().backward()
    W = layer.weight.detach()
    U, S, Vh = torch.linalg.svd(W)
    close(normalized, W / S[0])
    close(layer.weight.grad, (L - (L * W / S[0]).sum() * torch.outer(U[:, 0], Vh[0])) / S[0], 1e-10)


def test_a_normalised_matrix_stretches_no_vector_and_one_not_at_all():
    layer = SNLinear(6, 4, 1e-12, bias=False).double()
    nn.init.normal_(layer.weight)
    for _ in range(300):
        layer.normalized_weight()
    x = F.normalize(torch.randn(1000, 6, dtype=torch.float64))
    v = torch.linalg.svd(layer.weight)[2][:1]
    assert layer(x).norm(dim=1).max() <= 1
    close(layer(v).norm(), 1)


def test_spectral_norm_equals_torchs():
    ours, theirs = SNConv2d(3, 5, 3, 1e-12), nn.Conv2d(3, 5, 3, padding=1)
    theirs.load_state_dict({"weight": ours.weight, "bias": ours.bias})
    theirs = nn.utils.parametrizations.spectral_norm(theirs, n_power_iterations=30)
    x = torch.randn(2, 3, 8, 8)
    for _ in range(200):
        ours.normalized_weight()
    a, b = ours(x), theirs(x)
    close(a, b, 1e-5)
    g = torch.randn_like(a)
    a.backward(g), b.backward(g)
    close(ours.weight.grad, theirs.parametrizations.weight.original.grad, 1e-4)


@pytest.mark.parametrize("layer, x", [(SNConv2d(3, 5, 3, 1e-4), torch.randn(1, 3, 4, 4)), (SNLinear(3, 5, 1e-4), torch.randn(1, 3)),
                                      (SNEmbedding(5, 3, 1e-4), torch.tensor([2]))])
def test_u_moves_in_training_only_and_is_saved(layer, x):
    before = layer.state_dict()["u"].clone()
    layer.eval()(x)
    assert torch.equal(layer.u, before)
    layer.train()(x)
    assert not torch.equal(layer.u, before)
    close(layer.u.norm(), 1)
    assert torch.equal(layer.u, power_iteration(layer.weight.flatten(1), before, steps=1, eps=1e-4)[1])     # one step per pass


def test_without_eps_there_is_no_spectral_norm():
    layer = SNLinear(3, 5, None)
    assert layer.normalized_weight() is layer.weight


def test_spectral_norm_is_computed_in_float32_under_autocast():
    layer = SNLinear(64, 64, 1e-4).eval()
    plain = layer.normalized_weight()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.normalized_weight(), plain)


# ---------------------------------------------------------------- resampling folded into a convolution

def test_upsampling_then_3x3_is_one_transposed_4x4():
    x, layer = torch.randn(2, 3, 6, 8, dtype=torch.float64), SNConv2d(3, 5, 3, None).double()
    for _ in range(3):
        close(biggan.upsample_conv3x3(x, layer), layer(biggan.upsample(x)), 1e-12)
        biggan.fold_spectral_norm(layer)                                # from then on the 4x4 kernel is kept
    assert layer.kernel.shape == (3, 5, 4, 4) and "kernel" not in layer.state_dict()


def test_3x3_then_pooling_is_one_strided_4x4():
    x, layer = torch.randn(2, 3, 6, 8, dtype=torch.float64), SNConv2d(3, 5, 3, None).double()
    close(biggan.conv3x3_downsample(x, layer), F.avg_pool2d(layer(x), 2), 1e-12)


def test_four_copies_of_a_point_are_a_square():
    W = torch.zeros(1, 1, 3, 3)
    W[0, 0, 1, 1] = 1
    close(4 * biggan.mean_of_four_shifted(W)[0, 0], [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]])


def test_pooling_undoes_upsampling_and_1x1_commutes_with_both():
    x, W = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randn(5, 3, 1, 1, dtype=torch.float64)
    close(F.avg_pool2d(biggan.upsample(x), 2), x)
    close(F.conv2d(biggan.upsample(x), W), biggan.upsample(F.conv2d(x, W)))
    close(F.conv2d(F.avg_pool2d(x, 2), W), F.avg_pool2d(F.conv2d(x, W), 2))


def test_the_blocks_are_the_papers():
    """The folded blocks against the blocks as tables 4 and 5 draw them, one operation at a time."""
    config = small()
    x, c = torch.randn(2, 8, 8, 8), torch.randn(2, config.c_dim)
    g = biggan.GBlock(8, 16, config).eval()
    h = g.conv1(biggan.upsample(F.relu(g.bn1(x, c))))
    close(g(x, c), g.conv2(F.relu(g.bn2(h, c))) + g.conv_sc(biggan.upsample(x)), 1e-5)
    d = biggan.DBlock(8, 16, first=False, down=True, config=config).eval()
    close(d(x), F.avg_pool2d(d.conv2(F.relu(d.conv1(F.relu(x)))) + d.conv_sc(x), 2), 1e-5)
    first = biggan.DBlock(8, 16, first=True, down=True, config=config).eval()
    close(first(x), F.avg_pool2d(first.conv2(F.relu(first.conv1(x))), 2) + first.conv_sc(F.avg_pool2d(x, 2)), 1e-5)
    plain = biggan.DBlock(8, 8, first=False, down=False, config=config).eval()
    close(plain(x), plain.conv2(F.relu(plain.conv1(F.relu(x)))) + x, 1e-5)


def test_the_deep_blocks_are_the_papers():
    """Tables 7 to 9 and figure 16, one operation at a time: a bottleneck, and shortcuts that drop or add channels."""
    config = small("biggan-deep-128")
    x, c = torch.randn(2, 16, 8, 8), torch.randn(2, config.c_dim)
    for up, out in ((False, 16), (True, 16), (True, 8)):
        g = biggan.DeepGBlock(16, out, up, config).eval()
        resize = biggan.upsample if up else lambda x: x
        h = g.conv1(F.relu(g.bn1(x, c)))
        assert h.shape[1] == 16 // 4                                    # a quarter of what comes in
        h = g.conv2(resize(F.relu(g.bn2(h, c))))
        h = g.conv4(F.relu(g.bn4(g.conv3(F.relu(g.bn3(h, c))), c)))
        close(g(x, c), h + resize(x)[:, :out], 1e-5)
    for down, out in ((False, 16), (True, 16), (True, 32)):
        d = biggan.DeepDBlock(16, out, down, config).eval()
        resize = (lambda x: F.avg_pool2d(x, 2)) if down else lambda x: x
        h = d.conv1(F.relu(x))
        assert h.shape[1] == out // 4                                   # a quarter of what goes out
        h = d.conv4(resize(F.relu(d.conv3(F.relu(d.conv2(F.relu(h)))))))
        shortcut = resize(x) if out == 16 else torch.cat([resize(x), d.conv_sc(resize(x))], 1)
        close(d(x), h + shortcut, 1e-5)


# ---------------------------------------------------------------- batch norm

def test_two_opposite_samples_become_plus_and_minus_one():
    # Mean 0, variance a^2: a / sqrt(a^2 + eps) = 1 / sqrt(1 + eps / a^2).
    a, eps = 3.0, 0.5
    x = torch.tensor([a, -a]).reshape(2, 1, 1, 1)
    y = BatchNorm(1, eps)(x).flatten()
    close(y, [1 / math.sqrt(1 + eps / a**2), -1 / math.sqrt(1 + eps / a**2)])


def test_batch_norm_equals_torchs_in_values_gradients_and_running_averages():
    ours, theirs = BatchNorm(3, 1e-4).double(), nn.BatchNorm2d(3, 1e-4).double()
    with torch.no_grad():
        for name in ("gain", "bias"):
            getattr(ours, name).copy_(torch.randn(3))
        theirs.weight.copy_(ours.gain), theirs.bias.copy_(ours.bias)
    x = (5 + 2 * torch.randn(4, 3, 5, 5, dtype=torch.float64)).requires_grad_()
    x2 = x.detach().clone().requires_grad_()
    g = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    for _ in range(3):
        a, b = ours(x), theirs(x2)
    close(a, b, 1e-10)
    a.backward(g), b.backward(g)
    for one, other in ((x.grad, x2.grad), (ours.gain.grad, theirs.weight.grad), (ours.bias.grad, theirs.bias.grad),
                       (ours.running_mean, theirs.running_mean), (ours.running_var, theirs.running_var)):
        close(one, other, 1e-10)
    close(ours.eval()(x), theirs.eval()(x2), 1e-10)


def test_the_derivative_of_the_moments_is_that_of_finite_differences():
    assert torch.autograd.gradcheck(Moments.apply, torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True))


def test_moments_of_bfloat16_are_taken_in_float32():
    x = (100 + torch.randn(64, 2, 16, 16)).bfloat16()
    mean, var = Moments.apply(x)
    assert mean.dtype == var.dtype == torch.float32
    close(mean, x.double().mean((0, 2, 3)), 1e-4)
    close(var, x.double().var((0, 2, 3), correction=0), 1e-3)


def test_running_averages_follow_the_geometric_sum():
    # Each step keeps 0.9 of the average and adds 0.1 of the batch's m: after n equal batches (1 - 0.9^n) m, from 0.
    bn, x = BatchNorm(1, 1e-4), torch.tensor([6.0, 8.0]).reshape(2, 1, 1, 1)
    for _ in range(5):
        bn(x)
    close(bn.running_mean, [(1 - 0.9**5) * 7])
    close(bn.running_var, [0.9**5 + (1 - 0.9**5) * 2])


def conditional(channels, c_dim, eps=1e-4, **changes):
    return ConditionalBatchNorm(channels, small(shared_dim=c_dim, skip_z=False, bn_eps=eps, **changes))


def test_the_condition_sets_gain_and_bias():
    bn, x = conditional(2, 3, eps=1e-8), torch.randn(64, 2, 8, 8)
    plain = BatchNorm(2, 1e-8)(x)
    close(bn(x, torch.zeros(64, 3)), plain, 1e-5)                       # c = 0: gain 1, bias 0
    c = torch.randn(1, 3).expand(64, 3)
    bn.eval().training = True                                           # its two linear layers stay in eval mode: u rests
    y = bn(x, c)
    gain, bias = 1 + bn.gain.normalized_weight() @ c[0], bn.bias.normalized_weight() @ c[0]
    close(y.std((0, 2, 3), correction=0), gain.abs(), 1e-4)             # the gain is the new standard deviation
    close(y.mean((0, 2, 3)), bias, 1e-4)


def test_conditional_batch_norm_equals_torchs_in_values_and_gradients():
    # torch's batch norm without gain and bias, then a gain and a bias per image; u rests, so that both see the same weights.
    ours = conditional(3, 5).double().eval()
    ours.training = True
    x, c = 5 + 2 * torch.randn(4, 3, 5, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    x2, c2 = x.clone().requires_grad_(), c.clone().requires_grad_()
    x, c, g = x.requires_grad_(), c.requires_grad_(), torch.randn(4, 3, 5, 5, dtype=torch.float64)
    gain, bias = 1 + c2 @ ours.gain.normalized_weight().T, c2 @ ours.bias.normalized_weight().T
    plain = F.batch_norm(x2, None, None, training=True, eps=1e-4)
    a, b = ours(x, c), plain * gain[:, :, None, None] + bias[:, :, None, None]
    close(a, b, 1e-10)
    close(torch.cat([v.flatten() for v in torch.autograd.grad(a, (x, c, ours.gain.weight, ours.bias.weight), g)]),
          torch.cat([v.flatten() for v in torch.autograd.grad(b, (x2, c2, ours.gain.weight, ours.bias.weight), g)]), 1e-5)


def test_a_class_table_is_a_linear_layer_of_the_one_hot_class():
    bn, x, y = conditional(2, 0), torch.randn(4, 2, 8, 8), torch.tensor([0, 3, 3, 1])
    one_hot = F.one_hot(y, 4).float()
    gain, bias = 1 + one_hot @ bn.gain.weight, one_hot @ bn.bias.weight
    close(bn(x, y), BatchNorm(2, 1e-4)(x) * gain[:, :, None, None] + bias[:, :, None, None], 1e-5)


# ---------------------------------------------------------------- self-attention

def attention(C=16):
    layer = SelfAttention(C, 1e-4).eval()
    nn.init.constant_(layer.gamma, 0.7)
    return layer, torch.randn(2, C, 8, 8)


def test_attention_begins_as_the_identity():
    x = torch.randn(2, 16, 8, 8)
    assert torch.equal(SelfAttention(16, 1e-4)(x), x)


def test_without_questions_everybody_is_heard_equally():
    # theta = 0 makes all scores 0, all weights 1 / (HW / 4), and the answer the mean of the pooled g, at every position.
    layer, x = attention()
    nn.init.zeros_(layer.theta.weight)
    mean = F.max_pool2d(layer.g(x), 2).mean((2, 3), keepdim=True).expand(-1, -1, 8, 8)
    close(layer(x), x + 0.7 * layer.o(mean), 1e-5)


def test_one_dominant_answer_is_copied_everywhere():
    # theta asks everywhere with channel 0, which is 1; phi answers with channel 1, which is 60 in one place: exp(60) against exp(0).
    layer, x = attention()
    for part, channel in ((layer.theta, 0), (layer.phi, 1)):
        part.weight.data.zero_()[0, channel] = 1
        part.u.copy_(torch.tensor([1.0, 0.0]))
    x[:, 0], x[:, 1], x[:, 1, 5, 2] = 1, 0, 60
    value = F.max_pool2d(layer.g(x), 2)[:, :, 2:3, 1:2].expand(-1, -1, 8, 8)    # the pooled cell that holds row 5, column 2
    close(layer(x), x + 0.7 * layer.o(value), 1e-5)


def test_attention_equals_torchs_with_scale_one():
    layer, x = attention()
    q = layer.theta(x).flatten(2).mT
    k, v = (F.max_pool2d(part(x), 2).flatten(2).mT for part in (layer.phi, layer.g))
    heard = F.scaled_dot_product_attention(q, k, v, scale=1.0).mT.reshape(2, 8, 8, 8)
    close(layer(x), x + 0.7 * layer.o(heard), 1e-5)


def test_attention_does_not_know_where_things_are():
    # Moving whole 2x2 cells (which the pooling keeps together) moves the output alike: here, halves of the picture swap.
    layer, x = attention()
    close(layer(x.roll(4, dims=3)), layer(x).roll(4, dims=3), 1e-5)
    assert not torch.allclose(layer(x.roll(1, dims=3)), layer(x).roll(1, dims=3), atol=1e-3)


# ---------------------------------------------------------------- generator and discriminator

def test_projection_is_a_scalar_product_with_the_class_vector():
    # D(x, y) - D(x, y') = <e_y - e_y', h>
    D = Discriminator(small()).eval()
    x, h = torch.randn(2, 3, 32, 32), []
    D.linear.register_forward_hook(lambda module, inputs, output: h.append(inputs[0]))
    difference = D(x, torch.tensor([0, 0])) - D(x, torch.tensor([3, 3]))
    E = D.embed.normalized_weight()
    close(difference, h[0] @ (E[0] - E[3]), 1e-4)


def test_permuting_classes_permutes_the_logits():
    D, order = Discriminator(small()).eval(), torch.tensor([2, 0, 3, 1])
    x = torch.randn(1, 3, 32, 32).expand(4, -1, -1, -1)
    before = D(x, torch.arange(4))
    with torch.no_grad():
        D.embed.weight.copy_(D.embed.weight[order])
        D.embed.u.copy_(D.embed.u[order])
    close(D(x, torch.arange(4)), before[order], 1e-5)
    assert before.std() > 1e-3


def test_d_is_its_blocks_then_relu_sum_and_projection():
    D, x, y = Discriminator(small()).eval(), torch.randn(2, 3, 32, 32), torch.tensor([0, 2])
    assert [block.first for block in D.blocks] == [True, False, False, False]
    assert [block.down for block in D.blocks] == [True, True, False, False]
    h = x
    for block in D.blocks:
        h = block(h)
    h = h.clamp(min=0).flatten(2).sum(2)                                # sum, not mean, over the positions
    close(D(x, y), D.linear(h)[:, 0] + (D.embed.normalized_weight()[y] * h).sum(1), 1e-4)


def test_g_is_a_linear_layer_its_blocks_norm_relu_conv_tanh():
    G, z, y = Generator(small()).eval(), torch.randn(2, 128), torch.tensor([0, 2])
    assert type(G.shared) is nn.Embedding                               # no spectral norm on the class vectors
    h = G.linear(z[:, :32]).reshape(2, 32, 4, 4)
    for i, block in enumerate(G.blocks):
        h = block(h, torch.cat([G.shared.weight[y], z[:, 32 * (i + 1):32 * (i + 2)]], 1))
    close(G(z, y), G.to_rgb(G.output_norm(h).clamp(min=0)).tanh(), 1e-5)


def test_the_deep_generator_gives_all_of_z_and_the_class_to_every_layer():
    G, z, y = Generator(small("biggan-deep-128")).eval(), torch.randn(2, 128), torch.tensor([0, 2])
    c = torch.cat([z, G.shared.weight[y]], 1)                           # (2, 256): z first
    h = G.linear(c).reshape(2, 128, 4, 4)
    assert [block.up for block in G.blocks] == [False, True] * 5
    for i, block in enumerate(G.blocks):
        h = block(h, c)
        if i == 7:                                                      # 64x64 is reached
            h = G.attention(h)
    assert G.to_rgb.weight.shape[0] == 128                              # of whose results three are used
    close(G(z, y), G.to_rgb(G.output_norm(h).clamp(min=0))[:, :3].tanh(), 1e-5)


def test_the_deep_discriminator_is_a_convolution_its_blocks_and_the_projection():
    D, x, y = Discriminator(small("biggan-deep-128")).eval(), torch.randn(2, 3, 128, 128), torch.tensor([0, 2])
    assert [block.down for block in D.blocks] == [True, False] * 5
    h = D.from_rgb(x)
    for i, block in enumerate(D.blocks):
        h = block(h)
        if i == 1:                                                      # 64x64, both blocks
            h = D.attention(h)
    h = h.clamp(min=0).flatten(2).sum(2)
    close(D(x, y), D.linear(h)[:, 0] + (D.embed.normalized_weight()[y] * h).sum(1), 1e-4)


def test_sngan_has_a_narrow_d_no_attention_and_no_spectral_norm_in_g():
    G, D = Generator(small("sngan128")), Discriminator(small("sngan128"))
    assert [tuple(block.conv1.weight.shape[:2]) for block in D.blocks] == [(8, 3), (8, 8), (16, 16), (32, 32), (64, 64), (128, 128)]
    assert [block.conv2.weight.shape[0] for block in D.blocks] == [8, 16, 32, 64, 128, 128]
    assert not hasattr(G, "attention") and not hasattr(D, "attention")
    assert all(m.normalized_weight() is m.weight for m in G.modules() if isinstance(m, SpectralNorm))
    assert not any(m.normalized_weight() is m.weight for m in D.modules() if isinstance(m, SpectralNorm))


def test_sagan_has_a_class_table_per_layer_and_gives_all_of_z_to_the_first():
    G, z, y = Generator(small("sagan128")).eval(), torch.randn(2, 128), torch.tensor([0, 2])
    assert not hasattr(G, "shared") and G.linear.in_features == 128 and G.blocks[0].bn1.gain.weight.shape == (4, 128)
    h = G.linear(z).reshape(2, 128, 4, 4)
    for i, block in enumerate(G.blocks):
        h = block(h, y)
        if i == 3:
            h = G.attention(h)
    close(G(z, y), G.to_rgb(G.output_norm(h).clamp(min=0)).tanh(), 1e-5)
    with pytest.raises(ValueError, match="y must be class indices"):
        G(z, torch.randn(2, 128))
    with pytest.raises(ValueError):                                     # a chunk too many is not ignored
        Generator(small())(torch.randn(2, 160), y)
    shared = Generator(small("sagan128", shared_dim=12)).eval()         # row 6 of table 1: class vectors, no skip-z
    close(shared(z, shared.shared(y)), shared(z, y))
    assert shared.blocks[0].bn1.gain.in_features == 12 and shared.linear.in_features == 128


def test_attention_sits_where_the_table_says():
    for name, g_size, d_size in (("biggan128", 64, 64), ("biggan256", 64, 64), ("shapes32", 16, 16), ("biggan-deep-256", 64, 64),
                                 ("sagan128", 64, 64)):
        config, sizes = small(name), []
        G, D = Generator(config).eval(), Discriminator(config).eval()
        for network in G, D:
            network.attention.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape[-1]))
        D(G(torch.randn(1, config.z_dim), torch.tensor([0])), torch.tensor([0]))
        assert sizes == [g_size, d_size]


def test_a_chunk_of_z_only_reaches_its_block():
    config = small("biggan64", z_dim=20)
    G, seen = Generator(config).eval(), []
    for block in G.blocks:
        block.register_forward_hook(lambda module, inputs, output: seen.append(output))
    z, y = torch.randn(1, 20), torch.tensor([0])
    G(z, y)
    z[:, 12:16] += 1                                                    # chunk 3 belongs to the third block
    G(z, y)
    before, after = seen[:4], seen[4:]
    assert [torch.equal(a, b) for a, b in zip(before, after)] == [True, True, False, False]


def test_embedded_labels_equal_labels_and_may_lie_between_classes():
    G = Generator(small()).eval()
    z, y = torch.randn(2, 128), torch.tensor([0, 3])
    close(G(z, G.shared(y)), G(z, y))
    assert G(z, G.shared(y).mean(0, keepdim=True).expand(2, -1)).isfinite().all()


# ---------------------------------------------------------------- losses

def test_hinge_losses_on_paper():
    real, fake = torch.tensor([2.0, 0.5], requires_grad=True), torch.tensor([-3.0, 0.0], requires_grad=True)
    loss = hinge_loss_d(real, fake)                                     # (0 + 0.5) / 2 + (0 + 1) / 2
    close(loss, 0.75)
    loss.backward()
    close(real.grad, [0, -0.5])                                         # beyond the margin there is nothing to gain
    close(fake.grad, [0, 0.5])
    close(hinge_loss_g(fake), 1.5)


@pytest.mark.parametrize("name, best", [
    ("hinge", lambda p, q: math.copysign(1, p - q)),
    ("non-saturating", lambda p, q: math.log(p / q)),                   # -p log s(d) - q log(1 - s(d)): s(d) = p / (p + q)
    ("least-squares", lambda p, q: p / (p + q)),                        # p (d - 1)^2 + q d^2
])
def test_on_two_points_the_best_d_is_known(name, best):
    # Of 8 real images 5 are at the first point, of 8 generated ones 2. D is two free numbers: the loss is least at best(p, q), and
    # higher a little to each side of it.
    counts = [(5, 2), (3, 6)]
    d = torch.tensor([best(p, q) for p, q in counts], dtype=torch.float64)

    def loss(d):
        real, fake = (torch.cat([d[k].expand(counts[k][side]) for k in (0, 1)]) for side in (0, 1))
        return LOSSES[name][0](real, fake)
    for k in (0, 1):
        for step in (0.1, -0.1):
            assert loss(d + step * F.one_hot(torch.tensor(k), 2)) > loss(d) + 1e-4
    if name != "hinge":                                                 # whose best is at a kink
        d.requires_grad_()
        close(torch.autograd.grad(loss(d), d)[0], [0, 0])


def test_wgan_gps_best_slope_on_two_points():
    # Real at a, generated at 0, D(x) = w x: loss -w a + weight (w - 1)^2, least at w = 1 + a / (2 weight).
    a, weight = 3.0, 10.0
    w = torch.tensor(1 + a / (2 * weight), requires_grad=True)
    D, y = lambda x, y: w * x.flatten(), torch.zeros(1, dtype=torch.long)
    real, fake, mix = torch.full((1, 1, 1, 1), a), torch.zeros(1, 1, 1, 1), torch.rand(1)
    loss = LOSSES["wgan-gp"][0](D(real, y), D(fake, y)) + weight * gradient_penalty(D, real, fake, y, mix)
    close(loss, -w * a + weight * (w - 1)**2, 1e-5)
    close(torch.autograd.grad(loss, w)[0], 0, 1e-5)


@pytest.mark.parametrize("name, slope", [("hinge", lambda d: -1), ("wgan-gp", lambda d: -1), ("least-squares", lambda d: d - 1),
                                         ("non-saturating", lambda d: -1 / (1 + math.exp(d)))])
def test_gs_losses_push_the_logits_up(name, slope):
    d = torch.tensor([-1.5, 0.3], requires_grad=True)
    LOSSES[name][1](d).backward()
    close(d.grad, [slope(-1.5) / 2, slope(0.3) / 2])


def test_losses_equal_torchs():
    real, fake = torch.randn(7), torch.randn(5)
    entropy = F.binary_cross_entropy_with_logits
    close(LOSSES["non-saturating"][0](real, fake), entropy(real, torch.ones(7)) + entropy(fake, torch.zeros(5)))
    close(LOSSES["non-saturating"][1](fake), entropy(fake, torch.ones(5)))
    close(LOSSES["least-squares"][0](real, fake), (F.mse_loss(real, torch.ones(7)) + F.mse_loss(fake, torch.zeros(5))) / 2)
    close(LOSSES["least-squares"][1](fake), F.mse_loss(fake, torch.ones(5)) / 2)
    margin = nn.MultiMarginLoss(margin=2)                               # of scores (d, -d): max(0, 2 - 2 d) / 2 for class 0
    close(hinge_loss_d(real, fake), margin(torch.stack([real, -real], 1), torch.zeros(7, dtype=torch.long))
          + margin(torch.stack([fake, -fake], 1), torch.ones(5, dtype=torch.long)))


# ---------------------------------------------------------------- penalties

def test_r1_of_a_linear_d_is_half_its_squared_slope():
    # D(x) = <w, x> + b: the gradient is w everywhere.
    w = torch.randn(3, 4, 4, requires_grad=True)
    x, y = torch.randn(5, 3, 4, 4), torch.zeros(5, dtype=torch.long)
    penalty = r1_penalty(lambda x, y: (w * x).sum((1, 2, 3)) + 3, x, y)
    close(penalty, w.square().sum() / 2, 1e-5)
    close(torch.autograd.grad(penalty, w)[0], w, 1e-5)                  # and it can be differentiated itself
    # The gradient penalty of the same D: (|w| - 1)^2, wherever on the lines.
    close(gradient_penalty(lambda x, y: (w * x).sum((1, 2, 3)), x, -x, y, torch.rand(5)), (w.norm() - 1)**2, 1e-5)


def test_r1_of_a_quadratic_d_is_the_mean_of_its_squared_gradients():
    # D(x) = x A x / 2 with symmetric A: the gradient is A x.
    A, x, y = torch.randn(12, 12), torch.randn(5, 3, 2, 2), torch.zeros(5, dtype=torch.long)
    A = A + A.T
    D = lambda x, y: torch.einsum("ni,ij,nj->n", x.flatten(1), A, x.flatten(1)) / 2
    close(r1_penalty(D, x, y), (x.flatten(1) @ A).square().sum(1).mean() / 2, rtol=1e-5)
    # The gradient penalty looks between the two sets: all the way at the generated end with mix 1, at the real end with mix 0.
    fake = torch.randn(5, 3, 2, 2)
    for mix, where in ((0.0, x), (1.0, fake), (0.25, 0.75 * x + 0.25 * fake)):
        close(gradient_penalty(D, x, fake, y, torch.full((5,), mix)), ((where.flatten(1) @ A).norm(dim=1) - 1).square().mean(), rtol=1e-4)


def test_r1_of_the_real_d_equals_torchs_jacobian_and_finite_differences():
    D = Discriminator(small("shapes32")).double().eval()
    nn.init.constant_(D.attention.gamma, 0.5)
    x, y = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.tensor([0, 2])
    jacobian = torch.autograd.functional.jacobian(lambda x: D(x, y), x)         # (2, 2, 3, 32, 32): image i's logit by image j
    assert not jacobian[0, 1].any()
    penalty = r1_penalty(D, x, y)
    close(penalty, (jacobian[0, 0].square().sum() + jacobian[1, 1].square().sum()) / 4, 1e-9)
    W, direction, h = D.blocks[1].conv1.weight, torch.randn_like(D.blocks[1].conv1.weight), 1e-6
    slope = (torch.autograd.grad(penalty, W)[0] * direction).sum()
    values = []
    for side in (h, -h):
        with torch.no_grad():
            W += side * direction
        values.append(r1_penalty(D, x, y).detach())
        with torch.no_grad():
            W -= side * direction
    close((values[0] - values[1]) / (2 * h), slope, rtol=1e-3)


@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_a_linear_gan_circles_its_target_for_ever_and_spirals_in_under_r1(gamma):
    """After the Dirac-GAN (Mescheder et al. 2018), once per class: real images mu_y + z, G(z, y) = theta_y + z, D(x, y) = psi_y x.

    In steps that are infinitely small (here: Runge-Kutta) the error e = theta - mu and psi obey, with time in units of two,
    e' = psi and psi' = -e - gamma psi: a pendulum that only friction stops. One whole turn takes 2 pi."""
    mu, z, y = torch.tensor([2.0, -2.0], dtype=torch.float64), torch.tensor([1.0, -1.0, 1.0, -1.0]), torch.tensor([0, 0, 1, 1])
    loss_d, loss_g, _ = LOSSES["wgan-gp"]

    def velocity(state):                                                # minus the gradients of the two losses
        theta, psi = (part.clone().requires_grad_() for part in state)
        D = lambda x, y: psi[y] * x.flatten()
        real, fake = (mu[y] + z).reshape(4, 1, 1, 1), (theta[y] + z).reshape(4, 1, 1, 1)
        g = loss_g(D(fake, y))
        d = loss_d(D(real, y), D(fake.detach(), y)) + gamma * r1_penalty(D, real, y)
        return -torch.stack([torch.autograd.grad(g, theta)[0], torch.autograd.grad(d, psi)[0]])
    start = torch.tensor([[1.0, 0.5], [0.0, 1.0]], dtype=torch.float64)         # errors, and psi
    state, h = start + torch.stack([mu, 0 * mu]), 2 * 2 * math.pi / 400
    radius = []
    for _ in range(400):
        k1 = velocity(state)
        k2 = velocity(state + h / 2 * k1)
        k3 = velocity(state + h / 2 * k2)
        k4 = velocity(state + h * k3)
        state = state + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        radius.append((state - torch.stack([mu, 0 * mu])).norm(dim=0))
    law = torch.tensor([[0.0, 1.0], [-1.0, -gamma]], dtype=torch.float64)
    close(state - torch.stack([mu, 0 * mu]), torch.matrix_exp(2 * math.pi * law) @ start, 1e-5)
    if gamma == 0:
        close(torch.stack(radius), start.norm(dim=0).expand(400, 2), 1e-6)      # a circle
    else:
        assert (radius[-1] < 0.1 * start.norm(dim=0)).all()


def test_two_filters_at_an_angle_cost_twice_their_product_squared():
    # W W^T = [[p^2, pq cos a], [pq cos a, q^2]]: off the diagonal 2 (p q cos a)^2.
    p, q, a = 2.0, 3.0, 0.7
    W = torch.tensor([[p, 0.0], [q * math.cos(a), q * math.sin(a)]])    # rows are filters
    close(orthogonal_penalty(W), 2 * (p * q * math.cos(a))**2, 1e-4)
    close(orthogonal_penalty(W, off_diagonal=False), 2 * (p * q * math.cos(a))**2 + (p**2 - 1)**2 + (q**2 - 1)**2, 1e-4)
    skewed = torch.tensor([[2.0, 0.0], [0.0, 3.0]])                     # orthogonal, of other lengths than 1
    assert orthogonal_penalty(skewed) == 0 and orthogonal_penalty(skewed, off_diagonal=False) == 9 + 64


def test_the_penalty_compares_filters_not_inputs():
    # Rows orthogonal, columns not: no penalty. The transpose pays.
    W = torch.tensor([[1.0, 1.0, 0.0], [1.0, -1.0, 1.0]])
    assert orthogonal_penalty(W) == 0 and orthogonal_penalty(W.T) > 1
    conv = torch.zeros(2, 3, 3, 3)
    conv[0, 0, 0, 0] = conv[1, 2, 2, 2] = 5                             # filters that share no weight
    assert orthogonal_penalty(conv) == 0


@pytest.mark.parametrize("shape", [(4, 6), (6, 4)])
def test_the_penaltys_gradient_has_a_factor_of_four(shape):
    # Some code has 2, but d || W W^T * (1 - I) ||^2 / dW = 4 (W W^T * (1 - I)) W.
    W = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    orthogonal_penalty(W).backward()
    gram = (W @ W.T).detach()
    close(W.grad, 4 * (gram - torch.diag(gram.diag())) @ W.detach(), 1e-10)
    assert torch.autograd.gradcheck(orthogonal_penalty, W)
    close(orthogonal_penalty(W, off_diagonal=False), (W @ W.T - torch.eye(shape[0])).square().sum(), 1e-10)


def test_regularisation_leaves_the_class_vectors_alone():
    G = Generator(small())
    biggan.orthogonal_regularisation(G).backward()
    assert G.shared.weight.grad is None and all(p.grad is not None for n, p in G.named_parameters() if p.ndim > 1 and n != "shared.weight")
    tables = Generator(small("sagan128"))
    biggan.orthogonal_regularisation(tables).backward()
    assert {n for n, p in tables.named_parameters() if p.ndim > 1 and p.grad is None} == {
        f"blocks.{i}.{bn}.{part}.weight" for i in range(5) for bn in ("bn1", "bn2") for part in ("gain", "bias")}


# ---------------------------------------------------------------- singular values

def test_singular_values_are_the_diagonals_entries_and_torchs():
    close(singular_values(torch.diag(torch.tensor([1.0, 5.0, 2.0, 3.0]))), [5, 3, 2])
    for shape in ((6, 4), (4, 6), (8, 3, 3, 3), (1, 9)):
        W = torch.randn(shape)
        close(singular_values(W, 4), torch.linalg.svdvals(W.flatten(1))[:4], 1e-4)
    close(singular_values(torch.outer(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0, 2.0])), 2), [15, 0], 1e-2)


class Layers(nn.Module):
    """A network of one layer whose weight has the given singular values."""

    def __init__(self, singular, shape=(5, 4)):
        super().__init__()
        self.layer = SNLinear(shape[1], shape[0], 1e-12).double()
        U, _, Vh = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
        self.layer.weight.data = U @ torch.diag(torch.tensor(singular, dtype=torch.float64)) @ Vh
        self.u, self.v = U[:, 0], Vh[0]


@pytest.mark.parametrize("bound, value", [({"fixed": 3.5}, 3.5), ({"ratio": 1.25}, 1.25 * 3), ({"fixed": 9.0}, 5)])
def test_the_clamp_lowers_the_largest_singular_value_and_leaves_the_others(bound, value):
    G = Layers([5.0, 3.0, 2.0, 1.0])
    clamp_sigma(G, **bound)
    close(torch.linalg.svdvals(G.layer.weight.detach()), [value, 3, 2, 1])


def test_the_pulls_gradient_is_twice_the_excess_times_u_v():
    # d (sigma_0 - goal)^2 / dW = 2 (sigma_0 - goal) u v^T, also with a goal of r sigma_1, which counts as a constant.
    for bound, excess in (({"fixed": 3.5}, 1.5), ({"fixed": 6.0}, -1.0), ({"ratio": 1.5}, 0.5)):
        G = Layers([5.0, 3.0, 2.0, 1.0])
        penalty = sigma_pull(G, **bound)
        close(penalty, excess**2)
        penalty.backward()
        close(G.layer.weight.grad, 2 * excess * torch.outer(G.u, G.v), 1e-5)


def test_the_clamp_takes_one_singular_value_after_the_other():
    # A goal below sigma_1: each call lowers what is then the largest.
    G = Layers([5.0, 4.0, 2.0, 1.0], shape=(4, 6))
    for expected in ([4, 3, 2, 1], [3, 3, 2, 1], [3, 3, 2, 1]):
        clamp_sigma(G, fixed=3.0)
        close(torch.linalg.svdvals(G.layer.weight.detach()), expected)


def test_weights_that_are_not_finite_do_not_look_sound():
    G = Layers([5.0, 3.0, 2.0, 1.0])
    G.layer.weight.data[0, 0] = math.nan
    assert singular_values(G.layer.weight).isnan().all() and sigma_excess(G.layer.weight, ratio=2.0)[0].isnan()


# ---------------------------------------------------------------- truncation, averages, standing statistics

@pytest.mark.parametrize("t", [2.0, 1.5, 1.0, 0.5, 0.04])
def test_truncated_noise_has_the_truncated_normals_moments(t):
    # Variance 1 - 2 t phi(t) / (2 Phi(t) - 1); cumulative function (Phi(z) - Phi(-t)) / (2 Phi(t) - 1).
    z = truncated_normal((200_000,), t, torch.Generator().manual_seed(0)).double()
    phi, mass = math.exp(-t * t / 2) / math.sqrt(2 * math.pi), math.erf(t / math.sqrt(2))
    assert z.abs().max() <= t
    close(z.mean() / t, 0, 0.01)
    close(z.var(), 1 - 2 * t * phi / mass, rtol=0.02)
    cdf = (torch.erf(z.sort().values / math.sqrt(2)) / mass + 1) / 2
    distance = (cdf - torch.arange(1, len(z) + 1) / len(z)).abs().max()
    assert distance < 1.95 / math.sqrt(len(z))                          # Kolmogorov-Smirnov at the 0.1% level


def test_without_a_threshold_the_noise_is_normal():
    z = truncated_normal((200_000,), generator=torch.Generator().manual_seed(0)).double()
    close([z.mean(), z.var(), (z**4).mean()], [0, 1, 3], 0.05)
    assert z.abs().max() > 3.5


def test_the_two_meanings_of_truncation_half_differ():
    # The paper cuts N(0, 1) at 0.5: standard deviation 0.28. The published deep models halve noise that was cut at 2: 0.44.
    cut = truncated_normal((200_000,), 0.5, torch.Generator().manual_seed(0)).double()
    halved = 0.5 * truncated_normal((200_000,), 2, torch.Generator().manual_seed(0)).double()
    def std(t):
        return math.sqrt(1 - 2 * t * math.exp(-t * t / 2) / math.sqrt(2 * math.pi) / math.erf(t / math.sqrt(2)))
    close([cut.std(), halved.std()], [std(0.5), 0.5 * std(2)], 0.003)
    assert round(std(0.5), 2) == 0.28 and round(0.5 * std(2), 2) == 0.44 and halved.abs().max() > 0.99


def test_truncated_noise_equals_torchs_in_distribution():
    z = truncated_normal((100_000,), 0.7, torch.Generator().manual_seed(0)).sort().values
    other = nn.init.trunc_normal_(torch.empty(100_000), 0, 1, -0.7, 0.7).sort().values
    assert (z - other).abs().max() < 0.02                               # quantile by quantile


def test_one_seed_gives_the_same_noise_only_tamer_at_every_threshold():
    z = [truncated_normal((1000,), t, torch.Generator().manual_seed(7)) for t in (math.inf, 1.0, 0.5)]
    assert torch.equal(z[0].argsort(), z[1].argsort()) and torch.equal(z[1].argsort(), z[2].argsort())
    assert (z[2].abs() <= z[1].abs()).all() and (z[1].abs() <= z[0].abs()).all()
    with pytest.raises(ValueError, match="above 0"):
        truncated_normal((1,), 0)


def test_the_average_of_a_constant_approaches_it_geometrically():
    # From x0 with decay d, n steps of c: d^n x0 + (1 - d^n) c. Buffers follow; before `start` the average is a copy.
    source = BatchNorm(1, 1e-4)
    ema = EMA(source, decay=0.9, start=2)
    nn.init.constant_(source.gain, 5.0), source.running_mean.fill_(2.0)
    ema.update(source, step=1)
    assert ema.model.gain == 5 and ema.model.running_mean == 2
    nn.init.constant_(source.gain, 7.0), source.running_mean.fill_(4.0)
    ema.update(source, step=2)                                          # still a copy: 7 and 4
    assert ema.model.gain == 7
    nn.init.constant_(source.gain, 5.0), source.running_mean.fill_(2.0)
    for step in (3, 4, 5):
        ema.update(source, step)
    close(ema.model.gain, [0.9**3 * 7 + (1 - 0.9**3) * 5])
    close(ema.model.running_mean, [0.9**3 * 4 + (1 - 0.9**3) * 2])
    assert not ema.model.gain.requires_grad


def test_the_average_equals_torchs():
    torch.manual_seed(1)
    source = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    ours = EMA(source, decay=0.8)
    theirs = torch.optim.swa_utils.AveragedModel(source, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.8))
    theirs.update_parameters(source)                                    # torch's first update copies
    for step in range(1, 5):
        nn.init.normal_(source[0].weight), nn.init.normal_(source[1].bias)
        ours.update(source, step), theirs.update_parameters(source)
    for a, b in zip(ours.model.parameters(), theirs.module.parameters()):
        close(a, b)


def test_standing_statistics_are_the_exact_mean_over_batches():
    G = Generator(small())
    before = {name: p.clone() for name, p in G.state_dict().items() if "running" not in name}
    seen = []
    G.blocks[0].bn1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    standing_statistics(G, batches=5, batch_size=8)
    close(G.blocks[0].bn1.running_mean, torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0), 1e-5)
    close(G.blocks[0].bn1.running_var, torch.stack([x.var((0, 2, 3)) for x in seen]).mean(0), 1e-5)
    witness = nn.BatchNorm2d(32, momentum=None)                         # torch's name for a cumulative average
    for x in seen:
        witness(x)
    close(G.blocks[0].bn1.running_var, witness.running_var, 1e-5)
    assert not G.training and G.blocks[0].bn1.momentum == BatchNorm.momentum
    assert all(torch.equal(G.state_dict()[name], p) for name, p in before.items())     # nothing else has moved


def test_standing_statistics_draw_all_classes_with_the_truncation_asked_for():
    G, seen = Generator(small()), []
    G.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    standing_statistics(G, batches=3, batch_size=16, noise=functools.partial(truncated_normal, threshold=0.5))
    assert max(z.abs().max() for z, _ in seen) <= 0.5 and {k for _, y in seen for k in y.tolist()} == {0, 1, 2, 3}


# ---------------------------------------------------------------- scores

def test_frechet_distance_of_gaussians_on_paper():
    d, s, mu = 4, 3.0, np.array([1.0, 2, 0, 2])
    eye = np.eye(d)
    assert math.isclose(metrics.frechet_distance(mu, s**2 * eye, 0 * mu, eye), 9 + d * (1 - s)**2)
    a, b = np.array([1.0, 4, 9, 16]), np.array([4.0, 4, 1, 0])          # diagonal: sum of (sqrt a - sqrt b)^2
    assert math.isclose(metrics.frechet_distance(mu, np.diag(a), mu, np.diag(b)), 1 + 0 + 4 + 16)


def test_frechet_distance_of_fewer_points_than_dimensions_is_finite_and_not_negative():
    # 100 points in 2,048 dimensions span 99: the trace of the root is the sum of the singular values of the product of the points.
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(100, 2048)), 2 * rng.normal(size=(150, 2048)) + 1
    distance = metrics.frechet_distance(x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T))
    cx, cy = (x - x.mean(0)) / math.sqrt(99), (y - y.mean(0)) / math.sqrt(149)
    root = np.linalg.svd(cx @ cy.T, compute_uv=False).sum()
    assert math.isclose(distance, ((x.mean(0) - y.mean(0))**2).sum() + (cx**2).sum() + (cy**2).sum() - 2 * root, rel_tol=1e-10)
    same = metrics.frechet_distance(x.mean(0), np.cov(x.T), x.mean(0), np.cov(x.T))
    assert 0 <= same < 1e-9 * (cx**2).sum()


def test_frechet_distance_of_correlated_gaussians():
    # Rotating both leaves the distance as it is.
    q = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    a, b = np.diag([1.0, 4, 9]), np.diag([4.0, 1, 1])
    assert math.isclose(metrics.frechet_distance(np.zeros(3), q @ a @ q.T, np.zeros(3), q @ b @ q.T), 1 + 1 + 4)


def test_frechet_distance_equals_the_eigenvalues_of_the_plain_product():
    # (C1 C2)^(1/2) has the square roots of the eigenvalues of C1 C2, which is not symmetric: numpy finds them for a small case.
    rng = np.random.default_rng(1)
    a, b = (np.cov(rng.normal(size=(4, 30)) * rng.uniform(1, 3, (4, 1))) for _ in range(2))
    m, n = rng.normal(size=(2, 4))
    expected = ((m - n)**2).sum() + np.trace(a + b) - 2 * np.sqrt(np.linalg.eigvals(a @ b).astype(complex)).sum().real
    assert math.isclose(metrics.frechet_distance(m, a, n, b), expected, rel_tol=1e-9)


def test_inception_score_equals_torchs_divergence():
    p = torch.rand(50, 6, dtype=torch.float64).softmax(1)
    divergence = F.kl_div(p.mean(0).log().expand(50, 6), p, reduction="batchmean")
    close(metrics.inception_score(p.numpy(), splits=1)[0], divergence.exp())


def test_inception_score_is_one_for_sameness_and_k_for_certain_balanced_classes():
    close(metrics.inception_score(np.full((100, 5), 0.2)), [1, 0])
    close(metrics.inception_score(np.tile(np.eye(5), (20, 1))), [5, 0])
    with pytest.raises(ValueError):
        metrics.inception_score(np.eye(5), splits=10)


def test_the_frechet_distance_to_expect_of_small_samples():
    # One dimension, variance v: (1/n + 1/m) (v + v/2). A unit matrix, n = m: 2d/n for the mean and d (d + 1) / 2n for the covariance.
    close(metrics.expected_frechet_distance([[3.0]], 10, 20), (1 / 10 + 1 / 20) * 4.5)
    close(metrics.expected_frechet_distance(np.eye(5), 100, 100), 2 * 5 / 100 + 5 * 6 / 200)
    rng, scale = np.random.default_rng(0), np.array([1, 2, 3, 0.5])
    sample_moments = lambda n: (lambda x: (x.mean(0), np.cov(x.T)))(scale * rng.normal(size=(n, 4)))
    distances = [metrics.frechet_distance(*sample_moments(200), *sample_moments(300)) for _ in range(300)]
    close(np.mean(distances), metrics.expected_frechet_distance(np.diag(scale**2), 200, 300), rtol=0.05)


def test_kernel_distance_of_points_on_paper():
    # One dimension: k(0, 0) = 1, k(1, 1) = (1 + 1)^3 = 8, k(0, 1) = 1. Twice 0 against twice 1: 1 + 8 - 2.
    close(metrics.kernel_distance([[0.0], [0]], [[1.0], [1]]), [7, 0])
    # Pairs of a point and itself do not count: of {0, 1} the only pair is (0, 1). 1 + 1 - 2 (1 + 1 + 1 + 8) / 4.
    close(metrics.kernel_distance([[0.0], [1]], [[0.0], [1]]), [2 - 5.5, 0])


def test_kernel_distance_is_the_mean_over_all_pairs_and_has_no_bias():
    a, b = torch.randn(7, 3, dtype=torch.float64), torch.rand(9, 3, dtype=torch.float64)[:7]
    k = lambda x, y: (sum(p * q for p, q in zip(x, y)) / 3 + 1)**3
    within = [sum(k(s[i], s[j]) for i in range(7) for j in range(7) if i != j) / 42 for s in (a, b)]
    expected = sum(within) - 2 * sum(k(x, y) for x in a for y in b) / 49
    close(metrics.kernel_distance(a, b), [expected, 0])
    # Halves of the same set: zero on average, while the Frechet distance of so few points is far from it.
    points = torch.randn(4000, 20, dtype=torch.float64)
    mean, deviation = metrics.kernel_distance(points[:2000], points[2000:], subsets=50, size=200)
    assert abs(mean) < 3 * deviation / math.sqrt(50) + 0.01 and deviation > 0


def test_precision_and_recall_on_paper():
    # On a line, k = 1. Real 0, 1, 10 reach 1, 1 and 9 far; fake 0.5, 30, 31 reach 29.5, 1 and 1.
    real, fake = torch.tensor([[0.0], [1], [10]]), torch.tensor([[0.5], [30], [31]])
    close(metrics.precision_recall(real, fake, k=1), [1 / 3, 1])
    close(metrics.precision_recall(fake, real, k=1), [1, 1 / 3])
    points = torch.randn(50, 4)
    assert metrics.precision_recall(points, points) == (1, 1) and metrics.precision_recall(points, points + 100) == (0, 0)
    with pytest.raises(ValueError, match="no 3 neighbours"):
        metrics.precision_recall(points[:3], points)


def test_precision_and_recall_equal_all_distances_looked_at_one_by_one():
    rng = np.random.default_rng(0)
    real, fake = rng.normal(size=(40, 5)), 1.5 * rng.normal(size=(30, 5))
    d = lambda x, y: math.sqrt(sum((x - y)**2))
    reach = lambda points: [sorted(d(p, q) for q in points)[3] for p in points]             # the 0th is the point itself
    share = lambda points, centres: np.mean([any(d(p, c) <= r for c, r in zip(centres, reach(centres))) for p in points])
    close(metrics.precision_recall(torch.from_numpy(real), torch.from_numpy(fake), at_a_time=7), [share(fake, real), share(real, fake)])
    distances, which = metrics.nearest(torch.from_numpy(fake), torch.from_numpy(real), k=2, at_a_time=7)
    assert which.tolist() == [sorted(range(40), key=lambda j: d(p, real[j]))[:2] for p in fake]
    close(distances[:, 0], [min(d(p, q) for q in real) for p in fake])
    torch.testing.assert_close(metrics.nearest(*2 * [torch.from_numpy(real)], k=1, same=True, at_a_time=7)[0][:, 0],
                               torch.cdist(*2 * [torch.from_numpy(real)]).fill_diagonal_(9).min(1).values)


def test_the_chance_to_be_below_counts_pairs():
    assert metrics.chance_below([1, 2, 2], [2, 3]) == (2 + 1.5 + 1.5) / 6
    assert metrics.chance_below([5, 6], [1, 2, 3]) == 0 and metrics.chance_below([1], [1]) == 0.5


def test_sliced_wasserstein_of_a_shift_is_its_mean_projection():
    # Moving all points by delta moves each projection by <delta, u>. In 2 dimensions E|<delta, u>| = |delta| 2 / pi.
    a, delta = torch.randn(500, 2, dtype=torch.float64), torch.tensor([3.0, 4.0])
    close(metrics.sliced_wasserstein(a, a + delta, projections=20_000), 5 * 2 / math.pi, rtol=0.01)
    assert metrics.sliced_wasserstein(a, a[torch.randperm(500)]) < 1e-12
    with pytest.raises(ValueError):
        metrics.sliced_wasserstein(a, a[:10])


def test_on_a_line_sorting_is_the_best_of_all_pairings():
    # All 720 ways to pair 6 points with 6 others: none is shorter on average than the sorted one.
    a, b = torch.randn(6, 1, dtype=torch.float64), torch.randn(6, 1, dtype=torch.float64)
    best = min((a[:, 0] - b[list(order), 0]).abs().mean() for order in itertools.permutations(range(6)))
    close(metrics.sliced_wasserstein(a, b), best)


def test_the_pyramid_adds_up_to_the_image():
    x = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    bands = metrics.laplacian_pyramid(x)
    assert [b.shape[-1] for b in bands] == [64, 32, 16]
    rebuilt = bands[-1]
    for band in bands[-2::-1]:
        rebuilt = metrics.enlarge(rebuilt) + band
    close(rebuilt, x, 1e-12)
    flat = metrics.laplacian_pyramid(torch.full((1, 3, 32, 32), 9.0))
    close(flat[0], torch.zeros(1, 3, 32, 32), 1e-5), close(flat[1], torch.full((1, 3, 16, 16), 9.0), 1e-5)


def test_patches_are_cut_from_the_image():
    x = torch.arange(2 * 100).reshape(2, 1, 10, 10)
    p = metrics.patches(x, torch.Generator(), per_image=3, side=2)
    assert p.shape == (6, 4)
    assert all((row - row[0]).tolist() == [0, 1, 10, 11] for row in p) and (p[:3] < 100).all() and (p[3:] >= 100).all()


def drawn_shapes(first, end):
    """Shapes that training never sees, (n, 32, 32, 3) uint8, classes in turn."""
    data = train.Shapes(32, held_out=True)
    return np.stack([data[i][0] for i in range(first, end)])


def test_worse_images_are_farther_away():
    real, other = drawn_shapes(0, 100), drawn_shapes(100, 200)
    noise = np.random.default_rng(0).normal(size=other.shape)
    scores = [sum(metrics.pyramid_distances(real, (other + s * noise).clip(0, 255).astype(np.uint8)).values()) for s in (0, 10, 40)]
    grey = other.mean(3, keepdims=True).repeat(3, 3).astype(np.uint8)
    assert scores[0] < scores[1] < scores[2]
    assert sum(metrics.pyramid_distances(real, grey).values()) > 2 * scores[0]


# ---------------------------------------------------------------- Inception

def plain_inception(x, state):
    """The network of 2015 on images in [-1, 1], (N, 3, 299, 299), one torch operation at a time: features, logits.

    Weights that `state` lacks are drawn at random: with an empty one this is how to make a state laid out like the published file."""
    def conv(x, name, filters, kernel, stride=1, padding=0):
        height, width = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        if f"{name}.conv.weight" not in state:
            state[f"{name}.conv.weight"] = torch.randn(filters, x.shape[1], height, width) * math.sqrt(2 / (x.shape[1] * height * width))
            state[f"{name}.bn.weight"], state[f"{name}.bn.bias"] = torch.rand(filters) + 0.5, 0.2 * torch.randn(filters)
            state[f"{name}.bn.running_mean"], state[f"{name}.bn.running_var"] = 0.2 * torch.randn(filters), torch.rand(filters) + 0.5
            state[f"{name}.bn.num_batches_tracked"] = torch.tensor(7)
        x = F.conv2d(x, state[f"{name}.conv.weight"], stride=stride, padding=padding)
        norm = [state[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        return F.relu(F.batch_norm(x, *norm, eps=1e-3))

    average = lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    x = conv(x, "Conv2d_1a_3x3", 32, 3, 2)
    x = conv(x, "Conv2d_2a_3x3", 32, 3)
    x = F.max_pool2d(conv(x, "Conv2d_2b_3x3", 64, 3, 1, 1), 3, 2)
    x = conv(x, "Conv2d_3b_1x1", 80, 1)
    x = F.max_pool2d(conv(x, "Conv2d_4a_3x3", 192, 3), 3, 2)
    for m, pooled in ("Mixed_5b.", 32), ("Mixed_5c.", 64), ("Mixed_5d.", 64):
        five = conv(conv(x, m + "branch5x5_1", 48, 1), m + "branch5x5_2", 64, 5, padding=2)
        double = conv(conv(x, m + "branch3x3dbl_1", 64, 1), m + "branch3x3dbl_2", 96, 3, padding=1)
        double = conv(double, m + "branch3x3dbl_3", 96, 3, padding=1)
        x = torch.cat([conv(x, m + "branch1x1", 64, 1), five, double, conv(average(x), m + "branch_pool", pooled, 1)], 1)
    m = "Mixed_6a."
    double = conv(conv(x, m + "branch3x3dbl_1", 64, 1), m + "branch3x3dbl_2", 96, 3, padding=1)
    x = torch.cat([conv(x, m + "branch3x3", 384, 3, 2), conv(double, m + "branch3x3dbl_3", 96, 3, 2), F.max_pool2d(x, 3, 2)], 1)
    for m, c in ("Mixed_6b.", 128), ("Mixed_6c.", 160), ("Mixed_6d.", 160), ("Mixed_6e.", 192):
        seven, double = conv(x, m + "branch7x7_1", c, 1), conv(x, m + "branch7x7dbl_1", c, 1)
        seven = conv(conv(seven, m + "branch7x7_2", c, (1, 7), padding=(0, 3)), m + "branch7x7_3", 192, (7, 1), padding=(3, 0))
        double = conv(conv(double, m + "branch7x7dbl_2", c, (7, 1), padding=(3, 0)), m + "branch7x7dbl_3", c, (1, 7), padding=(0, 3))
        double = conv(conv(double, m + "branch7x7dbl_4", c, (7, 1), padding=(3, 0)), m + "branch7x7dbl_5", 192, (1, 7), padding=(0, 3))
        x = torch.cat([conv(x, m + "branch1x1", 192, 1), seven, double, conv(average(x), m + "branch_pool", 192, 1)], 1)
    m = "Mixed_7a."
    seven = conv(conv(x, m + "branch7x7x3_1", 192, 1), m + "branch7x7x3_2", 192, (1, 7), padding=(0, 3))
    seven = conv(conv(seven, m + "branch7x7x3_3", 192, (7, 1), padding=(3, 0)), m + "branch7x7x3_4", 192, 3, 2)
    x = torch.cat([conv(conv(x, m + "branch3x3_1", 192, 1), m + "branch3x3_2", 320, 3, 2), seven, F.max_pool2d(x, 3, 2)], 1)
    for m, pool in ("Mixed_7b.", average), ("Mixed_7c.", lambda x: F.max_pool2d(x, 3, 1, 1)):
        three = conv(x, m + "branch3x3_1", 384, 1)
        double = conv(conv(x, m + "branch3x3dbl_1", 448, 1), m + "branch3x3dbl_2", 384, 3, padding=1)
        forked = [conv(branch, m + name + letter, 384, kernel, padding=padding) for branch, name in ((three, "branch3x3_2"),
                  (double, "branch3x3dbl_3")) for letter, kernel, padding in (("a", (1, 3), (0, 1)), ("b", (3, 1), (1, 0)))]
        x = torch.cat([conv(x, m + "branch1x1", 320, 1), *forked, conv(pool(x), m + "branch_pool", 192, 1)], 1)
    features = F.adaptive_avg_pool2d(x, 1).flatten(1)
    if "fc.weight" not in state:
        state["fc.weight"], state["fc.bias"] = torch.randn(1008, 2048) / 45, torch.randn(1008)
    return features, F.linear(features, state["fc.weight"], state["fc.bias"])


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory):
    """Random weights laid out like the published ones."""
    torch.manual_seed(0)
    state, path = {}, tmp_path_factory.mktemp("inception") / "inception.pth"
    plain_inception(torch.zeros(1, 3, 299, 299), state)
    torch.save(state, path)
    return path


@pytest.mark.parametrize("height, width", [(32, 32), (299, 299), (256, 341)])
def test_inception_equals_one_operation_at_a_time(inception_file, height, width):
    x = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8)
    state = torch.load(inception_file)
    resized = F.interpolate(x.float() / 255, (299, 299), mode="bilinear", align_corners=False)
    features, logits = plain_inception(2 * resized - 1, state)
    ours = metrics.Inception(state)(x)
    assert ours[0].shape == (2, 2048) and ours[1].shape == (2, 1008) and features.std() > 0.05
    close(ours[0], features, atol=1e-5, rtol=1e-5), close(ours[1], logits, atol=1e-4, rtol=1e-5)
    assert sum(tensor.numel() for name, tensor in state.items() if name.endswith(("conv.weight", "fc.weight"))) == 23_815_520


def test_inceptions_two_ways_to_resize():
    # Two pixels made four. As squares, the new centres lie at -1/4, 1/4, 3/4, 5/4; as points, at 0, 1/2, 1, 3/2. Outside is the last one.
    line = torch.tensor([[[[0.0, 8]]]]).expand(1, 1, 2, 2)
    close(metrics.resize(line, 4, metrics.RESIZERS["pytorch"])[0, 0, 0], [0, 2, 6, 8])
    close(metrics.resize(line, 4, metrics.RESIZERS["tensorflow"])[0, 0, 0], [0, 4, 8, 8])
    # Four made two: every second one as points, the mean of two as squares.
    line = torch.tensor([[[[0.0, 2, 4, 6]]]]).expand(1, 1, 4, 4)
    close(metrics.resize(line, 2, metrics.RESIZERS["pytorch"])[0, 0, 0], [1, 5])
    close(metrics.resize(line, 2, metrics.RESIZERS["tensorflow"])[0, 0, 0], [0, 4])
    for height, width in (32, 32), (299, 299), (375, 500), (1, 7):
        x = 255 * torch.rand(1, 3, height, width)
        close(metrics.resize(x, 299, metrics.RESIZERS["pytorch"]), F.interpolate(x, (299, 299), mode="bilinear"), atol=0.02)


def test_the_original_resizer_gives_other_features(inception_file):
    x = torch.randint(0, 256, (1, 3, 299, 299), dtype=torch.uint8)
    state = torch.load(inception_file)
    original = metrics.Inception(state, "tensorflow")
    close(original(x)[0], plain_inception((x.float() - 128) / 128, state)[0], atol=1e-5, rtol=1e-5)
    assert (original(x)[0] - metrics.Inception(state)(x)[0]).abs().max() > 1e-3
    with pytest.raises(sample.UserError, match="no resizer bicubic; there are pytorch and tensorflow"):
        metrics.Inception(state, "bicubic")
    with pytest.raises(ValueError, match="images are .* uint8, not .* of torch.float32"):
        original(x.float())


@pytest.mark.parametrize("spoil, sentence", [
    (lambda state: state.pop("Mixed_6c.branch7x7dbl_3.conv.weight"), "Mixed_6c branch7x7dbl_3"),
    (lambda state: state.pop("Mixed_6c.branch7x7dbl_3.bn.running_var"), "Mixed_6c.branch7x7dbl_3.bn.running_var"),
    (lambda state: state.update({"fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}), "it has 1000 outputs, not 1,008"),
    (lambda state: state.update({"Mixed_7a.branch3x3_1.conv.weight": torch.zeros(192, 768, 3, 3)[:, :7]}), "not those of 2015"),
    (lambda state: state["Mixed_7a.branch3x3_1.bn.bias"].fill_(math.inf), "not finite, in Mixed_7a branch3x3_1 bias"),
    (lambda state: state.update(trap=Trap()), "could run code"),
    (lambda state: state.clear(), "fc.weight"),
])
def test_other_weights_than_inceptions_are_refused(inception_file, tmp_path, spoil, sentence):
    state = torch.load(inception_file)
    spoil(state)
    torch.save(state, tmp_path / "bad.pth")
    with pytest.raises(sample.UserError, match=sentence):
        metrics.Inception(tmp_path / "bad.pth")


def test_inception_is_fetched_once_and_its_hash_is_checked(tmp_path, server, monkeypatch):
    monkeypatch.setattr(metrics, "INCEPTION_URL", server.url)
    monkeypatch.setattr(metrics, "INCEPTION", tmp_path / "cache" / "inception.pth")
    with pytest.raises(sample.UserError, match="is damaged or another file: its sha256 begins with .*, not 6726825d; delete it"):
        metrics.find_inception()
    monkeypatch.setattr(metrics, "INCEPTION_SHA256", hashlib.sha256(server.content).hexdigest()[:8])
    assert metrics.find_inception().read_bytes() == server.content and len(server.asked) == 1
    with pytest.raises(sample.UserError, match="nothing.pth do not exist"):
        metrics.find_inception("nothing.pth")
    metrics.INCEPTION.unlink()
    monkeypatch.setattr(metrics, "INCEPTION_URL", "http://localhost:1/none")
    with pytest.raises(sample.UserError, match="could not be fetched .*put it at .*inception.pth.*--inception none scores without it"):
        metrics.find_inception()


def test_what_is_seen_are_the_moments_of_all_images_and_unreadable_ones_are_named(inception_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(metrics, "BLOCK", 16)
    monkeypatch.setattr(metrics, "KEPT", 20)                            # features of 19 images, moments of all
    shapes = drawn_shapes(0, 30)
    for i, image in enumerate(shapes):
        folder = tmp_path / "images" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i:02d}.png")
    given = metrics.Given(tmp_path / "images", 32)
    broken = given.order[5]
    given.data.paths[broken].write_bytes(b"no image")
    inception = metrics.Inception(inception_file)
    seen = metrics.see(given, inception)
    assert (seen.n, seen.skipped) == (29, 1) and given.data.paths[broken].name in capsys.readouterr().err and given.classes == ["a", "b"]
    numbers = [int(given.data.paths[i].stem) for i in given.order if i != broken]
    assert sorted(numbers) == [i for i in range(30) if i != int(given.data.paths[broken].stem)]
    assert seen.rows.tolist() == [row for row in range(20) if row != 5] and seen.labels.tolist() == [i % 2 for i in numbers[:19]]
    features, logits = inception(torch.from_numpy(shapes[numbers]).permute(0, 3, 1, 2))
    close(seen.features, features[:19], atol=1e-5)
    close(seen.mu, features.double().mean(0), 1e-6), close(seen.cov, np.cov(features.double().numpy().T), 1e-6)
    assert np.array_equal(seen.pixels, shapes[numbers])
    # The Inception score of the published code: softmax without the bias.
    probs = (logits - torch.load(inception_file)["fc.bias"])[:19].softmax(1)
    close(seen.score, metrics.inception_score(probs), atol=1e-5, rtol=1e-5)


def test_what_is_seen_of_real_images_is_kept_until_they_change(inception_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(metrics, "CACHE", tmp_path / "cache")
    for i, image in enumerate(drawn_shapes(0, 6)):
        picture(tmp_path / "images" / "ab"[i % 2], f"{i}.png")
        Image.fromarray(image).save(tmp_path / "images" / "ab"[i % 2] / f"{i}.png")
    looks = []

    def see_again(network=None, **options):
        inception = metrics.Inception(inception_file, **options)
        inception.said = network or inception.said
        inception.register_forward_hook(lambda *_: looks.append(1))
        looks.clear()
        return metrics.see_real(metrics.Given(tmp_path / "images", 32), inception), len(looks)

    one, first = see_again()
    two, second = see_again()
    assert (first, second) == (1, 0)
    for name in "mu", "cov", "features", "labels", "rows", "score", "pixels":
        assert np.array_equal(getattr(one, name), getattr(two, name)), name
    assert see_again(resizer="tensorflow")[1] == 1 and see_again("another")[1] == 1
    os.utime(tmp_path / "images" / "a" / "0.png", (1, 1))
    assert see_again()[1] == 1
    kept = next((tmp_path / "cache" / "statistics").glob("*.npz"))
    kept.write_bytes(kept.read_bytes()[:1000])                          # damaged: made again
    assert see_again()[1] + see_again(resizer="tensorflow")[1] >= 1


def test_scores_are_the_same_on_one_and_two_processes(inception_file, tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", 16)                           # two blocks of each set
    command = ["--weights", tiny_run, "--data", "shapes", "--n", 24, "--n-real", 20, "--trunc", 0.9, "--inception", inception_file]
    start(*command, "--out", tmp_path / "1.json", module=metrics)
    for kept in [*Path(metrics.CACHE, "statistics").glob("*.npz"), *tiny_run.rglob("*.stats")]:
        kept.unlink()
    code = "import sys, metrics; metrics.BLOCK = 16; metrics.run(metrics.main)"
    process = run_command("-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port", free_port(), "--no-python", "--",
                          sys.executable, "-c", code, *command, "--out", tmp_path / "2.json", cwd=HERE)
    output, error = process.communicate()
    assert "too few for 2,048 features" in output and process.returncode == 0, error
    one, two = (scores_in(tmp_path / f"{k}.json") for k in (1, 2))
    assert one["fid"] > 0 and math.isclose(one["fid"], two["fid"], rel_tol=1e-9)
    for name in "kid_x1000", "is", "precision", "recall", "swd_x1000_mean":
        assert math.isclose(one[name], two[name], rel_tol=1e-6), name
    assert one["network"] == hashlib.sha256(inception_file.read_bytes()).hexdigest()[:8] and one["resizer"] == "pytorch"
    assert (one["n"], one["n_real"], one["batch_norm"]) == (24, 20, "gathered from 1,024 images of this noise")


def test_every_score_notices_worse_images(inception_file, tmp_path):
    """Growing noise, growing blur, ever fewer images again and again: the distances to the images themselves grow, and recall falls."""
    inception, clean = metrics.Inception(inception_file), drawn_shapes(0, 32)
    noise, as_floats = np.random.default_rng(0).normal(size=clean.shape), torch.from_numpy(clean).permute(0, 3, 1, 2).float()
    blurred = lambda times: functools.reduce(lambda x, _: metrics.blur(x), range(times), as_floats).permute(0, 2, 3, 1).byte().numpy()
    series = {"noise": [(clean + s * noise).clip(0, 255).astype(np.uint8) for s in (10, 40)],
              "blur": [blurred(k) for k in (1, 4)],
              "few": [np.resize(clean[:k], clean.shape) for k in (10, 1)]}
    see = lambda pixels: metrics.see(metrics.Given(as_npz(tmp_path, pixels), 32), inception)
    seen = see(clean)
    itself = metrics.compare(seen, seen)
    scores = {name: [itself, *(metrics.compare(seen, see(pixels)) for pixels in steps)] for name, steps in series.items()}
    for name, steps in scores.items():
        for key in "fid", "kid_x1000", "swd_x1000_mean":
            assert steps[0][key] < steps[1][key] < steps[2][key], (name, key, steps)
        assert steps[0]["precision"] == steps[0]["recall"] == 1 and steps[2]["recall"] < 1, (name, steps)
    few = [s["recall"] for s in scores["few"]]
    assert few[0] > few[1] > few[2] and scores["few"][2]["precision"] == 1


def as_npz(folder, images, labels=None):
    np.savez(folder / "images.npz", images, *([] if labels is None else [labels]))
    return str(folder / "images.npz")


def test_an_array_is_read_from_the_disk_whoever_has_written_it(tmp_path):
    images, labels = drawn_shapes(0, 10), np.arange(10)
    plain = metrics.Array(as_npz(tmp_path, images, labels))
    assert isinstance(plain.images, np.memmap) and np.array_equal(plain.images, images) and plain.labels.tolist() == labels.tolist()
    np.savez_compressed(tmp_path / "c.npz", images)
    packed = metrics.Array(tmp_path / "c.npz")
    assert metrics.Array(as_npz(tmp_path, images, np.zeros(3, int))).labels is None         # labels of something else
    assert metrics.Array(as_npz(tmp_path, images, labels.astype(np.uint8))).labels.tolist() == labels.tolist()
    for side, fits in (16, True), (48, True), (15, False), (33, False), (34, True), (72, True), (66, False):
        if fits:
            assert metrics.Array(as_npz(tmp_path, np.zeros((1, side, side, 3), np.uint8))).resolution == side
        else:
            with pytest.raises(sample.UserError, match=f"images of {side} pixels"):
                metrics.Array(as_npz(tmp_path, np.zeros((1, side, side, 3), np.uint8)))
    assert np.array_equal(packed.images, images) and packed.labels is None and np.array_equal(packed[3][0], images[3])


def test_statistics_of_others_give_the_fid_and_those_of_another_network_are_refused(inception_file, tmp_path, monkeypatch, capsys):
    features = np.random.default_rng(0).random((9, 2048))
    np.savez(tmp_path / "others.npz", mu=features.mean(0), sigma=np.cov(features.T))
    fake = as_npz(tmp_path, drawn_shapes(0, 16))
    command = ["--fake", fake, "--inception", inception_file, "--out", tmp_path / "m.json"]
    start("--real", tmp_path / "others.npz", *command, module=metrics)
    result = scores_in(tmp_path / "m.json")
    seen = metrics.see(metrics.Given(fake, 32), metrics.Inception(inception_file))
    assert math.isclose(result["fid"], metrics.frechet_distance(features.mean(0), np.cov(features.T), seen.mu, seen.cov), rel_tol=1e-9)
    assert "swd_x1000" not in result and "kid_x1000" not in result
    made_from = json.dumps({"resolution": 32, "network": "another", "resizer": "pytorch"})
    np.savez(tmp_path / "ours.npz", mu=features.mean(0), sigma=np.cov(features.T), made_from=made_from, n=9)
    assert "were made with network another, not" in refused(monkeypatch, capsys, metrics, "--real", tmp_path / "ours.npz", *command)


def test_copies_are_found_and_shown(inception_file, tiny_run, tmp_path, monkeypatch, capsys):
    for name, images in ("train", drawn_shapes(0, 16)), ("held", drawn_shapes(20, 36)):
        for i, image in enumerate(images):
            picture(tmp_path / name / train.Shapes(32).classes[i % 10], f"{i}.png")
            Image.fromarray(image).save(tmp_path / name / train.Shapes(32).classes[i % 10] / f"{i}.png")
    command = ["--data", tmp_path / "train", "--held-out", tmp_path / "held", "--inception", inception_file, "--out", tmp_path / "m.json"]
    both = np.concatenate([drawn_shapes(0, 16), drawn_shapes(20, 36)])  # half copies, half as far from the training images as held-out ones
    start("--fake", as_npz(tmp_path, both), *command, "--neighbours", tmp_path / "n.png", module=metrics)
    assert scores_in(tmp_path / "m.json")["nearer_than_held_out"] == (1 + 0.5) / 2
    grid = np.asarray(Image.open(tmp_path / "n.png"))
    assert grid.shape == (10 * 34 + 2, 6 * 34 + 2, 3) and np.array_equal(grid[:, 2:34], grid[:, 36:68])
    mislabelled = as_npz(tmp_path, both, np.full(32, 10))
    assert "does not have the classes of" in refused(monkeypatch, capsys, metrics, "--weights", tiny_run, "--data", tmp_path / "train",
                                                     "--held-out", mislabelled, "--inception", "none", "--out", tmp_path / "x.json")
    # D's verdicts on training and held-out images, as a run's own D gives them.
    start("--weights", tiny_run, *command[:4], "--n", 16, "--inception", "none", "--out", tmp_path / "m.json", module=metrics)
    found = sample.read_weights(tiny_run, to_train=True)
    D = Discriminator(found.config)
    D.load_state_dict(found.D)
    verdicts = []
    for first in 0, 20:
        x = torch.from_numpy(drawn_shapes(first, first + 16)).permute(0, 3, 1, 2).float() / 127.5 - 1
        verdicts.append(D.eval()(x, torch.arange(16) % 10).tolist())
    assert math.isclose(scores_in(tmp_path / "m.json")["D_memory"], metrics.chance_below(verdicts[1], verdicts[0]))


def test_the_deviation_of_kid_is_one_of_different_subsets():
    sets = [metrics.Seen(40, features=np.random.default_rng(k).normal(size=(40, 8)).astype(np.float32)) for k in (0, 1)]
    assert metrics.compare(*sets)["kid_x1000_deviation"] > 1e-3


def test_fids_of_different_numbers_of_images_are_not_compared():
    monitor = metrics.Monitor()
    for step, n, fid in (50, 64, 20.0), (100, 32, 90.0), (150, 32, 91.0), (200, 32, 80.0):
        reason, best = monitor.judge(healthy(step, fid=fid, fid_n=n))
        assert reason is None and best == (step in (50, 100, 200))
    monitor.judge(healthy(250, fid=200.0, fid_n=32))
    assert "the FID of 32 images is 190.0, at step 200 it was 80.0" in monitor.judge(healthy(300, fid=190.0, fid_n=32))[0]


def test_inception_keeps_full_precision_where_training_does_not(inception_file):
    inception, flags, before = metrics.Inception(inception_file), [], torch.backends.cudnn.allow_tf32
    allowed = lambda: (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)
    inception.conv = lambda *_, **__: flags.append(allowed()) or 1 / 0
    torch.backends.cudnn.allow_tf32 = True
    with pytest.raises(ZeroDivisionError):
        inception(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    assert flags == [(False, False)] and torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = before


def test_a_generator_that_draws_what_is_not_finite_is_refused():
    G = sample.load_generator("shapes")
    G.to_rgb.bias[0] = math.nan
    with pytest.raises(sample.UserError, match="shapes.pt draws pixels that are not finite numbers"):
        sample.draw_seeds(G, [0, 1], [0, 1])


def test_a_class_has_an_fid_of_its_own_where_there_are_enough_images(monkeypatch):
    monkeypatch.setattr(metrics, "PER_CLASS", 30)
    rng = np.random.default_rng(0)
    sets = [metrics.Seen(60, features=rng.normal(size=(60, 8)).astype(np.float32) + shift, labels=np.arange(60) % 2) for shift in (0, 1)]
    scores = metrics.compare(*sets, ["a", "b"])
    moments = [m for s in sets for m in (s.features[1::2].astype(float).mean(0), np.cov(s.features[1::2].astype(float).T))]
    assert math.isclose(scores["fid_per_class"]["b"], metrics.frechet_distance(*moments), rel_tol=1e-9)
    monkeypatch.setattr(metrics, "PER_CLASS", 31)
    assert "fid_per_class" not in metrics.compare(*sets, ["a", "b"]) and "fid_per_class" not in metrics.compare(*sets)


def test_an_fid_that_cannot_be_measured_is_refused_before_a_run_begins(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "PAUSE", 0)
    monkeypatch.setattr(metrics, "INCEPTION_URL", "http://localhost:1/none")
    error = refused(monkeypatch, capsys, train, *TINY, "--out", "run", "--fid", 64)
    assert "could not be fetched" in error and "leave out --fid" in error and not listing(tmp_path)
    assert "--fid must be 0 or at least 2" in refused(monkeypatch, capsys, train, *TINY, "--fid", 1)


def test_training_measures_the_fid_and_keeps_the_best(inception_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(metrics, "INCEPTION", inception_file)
    monkeypatch.setattr(metrics, "INCEPTION_SHA256", hashlib.sha256(inception_file.read_bytes()).hexdigest()[:8])
    start(*TINY, "--out", tmp_path, "--steps", 2, "--eval-every", 2, "--fid", 16)
    entry = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    checkpoint = weights_of(tmp_path, 2)
    assert f"FID {entry['fid']:.2f}; score" in capsys.readouterr().out
    assert checkpoint["monitor"]["judged_by"] == "FID of 16 images" and checkpoint["monitor"]["score"] == entry["fid"]
    trainer_G = standing_statistics(biggan.fold_spectral_norm(sample.read_generator(tmp_path)), sample.STANDING_BATCHES)
    inception = metrics.Inception(inception_file)
    real, fake = (metrics.see(images, inception) for images in (metrics.Given("shapes", 32, 16), metrics.Drawn(trainer_G, 16)))
    assert math.isclose(metrics.frechet_distance(real.mu, real.cov, fake.mu, fake.cov), entry["fid"], rel_tol=1e-2)


# ---------------------------------------------------------------- data

def picture(folder, name, mode="RGB", size=(40, 30), colour=None):
    folder.mkdir(parents=True, exist_ok=True)
    image = Image.new(mode, size) if colour is None else Image.new(mode, size, colour)
    image.save(folder / name)
    return folder / name


def test_any_mode_and_size_becomes_an_rgb_square(tmp_path):
    for mode, name in (("RGB", "a.jpg"), ("L", "b.png"), ("CMYK", "c.jpg"), ("P", "d.gif"), ("LA", "e.png"), ("RGBA", "f.webp"),
                       ("1", "g.bmp"), ("I;16", "h.png"), ("I", "i.tiff"), ("RGB", "j.PPM")):
        for size in ((40, 30), (7, 90), (1, 1)):
            image = train.load_image(picture(tmp_path, name, mode, size), 16)
            assert image.shape == (16, 16, 3) and image.dtype == np.uint8, (mode, size)


def test_transparency_shows_white_and_16_bit_grey_keeps_its_value(tmp_path):
    assert (train.load_image(picture(tmp_path, "a.png", "RGBA", colour=(0, 0, 0, 0)), 8) == 255).all()
    Image.fromarray(np.full((9, 9), 257 * 100 + 28, np.uint16)).save(tmp_path / "b.png")
    assert (train.load_image(tmp_path / "b.png", 8) == 100).all()


def test_the_crop_is_central_and_the_reduction_an_average(tmp_path):
    # 8 wide, 4 high: columns 2 to 5 remain; each 2x2 block of them is averaged.
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, 2], pixels[:, 3], pixels[:, 6:] = 100, 200, 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    close(train.load_image(tmp_path / "a.png", 2)[:, :, 0].astype(float), [[150, 0], [150, 0]])


def test_a_folders_classes_are_its_sub_folders_in_order(tmp_path):
    for name, n in (("b", 3), ("a", 2)):
        for i in range(n):
            picture(tmp_path / name, f"{i}.png")
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    data = train.ImageFolder(tmp_path, 8)
    assert data.classes == ["a", "b"] and data.labels.tolist() == [0, 0, 1, 1, 1] and data[4][1] == 1


def test_a_corrupt_file_is_named_and_replaced_by_the_next_of_its_class(tmp_path, capsys):
    for i, colour in enumerate(("red", "lime", "blue")):
        picture(tmp_path / "a", f"{i}.png", colour=colour)
    whole = (tmp_path / "a" / "1.png").read_bytes()
    (tmp_path / "a" / "1.png").write_bytes(whole[:40])
    data = train.ImageFolder(tmp_path, 8)
    assert data[1][0][0, 0].tolist() == [0, 0, 255] and data[1][1] == 0
    assert capsys.readouterr().err.count("warning: skipped") == 1                # named once, not every time


def test_a_large_jpeg_is_decoded_smaller_and_looks_the_same(tmp_path, monkeypatch):
    shape = np.kron(train.Shapes(64)[4][0], np.ones((32, 32, 1), np.uint8))           # 2048 pixels per side
    Image.fromarray(shape).save(tmp_path / "a.jpg", quality=95)
    decoded = []
    convert = Image.Image.convert
    monkeypatch.setattr(Image.Image, "convert", lambda image, *mode: decoded.append(image.size) or convert(image, *mode))
    assert np.abs(train.load_image(tmp_path / "a.jpg", 64).astype(int) - train.Shapes(64)[4][0]).mean() < 2
    assert decoded == [(256, 256)]                                      # an eighth, the smallest a JPEG can do
    assert train.load_image(tmp_path / "a.jpg", 512).shape == (512, 512, 3) and decoded[1] == (1024, 1024)


@pytest.fixture
def mixed_folder(tmp_path):
    """600 images, three blocks to pack, in two classes; one in colour, the others grey, one corrupt."""
    noise = np.random.default_rng(0).integers(0, 255, (600, 9, 9), np.uint8)
    for i, image in enumerate(noise):
        path = picture(tmp_path / "images" / "ab"[i % 2], f"{i:03d}.png")
        Image.fromarray(image).save(path)
    picture(tmp_path / "images" / "a", "000.png", colour=(10, 20, 30))
    (tmp_path / "images" / "b" / "301.png").write_bytes(b"not an image")
    return tmp_path / "images"


def test_a_packed_folder_holds_the_folders_pixels_labels_and_classes(mixed_folder, tmp_path, capsys):
    start("--preset", "shapes", "--data", mixed_folder, "--pack", tmp_path / "packed")
    assert "600 images at 32x32: 0.00 GB" in capsys.readouterr().out
    data, packed = train.open_data(mixed_folder, 32), train.open_data(tmp_path / "packed", 32)
    assert isinstance(packed.images, np.memmap) and packed.classes == ["a", "b"] and len(packed) == 600
    assert all(np.array_equal(data[i][0], packed[i][0]) and data[i][1] == packed[i][1] for i in range(600))
    runs = [["--data", source, "--ch", 8, "--batch", 8, "--steps", 2, "--flip", 1, "--out", tmp_path / f"run{k}"]
            for k, source in enumerate((mixed_folder, tmp_path / "packed"))]
    for run in runs:
        start("--preset", "shapes", "--held-out", tmp_path / "packed" if run[1] == mixed_folder else mixed_folder, *run)
    assert_same(weights_of(tmp_path / "run0", 2), weights_of(tmp_path / "run1", 2))
    start_metrics = ["--fake", tmp_path / "packed", "--real", mixed_folder, "--n", 20, "--inception", "none", "--out", tmp_path / "m.json"]
    start(*start_metrics, module=metrics)
    result = scores_in(tmp_path / "m.json")
    assert result["resolution"] == 32 and (result["n"], result["n_real"], result["real_skipped"]) == (20, 599, 1)
    assert "301.png" in capsys.readouterr().err


def test_packing_that_was_killed_continues_and_a_damaged_block_is_packed_again(mixed_folder, tmp_path, monkeypatch, capsys):
    command = ["--preset", "shapes", "--data", mixed_folder, "--pack", tmp_path / "packed", "--workers", 1]
    process = run_command("train.py", *command)
    while not (tmp_path / "packed" / "checksums.npy").exists() or (np.load(tmp_path / "packed" / "checksums.npy") < 0).all():
        assert process.poll() is None
    process.kill()
    process.wait()
    done = np.load(tmp_path / "packed" / "checksums.npy") >= 0
    if not done.all():                                                  # it was, on a machine that was faster than the kill
        assert "lacks" in refused(monkeypatch, capsys, train, "--preset", "shapes", "--data", tmp_path / "packed", "--out", tmp_path / "r")
    whole, first_block = (tmp_path / "packed" / "images.npy"), slice(128, 128 + 256 * 32 * 32 * 3)
    with open(whole, "r+b") as f:                                       # what is there already is kept, if it is sound
        f.seek(128 + 300 * 32 * 32 * 3)
        f.write(b"damage")
    kept = whole.read_bytes()[first_block]
    start(*command)
    assert not done[1] or "images 256 to 511" in capsys.readouterr().err
    assert whole.read_bytes()[first_block] == kept
    data, packed = train.open_data(mixed_folder, 32), train.open_data(tmp_path / "packed", 32)
    assert all(np.array_equal(data[i][0], packed[i][0]) for i in range(600))
    half = tmp_path / "half"                                            # killed before it was described
    half.mkdir()
    (half / "images.npy").write_bytes(b"")
    start(*command[:5], half)
    assert train.share_missing(half) == 0
    with open(half / "images.npy", "r+b") as f:
        f.truncate(1000)
    assert "is damaged; delete it" in refused(monkeypatch, capsys, train, *command[:5], half)
    assert "is damaged" in refused(monkeypatch, capsys, train, "--preset", "shapes", "--data", half)
    assert "would pass for a class" in refused(monkeypatch, capsys, train, *command[:5], mixed_folder / "packed")
    for change, sentence in ((lambda: (mixed_folder / "a" / "000.png").unlink(), "was packed from other images"),
                             (lambda: command.__setitem__(5, picture(tmp_path / "c", "d.png").parent), "is in use for something else")):
        change()
        assert sentence in refused(monkeypatch, capsys, train, *command)
    for spoil, sentence in ((lambda: None, "pixels and the model draws 64"),
                            (lambda: np.save(tmp_path / "packed" / "labels.npy", np.arange(600)), "is damaged"),
                            (lambda: (tmp_path / "packed" / "packed.json").write_text("{"), "is damaged")):
        spoil()
        model = "biggan64" if "draws" in sentence else "shapes32"
        assert sentence in refused(monkeypatch, capsys, train, "--preset", "shapes", "--model", model, "--data", tmp_path / "packed")


def test_cifar_10_is_fetched_once_checked_and_packed(tmp_path, capsys):
    # A small archive of the official layout: 4 records per file. Image k of file f has 10 f + k in red, the row in green and 2 in blue.
    (tmp_path / "www").mkdir()
    with tarfile.open(tmp_path / "www" / "c.tar.gz", "w:gz") as tar:
        for f, name in enumerate([*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin", "batches.meta.txt"]):
            content = b"".join(bytes([k]) + bytes([10 * f + k]) * 1024 + bytes(i // 32 for i in range(1024)) + bytes([2]) * 1024
                               for k in range(4))
            content = b"airplane\nautomobile\nbird\ncat\n\n" if "meta" in name else content
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    md5 = hashlib.md5((tmp_path / "www" / "c.tar.gz").read_bytes()).hexdigest()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "www")
    server = http.server.ThreadingHTTPServer(("localhost", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://localhost:{server.server_address[1]}/c.tar.gz"
    with pytest.raises(sample.UserError, match="its md5 is .*, not 0; delete it and repeat"):
        train.fetch_cifar10(tmp_path / "data", url, "0")
    (tmp_path / "data" / "c.tar.gz").unlink()
    with pytest.raises(sample.UserError, match="could not be fetched .*put it at .*none.tar.gz, and repeat"):
        train.fetch_cifar10(tmp_path / "data", url.replace("c.tar", "none.tar"), md5)
    train.fetch_cifar10(tmp_path / "data", url, md5)
    server.shutdown()
    server.server_close()
    train.fetch_cifar10(tmp_path / "data", url, md5)                    # once: without a server
    data, test = (train.open_data(tmp_path / "data" / name, 32) for name in ("cifar10", "cifar10-test"))
    assert data.classes == test.classes == ["airplane", "automobile", "bird", "cat"] and (len(data), len(test)) == (20, 4)
    for i in range(20):
        image, label = data[i]
        assert label == i % 4 and all((image[row] == [10 * (i // 4) + i % 4, row, 2]).all() for row in range(32))
    assert (test[3][0][9] == [53, 9, 2]).all()


def test_trouble_of_the_disk_is_waited_for_and_costs_no_image(tmp_path, monkeypatch, capsys):
    for i in range(2):
        picture(tmp_path / "a", f"{i}.png", colour=(i, i, i))
    data, trouble, waited, whole = train.ImageFolder(tmp_path, 8), [5, 5, 116], [], train.load_image

    def troubled(path, resolution):
        if trouble:
            raise OSError(trouble.pop(), "Stale file handle")
        return whole(path, resolution)

    monkeypatch.setattr(train, "load_image", troubled)
    monkeypatch.setattr(time, "sleep", waited.append)
    assert (data[0][0] == 0).all() and waited == [1, 10, 60] and not data.broken
    assert capsys.readouterr().err.count("cannot be read now: Stale file handle; trying again") == 3


def test_every_shape_is_drawn_inside_its_picture_and_reproducibly():
    shapes = train.Shapes(32)
    for i in range(200):
        image, label = shapes[i]
        assert label == i % 10 and image.shape == (32, 32, 3)
        assert (image[0] == image[0, 0]).all() and (image[:, 0] == image[0, 0]).all()      # the border is background
        assert np.abs(image.astype(int) - image[0, 0]).max() > 60                          # the shape stands out
        assert np.array_equal(image, train.Shapes(32)[i][0])


def test_every_epoch_shows_each_image_once_and_may_be_entered_anywhere():
    def first(position, batches, batch=4):
        order = iter(train.in_order(10, batch, position, seed=1, flip=1, rows=range(batch)))
        return [item for _ in range(batches) for item in next(order)]
    all_items = first(0, 10)
    for epoch in range(4):
        assert sorted(i for i, _ in all_items[10 * epoch:10 * epoch + 10]) == list(range(10))
    assert all_items[:10] != all_items[10:20]
    assert first(12, 2) == all_items[12:20] and first(0, 5, batch=8) == all_items
    assert 8 < sum(mirror for _, mirror in all_items) < 32
    assert not any(mirror for _, mirror in next(train.in_order(10, 10, 0, seed=1, flip=0, rows=range(10))))


# ---------------------------------------------------------------- training

TINY = ["--preset", "shapes", "--ch", "8", "--batch", "8", "--ema-start", "0", "--log-every", "2", "--save-every", "2",
        "--sample-every", "6"]


def start(*arguments, module=train):
    """Run a command in this process, as `run` would."""
    module.main([str(a) for a in arguments])


def weights_of(out, step):
    return sample.read_checkpoint(Path(out, "checkpoints", f"step-{step:08d}.pt"))


def assert_same(a, b):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    else:
        assert a == b


def trainer(*arguments):
    s = train.parse_settings(["--preset", "shapes", "--ch", "8", "--batch", "8", "--precision", "fp32", *map(str, arguments)])
    data = train.open_data("shapes", 32)
    t = train.Trainer(s, train.model_config(s, n_classes=10), torch.device("cpu"))
    return t, train.batches(data, s, 0, t.device)


def naive_loss_d(loss, r1, D, x, y, fake, fake_y, mix):
    """D's loss and penalty as the papers write them, with the gradients of the logits taken image by image."""
    def slopes(x, y):
        x = x.clone().requires_grad_()
        return torch.stack([torch.autograd.grad(D(x[i:i + 1], y[i:i + 1])[0], x, create_graph=True)[0][i].norm() for i in range(len(x))])
    real_logits, fake_logits = D(torch.cat([x, fake]), torch.cat([y, fake_y])).split(len(x))
    if loss == "hinge":
        value = F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()
    elif loss == "non-saturating":
        value = -real_logits.sigmoid().log().mean() - (1 - fake_logits.sigmoid()).log().mean()
    elif loss == "wgan-gp":
        mix = mix[:, None, None, None]
        value = fake_logits.mean() - real_logits.mean() + 10 * ((slopes((1 - mix) * x + mix * fake, y) - 1)**2).mean()
    return value + r1 / 2 * (slopes(x, y)**2).mean() if r1 else value


@pytest.mark.parametrize("loss, r1", [("hinge", 0), ("hinge", 10), ("non-saturating", 0), ("wgan-gp", 0)])
def test_a_step_is_two_updates_of_d_one_of_g_and_one_of_the_average(loss, r1):
    """The whole step again, written naively: separate penalty, torch's own Adam as it comes, no switching off of gradients."""
    beta, decay, lr = 0.01, 0.9, 1e-3
    t, real = trainer("--d-steps", "2", "--ortho", beta, "--ema", decay, "--ema-start", "0", "--g-lr", lr, "--d-lr", lr,
                      "--loss", loss, "--r1", r1, "--precision", "fp64")
    # In float64, since Adam's first steps are the signs of the gradients; and u rests: it does not matter how often D is called.
    t.D.eval()
    real = ((x.double(), y) for x, y in real)
    G, D, average = copy.deepcopy(t.G), copy.deepcopy(t.D), copy.deepcopy(t.ema.model)
    adam = {n: torch.optim.Adam(n.parameters(), lr, (0.0, 0.99)) for n in (G, D)}
    batches, noise = [next(real), next(real)], [next(t.noise(part)) for part in range(3)]
    assert not torch.equal(noise[1][0], noise[2][0]) and not torch.equal(batches[0][0], batches[1][0])
    logged = t.train_step(iter(batches))
    for (x, y), (z, fake_y, mix) in zip(batches, noise[1:]):
        fake_y = y if loss == "wgan-gp" else fake_y
        adam[D].zero_grad()
        naive_loss_d(loss, r1, D, x, y, G(z, fake_y).detach(), fake_y, mix).backward()
        adam[D].step()
    d_grads = [p.grad.clone() for p in D.parameters()]
    z, y, _ = noise[0]
    logits = D(G(z, y), y)
    g_loss = -logits.sigmoid().log().mean() if loss == "non-saturating" else -logits.mean()
    penalty = sum(((W.flatten(1) @ W.flatten(1).T) * (1 - torch.eye(len(W)))).square().sum()
                  for name, W in G.named_parameters() if W.ndim > 1 and name != "shared.weight")
    adam[G].zero_grad()
    (g_loss + beta * penalty).backward()
    adam[G].step()
    close(logged["G_loss"], g_loss.detach()), close(logged["ortho"], penalty.detach())
    close(logged["G_grad"], torch.cat([p.grad.flatten() for p in G.parameters()]).norm())
    for p, grad in zip(t.D.parameters(), d_grads):                      # G's step has added nothing to D's gradients
        close(p.grad, grad, 1e-9)
    assert not torch.equal(next(t.noise(1))[0], noise[1][0])            # the next step draws other noise
    for name, p in t.D.named_parameters():
        close(p, D.get_parameter(name), 1e-9)
    for name, p in t.G.named_parameters():
        if not re.search(r"conv\w+\.bias", name):                       # whose gradients are zero but for rounding: the sign is chance
            close(p, G.get_parameter(name), 1e-9)
            start = average.get_parameter(name)
            close(t.ema.model.get_parameter(name), start + (1 - decay) * (p - start), 1e-9)


class Point(nn.Module):
    """G: the same number at every pixel, whatever z and y."""

    def __init__(self, theta):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta))

    def forward(self, z, y):
        return self.theta.expand(len(z), 3, 32, 32)


class Slope(nn.Module):
    """D: psi times the mean of the pixels."""

    def __init__(self, psi):
        super().__init__()
        self.psi = nn.Parameter(torch.tensor(psi))

    def forward(self, x, y):
        return self.psi * x.mean((1, 2, 3))


def test_a_step_of_two_parameters_on_paper():
    # D: d/dpsi [relu(1 - psi m) + relu(1 + psi theta)] = theta - m within the margin; then G: d/dtheta (-psi theta) = -psi.
    # R1: |dD/dx|^2 / 2 = (psi / n)^2 n / 2 with n = 3072 pixels of slope psi / n each, so gamma psi / n comes on top.
    theta, psi, lr, gamma, n = 0.4, 0.3, 0.1, 50.0, 3 * 32 * 32
    t, real = trainer("--ortho", "0", "--r1", gamma)
    t.G, t.D = t.fast_G, t.fast_D = t.parallel_G, t.parallel_D = Point(theta), Slope(psi)
    t.ema, t.opt_G, t.opt_D = EMA(t.G, 0.9), torch.optim.SGD(t.G.parameters(), lr), torch.optim.SGD(t.D.parameters(), lr)
    x, y = next(real)
    logged = t.train_step(iter([(x, y)]))
    m = x.mean().item()
    new_psi = psi - lr * (theta - m + gamma * psi / n)
    close(t.D.psi.detach(), new_psi), close(t.D.psi.grad, theta - m + gamma * psi / n, 1e-5)
    close(t.G.theta.detach(), theta + lr * new_psi), close(t.G.theta.grad, -new_psi)
    close(t.ema.model.theta, 0.9 * theta + 0.1 * (theta + lr * new_psi))
    close([logged[k] for k in ("D_real", "D_fake", "D_penalty", "G_loss")],
          [psi * m, psi * theta, gamma * psi**2 / n / 2, -new_psi * theta], 1e-5)
    close([logged["D_grad"], logged["G_grad"]], [abs(theta - m + gamma * psi / n), new_psi], 1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_takes_nearly_the_step_of_float32(precision):
    (exact, real), (t, _) = trainer("--ortho", "1e-2"), trainer("--ortho", "1e-2", "--precision", precision)
    t.scaler_D = torch.amp.GradScaler("cpu", init_scale=2.0**10) if precision == "fp16" else t.scaler_D
    x, y = next(real)
    logged = [u.train_step(iter([(x, y)])) for u in (exact, t)]
    assert logged[1]["D_skipped"] == 0 and t.half.itemsize == 2
    for network in "GD":
        for (name, p), q in zip(getattr(exact, network).named_parameters(), getattr(t, network).parameters()):
            if p.grad.norm() > 1e-3 and not (precision == "fp16" and network == "G" and logged[1]["G_skipped"]):
                assert F.cosine_similarity(p.grad.flatten(), q.grad.flatten(), 0) > 0.9, name
                assert 0.9 < q.grad.norm() / p.grad.norm() < 1.1, name


def test_the_loss_scale_drops_out_of_the_step_and_halves_when_it_overflows():
    t, real = trainer("--precision", "fp16")
    before = copy.deepcopy(t.D.state_dict())
    t.scaler_D = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    logged = t.train_step(real)                                         # the scaled gradient of every activation is infinite in float16
    assert logged["D_skipped"] == 1 and logged["D_grad"] == 0 and t.scaler_D.get_scale() == 2.0**59
    assert_same(parameters_of(t.D), {name: before[name] for name in parameters_of(t.D)})
    t.G, t.D = t.fast_G, t.fast_D = t.parallel_G, t.parallel_D = Point(0.4), Slope(0.3)
    t.ema, t.opt_G, t.opt_D = EMA(t.G, 0.9), torch.optim.SGD(t.G.parameters(), 0.1), torch.optim.SGD(t.D.parameters(), 0.1)
    t.s.ortho, t.not_finite, t.scaler_D = 0, {}, torch.amp.GradScaler("cpu", init_scale=2.0**10)
    x, y = next(real)
    logged = t.train_step(iter([(x, y)]))
    psi = 0.3 - 0.1 * (0.4 - x.mean().item())
    close([logged["D_grad"], logged["G_grad"]], [abs(0.4 - x.mean().item()), psi], 1e-3)
    close(t.D.psi.detach(), psi, 1e-3), close(t.G.theta.detach(), 0.4 + 0.1 * psi, 1e-3)


def parameters_of(network):
    return {name: p.detach() for name, p in network.named_parameters()}


def test_a_divergence_is_named_by_its_layer_and_leaves_the_weights_whole():
    t, real = trainer()
    hook = t.D.blocks[1].conv1.weight.register_hook(lambda gradient: gradient / 0)
    before = copy.deepcopy(parameters_of(t.D))
    assert t.train_step(real)["D_skipped"] == 1 and t.first_not_finite() == "the gradient of D.blocks.1.conv1.weight"
    assert_same(parameters_of(t.D), before)
    with pytest.raises(SystemExit, match="the gradient of D.blocks.1.conv1.weight is no longer finite"):
        train.stop_if_not_finite(t, {}, t.s)
    hook.remove()
    hook = t.G.blocks[2].register_forward_hook(lambda module, inputs, output: output / 0)
    assert t.first_not_finite() == "the output of G.blocks.2"
    hook.remove()
    with torch.no_grad():
        t.G.blocks[1].bn1.gain.weight[3, 5] = math.nan
    assert t.first_not_finite() == "the weight G.blocks.1.bn1.gain.weight"


def test_the_micro_batch_that_fits_is_found_by_trying():
    t, _ = trainer("--batch", 24)

    def memory_for_four(module, inputs):
        if len(inputs[0]) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")

    t.G.register_forward_pre_hook(memory_for_four)
    assert t.micro_batch_that_fits() == 3                               # 24, then 12, 6 and 3
    t.D.register_forward_pre_hook(lambda module, inputs: memory_for_four(module, [range(99)]))
    assert t.micro_batch_that_fits() is None


def test_networks_that_do_not_fit_into_memory_end_in_one_sentence(tmp_path):
    process = run_command("train.py", *TINY, "--ch", 4096, "--out", tmp_path / "r", "--steps", 1,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30, 8 * 2**30)))
    error = process.communicate()[1]
    assert process.returncode == 2 and re.fullmatch("error: the networks of --model shapes32 --ch 4096 do not fit.*\n", error), error


def test_the_bound_on_singular_values_holds_in_training():
    # Fast steps let sigma_0 grow. Only one singular value is lowered per step and several grow, so the bound gives a little.
    def largest(*options):
        t, real = trainer("--g-lr", "2e-3", *options)
        for _ in range(30):
            t.train_step(real)
        G = [sigmas for name, sigmas in t.spectra().items() if name.startswith("G.")]
        return max(s[0] for s in G), max(s[0] / s[1] for s in G)
    free, free_ratio = largest()
    assert free > 1.15 and free_ratio > 1.08
    assert largest("--sigma-fixed", 1.02)[0] < 1.1
    assert largest("--sigma-ratio", 1.05)[1] < 1.06
    assert largest("--sigma-fixed", 1.0, "--sigma-pull", 100)[0] < 1.15


def test_spectra_names_every_layer_and_measures_the_weights_before_spectral_norm():
    t, _ = trainer()
    t.G.blocks[1].conv1.weight.data *= 3
    spectra = t.spectra()
    assert spectra["G.blocks.1.conv1"] == [pytest.approx(3, abs=1e-3)] * 3 and spectra["D.linear"] == [pytest.approx(1, abs=1e-3)]
    assert len(spectra) == sum(isinstance(m, SpectralNorm) for network in (t.G, t.D) for m in network.modules())


def test_ds_memory_is_the_share_of_real_images_with_positive_logits():
    t, real = trainer()
    images, labels = train.some_images(train.Shapes(32, held_out=True), 100, seed=0)
    u = t.D.linear.u.clone()
    with torch.no_grad():
        logits = t.D.eval()(train.to_network(images, t.device), labels)
        t.D.linear.bias -= logits.sort().values[30:32].mean()           # now 31 of 100 are below 0
    t.D.train()
    assert t.share_called_real(images, labels) == pytest.approx(0.69)
    assert t.D.training and torch.equal(t.D.linear.u, u)                # looking has changed nothing
    assert [trainer("--loss", name)[0].border for name in LOSSES] == [0, 0, 0.5, None]


def test_held_out_shapes_are_other_shapes_of_the_same_classes():
    seen, held_out = train.open_data("shapes", 32), train.open_data("shapes", 32, held_out=True)
    assert seen.classes == held_out.classes and seen[3][1] == held_out[3][1] and not np.array_equal(seen[3][0], held_out[3][0])
    images, labels = train.some_images(held_out, 50, seed=1)
    assert images.shape == (50, 32, 32, 3) and len(set(labels.tolist())) == 10


def test_the_log_shows_singular_values_and_memory_every_so_often(tmp_path, capsys):
    start(*TINY, "--out", tmp_path / "r", "--steps", 5, "--eval-every", 3)
    lines = [json.loads(line) for line in (tmp_path / "r" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3, 4, 5] and ["sigma" in line for line in lines] == [False, True, False, True]
    assert len(lines[1]["sigma"]["G.linear"]) == 3 and 0 <= lines[1]["D_calls_held_out_real"] <= 1
    assert all(line["G_grad"] > 0 and line["D_grad"] > 0 for line in lines)
    assert re.search(r"score \d+\.\d; largest sigma_0: ", capsys.readouterr().out) and lines[1]["score"] > 0
    # Looking changes nothing.
    start(*TINY, "--out", tmp_path / "s", "--steps", 5)
    a, b = weights_of(tmp_path / "r", 5), weights_of(tmp_path / "s", 5)
    assert_same({name: a[name] for name in a if name != "monitor"}, {name: b[name] for name in b if name != "monitor"})


def test_noise_does_not_depend_on_how_the_batch_is_split():
    whole, parts = (list(trainer("--micro-batch", size)[0].noise(1)) for size in (8, 2))
    assert len(whole) == 1 and len(parts) == 4
    for a, b in zip(whole[0], zip(*parts)):
        assert torch.equal(a, torch.cat(b))


@pytest.mark.parametrize("preset", train.PRESETS)
def test_every_preset_describes_a_model_that_exists(preset):
    s = train.parse_settings(["--preset", preset, "--data", "x"])
    config = train.model_config(s, n_classes=10)
    with torch.device("meta"):
        Generator(config), Discriminator(config)
    for name, value in train.PRESETS[preset].items():
        assert type(value) is str or getattr(train.Settings, name) != value     # a preset lists only what differs


def test_each_update_leaves_the_other_network_alone():
    t, real = trainer("--g-lr", "0")
    before = {name: p.clone() for name, p in t.G.named_parameters()}
    d_before = {name: p.clone() for name, p in t.D.named_parameters()}
    t.train_step(real)
    assert all(torch.equal(p, before[name]) for name, p in t.G.named_parameters())
    assert not any(torch.equal(p, d_before[name]) for name, p in t.D.named_parameters() if "weight" in name and "attention" not in name)
    t, real = trainer("--d-lr", "0")
    d_before = {name: p.clone() for name, p in t.D.named_parameters()}
    t.train_step(real)
    assert all(torch.equal(p, d_before[name]) for name, p in t.D.named_parameters())


def test_gradients_of_micro_batches_add_up():
    # D has no batch norm: with G's part of the batch fixed by eval mode, 2 halves give the gradient of the whole.
    grads = []
    for micro in ("8", "4"):
        torch.manual_seed(0)
        t, real = trainer("--micro-batch", micro, "--g-lr", "0", "--d-lr", "0", "--ortho", "0")
        t.D.eval(), t.G.eval()
        t.train_step(real)
        grads.append([p.grad.clone() for network in (t.D, t.G) for p in network.parameters()])
    for a, b in zip(*grads):
        close(a, b, 1e-5, 1e-3)


def test_training_steps_reduce_ds_loss_on_a_frozen_g():
    t, real = trainer("--g-lr", "0", "--d-lr", "1e-3")
    logs = [t.train_step(real) for _ in range(30)]
    assert sum(log["D_loss"] for log in logs[-5:]) < 0.7 * sum(log["D_loss"] for log in logs[:5])
    assert logs[-1]["D_real"] > logs[-1]["D_fake"] + 1


def test_stopping_and_continuing_equals_never_stopping(tmp_path):
    start(*TINY, "--out", tmp_path / "a", "--steps", 6, "--workers", 1)
    start(*TINY, "--out", tmp_path / "b", "--steps", 4)
    start(*TINY, "--out", tmp_path / "b", "--steps", 6)
    assert_same(weights_of(tmp_path / "a", 6), weights_of(tmp_path / "b", 6))
    lines = [json.loads(line) for line in (tmp_path / "b" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert sorted(p.name for p in (tmp_path / "b" / "checkpoints").iterdir()) == [f"step-{k:08d}.pt" for k in (2, 4, 6)]
    assert Image.open(tmp_path / "b" / "samples" / "step-00000006.png").size == (342, 342)
    assert json.loads((tmp_path / "b" / "config.json").read_text())["classes"][7] == "square"


def run_command(script, *arguments, **options):
    command = [sys.executable, script if script in ("-m", "-c") else HERE / script, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, **options)


def kill_again_and_again(folder, kills, *options):
    """Kill a run at so many random moments, some before its next checkpoint, then let it finish. It must equal one left alone."""
    dice, killed, started, seconds = random.Random(0), 0, time.perf_counter(), None
    for kill in range(kills):
        process = run_command("train.py", *TINY, "--out", folder / "killed", *options)
        if kill == 0:                                                   # how long this machine takes to come to a checkpoint
            while not sample.checkpoints_of(folder / "killed"):
                assert process.poll() is None and time.sleep(0.01) is None
            seconds = 2 * (time.perf_counter() - started)
        else:
            time.sleep(dice.uniform(0, seconds))
        killed += process.poll() is None
        process.kill()
        error = process.communicate()[1]
        assert process.returncode in (-signal.SIGKILL, 0), error
        for path in sample.checkpoints_of(folder / "killed"):
            sample.read_checkpoint(path)
    continued_from = max([int(path.stem[5:]) for path in sample.checkpoints_of(folder / "killed")], default=0)
    processes = [run_command("train.py", *TINY, "--out", folder / name, *options) for name in ("killed", "whole")]
    (output, error), (_, other_error) = (process.communicate() for process in processes)
    assert [process.returncode for process in processes] == [0, 0], error + other_error
    steps = sample.newest_checkpoint(folder / "whole")[0]["step"]
    assert_same(weights_of(folder / "killed", steps), weights_of(folder / "whole", steps))
    assert not list(folder.rglob("*.tmp")) and not list(folder.rglob("*.damaged"))
    assert "continuing" in output or continued_from == steps, output
    return killed, continued_from, steps


def test_sigkill_at_any_moment_costs_no_checkpoint_and_changes_nothing(tmp_path):
    killed, continued_from, steps = kill_again_and_again(tmp_path, 4, "--steps", 40)
    assert killed and continued_from and steps == 40


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_save_and_leave_with_status_0(tmp_path, number):
    process = run_command("train.py", *TINY, "--out", tmp_path / "r", "--steps", 10_000, "--save-every", 10_000, "--workers", 1)
    while not (tmp_path / "r" / "log.jsonl").exists() or not (tmp_path / "r" / "log.jsonl").read_text():
        time.sleep(0.01)
    process.send_signal(number)
    output, error = process.communicate(timeout=60)
    assert process.returncode == 0 and "the same command continues" in output and "Traceback" not in error, error
    assert sample.newest_checkpoint(tmp_path / "r")[0]["step"] >= 2


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path, capsys):
    start(*TINY, "--out", tmp_path / "r", "--steps", 4)
    path = tmp_path / "r" / "checkpoints" / "step-00000004.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1                                     # one bit, somewhere in the weights
    path.write_bytes(content)
    checkpoint, _ = sample.newest_checkpoint(tmp_path / "r")
    assert checkpoint["step"] == 2 and "step-00000004.pt is damaged" in capsys.readouterr().err
    (tmp_path / "r" / "checkpoints" / "best.pt").write_text("the user's own")
    with open(tmp_path / "r" / "log.jsonl", "a") as log:
        log.write("\x00 half a line\n")
    start(*TINY, "--out", tmp_path / "r", "--steps", 3, "--keep", 1)    # what is damaged neither counts as newest nor is in the way
    assert sorted(p.name for p in path.parent.iterdir()) == ["best.pt", "step-00000003.pt", "step-00000004.damaged"]
    assert [json.loads(line)["step"] for line in (tmp_path / "r" / "log.jsonl").read_text().splitlines()] == [2, 3]


def test_a_second_process_in_the_same_folder_is_refused(tmp_path):
    first = run_command("train.py", *TINY, "--out", tmp_path / "r", "--steps", 10_000)
    while not sample.checkpoints_of(tmp_path / "r"):
        time.sleep(0.01)
    second = run_command("train.py", *TINY, "--out", tmp_path / "r", "--steps", 10_000)
    error = second.communicate()[1]
    first.kill(), first.communicate()
    assert second.returncode == 2 and "another process is at work" in error


def test_a_first_attempt_that_saved_nothing_is_not_in_the_way(tmp_path):
    with pytest.raises(SystemExit, match="no longer finite"):
        start(*TINY, "--out", tmp_path / "r", "--steps", 4, "--g-lr", "1e38", "--save-every", 4, "--log-every", 4)
    start(*TINY, "--out", tmp_path / "r", "--steps", 2)


def test_a_failing_save_costs_a_warning_and_no_older_checkpoint(tmp_path, capsys, monkeypatch):
    start(*TINY, "--out", tmp_path / "r", "--steps", 2)
    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        sample.save_atomically(tmp_path / "x", lambda f: f.write(b"x"))
    t, _ = trainer("--out", str(tmp_path / "r"))
    train.save_checkpoint(t, list(train.SHAPES), t.s)
    assert "could not be written" in capsys.readouterr().err
    monkeypatch.undo()
    assert sample.newest_checkpoint(tmp_path / "r")[0]["step"] == 2 and not list(tmp_path.rglob("*.tmp"))
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SystemExit, match="step 3 is not saved"):
        start(*TINY, "--out", tmp_path / "r", "--steps", 3)


def test_the_best_the_newest_and_every_nth_checkpoint_are_kept(tmp_path):
    start(*TINY, "--out", tmp_path / "r", "--steps", 13, "--eval-every", 3, "--sample-every", 99, "--keep", 1, "--keep-every", 4)
    lines = [json.loads(line) for line in (tmp_path / "r" / "log.jsonl").read_text().splitlines()]
    best = min((line["score"], line["step"]) for line in lines if "score" in line)
    kept = [int(path.stem[5:]) for path in sample.checkpoints_of(tmp_path / "r")]
    assert kept == sorted({4, 8, 12, 13, best[1]})
    assert (weights_of(tmp_path / "r", 13)["monitor"]["score"], weights_of(tmp_path / "r", 13)["monitor"]["best"]) == best


def test_the_best_checkpoint_is_kept_however_old(tmp_path):
    s = train.parse_settings([*TINY, "--out", str(tmp_path), "--keep", "2", "--keep-every", "5"])
    t = train.Trainer(s, train.model_config(s, n_classes=10), torch.device("cpu"))
    for t.step in range(1, 10):
        t.monitor.best = 3 if t.step < 9 else 4
        train.save_checkpoint(t, list("abcdefghij"), s)
        if t.step == 8:
            assert [int(path.stem[5:]) for path in sample.checkpoints_of(tmp_path)] == [3, 5, 7, 8]
    assert [int(path.stem[5:]) for path in sample.checkpoints_of(tmp_path)] == [5, 8, 9]        # 3 is the best no longer


def healthy(step, **changes):
    """A line of the log of a run in good health."""
    return {"step": step, "diversity": 0.9, "D_loss": 1.5, "D_guessing": 2.0, "D_real": 0.4, "D_fake": -0.3,
            "sigma_0": {"linear": 1.5, "blocks.0.conv1": 1.4}, **changes}


@pytest.mark.parametrize("sick, reason", [
    (lambda k: {"diversity": 0.4}, "images of one class have become alike: they differ 0.40 times as much as real ones, and did 0.90"),
    (lambda k: {"D_loss": 0.01}, "D is never wrong any more: its loss is 0.010, where guessing would cost 2.000"),
    (lambda k: {"D_fake": 0.399}, "D no longer tells real from generated images"),
    (lambda k: {"sigma_0": {"linear": 1.5 * 1.01 ** (50 * k), "blocks.0.conv1": 1.4}}, "the largest singular value of linear explodes"),
    (lambda k: {"score": 80.0}, "the score is 80.0, at step 200 it was 39.0"),
])
def test_the_monitor_names_each_sign_of_collapse_and_none_in_health(sick, reason):
    monitor = metrics.Monitor()
    well = lambda step: healthy(step, **({"score": 40.0 - step / 200} if step % 200 == 0 else {}))
    for step in range(50, 5050, 50):
        assert monitor.judge(well(step))[0] is None
    monitor = metrics.Monitor()
    for step in range(50, 250, 50):
        verdict = monitor.judge(well(step))
    assert verdict == (None, True) and monitor.best == 200
    for k in range(1, 7):
        verdict, _ = monitor.judge(healthy(200 + 50 * k, **sick(k)))
        if verdict:
            break
    assert verdict and verdict.startswith(reason) and k > 1 and monitor.judge(healthy(600))[0] is None


def test_the_monitor_sees_what_is_no_number_and_explosions_between_rare_lines():
    monitor = metrics.Monitor()
    assert monitor.judge(healthy(1000))[0] is None
    assert "linear explodes: 1.5 at step 1000, 3.1 now" in monitor.judge(healthy(2000, sigma_0={"linear": 3.1}))[0]
    for bad in {"diversity": math.nan}, {"score": math.inf}, {"sigma_0": {"linear": math.nan}}:
        assert "is no longer a finite number" in metrics.Monitor().judge(healthy(50, **bad))[0]


def test_spread_is_the_deviation_within_classes_of_what_is_left_after_averaging():
    # Class 0: two images of a and b, deviation |a - b| / sqrt 2; class 1: three equal ones but for a fine checkerboard.
    x = torch.zeros(5, 3, 16, 16)
    x[0], x[1], x[2:], x[3, :, ::2, ::2], x[3, :, 1::2, ::2] = 0.5, -0.1, 0.3, 1.3, -0.7
    close(metrics.spread_within(x[:2], torch.tensor([0, 0])), 0.6 / math.sqrt(2))
    close(metrics.spread_within(x, torch.tensor([0, 0, 1, 1, 1])), math.sqrt(0.36 / 2 / 2))


def test_a_collapsed_run_stops_or_goes_back_to_its_best_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(metrics.Monitor, "few", 9.0)                    # every run has collapsed ...
    monkeypatch.setattr(metrics.Monitor, "lines", 4)                    # ... after four lines ...
    monkeypatch.setattr(metrics.Monitor, "window", 9)                   # ... and six steps
    command = [*TINY, "--steps", 40, "--eval-every", 4, "--sample-every", 99, "--out"]
    with pytest.raises(SystemExit, match=r"collapse at step 8: images of one class .* the best weights are those of step 4 "):
        start(*command, tmp_path / "stop")
    assert "collapse" in json.loads((tmp_path / "stop" / "log.jsonl").read_text().splitlines()[-1])
    start(*TINY, "--steps", 9, "--eval-every", 99, "--sample-every", 99, "--on-collapse", "warn", "--out", tmp_path / "warn")
    assert "step 8: images of one class" in capsys.readouterr().err and weights_of(tmp_path / "warn", 9)
    with pytest.raises(SystemExit, match="rolled back 3 times already"):
        start(*command, tmp_path / "back", "--on-collapse", "rollback")
    before, after = (sample.newest_checkpoint(tmp_path / name)[0] for name in ("stop", "back"))
    assert after["monitor"]["rollbacks"] == 3 and list((tmp_path / "back" / "checkpoints").glob("*.collapsed"))
    for name, lr in ("opt_G", 2e-4), ("opt_D", 4e-4):
        assert before[name]["param_groups"][0]["lr"] == lr and after[name]["param_groups"][0]["lr"] == lr / 8
    assert capsys.readouterr().out.count("rolled back from step") == 3


def test_after_a_rollback_the_noise_is_other_noise():
    t, _ = trainer()
    first = next(iter(t.noise(1)))[0]
    t.monitor.rollbacks = 1
    assert not torch.equal(first, next(iter(t.noise(1)))[0])


def test_a_run_that_has_become_nan_stops_and_keeps_its_checkpoints(tmp_path):
    start(*TINY, "--out", tmp_path / "r", "--steps", 2)
    with pytest.raises(SystemExit, match="no longer finite"):
        start(*TINY, "--out", tmp_path / "s", "--steps", 100, "--g-lr", "1e30", "--d-lr", "1e30")
    for path in (tmp_path / "s" / "checkpoints").glob("*.pt"):
        assert all(p.isfinite().all() for p in sample.read_checkpoint(path)["G"].values())


# ---------------------------------------------------------------- several processes

def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def normalise_a_part(rank, port, folder):
    """One of two processes: its half of the batch through a batch norm, and back."""
    torch.distributed.init_process_group("gloo", f"tcp://localhost:{port}", rank=rank, world_size=2)
    x, g = torch.load(folder / "batch.pt")
    half = x[4 * rank:4 * rank + 4].clone().requires_grad_()
    bn = BatchNorm(3, 1e-4).double()
    y = bn(half)
    y.backward(g[4 * rank:4 * rank + 4])
    torch.save([y.detach(), half.grad, bn.gain.grad, bn.running_mean, bn.running_var], folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_cross_replica_batch_norm_is_that_of_the_whole_batch(tmp_path):
    x, g = 5 + torch.randn(8, 3, 4, 4, dtype=torch.float64), torch.randn(8, 3, 4, 4, dtype=torch.float64)
    x[:4] *= 3                                                          # the halves differ in mean and variance
    torch.save([x, g], tmp_path / "batch.pt")
    torch.multiprocessing.spawn(normalise_a_part, (free_port(), tmp_path), nprocs=2)
    (y0, x0, g0, *running), (y1, x1, g1, *_) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    x.requires_grad_()
    bn, witness = BatchNorm(3, 1e-4).double(), nn.BatchNorm2d(3, 1e-4).double()
    for whole, gain in (bn, bn.gain), (witness, witness.weight):
        x.grad = None
        y = whole(x)
        y.backward(g)
        close(torch.cat([y0, y1]), y, 1e-12), close(torch.cat([x0, x1]), x.grad, 1e-12), close(g0 + g1, gain.grad, 1e-12)
        close(running[0], whole.running_mean, 1e-12), close(running[1], whole.running_var, 1e-12)


def compile_a_part(rank, port, folder):
    """One of two processes: G and D as torch.compile traces them, each as one graph without a break, against G and D themselves."""
    torch.distributed.init_process_group("gloo", f"tcp://localhost:{port}", rank=rank, world_size=2)
    torch.manual_seed(0)
    plain_G, plain_D = Generator(small("shapes32")), Discriminator(small("shapes32"))
    z, y = torch.randn(2, 3, 64)[rank], torch.arange(3)
    results = []
    for trace in (lambda network: network, lambda network: torch.compile(network, backend="aot_eager", fullgraph=True, dynamic=False)):
        G, D = copy.deepcopy(plain_G), copy.deepcopy(plain_D)
        logits = trace(D)(trace(G)(z, y), y)
        logits.sum().backward()
        results.append([logits.detach(), *(p.grad for p in G.parameters()), *G.buffers()])
    torch.save(results, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_torch_compile_finds_no_graph_break_not_even_at_the_exchange_of_moments(tmp_path):
    torch.multiprocessing.spawn(compile_a_part, (free_port(), tmp_path), nprocs=2)
    for rank in (0, 1):
        plain, compiled = torch.load(tmp_path / f"{rank}.pt")
        for a, b in zip(plain, compiled):
            close(a, b, 1e-5, 1e-5)


SHARED = ["--preset", "shapes", "--ch", "8", "--batch", "8", "--precision", "fp64", "--d-steps", "2", "--ema", "0.9", "--ema-start", "1",
          "--save-every", "1", "--log-every", "1", "--eval-every", "3", "--keep", "9"]


def torchrun(n, *arguments, **options):
    return run_command("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", n, *arguments, **options)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    # Commands, like what they are compared with: the first weights depend, by a rounding, on the number of threads.
    runs = [run_command("train.py", *SHARED, "--out", folder / name, "--steps", 5, *options)
            for name, options in (("whole", []), ("split", ["--micro-batch", 4]))]
    assert [run.communicate() and run.returncode for run in runs] == [0, 0]
    return folder


def assert_equal_up_to_rounding(a, b):
    """Parameters, buffers and optimiser states to 1e-9. The biases that a batch norm of G cancels have no gradient but rounding, which Adam
    makes as large as any other: they stay below 1e-7."""
    assert a.keys() == b.keys()
    for key in a:
        if isinstance(a[key], dict):
            assert_equal_up_to_rounding(a[key], b[key])
        elif isinstance(a[key], torch.Tensor) and re.search(r"conv\w+\.bias", str(key)):
            close(a[key], b[key], 1e-7, 1e-9)
        elif isinstance(a[key], torch.Tensor):
            close(a[key], b[key], 1e-13, 1e-9)

def test_five_steps_with_4x4_kernels_equal_five_with_the_papers_operations(monkeypatch):
    """Up-sampling and pooling done as they are written, in float64."""
    states = []
    for _ in range(2):
        t, real = trainer("--precision", "fp64", "--d-steps", 2)
        for _ in range(5):
            t.train_step(real)
        states.append({"G": t.G.state_dict(), "D": t.D.state_dict(), "G_ema": t.ema.model.state_dict()})
        monkeypatch.setattr(biggan, "upsample_conv3x3", lambda x, layer: layer(biggan.upsample(x)))
        monkeypatch.setattr(biggan, "conv3x3_downsample", lambda x, layer: F.avg_pool2d(layer(x), 2))
    assert any(not torch.equal(states[0]["G"][name], states[1]["G"][name]) for name in states[0]["G"])      # it was another way
    assert_equal_up_to_rounding(*states)


def test_the_benchmark_counts_operations_and_says_where_the_time_goes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    start("--preset", "shapes", "--ch", 8, "--batch", 8, "--benchmark", 2)
    said = capsys.readouterr().out
    assert re.search(r"real images per second; \d+ ms per step: 1 times \d+ ms for D, \d+ ms for G", said)
    assert re.search(r"at most [\d.]+ GB\n\d+% of the time is outside convolutions; the five largest entries:(\n +\d+% +\d+ x .*){5}", said)
    assert not listing(tmp_path)



@pytest.mark.parametrize("n, name, options", [(2, "whole", []), (4, "whole", []), (2, "split", ["--micro-batch", 4])])
def test_several_processes_compute_what_one_does(one_process, tmp_path, n, name, options):
    process = torchrun(n, HERE / "train.py", *SHARED, "--out", tmp_path / "r", "--steps", 5, *options)
    output, error = process.communicate()
    assert process.returncode == 0 and output.count("done: 5 steps") == 1, error
    assert_equal_up_to_rounding(weights_of(one_process / name, 5), weights_of(tmp_path / "r", 5))
    logs = [[json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] for run in (one_process / name, tmp_path / "r")]
    for a, b in zip(*logs):
        assert {k: v for k, v in b.items() if isinstance(v, float) and "per_" not in k} == pytest.approx(
            {k: v for k, v in a.items() if isinstance(v, float) and "per_" not in k}, rel=1e-4, abs=1e-6)
    pictures = [np.asarray(Image.open(run / "samples/step-00000005.png")).astype(int) for run in (one_process / name, tmp_path / "r")]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


def test_a_run_may_continue_on_another_number_of_processes(one_process, tmp_path):
    run_command("train.py", *SHARED, "--out", tmp_path / "r", "--steps", 3).communicate()
    process = torchrun(2, HERE / "train.py", *SHARED, "--out", tmp_path / "r", "--steps", 5)
    output, error = process.communicate()
    assert process.returncode == 0 and output.count("from step 3") == 1, error
    assert_equal_up_to_rounding(weights_of(one_process / "whole", 5), weights_of(tmp_path / "r", 5))


def test_a_mistake_is_reported_once_by_many_processes(tmp_path):
    for arguments, sentence in ((["--batch", 9], "2 processes cannot share --batch 9"), (["--data", tmp_path / "none"], "does not exist")):
        process = torchrun(2, HERE / "train.py", *SHARED, "--out", tmp_path / "r", "--steps", 5, *arguments)
        error = process.communicate()[1]
        assert process.returncode and len(re.findall("^error: .*" + sentence, error, re.M)) == 1 and "train.py\", line" not in error, error
        assert not (tmp_path / "r").exists()


def test_a_killed_process_is_replaced_and_nothing_changes(tmp_path):
    command = [*SHARED, "--steps", 16, "--sample-every", 99, "--eval-every", 99, "--out"]
    whole = torchrun(2, HERE / "train.py", *command, tmp_path / "whole")
    assert whole.communicate() and whole.returncode == 0
    process = torchrun(2, "--max-restarts", 3, HERE / "train.py", *command, tmp_path / "killed")
    while len(sample.checkpoints_of(tmp_path / "killed")) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes():
            os.kill(int(pid), signal.SIGKILL)
    output, error = process.communicate()
    assert process.returncode == 0 and output.count("continuing") == 1 and "done: 16 steps" in output, error
    assert "lost another one" in error and "Traceback" not in error, error
    assert_same(weights_of(tmp_path / "whole", 16), weights_of(tmp_path / "killed", 16))


# ---------------------------------------------------------------- sampling

@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "shapes"
    start(*TINY, "--out", out, "--steps", 4)
    return out


def test_an_image_depends_on_its_seed_and_not_on_its_neighbours(tiny_run):
    G = sample.load_generator(tiny_run)
    labels, seeds = [k % 10 for k in range(10)], list(range(10))
    together = sample.draw_seeds(G, labels, seeds, batch=10).astype(int)
    alone = sample.draw_seeds(G, labels, seeds, batch=1).astype(int)
    assert np.abs(together - alone).max() <= 1                          # at most a rounding


def test_samples_are_drawn_by_the_averaged_generator(tiny_run):
    G = sample.load_generator(tiny_run)
    checkpoint = sample.newest_checkpoint(tiny_run)[0]
    assert G.classes == list(train.SHAPES) and not G.training
    for name, p in G.named_parameters():                                # matrices are divided by their sigma
        a, b = p.flatten().double(), checkpoint["G_ema"][name].flatten().double()
        close(a / a.norm().clamp(min=1e-12), b / b.norm().clamp(min=1e-12), atol=1e-6)
    assert not torch.equal(checkpoint["G_ema"]["linear.weight"], checkpoint["G"]["linear.weight"])


def test_sample_writes_one_row_per_class(tiny_run, tmp_path, capsys):
    start("--weights", tiny_run, "--class", "star", "3", "--n", 5, "--trunc", 0.5, "--out", tmp_path / "a.png", module=sample)
    assert Image.open(tmp_path / "a.png").size == (5 * 34 + 2, 2 * 34 + 2)
    assert "10 images of star (8), cross (3), truncated at 0.5" in capsys.readouterr().out
    checkpoint = next((tiny_run / "checkpoints").glob("*.pt"))
    start("--weights", checkpoint, "--class", "HEART", "--n", 4, "--out", tmp_path / "b.png", module=sample)
    assert Image.open(tmp_path / "b.png").size == (2 * 34 + 2, 2 * 34 + 2)
    for n, columns in (8, 4), (7, 3), (9, 3):                           # one class: about a square, without a hole where that can be
        start("--weights", checkpoint, "--class", "HEART", "--n", n, "--out", tmp_path / "c.png", module=sample)
        assert Image.open(tmp_path / "c.png").size == (columns * 34 + 2, -(-n // columns) * 34 + 2)


def scores_in(path, k=0):
    return json.loads(Path(path).read_text())["results"][k]


def test_metrics_scores_a_run_at_every_level(tiny_run, tmp_path):
    command = ["--weights", tiny_run, "--data", "shapes", "--n", 50, "--inception", "none"]
    start(*command, "--out", tmp_path / "m.json", module=metrics)
    result = scores_in(tmp_path / "m.json")
    assert set(result["swd_x1000"]) == {"32", "16"} and result["n"] == 50 and result["swd_x1000_mean"] > 0
    start(*command, "--trunc", 0.1, "--out", tmp_path / "t.json", module=metrics)
    truncated = scores_in(tmp_path / "t.json")
    G = sample.load_generator(tiny_run, 0.1)
    fake = sample.draw_seeds(G, [k % 10 for k in range(50)], range(50), G.noise)
    assert truncated["truncation"] == 0.1 and truncated["fake_colour"]["mean"] == metrics.mean_colours(fake)[0].round(1).tolist()
    for i in range(3):
        picture(tmp_path / "images", f"{i}.png", size=(45, 37), colour=(i, i, 200))
    start("--fake", tmp_path / "images", "--real", tmp_path / "images", "--inception", "none", "--out", tmp_path / "n.json", module=metrics)
    assert scores_in(tmp_path / "n.json")["real_colour"]["mean"] == [1, 1, 200]


def test_several_runs_seeds_and_truncations_are_scored_one_by_one_and_averaged(tiny_run, tmp_path, capsys):
    start("--weights", tiny_run, "--data", "shapes", "--n", 40, "--trunc", 1, 0.04, "--seed", 0, 5, "--inception", "none",
          "--out", tmp_path / "m.json", module=metrics)
    content, printed = json.loads((tmp_path / "m.json").read_text()), capsys.readouterr().out
    results, G = content["results"], sample.load_generator(tiny_run, 1)
    assert [(r["truncation"], r["seed"], r["noise"]) for r in results] == [
        (1, 0, "truncated at 1"), (1, 5, "truncated at 1"), (0.04, 0, "truncated at 0.04"), (0.04, 5, "truncated at 0.04")]
    alone = sample.draw_seeds(G, [k % 10 for k in range(40)], range(200, 240), G.noise)     # with that truncation's batch norm statistics
    assert results[1]["fake_colour"]["mean"] == metrics.mean_colours(alone)[0].round(1).tolist()
    a, b = (r["swd_x1000_mean"] for r in results[2:])
    mean = content["means"][1]
    assert mean["of"] == "0.04, mean of 2"
    close([mean["swd_x1000_mean"], mean["swd_x1000_mean_deviation"]], [(a + b) / 2, abs(a - b) / math.sqrt(2)])
    assert f"{(a + b) / 2:.2f} ± {abs(a - b) / math.sqrt(2):.2f}" in printed


# ---------------------------------------------------------------- published weights
# State dicts laid out as the published ones, of random numbers, and what their own networks compute from them, written with torch's
# functions alone and their names. `make peers` compares with the PyPI package itself, at full size.

def random_state(shapes):
    """name -> shape to name -> tensor: variances positive, u and v unit vectors as training leaves them, the rest normal."""
    state = {name: torch.rand(shape) + 0.5 if re.search("vars?$", name) else 0.3 * torch.randn(shape) for name, shape in shapes.items()}
    for name in state:
        if name.endswith(("weight_u", "u0")):
            W = state[re.sub("weight_u$", "weight_orig", name) if name.endswith("weight_u") else name[:-2] + "weight"].flatten(1)
            u = power_iteration(W, torch.randn(len(W)), steps=3)[1:]
            state[name] = u[0].reshape(state[name].shape)
            if name.endswith("weight_u"):
                state[name[:-1] + "v"] = u[1]
    return state


def deep_state(ch=16, channels=((16, 16), (16, 16), (16, 16), (16, 8), (8, 8), (8, 4), (4, 4), (4, 2), (2, 2), (2, 1)), n_classes=6):
    """A BigGAN-deep of 128 pixels as Hugging Face lays it out."""
    def sn(name, *shape, bias=True):
        columns = math.prod(shape[1:])
        return {f"{name}.weight_orig": shape, f"{name}.weight_u": shape[:1], f"{name}.weight_v": (columns,),
                **({f"{name}.bias": shape[:1]} if bias else {})}
    shapes = {"embeddings.weight": (128, n_classes)} | sn("generator.gen_z", 16 * 16 * ch, 256) | sn("generator.conv_to_rgb", ch, ch, 3, 3)
    for i, (a, b) in enumerate(channels):
        name, a, b, middle = f"generator.layers.{i + (i >= 8)}", a * ch, b * ch, a * ch // 4
        for k, (n, m, size) in enumerate(((a, middle, 1), (middle, middle, 3), (middle, middle, 3), (middle, b, 1))):
            shapes |= {f"{name}.bn_{k}.running_means": (51, n), f"{name}.bn_{k}.running_vars": (51, n)}
            shapes |= sn(f"{name}.bn_{k}.scale", n, 256, bias=False) | sn(f"{name}.bn_{k}.offset", n, 256, bias=False)
            shapes |= sn(f"{name}.conv_{k}", m, n, size, size)
    for name, out, columns in ("theta", ch // 4, 2 * ch), ("phi", ch // 4, 2 * ch), ("g", ch, 2 * ch), ("o_conv", 2 * ch, ch):
        shapes |= sn(f"generator.layers.8.snconv1x1_{name}", out, columns, 1, 1, bias=False)
    shapes |= {"generator.layers.8.gamma": (1,), "generator.bn.weight": (ch,), "generator.bn.bias": (ch,),
               "generator.bn.running_means": (51, ch), "generator.bn.running_vars": (51, ch)}
    return random_state(shapes)


def attend(x, conv, gamma):
    """SAGAN's attention from its four 1x1 convolutions."""
    N, C, H, W = x.shape
    theta, (phi, g) = conv("theta", x).flatten(2), (F.max_pool2d(conv(name, x), 2).flatten(2) for name in ("phi", "g"))
    weights = torch.softmax(theta.mT @ phi, -1)
    return x + gamma * conv("o", (g @ weights.mT).view(N, C // 2, H, W))


def deep_images(state, z, y, t):
    """What the published BigGAN-deep computes: sigma = u . W v, batch norm's moments interpolated between the 51 truncations."""
    def W(name):
        W, u, v = (state[f"{name}.weight_{part}"] for part in ("orig", "u", "v"))
        return W / (u @ W.flatten(1) @ v)

    def norm(x, name, gain, bias):
        low, share = int(t * 50 + 1e-9), t * 50 - int(t * 50 + 1e-9)
        mean, var = ((1 - share) * table[low] + share * table[min(low + 1, 50)]
                     for table in (state[f"{name}.running_means"], state[f"{name}.running_vars"]))
        return (x - mean[:, None, None]) / (var[:, None, None] + 1e-4).sqrt() * gain[..., None, None] + bias[..., None, None]

    conv = lambda name, x: F.conv2d(x, W(name), state.get(f"{name}.bias"), padding=W(name).shape[-1] // 2)
    c = torch.cat([z, state["embeddings.weight"].T[y]], 1)
    h = F.linear(c, W("generator.gen_z"), state["generator.gen_z.bias"]).view(len(z), 4, 4, -1).permute(0, 3, 1, 2)
    for i in range(11):
        name = f"generator.layers.{i}"
        if i == 8:
            h = attend(h, lambda part, x: conv(f"{name}.snconv1x1_{part}{'_conv' if part == 'o' else ''}", x), state[f"{name}.gamma"])
            continue
        x, up = h, i in (1, 3, 5, 7, 10)
        for k in range(4):
            h = F.relu(norm(h, f"{name}.bn_{k}", 1 + c @ W(f"{name}.bn_{k}.scale").T, c @ W(f"{name}.bn_{k}.offset").T))
            h = conv(f"{name}.conv_{k}", F.interpolate(h, scale_factor=2) if up and k == 1 else h)
        x = x[:, :h.shape[1]]
        h = h + (F.interpolate(x, scale_factor=2) if up else x)
    h = F.relu(norm(h, "generator.bn", state["generator.bn.weight"], state["generator.bn.bias"]))
    return torch.tanh(conv("generator.conv_to_rgb", h)[:, :3])


def port_states(ch=8, n_classes=6):
    """G and D of BigGAN 128 as the author's PyTorch code lays them out."""
    sn = lambda name, *shape, bias=True: {f"{name}.weight": shape, f"{name}.u0": (1, shape[0]), f"{name}.sv0": (1,),
                                          **({f"{name}.bias": shape[:1]} if bias else {})}
    attention = lambda name, C: {f"{name}.gamma": (), **sn(f"{name}.theta", C // 8, C, 1, 1, bias=False),
                                 **sn(f"{name}.phi", C // 8, C, 1, 1, bias=False), **sn(f"{name}.g", C // 2, C, 1, 1, bias=False),
                                 **sn(f"{name}.o", C, C // 2, 1, 1, bias=False)}
    G = {"shared.weight": (n_classes, 128), **sn("linear", 16 * 16 * ch, 20), **sn("output_layer.2", 3, ch, 3, 3)}
    G |= {f"output_layer.0.{name}": (ch,) for name in ("gain", "bias", "stored_mean", "stored_var")}
    for i, (a, b) in enumerate(itertools.pairwise((16, 16, 8, 4, 2, 1))):
        for k, n, m in (1, a * ch, b * ch), (2, b * ch, b * ch):
            G |= {f"blocks.{i}.0.bn{k}.stored_mean": (n,), f"blocks.{i}.0.bn{k}.stored_var": (n,)}
            G |= sn(f"blocks.{i}.0.bn{k}.gain", n, 148, bias=False) | sn(f"blocks.{i}.0.bn{k}.bias", n, 148, bias=False)
            G |= sn(f"blocks.{i}.0.conv{k}", m, n, 3, 3)
        G |= sn(f"blocks.{i}.0.conv_sc", b * ch, a * ch, 1, 1)
    D = {**sn("linear", 1, 16 * ch), **sn("embed", n_classes, 16 * ch, bias=False)}
    widths = [3, *(m * ch for m in (1, 2, 4, 8, 16, 16))]
    for i, (a, b) in enumerate(itertools.pairwise(widths)):
        D |= sn(f"blocks.{i}.0.conv1", b, a, 3, 3) | sn(f"blocks.{i}.0.conv2", b, b, 3, 3)
        D |= sn(f"blocks.{i}.0.conv_sc", b, a, 1, 1) if i < 5 else {}
    return random_state(G | attention("blocks.3.1", 2 * ch)), random_state(D | attention("blocks.0.1", ch))


def port_layers(state):
    """sigma as that code takes it in eval mode: one power step from the stored u0. Returns conv(name, x) and linear(name, x)."""
    def W(name):
        W, u = state[f"{name}.weight"], state[f"{name}.u0"]
        v = F.normalize(u @ W.flatten(1), eps=1e-6)
        u = F.normalize(v @ W.flatten(1).T, eps=1e-6)
        return W / (u @ W.flatten(1) @ v.T)
    return (lambda name, x: F.conv2d(x, W(name), state.get(f"{name}.bias"), padding=W(name).shape[-1] // 2),
            lambda name, x: F.linear(x, W(name), state.get(f"{name}.bias")), W)


def port_images(state, z, y):
    conv, linear, _ = port_layers(state)
    norm = lambda x, name: F.batch_norm(x, state[f"{name}.stored_mean"], state[f"{name}.stored_var"], eps=1e-5)
    first, *chunks = z.split(20, 1)
    h = linear("linear", first).view(len(z), -1, 4, 4)
    for i, chunk in enumerate(chunks):
        name, x, c = f"blocks.{i}.0", h, torch.cat([state["shared.weight"][y], chunk], 1)
        cbn = lambda x, k: F.relu(norm(x, f"{name}.bn{k}") * (1 + linear(f"{name}.bn{k}.gain", c))[..., None, None]
                                  + linear(f"{name}.bn{k}.bias", c)[..., None, None])
        h = conv(f"{name}.conv1", F.interpolate(cbn(x, 1), scale_factor=2))
        h = conv(f"{name}.conv2", cbn(h, 2)) + conv(f"{name}.conv_sc", F.interpolate(x, scale_factor=2))
        if i == 3:
            h = attend(h, lambda part, x: conv(f"blocks.3.1.{part}", x), state["blocks.3.1.gamma"])
    gain, bias = (state[f"output_layer.0.{part}"][:, None, None] for part in ("gain", "bias"))
    return torch.tanh(conv("output_layer.2", F.relu(norm(h, "output_layer.0") * gain + bias)))


def port_logits(state, x, y):
    conv, linear, W = port_layers(state)
    for i in range(6):
        name, pool = f"blocks.{i}.0", (lambda a: F.avg_pool2d(a, 2)) if i < 5 else (lambda a: a)
        h = conv(f"{name}.conv2", F.relu(conv(f"{name}.conv1", x if i == 0 else F.relu(x))))
        x = pool(h) + (conv(f"{name}.conv_sc", pool(x)) if i == 0 else pool(conv(f"{name}.conv_sc", x)) if i < 5 else x)
        if i == 0:
            x = attend(x, lambda part, a: conv(f"blocks.0.1.{part}", a), state["blocks.0.1.gamma"])
    h = F.relu(x).sum((2, 3))
    return (linear("linear", h) + (F.embedding(y, W("embed")) * h).sum(1, keepdim=True)).squeeze(1)


@pytest.fixture(scope="module")
def deep_file(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("deep") / "deep.bin"
    torch.save(deep_state(), path, _use_new_zipfile_serialization=False)       # the format of 2019, in which they were published
    return path


@pytest.fixture(scope="module")
def port_folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("port")
    for name, state in zip("GD", port_states()):
        torch.save(state, folder / f"{name}.pth")
    return folder


@pytest.mark.parametrize("truncation", [0.4, 0.43, 1.0, None])
def test_published_deep_weights_draw_what_their_own_network_draws(deep_file, truncation):
    G, y = sample.load_generator(deep_file, truncation), torch.tensor([3, 0])
    z = G.noise((2, 128))
    assert z.abs().max() <= 2 * (truncation or 1) and z.abs().max() > (truncation or 1)
    state = torch.load(deep_file, weights_only=True)
    with torch.no_grad():
        images = G(z, y)
        assert images.std() > 0.1 and not list(deep_file.parent.glob("*.stats"))
        close(images, deep_images(state, z, y, truncation or 1.0), atol=1e-5)


def test_the_authors_weights_draw_and_judge_as_his_code_does(port_folder):
    (G_state, D_state), y = (torch.load(port_folder / f"{name}.pth", weights_only=True) for name in "GD"), torch.tensor([3, 0])
    G, found = sample.load_generator(port_folder), sample.read_weights(port_folder / "G.pth", to_train=True)
    z = G.noise((2, 120))
    D = Discriminator(found.config).eval()
    D.load_state_dict(found.D)
    with torch.no_grad():
        images = G(z, y)
        assert images.std() > 0.05
        close(images, port_images(G_state, z, y), atol=1e-5)
        close(D(images, y), port_logits(D_state, images, y), rtol=1e-4)


def test_a_thousand_classes_of_published_weights_are_imagenets():
    assert sample.class_names(1000)[207] == "n02099601" and sample.class_names(2) == ["0", "1"]
    assert sample.class_title(sample.class_names(1000), 207) == "golden retriever (207)"


def published_spoiled(change, old=True):
    def write(path):
        state = deep_state(ch=8)
        change(state)
        torch.save(state, path, _use_new_zipfile_serialization=not old)
    return write


def plain_pickle(path):
    with open(path, "wb") as f:
        pickle.dump(Trap(), f)


@pytest.mark.parametrize("spoil, sentence", [
    (plain_pickle, "not a checkpoint, or it is cut short"),
    (published_spoiled(lambda s: s.update(x=Trap())), "could run code"),
    (published_spoiled(lambda s: s.update(x=Trap()), old=False), "could run code"),
    (published_spoiled(lambda s: s.update(x=3)), "do not fit"),
    (published_spoiled(lambda s: s.pop("generator.bn.bias")), "Missing key.*output_norm.bias.*get the file again"),
    (published_spoiled(lambda s: s.pop("generator.layers.0.conv_0.weight_v")), "not complete: 'a weight_v' is missing"),
    (published_spoiled(lambda s: s["generator.layers.3.bn_1.running_vars"].neg_()), "negative variances, in blocks.3.bn2.running_var"),
    (published_spoiled(lambda s: s.pop("generator.gen_z.weight_orig")), "not complete: 'linear.weight' is missing"),
    (published_spoiled(lambda s: s.update({"generator.bn.bias": torch.ones(3)})), "size mismatch"),
    (published_spoiled(lambda s: s["generator.layers.3.bn_1.running_means"].fill_(math.nan)), "not finite, in blocks.3.bn2.running_mean"),
    (published_spoiled(lambda s: s["generator.layers.10.conv_1.bias"].fill_(math.inf)), "not finite, in blocks.9.conv2.bias"),
    (lambda p: published_spoiled(lambda s: None)(p) or os.truncate(p, p.stat().st_size // 2), "not a checkpoint that torch can load"),
    (lambda p: torch.save(port_states()[1], p), "holds no weights"),
    (lambda p: torch.save([1, 2], p), "holds no weights"),
])
def test_a_file_that_is_no_sound_published_weights_is_refused(tmp_path, monkeypatch, capsys, spoil, sentence):
    monkeypatch.chdir(tmp_path)
    spoil(tmp_path / "bad.bin")
    assert re.search(sentence, refused(monkeypatch, capsys, sample, "--weights", "bad.bin"))
    assert [p.name for p in tmp_path.iterdir()] == ["bad.bin"]


class Cutting(http.server.BaseHTTPRequestHandler):
    """Serves `content`; each of the first `cuts` answers breaks off after 100,000 bytes. Continues where it is asked to, if `ranges`."""

    content, cuts, ranges, mark, asked = b"", 0, True, '"a"', []

    def do_GET(self):
        start, wanted = 0, self.headers["Range"]
        self.asked.append(wanted)
        if self.ranges and wanted and self.headers["If-Range"] == self.mark:
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(self.content) - start))
        self.send_header("ETag", self.mark)
        self.end_headers()
        end = start + 100_000 if len(self.asked) <= self.cuts else len(self.content)
        self.wfile.write(self.content[start:end])

    def log_message(self, *words):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server on this machine; its class attributes say how it behaves."""
    monkeypatch.setattr(sample, "PAUSE", 0)
    handler = type("Handler", (Cutting,), {"content": np.random.default_rng(0).bytes(450_000), "asked": []})
    server = http.server.ThreadingHTTPServer(("localhost", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    handler.url = f"http://localhost:{server.server_address[1]}/weights.bin"
    yield handler
    server.shutdown()
    server.server_close()


def test_a_download_that_is_cut_goes_on_where_it_was_cut(tmp_path, server):
    server.cuts = 3
    sample.fetch(server.url, tmp_path / "a" / "w.bin", size=452_000)
    assert (tmp_path / "a" / "w.bin").read_bytes() == server.content and server.asked == [None] + [f"bytes={k}00000-" for k in (1, 2, 3)]
    sample.fetch("http://localhost:1/", tmp_path / "a" / "w.bin")                       # once is enough
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["w.bin"]


def test_a_download_starts_again_where_the_server_cannot_continue_or_the_file_has_changed(tmp_path, server):
    server.cuts, server.ranges = 2, False
    sample.fetch(server.url, tmp_path / "w.bin")
    assert (tmp_path / "w.bin").read_bytes() == server.content and len(server.asked) == 3
    changing = server.do_GET

    def change_after_the_first(self):
        changing(self)
        type(self).mark, type(self).content = '"b"', bytes(450_000)
    server.asked.clear()
    server.cuts, server.ranges, server.do_GET = 1, True, change_after_the_first
    sample.fetch(server.url, tmp_path / "v.bin")
    assert (tmp_path / "v.bin").read_bytes() == bytes(450_000)


@pytest.mark.parametrize("behaviour, size, sentence", [
    ({"cuts": 99}, None, "the connection was cut|IncompleteRead"),
    ({}, 500_000, "sends 450,000 bytes, not 500,000"),
    ({"content": b""}, None, "cut"),
    ({"do_GET": lambda self: self.send_error(404)}, None, "Not Found"),
])
def test_a_download_that_fails_leaves_nothing(tmp_path, server, behaviour, size, sentence):
    server.ranges = False
    for name, value in behaviour.items():
        setattr(server, name, value)
    with pytest.raises((OSError, sample.UserError), match=sentence):
        sample.fetch(server.url, tmp_path / "w.bin", size)
    assert not list(tmp_path.iterdir())


def test_a_download_that_is_killed_leaves_no_file_under_the_final_name(tmp_path, server):
    server.do_GET = lambda self: (self.send_response(200), self.send_header("Content-Length", "450000"), self.end_headers(),
                                  self.wfile.write(bytes(200_000)), time.sleep(60))
    code = f"import pathlib, sample; sample.fetch({server.url!r}, pathlib.Path({str(tmp_path / 'w.bin')!r}))"
    process = run_command("-c", code, cwd=HERE)
    while not list(tmp_path.glob("*.part")):
        assert process.poll() is None and time.sleep(0.01) is None
    process.kill()
    process.communicate()
    assert [p.name for p in tmp_path.iterdir()] == ["w.bin.part"]
    server.do_GET = Cutting.do_GET
    sample.fetch(server.url, tmp_path / "w.bin")
    assert (tmp_path / "w.bin").read_bytes() == server.content and len(list(tmp_path.iterdir())) == 1


def test_several_processes_fetch_a_file_once_even_after_an_address_that_fails(tmp_path, server):
    answer = server.do_GET
    server.do_GET = lambda self: self.send_error(403) if self.path == "/bad" else answer(self)
    code = (f"import sample, pathlib; sample.fetch_weights([{server.url.replace('weights.bin', 'bad')!r}, {server.url!r}], None, "
            f"pathlib.Path({str(tmp_path / 'w.bin')!r}), 'w')")
    processes = [run_command("-c", code, cwd=HERE) for _ in range(3)]
    for process in processes:
        error = process.communicate()[1]
        assert process.returncode == 0, error
    assert (tmp_path / "w.bin").read_bytes() == server.content and len(server.asked) == 1 and len(list(tmp_path.iterdir())) == 1


def test_a_file_in_the_cache_that_is_cut_short_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sample, "CACHE", tmp_path)
    (tmp_path / "biggan-deep-128.bin").write_bytes(bytes(1000))
    assert "has 1,000 bytes, not 210,848,000; delete it" in refused(monkeypatch, capsys, sample, "--weights", "biggan-deep-128")


def test_published_weights_are_fetched_by_name_from_the_first_address_that_has_them(tmp_path, monkeypatch, capsys, server, deep_file):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "CACHE", tmp_path / "cache")
    size, gone = deep_file.stat().st_size, server.url.replace("http://localhost", "http://localhost:1/?")
    monkeypatch.setitem(sample.PUBLISHED, "biggan-deep-256", ([gone, server.url], size))
    error = refused(monkeypatch, capsys, sample)                        # no run in runs/: the published ones; those here have a wrong size
    assert all(words in error for words in ("biggan-deep-256 could not be fetched", gone, "sends 450,000 bytes", "put it at", "shapes"))
    assert not list(tmp_path.rglob("*.bin"))
    server.content = deep_file.read_bytes()
    start("--class", 3, "--n", 2, "--trunc", 0.4, "--out", "a.png", module=sample)
    assert (tmp_path / "cache" / "biggan-deep-256.bin").read_bytes() == server.content
    start("--weights", server.url, "--class", 3, "--n", 2, "--trunc", 0.4, "--out", "b.png", module=sample)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_without_weights_the_newest_run_is_drawn_from_and_named(tiny_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for k, name in enumerate(("newer", "older")):
        shutil.copytree(tiny_run, tmp_path / "runs" / name)
        for path in (tmp_path / "runs" / name / "checkpoints").iterdir():
            os.utime(path, (1e9 - k, 1e9 - k))
    start("--n", 1, "--class", "star", module=sample)
    assert "the newest run is runs/newer; --weights chooses another" in capsys.readouterr().err and (tmp_path / "sample.png").exists()


def test_the_sizes_of_published_files_are_those_of_their_tensors():
    for name, (_, size) in sample.PUBLISHED.items():
        with torch.device("meta"):
            G = Generator(MODELS[name])
        uv = sum(sum(layer.weight.flatten(1).shape) for layer in biggan.matrix_layers(G).values())
        moments = sum(2 * 51 * len(m.running_mean) for m in G.modules() if isinstance(m, biggan.Norm))
        assert 0 < size - 4 * (parameters(G) + uv + moments) < 200_000          # the rest is their names


# ---------------------------------------------------------------- truncation and batch norm's statistics

def test_the_two_meanings_of_truncation_are_two_distributions():
    paper, deep = truncated_normal((200_000,), 0.5), biggan.scaled_normal((200_000,), 0.5)
    # Variance of a standard normal cut off at a: 1 - 2 a phi(a) / (Phi(a) - Phi(-a)).
    std = lambda a: math.sqrt(1 - 2 * a * math.exp(-a * a / 2) / math.sqrt(2 * math.pi) / math.erf(a / math.sqrt(2)))
    assert math.isclose(paper.std(), std(0.5), rel_tol=0.01) and math.isclose(deep.std(), 0.5 * std(2), rel_tol=0.01)
    assert round(std(0.5), 2) == 0.28 and round(0.5 * std(2), 2) == 0.44
    assert paper.abs().max() <= 0.5 and 0.99 < deep.abs().max() <= 1


def test_folding_spectral_norm_changes_the_weights_and_not_the_images():
    G, y = Generator(small("shapes32")), torch.tensor([0, 1])
    z = torch.randn(2, G.config.z_dim)
    for _ in range(3):
        G(z, y)                                                         # so that u is not the one it started with
    nn.init.normal_(G.linear.weight)
    G.eval()
    images = G(z, y)
    folded = biggan.fold_spectral_norm(copy.deepcopy(G))
    close(folded(z, y), images, atol=1e-6)
    assert not torch.equal(folded.linear.weight, G.linear.weight)
    assert folded.linear.normalized_weight() is folded.linear.weight    # nothing is left to do
    W = G.linear.weight.clone()
    biggan.fold_spectral_norm(G, {name: torch.tensor(2.0) for name in biggan.matrix_layers(G)})
    assert torch.equal(G.linear.weight, W / 2)


def test_moments_between_two_published_truncations_are_interpolated_the_right_way_round():
    table = torch.arange(51.0)[:, None] ** 2
    assert sample.interpolate(table, 0.42) == 441 and sample.interpolate(table, 1.0) == 2500
    close(sample.interpolate(table, 0.425), [0.75 * 441 + 0.25 * 484])
    assert sample.interpolate(table[:1], 0.7) == 0


def test_statistics_belong_to_the_truncation_and_are_kept_beside_the_weights(tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "r")
    kept = tmp_path / "r" / "checkpoints" / "step-00000004.pt.resample-0.5.stats"
    kept.unlink(missing_ok=True)                                        # of another test
    one = sample.load_generator(tmp_path / "r", 0.5)
    expected = standing_statistics(sample.read_generator(tmp_path / "r"), 16, noise=functools.partial(truncated_normal, threshold=0.5))
    assert_same(one.state_dict(), expected.state_dict())
    # Kept ones are used; those of other weights, damaged ones, and those that are not finite are not.
    content = torch.load(kept)
    double = {name: 2 * tensor for name, tensor in content["moments"].items()}
    for change, used in ((lambda m: m.update(moments=double), True),
                         (lambda m: m.update(moments=double, weights=1), False),
                         (lambda m: m.update(moments={n: a / 0 for n, a in m["moments"].items()}), False),
                         (lambda m: m.update(moments={n: a[:3] for n, a in m["moments"].items()}), False)):
        changed = dict(content)
        change(changed)
        torch.save(changed, kept)
        same = torch.equal(sample.load_generator(tmp_path / "r", 0.5).output_norm.running_mean, expected.output_norm.running_mean)
        assert same != used
    kept.write_bytes(b"PK")
    assert_same(sample.load_generator(tmp_path / "r", 0.5).state_dict(), expected.state_dict())
    start("--weights", tmp_path / "r", "--trunc", 0.5, "--out", tmp_path / "a.png", module=sample)
    start(*TINY, "--out", tmp_path / "r", "--steps", 10, "--keep", 1, "--eval-every", 100)
    assert not list((tmp_path / "r").rglob("*.stats"))                  # gone with their checkpoint


def test_statistics_that_cannot_be_written_are_only_not_kept(tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "r")
    (tmp_path / "r" / "checkpoints" / "step-00000004.pt.resample-0.55.stats").mkdir()       # in the way
    G = sample.load_generator(tmp_path / "r", 0.55)
    assert G.output_norm.running_mean.abs().max() > 0 and not list((tmp_path / "r").rglob("*.tmp"))


def test_scaled_noise_stops_at_1_but_published_weights_take_the_papers_truncation_too(deep_file, tmp_path, monkeypatch, capsys):
    shutil.copy(deep_file, tmp_path / "w.bin")
    monkeypatch.setattr(sample, "STANDING_BATCHES", 1)
    common = ["--weights", tmp_path / "w.bin", "--class", 1, "--n", 1, "--trunc", 1.5, "--out", tmp_path / "a.png"]
    assert "--trunc-kind resample takes any" in refused(monkeypatch, capsys, sample, *common) and len(list(tmp_path.iterdir())) == 1
    G = sample.load_generator(tmp_path / "w.bin", 1.5, "resample")
    assert 1.2 < G.noise((4000,)).abs().max() <= 1.5 and len(list(tmp_path.glob("*.resample-1.5.stats"))) == 1


# ---------------------------------------------------------------- seeds, sheets, arrays

def test_the_same_seed_is_the_same_image_in_any_batch(tiny_run):
    G, seeds = sample.load_generator(tiny_run), range(64)
    z, y = sample.seeded_noise(seeds, G.config.z_dim, G.noise), torch.arange(64) % 10
    with torch.no_grad():
        images = {n: torch.cat([G(*part) for part in zip(z.split(n), y.split(n))]) for n in (1, 7, 64)}
    assert max((images[n] - images[64]).abs().max() for n in (1, 7)) < 1e-5


def grid_in(path, labels):
    """The pixels of a labelled sheet without its labels, for images of 32 pixels."""
    sheet = np.asarray(Image.open(path).convert("RGB"))
    left = 12 + round(max(ImageFont.load_default(12).getlength(label) for label in labels))
    assert (sheet[:24] < 128).any() and all((sheet[26 + 34 * k:56 + 34 * k, :left] < 128).any() for k in range(len(labels)))   # words
    return sheet[24:, left:]


def same_grid(found, images, columns):
    grid = np.asarray(sample.image_grid(images, columns))
    return np.abs(found[:grid.shape[0], :grid.shape[1]].astype(int) - grid).max() <= 1


def test_the_sheet_of_classes_has_a_labelled_row_per_class(tiny_run, tmp_path):
    start("--weights", tiny_run, "--class", "star", 3, "--n", 4, "--sheet", "classes", "--out", tmp_path / "a.png", module=sample)
    G = sample.load_generator(tiny_run)
    assert same_grid(grid_in(tmp_path / "a.png", ["star (8)", "cross (3)"]), sample.draw_seeds(G, [8] * 4 + [3] * 4, [0, 1, 2, 3] * 2), 4)


def test_the_sheet_of_truncations_has_the_same_seeds_at_each_with_its_own_statistics(tiny_run, tmp_path, capsys):
    start("--weights", tiny_run, "--class", "star", "--n", 3, "--seed", 5, "--sheet", "truncation", "--out", tmp_path / "a.png",
          module=sample)
    assert "15 images of star (8), truncations 2, 1.5, 1, 0.5, 0.04" in capsys.readouterr().out
    found = grid_in(tmp_path / "a.png", ["2", "1.5", "1", "0.5", "0.04"])
    rows = [sample.load_generator(tiny_run, t) for t in (2, 1.5, 1, 0.5, 0.04)]
    assert same_grid(found, np.concatenate([sample.draw_seeds(G, [8] * 3, [5, 6, 7], G.noise) for G in rows]), 3)
    start("--weights", tiny_run, "--class", "star", "ring", "--n", 3, "--trunc", 1, 0.5, "--sheet", "truncation",
          "--out", tmp_path / "b.png", module=sample)
    images = [sample.draw_seeds(G, [k] * 3, [0, 1, 2], G.noise) for k in (8, 6) for G in rows[2:4]]
    found = grid_in(tmp_path / "b.png", ["star (8), 1", "star (8), 0.5", "ring (6), 1", "ring (6), 0.5"])
    assert same_grid(found, np.concatenate(images), 3)


def test_the_sheet_of_interpolations_leads_from_one_image_to_another(tiny_run, tmp_path):
    start("--weights", tiny_run, "--class", "star", "ring", "--n", 3, "--sheet", "interpolation", "--out", tmp_path / "a.png",
          module=sample)
    G = sample.load_generator(tiny_run)
    (z0, z1), (y0, y1) = sample.seeded_noise([0, 1], G.config.z_dim), G.shared.weight[[8, 6]]
    half_z, half_y = (z0 + z1) / math.sqrt(2), (y0 + y1) / 2                # the half-way noise has variance 1, too
    z, y = [z0, half_z, z1, z0, z0, z0, z0, half_z, z1], [y0, y0, y0, y0, half_y, y1, y0, half_y, y1]
    assert same_grid(grid_in(tmp_path / "a.png", ["noise", "class", "both"]), sample.draw(G, torch.stack(z), torch.stack(y)), 3)


def test_the_timelapse_shows_a_runs_grids_in_order(tiny_run, tmp_path):
    folder = tmp_path / "r" / "samples"
    folder.mkdir(parents=True)
    for step, grey in (2, 200), (10, 100), (1000, 0):
        Image.new("RGB", (90, 50), (grey,) * 3).save(folder / f"step-{step:08d}.png")
    (folder / "step-00000003.png").write_bytes(b"broken"), (folder / "step-final.png").write_bytes(b"not one of them")
    start("--weights", tmp_path / "r", "--sheet", "timelapse", "--out", tmp_path / "a.webp", module=sample)
    with Image.open(tmp_path / "a.webp") as animation:
        assert animation.n_frames == 3 and animation.size == (90, 68)
        for k, grey in enumerate((200, 100, 0)):
            animation.seek(k)
            frame = np.asarray(animation.convert("RGB")).astype(int)
            assert np.abs(frame[40:] - grey).max() < 4 and (frame[:18] < 128).any() and (frame[:18] > 200).any()


def test_classes_are_found_by_number_name_and_imagenets_words(monkeypatch, capsys):
    synsets = list(sample.imagenet_words())
    assert len(synsets) == 1000 and synsets == sorted(synsets)
    find = lambda *wanted: sample.class_indices(wanted, synsets)
    assert find("207", "n02099601", "Golden Retriever", "tench", "goldfinch") == [207, 207, 207, 0, 11]
    assert find("golden", "retriever") == [207] and find("chickadee") == [19] and len(find("all")) == 1000
    for text, sentence in (("crane", r"crane could be crane \(134\), crane \(517\); type the number"),
                           ("retriever", r"flat-coated retriever \(205\).*golden retriever \(207\)"),
                           ("dog", r"Maltese dog \(153\).*hotdog \(934\); type the number"),
                           ("goldn retriever", r"did you mean golden retriever"),
                           ("1000", "classes 0 to 999"), ("qqqqq", "no class named qqqqq; this model knows")):
        with pytest.raises(sample.UserError, match=sentence):
            find(text)
    ten = synsets[200:210]                                              # a model of some of ImageNet's classes
    assert sample.class_indices(["golden retriever"], ten) == [7] and sample.class_title(ten, 7) == "golden retriever (7)"
    assert sample.class_indices(["3", "5"], ["5", "3"]) == [1, 0]       # a name comes before a number


def test_the_model_that_comes_along_draws_in_an_empty_folder(tmp_path, monkeypatch, capsys):
    assert (HERE / "docs" / "shapes.pt").stat().st_size < 2e6
    output, error = run_command("sample.py", "--weights", "shapes", "--class", "star", "--n", 4, cwd=tmp_path).communicate()
    assert "4 images of star (8), not truncated" in output and not error and [p.name for p in tmp_path.iterdir()] == ["sample.png"]
    G = sample.load_generator("shapes")
    # Recognised by comparison: nine of ten are nearest to drawn shapes of their own class, by their brightness alone.
    brightness = lambda images: (a := images.max(-1).astype(float)) - a.mean((1, 2), keepdims=True)
    known = brightness(drawn_shapes(6000, 8000)).reshape(2000, -1)
    drawn = brightness(sample.draw_seeds(G, [k % 10 for k in range(200)], range(200))).reshape(200, -1)
    nearest = (drawn @ (known / np.linalg.norm(known, axis=1, keepdims=True)).T).argmax(1)
    assert (nearest % 10 == np.arange(200) % 10).mean() > 0.9


def test_an_exported_generator_is_small_and_draws_the_same(tiny_run, tmp_path):
    start("--weights", tiny_run, "--export", "--out", tmp_path / "g.pt", module=sample)
    assert (tmp_path / "g.pt").stat().st_size < 0.15 * sample.newest_checkpoint(tiny_run)[1].stat().st_size
    one, other = (sample.load_generator(weights) for weights in (tiny_run, tmp_path / "g.pt"))
    a, b = (sample.draw_seeds(G, range(10), range(10)).astype(int) for G in (one, other))
    assert np.abs(a - b).mean() < 1 and list(tmp_path.iterdir()) == [tmp_path / "g.pt"]      # no statistics had to be gathered


NPZ = ["--trunc", 0.7, "--seed", 3, "--npz"]


def test_an_array_for_scores_is_the_same_on_one_and_on_three_processes(tiny_run, tmp_path, capsys):
    shutil.copytree(tiny_run, tmp_path / "r")                           # without the statistics that others have kept
    start("--weights", tiny_run, *NPZ, 150, "--out", tmp_path / "1.npz", module=sample)
    for path in (tmp_path / "r").rglob("*.stats"):
        path.unlink()
    process = run_command("-m", "torch.distributed.run", "--nproc-per-node", 3, "--master-port", free_port(), HERE / "sample.py",
                          "--weights", tmp_path / "r", *NPZ, 150, "--out", tmp_path / "3.npz")
    output, error = process.communicate()
    assert process.returncode == 0 and "150 images in" in output, error
    one, three = (np.load(tmp_path / f"{k}.npz") for k in (1, 3))
    images, G = one["arr_0"].astype(int), sample.load_generator(tiny_run, 0.7)
    assert images.shape == (150, 32, 32, 3) and one["arr_1"].tolist() == three["arr_1"].tolist() == [k % 10 for k in range(150)]
    assert np.abs(images - sample.draw_seeds(G, [k % 10 for k in range(150)], range(3, 153), G.noise)).max() <= 1
    assert np.abs(images - three["arr_0"]).max() <= 1
    start("--fake", tmp_path / "1.npz", "--real", "shapes", "--inception", "none", "--out", tmp_path / "m.json", module=metrics)
    result = scores_in(tmp_path / "m.json")
    assert result["fake_colour"]["mean"] == np.round(images.mean((0, 1, 2)), 1).tolist() and "truncated at 0.7" in result["made_of"]


def test_an_array_that_was_killed_goes_on_where_it_was(tiny_run, tmp_path, monkeypatch, capsys):
    arguments = ["--weights", tiny_run, *NPZ, 8000, "--out", tmp_path / "a.npz"]
    part, process = tmp_path / "a.npz.part", run_command("sample.py", *arguments)
    marks = lambda: np.load(part / "done.npy") if (part / "settings.json").exists() else np.zeros(1)
    while not marks().any():
        assert process.poll() is None and time.sleep(0.01) is None
    assert "another process is at work" in refused(monkeypatch, capsys, sample, *arguments)
    process.kill()
    process.communicate()
    assert marks()[0] and not marks().all() and not (tmp_path / "a.npz").exists()
    first = np.load(part / "images.npy", mmap_mode="r+")
    first[0] = 7                                                        # which nobody would draw: what is done is not done again
    first.flush()
    other = [5 if argument == 3 else argument for argument in arguments]
    assert "holds the beginning of other images" in refused(monkeypatch, capsys, sample, *other)
    start(*arguments, module=sample)
    images, G = np.load(tmp_path / "a.npz")["arr_0"].astype(int), sample.load_generator(tiny_run, 0.7)
    drawn = sample.draw_seeds(G, [k % 10 for k in range(8000)], range(3, 8003), G.noise)
    assert (images[0] == 7).all() and np.abs(images[1:] - drawn[1:]).max() <= 1 and not part.exists()
    start(*arguments, module=sample)
    assert "is complete already" in capsys.readouterr().out
    assert "holds something else" in refused(monkeypatch, capsys, sample, *other)


# ---------------------------------------------------------------- starting from weights that exist

def test_a_run_starts_from_another_and_keeps_the_classes_of_the_same_name(tmp_path, capsys):
    for label in "heart", "moon", "star":
        for i in range(4):
            picture(tmp_path / "data" / label, f"{i}.png", colour=(60 * i, 0, 0))
    start(*TINY, "--out", tmp_path / "old", "--steps", 4)
    capsys.readouterr()
    new = ["--init", tmp_path / "old", "--preset", "shapes", "--data", tmp_path / "data", "--batch", 8, "--out", tmp_path / "new"]
    start(*new, "--steps", 1, "--g-lr", 0, "--d-lr", 0, "--ema", 0.9)
    said = capsys.readouterr().out
    assert "starting from" in said and "all weights of G and D, but for the vectors of the classes arrow, circle, crescent" in said
    assert "those of the new classes moon start at random" in said
    old, new = weights_of(tmp_path / "old", 4), weights_of(tmp_path / "new", 1)
    for network in "G", "D":
        for name, tensor in old[network].items():
            if name in ("shared.weight", "embed.weight"):
                assert torch.equal(new[network][name][[0, 2]], tensor[[5, 8]]) and len(new[network][name]) == 3
                assert (new[network][name][1] - tensor.mean(0)).abs().max() < 5 * tensor.std(0).max()
                assert not torch.equal(new[network][name][1], tensor.mean(0))
            elif "running" not in name and not name.endswith(".u"):
                assert torch.equal(new[network][name], tensor), name
    # The average starts as the old average (here it then moved a tenth of the way to G), not as G.
    close(new["G_ema"]["linear.weight"], 0.9 * old["G_ema"]["linear.weight"] + 0.1 * old["G"]["linear.weight"])
    W, u = new["D"]["embed.weight"], new["D"]["embed.u"]
    close((W.T @ u).norm(), torch.linalg.matrix_norm(W, 2), rtol=0.05)


def test_d_may_win_while_it_is_trained_alone(tmp_path, monkeypatch):
    for name, value in ("window", 2), ("lines", 2), ("won", 99):         # any loss of D counts as won
        monkeypatch.setattr(metrics.Monitor, name, value)
    start(*TINY, "--out", tmp_path / "alone", "--steps", 8, "--g-lr", 0)
    with pytest.raises(SystemExit, match="D is never wrong any more"):
        start(*TINY, "--out", tmp_path / "both", "--steps", 8)


def test_class_tables_in_every_layer_are_matched_too():
    old, new = (Generator(small("sagan128", n_classes=n, ch=8)) for n in (4, 3))
    for table in (m for m in old.modules() if isinstance(m, nn.Embedding)):
        nn.init.normal_(table.weight)
    state = train.match_classes(new, old.state_dict(), [2, None, 0], torch.Generator())
    new.load_state_dict(state)
    for layer in "gain", "bias":
        ours, theirs = (getattr(G.blocks[1].bn2, layer).weight for G in (new, old))
        assert torch.equal(ours[[0, 2]], theirs[[2, 0]]) and not torch.equal(ours[1], theirs[1])


def test_all_classes_the_same_means_all_weights_the_same(tmp_path):
    start(*TINY, "--out", tmp_path / "old", "--steps", 2)
    start("--init", tmp_path / "old", *TINY[:2], *TINY[4:], "--out", tmp_path / "new", "--steps", 1, "--g-lr", 0, "--d-lr", 0)
    old, new = weights_of(tmp_path / "old", 2), weights_of(tmp_path / "new", 1)
    assert all(torch.equal(old[n][name], new[n][name]) for n in "GD" for name in old[n] if name.endswith(("weight", "bias", "gain")))


def test_a_run_that_was_started_from_weights_continues_without_them(tmp_path, capsys):
    shutil.copy(HERE / "docs" / "shapes.pt", tmp_path / "w.pt")
    command = ["--init", tmp_path / "w.pt", "--preset", "shapes", "--batch", 8, "--save-every", 1, "--out"]
    start(*command, tmp_path / "r", "--steps", 1)
    output = capsys.readouterr()
    assert "has no discriminator: D starts from random weights" in output.err and "--g-lr 0" in output.err
    assert "all weights of G;" in output.out
    (tmp_path / "w.pt").unlink()
    start(*command, tmp_path / "r", "--steps", 2)
    assert "continuing" in capsys.readouterr().out and weights_of(tmp_path / "r", 2)["model"]["ch"] == 32


def test_published_weights_of_both_kinds_can_be_trained_on(deep_file, port_folder, capsys):
    for weights, described in (deep_file, "all weights of G, but"), (port_folder, "all weights of G and D, but"):
        s = train.parse_settings(["--init", str(weights), "--data", "x", "--batch", "2", "--precision", "fp32"])
        config, found = train.first_weights(s)
        t = train.Trainer(s, dataclasses.replace(config, n_classes=2), torch.device("cpu"))
        t.start_from(found, ["2", "cat"])
        assert described in capsys.readouterr().out and s.ema_start == 0
        assert torch.equal(t.G.blocks[2].conv2.weight, found.G_ema["blocks.2.conv2.weight"])
        assert torch.equal(t.G.shared.weight[0], found.G_ema["shared.weight"][2]) and len(t.D.embed.weight) == 2
        # What it draws is what the weights drew, but for the sigma of their publication.
        z, G = torch.randn(1, config.z_dim), sample.read_generator(weights)
        with torch.no_grad():
            ours, theirs = t.G.eval()(z, torch.tensor([0])), G(z, torch.tensor([2]))
        assert (ours - theirs).abs().mean() < 0.2 * theirs.std()
        real = iter([(torch.zeros(2, 3, 128, 128), torch.tensor([0, 1]))] * 2)
        assert all(value.isfinite() for value in map(torch.as_tensor, t.train_step(real).values()))


@pytest.mark.parametrize("arguments, sentence", [
    (["--init", "shapes", "--ch", "8"], "--ch does not go with --init"),
    (["--init", "shapes", "--model", "biggan32"], "--model does not go with --init"),
    (["--init", "nothing"], "nothing does not exist"),
    (["--init", "runs/shapes"], "--init and --out are both runs/shapes"),
])
def test_wrong_weights_to_start_from_are_refused(tmp_path, monkeypatch, capsys, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    assert sentence in refused(monkeypatch, capsys, train, "--preset", "shapes", *arguments) and not listing(tmp_path)


# ---------------------------------------------------------------- mistakes: one sentence, status 2, nothing written

def refused(monkeypatch, capsys, module, *arguments):
    """Run a command that must be refused, as the shell would; returns its sentence."""
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        sample.run(module.main)
    other = "warning:", "fetching ", "gathering ", "there is no run in"
    error = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(other)]
    assert stop.value.code == 2 and len(error) == 1 and error[0].startswith("error: "), error
    return error[0]


def listing(folder):
    return {p: p.stat().st_mtime_ns for p in Path(folder).rglob("*")}


@pytest.mark.parametrize("make, sentence", [
    (lambda d: d.rmdir(), "does not exist"),
    (lambda d: None, "holds no images"),
    (lambda d: picture(d, "a.png"), "no class folders"),
    (lambda d: picture(d / "train" / "cat", "a.png"), "one folder too high.*pass --data .*train"),
    (lambda d: (picture(d / "cat", "a.png"), (d / "dog").mkdir()), "dog holds no images"),
    (lambda d: (d / "cat").mkdir() or (d / "cat" / "a.png").write_bytes(b"broken"), "none of the 1 images .*cat can be read"),
])
def test_a_data_folder_of_the_wrong_shape_is_refused(tmp_path, monkeypatch, capsys, make, sentence):
    data = tmp_path / "data"
    data.mkdir()
    make(data)
    error = refused(monkeypatch, capsys, train, "--preset", "cifar10", "--data", data, "--out", tmp_path / "run")
    assert re.search(sentence, error) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("arguments, sentence", [
    (["--preset", "cifra10"], "invalid choice: 'cifra10'"),
    (["--presett", "shapes"], "there is no option --presett; did you mean --preset?"),
    (["--pre", "shapes"], "there is no option --pre"),
    (["shapes"], "there is no option shapes"),
    (["--preset", "imagenet64"], "needs --data DIR"),
    (["--preset", "shapes", "--on-collapse", "pray"], "invalid choice: 'pray'"),
    ([], "needs --data DIR"),
    (["--preset", "shapes", "--steps", "0"], "--steps must be at least 1"),
    (["--preset", "shapes", "--steps", "many"], "invalid int value: 'many'"),
    (["--preset", "shapes", "--g-lr", "nan"], "--g-lr must be 0 or more"),
    (["--preset", "shapes", "--ema", "1"], "--ema must be at least 0 and below 1"),
    (["--preset", "shapes", "--ch", "12"], "multiple of 8"),
    (["--preset", "shapes", "--batch", "10", "--micro-batch", "4"], "does not divide"),
    (["--preset", "shapes", "--loss", "hinged"], "invalid choice: 'hinged'"),
    (["--preset", "shapes", "--r1", "-1"], "--r1 must be 0 or more"),
    (["--preset", "shapes", "--sigma-fixed", "0"], "--sigma-fixed must be above 0"),
    (["--preset", "shapes", "--sigma-ratio", "0.9"], "--sigma-ratio must be at least 1"),
    (["--preset", "shapes", "--sigma-fixed", "2", "--sigma-ratio", "2"], "exclude each other"),
    (["--preset", "shapes", "--sigma-pull", "1"], "--sigma-pull needs a goal"),
    (["--preset", "shapes", "--shared-dim", "0"], "--shared-dim 0 does not go with --model shapes32"),
    (["--preset", "shapes", "--held-out", "nowhere"], "the data folder nowhere does not exist; give --held-out another"),
    (["--preset", "shapes", "--held-out", "nowhere", "--loss", "wgan-gp"], "--held-out tells nothing under --loss wgan-gp"),
    (["--preset", "cifar10", "--data", "x", "--held-out", "./x/"], "is the folder of --data"),
])
def test_a_wrong_setting_is_refused(tmp_path, monkeypatch, capsys, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    assert sentence in refused(monkeypatch, capsys, train, *arguments) and not listing(tmp_path)


def test_held_out_images_of_other_classes_are_refused(tmp_path, monkeypatch, capsys):
    picture(tmp_path / "a" / "cat", "0.png"), picture(tmp_path / "b" / "dog", "0.png")
    error = refused(monkeypatch, capsys, train, "--preset", "cifar10", "--data", tmp_path / "a", "--held-out", tmp_path / "b",
                    "--out", tmp_path / "run")
    assert "only one of the two has cat" in error and not (tmp_path / "run").exists()


def test_continuing_with_other_settings_lists_each_difference(tiny_run, monkeypatch, capsys):
    before = listing(tiny_run)
    error = refused(monkeypatch, capsys, train, *TINY, "--out", tiny_run, "--steps", 9, "--seed", 5, "--d-lr", "1e-3")
    assert "seed was 0 and is now 5" in error and "d_lr was 0.0004 and is now 0.001" in error and "g_lr" not in error
    assert listing(tiny_run) == before


def test_a_run_from_before_an_option_existed_continues_with_its_default(tmp_path, monkeypatch, capsys):
    start(*TINY, "--out", tmp_path / "r", "--steps", 2)
    path = tmp_path / "r" / "config.json"
    config = json.loads(path.read_text())
    del config["r1"], config["loss"], config["deep"]
    path.write_text(json.dumps(config))
    assert "r1 was 0.0 and is now 1.0" in refused(monkeypatch, capsys, train, *TINY, "--out", tmp_path / "r", "--steps", 3, "--r1", 1)
    start(*TINY, "--out", tmp_path / "r", "--steps", 3)


def test_a_folder_with_other_things_is_not_used_as_run_folder(tmp_path, monkeypatch, capsys):
    (tmp_path / "thesis.txt").write_text("precious")
    assert "is not empty" in refused(monkeypatch, capsys, train, *TINY, "--out", tmp_path)
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(monkeypatch, capsys, train, *TINY, "--out", tmp_path / "file")
    assert "Not a directory" in refused(monkeypatch, capsys, train, *TINY, "--out", tmp_path / "file" / "run")


@pytest.mark.parametrize("arguments, sentence", [
    (["--class", "10"], "classes 0 to 9; among ImageNet's classes there is one"),
    (["--class", "-1"], "classes 0 to 9"),
    (["--class", "²"], "no class named ²"),                             # a digit, but not a number
    (["--class", "hart"], "no class named hart; did you mean heart?"),
    (["--class", "zebra"], "no class named zebra; this model knows arrow, circle, crescent, cross, diamond, heart, "
                           "ring, square, star, triangle; among ImageNet's classes there is one: --weights biggan-deep-256"),
    (["--class", "star,", "hart"], "no class named hart; did you mean heart?"),
    (["--truncation", "0.5"], "there is no option --truncation; did you mean --trunc?"),
    (["--size", "512"], "there is no option --size; --help lists them"),
    (["--trunc", "0"], "0 is not above 0"),
    (["--trunc", "-1"], "-1 is not above 0"),
    (["--trunc", "nan"], "nan is not above 0"),
    (["--trunc", "half"], "invalid positive number value: 'half'"),
    (["--n", "0"], "0 is below 1"),
    (["--seed", "x"], "invalid whole number value: 'x'"),
    (["--seed", "-3"], "-3 is not between 0 and 2^62"),
    (["--out", "nowhere/a.png"], "the folder nowhere for the output a.png does not exist"),
    (["--out", "a.jpeg"], "must end in .png"),
    (["--weights", "nothing.pt"], "nothing.pt does not exist"),
    (["--weights", ""], "one of the values is empty"),
    (["--n", "14000"], "ask for 131,072 at most"),
    (["--sheet", "truncation", "--trunc", "0.5", "2", "--trunc-kind", "scale"], "truncation 2 is above 1"),
    (["--sheet", "timelapse", "--weights", "nowhere"], "there is no run folder nowhere, which a time-lapse needs"),
    (["--trunc", "1", "2"], "--trunc takes several values for --sheet truncation only"),
    (["--trunc", "2", "--trunc-kind", "scale"], "truncation 2 is above 1"),
    (["--sheet", "interpolation", "--class", "star"], "give --class two of them, not 1"),
    (["--sheet", "truncations"], "invalid choice: 'truncations'"),
    (["--npz", "5", "--sheet", "classes"], "--sheet and --npz exclude each other"),
    (["--npz", "5", "--out", "a.png"], "must end in .npz"),
    (["--npz", "5", "--n", "3"], "--npz 5 already says how many images"),
    (["--export", "--trunc", "0.5"], "--trunc has no meaning for --export"),
    (["--npz", "100000000000"], "MB; make room or choose another --out"),
    (["--wieghts", "x"], "did you mean --weights?"),
])
def test_a_wrong_request_for_samples_is_refused(tiny_run, tmp_path, monkeypatch, capsys, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    given = [] if "--weights" in arguments else ["--weights", tiny_run]
    assert sentence in refused(monkeypatch, capsys, sample, *given, *arguments) and not listing(tmp_path)


def test_a_number_that_imagenet_does_not_have_either_is_not_sent_there(monkeypatch, capsys):
    assert refused(monkeypatch, capsys, sample, "--weights", "shapes", "--class", 1000).endswith("this model has classes 0 to 9")


def test_a_folder_without_weights_is_refused(tmp_path, monkeypatch, capsys):
    assert "not a run folder" in refused(monkeypatch, capsys, sample, "--weights", tmp_path)


class Trap:
    """Pickles to an instruction that would create a file when it is loaded."""

    def __reduce__(self):
        return (open, ("trapped", "w"))


def edited(checkpoint, change):
    change(checkpoint)
    return checkpoint


@pytest.mark.parametrize("spoil, sentence", [
    (lambda c, p: p.write_bytes(b""), "not a checkpoint, or it is cut short"),
    (lambda c, p: p.write_text("hello"), "not a checkpoint, or it is cut short"),
    (lambda c, p: (torch.save(c, p), os.truncate(p, p.stat().st_size // 2)), "not a checkpoint, or it is cut short"),
    (lambda c, p: torch.save({**c, "extra": Trap()}, p), "could run code"),
    (lambda c, p: zipfile.ZipFile(p, "w").close(), "a zip archive but not a checkpoint"),
    (lambda c, p: torch.save({"G_ema": 1}, p), "holds no weights"),
    (lambda c, p: torch.save(edited(c, lambda c: c["G_ema"].pop("linear.bias")), p), "Missing key.*linear.bias"),
    (lambda c, p: torch.save(edited(c, lambda c: c["model"].update(ch=16)), p), "size mismatch"),
    (lambda c, p: torch.save(edited(c, lambda c: c["model"].update(colour="red")), p), "colour"),
    (lambda c, p: torch.save(edited(c, lambda c: c["G_ema"]["linear.bias"].fill_(math.nan)), p), "not finite, in linear.bias"),
    (lambda c, p: torch.save(edited(c, lambda c: c["classes"].pop()), p), "does not name its 10 classes"),
])
def test_a_file_that_is_no_sound_checkpoint_is_refused(tiny_run, tmp_path, monkeypatch, capsys, spoil, sentence):
    monkeypatch.chdir(tmp_path)
    spoil(sample.newest_checkpoint(tiny_run)[0], tmp_path / "bad.pt")
    error = refused(monkeypatch, capsys, sample, "--weights", "bad.pt")
    assert re.search(sentence, error)
    assert not (tmp_path / "trapped").exists() and not (tmp_path / "sample.png").exists()


@pytest.mark.parametrize("arguments, sentence", [
    (["--fake", "a", "--real", "b"], "b does not exist; name a folder of images or an array"),
    (["--fake", "empty", "--real", "shapes"], "empty holds no images"),
    (["--fake", "shapes", "--real", "shapes", "--n", "9", "--inception", "w.pth"], "the Inception weights w.pth do not exist"),
    (["--weights", "shapes", "--data", "shapes", "--plot", "a.png"], "give --trunc two or more"),
    (["--weights", "shapes", "--data", "shapes", "--neighbours", "a.jpg"], "must end in .png"),
    (["--weights", "shapes", "--data", "shapes", "--neighbours", "a.png", "--inception", "none"], "--neighbours needs Inception"),
    (["--weights", "shapes", "--data", "shapes", "--resizer", "lanczos"], "invalid choice: 'lanczos'"),
    (["--weights", "shapes", "--data", "shapes", "--resizer", "tensorflow", "--inception", "none"], "--resizer needs Inception"),
    (["--weights", "shapes", "--data", "shapes", "--held-out", "shapes"], "--held-out shapes is the same as --data"),
    (["--weights", "shapes", "--data", "shapes", "--seed", "0", "1", "--neighbours", "a.png"], "shows one set of samples"),
    (["--weights", "shapes", "--data", "shapes", "--trunc", "inf"], "must be smaller numbers"),
    (["--fake", "images.npz", "--data", "images.npz", "--seed", "3"], "--fake excludes --seed"),
    (["--fake", "odd.npz", "--data", "odd.npz", "--inception", "none"], "odd.npz holds images of 33 pixels; a size like"),
    (["--weights", "shapes", "--data", "shapes", "--trunc", "2", "--trunc-kind", "scale", "--inception", "none"], "2 is above 1"),
    (["--weights", "shapes", "--data", "images.npz", "--inception", "none"], "images.npz has images of 16 pixels and the others have 32"),
    (["--fake", "images.npz", "--data", "images.npz", "--n", "7", "--inception", "none"], "has 6 images, fewer than --n 7; pass --n 6"),
    (["--fake", "images.npz", "--data", "images.npz", "--n-real", "7", "--inception", "none"], "pass --n-real 6"),
    (["--fake", "text.npz", "--data", "images.npz", "--inception", "none"], "text.npz is not an array of images"),
    (["--fake", "a", "--weights", "b", "--real", "c"], "--fake excludes --weights"),
    ([], "--data DIR, the folder of real images to compare with, is missing"),
    (["--data", "shapes", "--n", "1"], "at least 2"),
])
def test_a_wrong_request_for_scores_is_refused(tmp_path, monkeypatch, capsys, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    as_npz(tmp_path, np.zeros((6, 16, 16, 3), np.uint8))
    np.savez(tmp_path / "odd.npz", np.zeros((6, 33, 33, 3), np.uint8))
    (tmp_path / "text.npz").write_text("hello")
    assert sentence in refused(monkeypatch, capsys, metrics, *arguments)


def test_an_unforeseen_error_of_one_of_several_processes_ends_it_at_once_whatever_still_waits():
    waiting = "import threading, time, sample; threading.Thread(target=time.sleep, args=[60]).start(); sample.run(lambda arguments: 1 / 0)"
    started = time.time()
    process = run_command("-c", "import os; os.environ['WORLD_SIZE'] = '2'; " + waiting)
    output, error = process.communicate()
    assert process.returncode == 1 and "ZeroDivisionError" in error and time.time() - started < 50


@pytest.mark.parametrize("script", ["train.py", "sample.py", "metrics.py"])
def test_a_mistake_on_the_real_command_line_ends_in_one_sentence_and_help_in_status_0(script, tmp_path):
    process = run_command(script, "--xyzzy", cwd=tmp_path)
    output, error = process.communicate()
    assert process.returncode == 2 and error == "error: there is no option --xyzzy; --help lists them\n" and not output
    process = run_command(script, "--help", cwd=tmp_path)
    assert {"train.py": "--data", "sample.py": "--class", "metrics.py": "--real"}[script] in process.communicate()[0]
    assert process.returncode == 0


# ---------------------------------------------------------------- make check: is the demo good?

def shape_classifier():
    """Train a classifier on drawn shapes. Returns a function: images, labels (n,) -> whether it agrees, (n,) of 0 and 1."""
    data = train.Shapes(32)
    judge = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.BatchNorm2d(64),
                          nn.ReLU(), nn.Conv2d(64, 128, 3, 2, 1), nn.BatchNorm2d(128), nn.ReLU(), nn.Flatten(), nn.Linear(2048, 10))
    optimizer = torch.optim.Adam(judge.parameters(), 1e-3)
    to_input = lambda images: torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    for step in range(500):
        images, labels = zip(*[data[i] for i in range(128 * step, 128 * step + 128)])
        optimizer.zero_grad()
        F.cross_entropy(judge(to_input(images)), torch.tensor(labels)).backward()
        optimizer.step()
    judge.eval().requires_grad_(False)
    return lambda images, labels: (judge(to_input(images)).argmax(1) == labels).double()


def check_the_demos_samples_are_the_shapes_that_were_asked_for():
    """After `make demo`: a classifier trained on drawn shapes recognises at least 90% of 2,000 samples; they are at under a third of
    the distance of an untrained generator's; the mean and the spread of their colours are within 25% of the drawn ones'."""
    data, n, agrees = train.Shapes(32), 2000, shape_classifier()
    labels = torch.arange(n) % 10
    real = drawn_shapes(0, n)
    G = sample.load_generator(HERE / "runs/shapes")
    fake = sample.draw_seeds(G, labels.tolist(), range(n))
    untrained = standing_statistics(Generator(G.config), batches=16)
    correct = {name: agrees(images, labels) for name, images in (("real", real), ("fake", fake))}
    agreement = {name: c.mean().item() for name, c in correct.items()}
    distance = {name: np.mean(list(metrics.pyramid_distances(real, images).values())) for name, images in
                (("fake", fake), ("untrained", sample.draw_seeds(untrained, labels.tolist(), range(n))),
                 ("real", drawn_shapes(n, 2 * n)))}
    (real_mean, real_spread), (fake_mean, fake_spread) = metrics.mean_colours(real), metrics.mean_colours(fake)
    print(f"\nagreement: drawn shapes {agreement['real']:.1%}, samples {agreement['fake']:.1%}; per class "
          + ", ".join(f"{name} {correct['fake'][k::10].mean():.0%}" for k, name in enumerate(data.classes)))
    print(f"sliced Wasserstein distance x 1000: other drawn shapes {1000 * distance['real']:.1f}, samples {1000 * distance['fake']:.1f}, "
          f"untrained generator {1000 * distance['untrained']:.1f}")
    print(f"mean colour, samples / drawn: {(fake_mean / real_mean).round(2)}; its spread: {(fake_spread / real_spread).round(2)}")
    assert agreement["real"] > 0.99 and agreement["fake"] >= 0.9
    assert distance["fake"] < distance["untrained"] / 3
    assert np.abs(fake_mean / real_mean - 1).max() < 0.25 and np.abs(fake_spread / real_spread - 1).max() < 0.25


# ---------------------------------------------------------------- the road to BigGAN on drawn shapes, by `make road`

SNGAN = dict(shared_dim=0, skip_z=False, g_sn=False, d_wide=False, g_attention=0, d_attention=0)
SAGAN = dict(shared_dim=0, skip_z=False)
ROAD = {  # what differs from shapes32 (at width 16, batch 32), and options of train.py
    "SN-GAN": (SNGAN, "--ortho 0"),
    "SAGAN: attention, spectral norm in G, a wider D": (SAGAN, "--ortho 0"),
    "+ shared class vectors": (dict(skip_z=False), "--ortho 0"),
    "+ skip-z": ({}, "--ortho 0"),
    "+ orthogonal regularisation: BigGAN": ({}, ""),
    "+ batch 64": ({}, "--batch 64"),
    "+ width 32": ({}, "--batch 64 --ch 32"),
}


def road_on_shapes(tmp_path):
    """Seven models, 2,000 steps each, three seeds, one thread each, as many at a time as there are cores."""
    agrees, labels, real = shape_classifier(), torch.arange(2000) % 10, drawn_shapes(0, 2000)

    def travel(name, seed):
        changes, options = ROAD[name]
        out = tmp_path / f"{list(ROAD).index(name)}-{seed}"
        arguments = f"--preset shapes --model road --ch 16 --batch 32 --steps 2000 --seed {seed} {options} --on-collapse warn --out {out}"
        code = ("import dataclasses, biggan, train; "
                f"biggan.MODELS['road'] = dataclasses.replace(biggan.MODELS['shapes32'], **{changes}); train.main({arguments.split()})")
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        minutes = (time.perf_counter() - started) / 60
        fake = sample.draw_seeds(sample.load_generator(out), labels.tolist(), range(2000))
        return 1000 * np.mean(list(metrics.pyramid_distances(real, fake).values())), 100 * agrees(fake, labels).mean().item(), minutes

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        # seed after seed, so that models are compared under the same conditions
        found = {(name, seed): pool.submit(travel, name, seed) for seed in range(3) for name in ROAD}
        print()
        for name in ROAD:
            distance, agreement, minutes = zip(*(found[name, seed].result() for seed in range(3)))
            print(f"{name:50} distance {np.mean(distance):6.1f} +- {np.std(distance, ddof=1):5.1f}   "
                  f"classifier agrees {np.mean(agreement):5.1f}% +- {np.std(agreement, ddof=1):4.1f}   {np.mean(minutes):4.1f} minutes")


# ---------------------------------------------------------------- beside others, by `make peers`

def published_package(resolution):
    """The PyPI package's model with random weights and statistics, its power iterations converged as training leaves them."""
    from pytorch_pretrained_biggan import BigGAN, BigGANConfig
    channels = {128: (16, 16, 8, 4, 2, 1), 256: (16, 16, 8, 8, 4, 2, 1), 512: (16, 16, 8, 8, 4, 2, 1, 1)}[resolution]
    layers = [layer for a, b in itertools.pairwise(channels) for layer in ((False, a, a), (True, a, b))]
    model = BigGAN(BigGANConfig(output_dim=resolution, layers=layers)).eval().requires_grad_(False)
    for name, tensor in model.state_dict().items():
        if name.endswith("vars"):
            tensor.uniform_(0.5, 2)
        elif name.endswith(("means", "bias", "gamma")):
            tensor.normal_(0, 0.3)
        elif name.endswith("weight_u"):
            W = model.state_dict()[name[:-1] + "orig"].flatten(1)
            u, v = power_iteration(W, tensor, steps=5)[1:]
            tensor.copy_(u), model.state_dict()[name[:-1] + "v"].copy_(v)
    model.generator.bn.weight.normal_(1, 0.1)
    return model


@pytest.mark.parametrize("resolution", [128, 256, 512])
def peer_the_published_package_draws_the_same_images(tmp_path, resolution):
    package = published_package(resolution)
    torch.save(package.state_dict(), tmp_path / "w.bin", _use_new_zipfile_serialization=False)
    y = torch.tensor([207, 0][:1 if resolution == 512 else 2])
    for truncation in 0.4, 1.0:
        G = sample.load_generator(tmp_path / "w.bin", truncation)
        z = G.noise((len(y), 128))
        with torch.no_grad():
            ours, theirs = G(z, y), package(z, F.one_hot(y, 1000).float(), truncation)
        print(f"\n{resolution}, truncation {truncation}: differ by {(ours - theirs).abs().max():.1e} at most, deviation {theirs.std():.2f}")
        assert theirs.std() > 0.05 and (ours - theirs).abs().max() < 1e-4


def seconds_per_call(whose, path, batch):
    """Of drawing a batch with biggan-deep-128: the median of ten rounds. In a process of its own, as its users would run it."""
    y, z = torch.arange(batch), biggan.scaled_normal((batch, 128), 0.4)
    if whose == "here":
        G = sample.load_generator(path, 0.4)
        work = lambda: G(z, y)
    else:
        package = published_package(128)
        work = lambda: package(z, F.one_hot(y, 1000).float(), 0.4)
    times, repeats = [], max(1, 8 // batch)
    with torch.no_grad():
        for _ in range(12):
            started = time.perf_counter()
            for _ in range(repeats):
                work()
            times.append((time.perf_counter() - started) / repeats)
    print(np.median(times[2:]))


@pytest.mark.parametrize("batch", [1, 16])
def peer_images_per_second(tmp_path, batch):
    """On this machine, the two in turn, twice each."""
    torch.save(published_package(128).state_dict(), tmp_path / "w.bin")
    seconds = {"here": [], "package": []}
    for _ in range(2):
        for whose in seconds:
            code = f"import test_biggan; test_biggan.seconds_per_call({whose!r}, {str(tmp_path / 'w.bin')!r}, {batch})"
            seconds[whose].append(float(subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, check=True).stdout))
    here, package = (np.median(seconds[whose]) for whose in seconds)
    print(f"\nbatch {batch}: {batch / here:.1f} images per second, the package {batch / package:.1f}: {package / here:.2f} times")
    assert package / here > (2 if batch > 1 else 1.5)                   # at batch 1 both wait for the weights to come from memory


def authors_step(s, config):
    """A training step of the author's PyTorch code, checked out in the folder PORT, with networks and settings like ours, on the GPU if
    there is one: then with TF32 and tuned convolutions, its fastest setting that trains."""
    for name in "torchvision", "torchvision.transforms", "datasets", "animal_hash":         # imported there, but not needed for this
        sys.modules[name] = unittest.mock.MagicMock()
    sys.path.insert(0, os.environ["PORT"])
    import BigGAN
    import train_fns
    import utils
    shared = {"resolution": config.resolution, "n_classes": config.n_classes, "SN_eps": config.sn_eps, "adam_eps": 1e-8}
    G = BigGAN.Generator(G_ch=config.ch, dim_z=config.z_dim, G_attn=str(config.g_attention), G_shared=True, hier=True,
                         shared_dim=config.shared_dim, BN_eps=config.bn_eps, G_lr=s.g_lr, G_B1=s.beta1, G_B2=s.beta2, **shared)
    D = BigGAN.Discriminator(D_ch=config.ch, D_attn=str(config.d_attention), D_lr=s.d_lr, D_B1=s.beta1, D_B2=s.beta2, **shared)
    G_ema = BigGAN.Generator(G_ch=config.ch, dim_z=config.z_dim, G_attn=str(config.g_attention), G_shared=True, hier=True,
                             shared_dim=config.shared_dim, skip_init=True, no_optim=True, **shared)
    device = sample.pick_device()
    G, D, G_ema = G.to(device), D.to(device), G_ema.to(device)
    torch.backends.cudnn.benchmark = torch.backends.cuda.matmul.allow_tf32 = True
    z, y = utils.prepare_z_y(s.batch, G.dim_z, config.n_classes, device=str(device))
    step = train_fns.GAN_training_function(
        G, D, BigGAN.G_D(G, D), z, y, utils.ema(G, G_ema, s.ema, s.ema_start), {"itr": 1},
        {"batch_size": s.batch, "toggle_grads": True, "num_D_steps": s.d_steps, "num_D_accumulations": 1, "num_G_accumulations": 1,
         "split_D": False, "D_ortho": 0.0, "G_ortho": s.ortho, "ema": True})
    assert (parameters(G), parameters(D)) == (parameters(Generator(config)), parameters(Discriminator(config)))
    x = torch.rand(s.d_steps * s.batch, 3, config.resolution, config.resolution, device=device) * 2 - 1
    y = torch.randint(config.n_classes, (s.d_steps * s.batch,), device=device)
    return lambda: step(x, y)


def training_rate(whose, arguments, steps):
    """Print the real images per second of these many steps after two, by the author's code ("port") or by this project."""
    s = train.parse_settings([*arguments, "--precision", "fp32" if whose == "port" else whose, "--data", "x"])
    config = train.model_config(s, MODELS[s.model].n_classes)
    device = sample.pick_device()
    if whose == "port":
        work = authors_step(s, config)
    else:
        sample.keep_freed_memory()                                      # as train.py does
        trainer = train.Trainer(s, config, device)
        x = torch.rand(s.batch, 3, config.resolution, config.resolution, device=device).mul(2).sub(1)
        real = itertools.repeat((x.to(memory_format=torch.channels_last), torch.randint(config.n_classes, (s.batch,), device=device)))
        work = lambda: trainer.train_step(real)
    times = [train.seconds_of(work, device) for _ in range(steps + 2)]
    print("\nrate", s.batch * s.d_steps / np.median(times[2:]))


@pytest.mark.parametrize("arguments, steps, fp32, bf16", [
    (["--preset", "cifar10", "--ch", "16", "--batch", "64", "--d-steps", "1"], 12, 2, 3.3),
    (["--preset", "imagenet128", "--ch", "32", "--batch", "8", "--d-steps", "1"], 5, 2, 3.3),
    *([(["--preset", "imagenet128", "--batch", "128", "--d-steps", "1"], 20, 0, 4)] if torch.cuda.is_available() else [])])
def beside_the_authors_code_training_is_faster(arguments, steps, fp32, bf16):
    """The same architecture, batch and settings, each in a process of its own, in turn, three times."""
    rates = {"port": [], "fp32": [], "bf16": []}
    for _ in range(3):
        for whose in rates:
            code = f"import test_biggan; test_biggan.training_rate({whose!r}, {arguments}, {steps})"
            done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, check=True)
            rates[whose].append(float(done.stdout.split()[-1]))
    port, ours32, ours16 = (np.median(rates[whose]) for whose in rates)
    print(f"\n{' '.join(arguments)}: {port:.1f} images per second by the author's code, "
          f"{ours32:.1f} here in fp32 ({ours32 / port:.2f} times), {ours16:.1f} in bf16 ({ours16 / port:.2f} times)")
    assert ours32 / port >= fp32 and ours16 / port >= bf16


def pytorch_fids_network(state):
    """pytorch-fid's Inception with these weights. torchvision, which it is built from, lacks its own operators beside a torch for CPUs;
    they are not needed, but must have been declared."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in "nms(Tensor a, Tensor b, float c) -> Tensor", "qnms(Tensor a, Tensor b, float c) -> Tensor":
        if not hasattr(torch.ops.torchvision, name.split("(")[0]):
            library.define(name)
    from pytorch_fid import inception
    inception.load_state_dict_from_url = lambda *_, **__: state         # the published file cannot be had everywhere
    return inception.InceptionV3([3]).eval()


def peer_pytorch_fid_sees_the_same(inception_file, tmp_path):
    """Features of 64 images of four sizes, logits, FID, and images per second, with the same random weights.

    The images are those in the folder PEER_IMAGES, or drawn shapes."""
    folder, state = os.environ.get("PEER_IMAGES"), torch.load(inception_file)
    sides, images = (32, 128, 256, 512), []
    found = sorted(p for p in Path(folder).rglob("*") if train.is_image(p.name)) if folder else []
    for k in range(64):
        side = sides[k % 4]
        images.append(torch.tensor(train.load_image(found[k * len(found) // 64], side) if found else
                                       train.Shapes(side)[k][0]).permute(2, 0, 1)[None])
    theirs, ours = pytorch_fids_network(state), metrics.Inception(inception_file)
    with torch.no_grad():
        features = torch.cat([theirs(x / 255)[0].flatten(1) for x in images])
    logits = features @ state["fc.weight"].T + state["fc.bias"]
    seen = [ours(x) for x in images]
    ours_features, ours_logits = (torch.cat(parts) for parts in zip(*seen))
    difference = [(a - b).abs().max().item() for a, b in ((ours_features, features), (ours_logits, logits))]
    from pytorch_fid.fid_score import calculate_frechet_distance
    moments = lambda f: (f.double().mean(0).numpy(), np.cov(f.double().numpy().T))
    fid = metrics.frechet_distance(*moments(ours_features[::2]), *moments(ours_features[1::2]))
    their_fid = calculate_frechet_distance(*moments(features[::2]), *moments(features[1::2]), eps=1e-12)
    x = torch.randint(0, 256, (32, 3, 32, 32), dtype=torch.uint8)
    rates = {"here": [], "pytorch-fid": []}
    for _ in range(4):
        for name, work in ("here", lambda: [ours(part) for part in x.split(16)]), ("pytorch-fid", lambda: theirs(x / 255)):
            started = time.perf_counter()
            with torch.no_grad():
                work()
            rates[name].append(32 / (time.perf_counter() - started))
    here, there = (np.median(rates[name][1:]) for name in rates)
    print(f"\n64 images: features differ by {difference[0]:.1e}, logits by {difference[1]:.1e}; FID {fid:.6f}, theirs {their_fid:.6f}; "
          f"{here:.1f} images per second, theirs {there:.1f}: {here / there:.2f} times")
    assert max(difference) < 1e-4 and math.isclose(fid, their_fid, rel_tol=1e-3) and here > there


def peer_the_frechet_distance_equals_scipys_and_is_faster():
    """2,048 dimensions, 5,000 correlated points each."""
    from scipy.linalg import sqrtm
    rng = np.random.default_rng(0)
    mu, cov = zip(*((x.mean(0), np.cov(x.T)) for x in (np.abs(rng.normal(size=(5000, 2048)) @ rng.normal(size=(2048, 2048)) / 45)
                                                      for _ in range(2))))
    times = {"here": [], "scipy": []}
    for name in ["here", "scipy"] * 2:
        started = time.perf_counter()
        if name == "here":
            distance = metrics.frechet_distance(mu[0], cov[0], mu[1], cov[1])
        else:
            theirs = np.square(mu[0] - mu[1]).sum() + np.trace(cov[0] + cov[1]) - 2 * np.trace(sqrtm(cov[0] @ cov[1])).real
        times[name].append(time.perf_counter() - started)
    here, scipy = (min(times[name]) for name in times)
    print(f"\nFrechet distance {distance:.8f}, scipy's {theirs:.8f}; {here:.2f} s, scipy {scipy:.2f} s: {scipy / here:.1f} times")
    assert math.isclose(distance, theirs, rel_tol=1e-6) and scipy / here > 5


# ---------------------------------------------------------------- long trials, by `make trial`

def trial_thirty_kills(tmp_path):
    killed, continued_from, steps = kill_again_and_again(tmp_path, 30, "--steps", 600, "--save-every", 3)
    print(f"\n{killed} kills; the last one left step {continued_from} of {steps}; bit for bit the weights of an undisturbed run")
    assert killed == 30 and continued_from and steps >= 60


def trial_collapse_is_declared_and_health_is_not(tmp_path):
    """G's learning rate ten times too high, D's four times too low: G draws ever fewer images of each class, and that is declared."""
    command = ["--preset", "shapes", "--ch", 16, "--batch", 16, "--steps", 600, "--sample-every", 600, "--eval-every", 200]
    well, sick = (run_command("train.py", *command, "--out", tmp_path / name, *options)
                  for name, options in (("well", []), ("sick", ["--g-lr", 2e-3, "--d-lr", 1e-4])))
    error = sick.communicate()[1]
    assert sick.returncode == 1 and error.count("error: collapse at step") == 1, error
    assert well.communicate() and well.returncode == 0
    log = {name: [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()] for name in ("well", "sick")}
    lost = next(line["step"] for line in log["sick"] if line["diversity"] < 0.45)
    lowest = min(line["diversity"] for line in log["well"])
    print("\n" + error, f"diversity first below 0.45 at step {lost}; of the healthy run at least {lowest:.2f}")
    assert log["sick"][-1]["step"] - lost <= 300 and log["well"][-1]["step"] == 600


def trial_a_small_disk_costs_no_checkpoint(tmp_path):
    """A file system of 5 MB as run folder (as root), with checkpoints of 1.3 MB."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", tmp_path], check=True)
    try:
        process = run_command("train.py", *TINY, "--out", tmp_path, "--steps", 12, "--keep", 9)
        output, error = process.communicate()
        kept = sample.checkpoints_of(tmp_path)
        print("\n" + error, f"kept: {[path.stem for path in kept]}")
        assert error.count("could not be written") >= 3 and "step 12/12" in output and process.returncode == 1
        assert len(kept) >= 2 and all(sample.read_checkpoint(path) for path in kept)
    finally:
        subprocess.run(["umount", tmp_path], check=True)
