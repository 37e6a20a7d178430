"""BigGAN, every technique written out by hand.

A generator G turns noise z and a class y into an image. A discriminator D looks at an image x and a class y
and returns one number, the logit D(x, y): large if it takes x for a real image of that class. They take
turns:

    D minimises  E max(0, 1 - D(x, y)) + E max(0, 1 + D(G(z, y), y))    over real x, y; normal z, uniform y
    G minimises  - E D(G(z, y), y)                                      through D, whose weights are frozen

D learns to tell real from generated images, and G to make D take its images for real. In the game's
equilibrium, if both networks can represent any function, generated images are distributed like real ones, and
D can only guess (see "losses"). The paper's recipe at 128x128 (`Trainer.train_step` in train.py), with Adam,
beta1 = 0:

    150,000 times:
        twice   2048 new real images, as many generated ones; a step on D's loss    learning rate 2e-4
        once    2048 generated images; a step on G's loss + 1e-4 orthogonal penalty               5e-5
                EMA weights <- 0.9999 EMA weights + 0.0001 G's weights      samples are drawn with these

Reading order: the techniques, each a few lines (spectral norm, resampling, batch norm, attention); the two
networks built from them, and their sizes (MODELS); then what training needs (losses, penalties, for few
images augmentation) and what makes good samples (truncation, EMA weights, standing statistics).

Paper: Brock, Donahue, Simonyan, "Large Scale GAN Training for High Fidelity Natural Image Synthesis", ICLR
2019, arXiv:1809.11096. "section 3.1", "table 4" and so on below refer to it.

Shapes: N images, C channels (the width of a layer), H x W pixels, R the image's resolution. Training may run
under autocast, which computes convolutions and matrix products in 16 bits; `precise` marks what must be
float32. channels_last is a memory layout in which the channels of a pixel lie together, for speed."""

import copy
import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


# ---------------------------------------------------------------- spectral norm
# The largest singular value sigma of a weight matrix W says how much W can stretch a vector: sigma = max |Wv|
# over |v| = 1. A layer that computes with W / sigma does not stretch, so D's gradient, which is all that G
# learns from, stays bounded. BigGAN does the same in G (section 3). (The bound is rough: a residual block
# adds two paths, and a 3x3 convolution reads every pixel nine times, so that it may stretch up to sqrt(9) = 3
# times.) Power iteration finds sigma:
#     v = W^T u / |W^T u|,   u = W v / |W v|,   sigma = u^T W v
# Each round multiplies the component of u along the i-th singular direction by sigma_i^2, so the largest one
# wins. W changes little from step to step: u is kept, and one round in every forward pass is enough
# (at the start all singular values are 1, and any u will do).

def power_iteration(W, u, steps=1, eps=1e-12):
    """The largest singular value of W (rows, columns), estimated from u (rows,).

    Returns sigma (a scalar through which gradients reach W), u (rows,) and v (columns,), unit vectors with
    u^T W v = sigma. u and v count as constants: d sigma / dW = u v^T, the exact derivative once they have
    converged. Miyato et al. 2018, algorithm 1."""
    with torch.no_grad():
        for _ in range(steps):
            v = F.normalize(W.T @ u, dim=0, eps=eps)
            u = F.normalize(W @ v, dim=0, eps=eps)
    return u @ (W @ v), u, v


class SpectralNorm:
    """Mixed into one of torch's layers: adds `normalized_weight()`, its weight divided by sigma.

    eps=None switches it off (in SN-GAN's generator): the weight stays as it is, and so does u."""

    def __init__(self, eps, *size, **options):
        super().__init__(*size, **options)
        self.eps = eps
        self.register_buffer("u", F.normalize(torch.randn(self.weight.shape[0]), dim=0))

    def normalized_weight(self):
        if self.eps is None:
            return self.weight
        # In float32 also under autocast: sigma is a sum over thousands of products.
        with torch.autocast(self.weight.device.type, enabled=False):
            W = self.weight.flatten(1)                      # (out, everything else): one row per filter
            sigma, u, _ = power_iteration(W, self.u, eps=self.eps)
            if self.training:
                self.u.copy_(u)                             # evaluation takes the step without keeping it
            return self.weight / sigma.clamp(min=self.eps)


def matrix_layers(network):
    """Name -> layer with a weight matrix: convolutions, linear layers and D's embedding, not G's."""
    return {name: m for name, m in network.named_modules() if isinstance(m, SpectralNorm)}


@torch.no_grad()
def fold_spectral_norm(network):
    """Divide every weight by its sigma for good: the same output, without computing sigma at every call."""
    for layer in matrix_layers(network).values():
        layer.weight.copy_(layer.normalized_weight())
        layer.eps = None
    return network


class SNConv2d(SpectralNorm, nn.Conv2d):
    """Channels in and out, and a kernel size, 3 or 1; keeps H and W."""

    def forward(self, x):                                   # (N, in, H, W) -> (N, out, H, W)
        return F.conv2d(x, self.normalized_weight(), self.bias, padding="same")


class SNLinear(SpectralNorm, nn.Linear):
    def forward(self, x):                                   # (N, in) -> (N, out)
        return F.linear(x, self.normalized_weight(), self.bias)


class SNEmbedding(SpectralNorm, nn.Embedding):
    def forward(self, y):                                   # (N,) labels -> (N, dim)
        return F.embedding(y, self.normalized_weight())


# ---------------------------------------------------------------- resampling folded into a convolution
# G doubles the image by repeating each pixel, then convolves; D convolves, then averages 2x2 pixels. Both
# waste work: repeated pixels are multiplied more than once, and four outputs are computed for each one that
# is kept. All of it is linear, so D's pair equals *one* convolution of stride 2 with a 4x4 kernel, the mean
# of the 3x3 kernel placed in its four corners, and G's is the transpose of one, with the sum for the mean: 16
# products per small pixel instead of 36.

