"""BigGAN, every technique written out by hand.

A generator G turns noise z and a class y into an image. A discriminator D looks at an image x and a class y and answers with one
number D(x, y): large if it takes x for a real image of that class. They learn in turns:

    D minimises  E max(0, 1 - D(x, y)) + E max(0, 1 + D(G(z, y), y))      over real x with their y, and normal z with any y
    G minimises  - E D(G(z, y), y)                                        the gradient comes to G through D, which stands still

D learns to tell real from generated, G to be believed. If both could learn anything and found their optimum, the generated images would
be distributed like the real ones (see "losses"). The paper's recipe at 128x128 (`Trainer.train_step` in train.py), with Adam, beta1 = 0:

    150,000 times:
        twice   2048 new real images, as many generated ones; a step on D's loss           learning rate 2e-4
        once    2048 generated images; a step on G's loss + 1e-4 orthogonal_regularisation(G)             5e-5
                average <- 0.9999 average + 0.0001 G                                        what draws in the end

Reading order: the techniques, each a few lines (spectral norm, resampling, batch norm, attention); the two networks that are built from
them, and their sizes (MODELS); then what training needs (losses, penalties) and what makes good samples (truncation, averaged weights).

Paper: Brock, Donahue, Simonyan, "Large Scale GAN Training for High Fidelity Natural Image Synthesis", ICLR 2019,
arXiv:1809.11096. "section 3.1", "table 4" and so on below refer to it.

Shapes: N images, C channels, H x W pixels, R the image's resolution. Training may run under autocast, which computes convolutions and
products in 16 bits; `precise`, and a block with autocast off, mark what must be float32. channels_last: in memory, pixels outside
and channels inside, for faster convolutions.
"""

import copy
import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


# ---------------------------------------------------------------- spectral norm
# The largest singular value sigma of a weight matrix W says how much W can stretch a vector: sigma = max |W v| over |v| = 1. A layer
# that computes with W / sigma does not stretch, and so D cannot become arbitrarily steep; its slope is all that G learns from. BigGAN
# does it in G too (section 3). (Roughly so: a residual block adds two paths, and a convolution, whose W has a row per filter, reads every
# pixel nine times with a 3x3 kernel, so that it may stretch up to sqrt(9) = 3 times.) Power iteration finds sigma:
#     v = W^T u / |W^T u|,   u = W v / |W v|,   sigma = u^T W v
# Each turn multiplies the share of u in the i-th singular direction by sigma_i^2, so that of the largest wins. W moves little from one
# training step to the next, so u is remembered, and one turn in every forward pass is enough.

def power_iteration(W, u, steps=1, eps=1e-12):
    """The largest singular value of W (rows, columns), estimated from u (rows,).

    Returns sigma (a scalar through which gradients reach W), u (rows,) and v (columns,), unit vectors with u^T W v = sigma.
    u and v count as constants: d sigma / dW = u v^T, the exact derivative once they have converged. Miyato et al. 2018, algorithm 1."""
    with torch.no_grad():
        for _ in range(steps):
            v = F.normalize(W.T @ u, dim=0, eps=eps)
            u = F.normalize(W @ v, dim=0, eps=eps)
    return u @ (W @ v), u, v


class SpectralNorm:
    """Mixed into a layer with a `weight`: gives it `normalized_weight()`, the weight divided by its largest singular value.

    eps=None switches it off (SN-GAN's generator): the weight stays as it is, and so does u."""

    folded = False                                                  # see fold_spectral_norm

    def init_u(self, eps):
        self.eps = eps
        self.register_buffer("u", F.normalize(torch.randn(self.weight.shape[0]), dim=0))

    def normalized_weight(self):
        if self.eps is None:
            return self.weight
        # In float32 also under autocast: sigma is a sum over thousands of products.
        with torch.autocast(self.weight.device.type, enabled=False):
            W = self.weight.flatten(1)                              # (out, everything else): one row per filter
            sigma, u, _ = power_iteration(W, self.u, eps=self.eps)
            if self.training:
                self.u.copy_(u)                                     # evaluation takes the same step but does not keep it
            return self.weight / sigma.clamp(min=self.eps)


def matrix_layers(network):
    """The layers with a weight matrix, by name: all convolutions and linear layers, and D's embedding; not G's class vectors and tables."""
    return {name: m for name, m in network.named_modules() if isinstance(m, SpectralNorm)}


@torch.no_grad()
def fold_spectral_norm(network, sigmas=None):
    """Divide every weight by its sigma for good, where weights no longer change: the same output without computing sigma at every call.

    sigmas: name of a layer -> its sigma, where they are known; else it is the one that the layer would use. Returns the network."""
    for name, layer in matrix_layers(network).items():
        layer.weight.copy_((layer.weight / sigmas[name]) if sigmas else layer.normalized_weight())
        layer.eps, layer.folded = None, True
    return network


