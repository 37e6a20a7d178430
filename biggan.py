"""BigGAN, every technique written out by hand.

A generator G turns noise z and a class y into an image. A discriminator D looks at an image x and
a class y and returns one number, the logit D(x, y): large if it takes x for a real image of that
class. (It stays a score, and is never turned into a probability.) They take turns:

    D minimises  E max(0, 1 - D(x, y)) + E max(0, 1 + D(G(z, y), y))
    G minimises  - E D(G(z, y), y)

E is the mean over a batch. Real images x come from the data, with their classes. For generated
ones z is drawn from a normal distribution and y uniformly from all classes. In G's turn the
gradient flows back through D into G, but D's weights do not move. So G never sees a real image.

D is content with a real image once its logit is above 1, and with a generated one once its logit
is below -1. So D learns to tell the two apart, and G to make images that D takes for real.
The game is in equilibrium when neither network can improve alone. Then generated images are
distributed like real ones, and D can only guess (the section "hinge loss" says why).

The paper's recipe at 128x128 pixels (`Trainer.train_step` in train.py) uses Adam, with a learning
rate of 2e-4 for D and 5e-5 for G:

    150,000 times:
        twice:  take 2048 real images, generate 2048;   one step on D's loss
        once:   generate 2048 images;                   one step on G's loss + 1e-4 * penalty
                average <- 0.9999 * average + 0.0001 * G's weights

These numbers were found by trying. The large batch matters most: 2048 images instead of 256 raised
the inception score by 46% (section 3). The authors suppose that each batch then shows more of the
data's variety. Adam's momentum beta1 is 0: the opponent changes at every step, and old gradients
belong to an opponent that is no longer there. The penalty is the orthogonal one below. The average
is an exponential moving average (EMA) of G's weights, begun at step 20,000 as in the author's code.
Samples are drawn with it; it is never trained.

Paper: Brock, Donahue, Simonyan, "Large Scale GAN Training for High Fidelity Natural Image
Synthesis", ICLR 2019, arXiv:1809.11096. "Section 3.1", "table 4" and so on refer to it.

How to read this file. Part 1, some 770 lines, is the recipe: spectral norm, batch norm and
attention, the networks built from them, the loss and the penalty, and what makes good samples.
Part 1 of all scripts (train.py 500, sample.py 270, metrics.py 280 lines) is an evening's reading.
Part 2 is what BigGAN at 128 pixels does not need: deeper blocks, other losses, penalties on D,
augmentation. Part 3 computes the same numbers faster, or on many GPUs.

Shapes: N images, C channels (the width of a layer), H x W pixels, R the image's resolution.
Training may run under autocast, which computes convolutions and matrix products in 16 bits;
`precise` marks what must stay in float32. channels_last is a memory layout in which the channels
of a pixel lie together, which convolutions prefer."""

import copy
import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

# ==================================================================================================
# Part 1: the recipe
# ==================================================================================================

# ------------------------------------------------------------------------------------ spectral norm
# Left alone, D would turn into a cliff: 1 at every real image, -1 right beside it. G learns from
# the slope of D's logit at its images, and from a cliff there is nothing to learn: the slope is
# enormous at the edge and 0 everywhere else. Spectral norm keeps D from becoming steep. The largest
# singular value sigma of a weight matrix W is the most by which W can stretch a vector:
#     sigma = max |W v|  over all v of length 1
# A layer that computes with W / sigma makes no vector longer, so a small change of the image can
# make only a small change of the logit. (Only roughly: in a 3x3 convolution each pixel is part of
# nine patches, so an image may become sqrt(9) = 3 times as long, and a residual block adds two
# paths. But that bound does not grow, however long D trains.)
#
# G has spectral norm as well. The evidence for that is practical: SAGAN, the model that BigGAN grew
# out of (Zhang et al. 2019), trained more steadily with it. However large G's weights become, what
# G computes with, W / sigma, keeps its size, and so do its outputs and gradients.
#
# Power iteration finds sigma. Starting from any vector u, repeat
#     v = W^T u / |W^T u|
#     u = W v / |W v|
# and sigma = u^T W v. Each round multiplies the component of u along the i-th singular direction
# by sigma_i^2, so the direction of the largest one wins. W changes little from one training step
# to the next. So u is kept, and one round in every forward pass is enough. (At the start all
# singular values are 1, see `initialise`, and any u will do.)

def power_iteration(W, u, steps=1, eps=1e-12):
    """The largest singular value of W (rows, columns), estimated from u (rows,).

    Returns sigma, a scalar through which gradients reach W, and two vectors of length 1: u (rows,)
    and v (columns,). (W / sigma stays the same when W gets longer. Only with the gradient through
    sigma does training know that.) No gradient passes through u and v. So d sigma / d W is the
    matrix u v^T, the exact derivative once they have converged. Miyato et al. 2018 (SN-GAN),
    algorithm 1."""
    with torch.no_grad():
        for _ in range(steps):
            v = F.normalize(W.T @ u, dim=0, eps=eps)
            u = F.normalize(W @ v, dim=0, eps=eps)
    sigma = u @ (W @ v)
    return sigma, u, v


def add_spectral_norm(layer, eps):
    """Give a layer its vector u. eps keeps divisions from 0, and None switches spectral norm off.

    (For the layers of G and D, `initialise` sets the eps that ModelConfig has.)"""
    layer.eps = eps
    u = torch.randn(layer.weight.shape[0])
    layer.register_buffer("u", F.normalize(u, dim=0))  # a buffer: saved, but not trained


def normalized_weight(layer):
    """The layer's weight divided by its largest singular value, in the weight's own shape."""
    if layer.eps is None:                           # spectral norm is off
        return layer.weight
    W = layer.weight.flatten(1)                     # (out, everything else): one row per filter
    # Not in 16 bits under autocast: sigma is a sum over thousands of products.
    with torch.autocast(W.device.type, enabled=False):
        sigma, u, _ = power_iteration(W, layer.u, eps=layer.eps)
    if layer.training:
        layer.u.copy_(u)                            # evaluation leaves the layer as it is
    return layer.weight / sigma.clamp(min=layer.eps)


class SNConv2d(nn.Conv2d):
    """A convolution with spectral norm, of stride 1, which keeps H and W."""

    def __init__(self, in_channels, out_channels, kernel_size, bias=True, eps=1e-4):
        super().__init__(in_channels, out_channels, kernel_size, padding="same", bias=bias)
        add_spectral_norm(self, eps)

    def forward(self, x):                           # (N, in, H, W) -> (N, out, H, W)
        return F.conv2d(x, normalized_weight(self), self.bias, padding="same")


class SNLinear(nn.Linear):
    """A linear layer with spectral norm."""

    def __init__(self, in_features, out_features, bias=True, eps=1e-4):
        super().__init__(in_features, out_features, bias=bias)
        add_spectral_norm(self, eps)

    def forward(self, x):                           # (N, in) -> (N, out)
        return F.linear(x, normalized_weight(self), self.bias)


class SNEmbedding(nn.Embedding):
    """A table of vectors with spectral norm: one row per class."""

    def __init__(self, num_embeddings, embedding_dim, eps=1e-4):
        super().__init__(num_embeddings, embedding_dim)
        add_spectral_norm(self, eps)

    def forward(self, y):                           # (N,) labels -> (N, dim)
        return F.embedding(y, normalized_weight(self))