def mean_of_four_shifted(W):
    """(out, in, 3, 3) -> (out, in, 4, 4): the mean of W placed in each corner: a 2x2 average."""
    return F.avg_pool2d(W, 2, stride=1, padding=1)


def upsample_conv3x3(x, layer):
    """Nearest-neighbour doubling, then a 3x3 convolution layer. x (N, in, H, W) -> (N, out, 2H, 2W)."""
    if x.numel() < layer.weight.numel() / 8:    # few pixels: the kernel would cost more than it saves
        return layer(upsample(x))
    # A transposed convolution reads its kernel backwards and wants it as (in, out, 4, 4).
    W = layer.normalized_weight().flip(2, 3).transpose(0, 1).contiguous(memory_format=torch.channels_last)
    y = F.conv_transpose2d(x, mean_of_four_shifted(4 * W), stride=2, padding=1)    # 4 x mean = sum
    # The bias is added here: in conv_transpose2d, on a CPU, its gradient costs more than all else.
    return y.add_(per_channel(layer.bias.to(y.dtype)))


def conv3x3_downsample(x, layer):
    """A 3x3 convolution layer, then 2x2 average pooling. x (N, in, H, W) -> (N, out, H/2, W/2)."""
    return F.conv2d(x, mean_of_four_shifted(layer.normalized_weight()), layer.bias, stride=2, padding=1)


def upsample(x):                                            # (N, C, H, W) -> (N, C, 2H, 2W)
    return F.interpolate(x, scale_factor=2, mode="nearest")


# ---------------------------------------------------------------- batch norm, plain and conditional
# Batch norm brings every channel to mean 0 and variance 1, then to a gain and a bias of its own:
#     gain * (x - mean) / sqrt(var + eps) + bias,   mean and var of each channel over the whole batch
# In G's blocks gain = 1 + W_g c and bias = W_b c depend on each image's condition c, its class embedding
# joined with a chunk of its z: that is how every block is told what to draw. The batch spans all GPUs. D has
# no batch norm: each image's logit depends on that image alone.

def precise(x):                                             # float32 for sums and exponentials; float64 stays
    return x.to(torch.promote_types(x.dtype, torch.float32))


def per_channel(a):                                         # (C,) -> (1, C, 1, 1) and (N, C) -> (N, C, 1, 1)
    return a.reshape(-1, a.shape[-1], 1, 1)


def processes():                                            # how many train together, one per GPU
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():                                                 # which of them this one is, from 0
    return dist.get_rank() if processes() > 1 else 0


class Moments(torch.autograd.Function):
    """Mean and variance of each channel over the batch of all processes. (N, C, H, W) -> (C,), (C,) float32.

    The derivative is written out because it is one pass over x instead of the many that autograd would
    record: with n = N H W,  d mean / dx = 1 / n  and  d var / dx = 2 (x - mean) / n.

    Cross-replica batch norm (appendix C): where several processes each hold an equal part of the batch, the
    moments and the derivatives are those of the whole batch: every loss depends on every process's x."""

    @staticmethod
    def forward(ctx, x):
        full = precise(x)
        mean = full.mean((0, 2, 3))
        # A float32 copy of x may be overwritten, x itself may not.
        centred = full - per_channel(mean) if full is x else full.sub_(per_channel(mean))
        var = centred.square_().mean((0, 2, 3))
        if processes() > 1:                                 # variance = mean of variances + variance of means
            own = torch.stack([mean, var])
            parts = [torch.empty_like(own) for _ in range(processes())]
            dist.all_gather(parts, own)
            means, variances = torch.stack(parts, dim=1)    # (processes, C) each
            mean = means.mean(0)
            var = (variances + (means - mean).square()).mean(0)
        ctx.save_for_backward(x, mean)
        return mean, var

    @staticmethod
    def backward(ctx, grad_mean, grad_var):
        x, mean = ctx.saved_tensors
        grads = torch.stack([grad_mean, grad_var])
        if processes() > 1:
            dist.all_reduce(grads)                          # the sum over all processes' losses
        n = processes() * x.numel() // x.shape[1]
        factor = 2 * grads[1] / n
        offset = grads[0] / n - factor * mean
        return torch.addcmul(per_channel(offset).to(x.dtype), x, per_channel(factor).to(x.dtype))


class Norm(nn.Module):
    """What both batch norms share: batch moments in training, running averages of them in evaluation."""

    momentum = 0.1                                          # weight of the newest batch in the average

    def __init__(self, channels, eps):
        super().__init__()
        self.eps = eps
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def normalise(self, x, gain, bias):
        """x (N, C, H, W); gain and bias (C,) or (N, C)."""
        mean, var = self.running_mean, self.running_var
        if self.training:
            mean, var = Moments.apply(x)
            n = processes() * x.numel() // x.shape[1]
            with torch.no_grad():                           # unbiased, as in nn.BatchNorm2d
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(var * n / (n - 1), self.momentum)
        # (C,) or (N, C). Rounded to x's 16 bits before shift, so that rounding it does not move the mean.
        scale = (gain * torch.rsqrt(var + self.eps)).to(x.dtype)
        shift = bias - mean * scale
        return torch.addcmul(per_channel(shift).to(x.dtype), x, per_channel(scale))    # in one pass over x


class BatchNorm(Norm):
    """Gain and bias are learned numbers, one pair per channel."""

    def __init__(self, channels, eps):
        super().__init__(channels, eps)
        self.gain = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x):                                   # (N, C, H, W) -> (N, C, H, W)
        return self.normalise(x, self.gain, self.bias)