class SNConv2d(SpectralNorm, nn.Conv2d):
    """Convolution with spectral norm that keeps H and W: kernel of size 3 or 1, stride 1."""

    def __init__(self, in_channels, out_channels, size, eps, bias=True):
        super().__init__(in_channels, out_channels, size, padding=size // 2, bias=bias)
        self.init_u(eps)
        self.register_buffer("kernel", None, persistent=False)      # see upsample_conv3x3

    def forward(self, x):                                           # (N, in, H, W) -> (N, out, H, W)
        return F.conv2d(x, self.normalized_weight(), self.bias, padding=self.padding)


class SNLinear(SpectralNorm, nn.Linear):
    def __init__(self, in_features, out_features, eps, bias=True):
        super().__init__(in_features, out_features, bias=bias)
        self.init_u(eps)

    def forward(self, x):                                           # (N, in) -> (N, out)
        return F.linear(x, self.normalized_weight(), self.bias)


class SNEmbedding(SpectralNorm, nn.Embedding):
    def __init__(self, n_classes, dim, eps):
        super().__init__(n_classes, dim)
        self.init_u(eps)

    def forward(self, y):                                           # (N,) labels -> (N, dim)
        return F.embedding(y, self.normalized_weight())


# ---------------------------------------------------------------- resampling folded into a convolution
# G doubles the image by repeating each pixel, then convolves; D convolves, then averages 2x2 pixels. Both pairs do needless work:
# the repeated pixels get multiplied more than once, and four convolved pixels are made for each one that is kept. As all of it is
# linear, D's pair equals *one* convolution of stride 2 with a 4x4 kernel, the mean of the 3x3 kernel laid into its four corners, and G's
# is the transpose of such a one, with their sum: 16 products per pixel of the small image instead of 36.

def mean_of_four_shifted(W):
    """(out, in, 3, 3) -> (out, in, 4, 4): the mean of W laid into each corner of a 4x4 kernel, which is W averaged 2x2 in steps of 1."""
    return F.avg_pool2d(W, 2, stride=1, padding=1)


def upsample_conv3x3(x, layer):
    """Nearest-neighbour doubling, then a 3x3 convolution layer. x (N, in, H, W) -> (N, out, 2H, 2W)."""
    kernel = layer.kernel
    if kernel is None:
        # A transposed convolution reads its kernel backwards and wants it as (in, out, 4, 4).
        W = layer.normalized_weight().flip(2, 3).transpose(0, 1)
        kernel = mean_of_four_shifted(4 * W.contiguous(memory_format=torch.channels_last))      # 4 times the mean: the sum
        if layer.folded:                                            # kept: making it takes a third of the time of one image
            layer.kernel = kernel.detach()
    # The bias is added outside: inside, on a CPU, its gradient alone takes longer than the rest of the layer's backward pass.
    return F.conv_transpose2d(x, kernel, stride=2, padding=1).add_(per_channel(layer.bias.to(x.dtype)))


def conv3x3_downsample(x, layer):
    """A 3x3 convolution layer, then 2x2 average pooling. x (N, in, H, W) -> (N, out, H/2, W/2)."""
    return F.conv2d(x, mean_of_four_shifted(layer.normalized_weight()), layer.bias, stride=2, padding=1)


def upsample(x):                                                    # (N, C, H, W) -> (N, C, 2H, 2W)
    return F.interpolate(x, scale_factor=2, mode="nearest")


# ---------------------------------------------------------------- batch norm, plain and conditional
# Batch norm brings every channel to mean 0 and variance 1, and then to a bias and a gain of the layer's choice:
#     gain * (x - mean) / sqrt(var + eps) + bias,   mean and var of each channel over the whole batch
# In G's blocks gain = 1 + W_g c and bias = W_b c depend on each image's condition c, its class vector joined with a chunk of its z: that
# is how every block learns what to draw. The whole batch is that of all GPUs. D has no batch norm: each image is judged by itself.

def precise(x):                                                     # float32 for sums and exponentials, or float64 if x has it already
    return x.to(torch.promote_types(x.dtype, torch.float32))


def per_channel(a):                                                 # (C,) -> (1, C, 1, 1) and (N, C) -> (N, C, 1, 1)
    return a.reshape(-1, a.shape[-1], 1, 1)


def processes():                                                    # how many work together, one per GPU
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank():                                                         # which of them this one is, from 0
    return dist.get_rank() if processes() > 1 else 0


class Moments(torch.autograd.Function):
    """Mean and variance of each channel over the batch of all processes. x (N, C, H, W) -> two (C,), float32 or better.

    The derivative is written out because it is one pass over x instead of the many that autograd would record:
    with n = N H W,  d mean / dx = 1 / n  and  d var / dx = 2 (x - mean) / n.

    Cross-replica batch norm (appendix C): where several processes each hold an equal share of the batch, the moments are those of the
    whole batch, and so are the derivatives: every process's loss depends on every process's x."""

    @staticmethod
    def forward(ctx, x):
        full = precise(x)
        mean = full.mean((0, 2, 3))
        centred = full - per_channel(mean) if full is x else full.sub_(per_channel(mean))       # a copy may be overwritten
        var = centred.square_().mean((0, 2, 3))
        if processes() > 1:                                         # variance of the whole = mean of variances + variance of means
            own = torch.stack([mean, var])
            shares = [torch.empty_like(own) for _ in range(processes())]
            dist.all_gather(shares, own)
            means, variances = torch.stack(shares, dim=1)           # (processes, C) each
            mean = means.mean(0)
            var = (variances + (means - mean).square()).mean(0)
        ctx.save_for_backward(x, mean)
        return mean, var

    @staticmethod
    def backward(ctx, grad_mean, grad_var):
        x, mean = ctx.saved_tensors
        grads = torch.stack([grad_mean, grad_var])
        if processes() > 1:
            dist.all_reduce(grads)                                  # the sum of what all processes' losses ask for
        n = processes() * x.numel() // x.shape[1]
        slope = 2 * grads[1] / n
        offset = grads[0] / n - slope * mean
        return torch.addcmul(per_channel(offset).to(x.dtype), x, per_channel(slope).to(x.dtype))


class Norm(nn.Module):
    """What both batch norms share. In training the moments are the batch's, and running averages of them are kept for evaluation."""

    momentum = 0.1                                                  # share of the newest batch in the running averages

    def __init__(self, channels, eps):
        super().__init__()
        self.eps = eps
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def normalise(self, x, gain, bias):
        """x (N, C, H, W); gain and bias (C,) or (N, C)."""
        if self.training:
            mean, var = Moments.apply(x)
            n = processes() * x.numel() // x.shape[1]
            with torch.no_grad():                                   # n / (n - 1): an unbiased estimate is kept, as by nn.BatchNorm2d
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(var * n / (n - 1), self.momentum)
        else:
            mean, var = self.running_mean, self.running_var
        # (C,) or (N, C). Rounded to x's 16 bits before the shift is made from it: mean * scale then takes off just what x * scale has.
        scale = (gain * torch.rsqrt(var + self.eps)).to(x.dtype)
        shift = bias - mean * scale
        return torch.addcmul(per_channel(shift).to(x.dtype), x, per_channel(scale))     # shift + x * scale, in one pass over x


class BatchNorm(Norm):
    """Gain and bias are learned numbers, one pair per channel."""

    def __init__(self, channels, eps):
        super().__init__(channels, eps)
        self.gain = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x):                                           # (N, C, H, W) -> (N, C, H, W)
        return self.normalise(x, self.gain, self.bias)


