"""The U-Net of Ronneberger, Fischer and Brox (2015), arXiv:1505.04597, figure 1.

Differences from the paper, both usual today: 3x3 convolutions are padded, so that the output is as large as the input,
and each is followed by batch normalisation (Ioffe and Szegedy, 2015).

    from unet import UNet
    net = UNet(n_channels=1, n_classes=1, bilinear=False)   # 31,042,369 parameters
    logits = net(images)                                    # (N, 1, H, W) -> (N, 1, H, W)

Shapes in the comments are for b = base_channels; H, W stand for the side at the finest level.
"""

import common.quiet  # noqa: F401  OneFlow, without its noise and its handler of Ctrl-C

import oneflow as flow
from oneflow import nn
from oneflow.nn import functional as F

MIN_SIDE = 16  # four poolings halve a side four times


# Modules, since cpu_kernels/layers.py computes each of them its own way: who changes one changes it there too.


class Dropout(nn.Module):
    """Sets a share p of the numbers to 0 in training and divides the rest by 1 - p.

    Not nn.Dropout, which draws the same numbers for every seed and in every layer.
    """

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        return F.dropout(x, self.p) if self.training and self.p else x


class PadTo(nn.Module):
    """Zeros around x up to the sides of skip: pooling dropped the last row or column of an odd side."""

    def forward(self, x, skip):
        missing_h, missing_w = (skip.shape[i] - x.shape[i] for i in (2, 3))
        if not (missing_h or missing_w):
            return x
        left, top = missing_w // 2, missing_h // 2
        return F.pad(x, (left, missing_w - left, top, missing_h - top))


class Cat(nn.Module):
    """One or more inputs behind each other along the channels."""

    def forward(self, *parts):
        return flow.cat(parts, dim=1) if len(parts) > 1 else parts[0]


class DoubleConv(nn.Module):
    """(3x3 convolution, batch normalisation, ReLU) twice; (N, in, H, W) -> (N, out, H, W).

    Several inputs are concatenated; their channels add up to `in`.
    """

    def __init__(self, in_channels, out_channels, mid_channels=None):
        super().__init__()
        mid_channels = mid_channels or out_channels
        self.cat = Cat()
        self.double_conv = nn.Sequential(
            nn.Conv2d(in_channels, mid_channels, kernel_size=3, padding=1),
            nn.BatchNorm2d(mid_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(mid_channels, out_channels, kernel_size=3, padding=1),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )

    def forward(self, *parts):
        return self.double_conv(self.cat(*parts))


class Down(nn.Module):
    """2x2 max-pooling, then DoubleConv; (N, in, H, W) -> (N, out, H // 2, W // 2)."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.maxpool_conv = nn.Sequential(nn.MaxPool2d(2), DoubleConv(in_channels, out_channels))

    def forward(self, x):
        return self.maxpool_conv(x)


class Up(nn.Module):
    """Doubles the sides, puts the skip connection in front, then DoubleConv.

    `in_channels` counts the channels after the concatenation: half of them come from the skip. The transposed
    convolution halves the channels itself. Bilinear upsampling can't: there the level below has in_channels // 2.
    """

    def __init__(self, in_channels, out_channels, bilinear=True):
        super().__init__()
        if bilinear:
            self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
            self.conv = DoubleConv(in_channels, out_channels, in_channels // 2)
        else:
            self.up = nn.ConvTranspose2d(in_channels, in_channels // 2, kernel_size=2, stride=2)
            self.conv = DoubleConv(in_channels, out_channels)
        self.pad = PadTo()

    def forward(self, x, skip):
        return self.conv(skip, self.pad(self.up(x), skip))


class OutConv(nn.Module):
    """1x1 convolution to the logits; (N, in, H, W) -> (N, out, H, W)."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=1)

    def forward(self, x):
        return self.conv(x)


class UNet(nn.Module):
    """Image (N, n_channels, H, W), float32 -> logits (N, n_classes, H, W), float32.

    H and W are any numbers from 16 up. P(class) is sigmoid(logit), which is left to the caller: the loss wants logits.

    n_channels: channels of the image, 1 for an electron micrograph.
    n_classes: channels of the output, 1 for interior against membrane.
    bilinear: upsample by interpolation (True) or by a learned 2x2 transposed convolution (False, the paper's way). The
        bilinear net's levels hand half as many channels to the level above; its deepest level has 8b instead of 16b.
    base_channels: b, the width of the first level; the levels have b, 2b, 4b, 8b, 16b channels.
    dropout: the share of numbers that training sets to 0 after each of the two deepest levels.

    Raises ValueError for an input with a side under 16 pixels.
    """

    def __init__(self, n_channels, n_classes, bilinear=True, base_channels=64, dropout=0.0):
        super().__init__()
        self.n_channels = n_channels
        self.n_classes = n_classes
        self.bilinear = bilinear
        self.base_channels = b = base_channels
        self.dropout = Dropout(dropout)
        half = 2 if bilinear else 1
        self.inc = DoubleConv(n_channels, b)
        self.down1 = Down(b, 2 * b)
        self.down2 = Down(2 * b, 4 * b)
        self.down3 = Down(4 * b, 8 * b)
        self.down4 = Down(8 * b, 16 * b // half)
        self.up1 = Up(16 * b, 8 * b // half, bilinear)
        self.up2 = Up(8 * b, 4 * b // half, bilinear)
        self.up3 = Up(4 * b, 2 * b // half, bilinear)
        self.up4 = Up(2 * b, b, bilinear)
        self.outc = OutConv(b, n_classes)

    def forward(self, x):
        if min(x.shape[2:]) < MIN_SIDE:
            # OneFlow would abort the process in the fourth pooling.
            size = f"{x.shape[2]} x {x.shape[3]}"
            raise ValueError(
                f"{size} pixels are too small for this U-Net: both sides must be at least {MIN_SIDE} pixels"
            )
        x1 = self.inc(x)  # (N, b, H, W)
        x2 = self.down1(x1)  # (N, 2b, H/2, W/2)
        x3 = self.down2(x2)  # (N, 4b, H/4, W/4)
        x4 = self.dropout(self.down3(x3))  # (N, 8b, H/8, W/8)
        x5 = self.dropout(self.down4(x4))  # (N, 16b or 8b, H/16, W/16)
        x = self.up1(x5, x4)  # (N, 8b or 4b, H/8, W/8)
        x = self.up2(x, x3)  # (N, 4b or 2b, H/4, W/4)
        x = self.up3(x, x2)  # (N, 2b or b, H/2, W/2)
        x = self.up4(x, x1)  # (N, b, H, W)
        return self.outc(x)  # (N, n_classes, H, W)