class ConditionalBatchNorm(Norm):
    """One gain and bias per channel and image, computed from the condition c (section 3, figure 15).

    Without a shared class embedding (shared_dim 0, as in SAGAN) c is the class; W_g and W_b are
    embeddings."""

    def __init__(self, channels, config):
        super().__init__(channels, config.bn_eps)
        if config.shared_dim:
            self.gain = SNLinear(config.g_sn_eps, config.c_dim, channels, bias=False)
            self.bias = SNLinear(config.g_sn_eps, config.c_dim, channels, bias=False)
        else:
            self.gain = nn.Embedding(config.n_classes, channels)
            self.bias = nn.Embedding(config.n_classes, channels)

    def forward(self, x, c):                                # (N, C, H, W), (N, c_dim) or (N,) -> (N, C, H, W)
        return self.normalise(x, 1 + precise(self.gain(c)), precise(self.bias(c)))


# ---------------------------------------------------------------- self-attention
# A convolution sees 3x3 pixels. Attention lets every position p look at all positions q:
#     out_p = x_p + gamma o( sum_q a_pq g(x_q) ),   a_pq = softmax over q of theta(x_p) . phi(x_q)
# theta, phi, g and o are 1x1 convolutions: query, key, value and output projection. Keys and values are
# pooled: q runs over cells of 2x2 positions.

def attention(query, key, value):
    """(N, L, E), (N, M, E), (N, M, V) -> (N, L, V): mean of the values by the softmax of query . key."""
    scores = query @ key.mT                                 # (N, L, M)
    # Autocast is off here for memory: on a GPU it would return the softmax, the largest tensor of all, in
    # float32. The sums inside are taken in float32 anyway.
    with torch.autocast(scores.device.type, enabled=False):
        weights = scores.softmax(-1)                        # (N, L, M), every row sums to 1
    return weights @ value


def fused_attention(query, key, value):
    """The same by torch's kernel for GPUs, which never stores (N, L, M). Has no second derivative."""
    missing = value.shape[2] - query.shape[2]               # zeros change no product; lengths must be equal
    query, key = F.pad(query, (0, missing)), F.pad(key, (0, missing))
    one_head = [a[:, None] for a in (query, key, value)]
    return F.scaled_dot_product_attention(*one_head, scale=1.0)[:, 0]