class ConditionalBatchNorm(Norm):
    """One pair per channel and image, made from c (section 3, figure 15).

    Without a shared class vector (shared_dim 0, as in SAGAN) c is the class index, and W_g and W_b are tables with a row per class."""

    def __init__(self, channels, config):
        super().__init__(channels, config.bn_eps)
        if config.shared_dim:
            self.gain = SNLinear(config.c_dim, channels, config.g_sn_eps, bias=False)
            self.bias = SNLinear(config.c_dim, channels, config.g_sn_eps, bias=False)
        else:
            self.gain = nn.Embedding(config.n_classes, channels)
            self.bias = nn.Embedding(config.n_classes, channels)

    def forward(self, x, c):                                        # (N, C, H, W), (N, c_dim) or (N,) -> (N, C, H, W)
        return self.normalise(x, 1 + precise(self.gain(c)), precise(self.bias(c)))


# ---------------------------------------------------------------- self-attention
# A convolution sees 3x3 pixels. Attention lets every position p look at all positions q:
#     out_p = x_p + gamma o( sum_q a_pq g(x_q) ),   a_pq = softmax over q of theta(x_p) . phi(x_q)
# theta, phi, g and o are 1x1 convolutions: theta asks (a transformer's query), phi offers (the key), g is what is heard (the value), and o
# leads back to C channels.