def matrix_layers(network):
    """Name -> layer, for all layers of the three classes above. (G's embedding has none.)"""
    kinds = (SNConv2d, SNLinear, SNEmbedding)
    return {name: m for name, m in network.named_modules() if isinstance(m, kinds)}


# --------------------------------------------------------------------------- conditional batch norm
# Batch norm brings every channel to mean 0 and variance 1, then gives it a gain and a bias:
#     gain * (x - mean) / sqrt(var + eps) + bias
# where mean and var are the channel's own, over all pixels of all images in the batch. In G's
# blocks, gain and bias depend on what the image is to show. With the condition c, the embedding of
# its class joined with a part of its noise z:
#     gain = 1 + W_g c        bias = W_b c
# If the class entered the first layer only, it would have to be carried through all others, which
# have much else to carry. So every block is told again what to draw. A part of the noise comes with
# it, so that chance can decide about coarse things in one block and about details in another.
#
# In training, mean and var are those of the batch, over all GPUs (`Moments`, in part 3). In
# evaluation they are fixed numbers, so that an image does not depend on which others are drawn with
# it. D has no batch norm: whether an image looks real should depend on that image alone.

class Norm(nn.Module):
    """What all batch norms share: moments of the batch, or in evaluation their running averages."""

    momentum = 0.1                                  # weight of the newest batch in the average

    def __init__(self, channels, eps):
        super().__init__()
        self.eps = eps
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def normalise(self, x, gain, bias):
        """x (N, C, H, W), gain and bias (C,) or (N, C) -> (N, C, H, W)."""
        if self.training:
            mean, var = Moments.apply(x)            # (C,) each, over the images of all GPUs
            self.update_running_averages(mean, var, x)
        else:
            mean = self.running_mean
            var = self.running_var
        # The formula above, written as offset + factor * x, so that one pass over x is enough.
        # Under autocast factor is rounded to 16 bits. offset is computed from the rounded one, so
        # at x = mean the result is still bias, up to rounding.
        factor = (gain * torch.rsqrt(var + self.eps)).to(x.dtype)       # (C,) or (N, C)
        offset = (bias - mean * factor).to(x.dtype)                     # (C,) or (N, C)
        return torch.addcmul(per_channel(offset), x, per_channel(factor))

    @torch.no_grad()
    def update_running_averages(self, mean, var, x):
        """Take in a batch's mean and var, var with n - 1 in place of n, like nn.BatchNorm2d."""
        n = processes() * x.numel() // x.shape[1]   # numbers per channel, over all GPUs
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var * n / (n - 1), self.momentum)


class ConditionalBatchNorm(Norm):
    """One gain and bias per channel and image, computed from the condition c (section 3)."""

    def __init__(self, channels, c_dim, eps=1e-4):
        super().__init__(channels, eps)
        self.gain = SNLinear(c_dim, channels, bias=False)           # W_g
        self.bias = SNLinear(c_dim, channels, bias=False)           # W_b

    def forward(self, x, c):                        # (N, C, H, W), (N, c_dim) -> (N, C, H, W)
        gain = 1 + precise(self.gain(c))            # (N, C)
        bias = precise(self.bias(c))                # (N, C)
        return self.normalise(x, gain, bias)


class BatchNorm(Norm):
    """The usual one, before G's last layer: gain and bias are learned, one pair per channel."""

    def __init__(self, channels, eps=1e-4):
        super().__init__(channels, eps)
        self.gain = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x):                           # (N, C, H, W) -> (N, C, H, W)
        return self.normalise(x, self.gain, self.bias)


def precise(x):
    """x in float32, for sums and exponentials. (float64, in tests, stays as it is.)"""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def per_channel(a):                                 # (C,) -> (1, C, 1, 1), (N, C) -> (N, C, 1, 1)
    return a.reshape(-1, a.shape[-1], 1, 1)


# ----------------------------------------------------------------------------------- self-attention
# A convolution sees 3x3 pixels. Attention lets every position p look at all positions q, and take
# more from those that fit:
#     out_p = x_p + gamma * o( sum over q of a_pq g(x_q) )
#     a_pq = softmax over q of theta(x_p) . phi(x_q)
# theta, phi, g and o are 1x1 convolutions, known elsewhere as query, key, value and output
# projection. gamma is a learned number that starts at 0. So the layer starts as the identity, and
# the network learns first what convolutions can do.