class SelfAttention(nn.Module):
    """(N, C, H, W) -> (N, C, H, W). Zhang et al. 2019 (SAGAN), as in its authors' code.

    Pooling quarters the work. The products are not divided by sqrt(C/8), unlike in a transformer. gamma
    starts at 0: at first the layer is the identity."""

    fused = False                                           # torch's kernel, which never stores all of a_pq

    def __init__(self, channels, eps):
        super().__init__()
        self.theta = SNConv2d(eps, channels, channels // 8, 1, bias=False)
        self.phi = SNConv2d(eps, channels, channels // 8, 1, bias=False)
        self.g = SNConv2d(eps, channels, channels // 2, 1, bias=False)
        self.o = SNConv2d(eps, channels // 2, channels, 1, bias=False)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x):                                   # (N, C, H, W)
        N, C, H, W = x.shape
        positions = lambda a: a.permute(0, 2, 3, 1).flatten(1, 2)  # (N, C, H, W) -> (N, HW, C)
        query = positions(self.theta(x))                    # (N, HW, C/8)
        key = positions(F.max_pool2d(self.phi(x), 2))       # (N, HW/4, C/8)
        value = positions(F.max_pool2d(self.g(x), 2))       # (N, HW/4, C/2)
        mixed = (fused_attention if self.fused else attention)(query, key, value)       # (N, HW, C/2)
        mixed = mixed.view(N, H, W, C // 2).permute(0, 3, 1, 2)     # (N, C/2, H, W)
        return torch.addcmul(x, self.gamma.to(x.dtype), self.o(mixed))


# ---------------------------------------------------------------- the networks
#     G       z is cut into chunks z_0, z_1, ...:  h = linear(z_0), 4x4;  h = block_i(h, [class, z_i]), each
#             doubling H and W;  image = tanh(conv(ReLU(norm(h))))
#     deep G  (BigGAN-deep) gives linear and every block [class, all of z]; every second block doubles
#     old G   (SAGAN, SN-GAN; without skip_z) has all of z in linear alone, and the class in the blocks
#     D       blocks, most halving H and W;  s = sum over pixels of ReLU(h);  then one linear layer (w, b)
#             and one vector e_y per class:  D(x, y) = w . s + b + e_y . s
# A block is residual: shortcut(x) + convolutions of x. In most sizes attention follows one block of each
# network. A shortcut's 1x1 convolution sees one pixel at a time: it gives the same on the smaller image, with
# a quarter of the work. `config` is a ModelConfig, explained below the networks.

class GBlock(nn.Module):
    """Doubles the resolution: norm, ReLU, upsample, conv, norm, ReLU, conv (table 4, figure 15b)."""

    def __init__(self, in_channels, out_channels, config):
        super().__init__()
        self.bn1 = ConditionalBatchNorm(in_channels, config)
        self.conv1 = SNConv2d(config.g_sn_eps, in_channels, out_channels, 3)
        self.bn2 = ConditionalBatchNorm(out_channels, config)
        self.conv2 = SNConv2d(config.g_sn_eps, out_channels, out_channels, 3)
        self.conv_sc = SNConv2d(config.g_sn_eps, in_channels, out_channels, 1)      # sc: shortcut

    def forward(self, x, c):                                # (N, in, H, W), (N, c_dim)
        h = self.bn1(x, c).relu_()                          # (N, in, H, W); in place, nobody else needs it
        h = upsample_conv3x3(h, self.conv1)                 # (N, out, 2H, 2W)
        h = self.conv2(self.bn2(h, c).relu_())              # (N, out, 2H, 2W)
        return h.add_(upsample(self.conv_sc(x)))            # (N, out, 2H, 2W)


class DeepGBlock(nn.Module):
    """BigGAN-deep: four convolutions, in a bottleneck a quarter as wide; keeps or doubles H, W (figure 16b).

    Deeper and yet smaller. The shortcut has no weights: where the block narrows, it keeps the first
    channels."""

    def __init__(self, in_channels, out_channels, up, config):
        super().__init__()
        self.up, self.out_channels, middle = up, out_channels, in_channels // 4
        self.bn1 = ConditionalBatchNorm(in_channels, config)
        self.conv1 = SNConv2d(config.g_sn_eps, in_channels, middle, 1)
        self.bn2 = ConditionalBatchNorm(middle, config)
        self.conv2 = SNConv2d(config.g_sn_eps, middle, middle, 3)
        self.bn3 = ConditionalBatchNorm(middle, config)
        self.conv3 = SNConv2d(config.g_sn_eps, middle, middle, 3)
        self.bn4 = ConditionalBatchNorm(middle, config)
        self.conv4 = SNConv2d(config.g_sn_eps, middle, out_channels, 1)

    def forward(self, x, c):                                # (N, in, H, W), (N, c_dim)
        h = self.conv1(self.bn1(x, c).relu_())              # (N, in/4, H, W)
        h = self.bn2(h, c).relu_()                          # (N, in/4, H, W)
        x = x[:, :self.out_channels]                        # (N, out, H, W)
        if self.up:
            h = upsample_conv3x3(h, self.conv2)             # (N, in/4, 2H, 2W)
            x = upsample(x)                                 # (N, out, 2H, 2W)
        else:
            h = self.conv2(h)
        h = self.conv3(self.bn3(h, c).relu_())              # (N, in/4, 2H, 2W)
        return self.conv4(self.bn4(h, c).relu_()).add_(x)   # (N, out, 2H, 2W)


class Generator(nn.Module):
    """z (N, z_dim), y (N,) class indices -> images (N, 3, R, R) in [-1, 1].

    y may also be (N, shared_dim) float: class embeddings, or points between them for images between
    classes."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        channels = widths(config.g_channels, config.ch)
        if config.shared_dim:
            # No spectral norm: it cripples G, as the author's code notes, for reasons unknown.
            self.shared = nn.Embedding(config.n_classes, config.shared_dim)
        # The first layer sees a chunk of z alone, and the class enters later (deep: all of z, and the class).
        first_dim = config.c_dim if config.deep else config.z_chunk
        self.linear = SNLinear(config.g_sn_eps, first_dim, 4 * 4 * channels[0])
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
        self.to_rgb = SNConv2d(config.g_sn_eps, channels[-1], config.rgb_filters, 3)
        initialise(self)

    def conditions(self, z, y):
        """The first layer's input (N, ...), and per block a condition (N, c_dim) or class (N,)."""
        if not self.config.shared_dim:
            assert not y.is_floating_point(), "without a shared class embedding y must be class indices"
            return z, [y] * len(self.blocks)
        c = y if y.is_floating_point() else self.shared(y)  # (N, shared_dim)
        if self.config.deep:
            c = torch.cat([z, c], dim=1)                    # (N, z_dim + shared_dim)
            return c, [c] * len(self.blocks)
        if not self.config.skip_z:
            return z, [c] * len(self.blocks)
        first, *chunks = z.split(self.config.z_chunk, dim=1)  # (N, z_chunk) each
        return first, [torch.cat([c, chunk], dim=1) for chunk in chunks]

    def forward(self, z, y):                                # (N, z_dim), (N,) or (N, shared_dim)
        first, per_block = self.conditions(z, y)
        h = self.linear(first).view(len(z), -1, 4, 4)       # (N, first width, 4, 4)
        h = h.contiguous(memory_format=torch.channels_last)
        for i, (block, c) in enumerate(zip(self.blocks, per_block, strict=True), start=1):
            h = block(h, c)                                 # (N, channels, H, W): fewer channels, more pixels
            if i == self.attention_after:
                h = self.attention(h)
        h = self.output_norm(h).relu_()                     # (N, last width, R, R)
        # The published deep weights have 128 filters here: all count for sigma, three are colours.
        W, b = self.to_rgb.normalized_weight()[:3], self.to_rgb.bias[:3]
        return torch.tanh(precise(F.conv2d(h, W, b, padding=1)))  # (N, 3, R, R) in [-1, 1]


class DBlock(nn.Module):
    """ReLU, conv, ReLU, conv, average-pool (figure 15c). The first block's first ReLU is left out."""

    def __init__(self, in_channels, out_channels, first, down, config):
        super().__init__()
        self.first, self.down = first, down
        middle = out_channels if first or config.d_wide else in_channels
        self.conv1 = SNConv2d(config.sn_eps, in_channels, middle, 3)
        self.conv2 = SNConv2d(config.sn_eps, middle, out_channels, 3)
        self.conv_sc = nn.Identity()
        if down or in_channels != out_channels:
            self.conv_sc = SNConv2d(config.sn_eps, in_channels, out_channels, 1)

    def forward(self, x):                                   # (N, in, H, W)
        # The first ReLU is not in place: the shortcut needs x as it was.
        h = self.conv1(x if self.first else F.relu(x)).relu_()  # (N, middle, H, W)
        if self.down:
            h = conv3x3_downsample(h, self.conv2)           # (N, out, H/2, W/2)
            x = F.avg_pool2d(x, 2)                          # (N, in, H/2, W/2)
        else:
            h = self.conv2(h)
        return h.add_(self.conv_sc(x))                      # (N, out, H/2, W/2)


class DeepDBlock(nn.Module):
    """The mirror of DeepGBlock: keeps or halves H and W (table 7, figure 16c).

    Where the block widens, its shortcut adds the missing channels by a 1x1 convolution."""

    def __init__(self, in_channels, out_channels, down, config):
        super().__init__()
        self.down, middle, missing = down, out_channels // 4, out_channels - in_channels
        self.conv1 = SNConv2d(config.sn_eps, in_channels, middle, 1)
        self.conv2 = SNConv2d(config.sn_eps, middle, middle, 3)
        self.conv3 = SNConv2d(config.sn_eps, middle, middle, 3)
        self.conv4 = SNConv2d(config.sn_eps, middle, out_channels, 1)
        self.conv_sc = SNConv2d(config.sn_eps, in_channels, missing, 1) if missing else None

    def forward(self, x):                                   # (N, in, H, W)
        h = self.conv1(F.relu(x)).relu_()                   # (N, out/4, H, W)
        h = self.conv2(h).relu_()                           # (N, out/4, H, W)
        h = self.conv3(h).relu_()                           # (N, out/4, H, W)
        if self.down:
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)   # (N, out/4, H/2, W/2), (N, in, H/2, W/2)
        if self.conv_sc is not None:
            x = torch.cat([x, self.conv_sc(x)], dim=1)      # (N, out, H/2, W/2)
        return self.conv4(h).add_(x)                        # (N, out, H/2, W/2)


class Discriminator(nn.Module):
    """x (N, 3, R, R) in [-1, 1], y (N,) class indices -> logits D(x, y) (N,)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        channels = widths(config.d_channels, config.ch)
        if config.deep:
            self.from_rgb = SNConv2d(config.sn_eps, 3, channels[0], 3)
        else:
            channels = [3, *channels]
        self.blocks, self.attention_after = nn.ModuleList(), None
        for i, (a, b) in enumerate(zip(channels, channels[1:])):
            down = i < config.d_down
            if config.deep:
                self.blocks.append(DeepDBlock(a, b, down, config))
                self.blocks.append(DeepDBlock(b, b, False, config))
            else:
                self.blocks.append(DBlock(a, b, i == 0, down, config))
            if down and config.d_attention == config.resolution // 2**(i + 1):
                self.attention, self.attention_after = SelfAttention(b, config.sn_eps), len(self.blocks)
        self.linear = SNLinear(config.sn_eps, channels[-1], 1)
        self.embed = SNEmbedding(config.sn_eps, config.n_classes, channels[-1])
        initialise(self)

    def forward(self, x, y):                                # (N, 3, R, R), (N,)
        h = x.contiguous(memory_format=torch.channels_last)
        if self.config.deep:
            h = self.from_rgb(h)                            # (N, ch, R, R)
        for i, block in enumerate(self.blocks, start=1):
            h = block(h)                                    # (N, channels, H, W): more channels, fewer pixels
            if i == self.attention_after:
                h = self.attention(h)
        with torch.autocast(x.device.type, enabled=False):  # the logits in float32
            s = F.relu(precise(h)).sum((2, 3))              # (N, last width); a sum, not a mean, since SN-GAN
            # Projection (Miyato & Koyama 2018): w . s + b, plus e_y . s with the class's own direction e_y.
            return self.linear(s).squeeze(1) + (self.embed(y) * s).sum(1)   # (N,)


def widths(channels, ch):
    """"16-8", 96 -> [1536, 768]."""
    return [int(multiple) * ch for multiple in channels.split("-")]


def initialise(network):
    """Orthogonal weights (section 3), zero biases: all singular values start at 1."""
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.Embedding)):
            nn.init.orthogonal_(module.weight)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)


# ---------------------------------------------------------------- their sizes
# With k doublings G makes R = 4 * 2^k pixels; with skip_z the first layer and each block get z_dim / (k + 1).

@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides the shape of G and D. Channels, such as "16-8", are multiples of `ch`."""
    resolution: int                 # R, pixels per side
    g_channels: str                 # G: input of the first block, then output of each (deep: of each pair)
    d_channels: str                 # D: output of each block (deep: of a convolution, then of each pair)
    d_down: int                     # D: this many of its first blocks halve H and W, the others keep them
    g_attention: int                # attention follows the block with this many pixels per side; 0: none
    d_attention: int
    z_dim: int                      # length of the noise vector
    ch: int = 96                    # the width everything is a multiple of
    n_classes: int = 1000
    shared_dim: int = 128           # length of the class embedding shared by G's layers; 0: each has its own
    skip_z: bool = True             # cut z into chunks: one for the first layer, one per block (section 3)
    deep: bool = False              # BigGAN-deep: bottleneck blocks that all see z and class (appendix B)
    d_wide: bool = True             # D's blocks widen in their first convolution; SN-GAN's in the second
    rgb_filters: int = 3            # of G's last convolution; the first three make the image
    sn_eps: float = 1e-4            # the paper's value for low precision, in spectral norm of D,
    g_sn_eps: float | None = 1e-4   # of G (None: SN-GAN has spectral norm in D alone),
    bn_eps: float = 1e-4            # and in batch norm (appendix C)

    def __post_init__(self):
        k = self.g_channels.count("-")                      # the number of doublings
        g_sizes = [0, *(8 * 2**i for i in range(k))]
        d_sizes = [0, *(self.resolution // 2**i for i in range(1, self.d_down + 1))]
        assert self.resolution == 4 * 2**k, f"g_channels has {k} blocks, which make {4 * 2**k} pixels"
        assert self.g_attention in g_sizes, f"g_attention {self.g_attention} is not one of {g_sizes}"
        assert self.d_attention in d_sizes, f"d_attention {self.d_attention} is not one of {d_sizes}"
        assert self.shared_dim or not (self.deep or self.skip_z), "skip_z and deep need a shared_dim above 0"
        assert not self.skip_z or self.z_dim % (k + 1) == 0, f"skip_z cuts z into {k + 1} equal chunks"

    @property
    def z_chunk(self):
        """How many components of z the first layer gets and, with skip_z, each block."""
        return self.z_dim // (self.g_channels.count("-") + 1) if self.skip_z else self.z_dim

    @property
    def c_dim(self):
        """Length of the condition c in G's batch norms; 0 where it is the class index."""
        return self.shared_dim + (self.z_chunk if self.skip_z or self.deep else 0)


DEEP = dict(ch=128, skip_z=False, deep=True, rgb_filters=128)
ROAD = dict(ch=64, skip_z=False, shared_dim=0)

MODELS = {  # resolution, channels of G and of D, halving blocks of D, attention in G and D, z: tables 4 to 9
    # The channels of biggan32 and biggan64 and G's attention at 256 are those of the author's PyTorch code.
    # shapes32 is ours: narrow where the pixels are many, for drawn shapes on two CPU cores.
    "shapes32": ModelConfig(32, "4-4-2-1", "1-2-4-4", 3, 16, 16, 64, ch=32, n_classes=10, shared_dim=32),
    "biggan32": ModelConfig(32, "4-4-4-4", "4-4-4-4", 2, 0, 0, 128, ch=64, n_classes=10),
    "biggan64": ModelConfig(64, "16-16-8-4-2", "1-2-4-8-16", 4, 32, 32, 100, ch=64),
    "biggan128": ModelConfig(128, "16-16-8-4-2-1", "1-2-4-8-16-16", 5, 64, 64, 120),
    "biggan256": ModelConfig(256, "16-16-8-8-4-2-1", "1-2-4-8-8-16-16", 6, 64, 64, 140),
    "biggan512": ModelConfig(512, "16-16-8-8-4-2-1-1", "1-1-2-4-8-8-16-16", 7, 64, 64, 160),
    "biggan-deep-128": ModelConfig(128, "16-16-8-4-2-1", "1-2-4-8-16-16", 5, 64, 64, 128, **DEEP),
    "biggan-deep-256": ModelConfig(256, "16-16-8-8-4-2-1", "1-2-4-8-8-16-16", 6, 64, 64, 128, **DEEP),
    "biggan-deep-512": ModelConfig(512, "16-16-8-8-4-2-1-1", "1-1-2-4-8-8-16-16", 7, 64, 64, 128, **DEEP),

    # The road to BigGAN: SN-GAN with projection (Miyato & Koyama 2018), then SAGAN (Zhang et al. 2019), which
    # adds attention, spectral norm in G and a wide D, and with which table 1 of the paper starts.
    "sngan128": ModelConfig(128, "16-16-8-4-2-1", "1-2-4-8-16-16", 5, 0, 0, 128, d_wide=False,
                            g_sn_eps=None, **ROAD),
    "sagan128": ModelConfig(128, "16-16-8-4-2-1", "1-2-4-8-16-16", 5, 64, 64, 128, **ROAD),
}


# ---------------------------------------------------------------- losses
# BigGAN's is the hinge (Lim & Ye 2017, Tran et al. 2017), the formula at the top of this file. The others are
# for comparison. Where real images have density p and generated ones q, the best possible D is sign(p - q)
# under the hinge, log(p / q) under non-saturating, p / (p + q) under least squares. (Wasserstein's has no
# such formula.) With it D's hinge loss is twice the integral of min(p, q): at most 2, where p = q and D can
# only guess.

def hinge_loss_d(real_logits, fake_logits):
    """D wants real logits above 1 and fake ones below -1, no further. (N,), (M,) -> scalar."""
    return F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()


def hinge_loss_g(fake_logits):
    """G wants its images to have high logits. (N,) -> scalar."""
    return -fake_logits.mean()


def nonsaturating_loss_d(real_logits, fake_logits):
    """-log p(real) - log(1 - p(fake)), with p = sigmoid(logit) (Goodfellow et al. 2014). -> scalar."""
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def nonsaturating_loss_g(fake_logits):
    """-log p(fake). The original log(1 - p(fake)) is flat where D is sure and G must learn. -> scalar."""
    return F.softplus(-fake_logits).mean()


def least_squares_loss_d(real_logits, fake_logits):
    """D wants real logits to be 1 and fake ones 0 (Mao et al. 2017). -> scalar."""
    return ((real_logits - 1).square().mean() + fake_logits.square().mean()) / 2


def least_squares_loss_g(fake_logits):
    return (fake_logits - 1).square().mean() / 2


def wasserstein_loss_d(real_logits, fake_logits):
    """Mean fake minus mean real logit (Arjovsky et al. 2017). Needs `gradient_penalty`. -> scalar."""
    return fake_logits.mean() - real_logits.mean()


LOSSES = {  # D's loss, G's loss, and the decision threshold: D takes images with higher logits for real
    "hinge": (hinge_loss_d, hinge_loss_g, 0.0),
    "non-saturating": (nonsaturating_loss_d, nonsaturating_loss_g, 0.0),
    "least-squares": (least_squares_loss_d, least_squares_loss_g, 0.5),
    "wgan-gp": (wasserstein_loss_d, hinge_loss_g, None),    # G's loss is the hinge's; only differences matter
}


# ---------------------------------------------------------------- penalties
# What is added to a loss to keep a network well-behaved. BigGAN itself uses one, orthogonal regularisation on
# G: beta || W W^T * (1 - I) ||_F^2, the squares of all entries of W W^T off its diagonal, with beta = 1e-4.
# Section 4.2 tries R1 on D, gamma/2 E |d D / d x|^2, against collapse (after long training, G's images
# suddenly become poor or alike, for good): that works, at a price in quality.

def squared_gradient_norm(D, x, y):
    """|d D(x, y) / dx|^2 at each image: x (N, 3, R, R), y (N,) -> (N,). Can itself be differentiated."""
    x = x.detach().requires_grad_()
    # The gradient of the sum holds each image's own, since each logit depends on one image.
    gradient, = torch.autograd.grad(D(x, y).sum(), x, create_graph=True)
    return gradient.flatten(1).square().sum(1)


def r1_penalty(D, x, y):
    """1/2 E |d D(x, y) / dx|^2 over real images (Mescheder et al. 2018; section 4.2): makes D flat there.

    x (N, 3, R, R), y (N,) -> scalar. The weight gamma is left out; the paper tries 1 and 10."""
    return squared_gradient_norm(D, x, y).mean() / 2


def gradient_penalty(D, real, fake, y, mix):
    """E (|d D(x, y) / dx| - 1)^2 over x on lines from real to generated images (Gulrajani et al. 2017).

    mix (N,) says where on its line each x lies: 0 at the real, 1 at the generated end. y (N,): of both. ->
    scalar."""
    x = torch.lerp(real, fake, mix.reshape(-1, 1, 1, 1))
    norm = (squared_gradient_norm(D, x, y) + 1e-12).sqrt()  # 1e-12: the root of 0 has no derivative
    return (norm - 1).square().mean()


def orthogonal_penalty(W, off_diagonal=True):
    """|| W W^T * (1 - I) ||_F^2 -> scalar: how far W's rows, the filters, are from orthogonal.

    Orthogonal filters do not repeat each other, and G stays smooth: it draws well also with truncated noise
    (below), which covers a small part of what it was trained on (section 3.1). The paper has filters as
    columns and writes W^T W. Leaving out the diagonal leaves the filters' norms free; off_diagonal=False
    gives the older || W W^T - I ||_F^2. The factor beta is left out."""
    W = W.flatten(1)
    squared_norms = W.square().sum(1)                       # the diagonal of W W^T
    if W.shape[0] <= W.shape[1]:
        target = squared_norms if off_diagonal else torch.ones_like(squared_norms)
        return (W @ W.T - torch.diag(target)).square().sum()
    # More filters than inputs: || W W^T ||_F = || W^T W ||_F, and the latter is small. G's first layer at 128
    # pixels has 24,576 filters of 20 inputs: 400 numbers instead of 604 million. || A - I ||^2 = || A ||^2 -
    # 2 tr A + n.
    total = (W.T @ W).square().sum()
    return total - (squared_norms.square().sum() if off_diagonal else 2 * squared_norms.sum() - len(W))


def orthogonal_regularisation(G):
    """The sum of the off-diagonal penalty over all weight matrices of G; embeddings are no filters."""
    return sum(orthogonal_penalty(m.weight) for m in matrix_layers(G).values())


# ---------------------------------------------------------------- augmentation for few images
# With few images D memorises them, and G learns nothing more. Differentiable augmentation (Zhao et al. 2020,
# "DiffAugment") changes real *and* generated images at random before D sees any, in D's turn and in G's, so
# that D cannot memorise. G's gradient passes through. If G drew such changes itself, its images would reach D
# changed twice, and real ones once: that holds G back from it. All images here are (N, 3, R, R) in [-1, 1]; r
# are random numbers in [0, 1), three per image and change.

def colour(x, r):
    """Brightness + [-0.5, 0.5], saturation * [0, 2] around each pixel's grey, contrast * [0.5, 1.5] around
    the image's mean. r (N, 3)."""
    brightness, saturation, contrast = r.T.reshape(3, -1, 1, 1, 1)
    x = x + brightness - 0.5
    x = torch.lerp(x.mean(1, keepdim=True), x, 2 * saturation)
    return torch.lerp(x.mean((1, 2, 3), keepdim=True), x, contrast + 0.5)


def translate(x, r):
    """Shift by up to an eighth of the side up or down, left or right; zeros (grey) come in. r (N, 3)."""
    most, line = (x.shape[-1] + 4) // 8, torch.arange(x.shape[-1], device=x.device)
    down, right = (r[:, :2] * (2 * most + 1)).long().T - most           # (N,) whole pixels each
    # A shift by k is a matrix with ones where row - column = k.
    matrix = lambda k: (line[:, None] - line == k.view(-1, 1, 1, 1)).to(x.dtype)        # (N, 1, R, R)
    return matrix(down) @ x @ matrix(right).mT


def cutout(x, r):
    """Zeros in a square of half the side, whose centre is anywhere in the image. r (N, 3)."""
    R = x.shape[-1]
    line, first = torch.arange(R, device=x.device), (r[:, :2] * (R + 1)).long() - R // 4
    row, column = first.T[..., None]                                    # (N, 1) each: the upper left corner
    hidden = lambda first: (line >= first) & (line < first + R // 2)    # (N, R)
    return x.masked_fill((hidden(row)[:, :, None] & hidden(column)[:, None])[:, None], 0)


AUGMENTATIONS = {"colour": colour, "translation": translate, "cutout": cutout}


def augment(x, policy, r):
    """x after the changes that `policy` names, such as "translation,cutout"; r (N, 3, 3)."""
    with torch.autocast(x.device.type, enabled=False):      # penalties need x, its gradient in float32
        for k, (name, change) in enumerate(AUGMENTATIONS.items()):
            if name in policy:
                x = change(x, r[:, k])
    return x


# ---------------------------------------------------------------- singular values (section 4.1)
# Before a run collapses, the largest singular value sigma_0 of some weights of G, the first layer's above
# all, grows faster and faster. Spectral norm hides that from the output. Watch it, or hold it down.

@torch.no_grad()
def singular_values(W, k=3):
    """The k largest singular values of W (out, ...), descending; NaN where their squares are not finite."""
    W = W.flatten(1)
    gram = W @ W.T if W.shape[0] <= W.shape[1] else W.T @ W  # the smaller; its eigenvalues: squares
    if not gram.isfinite().all():
        return gram.new_full((min(k, len(gram)),), math.nan)
    return torch.linalg.eigvalsh(gram).flip(0)[:k].clamp(min=0).sqrt()


def sigma_excess(W, fixed=None, ratio=None):
    """sigma_0 of W (out, ...) minus a goal: `fixed`, or `ratio` times sigma_1, which counts as a constant.

    Returns the excess, through which gradients reach W, and the singular vectors u (out,) and v (everything
    else,)."""
    W = W.flatten(1)
    with torch.no_grad():           # svd gives u, but raises for NaN, which sigma_0 from one more step shows
        U, S, _ = torch.linalg.svd(W.nan_to_num(0, 0, 0), full_matrices=False)
        goal = fixed if fixed is not None else ratio * S[1]
    sigma_0, u, v = power_iteration(W, U[:, 0])
    return sigma_0 - goal, u, v


def sigma_pull(G, fixed=None, ratio=None):
    """Sum over G's layers of the squared excess: pulls sigma_0 to its goal from both sides. -> scalar."""
    return sum(sigma_excess(m.weight, fixed, ratio)[0].square() for m in matrix_layers(G).values())


@torch.no_grad()
def clamp_sigma(G, fixed=None, ratio=None):
    """W <- W - max(0, excess) u v^T in every layer of G: lowers sigma_0 to its goal."""
    for m in matrix_layers(G).values():
        excess, u, v = sigma_excess(m.weight, fixed, ratio)
        m.weight -= (excess.clamp(min=0) * torch.outer(u, v)).view_as(m.weight)


# ---------------------------------------------------------------- truncation, EMA, standing statistics
# Three things that turn a trained G into good samples: z drawn within a threshold (less variety, better
# images); an exponential moving average of G's weights, EMA <- d EMA + (1 - d) G; and batch norm's moments,
# re-estimated from many batches of such samples.

def truncated_normal(shape, threshold=math.inf, generator=None):
    """Standard normal noise without components beyond +-threshold (section 3.1). -> float32 of this shape.

    The paper resamples whatever lies outside. Pushing uniform numbers through the inverse of the truncated
    normal's cumulative function, z = sqrt(2) erfinv(u) with |u| <= erf(threshold / sqrt(2)), gives the same
    distribution without a loop, and one seed then gives the same noise at any threshold, only smaller."""
    assert threshold > 0, f"the truncation threshold must be above 0, not {threshold}"
    inside = math.erf(threshold / math.sqrt(2))             # the probability of lying within the threshold
    uniform = (torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1) * inside
    limit = min(threshold, 9)                               # erfinv(-1) is infinite
    return (math.sqrt(2) * torch.erfinv(uniform)).clamp(-limit, limit).float()


def scaled_normal(shape, scale, generator=None):
    """"Truncation" of the published BigGAN-deep weights: noise truncated at 2, times `scale` from 0 to 1."""
    return scale * truncated_normal(shape, 2.0, generator)


class EMA:
    """A copy of G whose weights, and buffers, are exponential moving averages of G's (section 3, appendix C).

    G never settles, it circles; the average is nearer to the centre than any point of the circle. Until step
    `start` the copy equals G, so that the random initial weights do not linger in it."""

    def __init__(self, model, decay=0.9999, start=0):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay, self.start = decay, start

    @torch.no_grad()
    def update(self, model, step):
        """Take in the weights and buffers of `model` after optimiser step number `step`."""
        averages = [*self.model.parameters(), *self.model.buffers()]
        newest = [*model.parameters(), *model.buffers()]
        # All in one call (torch has no public name for it). An averaged u is no unit vector; power iteration
        # makes it one.
        torch._foreach_lerp_(averages, newest, 1 - self.decay if step > self.start else 1.0)


@torch.no_grad()
def standing_statistics(G, batches=16, batch_size=64, noise=truncated_normal):
    """Replace the running averages in G's batch norms by means over batches of fresh samples (appendix C).

    Running averages lag behind the weights, and they belong to untruncated noise: truncated noise has other
    moments, and samples drawn with the wrong ones look washed out. So the noise must be that of the samples:
    noise(shape, generator=...). Classes are drawn uniformly. Several processes share the work and must all
    call it. Leaves G in eval mode."""
    device = next(G.parameters()).device
    norms = [m for m in G.eval().modules() if isinstance(m, Norm)]
    generator = torch.Generator().manual_seed(0)
    # Equal parts of the batch, or where it cannot be shared all of it.
    own = slice(None) if batch_size % processes() else slice(rank(), None, processes())
    for k in range(batches):
        for norm in norms:
            norm.training = True                            # not the layers inside
            norm.momentum = 1 / (k + 1)                     # makes it the mean of k + 1 batches
        z = noise((batch_size, G.config.z_dim), generator=generator)
        y = torch.randint(G.config.n_classes, (batch_size,), generator=generator)
        G(z[own].to(device), y[own].to(device))
    for norm in norms:
        norm.momentum = Norm.momentum
    return G.eval()