class SelfAttention(nn.Module):
    """(N, C, H, W) -> (N, C, H, W). Zhang et al. 2019 (SAGAN), as its authors' code does it.

    phi and g are pooled 2x2, which quarters the work. The products are not divided by sqrt(C/8), unlike in a transformer. gamma starts
    at 0: the layer begins as the identity and the network decides when to use it."""

    def __init__(self, channels, eps):
        super().__init__()
        self.theta = SNConv2d(channels, channels // 8, 1, eps, bias=False)
        self.phi = SNConv2d(channels, channels // 8, 1, eps, bias=False)
        self.g = SNConv2d(channels, channels // 2, 1, eps, bias=False)
        self.o = SNConv2d(channels // 2, channels, 1, eps, bias=False)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x):                                           # (N, C, H, W)
        N, C, H, W = x.shape
        positions = lambda a: a.permute(0, 2, 3, 1).flatten(1, 2)   # (N, C, H, W) -> (N, HW, C)
        theta = positions(self.theta(x))                            # (N, HW, C/8)
        phi = positions(F.max_pool2d(self.phi(x), 2))               # (N, HW/4, C/8)
        g = positions(F.max_pool2d(self.g(x), 2))                   # (N, HW/4, C/2)
        scores = theta @ phi.mT                                     # (N, HW, HW/4): row = who asks, column = who answers
        # Autocast is off for the opposite reason: softmax sums in float32 inside, and on a GPU autocast would also return that, with twice
        # the memory for what is the largest tensor of all.
        with torch.autocast(x.device.type, enabled=False):
            weights = scores.softmax(-1)                            # (N, HW, HW/4), every row sums to 1
        heard = (weights @ g).view(N, H, W, C // 2).permute(0, 3, 1, 2)     # (N, C/2, H, W)
        return torch.addcmul(x, self.gamma.to(x.dtype), self.o(heard))


# ---------------------------------------------------------------- the networks
#     G:  h = linear(z) as 4x4 pixels;   blocks, each (deep: every second) doubling H and W;   image = tanh(conv(ReLU(BatchNorm(h))))
#     D:  blocks, most halving H and W, down to 4x4 or 8x8;   s = sum over the pixels of ReLU(h);   D(x, y) = w . s + b + e_y . s
# A block is residual: shortcut(x) + convolutions of x. In most sizes attention follows one block of each network. The 1x1 convolution of a
# shortcut sees one pixel at a time, so it may be done before repeating pixels or after averaging them: the same with a quarter of the work.

class GBlock(nn.Module):
    """Doubles the resolution: norm, ReLU, up-sample, conv, norm, ReLU, conv (table 4, figure 15b)."""

    def __init__(self, in_channels, out_channels, config):
        super().__init__()
        self.bn1 = ConditionalBatchNorm(in_channels, config)
        self.conv1 = SNConv2d(in_channels, out_channels, 3, config.g_sn_eps)
        self.bn2 = ConditionalBatchNorm(out_channels, config)
        self.conv2 = SNConv2d(out_channels, out_channels, 3, config.g_sn_eps)
        self.conv_sc = SNConv2d(in_channels, out_channels, 1, config.g_sn_eps)      # sc: shortcut

    def forward(self, x, c):                                        # (N, in, H, W), (N, c_dim)
        h = self.bn1(x, c).relu_()                                  # (N, in, H, W); in place, since nobody else needs it
        h = upsample_conv3x3(h, self.conv1)                         # (N, out, 2H, 2W)
        h = self.conv2(self.bn2(h, c).relu_())                      # (N, out, 2H, 2W)
        return h.add_(upsample(self.conv_sc(x)))                    # (N, out, 2H, 2W)


class DeepGBlock(nn.Module):
    """BigGAN-deep: four convolutions through a bottleneck a quarter as wide; keeps or doubles the resolution (table 7, figure 16b).

    Deeper and yet smaller. The shortcut has no weights: where the block narrows, it keeps the first channels and drops the rest."""

    def __init__(self, in_channels, out_channels, up, config):
        super().__init__()
        self.up, self.out_channels, middle = up, out_channels, in_channels // 4
        self.bn1 = ConditionalBatchNorm(in_channels, config)
        self.conv1 = SNConv2d(in_channels, middle, 1, config.g_sn_eps)
        self.bn2 = ConditionalBatchNorm(middle, config)
        self.conv2 = SNConv2d(middle, middle, 3, config.g_sn_eps)
        self.bn3 = ConditionalBatchNorm(middle, config)
        self.conv3 = SNConv2d(middle, middle, 3, config.g_sn_eps)
        self.bn4 = ConditionalBatchNorm(middle, config)
        self.conv4 = SNConv2d(middle, out_channels, 1, config.g_sn_eps)

    def forward(self, x, c):                                        # (N, in, H, W), (N, c_dim)
        h = self.conv1(self.bn1(x, c).relu_())                      # (N, in/4, H, W)
        h = self.bn2(h, c).relu_()                                  # (N, in/4, H, W)
        x = x[:, :self.out_channels]                                # (N, out, H, W)
        if self.up:
            h = upsample_conv3x3(h, self.conv2)                     # (N, in/4, 2H, 2W)
            x = upsample(x)                                         # (N, out, 2H, 2W)
        else:
            h = self.conv2(h)
        h = self.conv3(self.bn3(h, c).relu_())                      # (N, in/4, 2H, 2W)
        return self.conv4(self.bn4(h, c).relu_()).add_(x)           # (N, out, 2H, 2W)


class Generator(nn.Module):
    """z (N, z_dim), y (N,) class indices -> images (N, 3, R, R) in [-1, 1].

    y may also be (N, shared_dim) float: class vectors that are already embedded, for classes between classes."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        channels = [m * config.ch for m in config.g_channels]
        if config.shared_dim:
            # Not spectrally normalised: the author's code notes that this cripples G, for reasons unknown.
            self.shared = nn.Embedding(config.n_classes, config.shared_dim)
        # The first layer sees a chunk of z alone, and the class enters with the first norm (deep: all of z and the class vector).
        self.linear = SNLinear(config.c_dim if config.deep else config.z_chunk, 4 * 4 * channels[0], config.g_sn_eps)
        self.blocks, self.attention_after = nn.ModuleList(), None
        for i, (a, b) in enumerate(zip(channels, channels[1:])):
            if config.deep:
                self.blocks.append(DeepGBlock(a, a, up=False, config=config))
                self.blocks.append(DeepGBlock(a, b, up=True, config=config))
            else:
                self.blocks.append(GBlock(a, b, config))
            if config.g_attention == 8 * 2**i:
                self.attention, self.attention_after = SelfAttention(b, config.g_sn_eps), len(self.blocks)
        self.output_norm = BatchNorm(channels[-1], config.bn_eps)
        self.to_rgb = SNConv2d(channels[-1], config.rgb_filters, 3, config.g_sn_eps)
        initialise(self)

    def conditions(self, z, y):
        """What the first layer receives (N, ...), and a list of what each block receives: (N, c_dim), or the classes (N,)."""
        if not self.config.shared_dim:
            if y.is_floating_point():
                raise ValueError("this generator has a class table per layer, no class vectors (shared_dim 0): y must be class indices")
            return z, [y] * len(self.blocks)
        c = y if y.is_floating_point() else self.shared(y)          # (N, shared_dim)
        if self.config.deep:
            c = torch.cat([z, c], dim=1)                            # (N, z_dim + shared_dim)
            return c, [c] * len(self.blocks)
        if not self.config.skip_z:
            return z, [c] * len(self.blocks)
        first, *chunks = z.split(self.config.z_chunk, dim=1)        # (N, z_chunk) each
        return first, [torch.cat([c, chunk], dim=1) for chunk in chunks]

    def forward(self, z, y):                                        # (N, z_dim), (N,) or (N, shared_dim)
        first, per_block = self.conditions(z, y)
        h = self.linear(first).view(len(z), -1, 4, 4)               # (N, first width, 4, 4)
        h = h.contiguous(memory_format=torch.channels_last)
        for i, (block, c) in enumerate(zip(self.blocks, per_block, strict=True), start=1):
            h = block(h, c)                                         # (N, g_channels ch, H, W): narrower and larger, up to R x R
            if i == self.attention_after:
                h = self.attention(h)
        h = self.output_norm(h).relu_()                             # (N, last width, R, R)
        # The published deep weights have 128 filters here: sigma is that of all, but only the first three, the colours, are computed.
        h = F.conv2d(h, self.to_rgb.normalized_weight()[:3], self.to_rgb.bias[:3], padding=1)   # (N, 3, R, R)
        return torch.tanh(precise(h))                               # (N, 3, R, R) in [-1, 1]


class DBlock(nn.Module):
    """ReLU, conv, ReLU, conv, average-pool (figure 15c). The first block leaves out the first ReLU: the image would lose all below 0."""

    def __init__(self, in_channels, out_channels, first, down, config):
        super().__init__()
        self.first, self.down = first, down
        middle = out_channels if first or config.d_wide else in_channels
        self.conv1 = SNConv2d(in_channels, middle, 3, config.sn_eps)
        self.conv2 = SNConv2d(middle, out_channels, 3, config.sn_eps)
        self.conv_sc = nn.Identity()
        if down or in_channels != out_channels:
            self.conv_sc = SNConv2d(in_channels, out_channels, 1, config.sn_eps)

    def forward(self, x):                                           # (N, in, H, W)
        # The first ReLU is not in place: the shortcut needs x as it was.
        h = self.conv1(x if self.first else F.relu(x)).relu_()      # (N, middle, H, W)
        if self.down:
            h, x = conv3x3_downsample(h, self.conv2), F.avg_pool2d(x, 2)    # (N, out, H/2, W/2), (N, in, H/2, W/2)
        else:
            h = self.conv2(h)
        return h.add_(self.conv_sc(x))                              # (N, out, H/2, W/2)


class DeepDBlock(nn.Module):
    """The mirror of DeepGBlock: keeps or halves the resolution (table 7, figure 16c).

    Where the block widens, its shortcut keeps all channels of x and adds the missing ones by a 1x1 convolution."""

    def __init__(self, in_channels, out_channels, down, config):
        super().__init__()
        self.down, middle = down, out_channels // 4
        self.conv1 = SNConv2d(in_channels, middle, 1, config.sn_eps)
        self.conv2 = SNConv2d(middle, middle, 3, config.sn_eps)
        self.conv3 = SNConv2d(middle, middle, 3, config.sn_eps)
        self.conv4 = SNConv2d(middle, out_channels, 1, config.sn_eps)
        self.conv_sc = SNConv2d(in_channels, out_channels - in_channels, 1, config.sn_eps) if out_channels > in_channels else None

    def forward(self, x):                                           # (N, in, H, W)
        h = self.conv1(F.relu(x)).relu_()                           # (N, out/4, H, W)
        h = self.conv2(h).relu_()                                   # (N, out/4, H, W)
        h = self.conv3(h).relu_()                                   # (N, out/4, H, W)
        if self.down:
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)           # (N, out/4, H/2, W/2), (N, in, H/2, W/2)
        if self.conv_sc is not None:
            x = torch.cat([x, self.conv_sc(x)], dim=1)              # (N, out, H/2, W/2)
        return self.conv4(h).add_(x)                                # (N, out, H/2, W/2)


class Discriminator(nn.Module):
    """x (N, 3, R, R) in [-1, 1], y (N,) class indices -> D(x, y), called logits (N,)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        channels = [m * config.ch for m in config.d_channels]
        if config.deep:
            self.from_rgb = SNConv2d(3, channels[0], 3, config.sn_eps)
        else:
            channels = [3, *channels]
        self.blocks, self.attention_after, size = nn.ModuleList(), None, config.resolution
        for i, (a, b) in enumerate(zip(channels, channels[1:])):
            down = i < config.d_down
            size = size // 2 if down else size
            if config.deep:
                self.blocks.append(DeepDBlock(a, b, down, config))
                self.blocks.append(DeepDBlock(b, b, False, config))
            else:
                self.blocks.append(DBlock(a, b, i == 0, down, config))
            if down and size == config.d_attention:
                self.attention, self.attention_after = SelfAttention(b, config.sn_eps), len(self.blocks)
        self.linear = SNLinear(channels[-1], 1, config.sn_eps)
        self.embed = SNEmbedding(config.n_classes, channels[-1], config.sn_eps)
        initialise(self)

    def forward(self, x, y):                                        # (N, 3, R, R), (N,)
        h = x.contiguous(memory_format=torch.channels_last)
        if self.config.deep:
            h = self.from_rgb(h)                                    # (N, ch, R, R)
        for i, block in enumerate(self.blocks, start=1):
            h = block(h)                                            # (N, d_channels ch, H, W): wider and smaller
            if i == self.attention_after:
                h = self.attention(h)
        with torch.autocast(x.device.type, enabled=False):          # the logits in full precision
            h = F.relu(precise(h)).sum((2, 3))                      # (N, last width); a sum, not a mean, since SN-GAN
            # Projection (Miyato & Koyama 2018): w . h + b, plus e_y . h for the class's own direction e_y.
            return self.linear(h).squeeze(1) + (self.embed(y) * h).sum(1)   # (N,)


def initialise(network):
    """Orthogonal weights (section 3), zero biases: at the start all singular values are 1, so no direction is preferred to another."""
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.Embedding)):
            nn.init.orthogonal_(module.weight)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)


# ---------------------------------------------------------------- their sizes
# With k doublings G makes R = 4 * 2^k pixels, and with skip_z its first layer and each of the k blocks get z_dim / (k + 1) components of z.

@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides the shape of G and D. Channel numbers are multiples of `ch`, as the paper prints them."""
    resolution: int                 # R, pixels per side
    g_channels: tuple               # G: entering its first block, at 4x4, then leaving each (deep: pair), which doubles H and W
    d_channels: tuple               # D: leaving each block; the first one receives 3 colours (deep: a convolution makes the first)
    d_down: int                     # D: this many of its first blocks halve H and W, the others keep them
    g_attention: int                # attention follows the block whose output has this many pixels per side; 0 for none
    d_attention: int
    z_dim: int                      # length of the noise vector
    ch: int = 96                    # the width everything is a multiple of
    n_classes: int = 1000
    shared_dim: int = 128           # length of the class vector that all layers of G share; 0: every layer has a class table
    skip_z: bool = True             # cut z into equal chunks: one for the first layer, one for each block (section 3)
    deep: bool = False              # BigGAN-deep: bottleneck blocks, two per resolution; all of z goes to every block (appendix B)
    d_wide: bool = True             # D's blocks widen in their first convolution; SN-GAN's widen in the second
    g_sn: bool = True               # spectral norm in G too; SN-GAN has it in D alone
    rgb_filters: int = 3            # of G's last convolution; the first three make the image
    sn_eps: float = 1e-4            # the paper's value for low precision, in spectral norm ...
    bn_eps: float = 1e-4            # ... and in batch norm (appendix C)

    def __post_init__(self):
        # Lists become tuples, so that a configuration read back from a file equals the one that was written.
        for name in ("g_channels", "d_channels"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        blocks = len(self.g_channels) - 1
        if 4 * 2**blocks != self.resolution:
            raise ValueError(f"g_channels has {blocks} blocks, which make {4 * 2**blocks} pixels, not {self.resolution}")
        for network, size, sizes in (("g", self.g_attention, [8 * 2**i for i in range(blocks)]),
                                     ("d", self.d_attention, [self.resolution // 2**(i + 1) for i in range(self.d_down)])):
            if size and size not in sizes:
                raise ValueError(f"{network}_attention {size} is not what a block makes; 0 (none) or one of {sizes} could be")
        if self.skip_z and self.deep:
            raise ValueError("deep gives all of z to every block; skip_z must be False")
        if not self.shared_dim and (self.skip_z or self.deep):
            raise ValueError("a class table per layer (shared_dim 0) needs skip_z and deep to be False")
        growing = [list(channels) for channels in (self.g_channels[::-1], self.d_channels)]
        if self.deep and growing != [sorted(channels) for channels in growing]:
            raise ValueError("deep needs g_channels that never grow and d_channels that never shrink, for its shortcuts")
        if self.rgb_filters < 3:
            raise ValueError(f"rgb_filters must be at least 3, one per colour, not {self.rgb_filters}")
        if self.skip_z and self.z_dim % (blocks + 1):
            raise ValueError(f"z_dim {self.z_dim} cannot be cut into {blocks + 1} equal chunks for skip_z; "
                             f"{self.z_dim // (blocks + 1) * (blocks + 1) or blocks + 1} could")

    @property
    def z_chunk(self):
        """How many components of z the first layer receives (beside the class vector in deep) and, with skip_z, each block."""
        return self.z_dim // len(self.g_channels) if self.skip_z else self.z_dim

    @property
    def c_dim(self):
        """Length of the condition c that sets gain and bias in G's batch norms; 0 where it is the class index itself."""
        return self.shared_dim + (self.z_chunk if self.skip_z or self.deep else 0)

    @property
    def g_sn_eps(self):
        return self.sn_eps if self.g_sn else None                   # None: no spectral norm


DEEP = dict(ch=128, skip_z=False, deep=True, rgb_filters=128)
ROAD = dict(ch=64, skip_z=False, shared_dim=0)

MODELS = {  # resolution, G channels, D channels, D's halving blocks, attention in G and D, z. Tables 4 to 9.
    # The channels of biggan32 and biggan64 and G's attention at 256 are those of the author's PyTorch code. shapes32 is ours: narrow where
    # the pixels are many, for drawn shapes on two CPU cores.
    "shapes32":  ModelConfig(32, (4, 4, 2, 1), (1, 2, 4, 4), 3, 16, 16, 64, ch=32, n_classes=10, shared_dim=32),
    "biggan32":  ModelConfig(32, (4, 4, 4, 4), (4, 4, 4, 4), 2, 0, 0, 128, ch=64, n_classes=10),
    "biggan64":  ModelConfig(64, (16, 16, 8, 4, 2), (1, 2, 4, 8, 16), 4, 32, 32, 100, ch=64),
    "biggan128": ModelConfig(128, (16, 16, 8, 4, 2, 1), (1, 2, 4, 8, 16, 16), 5, 64, 64, 120),
    "biggan256": ModelConfig(256, (16, 16, 8, 8, 4, 2, 1), (1, 2, 4, 8, 8, 16, 16), 6, 64, 64, 140),
    "biggan512": ModelConfig(512, (16, 16, 8, 8, 4, 2, 1, 1), (1, 1, 2, 4, 8, 8, 16, 16), 7, 64, 64, 160),

    "biggan-deep-128": ModelConfig(128, (16, 16, 8, 4, 2, 1), (1, 2, 4, 8, 16, 16), 5, 64, 64, 128, **DEEP),
    "biggan-deep-256": ModelConfig(256, (16, 16, 8, 8, 4, 2, 1), (1, 2, 4, 8, 8, 16, 16), 6, 64, 64, 128, **DEEP),
    "biggan-deep-512": ModelConfig(512, (16, 16, 8, 8, 4, 2, 1, 1), (1, 1, 2, 4, 8, 8, 16, 16), 7, 64, 64, 128, **DEEP),

    # The road to BigGAN: SN-GAN with projection (Miyato & Koyama 2018), then SAGAN (Zhang et al. 2019), which adds attention, spectral
    # norm in G and a wide D, as table 1 of the paper starts from it.
    "sngan128": ModelConfig(128, (16, 16, 8, 4, 2, 1), (1, 2, 4, 8, 16, 16), 5, 0, 0, 128, d_wide=False, g_sn=False, **ROAD),
    "sagan128": ModelConfig(128, (16, 16, 8, 4, 2, 1), (1, 2, 4, 8, 16, 16), 5, 64, 64, 128, **ROAD),
}


# ---------------------------------------------------------------- losses
# BigGAN's is the hinge (Lim & Ye 2017, Tran et al. 2017), the formula at the top of this file. The others are for comparison. Where real
# images have density p and generated ones q, the best possible D answers sign(p - q) under the hinge, log(p / q) under non-saturating,
# p / (p + q) under least squares. (Under Wasserstein no formula of p(x) and q(x) says it.) The hinge then leaves D with twice the integral
# of min(p, q), which is largest, 2, where p = q: there no D does better than a guess.

def hinge_loss_d(real_logits, fake_logits):
    """D wants real logits above 1 and fake ones below -1; beyond that it has nothing to gain. (N,), (M,) -> scalar."""
    return F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()


def hinge_loss_g(fake_logits):
    """G wants D to call its images real. (N,) -> scalar."""
    return -fake_logits.mean()


def nonsaturating_loss_d(real_logits, fake_logits):
    """-log D(real) - log(1 - D(fake)), where D(x) = sigmoid(logit) is a probability (Goodfellow et al. 2014). -> scalar."""
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def nonsaturating_loss_g(fake_logits):
    """-log D(fake). The original log(1 - D(fake)) hardly moves where D is sure, just when G has most to learn. -> scalar."""
    return F.softplus(-fake_logits).mean()


def least_squares_loss_d(real_logits, fake_logits):
    """D wants real logits to be 1 and fake ones 0 (Mao et al. 2017). -> scalar."""
    return ((real_logits - 1).square().mean() + fake_logits.square().mean()) / 2


def least_squares_loss_g(fake_logits):
    return (fake_logits - 1).square().mean() / 2


def wasserstein_loss_d(real_logits, fake_logits):
    """Mean fake minus mean real logit (Arjovsky et al. 2017). Without `gradient_penalty` it would fall without end. -> scalar."""
    return fake_logits.mean() - real_logits.mean()


LOSSES = {  # D's loss, G's loss, and the logit above which D takes an image for real; wgan-gp cares for differences only and has none
    "hinge": (hinge_loss_d, hinge_loss_g, 0.0),
    "non-saturating": (nonsaturating_loss_d, nonsaturating_loss_g, 0.0),
    "least-squares": (least_squares_loss_d, least_squares_loss_g, 0.5),
    "wgan-gp": (wasserstein_loss_d, hinge_loss_g, None),            # G wants the same as under the hinge
}


# ---------------------------------------------------------------- penalties
# What is added to a loss to keep a network tame. BigGAN itself uses one, orthogonal regularisation on G: beta || W W^T * (1 - I) ||_F^2,
# the squares of all entries of W W^T off its diagonal, with beta = 1e-4.
# Section 4.2 tries R1 on D, gamma/2 E |d D / d x|^2, against collapse: after long training, G's images suddenly become poor or alike,
# for good. It works, at a price in quality that the authors did not want to pay.

def squared_slope(D, x, y):
    """How steep D is at each image: the squared length of d D(x, y) / dx, one number per image (N,). Can itself be differentiated."""
    x = x.detach().requires_grad_()
    # The sum's gradient holds each image's own, since D looks at every image by itself.
    gradient, = torch.autograd.grad(D(x, y).sum(), x, create_graph=True)
    return gradient.flatten(1).square().sum(1)


def r1_penalty(D, x, y):
    """1/2 E |d D(x, y) / dx|^2 over real images: D must not be steep where the data are (Mescheder et al. 2018; section 4.2).

    x (N, 3, R, R), y (N,) -> scalar. The weight gamma is left out; the paper tries 1 and 10."""
    return squared_slope(D, x, y).mean() / 2


def gradient_penalty(D, real, fake, y, mix):
    """E (|d D(x, y) / dx| - 1)^2 over x on the straight lines from real to generated images (Gulrajani et al. 2017). -> scalar.

    mix (N,) says where on its line each x lies, 0 at the real end and 1 at the generated one. Both ends are of the classes y (N,)."""
    x = torch.lerp(real, fake, mix.reshape(-1, 1, 1, 1))
    return ((squared_slope(D, x, y) + 1e-12).sqrt() - 1).square().mean()    # 1e-12: the root of 0 has no derivative


def orthogonal_penalty(W, off_diagonal=True):
    """|| W W^T * (1 - I) ||_F^2, where the rows of W (out, ...) are the filters: how far filters are from right angles.

    Filters at right angles do not repeat each other, and G stays smooth: it draws well also with truncated noise (below), which fills a
    small region of what it was trained with (section 3.1).
    The paper has filters as columns and writes W^T W. Leaving out the diagonal leaves the filters' lengths free;
    off_diagonal=False gives the older form || W W^T - I ||_F^2. The factor beta is left out. Returns a scalar."""
    W = W.flatten(1)
    diagonal = W.square().sum(1)                                    # of W W^T
    if W.shape[0] <= W.shape[1]:
        gram = W @ W.T
        return (gram - torch.diag(diagonal if off_diagonal else torch.ones_like(diagonal))).square().sum()
    # More filters than inputs: || W W^T ||_F = || W^T W ||_F, and the latter is small. G's first layer at 128 pixels has 24,576
    # filters of 20 inputs: a matrix of 400 numbers instead of 604 million. Its diagonal's share comes off: || A - I ||^2 = || A ||^2 -
    # 2 tr A + n.
    squares = (W.T @ W).square().sum()
    return squares - (diagonal.square().sum() if off_diagonal else 2 * diagonal.sum() - len(diagonal))


def orthogonal_regularisation(G):
    """The sum of the off-diagonal penalty over all weight matrices of G but class vectors and tables, which are data, not filters."""
    return sum(orthogonal_penalty(m.weight) for m in matrix_layers(G).values())


# ---------------------------------------------------------------- watching and restraining the singular values (section 4.1)
# Before a run collapses, the largest singular value sigma_0 of some of G's weights, the first layer's above all, grows faster and faster.
# Spectral norm hides that from the output, but not from the optimiser. Watch the first three, or hold the first one down.

def fewer_rows(W):                                                  # W or W^T, whichever has fewer: W W^T is then the smaller one
    return W if W.shape[0] <= W.shape[1] else W.T


@torch.no_grad()
def singular_values(W, k=3):
    """The k largest singular values of W (out, ...) -> (k,) or fewer, largest first: the square roots of the largest eigenvalues
    of W W^T, or of W^T W where that is smaller, which has the same but for zeros. NaN where W is not finite."""
    small = fewer_rows(W.flatten(1))
    gram = small @ small.T
    if not gram.isfinite().all():                                   # on which eigvalsh raises
        return gram.new_full((min(k, len(gram)),), math.nan)
    return torch.linalg.eigvalsh(gram).flip(0)[:k].clamp(min=0).sqrt()


def sigma_excess(W, fixed=None, ratio=None):
    """By how much sigma_0 of W (out, ...) exceeds a goal: `fixed`, or `ratio` times sigma_1, which counts as a constant.

    Returns the excess, through which gradients reach W, and the singular vectors u (out,) and v (everything else,). They are exact,
    which takes a full decomposition of every layer at every step: a tenth of a second or more for the widest ones."""
    W = W.flatten(1)
    with torch.no_grad():
        small = fewer_rows(W)
        squares, vectors = torch.linalg.eigh((small @ small.T).nan_to_num(0, 0, 0))     # ascending; sigma_0 below will show a NaN
        start = vectors[:, -1] if small is W else W @ vectors[:, -1]
        goal = fixed if fixed is not None else ratio * squares[-2].sqrt()
    sigma_0, u, v = power_iteration(W, start)                       # starts at the answer
    return sigma_0 - goal, u, v


def sigma_pull(G, fixed=None, ratio=None):
    """Sum over G's layers of the squared excess: a penalty that pulls sigma_0 to its goal, from above and from below. -> scalar."""
    return sum(sigma_excess(m.weight, fixed, ratio)[0].square() for m in matrix_layers(G).values())


@torch.no_grad()
def clamp_sigma(G, fixed=None, ratio=None):
    """W <- W - max(0, excess) u v^T in every layer of G: lowers sigma_0 to the goal, one singular value per call."""
    for m in matrix_layers(G).values():
        excess, u, v = sigma_excess(m.weight, fixed, ratio)
        m.weight -= (excess.clamp(min=0) * torch.outer(u, v)).view_as(m.weight)


# ---------------------------------------------------------------- truncation, averaged weights, standing statistics
# Three things that turn a trained G into good samples: z drawn within a threshold (less variety, better images); the average of G's
# weights over time, average <- d average + (1 - d) newest; and batch norm's moments taken anew from many batches of such samples.

def truncated_normal(shape, threshold=math.inf, generator=None):
    """Standard normal noise in which no component exceeds the threshold in size: less variety, better images (section 3.1).

    The paper draws again whatever lies outside. Pushing uniform numbers through the inverse of the truncated normal's cumulative
    function, z = sqrt(2) erfinv(u) with |u| <= erf(threshold / sqrt(2)), gives the same distribution without a loop, and one seed then
    gives the same noise, only tamer, at any threshold. Returns a float32 tensor."""
    if not threshold > 0:
        raise ValueError(f"the truncation threshold must be above 0, not {threshold}")
    inside = math.erf(threshold / math.sqrt(2))                     # the share of a normal distribution within the threshold
    uniform = (torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1) * inside
    limit = min(threshold, 9)                                       # erfinv(-1) is infinite
    return (math.sqrt(2) * torch.erfinv(uniform)).clamp(-limit, limit).float()


def scaled_normal(shape, scale, generator=None):
    """What "truncation" means for the BigGAN-deep weights that were published: noise truncated at 2, times `scale` from 0 to 1."""
    return scale * truncated_normal(shape, 2.0, generator)


class EMA:
    """A copy of G whose weights, and buffers, are running averages of G's (section 3, appendix C).

    G never settles, it circles; the average is nearer to the centre than any point of the circle. Until `start` steps are done the
    copy simply follows, so that the random first weights do not linger in it."""

    def __init__(self, model, decay=0.9999, start=0):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay, self.start = decay, start

    @torch.no_grad()
    def update(self, model, step):
        """Take in the weights and buffers of `model` after optimiser step number `step`."""
        averages = [*self.model.parameters(), *self.model.buffers()]
        newest = [*model.parameters(), *model.buffers()]
        # All in one call (torch has no public name for it). An averaged u is no unit vector, which power_iteration does not mind.
        torch._foreach_lerp_(averages, newest, 1 - self.decay if step > self.start else 1.0)


@torch.no_grad()
def standing_statistics(G, batches=16, batch_size=64, noise=truncated_normal):
    """Replace the running averages in G's batch norms by plain averages over batches of freshly drawn images (appendix C).

    The averages that training leaves behind lag behind the weights, and they belong to untruncated noise: truncated noise has other
    moments, and samples drawn with the wrong ones are washed out. So the noise must be that of the samples: noise(shape, generator=...).
    Classes are drawn uniformly. Several processes share the work and must all call it. Leaves G in eval mode."""
    device = next(G.parameters()).device
    norms = [m for m in G.eval().modules() if isinstance(m, Norm)]
    generator = torch.Generator().manual_seed(0)
    share = -(-batch_size // processes())                           # rounded up, since all shares must be equal
    mine = slice(rank() * share, (rank() + 1) * share)
    for norm in norms:
        norm.training = True                                        # of the norm alone: the layers inside it stay in eval mode
    for k in range(batches):
        for norm in norms:
            norm.momentum = 1 / (k + 1)                             # then the running average is the mean of all k + 1 batches
        z = noise((share * processes(), G.config.z_dim), generator=generator)
        y = torch.randint(G.config.n_classes, (share * processes(),), generator=generator)
        G(z[mine].to(device), y[mine].to(device))
    for norm in norms:
        norm.momentum = Norm.momentum
    return G.eval()
