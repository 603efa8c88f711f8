"""The U-Net of Ronneberger, Fischer and Brox (2015), arXiv:1505.04597, figure 1, with two changes that are usual today:
padding, so that the output is as large as the input, and batch normalisation (Ioffe and Szegedy, 2015). The paper's is
UNet(n_channels=1, n_classes=1, bilinear=False), of 31,042,369 parameters. In the comments b is base_channels; H and W
are the sides at the finest level."""

import common.quiet  # noqa: F401  OneFlow, without its noise and its handler of Ctrl-C

import oneflow as flow
from oneflow import nn

MIN_SIDE = 16  # four poolings halve a side four times


# Modules, since cpu_kernels/layers.py computes each layer its own way: who changes one changes it there too.
class Dropout(nn.Module):
    """Sets a share p to 0 in training. Not nn.Dropout, which draws the same ones for every seed and every layer."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        return nn.functional.dropout(x, self.p) if self.training and self.p else x


class Join(nn.Module):
    """Puts skip in front of x, which gets the row or column of zeros that pooling dropped from an odd side."""

    def forward(self, skip, x):
        rows, columns = (skip.shape[i] - x.shape[i] for i in (2, 3))  # 0 or 1
        x = nn.functional.pad(x, (0, columns, 0, rows)) if rows or columns else x
        return flow.cat((skip, x), dim=1)


class DoubleConv(nn.Module):
    """(3x3 convolution, batch normalisation, ReLU) twice; (N, in, H, W) -> (N, out, H, W)."""

    def __init__(self, in_channels, out_channels, mid_channels=None):
        super().__init__()
        mid_channels = mid_channels or out_channels
        self.double_conv = nn.Sequential(
            nn.Conv2d(in_channels, mid_channels, kernel_size=3, padding=1),
            nn.BatchNorm2d(mid_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(mid_channels, out_channels, kernel_size=3, padding=1),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )

    def forward(self, x):
        return self.double_conv(x)


class Down(nn.Module):
    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.maxpool_conv = nn.Sequential(nn.MaxPool2d(2), DoubleConv(in_channels, out_channels))

    def forward(self, x):
        return self.maxpool_conv(x)  # (N, in, H, W) -> (N, out, H // 2, W // 2)


class Up(nn.Module):
    """Doubles the sides of x, puts the skip connection in front, then DoubleConv. Of the in_channels half are the
    skip's: the transposed convolution halves those of x, for bilinear upsampling the level below has half as many."""

    def __init__(self, in_channels, out_channels, bilinear=True):
        super().__init__()
        upsample = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        self.up = upsample if bilinear else nn.ConvTranspose2d(in_channels, in_channels // 2, kernel_size=2, stride=2)
        self.join = Join()
        self.conv = DoubleConv(in_channels, out_channels, in_channels // 2)

    def forward(self, x, skip):
        return self.conv(self.join(skip, self.up(x)))


class OutConv(nn.Module):
    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=1)

    def forward(self, x):
        return self.conv(x)  # (N, in, H, W) -> (N, out, H, W)


class UNet(nn.Module):
    """Images (N, n_channels, H, W), float32 -> logits (N, n_classes, H, W), float32; ValueError for a side under 16.
    P(class) is sigmoid(logit), left to the caller: the loss wants logits. Levels have b, 2b, 4b, 8b, 16b channels.
    bilinear: upsample by interpolation, not by transposed convolutions (the paper's way); each level then hands half
    as many channels up, the deepest has 8b. dropout: the share of the two deepest levels that training sets to 0."""

    def __init__(self, n_channels, n_classes, bilinear=True, base_channels=64, dropout=0.0):
        super().__init__()
        self.n_channels, self.n_classes, self.bilinear = n_channels, n_classes, bilinear
        self.base_channels = b = base_channels
        half = 2 if bilinear else 1
        self.inc = DoubleConv(n_channels, b)
        self.down1 = Down(b, 2 * b)
        self.down2 = Down(2 * b, 4 * b)
        self.down3 = Down(4 * b, 8 * b)
        self.down4 = Down(8 * b, 16 * b // half)
        self.dropout = Dropout(dropout)
        self.up1 = Up(16 * b, 8 * b // half, bilinear)
        self.up2 = Up(8 * b, 4 * b // half, bilinear)
        self.up3 = Up(4 * b, 2 * b // half, bilinear)
        self.up4 = Up(2 * b, b, bilinear)
        self.outc = OutConv(b, n_classes)

    def forward(self, x):
        if min(x.shape[2:]) < MIN_SIDE:  # OneFlow would abort the process in the fourth pooling
            raise ValueError(f"{tuple(x.shape[2:])} are too small, this U-Net's sides need at least {MIN_SIDE} pixels")
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