class SelfAttention(nn.Module):
    """(N, C, H, W) -> (N, C, H, W). Zhang et al. 2019 (SAGAN), as in its authors' code.

    Keys and values are pooled, so q runs over cells of 2x2 positions: a quarter of the work.
    theta . phi is not divided by the root of C/8, unlike in a transformer."""

    fused = False                                   # True: `fused_attention`, in part 3

    def __init__(self, channels):
        super().__init__()
        self.theta = SNConv2d(channels, channels // 8, 1, bias=False)
        self.phi = SNConv2d(channels, channels // 8, 1, bias=False)
        self.g = SNConv2d(channels, channels // 2, 1, bias=False)
        self.o = SNConv2d(channels // 2, channels, 1, bias=False)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x):                           # (N, C, H, W)
        N, C, H, W = x.shape
        query = list_positions(self.theta(x))                   # (N, HW, C/8)
        key = list_positions(F.max_pool2d(self.phi(x), 2))      # (N, HW/4, C/8)
        value = list_positions(F.max_pool2d(self.g(x), 2))      # (N, HW/4, C/2)
        attend = fused_attention if self.fused else attention
        h = attend(query, key, value)                           # (N, HW, C/2)
        h = h.view(N, H, W, C // 2).permute(0, 3, 1, 2)         # (N, C/2, H, W)
        return x + self.gamma * self.o(h)                       # (N, C, H, W)


def list_positions(a):                              # (N, C, H, W) -> (N, HW, C)
    return a.permute(0, 2, 3, 1).flatten(1, 2)


def attention(query, key, value):
    """The mean of the values, weighted by the softmax of query . key.

    (N, L, E), (N, M, E), (N, M, V) -> (N, L, V)"""
    scores = query @ key.mT                         # (N, L, M)
    # Autocast would return the softmax, the largest tensor of all, in float32. With autocast off it
    # has 16 bits. (The sums inside are taken in float32 anyway.)
    with torch.autocast(scores.device.type, enabled=False):
        weights = scores.softmax(-1)                # (N, L, M): each row sums to 1
    return weights @ value


# -------------------------------------------------------------------------------------------- sizes
# One ModelConfig describes G and D. Channels are written as multiples of ch: at 128 pixels with
# ch = 96, g_channels = (16, 16, 8, 4, 2, 1) means 1536, 1536, 768, 384, 192, 96.

class UserError(Exception):
    """A user's mistake, in one sentence that names the thing and says what to do."""


def require(condition, sentence):
    """Raise a UserError unless the condition holds. (`python -O` would skip an assert.)"""
    if not condition:
        raise UserError(sentence)


@dataclass(frozen=True)
class ModelConfig:
    resolution: int                     # R: G starts from 4x4 pixels, and every block doubles that
    g_channels: tuple                   # of G: input of the first block, then output of each
    d_channels: tuple                   # of D: output of each block
    z_dim: int                          # length of the noise z
    ch: int = 96                        # what channels are multiples of
    n_classes: int = 1000
    d_plain: int = 1                    # how many of D's last blocks keep H and W; the others halve
    g_attention: int = 64               # at which H = W does G have attention? 0: nowhere
    d_attention: int = 64               # the same for D
    shared_dim: int = 128               # length of the class embedding that all of G's blocks share
    skip_z: bool = True                 # each block gets its own chunk of z (section 3)
    sn_eps: float = 1e-4                # in spectral norm, of D alone; None switches it off
    g_sn_eps: float = 1e-4              # in spectral norm of G; None switches it off
    bn_eps: float = 1e-4                # in batch norm. All three are appendix C's, for 16 bits
    deep: bool = False                  # BigGAN-deep (part 2): two blocks for each entry above
    rgb_filters: int = 3                # filters of G's last layer, of which three are used
    d_wide: bool = True                 # D's blocks widen in the first convolution, not the second

    def __post_init__(self):
        n_blocks = len(self.g_channels) - 1
        made = 4 * 2**n_blocks
        require(self.resolution == made, f"g_channels makes {made} pixels, not {self.resolution}")
        if self.deep or self.skip_z:
            require(self.shared_dim > 0, "deep and skip_z need a shared_dim above 0")
        if self.skip_z:
            chunks = n_blocks + 1
            require(self.z_dim % chunks == 0, f"skip_z cuts z into {chunks} equal chunks")

    @property
    def d_blocks_down(self):
        """How many of D's blocks halve H and W."""
        return len(self.d_channels) - self.d_plain

    @property
    def z_chunk(self):
        """Length of a chunk of z: one chunk for G's first layer, one for each block."""
        return self.z_dim // len(self.g_channels)

    # What G's first layer sees, and what its blocks see (c):
    #     BigGAN         a chunk of z             embedding, chunk of z
    #     BigGAN-deep    embedding, all of z      embedding, all of z
    #     older models   all of z                 embedding, or if there is none, the class

    @property
    def c_dim(self):
        """Length of the condition c in G's blocks."""
        if self.skip_z:
            return self.shared_dim + self.z_chunk
        if self.deep:
            return self.shared_dim + self.z_dim
        return self.shared_dim

    @property
    def first_dim(self):
        """Length of what G's first layer sees."""
        if self.skip_z:
            return self.z_chunk
        return self.c_dim if self.deep else self.z_dim


AT_128 = dict(resolution=128, g_channels=(16, 16, 8, 4, 2, 1), d_channels=(1, 2, 4, 8, 16, 16))
AT_256 = dict(
    resolution=256, g_channels=(16, 16, 8, 8, 4, 2, 1), d_channels=(1, 2, 4, 8, 8, 16, 16)
)
AT_512 = dict(
    resolution=512, g_channels=(16, 16, 8, 8, 4, 2, 1, 1), d_channels=(1, 1, 2, 4, 8, 8, 16, 16)
)
DEEP = dict(ch=128, z_dim=128, skip_z=False, deep=True, rgb_filters=128)
OLDER = dict(ch=64, z_dim=128, skip_z=False, shared_dim=0)

MODELS = {
    # The paper's, tables 4 to 6. (biggan256: G's attention as in the author's PyTorch code.)
    "biggan128": ModelConfig(**AT_128, z_dim=120),
    "biggan256": ModelConfig(**AT_256, z_dim=140),
    "biggan512": ModelConfig(**AT_512, z_dim=160),
    # BigGAN-deep, tables 7 to 9.
    "biggan-deep-128": ModelConfig(**AT_128, **DEEP),
    "biggan-deep-256": ModelConfig(**AT_256, **DEEP),
    "biggan-deep-512": ModelConfig(**AT_512, **DEEP),
    # Small images, as in the author's PyTorch code.
    "biggan64": ModelConfig(
        resolution=64, g_channels=(16, 16, 8, 4, 2), d_channels=(1, 2, 4, 8, 16),
        ch=64, z_dim=100, g_attention=32, d_attention=32,
    ),
    "biggan32": ModelConfig(
        resolution=32, g_channels=(4, 4, 4, 4), d_channels=(4, 4, 4, 4), d_plain=2,
        ch=64, z_dim=128, g_attention=0, d_attention=0, n_classes=10,
    ),
    # Ours, for drawn shapes on two CPU cores: narrow where the pixels are many.
    "shapes32": ModelConfig(
        resolution=32, g_channels=(4, 4, 2, 1), d_channels=(1, 2, 4, 4),
        ch=32, z_dim=64, g_attention=16, d_attention=16, n_classes=10, shared_dim=32,
    ),
    # Where BigGAN comes from: first SN-GAN with projection (Miyato & Koyama 2018), then SAGAN, with
    # attention, spectral norm in G and a wider D. It is the first row of the paper's table 1.
    "sngan128": ModelConfig(
        **AT_128, **OLDER, g_attention=0, d_attention=0, g_sn_eps=None, d_wide=False
    ),
    "sagan128": ModelConfig(**AT_128, **OLDER),
}


# ------------------------------------------------------------------------------------- the networks
# BigGAN at 128 pixels, ch = 96. The noise z (N, 120) is cut into six chunks z_0 ... z_5 of 20; e is
# G's embedding of the class y, (N, 128), and c_i = [e, z_i] the condition of block i. D has its own
# embedding of the class, e_y, (N, 1536).
#
#     G: z, y -> image                              D: x, y -> logit
#
#     linear(z_0), as an image  (N, 1536, 4, 4)     x                      (N,    3, 128, 128)
#     GBlock, c_1               (N, 1536, 8, 8)     DBlock                 (N,   96, 64, 64)
#     GBlock, c_2               (N, 768, 16, 16)    attention              (N,   96, 64, 64)
#     GBlock, c_3               (N, 384, 32, 32)    DBlock                 (N,  192, 32, 32)
#     GBlock, c_4               (N, 192, 64, 64)    DBlock                 (N,  384, 16, 16)
#     attention                 (N, 192, 64, 64)    DBlock                 (N,  768, 8, 8)
#     GBlock, c_5               (N, 96, 128, 128)   DBlock                 (N, 1536, 4, 4)
#     batch norm, ReLU          (N, 96, 128, 128)   DBlock, not halving    (N, 1536, 4, 4)
#     conv 3x3, tanh            (N, 3, 128, 128)    ReLU, sum over pixels: s    (N, 1536)
#                                                   w . s + b + e_y . s         (N,)
#
# Both kinds of block are residual: what the convolutions compute is added to a shortcut.
#
#     GBlock:   x ------------------.               DBlock:   x ----------------.
#               |                   |                         |                 |
#        cond. batch norm, ReLU     |                       ReLU                |
#        upsample, conv 3x3      upsample                   conv 3x3         conv 1x1
#        cond. batch norm, ReLU  conv 1x1                   ReLU                |
#        conv 3x3                   |                       conv 3x3            |
#               |                   |                       average 2x2      average 2x2
#               + <-----------------'                         + <---------------'
#
# A 1x1 convolution looks at one pixel at a time. So it may come before or after repeating or
# averaging pixels, and the code below puts it where the image is small.

class GBlock(nn.Module):
    """Doubles H and W (table 4, figure 15b)."""

    def __init__(self, in_channels, out_channels, config):
        super().__init__()
        self.bn1 = conditional_norm(in_channels, config)
        self.conv1 = SNConv2d(in_channels, out_channels, 3)
        self.bn2 = conditional_norm(out_channels, config)
        self.conv2 = SNConv2d(out_channels, out_channels, 3)
        self.conv_sc = SNConv2d(in_channels, out_channels, 1)      # of the shortcut

    def forward(self, x, c):                        # (N, in, H, W), (N, c_dim)
        h = self.bn1(x, c).relu_()                  # (N, in, H, W)
        h = upsample_conv3x3(h, self.conv1)         # = self.conv1(upsample(h)), in fewer products
        h = self.bn2(h, c).relu_()                  # (N, out, 2H, 2W)
        h = self.conv2(h)                           # (N, out, 2H, 2W)
        return h + upsample(self.conv_sc(x))        # (N, out, 2H, 2W)


def conditional_norm(channels, config):
    """BigGAN's conditional batch norm, or that of older models (part 2)."""
    if config.shared_dim == 0:
        return ClassBatchNorm(channels, config.n_classes, config.bn_eps)
    return ConditionalBatchNorm(channels, config.c_dim, config.bn_eps)


def upsample(x):                                    # (N, C, H, W) -> (N, C, 2H, 2W)
    # On a GPU, autocast would return float32, and so would all that comes after it.
    with torch.autocast(x.device.type, enabled=False):
        return F.interpolate(x, scale_factor=2, mode="nearest")     # each pixel becomes four


class Generator(nn.Module):
    """z (N, z_dim), y (N,) class indices -> images (N, 3, R, R) in [-1, 1].

    y may also be (N, shared_dim) float: embeddings instead of classes. A point between the
    embeddings of two classes gives an image that mixes them."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        channels = [multiple * config.ch for multiple in config.g_channels]
        if config.shared_dim > 0:
            # No spectral norm here: it cripples G, says the author's code, but not why.
            self.shared = nn.Embedding(config.n_classes, config.shared_dim)
        self.linear = SNLinear(config.first_dim, 4 * 4 * channels[0])
        self.blocks = nn.ModuleList()
        self.attention_after = None                 # the index of the block before attention
        size = 4
        for in_channels, out_channels in pairwise(channels):
            size = 2 * size
            if config.deep:                         # two blocks, of which the second doubles
                self.blocks.append(DeepGBlock(in_channels, in_channels, False, config))
                self.blocks.append(DeepGBlock(in_channels, out_channels, True, config))
            else:
                self.blocks.append(GBlock(in_channels, out_channels, config))
            if size == config.g_attention:
                self.attention = SelfAttention(out_channels)
                self.attention_after = len(self.blocks) - 1
        if config.g_attention and self.attention_after is None:
            raise UserError(f"g_attention: no block of G makes {config.g_attention} pixels")
        self.output_norm = BatchNorm(channels[-1], config.bn_eps)
        self.to_rgb = SNConv2d(channels[-1], config.rgb_filters, 3)
        initialise(self, config.g_sn_eps)

    def conditions(self, z, y):
        """What the first layer sees (N, first_dim), and a list of every block's condition."""
        config = self.config
        n = len(self.blocks)
        require(z.shape[1] == config.z_dim, f"z must have {config.z_dim} components per image")
        if config.shared_dim == 0:                  # older models have a class table in each block
            require(not y.is_floating_point(), "this model has no embedding: y must be classes")
            return z, [y] * n
        e = y if y.is_floating_point() else self.shared(y)      # (N, shared_dim)
        if config.skip_z:                           # BigGAN: a chunk of z for everyone
            first, *chunks = z.split(config.z_chunk, dim=1)     # (N, z_chunk) each
            return first, [torch.cat([e, chunk], dim=1) for chunk in chunks]
        if config.deep:                             # BigGAN-deep: all of z for everyone
            c = torch.cat([z, e], dim=1)            # (N, z_dim + shared_dim)
            return c, [c] * n
        return z, [e] * n

    def forward(self, z, y):                        # (N, z_dim), (N,) or (N, shared_dim)
        first, conditions = self.conditions(z, y)
        h = self.linear(first).view(len(z), -1, 4, 4)           # (N, 16 ch, 4, 4)
        h = h.contiguous(memory_format=torch.channels_last)
        for i, block in enumerate(self.blocks):
            h = block(h, conditions[i])             # (N, fewer channels, 2H, 2W)
            if i == self.attention_after:
                h = self.attention(h)
        h = self.output_norm(h).relu_()             # (N, ch, R, R)
        # The published deep weights have 128 filters in the last layer. All of them count for
        # sigma, but only three are used, the image's colours.
        W = normalized_weight(self.to_rgb)[:3]
        h = F.conv2d(h, W, self.to_rgb.bias[:3], padding="same")    # (N, 3, R, R)
        return torch.tanh(precise(h))               # (N, 3, R, R) in [-1, 1]


class DBlock(nn.Module):
    """Halves H and W, if `down` (table 4, figure 15c).

    The first block has no first ReLU: its input is the image, whose negative half ReLU would
    throw away."""

    def __init__(self, in_channels, out_channels, first, down, config):
        super().__init__()
        self.first = first
        self.down = down
        middle = out_channels if first or config.d_wide else in_channels
        self.conv1 = SNConv2d(in_channels, middle, 3)
        self.conv2 = SNConv2d(middle, out_channels, 3)
        self.conv_sc = nn.Identity()
        if down or in_channels != out_channels:
            self.conv_sc = SNConv2d(in_channels, out_channels, 1)

    def forward(self, x):                           # (N, in, H, W)
        h = x if self.first else F.relu(x)          # not in place: the shortcut needs x as it is
        h = self.conv1(h).relu_()                   # (N, middle, H, W)
        if self.down:
            h = conv3x3_downsample(h, self.conv2)   # = F.avg_pool2d(self.conv2(h), 2), faster
            x = F.avg_pool2d(x, 2)                  # (N, in, H/2, W/2)
        else:
            h = self.conv2(h)
        return h + self.conv_sc(x)                  # (N, out, H/2, W/2)


class Discriminator(nn.Module):
    """x (N, 3, R, R) in [-1, 1], y (N,) class indices -> logits D(x, y) (N,)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        channels = [multiple * config.ch for multiple in config.d_channels]
        if config.deep:
            self.from_rgb = SNConv2d(3, channels[0], 3)
        else:
            channels = [3] + channels
        self.blocks = nn.ModuleList()
        self.attention_after = None
        size = config.resolution
        for i, (in_channels, out_channels) in enumerate(pairwise(channels)):
            down = i < config.d_blocks_down
            if down:
                size = size // 2
            if config.deep:                         # two blocks, of which the first halves
                self.blocks.append(DeepDBlock(in_channels, out_channels, down, config))
                self.blocks.append(DeepDBlock(out_channels, out_channels, False, config))
            else:
                self.blocks.append(DBlock(in_channels, out_channels, i == 0, down, config))
            if down and size == config.d_attention:
                self.attention = SelfAttention(out_channels)
                self.attention_after = len(self.blocks) - 1
        if config.d_attention and self.attention_after is None:
            raise UserError(f"d_attention: no block of D halves to {config.d_attention} pixels")
        self.linear = SNLinear(channels[-1], 1)
        self.embed = SNEmbedding(config.n_classes, channels[-1])
        initialise(self, config.sn_eps)

    def forward(self, x, y):                        # (N, 3, R, R), (N,)
        h = x.contiguous(memory_format=torch.channels_last)
        if self.config.deep:
            h = self.from_rgb(h)                    # (N, ch, R, R)
        for i, block in enumerate(self.blocks):
            h = block(h)                            # (N, more channels, H/2, W/2)
            if i == self.attention_after:
                h = self.attention(h)
        with torch.autocast(x.device.type, enabled=False):      # the logits in float32
            s = F.relu(precise(h)).sum((2, 3))      # (N, C): how much of each feature there is
            # w . s + b says how real the image looks. The product with e_y, a vector learned for
            # each class, says how well it fits the class: the features s of images of class y come
            # to point in the direction e_y. Projection, Miyato & Koyama 2018.
            looks_real = self.linear(s).squeeze(1)  # (N,)
            fits_class = (self.embed(y) * s).sum(1)     # (N,)
            return looks_real + fits_class


def initialise(network, eps):
    """Orthogonal weights (section 3), so that all singular values start at 1, and zero biases.

    All layers get this eps for spectral norm in place of the one they were made with."""
    for layer in matrix_layers(network).values():
        layer.eps = eps
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.Embedding)):
            nn.init.orthogonal_(module.weight)
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            nn.init.zeros_(module.bias)


# --------------------------------------------------------------------------------------- hinge loss
# D wants real logits above 1 and generated ones below -1, and no further. Why should this game end
# with generated images that are distributed like real ones? Say that some image has density p
# among real images and q among generated ones. D chooses its logit d there, and pays
#     p max(0, 1 - d) + q max(0, 1 + d)
# which is least at d = 1 where p > q, and at d = -1 where p < q: the best D is sign(p - q). G wants
# its images to have high logits, so it moves them away from where there are too many (q > p, with
# logit -1) to where there are too few (q < p, with logit 1). If p = q everywhere, all d from -1 to
# 1 cost the same. D gains nothing from telling images apart, so it may as well give all of them the
# same logit, and then G has nowhere to move: neither can improve alone. (This shows where the game
# can rest. It is no proof that it gets there.)
#
# The best D pays 2q where p > q, and 2p where p < q: 2 min(p, q). p and q each sum to 1 over all
# images, so this sums to 2 if they are equal, and to less otherwise. So a loss of D near 2 means
# that it cannot tell the two apart, and a loss near 0 that it always can.

def hinge_loss_d(real_logits, fake_logits):
    """(N,), (M,) -> scalar. Lim & Ye 2017, Tran et al. 2017."""
    return F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()


def hinge_loss_g(fake_logits):
    """(N,) -> scalar. It has no hinge: G can gain from every image, also from logits above 1."""
    return -fake_logits.mean()


# -------------------------------------------------------------------------- orthogonal penalty on G
# Each row of a weight matrix W is a filter. (W W^T)_ij is the scalar product of filters i and j: 0
# if they are orthogonal, large if they compute nearly the same. The penalty is the sum of squares
# of all products of two different filters:
#     || W W^T * (1 - I) ||^2
# where 1 - I removes the diagonal, the filters' own squared lengths. (An older penalty wants these
# to be 1. The paper calls that too limiting.) If there are more filters than inputs, not all can be
# orthogonal. Then, at given lengths, the penalty is least if they are spread evenly.
#
# What is it for? The paper found that samples improve when z is drawn closer to 0 than in training
# (truncation, below). Each number in z is often near 0, but hardly ever are all 120 of them at
# once: the length of z is about sqrt(120). So G has not been trained near 0, and many a G draws
# poor images there. It helps if each layer stretches all directions about equally, which orthogonal
# filters of similar length do: then G changes gradually on the way to z = 0, and what it has
# learned carries over. In the paper (section 3.1), with a weight of 1e-4, 60% of the models could
# draw well from truncated noise; without the penalty, 16%.

def orthogonal_penalty(W, off_diagonal=True):
    """|| W W^T * (1 - I) ||^2 of W (out, ...) -> scalar. (In the paper, filters are columns.)

    off_diagonal=False: the older || W W^T - I ||^2, which also wants filters of length 1."""
    W = W.flatten(1)                                # (filters, inputs)
    squared_lengths = W.square().sum(1)             # (filters,): the diagonal of W W^T
    if W.shape[0] <= W.shape[1]:
        target = squared_lengths if off_diagonal else torch.ones_like(squared_lengths)
        return (W @ W.T - torch.diag(target)).square().sum()
    # More filters than inputs: W^T W is smaller than A = W W^T, and has the same norm. (G's first
    # layer at 128 pixels has 24,576 filters of 20 inputs: 400 numbers instead of 604 million.)
    whole = (W.T @ W).square().sum()                # || A ||^2, with the diagonal
    if off_diagonal:
        return whole - squared_lengths.square().sum()
    return whole - 2 * squared_lengths.sum() + len(W)       # || A ||^2 - 2 tr A + || I ||^2


def orthogonal_regularisation(G):
    """The penalty, summed over all of G's layers with spectral norm."""
    return sum(orthogonal_penalty(layer.weight) for layer in matrix_layers(G).values())


# ----------------------------------------------- good samples: truncation, EMA, standing statistics
# Three things turn a trained G into good samples.
# 1. Truncation: components of z far from 0 are drawn again. Images get more typical, less varied.
# 2. EMA: draw with the average of G's weights over many steps.
# 3. Standing statistics: batch norm's mean and var are measured again, on images like those that
#    are to be drawn.

def truncated_normal(shape, threshold=math.inf, generator=None):
    """Normal noise whose components all lie within +-threshold (section 3.1). -> float32.

    The paper draws components again until they lie inside. Here uniform numbers u go through the
    inverse of the truncated normal's distribution function,
        z = sqrt(2) erfinv(u),   |u| <= erf(threshold / sqrt(2))
    which gives the same distribution without a loop. And the same seed gives the same noise at
    every threshold, only smaller."""
    require(threshold > 0, f"the truncation threshold must be above 0, not {threshold}")
    inside = math.erf(threshold / math.sqrt(2))     # the probability of lying within the threshold
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)       # in [0, 1)
    u = (2 * uniform - 1) * inside
    z = math.sqrt(2) * torch.erfinv(u)
    limit = min(threshold, 9)                       # without threshold, rand = 0 gives -infinity
    return z.clamp(-limit, limit).float()


class EMA:
    """A copy of G whose weights are an exponential moving average of G's (section 3, appendix C).

    G and D chase each other, so G circles around the equilibrium. The average of a circle is near
    its centre. (To average weights works as long as they are close to each other: then G depends on
    them almost linearly.) The copy is used for drawing only and never trained. Until step `start`
    it equals G, which at first improves so fast that an average would only lag behind."""

    def __init__(self, model, decay=0.9999, start=0):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.start = start

    def update(self, model, step):
        """Take in the weights of `model` after step number `step`, and its buffers, too.

        (Among these is spectral norm's u. Its average is too short: power iteration mends that.)"""
        newest_weight = 1 - self.decay if step > self.start else 1.0
        newest = model.state_dict()
        for name, average in self.model.state_dict().items():
            average.lerp_(newest[name], newest_weight)      # += newest_weight * (newest - average)


@torch.no_grad()
def standing_statistics(G, batches=16, batch_size=64, noise=truncated_normal):
    """Replace batch norm's running averages by the mean over batches of samples (appendix C).

    Running averages were taken in training: by other weights than those of an EMA, and of
    untruncated noise. Truncated noise has other moments, and images normalised by the wrong ones
    look washed out. So the noise must be that of the images to be drawn: noise(shape,
    generator=...). Classes are drawn uniformly. Several processes share the work, so all must call
    this. Leaves G in evaluation mode."""
    device = next(G.parameters()).device
    generator = torch.Generator().manual_seed(0)
    own = rows_of_standing_batch(batch_size)        # all rows, unless several processes share them
    norms = [m for m in G.eval().modules() if isinstance(m, Norm)]
    for norm in norms:
        norm.training = True                        # .train() would let its SNLinears change u
    for k in range(batches):
        for norm in norms:
            norm.momentum = 1 / (k + 1)             # makes the average the mean of k + 1 batches
        z = noise((batch_size, G.config.z_dim), generator=generator)
        y = torch.randint(G.config.n_classes, (batch_size,), generator=generator)
        G(z[own].to(device), y[own].to(device))
    for norm in norms:
        norm.momentum = Norm.momentum
    return G.eval()


# ==================================================================================================
# Part 2: beyond the recipe
# ==================================================================================================

# ------------------------------------------------------------------- other blocks, other batch norm
# BigGAN-deep (appendix B) has twice as many blocks, each a bottleneck: a 1x1 convolution to a
# quarter of the channels, two 3x3 convolutions there, a 1x1 convolution back. It is deeper, and yet
# smaller. Its shortcuts have (almost) no weights: they drop or add channels.

class DeepGBlock(nn.Module):
    """Keeps H and W, or doubles them if `up` (figure 16b). The shortcut drops the last channels."""

    def __init__(self, in_channels, out_channels, up, config):
        super().__init__()
        self.up = up
        self.out_channels = out_channels
        middle = in_channels // 4
        self.bn1 = conditional_norm(in_channels, config)
        self.conv1 = SNConv2d(in_channels, middle, 1)
        self.bn2 = conditional_norm(middle, config)
        self.conv2 = SNConv2d(middle, middle, 3)
        self.bn3 = conditional_norm(middle, config)
        self.conv3 = SNConv2d(middle, middle, 3)
        self.bn4 = conditional_norm(middle, config)
        self.conv4 = SNConv2d(middle, out_channels, 1)

    def forward(self, x, c):                        # (N, in, H, W), (N, c_dim)
        h = self.bn1(x, c).relu_()                  # (N, in, H, W)
        h = self.conv1(h)                           # (N, in/4, H, W)
        h = self.bn2(h, c).relu_()                  # (N, in/4, H, W)
        x = first_channels(x, self.out_channels)    # (N, out, H, W)
        if self.up:
            h = upsample_conv3x3(h, self.conv2)     # (N, in/4, 2H, 2W)
            x = upsample(x)                         # (N, out, 2H, 2W)
        else:
            h = self.conv2(h)
        h = self.bn3(h, c).relu_()                  # (N, in/4, 2H, 2W)
        h = self.conv3(h)                           # (N, in/4, 2H, 2W)
        h = self.bn4(h, c).relu_()                  # (N, in/4, 2H, 2W)
        return self.conv4(h) + x                    # (N, out, 2H, 2W)


def first_channels(x, n):                           # (N, C, H, W) -> (N, n, H, W)
    """x[:, :n]. Cut where channels come last, so that the gradient, too, has them last in memory.

    (Else all convolutions before it would compute their gradients in another layout, slower.)"""
    return x.permute(0, 2, 3, 1)[..., :n].permute(0, 3, 1, 2)


class DeepDBlock(nn.Module):
    """Keeps H and W, or halves them if `down` (figure 16c).

    Where the block has more channels than its input, a 1x1 convolution adds the missing ones to
    the shortcut."""

    def __init__(self, in_channels, out_channels, down, config):
        super().__init__()
        self.down = down
        middle = out_channels // 4
        missing = out_channels - in_channels
        self.conv1 = SNConv2d(in_channels, middle, 1)
        self.conv2 = SNConv2d(middle, middle, 3)
        self.conv3 = SNConv2d(middle, middle, 3)
        self.conv4 = SNConv2d(middle, out_channels, 1)
        self.conv_sc = None
        if missing:
            self.conv_sc = SNConv2d(in_channels, missing, 1)

    def forward(self, x):                           # (N, in, H, W)
        h = self.conv1(F.relu(x)).relu_()           # (N, out/4, H, W)
        h = self.conv2(h).relu_()                   # (N, out/4, H, W)
        h = self.conv3(h).relu_()                   # (N, out/4, H, W)
        if self.down:
            h = F.avg_pool2d(h, 2)                  # (N, out/4, H/2, W/2)
            x = F.avg_pool2d(x, 2)                  # (N, in, H/2, W/2)
        if self.conv_sc is not None:
            x = torch.cat([x, self.conv_sc(x)], dim=1)      # (N, out, H/2, W/2)
        return self.conv4(h) + x                    # (N, out, H/2, W/2)


class ClassBatchNorm(Norm):
    """Of SN-GAN and SAGAN: a table of gains and biases, one row per class, and no part of z."""

    def __init__(self, channels, n_classes, eps=1e-4):
        super().__init__(channels, eps)
        self.gain = nn.Embedding(n_classes, channels)
        self.bias = nn.Embedding(n_classes, channels)

    def forward(self, x, y):                        # (N, C, H, W), (N,) -> (N, C, H, W)
        return self.normalise(x, 1 + self.gain(y), self.bias(y))


# ------------------------------------------------------------------------------------- other losses
# For comparison. Under the hinge the best D is sign(p - q). Under the non-saturating loss it is
# log(p / q), and under least squares p / (p + q). Wasserstein's has no such formula. For a new
# loss, add a line to LOSSES. (train.py stops a run whose loss of D is between 0 and 0.02.)

def nonsaturating_loss_d(real_logits, fake_logits):
    """Mean -log p(real) - log(1 - p(fake)) with p = sigmoid(logit). Goodfellow et al. 2014."""
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def nonsaturating_loss_g(fake_logits):
    """Mean -log p(fake). (log(1 - p(fake)), as first proposed, is flat where D is sure.)"""
    return F.softplus(-fake_logits).mean()


def least_squares_loss_d(real_logits, fake_logits):
    """D wants real logits to be 1 and generated ones 0. Mao et al. 2017."""
    return ((real_logits - 1).square().mean() + fake_logits.square().mean()) / 2


def least_squares_loss_g(fake_logits):
    return (fake_logits - 1).square().mean() / 2


def wasserstein_loss_d(real_logits, fake_logits):
    """Mean generated logit minus mean real logit. Arjovsky et al. 2017.

    Nothing here keeps D from making its logits larger without end. `gradient_penalty` does."""
    return fake_logits.mean() - real_logits.mean()


# Name -> loss of D, loss of G, and the logit above which D takes an image for real.
LOSSES = {
    "hinge": (hinge_loss_d, hinge_loss_g, 0.0),
    "non-saturating": (nonsaturating_loss_d, nonsaturating_loss_g, 0.0),
    "least-squares": (least_squares_loss_d, least_squares_loss_g, 0.5),
    "wgan-gp": (wasserstein_loss_d, hinge_loss_g, None),        # only differences mean anything
}


# ----------------------------------------------------------------------------------- penalties on D
# They keep D's gradient with respect to the image small. Section 4.2 tries R1 against collapse
# (after long training, G's images suddenly become poor or alike, and stay so): it helps, at a price
# in quality. The penalty is itself made of a gradient, so D learns from a second derivative.

def squared_gradient_norm(D, x, y):
    """|d D(x, y) / dx|^2 of each image: x (N, 3, R, R), y (N,) -> (N,). Can be differentiated."""
    x = x.detach().requires_grad_()
    # Each logit depends on its own image only. So the gradient of their sum holds, at every image,
    # the gradient of that image's logit.
    gradient, = torch.autograd.grad(D(x, y).sum(), x, create_graph=True)
    return gradient.flatten(1).square().sum(1)


def r1_penalty(D, x, y):
    """1/2 E |d D(x, y) / dx|^2 over real images: makes D flat there. Mescheder et al. 2018.

    x (N, 3, R, R), y (N,) -> scalar. The weight gamma is left out; the paper tries 1 and 10."""
    return squared_gradient_norm(D, x, y).mean() / 2


def gradient_penalty(D, real, fake, y, mix):
    """E (|d D(x, y) / dx| - 1)^2 over images x on lines from real to generated ones of one class.

    mix (N,) says where on its line each x lies: 0 at the real end, 1 at the generated one.
    y (N,): the class of both. -> scalar. Gulrajani et al. 2017."""
    x = torch.lerp(real, fake, mix.reshape(-1, 1, 1, 1))
    norm = (squared_gradient_norm(D, x, y) + 1e-12).sqrt()      # the root of 0 has no derivative
    return (norm - 1).square().mean()


# ---------------------------------------------------------------------- augmentation for few images
# With few images, D learns them by heart, and G learns nothing more from D. Differentiable
# augmentation (Zhao et al. 2020, "DiffAugment") changes every image at random before D sees it:
# real and generated ones, in D's turn and in G's. Then D cannot learn the real ones by heart.
# Why the generated ones, too? If only real images were shifted, shifted images would look real, and
# G would learn to draw them. If all are, a G that draws shifted images gains nothing by it.
# Images are (N, 3, R, R) in [-1, 1]. r are random numbers in [0, 1): three for each image, for each
# kind of change.

def colour(x, r):
    """Brightness; saturation around each pixel's grey; contrast around the mean. r (N, 3)."""
    brightness, saturation, contrast = r.T.reshape(3, -1, 1, 1, 1)      # (N, 1, 1, 1) each
    x = x + brightness - 0.5                                # + [-0.5, 0.5)
    grey = x.mean(1, keepdim=True)                          # (N, 1, R, R)
    x = torch.lerp(grey, x, 2 * saturation)                 # * [0, 2)
    mean = x.mean((1, 2, 3), keepdim=True)                  # (N, 1, 1, 1)
    return torch.lerp(mean, x, contrast + 0.5)              # * [0.5, 1.5)


def translate(x, r):
    """Shift by up to an eighth of the side, up or down, left or right; grey comes in. r (N, 3)."""
    largest = (x.shape[-1] + 4) // 8                        # an eighth, rounded
    shifts = (r[:, :2] * (2 * largest + 1)).long() - largest        # (N, 2) whole pixels
    down = shift_matrix(shifts[:, 0], x)                    # (N, 1, R, R)
    right = shift_matrix(shifts[:, 1], x)
    return down @ x @ right.mT


def shift_matrix(shift, x):
    """S with S @ column = the column shifted by k pixels: ones where row - column = k. k (N,)."""
    line = torch.arange(x.shape[-1], device=x.device)
    return (line[:, None] - line == shift.view(-1, 1, 1, 1)).to(x.dtype)


def cutout(x, r):
    """Grey in a square of half the side, whose centre is anywhere in the image. r (N, 3)."""
    side = x.shape[-1]
    first = (r[:, :2] * (side + 1)).long() - side // 4      # (N, 2): the square's upper left corner
    distance = torch.arange(side, device=x.device) - first[..., None]       # (N, 2, R)
    inside = (distance >= 0) & (distance < side // 2)       # of rows and of columns
    square = inside[:, 0, :, None] & inside[:, 1, None, :]  # (N, R, R)
    return x.masked_fill(square[:, None], 0)


AUGMENTATIONS = {"colour": colour, "translation": translate, "cutout": cutout}


def augment(x, policy, r):
    """x after the changes that `policy` names, such as "translation,cutout". r (N, 3, 3)."""
    with torch.autocast(x.device.type, enabled=False):      # penalties need the gradient in float32
        for k, (name, change) in enumerate(AUGMENTATIONS.items()):
            if name in policy:
                x = change(x, r[:, k])
    return x


# -------------------------------------------------------------------- singular values (section 4.1)
# Before a run collapses, the largest singular value sigma_0 of some weights of G, its first layer's
# above all, grows faster and faster. (Spectral norm divides by it, so the images do not change with
# it.) One can watch it, or hold it down.

@torch.no_grad()
def singular_values(W, k=3):
    """The k largest singular values of W (out, ...), descending; NaN where W is not finite."""
    gram = smaller_gram(W.flatten(1))
    if not gram.isfinite().all():
        return gram.new_full((min(k, len(gram)),), math.nan)
    squares = torch.linalg.eigvalsh(gram).flip(0)[:k]       # eigvalsh sorts upwards
    return squares.clamp(min=0).sqrt()


def smaller_gram(W):
    """W W^T or W^T W. The eigenvalues of both are the squares of W's singular values."""
    return W @ W.T if W.shape[0] <= W.shape[1] else W.T @ W


def sigma_excess(W, fixed=None, ratio=None):
    """How far sigma_0 of W (out, ...) is above a goal: `fixed`, or `ratio` times the second value.

    Returns the excess, through which gradients reach W but not the goal, and the singular vectors
    u (out,) and v (everything else,)."""
    W = W.flatten(1)
    with torch.no_grad():
        # eigh raises an error for NaN, so it gets zeros for them. They still show in sigma_0 below.
        squares, vectors = torch.linalg.eigh(smaller_gram(W).nan_to_num(0, 0, 0))
        goal = fixed if fixed is not None else ratio * squares[-2].clamp(min=0).sqrt()
        u = vectors[:, -1]
        if len(W) > W.shape[1]:                     # it is a vector of W^T W, which is v
            u = W @ u
    sigma_0, u, v = power_iteration(W, u)
    return sigma_0 - goal, u, v


def sigma_pull(G, fixed=None, ratio=None):
    """The squared excess, summed over G's layers: pulls sigma_0 to its goal from both sides."""
    total = 0
    for layer in matrix_layers(G).values():
        excess, _, _ = sigma_excess(layer.weight, fixed, ratio)
        total = total + excess.square()
    return total


@torch.no_grad()
def clamp_sigma(G, fixed=None, ratio=None):
    """W <- W - max(0, excess) u v^T in every layer of G: lowers sigma_0 to its goal."""
    for layer in matrix_layers(G).values():
        excess, u, v = sigma_excess(layer.weight, fixed, ratio)
        change = excess.clamp(min=0) * torch.outer(u, v)
        layer.weight -= change.view_as(layer.weight)


def scaled_normal(shape, scale, generator=None):
    """What the published BigGAN-deep weights call truncation: noise cut at 2, times `scale`."""
    return scale * truncated_normal(shape, 2.0, generator)


# ==================================================================================================
# Part 3: the same numbers, faster, and on many GPUs
# ==================================================================================================

# ------------------------------------------------------------------------------------ batch moments

def processes():
    """How many processes train together, one per GPU."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    """Which of them this one is, counted from 0."""
    return dist.get_rank() if processes() > 1 else 0


class Moments(torch.autograd.Function):
    """Mean and variance of each channel over the batch. (N, C, H, W) -> (C,), (C,) float32.

    The derivative is written out, as that is one pass over x instead of the many that autograd
    would record. With n = N H W numbers per channel:
        d mean / d x = 1 / n            d var / d x = 2 (x - mean) / n

    Cross-replica batch norm (appendix C): several processes each hold an equal part of the batch,
    and the moments are those of all of it. So the loss of every process depends on the images of
    every other: backward adds up the gradients of all losses by the moments. After that,
    DistributedDataParallel takes the mean over the processes. The sum here and the mean there
    make the gradient of the mean loss, the same that one process would find for the whole batch."""

    @staticmethod
    def forward(ctx, x):
        full = precise(x)
        if x.is_cuda:
            var, mean = torch.var_mean(full, (0, 2, 3), correction=0)
        else:                                       # on a CPU, four times as fast
            mean = full.mean((0, 2, 3))
            if full is x:
                centred = full - per_channel(mean)
            else:                                   # a copy, which may be overwritten
                centred = full.sub_(per_channel(mean))
            var = centred.square_().mean((0, 2, 3))
        if processes() > 1:
            mean, var = moments_of_all(mean, var)
        ctx.save_for_backward(x, mean)
        return mean, var

    @staticmethod
    def backward(ctx, grad_mean, grad_var):
        x, mean = ctx.saved_tensors
        grads = torch.stack([grad_mean, grad_var])
        if processes() > 1:
            dist.all_reduce(grads)                  # the sum over the losses of all processes
        grad_mean, grad_var = grads
        n = processes() * x.numel() // x.shape[1]
        # grad_mean / n + grad_var * 2 (x - mean) / n, sorted as offset + factor * x.
        factor = 2 * grad_var / n
        offset = grad_mean / n - factor * mean
        factor = per_channel(factor).to(x.dtype)
        offset = per_channel(offset).to(x.dtype)
        return torch.addcmul(offset, x, factor)


def moments_of_all(mean, var):
    """Moments of each process's part -> those of the whole: (C,), (C,) -> (C,), (C,).

    The variance of the whole is the mean of the variances plus the variance of the means."""
    own = torch.stack([mean, var])
    parts = [torch.empty_like(own) for _ in range(processes())]
    dist.all_gather(parts, own)
    means, variances = torch.stack(parts, dim=1)            # (processes, C) each
    mean = means.mean(0)
    var = (variances + (means - mean).square()).mean(0)
    return mean, var


def rows_of_standing_batch(batch_size):
    """This process's rows of a batch, or all rows if they cannot be shared equally."""
    if batch_size % processes() == 0:
        return slice(rank(), None, processes())
    return slice(None)


# ------------------------------------------------------------- resampling folded into a convolution
# G doubles the image by repeating each pixel, then convolves. D convolves, then averages 2x2
# pixels. Both waste work: repeated pixels are multiplied more than once, and four outputs are
# computed for each one that is kept. A small example in one dimension, with the kernel (a, b, c):
#
#     convolve   p = a x0 + b x1 + c x2   and its neighbour   q = a x1 + b x2 + c x3
#     average    (p + q) / 2 = (a x0 + (a + b) x1 + (b + c) x2 + c x3) / 2
#
# which is one convolution with stride 2, whose kernel (a, a + b, b + c, c) / 2 is the mean of the
# old one in both places, (a, b, c, 0) and (0, a, b, c). In two dimensions a 3x3 kernel becomes a
# 4x4 kernel, the mean of the old one in its four corners: 16 products for each small pixel instead
# of 36. Repeating and convolving is the transpose of that, with the sum instead of the mean.

def mean_of_four_shifted(W):
    """(out, in, 3, 3) -> (out, in, 4, 4): the mean of W placed in each corner, a 2x2 average."""
    return F.avg_pool2d(W, 2, stride=1, padding=1)


def conv3x3_downsample(x, layer):
    """The 3x3 convolution `layer`, then 2x2 averages. x (N, in, H, W) -> (N, out, H/2, W/2)."""
    W = mean_of_four_shifted(normalized_weight(layer))      # (out, in, 4, 4)
    return F.conv2d(x, W, layer.bias, stride=2, padding=1)


def upsample_conv3x3(x, layer):
    """Doubling, then the 3x3 convolution `layer`. x (N, in, H, W) -> (N, out, 2H, 2W)."""
    # For few pixels, making the large kernel costs more than it saves: measured on a CPU.
    if x.numel() < layer.weight.numel() / 8:
        return layer(upsample(x))
    # A transposed convolution reads its kernel backwards, and wants it as (in, out, 4, 4).
    W = normalized_weight(layer).flip(2, 3).transpose(0, 1)
    W = W.contiguous(memory_format=torch.channels_last)
    W = mean_of_four_shifted(4 * W)                         # four times the mean is the sum
    h = F.conv_transpose2d(x, W, stride=2, padding=1)       # (N, out, 2H, 2W)
    # Inside conv_transpose2d, on a CPU, the bias's gradient would cost more than all else.
    return h.add_(per_channel(layer.bias.to(h.dtype)))


# -------------------------------------------------------------------- fused attention, folded sigma

def fused_attention(query, key, value):
    """`attention` by torch's GPU kernel, which never stores (N, L, M). No second derivative."""
    # It wants vectors of equal length. Added zeros change no product.
    missing = value.shape[2] - query.shape[2]
    query = F.pad(query, (0, missing))
    key = F.pad(key, (0, missing))
    h = F.scaled_dot_product_attention(             # it wants a dimension for heads: there is one
        query[:, None], key[:, None], value[:, None], scale=1.0
    )
    return h[:, 0]


@torch.no_grad()
def fold_spectral_norm(network):
    """Divide each weight by its sigma, and switch spectral norm off: the same output, sooner.

    For a network that is not trained any more."""
    for layer in matrix_layers(network).values():
        layer.weight.copy_(normalized_weight(layer))
        layer.eps = None
    return network

